//! What a run wrote on its way.

use std::path::Path;

/// The records of a run without what depends on the clock.
pub fn records(run: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .map(|mut record| {
            record.as_object_mut().unwrap().remove("seconds");
            record
        })
        .collect()
}
