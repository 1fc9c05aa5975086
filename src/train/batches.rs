//! What each step is trained on. A batch is a function of (run seed, step) alone, so a resumed run sees what the
//! uninterrupted one would have seen, and nothing else that draws random numbers can disturb it.

use crate::data::image::RgbImage;
use crate::data::{Crop, Window};
use crate::diffusion::sample::conditions;
use crate::diffusion::stable_diffusion::{StableDiffusion, Tokens};
use crate::error::Result;
use crate::model::{Conditioning, Denoiser};
use crate::platform::observer::Observer;
use crate::platform::{host, random, seed};
use crate::train::config::TrainConfig;
use crate::train::loss::Batch;
use crate::train::pictures::{Pictures, encode};
use std::collections::HashMap;
use std::ops::Range;
use tch::Tensor;

/// Moments are kept for at most this many different crops; a folder of large pictures with random crops has more, and
/// is encoded anew at each step.
const MAX_CACHED: u64 = 4096;

/// Pictures of the subject, of its class, or pairs, with the states of what is said of them.
struct PictureSource {
    /// In the purposes of random draws.
    name: &'static str,
    pictures: Pictures,
    /// Pictures that are used.
    count: usize,
    /// What is said of all pictures; pairs have captions of their own.
    prompt: Option<FixedPrompt>,
    /// Share of captions that are left out.
    empty: f64,
    cache: bool,
    /// Mean and standard deviation of a crop's latents, `(1, c, h, w)`: the VAE is frozen, so this is exact.
    moments: HashMap<(usize, Window), (Tensor, Tensor)>,
}

/// One prompt for all pictures.
struct FixedPrompt {
    tokens: Tokens,
    /// What it becomes, unless text encoders train: then it is made anew for each batch, with gradient.
    conditioning: Option<Conditioning>,
}

/// Makes the batches of a run.
pub struct Batches {
    draws: BatchDraws,
    batch_size: u64,
    /// The subject's pictures, or pairs.
    instance: PictureSource,
    class: Option<PictureSource>,
}

/// What a sample's random numbers depend on beside its number.
#[derive(Clone, Copy)]
struct BatchDraws {
    seed: u64,
    resolution: u32,
    center_crop: bool,
    train_timesteps: u64,
}

impl Batches {
    /// From pictures that have been scanned.
    pub fn new(
        model: &StableDiffusion,
        config: &TrainConfig,
        resolution: u32,
        (instance, class): (Pictures, Option<Pictures>),
        observer: &dyn Observer,
    ) -> Result<Self> {
        let source = |name, pictures: Pictures, prompt: &str, most: usize| {
            let count = pictures.len().min(most);
            let crops: u64 = (0..count)
                .map(|i| if config.data.center_crop { 1 } else { pictures.window_count(i, resolution) })
                .fold(0, u64::saturating_add);
            let prompt = match &pictures {
                Pictures::Folder(_) => {
                    Some(FixedPrompt::new(model, prompt, config.adapter.train_text_encoder, observer)?)
                }
                Pictures::Pairs(_) => {
                    warn_of_long_captions(model, &pictures, observer)?;
                    None
                }
            };
            Result::Ok(PictureSource {
                name,
                pictures,
                count,
                prompt,
                empty: config.data.proportion_empty_prompts,
                cache: crops <= MAX_CACHED,
                moments: HashMap::new(),
            })
        };
        let class = class
            .map(|pictures| {
                source("class", pictures, &config.prior.class_prompt, config.prior.num_class_images)
            })
            .transpose()?;
        let name = if config.is_control() { "pair" } else { "instance" };
        Ok(Self {
            draws: BatchDraws {
                seed: config.seed,
                resolution,
                center_crop: config.data.center_crop,
                train_timesteps: model.scheduler.train_timesteps()? as u64,
            },
            batch_size: config.schedule.train_batch_size as u64,
            instance: source(name, instance, &config.data.instance_prompt, usize::MAX)?,
            class,
        })
    }

    /// The batch of number `index`, counted from 0 over all steps and accumulations. `trains_text` says whether the states of
    /// captions carry gradients.
    pub fn batch(&mut self, model: &StableDiffusion, index: u64, trains_text: bool) -> Result<Batch> {
        let mut rows = Vec::new();
        let mut conditionings = Vec::new();
        let numbers = index * self.batch_size..(index + 1) * self.batch_size;
        for source in std::iter::once(&mut self.instance).chain(&mut self.class) {
            let samples = source.samples(self.draws, numbers.clone());
            conditionings.push(source.conditioning(model, self.draws, &samples, trains_text)?);
            let _guard = tch::no_grad_guard();
            for sample in samples {
                rows.push(source.row(model, self.draws, sample)?);
            }
        }
        let device = model.unet.device();
        let all = |part: fn(&BatchRow) -> &Tensor| Tensor::cat(&rows.iter().map(part).collect::<Vec<_>>(), 0);
        // All noise of a batch goes to the device at once.
        let noise = Tensor::stack(&[all(|r| &r.latent_noise), all(|r| &r.noise)], 0);
        let noise = host::to_device(&noise, device);
        let latents = all(|r| &r.mean) + all(|r| &r.deviation) * noise.get(0);
        let timesteps: Vec<i64> = rows.iter().map(|r| r.timestep).collect();
        let conditions: Vec<&Tensor> = rows.iter().filter_map(|r| r.condition.as_ref()).collect();
        Ok(Batch {
            latents: model.vae.scaling().to_unet(&latents),
            noise: noise.get(1),
            timesteps: host::to_device(&host::tensor(&timesteps), device),
            conditioning: Conditioning::cat(&conditionings.iter().collect::<Vec<_>>()),
            conditions: (!conditions.is_empty())
                .then(|| host::to_device(&Tensor::cat(&conditions, 0), device)),
            class_half: self.class.is_some(),
        })
    }
}

/// A sample's number, counted over the whole run, and its picture.
#[derive(Clone, Copy)]
struct Sample {
    number: u64,
    image: usize,
}

/// What a sample is.
struct BatchRow {
    /// Mean and standard deviation of the latents, `(1, c, h, w)`, on the device.
    mean: Tensor,
    deviation: Tensor,
    /// What the latents are drawn with, and what is added to them; the same shape, on the host.
    latent_noise: Tensor,
    noise: Tensor,
    timestep: i64,
    /// `(1, 3, H, W)`, on the host.
    condition: Option<Tensor>,
}

impl FixedPrompt {
    fn new(
        model: &StableDiffusion,
        prompt: &str,
        trains_text: bool,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let (tokens, warnings) = model.tokens(&[prompt])?;
        warnings.iter().for_each(|w| observer.warn(w));
        Ok(Self { conditioning: (!trains_text).then(|| model.conditioning(&tokens)), tokens })
    }
}

/// Says how many captions are cut, and the first of them.
fn warn_of_long_captions(
    model: &StableDiffusion,
    pictures: &Pictures,
    observer: &dyn Observer,
) -> Result<()> {
    let mut cut = Vec::new();
    for i in 0..pictures.len() {
        cut.extend(model.tokens(&[pictures.caption(i).unwrap_or_default()])?.1);
    }
    if let Some(first) = cut.first() {
        observer.warn(&format!("{} of {} captions are cut; {first}", cut.len(), pictures.len()));
    }
    Ok(())
}

impl PictureSource {
    fn purpose(&self, draws: BatchDraws, what: &str, number: u64) -> u64 {
        seed::derive(draws.seed, &format!("{} {what}", self.name), number)
    }

    /// The samples of a batch: every picture once, in a new order, before any comes again.
    fn samples(&self, draws: BatchDraws, numbers: Range<u64>) -> Vec<Sample> {
        let n = self.count as u64;
        let (mut round, mut order) = (None, Vec::new());
        let sample = |number: u64| {
            if round != Some(number / n) {
                round = Some(number / n);
                order = seed::permutation(self.purpose(draws, "order", number / n), self.count);
            }
            Sample { number, image: order[(number % n) as usize] }
        };
        numbers.map(sample).collect()
    }

    /// What is said of samples.
    fn conditioning(
        &self,
        model: &StableDiffusion,
        draws: BatchDraws,
        samples: &[Sample],
        trains_text: bool,
    ) -> Result<Conditioning> {
        if let Some(prompt) = &self.prompt {
            let one = match &prompt.conditioning {
                Some(fixed) => fixed.shallow_clone(),
                None => model.conditioning_with_gradient(&prompt.tokens),
            };
            return Ok(one.repeat(samples.len() as i64));
        }
        let caption = |sample: &Sample| {
            // The upper 53 bits, a number from 0 up to 1.
            let draw = (self.purpose(draws, "caption", sample.number) >> 11) as f64 / (1u64 << 53) as f64;
            if draw < self.empty { "" } else { self.pictures.caption(sample.image).unwrap_or_default() }
        };
        let captions: Vec<&str> = samples.iter().map(caption).collect();
        let (tokens, _) = model.tokens(&captions)?;
        Ok(if trains_text { model.conditioning_with_gradient(&tokens) } else { model.conditioning(&tokens) })
    }

    fn row(&mut self, model: &StableDiffusion, draws: BatchDraws, sample: Sample) -> Result<BatchRow> {
        let Sample { number, image } = sample;
        let purpose = |what: &str| self.purpose(draws, what, number);
        let crop = if draws.center_crop { Crop::Center } else { Crop::Random(purpose("crop")) };
        let window = self.pictures.crop_window(image, draws.resolution, crop);
        let (latent_seed, noise_seed) = (purpose("latent"), purpose("noise"));
        let timestep = (purpose("timestep") % draws.train_timesteps) as i64;

        let known = self.moments.get(&(image, window)).map(|(m, d)| (m.shallow_clone(), d.shallow_clone()));
        // Pixels are read where something is to be made of them.
        let prepared = match &known {
            Some(_) if !self.pictures.has_conditions() => None,
            _ => Some(self.pictures.prepare(image, draws.resolution, window)?),
        };
        let (mean, deviation) = match (known, &prepared) {
            (Some(known), _) => known,
            (None, Some((pixels, _))) => self.latent_moments(model, (image, window), pixels),
            (None, None) => unreachable!("pixels are read where moments are not known"),
        };
        let side = i64::from(draws.resolution);
        let condition = prepared.and_then(|(_, condition)| condition);
        let shape = mean.size();
        Ok(BatchRow {
            latent_noise: random::normal(latent_seed, &shape),
            noise: random::normal(noise_seed, &shape),
            mean,
            deviation,
            timestep,
            condition: condition.map(|c| conditions(&[&c], side, side)),
        })
    }

    fn latent_moments(
        &mut self,
        model: &StableDiffusion,
        place: (usize, Window),
        pixels: &RgbImage,
    ) -> (Tensor, Tensor) {
        let (mean, log_variance) = encode(model, pixels);
        let deviation = (log_variance * 0.5).exp();
        if self.cache {
            self.moments.insert(place, (mean.shallow_clone(), deviation.shallow_clone()));
        }
        (mean, deviation)
    }
}
