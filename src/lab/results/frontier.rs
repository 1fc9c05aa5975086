//! The frontier in `plan.json` and `record.json`: every trained cell drawn along a grid of adapter scales and checkpoints.

use crate::lab::results::{Evaluation, ScoredWith};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is drawn of every trained cell, and what is asked of the curves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedFrontier {
    /// Adapter scales, ascending; 0 is the base model's own cell.
    pub scales: Vec<f64>,
    /// Optimiser steps, ascending.
    pub checkpoints: Vec<i64>,
    /// Drifts at which likeness is told.
    pub drifts: Vec<f64>,
    /// Likenesses at which drift is told.
    pub likeness: Vec<f64>,
    /// The area below a curve ends here, and a chosen point drifts no further.
    pub drift_limit: f64,
    /// For each cell's id what its points on each set are to be made with; those made with other things do not count.
    pub made_with: BTreeMap<String, ScoredWith>,
}

/// A cell at one place of the grid.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FrontierPoint {
    /// Of the adapter; 0 in the base model's record.
    pub scale: f64,
    /// What was drawn there.
    #[serde(flatten)]
    pub evaluation: Evaluation,
}

/// The points of a cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FrontierRecord {
    /// See [`PlannedFrontier::made_with`].
    pub made_with: ScoredWith,
    /// In the order of checkpoints, scales and sets.
    pub points: Vec<FrontierPoint>,
}
