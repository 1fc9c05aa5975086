//! How the HRA authors' scripts choose the pictures that they score (`get_result.py` of DaShenZi721/HRA, generation/subject).
//!
//! For each training and prompt, each of four metrics is divided by its range over the epochs that were drawn from, the
//! four are summed, and the epoch with the largest sum gives the values. It is a choice of the best of N by the test
//! metrics themselves. The scripts divide by zero where a metric never changes; here such a metric does not count.

use crate::lab::report::statistics::prompt_value;
use crate::lab::results::{Evaluation, PromptScores};

/// The metrics of the sum; LPIPS counts as the others do, the larger the better.
const METRICS: [&str; 4] = ["dino", "clip_i", "clip_t", "lpips_vgg"];

/// What a reader of the report must know.
pub const NOTE: &str = "protocol paper: for every training and prompt the step is chosen by the sum of DINO, CLIP-I, CLIP-T and \
                        LPIPS, each divided by its range over the steps, on the test pictures. This is the best of N on the test \
                        metrics, as the authors' script computes it; such values are higher than those of a step fixed beforehand. Drift is \
                        that of the last step";

/// For each prompt the scores of the step that the script chooses, with that step. `steps` are ascending.
pub fn chosen<'a>(steps: &[&'a Evaluation]) -> Vec<(i64, &'a PromptScores)> {
    let prompts = steps.iter().map(|e| e.prompts.len()).max().unwrap_or(0);
    (0..prompts)
        .filter_map(|prompt| {
            let drawn: Vec<(i64, &PromptScores)> =
                steps.iter().filter_map(|e| Some((e.step, e.prompts.get(prompt)?))).collect();
            let scores: Vec<_> = drawn.iter().map(|(_, p)| METRICS.map(|key| prompt_value(p, key))).collect();
            drawn.get(largest(&scores)?).copied()
        })
        .collect()
}

/// The first step with the largest sum of scaled metrics; a metric that a step lacks is 0 there, as in the script.
fn largest(steps: &[[Option<f64>; 4]]) -> Option<usize> {
    let mut sums = vec![0.0; steps.len()];
    for metric in 0..METRICS.len() {
        let values: Vec<f64> = steps.iter().map(|step| step[metric].unwrap_or(0.0)).collect();
        let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        if most > least {
            for (sum, value) in sums.iter_mut().zip(&values) {
                *sum += value / (most - least);
            }
        }
    }
    let mut best: Option<usize> = None;
    for (step, sum) in sums.iter().enumerate() {
        if best.is_none_or(|b| *sum > sums[b]) {
            best = Some(step);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand. Ranges over three steps: 0.2, 0.1, 0.05, 0.4.
    /// Step 0: 0.5/0.2 + 0.80/0.1 + 0.25/0.05 + 0.6/0.4 = 2.5 + 8.0 + 5.0 + 1.5 = 17.0
    /// Step 1: 0.7/0.2 + 0.85/0.1 + 0.20/0.05 + 0.2/0.4 = 3.5 + 8.5 + 4.0 + 0.5 = 16.5
    /// Step 2: 0.6/0.2 + 0.90/0.1 + 0.22/0.05 + 0.3/0.4 = 3.0 + 9.0 + 4.4 + 0.75 = 17.15
    #[test]
    fn the_step_of_the_largest_sum_of_scaled_metrics() {
        let step = |v: [f64; 4]| v.map(Some);
        let (a, b) = (step([0.5, 0.80, 0.25, 0.6]), step([0.7, 0.85, 0.20, 0.2]));
        assert_eq!(largest(&[a, b, step([0.6, 0.90, 0.22, 0.3])]), Some(2));
        // Without the third step the ranges are 0.2, 0.05, 0.05, 0.4: 25.0 against 25.0 + 0.5 - 0.5.
        assert_eq!(largest(&[a, step([0.7, 0.85, 0.20, 0.6])]), Some(1));
        // LPIPS counts upwards: alone it decides.
        assert_eq!(largest(&[step([0.5, 0.8, 0.2, 0.1]), step([0.5, 0.8, 0.2, 0.3])]), Some(1));
        // Nothing changes: the first, as `list.index(max(list))` gives.
        assert_eq!(largest(&[a, a]), Some(0));
        assert_eq!(largest(&[]), None);
    }
}
