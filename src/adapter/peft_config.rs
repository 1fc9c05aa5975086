//! PEFT's `adapter_config.json`: its whole field set for LORA, OFT, BOFT and HRA (PEFT 0.21), and what a reader must refuse.
//!
//! A field that changes what the tensors mean is honoured or refused; fields of training alone (dropout, the start of the
//! weights) are ignored, and so are names of layers, which the tensors' names tell.

use crate::adapter::Method;
use crate::adapter::blocks::{Cayley, Partition};
use crate::adapter::boft::BoftConfig;
use crate::adapter::hra::{HraConfig, HraInit};
use crate::adapter::lora::{LoraConfig, LoraInit};
use crate::adapter::oft::{Coft, MOST_EPS, OftConfig};
use crate::adapter::peft_patterns::{Exceptions, Patterns};
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// PEFT release whose files these are.
const PEFT_VERSION: &str = "0.21.2";
/// More terms of PEFT's series than anyone uses (it starts at 5), and few enough to compute.
const MOST_TERMS: i64 = 64;

/// Which biases are trained beside the adapter, as PEFT defines it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None.
    None,
    /// Every bias of the network, norms included.
    All,
    /// Those of the adapted layers.
    #[serde(alias = "hra_only", alias = "lora_only", alias = "oft_only", alias = "boft_only")]
    #[value(aliases = ["hra_only", "hra-only", "lora_only", "oft_only", "boft_only"])]
    Only,
}

/// What an `adapter_config.json` says.
#[derive(Debug, Clone)]
pub struct AdapterConfig {
    /// The method and its settings.
    pub method: Method,
    /// `bias`.
    pub bias: Bias,
    /// `target_modules` as it stands in the file. Which layers are adapted is known from the tensors' names; a pattern in
    /// Python's syntax is kept, not run.
    pub targets: Value,
    /// `base_model_name_or_path`.
    pub base_model: Option<String>,
    /// LoRA: layers whose rank or alpha is not the method's.
    pub exceptions: Exceptions,
}

/// A config that was read, and what its reader should know beside it.
#[derive(Debug)]
pub(super) struct ReadConfig {
    pub config: AdapterConfig,
    pub patterns: Patterns,
    pub notes: Vec<String>,
}

impl AdapterConfig {
    /// The whole field set that PEFT writes; `None` for full fine-tuning, which is no adapter of PEFT's. `class` is the
    /// adapted model's class and its module in Python.
    pub fn to_json(&self, class: (&str, &str)) -> Option<Value> {
        let (peft_type, own) = match &self.method {
            Method::Hra(hra) => {
                ("HRA", json!({"apply_GS": hra.gram_schmidt, "init_weights": true, "r": hra.rank}))
            }
            Method::Lora(lora) => ("LORA", self.lora_json(lora)),
            Method::Oft(oft) => ("OFT", oft_json(oft)),
            Method::Boft(boft) => {
                let (blocks, size) = halves(boft.partition);
                let own = json!({
                    "boft_block_num": blocks,
                    "boft_block_size": size,
                    "boft_dropout": 0.0,
                    "boft_n_butterfly_factor": boft.factors,
                    "fan_in_fan_out": false,
                    "init_weights": true,
                });
                ("BOFT", own)
            }
            Method::Full => return None,
        };
        let bias = match self.bias {
            Bias::None => "none".to_string(),
            Bias::All => "all".to_string(),
            Bias::Only => only(peft_type),
        };
        let mut fields = json!({
            "auto_mapping": {"base_model_class": class.0, "parent_library": class.1},
            "base_model_name_or_path": self.base_model,
            "bias": bias,
            "exclude_modules": null,
            "inference_mode": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "modules_to_save": null,
            "peft_type": peft_type,
            "peft_version": PEFT_VERSION,
            "revision": null,
            "target_modules": self.targets,
            "task_type": null,
        });
        if let (Value::Object(fields), Value::Object(own)) = (&mut fields, own) {
            fields.extend(own);
        }
        Some(fields)
    }

    fn lora_json(&self, lora: &LoraConfig) -> Value {
        // Anchored and whole, so that no name of one layer is the ending of another's.
        let key = |name: &String| format!("^{}", regex::escape(name));
        let ranks: Map<String, Value> =
            self.exceptions.rank.iter().map(|(name, r)| (key(name), (*r).into())).collect();
        let alphas: Map<String, Value> =
            self.exceptions.alpha.iter().map(|(name, a)| (key(name), number(*a))).collect();
        json!({
            "alora_invocation_tokens": null,
            "alpha_pattern": alphas,
            "arrow_config": null,
            "corda_config": null,
            "ensure_weight_tying": false,
            "eva_config": null,
            "fan_in_fan_out": false,
            "init_lora_weights": match lora.init {
                LoraInit::Gaussian => Value::from("gaussian"),
                LoraInit::Kaiming => Value::from(true),
            },
            "kasa_config": null,
            "layer_replication": null,
            "loftq_config": {},
            "lora_alpha": number(lora.alpha),
            "lora_bias": false,
            "lora_dropout": 0.0,
            "lora_ga_config": null,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "monteclora_config": null,
            "qalora_group_size": 16,
            "r": lora.rank,
            "rank_pattern": ranks,
            "target_parameters": null,
            "trainable_token_indices": null,
            "use_bdlora": null,
            "use_dora": lora.dora,
            "use_qalora": false,
            "use_rslora": lora.rslora,
            "velora_config": null,
        })
    }
}

/// OFT's own fields. The paper's COFT is a constraint of training: the file says OFT, and its `eps` is for information.
fn oft_json(oft: &OftConfig) -> Value {
    let (blocks, size) = halves(oft.partition);
    let (neumann, terms) = match oft.cayley {
        Cayley::Exact => (false, 5),
        Cayley::Neumann(terms) => (true, terms),
    };
    let (coft, eps) = match oft.coft {
        Coft::None => (false, 6e-5),
        Coft::Paper { eps } => (false, eps),
        Coft::Peft { eps } => (true, eps),
    };
    json!({
        "block_share": oft.block_share,
        "coft": coft,
        "eps": eps,
        "fan_in_fan_out": false,
        "init_weights": true,
        "module_dropout": 0.0,
        "num_cayley_neumann_terms": terms,
        "oft_block_size": size,
        "r": blocks,
        "use_cayley_neumann": neumann,
    })
}

/// `(number of blocks, block size)` with 0 for the one that follows from the other.
fn halves(partition: Partition) -> (i64, i64) {
    match partition {
        Partition::Blocks(n) => (n, 0),
        Partition::BlockSize(b) => (0, b),
    }
}

/// PEFT writes alpha as an integer where it is one.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { Value::from(x as i64) } else { Value::from(x) }
}

/// PEFT's word for the biases of adapted layers.
fn only(peft_type: &str) -> String {
    format!("{}_only", peft_type.to_lowercase())
}

impl ReadConfig {
    /// From the text of a config; all of its problems in one error.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self> {
        let problem = |text: String| Error::format(path, text);
        let value: Value = serde_json::from_str(text).map_err(|e| problem(e.to_string()))?;
        let Some(map) = value.as_object() else {
            return Err(problem("expected PEFT's adapter config, found no JSON object".into()));
        };
        let mut fields = Fields { map, problems: Vec::new() };
        let peft_type = match map.get("peft_type").and_then(Value::as_str) {
            Some(known @ ("HRA" | "LORA" | "OFT" | "BOFT")) => known,
            Some(other) => {
                return Err(problem(format!(
                    "expected an adapter of peft_type HRA, LORA, OFT or BOFT, found {other}"
                )));
            }
            None => return Err(problem("expected PEFT's adapter config, found no `peft_type`".into())),
        };
        fields.refuse("modules_to_save", "whole layers beside the adapter");
        let mut notes = Vec::new();
        let method = match peft_type {
            "HRA" => Method::Hra(HraConfig {
                rank: fields.positive("r"),
                gram_schmidt: fields.flag("apply_GS", false),
                init: HraInit::Peft,
                allow_odd_rank: true,
            }),
            "LORA" => fields.lora(),
            "OFT" => fields.oft(&mut notes),
            _ => fields.boft(),
        };
        let patterns = if peft_type == "LORA" { fields.patterns(text) } else { Patterns::default() };
        let bias = match map.get("bias") {
            None | Some(Value::Null) => Bias::None,
            Some(word) => match word.as_str() {
                Some("none") => Bias::None,
                Some("all") => Bias::All,
                Some(word) if *word == only(peft_type) => Bias::Only,
                _ => {
                    let only = only(peft_type);
                    fields.problems.push(format!("bias: expected none, all or {only}, found {word}"));
                    Bias::None
                }
            },
        };
        if !fields.problems.is_empty() {
            return Err(problem(fields.problems.join("\n")));
        }
        let config = AdapterConfig {
            method,
            bias,
            targets: value["target_modules"].clone(),
            base_model: value["base_model_name_or_path"].as_str().map(str::to_string),
            exceptions: Exceptions::default(),
        };
        Ok(Self { config, patterns, notes })
    }
}

/// The fields of a config, and what is wrong with them.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    problems: Vec<String>,
}

impl Fields<'_> {
    fn expected(&mut self, name: &str, what: &str) {
        let found = self.map.get(name).map_or("nothing".into(), Value::to_string);
        self.problems.push(format!("{name}: expected {what}, found {found}"));
    }

    fn set(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn flag(&mut self, name: &str, default: bool) -> bool {
        match self.set(name) {
            None => default,
            Some(Value::Bool(flag)) => *flag,
            Some(_) => {
                self.expected(name, "true or false");
                default
            }
        }
    }

    fn integer(&mut self, name: &str, default: i64) -> i64 {
        match self.set(name).map(|value| value.as_i64().filter(|n| (0..=i64::from(i32::MAX)).contains(n))) {
            None => default,
            Some(Some(n)) => n,
            Some(None) => {
                self.expected(name, "a whole number");
                default
            }
        }
    }

    fn positive(&mut self, name: &str) -> i64 {
        let n = self.integer(name, 0);
        if n < 1 {
            self.expected(name, "a positive number");
        }
        n.max(1)
    }

    fn number(&mut self, name: &str, default: f64) -> f64 {
        match self.set(name).map(|value| value.as_f64().filter(|x| x.is_finite())) {
            None => default,
            Some(Some(x)) => x,
            Some(None) => {
                self.expected(name, "a number");
                default
            }
        }
    }

    /// A field that must not be set: `why` says what it stands for.
    fn refuse(&mut self, name: &str, why: &str) {
        let empty = match self.set(name) {
            None | Some(Value::Bool(false)) => true,
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Object(map)) => map.is_empty(),
            Some(_) => false,
        };
        if !empty {
            let found = &self.map[name];
            self.problems.push(format!("{name}: expected none, found {found}: {why} cannot be used"));
        }
    }

    fn partition(&mut self, blocks: &str, size: &str, default: i64) -> Partition {
        let (n, b) = (self.integer(blocks, 0), self.integer(size, default));
        match (n, b) {
            (n, 0) if n > 0 => Partition::Blocks(n),
            (0, b) if b > 0 => Partition::BlockSize(b),
            _ => {
                self.problems.push(format!(
                    "expected one of {blocks} and {size} to be 0 and the other positive, found {n} and {b}"
                ));
                Partition::Blocks(1)
            }
        }
    }

    fn lora(&mut self) -> Method {
        self.refuse("fan_in_fan_out", "weights stored the other way round");
        self.refuse("lora_bias", "biases inside of the low-rank product");
        self.refuse("layer_replication", "a model with layers added");
        self.refuse("target_parameters", "adapters of single tensors");
        self.refuse("trainable_token_indices", "trained words of the vocabulary");
        self.refuse("alora_invocation_tokens", "adapters that start in the middle of a prompt");
        self.refuse("use_qalora", "inputs averaged over groups");
        self.refuse("use_bdlora", "block-diagonal matrices");
        for name in ["arrow_config", "kasa_config", "monteclora_config", "velora_config"] {
            self.refuse(name, "another layer than LoRA's");
        }
        let init = match self.set("init_lora_weights") {
            None | Some(Value::Bool(_)) => LoraInit::Kaiming,
            Some(Value::String(word)) if word == "gaussian" => LoraInit::Gaussian,
            // starts that leave the base model as it is
            Some(Value::String(word)) if ["eva", "orthogonal"].contains(&word.as_str()) => LoraInit::Kaiming,
            Some(other) => {
                let other = other.to_string();
                self.problems.push(format!(
                    "init_lora_weights: expected true, false, gaussian, orthogonal or eva, found {other}, with which PEFT may \
                     change the base weights too\nhint: save it in PEFT with path_initial_model_for_weight_conversion"
                ));
                LoraInit::Kaiming
            }
        };
        Method::Lora(LoraConfig {
            rank: self.positive("r"),
            alpha: self.number("lora_alpha", 8.0),
            rslora: self.flag("use_rslora", false),
            init,
            dora: self.flag("use_dora", false),
        })
    }

    fn oft(&mut self, notes: &mut Vec<String>) -> Method {
        self.refuse("fan_in_fan_out", "weights stored the other way round");
        if self.set("oft_block_size").is_none() {
            self.problems.push(
                "oft_block_size: expected a number, found nothing: this OFT was written by PEFT before 0.14, whose tensors \
                 have another form\nhint: train it again"
                    .into(),
            );
        }
        let partition = if self.set("oft_block_size").is_some() {
            self.partition("r", "oft_block_size", 0)
        } else {
            Partition::Blocks(1)
        };
        let terms = self.integer("num_cayley_neumann_terms", 5);
        let cayley = if !self.flag("use_cayley_neumann", true) {
            Cayley::Exact
        } else if (1..=MOST_TERMS).contains(&terms) {
            if !self.set("peft_version").and_then(Value::as_str).is_some_and(since_0_18) {
                notes.push(
                    "this OFT may be of PEFT before 0.18, which had another Cayley-Neumann series; it is used as newer \
                     ones use it"
                        .into(),
                );
            }
            Cayley::Neumann(terms)
        } else {
            self.expected("num_cayley_neumann_terms", &format!("1 to {MOST_TERMS}"));
            Cayley::Exact
        };
        let eps = self.number("eps", 6e-5);
        let coft = if self.flag("coft", false) {
            if !(0.0..=MOST_EPS).contains(&eps) {
                self.expected("eps", &format!("0 or a positive number up to {MOST_EPS:e}"));
            }
            Coft::Peft { eps }
        } else {
            Coft::None
        };
        let block_share = self.flag("block_share", false);
        Method::Oft(OftConfig { partition, cayley, coft, block_share })
    }

    fn boft(&mut self) -> Method {
        self.refuse("fan_in_fan_out", "weights stored the other way round");
        let partition = self.partition("boft_block_num", "boft_block_size", 4);
        let factors = self.integer("boft_n_butterfly_factor", 1);
        if factors < 1 {
            self.expected("boft_n_butterfly_factor", "a positive number");
        }
        Method::Boft(BoftConfig { partition, factors })
    }

    fn patterns(&mut self, text: &str) -> Patterns {
        Patterns::parse(text).unwrap_or_else(|problem| {
            self.problems.push(problem);
            Patterns::default()
        })
    }
}

/// Whether a version such as `0.21.2` or `0.18.1.dev0@abc` is 0.18 or newer.
fn since_0_18(version: &str) -> bool {
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().ok());
    let release = (numbers.next().flatten(), numbers.next().flatten());
    matches!(release, (Some(major), Some(minor)) if (major, minor) >= (0, 18))
}
