//! One run's charts: likeness against drift, and scores against steps, a line for each adapter scale.

use crate::lab::report::chart::{Chart, Line, Mark, Series, standalone};
use crate::lab::report::frontier::columns::{drift_and_fidelity, likeness};
use crate::lab::report::plots::{DRIFT, SIMILARITY, axis, first, score_axis, step_title};
use crate::lab::report::values::{ScoreColumn, columns_of};
use crate::lab::results::FrontierPoint;

/// What the charts of a run mark.
#[derive(Debug, Clone, Copy, Default)]
pub struct MarkedPlace {
    /// The number of the point to draw with.
    pub best: Option<usize>,
    /// How far it may drift.
    pub drift_limit: Option<f64>,
}

/// The charts as an SVG file; `points` are of one set. An empty drawing where there is nothing to show.
pub fn run_plot(title: &str, points: &[FrontierPoint], marked: MarkedPlace) -> String {
    let columns = columns_of(points.iter().flat_map(|point| point.evaluation.scores.keys()));
    let mut charts: Vec<Chart> = against_drift(points, &columns, marked).into_iter().collect();
    let wanted = [first(&columns, &SIMILARITY), first(&columns, &["clip_t"]), first(&columns, &DRIFT)];
    for column in wanted.into_iter().flatten() {
        let chart = against_steps(points, column, marked);
        if charts.iter().all(|c| c.title != chart.title) {
            charts.push(chart);
        }
    }
    charts.retain(|chart| !chart.is_empty());
    standalone(title, &charts)
}

fn against_drift(points: &[FrontierPoint], columns: &[ScoreColumn], marked: MarkedPlace) -> Option<Chart> {
    let (likeness, [drift, _]) = (likeness(columns)?, drift_and_fidelity(columns));
    let drift = drift?;
    let place = |point: &FrontierPoint| Some((value(point, drift)?, value(point, likeness)?));
    // Where every point is within it, the limit has no say.
    let beyond = |limit: &f64| points.iter().any(|point| value(point, drift).is_some_and(|d| d > *limit));
    Some(Chart {
        title: format!("{} against {}", likeness.title, drift.title),
        x: score_axis(drift),
        y: score_axis(likeness),
        series: lines(points, &likeness.title, marked, &place, &[likeness, drift]),
        rule: marked.drift_limit.filter(beyond).map(|limit| (limit, format!("limit: {limit:.1}"))),
    })
}

fn against_steps(points: &[FrontierPoint], column: &ScoreColumn, marked: MarkedPlace) -> Chart {
    let place = |point: &FrontierPoint| Some((point.evaluation.step as f64, value(point, column)?));
    let best = marked.best.map(|i| &points[i]);
    Chart {
        title: step_title(column),
        x: axis("step", false),
        y: score_axis(column),
        series: lines(points, &column.title, marked, &place, &[column]),
        rule: best.map(|point| {
            (point.evaluation.step as f64, format!("best: {}, scale {}", point.evaluation.step, point.scale))
        }),
    }
}

/// A line for each scale, through its steps.
fn lines(
    points: &[FrontierPoint],
    alone: &str,
    marked: MarkedPlace,
    place: &dyn Fn(&FrontierPoint) -> Option<(f64, f64)>,
    told: &[&ScoreColumn],
) -> Vec<Series> {
    let mut scales: Vec<f64> = points.iter().map(|point| point.scale).collect();
    scales.sort_by(f64::total_cmp);
    scales.dedup();
    let mark = |(number, point): (usize, &FrontierPoint)| {
        let (x, y) = place(point)?;
        let values = told.iter().filter_map(|column| {
            Some(format!("{} {:.*}", column.title, column.digits, value(point, column)?))
        });
        let values = values.collect::<Vec<_>>().join(", ");
        Some(Mark {
            x,
            y,
            radius: if marked.best == Some(number) { 5.5 } else { 4.0 },
            bar: None,
            title: format!("step {}, scale {}: {values}", point.evaluation.step, point.scale),
            opens: None,
        })
    };
    let line = |(number, scale): (usize, &f64)| Series {
        label: if scales.len() == 1 { alone.to_string() } else { format!("scale {scale}") },
        number: Some(number),
        marks: points.iter().enumerate().filter(|(_, p)| p.scale == *scale).filter_map(mark).collect(),
        line: Line::Marks,
        dots: Vec::new(),
    };
    scales.iter().enumerate().map(line).collect()
}

fn value(point: &FrontierPoint, column: &ScoreColumn) -> Option<f64> {
    point.evaluation.scores.get(&column.key).copied()
}
