//! The run folder: who may write into it, the resolved config, `metrics.jsonl` and TensorBoard's event file.

use crate::error::{Error, Result};
use crate::platform::files;
use crate::platform::observer::Observer;
use crate::train::tensorboard::EventWriter;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Resolved settings in a run folder.
pub const CONFIG_FILE: &str = "config.toml";
/// One JSON object a line.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// More than a record of each of three million steps.
const MAX_METRICS: u64 = 1 << 30;

/// A folder that this process alone may write into.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    /// The folder itself, whatever is at its path; no other folder gets its number as long as it is held.
    folder: File,
    /// Held as long as the run lasts; the system lets go of it even after kill -9.
    _lock: File,
}

impl RunFolder {
    /// Refuses a folder that holds anything, so that no run is overwritten. Makes nothing.
    pub fn check_new(path: &Path) -> Result<()> {
        if path.join(CONFIG_FILE).is_file() {
            return Err(Error::run(format!("{} holds a run already", path.display()))
                .with_hint("go on with `--resume latest`, or give another --output_dir"));
        }
        if path.exists() && !path.is_dir() {
            return Err(Error::run(format!(
                "{}: expected a folder for the run, found a file",
                path.display()
            )));
        }
        if path.is_dir() && files::list_dir(path)?.iter().any(is_somebodys) {
            return Err(Error::run(format!("{} is not empty", path.display()))
                .with_hint("give another --output_dir; a run writes only into its own folder"));
        }
        Ok(())
    }

    /// Makes the folder of a new run and writes its settings.
    pub fn create(path: &Path, config: &str) -> Result<Self> {
        Self::check_new(path)?;
        files::create_dir_all(path)?;
        let run = Self::lock(path)?;
        run.write_config(config)?;
        Ok(run)
    }

    /// Opens the folder of a run that is to go on, with the settings that count from now.
    pub fn open(path: &Path, config: &str) -> Result<Self> {
        Self::check_run(path)?;
        let run = Self::lock(path)?;
        let written = ["", "checkpoints", "class_images", "samples"].map(|name| path.join(name));
        written.iter().filter(|dir| dir.is_dir()).try_for_each(|dir| files::remove_leftovers(dir))?;
        run.write_config(config)?;
        Ok(run)
    }

    /// Fails unless `path` holds a run.
    pub fn check_run(path: &Path) -> Result<()> {
        if path.join(CONFIG_FILE).is_file() {
            return Ok(());
        }
        Err(Error::run(format!("{}: expected a run to resume, found no {CONFIG_FILE}", path.display()))
            .with_hint("leave --resume away to start a run there"))
    }

    fn write_config(&self, config: &str) -> Result<()> {
        files::write_atomic(&self.path.join(CONFIG_FILE), config.as_bytes())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes something into the folder, which must be the one that the run began with, before and meanwhile: `check_there`.
    pub fn write<T>(&self, write: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        self.check_there()?;
        write(&self.path).map_err(|error| self.check_there().err().unwrap_or(error))
    }

    /// Fails if the folder was removed, renamed or replaced, or its settings were removed, since the run began: what would be
    /// written then could not be gone on with.
    fn check_there(&self) -> Result<()> {
        let same = match (self.folder.metadata(), std::fs::metadata(&self.path)) {
            (Ok(held), Ok(found)) => (held.dev(), held.ino()) == (found.dev(), found.ino()),
            _ => false,
        };
        if same && self.path.join(CONFIG_FILE).is_file() {
            return Ok(());
        }
        let what = if same { format!("its {CONFIG_FILE} was") } else { "the run folder was".to_string() };
        Err(Error::run(format!(
            "{}: {what} removed, renamed or replaced while the training ran; it stops, and writes nothing more",
            self.path.display()
        ))
        .with_hint("what was trained since is lost: start the run anew, in a folder that stays"))
    }

    fn lock(path: &Path) -> Result<Self> {
        let folder = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let lock = path.join(LOCK_FILE);
        let file = files::open_append(&lock)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { path: path.to_path_buf(), folder, _lock: file }),
            Err(std::fs::TryLockError::WouldBlock) => {
                Err(Error::run(format!("{}: another process is training in this folder", path.display())))
            }
            Err(std::fs::TryLockError::Error(e)) => Err(Error::io("lock", &lock, e)),
        }
    }
}

const LOCK_FILE: &str = ".lock";

/// Neither our lock nor what a killed process left behind while it made the folder.
fn is_somebodys(entry: &files::DirEntry) -> bool {
    let name = entry.name.to_string_lossy();
    name != LOCK_FILE && !name.starts_with(files::LEFTOVER_PREFIX)
}

/// What is recorded of one step.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Record {
    /// Optimiser steps taken, from 1.
    pub step: i64,
    /// Mean of the whole loss since the record before.
    pub loss: f64,
    /// Mean of the loss on the subject's pictures.
    pub loss_instance: f64,
    /// Mean of the loss on class pictures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_prior: Option<f64>,
    /// Sum of the layers' regularisers, before its weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regulariser: Option<f64>,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Gradient norm of this step, before clipping; in f16 of the last step that was not skipped, 0 before the first.
    pub gradient_norm: f64,
    /// Mean over layers of `||W' - W|| / ||W||`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_change: Option<f64>,
    /// The largest of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_change_max: Option<f64>,
    /// `max |H H^T - I|`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub orthogonality_error: Option<f64>,
    /// Loss on held-out pictures with fixed noise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_out_loss: Option<f64>,
    /// In f16, what the next loss is multiplied by before its gradient is taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// In f16, steps since the record before that were skipped because their gradients overflowed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped_steps: Option<f64>,
    /// The most bytes of GPU memory that tensors of this process have held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_allocated_peak: Option<u64>,
    /// The most bytes that libtorch has taken from the GPU for this process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_reserved_peak: Option<u64>,
    /// Seconds of training so far.
    pub seconds: f64,
}

/// Sums since the last record; part of a checkpoint, so that a resumed run records the same means.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    /// Steps.
    pub count: f64,
    /// Whole loss.
    pub loss: f64,
    /// On the subject's pictures.
    pub instance: f64,
    /// On class pictures.
    pub prior: f64,
    /// Regulariser, before its weight.
    pub regulariser: f64,
    /// Steps that f16 skipped.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skipped: f64,
}

fn is_zero(number: &f64) -> bool {
    *number == 0.0
}

/// Writes records to `metrics.jsonl` and to TensorBoard.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    events: EventWriter,
}

impl Metrics {
    /// Opens a run's metrics to go on after `step`: later records, and a line that was cut off, are dropped, and others that are no
    /// records too, which is said. `resumed` tells TensorBoard to drop what an earlier session wrote beyond it.
    pub fn open(run: &Path, step: i64, resumed: bool, observer: &dyn Observer) -> Result<Self> {
        let path = run.join(METRICS_FILE);
        if path.is_file() {
            let text = String::from_utf8_lossy(&files::read(&path, MAX_METRICS)?).into_owned();
            let mut damaged = 0;
            let kept: String = text
                .split_inclusive('\n')
                .filter(|line| match serde_json::from_str::<Record>(line) {
                    Ok(record) => record.step <= step && line.ends_with('\n'),
                    Err(_) => {
                        damaged += usize::from(line.ends_with('\n'));
                        false
                    }
                })
                .collect();
            if damaged > 0 {
                observer
                    .note(&format!("{}: lines that are no records are dropped: {damaged}", path.display()));
            }
            if kept != text {
                files::write_atomic(&path, kept.as_bytes())?;
            }
        }
        let file = files::open_append(&path)?;
        let events = EventWriter::create(&run.join("tensorboard"), if resumed { step + 1 } else { 0 })?;
        Ok(Self { path, file, events })
    }

    /// Appends one record; gives it as it was written.
    pub fn write(&mut self, record: &Record) -> Result<serde_json::Value> {
        let value = serde_json::to_value(record).map_err(|e| Error::run(e.to_string()))?;
        // One write for the whole line: a reader never sees half of it.
        self.file
            .write_all(format!("{value}\n").as_bytes())
            .map_err(|e| Error::io("write", &self.path, e))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let fields = value.as_object().into_iter().flatten().filter(|(key, _)| key.as_str() != "step");
        for (key, number) in fields {
            if let Some(number) = number.as_f64() {
                self.events.scalar(key, number as f32, record.step, now)?;
            }
        }
        self.events.flush()?;
        Ok(value)
    }
}
