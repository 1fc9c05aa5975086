//! Attention, transformer blocks, and the spatial transformer around them (diffusers `Transformer2DModel`).

use crate::model::layers::{Layer, Module, Norm};
use crate::platform::device::adds_mask;
use crate::platform::host;
use crate::weights::config::UNetConfig;
use crate::weights::scope::Scope;
use tch::{Kind, Tensor};

/// Multi-head attention of `width` channels to themselves or to a context.
pub struct Attention {
    to_q: Layer,
    to_k: Layer,
    to_v: Layer,
    to_out: Layer,
    heads: i64,
    upcast: bool,
}

impl Attention {
    fn new(scope: &Scope, width: i64, context: i64, heads: i64, upcast: bool) -> Self {
        Self {
            to_q: Layer::linear(&scope.at("to_q"), width, width, false),
            to_k: Layer::linear(&scope.at("to_k"), context, width, false),
            to_v: Layer::linear(&scope.at("to_v"), context, width, false),
            to_out: Layer::linear(&scope.at("to_out.0"), width, width, true),
            heads,
            upcast,
        }
    }

    /// `x (b, n, c)`, `context (b, m, d)` to `(b, n, c)`.
    fn forward(&self, x: &Tensor, context: &Tensor) -> Tensor {
        let q = split_heads(&self.to_q.forward(x), self.heads);
        let k = split_heads(&self.to_k.forward(context), self.heads);
        let v = split_heads(&self.to_v.forward(context), self.heads);
        let y = attend(&q, &k, &v, Sees::All, self.upcast);
        self.to_out.forward(&join_heads(&y))
    }

    fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        out.extend([&mut self.to_q, &mut self.to_k, &mut self.to_v, &mut self.to_out].map(Module::Layer));
    }
}

/// `(b, n, heads * d)` to `(b, heads, n, d)`.
pub(crate) fn split_heads(x: &Tensor, heads: i64) -> Tensor {
    let (b, n, c) = (x.size()[0], x.size()[1], x.size()[2]);
    x.view([b, n, heads, c / heads]).transpose(1, 2)
}

/// `(b, heads, n, d)` to `(b, n, heads * d)`.
pub(crate) fn join_heads(x: &Tensor) -> Tensor {
    let s = x.size();
    x.transpose(1, 2).reshape([s[0], s[2], s[1] * s[3]])
}

/// Which keys a query sees.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Sees {
    /// All of them.
    All,
    /// Its own and those before it, as many as there are queries.
    Past,
}

/// Scaled dot-product attention; `upcast` computes it in f32, which models with large scores need in half precision.
pub(crate) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, sees: Sees, upcast: bool) -> Tensor {
    let kind = q.kind();
    if upcast && kind != Kind::Float {
        let [q, k, v] = [q, k, v].map(|t| t.to_kind(Kind::Float));
        return attend(&q, &k, &v, sees, false).to_kind(kind);
    }
    let dot_product = |mask: Option<&Tensor>, causal| {
        Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, causal, None, false)
    };
    if sees == Sees::Past && adds_mask(q.device()) {
        let n = q.size()[2];
        return dot_product(Some(&host::full(&[n, n], f64::NEG_INFINITY, kind).triu(1)), false);
    }
    dot_product(None, sees == Sees::Past)
}

/// Self-attention, cross-attention and a gated feed-forward, each with a norm before and a skip around.
struct TransformerBlock {
    norm1: Norm,
    attn1: Attention,
    norm2: Norm,
    attn2: Attention,
    norm3: Norm,
    ff_in: Layer,
    ff_out: Layer,
}

impl TransformerBlock {
    fn new(scope: &Scope, width: i64, heads: i64, config: &UNetConfig) -> Self {
        let context = config.attention.cross_attention_dim;
        let upcast = config.attention.upcast_attention;
        let hidden = 4 * width;
        Self {
            norm1: Norm::layer(&scope.at("norm1"), width, 1e-5),
            attn1: Attention::new(&scope.at("attn1"), width, width, heads, upcast),
            norm2: Norm::layer(&scope.at("norm2"), width, 1e-5),
            attn2: Attention::new(&scope.at("attn2"), width, context, heads, upcast),
            norm3: Norm::layer(&scope.at("norm3"), width, 1e-5),
            ff_in: Layer::linear(&scope.at("ff.net.0.proj"), width, 2 * hidden, true),
            ff_out: Layer::linear(&scope.at("ff.net.2"), hidden, width, true),
        }
    }

    fn forward(&self, x: &Tensor, context: &Tensor) -> Tensor {
        let normed = self.norm1.forward(x);
        let x = x + self.attn1.forward(&normed, &normed);
        let x = &x + self.attn2.forward(&self.norm2.forward(&x), context);
        let gated = self.ff_in.forward(&self.norm3.forward(&x)).chunk(2, -1); // GEGLU
        &x + self.ff_out.forward(&(&gated[0] * gated[1].gelu("none")))
    }

    fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        out.push(Module::Norm(&mut self.norm1));
        self.attn1.collect(out);
        out.push(Module::Norm(&mut self.norm2));
        self.attn2.collect(out);
        out.push(Module::Norm(&mut self.norm3));
        out.extend([&mut self.ff_in, &mut self.ff_out].map(Module::Layer));
    }
}

/// Transformer blocks on the pixels of a feature map.
pub struct SpatialTransformer {
    norm: Norm,
    proj_in: Layer,
    blocks: Vec<TransformerBlock>,
    proj_out: Layer,
    linear_projection: bool,
}

impl SpatialTransformer {
    /// `depth` blocks at `channels` channels.
    pub fn new(scope: &Scope, channels: i64, heads: i64, depth: i64, config: &UNetConfig) -> Self {
        let projection = |name: &str| {
            let scope = scope.at(name);
            if config.attention.use_linear_projection {
                Layer::linear(&scope, channels, channels, true)
            } else {
                Layer::conv(&scope, channels, channels, 1, 1, 0)
            }
        };
        Self {
            norm: Norm::groups(&scope.at("norm"), config.norm.norm_num_groups, channels, 1e-6),
            proj_in: projection("proj_in"),
            blocks: (0..depth)
                .map(|i| {
                    TransformerBlock::new(&scope.at("transformer_blocks").at(i), channels, heads, config)
                })
                .collect(),
            proj_out: projection("proj_out"),
            linear_projection: config.attention.use_linear_projection,
        }
    }

    /// `x (b, c, h, w)`, `context (b, m, d)` to `(b, c, h, w)`.
    pub fn forward(&self, x: &Tensor, context: &Tensor) -> Tensor {
        let (b, c, h, w) = (x.size()[0], x.size()[1], x.size()[2], x.size()[3]);
        let to_tokens = |t: &Tensor| t.permute([0, 2, 3, 1]).reshape([b, h * w, c]);
        // Contiguous, as diffusers has it: another memory layout would choose other kernels in all that follows.
        let to_pixels = |t: &Tensor| t.reshape([b, h, w, c]).permute([0, 3, 1, 2]).contiguous();
        let normed = self.norm.forward(x);
        let mut tokens = if self.linear_projection {
            self.proj_in.forward(&to_tokens(&normed))
        } else {
            to_tokens(&self.proj_in.forward(&normed))
        }; // [b, h*w, c]
        for block in &self.blocks {
            tokens = block.forward(&tokens, context);
        }
        let y = if self.linear_projection {
            to_pixels(&self.proj_out.forward(&tokens))
        } else {
            self.proj_out.forward(&to_pixels(&tokens))
        };
        y + x
    }

    /// Adds this module's parts to `out`.
    pub fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        out.extend([Module::Norm(&mut self.norm), Module::Layer(&mut self.proj_in)]);
        self.blocks.iter_mut().for_each(|block| block.collect(out));
        out.push(Module::Layer(&mut self.proj_out));
    }
}
