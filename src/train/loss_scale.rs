//! The dynamic loss scale of training in f16, whose smallest normal number, 6e-5, lies above most gradients of a mean over pixels.
//!
//! The rule and its numbers are those of torch's `GradScaler`: a step whose gradient is not finite is skipped and halves the scale;
//! 2,000 good steps in a row double it. Whether a step is skipped is known on the device alone: nothing is waited for.

use crate::platform::host;
use tch::{Device, Kind, Tensor};

const START: f64 = 65_536.0;
const GROWTH: f64 = 2.0;
const BACKOFF: f64 = 0.5;
const GROWTH_INTERVAL: i64 = 2_000;

/// Below this the loss would be made smaller than it is: gradients overflow for another reason.
pub const LEAST: f64 = 1.0;

/// The scale, and how many good steps it has seen; tensors `(1)` on the device.
pub struct LossScale {
    /// What the loss is multiplied by, f32.
    pub scale: Tensor,
    /// Good steps since it changed, i32.
    pub good_steps: Tensor,
}

impl LossScale {
    /// As training starts.
    pub fn new(device: Device) -> Self {
        let scale = host::to_device(&host::tensor(&[START as f32]), device);
        let good_steps = host::to_device(&host::tensor(&[0i32]), device);
        Self { scale, good_steps }
    }

    /// 1 where a norm of gradients, a scalar, is not finite, else 0; f32 `(1)`.
    pub fn overflow(norm: &Tensor) -> Tensor {
        norm.detach().isfinite().logical_not().to_kind(Kind::Float).reshape([1])
    }

    /// Takes in whether a step overflowed.
    pub fn update(&mut self, overflow: &Tensor) {
        let _guard = tch::no_grad_guard();
        let _ = self.scale.internal_amp_update_scale_(
            &self.good_steps,
            overflow,
            GROWTH,
            BACKOFF,
            GROWTH_INTERVAL,
        );
    }
}
