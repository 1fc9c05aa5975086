//! From records to the values that tables use: which step and set of a cell counts, and which prompts are paired.

use crate::lab::report::paper;
use crate::lab::report::statistics::{mean, prompt_value};
use crate::lab::results::{Better, CellRecord, Evaluation, Plan, PromptScores, SCORES, Set};
use std::collections::BTreeSet;

/// Protocol of the HRA authors' scripts, see [`paper`].
pub const PAPER: &str = "paper";

/// A score that at least one record has.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreColumn {
    /// Its key.
    pub key: String,
    /// Its heading.
    pub title: String,
    /// -1 where less is better, 1 where more is, else 0.
    pub sign: i8,
    /// One sentence.
    pub about: String,
    /// Digits behind the point.
    pub digits: usize,
}

/// Every score of the records, in the order of [`SCORES`]; unknown ones come last.
pub fn columns(records: &[CellRecord]) -> Vec<ScoreColumn> {
    let evaluations = records.iter().flat_map(|r| &r.evaluations);
    let prompts = evaluations.clone().flat_map(|e| e.prompts.iter().chain(&e.drift));
    let of_prompts =
        prompts.flat_map(|p| p.scores.keys().chain(p.pictures.iter().flat_map(|x| x.scores.keys())));
    let of_wholes = evaluations.flat_map(|e| e.scores.keys());
    columns_of(of_prompts.chain(of_wholes).chain(records.iter().flat_map(|r| r.real.keys())))
}

/// The columns of these keys.
pub fn columns_of<'a>(keys: impl Iterator<Item = &'a String>) -> Vec<ScoreColumn> {
    let mut found: BTreeSet<&str> = keys.map(String::as_str).collect();
    let mut columns = Vec::new();
    for kind in SCORES.iter().filter(|kind| found.remove(kind.key)) {
        let sign = match kind.better {
            Better::Higher => 1,
            Better::Lower => -1,
            Better::Neither => 0,
        };
        let digits = match kind.key {
            "drift" => 2,
            "held_out_loss" => 4,
            _ => 3,
        };
        let (key, title, about) = (kind.key.into(), kind.title.into(), kind.about.into());
        columns.push(ScoreColumn { key, title, sign, about, digits });
    }
    let unknown = |key: &str| ScoreColumn {
        key: key.into(),
        title: key.into(),
        sign: 0,
        about: "unknown to this version".into(),
        digits: 3,
    };
    columns.extend(found.into_iter().map(unknown));
    columns
}

/// The set that the tables use: test, or where no training was scored on it, validation.
pub fn table_set(records: &[CellRecord]) -> Set {
    let tested = |r: &&CellRecord| r.evaluations.iter().any(|e| e.set == Set::Test);
    let trained = records.iter().filter(|r| !r.cell.is_base());
    let any_trained = trained.clone().any(|r| !r.evaluations.is_empty());
    let found =
        if any_trained { trained.clone().any(|r| tested(&r)) } else { records.iter().any(|r| tested(&r)) };
    if found || !any_trained { Set::Test } else { Set::Validation }
}

/// The evaluation that counts as the cell's result: of the plan's last step; the base model's only one.
pub fn result<'a>(plan: &Plan, record: &'a CellRecord, set: Set) -> Option<&'a Evaluation> {
    let last = if !record.cell.is_base() { plan.steps.last().copied() } else { None };
    record.evaluations.iter().rev().find(|e| e.set == set && last.is_none_or(|step| e.step == step))
}

/// What one cell gave, prompt by prompt.
pub struct CellValues<'a> {
    /// The cell's record.
    pub record: &'a CellRecord,
    /// Prompts with the subject, each with the step after which it was drawn.
    pub prompts: Vec<(i64, &'a PromptScores)>,
    /// Prompts without it.
    drift: Vec<&'a PromptScores>,
    whole: &'a Evaluation,
}

impl<'a> CellValues<'a> {
    /// `None` where the cell was not scored on that set.
    pub fn new(plan: &Plan, record: &'a CellRecord, set: Set) -> Option<Self> {
        let whole = result(plan, record, set)?;
        let prompts = if plan.protocol == PAPER {
            let steps: Vec<&Evaluation> = record.evaluations.iter().filter(|e| e.set == set).collect();
            paper::chosen(&steps)
        } else {
            whole.prompts.iter().map(|p| (whole.step, p)).collect()
        };
        Some(Self { record, prompts, drift: whole.drift.iter().collect(), whole })
    }

    /// The mean over prompts of a score; where no prompt has it, the evaluation's own.
    pub fn value(&self, key: &str) -> Option<f64> {
        let of_prompts = mean(self.prompts.iter().filter_map(|(_, p)| prompt_value(p, key)));
        let of_drift = || mean(self.drift.iter().filter_map(|p| prompt_value(p, key)));
        of_prompts.or_else(of_drift).or_else(|| self.whole.scores.get(key).copied())
    }

    /// A score of each prompt with the subject that has it.
    pub fn values(&self, key: &str) -> Vec<f64> {
        self.prompts.iter().filter_map(|(_, p)| prompt_value(p, key)).collect()
    }

    /// Differences of a score from another cell's, one for each prompt that both have, of the pictures that both have.
    pub fn differences(&self, other: &Self, key: &str) -> Vec<f64> {
        let subject = self.prompts.iter().zip(&other.prompts).map(|((_, a), (_, b))| (*a, *b));
        let drift = self.drift.iter().zip(&other.drift).map(|(a, b)| (*a, *b));
        let found: Vec<f64> =
            subject.chain(drift).filter_map(|(a, b)| prompt_difference(a, b, key)).collect();
        let whole = || Some(self.whole.scores.get(key)? - other.whole.scores.get(key)?);
        let has_prompts = |cell: &Self| {
            cell.prompts
                .iter()
                .map(|(_, p)| *p)
                .chain(cell.drift.iter().copied())
                .any(|p| prompt_value(p, key).is_some())
        };
        if found.is_empty() && !has_prompts(self) && !has_prompts(other) {
            return whole().into_iter().collect();
        }
        found
    }
}

/// `a - b`, of the prompt's own score or of the pictures of the same number.
fn prompt_difference(a: &PromptScores, b: &PromptScores, key: &str) -> Option<f64> {
    if let (Some(a), Some(b)) = (a.scores.get(key), b.scores.get(key)) {
        return Some(a - b);
    }
    let pairs = a.pictures.iter().zip(&b.pictures);
    mean(pairs.filter_map(|(a, b)| Some(a.scores.get(key)? - b.scores.get(key)?)))
}
