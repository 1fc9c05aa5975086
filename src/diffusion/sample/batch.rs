//! One batch of pictures, from noise to latents.

use crate::data::image::RgbImage;
use crate::diffusion::sample::noise::Noise;
use crate::diffusion::sample::start::{Begin, PreparedStart};
use crate::diffusion::sample::steering::Steered;
use crate::diffusion::sampler::SamplerPlan;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::model::{Call, Conditioning};
use crate::platform::host;
use crate::platform::observer::Observer;
use tch::{Kind, Tensor};

/// What is the same for all batches of a request.
pub(super) struct Drawing<'a> {
    pub(super) model: &'a StableDiffusion,
    pub(super) plan: &'a SamplerPlan,
    /// Of the negative prompt and the prompt, or of the prompt alone.
    pub(super) conditioning: &'a Conditioning,
    pub(super) guidance: f64,
    pub(super) guidance_rescale: f64,
    pub(super) picture: Option<&'a PreparedStart>,
    pub(super) tick: Option<&'a dyn Fn()>,
    pub(super) observer: &'a dyn Observer,
}

/// The latents of a batch.
pub(super) fn draw_batch(drawing: &Drawing, noise: &Noise, mut steered: Option<Steered>) -> Result<Tensor> {
    let Drawing { model, plan, picture, tick, observer, .. } = drawing;
    let device = model.device();
    let b = noise.latents.size()[0];
    let guided = drawing.conditioning.rows() == 2;
    // [negative x b, prompt x b], or [prompt x b]
    let conditioning = &drawing.conditioning.repeat_rows(b);
    let begin = match picture {
        Some(picture) => {
            let of_picture = [noise.image.as_ref(), noise.masked_image.as_ref()];
            picture.begin(noise.unit(device), of_picture, plan)
        }
        None => Begin { x: noise.unit(device) * plan.init_noise_sigma(), beside: None, kept: None },
    };
    let mut denoise = |x: &Tensor, timestep: f64| {
        let both = |x: &Tensor| if guided { Tensor::cat(&[x, x], 0) } else { x.shallow_clone() };
        let x = both(x);
        let timesteps = Tensor::full([x.size()[0]], timestep, (Kind::Float, device));
        // A control sees the latents alone.
        let call = Call { sample: &x, timesteps: &timesteps, conditioning };
        let signals = steered.as_mut().map(|s| s.next(call)).unwrap_or_default();
        let seen =
            begin.beside.as_ref().map_or_else(|| x.shallow_clone(), |t| Tensor::cat(&[&x, &both(t)], 1));
        let output = model.denoiser().predict(Call { sample: &seen, ..call }, &signals);
        if !guided {
            return Ok(output);
        }
        let halves = output.chunk(2, 0);
        let guided = &halves[0] + (&halves[1] - &halves[0]) * drawing.guidance;
        Ok(rescaled(guided, &halves[1], drawing.guidance_rescale))
    };
    let mut step_noise = |i: usize| {
        if noise.steps.dim() != 5 || i as i64 >= noise.steps.size()[0] {
            let found = if noise.steps.dim() == 5 { noise.steps.size()[0] } else { 0 };
            return Err(Error::config(format!(
                "--step-noise: expected noise for step {i}, found {found} steps"
            )));
        }
        Ok(host::to_device(&noise.steps.get(i as i64), device).to_kind(Kind::Float))
    };
    let mut progress = |_| {
        if let Some(tick) = tick {
            tick();
        }
        observer
            .check(|| "stopped while sampling; pictures of the prompts before this one are saved".to_string())
    };
    let mut keep = |calls: usize, x: Tensor| match &begin.kept {
        Some(kept) => kept.keep(plan, calls, x),
        None => x,
    };
    plan.run_keeping(begin.x.shallow_clone(), &mut denoise, &mut step_noise, &mut keep, &mut progress)
}

/// A guided prediction `(b, c, h, w)` with its deviation brought back towards that of the prompt's alone (arXiv 2305.08891, equations
/// 15 and 16).
fn rescaled(guided: Tensor, of_prompt: &Tensor, by: f64) -> Tensor {
    if by == 0.0 {
        return guided;
    }
    let deviation = |t: &Tensor| t.std_dim(&[1i64, 2, 3][..], true, true);
    let back = &guided * (deviation(of_prompt) / deviation(&guided));
    back * by + guided * (1.0 - by)
}

/// Decoder output `(1, 3, h, w)` in about [-1, 1] to pixels.
pub(super) fn to_image(pixels: &Tensor) -> Result<RgbImage> {
    let s = pixels.size();
    let bytes = ((pixels / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round().to_kind(Kind::Uint8);
    let buffer = host::values::<u8>(&bytes.squeeze_dim(0).permute([1, 2, 0]).contiguous())?; // [h, w, 3]
    RgbImage::from_raw(s[3] as u32, s[2] as u32, buffer)
        .ok_or_else(|| Error::not_finite("the decoder gave a picture of the wrong size"))
}
