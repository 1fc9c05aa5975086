//! A layer whose inputs are changed within the span of a few directions: `W' = W (I - P U^T)`, `U` and `P` `(d_in, r)`.

use crate::adapter::{Frozen, Geometry};
use tch::Tensor;

/// Which side of the frozen product the change is made on; both are exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    /// `y = (x - (x U) P^T) W^T + b`
    Input,
    /// `y = x W^T + b - (x U) (W P)^T`
    Output,
}

/// The output of the layer with `W (I - P U^T)` for its weight, for `x` in the dtype of `u` and `p`, both `(d_in, r)`.
pub fn within(frozen: &Frozen, x: &Tensor, u: &Tensor, p: &Tensor) -> Tensor {
    match choose_side(frozen, x, u.size()[1]) {
        Side::Input => {
            let x = x - x.matmul(u).matmul(&p.tr()); // [.., d_in]
            frozen.forward(&x)
        }
        Side::Output => {
            let up = frozen.times(p); // [d_out, r]
            frozen.forward(x) - frozen.low_rank(x, &u.tr(), &up)
        }
    }
}

/// The cheaper exact form for this call, by multiplications, forward and backward.
///
/// On the input side the gradient of the directions needs `grad_y W`, which is free only if `x` wants a gradient anyway;
/// on the output side `W U` and its backward cost `4 d_out d_in r` whatever the number of tokens.
fn choose_side(frozen: &Frozen, x: &Tensor, rank: i64) -> Side {
    if frozen.geometry != Geometry::Linear {
        return Side::Output;
    }
    let size = frozen.weight.size();
    let (d_out, d_in) = (size[0] as f64, size[1] as f64);
    let r = rank as f64;
    let tokens = x.numel() as f64 / d_in;
    let through_weight = if x.requires_grad() { 0.0 } else { tokens * d_in * d_out };
    let input = 6.0 * tokens * d_in * r + through_weight;
    let output = 3.0 * tokens * (d_in + d_out) * r + 2.0 * d_out * d_in * r;
    if input <= output { Side::Input } else { Side::Output }
}

/// The columns of `v` `(.., d, r)` divided by their norms, without an epsilon, as PEFT divides them.
pub fn unit_columns(v: &Tensor) -> Tensor {
    v / v.norm_scalaropt_dim(2, [-2], true)
}
