//! The loss that is shown while a run trains: a mean over its last steps, since a single step's says little.

use std::collections::VecDeque;
use std::fmt;

/// So many steps are averaged over, at least, once they are there.
const STEPS: f64 = 50.0;

/// A running mean; shown as `loss 0.1377 (mean of last 50) `, and as nothing before the first record.
#[derive(Default)]
pub struct RecentLoss {
    /// Sums of the loss over the steps between two records, with the number of steps; the oldest first.
    records: VecDeque<(f64, f64)>,
}

impl RecentLoss {
    /// Adds the sum of the loss over `steps` steps, and forgets what lies [`STEPS`] back.
    pub fn add(&mut self, sum: f64, steps: f64) {
        self.records.push_back((sum, steps));
        while self.records.front().is_some_and(|oldest| self.steps() - oldest.1 >= STEPS) {
            self.records.pop_front();
        }
    }

    fn steps(&self) -> f64 {
        self.records.iter().map(|(_, steps)| steps).sum()
    }
}

impl fmt::Display for RecentLoss {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let steps = self.steps();
        if steps == 0.0 {
            return Ok(());
        }
        let sum: f64 = self.records.iter().map(|(sum, _)| sum).sum();
        write!(f, "loss {:.4} (mean of last {steps}) ", sum / steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_over_the_last_fifty_steps_however_often_they_are_recorded() {
        for (every, steps, shown) in [(1, 200, "50"), (20, 200, "60"), (10, 30, "30"), (100, 300, "100")] {
            let mut recent = RecentLoss::default();
            assert_eq!(recent.to_string(), "");
            // The loss of step i is i.
            for end in (every..=steps).step_by(every) {
                recent.add((end - every + 1..=end).map(|i| i as f64).sum(), every as f64);
            }
            let averaged: usize = shown.parse().unwrap();
            let mean = (steps - averaged + 1..=steps).sum::<usize>() as f64 / averaged as f64;
            assert_eq!(
                recent.to_string(),
                format!("loss {mean:.4} (mean of last {shown}) "),
                "every {every}"
            );
        }
    }
}
