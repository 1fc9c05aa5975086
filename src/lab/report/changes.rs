//! What the trainings changed, measured on the weights alone: a row for each method.

use crate::lab::report::plain_table::plain_table;
use crate::lab::report::scroll::scroll;
use crate::lab::report::statistics::mean;
use crate::lab::report::table::{Analysis, RowKind, TableRow};
use crate::lab::report::values;
use crate::lab::report::words;
use crate::lab::results::{CellRecord, WeightChanges};
use maud::{Markup, html};
use serde::Serialize;

/// Heading of the table.
pub const TITLE: &str = "What the training changed";

/// How it is to be read, a sentence each.
pub const ABOUT: [&str; 2] = [
    "From the weights after the last step, means over adapted layers, then over trainings (of full fine-tuning, over the layers that adapters are \
     on): the mean angle between a row of the weight before and after; how far its singular values moved, relative \
     to all of them; and how many of its 10 leading left singular vectors have a cosine below 0.5 to each of the base model's \
     (intruder dimensions, arXiv:2410.21228), of all layers together.",
    "A method that only turns a layer's inputs turns rows as far as it likes and leaves singular values where they were, without intruders; \
     intruders are directions that the base model did not have, and went together with forgetting in that paper.",
];

/// Means over the trainings of a row of the table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChangedRow {
    /// The row's heading.
    pub label: String,
    /// Trainings that were measured.
    pub cells: usize,
    /// Degrees.
    pub angle: f64,
    /// Relative.
    pub singular_values: f64,
    /// Mean over trainings of their number.
    pub intruders: f64,
    /// Of the vectors that were looked at.
    pub intruder_share: f64,
}

impl ChangedRow {
    /// Of every row with a training that was measured.
    pub fn all(a: &Analysis) -> Vec<Self> {
        let rows = a.rows.iter().filter(|row| row.kind == RowKind::Method);
        let of_row =
            |row| Some((row, in_table(a, row).filter_map(|record| record.changes).collect::<Vec<_>>()));
        rows.filter_map(of_row).filter_map(|(row, found)| Self::new(&row.label, &found)).collect()
    }

    fn new(label: &str, found: &[WeightChanges]) -> Option<Self> {
        let of = |value: fn(&WeightChanges) -> f64| mean(found.iter().map(value));
        Some(Self {
            label: label.to_string(),
            cells: found.len(),
            angle: of(|c| c.angle)?,
            singular_values: of(|c| c.singular_values)?,
            intruders: of(|c| c.intruders as f64)?,
            intruder_share: of(|c| c.intruders as f64 / c.leading.max(1) as f64)?,
        })
    }
}

/// The row's trainings that its scores are of.
fn in_table<'a>(a: &'a Analysis, row: &'a TableRow) -> impl Iterator<Item = &'a CellRecord> {
    a.records_of(row).filter(|record| values::result(a.plan, record, a.set).is_some())
}

/// Headings, and a row for each method, in plain text; `None` where no training was measured.
pub fn rows(a: &Analysis) -> Option<(Vec<String>, Vec<Vec<String>>)> {
    let changed = ChangedRow::all(a);
    if changed.is_empty() {
        return None;
    }
    let headings = ["method", "angle of rows", "singular values moved", "intruder dimensions", "trainings"];
    let methods = a.rows.iter().filter(|row| row.kind == RowKind::Method);
    let cells = methods.map(|row| {
        let none = || vec![words::NONE.to_string(); headings.len() - 2];
        let found = changed.iter().find(|changed| changed.label == row.label);
        let values = found.map_or_else(none, |c| {
            vec![
                format!("{:.2}\u{b0}", c.angle),
                moved(c.singular_values),
                format!("{} ({:.1} %)", words::significant(c.intruders), 100.0 * c.intruder_share),
            ]
        });
        let count = found.map_or(0, |c| c.cells).to_string();
        [vec![row.label.clone()], values, vec![count]].concat()
    });
    Some((headings.map(String::from).to_vec(), cells.collect()))
}

/// Rounding is not told as a number.
fn moved(value: f64) -> String {
    if value < 5e-6 { "0".into() } else { format!("{value:.5}") }
}

/// On the page; nothing, where no training was measured.
pub fn section(a: &Analysis) -> Markup {
    let Some((headings, rows)) = rows(a) else { return html! {} };
    html! {
        section #changes {
            h2 { (TITLE) }
            (scroll(TITLE, &plain_table(&headings, &rows)))
            ul .findings { @for sentence in ABOUT { li { (sentence) } } }
        }
    }
}
