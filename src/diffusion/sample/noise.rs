//! Noise that drawings start from and take in on their way.

use crate::diffusion::sample::settings::SampleSettings;
use crate::diffusion::sample::start::Start;
use crate::diffusion::sampler::SamplerPlan;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::Result;
use crate::platform::host;
use crate::platform::random;
use tch::{Device, Kind, Tensor};

/// Noise that a batch starts from and, for ancestral samplers, takes in on its way.
pub struct Noise {
    /// Unit noise `(b, c, h, w)`, f32.
    pub latents: Tensor,
    /// `(steps, b, c, h, w)`; empty unless the sampler is ancestral.
    pub steps: Tensor,
    /// Unit noise for the latents of a [`Start`](super::Start)'s picture, like `latents`; `None` takes the middle of what its encoder says.
    pub image: Option<Tensor>,
    /// The same for the masked picture that an inpainting UNet sees.
    pub masked_image: Option<Tensor>,
}

impl Noise {
    /// Draws the noise of `seeds`, one picture each, with what `start` takes from the same stream: noise for the picture's
    /// latents before that of the drawing, and for those of the masked picture after it, whether the UNet sees them or not.
    pub(super) fn draw(
        seeds: &[u64],
        settings: &SampleSettings,
        model: &StableDiffusion,
        plan: &SamplerPlan,
        start: Option<&Start>,
    ) -> Result<Self> {
        let shape = settings.latent_shape(model);
        let (mut latents, mut images, mut masked) = (Vec::new(), Vec::new(), Vec::new());
        let mut steps = Vec::new();
        for &seed in seeds {
            random::seeded(seed, |draws| -> Result<()> {
                if start.is_some_and(|start| start.uses_image(model)) {
                    images.push(draws.try_normal(&shape)?);
                }
                latents.push(draws.try_normal(&shape)?);
                if start.is_some_and(Start::is_inpainting) {
                    masked.push(draws.try_normal(&shape)?);
                }
                let of_steps =
                    (0..plan.noise_steps()).map(|_| draws.try_normal(&shape)).collect::<Result<Vec<_>>>()?;
                if !of_steps.is_empty() {
                    steps.push(Tensor::stack(&of_steps, 0)); // [steps, 1, c, h, w]
                }
                Ok(())
            })?;
        }
        let steps = if steps.is_empty() { host::zeros(&[0], Kind::Float) } else { Tensor::cat(&steps, 1) };
        let stack = |all: Vec<Tensor>| (!all.is_empty()).then(|| Tensor::cat(&all, 0));
        Ok(Self {
            latents: Tensor::cat(&latents, 0),
            steps,
            image: stack(images),
            masked_image: stack(masked),
        })
    }

    /// The latents' unit noise where the model is.
    pub(super) fn unit(&self, device: Device) -> Tensor {
        host::to_device(&self.latents, device).to_kind(Kind::Float)
    }

    pub(super) fn batch(&self, start: i64, length: i64) -> Self {
        let steps = if self.steps.dim() == 5 {
            self.steps.narrow(1, start, length)
        } else {
            self.steps.shallow_clone()
        };
        let part = |tensor: &Tensor| tensor.narrow(0, start, length);
        Self {
            latents: part(&self.latents),
            steps,
            image: self.image.as_ref().map(part),
            masked_image: self.masked_image.as_ref().map(part),
        }
    }
}
