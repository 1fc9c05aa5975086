//! Losses added up on the device between two records, and where the first number was that is not finite: training waits for the
//! device when they are read, and not before.

use crate::train::run::Sums;
use tch::{Device, Kind, Tensor};

/// What is added up, as [`Sums`] has it: in f64, so that neither the device nor the number of reads changes a mean.
pub struct Totals {
    /// Steps.
    count: f64,
    /// Loss, its instance and prior parts, regulariser: `(4)`, f64.
    values: Tensor,
    /// Norm of the last step's gradient.
    norm: Tensor,
    /// The first steps whose loss and whose gradient were not finite, 0 for none: `(2)`, i64.
    bad: Tensor,
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
    pub fn new(sums: &Sums, device: Device) -> Self {
        let values = Tensor::from_slice(&[sums.loss, sums.instance, sums.prior, sums.regulariser]);
        Self {
            count: sums.count,
            values: values.to_device(device),
            norm: Tensor::zeros([], (Kind::Float, device)),
            bad: Tensor::zeros([2], (Kind::Int64, device)),
        }
    }

    /// Adds `share` of a batch's loss and its parts, scalars.
    pub fn add(&mut self, step: i64, parts: [Option<&Tensor>; 4], share: f64) {
        let _guard = tch::no_grad_guard();
        let zero = Tensor::zeros([], (Kind::Double, self.values.device()));
        let parts = parts.map(|part| part.map_or_else(|| zero.shallow_clone(), |p| p.to_kind(Kind::Double)));
        self.mark(0, &parts[0], step);
        self.values += Tensor::stack(&parts, 0) * share;
    }

    /// Ends a step with the norm of its gradient, a scalar.
    pub fn end_step(&mut self, step: i64, norm: &Tensor) {
        let _guard = tch::no_grad_guard();
        self.mark(1, norm, step);
        self.norm = norm.shallow_clone();
        self.count += 1.0;
    }

    /// Remembers the step where `value` is not finite, unless one was before.
    fn mark(&self, place: i64, value: &Tensor, step: i64) {
        let mut bad = self.bad.get(place);
        let is_first = value.isfinite().logical_not().logical_and(&bad.eq(0));
        let _ = bad.masked_fill_(&is_first, step);
    }

    /// Waits for the device. `clear` begins anew after it.
    pub fn read(&mut self, clear: bool) -> Reading {
        let _guard = tch::no_grad_guard();
        let last = self.norm.to_kind(Kind::Double).reshape([1]);
        let all = Tensor::cat(&[&self.values, &last, &self.bad.to_kind(Kind::Double)], 0);
        let all = all.to_device(Device::Cpu);
        let all: Vec<f64> = (0..7).map(|i| all.double_value(&[i])).collect();
        let sums =
            Sums { count: self.count, loss: all[0], instance: all[1], prior: all[2], regulariser: all[3] };
        let bad = [(all[5], "the loss"), (all[6], "the gradient")];
        // Of one step the loss is told, which comes first.
        let first = bad.into_iter().filter(|(step, _)| *step > 0.0).min_by(|a, b| a.0.total_cmp(&b.0));
        if clear {
            self.count = 0.0;
            let _ = self.values.zero_();
        }
        Reading { sums, gradient_norm: all[4], not_finite: first.map(|(step, what)| (step as i64, what)) }
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
        let mut totals = Totals::new(&before, Device::Cpu);
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
        let mut totals = Totals::new(&Sums::default(), Device::Cpu);
        for (step, loss, norm) in
            [(1, 1.0, 1.0), (2, 1.0, f64::INFINITY), (3, f64::NAN, f64::NAN), (4, 1.0, 1.0)]
        {
            totals.add(step, [Some(&scalar(loss)), None, None, None], 1.0);
            totals.end_step(step, &scalar(norm));
        }
        assert_eq!(totals.read(true).not_finite, Some((2, "the gradient")));
        let mut totals = Totals::new(&Sums::default(), Device::Cpu);
        totals.add(7, [Some(&scalar(f64::NEG_INFINITY)), None, None, None], 1.0);
        totals.end_step(7, &scalar(f64::NAN));
        assert_eq!(totals.read(false).not_finite, Some((7, "the loss")));
    }
}
