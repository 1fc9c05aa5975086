//! The training loss: denoising error on instance pictures, prior preservation, min-SNR weights.

use crate::diffusion::noise::NoiseSchedule;
use crate::model::control::{Control, Passes};
use crate::model::{Call, Conditioning, Denoiser, Signals};
use tch::{Kind, Tensor};

/// One batch, everything drawn already. With `class_half` the first half are instance pictures, the second class pictures.
pub struct Batch {
    /// Scaled latents `(b, c, h, w)`, f32.
    pub latents: Tensor,
    /// Noise, the same shape.
    pub noise: Tensor,
    /// Timesteps `(b)`, i64.
    pub timesteps: Tensor,
    /// What is said of them, a row for each.
    pub conditioning: Conditioning,
    /// Conditions `(b, 3, H, W)` in [0, 1], where control trains.
    pub conditions: Option<Tensor>,
    /// Whether the second half are class pictures.
    pub class_half: bool,
}

impl Batch {
    /// The same tensors.
    pub fn shallow_clone(&self) -> Self {
        Self {
            latents: self.latents.shallow_clone(),
            noise: self.noise.shallow_clone(),
            timesteps: self.timesteps.shallow_clone(),
            conditioning: self.conditioning.shallow_clone(),
            conditions: self.conditions.as_ref().map(Tensor::shallow_clone),
            class_half: self.class_half,
        }
    }
}

/// The loss and its parts; scalars, `total` with gradient.
pub struct Loss {
    /// What the network predicted, `(b, c, h, w)`, without gradient.
    pub prediction: Tensor,
    /// Error on the instance pictures.
    pub instance: Tensor,
    /// Error on the class pictures, if there are any.
    pub prior: Option<Tensor>,
    /// `instance + prior_weight * prior`.
    pub total: Tensor,
}

/// Noises the batch and compares the prediction with the model's own target.
///
/// `snr_gamma` weights each sample, of both halves, by min-SNR (arXiv 2303.09556) before the mean; diffusers' scripts
/// weight only one half, or the wrong one. `control` reads the batch's conditions.
pub fn training_loss(
    denoiser: &dyn Denoiser,
    control: Option<&Control>,
    schedule: &NoiseSchedule,
    batch: &Batch,
    prior_weight: f64,
    snr_gamma: Option<f64>,
) -> Loss {
    let noisy = schedule.add_noise(&batch.latents, &batch.noise, &batch.timesteps);
    let target = schedule.target(&batch.latents, &batch.noise, &batch.timesteps);
    let call = Call { sample: &noisy, timesteps: &batch.timesteps, conditioning: &batch.conditioning };
    let signals = match (control, &batch.conditions) {
        (Some(control), Some(conditions)) => {
            control.signals(&control.features(conditions), 1.0, Passes::Both, call)
        }
        _ => Signals::default(),
    };
    let prediction = denoiser.predict(call, &signals);
    let errors = (&prediction - target).square().flatten(1, -1).mean_dim(1, false, Kind::Float); // [b]
    let errors = match snr_gamma {
        Some(gamma) => errors * schedule.snr_weights(&batch.timesteps, gamma),
        None => errors,
    };
    let prediction = prediction.detach();
    if !batch.class_half {
        let instance = errors.mean(Kind::Float);
        return Loss { prediction, prior: None, total: instance.shallow_clone(), instance };
    }
    let halves = errors.chunk(2, 0);
    let (instance, prior) = (halves[0].mean(Kind::Float), halves[1].mean(Kind::Float));
    let total = &instance + &prior * prior_weight;
    Loss { prediction, instance, prior: Some(prior), total }
}
