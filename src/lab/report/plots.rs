//! Which charts a comparison has; those that the records cannot fill are left out.

use crate::lab::report::chart::{Axis, Chart, Line, Mark, Series};
use crate::lab::report::statistics::mean;
use crate::lab::report::table::{Analysis, RowKind, TableRow};
use crate::lab::report::values::ScoreColumn;
use crate::lab::report::words;
use crate::lab::results::{CellRecord, Set};
use std::collections::BTreeMap;

/// Scores that say how much a picture is like its condition or the subject, the first that there is.
pub const SIMILARITY: [&str; 6] = ["edge_f1", "subject_miou", "dino", "dinov2", "clip_i", "clip_t"];
/// Scores that say how much was forgotten, the first that there is.
pub const DRIFT: [&str; 2] = ["drift_clip", "drift"];
/// A curve has at most this many points.
const CURVE_POINTS: usize = 150;

/// A chart with what it shows.
pub struct Figure {
    /// One or two sentences.
    pub caption: String,
    /// The drawing.
    pub chart: Chart,
}

/// Every chart that the records can fill.
pub fn figures(a: &Analysis) -> Vec<Figure> {
    let similarity = first(&a.columns, &SIMILARITY);
    let drift = first(&a.columns, &DRIFT);
    let mut figures: Vec<Figure> = Vec::new();
    if let Some(score) = similarity {
        figures.push(against_parameters(a, score));
        figures.extend(drift.map(|drift| against_drift(a, score, drift)));
    }
    figures.push(loss_curves(a, "Training loss", "training loss", |p| Some(p.loss)));
    figures.push(loss_curves(a, "Held-out loss", "held-out loss", |p| p.held_out));
    for column in [similarity, first(&a.columns, &["clip_t"]), drift].into_iter().flatten() {
        if figures.iter().all(|f| f.chart.title != step_title(column)) {
            figures.extend(against_steps(a, column));
        }
    }
    for column in [similarity, drift].into_iter().flatten() {
        figures.extend(robustness(a, column));
    }
    figures.retain(|f| !f.chart.is_empty());
    figures
}

/// The column of the first of these keys that there is.
pub fn first<'a>(columns: &'a [ScoreColumn], keys: &[&str]) -> Option<&'a ScoreColumn> {
    keys.iter().find_map(|key| columns.iter().find(|c| c.key == *key))
}

pub fn axis(label: &str, log: bool) -> Axis {
    Axis { label: label.to_string(), log }
}

/// A chart's axis of a score.
pub fn score_axis(column: &ScoreColumn) -> Axis {
    axis(&words::heading(column), false)
}

fn drawn_rows<'b>(a: &'b Analysis) -> impl Iterator<Item = &'b TableRow> {
    a.rows.iter().filter(|row| row.kind != RowKind::Real)
}

/// Colours follow the rows, so that two rates of one method differ.
pub fn colour(a: &Analysis, row: &TableRow) -> Option<usize> {
    let methods = a.rows.iter().filter(|r| r.kind == RowKind::Method);
    methods.enumerate().find(|(_, r)| r.label == row.label).map(|(number, _)| number)
}

fn against_parameters(a: &Analysis, score: &ScoreColumn) -> Figure {
    let series = drawn_rows(a).filter_map(|row| {
        let (x, e) = (row.budget.parameters? as f64, row.scores.get(&score.key)?);
        let title = format!(
            "{}: {} parameters, {} {}",
            row.label,
            words::count(x),
            score.title,
            words::estimate(e, score.digits)
        );
        let bar = e.spread.map(|s| (e.mean - s, e.mean + s));
        let dots = if a.few_subjects { e.seeds.iter().map(|(_, v)| (x, *v)).collect() } else { Vec::new() };
        let marks = vec![Mark { x, y: e.mean, radius: 5.0, bar, title, opens: None }];
        Some(Series { label: row.label.clone(), number: colour(a, row), marks, line: Line::None, dots })
    });
    let seeds = if a.few_subjects { "; small dots are seeds" } else { "" };
    Figure {
        caption: format!("{} against trained parameters. Bars: ± spread over seeds{seeds}.", score.title),
        chart: Chart {
            title: format!("{} against parameters", score.title),
            x: axis("trained parameters", true),
            y: score_axis(score),
            series: series.collect(),
            rule: None,
        },
    }
}

fn against_drift(a: &Analysis, score: &ScoreColumn, drift: &ScoreColumn) -> Figure {
    let longest = drawn_rows(a).filter_map(|row| row.budget.seconds).fold(0.0, f64::max);
    let series = drawn_rows(a).filter_map(|row| {
        let (x, y) = (row.scores.get(&drift.key)?.mean, row.scores.get(&score.key)?.mean);
        let radius = match row.budget.seconds {
            Some(seconds) if longest > 0.0 => 4.0 + 13.0 * (seconds / longest).sqrt(),
            _ => 4.0,
        };
        let time =
            row.budget.seconds.map(|s| format!(", {} min", words::significant(s / 60.0))).unwrap_or_default();
        let (sd, dd) = (score.digits, drift.digits);
        let title = format!("{}: {} {y:.sd$}, {} {x:.dd$}{time}", row.label, score.title, drift.title);
        let marks = vec![Mark { x, y, radius, bar: None, title, opens: None }];
        Some(Series {
            label: row.label.clone(),
            number: colour(a, row),
            marks,
            line: Line::None,
            dots: Vec::new(),
        })
    });
    Figure {
        caption: format!(
            "{} against {}. A larger circle took longer to train (the area above the smallest grows with the minutes).",
            score.title, drift.title
        ),
        chart: Chart {
            title: format!("{} against {} and time", score.title, drift.title),
            x: score_axis(drift),
            y: score_axis(score),
            series: series.collect(),
            rule: None,
        },
    }
}

fn loss_curves(
    a: &Analysis,
    title: &str,
    what: &str,
    value: fn(&crate::lab::results::LossPoint) -> Option<f64>,
) -> Figure {
    let series = drawn_rows(a).map(|row| {
        let mut by_step: BTreeMap<i64, Vec<f64>> = BTreeMap::new();
        for point in a.records_of(row).flat_map(|r| &r.losses) {
            by_step.entry(point.step).or_default().extend(value(point));
        }
        let points: Vec<(i64, f64)> =
            by_step.into_iter().filter_map(|(step, values)| Some((step, mean(values)?))).collect();
        // Neighbours are averaged where there are many.
        let marks = points.chunks(points.len().div_ceil(CURVE_POINTS).max(1)).filter_map(|chunk| {
            let (x, y) = (mean(chunk.iter().map(|p| p.0 as f64))?, mean(chunk.iter().map(|p| p.1))?);
            Some(Mark {
                x,
                y,
                radius: 4.0,
                bar: None,
                title: format!("{}, step {x:.0}: {y:.4}", row.label),
                opens: None,
            })
        });
        Series {
            label: row.label.clone(),
            number: colour(a, row),
            marks: marks.collect(),
            line: Line::Marks,
            dots: Vec::new(),
        }
    });
    Figure {
        caption: format!("{title} against steps, mean over the cells of each method."),
        chart: Chart {
            title: title.to_string(),
            x: axis("step", false),
            y: axis(what, false),
            series: series.filter(|s| !s.marks.is_empty()).collect(),
            rule: None,
        },
    }
}

/// Heading of a chart of a score against steps.
pub fn step_title(column: &ScoreColumn) -> String {
    format!("{} against steps", column.title)
}

fn against_steps(a: &Analysis, column: &ScoreColumn) -> Option<Figure> {
    if a.plan.steps.len() < 2 {
        return None;
    }
    let series = drawn_rows(a).filter(|row| row.kind == RowKind::Method).map(|row| {
        let marks = a.plan.steps.iter().filter_map(|&step| {
            let found = a.records_of(row).filter_map(|r| evaluation_value(r, a.set, step, &column.key));
            Some(mark(&row.label, &format!("step {step}"), step as f64, mean(found)?, column))
        });
        Series {
            label: row.label.clone(),
            number: colour(a, row),
            marks: marks.collect(),
            line: Line::Marks,
            dots: Vec::new(),
        }
    });
    Some(Figure {
        caption: format!(
            "{} against steps, {} set, mean over subjects and seeds.",
            column.title,
            a.set.name()
        ),
        chart: Chart {
            title: step_title(column),
            x: axis("step", false),
            y: score_axis(column),
            series: series.filter(|s| !s.marks.is_empty()).collect(),
            rule: None,
        },
    })
}

fn mark(label: &str, at: &str, x: f64, y: f64, column: &ScoreColumn) -> Mark {
    let digits = column.digits;
    Mark {
        x,
        y,
        radius: 4.0,
        bar: None,
        title: format!("{label}, {at}: {} {y:.digits$}", column.title),
        opens: None,
    }
}

/// The evaluation's mean of a score at a step.
fn evaluation_value(record: &CellRecord, set: Set, step: i64, key: &str) -> Option<f64> {
    record.evaluations.iter().find(|e| e.set == set && e.step == step)?.scores.get(key).copied()
}

/// A panel for each number of steps: the score against the learning rate.
fn robustness(a: &Analysis, column: &ScoreColumn) -> Vec<Figure> {
    if !a.has_rates() {
        return Vec::new();
    }
    let trained = || a.records.iter().filter(|r| !r.cell.is_base());
    let validated = trained()
        .flat_map(|r| &r.evaluations)
        .any(|e| e.set == Set::Validation && e.scores.contains_key(&column.key));
    let set = if validated { Set::Validation } else { a.set };
    let panel = |&step: &i64| {
        let series = a.plan.methods.iter().enumerate().map(|(number, method)| {
            let mut rates = method.learning_rates.clone();
            rates.sort_by(f64::total_cmp);
            let marks = rates.iter().filter_map(|&rate| {
                let mine = trained()
                    .filter(|r| r.cell.method() == method.label && r.cell.learning_rate() == Some(rate));
                let y = mean(mine.filter_map(|r| evaluation_value(r, set, step, &column.key)))?;
                Some(mark(&method.label, &format!("rate {rate:e}"), rate, y, column))
            });
            let marks = marks.collect();
            Series {
                label: method.label.clone(),
                number: Some(number),
                marks,
                line: Line::Marks,
                dots: Vec::new(),
            }
        });
        Figure {
            caption: format!(
                "What a wrong learning rate costs: {} after {step} steps, {} set, mean over subjects and seeds.",
                column.title,
                set.name()
            ),
            chart: Chart {
                title: format!("{} against learning rate, {step} steps", column.title),
                x: axis("learning rate", true),
                y: score_axis(column),
                series: series.filter(|s| !s.marks.is_empty()).collect(),
                rule: None,
            },
        }
    };
    a.plan.steps.iter().map(panel).collect()
}
