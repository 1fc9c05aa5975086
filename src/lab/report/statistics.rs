//! Means, spreads and intervals of differences.
//!
//! The interval is the paired percentile bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter
//! 13): units are drawn with replacement inside their groups, the mean of the groups' means is taken, and the interval
//! holds the middle 95 % of these. Every comparison of one shape draws the same units.

use crate::lab::results::PromptScores;
use crate::platform::seed;
use std::collections::BTreeMap;
use std::sync::Arc;

/// How often units are drawn again.
pub const RESAMPLES: usize = 10_000;
/// From this many subjects up, subjects are drawn instead of pairs of prompt and seed.
pub const MANY_SUBJECTS: usize = 5;
/// Share of the resamples that the interval leaves out on each side.
const TAIL: f64 = 0.025;
/// Above this many units there is no interval: their draws would not fit into memory. No comparison has so many.
const MAX_UNITS: usize = 5_000;
/// Fewer say nothing: see [`Bootstrap::interval`].
const MIN_UNITS: usize = 5;

/// The mean; `None` of nothing.
pub fn mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0.0);
    for value in values {
        sum += value;
        count += 1.0;
    }
    (count > 0.0).then(|| sum / count)
}

/// The sample standard deviation (divided by n - 1); `None` of fewer than two values.
pub fn spread(values: &[f64]) -> Option<f64> {
    let centre = mean(values.iter().copied()).filter(|_| values.len() > 1)?;
    let squares: f64 = values.iter().map(|v| (v - centre).powi(2)).sum();
    Some((squares / (values.len() - 1) as f64).sqrt())
}

/// The mean over groups of each group's mean; `None` where a group is empty, or there is none.
pub fn mean_of_means(groups: &[Vec<f64>]) -> Option<f64> {
    let means: Option<Vec<f64>> = groups.iter().map(|group| mean(group.iter().copied())).collect();
    mean(means?)
}

/// The value below which the share `q` of sorted values lies, linear between neighbours (type 7 of Hyndman and Fan
/// 1996; numpy's default).
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = q * (sorted.len() - 1) as f64;
    let (below, part) = (at.floor() as usize, at.fract());
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (sorted[above] - sorted[below]) * part
}

/// Draws units, the same for every comparison of one shape.
#[derive(Default)]
pub struct Bootstrap {
    draws: BTreeMap<Vec<usize>, Arc<Vec<u16>>>,
}

impl Bootstrap {
    /// The 95 % interval of [`mean_of_means`] where the units of each group are drawn again; `None` for fewer than 5 units, of
    /// which all have one sign by chance too often (1 in 8 for 4), where nothing can vary, or for more than 5,000.
    pub fn interval(&mut self, groups: &[Vec<f64>]) -> Option<(f64, f64)> {
        let sizes: Vec<usize> = groups.iter().map(Vec::len).collect();
        let draws = self.units(&sizes)?;
        let means = draws
            .chunks_exact(sizes.iter().sum())
            .map(|drawn| {
                let (mut drawn, mut total) = (drawn, 0.0);
                for group in groups {
                    let (mine, rest) = drawn.split_at(group.len());
                    drawn = rest;
                    total += mine.iter().map(|&unit| group[unit as usize]).sum::<f64>() / group.len() as f64;
                }
                total / groups.len() as f64
            })
            .collect();
        Some(Self::middle(means))
    }

    /// For each resample, one after another, the numbers of the units that are drawn from groups of these sizes; `None` where
    /// [`Self::interval`] gives none.
    pub fn units(&mut self, sizes: &[usize]) -> Option<Arc<Vec<u16>>> {
        let units: usize = sizes.iter().sum();
        let nothing_varies = sizes.iter().all(|size| *size < 2);
        if nothing_varies || !(MIN_UNITS..=MAX_UNITS).contains(&units) || sizes.contains(&0) {
            return None;
        }
        Some(self.draws(sizes.to_vec()))
    }

    /// The interval that holds the middle 95 % of the values of resamples; at least one.
    pub fn middle(mut values: Vec<f64>) -> (f64, f64) {
        values.sort_by(f64::total_cmp);
        (quantile(&values, TAIL), quantile(&values, 1.0 - TAIL))
    }

    /// For each resample, for each group of these sizes, the numbers of the units drawn.
    fn draws(&mut self, sizes: Vec<usize>) -> Arc<Vec<u16>> {
        if let Some(draws) = self.draws.get(&sizes) {
            return draws.clone();
        }
        let mut draws = Vec::with_capacity(RESAMPLES * sizes.iter().sum::<usize>());
        for _ in 0..RESAMPLES {
            for &size in &sizes {
                for _ in 0..size {
                    let random = seed::derive(0, "bootstrap", draws.len() as u64);
                    // The upper half times the size: sizes are so far below 2^32 that none is favoured noticeably.
                    draws.push((((random >> 32) * size as u64) >> 32) as u16);
                }
            }
        }
        let draws = Arc::new(draws);
        self.draws.insert(sizes, draws.clone());
        draws
    }
}

/// The prompt's own score, or the mean of its pictures' (see [`PromptScores::means`]).
pub fn prompt_value(prompt: &PromptScores, key: &str) -> Option<f64> {
    let pictures = || mean(prompt.pictures.iter().filter_map(|p| p.scores.get(key).copied()));
    prompt.scores.get(key).copied().or_else(pictures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_spread_of_known_numbers() {
        // 2, 4, 4, 4, 5, 5, 7, 9: mean 5, squared deviations sum to 32.
        let values = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0];
        assert_eq!(mean(values), Some(5.0));
        assert!((spread(&values).unwrap() - (32.0_f64 / 7.0).sqrt()).abs() < 1e-12);
        assert_eq!((mean([]), spread(&[1.0])), (None, None));
        assert_eq!(mean_of_means(&[vec![1.0, 3.0], vec![5.0]]), Some(3.5));
        assert_eq!(mean_of_means(&[vec![1.0], vec![]]), None);
    }

    #[test]
    fn a_constant_difference_has_no_width() {
        assert_eq!(Bootstrap::default().interval(&[vec![0.25; 12], vec![0.25; 3]]), Some((0.25, 0.25)));
    }

    #[test]
    fn single_units_have_no_interval() {
        let mut bootstrap = Bootstrap::default();
        assert_eq!(bootstrap.interval(&[vec![1.0], vec![2.0]]), None);
        assert_eq!(bootstrap.interval(&[]), None);
        assert_eq!(bootstrap.interval(&[vec![1.0; MAX_UNITS + 1]]), None);
        assert_eq!(bootstrap.interval(&[vec![], vec![1.0, 2.0]]), None);
    }

    /// Four units of one sign are one of eight draws of chance: no interval. Ten units of which one is 1: a resample's mean is k/10 with k binomial(10, 0.1). P(k <= 2) = 0.930 and
    /// P(k <= 3) = 0.987, so the 97.5 % quantile is 0.3.
    #[test]
    fn intervals_of_counts_are_those_of_the_binomial() {
        let mut bootstrap = Bootstrap::default();
        assert_eq!(bootstrap.interval(&[vec![0.1, 0.2, 0.3, 0.4]]), None);
        let mut one_of_ten = vec![0.0; 10];
        one_of_ten[3] = 1.0;
        let (low, high) = bootstrap.interval(&[one_of_ten]).unwrap();
        assert_eq!(low, 0.0);
        assert!((high - 0.3).abs() < 1e-12, "{high}");
    }

    /// The central limit: of n units with standard deviation s (divided by n) the interval is mean -+ 1.96 s / sqrt n. Two
    /// groups: variances of the groups' means add up, divided by 4.
    #[test]
    fn intervals_of_many_units_are_normal() {
        // Quantiles of the uniform distribution on [0, 1]: variance (n^2 - 1) / (12 n^2).
        let even = |n: usize, shift: f64| -> Vec<f64> {
            (0..n).map(|i| (i as f64 + 0.5) / n as f64 + shift).collect()
        };
        let variance = |n: f64| (n * n - 1.0) / (12.0 * n * n) / n;
        let groups = [even(400, 0.0), even(100, 1.0)];
        let centre = mean_of_means(&groups).unwrap();
        assert!((centre - 1.0).abs() < 1e-12);
        let half = 1.96 * ((variance(400.0) + variance(100.0)) / 4.0).sqrt();
        let (low, high) = Bootstrap::default().interval(&groups).unwrap();
        // Standard error of a 2.5 % quantile of 10,000 draws: sqrt(0.025 0.975 / 10000) / density = 0.027 of s.
        assert!((low - (centre - half)).abs() < 0.05 * half, "{low} {}", centre - half);
        assert!((high - (centre + half)).abs() < 0.05 * half, "{high} {}", centre + half);
    }

    /// `scipy.stats.bootstrap((x,), np.mean, method="percentile", n_resamples=200000, random_state=1)` of scipy 1.17 for these ten
    /// differences.
    #[test]
    fn the_interval_is_scipys() {
        let x = vec![0.031, -0.012, 0.044, 0.007, 0.020, -0.003, 0.015, 0.051, -0.020, 0.012];
        let (low, high) = Bootstrap::default().interval(&[x]).unwrap();
        assert!((low - SCIPY.0).abs() < 6e-4 && (high - SCIPY.1).abs() < 6e-4, "{low} {high}");
    }
    const SCIPY: (f64, f64) = (0.0012, 0.0281);
}
