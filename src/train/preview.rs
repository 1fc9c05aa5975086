//! What is looked at between steps: preview pictures from fixed seeds, and the loss on held-out pictures with fixed noise.
//! Neither draws from anything that training draws from.

use crate::data::Crop;
use crate::data::image::grid::{Grid, GridRow};
use crate::data::image::{RgbImage, center_crop, png};
use crate::data::pairs::ConditionFiles;
use crate::diffusion::noise::NoiseSchedule;
use crate::diffusion::sample::{self, KnownTexts, Request, SampleSettings, Session, Steering, Strength};
use crate::diffusion::stable_diffusion::{StableDiffusion, Tokens};
use crate::error::Result;
use crate::model::Denoiser;
use crate::model::control::Control;
use crate::platform::observer::{Event, Observer};
use crate::platform::{files, host, random, seed};
use crate::train::config::TrainConfig;
use crate::train::loss::{Batch, training_loss};
use crate::train::pictures::{Pictures, encode};
use std::path::{Path, PathBuf};

/// The contact sheet of previews.
const GRID_FILE: &str = "grid.png";

/// Each held-out picture is measured at this many timesteps, evenly spread.
const HELD_OUT_TIMESTEPS: i64 = 8;
/// Of held-out pairs so many are measured, the first ones.
const HELD_OUT_PAIRS: usize = 32;
/// So many held-out pairs are drawn where no validation prompts are given.
const PREVIEWED_PAIRS: usize = 4;

/// Previews in a run's folder.
const FOLDER: &str = "samples";

fn folder(run: &Path, step: i64) -> PathBuf {
    run.join(FOLDER).join(format!("step-{step:06}"))
}

/// What previews are drawn from.
pub struct Previews {
    rows: Vec<(SampleSettings, Option<RgbImage>)>,
    /// What the prompts become, unless text encoders train.
    known: KnownTexts,
}

impl Previews {
    /// The validation prompts, with their conditions where control trains; without them, the first held-out pairs. Refuses
    /// settings that the model cannot draw, before any step is taken.
    pub fn new(
        model: &StableDiffusion,
        config: &TrainConfig,
        resolution: u32,
        held_out: Option<&Pictures>,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let images = &config.previews.validation_image;
        let files = ConditionFiles::new(&config.data.pair_settings())?;
        let mut wanted: Vec<(String, Option<RgbImage>)> = Vec::new();
        for (i, prompt) in config.previews.validation_prompt.iter().enumerate() {
            let condition =
                images.get(i).or(images.last()).map(|path| files.load(path, observer)).transpose()?;
            // The middle square, as of pairs.
            let square = |c: RgbImage| {
                let side = c.width().min(c.height());
                files.shown(&center_crop(&c, side), resolution, resolution)
            };
            wanted.push((prompt.clone(), condition.map(square)));
        }
        if config.previews.num_validation_images == 0 {
            return Ok(Self { rows: Vec::new(), known: KnownTexts::default() });
        }
        if let (true, Some(pictures)) = (wanted.is_empty(), held_out) {
            for i in 0..pictures.len().min(PREVIEWED_PAIRS) {
                let shown = pictures.shown(i, resolution)?;
                wanted.extend(shown.map(|(caption, condition)| (caption, Some(condition))));
            }
        }
        let row = |(prompt, condition): (String, Option<RgbImage>)| {
            let settings = SampleSettings::square(
                model,
                &prompt,
                config.previews.validation_scheduler,
                config.previews.validation_inference_steps,
                config.previews.validation_guidance,
                resolution,
            )?;
            settings.validate(model)?;
            Ok((settings, condition))
        };
        let rows = wanted.into_iter().map(row).collect::<Result<Vec<_>>>()?;
        let known = match config.adapter.train_text_encoder {
            true => KnownTexts::default(),
            false => Session::<_, Control>::over(model, None).know_texts(rows.iter().map(|row| &row.0))?,
        };
        Ok(Self { rows, known })
    }

    /// Whether there is nothing to draw.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Whether those of a step are to be drawn still: a run may have been stopped between its checkpoint and them.
    pub fn are_missing(&self, run: &Path, step: i64) -> bool {
        !self.is_empty() && !folder(run, step).join(GRID_FILE).is_file()
    }

    /// Draws them into `samples/step-NNNNNN/` of the run: one PNG a picture, and a grid, with the conditions beside.
    pub fn draw(
        &self,
        model: &StableDiffusion,
        control: Option<&Control>,
        config: &TrainConfig,
        (run, step): (&Path, i64),
        observer: &dyn Observer,
    ) -> Result<PathBuf> {
        let place = folder(run, step);
        files::create_dir(&run.join(FOLDER))?;
        files::stage_dir(&place, |dir| self.draw_into(dir, model, control, config, step, observer))?;
        observer.tell(Event::Picture(&place.join(GRID_FILE)));
        Ok(place)
    }

    fn draw_into(
        &self,
        dir: &Path,
        model: &StableDiffusion,
        control: Option<&Control>,
        config: &TrainConfig,
        step: i64,
        observer: &dyn Observer,
    ) -> Result<()> {
        let seeds: Vec<u64> =
            (0..config.previews.num_validation_images as u64).map(|i| config.seed + i).collect();
        let condition = self.rows.iter().take(1).filter_map(|row| row.1.as_ref()).map(|_| "condition".into());
        let columns = condition.chain(seeds.iter().map(|s| format!("seed {s}"))).collect();
        let mut grid = Grid { columns, rows: Vec::new() };
        let name = model.name();
        let mut session = Session::over(model, control).with_texts(&self.known);
        for (p, (settings, condition)) in self.rows.iter().enumerate() {
            let mut request = Request::new(settings, &seeds, config.prior.sample_batch_size);
            request.steering = condition.as_ref().filter(|_| control.is_some()).map(|condition| Steering {
                conditions: sample::conditions(&[condition], settings.width, settings.height),
                strength: Strength::default(),
            });
            let pictures = session.draw(&request, observer)?;
            for (i, picture) in pictures.iter().enumerate() {
                let by = format!("{} at step {step}", config.output_dir.display());
                let mut text = settings.to_text(Some(seeds[i]), &name, &by);
                text.extend(
                    condition.iter().map(|_| ("condition".to_string(), config.data.condition.to_string())),
                );
                png::save_png(&dir.join(format!("{p:04}-{i:04}.png")), &picture.image, &text)?;
            }
            let images = condition.iter().cloned().chain(pictures.into_iter().map(|p| p.image)).collect();
            grid.rows.push(GridRow { label: settings.prompt.clone(), images });
        }
        png::save_png(&dir.join(GRID_FILE), &grid.render(), &[])
    }
}

/// Held-out pictures, encoded once, with the noise that they are always measured with.
pub struct HeldOut {
    /// Each with the tokens of its prompt where they come to mean something else in training.
    batches: Vec<(Batch, Option<Tokens>)>,
}

impl HeldOut {
    /// Encodes pictures, the middle of each.
    pub fn new(
        model: &StableDiffusion,
        config: &TrainConfig,
        resolution: u32,
        pictures: &Pictures,
    ) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let device = model.unet.device();
        let spacing = model.scheduler.train_timesteps()? as f64 / HELD_OUT_TIMESTEPS as f64;
        let timesteps: Vec<i64> =
            (0..HELD_OUT_TIMESTEPS).map(|j| ((j as f64 + 0.5) * spacing) as i64).collect();
        let most = if config.is_control() { HELD_OUT_PAIRS } else { usize::MAX };
        let mut batches = Vec::new();
        for image in 0..pictures.len().min(most) {
            let window = pictures.crop_window(image, resolution, Crop::Center);
            let (pixels, condition) = pictures.prepare(image, resolution, window)?;
            let sizes = pictures.sizes(image, resolution, window);
            let (mean, _) = encode(model, &pixels);
            let latents = model.vae.scaling().to_unet(&mean); // [1, c, h, w]
            let mut shape = latents.size();
            shape[0] = HELD_OUT_TIMESTEPS;
            let noise = random::normal(seed::derive(config.seed, "held-out noise", image as u64), &shape);
            let (tokens, _) =
                model.tokens(&[pictures.caption(image).unwrap_or(&config.data.instance_prompt)])?;
            let side = i64::from(resolution);
            // Equal rows share their memory.
            let condition =
                condition.map(|c| host::to_device(&sample::conditions(&[&c], side, side), device));
            let batch = Batch {
                latents: latents.repeat([HELD_OUT_TIMESTEPS, 1, 1, 1]),
                noise: host::to_device(&noise, device),
                timesteps: host::to_device(&host::tensor(&timesteps), device),
                conditioning: model
                    .told_sizes(model.conditioning(&tokens), &[sizes])
                    .repeat(HELD_OUT_TIMESTEPS),
                conditions: condition.map(|c| c.expand([HELD_OUT_TIMESTEPS, -1, -1, -1], false)),
                class_half: false,
            };
            batches.push((batch, config.adapter.train_text_encoder.then_some(tokens)));
        }
        Ok(Self { batches })
    }

    /// Mean denoising error over all pictures and timesteps.
    pub fn loss(&self, model: &StableDiffusion, control: Option<&Control>, schedule: &NoiseSchedule) -> f64 {
        let _guard = tch::no_grad_guard();
        let loss = |(batch, tokens): &(Batch, Option<Tokens>)| {
            let mut batch = batch.shallow_clone();
            if let Some(tokens) = tokens {
                let now = model.conditioning(tokens).repeat(HELD_OUT_TIMESTEPS);
                batch.conditioning = now.with_sizes_of(batch.conditioning);
            }
            host::number(&training_loss(&model.unet, control, schedule, &batch, 0.0, None).total)
        };
        let sum: f64 = self.batches.iter().map(loss).sum();
        sum / self.batches.len() as f64
    }
}
