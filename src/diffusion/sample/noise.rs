//! Noise that drawings start from and take in on their way.

use crate::diffusion::sample::settings::SampleSettings;
use crate::diffusion::sample::start::Start;
use crate::diffusion::sampler::SamplerPlan;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::platform::host;
use crate::platform::random;
use crate::weights::tensor_file::TensorFile;
use std::path::Path;
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
    /// Reads what other programs drew: a safetensors file with `latents` `(b, c, h, w)`, and perhaps `image_noise` and
    /// `masked_image_noise` of that shape, and one with the `noise` of each step, `(steps, b, c, h, w)`. Errors: a file that is none, a
    /// tensor that is missing or of another shape.
    pub fn read(path: &Path, steps: Option<&Path>) -> Result<Self> {
        let read = |path: &Path, name: &str, dims: usize| {
            let file = TensorFile::open(path)?;
            let tensor = file.read_as(name, Kind::Float)?;
            if tensor.dim() != dims || tensor.numel() == 0 {
                let found = tensor.size();
                return Err(Error::format(
                    path,
                    format!("`{name}`: expected {dims} dimensions, found shape {found:?}"),
                ));
            }
            if !host::all_finite(&tensor) {
                return Err(Error::format(path, format!("`{name}`: holds numbers that are not finite")));
            }
            Ok(tensor)
        };
        let latents = read(path, "latents", 4)?;
        let beside = |name: &str| {
            if TensorFile::open(path)?.shape(name).is_none() {
                return Ok(None);
            }
            let (tensor, expected) = (read(path, name, 4)?, latents.size());
            if tensor.size() != expected {
                let found = tensor.size();
                return Err(Error::format(
                    path,
                    format!("`{name}`: expected shape {expected:?}, found {found:?}"),
                ));
            }
            Ok(Some(tensor))
        };
        let (image, masked_image) = (beside("image_noise")?, beside("masked_image_noise")?);
        let Some(steps) = steps else {
            let steps = host::zeros(&[0], Kind::Float);
            return Ok(Self { latents, steps, image, masked_image });
        };
        let noise = read(steps, "noise", 5)?;
        if noise.size()[1..] != latents.size()[..] {
            let (expected, found) = (latents.size(), noise.size());
            return Err(Error::format(
                steps,
                format!("`noise`: expected (steps, ..) over {expected:?}, found {found:?}"),
            ));
        }
        Ok(Self { latents, steps: noise, image, masked_image })
    }

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
