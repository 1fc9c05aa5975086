//! Means over cells at every place, as measured and with units drawn again.

use crate::lab::report::frontier::cells::CellPlaces;
use crate::lab::report::frontier::envelope::Envelope;
use std::collections::BTreeMap;

/// Values of a cell, `[prompt][place]`.
type PromptValues = for<'c, 'a> fn(&'c CellPlaces<'a>) -> &'c Vec<Vec<f64>>;

/// Groups of units of values at places; the mean is that over groups of the means over their units.
struct Family(Vec<Vec<Vec<f64>>>);

impl Family {
    fn sizes(&self) -> impl Iterator<Item = usize> {
        self.0.iter().map(Vec::len)
    }

    fn units(&self) -> usize {
        self.sizes().sum()
    }

    /// At each place; `drawn` are numbers of units, group after group.
    fn means(&self, drawn: Option<&[u16]>) -> Vec<f64> {
        let places = self.0.first().and_then(|group| group.first()).map_or(0, Vec::len);
        let mut means = vec![0.0; places];
        let mut rest = drawn;
        for group in &self.0 {
            let mine = rest.map(|rest| rest.split_at(group.len()));
            rest = mine.map(|(_, rest)| rest);
            let weight = 1.0 / (group.len() * self.0.len()) as f64;
            for unit in 0..group.len() {
                let unit = mine.map_or(unit, |(mine, _)| mine[unit] as usize);
                for (sum, value) in means.iter_mut().zip(&group[unit]) {
                    *sum += value * weight;
                }
            }
        }
        means
    }
}

/// The cells of a method as units that may be drawn again: subjects where there are many, else pairs of seed and prompt in
/// each subject.
pub struct PlaceSample {
    likeness: Family,
    drift: Family,
    /// Likeness and drift are of the same units.
    of_subjects: bool,
}

impl PlaceSample {
    /// Of cells; `few_subjects` says which units.
    pub fn new(cells: &[&CellPlaces], few_subjects: bool) -> Self {
        let family = |of: PromptValues| {
            let subjects = by_subject(cells, of);
            if few_subjects {
                return subjects;
            }
            let whole = |prompts: Vec<Vec<f64>>| Family(vec![prompts]).means(None);
            Family(vec![subjects.0.into_iter().map(whole).collect()])
        };
        Self {
            likeness: family(|cell| &cell.likeness),
            drift: family(|cell| &cell.drift),
            of_subjects: !few_subjects,
        }
    }

    /// How many units each group to draw from has.
    pub fn sizes(&self) -> Vec<usize> {
        let drift = self.drift.sizes().filter(|_| !self.of_subjects);
        self.likeness.sizes().chain(drift).collect()
    }

    /// `(drift, likeness)` at each place; `drawn` are numbers of units, group after group.
    pub fn points(&self, drawn: Option<&[u16]>) -> Vec<(f64, f64)> {
        let (first, second) = match drawn {
            Some(drawn) if !self.of_subjects => {
                let (first, second) = drawn.split_at(self.likeness.units());
                (Some(first), Some(second))
            }
            drawn => (drawn, drawn),
        };
        self.drift.means(second).into_iter().zip(self.likeness.means(first)).collect()
    }

    /// The curve above the points.
    pub fn envelope(&self, drawn: Option<&[u16]>) -> Option<Envelope> {
        Envelope::new(&self.points(drawn))
    }
}

/// A group for each subject, of the values of its cells' prompts.
fn by_subject(cells: &[&CellPlaces], of: PromptValues) -> Family {
    let mut subjects: BTreeMap<&str, Vec<Vec<f64>>> = BTreeMap::new();
    for cell in cells {
        subjects.entry(cell.pair().0).or_default().extend(of(cell).iter().cloned());
    }
    Family(subjects.into_values().collect())
}

/// Means at each place over subjects of the means over their cells' prompts; `None` where some cell has no values.
pub fn means(cells: &[&CellPlaces], of: PromptValues) -> Option<Vec<f64>> {
    if cells.iter().any(|cell| of(cell).is_empty()) {
        return None;
    }
    Some(by_subject(cells, of).means(None))
}

/// Likeness on validation at each place: the mean over subjects, of those that have pictures of their own, of the means over their
/// cells.
pub fn validation(cells: &[&CellPlaces]) -> Option<Vec<f64>> {
    let mut subjects: BTreeMap<&str, Vec<Vec<f64>>> = BTreeMap::new();
    for cell in cells.iter().filter(|cell| !cell.validation.is_empty()) {
        subjects.entry(cell.pair().0).or_default().push(cell.validation.clone());
    }
    (!subjects.is_empty()).then(|| Family(subjects.into_values().collect()).means(None))
}
