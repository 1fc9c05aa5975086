//! `recommended.json` of a run folder: which checkpoint to draw with, and at which adapter scale.

use crate::error::Result;
use crate::lab::results::{self, FrontierPoint};
use crate::platform::files;
use crate::train::checkpoint;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// In the run folder.
const RECOMMENDED_FILE: &str = "recommended.json";

/// What to draw with.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recommended {
    /// Optimiser steps.
    pub step: i64,
    /// Adapter scale, 1 as trained.
    pub scale: f64,
    /// To the held-out pictures: DINO, else DINOv2, else CLIP-I.
    pub likeness: Option<f64>,
    /// From the base model's pictures, in pixels.
    pub drift: Option<f64>,
    /// The checkpoint, which stays what it is when the run goes on.
    pub adapter: PathBuf,
}

impl Recommended {
    /// A point of the run, with its scores; `likeness` is the key of the first of them.
    pub fn new(run: &Path, point: &FrontierPoint, likeness: Option<&str>) -> Self {
        let evaluation = &point.evaluation;
        let score = |key: &str| evaluation.scores.get(key).copied();
        Self {
            step: evaluation.step,
            scale: point.scale,
            likeness: likeness.and_then(score),
            drift: score("drift"),
            adapter: checkpoint::folder(run, evaluation.step),
        }
    }

    /// With a path relative to the run folder, which may be moved.
    pub fn within(&self, run: &Path) -> Self {
        let adapter = self.adapter.strip_prefix(run).unwrap_or(&self.adapter).to_path_buf();
        Self { adapter, ..self.clone() }
    }

    /// Writes the file, or removes it where nothing is recommended.
    pub fn write(run: &Path, recommended: Option<&Self>) -> Result<()> {
        let path = run.join(RECOMMENDED_FILE);
        recommended.map_or_else(|| files::remove_file(&path), |place| results::write_json(&path, place))
    }
}
