//! Which method is better at the same drift: a curve of likeness against drift for each row of the table, from cells that
//! were drawn along a grid of adapter scales and checkpoints.
//!
//! `columns` says which scores these are, `cells` reads the grid from the records, `sample` takes means, `envelope` is the curve;
//! `plot`, `tables` and `page` show them; `rate` judges a learning rate by its curve.

mod cells;
pub mod columns;
mod envelope;
pub mod page;
pub mod plot;
pub mod rate;
mod sample;
pub mod tables;

pub use cells::{Place, counts, evaluation, places};

use crate::lab::report::statistics::Bootstrap;
use crate::lab::report::table::{Analysis, RowKind, TableRow};
use crate::lab::results::CellRecord;
use cells::{CellPlaces, common_places};
use columns::{DRIFT, FIDELITY, likeness};
use envelope::{Envelope, Mixture};
use sample::PlaceSample;
use serde::Serialize;
use std::collections::BTreeSet;

/// Where likenesses to match are not given: these shares of what all methods reach.
const SHARES: [f64; 3] = [0.25, 0.5, 0.75];
/// Resamples of which fewer than this share have a value have no interval.
const MOST_HAVE_IT: f64 = 0.95;

/// All curves.
#[derive(Debug, Clone, Serialize)]
pub struct Frontier {
    /// Key of the likeness.
    pub likeness: String,
    /// Drifts at which likeness is told.
    pub drifts: Vec<f64>,
    /// Likenesses at which drift is told.
    pub levels: Vec<f64>,
    /// The area ends here, and no chosen point drifts further.
    pub drift_limit: f64,
    /// A curve for each row that has one.
    pub curves: Vec<Curve>,
}

/// The curve of a row.
#[derive(Debug, Clone, Serialize)]
pub struct Curve {
    /// The row's heading.
    pub label: String,
    /// Its method in the plan.
    pub method: usize,
    /// Its learning rate.
    pub rate: f64,
    /// Cells that are on it.
    pub cells: usize,
    /// Every place of the grid.
    pub points: Vec<CurvePoint>,
    /// Numbers of the points that the curve goes through.
    pub envelope: Vec<usize>,
    /// Likeness at each of [`Frontier::drifts`].
    pub at_drift: Vec<Option<Matched>>,
    /// Fidelity to the prompt there.
    pub fidelity: Vec<Option<f64>>,
    /// Drift at each of [`Frontier::levels`].
    pub at_likeness: Vec<Option<Matched>>,
    /// Mean likeness from no drift to [`Frontier::drift_limit`].
    pub area: Option<Matched>,
    /// The place with the most likeness on validation within the limit.
    pub chosen: Option<CurvePoint>,
}

/// Means at a place of the grid.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CurvePoint {
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// From the base model's pictures.
    pub drift: f64,
    /// To the pictures of the table's set.
    pub likeness: f64,
    /// To the prompt.
    pub fidelity: Option<f64>,
}

/// A value of a curve at something that other curves have too.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Matched {
    /// The value.
    pub value: f64,
    /// How much more it is than that of the reference row, over the cells that both have.
    pub difference: Option<f64>,
    /// 95 % interval of that.
    pub interval: Option<(f64, f64)>,
}

/// Heading of the curves.
pub const TITLE: &str = "At the same drift";

/// How the curves are to be read, a sentence each.
pub fn about(a: &Analysis) -> Vec<String> {
    let reference = a.reference.as_deref().unwrap_or_default();
    vec![
        "A curve goes through the checkpoints and adapter scales that no other one of the method beats with less drift, straight \
         between them, and level after the last; beyond the largest drift that was measured there is no value."
            .into(),
        format!(
            "In brackets, where there is one: the difference to {reference}, and its 95 % interval, from {}, drawn again for both.",
            a.resampled
        ),
        format!(
            "The chosen point has the most likeness on validation prompts, to the pictures that are trained on or left out for \
             validation, within the limit of drift; what stands there is its score on the {} set.",
            a.set.name()
        ),
    ]
}

/// What is asked of a curve.
type Question<'q> = &'q dyn Fn(&Envelope) -> Option<f64>;

impl Frontier {
    /// Of the rows of the table; `None` without a planned frontier, or where no cell has it yet.
    pub fn new(a: &Analysis) -> Option<Self> {
        let planned = a.plan.frontier.as_ref()?;
        let likeness = likeness(&a.columns)?;
        let rows: Vec<RowCells> = a
            .rows
            .iter()
            .filter(|row| row.kind == RowKind::Method)
            .map(|row| RowCells::new(a, row, &likeness.key))
            .filter(|row| !row.cells.is_empty())
            .collect();
        let all = |cells: &[CellPlaces]| PlaceSample::new(&refs(cells), a.few_subjects).envelope(None);
        let envelopes: Vec<Envelope> = rows.iter().map(|row| all(&row.cells)).collect::<Option<_>>()?;
        let mut frontier = Self {
            likeness: likeness.key.clone(),
            drifts: planned.drifts.clone(),
            levels: planned.likeness.clone(),
            drift_limit: planned.drift_limit,
            curves: Vec::new(),
        };
        if frontier.levels.is_empty() {
            frontier.levels = levels(&envelopes);
        }
        let reference = rows.iter().find(|row| Some(&row.row.label) == a.reference.as_ref());
        let mut bootstrap = Bootstrap::default();
        for (RowCells { row, cells, places }, envelope) in rows.iter().zip(&envelopes) {
            let against = reference.filter(|first| first.row.label != row.label).map(|first| &first.cells);
            let curve = frontier.curve(row, cells, envelope, places);
            let matching =
                Matching::new(&mut bootstrap, cells, against.map_or(&[], Vec::as_slice), a.few_subjects);
            frontier.curves.push(frontier.matched(curve?, envelope, &matching));
        }
        (!frontier.curves.is_empty()).then_some(frontier)
    }

    /// A curve with its points, nothing matched yet.
    fn curve(
        &self,
        row: &TableRow,
        cells: &[CellPlaces],
        envelope: &Envelope,
        places: &[Place],
    ) -> Option<Curve> {
        let cells = refs(cells);
        let fidelity = sample::means(&cells, |cell| &cell.fidelity);
        let (drift, likeness) =
            (sample::means(&cells, |cell| &cell.drift)?, sample::means(&cells, |cell| &cell.likeness)?);
        let point = |i: usize| CurvePoint {
            place: places[i],
            drift: drift[i],
            likeness: likeness[i],
            fidelity: fidelity.as_ref().map(|values| values[i]),
        };
        let points: Vec<CurvePoint> = (0..places.len()).map(point).collect();
        let chosen = sample::validation(&cells).and_then(|validation| {
            let within = (0..points.len()).filter(|&i| points[i].drift <= self.drift_limit);
            // Of equal ones the one with less drift.
            let rank = |i: usize| (validation[i], -points[i].drift);
            let better = |best: usize, i: usize| if rank(i) > rank(best) { i } else { best };
            within.reduce(better)
        });
        Some(Curve {
            label: row.label.clone(),
            method: row.method?,
            rate: row.rate?,
            cells: cells.len(),
            chosen: chosen.map(|i| points[i]),
            fidelity: self
                .drifts
                .iter()
                .map(|drift| mixed(envelope.at_drift(*drift)?, fidelity.as_deref()?))
                .collect(),
            points,
            envelope: envelope.points().collect(),
            at_drift: Vec::new(),
            at_likeness: Vec::new(),
            area: None,
        })
    }

    fn matched(&self, curve: Curve, envelope: &Envelope, matching: &Matching) -> Curve {
        let ask = |question: Question| {
            let value = question(envelope)?;
            let (difference, interval) = matching.difference(question);
            Some(Matched { value, difference, interval })
        };
        let at_drift = self.drifts.iter().map(|drift| ask(&|e| e.likeness_at(*drift))).collect();
        let at_likeness = self.levels.iter().map(|level| ask(&|e| e.drift_at(*level))).collect();
        let area = ask(&|e| e.mean_up_to(self.drift_limit));
        Curve { at_drift, at_likeness, area, ..curve }
    }
}

/// A row of the table with its cells at the places that all of them have.
struct RowCells<'a> {
    row: &'a TableRow,
    cells: Vec<CellPlaces<'a>>,
    places: Vec<Place>,
}

impl<'a> RowCells<'a> {
    fn new(a: &'a Analysis, row: &'a TableRow, likeness: &str) -> Self {
        let records: Vec<&CellRecord> = a.records_of(row).collect();
        let places = common_places(a.plan, a.records, &records, a.set);
        let keys = [likeness, FIDELITY, DRIFT];
        let cell =
            |record: &&'a CellRecord| CellPlaces::new(a.plan, a.records, record, (a.set, &places), keys);
        let cells = records.iter().filter_map(cell).collect();
        Self { row, cells, places }
    }
}

fn refs<'c, 'a>(cells: &'c [CellPlaces<'a>]) -> Vec<&'c CellPlaces<'a>> {
    cells.iter().collect()
}

fn mixed(mixture: Mixture, values: &[f64]) -> Option<f64> {
    Some(mixture.iter().map(|(point, weight)| values[*point] * weight).sum())
}

/// Likenesses between the base model's and the largest that every curve reaches.
fn levels(envelopes: &[Envelope]) -> Vec<f64> {
    let low = envelopes.iter().filter_map(|e| e.likeness_at(0.0)).fold(f64::NEG_INFINITY, f64::max);
    let high = envelopes.iter().map(Envelope::top).fold(f64::INFINITY, f64::min);
    if high > low { SHARES.iter().map(|share| low + share * (high - low)).collect() } else { Vec::new() }
}

/// A row beside the reference, over the cells that both have, as measured and with units drawn again.
struct Matching {
    whole: Option<[Envelope; 2]>,
    drawn: Vec<Option<[Envelope; 2]>>,
}

impl Matching {
    fn new(
        bootstrap: &mut Bootstrap,
        cells: &[CellPlaces],
        reference: &[CellPlaces],
        few_subjects: bool,
    ) -> Self {
        let both: BTreeSet<(&str, u64)> =
            cells.iter().map(CellPlaces::pair).filter(|p| reference.iter().any(|c| c.pair() == *p)).collect();
        if both.is_empty() {
            return Self { whole: None, drawn: Vec::new() };
        }
        let samples = [cells, reference].map(|cells| {
            let mut cells: Vec<&CellPlaces> = cells.iter().filter(|c| both.contains(&c.pair())).collect();
            cells.sort_by_key(|cell| cell.pair());
            PlaceSample::new(&cells, few_subjects)
        });
        let curves = |drawn: Option<&[u16]>| {
            let [a, b] = &samples;
            Some([a.envelope(drawn)?, b.envelope(drawn)?])
        };
        let drawn = match bootstrap.units(&samples[0].sizes()) {
            Some(draws) if samples[0].sizes() == samples[1].sizes() => {
                let units = samples[0].sizes().iter().sum();
                draws.chunks_exact(units).map(|drawn| curves(Some(drawn))).collect()
            }
            _ => Vec::new(),
        };
        Self { whole: curves(None), drawn }
    }

    /// The difference of the answers, and its interval.
    fn difference(&self, question: Question) -> (Option<f64>, Option<(f64, f64)>) {
        let of = |curves: &Option<[Envelope; 2]>| {
            let [a, b] = curves.as_ref()?;
            Some(question(a)? - question(b)?)
        };
        let Some(whole) = of(&self.whole) else { return (None, None) };
        let found: Vec<f64> = self.drawn.iter().filter_map(of).collect();
        let enough = !found.is_empty() && found.len() as f64 >= MOST_HAVE_IT * self.drawn.len() as f64;
        (Some(whole), enough.then(|| Bootstrap::middle(found)))
    }
}
