//! The CLIP text tower (transformers `CLIPTextModel`), any size: a causal transformer over token ids.
//!
//! Published files name its tensors `text_model.*` (transformers 4) or without that prefix (5); both load.

use crate::error::Result;
use crate::model::attention::{Sees, attend, join_heads, split_heads};
use crate::model::layers::{Layer, Layers, Module, Norm};
use crate::platform::host;
use crate::platform::precision::Numbers;
use crate::weights::config::TextConfig;
use crate::weights::part::Part;
use crate::weights::scope::{Scope, Weights};
use crate::weights::source::{Source, config_of};
use tch::{Device, Kind, Tensor};

/// Before the names of the second tower's layers, which are called as those of the first.
pub const SECOND_TEXT_ENCODER: &str = "text_encoder_2";

/// The name that a layer of the second tower has in a whole model.
pub fn in_second_tower(name: impl std::fmt::Display) -> String {
    format!("{SECOND_TEXT_ENCODER}.{name}")
}

/// The name that a layer has in its own tower: the inverse of [`in_second_tower`], and of others the same.
pub fn in_own_tower(name: &str) -> &str {
    name.strip_prefix(SECOND_TEXT_ENCODER).and_then(|rest| rest.strip_prefix('.')).unwrap_or(name)
}

/// Text tower with frozen weights.
pub struct TextEncoder {
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<EncoderLayer>,
    final_layer_norm: Norm,
    projection: Option<Projection>,
    length: i64,
    vocabulary: i64,
    kind: Kind,
    device: Device,
}

/// What makes one vector of a prompt (transformers `CLIPTextModelWithProjection`).
struct Projection {
    layer: Layer,
    /// The token whose state it takes; `None` for the largest id.
    token: Option<i64>,
}

/// What a tower makes of token ids.
pub struct TextOutput {
    /// `(b, n, width)`
    pub states: Tensor,
    /// The projected state of the end token `(b, projection)`, of a tower that has a projection.
    pub pooled: Option<Tensor>,
}

/// Which states of a tower count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextStates {
    /// Those after so many layers less than all, and the final norm: Stable Diffusion 1.x and 2.x.
    Normed { skipped: usize },
    /// Those after one layer and so many more less than all, without the norm: Stable Diffusion XL.
    Raw { skipped: usize },
}

/// What a layer of CLIP's towers, of texts and of pictures, is made of.
#[derive(Debug, Clone, Copy)]
pub struct LayerSizes {
    /// Width of the states.
    pub width: i64,
    /// Width within the feed-forward.
    pub hidden: i64,
    /// Attention heads, which divide `width`.
    pub heads: i64,
    /// Of the norms.
    pub eps: f64,
    /// The sigmoid approximation in place of the exact GELU.
    pub quick_gelu: bool,
}

impl From<&TextConfig> for LayerSizes {
    fn from(config: &TextConfig) -> Self {
        Self {
            width: config.hidden_size,
            hidden: config.intermediate_size,
            heads: config.num_attention_heads,
            eps: config.layer_norm_eps,
            quick_gelu: config.hidden_act == "quick_gelu",
        }
    }
}

/// Self-attention and a feed-forward, each with a norm before and a skip around (transformers `CLIPEncoderLayer`).
pub struct EncoderLayer {
    layer_norm1: Norm,
    q_proj: Layer,
    k_proj: Layer,
    v_proj: Layer,
    out_proj: Layer,
    layer_norm2: Norm,
    fc1: Layer,
    fc2: Layer,
    heads: i64,
    quick_gelu: bool,
}

impl EncoderLayer {
    /// The layer at `scope`.
    pub fn new(scope: &Scope, sizes: LayerSizes) -> Self {
        let LayerSizes { width, hidden, heads, eps, quick_gelu } = sizes;
        let attention = |name: &str| Layer::linear(&scope.at("self_attn").at(name), width, width, true);
        Self {
            layer_norm1: Norm::layer(&scope.at("layer_norm1"), width, eps),
            q_proj: attention("q_proj"),
            k_proj: attention("k_proj"),
            v_proj: attention("v_proj"),
            out_proj: attention("out_proj"),
            layer_norm2: Norm::layer(&scope.at("layer_norm2"), width, eps),
            fc1: Layer::linear(&scope.at("mlp.fc1"), width, hidden, true),
            fc2: Layer::linear(&scope.at("mlp.fc2"), hidden, width, true),
            heads,
            quick_gelu,
        }
    }

    /// `x (b, n, width)` to the same shape.
    pub(crate) fn forward(&self, x: &Tensor, sees: Sees) -> Tensor {
        let normed = self.layer_norm1.forward(x);
        let heads = |layer: &Layer| split_heads(&layer.forward(&normed), self.heads);
        let y = attend(&heads(&self.q_proj), &heads(&self.k_proj), &heads(&self.v_proj), sees, false);
        let x = x + self.out_proj.forward(&join_heads(&y));
        let h = self.fc1.forward(&self.layer_norm2.forward(&x));
        let h = if self.quick_gelu { &h * (&h * 1.702).sigmoid() } else { h.gelu("none") };
        &x + self.fc2.forward(&h)
    }
}

impl TextEncoder {
    /// Loads a text tower of `source`; the second one of Stable Diffusion XL has a projection. The second value names tensors of the
    /// file that the tower lacks.
    pub fn load(
        source: &Source,
        part: Part,
        numbers: impl Into<Numbers>,
        device: Device,
    ) -> Result<(Self, Vec<String>)> {
        let text = source.text(&config_of(part))?;
        let config = TextConfig::parse(&text)?;
        let weights = Weights::open(source, part, numbers.into(), device)?;
        let mut encoder = Self::new(&weights.root(), &config, device);
        if part == Part::TextEncoder2 {
            let (scope, width) = (weights.root().at("text_projection"), config.projection(&text)?);
            let layer = Layer::linear(&scope, config.hidden_size, width, false);
            encoder.projection = Some(Projection { layer, token: config.pooled_token() });
            for module in encoder.modules_mut() {
                let name = match module {
                    Module::Layer(layer) => &mut layer.name,
                    Module::Norm(norm) => &mut norm.name,
                };
                *name = in_second_tower(&name);
            }
        }
        let mut unused = weights.finish()?;
        // A constant that old files store, and the projection of the image-text loss.
        unused.retain(|name| !name.ends_with("position_ids") && name != "text_projection.weight");
        Ok((encoder, unused))
    }

    /// The tower at `scope`, whose weights go to `device`.
    pub fn new(scope: &Scope, config: &TextConfig, device: Device) -> Self {
        let width = config.hidden_size;
        let sizes = LayerSizes::from(config);
        Self {
            token_embedding: scope.tensor("embeddings.token_embedding.weight", &[config.vocab_size, width]),
            position_embedding: scope
                .tensor("embeddings.position_embedding.weight", &[config.max_position_embeddings, width]),
            layers: (0..config.num_hidden_layers)
                .map(|i| EncoderLayer::new(&scope.at("encoder.layers").at(i), sizes))
                .collect(),
            final_layer_norm: Norm::layer(&scope.at("final_layer_norm"), width, config.layer_norm_eps),
            projection: None,
            length: config.max_position_embeddings,
            vocabulary: config.vocab_size,
            kind: scope.numbers().compute,
            device,
        }
    }

    /// Token ids `(b, n)`, n at most [`Self::length`], to the last hidden states after the final norm, `(b, n, width)`.
    pub fn forward(&self, ids: &Tensor) -> Tensor {
        self.output(ids, TextStates::Normed { skipped: 0 }).states
    }

    /// The states that are asked for, and the pooled output where there is one. At most [`Self::layers`] can be skipped.
    pub fn output(&self, ids: &Tensor, asked: TextStates) -> TextOutput {
        let ids = host::to_device(ids, self.device);
        let left_out = match asked {
            TextStates::Normed { skipped } => skipped,
            TextStates::Raw { skipped } => skipped + 1,
        };
        let counted = self.layers.len().saturating_sub(left_out);
        let mut states = self.embedded(&ids);
        for layer in &self.layers[..counted] {
            states = layer.forward(&states, Sees::Past);
        }
        let pooled = self.projection.as_ref().map(|projection| {
            let rest = self.layers[counted..].iter();
            let last = rest.fold(states.shallow_clone(), |x, layer| layer.forward(&x, Sees::Past));
            projection.forward(&self.final_layer_norm.forward(&last), &ids)
        });
        if let TextStates::Normed { .. } = asked {
            states = self.final_layer_norm.forward(&states);
        }
        TextOutput { states, pooled }
    }

    /// Token ids `(b, n)` to what the first layer sees, `(b, n, width)`.
    fn embedded(&self, ids: &Tensor) -> Tensor {
        let (b, n) = (ids.size()[0], ids.size()[1]);
        let tokens = Tensor::embedding(&self.token_embedding, ids, -1, false, false); // [b, n, width]
        let positions = self.position_embedding.narrow(0, 0, n).expand([b, n, -1], false);
        tokens.to_kind(self.kind) + positions.to_kind(self.kind)
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Width of the pooled output, of a tower that has one.
    pub fn pooled_width(&self) -> Option<i64> {
        self.projection.as_ref().map(|projection| projection.layer.weight().size()[0])
    }

    /// The most tokens it can take.
    pub fn length(&self) -> i64 {
        self.length
    }

    /// Number of tokens that it knows.
    pub fn vocabulary(&self) -> i64 {
        self.vocabulary
    }

    /// Width of its states.
    pub fn width(&self) -> i64 {
        self.token_embedding.size()[1]
    }
}

impl Projection {
    /// Normed last states `(b, n, width)` of `ids (b, n)` to `(b, projection)`.
    fn forward(&self, states: &Tensor, ids: &Tensor) -> Tensor {
        let marked = match self.token {
            Some(token) => ids.eq(token).to_kind(Kind::Int),
            None => ids.to_kind(Kind::Int),
        };
        let place = marked.argmax(1, true).unsqueeze(-1); // [b, 1, 1], the first of several
        let place = place.expand([-1, 1, states.size()[2]], false);
        self.layer.forward(&states.gather(1, &place, false).squeeze_dim(1))
    }
}

impl Layers for TextEncoder {
    fn modules_mut(&mut self) -> Vec<Module<'_>> {
        let mut out = Vec::new();
        for l in &mut self.layers {
            out.push(Module::Norm(&mut l.layer_norm1));
            out.extend([&mut l.q_proj, &mut l.k_proj, &mut l.v_proj, &mut l.out_proj].map(Module::Layer));
            out.push(Module::Norm(&mut l.layer_norm2));
            out.extend([&mut l.fc1, &mut l.fc2].map(Module::Layer));
        }
        out.push(Module::Norm(&mut self.final_layer_norm));
        out.extend(self.projection.as_mut().map(|projection| Module::Layer(&mut projection.layer)));
        out
    }
}
