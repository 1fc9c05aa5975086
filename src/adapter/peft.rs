//! HRA adapters as PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Keys are `base_model.model.LAYER.hra_u`, shape `(d_in, r)`, and `base_model.model.LAYER.base_layer.bias` where
//! biases were trained (PEFT 0.21 `save_pretrained`). What PEFT's config has no field for goes into the metadata of
//! the tensor file, which PEFT ignores silently; unknown config fields make it warn.

use super::hra::{HraConfig, HraInit};
use super::{Adapter, Hra, Method};
use crate::error::{Error, Result};
use crate::files;
use crate::tensor_file::{self, TensorFile};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// File names in an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// See [`CONFIG_FILE`].
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// PEFT release whose files these are.
const PEFT_VERSION: &str = "0.21.2";

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
}

/// A whole adapter, read from a folder.
pub struct AdapterFile {
    /// Its settings.
    pub config: AdapterConfig,
    /// By layer name, without PEFT's prefix; tensors are f32 on the CPU.
    pub layers: BTreeMap<String, Box<dyn Adapter>>,
    /// Trained biases `(n)`, f32, by the name of their layer or norm.
    pub biases: BTreeMap<String, Tensor>,
    /// Keys that belong to no known part of an adapter of this method.
    pub unused: Vec<String>,
    /// What the tensor file says of itself in text.
    pub metadata: BTreeMap<String, String>,
}

impl AdapterConfig {
    /// The whole field set that PEFT writes. `class` is the adapted model's class and its module in Python.
    pub fn to_json(&self, class: (&str, &str)) -> Value {
        let Method::Hra(hra) = &self.method else { return Value::Null };
        let bias = match self.bias {
            Bias::None => "none",
            Bias::All => "all",
            Bias::Only => "hra_only",
        };
        json!({
            "apply_GS": hra.gram_schmidt,
            "auto_mapping": {"base_model_class": class.0, "parent_library": class.1},
            "base_model_name_or_path": self.base_model,
            "bias": bias,
            "exclude_modules": null,
            "inference_mode": true,
            "init_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "modules_to_save": null,
            "peft_type": "HRA",
            "peft_version": PEFT_VERSION,
            "r": hra.rank,
            "revision": null,
            "target_modules": self.targets,
            "task_type": null,
        })
    }

    fn from_json(path: &Path, value: &Value) -> Result<Self> {
        let problem = |text: String| Error::format(path, text);
        match value["peft_type"].as_str() {
            Some("HRA") => {}
            Some(other) => {
                return Err(problem(format!("expected an adapter of peft_type HRA, found {other}")));
            }
            None => return Err(problem("expected PEFT's adapter config, found no `peft_type`".into())),
        }
        let rank = value["r"].as_i64().filter(|r| *r > 0);
        let rank =
            rank.ok_or_else(|| problem(format!("r: expected a positive number, found {}", value["r"])))?;
        let bias = match value["bias"].as_str() {
            None | Some("none") => Bias::None,
            Some("all") => Bias::All,
            Some("hra_only") => Bias::Only,
            Some(other) => {
                return Err(problem(format!("bias: expected none, all or hra_only, found {other}")));
            }
        };
        if value["modules_to_save"].as_array().is_some_and(|list| !list.is_empty()) {
            return Err(problem(format!(
                "modules_to_save: expected none, found {}",
                value["modules_to_save"]
            )));
        }
        Ok(Self {
            method: Method::Hra(HraConfig {
                rank,
                gram_schmidt: value["apply_GS"].as_bool().unwrap_or(false),
                init: HraInit::Peft,
                allow_odd_rank: true,
            }),
            bias,
            targets: value["target_modules"].clone(),
            base_model: value["base_model_name_or_path"].as_str().map(str::to_string),
        })
    }
}

impl AdapterFile {
    /// Reads a PEFT folder; tensors become f32 on the CPU. All problems of the file are reported at once.
    pub fn read(dir: &Path) -> Result<Self> {
        let config_path = dir.join(CONFIG_FILE);
        if !config_path.is_file() {
            return Err(Error::format(
                dir,
                format!(
                    "expected an adapter folder with {CONFIG_FILE} and {WEIGHTS_FILE}, found no {CONFIG_FILE}"
                ),
            ));
        }
        let text = files::read_to_string(&config_path)?;
        let value: Value =
            serde_json::from_str(&text).map_err(|e| Error::format(&config_path, e.to_string()))?;
        let config = AdapterConfig::from_json(&config_path, &value)?;

        let file = TensorFile::open(&dir.join(WEIGHTS_FILE))?;
        let Method::Hra(hra) = &config.method else { return Err(Error::config("not an HRA adapter")) };
        let mut layers: BTreeMap<String, Box<dyn Adapter>> = BTreeMap::new();
        let mut biases = BTreeMap::new();
        let mut unused = Vec::new();
        let mut problems = Vec::new();
        for key in file.names() {
            let name = key.strip_prefix("base_model.model.").unwrap_or(&key);
            // transformers 4 puts this before the names of a text tower, 5 does not
            let name = name.strip_prefix("text_model.").unwrap_or(name);
            if let Some(layer) = name.strip_suffix(".hra_u") {
                let shape = file.shape(&key).unwrap_or_default();
                if shape.len() != 2 || shape[0] < 1 || shape[1] != hra.rank {
                    problems.push(format!("`{key}`: expected shape (d_in, {}), found {shape:?}", hra.rank));
                    continue;
                }
                let hra_u = file.read_as(&key, Kind::Float, Device::Cpu)?;
                if let Some(what) = bad_vectors(&hra_u) {
                    problems.push(format!("`{key}`: {what}"));
                }
                layers.insert(layer.to_string(), Box::new(Hra::from_vectors(hra_u, hra.gram_schmidt)));
            } else if let Some(layer) = name.strip_suffix(".bias") {
                let bias = file.read_as(&key, Kind::Float, Device::Cpu)?;
                if bias.isfinite().all().int64_value(&[]) == 0 {
                    problems.push(format!("`{key}`: holds numbers that are not finite"));
                }
                biases.insert(layer.strip_suffix(".base_layer").unwrap_or(layer).to_string(), bias);
            } else {
                unused.push(key);
            }
        }
        if layers.is_empty() && problems.is_empty() {
            problems.push(format!(
                "expected tensors named `..LAYER.hra_u`, found {}",
                tensor_file::list(&file.names())
            ));
        }
        if !problems.is_empty() {
            return Err(Error::Weights { path: file.path().to_path_buf(), problems });
        }
        Ok(Self { config, layers, biases, unused, metadata: file.text() })
    }
}

/// Why raw vectors cannot be used, if so: HRA divides by their norms.
fn bad_vectors(v: &Tensor) -> Option<&'static str> {
    if v.isfinite().all().int64_value(&[]) == 0 {
        return Some("holds numbers that are not finite");
    }
    let shortest = v.norm_scalaropt_dim(2, [0], false).min().double_value(&[]);
    (shortest == 0.0).then_some("holds a vector of length zero, which has no direction")
}

/// Writes a PEFT folder's two files into `dir`, each whole or not at all. `tensors` are named `LAYER.hra_u` and the like.
pub fn write(
    dir: &Path,
    config: &AdapterConfig,
    class: (&str, &str),
    tensors: &[(String, Tensor)],
    text: &[(&str, String)],
) -> Result<()> {
    let tensors: Vec<(String, Tensor)> = tensors
        .iter()
        .map(|(name, t)| (format!("base_model.model.{name}"), t.to_kind(Kind::Float)))
        .collect();
    tensor_file::write(&dir.join(WEIGHTS_FILE), &tensors, text)?;
    let json =
        serde_json::to_string_pretty(&config.to_json(class)).map_err(|e| Error::config(e.to_string()))?;
    files::write_atomic(&dir.join(CONFIG_FILE), format!("{json}\n").as_bytes())
}
