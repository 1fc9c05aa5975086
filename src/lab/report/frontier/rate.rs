//! A learning rate judged by the curve of its trainings: the likeness on validation that is had with the drift that is asked for.

use crate::lab::report::frontier::cells::{CellPlaces, common_places};
use crate::lab::report::frontier::columns::{DRIFT, FIDELITY, likeness};
use crate::lab::report::frontier::sample::PlaceSample;
use crate::lab::report::values::ScoreColumn;
use crate::lab::results::{CellRecord, Plan, Set};

/// The likeness that these trainings, all with one rate, have within a drift, and the largest drift that they have; `None` where none
/// has a curve.
pub fn likeness_within(
    plan: &Plan,
    all: &[CellRecord],
    columns: &[ScoreColumn],
    trained: &[&CellRecord],
    drift: f64,
) -> Option<(f64, f64)> {
    let places = common_places(plan, all, trained, Set::Validation);
    let keys = [likeness(columns)?.key.as_str(), FIDELITY, DRIFT];
    let at = (Set::Validation, places.as_slice());
    let cells: Vec<CellPlaces> =
        trained.iter().filter_map(|record| CellPlaces::new(plan, all, record, at, keys)).collect();
    let cells: Vec<&CellPlaces> = cells.iter().collect();
    if cells.is_empty() {
        return None;
    }
    // Which units are drawn again has no say in the means.
    let envelope = PlaceSample::new(&cells, true).envelope(None)?;
    Some((envelope.likeness_within(drift)?, envelope.reach()))
}
