//! Vision transformers whose class token is a picture's embedding: DINO (Caron et al. 2021, transformers `ViTModel`) and DINOv2
//! (Oquab et al. 2023, transformers `Dinov2Model`), of any size.
//!
//! DINOv2 multiplies what each half of a layer adds by a trained scale, and its giant has a gated feed-forward.

use crate::data::image::RgbImage;
use crate::error::{Error, Result};
use crate::lab::evaluate::processor::Processor;
use crate::lab::evaluate::vision::{self, Division, Eye, Patches};
use crate::model::attention::{Sees, attend, join_heads, split_heads};
use crate::model::layers::{Layer, Norm};
use crate::weights::bounds::Transformer;
use crate::weights::scope::{Scope, Weights};
use serde_json::{Value, json};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// A vision transformer whose class token is the picture's embedding: DINO (`vit`) or DINOv2 (`dinov2`).
pub struct Vit {
    eye: Eye,
    layers: Vec<VitLayer>,
    layernorm: Norm,
}

impl Vit {
    /// Loads a Hugging Face folder; `config.json`'s `model_type` says which it is. Everything is computed in f32. Errors: every
    /// problem of a file at once.
    pub fn load(dir: &Path, device: Device) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let config = VitConfig::read(dir)?;
        let processor = Processor::read(dir)?;
        let weights = Weights::in_folder(dir, "model", Kind::Float.into(), device)?;
        // Files of models with a head have a prefix.
        let root = weights.root();
        let prefixed = weights.shape(&format!("{}.embeddings.cls_token", config.prefix())).is_some();
        let root = if prefixed { root.at(config.prefix()) } else { root };
        let width = config.sizes.hidden_size;
        let patches = Patches::vit(&root.at("embeddings"), config.division, width);
        let layer = |i| VitLayer::new(&root.at("encoder.layer").at(i), &config);
        let layers = (0..config.sizes.num_hidden_layers).map(layer).collect();
        let layernorm = Norm::layer(&root.at("layernorm"), width, config.sizes.layer_norm_eps);
        weights.finish()?; // a pooler, a head and a mask token are left over
        let patches = patches.fitted(processor.size()).map_err(|problem| Error::format(dir, problem))?;
        let eye = Eye { dir: dir.to_path_buf(), processor, patches, width, device };
        Ok(Self { eye, layers, layernorm })
    }

    /// Unit class tokens of the last hidden state `(b, d)`, f32, CPU.
    pub fn images(&self, pictures: &[&RgbImage]) -> Result<Tensor> {
        self.eye.embed(pictures, |tokens| {
            let mut x = tokens.shallow_clone();
            for layer in &self.layers {
                x = layer.forward(&x);
            }
            self.layernorm.forward(&x.select(1, 0))
        })
    }
}

/// Self-attention and a feed-forward, each with a norm before and a skip around.
struct VitLayer {
    norm1: Norm,
    query: Layer,
    key: Layer,
    value: Layer,
    output: Layer,
    norm2: Norm,
    feed_in: Layer,
    feed_out: Layer,
    /// DINOv2's `layer_scale1` and `layer_scale2` `(d)`.
    scales: Option<(Tensor, Tensor)>,
    gated: bool,
    heads: i64,
}

impl VitLayer {
    fn new(scope: &Scope, config: &VitConfig) -> Self {
        let Transformer { hidden_size: width, intermediate_size: hidden, num_attention_heads: heads, .. } =
            config.sizes;
        let norm = |name: &str| Norm::layer(&scope.at(name), width, config.sizes.layer_norm_eps);
        let linear = |name: &str, from: i64, to: i64| Layer::linear(&scope.at(name), from, to, true);
        let attention =
            |name: &str| Layer::linear(&scope.at("attention.attention").at(name), width, width, config.bias);
        let scale = |name: &str| scope.at(name).tensor("lambda1", &[width]);
        let [norm1, norm2, feed_in, feed_out] = match config.kind {
            VitFamily::Dino => ["layernorm_before", "layernorm_after", "intermediate.dense", "output.dense"],
            VitFamily::Dinov2 if config.gated => ["norm1", "norm2", "mlp.weights_in", "mlp.weights_out"],
            VitFamily::Dinov2 => ["norm1", "norm2", "mlp.fc1", "mlp.fc2"],
        };
        Self {
            norm1: norm(norm1),
            query: attention("query"),
            key: attention("key"),
            value: attention("value"),
            output: linear("attention.output.dense", width, width),
            norm2: norm(norm2),
            feed_in: linear(feed_in, width, if config.gated { 2 * hidden } else { hidden }),
            feed_out: linear(feed_out, hidden, width),
            scales: (config.kind == VitFamily::Dinov2)
                .then(|| (scale("layer_scale1"), scale("layer_scale2"))),
            gated: config.gated,
            heads,
        }
    }

    /// `(b, n, width)` to the same shape.
    fn forward(&self, x: &Tensor) -> Tensor {
        let normed = self.norm1.forward(x);
        let [q, k, v] =
            [&self.query, &self.key, &self.value].map(|l| split_heads(&l.forward(&normed), self.heads));
        let mut y = self.output.forward(&join_heads(&attend(&q, &k, &v, Sees::All, false)));
        if let Some((scale, _)) = &self.scales {
            y *= scale;
        }
        let x = x + y;
        let h = self.feed_in.forward(&self.norm2.forward(&x));
        let h = if self.gated {
            let halves = h.chunk(2, -1); // SwiGLU
            halves[0].silu() * &halves[1]
        } else {
            h.gelu("none")
        };
        let mut y = self.feed_out.forward(&h);
        if let Some((_, scale)) = &self.scales {
            y *= scale;
        }
        x + y
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum VitFamily {
    Dino,
    Dinov2,
}

/// What `config.json` says, with the defaults of transformers' `ViTConfig` and `Dinov2Config`.
struct VitConfig {
    kind: VitFamily,
    sizes: Transformer,
    division: Division,
    /// Of queries, keys and values.
    bias: bool,
    /// SwiGLU; then `intermediate_size` is that of each half.
    gated: bool,
}

impl VitConfig {
    fn read(dir: &Path) -> Result<Self> {
        let (value, file) = vision::config(dir)?;
        let kind = match value["model_type"].as_str() {
            Some("vit") => VitFamily::Dino,
            Some("dinov2") => VitFamily::Dinov2,
            _ => {
                let found = &value["model_type"];
                let problem = format!("model_type: expected vit (DINO) or dinov2, found {found}");
                return Err(Error::format(&file.path, problem));
            }
        };
        Self::parse(kind, &value).map_err(|problem| Error::format(&file.path, problem))
    }

    fn parse(kind: VitFamily, given: &Value) -> std::result::Result<Self, String> {
        let mut settings = vision::with_defaults(defaults(kind), given);
        let flag = |name: &str| {
            let value = &settings[name];
            value.as_bool().ok_or_else(|| format!("{name}: expected true or false, found {value}"))
        };
        let bias = flag("qkv_bias")?;
        let gated = kind == VitFamily::Dinov2 && flag("use_swiglu_ffn")?;
        if kind == VitFamily::Dinov2 {
            let product = settings["hidden_size"].as_f64().zip(settings["mlp_ratio"].as_f64());
            let hidden = product.map_or(0.0, |(width, ratio)| (width * ratio).trunc());
            // Two thirds, up to a multiple of 8: as many weights as without the gate.
            let hidden = if gated { ((hidden * 2.0 / 3.0).trunc() / 8.0).ceil() * 8.0 } else { hidden };
            settings["intermediate_size"] = json!(hidden as i64);
        }
        let (sizes, division) = vision::sizes(&settings, &["gelu"])?;
        Ok(Self { kind, sizes, division, bias, gated })
    }

    /// Under which a model with a head has these tensors.
    fn prefix(&self) -> &'static str {
        match self.kind {
            VitFamily::Dino => "vit",
            VitFamily::Dinov2 => "dinov2",
        }
    }
}

fn defaults(kind: VitFamily) -> Value {
    let (patch, eps) = match kind {
        VitFamily::Dino => (16, 1e-12),
        VitFamily::Dinov2 => (14, 1e-6),
    };
    json!({
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "mlp_ratio": 4,
        "hidden_act": "gelu", "layer_norm_eps": eps, "image_size": 224, "patch_size": patch, "num_channels": 3,
        "qkv_bias": true, "use_swiglu_ffn": false,
    })
}
