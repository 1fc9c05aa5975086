//! What is wrong with `[frontier]` in a comparison.

use crate::lab::compare::config::{CompareConfig, Protocol};
use crate::lab::compare::frontier::{FrontierEntry, SCALES};
use std::collections::BTreeSet;

/// What is wrong with it in this comparison.
pub fn problems(entry: &FrontierEntry, config: &CompareConfig) -> Vec<String> {
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
        config.search.as_ref().is_none_or(|search| !search.only || search.drift.is_some()),
        "a [search] with only = true and no drift of its own trains nothing for it",
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
        !entry.scales.is_empty() && entry.scales.iter().all(|s| SCALES.contains(s)) && once(&entry.scales),
        "scales: expected different numbers from -4 to 4",
    );
    check(
        entry.ascending().iter().any(|scale| *scale != 0.0),
        "scales: expected one or more beside 0, which is the base model",
    );
    let scored = config.steps().unwrap_or_default();
    let known = entry.checkpoints.iter().all(|step| scored.contains(step));
    check(
        known && entry.checkpoints.iter().collect::<BTreeSet<_>>().len() == entry.checkpoints.len(),
        &format!(
            "checkpoints: expected different steps of those that are scored ({scored:?}; score_steps says which), \
             found {:?}",
            entry.checkpoints
        ),
    );
    let positive = |values: &[f64]| values.iter().all(|v| v.is_finite() && *v > 0.0) && once(values);
    check(!entry.drifts.is_empty() && positive(&entry.drifts), "drifts: expected different positive numbers");
    check(
        entry.likeness.iter().all(|v| (-1.0..=1.0).contains(v)) && once(&entry.likeness),
        "likeness: expected different numbers from -1 to 1",
    );
    check(positive(&[entry.drift_limit]), "drift_limit: expected a positive number");
    problems
}
