//! How long a comparison may take: from the cells that are done, or else from one call of the UNet on this machine.

use crate::attach;
use crate::diffusion::picture_sizes::PictureSizes;
use crate::diffusion::sample::SampleSettings;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::Result;
use crate::lab::compare::cell;
use crate::lab::compare::config::CompareConfig;
use crate::lab::compare::shard::Shard;
use crate::lab::compare::task::Task;
use crate::lab::results::{self, CellRecord, RECORD_FILE};
use crate::platform::device;
use crate::platform::host;
use crate::platform::observer::Observer;
use crate::train::config::TrainConfig;
use crate::train::{self, base};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Instant;
use tch::{Kind, Tensor};

/// A training step in calls of the UNet on its batch: forward, and backward at about twice its cost.
const CALLS_A_STEP: f64 = 3.0;
/// The same where every weight trains (measured on the embedded model, optimiser included).
const CALLS_A_FULL_STEP: f64 = 5.0;

/// What is left to do, and how long it may take.
#[derive(Debug, Clone, PartialEq)]
pub struct Estimate {
    /// Trainings of this share that are not done.
    pub trainings: usize,
    /// Trainings that are done.
    pub done: usize,
    /// Optimiser steps of the rest.
    pub steps: i64,
    /// Pictures to draw, class pictures among them.
    pub pictures: usize,
    /// Seconds on this machine.
    pub seconds: f64,
    /// What the seconds rest on.
    pub from: String,
}

impl Estimate {
    /// Of the tasks of a share.
    pub fn of(config: &CompareConfig, tasks: &[Task], shard: Shard, observer: &dyn Observer) -> Result<Self> {
        let folder = &config.output_dir;
        let trainings: Vec<&Task> = tasks.iter().filter(|t| !t.cell.is_base()).collect();
        let mine = |i: &usize| shard.has(*i);
        let mine: Vec<&Task> =
            trainings.iter().enumerate().filter(|(i, _)| mine(i)).map(|(_, t)| *t).collect();
        let todo: Vec<&Task> = mine.iter().filter(|t| !cell::is_done(folder, t)).copied().collect();
        let bases = tasks.iter().filter(|t| t.cell.is_base() && !cell::is_done(folder, t));
        let left: Vec<&Task> = todo.iter().copied().chain(bases).collect();
        let draws_class = |t: &&&Task| {
            t.cell.is_base() && t.train.prior.with_prior_preservation && !cell::is_scored(folder, t)
        };
        // Subjects of one class share theirs.
        let class: BTreeMap<&Path, usize> = left
            .iter()
            .filter(draws_class)
            .map(|t| (t.class_folder.as_path(), t.train.prior.num_class_images))
            .collect();
        let class: usize =
            class.into_iter().map(|(of, total)| train::missing_class_images(&folder.join(of), total)).sum();
        let drawn: usize = left.iter().map(|task| cell::undrawn(folder, task)).sum();
        let untrained: Vec<&Task> = todo.iter().filter(|t| !cell::is_trained(folder, t)).copied().collect();
        let steps = untrained.iter().map(|t| t.train.schedule.max_train_steps).sum();
        let mut estimate = Self {
            trainings: untrained.len(),
            done: mine.len() - untrained.len(),
            steps,
            pictures: drawn + class,
            seconds: 0.0,
            from: String::new(),
        };
        if todo.is_empty() {
            estimate.from = "nothing is left to do".into();
            return Ok(estimate);
        }
        let call = Probe::measure(&todo[0].train, config, observer)?;
        let mut known: HashMap<String, Option<f64>> = HashMap::new();
        let mut step = |task: &Task| {
            let method = task.cell.method();
            let of_method = known.entry(method.to_string()).or_insert_with(|| seen(folder, tasks, method));
            of_method.unwrap_or_else(|| call.step(task))
        };
        let training: f64 = untrained.iter().map(|t| step(t) * t.train.schedule.max_train_steps as f64).sum();
        let drawing = call.picture(config.draw.steps, config.draw.guidance) * drawn as f64
            + todo
                .first()
                .map_or(0.0, |t| call.picture(t.train.prior.class_steps, t.train.prior.class_guidance))
                * class as f64;
        let asked: usize = left.iter().filter_map(|task| cell::questions(folder, task)).sum();
        let asking = asked as f64 * call.seconds;
        estimate.seconds = (training + drawing + asking) / config.jobs as f64;
        estimate.from = format!(
            "from one UNet call of {:.0} ms on a picture here{}; scores and loading come on top",
            call.seconds * 1e3,
            if estimate.done > 0 { " and the steps of the cells that are done" } else { "" }
        );
        Ok(estimate)
    }
}

/// Seconds of a step of a method, from a cell that is done.
fn seen(folder: &Path, tasks: &[Task], method: &str) -> Option<f64> {
    let same = tasks.iter().filter(|t| t.cell.method() == method);
    let record =
        |t: &Task| CellRecord::read(&results::cell_folder(folder, &t.cell.id).join(RECORD_FILE)).ok();
    same.filter_map(record).find_map(|r| r.budget?.seconds_per_step)
}

/// The time of one UNet call on one picture, as drawing calls it.
struct Probe {
    seconds: f64,
}

impl Probe {
    fn measure(train: &TrainConfig, config: &CompareConfig, observer: &dyn Observer) -> Result<Self> {
        let compute = device::resolve(train.device, Some(train.model.dtype))?;
        let asked = base::request(&train.model, observer)?;
        let mut model = StableDiffusion::open(&asked, compute.numbers, compute.device)?;
        model.expect_text_to_image()?;
        let cores = device::cores();
        let threads = train.threads.unwrap_or((cores / config.jobs).max(1) as i32);
        device::set_threads(Some(threads), attach::weight_count(&mut model.unet))?;
        let size = train.data.resolution.unwrap_or(model.native_size() as u32);
        let settings = SampleSettings::square(&model, "", None, 1, 1.0, size)?;
        settings.validate(&model)?;
        let _guard = tch::no_grad_guard();
        let batch = 2;
        let mut shape = settings.latent_shape(&model);
        shape[0] = batch;
        let (conditioning, _) = model.encode_prompts(&["", ""])?;
        let sizes = [PictureSizes::whole([settings.height, settings.width]); 2];
        let conditioning = model.told_sizes(conditioning, &sizes);
        let latents = Tensor::zeros(shape, (Kind::Float, compute.device));
        let timesteps = Tensor::full([batch], 500.0, (Kind::Float, compute.device));
        let mut seconds = f64::INFINITY;
        // The first call also allocates.
        for _ in 0..3 {
            let started = Instant::now();
            let sum = model.denoiser().forward(&latents, &timesteps, &conditioning).sum(Kind::Float);
            let _ = host::number(&sum); // waits for the device
            seconds = f64::min(seconds, started.elapsed().as_secs_f64() / batch as f64);
        }
        Ok(Self { seconds })
    }

    fn step(&self, task: &Task) -> f64 {
        let train = &task.train;
        let rows = train.schedule.train_batch_size * train.schedule.gradient_accumulation_steps;
        let rows = if train.prior.with_prior_preservation { 2 * rows } else { rows };
        let method = train.adapter.method().ok().flatten();
        let whole = method.is_some_and(|method| method.trains_whole_network());
        let calls = if whole { CALLS_A_FULL_STEP } else { CALLS_A_STEP };
        self.seconds * rows as f64 * calls
    }

    fn picture(&self, steps: usize, guidance: f64) -> f64 {
        self.seconds * steps as f64 * if guidance > 1.0 { 2.0 } else { 1.0 }
    }
}
