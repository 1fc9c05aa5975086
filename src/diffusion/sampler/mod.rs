//! Samplers: from noise to latents. A [`SamplerPlan`] is everything that can be computed before the first model call; running
//! it is one plain function per sampler.
//!
//! The numbers are those of Python `diffusers` 0.42.1: `Plan::new(kind, config, steps)` is
//! `Scheduler.from_config(config)` followed by `set_timesteps(steps)`, and [`SamplerPlan::run`] is the pipeline's loop. Factors
//! are computed on the host in f32, in the order in which `diffusers` computes them; tensors are f32, and no step waits
//! for the device.

mod ddim;
mod euler;
mod heun;
mod pndm;
mod schedule;
mod solver;
mod unipc;

use tch::{Kind, Tensor};

pub use schedule::Spacing;
use schedule::scaled;

use crate::diffusion::noise::{Prediction, SchedulerConfig};
use crate::platform::choice::{Choice, Named, named};
use crate::{Error, Result};

/// The samplers, under the names that the command line uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SamplerKind {
    /// DDIM without added noise
    Ddim,
    /// PNDM, or PLMS where the config skips the Runge-Kutta steps
    Pndm,
    /// Euler
    Euler,
    /// Euler, adding noise at each step
    EulerAncestral,
    /// DPM-Solver++, second order, multistep
    DpmPp2m,
    /// DPM-Solver++ on Karras' noise levels
    DpmPp2mKarras,
    /// Heun, two model calls a step
    Heun,
    /// UniPC, second order
    UniPc,
}

impl Choice for SamplerKind {
    const CHOICES: &'static [Named<Self>] = &[
        named(Self::Ddim, "ddim", &[], "DDIM without added noise"),
        named(Self::Pndm, "pndm", &[], "PNDM, or PLMS where the config skips the Runge-Kutta steps"),
        named(Self::Euler, "euler", &[], "Euler"),
        named(
            Self::EulerAncestral,
            "euler-a",
            &["euler_a", "euler-ancestral"],
            "Euler, adding noise at each step",
        ),
        named(Self::DpmPp2m, "dpm++2m", &["dpmpp_2m", "dpmpp-2m"], "DPM-Solver++, second order, multistep"),
        named(
            Self::DpmPp2mKarras,
            "dpm++2m-karras",
            &["dpmpp_2m_karras", "dpmpp-2m-karras"],
            "DPM-Solver++ on Karras' noise levels",
        ),
        named(Self::Heun, "heun", &[], "Heun, two model calls a step"),
        named(Self::UniPc, "unipc", &["uni_pc"], "UniPC, second order"),
    ];
}

impl SamplerKind {
    /// The sampler that the model's own config names, and a note for the user where we have to take another.
    pub fn from_config(config: &SchedulerConfig) -> Result<(Self, Option<String>)> {
        let kind = match config.class_name() {
            Some("DDIMScheduler") => Self::Ddim,
            Some("PNDMScheduler") => Self::Pndm,
            Some("EulerDiscreteScheduler") => Self::Euler,
            Some("EulerAncestralDiscreteScheduler") => Self::EulerAncestral,
            Some("DPMSolverMultistepScheduler") if config.flag("use_karras_sigmas", false)? => {
                Self::DpmPp2mKarras
            }
            Some("DPMSolverMultistepScheduler") => Self::DpmPp2m,
            Some("HeunDiscreteScheduler") => Self::Heun,
            Some("UniPCMultistepScheduler") => Self::UniPc,
            other => {
                let named = other.unwrap_or("no scheduler");
                let note = format!("the model's scheduler config names {named}; sampling with ddim instead");
                return Ok((Self::Ddim, Some(note)));
            }
        };
        Ok((kind, None))
    }

    /// The model's config as this sampler takes it over, for [`SamplerPlan::new`]; `spacing` and `karras` are the user's wish.
    ///
    /// A pipeline that is put together in Python passes on what differs from its scheduler's defaults, and nothing else;
    /// a folder written by a newer `diffusers` spells the defaults out. To give the same pictures from either, the
    /// spacing that is its class's default is not passed on: Euler, DPM++, Heun and UniPC then spread their timesteps by
    /// `linspace`, their own default. Heun is the second-order method of Karras et al. (arXiv 2206.00364, algorithm 1) and
    /// keeps its noise levels, and so does UniPC; PNDM skips the Runge-Kutta steps. Each only where the file is silent.
    pub fn settings(
        self,
        model: &SchedulerConfig,
        spacing: Option<Spacing>,
        karras: Option<bool>,
    ) -> SchedulerConfig {
        let spelled_out = match model.class_name() {
            Some("DDIMScheduler" | "PNDMScheduler" | "DDPMScheduler") => "leading",
            _ => "linspace",
        };
        let mut config = model.clone();
        if Self::from_config(model).ok().map(|(own, _)| own) != Some(self) {
            config = config.without("timestep_spacing", spelled_out);
        }
        if self == Self::Pndm && !config.has("skip_prk_steps") {
            config = config.with("skip_prk_steps", true);
        }
        if matches!(self, Self::Heun | Self::UniPc) && !config.has("use_karras_sigmas") {
            config = config.with("use_karras_sigmas", true);
        }
        if let Some(spacing) = spacing {
            config = config.with("timestep_spacing", spacing.name());
        }
        karras.map_or(config.clone(), |karras| config.with("use_karras_sigmas", karras))
    }

    /// What a user should know of drawing with this sampler what has this config.
    pub fn note(self, model: &SchedulerConfig) -> Option<String> {
        let ignores = matches!(self, Self::Pndm | Self::Heun) && model.is_set("rescale_betas_zero_snr");
        ignores.then(|| {
            format!(
                "the model has zero terminal SNR, of which scheduler {self} knows nothing, here as in diffusers; ddim, euler, euler-a, \
                 dpm++2m and unipc honour it"
            )
        })
    }

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        self.word()
    }
}

impl std::fmt::Display for SamplerKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for SamplerKind {
    type Err = crate::Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::find(name).ok_or_else(|| {
            let names: Vec<_> = Self::CHOICES.iter().map(|choice| choice.name).collect();
            crate::Error::config(format!("sampler: expected one of {}, found {name}", names.join(", ")))
        })
    }
}

impl TryFrom<String> for SamplerKind {
    type Error = crate::Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<SamplerKind> for String {
    fn from(kind: SamplerKind) -> Self {
        kind.name().to_string()
    }
}

/// The steps of one sampler, computed before the first model call.
#[derive(Debug)]
pub struct SamplerPlan {
    prediction: Prediction,
    init_noise_sigma: f64,
    steps: SamplerSteps,
}

#[derive(Debug)]
enum SamplerSteps {
    Ddim(ddim::DdimSteps),
    Pndm(pndm::PndmSteps),
    Euler(Vec<euler::EulerStep>),
    Heun(heun::HeunSteps),
    Dpm(Vec<solver::SolverStep>),
    UniPc(Vec<unipc::UniPcStep>),
}

impl SamplerPlan {
    /// Plans `steps` steps of `kind` for the model whose scheduler config is `config`.
    ///
    /// Errors, all before the first model call: a number of steps that the sampler cannot do, a setting that we do not
    /// have, or factors that would not be finite.
    pub fn new(kind: SamplerKind, config: &SchedulerConfig, steps: usize) -> Result<Self> {
        Self::after(kind, config, steps, 0)
    }

    /// The last of `steps` steps, for a picture of which `strength` is drawn anew: the `get_timesteps` of `diffusers`'
    /// image-to-image pipelines.
    ///
    /// Errors: a strength outside (0, 1], or one that leaves no step; and those of [`SamplerPlan::new`].
    pub fn from_strength(
        kind: SamplerKind,
        config: &SchedulerConfig,
        steps: usize,
        strength: f64,
    ) -> Result<Self> {
        if !(strength > 0.0 && strength <= 1.0) {
            return Err(Error::config(format!(
                "strength: expected a number above 0 and up to 1, found {strength}"
            )));
        }
        // Cut off, not rounded, as Python's `int` does.
        let taken = (steps as f64 * strength) as usize;
        if taken == 0 && steps > 0 {
            return Err(Error::config(format!(
                "strength: {strength} of {steps} steps is less than one step"
            ))
            .with_hint("take more steps or a higher strength"));
        }
        Self::after(kind, config, steps, steps - taken.min(steps))
    }

    fn after(kind: SamplerKind, config: &SchedulerConfig, steps: usize, skip: usize) -> Result<Self> {
        let (init_noise_sigma, steps) = match kind {
            SamplerKind::Ddim => (1.0, SamplerSteps::Ddim(ddim::plan(config, steps, skip)?)),
            SamplerKind::Pndm => (1.0, SamplerSteps::Pndm(pndm::plan(config, steps, skip)?)),
            SamplerKind::Euler => {
                let plan = euler::plan(config, steps, skip)?;
                (plan.init_noise_sigma, SamplerSteps::Euler(plan.steps))
            }
            SamplerKind::EulerAncestral => {
                let plan = euler::plan_ancestral(config, steps, skip)?;
                (plan.init_noise_sigma, SamplerSteps::Euler(plan.steps))
            }
            SamplerKind::Heun => {
                let plan = euler::plan_class(&schedule::HEUN, config, steps, skip)?;
                (plan.init_noise_sigma, SamplerSteps::Heun(heun::plan(config, plan.steps)?))
            }
            SamplerKind::DpmPp2m => (1.0, SamplerSteps::Dpm(solver::plan(config, steps, skip, false)?)),
            SamplerKind::DpmPp2mKarras => (1.0, SamplerSteps::Dpm(solver::plan(config, steps, skip, true)?)),
            SamplerKind::UniPc => (1.0, SamplerSteps::UniPc(unipc::plan(config, steps, skip)?)),
        };
        let plan = Self { prediction: config.prediction()?, init_noise_sigma, steps };
        if plan.model_calls() == 0 {
            return Err(
                Error::config("strength: no step is left").with_hint("take more steps or a higher strength")
            );
        }
        Ok(plan)
    }

    /// What unit noise is multiplied by before [`SamplerPlan::run`].
    pub fn init_noise_sigma(&self) -> f64 {
        self.init_noise_sigma
    }

    /// How often [`SamplerPlan::run`] calls the model: Heun does so twice a step but for the last, PNDM once or nine times
    /// more than there are steps.
    pub fn model_calls(&self) -> usize {
        match &self.steps {
            SamplerSteps::Ddim(plan) => plan.steps.len(),
            SamplerSteps::Pndm(plan) => plan.model_calls(),
            SamplerSteps::Euler(steps) => steps.len(),
            SamplerSteps::Heun(plan) => plan.model_calls(),
            SamplerSteps::Dpm(steps) => steps.len(),
            SamplerSteps::UniPc(steps) => steps.len(),
        }
    }

    /// How many noise tensors [`SamplerPlan::run`] asks for: 0 unless the sampler is ancestral, which asks at every step but
    /// the last.
    pub fn noise_steps(&self) -> usize {
        match &self.steps {
            SamplerSteps::Euler(steps) => steps.iter().filter(|step| step.sigma_up > 0.0).count(),
            _ => 0,
        }
    }

    /// Clean latents as [`SamplerPlan::run`] has them before model call `call`, counted from 0, with unit noise; after the last
    /// call, the clean latents themselves. The class's `add_noise`, for a picture that is noised on the way.
    pub fn add_noise(&self, call: usize, clean: &Tensor, noise: &Tensor) -> Tensor {
        if call >= self.model_calls() {
            return clean.shallow_clone();
        }
        let (of_clean, of_noise) = match &self.steps {
            SamplerSteps::Ddim(plan) => plan.level(call),
            SamplerSteps::Pndm(plan) => plan.level(call),
            SamplerSteps::Euler(steps) => steps[call].level(),
            SamplerSteps::Heun(plan) => plan.level(call),
            SamplerSteps::Dpm(steps) => steps[call].level(),
            SamplerSteps::UniPc(steps) => steps[call].level(),
        };
        scaled(clean, of_clean) + scaled(noise, of_noise)
    }

    /// Samples from `x`, f32 `[b, c, h, w]`, unit noise times [`SamplerPlan::init_noise_sigma`]; returns latents like it.
    ///
    /// `model` answers for scaled latents and a timestep; `noise` gives the noise of a step, like `x`; `progress` is
    /// told after each model call how many there were. An error of any of them stops the sampling and is returned.
    pub fn run(
        &self,
        x: Tensor,
        model: &mut dyn FnMut(&Tensor, f64) -> Result<Tensor>,
        noise: &mut dyn FnMut(usize) -> Result<Tensor>,
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Tensor> {
        self.run_keeping(x, model, noise, &mut |_, x| x, progress)
    }

    /// As [`SamplerPlan::run`]; what each model call leads to goes through `keep`, with the number of calls made.
    pub fn run_keeping(
        &self,
        x: Tensor,
        model: &mut dyn FnMut(&Tensor, f64) -> Result<Tensor>,
        noise: &mut dyn FnMut(usize) -> Result<Tensor>,
        keep: &mut dyn FnMut(usize, Tensor) -> Tensor,
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let mut call = Denoising { answer: model, keep, progress, calls: 0 };
        match &self.steps {
            SamplerSteps::Ddim(plan) => ddim::run(plan, self.prediction, x, &mut call),
            SamplerSteps::Pndm(plan) => pndm::run(plan, self.prediction, x, &mut call),
            SamplerSteps::Euler(steps) => euler::run(steps, self.prediction, x, &mut call, noise),
            SamplerSteps::Heun(plan) => heun::run(plan, self.prediction, x, &mut call),
            SamplerSteps::Dpm(steps) => solver::run(steps, self.prediction, x, &mut call),
            SamplerSteps::UniPc(steps) => unipc::run(steps, self.prediction, x, &mut call),
        }
    }
}

/// The model as the samplers see it, and what else happens at each of its calls.
struct Denoising<'a> {
    answer: &'a mut dyn FnMut(&Tensor, f64) -> Result<Tensor>,
    keep: &'a mut dyn FnMut(usize, Tensor) -> Tensor,
    progress: &'a mut dyn FnMut(usize) -> Result<()>,
    calls: usize,
}

impl Denoising<'_> {
    /// Scaled latents and a timestep to an f32 answer.
    fn ask(&mut self, x: &Tensor, timestep: f64) -> Result<Tensor> {
        let answer = (self.answer)(x, timestep)?.to_kind(Kind::Float);
        self.calls += 1;
        (self.progress)(self.calls)?;
        Ok(answer)
    }

    /// What goes on in place of the latents `x` that the last answer led to.
    fn keep(&mut self, x: Tensor) -> Tensor {
        (self.keep)(self.calls, x)
    }
}
