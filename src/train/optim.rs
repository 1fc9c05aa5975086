//! The optimiser: AdamW whose whole state can be saved, gradient clipping, learning-rate schedules.
//!
//! It steps [`Parameters`] flat, so that a step costs about a dozen operations however many layers are adapted, and a
//! checkpoint is three tensors.

use crate::attach::parameters::Parameters;
use crate::error::{Error, Result};
use crate::platform::choice::{Choice, Named, named};
use crate::platform::host;
use tch::{Device, Kind, Tensor};
use torch_extra::{AdamWNumbers, AdamWTensors};

/// AdamW's constants (arXiv 1711.05101; names and defaults of torch).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

/// AdamW over one flat tensor.
pub struct AdamW {
    config: AdamWConfig,
    /// First moment, flat.
    pub exp_avg: Tensor,
    /// Second moment, flat.
    pub exp_avg_sq: Tensor,
    /// Steps taken, skipped ones not counted; f32 `(1)`, on the device.
    pub steps: Tensor,
}

impl AdamW {
    /// With moments of zero for `parameters`.
    pub fn new(config: AdamWConfig, parameters: &Parameters) -> Self {
        let zeros = || parameters.flat().zeros_like();
        let steps = parameters.flat().new_zeros([1], (Kind::Float, parameters.flat().device()));
        Self { config, exp_avg: zeros(), exp_avg_sq: zeros(), steps }
    }

    /// One step along the gradients times `factor` (a scalar tensor, see [`clip_factor`]) with decoupled weight decay; a
    /// learning rate for each group of [`Parameters::pack`]. Where `overflow (1)` is 1, nothing changes.
    ///
    /// # Errors
    /// What libtorch says of its fused kernel.
    pub fn step(
        &mut self,
        parameters: &mut Parameters,
        factor: &Tensor,
        learning_rates: &[f64],
        overflow: Option<&Tensor>,
    ) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let counts = match overflow {
            Some(overflow) => overflow.rsub_scalar(1.0),
            None => self.steps.ones_like(),
        };
        self.steps += counts;
        match (overflow, parameters.flat().device()) {
            // The kernels by which runs on a CPU have always been rounded.
            (None, host::CPU) => {
                self.step_by_parts(parameters, factor, learning_rates);
                Ok(())
            }
            _ => self.step_fused(parameters, factor, learning_rates, overflow),
        }
    }

    fn step_by_parts(&mut self, parameters: &mut Parameters, factor: &Tensor, learning_rates: &[f64]) {
        let AdamWConfig { beta1, beta2, epsilon, weight_decay } = self.config;
        let t = host::number(&self.steps.get(0));
        let correction1 = 1.0 - beta1.powf(t);
        let correction2 = 1.0 - beta2.powf(t);
        for piece in parameters.pieces() {
            let learning_rate = learning_rates[piece.group];
            let of = |flat: &Tensor| flat.narrow(0, piece.start, piece.length);
            let gradient = parameters.gradient(piece) * factor;
            let mut first = of(&self.exp_avg);
            let mut second = of(&self.exp_avg_sq);
            let mut values = of(parameters.flat());
            let _ = first.lerp_(&gradient, 1.0 - beta1);
            let _ = second.g_mul_scalar_(beta2);
            second += (&gradient * &gradient) * (1.0 - beta2);
            let denominator = second.sqrt() / correction2.sqrt() + epsilon;
            let _ = values.g_mul_scalar_(1.0 - learning_rate * weight_decay);
            values -= (first / denominator) * (learning_rate / correction1);
        }
    }

    /// The same in one kernel a piece, which reads number and overflow of the step on the device.
    fn step_fused(
        &mut self,
        parameters: &mut Parameters,
        factor: &Tensor,
        learning_rates: &[f64],
        overflow: Option<&Tensor>,
    ) -> Result<()> {
        let AdamWConfig { beta1, beta2, epsilon, weight_decay } = self.config;
        let scale = factor.reciprocal().reshape([1]);
        for piece in parameters.pieces() {
            let of = |flat: &Tensor| flat.narrow(0, piece.start, piece.length);
            let tensors = AdamWTensors {
                values: &of(parameters.flat()),
                gradient: &parameters.gradient(piece),
                exp_avg: &of(&self.exp_avg),
                exp_avg_sq: &of(&self.exp_avg_sq),
            };
            let learning_rate = learning_rates[piece.group];
            let numbers = AdamWNumbers { learning_rate, beta1, beta2, weight_decay, epsilon };
            torch_extra::fused_adamw(&tensors, &self.steps, &numbers, Some(&scale), overflow)
                .map_err(tch::TchError::Torch)?;
        }
        Ok(())
    }
}

/// What gradients of this norm are multiplied by so that it is at most `limit`, as torch's `clip_grad_norm_` does; a
/// scalar tensor, and the device is not waited for.
pub fn clip_factor(norm: &Tensor, limit: f64) -> Tensor {
    let _guard = tch::no_grad_guard();
    ((norm + 1e-6).reciprocal() * limit).clamp_max(1.0)
}

/// Exponential moving average of the trained values.
pub struct Ema {
    decay: f64,
    /// The average, flat.
    pub average: Tensor,
}

impl Ema {
    /// Starts at the present values.
    pub fn new(decay: f64, parameters: &Parameters) -> Self {
        Self { decay, average: parameters.flat().copy() }
    }

    /// Takes in the values after optimiser step `step` (from 1); early steps use a shorter memory, as diffusers' EMA does.
    pub fn update(&mut self, parameters: &Parameters, step: i64) {
        let _guard = tch::no_grad_guard();
        let before = (step - 1) as f64;
        let decay = if step <= 1 { 0.0 } else { self.decay.min((1.0 + before) / (10.0 + before)) };
        let _ = self.average.lerp_(parameters.flat(), 1.0 - decay);
    }
}

/// How the learning rate changes; names and formulas of diffusers' `get_scheduler`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedule {
    Constant,
    ConstantWithWarmup,
    Linear,
    Cosine,
    CosineWithRestarts,
    Polynomial,
}

impl Choice for LrSchedule {
    const CHOICES: &'static [Named<Self>] = &[
        named(Self::Constant, "constant", &[], ""),
        named(Self::ConstantWithWarmup, "constant_with_warmup", &["constant-with-warmup"], ""),
        named(Self::Linear, "linear", &[], ""),
        named(Self::Cosine, "cosine", &[], ""),
        named(Self::CosineWithRestarts, "cosine_with_restarts", &["cosine-with-restarts"], ""),
        named(Self::Polynomial, "polynomial", &[], ""),
    ];
}

/// A schedule with its numbers.
#[derive(Debug, Clone, Copy)]
pub struct LearningRate {
    pub peak: f64,
    pub schedule: LrSchedule,
    pub warmup: i64,
    pub total: i64,
    pub cycles: f64,
    pub power: f64,
}

impl LearningRate {
    /// The learning rate of optimiser step `step`, counted from 0.
    pub fn at(&self, step: i64) -> f64 {
        self.peak * self.factor(step)
    }

    fn factor(&self, step: i64) -> f64 {
        if self.schedule == LrSchedule::Constant {
            return 1.0;
        }
        if step < self.warmup {
            return step as f64 / self.warmup.max(1) as f64;
        }
        let progress = (step - self.warmup) as f64 / (self.total - self.warmup).max(1) as f64;
        match self.schedule {
            LrSchedule::Constant | LrSchedule::ConstantWithWarmup => 1.0,
            LrSchedule::Linear => (1.0 - progress).max(0.0),
            LrSchedule::Cosine => {
                (0.5 * (1.0 + (std::f64::consts::PI * self.cycles * 2.0 * progress).cos())).max(0.0)
            }
            LrSchedule::CosineWithRestarts => {
                if progress >= 1.0 {
                    return 0.0;
                }
                (0.5 * (1.0 + (std::f64::consts::PI * (self.cycles * progress).fract()).cos())).max(0.0)
            }
            // diffusers ends at 1e-7, whatever the peak
            LrSchedule::Polynomial => {
                let end = 1e-7;
                let left = (1.0 - progress).max(0.0);
                (end + (self.peak - end) * left.powf(self.power)) / self.peak
            }
        }
    }
}

/// Moves a saved moment or average back, which must have the size of `like`.
pub fn restore(saved: Tensor, like: &Tensor, what: &str, device: Device) -> Result<Tensor> {
    if saved.size() != like.size() {
        return Err(Error::run(format!(
            "{what}: expected {:?} values, found {:?}",
            like.size(),
            saved.size()
        )));
    }
    Ok(host::to_device(&saved, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(schedule: LrSchedule, warmup: i64, cycles: f64) -> LearningRate {
        LearningRate { peak: 2.0, schedule, warmup, total: 10, cycles, power: 1.0 }
    }

    #[test]
    fn schedules_give_the_values_of_diffusers() {
        // diffusers 0.42.1 get_scheduler(name, AdamW(lr=2), num_warmup_steps=2, num_training_steps=10), first 11 values
        let cosine = rate(LrSchedule::Cosine, 2, 0.5);
        let expected = [0.0, 1.0, 2.0, 1.923_879_532_5, std::f64::consts::FRAC_1_SQRT_2 + 1.0];
        for (step, value) in expected.iter().enumerate() {
            assert!((cosine.at(step as i64) - value).abs() < 1e-9, "step {step}");
        }
        assert!(cosine.at(10).abs() < 1e-12);
        let linear = rate(LrSchedule::Linear, 0, 0.5);
        assert_eq!(linear.at(5), 1.0);
        assert_eq!(rate(LrSchedule::Constant, 5, 1.0).at(0), 2.0);
        assert_eq!(rate(LrSchedule::ConstantWithWarmup, 4, 1.0).at(1), 0.5);
        let restarts = rate(LrSchedule::CosineWithRestarts, 0, 2.0);
        assert!((restarts.at(5) - 2.0).abs() < 1e-12 && restarts.at(10) == 0.0);
        let polynomial = rate(LrSchedule::Polynomial, 0, 1.0);
        assert!((polynomial.at(5) - (1e-7 + (2.0 - 1e-7) * 0.5)).abs() < 1e-12);
    }

    #[test]
    fn clipping_leaves_small_gradients_alone() {
        let clipped = |values: &[f32]| {
            let gradient = Tensor::from_slice(values);
            (&gradient * clip_factor(&gradient.norm(), 1.0)).norm().double_value(&[])
        };
        assert!((clipped(&[0.3, 0.4]) - 0.5).abs() < 1e-6);
        assert!((clipped(&[3.0, 4.0]) - 1.0).abs() < 1e-5);
    }

    #[test]
    fn views_share_memory_with_the_flat_tensor_and_collect_gradients() {
        let named = |name: &str, values: &[f32]| (name.to_string(), Tensor::from_slice(values));
        let groups = [vec![named("a", &[1.0, 2.0])], vec![named("b", &[3.0])]];
        let mut parameters = Parameters::pack(&groups);
        let loss = (&parameters.views()[0].1 * 2.0).sum(Kind::Float);
        loss.backward();
        assert!((parameters.gradient_norm().double_value(&[]) - 8f64.sqrt()).abs() < 1e-6);
        // The first step of Adam is the learning rate of the tensor's group, against the gradient's sign.
        let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 0.0, weight_decay: 0.0 };
        let one = Tensor::from(1f32);
        AdamW::new(config, &parameters).step(&mut parameters, &one, &[0.5, 7.0], None).unwrap();
        let values: Vec<f32> = Vec::try_from(parameters.flat()).unwrap();
        assert!((values[0] - 0.5).abs() < 1e-6 && (values[1] - 1.5).abs() < 1e-6, "{values:?}");
        assert!(values[2].is_nan(), "0 / 0: this one had no gradient");
        parameters.set(&Tensor::from_slice(&[5f32, 6.0, 7.0]));
        assert_eq!(parameters.views()[1].1.double_value(&[0]), 7.0);
    }
}
