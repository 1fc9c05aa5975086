//! The report of a comparison, made from its files alone: `report.html`, `report.csv`, `report-cells.csv`, `report.json`
//! and `report.md` in the comparison's folder; `frontier.csv` too, where cells were drawn along a grid, and `classifier.csv`, where the
//! model itself was asked.
//!
//! `values` picks what counts from the records (`paper`: as the HRA authors' script picks), `statistics` and `search` work
//! on numbers, `table` holds the rows, `frontier` the curves at matched drift, `classifier` what the model itself tells apart, `changes`
//! what weights say. `markdown`, `tables` and `page` with `pictures`, `plots` and `chart` show them.
//! The same records give the same bytes. No tensors here, and no clock.

pub mod changes;
mod chart;
pub mod classifier;
pub mod frontier;
mod markdown;
mod names;
mod page;
pub mod paper;
mod pictures;
mod plain_table;
mod plots;
mod recommend;
mod run_plot;
mod scroll;
pub mod search;
pub mod statistics;
pub mod table;
mod tables;
mod values;
mod words;

pub use recommend::{best_place, likeness_key};
pub use run_plot::{MarkedPlace, run_plot};
pub use search::{BestRate, best_rates};

use crate::error::{Error, Result};
pub use names::{
    CELLS_FILE, CLASSIFIER_FILE, FRONTIER_FILE, JSON_FILE, MARKDOWN_FILE, PAGE_FILE, PICTURES_FILE,
};

use crate::lab::results::{self, CellRecord, Plan, RECORD_FILE};
use crate::platform::files;
use changes::ChangedRow;
use classifier::Classified;
use frontier::Frontier;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use table::{Analysis, TableRow};

/// What the command line says after the report is written.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// The page.
    pub page: PathBuf,
    /// The table in columns, findings, what is missing, chosen rates; ends in a line break.
    pub text: String,
    /// Cells with a record.
    pub there: usize,
    /// Cells of the plan.
    pub planned: usize,
    /// Ids of cells without a record.
    pub missing: Vec<String>,
    /// What validation says of learning rates.
    pub rates: Vec<BestRate>,
}

/// `report.json`.
#[derive(Serialize)]
struct ReportJson<'a> {
    format: u32,
    set: &'static str,
    notes: &'a [String],
    reference: Option<&'a str>,
    resamples: usize,
    resampled: &'a str,
    rows: &'a [TableRow],
    findings: Vec<String>,
    rates: &'a [BestRate],
    missing: Vec<&'a str>,
    unscored: Vec<&'a str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    chosen_steps: &'a BTreeMap<&'a str, Vec<i64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    frontier: Option<&'a Frontier>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    changes: Vec<ChangedRow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    classifier: Option<&'a Classified>,
    plan: &'a Plan,
    records: &'a [CellRecord],
}

/// Writes the report of the comparison in a folder from its plan and the records that are there. Errors: no plan, a file
/// that cannot be read, a record of another plan, a folder that cannot be written.
pub fn write(comparison: &Path) -> Result<Summary> {
    let plan = Plan::read(comparison)?;
    let records = plan.records(comparison)?;
    for record in &records {
        if !plan.cells.contains(&record.cell) {
            let path = results::cell_folder(comparison, &record.cell.id).join(RECORD_FILE);
            return Err(Error::format(
                &path,
                "expected the record of a cell of the plan, found that of another",
            )
            .with_hint("the plan was changed after this cell ran; remove the cell's folder"));
        }
    }
    let analysis = Analysis::new(&plan, &records);
    let frontier = Frontier::new(&analysis);
    let classified = Classified::new(&analysis);
    let file = |name: &str| comparison.join(name);
    let pictures = tables::pictures(&analysis, &file(PICTURES_FILE))?;
    files::write_atomic(&file(PICTURES_FILE), &pictures)?;
    let cells = tables::cells(&analysis, &file(CELLS_FILE))?;
    files::write_atomic(&file(CELLS_FILE), &cells)?;
    if plan.frontier.is_some() {
        files::write_atomic(&file(FRONTIER_FILE), &frontier::tables::csv(&analysis, &file(FRONTIER_FILE))?)?;
    }
    if plan.classifier.is_some() {
        files::write_atomic(&file(CLASSIFIER_FILE), &classifier::csv(&analysis, &file(CLASSIFIER_FILE))?)?;
    }
    let ids = |cells: &[&'_ results::PlannedCell]| cells.iter().map(|c| c.id.clone()).collect::<Vec<_>>();
    results::write_json(
        &file(JSON_FILE),
        &ReportJson {
            format: results::FORMAT,
            set: analysis.set.name(),
            notes: &analysis.notes,
            reference: analysis.reference.as_deref(),
            resamples: statistics::RESAMPLES,
            resampled: analysis.resampled,
            rows: &analysis.rows,
            findings: analysis.findings(),
            rates: &analysis.rates,
            missing: analysis.missing.iter().map(|c| c.id.as_str()).collect(),
            unscored: analysis.unscored.iter().map(|c| c.id.as_str()).collect(),
            chosen_steps: &analysis.chosen_steps,
            frontier: frontier.as_ref(),
            changes: ChangedRow::all(&analysis),
            classifier: classified.as_ref(),
            plan: &plan,
            records: &records,
        },
    )?;
    files::write_atomic(
        &file(MARKDOWN_FILE),
        markdown::markdown(&analysis, frontier.as_ref(), classified.as_ref()).as_bytes(),
    )?;
    files::write_atomic(
        &file(PAGE_FILE),
        page::page(&analysis, frontier.as_ref(), classified.as_ref()).as_bytes(),
    )?;
    Ok(Summary {
        page: file(PAGE_FILE),
        text: markdown::terminal(&analysis),
        there: records.len(),
        planned: plan.cells.len(),
        missing: ids(&analysis.missing),
        rates: analysis.rates.clone(),
    })
}
