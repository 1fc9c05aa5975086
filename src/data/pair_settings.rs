//! How pairs of picture and condition are read.

use crate::data::image::Background;
use crate::data::image::edges::Thresholds;
use crate::platform::choice::{Choice, Named, named};
use std::fmt;
use std::path::PathBuf;

/// The columns as they are called where the user says nothing.
pub(super) const COLUMNS: [&str; 3] = ["file_name", "text", "conditioning_image"];

/// What the conditions of a data set are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConditionKind {
    /// Edges, white on black; made from the picture where no file is named
    Canny,
    /// A colour for each class; with a palette also maps of class numbers
    Segmentation,
    /// Points of a face, as a picture or as a file of points that are drawn
    Landmarks,
    /// Any other picture, shown as it is
    #[default]
    Other,
}

impl Choice for ConditionKind {
    const CHOICES: &'static [Named<Self>] = &[
        named(
            Self::Canny,
            "canny",
            &[],
            "Edges, white on black; made from the picture where no file is named",
        ),
        named(
            Self::Segmentation,
            "segmentation",
            &[],
            "A colour for each class; with a palette also maps of class numbers",
        ),
        named(
            Self::Landmarks,
            "landmarks",
            &[],
            "Points of a face, as a picture or as a file of points that are drawn",
        ),
        named(Self::Other, "other", &[], "Any other picture, shown as it is"),
    ];
}

impl fmt::Display for ConditionKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// How pairs are read.
#[derive(Debug, Clone, PartialEq)]
pub struct PairSettings {
    /// Column of the pictures.
    pub image_column: String,
    /// Column of the captions.
    pub caption_column: String,
    /// Column of the conditions.
    pub conditioning_image_column: String,
    /// What the conditions are.
    pub condition: ConditionKind,
    /// Whether conditions are made from the pictures even where the pairs name files.
    pub make_conditions: bool,
    /// Thresholds of edges that are made.
    pub thresholds: Thresholds,
    /// Colours of the classes, by which maps of class numbers become pictures.
    pub palette: Option<PathBuf>,
    /// Behind pictures with transparent parts.
    pub background: Background,
    /// Whether files outside the folder of the table are refused.
    pub strict_paths: bool,
}

impl Default for PairSettings {
    /// The columns of Hugging Face's scripts; conditions are pictures of any kind.
    fn default() -> Self {
        let [image_column, caption_column, conditioning_image_column] = COLUMNS.map(String::from);
        Self {
            image_column,
            caption_column,
            conditioning_image_column,
            condition: ConditionKind::default(),
            make_conditions: false,
            thresholds: Thresholds::default(),
            palette: None,
            background: Background::default(),
            strict_paths: false,
        }
    }
}
