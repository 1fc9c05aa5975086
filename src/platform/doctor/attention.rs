//! Which of its attention kernels libtorch chooses, by device and number format.

use crate::error::Result;
use crate::platform::device::adds_mask;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

/// What libtorch chose for one kind of attention, as in training.
#[derive(Debug, Serialize)]
pub struct AttentionKernel {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// `f32`, `bf16` or `f16`.
    pub precision: &'static str,
    /// `self` (as many keys as queries), `cross` (the keys of a text) or `causal` (in the text encoder).
    pub attention: &'static str,
    /// `math` keeps a matrix of scores; the others do not.
    pub kernel: &'static str,
}

/// Queries, keys, heads and width of a head in Stable Diffusion 1.5 at 512 px.
const SIZES: [(&str, i64, i64, i64, i64); 3] =
    [("self", 4096, 4096, 8, 40), ("cross", 4096, 77, 8, 40), ("causal", 77, 77, 12, 64)];

/// What is chosen on `device`, which the reports call `name`, in each of `precisions`.
///
/// # Errors
/// Where the device has no memory for the tensors (42 MB in f32), which are not computed with.
pub fn choices(
    device: Device,
    name: &str,
    precisions: &[(&'static str, Kind)],
) -> Result<Vec<AttentionKernel>> {
    let mut found = Vec::new();
    for &(precision, kind) in precisions {
        for (attention, queries, keys, heads, width) in SIZES {
            let tensor = |n: i64| -> Result<Tensor> {
                Ok(Tensor::f_empty([1, heads, n, width], (kind, device))?.set_requires_grad(true))
            };
            let (q, k) = (tensor(queries)?, tensor(keys)?);
            let causal = attention == "causal";
            let mask = (causal && adds_mask(device))
                .then(|| Tensor::f_empty([queries, keys], (kind, device)))
                .transpose()?;
            let is_causal = causal && mask.is_none();
            let choice = Tensor::f_internal_fused_sdp_choice(&q, &k, &k, mask, 0.0, is_causal, None, false)?;
            found.push(AttentionKernel {
                device: name.to_string(),
                precision,
                attention,
                kernel: kernel_name(choice),
            });
        }
    }
    Ok(found)
}

/// ATen's `SDPBackend`.
fn kernel_name(choice: i64) -> &'static str {
    match choice {
        0 => "math",
        1 => "flash",
        2 => "memory efficient",
        3 => "cuDNN",
        4 => "overrideable",
        _ => "none",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_keeps_no_matrix_of_scores_where_it_need_not() {
        let found = choices(Device::Cpu, "cpu", &[("f32", Kind::Float)]).expect("the CPU is there");
        let kernel = |of: &str| found.iter().find(|k| k.attention == of).map(|k| k.kernel);
        assert_eq!((kernel("self"), kernel("cross")), (Some("flash"), Some("flash")));
        assert!(kernel("causal").is_some());
    }
}
