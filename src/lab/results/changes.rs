//! What a training changed, in `record.json`: measured on the weights alone.

use serde::{Deserialize, Serialize};

/// Means over the layers whose weights were adapted; of full fine-tuning over those that an adapter is on by default.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct WeightChanges {
    /// How many layers.
    pub layers: usize,
    /// How far rows of a weight turned, in degrees.
    pub angle: f64,
    /// How far singular values moved, relative to all of the weight.
    pub singular_values: f64,
    /// Leading left singular vectors of all new weights that are like none of the old.
    pub intruders: usize,
    /// Leading left singular vectors that were looked at.
    pub leading: usize,
}
