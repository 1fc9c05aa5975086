//! The numbers of the report: a row for the base model and for each method, with budgets, means, spreads and differences.

use crate::lab::report::paper;
use crate::lab::report::search::{BestRate, best_rates};
use crate::lab::report::statistics::{Bootstrap, MANY_SUBJECTS, mean, mean_of_means, spread};
use crate::lab::report::values::{self, CellValues, PAPER, ScoreColumn};
use crate::lab::results::{BASE, CellRecord, Plan, PlannedCell, Set};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// The row of the pairs' own pictures, in a comparison of control.
pub const CEILING: &str = "real pictures (ceiling)";
/// The row of the base model, in a comparison of control.
pub const FLOOR: &str = "base, no condition (floor)";

/// Everything that the report says, from a plan and the records that are there.
pub struct Analysis<'a> {
    /// What was to be done.
    pub plan: &'a Plan,
    /// What was done.
    pub records: &'a [CellRecord],
    /// Which prompts and pictures the tables use.
    pub set: Set,
    /// The scores that there are.
    pub columns: Vec<ScoreColumn>,
    /// Real pictures (where they were scored), the base model, the methods.
    pub rows: Vec<TableRow>,
    /// Label of the row that differences are to.
    pub reference: Option<String>,
    /// What validation says of learning rates.
    pub rates: Vec<BestRate>,
    /// Cells without a record.
    pub missing: Vec<&'a PlannedCell>,
    /// Cells whose record lacks the last step's scores on the set of the tables.
    pub unscored: Vec<&'a PlannedCell>,
    /// For each cell the step that each prompt's scores are of, where the protocol chooses it.
    pub chosen_steps: BTreeMap<&'a str, Vec<i64>>,
    /// What a reader must know, in the report's own words and the plan's.
    pub notes: Vec<String>,
    /// What is drawn again for intervals, in words.
    pub resampled: &'static str,
    /// Whether each seed's own value is told.
    pub few_subjects: bool,
    /// Whether control is compared, on pairs.
    pub control: bool,
}

/// What a row of the table stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RowKind {
    /// Test pictures scored against training pictures; of control, the pairs' own pictures scored as drawn ones.
    Real,
    /// The base model.
    Base,
    /// A method at one learning rate.
    Method,
}

/// A row of the table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TableRow {
    /// Its heading: the method's label, with the rate where several have rows.
    pub label: String,
    /// What it is.
    pub kind: RowKind,
    /// Number of its method in the plan.
    pub method: Option<usize>,
    /// Learning rate of its cells.
    pub rate: Option<f64>,
    /// Cells with a record.
    pub cells: usize,
    /// Cells of the plan.
    pub planned: usize,
    /// Interrupted cells: their times and memory do not count.
    pub interrupted: usize,
    /// What the trainings cost.
    pub budget: BudgetMeans,
    /// By score key.
    pub scores: BTreeMap<String, MeanEstimate>,
    /// To the reference row, by score key.
    pub differences: BTreeMap<String, PairedDifference>,
}

/// What the trainings of a row cost; means over cells that were not interrupted, memory the largest.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct BudgetMeans {
    /// Trained values.
    pub parameters: Option<u64>,
    /// Bytes on disk.
    pub bytes: Option<u64>,
    /// Seconds for an optimiser step.
    pub seconds_per_step: Option<f64>,
    /// Seconds of a training.
    pub seconds: Option<f64>,
    /// Bytes.
    pub peak_memory: Option<u64>,
    /// Bytes.
    pub peak_device_memory: Option<u64>,
}

/// A mean over cells.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MeanEstimate {
    /// Over subjects and seeds of the cells' values.
    pub mean: f64,
    /// Sample standard deviation over seeds of [`Self::seeds`]; `None` of one seed.
    pub spread: Option<f64>,
    /// 95 % interval over the pairs of a comparison of control, where there is one seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<(f64, f64)>,
    /// Each seed's mean over subjects.
    pub seeds: Vec<(u64, f64)>,
    /// Cells that have the score.
    pub cells: usize,
}

/// How much more than the reference a row has.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PairedDifference {
    /// Mean over subjects of the mean over the subject's units.
    pub value: f64,
    /// 95 % interval; `None` where nothing can be drawn again.
    pub interval: Option<(f64, f64)>,
    /// Units that are drawn again.
    pub n: usize,
    /// Each seed's difference.
    pub seeds: Vec<(u64, f64)>,
}

impl PairedDifference {
    /// Whether the interval lies on one side of 0.
    pub fn seen(&self) -> bool {
        self.interval.is_some_and(|(low, high)| low > 0.0 || high < 0.0)
    }
}

impl<'a> Analysis<'a> {
    /// Works everything out.
    pub fn new(plan: &'a Plan, records: &'a [CellRecord]) -> Self {
        let set = values::table_set(records);
        let columns = values::columns(records);
        let rates = best_rates(plan, records);
        let values: Vec<CellValues> =
            records.iter().filter_map(|record| CellValues::new(plan, record, set)).collect();
        let there: BTreeSet<&str> = records.iter().map(|r| r.cell.id.as_str()).collect();
        let scored: BTreeSet<&str> = values.iter().map(|v| v.record.cell.id.as_str()).collect();
        let missing: Vec<_> = plan.cells.iter().filter(|c| !there.contains(c.id.as_str())).collect();
        // A cell of the search has no scores of the tables, and lacks none.
        let other = |r: &&CellRecord| {
            [Set::Validation, Set::Test].iter().any(|s| values::result(plan, r, *s).is_some())
        };
        let elsewhere: BTreeSet<&str> = records.iter().filter(other).map(|r| r.cell.id.as_str()).collect();
        let counts = |c: &&PlannedCell| scored.contains(c.id.as_str()) || elsewhere.contains(c.id.as_str());
        let unscored = plan.cells.iter().filter(|c| there.contains(c.id.as_str()) && !counts(c));
        let few_subjects = plan.subjects.len() < MANY_SUBJECTS;
        let control = plan.subjects.iter().any(|s| s.control.is_some());
        let mut analysis = Self {
            plan,
            records,
            set,
            rows: Vec::new(),
            reference: None,
            missing,
            unscored: unscored.collect(),
            chosen_steps: BTreeMap::new(),
            notes: notes(plan),
            resampled: match (few_subjects, control) {
                (true, true) => "pairs of picture and condition, with the seed, within each set",
                (true, false) => "pairs of prompt and seed within each subject",
                (false, _) => "subjects",
            },
            few_subjects,
            control,
            columns,
            rates,
        };
        if plan.protocol == PAPER {
            let steps = |v: &CellValues| v.prompts.iter().map(|(step, _)| *step).collect();
            analysis.chosen_steps = values.iter().map(|v| (v.record.cell.id.as_str(), steps(v))).collect();
        }
        analysis.fill(&values);
        analysis
    }

    fn fill(&mut self, values: &[CellValues]) {
        let mut bootstrap = Bootstrap::default();
        let mut rows: Vec<(TableRow, Vec<&CellValues>)> = Vec::new();
        let of = |label: &str, rate: Option<f64>| -> Vec<&CellValues> {
            values
                .iter()
                .filter(|v| v.record.cell.method() == label && v.record.cell.learning_rate() == rate)
                .collect()
        };
        rows.extend(self.real_row(&mut bootstrap).map(|row| (row, Vec::new())));
        let base = of(BASE, None);
        if self.plan.cells.iter().any(|c| c.is_base()) {
            let label = if self.control { FLOOR } else { BASE };
            rows.push((self.row(label, BASE, RowKind::Base, None, &base), base));
        }
        for (number, method) in self.plan.methods.iter().enumerate() {
            let chosen = self.rates.iter().find(|r| r.method == method.label).map(|r| vec![r.rate]);
            let rates = chosen.unwrap_or_else(|| method.learning_rates.clone());
            let common = self.plan.common_rate.filter(|common| !rates.contains(common));
            for rate in rates.iter().copied().chain(common) {
                let label = if Some(rate) == common {
                    format!("{} at {rate:e}, common", method.label)
                } else if rates.len() > 1 {
                    format!("{} {rate:e}", method.label)
                } else {
                    method.label.clone()
                };
                let cells = of(&method.label, Some(rate));
                let mut row = self.row(&label, &method.label, RowKind::Method, Some(rate), &cells);
                row.method = Some(number);
                rows.push((row, cells));
            }
        }
        if let Some(first) = rows.iter().position(|(row, _)| row.kind == RowKind::Method) {
            let reference = rows[first].1.clone();
            self.reference = Some(rows[first].0.label.clone());
            for (number, (row, cells)) in rows.iter_mut().enumerate() {
                if number != first {
                    for column in &self.columns {
                        let found = self.difference(&mut bootstrap, cells, &reference, &column.key);
                        row.differences.extend(found.map(|d| (column.key.clone(), d)));
                    }
                }
            }
        }
        if self.control {
            for (row, cells) in &mut rows {
                for (key, estimate) in row.scores.iter_mut().filter(|(_, e)| e.seeds.len() == 1) {
                    let groups: Vec<Vec<f64>> = cells.iter().map(|cell| cell.values(key)).collect();
                    estimate.interval = bootstrap.interval(&groups);
                }
            }
        }
        self.rows = rows.into_iter().map(|(row, _)| row).collect();
    }

    /// The test pictures against the training pictures, or the pairs' own pictures, from the base model's records.
    fn real_row(&self, bootstrap: &mut Bootstrap) -> Option<TableRow> {
        let records: Vec<_> = self.records.iter().filter(|r| !r.real.is_empty()).collect();
        let scores: BTreeMap<String, MeanEstimate> = self
            .columns
            .iter()
            .filter_map(|column| {
                let found: Vec<f64> =
                    records.iter().filter_map(|r| r.real.get(&column.key).copied()).collect();
                let mean = mean(found.iter().copied())?;
                let of_record = |r: &&CellRecord| -> Vec<f64> {
                    r.real_pictures.iter().filter_map(|p| p.scores.get(&column.key).copied()).collect()
                };
                let groups: Vec<Vec<f64>> = records.iter().map(of_record).collect();
                let interval = bootstrap.interval(&groups);
                let cells = found.len();
                Some((
                    column.key.clone(),
                    MeanEstimate { mean, spread: None, interval, seeds: Vec::new(), cells },
                ))
            })
            .collect();
        (!scores.is_empty()).then(|| TableRow {
            label: if self.control { CEILING } else { "real training pictures" }.into(),
            kind: RowKind::Real,
            method: None,
            rate: None,
            cells: records.len(),
            planned: records.len(),
            interrupted: 0,
            budget: BudgetMeans::default(),
            scores,
            differences: BTreeMap::new(),
        })
    }

    fn row(
        &self,
        label: &str,
        method: &str,
        kind: RowKind,
        rate: Option<f64>,
        cells: &[&CellValues],
    ) -> TableRow {
        let mine = |c: &PlannedCell| c.method() == method && c.learning_rate() == rate;
        let records: Vec<_> = self.records.iter().filter(|r| mine(&r.cell)).collect();
        // Trainings of the search have no scores of the tables, and lack none.
        let scored = |r: &CellRecord, set| values::result(self.plan, r, set).is_some();
        let for_others = records.iter().filter(|r| {
            !scored(r, self.set) && [Set::Validation, Set::Test].into_iter().any(|set| scored(r, set))
        });
        let for_others = for_others.count();
        let scores = self.columns.iter().filter_map(|c| Some((c.key.clone(), estimate(cells, &c.key)?)));
        TableRow {
            label: label.to_string(),
            kind,
            method: None,
            rate,
            cells: cells.len(),
            planned: self.plan.cells.iter().filter(|c| mine(c)).count() - for_others,
            interrupted: records.iter().filter(|r| r.budget.as_ref().is_some_and(|b| b.interrupted)).count(),
            budget: budget(&records),
            scores: scores.collect(),
            differences: BTreeMap::new(),
        }
    }

    fn difference(
        &self,
        bootstrap: &mut Bootstrap,
        cells: &[&CellValues],
        reference: &[&CellValues],
        key: &str,
    ) -> Option<PairedDifference> {
        let mut subjects: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        let mut seeds: BTreeMap<u64, Vec<Vec<f64>>> = BTreeMap::new();
        for cell in cells {
            for other in reference {
                let (a, b) = (&cell.record.cell, &other.record.cell);
                // The base model is not trained: it stands beside every seed.
                if a.subject != b.subject || (a.seed() != b.seed() && !a.is_base()) {
                    continue;
                }
                let found = cell.differences(other, key);
                if !found.is_empty() {
                    subjects.entry(&a.subject).or_default().extend(&found);
                    seeds.entry(b.seed()).or_default().push(found);
                }
            }
        }
        let groups: Vec<Vec<f64>> = if self.few_subjects {
            subjects.into_values().collect()
        } else {
            vec![subjects.into_values().filter_map(mean).collect()]
        };
        let value = mean_of_means(&groups)?;
        let interval = bootstrap.interval(&groups);
        let seeds = seeds.into_iter().filter_map(|(seed, of)| Some((seed, mean_of_means(&of)?)));
        Some(PairedDifference {
            value,
            interval,
            n: groups.iter().map(Vec::len).sum(),
            seeds: seeds.collect(),
        })
    }

    /// The row of the reference.
    pub fn reference_row(&self) -> Option<&TableRow> {
        self.rows.iter().find(|row| Some(&row.label) == self.reference.as_ref())
    }

    /// Records of a row's cells.
    pub fn records_of<'b>(&'b self, row: &'b TableRow) -> impl Iterator<Item = &'b CellRecord> {
        let label = match row.method {
            Some(number) => self.plan.methods[number].label.as_str(),
            None => BASE,
        };
        self.records.iter().filter(move |r| {
            row.kind != RowKind::Real && r.cell.method() == label && r.cell.learning_rate() == row.rate
        })
    }

    /// How the comparison ran, each way once with its number of cells.
    pub fn environments(&self) -> Vec<(String, usize)> {
        let mut found: BTreeMap<String, usize> = BTreeMap::new();
        for e in self.records.iter().map(|r| &r.environment) {
            let jobs = if e.jobs > 1 { format!(", {} cells at once", e.jobs) } else { String::new() };
            let threads = if e.threads == 1 { "1 thread".into() } else { format!("{} threads", e.threads) };
            *found
                .entry(format!("hra {}, {}, {}, {threads}{jobs}", e.version, e.device, e.dtype))
                .or_default() += 1;
        }
        found.into_iter().collect()
    }
}

fn estimate(cells: &[&CellValues], key: &str) -> Option<MeanEstimate> {
    let found: Vec<(u64, f64)> =
        cells.iter().filter_map(|cell| Some((cell.record.cell.seed(), cell.value(key)?))).collect();
    let mut by_seed: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for &(seed, value) in &found {
        by_seed.entry(seed).or_default().push(value);
    }
    let seeds: Vec<(u64, f64)> = by_seed.into_iter().filter_map(|(seed, v)| Some((seed, mean(v)?))).collect();
    let of_seeds: Vec<f64> = seeds.iter().map(|(_, value)| *value).collect();
    Some(MeanEstimate {
        mean: mean(found.iter().map(|(_, v)| *v))?,
        spread: spread(&of_seeds),
        interval: None,
        seeds,
        cells: found.len(),
    })
}

fn budget(records: &[&CellRecord]) -> BudgetMeans {
    let all = || records.iter().filter_map(|r| r.budget.as_ref());
    let whole = || all().filter(|b| !b.interrupted);
    BudgetMeans {
        parameters: all().map(|b| b.parameters).max(),
        bytes: all().map(|b| b.bytes).max(),
        seconds_per_step: mean(whole().filter_map(|b| b.seconds_per_step)),
        seconds: mean(whole().filter_map(|b| b.seconds)),
        peak_memory: whole().filter_map(|b| b.peak_memory).max(),
        peak_device_memory: whole().filter_map(|b| b.peak_device_memory).max(),
    }
}

fn notes(plan: &Plan) -> Vec<String> {
    let mut notes = plan.notes.clone();
    if plan.protocol == PAPER {
        notes.push(paper::NOTE.to_string());
    }
    for subject in &plan.subjects {
        notes.extend(subject.notes.iter().map(|note| format!("{}: {note}", subject.name)));
    }
    notes
}
