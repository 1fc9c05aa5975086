//! Pairs of a comparison, looked at; those that are drawn from are rendered into its folder.

use crate::data::Crop;
use crate::data::image::edges::Thresholds;
use crate::data::image::png::save_png;
use crate::data::pairs::{ConditionKind, PairFolder, PairSettings};
use crate::error::Result;
use crate::lab::results::{PlannedControl, PlannedPairs, Set};
use crate::platform::files;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How drawn pictures are compared with their conditions; a part of a cell's task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// What the conditions are.
    pub condition: ConditionKind,
    /// Of the edges that are compared.
    pub thresholds: Thresholds,
    /// The background's colours in segmentation maps.
    pub background: Vec<[u8; 3]>,
}

/// Pairs of a subject of a comparison, looked at.
#[derive(Debug, Clone)]
pub struct ControlSet {
    /// How they are read.
    pub settings: PairSettings,
    /// Table or folder of the pairs that are trained on, absolute.
    pub train_data_dir: PathBuf,
    /// Of all files that are trained on.
    pub train_hash: String,
    /// How many they are.
    pub trained_pairs: usize,
    /// How pictures are scored.
    pub agreement: Agreement,
    /// For the tables.
    pub test: DrawnPairs,
    /// To choose by; may be none.
    pub validation: Option<DrawnPairs>,
}

/// Pairs that are drawn from.
#[derive(Debug, Clone)]
pub struct DrawnPairs {
    pub(super) folder: Arc<PairFolder>,
    /// The first so many.
    pub(super) count: usize,
    /// Side of the squares in pixels.
    pub(super) resolution: u32,
    /// Of their files and how they are rendered.
    pub hash: String,
    /// For each pair the one whose condition it is drawn with too; see [`crate::data::pairs::shuffled`].
    pub shuffled: Vec<usize>,
}

impl DrawnPairs {
    /// The captions of the pairs that are drawn from.
    pub fn captions(&self) -> impl Iterator<Item = &str> {
        (0..self.count).map(|i| self.folder.caption(i))
    }

    /// Renders pictures and conditions into `subject` as KIND/ and KIND_conditions/, and their table KIND.jsonl, unless the
    /// same are there.
    fn render(&self, subject: &Path, kind: &str, settings: &PairSettings) -> Result<()> {
        let (done, table) = (subject.join(format!("{kind}.hash")), table(subject, kind));
        if done.is_file() && table.is_file() && files::read_to_string(&done)? == self.hash {
            return Ok(());
        }
        let folders = [subject.join(kind), subject.join(format!("{kind}_conditions"))];
        for folder in &folders {
            files::remove_dir_all(folder)?;
            files::create_dir_all(folder)?;
        }
        let mut lines = String::new();
        for i in 0..self.count {
            let window = self.folder.crop_window(i, self.resolution, Crop::Center);
            let (picture, condition) = self.folder.prepare(i, self.resolution, window)?;
            for (folder, image) in folders.iter().zip([&picture, &condition]) {
                save_png(&folder.join(file_name(i)), image, &[])?;
            }
            let row = [
                (&settings.image_column, format!("{kind}/{}", file_name(i))),
                (&settings.caption_column, self.folder.caption(i).to_string()),
                (&settings.conditioning_image_column, format!("{kind}_conditions/{}", file_name(i))),
            ];
            let row: Map<String, Value> =
                row.into_iter().map(|(column, text)| (column.clone(), text.into())).collect();
            lines += &format!("{}\n", Value::Object(row));
        }
        files::write_atomic(&table, lines.as_bytes())?;
        files::write_atomic(&done, self.hash.as_bytes())
    }

    fn planned(&self, name: &str, kind: &str) -> PlannedPairs {
        PlannedPairs {
            pictures: picture_places(name, kind, self.count),
            conditions: picture_places(name, &format!("{kind}_conditions"), self.count),
            shuffled: self.shuffled.clone(),
        }
    }
}

fn file_name(pair: usize) -> String {
    format!("{pair:05}.png")
}

/// Where the pictures of `count` pairs are in the comparison's folder.
pub fn picture_places(subject: &str, folder: &str, count: usize) -> Vec<String> {
    (0..count).map(|i| format!("subjects/{subject}/{folder}/{}", file_name(i))).collect()
}

/// The table of rendered pairs in a subject's folder.
pub fn table(subject: &Path, kind: &str) -> PathBuf {
    subject.join(format!("{kind}.jsonl"))
}

impl ControlSet {
    /// Renders the pairs that are drawn from into the comparison's folder.
    pub fn copy_into(&self, subject: &Path) -> Result<()> {
        files::create_dir_all(subject)?;
        self.test.render(subject, "test", &self.settings)?;
        match &self.validation {
            Some(pairs) => pairs.render(subject, "validation", &self.settings),
            None => {
                // Of an earlier plan: held-out losses would be measured on it.
                files::remove_file(&table(subject, "validation"))?;
                files::remove_dir_all(&subject.join("validation"))?;
                files::remove_dir_all(&subject.join("validation_conditions"))
            }
        }
    }

    /// Identity of the pairs of a set; empty where there are none.
    pub fn hash(&self, set: Set) -> &str {
        match set {
            Set::Test => &self.test.hash,
            Set::Validation => self.validation.as_ref().map_or("", |pairs| &pairs.hash),
        }
    }

    /// For each pair of a set the one whose condition it is drawn with too.
    pub fn shuffled(&self, set: Set) -> &[usize] {
        match set {
            Set::Test => &self.test.shuffled,
            Set::Validation => self.validation.as_ref().map_or(&[], |pairs| &pairs.shuffled),
        }
    }

    /// For readers of the plan.
    pub fn planned(&self, name: &str) -> PlannedControl {
        PlannedControl {
            condition: self.agreement.condition.to_string(),
            trained_pairs: self.trained_pairs,
            test: self.test.planned(name, "test"),
            validation: self.validation.as_ref().map(|v| v.planned(name, "validation")).unwrap_or_default(),
        }
    }
}
