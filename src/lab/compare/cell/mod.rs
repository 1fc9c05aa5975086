//! One cell, in a process of its own: train, draw, score, and write `record.json`. Whatever was finished before is not done
//! again; an interrupted training goes on from its last checkpoint. `scoring` scores; `frontier` draws and scores the grid of scales;
//! `changes` measures the weights; `classifier` asks the model itself; `undrawn` counts what is to be drawn.

mod changes;
mod classifier;
mod frontier;
mod scoring;
mod undrawn;

pub use changes::lacks_changes;
pub use classifier::questions;
pub use undrawn::undrawn;

use crate::adapter::peft;
use crate::attach::loaded::{FULL_UNET, HOMES};
use crate::data::image::RgbImage;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, ErrorKind, Result};
use crate::lab::compare::draw::{self, SetDrawing};
use crate::lab::compare::task::{Task, TaskClassifier, TaskSet};
use crate::lab::evaluate::Towers;
use crate::lab::results::{
    self, Budget, CellRecord, Environment, Evaluation, FORMAT, LossPoint, PictureScores, RECORD_FILE, Scores,
};
use crate::model::control::{CONTROL_ENCODER, FILE_STEM};
use crate::platform::device::{self, Compute};
use crate::platform::observer::Observer;
use crate::platform::{doctor, files};
use crate::train::config::TrainConfig;
use crate::train::run::{CONFIG_FILE, METRICS_FILE, Record};
use crate::train::{self, Resume, checkpoint};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

const TRAINED_FILE: &str = "trained.json";
const DRIFT: &str = "drift";
const LOCK_POLL: Duration = Duration::from_millis(200);
const MAX_METRICS: u64 = 1 << 30;

/// Does the cell `id` of a comparison. Another process at the same cell is waited for.
pub fn run(comparison: &Path, id: &str, observer: &dyn Observer) -> Result<()> {
    let folder = results::cell_folder(comparison, id);
    let _lock = lock(&folder.join(".lock"), observer)?;
    let task = Task::read(comparison, id)?;
    if is_done(comparison, &task) && !lacks_changes(comparison, &task) {
        return Ok(());
    }
    let config = task.train_config(comparison);
    let compute = device::resolve(config.device, Some(config.model.dtype))?;
    let cell = Cell { comparison, task: &task, folder, config, compute, observer };
    let record = match scored(comparison, &task) {
        Some(record) => record,
        None => cell.train_draw_and_score()?,
    };
    if record.failure.is_some() {
        return cell.finish(&record);
    }
    // However long the rest takes, the scores are there.
    let record = CellRecord { changes: record.changes.or(cell.kept_changes()), ..record };
    results::write_json(&cell.folder.join(RECORD_FILE), &record)?;
    let record = cell.with_changes(record)?;
    let asked = task.classifier.as_ref();
    if asked.is_none_or(|asked| record.classifier.as_ref().is_some_and(|c| asked.is_answered(c))) {
        return cell.finish(&record);
    }
    cell.finish(&CellRecord { classifier: cell.classify()?, ..record })
}

/// Whether the record of a task is there, with all scores of the task's pictures.
pub fn is_scored(comparison: &Path, task: &Task) -> bool {
    scored(comparison, task).is_some()
}

/// The record of a task, where it has all scores of the task's pictures.
fn scored(comparison: &Path, task: &Task) -> Option<CellRecord> {
    let path = results::cell_folder(comparison, &task.cell.id).join(RECORD_FILE);
    let record = path.is_file().then(|| CellRecord::read(&path).ok())??;
    (record.has(&task.scored_with) && has_frontier(&record, task)).then_some(record)
}

/// Whether the record of a task is there, with all that is asked of it.
pub fn is_done(comparison: &Path, task: &Task) -> bool {
    let asked = task.classifier.as_ref();
    scored(comparison, task).is_some_and(|record| {
        let answers =
            |asked: &TaskClassifier| record.classifier.as_ref().is_some_and(|c| asked.is_answered(c));
        record.failure.is_some() || asked.is_none_or(answers)
    })
}

/// Fails where something is wanted of a training that is done, and the weights that it needs were removed since. For a look before
/// any cell begins.
pub fn check_weights(comparison: &Path, task: &Task) -> Result<()> {
    if task.cell.is_base() || !is_trained(comparison, task) || is_done(comparison, task) {
        return Ok(());
    }
    frontier::check_weights(comparison, task)?;
    classifier::check_weights(comparison, task)
}

/// Whether the points of the task's grid are there; a training that failed has none.
fn has_frontier(record: &CellRecord, task: &Task) -> bool {
    let there = record.frontier.as_ref().map(|frontier| &frontier.made_with);
    let has = |(set, identity)| there.is_some_and(|there| there.get(set) == Some(identity));
    record.failure.is_some() || task.frontier.as_ref().is_none_or(|wanted| wanted.made_with.iter().all(has))
}

/// Whether the training of a task is done.
pub fn is_trained(comparison: &Path, task: &Task) -> bool {
    results::cell_folder(comparison, &task.cell.id).join(TRAINED_FILE).is_file()
}

/// Removes what cells keep as long as more may be drawn from it.
pub fn clean(comparison: &Path, task: &Task) -> Result<()> {
    let run = task.train_config(comparison).output_dir;
    files::remove_dir_all(&run.join("checkpoints"))?;
    let files = if task.remove_weights { weight_files(&run).to_vec() } else { Vec::new() };
    files.iter().try_for_each(|path| files::remove_file(path))
}

/// Waits until no other process holds the file; the system lets go of it when a process ends, however it ends.
fn lock(path: &Path, observer: &dyn Observer) -> Result<File> {
    let file = files::open_append(path)?;
    let mut told = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(std::fs::TryLockError::Error(e)) => return Err(Error::io("lock", path, e)),
            Err(std::fs::TryLockError::WouldBlock) => {}
        }
        if !std::mem::replace(&mut told, true) {
            observer.say(&format!("waiting for the process that holds {}", path.display()));
        }
        observer.check(|| "stopped while waiting for another process".into())?;
        std::thread::sleep(LOCK_POLL);
    }
}

struct Cell<'a> {
    comparison: &'a Path,
    task: &'a Task,
    folder: PathBuf,
    config: TrainConfig,
    compute: Compute,
    observer: &'a dyn Observer,
}

/// `trained.json`: what a training cost, and where it ran.
#[derive(Debug, Serialize, Deserialize)]
struct TrainedCell {
    budget: Budget,
    environment: Environment,
}

/// Scores of real pictures.
#[derive(Default)]
struct Real {
    scores: Scores,
    /// Each one's, of control.
    pictures: Vec<PictureScores>,
}

impl Cell<'_> {
    /// The record without answers of a classifier; one of a training that failed says why.
    fn train_draw_and_score(&self) -> Result<CellRecord> {
        let (trained, fingerprint) = match self.train_and_draw() {
            // A rate too high is a result; the other cells go on.
            Err(Error { kind: ErrorKind::NotFinite(why), .. }) if !self.task.cell.is_base() => {
                let failure = why.lines().next().map(str::to_string);
                return self.record(None, Vec::new(), Real::default(), failure);
            }
            other => other?,
        };
        let towers = Towers::load(&self.task.towers, self.compute.device, self.observer)?;
        let _guard = tch::no_grad_guard();
        let evaluations = self.score(&towers, &fingerprint)?;
        let frontier = self.score_frontier(&towers, &fingerprint, &evaluations)?;
        let real = match (&trained, &self.task.control) {
            (Some(_), _) => Real::default(),
            (None, Some(agreement)) => self.real_pairs(agreement, &towers)?,
            (None, None) => Real { scores: self.real(towers)?, pictures: Vec::new() },
        };
        Ok(CellRecord { frontier, ..self.record(trained, evaluations, real, None)? })
    }

    /// What was trained (`None` for the base model), and the base model's fingerprint; all pictures are there.
    fn train_and_draw(&self) -> Result<(Option<TrainedCell>, String)> {
        let mut trained = self.train()?;
        if let Some(fingerprint) = self.draw()? {
            return Ok((trained, fingerprint));
        }
        // Other pictures are wanted than before, and what was to draw them was removed since.
        for of_old_weights in [TRAINED_FILE, RECORD_FILE, classifier::ANSWERS_FILE] {
            files::remove_file(&self.folder.join(of_old_weights))?;
        }
        files::remove_dir_all(&self.config.output_dir)?;
        trained = self.train()?;
        let missing = || Error::run(format!("{}: the trained weights are missing", self.folder.display()));
        Ok((trained, self.draw()?.ok_or_else(missing)?))
    }

    /// Trains, unless that is done.
    fn train(&self) -> Result<Option<TrainedCell>> {
        if self.task.cell.is_base() {
            return Ok(None);
        }
        let done = self.folder.join(TRAINED_FILE);
        if done.is_file() {
            return results::read_json(&done).map(Some);
        }
        let run = &self.config.output_dir;
        let interrupted = run.exists();
        let resume =
            (!checkpoint::list(run)?.is_empty() && run.join(CONFIG_FILE).is_file()).then_some(Resume::Latest);
        if interrupted && resume.is_none() {
            files::remove_dir_all(run)?;
        }
        let outcome = train::train(self.config.clone(), resume.as_ref(), self.observer)?;
        let known = |value: f64| (!interrupted).then_some(value);
        let budget = Budget {
            parameters: outcome.parameters as u64,
            bytes: weight_files(run).iter().filter_map(|path| path.metadata().ok()).map(|m| m.len()).sum(),
            steps: outcome.steps,
            seconds: known(outcome.seconds),
            seconds_per_step: known(outcome.seconds / outcome.steps.max(1) as f64),
            peak_memory: device::peak_process_memory().filter(|_| !interrupted),
            peak_device_memory: outcome.gpu.map(|gpu| gpu.reserved).filter(|_| !interrupted),
            interrupted,
        };
        let trained = TrainedCell { budget, environment: self.environment() };
        results::write_json(&done, &trained)?;
        Ok(Some(trained))
    }

    fn step_folder(&self, step: i64) -> PathBuf {
        step_folder(&self.folder, step)
    }

    fn drawings(&self, sets: &[TaskSet], fingerprint: &str, resolution: u32) -> Vec<(String, SetDrawing)> {
        drawings(self.task, sets, fingerprint, resolution)
    }

    /// Draws what is missing; the base model's fingerprint, or `None` where the weights that should draw are gone.
    fn draw(&self) -> Result<Option<String>> {
        let (config, compute) = (&self.config, &self.compute);
        let mut session = draw::open(config, compute, self.observer)?;
        let fingerprint = session.model().fingerprint()?;
        let resolution = config.data.resolution.unwrap_or(session.model().native_size() as u32);
        results::write_json(&self.folder.join("resolution.json"), &resolution)?;
        if self.task.cell.is_base() && config.prior.with_prior_preservation {
            self.class_pictures(session.model())?;
        }
        let shown: Vec<Vec<RgbImage>> =
            self.task.sets.iter().map(|set| self.conditions(set)).collect::<Result<_>>()?;
        let drawings = self.drawings(&self.task.sets, &fingerprint, resolution);
        for &step in &self.task.steps {
            let place = self.step_folder(step);
            if all_drawn(&drawings, &place) {
                continue;
            }
            if let Some(adapter) = self.adapter(step) {
                if !has_weights(&adapter) {
                    return Ok(None);
                }
                draw::put_on(&mut session, config, &adapter, 1.0)?;
            }
            let by = self.by(step);
            // What is drawn for drift follows no condition.
            let shown = shown.iter().map(Vec::as_slice).chain(std::iter::repeat(&[][..]));
            for ((name, drawing), shown) in drawings.iter().zip(shown) {
                drawing.draw(&mut session, shown, &by, &place.join(name), self.observer)?;
            }
        }
        self.draw_frontier(&mut session, &fingerprint, resolution)?;
        Ok(Some(fingerprint))
    }

    /// What pictures say of what drew them.
    fn by(&self, step: i64) -> String {
        let cell = &self.task.cell;
        format!("{}, {}, seed {}, step {step}", cell.method(), cell.subject, cell.seed())
    }

    /// What was trained up to a step; `None` for the base model.
    fn adapter(&self, step: i64) -> Option<PathBuf> {
        self.task.cell.learning_rate()?;
        Some(adapter_folder(&self.config, step))
    }

    /// Class pictures are made once, by whoever comes first.
    fn class_pictures(&self, model: &StableDiffusion) -> Result<()> {
        let folder = self.comparison.join(&self.task.class_folder);
        files::create_dir_all(&folder)?;
        let _lock = lock(&folder.join(".lock"), self.observer)?;
        // Of a process that was killed while it wrote a picture: nobody else writes here now.
        files::remove_leftovers(&folder)?;
        self.observer.say(&train::make_class_images(model, &self.config, self.observer)?);
        Ok(())
    }

    fn environment(&self) -> Environment {
        let dtype = toml::Value::try_from(self.config.model.dtype).ok();
        Environment {
            version: env!("CARGO_PKG_VERSION").into(),
            device: doctor::device_name(self.compute.device),
            dtype: dtype.and_then(|d| d.as_str().map(str::to_string)).unwrap_or_default(),
            threads: tch::get_num_threads(),
            jobs: self.task.jobs,
        }
    }

    fn record(
        &self,
        trained: Option<TrainedCell>,
        evaluations: Vec<Evaluation>,
        real: Real,
        failure: Option<String>,
    ) -> Result<CellRecord> {
        let (budget, environment) = match trained {
            Some(trained) => (Some(trained.budget), trained.environment),
            None => (None, self.environment()),
        };
        Ok(CellRecord {
            format: FORMAT,
            cell: self.task.cell.clone(),
            budget,
            changes: None,
            losses: self.losses()?,
            evaluations,
            frontier: None,
            classifier: None,
            real: real.scores,
            real_pictures: real.pictures,
            failure,
            scored_with: self.task.scored_with.clone(),
            environment,
        })
    }

    /// The training's records without times. The loss is that of denoising, which methods share: no regulariser.
    fn losses(&self) -> Result<Vec<LossPoint>> {
        let path = self.config.output_dir.join(METRICS_FILE);
        if !path.is_file() {
            return Ok(Vec::new());
        }
        let text = String::from_utf8_lossy(&files::read(&path, MAX_METRICS)?).into_owned();
        let weight = self.config.prior.prior_loss_weight;
        let point = |r: Record| LossPoint {
            step: r.step,
            loss: r.loss_instance + weight * r.loss_prior.unwrap_or(0.0),
            held_out: r.held_out_loss,
        };
        Ok(text.lines().filter_map(|line| serde_json::from_str::<Record>(line).ok()).map(point).collect())
    }

    fn finish(&self, record: &CellRecord) -> Result<()> {
        results::write_json(&self.folder.join(RECORD_FILE), record)?;
        if self.task.is_final { clean(self.comparison, self.task) } else { Ok(()) }
    }
}

/// Everything that is drawn at one place: its folder's name, and how; what is drawn for drift is the last.
fn drawings(task: &Task, sets: &[TaskSet], model: &str, resolution: u32) -> Vec<(String, SetDrawing)> {
    let drawing = |prompts, num_images, pairs| SetDrawing {
        sampling: task.sampling.clone(),
        model: model.to_string(),
        resolution,
        batch: task.train.prior.sample_batch_size,
        prompts,
        num_images,
        pairs,
    };
    let of_set = |set: &TaskSet| {
        let prompts = set.prompts.iter().map(|p| p.prompt.clone()).collect();
        (set.set.name().to_string(), drawing(prompts, set.num_images, set.pairs.clone()))
    };
    let drift = (!task.drift_prompts.is_empty())
        .then(|| (DRIFT.to_string(), drawing(task.drift_prompts.clone(), task.num_drift_images, None)));
    sets.iter().map(of_set).chain(drift).collect()
}

/// Whether everything that is drawn at a place is there.
fn all_drawn(drawings: &[(String, SetDrawing)], place: &Path) -> bool {
    drawings.iter().all(|(name, drawing)| drawing.is_done(&place.join(name)))
}

/// Whether a folder holds something trained to draw with.
fn has_weights(adapter: &Path) -> bool {
    weight_files(adapter).iter().any(|path| path.is_file())
}

/// Where a training keeps what it had trained up to a step.
fn adapter_folder(config: &TrainConfig, step: i64) -> PathBuf {
    let run = &config.output_dir;
    if step == config.schedule.max_train_steps { run.clone() } else { checkpoint::folder(run, step) }
}

/// The files that are needed to draw with what was trained.
fn weight_files(run: &Path) -> Vec<PathBuf> {
    let control = run.join(CONTROL_ENCODER);
    let peft = |(place, _)| [peft::WEIGHTS_FILE, peft::CONFIG_FILE].map(|file| run.join(place).join(file));
    let others =
        [control.join(format!("{FILE_STEM}.safetensors")), control.join("config.json"), run.join(FULL_UNET)];
    HOMES.into_iter().flat_map(peft).chain(others).collect()
}

/// Where a cell keeps what was drawn after a step.
fn step_folder(cell: &Path, step: i64) -> PathBuf {
    cell.join(format!("step-{step:06}"))
}
