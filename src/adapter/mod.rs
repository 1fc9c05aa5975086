//! Adapters for one layer of any network: a few trained numbers beside a frozen weight.
//!
//! A layer shows its adapter the frozen weight `(d_out, d_in)` and its input `(.., d_in)`, nothing else; this folder
//! knows no UNet and no diffusion. One file a method:
//!
//! - [`hra`]: Householder Reflection Adaptation, trained in the compact WY form;
//! - [`reflections`]: the algebra of fixed products of reflections: strength, chains, merging, how far a weight moves;
//! - [`target`]: which layers are adapted, by PEFT's rules;
//! - [`peft`]: PEFT's `adapter_config.json` and `adapter_model.safetensors`;
//! - [`lora_file`]: LoRA in one file, in the styles of other programs.

pub mod hra;
pub mod lora_file;
pub mod peft;
pub mod reflections;
pub mod target;

pub use hra::Hra;
pub use reflections::Reflections;
use tch::Tensor;

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
    /// `(d_out, d_in)`, or `(d_out, c, kh, kw)` for a convolution; in the compute dtype, without gradient.
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

    /// The layer's operation with other numbers in it.
    pub fn apply(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        match self.geometry {
            Geometry::Linear => x.linear(weight, bias),
            Geometry::Conv { stride, padding } => {
                x.conv2d(weight, bias, [stride, stride], [padding, padding], [1, 1], 1)
            }
        }
    }

    /// The weight as a matrix `(d_out, d_in)`; a view.
    pub fn matrix(&self) -> Tensor {
        self.weight.flatten(1, -1)
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
pub trait Adapter: Send {
    /// The adapted layer's output for input `x`, in the dtype of `x`.
    fn forward(&self, frozen: &Frozen, x: &Tensor) -> Tensor;

    /// The trained tensors with the last part of their names in a PEFT file, such as `hra_u`.
    fn parameters(&self) -> Vec<(&'static str, Tensor)>;

    /// Lets the adapter hold its numbers elsewhere: `replace` gives the new tensor for each of [`Self::parameters`].
    fn replace_parameters(&mut self, replace: &mut dyn FnMut(&Tensor) -> Tensor);

    /// The method's regulariser for this layer, a scalar with gradient; `None` where it has none.
    fn regulariser(&self) -> Option<Tensor>;

    /// The adapter as a fixed orthogonal factor, where it is one.
    fn reflections(&self) -> Option<Reflections>;
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

    fn regulariser(&self) -> Option<Tensor> {
        None
    }

    fn reflections(&self) -> Option<Reflections> {
        None
    }
}
