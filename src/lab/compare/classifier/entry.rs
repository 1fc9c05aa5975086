//! `[classifier]` of a comparison's config: which classes the model itself is asked to tell apart, before and after training.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The table of the config file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassifierEntry {
    /// Pictures with captions: a folder with a table, or a table.
    pub data_dir: PathBuf,
    /// The classes. Pictures whose caption is one of them are classified.
    pub prompts: Vec<String>,
    /// So many pictures of each class, the first ones; all, where it is not set.
    pub num_pictures: Option<usize>,
    /// Pairs of timestep and noise for each picture and class.
    #[serde(default = "usual_noises")]
    pub num_noises: usize,
    /// Adapter scales after the last step. 0, the base model, is always measured.
    #[serde(default = "as_trained")]
    pub scales: Vec<f64>,
    /// Refuse pictures that lie outside the folder of their table.
    #[serde(default)]
    pub strict_paths: bool,
}

fn usual_noises() -> usize {
    8
}
fn as_trained() -> Vec<f64> {
    vec![1.0]
}

impl ClassifierEntry {
    /// The scales, ascending, without that of the base model.
    pub fn trained_scales(&self) -> Vec<f64> {
        let mut scales: Vec<f64> = self.scales.iter().copied().filter(|scale| *scale != 0.0).collect();
        scales.sort_by(f64::total_cmp);
        scales
    }

    /// The scales, ascending, 0 among them.
    pub fn ascending(&self) -> Vec<f64> {
        let mut scales = self.trained_scales();
        scales.push(0.0);
        scales.sort_by(f64::total_cmp);
        scales
    }
}
