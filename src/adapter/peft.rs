//! Adapters as PEFT's folders: `adapter_model.safetensors`, beside the config of [`super::peft_config`].
//!
//! Keys are `base_model.model.LAYER.` and the method's names, such as `hra_u` or `lora_A.weight`, and
//! `base_model.model.LAYER.base_layer.bias` or `base_model.model.LAYER.bias` where biases were trained (PEFT 0.21
//! `save_pretrained`). What PEFT's config has no field for goes into the metadata of the tensor file, which PEFT ignores
//! silently; unknown config fields make it warn.

use crate::adapter::boft::BoftConfig;
use crate::adapter::lora::LoraConfig;
use crate::adapter::oft::{Coft, MOST_EPS, OftConfig};
use crate::adapter::peft_config::ReadConfig;
use crate::adapter::peft_patterns::Patterns;
use crate::adapter::{Adapter, Boft, Dora, Hra, Lora, Method, Oft};
use crate::error::{Error, Result};
use crate::platform::files;
use crate::weights::tensor_file::{self, TensorFile};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tch::{Device, Kind, Tensor};

pub use crate::adapter::peft_config::{AdapterConfig, Bias};
pub use crate::adapter::peft_patterns::Exceptions;

/// File names in an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// See [`CONFIG_FILE`].
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// The longest config that is read; PEFT's own have a few kilobytes.
const MAX_CONFIG: u64 = 16 << 20;

/// A whole adapter, read from a folder.
pub struct AdapterFile {
    /// Its settings.
    pub config: AdapterConfig,
    /// By layer name, without PEFT's prefix; tensors are f32 on the CPU.
    pub layers: BTreeMap<String, Box<dyn Adapter>>,
    /// Trained biases `(n)`, f32, by the name of their layer or norm.
    pub biases: BTreeMap<String, Tensor>,
    /// Keys that belong to no known part of an adapter.
    pub unused: Vec<String>,
    /// What the tensor file says of itself in text.
    pub metadata: BTreeMap<String, String>,
    /// What a user should know, one sentence each.
    pub notes: Vec<String>,
}

/// The tensors of one layer, by the method's names.
#[derive(Default)]
struct Parts {
    /// The layer's name as the file has it, which patterns are matched with.
    name: String,
    tensors: BTreeMap<&'static str, Tensor>,
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
        let text = String::from_utf8_lossy(&files::read(&config_path, MAX_CONFIG)?).into_owned();
        let ReadConfig { mut config, patterns, mut notes } = ReadConfig::parse(&config_path, &text)?;
        let file = TensorFile::open(&dir.join(WEIGHTS_FILE))?;
        let metadata = file.texts();
        restore_coft(&mut config.method, &metadata);
        let mut found = Found::in_file(&file, &config.method)?;
        let layers = found.adapters(&mut config, &patterns, &mut notes);
        if layers.is_empty() && found.problems.is_empty() {
            let names = part_names(&config.method)[0];
            found.problems.push(format!(
                "expected tensors named `..LAYER.{names}`, found {}",
                tensor_file::list(&file.names())
            ));
        }
        if !found.problems.is_empty() {
            return Err(Error::Weights { path: file.path().to_path_buf(), problems: found.problems });
        }
        Ok(Self { config, layers, biases: found.biases, unused: found.unused, metadata, notes })
    }
}

/// What a tensor file holds.
#[derive(Default)]
struct Found {
    parts: BTreeMap<String, Parts>,
    biases: BTreeMap<String, Tensor>,
    unused: Vec<String>,
    problems: Vec<String>,
}

impl Found {
    fn in_file(file: &TensorFile, method: &Method) -> Result<Self> {
        let mut found = Self::default();
        for key in file.names() {
            let name = key.strip_prefix("base_model.model.").unwrap_or(&key);
            // transformers 4 puts this before the names of a text tower, 5 does not
            let short = name.strip_prefix("text_model.").unwrap_or(name);
            let part = part_names(method).iter().find_map(|part| {
                let layer = |name: &str| Some(name.strip_suffix(part)?.strip_suffix('.')?.to_string());
                Some((*part, layer(name)?, layer(short)?))
            });
            let bias =
                short.strip_suffix(".bias").map(|layer| layer.strip_suffix(".base_layer").unwrap_or(layer));
            let of_adapter = [".hra_", ".lora_", ".oft_", ".boft_"].iter().any(|p| name.contains(p));
            if part.is_none() && of_adapter {
                found.problems.push(format!(
                    "`{key}`: expected only tensors of {}, which are named {}",
                    method.describe(),
                    part_names(method).join(", ")
                ));
                continue;
            } else if part.is_none() && bias.is_none() {
                found.unused.push(key);
                continue;
            }
            if !file.is_float(&key) {
                let dtype = file.dtype(&key);
                found.problems.push(format!("`{key}`: expected floating point, found {dtype}"));
                continue;
            }
            let tensor = file.read_as(&key, Kind::Float, Device::Cpu)?;
            if tensor.isfinite().all().int64_value(&[]) == 0 {
                found.problems.push(format!("`{key}`: holds numbers that are not finite"));
                continue;
            }
            let earlier = match (part, bias) {
                (Some((part, name, layer)), _) => {
                    let parts = found.parts.entry(layer).or_default();
                    parts.name = name;
                    parts.tensors.insert(part, tensor)
                }
                (None, bias) => found.biases.insert(bias.unwrap_or_default().to_string(), tensor),
            };
            if earlier.is_some() {
                found.problems.push(format!("`{key}`: names the same tensor as another key"));
            }
        }
        Ok(found)
    }

    /// The adapters that the tensors are; problems are added to the others.
    fn adapters(
        &mut self,
        config: &mut AdapterConfig,
        patterns: &Patterns,
        notes: &mut Vec<String>,
    ) -> BTreeMap<String, Box<dyn Adapter>> {
        let names: Vec<String> = self.parts.values().map(|parts| parts.name.clone()).collect();
        let exceptions = patterns.resolve(&names).unwrap_or_else(|problems| {
            self.problems.extend(problems);
            Exceptions::default()
        });
        let mut factors = BTreeSet::new();
        let mut layers = BTreeMap::new();
        for (layer, parts) in std::mem::take(&mut self.parts) {
            let rank = exceptions.rank.get(&parts.name).copied();
            let alpha = exceptions.alpha.get(&parts.name).copied();
            if let Method::Lora(lora) = &config.method {
                config.exceptions.rank.extend(rank.filter(|r| *r != lora.rank).map(|r| (layer.clone(), r)));
                config
                    .exceptions
                    .alpha
                    .extend(alpha.filter(|a| *a != lora.alpha).map(|a| (layer.clone(), a)));
            }
            factors.extend(parts.tensors.get("boft_R").and_then(|r| r.size().first().copied()));
            match adapter(&config.method, parts, rank, alpha) {
                Ok(adapter) => {
                    layers.insert(layer, adapter);
                }
                Err(problem) => self.problems.push(format!("`{layer}`: {problem}")),
            }
        }
        if let Method::Boft(boft) = &mut config.method
            && !factors.is_empty()
            && factors != BTreeSet::from([boft.factors])
        {
            if factors == BTreeSet::from([1]) {
                // PEFT without its CUDA extension makes one factor whatever the config says, and writes the config.
                notes.push(format!(
                    "its config speaks of {} butterfly factors, its tensors are of one",
                    boft.factors
                ));
                *boft = BoftConfig { factors: 1, ..*boft };
            } else {
                self.problems.push(format!(
                    "boft_n_butterfly_factor: expected {} factors in every boft_R, found {factors:?}",
                    boft.factors
                ));
            }
        }
        layers
    }
}

/// The last parts of a method's tensor names.
fn part_names(method: &Method) -> &'static [&'static str] {
    match method {
        Method::Hra(_) => &["hra_u"],
        Method::Lora(LoraConfig { dora: false, .. }) => &["lora_A.weight", "lora_B.weight"],
        Method::Lora(_) => &["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"],
        Method::Oft(_) => &["oft_R.weight"],
        Method::Boft(_) => &["boft_R", "boft_s"],
        Method::Full => &["weight"],
    }
}

/// The adapter of one layer; `rank` and `alpha` where the layer is an exception.
fn adapter(
    method: &Method,
    mut parts: Parts,
    rank: Option<i64>,
    alpha: Option<f64>,
) -> std::result::Result<Box<dyn Adapter>, String> {
    let mut take = |name: &str| {
        parts
            .tensors
            .remove(name)
            .ok_or_else(|| format!("expected a tensor {name} beside the others, found none"))
    };
    Ok(match method {
        Method::Hra(hra) => {
            let hra_u = take("hra_u")?;
            let shape = hra_u.size();
            if shape.len() != 2 || shape[0] < 1 || shape[1] != hra.rank {
                return Err(format!("hra_u: expected shape (d_in, {}), found {shape:?}", hra.rank));
            }
            super::check_stored_rank(hra.rank)?;
            // HRA divides by the vectors' norms.
            if hra_u.norm_scalaropt_dim(2, [0], false).min().double_value(&[]) == 0.0 {
                return Err("hra_u: holds a vector of length zero, which has no direction".into());
            }
            Box::new(Hra::from_vectors(hra_u, hra.gram_schmidt))
        }
        Method::Lora(config) => {
            let (a, b) = (take("lora_A.weight")?, take("lora_B.weight")?);
            let expected = rank.unwrap_or(config.rank);
            let found = a.size().first().copied().unwrap_or_default();
            if found != expected {
                return Err(format!("lora_A: expected rank {expected}, found {found}"));
            }
            let scale = LoraConfig::scale(expected, alpha.unwrap_or(config.alpha), config.rslora);
            let lora = Lora::from_tensors(a, b, scale)?;
            if config.dora {
                Box::new(Dora::from_tensors(lora, take("lora_magnitude_vector")?)?)
            } else {
                Box::new(lora)
            }
        }
        Method::Oft(config) => Box::new(Oft::from_tensor(take("oft_R.weight")?, *config)?),
        Method::Boft(_) => Box::new(Boft::from_tensors(take("boft_R")?, take("boft_s")?)?),
        Method::Full => return Err("expected an adapter, found a whole weight".into()),
    })
}

impl AdapterFile {
    /// All tensors by their names in a file, as [`write`] takes them.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = Vec::new();
        for (layer, adapter) in &self.layers {
            for (suffix, tensor) in adapter.parameters() {
                tensors.push((format!("{layer}.{suffix}"), tensor));
            }
        }
        for (name, bias) in &self.biases {
            let base = self.layers.get(name).map_or("bias", |adapter| adapter.bias_name());
            tensors.push((format!("{name}.{base}"), bias.shallow_clone()));
        }
        tensors
    }
}

/// The paper's COFT, which a file keeps as text: a constraint of training that its use does not need.
fn restore_coft(method: &mut Method, metadata: &BTreeMap<String, String>) {
    if let Method::Oft(OftConfig { coft: coft @ Coft::None, .. }) = method
        && let Some(eps) = metadata.get("coft_eps").and_then(|text| text.parse::<f64>().ok())
        && eps > 0.0
        && eps <= MOST_EPS
    {
        *coft = Coft::Paper { eps };
    }
}

/// Writes a PEFT folder's two files into `dir`, each whole or not at all. `tensors` are named `LAYER.hra_u` and the like
/// and written in `kind` (PEFT itself keeps f32, and reads others); the method's own text is added to `text`.
pub fn write(
    dir: &Path,
    config: &AdapterConfig,
    class: (&str, &str),
    tensors: &[(String, Tensor)],
    kind: Kind,
    text: &[(&str, String)],
) -> Result<()> {
    let json = config.to_json(class).ok_or_else(|| {
        Error::config(format!("{}: expected an adapter to write, found none", config.method.describe()))
    })?;
    let tensors: Vec<(String, Tensor)> =
        tensors.iter().map(|(name, t)| (format!("base_model.model.{name}"), t.to_kind(kind))).collect();
    let text: Vec<(&str, String)> =
        text.iter().map(|(k, v)| (*k, v.clone())).chain(config.method.metadata()).collect();
    tensor_file::write(&dir.join(WEIGHTS_FILE), &tensors, &text)?;
    let json = serde_json::to_string_pretty(&json).map_err(|e| Error::config(e.to_string()))?;
    files::write_atomic(&dir.join(CONFIG_FILE), format!("{json}\n").as_bytes())
}
