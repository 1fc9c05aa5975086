//! Heun's second-order method on Euler's grid: arXiv 2206.00364, algorithm 1 without churn.

use tch::Tensor;

use crate::Result;
use crate::diffusion::noise::{Prediction, SchedulerConfig};
use crate::diffusion::sampler::schedule::scaled;
use crate::diffusion::sampler::{Denoising, euler};

/// Euler's steps, and the bound on predicted clean latents (`clip_sample`).
#[derive(Debug)]
pub(super) struct HeunSteps {
    pub(super) steps: Vec<euler::EulerStep>,
    clip: Option<f64>,
}

impl HeunSteps {
    /// Two model calls a step, but the last step has one.
    pub(super) fn model_calls(&self) -> usize {
        (2 * self.steps.len()).saturating_sub(1)
    }

    /// Factors of clean latents and of noise at model call `call`: a step's second call is where the next begins.
    pub(super) fn level(&self, call: usize) -> (f32, f32) {
        self.steps[call.div_ceil(2)].level()
    }
}

pub(super) fn plan(config: &SchedulerConfig, steps: Vec<euler::EulerStep>) -> Result<HeunSteps> {
    let clip = config.flag("clip_sample", false)?.then(|| config.number("clip_sample_range", 1.0));
    Ok(HeunSteps { steps, clip: clip.transpose()? })
}

pub(super) fn run(
    plan: &HeunSteps,
    prediction: Prediction,
    mut x: Tensor,
    model: &mut Denoising,
) -> Result<Tensor> {
    let slope = |x: &Tensor, at: &euler::EulerStep, model: &mut Denoising| -> Result<Tensor> {
        let mut clean = at.denoised(prediction, x, model)?;
        if let Some(range) = plan.clip {
            clean = clean.clamp(-range, range);
        }
        Ok((x - clean) / f64::from(at.sigma))
    };
    for (i, step) in plan.steps.iter().enumerate() {
        let first = slope(&x, step, model)?;
        let width = step.sigma_down - step.sigma;
        let ahead = model.keep(&x + scaled(&first, width));
        // The last step ends at sigma 0, where there is no slope.
        x = match plan.steps.get(i + 1) {
            None => ahead,
            Some(next) => {
                let second = slope(&ahead, next, model)?;
                model.keep(x + scaled(&((first + second) / 2.0), width))
            }
        };
    }
    Ok(x)
}
