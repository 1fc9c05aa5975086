//! What a drawing starts from when it is a picture and not noise alone: image-to-image, and inpainting, which draws only
//! where a mask is white.
//!
//! The numbers are those of `StableDiffusionImg2ImgPipeline` and `StableDiffusionInpaintPipeline` of Python `diffusers`
//! 0.42.1, for one picture and a generator of its own; [`super::Noise`] is drawn in their order. A UNet of 4 input channels
//! is held to the picture from outside: after each step the latents outside the mask are replaced by the picture's at that
//! noise level. One of 9 sees the mask and the masked picture beside its latents.

use crate::data::image::{Filter, Mask, RgbImage, resize, tensor};
use crate::diffusion::sample::settings::SampleSettings;
use crate::diffusion::sampler::SamplerPlan;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::model::LatentScaling;
use crate::platform::host;
use std::sync::atomic::{AtomicU64, Ordering};
use tch::Tensor;

/// Mask values from here on are white: `VaeImageProcessor` compares with 0.5 of 255.
const WHITE: u8 = 128;

/// A picture to start from.
#[derive(Debug, Clone)]
pub struct Start {
    /// Tells pictures apart in a session.
    id: u64,
    image: RgbImage,
    /// Whether a pixel is drawn anew; `None` for image-to-image.
    mask: Option<Mask>,
    strength: f64,
}

impl Start {
    /// `image` and `mask` at `width` x `height` pixels, stretched by a Lanczos filter as `VaeImageProcessor` does.
    /// `strength`, in (0, 1], is the part of the steps that is taken, and so of the picture that is drawn anew;
    /// [`SamplerPlan::from_strength`] checks it.
    ///
    /// Errors: no pixels, or a mask without white.
    pub fn new(
        image: &RgbImage,
        mask: Option<&RgbImage>,
        strength: f64,
        (width, height): (u32, u32),
    ) -> Result<Self> {
        if width == 0 || height == 0 {
            return Err(Error::config("--image: expected pixels to draw, found none"));
        }
        let image = resize(image, width, height, Filter::Lanczos);
        let mask = mask.map(|mask| is_white(&resize(mask, width, height, Filter::Lanczos)));
        if mask.as_ref().is_some_and(|mask| mask.count() == 0) {
            return Err(Error::config(
                "--mask: expected white where the picture is to be drawn anew, found black everywhere",
            ));
        }
        static MADE: AtomicU64 = AtomicU64::new(0);
        Ok(Self { id: MADE.fetch_add(1, Ordering::Relaxed), image, mask, strength })
    }

    /// A number of its own; a copy has the same.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Whether only a part of the picture is drawn.
    pub fn is_inpainting(&self) -> bool {
        self.mask.is_some()
    }

    /// The part of the steps that is taken.
    pub fn strength(&self) -> f64 {
        self.strength
    }

    /// Refuses a mask that has no latent to draw, and a picture of another size than `settings` has.
    pub(super) fn validate(&self, settings: &SampleSettings, model: &StableDiffusion) -> Result<()> {
        let (width, height) = self.image.dimensions();
        if (settings.width, settings.height) != (i64::from(width), i64::from(height)) {
            return Err(Error::config(format!(
                "--image: expected {}x{} pixels, found {width}x{height}",
                settings.width, settings.height
            )));
        }
        let factor = model.vae.factor();
        if self.latent_mask(factor).is_some_and(|mask| host::number(&mask.max()) == 0.0) {
            return Err(Error::config(format!(
                "--mask: its white is finer than the {factor} pixels of a latent, so that nothing would be drawn anew"
            )));
        }
        Ok(())
    }

    /// Pure noise, without a trace of the picture: inpainting at full strength.
    fn is_noise(&self) -> bool {
        self.is_inpainting() && self.strength == 1.0
    }

    /// Whether the picture's own latents are used, and their noise drawn.
    pub(super) fn uses_image(&self, model: &StableDiffusion) -> bool {
        !(model.is_inpainting() && self.is_noise())
    }

    /// Encodes the picture, once for all drawings.
    pub(super) fn prepare(&self, model: &StableDiffusion) -> PreparedStart {
        let device = model.device();
        // In memory pixel by pixel, as `VaeImageProcessor` has them: another layout would choose other kernels.
        let pixels = tensor::signed(&self.image).permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]);
        let posterior = |pixels: &Tensor| {
            let (mean, log_variance) = model.vae.encode(pixels);
            Posterior {
                mean,
                deviation: (log_variance * 0.5).exp(),
                scaling: model.vae.scaling().shallow_clone(),
            }
        };
        let masked = self.mask.as_ref().filter(|_| model.is_inpainting());
        let masked = masked.map(|mask| posterior(&(&pixels * tensor::of_mask(mask).rsub_scalar(1.0))));
        PreparedStart {
            image: self.uses_image(model).then(|| posterior(&pixels)),
            masked,
            mask: self.latent_mask(model.vae.factor()).map(|mask| host::to_device(&mask, device)),
            is_noise: self.is_noise(),
        }
    }

    /// Puts the picture back where the mask is black.
    pub(super) fn paste(&self, drawn: &mut RgbImage) {
        let Some(mask) = &self.mask else { return };
        for ((to, from), _) in
            drawn.pixels_mut().zip(self.image.pixels()).zip(mask.pixels()).filter(|(_, white)| !**white)
        {
            *to = *from;
        }
    }

    /// `(1, 1, h / factor, w / factor)`: the mask's pixel at the upper left corner of each latent.
    fn latent_mask(&self, factor: i64) -> Option<Tensor> {
        let pixels = tensor::of_mask(self.mask.as_ref()?);
        Some(pixels.slice(2, 0, None, factor).slice(3, 0, None, factor))
    }
}

/// Grey values by Pillow's `convert("L")` (ITU-R 601 in 16 binary places), then whether they are white.
fn is_white(mask: &RgbImage) -> Mask {
    let grey = |[r, g, b]: [u8; 3]| {
        ((u32::from(r) * 19595 + u32::from(g) * 38470 + u32::from(b) * 7471 + 0x8000) >> 16) as u8
    };
    Mask::of(mask, |pixel| grey(pixel) >= WHITE)
}

/// What the encoder makes of a picture: a Gaussian for each value of its latents.
struct Posterior {
    /// `(1, c, h, w)`
    mean: Tensor,
    /// `(1, c, h, w)`
    deviation: Tensor,
    scaling: LatentScaling,
}

impl Posterior {
    /// Latents `(b, c, h, w)` with unit noise of that shape; the mean's if there is none.
    fn latents(&self, noise: Option<&Tensor>, batch: i64) -> Tensor {
        let latents = match noise {
            Some(noise) => &self.mean + &self.deviation * host::to_device(noise, self.mean.device()),
            None => self.mean.expand([batch, -1, -1, -1], true),
        };
        self.scaling.to_unet(&latents)
    }
}

/// A [`Start`] as tensors on the model's device.
pub(super) struct PreparedStart {
    image: Option<Posterior>,
    masked: Option<Posterior>,
    mask: Option<Tensor>,
    is_noise: bool,
}

impl PreparedStart {
    /// What a batch starts from: `unit` noise on the model's device, and noise of the picture's latents and of the masked
    /// picture's, where it is drawn.
    pub(super) fn begin(
        &self,
        unit: Tensor,
        [image, masked]: [Option<&Tensor>; 2],
        plan: &SamplerPlan,
    ) -> Begin {
        let batch = unit.size()[0];
        let image = self.image.as_ref().map(|own| own.latents(image, batch));
        let x = match &image {
            Some(image) if !self.is_noise => plan.add_noise(0, image, &unit),
            _ => &unit * plan.init_noise_sigma(),
        };
        let (mut beside, mut kept) = (None, None);
        match (&self.masked, &self.mask, image) {
            (Some(own), Some(mask), _) => {
                let masked = own.latents(masked, batch);
                beside = Some(Tensor::cat(&[&mask.expand([batch, -1, -1, -1], true), &masked], 1));
            }
            (None, Some(mask), Some(image)) => {
                kept = Some(KeptRegion { image, noise: unit, mask: mask.shallow_clone() });
            }
            _ => {}
        }
        Begin { x, beside, kept }
    }
}

/// Where one batch begins.
pub(super) struct Begin {
    /// Latents `(b, c, h, w)` that the sampler begins with.
    pub(super) x: Tensor,
    /// What the UNet sees beside its latents: mask and latents of the masked picture, `(b, 1 + c, h, w)`.
    pub(super) beside: Option<Tensor>,
    pub(super) kept: Option<KeptRegion>,
}

/// What is kept of a picture while the rest is drawn.
pub(super) struct KeptRegion {
    image: Tensor,
    noise: Tensor,
    mask: Tensor,
}

impl KeptRegion {
    /// The latents `x` that model call `calls` led to, with the picture's at that noise level outside the mask.
    pub(super) fn keep(&self, plan: &SamplerPlan, calls: usize, x: Tensor) -> Tensor {
        let image = plan.add_noise(calls, &self.image, &self.noise);
        self.mask.rsub_scalar(1.0) * image + &self.mask * x
    }
}
