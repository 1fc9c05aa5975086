//! The curves as a chart.

use crate::lab::report::chart::{Chart, Line, Mark, Series};
use crate::lab::report::frontier::columns::{drift_and_fidelity, likeness};
use crate::lab::report::frontier::{Curve, CurvePoint, Frontier};
use crate::lab::report::plots::{Figure, colour, score_axis};
use crate::lab::report::table::Analysis;
use crate::lab::report::words;

/// Likeness against drift: a line above the points of each method, every point a mark that opens its pictures.
pub fn figure(a: &Analysis, frontier: &Frontier) -> Option<Figure> {
    let likeness = likeness(&a.columns)?;
    let [drift, fidelity] = drift_and_fidelity(&a.columns);
    let drift = drift?;
    let mark = |curve: &Curve, point: &CurvePoint| {
        let at = |value: f64, digits: usize| format!("{value:.digits$}");
        let fidelity = fidelity.zip(point.fidelity);
        let fidelity = fidelity.map(|(column, v)| format!(", {} {}", column.title, at(v, column.digits)));
        let title = format!(
            "{}, step {}, scale {}: {} {}, {} {}{}",
            curve.label,
            point.place.step,
            point.place.scale,
            likeness.title,
            at(point.likeness, likeness.digits),
            drift.title,
            at(point.drift, drift.digits),
            fidelity.unwrap_or_default()
        );
        let chosen = curve.chosen.is_some_and(|chosen| chosen.place == point.place);
        let opens = format!("{},{:e},{},{}", curve.method, curve.rate, point.place.step, point.place.scale);
        Mark {
            x: point.drift,
            y: point.likeness,
            radius: if chosen { 5.5 } else { 3.5 },
            bar: None,
            title: if chosen { format!("{title} (chosen on validation)") } else { title },
            opens: Some(opens),
        }
    };
    let series = frontier.curves.iter().map(|curve| Series {
        label: curve.label.clone(),
        number: a.rows.iter().find(|row| row.label == curve.label).and_then(|row| colour(a, row)),
        // The base model is where every curve begins.
        marks: curve.points[1..].iter().map(|point| mark(curve, point)).collect(),
        line: Line::Through(
            curve.envelope.iter().map(|i| (curve.points[*i].drift, curve.points[*i].likeness)).collect(),
        ),
        dots: Vec::new(),
    });
    let base = frontier.curves.first().and_then(|curve| curve.points.first()).map(|point| Series {
        label: "base".into(),
        number: None,
        marks: vec![Mark {
            x: point.drift,
            y: point.likeness,
            radius: 4.5,
            bar: None,
            title: format!("base: {} {:.*}", likeness.title, likeness.digits, point.likeness),
            opens: None,
        }],
        line: Line::None,
        dots: Vec::new(),
    });
    Some(Figure {
        caption: format!(
            "{} against {}, {} set: each method at every checkpoint and adapter scale, and the line above its points. More to \
             the upper left is better. The larger point was chosen on validation. Press a point to see its pictures.",
            words::heading(likeness),
            words::heading(drift),
            a.set.name()
        ),
        chart: Chart {
            title: format!("{} at the same drift", likeness.title),
            x: score_axis(drift),
            y: score_axis(likeness),
            series: base.into_iter().chain(series).collect(),
            rule: None,
        },
    })
}
