//! The raw records as tables: `report.csv`, a row for each scored picture, and `report-cells.csv`, a row for each cell, step
//! and set. Names, prompts and paths are cells that no spreadsheet runs.

use crate::error::{Error, Result};
use crate::lab::report::statistics::prompt_value;
use crate::lab::report::table::Analysis;
use crate::lab::report::values::ScoreColumn;
use crate::lab::results::{CellRecord, Evaluation, PlannedCell, PromptScores, Set};
use crate::platform::spreadsheet::text_cell;
use csv::Writer;
use std::borrow::Cow;
use std::path::Path;

/// `report.csv`. Scores that the pictures of a prompt have only together are repeated on each of them.
pub fn pictures(a: &Analysis, path: &Path) -> Result<Vec<u8>> {
    let head = [
        "cell",
        "method",
        "subject",
        "seed",
        "learning_rate",
        "step",
        "set",
        "kind",
        "prompt_number",
        "prompt",
        "picture_number",
        "picture_seed",
        "file",
    ];
    let mut writer = Writer::from_writer(Vec::new());
    let headings = head.into_iter().map(Cow::from).chain(a.columns.iter().map(|c| text_cell(&c.key)));
    writer.write_record(headings.map(Cow::into_owned)).map_err(|e| fail(path, &e))?;
    for record in a.records {
        for evaluation in &record.evaluations {
            let kind = if a.control { "pair" } else { "subject" };
            let kinds = [(kind, &evaluation.prompts), ("drift", &evaluation.drift)];
            for (kind, prompts) in kinds {
                for (number, prompt) in prompts.iter().enumerate() {
                    for row in prompt_rows(record, evaluation, kind, number, prompt, &a.columns) {
                        writer.write_record(&row).map_err(|e| fail(path, &e))?;
                    }
                }
            }
        }
    }
    for record in a.records.iter().filter(|record| !record.real_pictures.is_empty()) {
        let captions = record.evaluations.iter().find(|e| e.set == Set::Test).map(|e| &e.prompts);
        for (number, picture) in record.real_pictures.iter().enumerate() {
            let caption = captions.and_then(|all| Some(all.get(number)?.prompt.clone())).unwrap_or_default();
            let cell = &record.cell;
            let empty = String::new;
            let mut row =
                vec![shown(&cell.id), "real".into(), shown(&cell.subject), empty(), empty(), empty()];
            row.extend([Set::Test.name().into(), "real".into(), number.to_string(), shown(&caption)]);
            row.extend(["0".into(), empty(), shown(&picture.file)]);
            row.extend(a.columns.iter().map(|column| text(picture.scores.get(&column.key))));
            writer.write_record(&row).map_err(|e| fail(path, &e))?;
        }
    }
    writer.into_inner().map_err(|e| fail(path, &e))
}

fn prompt_rows(
    record: &CellRecord,
    evaluation: &Evaluation,
    kind: &str,
    number: usize,
    prompt: &PromptScores,
    columns: &[ScoreColumn],
) -> Vec<Vec<String>> {
    let pictures = prompt.pictures.iter().enumerate();
    pictures
        .map(|(index, picture)| {
            // A pair's second picture has another pair's condition.
            let kind = if kind == "pair" && index > 0 { "shuffled" } else { kind };
            let mut row = of_cell(&record.cell, evaluation);
            let file = format!("cells/{}/{}", record.cell.id, picture.file);
            row.extend([kind.into(), number.to_string(), shown(&prompt.prompt)]);
            row.extend([index.to_string(), picture.seed.to_string(), file]);
            row.extend(columns.iter().map(|column| {
                let value = picture.scores.get(&column.key).or_else(|| prompt.scores.get(&column.key));
                value.map(f64::to_string).unwrap_or_default()
            }));
            row
        })
        .collect()
}

/// `report-cells.csv`.
pub fn cells(a: &Analysis, path: &Path) -> Result<Vec<u8>> {
    let head = ["cell", "method", "subject", "seed", "learning_rate", "step", "set", "prompts", "pictures"];
    let budget = [
        "parameters",
        "bytes",
        "steps",
        "seconds",
        "seconds_per_step",
        "peak_memory",
        "peak_device_memory",
        "interrupted",
        "version",
        "device",
        "dtype",
        "threads",
        "jobs",
        "changed_layers",
        "row_angle",
        "singular_values_moved",
        "intruder_dimensions",
        "leading_vectors",
    ];
    let mut writer = Writer::from_writer(Vec::new());
    let keys = a.columns.iter().map(|c| text_cell(&c.key));
    let headings = head.into_iter().map(Cow::from).chain(keys).chain(budget.into_iter().map(Cow::from));
    writer.write_record(headings.map(Cow::into_owned)).map_err(|e| fail(path, &e))?;
    for record in a.records {
        for evaluation in &record.evaluations {
            let mut row = of_cell(&record.cell, evaluation);
            let pictures: usize = evaluation.prompts.iter().map(|p| p.pictures.len()).sum();
            row.extend([evaluation.prompts.len().to_string(), pictures.to_string()]);
            row.extend(a.columns.iter().map(|c| text(evaluation_value(evaluation, &c.key))));
            row.extend(of_budget(record));
            row.extend(of_changes(record, evaluation));
            writer.write_record(&row).map_err(|e| fail(path, &e))?;
        }
    }
    writer.into_inner().map_err(|e| fail(path, &e))
}

/// The evaluation's own mean, which is that over prompts.
fn evaluation_value(evaluation: &Evaluation, key: &str) -> Option<f64> {
    let prompts = || evaluation.prompts.iter().chain(&evaluation.drift).filter_map(|p| prompt_value(p, key));
    evaluation.scores.get(key).copied().or_else(|| super::statistics::mean(prompts()))
}

fn of_cell(cell: &PlannedCell, evaluation: &Evaluation) -> Vec<String> {
    vec![
        shown(&cell.id),
        shown(cell.method()),
        shown(&cell.subject),
        cell.seed().to_string(),
        text(cell.learning_rate()),
        evaluation.step.to_string(),
        evaluation.set.name().to_string(),
    ]
}

fn of_budget(record: &CellRecord) -> Vec<String> {
    let budget = record.budget.as_ref();
    let environment = &record.environment;
    vec![
        text(budget.map(|b| b.parameters)),
        text(budget.map(|b| b.bytes)),
        text(budget.map(|b| b.steps)),
        text(budget.and_then(|b| b.seconds)),
        text(budget.and_then(|b| b.seconds_per_step)),
        text(budget.and_then(|b| b.peak_memory)),
        text(budget.and_then(|b| b.peak_device_memory)),
        text(budget.map(|b| b.interrupted)),
        shown(&environment.version),
        shown(&environment.device),
        shown(&environment.dtype),
        environment.threads.to_string(),
        environment.jobs.to_string(),
    ]
}

/// What the training changed, beside the evaluations of its last step.
fn of_changes(record: &CellRecord, evaluation: &Evaluation) -> [String; 5] {
    let last = record.evaluations.iter().map(|e| e.step).max();
    let changes = record.changes.as_ref().filter(|_| Some(evaluation.step) == last);
    [
        text(changes.map(|c| c.layers)),
        text(changes.map(|c| c.angle)),
        text(changes.map(|c| c.singular_values)),
        text(changes.map(|c| c.intruders)),
        text(changes.map(|c| c.leading)),
    ]
}

/// A field of text, which a spreadsheet shows as it is.
fn shown(text: &str) -> String {
    text_cell(text).into_owned()
}

/// An empty field for what is not there.
fn text(value: Option<impl ToString>) -> String {
    value.map(|v| v.to_string()).unwrap_or_default()
}

fn fail(path: &Path, problem: &impl ToString) -> Error {
    Error::format(path, format!("cannot be written as CSV: {}", problem.to_string()))
}
