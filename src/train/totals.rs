//! Losses kept on the device between two records: training waits for the device when they are read, and not before.

use crate::train::run::Sums;
use tch::{Device, Kind, Tensor};

/// So many tensors of a few numbers are kept before they are read all the same.
const MOST_KEPT: usize = 2048;

/// What is added up between two records, in f64, so that the number of reads does not change a mean.
pub struct Totals {
    sums: Sums,
    /// Norm of the last step's gradient.
    norm: f64,
    /// The first number that is not finite, its step and its name.
    not_finite: Option<(i64, &'static str)>,
    /// On the device, in the order of the steps.
    kept: Vec<(Kept, Tensor)>,
}

/// What a tensor that was kept holds, f32.
enum Kept {
    /// A batch's loss and its parts, those that are there, and its share of the step.
    Loss { step: i64, there: [bool; 4], share: f64 },
    /// The norm of a step's gradient.
    Norm { step: i64 },
}

/// What [`Totals`] came to.
pub struct Reading {
    /// Since the last record.
    pub sums: Sums,
    /// Norm of the last step's gradient, before clipping.
    pub gradient_norm: f64,
    /// The first step with a number that is not finite, and which it was.
    pub not_finite: Option<(i64, &'static str)>,
}

impl Totals {
    /// Goes on from the sums of a checkpoint.
    pub fn new(sums: &Sums) -> Self {
        Self { sums: sums.clone(), norm: 0.0, not_finite: None, kept: Vec::new() }
    }

    /// Adds `share` of a batch's loss and its parts, scalars.
    pub fn add(&mut self, step: i64, parts: [Option<&Tensor>; 4], share: f64) {
        let _guard = tch::no_grad_guard();
        let values: Vec<&Tensor> = parts.iter().copied().flatten().collect();
        let there = parts.map(|part| part.is_some());
        self.keep(Kept::Loss { step, there, share }, Tensor::stack(&values, 0));
    }

    /// Ends a step with the norm of its gradient, a scalar.
    pub fn end_step(&mut self, step: i64, norm: &Tensor) {
        self.keep(Kept::Norm { step }, norm.detach().reshape([1]));
    }

    fn keep(&mut self, kept: Kept, values: Tensor) {
        self.kept.push((kept, values));
        if self.kept.len() >= MOST_KEPT {
            self.add_up();
        }
    }

    /// Waits for the device. `clear` begins anew after it.
    pub fn read(&mut self, clear: bool) -> Reading {
        self.add_up();
        let sums = self.sums.clone();
        if clear {
            self.sums = Sums::default();
        }
        Reading { sums, gradient_norm: self.norm, not_finite: self.not_finite }
    }

    fn add_up(&mut self) {
        let kept = std::mem::take(&mut self.kept);
        if kept.is_empty() {
            return;
        }
        let all: Vec<&Tensor> = kept.iter().map(|(_, values)| values).collect();
        let all = Tensor::cat(&all, 0).to_device(Device::Cpu).to_kind(Kind::Double);
        let mut values = Vec::<f64>::try_from(all).unwrap_or_default().into_iter();
        let mut next = || values.next().unwrap_or(f64::NAN);
        for (what, _) in kept {
            match what {
                Kept::Loss { step, there, share } => {
                    let [loss, instance, prior, regulariser] =
                        there.map(|there| if there { next() } else { 0.0 });
                    self.sums.loss += loss * share;
                    self.sums.instance += instance * share;
                    self.sums.prior += prior * share;
                    self.sums.regulariser += regulariser * share;
                    self.mark(step, "the loss", loss);
                }
                Kept::Norm { step } => {
                    self.norm = next();
                    self.sums.count += 1.0;
                    self.mark(step, "the gradient", self.norm);
                }
            }
        }
    }

    fn mark(&mut self, step: i64, what: &'static str, value: f64) {
        if !value.is_finite() {
            self.not_finite.get_or_insert((step, what));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scalar(value: f64) -> Tensor {
        Tensor::from(value).to_kind(Kind::Float)
    }

    #[test]
    fn sums_go_on_from_a_checkpoint_and_begin_anew_when_they_are_read() {
        let before = Sums { count: 1.0, loss: 2.0, instance: 1.0, prior: 1.0, regulariser: 0.0 };
        let mut totals = Totals::new(&before);
        let (loss, instance) = (scalar(0.5), scalar(0.25));
        for _ in 0..2 {
            totals.add(2, [Some(&loss), Some(&instance), None, None], 0.5);
        }
        totals.end_step(2, &scalar(3.0));
        let read = totals.read(true);
        let expected = Sums { count: 2.0, loss: 2.5, instance: 1.25, prior: 1.0, regulariser: 0.0 };
        assert_eq!((read.sums, read.gradient_norm, read.not_finite), (expected, 3.0, None));
        assert_eq!(totals.read(false).sums, Sums::default());
    }

    #[test]
    fn the_first_number_that_is_not_finite_is_told_with_its_step() {
        let mut totals = Totals::new(&Sums::default());
        for (step, loss, norm) in
            [(1, 1.0, 1.0), (2, 1.0, f64::INFINITY), (3, f64::NAN, f64::NAN), (4, 1.0, 1.0)]
        {
            totals.add(step, [Some(&scalar(loss)), None, None, None], 1.0);
            totals.end_step(step, &scalar(norm));
        }
        assert_eq!(totals.read(true).not_finite, Some((2, "the gradient")));
        let mut totals = Totals::new(&Sums::default());
        totals.add(7, [Some(&scalar(f64::NEG_INFINITY)), None, None, None], 1.0);
        totals.end_step(7, &scalar(f64::NAN));
        assert_eq!(totals.read(false).not_finite, Some((7, "the loss")));
    }
}
