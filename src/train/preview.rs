//! What is looked at between steps: preview pictures from fixed seeds, and the loss on held-out pictures with fixed noise.
//! Neither draws from anything that training draws from.

use super::batches::encode;
use super::loss::{Batch, training_loss};
use crate::config::TrainConfig;
use crate::data::{Crop, ImageFolder};
use crate::error::Result;
use crate::files;
use crate::image::grid::{Grid, GridRow};
use crate::image::png;
use crate::noise::NoiseSchedule;
use crate::sample::{self, Guides, Noise, Settings};
use crate::seed;
use crate::stable_diffusion::StableDiffusion;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// Each held-out picture is measured at this many timesteps, evenly spread.
const HELD_OUT_TIMESTEPS: i64 = 8;

/// Refuses preview settings that the model cannot draw, before any step is taken.
pub fn check(model: &StableDiffusion, config: &TrainConfig, resolution: u32) -> Result<()> {
    config
        .validation_prompt
        .iter()
        .try_for_each(|prompt| settings(model, config, resolution, prompt)?.validate(model))
}

fn settings(
    model: &StableDiffusion,
    config: &TrainConfig,
    resolution: u32,
    prompt: &str,
) -> Result<Settings> {
    Settings::square(
        model,
        prompt,
        config.validation_scheduler,
        config.validation_inference_steps,
        config.validation_guidance,
        resolution,
    )
}

/// Draws the validation prompts into `samples/step-NNNNNN/` of the run: one PNG a picture, and a grid.
pub fn draw(
    model: &StableDiffusion,
    config: &TrainConfig,
    resolution: u32,
    run: &Path,
    step: i64,
) -> Result<PathBuf> {
    let place = run.join("samples").join(format!("step-{step:06}"));
    files::create_dir_all(&run.join("samples"))?;
    files::stage_dir(&place, |dir| draw_into(dir, model, config, resolution, step))?;
    Ok(place)
}

fn draw_into(
    dir: &Path,
    model: &StableDiffusion,
    config: &TrainConfig,
    resolution: u32,
    step: i64,
) -> Result<()> {
    let seeds: Vec<u64> = (0..config.num_validation_images as u64).map(|i| config.seed + i).collect();
    let mut grid = Grid { columns: seeds.iter().map(|s| format!("seed {s}")).collect(), rows: Vec::new() };
    let name = model.name();
    for (p, prompt) in config.validation_prompt.iter().enumerate() {
        let settings = settings(model, config, resolution, prompt)?;
        let noise = Noise::draw(&seeds, &settings, model)?;
        let (guides, batch) = (Guides::default(), config.sample_batch_size);
        let pictures = sample::sample(model, &settings, &noise, &guides, batch, &mut || {})?;
        for (i, picture) in pictures.iter().enumerate() {
            let text = settings.to_text(
                Some(seeds[i]),
                &name,
                &format!("{} at step {step}", config.output_dir.display()),
            );
            png::save_png(&dir.join(format!("{p:04}-{i:04}.png")), &picture.image, &text)?;
        }
        let images = pictures.into_iter().map(|p| p.image).collect();
        grid.rows.push(GridRow { label: prompt.clone(), images });
    }
    png::save_png(&dir.join("grid.png"), &grid.render(), &[])
}

/// Held-out pictures, encoded once, with the noise that they are always measured with.
pub struct HeldOut {
    batches: Vec<Batch>,
    /// Ids of the subject's prompt `(1, n)`; its states may change in training.
    ids: Tensor,
}

impl HeldOut {
    /// Encodes the pictures of `folder`, the middle of each.
    pub fn new(
        model: &StableDiffusion,
        config: &TrainConfig,
        resolution: u32,
        folder: &ImageFolder,
    ) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let device = model.unet.device();
        let (ids, _) = model.prompt_ids(&[&config.instance_prompt])?;
        let states = model.text_states(&ids);
        let spacing = model.scheduler.train_timesteps()? as f64 / HELD_OUT_TIMESTEPS as f64;
        let timesteps: Vec<i64> =
            (0..HELD_OUT_TIMESTEPS).map(|j| ((j as f64 + 0.5) * spacing) as i64).collect();
        let mut batches = Vec::new();
        for image in 0..folder.images().len() {
            let window = folder.crop_window(image, resolution, Crop::Center);
            let (mean, _) = encode(model, folder, image, window, resolution)?;
            let latents = mean * model.vae.scaling_factor(); // [1, c, h, w]
            tch::manual_seed(seed::derive(config.seed, "held-out noise", image as u64) as i64);
            let mut shape = latents.size();
            shape[0] = HELD_OUT_TIMESTEPS;
            let noise = Tensor::randn(&shape[..], (Kind::Float, tch::Device::Cpu)).to_device(device);
            batches.push(Batch {
                latents: latents.repeat([HELD_OUT_TIMESTEPS, 1, 1, 1]),
                noise,
                timesteps: Tensor::from_slice(&timesteps).to_device(device),
                context: states.repeat([HELD_OUT_TIMESTEPS, 1, 1]),
                class_half: false,
            });
        }
        Ok(Self { batches, ids })
    }

    /// Mean denoising error over all pictures and timesteps.
    pub fn loss(&self, model: &StableDiffusion, schedule: &NoiseSchedule) -> f64 {
        let _guard = tch::no_grad_guard();
        let states = model.text_states(&self.ids).repeat([HELD_OUT_TIMESTEPS, 1, 1]);
        let loss = |batch: &Batch| {
            let batch = Batch { context: states.shallow_clone(), ..batch.shallow_clone() };
            training_loss(&model.unet, schedule, &batch, 0.0, None).total.double_value(&[])
        };
        let sum: f64 = self.batches.iter().map(loss).sum();
        sum / self.batches.len() as f64
    }
}
