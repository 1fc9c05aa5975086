//! Euler and Euler ancestral on the variance-exploding form x = x_0 + sigma e: arXiv 2206.00364, algorithm 1 without
//! churn; the ancestral split of a step is k-diffusion's.

use tch::Tensor;

use crate::Result;
use crate::diffusion::noise::{Prediction, SchedulerConfig};
use crate::diffusion::sampler::Denoising;
use crate::diffusion::sampler::schedule::{
    Class, EULER, EULER_ANCESTRAL, Levels, Spacing, TimestepGrid, check_factors, check_start,
    ends_above_zero, karras, root, scaled,
};

/// The steps, and what unit noise is scaled to.
pub(super) struct EulerPlan {
    pub(super) steps: Vec<EulerStep>,
    pub(super) init_noise_sigma: f64,
}

/// From noise level `sigma` at `timestep` down to `sigma_down`, then noise of level `sigma_up` is added. `spread` is
/// sqrt(sigma^2 + 1), the deviation of x.
#[derive(Debug)]
pub(super) struct EulerStep {
    pub(super) timestep: f64,
    pub(super) sigma: f32,
    spread: f32,
    pub(super) sigma_down: f32,
    pub(super) sigma_up: f32,
}

pub(super) fn plan(config: &SchedulerConfig, steps: usize, skip: usize) -> Result<EulerPlan> {
    config.choice("interpolation_type", (), &[("linear", ())])?;
    let types = [("discrete", false), ("continuous", true)];
    if config.choice("timestep_type", false, &types)? && config.prediction()? == Prediction::Velocity {
        return Err(config.problem("timestep_type: expected discrete, found continuous"));
    }
    plan_class(&EULER, config, steps, skip)
}

/// Timesteps and noise levels of one of the classes on Euler's grid, without the first `skip` steps. What unit noise is
/// scaled to is the whole grid's.
pub(super) fn plan_class(
    class: &Class,
    config: &SchedulerConfig,
    steps: usize,
    skip: usize,
) -> Result<EulerPlan> {
    let grid = TimestepGrid::new(class, config, steps)?;
    let levels = Levels::new(&grid.alphas_cumprod)?;
    let mut timesteps: Vec<f64> = grid.timesteps(steps).into_iter().map(|t| f64::from(t as f32)).collect();
    let mut sigmas: Vec<f64> = timesteps.iter().map(|t| levels.at(*t)).collect();
    if class.karras && config.flag("use_karras_sigmas", false)? {
        sigmas = karras(config, (sigmas[0], sigmas[sigmas.len() - 1]), steps)?;
        timesteps = sigmas.iter().map(|s| f64::from(levels.timestep(*s) as f32)).collect();
    }
    check_start(&timesteps)?;
    let mut sigmas: Vec<f32> = sigmas.into_iter().map(|s| s as f32).collect();
    let greatest = sigmas.iter().copied().fold(0.0, f32::max);
    // Only `leading` starts below pure noise, so only there the image's own variance counts.
    let init_noise_sigma =
        if grid.spacing == Spacing::Leading { root(greatest * greatest + 1.0)? } else { greatest };
    let last = if class.final_sigma && ends_above_zero(config)? { levels.least() } else { 0.0 };
    sigmas.push(last);
    let steps = timesteps.into_iter().zip(sigmas.windows(2)).skip(skip);
    let steps = steps.map(|(timestep, pair)| {
        check_factors(timestep, &[1.0 / pair[0], pair[0], pair[1]])?;
        let spread = root(pair[0] * pair[0] + 1.0)?;
        Ok(EulerStep { timestep, sigma: pair[0], spread, sigma_down: pair[1], sigma_up: 0.0 })
    });
    Ok(EulerPlan { steps: steps.collect::<Result<_>>()?, init_noise_sigma: f64::from(init_noise_sigma) })
}

/// Euler's plan with each step split: further down than its level, and up again by noise.
pub(super) fn plan_ancestral(config: &SchedulerConfig, steps: usize, skip: usize) -> Result<EulerPlan> {
    if config.prediction()? == Prediction::Sample {
        return Err(config.problem("prediction_type: euler-a expects epsilon or v_prediction, found sample"));
    }
    let mut plan = plan_class(&EULER_ANCESTRAL, config, steps, skip)?;
    for step in &mut plan.steps {
        let (from, to) = (step.sigma.powi(2), step.sigma_down.powi(2));
        step.sigma_up = root(to * (from - to) / from)?;
        step.sigma_down = root(to - step.sigma_up.powi(2))?;
    }
    Ok(plan)
}

impl EulerStep {
    /// Factors of clean latents and of noise where this step begins.
    pub(super) fn level(&self) -> (f32, f32) {
        (1.0, self.sigma)
    }

    /// The model's answer at x, which it sees divided by its deviation, as the clean latents that it stands for.
    pub(super) fn denoised(
        &self,
        prediction: Prediction,
        x: &Tensor,
        model: &mut Denoising,
    ) -> Result<Tensor> {
        let out = model.ask(&(x / f64::from(self.spread)), self.timestep)?;
        Ok(match prediction {
            Prediction::Epsilon => x - scaled(&out, self.sigma),
            Prediction::Velocity => {
                scaled(&out, -self.sigma / self.spread) + x / f64::from(self.sigma * self.sigma + 1.0)
            }
            Prediction::Sample => out,
        })
    }
}

pub(super) fn run(
    steps: &[EulerStep],
    prediction: Prediction,
    mut x: Tensor,
    model: &mut Denoising,
    noise: &mut dyn FnMut(usize) -> Result<Tensor>,
) -> Result<Tensor> {
    for (i, step) in steps.iter().enumerate() {
        let slope = (&x - step.denoised(prediction, &x, model)?) / f64::from(step.sigma);
        // Not in place: the first x is the caller's.
        x = &x + scaled(&slope, step.sigma_down - step.sigma);
        if step.sigma_up > 0.0 {
            x = &x + scaled(&noise(i)?, step.sigma_up);
        }
        x = model.keep(x);
    }
    Ok(x)
}
