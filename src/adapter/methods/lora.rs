//! LoRA (arXiv 2106.09685): `W' = W + s B A`, with `s = alpha / r`, or `alpha / sqrt(r)` for rsLoRA (arXiv 2312.03732).
//!
//! A convolution's A is a convolution with r filters and its B a 1x1 one after it, as PEFT stores them; no layer ever has
//! a dense `B A`. DoRA, which is built on it, is in [`super::dora`].

use crate::adapter::method::{
    Combined, FileFacts, How, LayerChain, Method, MethodSettings, OwnSection, OwnSettings, Parts, PeftReader,
    RegisteredMethod,
};
use crate::adapter::peft_fields::{Fields, factor};
use crate::adapter::peft_patterns::{Exceptions, Patterns};
use crate::adapter::{Adapter, Change, Form, Frozen, check_stored_rank, matrix_shape};
use crate::error::{Error, Result};
use crate::platform::choice::{Choice, Named, named};
use crate::platform::host;
use crate::platform::random;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

/// Far above any use; libtorch panics at factors that f32 does not hold.
const MOST_ALPHA: f64 = 1e12;

/// How A starts; B starts at zero, so training starts at the base model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoraInit {
    /// Normal with deviation `1 / r`: PEFT's `gaussian`, and what diffusers' training scripts use.
    Gaussian,
    /// Uniform in `+- 1 / sqrt(d_in)`: torch's `kaiming_uniform(a = sqrt 5)`, PEFT's default.
    Kaiming,
}

impl Choice for LoraInit {
    const CHOICES: &'static [Named<Self>] = &[
        named(
            Self::Gaussian,
            "gaussian",
            &[],
            "Normal with deviation `1 / r`: PEFT's `gaussian`, and what diffusers' training scripts use",
        ),
        named(
            Self::Kaiming,
            "kaiming",
            &[],
            "Uniform in `+- 1 / sqrt(d_in)`: torch's `kaiming_uniform(a = sqrt 5)`, PEFT's default",
        ),
    ];
}

/// The settings of LoRA, and of DoRA.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// r.
    pub rank: i64,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Divide by `sqrt(r)` in place of `r`.
    pub rslora: bool,
    /// Start of A.
    pub init: LoraInit,
    /// Layers of a file that have another rank or alpha.
    pub exceptions: Exceptions,
    /// The same as the file's config says it, until its layers are known.
    pub patterns: Patterns,
}

/// What a training says of LoRA, and of DoRA.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LoraSettings {
    rank: i64,
    /// The rank, where it is not set.
    lora_alpha: Option<f64>,
    use_rslora: bool,
    init_lora_weights: LoraInit,
}

impl Default for LoraSettings {
    fn default() -> Self {
        Self { rank: 8, lora_alpha: None, use_rslora: false, init_lora_weights: LoraInit::Gaussian }
    }
}

impl From<LoraSettings> for LoraConfig {
    fn from(settings: LoraSettings) -> Self {
        let LoraSettings { rank, lora_alpha, use_rslora: rslora, init_lora_weights: init } = settings;
        Self { rslora, init, ..Self::new(rank, lora_alpha.unwrap_or(rank as f64)) }
    }
}

impl OwnSettings for LoraSettings {
    fn method(self) -> Method {
        Method::new(LoraConfig::from(self))
    }
}

/// LoRA's line in the registry.
pub const METHOD: RegisteredMethod = RegisteredMethod {
    name: "lora",
    about: "Low-rank adaptation",
    own: OwnSection::of::<LoraSettings>(),
    reader: Some(PeftReader {
        peft_type: "LORA",
        prefix: "lora_",
        read: |fields| match fields.flag("use_dora", false) {
            false => Some(Box::new(LoraConfig::read(fields))),
            true => None,
        },
    }),
};

impl LoraConfig {
    /// With a start from a normal distribution, and one rank and alpha for all layers.
    pub fn new(rank: i64, alpha: f64) -> Self {
        let (init, exceptions, patterns) = (LoraInit::Gaussian, Exceptions::default(), Patterns::default());
        Self { rank, alpha, rslora: false, init, exceptions, patterns }
    }

    /// s for a layer of this rank and alpha.
    pub fn scale(rank: i64, alpha: f64, rslora: bool) -> f64 {
        alpha / if rslora { (rank as f64).sqrt() } else { rank as f64 }
    }

    /// From PEFT's config, of LoRA or DoRA.
    pub(super) fn read(fields: &mut Fields) -> Self {
        fields.refuse("fan_in_fan_out", "weights stored the other way round");
        fields.refuse("lora_bias", "biases inside of the low-rank product");
        fields.refuse("layer_replication", "a model with layers added");
        fields.refuse("target_parameters", "adapters of single tensors");
        fields.refuse("trainable_token_indices", "trained words of the vocabulary");
        fields.refuse("alora_invocation_tokens", "adapters that start in the middle of a prompt");
        fields.refuse("use_qalora", "inputs averaged over groups");
        fields.refuse("use_bdlora", "block-diagonal matrices");
        for name in ["arrow_config", "kasa_config", "megatron_config", "monteclora_config", "velora_config"] {
            fields.refuse(name, "another layer than LoRA's");
        }
        let init = match fields.set("init_lora_weights") {
            None | Some(Value::Bool(_)) => LoraInit::Kaiming,
            Some(Value::String(word)) if word == "gaussian" => LoraInit::Gaussian,
            // starts that leave the base model as it is
            Some(Value::String(word)) if ["eva", "orthogonal"].contains(&word.as_str()) => LoraInit::Kaiming,
            Some(other) => {
                let other = other.to_string();
                fields.problems.push(format!(
                    "init_lora_weights: expected true, false, gaussian, orthogonal or eva, found {other}, with which PEFT may \
                     change the base weights too; save it in PEFT with path_initial_model_for_weight_conversion"
                ));
                LoraInit::Kaiming
            }
        };
        fields.asked(&["rank_pattern", "alpha_pattern"]);
        let patterns = Patterns::parse(fields.text).unwrap_or_else(|problem| {
            fields.problems.push(problem);
            Patterns::default()
        });
        Self {
            rank: fields.positive("r"),
            alpha: fields.number("lora_alpha", 8.0),
            rslora: fields.flag("use_rslora", false),
            init,
            exceptions: Exceptions::default(),
            patterns,
        }
    }

    /// PEFT's own fields.
    pub(super) fn peft_fields(&self, dora: bool) -> Value {
        // Anchored and whole, so that no name of one layer is the ending of another's.
        let key = |name: &String| format!("^{}", regex::escape(name));
        let ranks: Map<String, Value> =
            self.exceptions.rank.iter().map(|(name, r)| (key(name), (*r).into())).collect();
        let alphas: Map<String, Value> =
            self.exceptions.alpha.iter().map(|(name, a)| (key(name), factor(*a))).collect();
        json!({
            "alora_invocation_tokens": null,
            "alpha_pattern": alphas,
            "arrow_config": null,
            "corda_config": null,
            "ensure_weight_tying": false,
            "eva_config": null,
            "fan_in_fan_out": false,
            "init_lora_weights": match self.init {
                LoraInit::Gaussian => Value::from("gaussian"),
                LoraInit::Kaiming => Value::from(true),
            },
            "kasa_config": null,
            "layer_replication": null,
            "loftq_config": {},
            "lora_alpha": factor(self.alpha),
            "lora_bias": false,
            "lora_dropout": 0.0,
            "lora_ga_config": null,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "monteclora_config": null,
            "qalora_group_size": 16,
            "r": self.rank,
            "rank_pattern": ranks,
            "target_parameters": null,
            "trainable_token_indices": null,
            "use_bdlora": null,
            "use_dora": dora,
            "use_qalora": false,
            "use_rslora": self.rslora,
            "velora_config": null,
        })
    }

    /// In a few words.
    pub(super) fn describe_as(&self, name: &str) -> String {
        let Self { rank, alpha, rslora, .. } = self;
        format!("{}{name} r {rank}, alpha {alpha}", if *rslora { "rs" } else { "" })
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

    /// The low-rank part of a file's layer.
    pub(super) fn lora(&self, parts: &mut Parts) -> std::result::Result<Lora, String> {
        let (a, b) = (parts.take("lora_A.weight")?, parts.take("lora_B.weight")?);
        let expected = self.exceptions.rank.get(&parts.layer).copied().unwrap_or(self.rank);
        let alpha = self.exceptions.alpha.get(&parts.layer).copied().unwrap_or(self.alpha);
        let found = a.size().first().copied().unwrap_or_default();
        if found != expected {
            return Err(format!("lora_A: expected rank {expected}, found {found}"));
        }
        Lora::from_tensors(a, b, Self::scale(expected, alpha, self.rslora))
    }
}

impl MethodSettings for LoraConfig {
    fn name(&self) -> &'static str {
        METHOD.name
    }

    fn describe(&self) -> String {
        self.describe_as("LoRA")
    }

    fn validate(&self) -> Result<()> {
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

    fn start(&self, weight: &Tensor, seed: u64) -> std::result::Result<Box<dyn Adapter>, String> {
        Ok(Box::new(Lora::new(&weight.size(), weight.device(), self, seed)?))
    }

    fn parameters_for(&self, weight: &[i64]) -> std::result::Result<usize, String> {
        self.check_rank(weight)?;
        let (d_out, d_in) = matrix_shape(weight);
        Ok((self.rank * (d_in + d_out)) as usize)
    }

    fn is_uniform(&self) -> bool {
        self.exceptions == Exceptions::default()
    }

    fn tensor_names(&self) -> &'static [&'static str] {
        &["lora_A.weight", "lora_B.weight"]
    }

    fn to_peft(&self) -> Option<(&'static str, Value)> {
        Some(("LORA", self.peft_fields(false)))
    }

    /// Which layers have another rank or alpha.
    fn settle(&mut self, file: &FileFacts) -> std::result::Result<Vec<String>, Vec<String>> {
        let layers: Vec<(&str, &str)> =
            file.layers.iter().map(|parts| (parts.layer.as_str(), parts.name.as_str())).collect();
        let (mut exceptions, notes) = std::mem::take(&mut self.patterns).resolve(&layers)?;
        exceptions.rank.retain(|_, rank| *rank != self.rank);
        exceptions.alpha.retain(|_, alpha| *alpha != self.alpha);
        self.exceptions = exceptions;
        Ok(notes)
    }

    fn adapter(&self, mut parts: Parts) -> std::result::Result<Box<dyn Adapter>, String> {
        Ok(Box::new(self.lora(&mut parts)?))
    }

    /// `sum s_i B_i A_i = [s_1 B_1, s_2 B_2, ..] [A_1; A_2; ..]`; the scales go into B, so that alpha is the rank.
    fn combine(&self, _: &[&Method], layers: &[LayerChain], _: How) -> Result<Combined> {
        let mut stacked = Vec::new();
        for (name, chain) in layers {
            let (mut downs, mut ups) = (Vec::new(), Vec::new());
            for link in chain {
                let (down, up) = link.get::<Lora>().wide();
                downs.push(down.to_kind(Kind::Float));
                ups.push((up * link.strength).to_kind(Kind::Float));
            }
            let filters = chain.iter().map(|link| link.get::<Lora>().a.size()[1..].to_vec());
            let filter = filters.max_by_key(Vec::len).unwrap_or_default();
            stacked.push((name, Tensor::cat(&downs, 0), Tensor::cat(&ups, 1), filter));
        }
        // One rank for all layers: rows and columns of zeros add nothing.
        let rank = stacked.iter().map(|(_, down, ..)| down.size()[0]).max().unwrap_or(1);
        let mut tensors = Vec::new();
        for (name, down, up, filter) in stacked {
            let missing = rank - down.size()[0];
            let (down, up) = (down.constant_pad_nd([0, 0, 0, missing]), up.constant_pad_nd([0, missing]));
            let (mut a, mut b) = (vec![rank], up.size());
            a.extend(&filter);
            if filter.len() == 3 {
                b.extend([1, 1]); // the 1x1 convolution after one with `rank` filters
            }
            tensors.push((format!("{name}.lora_A.weight"), down.reshape(a)));
            tensors.push((format!("{name}.lora_B.weight"), up.reshape(b)));
        }
        Ok((Method::new(Self { init: self.init, ..Self::new(rank, rank as f64) }), tensors))
    }
}

/// A shape without the kernel of a 1x1 convolution.
fn flat(shape: &[i64]) -> &[i64] {
    if shape.len() == 4 && shape[2..] == [1, 1] { &shape[..2] } else { shape }
}

/// The LoRA adapter of one layer.
pub struct Lora {
    /// `(r, d_in)` or `(r, c, kh, kw)`, f32; of either layer, see [`Self::from_tensors`].
    a: Tensor,
    /// `(d_out, r)` or `(d_out, r, 1, 1)`, f32.
    b: Tensor,
    scale: f64,
}

impl Lora {
    /// An adapter with the given matrices, A `(r, d_in)` or `(r, c, kh, kw)` and B `(d_out, r)` or `(d_out, r, 1, 1)`; a
    /// convolution's may be flat, and a linear map's have four dimensions, which some trainers write: the numbers are the same.
    ///
    /// Errors: what is wrong with their shapes.
    pub fn from_tensors(a: Tensor, b: Tensor, scale: f64) -> std::result::Result<Self, String> {
        let (down, up) = (a.size(), b.size());
        let both = [2, 4].contains(&down.len()) && flat(&up).len() == 2;
        if !both || down[0] != up[1] || down.iter().chain(&up).any(|d| *d < 1) {
            return Err(format!(
                "expected lora_A (r, d_in) or (r, c, kh, kw) and lora_B (d_out, r) or (d_out, r, 1, 1), found {down:?} and {up:?}"
            ));
        }
        if scale.abs() > f64::from(f32::MAX) || scale.is_nan() {
            return Err(format!("alpha: expected a scale that f32 holds, found {scale:e}"));
        }
        check_stored_rank(down[0])?;
        Ok(Self { a, b, scale })
    }

    /// A new adapter for a weight of this shape on this device. Draws on the CPU from `seed` alone.
    pub fn new(
        weight: &[i64],
        device: Device,
        config: &LoraConfig,
        seed: u64,
    ) -> std::result::Result<Self, String> {
        config.check_rank(weight)?;
        let _guard = tch::no_grad_guard();
        let r = config.rank;
        let mut down = weight.to_vec();
        down[0] = r;
        let mut up = vec![1; weight.len()];
        up[..2].copy_from_slice(&[weight[0], r]);
        let a = random::seeded(seed, |draws| match config.init {
            LoraInit::Gaussian => draws.normal(&down) / r as f64,
            LoraInit::Kaiming => {
                let bound = 1.0 / (matrix_shape(weight).1 as f64).sqrt();
                draws.uniform(&down, -bound, bound)
            }
        });
        let b = Tensor::zeros(&up[..], (Kind::Float, device));
        let scale = LoraConfig::scale(r, config.alpha, config.rslora);
        Self::from_tensors(host::to_device(&a, device), b, scale)
    }

    /// `(A, s B)` as matrices `(r, d_in)`, `(d_out, r)`, f32 with gradient.
    pub(super) fn factors(&self) -> (Tensor, Tensor) {
        let up = self.b.flatten(1, -1);
        (self.a.flatten(1, -1), if self.scale == 1.0 { up } else { up * self.scale })
    }

    /// `(A, s B)` as matrices in f64 on the CPU.
    pub(super) fn wide(&self) -> (Tensor, Tensor) {
        let wide = |t: &Tensor| host::wide(t).flatten(1, -1);
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
        let is_flat = a.len() == 2 && a[1] == weight[1..].iter().product::<i64>();
        if (flat(&a)[1..] == flat(weight)[1..] || is_flat) && b[0] == weight[0] {
            return Ok(());
        }
        Err(format!(
            "expected a LoRA of shape {weight:?} for this model, found lora_A {a:?} and lora_B {b:?}"
        ))
    }

    fn size(&self) -> (i64, i64) {
        (self.a.size()[1..].iter().product(), self.b.size()[0])
    }

    fn adds_the_same_to_any_weight(&self) -> bool {
        true
    }

    /// `W + strength s B A`.
    fn change(&self, _: &Tensor, strength: f64) -> Change {
        let (down, up) = self.wide();
        Form::LowRank { down, up: up * strength }.into()
    }
}
