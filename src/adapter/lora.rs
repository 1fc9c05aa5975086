//! LoRA (arXiv 2106.09685): `W' = W + s B A`, with `s = alpha / r`, or `alpha / sqrt(r)` for rsLoRA (arXiv 2312.03732).
//!
//! A convolution's A is a convolution with r filters and its B a 1x1 one after it, as PEFT stores them; no layer ever has
//! a dense `B A`. DoRA, which is built on it, is in [`super::dora`].

use crate::adapter::{Adapter, Change, Form, Frozen, matrix_shape};
use crate::error::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Far above any use; libtorch panics at factors that f32 does not hold.
const MOST_ALPHA: f64 = 1e12;

/// How A starts; B starts at zero, so training starts at the base model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LoraInit {
    /// Normal with deviation `1 / r`: PEFT's `gaussian`, and what diffusers' training scripts use.
    Gaussian,
    /// Uniform in `+- 1 / sqrt(d_in)`: torch's `kaiming_uniform(a = sqrt 5)`, PEFT's default.
    Kaiming,
}

/// The settings of a new LoRA or DoRA adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraConfig {
    /// r.
    pub rank: i64,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Divide by `sqrt(r)` in place of `r`.
    pub rslora: bool,
    /// Start of A.
    pub init: LoraInit,
    /// Train each output's length apart from its direction.
    pub dora: bool,
}

impl LoraConfig {
    /// s for a layer of this rank and alpha.
    pub fn scale(rank: i64, alpha: f64, rslora: bool) -> f64 {
        alpha / if rslora { (rank as f64).sqrt() } else { rank as f64 }
    }

    /// Refuses settings that cannot be trained.
    pub fn validate(&self) -> Result<()> {
        if self.rank < 1 {
            return Err(Error::config(format!("rank: expected at least 1, found {}", self.rank)));
        }
        if self.alpha == 0.0 || !(-MOST_ALPHA..=MOST_ALPHA).contains(&self.alpha) {
            return Err(Error::config(format!(
                "lora_alpha: expected a number other than 0, up to {MOST_ALPHA:e}, found {}",
                self.alpha
            )));
        }
        Ok(())
    }

    /// Refuses ranks that no layer of this shape can use.
    pub fn check_rank(&self, weight: &[i64]) -> std::result::Result<(), String> {
        let (d_out, d_in) = matrix_shape(weight);
        let most = d_out.max(d_in);
        if self.rank > most {
            return Err(format!(
                "rank: expected at most {most}, the larger side of the layer's weight, found {}",
                self.rank
            ));
        }
        Ok(())
    }
}

/// The LoRA adapter of one layer.
pub struct Lora {
    /// `(r, d_in)` or `(r, c, kh, kw)`, f32.
    a: Tensor,
    /// `(d_out, r)` or `(d_out, r, 1, 1)`, f32.
    b: Tensor,
    scale: f64,
}

impl Lora {
    /// An adapter with the given matrices, A `(r, d_in)` or `(r, c, kh, kw)` and B `(d_out, r)` or `(d_out, r, 1, 1)`.
    ///
    /// Errors: what is wrong with their shapes.
    pub fn from_tensors(a: Tensor, b: Tensor, scale: f64) -> std::result::Result<Self, String> {
        let (down, up) = (a.size(), b.size());
        let both = match down.len() {
            2 => up.len() == 2,
            4 => up.len() == 4 && up[2..] == [1, 1],
            _ => false,
        };
        if !both || down[0] != up[1] || down.iter().chain(&up).any(|d| *d < 1) {
            return Err(format!(
                "expected lora_A (r, d_in) and lora_B (d_out, r), or (r, c, kh, kw) and (d_out, r, 1, 1), found {down:?} \
                 and {up:?}"
            ));
        }
        if scale.abs() > f64::from(f32::MAX) || scale.is_nan() {
            return Err(format!("alpha: expected a scale that f32 holds, found {scale:e}"));
        }
        super::check_stored_rank(down[0])?;
        Ok(Self { a, b, scale })
    }

    /// A new adapter for a weight of this shape on this device. Draws on the CPU from `seed` alone.
    pub fn new(
        weight: &[i64],
        device: Device,
        config: LoraConfig,
        seed: u64,
    ) -> std::result::Result<Self, String> {
        config.check_rank(weight)?;
        let _guard = tch::no_grad_guard();
        let r = config.rank;
        let mut down = weight.to_vec();
        down[0] = r;
        let mut up = vec![1; weight.len()];
        up[..2].copy_from_slice(&[weight[0], r]);
        tch::manual_seed(seed as i64);
        let options = (Kind::Float, Device::Cpu);
        let a = match config.init {
            LoraInit::Gaussian => Tensor::randn(&down[..], options) / r as f64,
            LoraInit::Kaiming => {
                let bound = 1.0 / (matrix_shape(weight).1 as f64).sqrt();
                Tensor::empty(&down[..], options).uniform_(-bound, bound)
            }
        };
        let b = Tensor::zeros(&up[..], (Kind::Float, device));
        let scale = LoraConfig::scale(r, config.alpha, config.rslora);
        Self::from_tensors(a.to_device(device), b, scale)
    }

    /// `(A, s B)` as matrices `(r, d_in)`, `(d_out, r)`, f32 with gradient.
    pub(super) fn factors(&self) -> (Tensor, Tensor) {
        (self.a.flatten(1, -1), self.b.flatten(1, -1) * self.scale)
    }

    /// `(A, s B)` as matrices in f64 on the CPU.
    pub(super) fn wide(&self) -> (Tensor, Tensor) {
        let wide = |t: &Tensor| t.detach().to_device(Device::Cpu).to_kind(Kind::Double).flatten(1, -1);
        (wide(&self.a), wide(&self.b) * self.scale)
    }

    /// The layer's weight and its change, `x W^T + s x A^T B^T`, without bias.
    pub(super) fn product(&self, frozen: &Frozen, x: &Tensor) -> Tensor {
        let (down, up) = self.factors();
        let change = frozen.low_rank(x, &down.to_kind(x.kind()), &up.to_kind(x.kind()));
        frozen.apply(x, frozen.weight, None) + change
    }
}

impl Adapter for Lora {
    fn forward(&self, frozen: &Frozen, x: &Tensor) -> Tensor {
        let (down, up) = self.factors();
        frozen.forward(x) + frozen.low_rank(x, &down.to_kind(x.kind()), &up.to_kind(x.kind()))
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![("lora_A.weight", self.a.shallow_clone()), ("lora_B.weight", self.b.shallow_clone())]
    }

    fn replace_parameters(&mut self, replace: &mut dyn FnMut(&Tensor) -> Tensor) {
        self.a = replace(&self.a);
        self.b = replace(&self.b);
    }

    fn check(&self, weight: &[i64]) -> std::result::Result<(), String> {
        let (a, b) = (self.a.size(), self.b.size());
        if a[1..] == weight[1..] && b[0] == weight[0] {
            return Ok(());
        }
        Err(format!(
            "expected a LoRA of shape {weight:?} for this model, found lora_A {a:?} and lora_B {b:?}"
        ))
    }

    /// `W + strength s B A`.
    fn change(&self, _: &Tensor, strength: f64) -> Change {
        let (down, up) = self.wide();
        Form::LowRank { down, up: up * strength }.into()
    }
}
