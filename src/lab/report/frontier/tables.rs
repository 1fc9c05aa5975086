//! The curves as tables: `frontier.csv`, from which everything can be worked out anew, and headings and cells of the report's
//! table.

use crate::error::{Error, Result};
use crate::lab::report::frontier::columns::{drift_and_fidelity, likeness};
use crate::lab::report::frontier::{Curve, Frontier, Matched, evaluation, places};
use crate::lab::report::table::Analysis;
use crate::lab::report::words;
use crate::lab::results::{PromptScores, Set};
use crate::platform::spreadsheet::text_cell;
use std::path::Path;

/// `frontier.csv`: for each cell of the tables the mean of every score at every place of the grid, a row for each prompt. Rows of
/// the base model have scale 0 and stand for all cells of their subject.
pub fn csv(a: &Analysis, path: &Path) -> Result<Vec<u8>> {
    let fail =
        |problem: &dyn std::fmt::Display| Error::format(path, format!("cannot be written as CSV: {problem}"));
    let head = [
        "method",
        "learning_rate",
        "subject",
        "seed",
        "step",
        "scale",
        "set",
        "kind",
        "prompt_number",
        "score",
        "value",
    ];
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(head).map_err(|e| fail(&e))?;
    for record in a.records {
        let cell = &record.cell;
        let own = places(a.plan).into_iter().filter(|place| (place.scale == 0.0) == cell.is_base());
        for (place, set) in own.flat_map(|place| [Set::Validation, Set::Test].map(|set| (place, set))) {
            let Some(found) = evaluation(a.plan, a.records, record, place, set) else { continue };
            for (kind, prompts) in [("prompt", &found.prompts), ("unrelated", &found.drift)] {
                for (number, scores) in prompts.iter().enumerate() {
                    for (key, value) in PromptScores::means(scores) {
                        let rate = cell.learning_rate().map(|rate| rate.to_string());
                        let row = [
                            text_cell(cell.method()).into_owned(),
                            rate.unwrap_or_default(),
                            text_cell(&cell.subject).into_owned(),
                            cell.seed().to_string(),
                            place.step.to_string(),
                            place.scale.to_string(),
                            set.name().to_string(),
                            kind.to_string(),
                            number.to_string(),
                            key,
                            value.to_string(),
                        ];
                        writer.write_record(row).map_err(|e| fail(&e))?;
                    }
                }
            }
        }
    }
    writer.into_inner().map_err(|e| fail(&e))
}

/// Heading of each column, and the cells of each curve, both in plain text.
pub fn rows(a: &Analysis, frontier: &Frontier) -> Option<(Vec<String>, Vec<Vec<String>>)> {
    let likeness = likeness(&a.columns)?;
    let [drift, fidelity] = drift_and_fidelity(&a.columns);
    let (title, digits, drift) = (&likeness.title, likeness.digits, drift?);
    let mut headings = vec!["method".to_string()];
    headings.extend(frontier.drifts.iter().map(|at| format!("{title} at {} {at}", drift.title)));
    if let Some(fidelity) = fidelity {
        headings.extend(
            frontier.drifts.iter().map(|at| format!("{} there, {} {at}", fidelity.title, drift.title)),
        );
    }
    headings.extend(frontier.levels.iter().map(|at| format!("{} at {title} {at:.digits$}", drift.title)));
    headings.push(format!("mean {title} to {} {}", drift.title, frontier.drift_limit));
    headings.push("chosen on validation".into());
    let cells = |curve: &Curve| {
        let matched = |value: &Option<Matched>, digits: usize| {
            value.map_or_else(|| words::NONE.to_string(), |value| words::matched(&value, digits))
        };
        let mut cells = vec![curve.label.clone()];
        cells.extend(curve.at_drift.iter().map(|value| matched(value, digits)));
        if let Some(fidelity) = fidelity {
            let number = |value: &Option<f64>| {
                value.map_or_else(|| words::NONE.to_string(), |value| format!("{value:.*}", fidelity.digits))
            };
            cells.extend(curve.fidelity.iter().map(number));
        }
        cells.extend(curve.at_likeness.iter().map(|value| matched(value, drift.digits)));
        cells.push(matched(&curve.area, digits));
        cells.push(curve.chosen.map_or_else(
            || words::NONE.into(),
            |point| {
                format!(
                    "step {}, scale {}: {title} {:.digits$}, {} {:.*}",
                    point.place.step,
                    point.place.scale,
                    point.likeness,
                    drift.title,
                    drift.digits,
                    point.drift
                )
            },
        ));
        cells
    };
    Some((headings, frontier.curves.iter().map(cells).collect()))
}
