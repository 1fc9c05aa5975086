//! Functions of libtorch that tch 0.24 does not bind.

use std::ffi::{CStr, c_char, c_int, c_void};
use tch::Tensor;

type TensorPointer = *mut c_void;

unsafe extern "C" {
    fn torch_extra_fused_adamw(
        values: TensorPointer,
        gradient: TensorPointer,
        first: TensorPointer,
        second: TensorPointer,
        step: TensorPointer,
        learning_rate: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        epsilon: f64,
        gradient_scale: TensorPointer,
        found_inf: TensorPointer,
        message: *mut c_char,
        room: usize,
    ) -> c_int;
    fn torch_extra_to_cuda(
        tensor: TensorPointer,
        index: c_int,
        message: *mut c_char,
        room: usize,
    ) -> TensorPointer;
    fn torch_extra_rested(
        x: TensorPointer,
        weight: TensorPointer,
        bias: TensorPointer,
        stride: i64,
        padding: i64,
        message: *mut c_char,
        room: usize,
    ) -> TensorPointer;
    fn torch_extra_device_peaks(index: c_int, peaks: *mut i64, message: *mut c_char, room: usize) -> c_int;
}

/// Calls a function that returns 0, or writes its message; the message as the error.
fn checked(call: impl FnOnce(*mut c_char, usize) -> c_int) -> Result<(), String> {
    let mut message: [c_char; 1024] = [0; 1024];
    // One less than the room, so that the text ends in a zero.
    match call(message.as_mut_ptr(), message.len() - 1) {
        0 => Ok(()),
        // SAFETY: the buffer began as zeros and its last byte was not given away.
        _ => Err(unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy().into_owned()),
    }
}

fn pointer(tensor: &Tensor) -> TensorPointer {
    tensor.as_ptr().cast_mut().cast()
}

/// What a step of AdamW changes, flat f32 tensors of one length on one device.
pub struct AdamWTensors<'a> {
    pub values: &'a Tensor,
    /// Overwritten with the gradient divided by its scale.
    pub gradient: &'a Tensor,
    pub exp_avg: &'a Tensor,
    pub exp_avg_sq: &'a Tensor,
}

/// AdamW's constants and the learning rate of a step.
pub struct AdamWNumbers {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub weight_decay: f64,
    pub epsilon: f64,
}

/// One step of AdamW in one call (torch `_fused_adamw_`). `step` is the number of this step, from 1, f32 `(1)`; the gradient is
/// divided by `gradient_scale (1)`, and nothing changes where `found_inf (1)` is 1.
///
/// # Errors
/// libtorch's own message.
pub fn fused_adamw(
    tensors: &AdamWTensors,
    step: &Tensor,
    numbers: &AdamWNumbers,
    gradient_scale: Option<&Tensor>,
    found_inf: Option<&Tensor>,
) -> Result<(), String> {
    let optional = |tensor: Option<&Tensor>| tensor.map_or(std::ptr::null_mut(), pointer);
    // SAFETY: every pointer is to a tensor that lives through the call, or null where the callee allows it.
    checked(|message, room| unsafe {
        torch_extra_fused_adamw(
            pointer(tensors.values),
            pointer(tensors.gradient),
            pointer(tensors.exp_avg),
            pointer(tensors.exp_avg_sq),
            pointer(step),
            numbers.learning_rate,
            numbers.beta1,
            numbers.beta2,
            numbers.weight_decay,
            numbers.epsilon,
            optional(gradient_scale),
            optional(found_inf),
            message,
            room,
        )
    })
}

/// A copy of a host tensor on GPU `index` that leaves from page-locked memory and is not waited for.
///
/// # Errors
/// libtorch's own message, such as that there is no memory for it.
pub fn to_cuda(tensor: &Tensor, index: usize) -> Result<Tensor, String> {
    let index = c_int::try_from(index).map_err(|e| e.to_string())?;
    let mut copy: TensorPointer = std::ptr::null_mut();
    // SAFETY: the tensor lives through the call; what comes back is null or a new tensor, which is ours.
    checked(|message, room| unsafe {
        copy = torch_extra_to_cuda(pointer(tensor), index, message, room);
        c_int::from(copy.is_null())
    })?;
    Ok(unsafe { Tensor::from_ptr(copy.cast()) })
}

/// `x W^T + b`, or the convolution of `x` where `convolution` gives stride and padding, in the dtype of `x` and `bias`. `weight`, which
/// rests in another, gets no gradient: it is converted in the forward pass and again in the backward pass, and the graph keeps no
/// converted copy.
///
/// # Errors
/// libtorch's own message, such as that there is no memory for it.
pub fn rested(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    convolution: Option<(i64, i64)>,
) -> Result<Tensor, String> {
    let (stride, padding) = convolution.unwrap_or_default();
    let mut output: TensorPointer = std::ptr::null_mut();
    // SAFETY: the tensors live through the call; what comes back is null or a new tensor, which is ours.
    checked(|message, room| unsafe {
        let bias = bias.map_or(std::ptr::null_mut(), pointer);
        output = torch_extra_rested(pointer(x), pointer(weight), bias, stride, padding, message, room);
        c_int::from(output.is_null())
    })?;
    Ok(unsafe { Tensor::from_ptr(output.cast()) })
}

/// The most bytes that libtorch's allocator has given to tensors of GPU `index`, and has taken from the driver, in this process.
///
/// # Errors
/// libtorch's own message; there is no accelerator, or it was not used yet.
pub fn device_peaks(index: usize) -> Result<[u64; 2], String> {
    let mut peaks = [0i64; 2];
    let index = c_int::try_from(index).map_err(|e| e.to_string())?;
    // SAFETY: the callee writes two numbers.
    checked(|message, room| unsafe { torch_extra_device_peaks(index, peaks.as_mut_ptr(), message, room) })?;
    Ok(peaks.map(|bytes| bytes.max(0) as u64))
}
