//! `[[control]]` of a comparison's config: pairs of picture and condition in place of a subject.

use crate::data::image::edges::Thresholds;
use crate::data::pairs::{ConditionKind, PairSettings};
use crate::train::config::{DataSection, TrainConfig};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Pairs that control is taught with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlEntry {
    /// Its name, unique, usable as a folder.
    pub name: String,
    /// Pairs that are trained on.
    pub data_dir: PathBuf,
    /// Pairs for the tables.
    pub test_data_dir: PathBuf,
    /// Pairs to choose learning rates by.
    pub validation_data_dir: Option<PathBuf>,
    /// So many of the pairs for the tables, the first ones; all, where it is not set.
    pub num_test: Option<usize>,
    /// So many of the pairs to choose by.
    pub num_validation: Option<usize>,
    /// What the conditions are.
    #[serde(default)]
    pub condition: ConditionKind,
    /// Edges are made from the pictures even where the pairs name files.
    #[serde(default)]
    pub make_conditions: bool,
    /// Lower threshold of edges, those that are made and those that are compared.
    #[serde(default = "low")]
    pub canny_low: f64,
    /// Upper threshold.
    #[serde(default = "high")]
    pub canny_high: f64,
    /// Colours of the classes; the first one is the background.
    pub palette: Option<PathBuf>,
    /// Column of the pictures.
    #[serde(default = "image_column")]
    pub image_column: String,
    /// Column of the captions.
    #[serde(default = "caption_column")]
    pub caption_column: String,
    /// Column of the conditions.
    #[serde(default = "conditioning_image_column")]
    pub conditioning_image_column: String,
    /// Refuse pairs whose files lie outside the folder of their table.
    #[serde(default)]
    pub strict_paths: bool,
    /// What a reader must know of it.
    #[serde(default)]
    pub notes: Vec<String>,
}

fn low() -> f64 {
    Thresholds::default().low
}
fn high() -> f64 {
    Thresholds::default().high
}
fn image_column() -> String {
    PairSettings::default().image_column
}
fn caption_column() -> String {
    PairSettings::default().caption_column
}
fn conditioning_image_column() -> String {
    PairSettings::default().conditioning_image_column
}

impl ControlEntry {
    /// How its pairs are read. Paths as the user wrote them.
    pub fn settings(&self) -> PairSettings {
        self.applied_to(TrainConfig::default()).data.pair_settings()
    }

    /// The score that says whether pictures follow their conditions, where there is one.
    pub fn agreement_score(&self) -> Option<&'static str> {
        match self.condition {
            ConditionKind::Canny => Some("edge_f1"),
            ConditionKind::Segmentation => Some("subject_miou"),
            ConditionKind::Landmarks | ConditionKind::Other => None,
        }
    }

    /// The settings of a training on its pairs.
    pub fn applied_to(&self, train: TrainConfig) -> TrainConfig {
        let data = DataSection {
            train_data_dir: Some(self.data_dir.clone()),
            condition: self.condition,
            make_conditions: self.make_conditions,
            canny_low: self.canny_low,
            canny_high: self.canny_high,
            palette: self.palette.clone(),
            image_column: self.image_column.clone(),
            caption_column: self.caption_column.clone(),
            conditioning_image_column: self.conditioning_image_column.clone(),
            strict_paths: self.strict_paths,
            ..train.data
        };
        TrainConfig { data, ..train }
    }
}
