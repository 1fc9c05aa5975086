//! Training: one loop. Set-up is in [`Trainer::start`]; [`Trainer::run`] is batch, loss, gradient, step, record, save.

mod batches;
pub mod checkpoint;
mod class_images;
pub mod config;
pub mod loss;
pub mod optim;
mod pictures;
mod preview;
pub mod run;
mod setup;
pub mod tensorboard;
mod totals;

pub use checkpoint::Resume;

use crate::adapter::target::TargetRule;
use crate::attach::parameters::Parameters;
use crate::attach::{self, Movement};
use crate::data::ImageFolder;
use crate::diffusion::noise::NoiseSchedule;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::model::control::{ConditionEncoder, Control};
use crate::model::layers::Layers;
use crate::platform::hub::{self, Wanted};
use crate::platform::observer::{Counter, Event, Observer};
use crate::platform::{device, files, seed};
use crate::train::checkpoint::{State, TrainedPart};
use crate::train::config::TrainConfig;
use crate::train::optim::{AdamW, Ema, LearningRate, clip_factor};
use crate::train::run::{Metrics, Record, RunFolder, Sums};
use batches::Batches;
use class_images::ClassImages;
use loss::training_loss;
use pictures::Pictures;
use preview::{HeldOut, Previews};
use setup::{find_checkpoint, resolution, trained_parts};
use std::path::PathBuf;
use std::time::Instant;
use tch::Kind;
use totals::{Reading, Totals};

/// How far the weights moved is measured at every so many records, and at the end: it looks at every adapted weight.
const RECORDS_A_MOVEMENT: i64 = 10;

/// In f16 the gradients of a mean over many pixels would vanish; in f32 and bf16 nothing is scaled.
const HALF_LOSS_SCALE: f64 = 4096.0;

/// What a finished run can say of itself.
#[derive(Debug)]
pub struct Outcome {
    /// The run folder, with the adapter at its top.
    pub folder: PathBuf,
    /// Optimiser steps taken, over all sessions.
    pub steps: i64,
    /// Loss of the last record; `None` if there was nothing left to do.
    pub loss: Option<f64>,
    /// How far the weights moved; full fine-tuning keeps no base weights to tell it by.
    pub movement: Option<Movement>,
    /// Seconds of training, over all sessions.
    pub seconds: f64,
    /// Trained values.
    pub parameters: usize,
}

struct Trainer<'a> {
    observer: &'a dyn Observer,
    config: TrainConfig,
    folder: RunFolder,
    model: StableDiffusion,
    schedule: NoiseSchedule,
    batches: Batches,
    held_out: Option<HeldOut>,
    previews: Previews,
    control: Option<Control>,
    parameters: Parameters,
    optimizer: AdamW,
    ema: Option<Ema>,
    learning_rates: Vec<LearningRate>,
    /// Number of adapted layers.
    layers: usize,
    /// Whether there are adapters beside base weights that stay.
    has_adapter: bool,
    parts: Vec<TrainedPart>,
    fingerprint: String,
    metrics: Metrics,
    totals: Totals,
    /// Mean loss up to the last record.
    mean_loss: Option<f64>,
    /// Seconds of earlier sessions, and when this one began to train.
    earlier: f64,
    started: Instant,
}

/// Trains as `config` says, from the start or from a checkpoint of the run in `config.output_dir`.
pub fn train(config: TrainConfig, resume: Option<&Resume>, observer: &dyn Observer) -> Result<Outcome> {
    let (mut trainer, step) = Trainer::start(config, resume, observer)?;
    trainer.run(step)
}

/// Makes the class pictures that a training as `config` says would begin with, where they are missing; says what was done.
/// `model` is the base model.
pub fn make_class_images(
    model: &StableDiffusion,
    config: &TrainConfig,
    observer: &dyn Observer,
) -> Result<String> {
    let resolution = resolution(config, model)?;
    ClassImages::check(model, config, resolution, &model.fingerprint()?)?.make(model, config, observer)
}

impl<'a> Trainer<'a> {
    /// Everything is checked before anything is written; the second value is the number of steps already taken.
    fn start(
        config: TrainConfig,
        resume: Option<&Resume>,
        observer: &'a dyn Observer,
    ) -> Result<(Self, i64)> {
        config.validate()?;
        let checkpoint = match resume {
            None => RunFolder::check_new(&config.output_dir).map(|()| None)?,
            Some(resume) => find_checkpoint(&config, resume, observer)?,
        };
        let compute = device::resolve(config.device, Some(config.dtype))?;
        compute.notes.iter().for_each(|note| observer.note(note));

        let (setting, path) = match &config.train_data_dir {
            Some(path) => ("train_data_dir", path),
            None => ("instance_data_dir", &config.instance_data_dir),
        };
        let instance = Pictures::read(&config, setting, path, observer)?;
        let held_out = config.held_out_data_dir.as_deref();
        let held_out =
            held_out.map(|dir| Pictures::read(&config, "held_out_data_dir", dir, observer)).transpose()?;
        let dir = hub::resolve(&config.pretrained_model_name_or_path, Wanted::Model, observer)?;
        let from = config.model_config.as_deref();
        let mut model = StableDiffusion::load_with(&dir, from, compute.kind, compute.device)?;
        model.expect_text_to_image()?;
        model.notes.iter().for_each(|note| observer.note(note));
        device::set_threads(config.threads, attach::weight_count(&mut model.unet))?;
        let resolution = resolution(&config, &model)?;
        let config = TrainConfig { resolution: Some(resolution), ..config };
        let (what, held_out_what) = if config.is_control() {
            ("pairs", "held-out pairs")
        } else {
            ("subject pictures", "held-out pictures")
        };
        let mut report = format!("{what}: {}\n", instance.report(resolution));
        if let Some(pictures) = &held_out {
            report += &format!("{held_out_what}: {}\n", pictures.report(resolution));
        }
        observer.say(report.trim_end());
        instance.warn_of_no_edges(&config, resolution, observer)?;

        if !config.with_prior_preservation
            && (config.class_data_dir.is_some() || !config.class_prompt.is_empty())
        {
            observer.note("class_data_dir and class_prompt have no effect without --with_prior_preservation");
        }
        let targets = TargetRule::from_words(&config.target_modules)?;
        let schedule = NoiseSchedule::new(&model.scheduler, compute.device)?;
        let fingerprint = model.fingerprint()?;
        let method = config.method()?;
        let text_targets = TargetRule::from_words(&config.text_target_modules)?;
        let mut layers = 0;
        if let Some(method) = &method {
            layers += attach::attach_new(&mut model.unet, &targets, method, config.bias, config.seed)?;
            setup::warn_of_idle_words("target_modules", &targets, &mut model.unet, observer);
            if config.train_text_encoder {
                for (i, tower) in model.texts.iter_mut().enumerate() {
                    let (network, seed) =
                        (&mut tower.encoder, seed::derive(config.seed, "text encoder", i as u64));
                    layers += attach::attach_new(network, &text_targets, method, config.bias, seed)?;
                }
            }
        }
        let mut encoder = setup::control_encoder(&config, &model, &instance)?;
        if config.train_text_encoder {
            for tower in &mut model.texts {
                let network = &mut tower.encoder;
                setup::warn_of_idle_words("text_target_modules", &text_targets, network, observer);
            }
        }
        let mut networks: Vec<&mut dyn Layers> = Vec::new();
        if method.is_some() {
            networks.push(&mut model.unet);
        }
        if config.train_text_encoder {
            networks.extend(model.texts.iter_mut().map(|tower| &mut tower.encoder as &mut dyn Layers));
        }
        networks.extend(encoder.iter_mut().map(|encoder| encoder as &mut dyn Layers));
        let mut parameters = attach::pack_parameters(&mut networks);
        let own = encoder.as_ref().map(ConditionEncoder::config);
        let parts = trained_parts(&config, &model, &targets, &text_targets, own)?;
        if checkpoint.is_none() {
            setup::start_from(&config, &fingerprint, &parts, &mut parameters, observer)?;
        }
        let control = encoder.map(Control::Encoder);
        let previews = Previews::new(&model, &config, resolution, held_out.as_ref(), observer)?;
        let class_images = config
            .with_prior_preservation
            .then(|| ClassImages::check(&model, &config, resolution, &fingerprint))
            .transpose()?;
        if let Some(loaded) = checkpoint.as_ref().filter(|c| c.state.base_fingerprint != fingerprint) {
            return Err(Error::Run(format!(
                "{}: the base model's weights are not those that this run began with (step {})",
                config.pretrained_model_name_or_path.display(),
                loaded.state.step
            )));
        }

        let folder = match resume {
            None => RunFolder::create(&config.output_dir, &config.to_toml()?)?,
            Some(_) => RunFolder::open(&config.output_dir, &config.to_toml()?)?,
        };
        let class = if let Some(class_images) = class_images {
            // Drawn by the base model, which an adapter that starts at the identity is only up to rounding.
            attach::set_enabled(&mut model, false);
            observer.say(&class_images.make(&model, &config, observer)?);
            attach::set_enabled(&mut model, true);
            let folder = ImageFolder::scan(&class_images::folder(&config))?;
            report += &format!("class pictures: {}\n", folder.report(resolution));
            Some(Pictures::Folder(folder))
        } else {
            None
        };
        files::write_atomic(&folder.path().join("dataset.txt"), report.as_bytes())?;

        let batches = Batches::new(&model, &config, resolution, (instance, class), observer)?;
        let held_out = held_out.map(|f| HeldOut::new(&model, &config, resolution, &f)).transpose()?;
        if method.as_ref().is_some_and(|method| method.trains_whole_network()) {
            attach::release_base(&mut model.unet);
        }
        let mut optimizer = AdamW::new(config.adamw(), &parameters);
        let mut ema = config.use_ema.then(|| Ema::new(config.ema_decay, &parameters));
        let (mut step, mut earlier, mut sums) = (0, 0.0, Sums::default());
        if let Some(loaded) = checkpoint {
            loaded.restore(&parts, &mut parameters, &mut optimizer, ema.as_mut())?;
            (step, earlier, sums) = (loaded.state.step, loaded.state.seconds, loaded.state.sums);
            observer.say(&format!("resuming after step {step}"));
            match checkpoint::remove_after(folder.path(), step)? {
                0 => {}
                n => observer.note(&format!(
                    "{n} checkpoints after step {step} are removed, as the steps after it are made anew"
                )),
            }
        }
        let metrics = Metrics::open(folder.path(), step, resume.is_some())?;
        let learning_rates = config.learning_rates();
        let totals = Totals::new(&sums, compute.device);
        let trainer = Self {
            observer,
            config,
            folder,
            model,
            schedule,
            batches,
            held_out,
            previews,
            control,
            parameters,
            optimizer,
            ema,
            learning_rates,
            layers,
            has_adapter: method.is_some_and(|method| !method.trains_whole_network()),
            parts,
            fingerprint,
            metrics,
            totals,
            mean_loss: None,
            earlier,
            started: Instant::now(),
        };
        Ok((trainer, step))
    }

    fn run(&mut self, first: i64) -> Result<Outcome> {
        let total = self.config.max_train_steps;
        if first >= total {
            let done = format!("this run is complete ({first} of {total} steps)");
            self.observer.say(&format!("{done}; raise --max_train_steps to train on"));
        } else {
            let (device, kind) = (self.model.device(), self.model.denoiser().kind());
            let (device, kind) = (format!("{device:?}").to_lowercase(), format!("{kind:?}").to_lowercase());
            let count = self.parameters.count();
            self.observer.say(&format!(
                "training {count} values on {} layers{}, steps {} to {total}, on {device} in {kind}",
                self.layers,
                if self.control.is_some() { " and in the control encoder" } else { "" },
                first + 1
            ));
        }
        let progress = Counter::new(self.observer, "training", first as u64, total.max(first) as u64);
        let mut last = None;
        for step in first + 1..=total {
            if self.observer.asks_to_stop() {
                return Err(self.stop(step - 1));
            }
            self.step(step)?;
            let due = |every: i64| step % every == 0 || step == total;
            let look = due(self.config.validation_steps);
            if look || due(self.config.log_every) {
                last = Some(self.record(step, look)?);
            }
            if due(self.config.checkpointing_steps) {
                self.save(step)?;
            }
            if look && !self.previews.is_empty() {
                let drawn = self.with_average(|t| {
                    let place = (t.folder.path(), step);
                    t.previews.draw(&t.model, t.control.as_ref(), &t.config, place, t.observer)
                });
                match drawn {
                    Ok(folder) => {
                        self.observer.say(&format!("previews of step {step}: {}", folder.display()));
                    }
                    Err(Error::Interrupted(_)) => return Err(self.stop(step)),
                    Err(e) => return Err(e),
                }
            }
            let rate = (step - first) as f64 / self.started.elapsed().as_secs_f64();
            let loss = self.mean_loss.map_or_else(String::new, |loss| format!("loss {loss:.4} "));
            let learning_rate = self.learning_rates[0].at(step - 1);
            progress.set(step as u64, &format!("{loss}lr {learning_rate:.2e} {rate:.2} step/s"));
        }
        drop(progress);
        let state = self.state(total.max(first))?;
        if let Some(ema) = &self.ema {
            // The last checkpoint, if there is one, keeps the values that training would go on with.
            self.parameters.set(&ema.average);
        }
        checkpoint::write_trained(self.folder.path(), &self.parts, &self.parameters, &state)?;
        let movement = self.movement();
        Ok(Outcome {
            folder: self.folder.path().to_path_buf(),
            steps: state.step,
            loss: last.map(|record| record.loss),
            movement,
            seconds: state.seconds,
            parameters: self.parameters.count(),
        })
    }

    /// One optimiser step. Nothing is waited for: [`Totals`] keeps the losses until they are recorded.
    fn step(&mut self, step: i64) -> Result<()> {
        let config = &self.config;
        let accumulation = config.gradient_accumulation_steps as u64;
        let scale = if self.model.denoiser().kind() == Kind::Half { HALF_LOSS_SCALE } else { 1.0 };
        self.parameters.zero_gradient();
        for micro in 0..accumulation {
            let index = (step - 1) as u64 * accumulation + micro;
            let batch = self.batches.batch(&self.model, index, config.train_text_encoder)?;
            let loss = training_loss(
                &self.model.unet,
                self.control.as_ref(),
                &self.schedule,
                &batch,
                config.prior_loss_weight,
                config.snr_gamma,
            );
            let regulariser =
                if config.hra_lambda > 0.0 { attach::regulariser(&mut self.model) } else { None };
            let total = match &regulariser {
                Some(regulariser) => &loss.total + regulariser * config.hra_lambda,
                None => loss.total.shallow_clone(),
            };
            let share = 1.0 / accumulation as f64;
            let parts = [Some(&total), Some(&loss.instance), loss.prior.as_ref(), regulariser.as_ref()];
            self.totals.add(step, parts, share);
            (total * (scale / accumulation as f64)).backward();
        }
        let norm = self.parameters.gradient_norm() / scale;
        self.totals.end_step(step, &norm);
        let factor = clip_factor(&norm, config.max_grad_norm) / scale;
        let rates: Vec<f64> = self.learning_rates.iter().map(|rate| rate.at(step - 1)).collect();
        self.optimizer.step(&mut self.parameters, &factor, &rates);
        attach::project(&mut self.model);
        if let Some(ema) = &mut self.ema {
            ema.update(&self.parameters, step);
        }
        Ok(())
    }

    /// Waits for the device, and writes what the steps since the last record came to.
    fn record(&mut self, step: i64, look: bool) -> Result<Record> {
        let Reading { sums, gradient_norm, .. } = self.read(true)?;
        let config = &self.config;
        let last = step == config.max_train_steps;
        let mean = |sum: f64| sum / sums.count;
        self.mean_loss = Some(mean(sums.loss));
        let mut record = Record {
            step,
            loss: mean(sums.loss),
            loss_instance: mean(sums.instance),
            loss_prior: config.with_prior_preservation.then(|| mean(sums.prior)),
            regulariser: (config.hra_lambda > 0.0).then(|| mean(sums.regulariser)),
            learning_rate: self.learning_rates[0].at(step - 1),
            gradient_norm,
            seconds: self.seconds(),
            ..Record::default()
        };
        if last || look || step % (config.log_every * RECORDS_A_MOVEMENT) == 0 {
            let movement = self.movement();
            record.weight_change = movement.map(|m| m.mean);
            record.weight_change_max = movement.map(|m| m.largest);
            record.orthogonality_error = movement.and_then(|m| m.orthogonality_error);
        }
        if look && self.held_out.is_some() {
            let look = |h: &HeldOut, t: &Self| h.loss(&t.model, t.control.as_ref(), &t.schedule);
            record.held_out_loss = self.with_average(|t| Ok(t.held_out.as_ref().map(|h| look(h, t))))?;
        }
        let written = self.metrics.write(&record)?;
        self.observer.tell(Event::Metrics(&written));
        Ok(record)
    }

    /// Runs `look` with the averaged adapter in place, where there is one.
    fn with_average<T>(&mut self, look: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        let Some(average) = self.ema.as_ref().map(|ema| ema.average.shallow_clone()) else {
            return look(self);
        };
        let own = self.parameters.flat().copy();
        self.parameters.set(&average);
        let result = look(self);
        self.parameters.set(&own);
        result
    }

    fn movement(&mut self) -> Option<Movement> {
        self.has_adapter.then(|| attach::movement(&mut self.model))
    }

    fn seconds(&self) -> f64 {
        self.earlier + self.started.elapsed().as_secs_f64()
    }

    /// Waits for the device. Fails where a number since the last reading was not finite: nothing is saved then.
    fn read(&mut self, clear: bool) -> Result<Reading> {
        let reading = self.totals.read(clear);
        match reading.not_finite {
            Some((step, what)) => Err(self.not_finite(step, what)),
            None => Ok(reading),
        }
    }

    fn state(&mut self, step: i64) -> Result<State> {
        let sums = self.read(false)?.sums;
        Ok(State::new(step, self.seconds(), &self.fingerprint, &self.parameters, sums))
    }

    fn save(&mut self, step: i64) -> Result<PathBuf> {
        let state = self.state(step)?;
        checkpoint::save(
            self.folder.path(),
            &state,
            &self.parts,
            &self.parameters,
            &self.optimizer,
            self.ema.as_ref(),
            self.config.checkpoints_total_limit,
        )
    }

    /// Saves after a request to stop; what to tell the user.
    fn stop(&mut self, step: i64) -> Error {
        let folder = files::shell_word(&self.folder.path().to_string_lossy());
        match self.save(step) {
            Ok(path) => Error::Interrupted(format!(
                "stopped after step {step}, saved {}\nhint: go on with `hra train --resume latest --output_dir {folder}`",
                path.display()
            )),
            Err(e) => e,
        }
    }

    fn not_finite(&self, step: i64, what: &str) -> Error {
        let steps = checkpoint::list(self.folder.path()).unwrap_or_default();
        let good = steps.last().map_or_else(
            || "there is no checkpoint".to_string(),
            |s| {
                format!(
                    "the last good checkpoint is {}",
                    checkpoint::folder(self.folder.path(), *s).display()
                )
            },
        );
        Error::NotFinite(format!(
            "step {step}: {what} is not a finite number; {good}\nhint: try a lower --learning_rate, or --dtype f32"
        ))
    }
}
