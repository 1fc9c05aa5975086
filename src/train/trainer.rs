//! The loop: batch, loss, gradient, step, record, save.

use crate::attach::{self, Movement};
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, ErrorKind, Result};
use crate::platform::device::{self, PeakMemory};
use crate::platform::observer::{Counter, Event, Observer};
use crate::platform::precision::Precision;
use crate::platform::{files, host};
use crate::train::checkpoint::{self, TrainState};
use crate::train::config::TrainConfig;
use crate::train::loss::{Batch, training_loss};
use crate::train::loss_scale::LossScale;
use crate::train::optim::clip_factor;
use crate::train::prepare::{Data, Networks, Optimisation, PreparedRun, Run};
use crate::train::preview::HeldOut;
use crate::train::recent_loss::RecentLoss;
use crate::train::run::Record;
use crate::train::totals::Reading;
use std::path::PathBuf;
use std::time::Instant;
use tch::Tensor;

/// How far the weights moved is measured at every so many records, and at the end: it looks at every adapted weight.
const RECORDS_A_MOVEMENT: i64 = 10;

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
    /// What it took of a GPU.
    pub gpu: Option<PeakMemory>,
    /// Trained values.
    pub parameters: usize,
}

pub(super) struct Trainer<'a> {
    observer: &'a dyn Observer,
    config: TrainConfig,
    run: Run,
    networks: Networks,
    data: Data,
    optimisation: Optimisation,
    /// What is shown of the loss; single steps differ by the noise that they drew.
    recent_loss: RecentLoss,
    started: Instant,
}

impl<'a> Trainer<'a> {
    pub(super) fn new(prepared: PreparedRun, observer: &'a dyn Observer) -> Self {
        let PreparedRun { config, run, networks, data, optimisation } = prepared;
        let (recent_loss, started) = (RecentLoss::default(), Instant::now());
        Self { observer, config, run, networks, data, optimisation, recent_loss, started }
    }

    pub(super) fn run(mut self) -> Result<Outcome> {
        let (first, total) = (self.run.taken, self.config.schedule.max_train_steps);
        let accumulation = self.config.schedule.gradient_accumulation_steps as u64;
        self.announce(first, total);
        if first > 0
            && self.is_due(first, self.config.previews.validation_steps)
            && self.data.previews.are_missing(self.run.folder.path(), first)
        {
            self.draw_previews(first)?;
        }
        let progress = Counter::new(self.observer, "training", first as u64, total.max(first) as u64);
        let mut last = None;
        for step in first + 1..=total {
            if self.observer.asks_to_stop() {
                return Err(self.stop(step - 1));
            }
            self.optimisation.parameters.zero_gradient();
            for micro in 0..accumulation {
                let index = (step - 1) as u64 * accumulation + micro;
                let trains_text = self.config.adapter.train_text_encoder;
                attach::prepare(&mut self.networks.model);
                let batch = self.data.batches.batch(&self.networks.model, index, trains_text)?;
                let loss = self.loss(&batch);
                loss.backward();
            }
            self.update(step)?;
            let look = self.is_due(step, self.config.previews.validation_steps);
            if look || self.is_due(step, self.config.checkpoints.log_every) {
                last = self.record(step, look)?.or(last);
            }
            if self.is_due(step, self.config.checkpoints.checkpointing_steps) {
                self.save(step)?;
            }
            if look {
                self.draw_previews(step)?;
            }
            let rate = (step - first) as f64 / self.started.elapsed().as_secs_f64();
            let loss = &self.recent_loss;
            let learning_rate = self.optimisation.learning_rates[0].at(step - 1);
            progress.set(step as u64, &format!("{loss}lr {learning_rate:.2e} {rate:.2} step/s"));
        }
        drop(progress);
        self.finish(total.max(first), last)
    }

    /// Whether what is done at every so many steps, and at the end, is done after `step`.
    fn is_due(&self, step: i64, every: i64) -> bool {
        step % every == 0 || step == self.config.schedule.max_train_steps
    }

    /// What the gradient is taken of: the loss with the method's regulariser, as a share of the step. Nothing is waited for:
    /// the totals keep the losses until they are recorded.
    fn loss(&mut self, batch: &Batch) -> Tensor {
        let Self { config, networks, optimisation, .. } = self;
        let accumulation = config.schedule.gradient_accumulation_steps as f64;
        let (control, schedule) = (networks.control.as_ref(), &networks.schedule);
        let (prior_weight, snr_gamma) = (config.prior.prior_loss_weight, config.optimizer.snr_gamma);
        let loss =
            training_loss(networks.model.denoiser(), control, schedule, batch, prior_weight, snr_gamma);
        let regulariser =
            if networks.regulariser_weight > 0.0 { attach::regulariser(&mut networks.model) } else { None };
        let total = match &regulariser {
            Some(regulariser) => &loss.total + regulariser * networks.regulariser_weight,
            None => loss.total.shallow_clone(),
        };
        let parts = [Some(&total), Some(&loss.instance), loss.prior.as_ref(), regulariser.as_ref()];
        optimisation.totals.add(parts, 1.0 / accumulation);
        match &optimisation.loss_scale {
            Some(loss_scale) => (total * loss_scale.scale.get(0)) / accumulation,
            None => total * (1.0 / accumulation),
        }
    }

    /// The optimiser's step.
    fn update(&mut self, step: i64) -> Result<()> {
        let Optimisation { parameters, optimizer, ema, learning_rates, totals, loss_scale, .. } =
            &mut self.optimisation;
        let rates: Vec<f64> = learning_rates.iter().map(|rate| rate.at(step - 1)).collect();
        let norm = parameters.gradient_norm();
        match loss_scale {
            None => {
                totals.end_step(step, &norm, None);
                let factor = clip_factor(&norm, self.config.optimizer.max_grad_norm);
                optimizer.step(parameters, &factor, &rates, None)?;
            }
            Some(loss_scale) => {
                let scale = loss_scale.scale.get(0).copy();
                let norm = norm / &scale;
                let overflow = LossScale::overflow(&norm);
                let factor = clip_factor(&norm, self.config.optimizer.max_grad_norm) / scale;
                optimizer.step(parameters, &factor, &rates, Some(&overflow))?;
                loss_scale.update(&overflow);
                totals.end_step(step, &norm, Some((&overflow, &loss_scale.scale)));
            }
        }
        attach::project(&mut self.networks.model);
        if let Some(ema) = ema {
            ema.update(parameters, step);
        }
        Ok(())
    }

    fn announce(&self, first: i64, total: i64) {
        if first >= total {
            let done = format!("this run is complete ({first} of {total} steps)");
            self.observer.say(&format!("{done}; raise --max_train_steps to train on"));
            return;
        }
        let Networks { model, control, layers, .. } = &self.networks;
        let numbers = model.denoiser().numbers();
        self.observer.say(&format!(
            "training {} values on {layers} layers{}, steps {} to {total}, on {} in {numbers}",
            self.optimisation.parameters.count(),
            if control.is_some() { " and in the control encoder" } else { "" },
            first + 1,
            device::name(model.device())
        ));
    }

    fn draw_previews(&mut self, step: i64) -> Result<()> {
        if self.data.previews.is_empty() {
            return Ok(());
        }
        let StableDiffusion { vae, source, .. } = &mut self.networks.model;
        let was_there = vae.is_there();
        if let Err(problem) = vae.bring_back(source) {
            // What was trained is worth more than a look at it.
            self.observer.warn(&format!("previews of step {step} are not drawn: {problem}"));
            return Ok(());
        }
        let drawn = self.with_average(|t| {
            let Networks { model, control, .. } = &t.networks;
            t.run.folder.write(|run| {
                t.data.previews.draw(model, control.as_ref(), &t.config, (run, step), t.observer)
            })
        });
        if !was_there {
            self.networks.model.vae.release();
        }
        match drawn {
            Ok(folder) => {
                self.observer.say(&format!("previews of step {step}: {}", folder.display()));
                Ok(())
            }
            Err(Error { kind: ErrorKind::Interrupted(_), .. }) => Err(self.stop(step)),
            Err(e) => Err(e),
        }
    }

    /// Writes what was trained.
    fn finish(&mut self, step: i64, last: Option<Record>) -> Result<Outcome> {
        let state = self.state(step)?;
        let Optimisation { parameters, parts, ema, .. } = &mut self.optimisation;
        if let Some(ema) = ema {
            // The last checkpoint, if there is one, keeps the values that training would go on with.
            parameters.set(&ema.average);
        }
        self.run.folder.write(|run| checkpoint::write_trained(run, parts, parameters, &state))?;
        Ok(Outcome {
            folder: self.run.folder.path().to_path_buf(),
            steps: state.step,
            loss: last.map(|record| record.loss),
            movement: self.movement(state.step)?,
            seconds: state.seconds,
            gpu: device::peak_memory(self.networks.model.device()),
            parameters: self.optimisation.parameters.count(),
        })
    }

    /// Waits for the device, and writes what the steps since the last record came to.
    fn record(&mut self, step: i64, look: bool) -> Result<Option<Record>> {
        let Reading { sums, gradient_norm, loss_scale, .. } = self.read()?;
        let config = &self.config;
        let last = step == config.schedule.max_train_steps;
        if sums.count == 0.0 {
            // f16 skipped every step, with losses that are no numbers: the next record tells of them.
            return Ok(None);
        }
        self.optimisation.totals.clear();
        let mean = |sum: f64| sum / sums.count;
        let peaks = device::peak_memory(self.networks.model.device());
        self.recent_loss.add(sums.loss, sums.count);
        let mut record = Record {
            step,
            loss: mean(sums.loss),
            loss_instance: mean(sums.instance),
            loss_prior: config.prior.with_prior_preservation.then(|| mean(sums.prior)),
            regulariser: (self.networks.regulariser_weight > 0.0).then(|| mean(sums.regulariser)),
            learning_rate: self.optimisation.learning_rates[0].at(step - 1),
            gradient_norm,
            loss_scale,
            skipped_steps: loss_scale.map(|_| sums.skipped),
            gpu_allocated_peak: peaks.map(|peaks| peaks.allocated),
            gpu_reserved_peak: peaks.map(|peaks| peaks.reserved),
            seconds: self.seconds(),
            ..Record::default()
        };
        if last || look || step % (config.checkpoints.log_every * RECORDS_A_MOVEMENT) == 0 {
            let movement = self.movement(step)?;
            record.weight_change = movement.map(|m| m.mean);
            record.weight_change_max = movement.map(|m| m.largest);
            record.orthogonality_error = movement.and_then(|m| m.orthogonality_error);
        }
        if look && self.data.held_out.is_some() {
            let look = |h: &HeldOut, t: &Self| {
                h.loss(&t.networks.model, t.networks.control.as_ref(), &t.networks.schedule)
            };
            record.held_out_loss = self.with_average(|t| Ok(t.data.held_out.as_ref().map(|h| look(h, t))))?;
            if let Some(loss) = record.held_out_loss {
                self.observer.say(&format!("step {step}: held-out loss {loss:.4}"));
            }
        }
        let Run { folder, metrics, .. } = &mut self.run;
        let written = folder.write(|_| metrics.write(&record))?;
        self.observer.tell(Event::Metrics(&written));
        Ok(Some(record))
    }

    /// Runs `look` with the averaged adapter in place, where there is one.
    fn with_average<T>(&mut self, look: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        let Some(average) = self.optimisation.ema.as_ref().map(|ema| ema.average.shallow_clone()) else {
            return look(self);
        };
        let own = self.optimisation.parameters.flat().copy();
        self.optimisation.parameters.set(&average);
        let result = look(self);
        self.optimisation.parameters.set(&own);
        result
    }

    /// How far the weights moved. Errors: the last step left numbers that are not finite, which nothing can be computed of.
    fn movement(&mut self, step: i64) -> Result<Option<Movement>> {
        if !self.networks.has_adapter {
            return Ok(None);
        }
        if !host::all_finite(self.optimisation.parameters.flat()) {
            return Err(self.not_finite(step, "a trained value"));
        }
        Ok(Some(attach::movement(&mut self.networks.model)))
    }

    fn seconds(&self) -> f64 {
        self.run.earlier + self.started.elapsed().as_secs_f64()
    }

    /// Waits for the device. Fails where a number since the last reading was not finite: nothing is saved then.
    fn read(&mut self) -> Result<Reading> {
        let reading = self.optimisation.totals.read();
        match (reading.not_finite, reading.scale_lost) {
            (Some((step, what)), _) => Err(self.not_finite(step, what)),
            (None, Some(step)) => Err(Error::not_finite(format!(
                "step {step}: gradients overflow in f16 however small the loss is made; {}",
                self.last_good()
            ))
            .with_hint("train with --dtype bf16 or f32, or a lower --learning_rate")),
            (None, None) => Ok(reading),
        }
    }

    fn state(&mut self, step: i64) -> Result<TrainState> {
        let sums = self.read()?.sums;
        Ok(TrainState::new(step, self.seconds(), &self.run.fingerprint, &self.optimisation.parameters, sums))
    }

    fn save(&mut self, step: i64) -> Result<PathBuf> {
        let state = self.state(step)?;
        let Optimisation { parts, parameters, .. } = &self.optimisation;
        let (moving, limit) = (self.optimisation.moving(), self.config.checkpoints.checkpoints_total_limit);
        self.run.folder.write(|run| checkpoint::save(run, &state, parts, parameters, &moving, limit))
    }

    /// Saves after a request to stop; what to tell the user.
    fn stop(&mut self, step: i64) -> Error {
        let folder = files::shell_word(&self.run.folder.path().to_string_lossy());
        match self.save(step) {
            Ok(path) => Error::interrupted(format!("stopped after step {step}, saved {}", path.display()))
                .with_hint(format!("go on with `hra train --resume latest --output_dir {folder}`")),
            Err(e) => e,
        }
    }

    fn not_finite(&self, step: i64, what: &str) -> Error {
        Error::not_finite(format!("step {step}: {what} is not a finite number; {}", self.last_good()))
            .with_hint(match self.config.model.dtype {
                Precision::F32 => "try a lower --learning_rate; where it is the first step, `hra inspect` tells whether the model is whole",
                _ => "try a lower --learning_rate, or --dtype f32",
            })
    }

    /// Where to go on from after a failure.
    fn last_good(&self) -> String {
        let run = self.run.folder.path();
        let steps = checkpoint::list(run).unwrap_or_default();
        steps.last().map_or_else(
            || "there is no checkpoint".to_string(),
            |step| format!("the last good checkpoint is {}", checkpoint::folder(run, *step).display()),
        )
    }
}
