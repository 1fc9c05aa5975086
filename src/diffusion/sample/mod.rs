//! Prompts and seeds to pictures.
//!
//! A picture belongs to its seed alone: its noise is drawn on the CPU after `manual_seed(seed)`, as Python's
//! `torch.Generator("cpu").manual_seed(seed)` draws it, whatever else is in the batch. An ancestral sampler's noise of
//! each step comes from the same stream, after the first latents.

mod noise;
mod settings;
mod start;
mod steering;

pub use noise::Noise;
pub use settings::Settings;
pub use start::Start;
pub use steering::{Steering, Strength, conditions};

use crate::data::image::RgbImage;
use crate::diffusion::sampler::Plan;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::platform::observer::Observer;
use start::{Begin, Prepared};
use steering::Steered;
use tch::{Device, Kind, Tensor};

/// What a drawing follows beside its prompt. By default nothing.
#[derive(Default)]
pub struct Guides<'a> {
    /// A picture to start from.
    pub start: Option<&'a Start>,
    /// Conditions, and the network that reads them.
    pub control: Option<Steering<'a>>,
}

/// A finished picture.
pub struct Picture {
    /// The seed it was drawn from; `None` if the noise was given.
    pub seed: Option<u64>,
    /// Final latents `(1, c, h, w)`, f32, CPU, not divided by the scaling factor.
    pub latents: Tensor,
    /// The pixels.
    pub image: RgbImage,
}

impl Guides<'_> {
    /// The sampler's steps for this model, less those that a [`Start`] leaves out.
    pub fn plan(&self, settings: &Settings, model: &StableDiffusion) -> Result<Plan> {
        let Some(start) = self.start else { return settings.plan(model) };
        let config = settings.sampler.settings(&model.scheduler, settings.spacing, settings.karras);
        Plan::from_strength(settings.sampler, &config, settings.steps, start.strength())
    }

    /// Refuses what does not fit the model or the settings.
    pub fn validate(&self, settings: &Settings, model: &StableDiffusion) -> Result<()> {
        if model.is_inpainting() && !self.start.is_some_and(Start::is_inpainting) {
            return Err(Error::config(
                "this model is made for inpainting (its UNet sees a mask and a masked picture): it expects a picture and a \
                 mask\nhint: give --image FILE --mask FILE",
            ));
        }
        if let Some(start) = self.start {
            start.validate(settings, model)?;
        }
        if let Some(control) = &self.control {
            control.validate(model)?;
        }
        self.plan(settings, model).map(|_| ())
    }
}

impl Noise {
    /// Draws the noise of `seeds`, one picture each.
    pub fn draw(seeds: &[u64], settings: &Settings, model: &StableDiffusion) -> Result<Self> {
        Self::draw_guided(seeds, settings, model, &Guides::default())
    }

    /// As [`Self::draw`], with what `guides` take from the same stream: noise for the picture's latents before that of the
    /// drawing, and for those of the masked picture after it, whether the UNet sees them or not.
    pub fn draw_guided(
        seeds: &[u64],
        settings: &Settings,
        model: &StableDiffusion,
        guides: &Guides,
    ) -> Result<Self> {
        let plan = guides.plan(settings, model)?;
        let shape = settings.latent_shape(model);
        let options = (Kind::Float, Device::Cpu);
        let start = guides.start;
        let (mut latents, mut images, mut masked) = (Vec::new(), Vec::new(), Vec::new());
        let mut steps = Vec::new();
        for &seed in seeds {
            tch::manual_seed(seed as i64);
            if start.is_some_and(|start| start.uses_image(model)) {
                images.push(Tensor::f_randn(shape, options)?);
            }
            latents.push(Tensor::f_randn(shape, options)?);
            if start.is_some_and(Start::is_inpainting) {
                masked.push(Tensor::f_randn(shape, options)?);
            }
            let of_steps: Vec<Tensor> =
                (0..plan.noise_steps()).map(|_| Tensor::randn(shape, options)).collect();
            if !of_steps.is_empty() {
                steps.push(Tensor::stack(&of_steps, 0)); // [steps, 1, c, h, w]
            }
        }
        let steps = if steps.is_empty() { Tensor::empty([0], options) } else { Tensor::cat(&steps, 1) };
        let stack = |all: Vec<Tensor>| (!all.is_empty()).then(|| Tensor::cat(&all, 0));
        Ok(Self {
            latents: Tensor::cat(&latents, 0),
            steps,
            image: stack(images),
            masked_image: stack(masked),
        })
    }
}

/// Number of UNet calls that `count` pictures take in batches of `batch_size`, for progress bars.
pub fn model_calls(
    model: &StableDiffusion,
    settings: &Settings,
    guides: &Guides,
    count: usize,
    batch_size: usize,
) -> Result<usize> {
    let plan = guides.plan(settings, model)?;
    Ok(plan.model_calls() * count.div_ceil(batch_size.max(1)))
}

/// Draws one picture for each row of `noise`, `batch_size` at a time. `tick` is called after every UNet call.
///
/// Errors: an interrupt, guides that do not fit, or latents that are not finite.
pub fn sample(
    model: &StableDiffusion,
    settings: &Settings,
    noise: &Noise,
    guides: &Guides,
    batch_size: usize,
    observer: &dyn Observer,
    tick: &mut dyn FnMut(),
) -> Result<Vec<Picture>> {
    let _guard = tch::no_grad_guard();
    guides.validate(settings, model)?;
    let guided = settings.guidance > 1.0;
    let prompts = [settings.negative_prompt.as_str(), settings.prompt.as_str()];
    let (states, _) = model.encode_prompts(if guided { &prompts } else { &prompts[1..] })?;
    let text = Text { states, guidance: settings.guidance };
    let plan = guides.plan(settings, model)?;
    let picture = guides.start.map(|start| start.prepare(model));
    let count = noise.latents.size()[0];
    let mut pictures = Vec::new();
    let mut start = 0;
    while start < count {
        let length = (count - start).min(batch_size.max(1) as i64);
        let batch = noise.batch(start, length);
        let calls = plan.model_calls();
        let steered =
            guides.control.as_ref().map(|s| Steered::new(s, start, length, calls, model.unet.device()));
        let latents = sample_batch(model, &plan, &text, &batch, (picture.as_ref(), steered), observer, tick)?;
        for latents in latents.split(1, 0) {
            if latents.isfinite().all().int64_value(&[]) == 0 {
                return Err(Error::NotFinite(format!(
                    "prompt `{}`: the latents are not finite numbers\nhint: try --dtype f32",
                    settings.prompt
                )));
            }
            // One at a time: the decoder is what needs most memory, and a picture must not depend on its neighbours.
            let pixels = model.vae.decode(&(&latents / model.vae.scaling_factor()));
            let mut image = to_image(&pixels)?;
            if let Some(start) = guides.start {
                start.paste(&mut image);
            }
            pictures.push(Picture { seed: None, latents: latents.to_device(Device::Cpu), image });
        }
        start += length;
    }
    Ok(pictures)
}

/// What the prompts say, and how much more than the negative one.
struct Text {
    /// Of the negative prompt and the prompt, or of the prompt alone.
    states: Tensor,
    guidance: f64,
}

fn sample_batch(
    model: &StableDiffusion,
    plan: &Plan,
    text: &Text,
    noise: &Noise,
    (picture, mut steered): (Option<&Prepared>, Option<Steered>),
    observer: &dyn Observer,
    tick: &mut dyn FnMut(),
) -> Result<Tensor> {
    let device = model.unet.device();
    let b = noise.latents.size()[0];
    let guided = text.states.size()[0] == 2;
    // [negative x b, prompt x b], or [prompt x b]
    let context = text.states.repeat_interleave_self_int(b, 0, None);
    let begin = match picture {
        Some(picture) => picture.begin(noise, plan, device),
        None => Begin { x: noise.unit(device) * plan.init_noise_sigma(), beside: None, kept: None },
    };
    let mut denoise = |x: &Tensor, timestep: f64| {
        let both = |x: &Tensor| if guided { Tensor::cat(&[x, x], 0) } else { x.shallow_clone() };
        let x = both(x);
        let timesteps = Tensor::full([x.size()[0]], timestep, (Kind::Float, device));
        // A control sees the latents alone.
        let signals = steered.as_mut().map(|s| s.next(&x, &timesteps, &context)).unwrap_or_default();
        let x = begin.beside.as_ref().map_or_else(|| x.shallow_clone(), |t| Tensor::cat(&[&x, &both(t)], 1));
        let output = model.unet.controlled(&x, &timesteps, &context, &signals);
        if !guided {
            return Ok(output);
        }
        let halves = output.chunk(2, 0);
        Ok(&halves[0] + (&halves[1] - &halves[0]) * text.guidance)
    };
    let mut step_noise = |i: usize| {
        if noise.steps.dim() != 5 || i as i64 >= noise.steps.size()[0] {
            let found = if noise.steps.dim() == 5 { noise.steps.size()[0] } else { 0 };
            return Err(Error::config(format!(
                "--step-noise: expected noise for step {i}, found {found} steps"
            )));
        }
        Ok(noise.steps.get(i as i64).to_device(device).to_kind(Kind::Float))
    };
    let mut progress = |_| {
        tick();
        observer
            .check(|| "stopped while sampling; pictures of the prompts before this one are saved".to_string())
    };
    let mut keep = |calls: usize, x: Tensor| match &begin.kept {
        Some(kept) => kept.keep(plan, calls, x),
        None => x,
    };
    plan.run_keeping(begin.x.shallow_clone(), &mut denoise, &mut step_noise, &mut keep, &mut progress)
}

/// Decoder output `(1, 3, h, w)` in about [-1, 1] to pixels.
fn to_image(pixels: &Tensor) -> Result<RgbImage> {
    let s = pixels.size();
    let bytes = ((pixels / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round().to_kind(Kind::Uint8);
    let bytes = bytes.squeeze_dim(0).permute([1, 2, 0]).contiguous().to_device(Device::Cpu); // [h, w, 3]
    let mut buffer = vec![0u8; bytes.numel()];
    bytes.f_copy_data(&mut buffer, bytes.numel())?;
    RgbImage::from_raw(s[3] as u32, s[2] as u32, buffer)
        .ok_or_else(|| Error::NotFinite("the decoder gave a picture of the wrong size".into()))
}
