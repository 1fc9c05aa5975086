//! Numbers and findings in words, the same in every form of the report.

use crate::lab::report::frontier::Matched;
use crate::lab::report::search::{BestRate, TriedRate};
use crate::lab::report::table::{
    Analysis, BudgetMeans, CEILING, FLOOR, MeanEstimate, PairedDifference, RowKind, TableRow,
};
use crate::lab::report::values::{PAPER, ScoreColumn};
use crate::lab::results::{self, PlannedCell, Set};

/// For what a row does not have.
pub const NONE: &str = "-";

/// `0.612 ± 0.010` or `0.612 [0.590, 0.634]`; without spread and interval the mean alone.
pub fn estimate(estimate: &MeanEstimate, digits: usize) -> String {
    let spread = estimate.spread.map(|s| format!(" ± {s:.digits$}"));
    let interval = || Some(format!(" {}", interval(estimate.interval?, digits)));
    format!("{:.digits$}{}", estimate.mean, spread.or_else(interval).unwrap_or_default())
}

/// `[0.590, 0.634]`.
pub fn interval((low, high): (f64, f64), digits: usize) -> String {
    format!("[{low:.digits$}, {high:.digits$}]")
}

/// `+0.012`.
pub fn signed(value: f64, digits: usize) -> String {
    format!("{value:+.digits$}").replace('-', "\u{2212}")
}

/// `+0.012 [+0.004, +0.020]`.
pub fn difference(d: &PairedDifference, digits: usize) -> String {
    match d.interval {
        Some((low, high)) => {
            format!("{} [{}, {}]", signed(d.value, digits), signed(low, digits), signed(high, digits))
        }
        None => signed(d.value, digits),
    }
}

/// `0.401`, with how much that is more than the reference: `0.401 (+0.020 [+0.004, +0.031])`.
pub fn matched(value: &Matched, digits: usize) -> String {
    let more = value.difference.map(|difference| match value.interval {
        Some((low, high)) => {
            format!(" ({} [{}, {}])", signed(difference, digits), signed(low, digits), signed(high, digits))
        }
        None => format!(" ({})", signed(difference, digits)),
    });
    format!("{:.digits$}{}", value.value, more.unwrap_or_default())
}

/// What an interval says.
pub fn verdict(d: &PairedDifference, column: &ScoreColumn) -> &'static str {
    match (d.interval, d.seen(), d.value > 0.0, column.sign) {
        (None, ..) => "no interval",
        (_, false, ..) => "no difference seen",
        (_, _, true, 1) | (_, _, false, -1) => "better",
        (_, _, true, -1) | (_, _, false, 1) => "worse",
        (_, _, true, _) => "higher",
        (_, _, false, _) => "lower",
    }
}

/// The score's heading with the way it is better.
pub fn heading(column: &ScoreColumn) -> String {
    match column.sign {
        1 => format!("{} \u{2191}", column.title),
        -1 => format!("{} \u{2193}", column.title),
        _ => column.title.clone(),
    }
}

/// A column of budgets.
pub struct BudgetColumn {
    /// Its heading.
    pub title: &'static str,
    /// One sentence.
    pub about: &'static str,
    /// Its value, in the heading's unit.
    pub value: fn(&BudgetMeans) -> Option<f64>,
    /// Its value in words.
    pub text: fn(f64) -> String,
}

/// Columns of budgets; those that no row fills are left out of the tables.
pub const BUDGET: [BudgetColumn; 6] = [
    BudgetColumn {
        title: "parameters",
        about: "trained values",
        value: |b| b.parameters.map(|v| v as f64),
        text: count,
    },
    BudgetColumn {
        title: "MB",
        about: "on disk, of what is needed beside the base model (1 MB = 10^6 bytes)",
        value: |b| b.bytes.map(|v| v as f64 / 1e6),
        text: significant,
    },
    BudgetColumn {
        title: "s/step",
        about: "seconds for an optimiser step, mean of the trainings that were not interrupted",
        value: |b| b.seconds_per_step,
        text: significant,
    },
    BudgetColumn {
        title: "minutes",
        about: "minutes for a training, mean of those that were not interrupted",
        value: |b| b.seconds.map(|v| v / 60.0),
        text: significant,
    },
    BudgetColumn {
        title: "memory GB",
        about: "largest memory of the training process",
        value: |b| b.peak_memory.map(|v| v as f64 / 1e9),
        text: significant,
    },
    BudgetColumn {
        title: "GPU GB",
        about: "largest memory of the GPU",
        value: |b| b.peak_device_memory.map(|v| v as f64 / 1e9),
        text: significant,
    },
];

impl Analysis<'_> {
    /// The columns of budgets that some row fills.
    pub fn budget_columns(&self) -> Vec<&'static BudgetColumn> {
        BUDGET.iter().filter(|c| self.rows.iter().any(|row| (c.value)(&row.budget).is_some())).collect()
    }

    /// Whether the table has a column of learning rates: where a method's was chosen among several.
    pub fn has_rates(&self) -> bool {
        self.plan.methods.iter().any(|m| m.learning_rates.len() > 1)
    }

    /// For each other method, where the reference stands against it: a sentence each.
    pub fn findings(&self) -> Vec<String> {
        let Some(reference) = &self.reference else { return Vec::new() };
        let others = self.rows.iter().filter(|row| row.kind != RowKind::Real && !row.differences.is_empty());
        others.map(|row| format!("{reference} against {}: {}", row.label, self.standing(row))).collect()
    }

    /// The differences are the row's minus the reference's: where the row is better, the reference is worse.
    fn standing(&self, row: &TableRow) -> String {
        let mut groups: [(&str, Vec<String>); 6] = [
            ("better on", Vec::new()),
            ("worse on", Vec::new()),
            ("higher on", Vec::new()),
            ("lower on", Vec::new()),
            ("no difference seen on", Vec::new()),
            ("too few values for an interval on", Vec::new()),
        ];
        for column in &self.columns {
            let Some(difference) = row.differences.get(&column.key) else { continue };
            let (group, told) = match verdict(difference, column) {
                "worse" => (0, true),
                "better" => (1, true),
                "lower" => (2, true),
                "higher" => (3, true),
                "no difference seen" => (4, false),
                _ => (5, false),
            };
            let by = signed(-difference.value, column.digits);
            let by = if told { format!(" ({by})") } else { String::new() };
            groups[group].1.push(format!("{}{by}", column.title));
        }
        let said = groups.iter().filter(|(_, on)| !on.is_empty());
        said.map(|(how, on)| format!("{how} {}", on.join(", "))).collect::<Vec<_>>().join("; ")
    }

    /// How means, spreads and intervals were made, a sentence each.
    pub fn method_notes(&self) -> Vec<String> {
        let plan = self.plan;
        let mut notes = if self.control { self.control_notes() } else { self.subject_notes() };
        for method in &plan.methods {
            let settings: Vec<String> = method
                .settings
                .iter()
                .filter(|(key, _)| *key != "learning_rate")
                .map(|(k, v)| format!("{k} {v}"))
                .collect();
            let rates: Vec<String> = method.learning_rates.iter().map(|rate| format!("{rate:e}")).collect();
            notes.push(format!(
                "{}: {}; learning rate {}",
                method.label,
                settings.join(", "),
                rates.join(", ")
            ));
        }
        let ways = self.environments().len();
        if ways > 1 {
            notes.push(format!(
                "the cells ran in {ways} different ways (see where it ran): times and memory compare within one of them only"
            ));
        }
        if let Some(reference) = &self.reference {
            let intervals =
                self.rows.iter().flat_map(|r| r.differences.values()).filter(|d| d.interval.is_some());
            let intervals = intervals.count();
            let paired = if self.control {
                "pair of picture and condition, seed and picture"
            } else {
                "subject, prompt, seed and picture"
            };
            notes.push(format!(
                "differences are to {reference}, paired by {paired}, with the 95 % interval of a percentile \
                 bootstrap (10,000 resamples of {}); where the interval holds 0 no difference was seen",
                self.resampled
            ));
            if self.control {
                notes.push(
                    "the intervals are over pairs: they say nothing of other trainings, for which there are seeds, or other data"
                        .into(),
                );
            } else if self.few_subjects {
                notes.push(
                    "with fewer than five subjects the intervals say nothing of other subjects, and pictures of one training \
                     are not independent: look at each seed's own value too"
                        .into(),
                );
            }
            if intervals > 1 {
                notes.push(format!(
                    "the report holds {intervals} intervals of 95 %: were there no differences at all, about one in twenty \
                     would still exclude 0"
                ));
            }
        }
        if self.searched().next().is_some() {
            notes.push(format!(
                "learning rates were chosen by validation prompts and pictures alone ({}), never by test pictures",
                self.objective()
            ));
        }
        notes
    }

    /// What the rows and values of a comparison of subjects are.
    fn subject_notes(&self) -> Vec<String> {
        let plan = self.plan;
        let mut notes = vec![format!(
            "{}, {}; a value is the mean over subjects and seeds of the mean over prompts, ± the sample standard deviation over \
             seeds of each seed's mean",
            counted(plan.subjects.len(), "subject"),
            counted(plan.seeds.len(), "seed"),
        )];
        if self.rows.iter().any(|row| row.kind == RowKind::Real) {
            notes.push(
                "real training pictures: the pictures that are trained on, scored against the test pictures"
                    .into(),
            );
        }
        notes
    }

    /// What the rows and values of a comparison of control are.
    fn control_notes(&self) -> Vec<String> {
        let plan = self.plan;
        let controls = plan.subjects.iter().filter_map(|s| Some((&s.name, s.control.as_ref()?)));
        let mut notes = vec![format!(
            "{}, {}; a value is the mean over pairs, with its 95 % interval of a percentile bootstrap over pairs where there is one \
             seed, else ± the sample standard deviation over seeds; where the intervals of two rows are apart, so are their means",
            counted(plan.subjects.len(), "set of pairs"),
            counted(plan.seeds.len(), "seed"),
        )];
        notes.extend(controls.map(|(name, control)| {
            format!(
                "{name}: condition {}, trained on {}, {} for the tables",
                control.condition,
                counted(control.trained_pairs, "pair"),
                counted(control.test.pictures.len(), "pair")
            )
        }));
        notes.push(
            "every pair is drawn with its caption and its condition, and once more with the condition of another pair (shuffled); \
             the noise belongs to the pair, for all methods alike"
                .into(),
        );
        if self.rows.iter().any(|row| row.kind == RowKind::Real) {
            notes.push(format!(
                "{CEILING}: the pairs' own pictures scored as drawn ones; shuffled, the picture of the other pair: what pictures \
                 agree by chance"
            ));
        }
        if self.rows.iter().any(|row| row.kind == RowKind::Base) {
            notes.push(format!("{FLOOR}: the captions drawn by the base model, which sees no condition"));
        }
        notes
    }

    /// The methods for which several learning rates have validation scores.
    pub fn searched(&self) -> impl Iterator<Item = &BestRate> {
        self.rates.iter().filter(|r| r.rates.len() > 1)
    }

    /// The objective of learning rates: `1 dino + 0.5 clip_t`.
    pub fn objective(&self) -> String {
        if let Some(drift) = self.plan.search_drift {
            return format!(
                "the most likeness with a drift of {drift}, along the grid of scales and checkpoints, of the rates that reach it"
            );
        }
        let terms: Vec<String> = self.plan.objective.iter().map(|(key, w)| format!("{w} {key}")).collect();
        format!("the largest {}", terms.join(" + "))
    }

    /// What is not there, a sentence each.
    pub fn gaps(&self) -> Vec<String> {
        let mut gaps = Vec::new();
        let names = |cells: &[&PlannedCell]| {
            let mut names: Vec<&str> = cells.iter().take(20).map(|c| c.id.as_str()).collect();
            if cells.len() > 20 {
                names.push("..");
            }
            names.join(", ")
        };
        if !self.missing.is_empty() {
            let (count, of) = (self.missing.len(), self.plan.cells.len());
            gaps.push(format!(
                "{count} of {} not there yet: {}",
                results::cell_count(of),
                names(&self.missing)
            ));
        }
        if !self.unscored.is_empty() {
            let count = self.unscored.len();
            gaps.push(format!(
                "{} without scores after the last step: {}",
                results::cell_count(count),
                names(&self.unscored)
            ));
        }
        let failed = self.records.iter().filter_map(|r| Some((&r.cell.id, r.failure.as_ref()?)));
        gaps.extend(failed.take(20).map(|(id, why)| format!("{id} gave no result: {why}")));
        let interrupted: Vec<&PlannedCell> = self
            .records
            .iter()
            .filter(|r| r.budget.as_ref().is_some_and(|b| b.interrupted))
            .map(|r| &r.cell)
            .collect();
        if !interrupted.is_empty() {
            let count = interrupted.len();
            gaps.push(format!(
                "{} interrupted and gone on with; times and memory do not count: {}",
                results::cell_count(count),
                names(&interrupted)
            ));
        }
        gaps
    }

    /// Warnings about the search of learning rates, a sentence each.
    pub fn rate_warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for best in self.searched() {
            if best.at_edge {
                warnings.push(format!(
                    "{}: the best learning rate {:e} is at the edge of those that were tried; widen the grid",
                    best.method, best.rate
                ));
            }
            let short: Vec<String> =
                best.rates.iter().filter(|r| r.cells < r.planned).map(|r| format!("{:e}", r.rate)).collect();
            if !short.is_empty() {
                warnings.push(format!(
                    "{}: cells are missing at learning rate {}",
                    best.method,
                    short.join(", ")
                ));
            }
        }
        warnings
    }

    /// Which pictures, prompts and step the tables are about.
    pub fn heading(&self) -> String {
        let step = match self.plan.steps.last() {
            _ if self.plan.protocol == PAPER => ", at the step chosen for each prompt".to_string(),
            Some(step) => format!(", after {step} steps"),
            None => String::new(),
        };
        let what = if self.control { "pairs" } else { "pictures and prompts" };
        match self.set {
            Set::Test => format!("Test {what}{step}"),
            Set::Validation => format!("Validation {what}{step}; nothing was scored on the test set"),
        }
    }
}

/// An objective, with its standard deviation over seeds where there are several.
pub fn objective_of(rate: &TriedRate) -> String {
    let spread = rate.spread.map_or_else(String::new, |spread| format!(" ± {spread:.4}"));
    format!("{:.4}{spread}", rate.objective)
}

/// `0.4712 at 1e-3 (6 of 6 cells)`, or with the largest drift: `(6 of 6 cells, to drift 15.9)`.
pub fn tried(rate: &TriedRate) -> String {
    format!(
        "{} at {:e} ({} of {}{})",
        objective_of(rate),
        rate.rate,
        rate.cells,
        results::cell_count(rate.planned),
        reach_of(rate)
    )
}

/// How far a rate's trainings drift, where that was asked for: `, to drift 15.9`.
pub fn reach_of(rate: &TriedRate) -> String {
    rate.reach.map_or_else(String::new, |reach| format!(", to drift {reach:.1}"))
}

/// The rate with what was tried.
pub fn rate_line(best: &BestRate) -> String {
    let all: Vec<String> = best.rates.iter().map(tried).collect();
    format!("{}: {:e}; {}", best.method, best.rate, all.join(", "))
}

/// `1 pair`, `3 pairs`; of `set of pairs` it is the sets that are several.
fn counted(count: usize, what: &str) -> String {
    let (first, rest) = what.split_once(' ').map_or((what, String::new()), |(a, b)| (a, format!(" {b}")));
    format!("{count} {first}{}{rest}", if count == 1 { "" } else { "s" })
}

/// A count with its thousands apart by narrow spaces.
pub fn count(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// Three significant digits or all before the point.
pub fn significant(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    let digits = (2 - value.abs().log10().floor() as i64).clamp(0, 9) as usize;
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_words() {
        assert_eq!(count(1_234_567.0).replace('\u{202f}', ","), "1,234,567");
        assert_eq!([0.0, 999.0].map(count), ["0", "999"]);
        assert_eq!([0.0412, 1.5, 1234.6].map(significant), ["0.0412", "1.50", "1235"]);
        assert_eq!(signed(-0.0123, 3), "\u{2212}0.012");
    }
}
