//! DPM-Solver++ 2M: arXiv 2211.01095, algorithm 2, on data predictions; and the path and half-log-SNR arithmetic that
//! UniPC shares.

use tch::Tensor;

use crate::Result;
use crate::diffusion::noise::{Prediction, SchedulerConfig};
use crate::diffusion::sampler::Denoising;
use crate::diffusion::sampler::schedule::{
    Class, DPM, Levels, TimestepGrid, check_factors, check_start, ends_above_zero, karras, root, scaled,
};

/// The last step is of first order below this number of steps (`lower_order_final`).
const FEW_STEPS: usize = 15;

/// One noise level in the variance-preserving form x = alpha x_0 + sigma e, and lambda = ln(alpha / sigma).
#[derive(Debug, Clone, Copy)]
pub(super) struct NoiseLevel {
    pub(super) alpha: f32,
    pub(super) sigma: f32,
    pub(super) lambda: f32,
}

impl NoiseLevel {
    /// From the variance-exploding level; 0 gives lambda = infinity.
    pub(super) fn new(sigma: f32) -> Result<Self> {
        let alpha = 1.0 / root(sigma * sigma + 1.0)?;
        let sigma = sigma * alpha;
        Ok(Self { alpha, sigma, lambda: alpha.ln() - sigma.ln() })
    }

    /// The clean latents that the model's answer at `x` stands for.
    pub(super) fn denoised(&self, prediction: Prediction, x: &Tensor, out: Tensor) -> Tensor {
        match prediction {
            Prediction::Epsilon => (x - scaled(&out, self.sigma)) / f64::from(self.alpha),
            Prediction::Velocity => scaled(x, self.alpha) - scaled(&out, self.sigma),
            Prediction::Sample => out,
        }
    }
}

/// The timesteps of a multistep solver and its levels, one more than timesteps.
pub(super) struct Path {
    pub(super) timesteps: Vec<f64>,
    pub(super) levels: Vec<NoiseLevel>,
    pub(super) ends_at_zero: bool,
}

/// The path of `class`. Karras' levels are taken where the sampler's name (`force_karras`) or the config says so; of the
/// others, those with a lambda below `lambda_min` are left out.
pub(super) fn path(
    class: &Class,
    config: &SchedulerConfig,
    steps: usize,
    force_karras: bool,
    lambda_min: f64,
) -> Result<Path> {
    let grid = TimestepGrid::new(class, config, steps)?;
    let table = Levels::new(&grid.alphas_cumprod)?;
    let is_karras = force_karras || config.flag("use_karras_sigmas", false)?;
    let (timesteps, sigmas): (Vec<f64>, Vec<f64>) = if is_karras {
        let sigmas = karras(config, table.range(), steps)?;
        (sigmas.iter().map(|s| table.timestep(*s).round_ties_even()).collect(), sigmas)
    } else {
        let timesteps = grid.solver_timesteps(steps, end(&grid, config, lambda_min)?);
        let sigmas = timesteps.iter().map(|t| table.at(*t)).collect();
        (timesteps, sigmas)
    };
    check_start(&timesteps)?;
    let ends_at_zero = !ends_above_zero(config)?;
    let mut sigmas: Vec<f32> = sigmas.into_iter().map(|s| s as f32).collect();
    let least = if is_karras && class.karras_ends_itself { sigmas[sigmas.len() - 1] } else { table.least() };
    sigmas.push(if ends_at_zero { 0.0 } else { least });
    let levels = sigmas.into_iter().map(NoiseLevel::new).collect::<Result<_>>()?;
    Ok(Path { timesteps, levels, ends_at_zero })
}

/// How many timesteps have a lambda of `lambda_min` or more; lambda falls with the timestep.
fn end(grid: &TimestepGrid, config: &SchedulerConfig, lambda_min: f64) -> Result<usize> {
    let lambda = |a: f32| f64::from(a.sqrt().ln() - (1.0 - a).sqrt().ln());
    match grid.alphas_cumprod.iter().rposition(|a| lambda(*a) >= lambda_min) {
        Some(last) => Ok(last + 1),
        None => Err(config.problem(format!(
            "lambda_min_clipped: expected a bound that leaves timesteps, found {lambda_min}, which leaves none"
        ))),
    }
}

/// x' = of_x x + of_clean D0 + of_slope (1 / r) (D0 - D1), with D0 and D1 the clean latents predicted now and before.
#[derive(Debug)]
pub(super) struct SolverStep {
    timestep: f64,
    level: NoiseLevel,
    of_x: f32,
    of_clean: f32,
    /// `of_slope` and 1 / r; none in steps of first order.
    second_order: Option<(f32, f32)>,
}

impl SolverStep {
    /// Factors of clean latents and of noise where this step begins.
    pub(super) fn level(&self) -> (f32, f32) {
        (self.level.alpha, self.level.sigma)
    }
}

/// The first step of the plan is of first order, wherever `skip` makes it start.
pub(super) fn plan(
    config: &SchedulerConfig,
    steps: usize,
    skip: usize,
    force_karras: bool,
) -> Result<Vec<SolverStep>> {
    let same = [("dpmsolver++", ()), ("deis", ())];
    config.choice("algorithm_type", (), &same)?;
    let order = config.count("solver_order", 2)?;
    if !(1..=2).contains(&order) {
        return Err(config.problem(format!("solver_order: dpm++2m expects 1 or 2, found {order}")));
    }
    let solver_types =
        [("midpoint", false), ("heun", true), ("logrho", false), ("bh1", false), ("bh2", false)];
    let heun = config.choice("solver_type", false, &solver_types)?;
    let lambda_min = config.number("lambda_min_clipped", f64::NEG_INFINITY)?;
    let path = path(&DPM, config, steps, force_karras, lambda_min)?;

    let len = path.timesteps.len();
    let first_order_end = path.ends_at_zero
        || config.flag("euler_at_final", false)?
        || (config.flag("lower_order_final", true)? && len < FEW_STEPS);
    let step = |i: usize| -> Result<SolverStep> {
        let (level, next) = (path.levels[i], path.levels[i + 1]);
        let h = next.lambda - level.lambda;
        let decay = (-h).exp() - 1.0;
        let of_clean = next.alpha * decay;
        let first_order = order == 1 || i == skip || (i == len - 1 && first_order_end);
        let second_order = (!first_order).then(|| {
            let of_slope = if heun { next.alpha * (decay / h + 1.0) } else { -0.5 * of_clean };
            (of_slope, 1.0 / ((level.lambda - path.levels[i - 1].lambda) / h))
        });
        let step = SolverStep {
            timestep: path.timesteps[i],
            level,
            of_x: next.sigma / level.sigma,
            of_clean: -of_clean,
            second_order,
        };
        let (slope, ratio) = second_order.unwrap_or_default();
        check_factors(step.timestep, &[1.0 / level.alpha, step.of_x, of_clean, slope, ratio])?;
        Ok(step)
    };
    (skip..len).map(step).collect()
}

pub(super) fn run(
    steps: &[SolverStep],
    prediction: Prediction,
    mut x: Tensor,
    model: &mut Denoising,
) -> Result<Tensor> {
    let mut before: Option<Tensor> = None;
    for step in steps {
        let out = model.ask(&x, step.timestep)?;
        let clean = step.level.denoised(prediction, &x, out);
        x = scaled(&x, step.of_x) + scaled(&clean, step.of_clean);
        if let (Some((of_slope, ratio)), Some(before)) = (step.second_order, &before) {
            x += scaled(&scaled(&(&clean - before), ratio), of_slope);
        }
        x = model.keep(x);
        before = Some(clean);
    }
    Ok(x)
}
