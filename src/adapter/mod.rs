//! Adapters for one layer of any network: a few trained numbers beside a frozen weight.
//!
//! A layer shows its adapter the frozen weight `(d_out, d_in)` and its input `(.., d_in)`, nothing else; this folder
//! knows no UNet and no diffusion.
//!
//! - [`method`]: what a method is, and what the rest of the program asks of it;
//! - [`methods`]: the registry, and a file for each method;
//! - [`blocks`]: the algebra of rotations of blocks of inputs, which OFT and BOFT share;
//! - [`few_inputs`]: a layer whose inputs change within a few directions, which the kinds of HRA share;
//! - [`reflections`]: the algebra of fixed products of reflections: strength, chains, how far they turn;
//! - [`spectrum`]: what any change does to rows and singular values of a weight;
//! - [`combine`], [`how`]: several adapters as one;
//! - [`target`]: which layers are adapted, by PEFT's rules;
//! - [`peft`], [`peft_config`], [`peft_fields`], `peft_patterns`: PEFT's `adapter_model.safetensors` and `adapter_config.json`;
//! - [`lora_file`]: LoRA in one file, in the styles of other programs.

pub mod blocks;
pub mod combine;
pub mod few_inputs;
pub mod how;
pub mod lora_file;
pub mod method;
pub mod methods;
pub mod peft;
pub mod peft_config;
pub mod peft_fields;
pub mod peft_patterns;
pub mod reflections;
pub mod spectrum;
pub mod target;

use crate::platform::host;
pub use method::{Method, MethodSettings};
pub use methods::boft::Boft;
pub use methods::dora::Dora;
pub use methods::full::Full;
pub use methods::hra::Hra;
pub use methods::lora::Lora;
pub use methods::oft::Oft;
pub use reflections::Reflections;
use tch::{Kind, Tensor};

/// What a layer does with its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Geometry {
    /// `y = x W^T + b`, input `(.., d_in)`.
    Linear,
    /// A convolution, input `(n, c, h, w)`; seen as a linear map of patches, its weight is `(d_out, c * kh * kw)`.
    Conv { stride: i64, padding: i64 },
}

/// The frozen part of a layer, as its adapter sees it.
#[derive(Debug, Clone, Copy)]
pub struct Frozen<'a> {
    /// `(d_out, d_in)`, or `(d_out, c, kh, kw)` for a convolution; without gradient, in the compute dtype or another that it rests in.
    pub weight: &'a Tensor,
    /// `(d_out)`; has a gradient where the adapter trains biases.
    pub bias: Option<&'a Tensor>,
    /// Linear map or convolution.
    pub geometry: Geometry,
}

impl Frozen<'_> {
    /// The layer without its adapter.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.apply(x, self.weight, self.bias)
    }

    /// The layer's operation with other numbers in it, in the dtype of `x` and `bias`.
    pub fn apply(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        if weight.kind() != x.kind() {
            debug_assert!(!weight.requires_grad(), "only what is frozen may rest in another dtype");
            let convolution = match self.geometry {
                Geometry::Linear => None,
                Geometry::Conv { stride, padding } => Some((stride, padding)),
            };
            return host::rested(x, weight, bias, convolution);
        }
        match self.geometry {
            Geometry::Linear => x.linear(weight, bias),
            Geometry::Conv { stride, padding } => {
                x.conv2d(weight, bias, [stride, stride], [padding, padding], [1, 1], 1)
            }
        }
    }

    /// The weight as a matrix `(d_out, d_in)` in `kind`; a view where it rests so.
    pub fn matrix(&self, kind: Kind) -> Tensor {
        self.weight.flatten(1, -1).to_kind(kind)
    }

    /// `W p` with gradient for `p (d_in, r)`, in its dtype: `(d_out, r)`.
    pub fn times(&self, p: &Tensor) -> Tensor {
        let matrix = self.weight.flatten(1, -1);
        if matrix.kind() == p.kind() {
            matrix.matmul(p)
        } else {
            host::rested(&p.tr(), &matrix, None, None).tr()
        }
    }

    /// `y scale + b`: an output of the layer without its bias `y`, each of its `d_out` values times `scale` `(d_out)` f32.
    pub fn scaled(&self, y: &Tensor, scale: &Tensor) -> Tensor {
        let along = |t: &Tensor| match self.geometry {
            Geometry::Linear => t.to_kind(y.kind()),
            Geometry::Conv { .. } => t.to_kind(y.kind()).view([-1, 1, 1]),
        };
        let y = y * along(scale);
        self.bias.map_or_else(|| y.shallow_clone(), |bias| &y + along(bias))
    }

    /// `x -> (x U) up^T` without ever unfolding patches: `down` is `(r, d_in)`, `up` is `(d_out, r)`.
    /// A convolution becomes one with r filters and a 1x1 one after it.
    pub fn low_rank(&self, x: &Tensor, down: &Tensor, up: &Tensor) -> Tensor {
        match self.geometry {
            Geometry::Linear => x.linear(down, None::<Tensor>).linear(up, None::<Tensor>),
            Geometry::Conv { .. } => {
                let s = self.weight.size();
                let filters = down.reshape([-1, s[1], s[2], s[3]]); // [r, c, kh, kw]
                let z = self.apply(x, &filters, None); // [n, r, h', w']
                let up = up.unsqueeze(-1).unsqueeze(-1); // [d_out, r, 1, 1]
                z.conv2d(&up, None::<Tensor>, [1, 1], [0, 0], [1, 1], 1)
            }
        }
    }
}

/// A trained change of one layer.
pub trait Adapter: std::any::Any + Send {
    /// The adapted layer's output for input `x`, in the dtype of `x`, with gradients for [`Self::parameters`].
    fn forward(&self, frozen: &Frozen, x: &Tensor) -> Tensor;

    /// The trained tensors with the last part of their names in a PEFT file, such as `hra_u`.
    fn parameters(&self) -> Vec<(&'static str, Tensor)>;

    /// Lets the adapter hold its numbers elsewhere: `replace` gives the new tensor for each of [`Self::parameters`],
    /// in their order.
    fn replace_parameters(&mut self, replace: &mut dyn FnMut(&Tensor) -> Tensor);

    /// The name of a trained bias beside it in a file.
    fn bias_name(&self) -> &'static str {
        "base_layer.bias"
    }

    /// Why the adapter cannot be on a weight of this shape, `(d_out, d_in)` or `(d_out, c, kh, kw)`, if so.
    fn check(&self, weight: &[i64]) -> std::result::Result<(), String>;

    /// What it does to `weight` `(d_out, d_in)` (f64, CPU) at a strength: 0 leaves the weight, 1 is as trained.
    fn change(&self, weight: &Tensor, strength: f64) -> Change;

    /// What it does to the layer's bias `(d_out)` (f64, CPU) at a strength; `None` where it leaves biases alone.
    fn change_bias(&self, _bias: &Tensor, _strength: f64) -> Option<Tensor> {
        None
    }

    /// `(d_in, d_out)` as far as its tensors tell; 0 where they do not.
    fn size(&self) -> (i64, i64) {
        (0, 0)
    }

    /// Whether [`Self::change`] adds the same to any weight, which then need not be known.
    fn adds_the_same_to_any_weight(&self) -> bool {
        false
    }

    /// Whether [`Self::change`] is a move from the base model's weight, which adds to what other adapters do, and not
    /// something done to whatever weight there is.
    fn moves_from_base(&self) -> bool {
        false
    }

    /// Computes what of [`Self::forward`] in `kind` depends on the parameters alone, for all of `alike` at once: adapters of
    /// this type with tensors of these shapes. It holds until [`Self::project`]; a forward without it computes its own.
    fn prepare(&self, _alike: &[&dyn Adapter], _kind: Kind) {}

    /// The sum of the method's regularisers for adapters that are `alike` ([`Self::prepare`]), a scalar with gradient; `None`
    /// where it has none.
    fn regulariser(&self, _alike: &[&dyn Adapter]) -> Option<Tensor> {
        None
    }

    /// After an optimiser step: puts the parameters back into the method's constraint, in place (COFT), and forgets what was
    /// prepared from those before it.
    fn project(&self) {}

    /// How the orthogonal factor of the method turns the layer's inputs; `None` where it has none.
    fn rotation(&self) -> Option<Rotation> {
        None
    }

    /// `max |H H^T - I|` alone, which costs less than all angles; `None` where the method has no orthogonal factor.
    fn orthogonality_error(&self) -> Option<f64> {
        self.rotation().map(|rotation| rotation.orthogonality_error)
    }

    /// What a user should know of this adapter on a weight of this shape, one sentence each.
    fn notes(&self, _weight: &[i64]) -> Vec<&'static str> {
        Vec::new()
    }
}

/// What an adapter does to one weight W, f64 on the CPU.
#[derive(Debug)]
pub struct Change {
    /// The new weight.
    pub form: Form,
    /// What a user should know, one sentence each.
    pub notes: Vec<&'static str>,
}

/// A new weight beside the old one.
#[derive(Debug)]
pub enum Form {
    /// `W' = W + up down`: `down` is `(r, d_in)`, `up` is `(d_out, r)`.
    LowRank { down: Tensor, up: Tensor },
    /// `W'` itself, `(d_out, d_in)`.
    Dense(Tensor),
}

impl Form {
    /// `W'`, given the W that the change was made for.
    pub fn merged(&self, weight: &Tensor) -> Tensor {
        match self {
            Self::LowRank { down, up } => weight + up.matmul(down),
            Self::Dense(merged) => merged.shallow_clone(),
        }
    }

    /// `||W' - W||_F / ||W||_F`; for a low-rank change without forming `W'`.
    pub fn relative_change(&self, weight: &Tensor) -> f64 {
        let squared = match self {
            // ||up down||_F^2 = sum((up^T up) * (down down^T))
            Self::LowRank { down, up } => (up.tr().matmul(up) * down.matmul(&down.tr())).sum(Kind::Double),
            Self::Dense(merged) => (merged - weight).square().sum(Kind::Double),
        };
        let norm = host::number(&weight.norm());
        host::number(&squared).max(0.0).sqrt() / norm.max(f64::MIN_POSITIVE)
    }
}

impl From<Form> for Change {
    fn from(form: Form) -> Self {
        Self { form, notes: Vec::new() }
    }
}

/// How an orthogonal factor turns a layer's inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotation {
    /// Angles of its planes of rotation in radians, the largest first; a reflection counts as pi.
    pub angles: Vec<f64>,
    /// `max |H H^T - I|` of the factor as training and sampling apply it, in f32.
    pub orthogonality_error: f64,
}

/// A fixed low-rank change, as sampling uses it: `y = x W^T + b + (x down^T) up^T`.
pub struct LowRank {
    /// `(r, d_in)`, in the compute dtype.
    pub down: Tensor,
    /// `(d_out, r)`, in the compute dtype.
    pub up: Tensor,
}

impl Adapter for LowRank {
    fn forward(&self, frozen: &Frozen, x: &Tensor) -> Tensor {
        frozen.forward(x) + frozen.low_rank(x, &self.down, &self.up)
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        Vec::new()
    }

    fn replace_parameters(&mut self, _: &mut dyn FnMut(&Tensor) -> Tensor) {}

    fn check(&self, _: &[i64]) -> std::result::Result<(), String> {
        Ok(())
    }

    fn change(&self, _: &Tensor, strength: f64) -> Change {
        Form::LowRank { down: host::wide(&self.down), up: host::wide(&self.up) * strength }.into()
    }
}

/// Refuses ranks of files that are beyond any use, and whose `r x r` products would fill the memory.
pub(crate) fn check_stored_rank(rank: i64) -> std::result::Result<(), String> {
    const MOST: i64 = 4096;
    if rank <= MOST { Ok(()) } else { Err(format!("expected a rank of at most {MOST}, found {rank}")) }
}

/// The matrix `(d_out, d_in)` that a weight of this shape is seen as.
pub(crate) fn matrix_shape(weight: &[i64]) -> (i64, i64) {
    (weight[0], weight[1..].iter().product())
}
