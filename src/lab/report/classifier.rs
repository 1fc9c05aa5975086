//! Which classes the model itself still tells apart: `classifier.csv`, from which everything can be worked out anew, and the rows of
//! the report's table.

use crate::error::{Error, Result};
use crate::lab::report::frontier::columns::DRIFT;
use crate::lab::report::frontier::{self, Place};
use crate::lab::report::plain_table::plain_table;
use crate::lab::report::scroll::scroll;
use crate::lab::report::statistics::mean;
use crate::lab::report::table::{Analysis, RowKind, TableRow};
use crate::lab::report::values;
use crate::lab::report::words;
use crate::lab::results::{BASE, CellRecord, ClassifierPoint, PlannedClassifier, Set};
use crate::platform::spreadsheet::text_cell;
use maud::{Markup, html};
use serde::Serialize;
use std::path::Path;

/// Heading of the table.
pub const TITLE: &str = "Classes still told apart";

/// The rows of the table, the base model's first.
#[derive(Debug, Clone, Serialize)]
pub struct Classified {
    /// Pictures of each row.
    pub pictures: usize,
    /// How many of them the base model tells right.
    pub base_right: usize,
    /// Rows that have answers.
    pub rows: Vec<ClassifiedRow>,
}

/// A row of the table.
#[derive(Debug, Clone, Serialize)]
pub struct ClassifiedRow {
    /// The row's heading.
    pub label: String,
    /// Trainings that the plan has for it; 1 of the base model, which answers once.
    pub planned: usize,
    /// Means over its cells at each scale that one of them has answers at.
    pub scales: Vec<ClassifiedMean>,
}

/// Means over cells at an adapter scale.
#[derive(Debug, Clone, Serialize)]
pub struct ClassifiedMean {
    /// Of the adapter; 0 of the base model.
    pub scale: f64,
    /// Cells that have answers.
    pub cells: usize,
    /// Share of the pictures that is told right.
    pub accuracy: f64,
    /// How many of those that the base model tells right.
    pub still_right: f64,
    /// From the base model's pictures at this scale, where it was measured.
    pub drift: Option<f64>,
}

impl Classified {
    /// Of the rows of the table; `None` without a planned classifier, or before the base model's answers are there.
    pub fn new(a: &Analysis) -> Option<Self> {
        let planned = a.plan.classifier.as_ref()?;
        let base = a.records.iter().filter(|r| r.cell.is_base()).find_map(|r| answers(planned, r, 0.0))?;
        let base = base.right(&planned.pictures);
        let rows = a.rows.iter().filter(|row| row.kind != RowKind::Real);
        let rows = rows.map(|row| ClassifiedRow {
            label: row.label.clone(),
            planned: if row.kind == RowKind::Base { 1 } else { row.planned },
            scales: planned
                .scales
                .iter()
                .filter_map(|scale| at_scale(a, planned, row, *scale, &base))
                .collect(),
        });
        Some(Self {
            pictures: planned.pictures.len(),
            base_right: base.iter().filter(|right| **right).count(),
            rows: rows.filter(|row| !row.scales.is_empty()).collect(),
        })
    }

    /// Heading of each column, and the cells of each row, both in plain text.
    pub fn table(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let mut scales: Vec<f64> =
            self.rows.iter().flat_map(|row| &row.scales).map(|at| at.scale).filter(|s| *s != 0.0).collect();
        scales.sort_by(f64::total_cmp);
        scales.dedup();
        let mut headings = vec!["method".to_string()];
        for scale in &scales {
            let of = ["told right", "of the base's", "drift"];
            headings.extend(of.map(|what| format!("{what} at scale {scale}")));
        }
        headings.push("trainings".into());
        let cells = |row: &ClassifiedRow| {
            let mut cells = vec![row.label.clone()];
            for scale in &scales {
                // The base model is the same at every scale.
                let here = row.scales.iter().find(|at| at.scale == *scale || at.scale == 0.0);
                let none = || words::NONE.to_string();
                cells.push(here.map_or_else(none, |at| format!("{:.3}", at.accuracy)));
                cells.push(
                    here.map_or_else(none, |at| format!("{:.1} of {}", at.still_right, self.base_right)),
                );
                cells.push(here.and_then(|at| at.drift).map_or_else(none, |drift| format!("{drift:.2}")));
            }
            let answered = row.scales.iter().map(|at| at.cells).min().unwrap_or_default();
            cells.push(format!("{answered} of {}", row.planned));
            cells
        };
        (headings, self.rows.iter().map(cells).collect())
    }

    /// How the table is to be read, a sentence each.
    pub fn about(&self, a: &Analysis) -> Vec<String> {
        let Some(planned) = &a.plan.classifier else { return Vec::new() };
        let classes = planned.prompts.len();
        vec![
            format!(
                "The model itself as a classifier (arXiv:2303.16203), which measures what it forgot of things that nobody taught it \
                 (arXiv:2410.14159): to each of {} pictures of {classes} classes that were not trained the same noise is added at {} \
                 timesteps, and the class whose prompt predicts it with the least error wins; by chance that is the right one for {:.3} \
                 of them.",
                self.pictures,
                planned.num_noises,
                1.0 / classes as f64
            ),
            format!(
                "\"Of the base's\" counts those that the base model tells right ({} of {}) and that still are; drift is of pixels, at \
                 the same step and scale, where it was drawn. All are means over cells.",
                self.base_right, self.pictures
            ),
        ]
    }
}

fn at_scale(
    a: &Analysis,
    planned: &PlannedClassifier,
    row: &TableRow,
    scale: f64,
    base: &[bool],
) -> Option<ClassifiedMean> {
    let own = a.records_of(row).filter_map(|record| Some((record, answers(planned, record, scale)?)));
    let own: Vec<(&CellRecord, &ClassifierPoint)> = own.collect();
    let right: Vec<Vec<bool>> = own.iter().map(|(_, point)| point.right(&planned.pictures)).collect();
    let still = |right: &Vec<bool>| right.iter().zip(base).filter(|(now, before)| **now && **before).count();
    Some(ClassifiedMean {
        scale,
        cells: own.len(),
        accuracy: mean(own.iter().filter_map(|(_, point)| point.accuracy))?,
        still_right: mean(right.iter().map(|right| still(right) as f64))?,
        drift: mean(own.iter().filter_map(|(record, point)| drift(a, record, point))),
    })
}

/// The answers of a cell at a scale, of the plan's question.
fn answers<'r>(
    planned: &PlannedClassifier,
    record: &'r CellRecord,
    scale: f64,
) -> Option<&'r ClassifierPoint> {
    let own = record.classifier.as_ref().filter(|own| own.made_with == planned.made_with)?;
    own.at(scale).filter(|point| point.accuracy.is_some())
}

/// The drift of the pictures that a cell drew at the same place.
fn drift(a: &Analysis, record: &CellRecord, point: &ClassifierPoint) -> Option<f64> {
    match point.scale {
        0.0 => Some(0.0),
        1.0 => values::result(a.plan, record, Set::Test)?.scores.get(DRIFT).copied(),
        _ => {
            let place = Place { step: point.step, scale: point.scale };
            let found = frontier::evaluation(a.plan, a.records, record, place, Set::Test)?;
            found.scores.get(DRIFT).copied()
        }
    }
}

/// `classifier.csv`: a row for each cell, scale, picture and class. The base model is nobody's: its rows have no subject.
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
        "picture",
        "caption",
        "class",
        "error",
    ];
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(head).map_err(|e| fail(&e))?;
    let Some(planned) = &a.plan.classifier else { return writer.into_inner().map_err(|e| fail(&e)) };
    for (record, scale) in a.records.iter().flat_map(|r| planned.scales.iter().map(move |scale| (r, *scale)))
    {
        let Some(point) = answers(planned, record, scale) else { continue };
        let cell = &record.cell;
        let subject = if cell.method() == BASE { "" } else { &cell.subject };
        for (picture, errors) in planned.pictures.iter().zip(&point.errors) {
            let caption = planned.prompts.get(picture.class).map(String::as_str).unwrap_or_default();
            for (prompt, error) in planned.prompts.iter().zip(errors) {
                let row = [
                    text_cell(cell.method()).into_owned(),
                    cell.learning_rate().map(|rate| rate.to_string()).unwrap_or_default(),
                    text_cell(subject).into_owned(),
                    cell.seed().to_string(),
                    point.step.to_string(),
                    scale.to_string(),
                    text_cell(&picture.file).into_owned(),
                    text_cell(caption).into_owned(),
                    text_cell(prompt).into_owned(),
                    error.to_string(),
                ];
                writer.write_record(row).map_err(|e| fail(&e))?;
            }
        }
    }
    writer.into_inner().map_err(|e| fail(&e))
}

/// The table on the page; nothing, where nobody was asked.
pub fn section(a: &Analysis, classified: Option<&Classified>) -> Markup {
    let Some(classified) = classified else { return html! {} };
    let (headings, rows) = classified.table();
    html! {
        section #classifier {
            h2 { (TITLE) }
            (scroll(TITLE, &plain_table(&headings, &rows)))
            ul .findings { @for sentence in classified.about(a) { li { (sentence) } } }
        }
    }
}
