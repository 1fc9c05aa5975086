//! Which place of a run to draw with, a step and an adapter scale: chosen by validation alone.

use crate::lab::report::frontier::columns::{DRIFT, FIDELITY, LIKENESS};
use crate::lab::results::FrontierPoint;

/// The key of the likeness that every point has: DINO, else DINOv2, else CLIP-I.
pub fn likeness_key(points: &[FrontierPoint]) -> Option<&'static str> {
    LIKENESS.into_iter().find(|key| all_have(points, key))
}

/// The number of the point to draw with. Where drift has a limit, that with the most likeness; elsewhere that with the largest sum of
/// likeness and CLIP-T, or of that one of them which is measured. No point counts that drifts further than the limit (pixels); of
/// equal ones that with less drift, then the first.
///
/// `None` where neither is measured, or every point drifts further.
pub fn best_place(points: &[FrontierPoint], drift_limit: Option<f64>) -> Option<usize> {
    let likeness = likeness_key(points);
    let fidelity = Some(FIDELITY).filter(|key| all_have(points, key));
    let counted: Vec<&str> = match likeness {
        Some(likeness) if drift_limit.is_some() && all_have(points, DRIFT) => vec![likeness],
        _ => likeness.into_iter().chain(fidelity).collect(),
    };
    if counted.is_empty() {
        return None;
    }
    let score = |i: usize, key: &str| points[i].evaluation.scores.get(key).copied();
    let drift = |i: usize| score(i, DRIFT).unwrap_or(0.0);
    let rank = |i: usize| (counted.iter().filter_map(|key| score(i, key)).sum::<f64>(), -drift(i));
    let within = (0..points.len()).filter(|&i| drift_limit.is_none_or(|limit| drift(i) <= limit));
    within.reduce(|best, i| if rank(i) > rank(best) { i } else { best })
}

fn all_have(points: &[FrontierPoint], key: &str) -> bool {
    !points.is_empty() && points.iter().all(|point| point.evaluation.scores.contains_key(key))
}
