//! Learning rates, chosen by validation alone: no test picture or test prompt has a say.

use crate::lab::report::frontier::rate;
use crate::lab::report::statistics::{mean, spread};
use crate::lab::report::values::{self, ScoreColumn, result};
use crate::lab::results::{CellRecord, Evaluation, Plan, PlannedCell, PlannedMethod, Set};
use crate::train::config::keys::{Section, keys};
use serde::Serialize;
use std::collections::BTreeSet;

/// What validation says of a method's learning rates.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BestRate {
    /// The method's label.
    pub method: String,
    /// The learning rate with the largest objective.
    pub rate: f64,
    /// Its objective.
    pub objective: f64,
    /// Whether it is the smallest or largest of several that were tried: the best may lie outside.
    pub at_edge: bool,
    /// Every rate with validation scores, ascending.
    pub rates: Vec<TriedRate>,
}

/// One learning rate of a method.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TriedRate {
    /// The learning rate.
    pub rate: f64,
    /// Sum over the objective's scores of weight times mean over subjects and seeds; or the likeness within the search's drift.
    pub objective: f64,
    /// The largest drift that was measured, where a drift is asked for: a rate that ends before it has no likeness there, and counts only
    /// where all do.
    pub reach: Option<f64>,
    /// Sample standard deviation of the seeds' own objectives; `None` of one seed.
    pub spread: Option<f64>,
    /// Trainings that it is the mean of.
    pub cells: usize,
    /// Trainings that were planned. A rate with fewer than the fullest is not chosen: what is missing may have diverged.
    pub planned: usize,
}

/// The best learning rate of each method that has validation scores, in the order of the plan.
pub fn best_rates(plan: &Plan, records: &[CellRecord]) -> Vec<BestRate> {
    let scored: Vec<ScoredCell> = records
        .iter()
        .filter(|r| !r.cell.is_base())
        .filter_map(|r| Some((r, result(plan, r, Set::Validation)?)))
        .collect();
    // (subject, score): missing in one training of the subject, it counts in none.
    let left_out: BTreeSet<(&str, &str)> = scored
        .iter()
        .flat_map(|(r, e)| {
            let lacking = plan.objective.iter().filter(|(key, _)| !e.scores.contains_key(key));
            lacking.map(|(key, _)| (r.cell.subject.as_str(), key.as_str()))
        })
        .collect();
    // Trainings that are for the tables alone are no part of the search.
    let for_tables =
        |r: &&CellRecord| result(plan, r, Set::Test).is_some() && result(plan, r, Set::Validation).is_none();
    let for_tables: BTreeSet<&str> = records.iter().filter(for_tables).map(|r| r.cell.id.as_str()).collect();
    let looks =
        |c: &PlannedCell| plan.scored_with.get(&c.id).is_none_or(|with| with.contains_key(&Set::Validation));
    let searched: Vec<&PlannedCell> =
        plan.cells.iter().filter(|c| !for_tables.contains(c.id.as_str()) && looks(c)).collect();
    let judge = Judge { plan, records, columns: values::columns(records), left_out };
    let rate = |method| best_rate(method, &judge, &scored, &searched);
    plan.methods.iter().filter_map(rate).collect()
}

/// A training with its scores on validation.
type ScoredCell<'a> = (&'a CellRecord, &'a Evaluation);

/// What is asked of a learning rate.
struct Judge<'a> {
    plan: &'a Plan,
    records: &'a [CellRecord],
    columns: Vec<ScoreColumn>,
    left_out: BTreeSet<(&'a str, &'a str)>,
}

impl Judge<'_> {
    /// Of trainings with one rate, and the largest drift where one is asked for; `None` where no score is there.
    fn objective(&self, cells: &[ScoredCell]) -> Option<(f64, Option<f64>)> {
        if let Some(drift) = self.plan.search_drift {
            let trained: Vec<&CellRecord> = cells.iter().map(|(record, _)| *record).collect();
            let found = rate::likeness_within(self.plan, self.records, &self.columns, &trained, drift);
            return found.map(|(likeness, reach)| (likeness, Some(reach)));
        }
        let mut sum = None;
        for (key, weight) in &self.plan.objective {
            let counts =
                |(r, _): &&ScoredCell| !self.left_out.contains(&(r.cell.subject.as_str(), key.as_str()));
            let found = cells.iter().filter(counts).filter_map(|(_, e)| e.scores.get(key).copied());
            if let Some(value) = mean(found) {
                *sum.get_or_insert(0.0) += weight * value;
            }
        }
        sum.map(|sum| (sum, None))
    }
}

fn best_rate(
    method: &PlannedMethod,
    judge: &Judge,
    scored: &[ScoredCell],
    searched: &[&PlannedCell],
) -> Option<BestRate> {
    let mut grid = method.learning_rates.clone();
    grid.sort_by(f64::total_cmp);
    grid.dedup();
    let mut rates = Vec::new();
    for &rate in &grid {
        let of_rate = |label: &str, found: Option<f64>| label == method.label && found == Some(rate);
        let cells: Vec<_> = scored
            .iter()
            .filter(|(r, _)| of_rate(r.cell.method(), r.cell.learning_rate()))
            .copied()
            .collect();
        if let Some((objective, reach)) = judge.objective(&cells) {
            let planned = searched.iter().filter(|c| of_rate(c.method(), c.learning_rate())).count();
            let seeds: BTreeSet<u64> = cells.iter().map(|(r, _)| r.cell.seed()).collect();
            let of_seed = |seed: u64| {
                let own: Vec<_> = cells.iter().filter(|(r, _)| r.cell.seed() == seed).copied().collect();
                judge.objective(&own).map(|(objective, _)| objective)
            };
            let spread = spread(&seeds.into_iter().filter_map(of_seed).collect::<Vec<f64>>());
            rates.push(TriedRate { rate, objective, reach, spread, cells: cells.len(), planned });
        }
    }
    let fullest = rates.iter().map(|r| r.cells).max()?;
    let full: Vec<&TriedRate> = rates.iter().filter(|r| r.cells == fullest).collect();
    let reaches =
        |r: &TriedRate| r.reach.zip(judge.plan.search_drift).is_none_or(|(reach, drift)| reach >= drift);
    let reaching: Vec<&TriedRate> = full.iter().copied().filter(|r| reaches(r)).collect();
    let mut counted = if reaching.is_empty() { full } else { reaching }.into_iter();
    let first = counted.next()?;
    // Of equal ones the smaller rate.
    let best = counted.fold(first, |best, r| if r.objective > best.objective { r } else { best });
    let at_edge = grid.len() > 1 && (grid.first() == Some(&best.rate) || grid.last() == Some(&best.rate));
    let (rate, objective) = (best.rate, best.objective);
    Some(BestRate { method: method.label.clone(), rate, objective, at_edge, rates })
}

/// The chosen rates as `[[method]]` of a compare config; empty where no method tried several.
pub fn toml_snippet(plan: &Plan, rates: &[BestRate]) -> String {
    let mut tables = Vec::new();
    for method in &plan.methods {
        let Some(best) = rates.iter().find(|r| r.method == method.label && r.rates.len() > 1) else {
            continue;
        };
        let mut table = toml::Table::new();
        table.insert("label".into(), method.label.clone().into());
        let said = keys().filter_map(|key| {
            let value = toml::Value::try_from(method.settings.get(key.name)?).ok()?;
            Some((key, value))
        });
        for (key, value) in said {
            key.section.of_mut(&mut table).insert(key.name.into(), value);
        }
        Section::Optimizer.of_mut(&mut table).insert("learning_rate".into(), best.rate.into());
        tables.push(toml::Value::Table(table));
    }
    if tables.is_empty() {
        return String::new();
    }
    toml::to_string(&toml::Table::from_iter([("method".to_string(), toml::Value::Array(tables))]))
        .unwrap_or_default()
}
