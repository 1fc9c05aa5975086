//! The layers that hold weights: linear maps and convolutions, which may carry an adapter, and norms.

use super::weights::Scope;
use crate::adapter::{Adapter, Frozen, Geometry};
use tch::{Kind, Tensor};

/// A frozen linear map or convolution, with the adapter that was put on it.
pub struct Layer {
    /// Its name in the checkpoint, such as `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`.
    pub name: String,
    weight: Tensor,
    bias: Option<Tensor>,
    geometry: Geometry,
    attached: Option<Attached>,
}

/// What an adapter puts on a layer.
pub struct Attached {
    /// The change of the weight.
    pub adapter: Box<dyn Adapter>,
    /// A trained or loaded bias `(d_out)` in place of the frozen one, f32.
    pub bias: Option<Tensor>,
    /// Switched off, the layer is the base model's.
    pub enabled: bool,
}

impl Layer {
    /// A linear map `d_in -> d_out`.
    pub fn linear(scope: &Scope, d_in: i64, d_out: i64, bias: bool) -> Self {
        Self {
            name: scope.path(),
            weight: scope.tensor("weight", &[d_out, d_in]),
            bias: bias.then(|| scope.tensor("bias", &[d_out])),
            geometry: Geometry::Linear,
            attached: None,
        }
    }

    /// A square convolution `c_in -> c_out` with bias.
    pub fn conv(scope: &Scope, c_in: i64, c_out: i64, kernel: i64, stride: i64, padding: i64) -> Self {
        Self {
            name: scope.path(),
            weight: scope.tensor("weight", &[c_out, c_in, kernel, kernel]),
            bias: Some(scope.tensor("bias", &[c_out])),
            geometry: Geometry::Conv { stride, padding },
            attached: None,
        }
    }

    /// The layer's output, in the dtype of `x`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        match self.attached.as_ref().filter(|a| a.enabled) {
            None => self.frozen(self.bias.as_ref()).forward(x),
            Some(Attached { adapter, bias: None, .. }) => {
                adapter.forward(&self.frozen(self.bias.as_ref()), x)
            }
            Some(Attached { adapter, bias: Some(bias), .. }) => {
                let bias = bias.to_kind(x.kind());
                adapter.forward(&self.frozen(Some(&bias)), x)
            }
        }
    }

    /// The frozen weight as a matrix `(d_out, d_in)`, a view in the compute dtype.
    pub fn matrix(&self) -> Tensor {
        self.frozen(None).matrix()
    }

    /// The frozen bias `(d_out)`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// What is on the layer.
    pub fn attached(&self) -> Option<&Attached> {
        self.attached.as_ref()
    }

    /// What is on the layer, to be changed.
    pub fn attached_mut(&mut self) -> Option<&mut Attached> {
        self.attached.as_mut()
    }

    /// Puts an adapter, and a bias where it has one, on the layer in place of what was there.
    pub fn attach(&mut self, adapter: Box<dyn Adapter>, bias: Option<Tensor>) {
        self.attached = Some(Attached { adapter, bias, enabled: true });
    }

    fn frozen<'a>(&'a self, bias: Option<&'a Tensor>) -> Frozen<'a> {
        Frozen { weight: &self.weight, bias, geometry: self.geometry }
    }
}

/// A network whose layers can carry adapters.
pub trait Layers {
    /// Every linear map and convolution, in the order of the network.
    fn layers_mut(&mut self) -> Vec<&mut Layer>;
}

/// Normalisation over groups of channels.
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: i64,
    eps: f64,
}

impl GroupNorm {
    /// `channels` in `groups`.
    pub fn new(scope: &Scope, groups: i64, channels: i64, eps: f64) -> Self {
        Self {
            weight: scope.tensor("weight", &[channels]),
            bias: scope.tensor("bias", &[channels]),
            groups,
            eps,
        }
    }

    /// `(n, c, h, w)` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.group_norm(self.groups, Some(&self.weight), Some(&self.bias), self.eps, true)
    }
}

/// Normalisation over the last dimension.
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Over `width` numbers.
    pub fn new(scope: &Scope, width: i64, eps: f64) -> Self {
        Self { weight: scope.tensor("weight", &[width]), bias: scope.tensor("bias", &[width]), eps }
    }

    /// `(.., width)` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, true)
    }
}

/// Sinusoidal features of timesteps `(b)`: `(b, width)` in f32 (diffusers `get_timestep_embedding`).
pub fn timestep_features(timesteps: &Tensor, width: i64, flip_sin_to_cos: bool, shift: f64) -> Tensor {
    let half = width / 2;
    let device = timesteps.device();
    // In diffusers' order of operations: an angle reaches 1000 radians, where a last bit of the exponent shows.
    let exponent = Tensor::arange(half, (Kind::Float, device)) * -(10_000f64.ln()) / (half as f64 - shift);
    let angle = timesteps.to_kind(Kind::Float).unsqueeze(1) * exponent.exp().unsqueeze(0); // [b, half]
    let (first, second) =
        if flip_sin_to_cos { (angle.cos(), angle.sin()) } else { (angle.sin(), angle.cos()) };
    let features = Tensor::cat(&[first, second], 1);
    if width % 2 == 1 { features.constant_pad_nd([0, 1]) } else { features }
}
