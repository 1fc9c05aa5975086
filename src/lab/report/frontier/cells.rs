//! From records to the numbers of the grid: for each cell, likeness and drift at every place, prompt by prompt.

use crate::lab::report::statistics::{mean, prompt_value};
use crate::lab::results::{CellRecord, Evaluation, FrontierRecord, Plan, PromptScores, Set};

/// A place of the grid.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Place {
    /// Optimiser steps; 0 of the base model.
    pub step: i64,
    /// Adapter scale; 0 of the base model.
    pub scale: f64,
}

/// One cell at every place: prompts of values at places.
pub struct CellPlaces<'a> {
    /// Which cell.
    pub record: &'a CellRecord,
    /// Likeness to the pictures of the set, `[prompt][place]`.
    pub likeness: Vec<Vec<f64>>,
    /// Fidelity to its prompts, `[prompt][place]`; empty where it was not scored.
    pub fidelity: Vec<Vec<f64>>,
    /// Drift, `[prompt without the subject][place]`.
    pub drift: Vec<Vec<f64>>,
    /// Likeness on the validation prompts, to the pictures that are trained on or left out, of each place; empty without such pictures.
    pub validation: Vec<f64>,
}

/// Every place: the base model, then checkpoints and scales in their order.
pub fn places(plan: &Plan) -> Vec<Place> {
    let Some(frontier) = &plan.frontier else { return Vec::new() };
    let base = Place { step: 0, scale: 0.0 };
    let scales = || frontier.scales.iter().copied().filter(|scale| *scale != 0.0);
    let of = |&step: &i64| scales().map(move |scale| Place { step, scale });
    std::iter::once(base).chain(frontier.checkpoints.iter().flat_map(of)).collect()
}

/// The places at which every cell that was drawn along the grid has its pictures: a scale may be too far for one of them.
pub fn common_places(plan: &Plan, all: &[CellRecord], records: &[&CellRecord], set: Set) -> Vec<Place> {
    let there = |record: &CellRecord, place: Place| {
        [Set::Validation, set].iter().all(|set| evaluation(plan, all, record, place, *set).is_some())
    };
    let mut places = places(plan);
    let drawn: Vec<&&CellRecord> =
        records.iter().filter(|record| places.iter().skip(1).any(|place| there(record, *place))).collect();
    places.retain(|place| drawn.iter().all(|record| there(record, *place)));
    places
}

/// A cell's evaluation at a place on a set: the base model's, of its subject, at the first.
pub fn evaluation<'a>(
    plan: &Plan,
    records: &'a [CellRecord],
    record: &'a CellRecord,
    place: Place,
    set: Set,
) -> Option<&'a Evaluation> {
    let is_base = place.scale == 0.0;
    let of = if is_base {
        records.iter().find(|r| r.cell.is_base() && r.cell.subject == record.cell.subject)?
    } else {
        record
    };
    let frontier = of.frontier.as_ref().filter(|frontier| counts(plan, &of.cell.id, frontier, set))?;
    let here = |e: &Evaluation, scale: f64| e.set == set && scale == place.scale && e.step == place.step;
    frontier.points.iter().find(|point| here(&point.evaluation, point.scale)).map(|point| &point.evaluation)
}

/// Whether a cell's points on a set were made with what the plan says.
pub fn counts(plan: &Plan, id: &str, frontier: &FrontierRecord, set: Set) -> bool {
    let wanted = plan.frontier.as_ref().and_then(|planned| planned.made_with.get(id)?.get(&set));
    wanted.is_some() && wanted == frontier.made_with.get(&set)
}

impl<'a> CellPlaces<'a> {
    /// On a set, at these places, of which the first is the base model; `None` where one lacks a score, or there is no other.
    pub fn new(
        plan: &Plan,
        records: &'a [CellRecord],
        record: &'a CellRecord,
        (set, places): (Set, &[Place]),
        [likeness, fidelity, drift]: [&str; 3],
    ) -> Option<Self> {
        if places.len() < 2 {
            return None;
        }
        let at = |set: Set| -> Option<Vec<&Evaluation>> {
            places.iter().map(|place| evaluation(plan, records, record, *place, set)).collect()
        };
        let (scored, validation) = (at(set)?, at(Set::Validation)?);
        let column = |of: fn(&Evaluation) -> &[PromptScores], from: &[&Evaluation], key: &str| {
            let prompts = of(from[from.len() - 1]).len();
            let value = |p: usize, e: &&Evaluation| prompt_value(of(e).get(p)?, key);
            (0..prompts)
                .map(|p| from.iter().map(|e| value(p, e)).collect())
                .collect::<Option<Vec<Vec<f64>>>>()
        };
        // The base model has not drifted from itself.
        let trained = &scored[1..];
        let from_base = |mut values: Vec<f64>| {
            values.insert(0, 0.0);
            values
        };
        let drift = column(|e| &e.drift, trained, drift)?.into_iter().map(from_base).collect();
        let chosen_by = column(|e| &e.prompts, &validation, likeness).unwrap_or_default();
        let validation = (0..places.len()).filter_map(|i| mean(chosen_by.iter().map(|prompt| prompt[i])));
        Some(Self {
            record,
            likeness: column(|e| &e.prompts, &scored, likeness)?,
            fidelity: column(|e| &e.prompts, &scored, fidelity).unwrap_or_default(),
            drift,
            validation: validation.collect(),
        })
        .filter(|cell| !cell.likeness.is_empty() && !cell.drift.is_empty())
    }

    /// The subject and seed, by which cells of two methods are pairs.
    pub fn pair(&self) -> (&str, u64) {
        (&self.record.cell.subject, self.record.cell.seed())
    }
}
