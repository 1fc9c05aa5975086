//! The scores that curves are of.

use crate::lab::report::values::ScoreColumn;

/// Scores that say how much a picture is like the subject, the first that there is.
pub const LIKENESS: [&str; 3] = ["dino", "dinov2", "clip_i"];
/// How far a picture went from the base model's: pixels, which need no tower.
pub const DRIFT: &str = "drift";
/// How much a picture is like its prompt.
pub const FIDELITY: &str = "clip_t";
/// The column of likeness, if there is one.
pub fn likeness(columns: &[ScoreColumn]) -> Option<&ScoreColumn> {
    LIKENESS.iter().find_map(|key| columns.iter().find(|column| column.key == *key))
}

/// The column of a key of the frontier's other scores.
pub fn drift_and_fidelity(columns: &[ScoreColumn]) -> [Option<&ScoreColumn>; 2] {
    [DRIFT, FIDELITY].map(|key| columns.iter().find(|column| column.key == key))
}
