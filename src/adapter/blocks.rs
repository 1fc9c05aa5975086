//! Orthogonal blocks on the diagonal of a `d_in x d_in` matrix: what OFT (arXiv 2306.07280) and BOFT (arXiv 2311.06243) share.
//!
//! A block comes from a skew matrix S `(b, b)` by the Cayley transform `R = (I - S)(I + S)^-1`. S has eigenvalues
//! `+-i sigma`, and every matrix here is a function of S, so it acts on each eigenvalue alone. Cayley's takes `i sigma` to
//! `(1 - i sigma) / (1 + i sigma) = exp(-2 i atan sigma)`: the plane of that pair turns by `2 atan sigma`. The power `R^s`
//! along the geodesic of the rotation group turns it by `2 s atan sigma`. A function `e(i sigma)` with
//! `e(-i sigma) = conj e(i sigma)` is a real matrix, of an even and an odd part:
//!
//! ```text
//! e(S) = V Re e V^T + S V (Im e / sigma) V^T,   S^T S = V sigma^2 V^T
//! ```
//!
//! so one symmetric eigenproblem serves. Tensors of blocks are `(blocks, b, b)`.

use crate::adapter::how::{ELSEWHERE, How};
use crate::error::Error;
use crate::platform::host;
use tch::{Kind, Tensor};

/// How a layer's inputs are cut into blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Partition {
    /// So many blocks in every layer.
    Blocks(i64),
    /// Blocks of so many inputs.
    BlockSize(i64),
}

/// What a training says of it: blocks of `block_size` inputs where one is given, else `rank` blocks.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct PartitionSettings {
    pub(super) rank: i64,
    pub(super) block_size: Option<i64>,
}

impl Default for PartitionSettings {
    fn default() -> Self {
        Self { rank: 8, block_size: None }
    }
}

impl From<PartitionSettings> for Partition {
    fn from(settings: PartitionSettings) -> Self {
        settings.block_size.map_or(Self::Blocks(settings.rank), Self::BlockSize)
    }
}

impl Partition {
    /// Refuses what fits no layer.
    pub fn validate(self) -> crate::Result<()> {
        match self {
            Self::Blocks(n) if n < 1 => {
                Err(Error::config(format!("rank: expected at least 1 block, found {n}")))
            }
            Self::BlockSize(b) if b < 2 => Err(Error::config(format!(
                "block_size: expected at least 2, as a block of one input cannot turn, found {b}"
            ))),
            _ => Ok(()),
        }
    }

    /// `(blocks, block size)` for `d_in` inputs. Errors: why not, with the values that do.
    pub fn of(self, d_in: i64) -> Result<(i64, i64), String> {
        let (flag, given) = match self {
            Self::Blocks(n) => ("rank", n),
            Self::BlockSize(b) => ("block_size", b),
        };
        let fits = |value: i64| match self {
            // a block of one input cannot turn
            Self::Blocks(_) => value >= 1 && d_in % value == 0 && d_in / value >= 2,
            Self::BlockSize(_) => value >= 2 && d_in % value == 0,
        };
        if fits(given) {
            return Ok(match self {
                Self::Blocks(n) => (n, d_in / n),
                Self::BlockSize(b) => (d_in / b, b),
            });
        }
        let all: Vec<i64> = (1..=d_in).filter(|v| fits(*v)).collect();
        let near = all.partition_point(|v| *v < given);
        let shown: Vec<String> =
            all[near.saturating_sub(8)..(near + 8).min(all.len())].iter().map(i64::to_string).collect();
        Err(match (self, shown.is_empty()) {
            (_, true) => format!("expected a layer with at least 2 inputs, found {d_in}"),
            (Self::Blocks(_), _) => format!(
                "{flag}: expected a number of blocks that divides the layer's {d_in} inputs, found {given}; hint: {}",
                shown.join(", ")
            ),
            (Self::BlockSize(_), _) => format!(
                "{flag}: expected a size that divides the layer's {d_in} inputs, found {given}; hint: {}",
                shown.join(", ")
            ),
        })
    }

    /// In a few words.
    pub fn describe(self) -> String {
        match self {
            Self::Blocks(1) => "1 block".into(),
            Self::Blocks(n) => format!("{n} blocks"),
            Self::BlockSize(b) => format!("blocks of {b}"),
        }
    }
}

/// How a skew matrix becomes a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cayley {
    /// `(I - S)(I + S)^-1`, orthogonal for every S.
    Exact,
    /// PEFT's series of so many terms for `(I + S)(I - S)^-1`: to first order the transpose of the exact one, and not
    /// orthogonal for large S.
    Neumann(i64),
}

impl Cayley {
    /// The blocks of skew `s`, in its dtype, with gradient.
    pub fn blocks(self, s: &Tensor) -> Tensor {
        let eye = Tensor::eye(s.size()[2], (s.kind(), s.device()));
        match self {
            // I + S has the eigenvalues 1 + i sigma and is never singular: no check, which would wait for the device.
            // Numerator and denominator commute, so the side of the solve does not matter.
            Self::Exact => Tensor::linalg_solve_ex(&(&eye + s), &(&eye - s), true, false).0,
            Self::Neumann(terms) => {
                let mut sum = eye.unsqueeze(0).repeat([s.size()[0], 1, 1]);
                let mut power = s.shallow_clone();
                for (k, c) in neumann_coefficients(terms).into_iter().enumerate().skip(1) {
                    if k > 1 {
                        power = power.bmm(s);
                    }
                    sum += &power * c;
                }
                sum
            }
        }
    }

    /// The blocks at a strength, f64: `R^s`; a block that is not orthogonal is `Q P` with `Q` orthogonal and `P`
    /// symmetric, and becomes `Q^s (I + s (P - I))`. Exactly [`Self::blocks`] at 1.
    pub fn power(self, s: &Tensor, strength: f64) -> Tensor {
        if strength == 1.0 {
            return self.blocks(s);
        }
        of_skew(s, |sigma| {
            let (length, angle) = self.eigenvalue(sigma);
            let length = (length - 1.0) * strength + 1.0;
            let angle = angle * strength;
            (&length * angle.cos(), length * angle.sin())
        })
    }

    /// `log R` of the exact blocks of `s` `(n, b, b)`: skew, f64.
    pub fn log(s: &Tensor) -> Tensor {
        of_skew(s, |sigma| (sigma.zeros_like(), Self::Exact.eigenvalue(sigma).1))
    }

    /// S whose exact blocks are `exp(log)`, f64; `None` where one turns a plane by half a turn, which no S does.
    pub fn of_log(log: &Tensor) -> Option<Tensor> {
        let s = of_skew(log, |angle| (angle.zeros_like(), -(angle / 2.0).tan()));
        representable(s)
    }

    /// S of orthogonal blocks `(n, b, b)`: `(I - R)(I + R)^-1`; `None` as for [`Self::of_log`].
    pub fn inverse(blocks: &Tensor) -> Option<Tensor> {
        let eye = Tensor::eye(blocks.size()[2], (blocks.kind(), blocks.device()));
        let s = Tensor::linalg_solve_ex(&(&eye + blocks), &(&eye - blocks), true, false).0;
        representable((&s - s.transpose(1, 2)) * 0.5) // skew up to rounding
    }

    /// The angles by which the blocks of `s` turn their planes, in radians, the largest first; planes at rest are left out.
    pub fn angles(self, s: &Tensor) -> Vec<f64> {
        let s = host::wide(s);
        // In pairs, the largest first: every second one is a plane's.
        let sigma = s.svd(true, false).1.slice(1, 0, s.size()[1] / 2 * 2, 2);
        let (_, angle) = self.eigenvalue(&sigma);
        let mut angles: Vec<f64> = host::values(&angle.abs()).unwrap_or_default();
        angles.retain(|angle| *angle > 1e-12);
        angles.sort_by(|a, b| b.total_cmp(a));
        angles
    }

    /// Length and angle of the function's value at `i sigma`.
    fn eigenvalue(self, sigma: &Tensor) -> (Tensor, Tensor) {
        match self {
            Self::Exact => (sigma.ones_like(), sigma.atan() * -2.0),
            Self::Neumann(terms) => {
                let (mut re, mut im) = (sigma.zeros_like(), sigma.zeros_like());
                let mut power = sigma.ones_like();
                for (k, c) in neumann_coefficients(terms).into_iter().enumerate() {
                    let term = &power * c;
                    match k % 4 {
                        0 => re += term,
                        1 => im += term,
                        2 => re -= term,
                        _ => im -= term,
                    }
                    power *= sigma;
                }
                (re.hypot(&im), im.atan2(&re))
            }
        }
    }
}

/// Near half a turn the entries of S grow without bound.
fn representable(s: Tensor) -> Option<Tensor> {
    let largest = host::number(&s.abs().max());
    (largest < 1e6).then_some(s)
}

/// Coefficients of `I, S, S^2, ..` in PEFT's series (PEFT 0.21 `OFTRotationModule._cayley_batch`). The last one is 1, not 2,
/// and 3 terms are the same as 4.
fn neumann_coefficients(terms: i64) -> Vec<f64> {
    let highest = match terms {
        ..=1 => 0,
        2 => 1,
        n => (n - 1).max(3),
    };
    let last = |k| if k == highest && highest > 1 { 1.0 } else { 2.0 };
    (0..=highest).map(|k| if k == 0 { 1.0 } else { last(k) }).collect()
}

/// `e(S)`; `e` gives the real and the imaginary part of its value at `i sigma`.
fn of_skew(s: &Tensor, e: impl Fn(&Tensor) -> (Tensor, Tensor)) -> Tensor {
    let (squares, v) = s.transpose(1, 2).bmm(s).linalg_eigh("L");
    let sigma = squares.clamp_min(0.0).sqrt().clamp_min(1e-12); // Im e / sigma has a limit at 0, and 0 / 0 has none
    let (re, im) = e(&sigma);
    let vt = v.transpose(1, 2);
    let even = (&v * re.unsqueeze(1)).bmm(&vt);
    let odd = (&v * (im / sigma).unsqueeze(1)).bmm(&vt);
    even + s.bmm(&odd)
}

/// The skew matrices `(n, b, b)` with the strict upper triangles `(n, b (b - 1) / 2)`, row by row; with gradient.
pub fn skew(upper: &Tensor, b: i64) -> Tensor {
    let device = upper.device();
    let at = Tensor::triu_indices(b, b, 1, (Kind::Int64, device));
    let at = at.get(0) * b + at.get(1);
    let n = upper.size()[0];
    let half = Tensor::zeros([n, b * b], (upper.kind(), device)).index_copy(1, &at, upper);
    let half = half.view([n, b, b]);
    &half - half.transpose(1, 2)
}

/// The strict upper triangles `(n, b (b - 1) / 2)` of `s` `(n, b, b)`, row by row.
pub fn upper(s: &Tensor) -> Tensor {
    let (n, b) = (s.size()[0], s.size()[1]);
    let at = Tensor::triu_indices(b, b, 1, (Kind::Int64, s.device()));
    s.reshape([n, b * b]).index_select(1, &(at.get(0) * b + at.get(1)))
}

/// Every row of `rows` `(.., d)` times the block diagonal matrix; one block stands for as many as fit.
pub fn rotate(rows: &Tensor, blocks: &Tensor) -> Tensor {
    let (n, b) = (blocks.size()[0], blocks.size()[1]);
    let shape = rows.size();
    if n == 1 {
        return rows.reshape([-1, b]).matmul(&blocks.squeeze_dim(0)).reshape(&shape[..]);
    }
    let parts = rows.reshape([-1, n, b]).transpose(0, 1); // [n, rows, b]
    parts.bmm(blocks).transpose(0, 1).reshape(&shape[..])
}

/// `max |R R^T - I|` over the entries of all blocks as they are in f32, summed in f64.
pub fn orthogonality_error(blocks: &Tensor) -> f64 {
    let r = host::wide(blocks);
    let eye = host::eye(r.size()[1]);
    host::number(&(r.bmm(&r.transpose(1, 2)) - eye).abs().max())
}

/// S of the combination of exact Cayley blocks, each given by its S `(n, b, b)`, f64.
pub(super) fn combined(name: &str, factors: &[(Tensor, f64)], how: How) -> crate::Result<Tensor> {
    if factors.windows(2).any(|pair| pair[0].0.size() != pair[1].0.size()) {
        return Err(Error::config(format!("{name}: expected blocks of one size in all adapters"))
            .with_hint(ELSEWHERE));
    }
    let combined = match (factors, how) {
        // As it is, no digit is lost.
        ([(s, 1.0)], _) => Some(s.shallow_clone()),
        (_, How::Geodesic) => {
            let log = factors.iter().map(|(s, strength)| Cayley::log(s) * *strength).reduce(|a, b| a + b);
            Cayley::of_log(&log.expect("the layer is in one of the files"))
        }
        (_, How::Chain) => {
            // W R_1^T R_2^T .. = W (.. R_2 R_1)^T
            let power = |(s, strength): &(Tensor, f64)| Cayley::Exact.power(s, *strength);
            let product = factors.iter().map(power).reduce(|before, next| next.bmm(&before));
            Cayley::inverse(&product.expect("the layer is in one of the files"))
        }
    };
    combined.ok_or_else(|| {
        Error::config(format!(
            "{name}: the combination turns a plane by half a turn, which Cayley's blocks cannot express"
        ))
        .with_hint("give smaller strengths, or `hra export --to merged`")
    })
}
