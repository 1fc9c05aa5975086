//! What one process of a comparison is to do, as the parent writes it into the cell's folder: `cells/ID/task.json`.

use crate::error::Result;
use crate::lab::compare::control::{self, Agreement};
use crate::lab::compare::draw::{DrawnPairing, Sampling};
use crate::lab::compare::subject::Prompt;
use crate::lab::evaluate::TowerPaths;
use crate::lab::results::{self, ClassifierRecord, PlannedCell, PlannedClassifier, ScoredWith, Set};
use crate::train::config::{DataSection, PriorSection, TrainConfig};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const FILE: &str = "task.json";

/// One training with its pictures and scores; or the base model's pictures of a subject.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// Which one.
    pub cell: PlannedCell,
    /// The settings of the training, and of the base model where there is none. Folders of the comparison are filled in
    /// by [`Task::train_config`].
    pub train: TrainConfig,
    /// Folder of the class pictures, relative to the comparison's.
    pub class_folder: PathBuf,
    /// Steps after which it is scored, ascending.
    pub steps: Vec<i64>,
    /// What is drawn and scored after each of them.
    pub sets: Vec<TaskSet>,
    /// Prompts without the subject; empty where another cell's pictures serve (see [`Self::drift_base`]).
    pub drift_prompts: Vec<String>,
    /// The cell, of the base model, that drift is measured from.
    pub drift_base: String,
    /// How pictures are drawn.
    pub sampling: Sampling,
    /// Pictures for each of [`Self::drift_prompts`].
    pub num_drift_images: usize,
    /// The towers.
    pub towers: TowerPaths,
    /// The class pictures are the subject's look-alikes.
    pub class_look_alikes: bool,
    /// Along which grid it is drawn too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frontier: Option<TaskFrontier>,
    /// What it is asked as a classifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classifier: Option<TaskClassifier>,
    /// What its scores are to be made with.
    pub scored_with: ScoredWith,
    /// Measure what the training changed in the weights.
    #[serde(default = "crate::lab::compare::config::yes")]
    pub weight_changes: bool,
    /// Whether likeness on validation is to the pictures that are trained on too.
    #[serde(default)]
    pub validates_with_train: bool,
    /// Remove what was trained once it is scored.
    pub remove_weights: bool,
    /// Where control is taught: how its pictures are scored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<Agreement>,
    /// Nothing else will be drawn from its checkpoints: they are removed when it is scored.
    pub is_final: bool,
    /// Cells that run at once.
    pub jobs: usize,
}

/// Prompts of one kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskSet {
    /// Which kind.
    pub set: Set,
    /// The prompts.
    pub prompts: Vec<Prompt>,
    /// Pictures for each.
    pub num_images: usize,
    /// Where the prompts are captions of pairs: how they are drawn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pairs: Option<DrawnPairing>,
}

/// What one cell draws beside its scored steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskFrontier {
    /// Steps and scales, in the order in which they are drawn.
    pub points: Vec<(i64, f64)>,
    /// What is drawn at each.
    pub sets: Vec<TaskSet>,
    /// What the points on each set are to be made with.
    pub made_with: ScoredWith,
}

/// What one cell is asked as a classifier.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskClassifier {
    /// After which step; 0 for the base model.
    pub step: i64,
    /// Of the plan's scales those of this cell.
    pub scales: Vec<f64>,
    /// The question.
    pub asked: PlannedClassifier,
}

impl TaskClassifier {
    /// Whether these are all answers.
    pub fn is_answered(&self, record: &ClassifierRecord) -> bool {
        let done = |scale: &f64| record.at(*scale).is_some_and(|point| point.is_done());
        record.made_with == self.asked.made_with && self.scales.iter().all(done)
    }
}

impl Task {
    /// Writes it into its cell's folder.
    pub fn write(&self, comparison: &Path) -> Result<()> {
        let folder = results::cell_folder(comparison, &self.cell.id);
        crate::platform::files::create_dir_all(&folder)?;
        results::write_json(&folder.join(FILE), self)
    }

    /// Reads the task of a cell.
    pub fn read(comparison: &Path, id: &str) -> Result<Self> {
        results::read_json(&results::cell_folder(comparison, id).join(FILE))
    }

    /// The settings of the training in this comparison's folder.
    pub fn train_config(&self, comparison: &Path) -> TrainConfig {
        let subject = comparison.join("subjects").join(&self.cell.subject);
        let output_dir = results::cell_folder(comparison, &self.cell.id).join("run");
        // The same for the search and the tables; nothing is chosen by it.
        let kinds = ["validation", "test"];
        if self.control.is_some() {
            let held_out = kinds.map(|kind| control::table(&subject, kind));
            let held_out_data_dir = held_out.into_iter().find(|table| table.is_file());
            let data = DataSection { held_out_data_dir, ..self.train.data.clone() };
            return TrainConfig { output_dir, data, ..self.train.clone() };
        }
        let held_out = kinds.map(|kind| subject.join(kind)).into_iter().find(|folder| folder.is_dir());
        let class_folder = || comparison.join(&self.class_folder);
        let class_data_dir = self.train.prior.with_prior_preservation.then(class_folder);
        TrainConfig {
            output_dir,
            data: DataSection {
                instance_data_dir: subject.join("train"),
                held_out_data_dir: held_out,
                ..self.train.data.clone()
            },
            prior: PriorSection { class_data_dir, ..self.train.prior.clone() },
            ..self.train.clone()
        }
    }
}
