//! Random tensors from a seed. libtorch's CPU generator is the process's: all draws go through here, so that threads do not
//! take each other's numbers.

use crate::error::Result;
use crate::platform::host::CPU;
use std::sync::Mutex;
use tch::{Kind, Tensor};

static GENERATOR: Mutex<()> = Mutex::new(());

/// The generator after a seed; its numbers are f32 on the host, whatever device computes with them.
pub struct Draws(());

impl Draws {
    /// Unit noise.
    pub fn normal(&self, shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, CPU))
    }

    /// Unit noise; an error where memory does not suffice.
    pub fn try_normal(&self, shape: &[i64]) -> Result<Tensor> {
        Ok(Tensor::f_randn(shape, (Kind::Float, CPU))?)
    }

    /// Numbers from `low` to `high`.
    pub fn uniform(&self, shape: &[i64], low: f64, high: f64) -> Tensor {
        Tensor::empty(shape, (Kind::Float, CPU)).uniform_(low, high)
    }
}

/// What `draw` draws on the CPU after `manual_seed(seed)`, as Python's `torch.Generator("cpu").manual_seed(seed)` draws it.
/// `draw` must not call this again.
pub fn seeded<T>(seed: u64, draw: impl FnOnce(&Draws) -> T) -> T {
    let _mine = GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    tch::manual_seed(seed as i64);
    draw(&Draws(()))
}

/// Unit noise of this shape.
pub fn normal(seed: u64, shape: &[i64]) -> Tensor {
    seeded(seed, |draws| draws.normal(shape))
}
