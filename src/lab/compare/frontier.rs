//! `[frontier]` of a comparison: along which grid of adapter scales and checkpoints every trained cell is drawn, without any
//! training of its own.

use crate::lab::compare::config::{CompareConfig, Protocol};
use crate::lab::compare::task::TaskSet;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Scales from the one end to the other of what anybody draws with.
const SCALES: std::ops::RangeInclusive<f64> = -4.0..=4.0;

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

/// What one cell draws beside its scored steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskFrontier {
    /// Steps and scales, in the order in which they are drawn.
    pub points: Vec<(i64, f64)>,
    /// What is drawn at each.
    pub sets: Vec<TaskSet>,
    /// What the points are to be made with.
    pub made_with: String,
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

    /// What is wrong with it in this comparison.
    pub fn problems(&self, config: &CompareConfig) -> Vec<String> {
        let mut problems = Vec::new();
        let mut check = |good: bool, problem: &str| {
            if !good {
                problems.push(format!("frontier: {problem}"));
            }
        };
        let once = |values: &[f64]| {
            values.iter().map(|v| (v + 0.0).to_bits()).collect::<BTreeSet<_>>().len() == values.len()
        };
        check(!config.topic.is_control(), "is for subjects: with [[control]] there is no drift to match");
        check(
            config.protocol != Protocol::Paper,
            "is for protocol = \"default\": the paper's scores are each the best of all steps",
        );
        check(
            config.search.as_ref().is_none_or(|search| !search.only),
            "a [search] with only = true trains nothing for it",
        );
        check(
            !config.draw.drift_prompts.is_empty(),
            "expected drift_prompts in [draw], from which drift is measured",
        );
        let towers = [&config.scores.clip, &config.scores.dino, &config.scores.dinov2];
        check(
            towers.iter().any(|tower| tower.is_some()),
            "expected clip, dino or dinov2 in [scores], by which likeness is measured",
        );
        check(
            !self.scales.is_empty() && self.scales.iter().all(|s| SCALES.contains(s)) && once(&self.scales),
            "scales: expected different numbers from -4 to 4",
        );
        check(
            self.ascending().iter().any(|scale| *scale != 0.0),
            "scales: expected one or more beside 0, which is the base model",
        );
        let scored = config.steps().unwrap_or_default();
        let known = self.checkpoints.iter().all(|step| scored.contains(step));
        check(
            known && self.checkpoints.iter().collect::<BTreeSet<_>>().len() == self.checkpoints.len(),
            &format!(
                "checkpoints: expected different steps of those that are scored ({scored:?}; score_steps says which), \
                 found {:?}",
                self.checkpoints
            ),
        );
        let positive = |values: &[f64]| values.iter().all(|v| v.is_finite() && *v > 0.0) && once(values);
        check(
            !self.drifts.is_empty() && positive(&self.drifts),
            "drifts: expected different positive numbers",
        );
        check(
            self.likeness.iter().all(|v| (-1.0..=1.0).contains(v)) && once(&self.likeness),
            "likeness: expected different numbers from -1 to 1",
        );
        check(positive(&[self.drift_limit]), "drift_limit: expected a positive number");
        problems
    }
}
