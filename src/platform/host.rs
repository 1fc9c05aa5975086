//! Where values cross between the host and the device: nowhere else is a tensor made on the CPU, moved, or read.
//!
//! Copies to a GPU leave from page-locked memory and are not waited for (CUDA C++ Programming Guide, "Asynchronous
//! concurrent execution"); every read waits for the device. clippy.toml and tests/program/layers.rs keep the other rooms to this.

use crate::error::Result;
use tch::{Device, Kind, Tensor, kind::Element};

/// The device of host tensors.
pub const CPU: Device = Device::Cpu;

/// Values as a host tensor `(n)`.
pub fn tensor<T: Element>(values: &[T]) -> Tensor {
    Tensor::from_slice(values)
}

/// Values as a host tensor `(rows, n)`.
pub fn rows<T: Element, U: AsRef<[T]>>(values: &[U]) -> Tensor {
    Tensor::from_slice2(values)
}

/// A host scalar.
pub fn scalar(value: f64, kind: Kind) -> Tensor {
    Tensor::from(value).to_kind(kind)
}

/// Zeros on the host.
pub fn zeros(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::zeros(shape, (kind, CPU))
}

/// Numbers that are all `value`, on the host.
pub fn full(shape: &[i64], value: f64, kind: Kind) -> Tensor {
    Tensor::full(shape, value, (kind, CPU))
}

/// Memory on the host that is still to be filled.
pub fn empty(shape: &[i64], kind: Kind) -> Result<Tensor> {
    Ok(Tensor::f_empty(shape, (kind, CPU))?)
}

/// The identity `(n, n)` in f64 on the host.
pub fn eye(n: i64) -> Tensor {
    Tensor::eye(n, (Kind::Double, CPU))
}

/// `steps` numbers from `first` to `last`, f32 on the host, rounded as torch.linspace rounds them.
pub fn line(first: f64, last: f64, steps: i64) -> Tensor {
    Tensor::linspace(first, last, steps, (Kind::Float, CPU))
}

/// The tensor on `device`; one that is there already is the same tensor.
pub fn to_device(tensor: &Tensor, device: Device) -> Tensor {
    match try_to_device(tensor, device) {
        Ok(copy) => copy,
        // As tch's own functions do: `main` says what it was.
        Err(error) => panic!("{error}"),
    }
}

/// As [`to_device`]; an error where memory does not suffice.
pub fn try_to_device(tensor: &Tensor, device: Device) -> Result<Tensor> {
    match (tensor.device(), device) {
        (CPU, Device::Cuda(index)) if !tensor.requires_grad() => {
            torch_extra::to_cuda(tensor, index).map_err(|message| tch::TchError::Torch(message).into())
        }
        _ => Ok(tensor.f_to_device(device)?),
    }
}

/// As [`try_to_device`], but waited for and from ordinary memory: for weights, which come once and are large.
pub fn upload(tensor: &Tensor, device: Device) -> Result<Tensor> {
    Ok(tensor.f_to_device(device)?)
}

/// A layer's output where its weight rests in another dtype than `x` ([`torch_extra::rested`]). Panics as tch's own operations do.
pub fn rested(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, convolution: Option<(i64, i64)>) -> Tensor {
    torch_extra::rested(x, weight, bias, convolution).map_err(tch::TchError::Torch).unwrap()
}

/// The tensor on the host.
pub fn to_host(tensor: &Tensor) -> Tensor {
    tensor.to_device(CPU)
}

/// The tensor on the host in f64, without gradient.
pub fn wide(tensor: &Tensor) -> Tensor {
    tensor.detach().to_device(CPU).to_kind(Kind::Double)
}

/// Whether two tensors have the same shape and values.
pub fn same(a: &Tensor, b: &Tensor) -> bool {
    a.equal(b)
}

/// Overwrites `tensor`, or the part of another that it is a view of, with values from wherever.
pub fn copy_into(tensor: &Tensor, values: &Tensor) {
    tensor.shallow_clone().copy_(values);
}

/// The number that a scalar holds.
pub fn number(scalar: &Tensor) -> f64 {
    scalar.double_value(&[])
}

/// The whole number that a scalar holds.
pub fn integer(scalar: &Tensor) -> i64 {
    scalar.int64_value(&[])
}

/// All values in order, rounded to `T`.
pub fn values<T: Element + Copy>(tensor: &Tensor) -> Result<Vec<T>> {
    let tensor = to_host(&tensor.detach()).f_to_kind(T::KIND)?.f_reshape([-1])?.f_contiguous()?;
    let mut values = vec![T::ZERO; tensor.numel()];
    tensor.f_copy_data(&mut values, tensor.numel())?;
    Ok(values)
}

/// Whether every entry is true.
pub fn all(conditions: &Tensor) -> bool {
    conditions.all().int64_value(&[]) != 0
}

/// Whether no value is infinite or not a number.
pub fn all_finite(tensor: &Tensor) -> bool {
    // A sum passes on what is not finite and needs no memory; one that overflows tells nothing.
    let plain = tensor.kind() == Kind::Float && number(&tensor.sum(Kind::Float)).is_finite();
    plain || all(&tensor.isfinite())
}

/// Gives memory of the host that nothing holds any more back to the system; glibc keeps blocks that are not large for later.
pub fn give_memory_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: takes a number of bytes to keep, and touches nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
