//! Losses kept on the device between two records: training waits for the device when they are read, and not before.

use crate::platform::host;
use crate::train::loss_scale::LEAST;
use crate::train::run::Sums;
use tch::Tensor;

/// So many tensors of a few numbers are kept before they are read all the same.
const MOST_KEPT: usize = 2048;

/// What is added up between two records, in f64, so that the number of reads does not change a mean.
pub struct Totals {
    sums: Sums,
    /// Norm of the last step's gradient.
    norm: f64,
    /// The first number that is not finite, its step and its name.
    not_finite: Option<(i64, &'static str)>,
    /// Losses of a step that has not ended.
    losses: Vec<[f64; 4]>,
    /// In f16, after the last step.
    loss_scale: Option<f64>,
    /// The step after which the loss scale was too small.
    scale_lost: Option<i64>,
    /// On the device, in the order of the steps.
    kept: Vec<(KeptLosses, Tensor)>,
}

/// What a tensor that was kept holds, f32.
enum KeptLosses {
    /// A batch's loss and its parts, those that are there, and its share of the step.
    Loss { there: [bool; 4], share: f64 },
    /// The norm of a step's gradient; with a loss scale then whether the step overflowed, and the scale after it.
    Step { step: i64, scaled: bool },
}

/// What [`Totals`] came to.
pub struct Reading {
    /// Since the last record.
    pub sums: Sums,
    /// Norm of the last step's gradient, before clipping, of the last that was not skipped.
    pub gradient_norm: f64,
    /// The first step with a number that is not finite, and which it was.
    pub not_finite: Option<(i64, &'static str)>,
    /// In f16, what the next loss is multiplied by.
    pub loss_scale: Option<f64>,
    /// The first step after which that was below [`LEAST`].
    pub scale_lost: Option<i64>,
}

impl Totals {
    /// Goes on from the sums of a checkpoint.
    pub fn new(sums: &Sums) -> Self {
        Self {
            sums: sums.clone(),
            norm: 0.0,
            not_finite: None,
            losses: Vec::new(),
            loss_scale: None,
            scale_lost: None,
            kept: Vec::new(),
        }
    }

    /// Adds `share` of a batch's loss and its parts, scalars.
    pub fn add(&mut self, parts: [Option<&Tensor>; 4], share: f64) {
        let _guard = tch::no_grad_guard();
        let values: Vec<&Tensor> = parts.iter().copied().flatten().collect();
        let there = parts.map(|part| part.is_some());
        self.keep(KeptLosses::Loss { there, share }, Tensor::stack(&values, 0));
    }

    /// Ends a step with the norm of its gradient, a scalar; in f16 with whether it overflowed, and the scale after it, `(1)`.
    pub fn end_step(&mut self, step: i64, norm: &Tensor, scaling: Option<(&Tensor, &Tensor)>) {
        let norm = norm.detach().reshape([1]);
        let values = match scaling {
            Some((overflow, scale)) => Tensor::cat(&[&norm, overflow, scale], 0),
            None => norm,
        };
        self.keep(KeptLosses::Step { step, scaled: scaling.is_some() }, values);
    }

    fn keep(&mut self, kept: KeptLosses, values: Tensor) {
        self.kept.push((kept, values));
        if self.kept.len() >= MOST_KEPT {
            self.add_up();
        }
    }

    /// Waits for the device.
    pub fn read(&mut self) -> Reading {
        self.add_up();
        Reading {
            sums: self.sums.clone(),
            gradient_norm: self.norm,
            not_finite: self.not_finite,
            loss_scale: self.loss_scale,
            scale_lost: self.scale_lost,
        }
    }

    /// Begins anew, after a record.
    pub fn clear(&mut self) {
        self.sums = Sums::default();
    }

    fn add_up(&mut self) {
        let kept = std::mem::take(&mut self.kept);
        if kept.is_empty() {
            return;
        }
        let all: Vec<&Tensor> = kept.iter().map(|(_, values)| values).collect();
        let all = Tensor::cat(&all, 0);
        let mut values = host::values::<f64>(&all).unwrap_or_default().into_iter();
        let mut next = || values.next().unwrap_or(f64::NAN);
        for (what, _) in kept {
            match what {
                KeptLosses::Loss { there, share } => {
                    self.losses.push(there.map(|there| if there { next() * share } else { 0.0 }));
                }
                KeptLosses::Step { step, scaled } => {
                    let norm = next();
                    let scaling = scaled.then(|| (next() == 1.0, next()));
                    self.take_in(step, norm, scaling);
                }
            }
        }
    }

    /// Adds up a step: its losses, and whether it overflowed and the scale after it.
    fn take_in(&mut self, step: i64, norm: f64, scaling: Option<(bool, f64)>) {
        let losses = std::mem::take(&mut self.losses);
        let skipped = scaling.is_some_and(|(overflowed, _)| overflowed);
        let finite = losses.iter().flatten().all(|loss| loss.is_finite());
        self.sums.skipped += f64::from(u8::from(skipped));
        if !skipped || finite {
            for [loss, instance, prior, regulariser] in losses {
                self.sums.loss += loss;
                self.sums.instance += instance;
                self.sums.prior += prior;
                self.sums.regulariser += regulariser;
                self.mark(step, "the loss", loss);
            }
            self.sums.count += 1.0;
        }
        if !skipped {
            self.norm = norm;
            self.mark(step, "the gradient", norm);
        }
        if let Some((_, scale)) = scaling {
            self.loss_scale = Some(scale);
            if scale < LEAST {
                self.scale_lost.get_or_insert(step);
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
    use tch::Kind;

    fn scalar(value: f64) -> Tensor {
        Tensor::from(value).to_kind(Kind::Float)
    }

    #[test]
    fn sums_go_on_from_a_checkpoint_and_begin_anew_when_they_are_read() {
        let before =
            Sums { count: 1.0, loss: 2.0, instance: 1.0, prior: 1.0, regulariser: 0.0, skipped: 0.0 };
        let mut totals = Totals::new(&before);
        let (loss, instance) = (scalar(0.5), scalar(0.25));
        for _ in 0..2 {
            totals.add([Some(&loss), Some(&instance), None, None], 0.5);
        }
        totals.end_step(2, &scalar(3.0), None);
        let read = totals.read();
        totals.clear();
        let expected =
            Sums { count: 2.0, loss: 2.5, instance: 1.25, prior: 1.0, regulariser: 0.0, skipped: 0.0 };
        assert_eq!((read.sums, read.gradient_norm, read.not_finite), (expected, 3.0, None));
        assert_eq!(totals.read().sums, Sums::default());
    }

    #[test]
    fn the_first_number_that_is_not_finite_is_told_with_its_step() {
        let mut totals = Totals::new(&Sums::default());
        for (step, loss, norm) in
            [(1, 1.0, 1.0), (2, 1.0, f64::INFINITY), (3, f64::NAN, f64::NAN), (4, 1.0, 1.0)]
        {
            totals.add([Some(&scalar(loss)), None, None, None], 1.0);
            totals.end_step(step, &scalar(norm), None);
        }
        assert_eq!(totals.read().not_finite, Some((2, "the gradient")));
        let mut totals = Totals::new(&Sums::default());
        totals.add([Some(&scalar(f64::NEG_INFINITY)), None, None, None], 1.0);
        totals.end_step(7, &scalar(f64::NAN), None);
        assert_eq!(totals.read().not_finite, Some((7, "the loss")));
    }

    #[test]
    fn a_skipped_step_is_counted_where_its_loss_is_a_number_and_is_never_a_fault() {
        let mut totals = Totals::new(&Sums::default());
        let scaling =
            |overflowed: f64, scale: f64| [scalar(overflowed).reshape([1]), scalar(scale).reshape([1])];
        for (step, loss, norm, [overflow, scale]) in [
            (1, f64::NAN, f64::NAN, scaling(1.0, 4.0)),
            (2, 3.0, f64::INFINITY, scaling(1.0, 2.0)),
            (3, 1.0, 0.5, scaling(0.0, 2.0)),
        ] {
            totals.add([Some(&scalar(loss)), None, None, None], 1.0);
            totals.end_step(step, &scalar(norm), Some((&overflow, &scale)));
        }
        let read = totals.read();
        assert_eq!((read.sums.count, read.sums.loss, read.sums.skipped), (2.0, 4.0, 2.0));
        assert_eq!((read.gradient_norm, read.not_finite), (0.5, None));
        assert_eq!((read.loss_scale, read.scale_lost), (Some(2.0), None));
        let [overflow, scale] = scaling(1.0, 0.5);
        totals.end_step(4, &scalar(f64::NAN), Some((&overflow, &scale)));
        assert_eq!(totals.read().scale_lost, Some(4));
    }
}
