//! Checkpoints: everything that training needs to go on exactly where it stopped.
//!
//! `checkpoints/step-000100/` holds what a finished run holds, usable as it is (a PEFT folder, with the text encoders' below
//! it, or a fully fine-tuned UNet; and a control encoder where one trains), the optimiser's moments, and `state.json`. A checkpoint is written beside its place and renamed, so one that is there is whole.

use crate::adapter::peft::{self, AdapterConfig, PythonClass};
use crate::attach::parameters::Parameters;
use crate::error::{Error, Result};
use crate::model::control::FILE_STEM;
use crate::model::text::in_own_tower;
use crate::platform::files;
use crate::platform::host;
use crate::train::loss_scale::LossScale;
use crate::train::optim::{self, AdamW, Ema};
use crate::train::run::Sums;
use crate::weights::tensor_file::{self, TensorFile};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

const FORMAT: u32 = 1;
/// The most steps that a run may have.
const MAX_STEP: i64 = 1_000_000_000;
const STATE_FILE: &str = "state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// In [`OPTIMIZER_FILE`], where f16 skipped some: the steps that were not.
const STEPS: &str = "steps";
/// In [`OPTIMIZER_FILE`], where f16 trains: the [`LossScale`].
const LOSS_SCALE: &str = "loss_scale";
const GOOD_STEPS: &str = "good_steps";

/// Where to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// The newest checkpoint.
    Latest,
    /// The checkpoint of this step.
    Step(i64),
}

impl std::str::FromStr for Resume {
    type Err = Error;

    /// `latest`, a number of steps, or a checkpoint folder's name or path as diffusers' scripts take it.
    fn from_str(text: &str) -> Result<Self> {
        if text == "latest" {
            return Ok(Self::Latest);
        }
        let name = text.trim_end_matches('/').rsplit('/').next().unwrap_or(text);
        let digits = name.trim_start_matches("step-").trim_start_matches("checkpoint-");
        digits
            .parse()
            .map(Self::Step)
            .map_err(|_| Error::config(format!("--resume: expected latest or a step, found `{text}`")))
    }
}

/// The files of one network's trained tensors.
pub enum TrainedPart {
    /// A PEFT folder: at the top (`""`) or in a folder below it.
    Peft { place: &'static str, config: AdapterConfig, class: PythonClass },
    /// A whole network in a folder of its own, as diffusers saves it, with its `config.json` and whatever belongs to it.
    Network { folder: &'static str, files: Vec<(&'static str, String)> },
}

impl TrainedPart {
    /// Its folder below a run or checkpoint; empty for the top.
    pub fn place(&self) -> &'static str {
        match self {
            Self::Peft { place, .. } => place,
            Self::Network { folder, .. } => folder,
        }
    }

    fn weights(&self, dir: &Path) -> PathBuf {
        match self {
            Self::Peft { place, .. } => dir.join(place).join(peft::WEIGHTS_FILE),
            Self::Network { folder, .. } => dir.join(folder).join(format!("{FILE_STEM}.safetensors")),
        }
    }

    /// The key of the tensor `name` in its file.
    fn key(&self, name: &str) -> String {
        match self {
            Self::Peft { class, .. } => class.key(in_own_tower(name)),
            Self::Network { .. } => name.to_string(),
        }
    }

    fn write(&self, dir: &Path, tensors: &[(String, Tensor)], text: &[(&str, String)]) -> Result<()> {
        // In a folder that must be there: one that was taken away meanwhile is not made anew.
        if !self.place().is_empty() {
            files::create_dir(&dir.join(self.place()))?;
        }
        match self {
            Self::Peft { place, config, class } => {
                let own = |(name, tensor): &(String, Tensor)| {
                    (in_own_tower(name).to_string(), tensor.shallow_clone())
                };
                let tensors: Vec<(String, Tensor)> = tensors.iter().map(own).collect();
                peft::write(&dir.join(place), config, *class, &tensors, Kind::Float, text)
            }
            Self::Network { folder, files: beside } => {
                tensor_file::write(&self.weights(dir), tensors, text)?;
                beside.iter().try_for_each(|(name, content)| {
                    files::write_atomic(&dir.join(folder).join(name), content.as_bytes())
                })
            }
        }
    }
}

/// What a checkpoint says beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Version of this format.
    pub format: u32,
    /// Optimiser steps taken.
    pub step: i64,
    /// Seconds of training so far, over all sessions.
    pub seconds: f64,
    /// Which base model the adapter belongs to.
    pub base_fingerprint: String,
    /// Trained tensors in the order of the optimiser's moments.
    pub parameters: Vec<String>,
    /// Losses summed up since the last record.
    pub sums: Sums,
}

/// What moves the trained tensors from step to step.
pub struct Moving<'a> {
    pub optimizer: &'a AdamW,
    pub ema: Option<&'a Ema>,
    /// Where f16 trains.
    pub loss_scale: Option<&'a LossScale>,
}

impl Moving<'_> {
    /// What is saved after `step` steps.
    fn tensors(&self, step: i64) -> Vec<(String, Tensor)> {
        let Self { optimizer, ema, loss_scale } = self;
        let mut tensors = vec![
            ("exp_avg", optimizer.exp_avg.shallow_clone()),
            ("exp_avg_sq", optimizer.exp_avg_sq.shallow_clone()),
        ];
        if host::number(&optimizer.steps.get(0)) != step as f64 {
            tensors.push((STEPS, optimizer.steps.shallow_clone()));
        }
        tensors.extend(ema.map(|e| ("ema", e.average.shallow_clone())));
        if let Some(loss_scale) = loss_scale {
            tensors.push((LOSS_SCALE, loss_scale.scale.shallow_clone()));
            tensors.push((GOOD_STEPS, loss_scale.good_steps.to_kind(Kind::Float)));
        }
        tensors.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect()
    }
}

/// Folder of the checkpoint of `step` in a run.
pub fn folder(run: &Path, step: i64) -> PathBuf {
    run.join("checkpoints").join(format!("step-{step:06}"))
}

/// Steps that a run has checkpoints of, ascending.
pub fn list(run: &Path) -> Result<Vec<i64>> {
    let dir = run.join("checkpoints");
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut steps: Vec<i64> =
        files::list_dir(&dir)?.iter().filter_map(|entry| step_of(&entry.path)).collect();
    steps.sort_unstable();
    Ok(steps)
}

/// Writes the checkpoint of `state.step` and removes the oldest ones beyond `limit`.
pub fn save(
    run: &Path,
    state: &TrainState,
    parts: &[TrainedPart],
    parameters: &Parameters,
    moving: &Moving,
    limit: Option<usize>,
) -> Result<PathBuf> {
    let dir = folder(run, state.step);
    files::create_dir(&run.join("checkpoints"))?;
    files::stage_dir(&dir, |dir| {
        write_trained(dir, parts, parameters, state)?;
        tensor_file::write(&dir.join(OPTIMIZER_FILE), &moving.tensors(state.step), &[])?;
        let json = serde_json::to_string_pretty(state).map_err(|e| Error::run(e.to_string()))?;
        files::write_atomic(&dir.join(STATE_FILE), json.as_bytes())
    })?;
    if let Some(limit) = limit {
        let older: Vec<i64> = list(run)?.into_iter().filter(|step| *step < state.step).collect();
        for step in &older[..older.len().saturating_sub(limit.max(1) - 1)] {
            files::remove_dir_all(&folder(run, *step))?;
        }
    }
    Ok(dir)
}

/// Removes the checkpoints after `step`, which a run that goes on from there no longer leads to; how many there were.
pub fn remove_after(run: &Path, step: i64) -> Result<usize> {
    let later: Vec<i64> = list(run)?.into_iter().filter(|s| *s > step).collect();
    later.iter().try_for_each(|s| files::remove_dir_all(&folder(run, *s)))?;
    Ok(later.len())
}

/// Writes the trained tensors, with what PEFT has no field for in the tensor files' metadata. Refuses numbers that are
/// not finite: such a file would load everywhere and draw black pictures.
pub fn write_trained(
    dir: &Path,
    parts: &[TrainedPart],
    parameters: &Parameters,
    state: &TrainState,
) -> Result<()> {
    // One look at all of them; which one it is, is asked afterwards.
    if !host::all_finite(parameters.flat()) {
        let broken = parameters.views().iter().find(|(_, tensor)| !host::all_finite(tensor));
        let name = broken.map_or("the adapter", |(name, _)| name);
        return Err(Error::not_finite(format!(
            "{name}: the adapter holds numbers that are not finite; it is not saved"
        )));
    }
    let text = [
        ("base_fingerprint", state.base_fingerprint.clone()),
        ("step", state.step.to_string()),
        ("software", format!("hra {}", env!("CARGO_PKG_VERSION"))),
    ];
    for (part, views) in parts.iter().zip(parameters.groups()) {
        part.write(dir, views, &text)?;
    }
    Ok(())
}

/// A checkpoint, read back.
pub struct Loaded {
    pub state: TrainState,
    optimizer: TensorFile,
    dir: PathBuf,
}

/// The step that a checkpoint's folder is called by.
fn step_of(dir: &Path) -> Option<i64> {
    dir.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

/// What is damaged is not passed over in silence, but there may be a checkpoint before it.
fn with_one_before(error: Error, dir: &Path) -> Error {
    let run = dir.parent().and_then(Path::parent);
    let steps = run.and_then(|run| list(run).ok()).unwrap_or_default();
    let before = steps.into_iter().rfind(|before| step_of(dir).is_some_and(|step| *before < step));
    error.with_hint(match before {
        Some(before) => format!("--resume {before} goes on from the checkpoint before it"),
        None => "there is no checkpoint before it: start the run anew in another --output_dir".to_string(),
    })
}

impl Loaded {
    /// Reads the checkpoint in `dir`.
    pub fn read(dir: &Path) -> Result<Self> {
        Self::read_whole(dir).map_err(|error| with_one_before(error, dir))
    }

    fn read_whole(dir: &Path) -> Result<Self> {
        let path = dir.join(STATE_FILE);
        let state: TrainState = serde_json::from_str(&files::read_to_string(&path)?)
            .map_err(|e| Error::format(&path, format!("not a checkpoint's state: {e}")))?;
        if state.format != FORMAT {
            return Err(Error::format(
                &path,
                format!("expected checkpoint format {FORMAT}, found {}", state.format),
            ));
        }
        if step_of(dir).is_some_and(|step| step != state.step) {
            return Err(Error::format(
                &path,
                format!("expected the state of the folder's step, found step {}", state.step),
            ));
        }
        if !(0..=MAX_STEP).contains(&state.step) {
            return Err(Error::format(
                &path,
                format!("step: expected 0 to {MAX_STEP}, found {}", state.step),
            ));
        }
        Ok(Self { state, optimizer: TensorFile::open(&dir.join(OPTIMIZER_FILE))?, dir: dir.to_path_buf() })
    }

    /// Puts everything back where training left it.
    pub fn restore(
        &self,
        parts: &[TrainedPart],
        parameters: &mut Parameters,
        optimizer: &mut AdamW,
        ema: Option<&mut Ema>,
        loss_scale: Option<&mut LossScale>,
    ) -> Result<()> {
        let names: Vec<&String> = parameters.views().iter().map(|(name, _)| name).collect();
        if !names.iter().copied().eq(&self.state.parameters) {
            return Err(Error::format(
                &self.dir,
                "the checkpoint's adapted layers are not those of this configuration",
            ));
        }
        self.put_back(parts, parameters, optimizer, ema, loss_scale)
            .map_err(|error| with_one_before(error, &self.dir))
    }

    /// The values themselves; its errors are damages.
    fn put_back(
        &self,
        parts: &[TrainedPart],
        parameters: &mut Parameters,
        optimizer: &mut AdamW,
        ema: Option<&mut Ema>,
        loss_scale: Option<&mut LossScale>,
    ) -> Result<()> {
        let mut rows = Vec::new();
        for (part, views) in parts.iter().zip(parameters.groups()) {
            let file = TensorFile::open(&part.weights(&self.dir))?;
            for (name, view) in views {
                let tensor = file.read_as(&part.key(name), Kind::Float)?;
                if tensor.size() != view.size() {
                    let (expected, found) = (view.size(), tensor.size());
                    return Err(Error::format(
                        file.path(),
                        format!("`{name}`: expected shape {expected:?}, found {found:?}"),
                    ));
                }
                check_finite(&tensor, &file, name)?;
                rows.push(tensor.reshape([-1]));
            }
        }
        let device = parameters.flat().device();
        let flat = host::to_device(&Tensor::cat(&rows, 0), device);
        let saved = |name: &str, like: &Tensor| {
            let tensor = self.optimizer.read_as(name, Kind::Float)?;
            check_finite(&tensor, &self.optimizer, name)?;
            optim::restore(tensor, like, name, device)
                .map_err(|error| Error::format(self.optimizer.path(), error.kind.to_string()))
        };
        optimizer.exp_avg = saved("exp_avg", &flat)?;
        optimizer.exp_avg_sq = saved("exp_avg_sq", &flat)?;
        self.require("exp_avg_sq", &optimizer.exp_avg_sq, (0.0, f64::INFINITY))?;
        optimizer.steps = match self.optimizer.shape(STEPS) {
            Some(_) => saved(STEPS, &optimizer.steps)?,
            None => host::to_device(&host::tensor(&[self.state.step as f32]), device),
        };
        self.require(STEPS, &optimizer.steps, (0.0, self.state.step as f64))?;
        if let Some(ema) = ema {
            ema.average = saved("ema", &flat)?;
        }
        if let Some(loss_scale) = loss_scale.filter(|_| self.optimizer.shape(LOSS_SCALE).is_some()) {
            loss_scale.scale = saved(LOSS_SCALE, &loss_scale.scale)?;
            self.require(LOSS_SCALE, &loss_scale.scale, (0.0, f64::INFINITY))?;
            let good_steps = saved(GOOD_STEPS, &loss_scale.good_steps)?;
            self.require(GOOD_STEPS, &good_steps, (0.0, self.state.step as f64))?;
            loss_scale.good_steps = good_steps.to_kind(Kind::Int);
        }
        parameters.set(&flat);
        Ok(())
    }

    /// Fails for a value of the optimiser's file that no step leaves behind: one outside `least` to `most`.
    fn require(&self, name: &str, tensor: &Tensor, (least, most): (f64, f64)) -> Result<()> {
        // A number of steps as large as f32 tells it.
        let most = f64::from(most as f32);
        let within = |value: f64| (least..=most).contains(&value);
        match [tensor.min(), tensor.max()].iter().map(host::number).find(|value| !within(*value)) {
            None => Ok(()),
            Some(found) => {
                let expected =
                    if most.is_finite() { format!("{least} to {most}") } else { format!("{least} or more") };
                Err(Error::format(
                    self.optimizer.path(),
                    format!("`{name}`: expected {expected}, found {found}"),
                ))
            }
        }
    }
}

/// Fails for numbers that no step leaves behind, and with which no other can be taken.
fn check_finite(tensor: &Tensor, file: &TensorFile, name: &str) -> Result<()> {
    if host::all_finite(tensor) {
        return Ok(());
    }
    Err(Error::format(file.path(), format!("`{name}`: holds numbers that are not finite")))
}

impl TrainState {
    /// The state after `step` steps.
    pub fn new(step: i64, seconds: f64, base_fingerprint: &str, parameters: &Parameters, sums: Sums) -> Self {
        Self {
            format: FORMAT,
            step,
            seconds,
            base_fingerprint: base_fingerprint.to_string(),
            parameters: parameters.views().iter().map(|(name, _)| name.clone()).collect(),
            sums,
        }
    }
}
