//! `[frontier]` of a comparison: along which grid of adapter scales and checkpoints every trained cell is drawn, without any
//! training of its own.

use serde::{Deserialize, Serialize};

/// Adapter scales from the one end to the other of what anybody draws with.
pub(super) const SCALES: std::ops::RangeInclusive<f64> = -4.0..=4.0;

/// The table of the config file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrontierEntry {
    /// Adapter scales: 0 is the base model, 1 as trained; between them methods that are orthogonal move along the geodesic.
    #[serde(default = "usual_scales")]
    pub scales: Vec<f64>,
    /// Steps of the scored ones; all of them, where it is empty.
    #[serde(default)]
    pub checkpoints: Vec<i64>,
    /// Drifts (of 8-bit pixels) at which likeness is compared.
    #[serde(default = "usual_drifts")]
    pub drifts: Vec<f64>,
    /// Likenesses at which drift is compared; quarters of what all methods reach, where it is empty.
    #[serde(default)]
    pub likeness: Vec<f64>,
    /// The area below the curves ends here, and the point that is chosen on validation drifts no further.
    #[serde(default = "usual_limit")]
    pub drift_limit: f64,
}

fn usual_scales() -> Vec<f64> {
    vec![0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
}
fn usual_drifts() -> Vec<f64> {
    vec![5.0, 10.0, 15.0, 20.0]
}
fn usual_limit() -> f64 {
    20.0
}

impl FrontierEntry {
    /// The scales, ascending, 0 among them.
    pub fn ascending(&self) -> Vec<f64> {
        let mut scales: Vec<f64> = self.scales.iter().map(|scale| scale + 0.0).collect();
        if !scales.contains(&0.0) {
            scales.push(0.0);
        }
        scales.sort_by(f64::total_cmp);
        scales
    }

    /// The checkpoints, ascending, of the steps that are scored.
    pub fn steps(&self, scored: &[i64]) -> Vec<i64> {
        let wanted = |step: &i64| self.checkpoints.is_empty() || self.checkpoints.contains(step);
        scored.iter().copied().filter(wanted).collect()
    }

    /// Steps and scales of a trained cell: all but those of the base model.
    pub fn points(&self, scored: &[i64]) -> Vec<(i64, f64)> {
        let scales = self.ascending();
        let of_step = |step| scales.iter().filter(|scale| **scale != 0.0).map(move |scale| (step, *scale));
        self.steps(scored).into_iter().flat_map(of_step).collect()
    }
}
