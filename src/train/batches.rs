//! What each step is trained on. A batch is a function of (run seed, step) alone, so a resumed run sees what the
//! uninterrupted one would have seen, and nothing else that draws random numbers can disturb it.

use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::Result;
use crate::model::{Conditioning, Denoiser};
use crate::platform::host;
use crate::platform::observer::Observer;
use crate::train::config::TrainConfig;
use crate::train::loss::Batch;
use crate::train::picture_source::{BatchDraws, BatchRow, FixedPrompt, PictureSource, Said};
use crate::train::pictures::Pictures;
use std::collections::HashMap;
use std::ops::Range;
use tch::Tensor;

/// Makes the batches of a run.
pub struct Batches {
    draws: BatchDraws,
    batch_size: u64,
    /// The subject's pictures, or pairs.
    instance: PictureSource,
    class: Option<PictureSource>,
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
        let draws = BatchDraws {
            seed: config.seed,
            resolution,
            center_crop: config.data.center_crop,
            train_timesteps: model.scheduler.train_timesteps()? as u64,
        };
        let source = |name, pictures: Pictures, prompt: &str, most: usize| {
            let said = match &pictures {
                Pictures::Folder(_) => {
                    let trains_text = config.adapter.train_text_encoder;
                    Said::Prompt(FixedPrompt::new(model, prompt, trains_text, observer)?)
                }
                Pictures::Pairs(_) => {
                    warn_of_long_captions(model, &pictures, observer)?;
                    Said::Captions { empty: config.data.proportion_empty_prompts, known: HashMap::new() }
                }
            };
            Result::Ok(PictureSource::new(name, pictures, said, most, draws))
        };
        let class = class
            .map(|pictures| {
                source("class", pictures, &config.prior.class_prompt, config.prior.num_class_images)
            })
            .transpose()?;
        let name = if config.is_control() { "pair" } else { "instance" };
        let instance = source(name, instance, &config.data.instance_prompt, usize::MAX)?;
        Ok(Self { draws, batch_size: config.schedule.train_batch_size as u64, instance, class })
    }

    /// Has every source encode ahead what it shows in these batches, by `encode`; the answer is whether all of them could.
    pub(super) fn encode_ahead(
        &mut self,
        batches: Range<u64>,
        encode: impl Fn(&mut PictureSource, BatchDraws, Range<u64>) -> Result<bool>,
    ) -> Result<bool> {
        let number = |batch: u64| batch.saturating_mul(self.batch_size);
        let numbers = number(batches.start)..number(batches.end);
        let mut all = true;
        for source in std::iter::once(&mut self.instance).chain(&mut self.class) {
            all &= encode(source, self.draws, numbers.clone())?;
        }
        Ok(all)
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
        let sizes: Vec<_> = rows.iter().map(|r| r.sizes).collect();
        let conditioning = Conditioning::cat(&conditionings.iter().collect::<Vec<_>>());
        let timesteps: Vec<i64> = rows.iter().map(|r| r.timestep).collect();
        let conditions: Vec<&Tensor> = rows.iter().filter_map(|r| r.condition.as_ref()).collect();
        Ok(Batch {
            latents: model.vae.scaling().to_unet(&latents),
            noise: noise.get(1),
            timesteps: host::to_device(&host::tensor(&timesteps), device),
            conditioning: model.told_sizes(conditioning, &sizes),
            conditions: (!conditions.is_empty())
                .then(|| host::to_device(&Tensor::cat(&conditions, 0), device)),
            class_half: self.class.is_some(),
        })
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
