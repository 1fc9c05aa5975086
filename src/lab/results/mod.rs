//! What a comparison is made of and what it measured: `plan.json`, and `record.json` for each cell. Reports are made from
//! these files alone, on any machine; no tensors here.
//!
//! A comparison's folder:
//!
//! ```text
//! plan.json                 Plan: methods, subjects, seeds, cells; written again when a search has chosen
//! subjects/NAME/KIND/       the subject's pictures (KIND: train, validation, test, look_alikes, masks); of control those of
//!                           the pairs at the drawn size (KIND: test, test_conditions; test.jsonl beside them is their table)
//! class_images/NAME/        shared class pictures
//! classifier/               pictures that the model itself is to tell apart
//! cells/ID/run/             the run folder of the cell's training
//! cells/ID/step-000300/test/00-01.png   prompt 0, picture 1, drawn after step 300
//! cells/ID/step-000300/scale-0.5/test/  the same at another adapter scale
//! cells/ID/classifier.json  ClassifierRecord, while it is measured too
//! cells/ID/record.json      CellRecord
//! report.html, report.csv, report-cells.csv, report.json, report.md
//! ```

mod cell;
mod changes;
mod classifier;
mod frontier;
mod scores;

pub use cell::{BASE, CellWork, PlannedCell};
pub use changes::WeightChanges;
pub use classifier::{ClassifiedPicture, ClassifierPoint, ClassifierRecord, PlannedClassifier};
pub use frontier::{FrontierPoint, FrontierRecord, PlannedFrontier};
pub use scores::{Better, OF_CONDITIONS, SCORES, ScoreKind, Scores};

use crate::error::{Error, Result};
use crate::platform::files;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Version of the files.
pub const FORMAT: u32 = 1;
/// The plan, at the top of a comparison's folder.
pub const PLAN_FILE: &str = "plan.json";
/// In each cell's folder.
pub const RECORD_FILE: &str = "record.json";
/// Pictures of the classes of [`PlannedClassifier`], below a comparison's folder.
pub const CLASSIFIER_PICTURES: &str = "classifier";
/// Room for the records of thousands of pictures.
const MAX_BYTES: u64 = 1 << 30;

/// What a comparison is going to do, written before its first cell begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// [`FORMAT`].
    pub format: u32,
    /// Heading of the report.
    pub title: String,
    /// `default`, or `paper`: what the HRA authors' scripts computed.
    pub protocol: String,
    /// What a reader must know, a sentence each: of the config file, and what the protocol brings with it.
    pub notes: Vec<String>,
    /// Rows of the table, in their order; the base model is not among them.
    pub methods: Vec<PlannedMethod>,
    /// What is taught.
    pub subjects: Vec<PlannedSubject>,
    /// Seeds of the trainings.
    pub seeds: Vec<u64>,
    /// Optimiser steps of each cell after which it is drawn from and scored, ascending; the last is the result.
    pub steps: Vec<i64>,
    /// Prompts that are not about the subject, for drift.
    pub drift_prompts: Vec<String>,
    /// How learning rates are chosen from validation: weights of score keys in a sum.
    pub objective: Vec<(String, f64)>,
    /// In place of that: the likeness that is had with no more than this drift.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search_drift: Option<f64>,
    /// A learning rate that every method has a row of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub common_rate: Option<f64>,
    /// What is the same for every cell, for the reader: setting and value.
    pub common: Vec<(String, String)>,
    /// Every cell, the base model's first.
    pub cells: Vec<PlannedCell>,
    /// For each cell's id what its scores are to be made with; a record that was made with other things does not count.
    #[serde(default)]
    pub scored_with: BTreeMap<String, ScoredWith>,
    /// Along which grid trained cells are drawn too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frontier: Option<PlannedFrontier>,
    /// Which classes the model itself is asked to tell apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classifier: Option<PlannedClassifier>,
}

/// For each set of prompts the identity of all that its scores depend on beside the training: towers, real pictures, prompts,
/// and how pictures are drawn.
pub type ScoredWith = BTreeMap<Set, String>;

/// A row of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedMethod {
    /// Its heading, unique.
    pub label: String,
    /// What the config file sets for this method only: `method`, `rank`, `hra_lambda` ..
    pub settings: serde_json::Map<String, serde_json::Value>,
    /// Learning rates that are tried; one where it is fixed.
    pub learning_rates: Vec<f64>,
}

/// A subject of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedSubject {
    /// Its name, unique, usable as a folder.
    pub name: String,
    /// What it is one of, such as `dog`.
    pub class: String,
    /// The prompt that it is trained with.
    pub instance_prompt: String,
    /// What it is drawn with for the tables.
    pub prompts: Vec<String>,
    /// What it is drawn with to choose learning rates and checkpoints.
    pub validation_prompts: Vec<String>,
    /// Pictures that are trained on, relative to the comparison's folder.
    pub train_pictures: Vec<String>,
    /// Pictures that only validation sees; may be empty.
    pub validation_pictures: Vec<String>,
    /// Pictures that only the tables see.
    pub test_pictures: Vec<String>,
    /// What a reader must know of it.
    pub notes: Vec<String>,
    /// Where control is taught, on pairs; then the prompts are their captions, and the lists of pictures above are empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<PlannedControl>,
}

/// Pairs of picture and condition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedControl {
    /// What the conditions are, such as `canny`.
    pub condition: String,
    /// How many pairs are trained on.
    pub trained_pairs: usize,
    /// Those of the tables, one for each prompt.
    pub test: PlannedPairs,
    /// Those to choose by, one for each validation prompt.
    pub validation: PlannedPairs,
}

/// Pairs that are drawn from, in the order of their prompts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PlannedPairs {
    /// Pictures relative to the comparison's folder.
    pub pictures: Vec<String>,
    /// Their conditions.
    pub conditions: Vec<String>,
    /// For each pair the number of the one whose condition it is drawn with once more.
    pub shuffled: Vec<usize>,
}

/// What one cell gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CellRecord {
    /// [`FORMAT`].
    pub format: u32,
    /// Which one it is.
    pub cell: PlannedCell,
    /// What the training cost; `None` for the base model.
    pub budget: Option<Budget>,
    /// What the training changed; `None` for the base model, and where no weights were there to measure it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<WeightChanges>,
    /// The training's records, in steps.
    pub losses: Vec<LossPoint>,
    /// Scores after each step of the plan and on each set of prompts, in that order.
    pub evaluations: Vec<Evaluation>,
    /// Along the grid of the plan's frontier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frontier: Option<FrontierRecord>,
    /// Its answers as a classifier; of the base model in the record of the first subject's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classifier: Option<ClassifierRecord>,
    /// Scores of the test pictures against the training pictures, in the base model's record: what a perfect likeness
    /// may look like. Empty elsewhere.
    pub real: Scores,
    /// Of control, in the base model's record: each test pair's own picture scored as a drawn one. Its file is relative to
    /// the comparison's folder, its seed is 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub real_pictures: Vec<PictureScores>,
    /// Why there is no result, such as a loss that is not a finite number; then [`Self::evaluations`] is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// What its scores were made with.
    #[serde(default)]
    pub scored_with: ScoredWith,
    /// Where it ran.
    pub environment: Environment,
}

/// What a training cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Budget {
    /// Trained values.
    pub parameters: u64,
    /// Of the files that are needed to draw with it, beside the base model.
    pub bytes: u64,
    /// Optimiser steps.
    pub steps: i64,
    /// Of training without loading and class pictures; `None` where it was interrupted.
    pub seconds: Option<f64>,
    /// Mean of the steps; `None` where it was interrupted.
    pub seconds_per_step: Option<f64>,
    /// Largest memory of the process that trained, bytes; `None` where it was interrupted.
    pub peak_memory: Option<u64>,
    /// Largest memory of the GPU, bytes; `None` on the CPU.
    pub peak_device_memory: Option<u64>,
    /// Stopped and gone on with: the result is the same, times and memory are not told.
    pub interrupted: bool,
}

/// A record of the training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossPoint {
    /// Optimiser steps.
    pub step: i64,
    /// Mean denoising loss since the point before, class pictures' share included, no regulariser.
    pub loss: f64,
    /// On pictures that were not trained on, with fixed noise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<f64>,
}

/// What prompts are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Set {
    /// To choose by; in no table.
    Validation,
    /// For the tables; nothing is chosen by it.
    Test,
}

impl Set {
    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }
}

/// Scores of what was drawn after one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Optimiser steps; 0 for the base model.
    pub step: i64,
    /// Which prompts.
    pub set: Set,
    /// Prompts with the subject.
    pub prompts: Vec<PromptScores>,
    /// Prompts without it: `drift` and `drift_clip` of each picture.
    pub drift: Vec<PromptScores>,
    /// Means: over prompts of the means over their pictures.
    pub scores: Scores,
}

/// Scores of the pictures of one prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptScores {
    /// As it was drawn.
    pub prompt: String,
    /// Scores that pictures have only together, such as their diversity.
    pub scores: Scores,
    /// Its pictures, in the order of their seeds.
    pub pictures: Vec<PictureScores>,
}

/// Scores of one picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PictureScores {
    /// Of its noise.
    pub seed: u64,
    /// Relative to the cell's folder.
    pub file: String,
    /// Its own scores.
    pub scores: Scores,
}

/// Where a cell ran.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    /// Of this program.
    pub version: String,
    /// In words, such as `cpu, AMD EPYC`.
    pub device: String,
    /// Number format of the base model.
    pub dtype: String,
    /// CPU threads of the process.
    pub threads: i32,
    /// Cells that ran at once on the machine.
    pub jobs: usize,
}

impl Evaluation {
    /// Fills [`Self::scores`]: for every key the mean over prompts, of the prompt's own value or the mean of its pictures; for
    /// those of [`OF_CONDITIONS`] the mean over pictures.
    pub fn summarise(&mut self) {
        let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for prompt in self.prompts.iter().chain(&self.drift) {
            for (key, value) in prompt.means() {
                values.entry(key).or_default().push(value);
            }
        }
        for key in OF_CONDITIONS {
            if let Some(values) = values.get_mut(key) {
                *values = self.values(key);
            }
        }
        self.scores =
            values.into_iter().map(|(key, v)| (key, v.iter().sum::<f64>() / v.len() as f64)).collect();
    }

    /// The score of every picture that has it, but those of [`Self::drift`].
    pub fn values(&self, key: &str) -> Vec<f64> {
        let pictures = self.prompts.iter().flat_map(|prompt| &prompt.pictures);
        pictures.filter_map(|picture| picture.scores.get(key).copied()).collect()
    }
}

impl PromptScores {
    /// Its own scores, and the means of its pictures' scores.
    pub fn means(&self) -> Scores {
        let mut sums: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
        for (key, value) in self.pictures.iter().flat_map(|picture| &picture.scores) {
            let (sum, count) = sums.entry(key).or_default();
            *sum += value;
            *count += 1.0;
        }
        let means = sums.into_iter().map(|(key, (sum, count))| (key.to_string(), sum / count));
        means.chain(self.scores.clone()).collect()
    }
}

/// Folder of a cell in a comparison's folder.
pub fn cell_folder(comparison: &Path, id: &str) -> PathBuf {
    comparison.join("cells").join(id)
}

/// `1 cell`, `2 cells`.
pub fn cell_count(count: usize) -> String {
    format!("{count} cell{}", if count == 1 { "" } else { "s" })
}

impl Plan {
    /// Reads the plan of a comparison.
    pub fn read(comparison: &Path) -> Result<Self> {
        let path = comparison.join(PLAN_FILE);
        if !path.is_file() {
            return Err(Error::run(format!(
                "{}: expected a comparison, found no {PLAN_FILE}",
                comparison.display()
            ))
            .with_hint("give the folder that `hra compare` wrote"));
        }
        let plan: Self = read_json(&path)?;
        check_format(&path, plan.format)?;
        Ok(plan)
    }

    /// The records that are there, in the order of the plan's cells; without those whose scores were made with other things
    /// than the plan's. One that cannot be read is an error.
    pub fn records(&self, comparison: &Path) -> Result<Vec<CellRecord>> {
        let mut records = Vec::new();
        for cell in &self.cells {
            let path = cell_folder(comparison, &cell.id).join(RECORD_FILE);
            if path.is_file() {
                let record = CellRecord::read(&path)?;
                if self.scored_with.get(&cell.id).is_none_or(|wanted| record.has(wanted)) {
                    records.push(record);
                }
            }
        }
        Ok(records)
    }
}

impl CellRecord {
    /// Whether it has these scores.
    pub fn has(&self, wanted: &ScoredWith) -> bool {
        wanted.iter().all(|(set, identity)| self.scored_with.get(set) == Some(identity))
    }

    /// Reads one record.
    pub fn read(path: &Path) -> Result<Self> {
        let record: Self = read_json(path)?;
        check_format(path, record.format)?;
        Ok(record)
    }
}

/// Reads a JSON file of ours.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&files::read(path, MAX_BYTES)?).map_err(|e| Error::format(path, e.to_string()))
}

/// Writes a JSON file, whole or not at all.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::format(path, e.to_string()))?;
    files::write_atomic(path, (text + "\n").as_bytes())
}

fn check_format(path: &Path, found: u32) -> Result<()> {
    if found == FORMAT {
        return Ok(());
    }
    Err(Error::format(path, format!("expected format {FORMAT}, found {found}"))
        .with_hint("another version of hra wrote it"))
}
