//! OFT and COFT (arXiv 2306.07280): `W' = W blockdiag(R)^T`, each block R the Cayley transform of a skew matrix S.
//!
//! As PEFT 0.21 stores it (`oft/layer.py`): the strict upper triangles of S, row by row. Linear maps rotate their input,
//! `x blockdiag(R)`; convolutions rotate their weight, seen as `(d_out, c kh kw)`, which is what PEFT merges. (PEFT's own
//! forward unfolds a picture, rotates the patches and folds them, adding up where patches overlap: for kernels larger than
//! 1x1 another map, which is not the base model's even at R = I.)
//!
//! COFT of the paper's code keeps a raw dense P with `S = (P - P^T) / 2` in a ball. Its gradient is
//! `dL/dP = (G - G^T) / 2` for `G = dL/dS`: skew, so P, which starts at zero, stays skew under SGD and Adam (equal sizes of
//! opposite sign at `ij` and `ji`), weight decay and the projection, which scales it; then `S = P`. Training the upper
//! triangle, whose gradient is twice that, is the same path for Adam, which divides the factor away.

use crate::adapter::blocks::{self, Cayley, Partition};
use crate::adapter::{Adapter, Change, Form, Frozen, Geometry, Rotation, matrix_shape};
use crate::error::{Error, Result};
use tch::{Device, Kind, Tensor};

/// The ball that S is kept in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Coft {
    /// Plain OFT.
    None,
    /// The paper's: `|S|_F <= eps b^2 / sqrt(blocks)` for each block, after every step of training.
    Paper { eps: f64 },
    /// PEFT's: `|S|_F <= eps / sqrt(blocks)`, before every use.
    Peft { eps: f64 },
}

/// A ball of this size holds every rotation.
pub(crate) const MOST_EPS: f64 = 1e6;

/// The settings of an OFT or COFT adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OftConfig {
    /// Number or size of the blocks.
    pub partition: Partition,
    /// From S to R.
    pub cayley: Cayley,
    /// Whether S is constrained.
    pub coft: Coft,
    /// One block for all.
    pub block_share: bool,
}

impl OftConfig {
    /// Refuses settings that cannot be trained on any layer.
    pub fn validate(&self) -> Result<()> {
        match self.partition {
            Partition::Blocks(n) if n < 1 => {
                return Err(Error::config(format!("rank: expected at least 1 block, found {n}")));
            }
            Partition::BlockSize(b) if b < 2 => {
                return Err(Error::config(format!(
                    "block_size: expected at least 2, as a block of one input cannot turn, found {b}"
                )));
            }
            _ => {}
        }
        match self.coft {
            Coft::Paper { eps } if !(eps > 0.0 && eps <= MOST_EPS) => Err(Error::config(format!(
                "coft_eps: expected a positive number up to {MOST_EPS:e}, found {eps}"
            ))),
            Coft::Peft { .. } => Err(Error::config(
                "coft: an adapter that PEFT constrains can be used, but not trained on\nhint: start a new one with --method coft",
            )),
            _ => Ok(()),
        }
    }

    /// `(stored blocks, block size)` for `d_in` inputs. Errors: see [`Partition::of`].
    pub fn shape(&self, d_in: i64) -> std::result::Result<(i64, i64), String> {
        let (n, b) = self.partition.of(d_in)?;
        Ok((if self.block_share { 1 } else { n }, b))
    }
}

/// The OFT adapter of one layer.
pub struct Oft {
    /// Strict upper triangles `(blocks, b (b - 1) / 2)`, f32.
    upper: Tensor,
    b: i64,
    config: OftConfig,
}

impl Oft {
    /// An adapter with the given upper triangles; what PEFT's COFT allows of them.
    ///
    /// Errors: what is wrong with their shape.
    pub fn from_tensor(upper: Tensor, config: OftConfig) -> std::result::Result<Self, String> {
        let size = upper.size();
        // b (b - 1) / 2 = n  <=>  b = (1 + sqrt(1 + 8 n)) / 2
        let b = match size[..] {
            [blocks, n] if blocks >= 1 && n >= 1 => {
                ((1.0 + (1.0 + 8.0 * n as f64).sqrt()) / 2.0).round() as i64
            }
            _ => 0,
        };
        if b < 2 || b * (b - 1) / 2 != size[1] {
            return Err(format!("oft_R: expected shape (blocks, b (b - 1) / 2), found {size:?}"));
        }
        if config.block_share && size[0] != 1 {
            return Err(format!("oft_R: expected one block, which block_share says, found {}", size[0]));
        }
        let oft = Self { upper, b, config };
        if let Coft::Peft { eps } = config.coft {
            oft.shrink(eps / (size[0] as f64).sqrt());
        }
        Ok(oft)
    }

    /// A new adapter for a weight of this shape on this device: S = 0, the base model.
    pub fn new(weight: &[i64], device: Device, config: OftConfig) -> std::result::Result<Self, String> {
        let (n, b) = config.shape(matrix_shape(weight).1)?;
        Self::from_tensor(Tensor::zeros([n, b * (b - 1) / 2], (Kind::Float, device)), config)
    }

    /// The blocks `(blocks, b, b)` in f32, with gradient.
    fn blocks(&self) -> Tensor {
        self.config.cayley.blocks(&blocks::skew(&self.upper, self.b))
    }

    /// S `(blocks, b, b)` in f64 on the CPU.
    fn skew(&self) -> Tensor {
        blocks::skew(&self.upper.detach().to_device(Device::Cpu).to_kind(Kind::Double), self.b)
    }

    /// Scales each block whose S is longer than `radius` back to it, in place.
    fn shrink(&self, radius: f64) {
        let _guard = tch::no_grad_guard();
        // |S|_F^2 counts each entry of the triangle twice
        let norms = self.upper.norm_scalaropt_dim(2, [1], true) * 2f64.sqrt();
        let scale = (norms.clamp_min(1e-30).reciprocal() * radius).clamp_max(1.0);
        let _ = self.upper.shallow_clone().g_mul_(&scale);
    }
}

impl Adapter for Oft {
    fn forward(&self, frozen: &Frozen, x: &Tensor) -> Tensor {
        let r = self.blocks().to_kind(x.kind());
        match frozen.geometry {
            Geometry::Linear => frozen.forward(&blocks::rotate(x, &r)),
            Geometry::Conv { .. } => {
                let rotated = blocks::rotate(&frozen.matrix(), &r.transpose(1, 2));
                frozen.apply(x, &rotated.view_as(frozen.weight), frozen.bias)
            }
        }
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![("oft_R.weight", self.upper.shallow_clone())]
    }

    fn replace_parameters(&mut self, replace: &mut dyn FnMut(&Tensor) -> Tensor) {
        self.upper = replace(&self.upper);
    }

    fn check(&self, weight: &[i64]) -> std::result::Result<(), String> {
        let (d_in, n) = (matrix_shape(weight).1, self.upper.size()[0]);
        let fits = if self.config.block_share { d_in % self.b == 0 } else { n * self.b == d_in };
        if fits {
            return Ok(());
        }
        Err(format!("oft_R: expected blocks for {d_in} inputs for this model, found {n} of {}", self.b))
    }

    /// `W blockdiag(R^s)^T`, each block on the geodesic of the rotation group.
    fn change(&self, weight: &Tensor, strength: f64) -> Change {
        let _guard = tch::no_grad_guard();
        let r = self.config.cayley.power(&self.skew(), strength);
        let mut notes = Vec::new();
        if self.config.cayley != Cayley::Exact && self.orthogonality_error().is_some_and(|e| e > 1e-3) {
            notes.push(
                "some blocks are not orthogonal, as PEFT's Cayley-Neumann series is not for large rotations; a strength \
                 scales what is not rotation along a straight line",
            );
        }
        Change { form: Form::Dense(blocks::rotate(weight, &r.transpose(1, 2))), notes }
    }

    fn project(&self) {
        if let Coft::Paper { eps } = self.config.coft {
            // one shared block counts as one
            let blocks = self.upper.size()[0] as f64;
            self.shrink(eps * (self.b * self.b) as f64 / blocks.sqrt());
        }
    }

    fn rotation(&self) -> Option<Rotation> {
        let _guard = tch::no_grad_guard();
        Some(Rotation {
            angles: self.config.cayley.angles(&self.skew()),
            orthogonality_error: self.orthogonality_error()?,
        })
    }

    fn orthogonality_error(&self) -> Option<f64> {
        let _guard = tch::no_grad_guard();
        Some(blocks::orthogonality_error(&self.blocks()))
    }

    fn notes(&self, weight: &[i64]) -> Vec<&'static str> {
        if weight.len() == 4 && weight[2..] != [1, 1] {
            vec![
                "OFT on convolutions larger than 1x1 is used as PEFT merges it; PEFT's own forward computes something else",
            ]
        } else {
            Vec::new()
        }
    }
}
