//! DDIM with eta 0: arXiv 2010.02502, eq. 12.

use tch::Tensor;

use crate::Result;
use crate::diffusion::noise::{Prediction, SchedulerConfig};
use crate::diffusion::sampler::Denoising;
use crate::diffusion::sampler::schedule::{DDIM, TimestepGrid, check_factors, root, scaled};

/// The steps, and the bound on predicted clean latents (`clip_sample`).
#[derive(Debug)]
pub(super) struct DdimSteps {
    pub(super) steps: Vec<DdimStep>,
    clip: Option<f64>,
}

/// From x = signal x_0 + noise e at `timestep` to the same with the factors of the next one.
#[derive(Debug)]
pub(super) struct DdimStep {
    timestep: f64,
    signal: f32,
    noise: f32,
    signal_next: f32,
    noise_next: f32,
}

impl DdimSteps {
    /// Factors of clean latents and of noise at model call `call`.
    pub(super) fn level(&self, call: usize) -> (f32, f32) {
        (self.steps[call].signal, self.steps[call].noise)
    }
}

pub(super) fn plan(config: &SchedulerConfig, steps: usize, skip: usize) -> Result<DdimSteps> {
    let grid = TimestepGrid::new(&DDIM, config, steps)?;
    let stride = (grid.train() / steps) as i64;
    let last = if config.flag("set_alpha_to_one", true)? { 1.0 } else { grid.alphas_cumprod[0] };
    let prediction = config.prediction()?;
    let mut plan = Vec::new();
    for timestep in grid.timesteps(steps).into_iter().map(f64::round_ties_even).skip(skip) {
        let next = timestep as i64 - stride;
        let alpha = grid.alpha(timestep as i64)?;
        // At zero terminal SNR the noise says nothing of the image; the velocity does.
        let divisor = match prediction {
            Prediction::Epsilon => alpha,
            Prediction::Sample => 1.0 - alpha,
            Prediction::Velocity => 1.0,
        };
        check_factors(timestep, &[1.0 / divisor])?;
        let alpha_next = if next < 0 { last } else { grid.alpha(next)? };
        plan.push(DdimStep {
            timestep,
            signal: root(alpha)?,
            noise: root(1.0 - alpha)?,
            signal_next: root(alpha_next)?,
            noise_next: root(1.0 - alpha_next)?,
        });
    }
    let clip = config.flag("clip_sample", true)?.then(|| config.number("clip_sample_range", 1.0));
    Ok(DdimSteps { steps: plan, clip: clip.transpose()? })
}

pub(super) fn run(
    plan: &DdimSteps,
    prediction: Prediction,
    mut x: Tensor,
    model: &mut Denoising,
) -> Result<Tensor> {
    for step in &plan.steps {
        let out = model.ask(&x, step.timestep)?;
        let (signal, noise) = (step.signal, step.noise);
        let (mut clean, eps) = match prediction {
            Prediction::Epsilon => ((&x - scaled(&out, noise)) / f64::from(signal), out),
            Prediction::Velocity => {
                (scaled(&x, signal) - scaled(&out, noise), scaled(&out, signal) + scaled(&x, noise))
            }
            Prediction::Sample => {
                let eps = (&x - scaled(&out, signal)) / f64::from(noise);
                (out, eps)
            }
        };
        if let Some(range) = plan.clip {
            clean = clean.clamp(-range, range);
        }
        x = model.keep(scaled(&clean, step.signal_next) + scaled(&eps, step.noise_next));
    }
    Ok(x)
}
