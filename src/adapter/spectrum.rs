//! What a change does to one weight, whatever the method: how far its rows turn, whether its singular values stay, and how many of its
//! leading directions are new.

use crate::error::Result;
use crate::platform::host;
use tch::{Kind, Tensor};

/// So many of the leading left singular vectors of the new weight are looked at (Shuttleworth et al. 2024, "LoRA vs Full
/// Fine-tuning: An Illusion of Equivalence", arXiv:2410.21228: k = 10).
pub const LEADING: i64 = 10;
/// A vector is an intruder whose cosine to every left singular vector of the old weight is below this (theirs is called epsilon).
pub const INTRUDER_COSINE: f64 = 0.5;

/// What a change does to one weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SpectrumChange {
    /// Mean angle between a row of the old weight and that of the new one, in degrees; rows of zeros on either side do not count. 0
    /// where there are no others.
    pub angle: f64,
    /// `||s' - s|| / ||s||` of the singular values, each in falling order.
    pub singular_values: f64,
    /// Left singular vectors of the new weight, of the leading ones, that are intruders.
    pub intruders: usize,
    /// How many leading ones there are: [`LEADING`], or as many as the weight has.
    pub leading: usize,
}

impl SpectrumChange {
    /// From a weight to another, both `(d_out, d_in)` f64 on the CPU. Errors: a decomposition that does not end, such as of numbers
    /// that are not finite.
    pub fn new(before: &Tensor, after: &Tensor) -> Result<Self> {
        let (left, old, _) = before.f_svd(true, true)?;
        let (new_left, new, _) = after.f_svd(true, true)?;
        let leading = LEADING.min(new_left.size()[1]);
        let cosines = left.tr().matmul(&new_left.narrow(1, 0, leading)).abs().amax(0, false); // [leading]
        let intruders = cosines.lt(INTRUDER_COSINE).sum(Kind::Int64);
        Ok(Self {
            angle: mean_angle(before, after),
            singular_values: host::number(&((new - &old).norm() / old.norm().clamp_min(f64::MIN_POSITIVE))),
            intruders: host::integer(&intruders) as usize,
            leading: leading as usize,
        })
    }
}

/// Of the rows, in degrees. From the sum and the difference of unit vectors, which tells small angles to the last bit where the
/// cosine does not (Kahan 2006, "How Futile are Mindless Assessments of Roundoff in Floating-Point Computation?", section 12).
fn mean_angle(before: &Tensor, after: &Tensor) -> f64 {
    let length = |rows: &Tensor| rows.square().sum_dim_intlist([1i64].as_slice(), true, Kind::Double).sqrt();
    let (old, new) = (length(before), length(after));
    let there = old.gt(0.0).logical_and(&new.gt(0.0)).to_kind(Kind::Double); // [d_out, 1]
    let (a, b) = (before / old.clamp_min(f64::MIN_POSITIVE), after / new.clamp_min(f64::MIN_POSITIVE));
    let angles: Tensor = length(&(&a - &b)).atan2(&length(&(a + b))) * 2.0;
    let count = host::number(&there.sum(Kind::Double));
    (host::number(&(angles * there).sum(Kind::Double)) / count.max(1.0)).to_degrees()
}
