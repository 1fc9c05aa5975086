//! One cell, in a process of its own: train, draw, score, and write `record.json`. Whatever was finished before is not done
//! again; an interrupted training goes on from its last checkpoint.

use super::draw::Drawing;
use super::score;
use super::subjects::CLASS_LOOK_ALIKES;
use super::task::Task;
use crate::adapter::peft;
use crate::checkpoint;
use crate::config::TrainConfig;
use crate::device::{self, Compute};
use crate::doctor;
use crate::error::{Error, Result};
use crate::evaluate::Towers;
use crate::files;
use crate::hub::{self, Wanted};
use crate::image::RgbImage;
use crate::interrupt;
use crate::model::loaded::{FULL_UNET, LoadedAdapter, TEXT_ENCODER};
use crate::model::{attach, fixed};
use crate::results::{
    self, Budget, CellRecord, Environment, Evaluation, FORMAT, LossPoint, RECORD_FILE, Scores, Set,
};
use crate::run::{CONFIG_FILE, METRICS_FILE, Record};
use crate::stable_diffusion::StableDiffusion;
use crate::train::{self, Resume};
use std::fs::File;
use std::path::{Path, PathBuf};
use tch::Device;

const TRAINED_FILE: &str = "trained.json";
const DRIFT: &str = "drift";
const MAX_METRICS: u64 = 1 << 30;

/// Does the cell `id` of a comparison. Another process at the same cell is waited for.
pub fn run(comparison: &Path, id: &str) -> Result<()> {
    let folder = results::cell_folder(comparison, id);
    let _lock = lock(&folder.join(".lock"))?;
    let task = Task::read(comparison, id)?;
    if is_done(comparison, &task) {
        return Ok(());
    }
    let config = task.train_config(comparison);
    let compute = device::resolve(config.device, Some(config.dtype))?;
    let cell = Cell { comparison, task: &task, folder, config, compute };
    match cell.result() {
        Ok(record) => cell.finish(record),
        // A rate too high is a result; the other cells go on.
        Err(Error::NotFinite(why)) => cell.finish(CellRecord {
            failure: Some(why.lines().next().unwrap_or_default().to_string()),
            ..cell.record(None, Vec::new(), Scores::new())?
        }),
        Err(e) => Err(e),
    }
}

/// Whether the record of a task is there and is of this task's scores.
pub fn is_done(comparison: &Path, task: &Task) -> bool {
    let path = results::cell_folder(comparison, &task.cell.id).join(RECORD_FILE);
    path.is_file() && CellRecord::read(&path).is_ok_and(|record| record.scored_with == task.scored_with)
}

/// Waits until no other process holds the file; the system lets go of it when a process ends, however it ends.
fn lock(path: &Path) -> Result<File> {
    let file = files::open_append(path)?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            eprintln!("waiting for the process that holds {}", path.display())
        }
        Err(std::fs::TryLockError::Error(e)) => return Err(Error::io("lock", path, e)),
    }
    file.lock().map_err(|e| Error::io("lock", path, e))?;
    Ok(file)
}

struct Cell<'a> {
    comparison: &'a Path,
    task: &'a Task,
    folder: PathBuf,
    config: TrainConfig,
    compute: Compute,
}

impl Cell<'_> {
    fn result(&self) -> Result<CellRecord> {
        let is_base = self.task.cell.learning_rate.is_none();
        let mut budget = if is_base { None } else { Some(self.train()?) };
        let fingerprint = match self.draw()? {
            Some(fingerprint) => fingerprint,
            // Other pictures are wanted than before, and what was to draw them was removed since.
            None => {
                let done = self.folder.join(TRAINED_FILE);
                files::remove_file(&done)?;
                files::remove_dir_all(&self.config.output_dir)?;
                budget = Some(self.train()?);
                let missing =
                    || Error::Run(format!("{}: the trained weights are missing", self.folder.display()));
                self.draw()?.ok_or_else(missing)?
            }
        };
        let towers = Towers::load(&self.task.towers, self.compute.device)?;
        let _guard = tch::no_grad_guard();
        let evaluations = self.score(&towers, &fingerprint)?;
        let real = if is_base { self.real(&towers)? } else { Scores::new() };
        self.record(budget, evaluations, real)
    }

    /// Trains, unless that is done; what it cost.
    fn train(&self) -> Result<Budget> {
        let done = self.folder.join(TRAINED_FILE);
        if done.is_file() {
            return results::read_json(&done);
        }
        let run = &self.config.output_dir;
        let interrupted = run.exists();
        let resume =
            (!checkpoint::list(run)?.is_empty() && run.join(CONFIG_FILE).is_file()).then_some(Resume::Latest);
        if interrupted && resume.is_none() {
            files::remove_dir_all(run)?;
        }
        let outcome = train::train(self.config.clone(), resume.as_ref())?;
        let known = |value: f64| (!interrupted).then_some(value);
        let peak = device::peak_process_memory().filter(|_| !interrupted);
        let gpu = match self.compute.device {
            Device::Cuda(index) => device::cuda_memory(index).map(|(free, total)| total - free),
            _ => None,
        };
        let budget = Budget {
            parameters: outcome.parameters as u64,
            bytes: weights_of(run),
            steps: outcome.steps,
            seconds: known(outcome.seconds),
            seconds_per_step: known(outcome.seconds / outcome.steps.max(1) as f64),
            peak_memory: peak,
            // libtorch keeps what it has once taken.
            peak_device_memory: gpu.filter(|_| !interrupted),
            interrupted,
        };
        results::write_json(&done, &budget)?;
        Ok(budget)
    }

    fn step_folder(&self, step: i64) -> PathBuf {
        self.folder.join(format!("step-{step:06}"))
    }

    fn drawing(
        &self,
        prompts: Vec<String>,
        num_images: usize,
        fingerprint: &str,
        resolution: u32,
    ) -> Drawing {
        let batch = self.config.sample_batch_size;
        let draw = self.task.draw.clone();
        // The lists are in `prompts` already, and their lengths change no picture.
        let draw = super::config::Draw {
            prompts: Vec::new(),
            validation_prompts: Vec::new(),
            drift_prompts: Vec::new(),
            num_images: 0,
            num_validation_images: 0,
            num_drift_images: 0,
            ..draw
        };
        Drawing { draw, model: fingerprint.to_string(), resolution, batch, prompts, num_images }
    }

    /// Everything that is drawn after a step: its folder's name, and how.
    fn drawings(&self, fingerprint: &str, resolution: u32) -> Vec<(String, Drawing)> {
        let sets = self.task.sets.iter().map(|set| {
            let prompts = set.prompts.iter().map(|p| p.prompt.clone()).collect();
            let drawing = self.drawing(prompts, set.num_images, fingerprint, resolution);
            (set.set.name().to_string(), drawing)
        });
        let drift = (!self.task.drift_prompts.is_empty()).then(|| {
            let (prompts, count) = (self.task.drift_prompts.clone(), self.task.draw.num_drift_images);
            (DRIFT.to_string(), self.drawing(prompts, count, fingerprint, resolution))
        });
        sets.chain(drift).collect()
    }

    /// Draws what is missing; the base model's fingerprint, or `None` where the weights that should draw are gone.
    fn draw(&self) -> Result<Option<String>> {
        let (config, compute) = (&self.config, &self.compute);
        let dir = hub::resolve(&config.pretrained_model_name_or_path, Wanted::Model)?;
        let load = || {
            let mut model = StableDiffusion::load_with(
                &dir,
                config.model_config.as_deref(),
                compute.kind,
                compute.device,
            )?;
            device::set_threads(config.threads, attach::weight_count(&mut model.unet))?;
            Ok::<_, Error>(model)
        };
        let mut model = load()?;
        let fingerprint = model.fingerprint()?;
        let resolution = config.resolution.unwrap_or(model.native_size() as u32);
        results::write_json(&self.folder.join("resolution.json"), &resolution)?;
        if self.task.cell.learning_rate.is_none() && config.with_prior_preservation {
            self.class_pictures(&mut model)?;
        }
        let drawings = self.drawings(&fingerprint, resolution);
        let mut fresh = true;
        for &step in &self.task.steps {
            let place = self.step_folder(step);
            if drawings.iter().all(|(name, drawing)| drawing.is_done(&place.join(name))) {
                continue;
            }
            if !fresh {
                model = load()?;
            }
            fresh = false;
            if let Some(adapter) = self.adapter(step) {
                if !weight_files(&adapter).iter().any(|path| path.is_file()) {
                    return Ok(None);
                }
                let names = model.layer_names()?;
                let loaded = LoadedAdapter::read(&adapter, &names)?;
                fixed::attach_fixed(&mut model, vec![(loaded, 1.0)], false)?;
            }
            let cell = &self.task.cell;
            let by = format!("{}, {}, seed {}, step {step}", cell.method, cell.subject, cell.seed);
            for (name, drawing) in &drawings {
                drawing.draw(&model, &by, &place.join(name))?;
            }
        }
        Ok(Some(fingerprint))
    }

    /// What was trained up to a step; `None` for the base model.
    fn adapter(&self, step: i64) -> Option<PathBuf> {
        self.task.cell.learning_rate?;
        let run = &self.config.output_dir;
        Some(if step == self.config.max_train_steps { run.clone() } else { checkpoint::folder(run, step) })
    }

    /// Class pictures are made once, by whoever comes first.
    fn class_pictures(&self, model: &mut StableDiffusion) -> Result<()> {
        let folder = self.comparison.join(&self.task.class_folder);
        files::create_dir_all(&folder)?;
        let _lock = lock(&folder.join(".lock"))?;
        eprintln!("{}", train::make_class_images(model, &self.config)?);
        Ok(())
    }

    fn score(&self, towers: &Towers, fingerprint: &str) -> Result<Vec<Evaluation>> {
        let resolution: u32 = results::read_json(&self.folder.join("resolution.json"))?;
        let look_alikes = self.look_alikes()?;
        let mut evaluations = Vec::new();
        let drawings = self.drawings(fingerprint, resolution);
        let base =
            results::cell_folder(self.comparison, &self.task.drift_base).join("step-000000").join(DRIFT);
        let subjects = self
            .task
            .sets
            .iter()
            .map(|set| {
                let real = self.real_pictures(set.set.name())?;
                let masks = if set.set == Set::Test { self.real_pictures("masks")? } else { Vec::new() };
                score::subject(towers, &real, if real.is_empty() { &[] } else { &look_alikes }, &masks)
            })
            .collect::<Result<Vec<_>>>()?;
        for &step in &self.task.steps {
            interrupt::check(|| "stopped while scoring".into())?;
            let place = self.step_folder(step);
            let drift = match drawings.iter().find(|(name, _)| name == DRIFT) {
                Some((_, drawing)) if self.task.cell.learning_rate.is_some() => {
                    score::drift(towers, drawing, &place.join(DRIFT), &base, &self.folder)?
                }
                _ => Vec::new(),
            };
            for ((set, subject), (name, drawing)) in self.task.sets.iter().zip(&subjects).zip(&drawings) {
                let folder = place.join(name);
                let prompts = score::prompts(towers, subject, drawing, &set.prompts, &folder, &self.folder)?;
                evaluations.push(score::evaluation(step, set.set, prompts, drift.clone()));
            }
        }
        Ok(evaluations)
    }

    fn real_pictures(&self, kind: &str) -> Result<Vec<RgbImage>> {
        let subject = self.comparison.join("subjects").join(&self.task.cell.subject);
        score::pictures(&subject.join(kind), usize::MAX)
    }

    fn look_alikes(&self) -> Result<Vec<RgbImage>> {
        if self.task.class_look_alikes {
            return score::pictures(&self.comparison.join(&self.task.class_folder), CLASS_LOOK_ALIKES);
        }
        self.real_pictures("look_alikes")
    }

    /// Scores of the pictures that are trained on against those of the tables.
    fn real(&self, towers: &Towers) -> Result<Scores> {
        let (train, test) = (self.real_pictures("train")?, self.real_pictures("test")?);
        if test.is_empty() || self.task.sets.iter().all(|s| s.set != Set::Test) {
            return Ok(Scores::new());
        }
        let subject = score::subject(towers, &test, &self.look_alikes()?, &[])?;
        // Photographs differ in size; LPIPS between them has no meaning here.
        let each =
            train.iter().map(|picture| Ok(subject.score(towers, None, std::slice::from_ref(picture))?.1));
        let each: Vec<Scores> = each.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        let mut mean = Scores::new();
        for (key, value) in each.iter().flatten() {
            *mean.entry(key.clone()).or_default() += value / each.len() as f64;
        }
        Ok(mean)
    }

    fn record(
        &self,
        budget: Option<Budget>,
        evaluations: Vec<Evaluation>,
        real: Scores,
    ) -> Result<CellRecord> {
        let dtype = toml::Value::try_from(self.config.dtype).ok();
        let cpu = doctor::cpu_model().unwrap_or_else(|| "unknown processor".into());
        Ok(CellRecord {
            format: FORMAT,
            cell: self.task.cell.clone(),
            budget,
            losses: losses(&self.config.output_dir)?,
            evaluations,
            real,
            failure: None,
            scored_with: self.task.scored_with.clone(),
            environment: Environment {
                version: env!("CARGO_PKG_VERSION").into(),
                device: format!("{}, {cpu}", format!("{:?}", self.compute.device).to_lowercase()),
                dtype: dtype.and_then(|d| d.as_str().map(str::to_string)).unwrap_or_default(),
                threads: tch::get_num_threads(),
                jobs: self.task.jobs,
            },
        })
    }

    fn finish(&self, record: CellRecord) -> Result<()> {
        results::write_json(&self.folder.join(RECORD_FILE), &record)?;
        let run = &self.config.output_dir;
        let checkpoints = run.join("checkpoints");
        if checkpoints.is_dir() {
            files::remove_dir_all(&checkpoints)?;
        }
        for path in weight_files(run).iter().filter(|_| self.task.remove_weights) {
            files::remove_file(path)?;
        }
        Ok(())
    }
}

/// The files that are needed to draw with what was trained.
fn weight_files(run: &Path) -> [PathBuf; 5] {
    let text = run.join(TEXT_ENCODER);
    [
        run.join(peft::WEIGHTS_FILE),
        run.join(peft::CONFIG_FILE),
        text.join(peft::WEIGHTS_FILE),
        text.join(peft::CONFIG_FILE),
        run.join(FULL_UNET),
    ]
}

fn weights_of(run: &Path) -> u64 {
    weight_files(run).iter().filter_map(|path| path.metadata().ok()).map(|m| m.len()).sum()
}

/// The records of a run, without times.
fn losses(run: &Path) -> Result<Vec<LossPoint>> {
    let path = run.join(METRICS_FILE);
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let text = String::from_utf8_lossy(&files::read(&path, MAX_METRICS)?).into_owned();
    let point = |r: Record| LossPoint { step: r.step, loss: r.loss, held_out: r.held_out_loss };
    Ok(text.lines().filter_map(|line| serde_json::from_str::<Record>(line).ok()).map(point).collect())
}
