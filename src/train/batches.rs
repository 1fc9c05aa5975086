//! What each step is trained on. A batch is a function of (run seed, step) alone, so a resumed run sees what the
//! uninterrupted one would have seen, and nothing else that draws random numbers can disturb it.

use super::loss::Batch;
use crate::config::TrainConfig;
use crate::data::{Crop, ImageFolder, Window, to_chw_f32};
use crate::error::{Error, Result};
use crate::seed;
use crate::stable_diffusion::StableDiffusion;
use std::collections::HashMap;
use tch::{Device, Kind, Tensor};

/// Moments are kept for at most this many different crops; a folder of large pictures with random crops has more, and
/// is encoded anew at each step.
const MAX_CACHED: u64 = 4096;

/// Subject pictures or class pictures with their prompt's states.
struct Source {
    /// In the purposes of random draws.
    name: &'static str,
    folder: ImageFolder,
    /// Pictures of the folder that are used.
    count: usize,
    /// Ids of the prompt `(1, n)`.
    ids: Tensor,
    /// Its states `(1, n, d)`, unless the text encoder trains: then they are made anew for each batch, with gradient.
    states: Option<Tensor>,
    cache: bool,
    /// Mean and standard deviation of a crop's latents, `(1, c, h, w)`: the VAE is frozen, so this is exact.
    moments: HashMap<(usize, Window), (Tensor, Tensor)>,
}

/// Makes the batches of a run.
pub struct Batches {
    seed: u64,
    resolution: u32,
    center_crop: bool,
    batch_size: u64,
    train_timesteps: u64,
    instance: Source,
    class: Option<Source>,
}

impl Batches {
    /// From folders that have been scanned.
    pub fn new(
        model: &StableDiffusion,
        config: &TrainConfig,
        resolution: u32,
        instance: ImageFolder,
        class: Option<ImageFolder>,
    ) -> Result<Self> {
        let source = |name, folder: ImageFolder, prompt: &str, most: usize| {
            let (ids, warnings) = model.prompt_ids(&[prompt])?;
            warnings.iter().for_each(|w| eprintln!("warning: {w}"));
            let count = folder.images().len().min(most);
            let crops: u64 = (0..count)
                .map(|i| if config.center_crop { 1 } else { folder.window_count(i, resolution) })
                .fold(0, u64::saturating_add);
            Ok::<Source, Error>(Source {
                name,
                folder,
                count,
                states: (!config.train_text_encoder).then(|| model.text_states(&ids)),
                ids,
                cache: crops <= MAX_CACHED,
                moments: HashMap::new(),
            })
        };
        let class = class
            .map(|folder| source("class", folder, &config.class_prompt, config.num_class_images))
            .transpose()?;
        Ok(Self {
            seed: config.seed,
            resolution,
            center_crop: config.center_crop,
            batch_size: config.train_batch_size as u64,
            train_timesteps: model.scheduler.train_timesteps()? as u64,
            instance: source("instance", instance, &config.instance_prompt, usize::MAX)?,
            class,
        })
    }

    /// The batch of number `index`, counted from 0 over all steps and accumulations.
    pub fn batch(&mut self, model: &StableDiffusion, index: u64) -> Result<Batch> {
        let mut rows = Vec::new();
        let mut states = Vec::new();
        let draws = index * self.batch_size..(index + 1) * self.batch_size;
        let (seed, resolution, center) = (self.seed, self.resolution, self.center_crop);
        for source in std::iter::once(&mut self.instance).chain(&mut self.class) {
            let own = match &source.states {
                Some(fixed) => fixed.shallow_clone(),
                None => model.text_encoder.forward(&source.ids),
            };
            let _guard = tch::no_grad_guard();
            for draw in draws.clone() {
                rows.push(source.row(model, seed, draw, resolution, center, self.train_timesteps)?);
                states.push(own.shallow_clone());
            }
        }
        let device = model.unet.device();
        let latents: Vec<&Tensor> = rows.iter().map(|r| &r.latents).collect();
        let noise: Vec<&Tensor> = rows.iter().map(|r| &r.noise).collect();
        let timesteps: Vec<i64> = rows.iter().map(|r| r.timestep).collect();
        Ok(Batch {
            latents: Tensor::cat(&latents, 0),
            noise: Tensor::cat(&noise, 0).to_device(device),
            timesteps: Tensor::from_slice(&timesteps).to_device(device),
            context: Tensor::cat(&states, 0),
            class_half: self.class.is_some(),
        })
    }
}

/// One sample of a batch.
struct Row {
    /// Scaled, `(1, c, h, w)`, on the device.
    latents: Tensor,
    /// The same shape, CPU.
    noise: Tensor,
    timestep: i64,
}

impl Source {
    fn row(
        &mut self,
        model: &StableDiffusion,
        run_seed: u64,
        draw: u64,
        resolution: u32,
        center: bool,
        train_timesteps: u64,
    ) -> Result<Row> {
        let purpose = |what: &str| seed::derive(run_seed, &format!("{} {what}", self.name), draw);
        // Every picture once, in a new order, before any comes again.
        let n = self.count as u64;
        let order = seed::derive(run_seed, &format!("{} order", self.name), draw / n);
        let image = seed::permutation(order, self.count)[(draw % n) as usize];
        let crop = if center { Crop::Center } else { Crop::Random(purpose("crop")) };
        let window = self.folder.crop_window(image, resolution, crop);
        let (latent_seed, noise_seed) = (purpose("latent"), purpose("noise"));
        let timestep = (purpose("timestep") % train_timesteps) as i64;

        let (mean, deviation) = self.latent_moments(model, image, window, resolution)?;
        let shape = mean.size();
        let draw_unit = |seed: u64| {
            tch::manual_seed(seed as i64);
            Tensor::randn(&shape[..], (Kind::Float, Device::Cpu))
        };
        let latents = mean + deviation * draw_unit(latent_seed).to_device(model.unet.device());
        Ok(Row { latents: latents * model.vae.scaling_factor(), noise: draw_unit(noise_seed), timestep })
    }

    fn latent_moments(
        &mut self,
        model: &StableDiffusion,
        image: usize,
        window: Window,
        resolution: u32,
    ) -> Result<(Tensor, Tensor)> {
        if let Some((mean, deviation)) = self.moments.get(&(image, window)) {
            return Ok((mean.shallow_clone(), deviation.shallow_clone()));
        }
        let (mean, log_variance) = encode(model, &self.folder, image, window, resolution)?;
        let deviation = (log_variance * 0.5).exp();
        if self.cache {
            self.moments.insert((image, window), (mean.shallow_clone(), deviation.shallow_clone()));
        }
        Ok((mean, deviation))
    }
}

/// Mean and log-variance of the latents of one crop, each `(1, c, h, w)`.
pub fn encode(
    model: &StableDiffusion,
    folder: &ImageFolder,
    image: usize,
    window: Window,
    resolution: u32,
) -> Result<(Tensor, Tensor)> {
    let pixels = folder.prepare(image, resolution, window)?;
    let size = i64::from(resolution);
    let pixels = Tensor::from_slice(&to_chw_f32(&pixels)).view([1, 3, size, size]);
    Ok(model.vae.encode(&pixels))
}
