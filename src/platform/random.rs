//! Random tensors from a seed. libtorch's CPU generator is the process's: all draws go through here, so that threads do not
//! take each other's numbers.

use std::sync::Mutex;
use tch::{Device, Kind, Tensor};

static GENERATOR: Mutex<()> = Mutex::new(());

/// What `draw` draws on the CPU after `manual_seed(seed)`, as Python's `torch.Generator("cpu").manual_seed(seed)` draws it.
/// `draw` must not call this again.
pub fn seeded<T>(seed: u64, draw: impl FnOnce() -> T) -> T {
    let _mine = GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    tch::manual_seed(seed as i64);
    draw()
}

/// Unit noise of this shape, f32 on the CPU.
pub fn normal(seed: u64, shape: &[i64]) -> Tensor {
    seeded(seed, || Tensor::randn(shape, (Kind::Float, Device::Cpu)))
}
