//! Which timesteps and noise levels a sampler visits: the grids of `diffusers` 0.42.1, number for number.
//!
//! Spacing: arXiv 2305.08891, table 2. Karras levels: arXiv 2206.00364, eq. 5. The grids of NumPy (`linspace`, `arange`,
//! `interp`) are redone in f64 and rounded where `diffusers` rounds, because the UNet sees the result.

use tch::Tensor;

use crate::diffusion::noise::{DEFAULT_BETAS, SchedulerConfig};
use crate::platform::choice::{Choice, Named, named};
use crate::platform::host;
use crate::{Error, Result};

/// How timesteps are spread over the training range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spacing {
    /// Evenly, with both ends
    Linspace,
    /// Evenly, from the clean end
    Leading,
    /// Evenly, from the noisy end
    Trailing,
}

impl Choice for Spacing {
    const CHOICES: &'static [Named<Self>] = &[
        named(Self::Linspace, "linspace", &[], "Evenly, with both ends"),
        named(Self::Leading, "leading", &[], "Evenly, from the clean end"),
        named(Self::Trailing, "trailing", &[], "Evenly, from the noisy end"),
    ];
}

impl Spacing {
    /// As a scheduler's config spells it.
    pub fn name(self) -> &'static str {
        self.word()
    }
}

/// What a class does with `rescale_betas_zero_snr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ZeroSnr {
    Ignored,
    /// The last a_t is 0.
    Exact,
    /// The last a_t is raised to 2^-24, so that its noise level is finite (4096).
    Floored,
}

/// What a `diffusers` class makes of a config: its defaults, and the keys it knows beyond those that all know.
#[derive(Debug)]
pub(super) struct Class {
    pub(super) betas: (f64, f64),
    pub(super) spacing: Spacing,
    pub(super) zero_snr: ZeroSnr,
    /// Honours `use_karras_sigmas`.
    pub(super) karras: bool,
    /// Honours `final_sigmas_type`.
    pub(super) final_sigma: bool,
    /// Karras levels that do not end at 0 end at their own least level, not at that of the training.
    pub(super) karras_ends_itself: bool,
    /// Settings of this class that we do not have.
    pub(super) refused: &'static [&'static str],
}

pub(super) const DDIM: Class = Class {
    betas: DEFAULT_BETAS,
    spacing: Spacing::Leading,
    zero_snr: ZeroSnr::Exact,
    karras: false,
    final_sigma: false,
    karras_ends_itself: false,
    refused: &["thresholding"],
};

pub(super) const PNDM: Class = Class { zero_snr: ZeroSnr::Ignored, refused: &[], ..DDIM };

pub(super) const EULER: Class = Class {
    betas: DEFAULT_BETAS,
    spacing: Spacing::Linspace,
    zero_snr: ZeroSnr::Floored,
    karras: true,
    final_sigma: true,
    karras_ends_itself: false,
    refused: &["use_exponential_sigmas", "use_beta_sigmas"],
};

pub(super) const EULER_ANCESTRAL: Class = Class { karras: false, final_sigma: false, refused: &[], ..EULER };

pub(super) const HEUN: Class =
    Class { betas: (0.00085, 0.012), zero_snr: ZeroSnr::Ignored, final_sigma: false, ..EULER };

pub(super) const DPM: Class = Class {
    refused: &[
        "thresholding",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_lu_lambdas",
        "use_flow_sigmas",
        "variance_type",
    ],
    ..EULER
};

pub(super) const UNIPC: Class = Class {
    karras_ends_itself: true,
    refused: &[
        "thresholding",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_flow_sigmas",
        "use_dynamic_shifting",
        "solver_p",
    ],
    ..EULER
};

/// A config as one class reads it: the noise table, and how timesteps are spread.
pub(super) struct TimestepGrid {
    /// a_t for every training timestep.
    pub(super) alphas_cumprod: Vec<f32>,
    pub(super) spacing: Spacing,
    offset: usize,
}

impl TimestepGrid {
    /// Reads `config` for `steps` steps. Errors: a setting that this class has and we do not, or a number of steps
    /// outside 1 to `num_train_timesteps`.
    pub(super) fn new(class: &Class, config: &SchedulerConfig, steps: usize) -> Result<Self> {
        if let Some(key) = class.refused.iter().find(|key| config.is_set(key)) {
            return Err(config
                .problem(format!("{key}: this setting is not supported"))
                .with_hint("try another sampler"));
        }
        let alphas_cumprod = config.alphas_cumprod(class.betas, class.zero_snr != ZeroSnr::Ignored)?;
        let mut alphas_cumprod = host::values::<f32>(&alphas_cumprod)?;
        if class.zero_snr == ZeroSnr::Floored
            && config.flag("rescale_betas_zero_snr", false)?
            && let Some(last) = alphas_cumprod.last_mut()
        {
            *last = 2f32.powi(-24);
        }
        if !(1..=alphas_cumprod.len()).contains(&steps) {
            let most = alphas_cumprod.len();
            return Err(Error::config(format!(
                "steps: expected 1 to {most}, the timesteps of the model, found {steps}"
            )));
        }
        let words = [Spacing::Linspace, Spacing::Leading, Spacing::Trailing].map(|s| (s.name(), s));
        let spacing = config.choice("timestep_spacing", class.spacing, &words)?;
        let (offset, train) = (config.count("steps_offset", 0)?, alphas_cumprod.len());
        if offset > train {
            return Err(config.problem(format!("steps_offset: expected 0 to {train}, found {offset}")));
        }
        Ok(Self { alphas_cumprod, spacing, offset })
    }

    /// The training timesteps (`num_train_timesteps`).
    pub(super) fn train(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// `steps` timesteps from noise to image, the last near 0; `linspace` ones are fractions.
    pub(super) fn timesteps(&self, steps: usize) -> Vec<f64> {
        let train = self.train();
        match self.spacing {
            Spacing::Linspace => reversed(linspace(train - 1, steps)),
            Spacing::Leading => self.leading(0..steps, train / steps),
            Spacing::Trailing => trailing(train, train as f64 / steps as f64),
        }
    }

    /// `steps` timesteps of the multistep solvers: a grid with one more point, whose last is left to the final noise
    /// level; whole numbers. `last`, 1 or more, is the end of the range, `num_train_timesteps` unless the config cuts it.
    pub(super) fn solver_timesteps(&self, steps: usize, last: usize) -> Vec<f64> {
        let whole = |t: f64| t.round_ties_even();
        match self.spacing {
            Spacing::Linspace => {
                let mut grid = reversed(linspace(last - 1, steps + 1));
                grid.pop();
                grid.into_iter().map(whole).collect()
            }
            Spacing::Leading => self.leading(1..steps + 1, last / (steps + 1)),
            Spacing::Trailing => trailing(last, self.train() as f64 / steps as f64),
        }
    }

    /// a_t of timestep `t`. Errors where the grid left the table, which `diffusers` meets as an index error or, for -1,
    /// as the a_t of pure noise.
    pub(super) fn alpha(&self, t: i64) -> Result<f32> {
        let found = usize::try_from(t).ok().and_then(|t| self.alphas_cumprod.get(t));
        found.copied().ok_or_else(|| {
            Error::config(format!(
                "steps: this number of steps asks for timestep {t}, but the model has 0 to {}",
                self.train() - 1
            ))
            .with_hint("a few steps fewer give another grid")
        })
    }

    fn leading(&self, indices: std::ops::Range<usize>, ratio: usize) -> Vec<f64> {
        indices.rev().map(|i| (i * ratio + self.offset) as f64).collect()
    }
}

/// `numpy.linspace(0, stop, points)`.
fn linspace(stop: usize, points: usize) -> Vec<f64> {
    let step = stop as f64 / (points as f64 - 1.0);
    let mut line: Vec<f64> = (0..points).map(|i| if i == 0 { 0.0 } else { i as f64 * step }).collect();
    if points > 1 {
        line[points - 1] = stop as f64;
    }
    line
}

/// `numpy.arange(last, 0, -ratio)`, rounded, minus 1. Rounding errors can give NumPy one timestep more, -1; so be it.
fn trailing(last: usize, ratio: f64) -> Vec<f64> {
    let last = last as f64;
    let len = (last / ratio).ceil() as usize;
    // NumPy steps by the difference of the first two values, not by `ratio`.
    let step = (last - ratio) - last;
    (0..len).map(|i| (last + i as f64 * step).round_ties_even() - 1.0).collect()
}

fn reversed(mut line: Vec<f64>) -> Vec<f64> {
    line.reverse();
    line
}

/// The noise levels sigma = sqrt((1 - a) / a) of the training timesteps.
pub(super) struct Levels {
    table: Vec<f32>,
}

impl Levels {
    pub(super) fn new(alphas_cumprod: &[f32]) -> Result<Self> {
        let alphas = host::tensor(alphas_cumprod);
        let ratio = alphas.rsub_scalar(1.0) / alphas;
        Ok(Self { table: host::values(&ratio.sqrt())? })
    }

    /// sigma at a timestep between two training timesteps (`numpy.interp`).
    pub(super) fn at(&self, t: f64) -> f64 {
        let last = self.table.len() - 1;
        let t = t.clamp(0.0, last as f64);
        let low = (t as usize).min(last.saturating_sub(1));
        let (a, b) = (f64::from(self.table[low]), f64::from(self.table[(low + 1).min(last)]));
        (b - a) * (t - low as f64) + a
    }

    /// The least level, which `final_sigmas_type` can make the last one.
    pub(super) fn least(&self) -> f32 {
        self.table[0]
    }

    /// The greatest and the least level.
    pub(super) fn range(&self) -> (f64, f64) {
        (f64::from(self.table[self.table.len() - 1]), f64::from(self.table[0]))
    }

    /// The (fractional) training timestep of a level, by interpolating log sigma.
    pub(super) fn timestep(&self, sigma: f64) -> f64 {
        let log_sigma = sigma.max(1e-10).ln();
        let below = |&s: &f32| log_sigma >= f64::from(s.ln());
        let low = self.table.iter().rposition(below).unwrap_or(0).min(self.table.len().saturating_sub(2));
        let (a, b) = (self.table[low].ln(), self.table[(low + 1).min(self.table.len() - 1)].ln());
        let weight = ((f64::from(a) - log_sigma) / f64::from(a - b)).clamp(0.0, 1.0);
        (1.0 - weight) * low as f64 + weight * (low + 1) as f64
    }
}

/// `steps` levels from `max` to `min`, even in sigma^(1/7) (arXiv 2206.00364, eq. 5). The config's `sigma_min` and
/// `sigma_max` go before the range given.
pub(super) fn karras(config: &SchedulerConfig, (max, min): (f64, f64), steps: usize) -> Result<Vec<f64>> {
    const RHO: f64 = 7.0;
    let max = config.optional_number("sigma_max")?.unwrap_or(max).powf(1.0 / RHO);
    let min = config.optional_number("sigma_min")?.unwrap_or(min).powf(1.0 / RHO);
    let ramp = linspace(1, steps).into_iter();
    Ok(ramp.map(|r| (max + r * (min - max)).powf(RHO)).collect())
}

/// Whether the last level is the least level of training and not 0 (`final_sigmas_type`).
pub(super) fn ends_above_zero(config: &SchedulerConfig) -> Result<bool> {
    config.choice("final_sigmas_type", false, &[("zero", false), ("sigma_min", true)])
}

/// Errors where `diffusers` loses its place: it looks the first timestep up in the grid, finds it twice, starts at the
/// second and runs off the end.
pub(super) fn check_start(timesteps: &[f64]) -> Result<()> {
    if timesteps.iter().filter(|t| **t == timesteps[0]).count() == 1 {
        return Ok(());
    }
    Err(Error::config(format!(
        "steps: {} steps are too many for this sampler, whose first timestep {} comes twice",
        timesteps.len(),
        timesteps[0]
    ))
    .with_hint("take fewer steps"))
}

/// Errors where the factors of the step at `timestep` are not finite, which would fill the image with NaN.
pub(super) fn check_factors(timestep: f64, factors: &[f32]) -> Result<()> {
    if factors.iter().all(|f| f.is_finite()) {
        return Ok(());
    }
    Err(Error::config(format!(
        "sampler: the step at timestep {timestep} would divide by zero with this scheduler config"
    ))
    .with_hint("take fewer steps or another sampler"))
}

/// The square root as libtorch takes it on the CPU, by a vector library whose last bit need not be that of `f32::sqrt`.
/// At zero terminal SNR that bit of the first level moves the image by 1e-4, and over many steps it adds up.
pub(super) fn root(x: f32) -> Result<f32> {
    Ok(host::number(&host::scalar(f64::from(x), tch::Kind::Float).sqrt()) as f32)
}

/// `x * factor` with a factor that was computed in f32.
pub(super) fn scaled(x: &Tensor, factor: f32) -> Tensor {
    x * f64::from(factor)
}
