//! Noise that drawings start from and take in on their way.

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
    /// The same tensors again.
    pub fn shallow_clone(&self) -> Self {
        let same = |tensor: &Option<Tensor>| tensor.as_ref().map(Tensor::shallow_clone);
        Self {
            latents: self.latents.shallow_clone(),
            steps: self.steps.shallow_clone(),
            image: same(&self.image),
            masked_image: same(&self.masked_image),
        }
    }

    /// The latents' unit noise where the model is.
    pub(super) fn unit(&self, device: Device) -> Tensor {
        self.latents.to_device(device).to_kind(Kind::Float)
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
