//! The layers that hold weights: linear maps and convolutions, which may carry an adapter, and norms.

use crate::adapter::{Adapter, Frozen, Geometry};
use crate::weights::scope::Scope;
use tch::{Kind, Tensor};

/// A frozen linear map or convolution, with the adapter that was put on it.
pub struct Layer {
    /// Its name in the checkpoint, such as `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`.
    pub name: String,
    weight: Tensor,
    bias: Option<Tensor>,
    geometry: Geometry,
    kind: Kind,
    attached: Option<Attached>,
}

/// What an adapter puts on a layer.
pub struct Attached {
    /// The change of the weight; `None` where only the bias trains.
    pub adapter: Option<Box<dyn Adapter>>,
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
            kind: scope.numbers().compute,
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
            kind: scope.numbers().compute,
            attached: None,
        }
    }

    /// A convolution of given numbers: weight `(c_out, c_in, kernel, kernel)`, bias `(c_out)`.
    pub fn conv_of(name: String, weight: Tensor, bias: Tensor, stride: i64, padding: i64) -> Self {
        let (geometry, kind) = (Geometry::Conv { stride, padding }, weight.kind());
        Self { name, weight, bias: Some(bias), geometry, kind, attached: None }
    }

    /// The layer's output, in the dtype of `x`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let attached = self.attached.as_ref().filter(|a| a.enabled);
        let trained = attached.and_then(|a| a.bias.as_ref()).map(|bias| bias.to_kind(x.kind()));
        let frozen = self.frozen(trained.as_ref().or(self.bias.as_ref()));
        match attached.and_then(|a| a.adapter.as_ref()) {
            None => frozen.forward(x),
            Some(adapter) => adapter.forward(&frozen, x),
        }
    }

    /// The frozen weight, `(d_out, d_in)` or `(d_out, c, kh, kw)`, in the dtype that it rests in.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The frozen weight as a matrix `(d_out, d_in)`, a view.
    pub fn matrix(&self) -> Tensor {
        self.weight.flatten(1, -1)
    }

    /// The dtype that it computes in.
    pub fn kind(&self) -> Kind {
        self.kind
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
    pub fn attach(&mut self, adapter: Option<Box<dyn Adapter>>, bias: Option<Tensor>) {
        self.attached = Some(Attached { adapter, bias, enabled: true });
    }

    /// Replaces the frozen weight, and the bias where one is given, for good.
    pub fn set_frozen(&mut self, weight: Tensor, bias: Option<Tensor>) {
        self.weight = weight;
        self.bias = bias.or_else(|| self.bias.take());
    }

    fn frozen<'a>(&'a self, bias: Option<&'a Tensor>) -> Frozen<'a> {
        Frozen { weight: &self.weight, bias, geometry: self.geometry }
    }
}

/// Scale and shift of a normalisation, with the trained ones that were put in their place.
pub struct Norm {
    /// Its name in the checkpoint, such as `down_blocks.0.resnets.0.norm1`.
    pub name: String,
    weight: Tensor,
    bias: Tensor,
    over: Over,
    eps: f64,
    attached: Option<AttachedNorm>,
}

/// What a normalisation is taken over.
enum Over {
    Groups(i64),
    LastDimension,
}

/// Trained numbers of a normalisation, f32.
pub struct AttachedNorm {
    /// In place of the scale.
    pub weight: Option<Tensor>,
    /// In place of the shift.
    pub bias: Option<Tensor>,
    /// Switched off, the norm is the base model's.
    pub enabled: bool,
}

impl Norm {
    /// Over groups of `channels`: `(n, c, h, w)` to the same shape.
    pub fn groups(scope: &Scope, groups: i64, channels: i64, eps: f64) -> Self {
        Self::new(scope, Over::Groups(groups), channels, eps)
    }

    /// Over the last dimension: `(.., width)` to the same shape.
    pub fn layer(scope: &Scope, width: i64, eps: f64) -> Self {
        Self::new(scope, Over::LastDimension, width, eps)
    }

    fn new(scope: &Scope, over: Over, width: i64, eps: f64) -> Self {
        Self {
            name: scope.path(),
            weight: scope.tensor("weight", &[width]),
            bias: scope.tensor("bias", &[width]),
            over,
            eps,
            attached: None,
        }
    }

    /// The normalised `x`, in its shape and dtype.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let attached = self.attached.as_ref().filter(|a| a.enabled);
        let pick = |trained: Option<&Tensor>, frozen: &Tensor| {
            trained.map_or_else(|| frozen.shallow_clone(), |t| t.to_kind(x.kind()))
        };
        let weight = pick(attached.and_then(|a| a.weight.as_ref()), &self.weight);
        let bias = pick(attached.and_then(|a| a.bias.as_ref()), &self.bias);
        match self.over {
            Over::Groups(groups) => x.group_norm(groups, Some(weight), Some(bias), self.eps, true),
            Over::LastDimension => x.layer_norm(weight.size(), Some(&weight), Some(&bias), self.eps, true),
        }
    }

    /// The frozen scale `(n)`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The frozen shift `(n)`.
    pub fn bias(&self) -> &Tensor {
        &self.bias
    }

    /// What is in their place.
    pub fn attached_mut(&mut self) -> Option<&mut AttachedNorm> {
        self.attached.as_mut()
    }

    /// Puts trained numbers in place of the frozen ones.
    pub fn attach(&mut self, weight: Option<Tensor>, bias: Option<Tensor>) {
        self.attached = Some(AttachedNorm { weight, bias, enabled: true });
    }
}

/// A part of a network that holds weights and may carry trained ones.
pub enum Module<'a> {
    /// A linear map or convolution.
    Layer(&'a mut Layer),
    /// A normalisation.
    Norm(&'a mut Norm),
}

impl Module<'_> {
    /// Whether something is put on it.
    pub fn is_attached(&self) -> bool {
        match self {
            Self::Layer(layer) => layer.attached.is_some(),
            Self::Norm(norm) => norm.attached.is_some(),
        }
    }

    /// Takes off what was put on it.
    pub fn detach(self) {
        match self {
            Self::Layer(layer) => layer.attached = None,
            Self::Norm(norm) => norm.attached = None,
        }
    }
}

/// A network whose layers can carry adapters.
pub trait Layers {
    /// Every part with weights, in the order of the network.
    fn modules_mut(&mut self) -> Vec<Module<'_>>;

    /// Every linear map and convolution, in the order of the network.
    fn layers_mut(&mut self) -> Vec<&mut Layer> {
        let only_layers = |module| match module {
            Module::Layer(layer) => Some(layer),
            Module::Norm(_) => None,
        };
        self.modules_mut().into_iter().filter_map(only_layers).collect()
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
