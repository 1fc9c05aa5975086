//! One real matrix product and one real convolution on a device, against another way of computing them.

use std::time::Instant;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::error::Error;
use crate::platform::precision::{Numbers, Precision};
use crate::platform::{device, random};

/// One operation on one device in one number format.
#[derive(Debug, Serialize)]
pub struct Check {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// `f32`, `bf16` or `f16`.
    pub precision: &'static str,
    pub operation: &'static str,
    /// The fastest of a few runs; `None` when it did not run.
    pub milliseconds: Option<f64>,
    /// Largest difference from the reference, as a share of the reference's largest value.
    pub error: Option<f64>,
    /// What `error` may be at most.
    pub tolerance: f64,
    /// libtorch's message when it did not run.
    pub message: Option<String>,
}

impl Check {
    /// Whether it ran and agrees with the reference.
    pub fn passed(&self) -> bool {
        // A NaN is no number below the tolerance.
        self.error.is_some_and(|error| error <= self.tolerance)
    }
}

/// A device's name in the report, and the number formats that are computed with on it.
pub(super) fn formats(device: Device) -> (String, Vec<(&'static str, Kind)>) {
    let mut precisions = vec![("f32", Kind::Float), ("bf16", Kind::BFloat16)];
    if device.is_cuda() {
        precisions.push(("f16", Kind::Half));
    }
    (device::name(device), precisions)
}

/// Says so where the CPU takes this many times as long in bf16 as in f32, as processors without instructions for it do.
const SLOW: f64 = 2.0;

/// A word where bf16 is far slower on the CPU than f32, with the ratio that was measured.
pub(super) fn slow_bf16(checks: &[Check]) -> Option<String> {
    let time = |precision: &str, operation: &str| {
        let mut of_cpu = checks.iter().filter(|check| check.device == "cpu");
        of_cpu.find(|c| (c.precision, c.operation) == (precision, operation))?.milliseconds
    };
    let ratio = |check: &Check| Some(time("bf16", check.operation)? / time("f32", check.operation)?);
    let slowest = checks.iter().filter_map(|check| Some((ratio(check)?, check.operation)));
    let (ratio, operation) = slowest.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(ratio, _)| *ratio > SLOW)?;
    let then = if Numbers::on(Device::Cpu, Precision::Bf16).compute == Kind::BFloat16 {
        "give --dtype f32 where it computes"
    } else {
        "with --dtype bf16 weights rest in bf16 and layers compute in f32"
    };
    Some(format!("bf16 on this CPU takes {ratio:.1} times as long as f32 ({operation}); {then}"))
}

type Operation = fn(Device, Kind) -> std::result::Result<Measured, tch::TchError>;

struct Measured {
    milliseconds: f64,
    error: f64,
}

/// Runs the checks on a device.
pub(super) fn check_device(device: Device) -> Vec<Check> {
    let (name, precisions) = formats(device);
    let operations: [(&'static str, Operation); 2] =
        [("matrix product", product), ("convolution", convolution)];
    let mut checks = Vec::new();
    for (precision, kind) in precisions {
        for (operation, measure) in operations {
            let result = measure(device, kind);
            checks.push(Check {
                device: name.clone(),
                precision,
                operation,
                milliseconds: result.as_ref().ok().map(|m| m.milliseconds),
                error: result.as_ref().ok().map(|m| m.error),
                tolerance: tolerance(device, kind),
                message: result.err().map(|e| Error::from(e).to_string()),
            });
        }
    }
    checks
}

/// Inputs are rounded before both ways of computing, so what differs is the rounding of sums and of the result:
/// 2^-9 of the value for bf16 and 2^-12 for f16, and some 2^-24 for each step of a sum in f32. libtorch lets
/// convolutions on CUDA round f32 inputs to the 10 bits of TF32.
fn tolerance(device: Device, kind: Kind) -> f64 {
    match (kind, device) {
        (Kind::BFloat16, _) => 8e-3,
        (Kind::Half, _) | (Kind::Float, Device::Cuda(_)) => 2e-3,
        _ => 1e-5,
    }
}

/// Random numbers, rounded to `kind`, on the CPU.
fn normal(shape: &[i64], kind: Kind) -> std::result::Result<Tensor, tch::TchError> {
    random::normal(shape.iter().sum::<i64>() as u64, shape).f_to_kind(kind)
}

/// Runs `compute` once to warm up and three times against the clock; returns its result and the best time in ms.
fn timed(
    device: Device,
    compute: impl Fn() -> std::result::Result<Tensor, tch::TchError>,
) -> std::result::Result<(Tensor, f64), tch::TchError> {
    let mut result = compute()?;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        wait_for(device);
        let start = Instant::now();
        result = compute()?;
        wait_for(device);
        best = best.min(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok((result, best))
}

fn wait_for(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

/// `(m, k) x (k, n)`, the size of a feed-forward projection; some entries are summed up again in f64 without libtorch.
fn product(device: Device, kind: Kind) -> std::result::Result<Measured, tch::TchError> {
    let (m, k, n) = (1024, 640, 1280);
    let (a, b) = (normal(&[m, k], kind)?, normal(&[k, n], kind)?);
    let (a_there, b_there) = (a.f_to_device(device)?, b.f_to_device(device)?);
    let (result, milliseconds) = timed(device, || a_there.f_matmul(&b_there))?;
    let result = result.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    let (mut difference, mut largest): (f64, f64) = (0.0, 0.0);
    // Rows and columns from all tiles a kernel may cut the result into.
    for row in (0..m).step_by(93) {
        let left = Vec::<f64>::try_from(a.f_get(row)?.f_to_kind(Kind::Double)?)?;
        for column in (0..n).step_by(129) {
            let right =
                Vec::<f64>::try_from(b.f_select(1, column)?.f_to_kind(Kind::Double)?.f_contiguous()?)?;
            let expected: f64 = left.iter().zip(&right).map(|(x, y)| x * y).sum();
            // Not `max`, which would pass over a NaN.
            let distance = (result.f_double_value(&[row, column])? - expected).abs();
            if distance.is_nan() || distance > difference {
                difference = distance;
            }
            largest = largest.max(expected.abs());
        }
    }
    Ok(Measured { milliseconds, error: difference / largest })
}

/// A 3x3 convolution of a resnet block; the reference unfolds the image into patches and multiplies, in f64.
fn convolution(device: Device, kind: Kind) -> std::result::Result<Measured, tch::TchError> {
    let (channels, side, filters) = (160, 32, 320);
    let (image, weight) =
        (normal(&[1, channels, side, side], kind)?, normal(&[filters, channels, 3, 3], kind)?);
    let (image_there, weight_there) = (image.f_to_device(device)?, weight.f_to_device(device)?);
    let (result, milliseconds) =
        timed(device, || image_there.f_conv2d(&weight_there, None::<Tensor>, 1, 1, 1, 1))?;
    let patches = image.f_to_kind(Kind::Double)?.f_im2col([3, 3], [1, 1], [1, 1], [1, 1])?; // [1, c*9, h*w]
    let expected = weight
        .f_to_kind(Kind::Double)?
        .f_view([filters, channels * 9])?
        .f_matmul(&patches)? // [1, filters, h*w]
        .f_view([1, filters, side, side])?;
    let result = result.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    let difference = result.f_sub(&expected)?.f_abs()?.f_max()?.f_double_value(&[])?;
    let largest = expected.f_abs()?.f_max()?.f_double_value(&[])?;
    Ok(Measured { milliseconds, error: difference / largest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_that_is_far_slower_than_f32_is_told_with_its_ratio() {
        let check = |device: &str, precision, operation, milliseconds| Check {
            device: device.into(),
            precision,
            operation,
            milliseconds,
            error: Some(0.0),
            tolerance: 1.0,
            message: None,
        };
        let mut checks = vec![
            check("cpu", "f32", "matrix product", Some(2.0)),
            check("cpu", "f32", "convolution", Some(4.0)),
            check("cpu", "bf16", "matrix product", Some(3.0)),
            check("cpu", "bf16", "convolution", Some(30.0)),
        ];
        let said = slow_bf16(&checks).expect("7.5 times as long");
        assert!(said.contains("takes 7.5 times as long as f32 (convolution)"), "{said}");
        checks[3].milliseconds = Some(7.0);
        assert_eq!(slow_bf16(&checks), None);
        checks[3].milliseconds = None;
        assert_eq!(slow_bf16(&checks), None, "what did not run has no time");
        // A GPU's times do not count.
        checks.extend([
            check("cuda:0", "f32", "convolution", Some(1.0)),
            check("cuda:0", "bf16", "convolution", Some(9.0)),
        ]);
        assert_eq!(slow_bf16(&checks), None);
    }

    #[test]
    fn the_cpu_computes_correctly() {
        let checks = check_device(Device::Cpu);
        assert_eq!(checks.len(), 4);
        for check in &checks {
            assert!(check.passed(), "{check:?}");
            // Two ways of rounding never agree to the last bit; a reference computed by itself would.
            assert!(check.error.is_some_and(|error| error > 0.0), "{check:?}");
        }
    }
}
