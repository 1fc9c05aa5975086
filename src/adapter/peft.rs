//! Adapters as PEFT's folders: `adapter_model.safetensors`, beside the config of [`super::peft_config`].
//!
//! Keys are `base_model.model.LAYER.` and the method's names, such as `hra_u` or `lora_A.weight`, and
//! `base_model.model.LAYER.base_layer.bias` or `base_model.model.LAYER.bias` where biases were trained (PEFT 0.21
//! `save_pretrained`). What PEFT's config has no field for goes into the metadata of the tensor file, which PEFT ignores
//! silently; unknown config fields make it warn.

use crate::adapter::Adapter;
use crate::adapter::method::{FileFacts, MethodSettings, Parts};
use crate::adapter::methods;
use crate::adapter::peft_config::ReadConfig;
use crate::error::{Error, Result};
use crate::platform::adapter_layout::AdapterParts;
use crate::platform::files;
use crate::platform::host;
use crate::weights::family;
use crate::weights::tensor_file::{self, TensorFile};
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Kind, Tensor};

pub use crate::adapter::peft_config::{AdapterConfig, Bias, PythonClass};
pub use crate::platform::adapter_layout::{PEFT_CONFIG as CONFIG_FILE, PEFT_WEIGHTS as WEIGHTS_FILE};

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
    /// The Python class of the network that it was on, where the config says.
    pub class: Option<String>,
}

impl AdapterFile {
    /// Whether its layers are a CLIP text encoder's.
    pub fn is_of_text_encoder(&self) -> bool {
        let mut names = self.layers.keys().chain(self.biases.keys());
        names.all(|name| {
            ["encoder.layers.", "final_layer_norm", "embeddings.", "text_projection"]
                .iter()
                .any(|start| name.starts_with(start))
        })
    }

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
        if !dir.join(WEIGHTS_FILE).is_file() {
            // It says which half is missing, and how an older one is converted.
            AdapterParts::at(dir)?;
        }
        let text = String::from_utf8_lossy(&files::read(&config_path, MAX_CONFIG)?).into_owned();
        let mut config = ReadConfig::parse(&config_path, &text)?;
        let file = TensorFile::open(&dir.join(WEIGHTS_FILE))?;
        let metadata = file.texts();
        let mut found = FoundLayer::in_file(&file, &*config.method)?;
        let names: Vec<String> = found.parts.values().map(|parts| parts.name.clone()).collect();
        let layers = found.adapters(&mut config, &metadata);
        if let Some(family) = family::of_adapter(&file.names(), &[]) {
            found.problems.insert(0, family::adapter_problem(family));
        }
        if layers.is_empty() && found.problems.is_empty() {
            let names = config.method.tensor_names()[0];
            found.problems.push(format!(
                "expected tensors named `..LAYER.{names}`, found {}",
                tensor_file::list(&file.names())
            ));
        }
        if !found.problems.is_empty() {
            return Err(Error::weights(file.path(), found.problems));
        }
        let mut notes = std::mem::take(&mut config.notes);
        let idle = config.idle_targets(&names.iter().map(String::as_str).collect::<Vec<_>>());
        if !idle.is_empty() {
            notes.push(format!(
                "target_modules names layers that the file has no tensors of: {}",
                idle.join(", ")
            ));
        }
        let FoundLayer { biases, unused, .. } = found;
        let class = config.class.take();
        Ok(Self { config: config.finish(), layers, biases, unused, metadata, notes, class })
    }
}

/// What a tensor file holds.
#[derive(Default)]
struct FoundLayer {
    parts: BTreeMap<String, Parts>,
    biases: BTreeMap<String, Tensor>,
    unused: Vec<String>,
    problems: Vec<String>,
}

impl FoundLayer {
    fn in_file(file: &TensorFile, method: &dyn MethodSettings) -> Result<Self> {
        let mut found = Self::default();
        for key in file.names() {
            let name = key.strip_prefix("base_model.model.").unwrap_or(&key);
            // transformers 4 puts this before the names of a text tower, 5 does not
            let short = name.strip_prefix("text_model.").unwrap_or(name);
            let part = method.tensor_names().iter().find_map(|part| {
                let layer = |name: &str| Some(name.strip_suffix(part)?.strip_suffix('.')?.to_string());
                Some((*part, layer(name)?, layer(short)?))
            });
            let bias =
                short.strip_suffix(".bias").map(|layer| layer.strip_suffix(".base_layer").unwrap_or(layer));
            let of_adapter =
                methods::readers().any(|r| name.split('.').skip(1).any(|p| p.starts_with(r.prefix)));
            if part.is_none() && of_adapter {
                found.problems.push(format!(
                    "`{key}`: expected only tensors of {}, which are named {}",
                    method.describe(),
                    method.tensor_names().join(", ")
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
            let tensor = file.read_as(&key, Kind::Float)?;
            if !host::all_finite(&tensor) {
                found.problems.push(format!("`{key}`: holds numbers that are not finite"));
                continue;
            }
            let earlier = match (part, bias) {
                (Some((part, name, layer)), _) => {
                    let parts = found.parts.entry(layer.clone()).or_default();
                    (parts.layer, parts.name) = (layer, name);
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
        config: &mut ReadConfig,
        metadata: &BTreeMap<String, String>,
    ) -> BTreeMap<String, Box<dyn Adapter>> {
        let layers: Vec<Parts> = std::mem::take(&mut self.parts).into_values().collect();
        match config.method.settle(&FileFacts { layers: &layers, metadata }) {
            Ok(notes) => config.notes.extend(notes),
            Err(problems) => self.problems.extend(problems),
        }
        let mut adapters = BTreeMap::new();
        for parts in layers {
            let layer = parts.layer.clone();
            match config.method.adapter(parts) {
                Ok(adapter) => {
                    adapters.insert(layer, adapter);
                }
                Err(problem) => self.problems.push(format!("`{layer}`: {problem}")),
            }
        }
        adapters
    }
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

/// Writes a PEFT folder's two files into `dir`, each whole or not at all. `tensors` are named `LAYER.hra_u` and the like
/// and written in `kind` (PEFT itself keeps f32, and reads others); the method's own text is added to `text`.
pub fn write(
    dir: &Path,
    config: &AdapterConfig,
    class: PythonClass,
    tensors: &[(String, Tensor)],
    kind: Kind,
    text: &[(&str, String)],
) -> Result<()> {
    let json = config.to_json(class).ok_or_else(|| {
        Error::config(format!("{}: expected an adapter to write, found none", config.method.describe()))
    })?;
    let tensors: Vec<(String, Tensor)> =
        tensors.iter().map(|(name, t)| (class.key(name), t.to_kind(kind))).collect();
    let text: Vec<(&str, String)> =
        text.iter().map(|(k, v)| (*k, v.clone())).chain(config.method.metadata()).collect();
    tensor_file::write(&dir.join(WEIGHTS_FILE), &tensors, &text)?;
    let json = serde_json::to_string_pretty(&json).map_err(|e| Error::config(e.to_string()))?;
    files::write_atomic(&dir.join(CONFIG_FILE), format!("{json}\n").as_bytes())
}
