//! PEFT's `adapter_config.json`: the fields that all methods share (PEFT 0.21), and what a reader must refuse.
//!
//! A field that changes what the tensors mean is honoured or refused; fields of training alone (dropout, the start of the
//! weights) are ignored, and so are names of layers, which the tensors' names tell.

use crate::adapter::method::{Method, MethodSettings};
use crate::adapter::methods;
use crate::adapter::peft_fields::{Fields, PEFT_VERSION};
use crate::adapter::peft_patterns::whole_pattern;
use crate::error::{Error, Result};
use crate::platform::choice::{Choice, Named, named};
use serde_json::{Value, json};
use std::path::Path;

/// Which biases are trained beside the adapter, as PEFT defines it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None.
    None,
    /// Every bias of the network, norms included.
    All,
    /// Those of the adapted layers.
    #[serde(alias = "hra_only", alias = "lora_only", alias = "oft_only", alias = "boft_only")]
    Only,
}

impl Choice for Bias {
    const CHOICES: &'static [Named<Self>] = &[
        named(Self::None, "none", &[], "None"),
        named(Self::All, "all", &[], "Every bias of the network, norms included"),
        named(
            Self::Only,
            "only",
            &["hra_only", "hra-only", "lora_only", "oft_only", "boft_only"],
            "Those of the adapted layers",
        ),
    ];
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

/// A config that was read, and what its reader should know beside it.
#[derive(Debug)]
pub(super) struct ReadConfig {
    /// As far as the config says them.
    pub method: Box<dyn MethodSettings>,
    bias: Bias,
    targets: Value,
    base_model: Option<String>,
    pub notes: Vec<String>,
    /// Of the network that it was on.
    pub class: Option<String>,
}

/// A network as Python has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PythonClass {
    /// Its class.
    pub name: &'static str,
    /// The class's module.
    pub module: &'static str,
    /// What stands before its layers' names there, and not here.
    pub before: &'static str,
}

/// A layer of text towers that stands beside the transformer, and has nothing before its name.
const PROJECTION: &str = "text_projection";

impl PythonClass {
    /// The name of a layer's tensor in PEFT's files.
    pub fn key(&self, name: &str) -> String {
        let before = if name.starts_with(PROJECTION) { "" } else { self.before };
        format!("base_model.model.{before}{name}")
    }
}

impl AdapterConfig {
    /// The whole field set that PEFT writes for an adapter of a network; `None` for full fine-tuning, which is no adapter of PEFT's.
    pub fn to_json(&self, class: PythonClass) -> Option<Value> {
        let (peft_type, own) = self.method.to_peft()?;
        let bias = match self.bias {
            Bias::None => "none".to_string(),
            Bias::All => "all".to_string(),
            Bias::Only => only(peft_type),
        };
        let mut fields = json!({
            "auto_mapping": {"base_model_class": class.name, "parent_library": class.module},
            "base_model_name_or_path": self.base_model,
            "exclude_modules": null,
            "inference_mode": true,
            "modules_to_save": null,
            "peft_type": peft_type,
            "peft_version": PEFT_VERSION,
            "revision": null,
            "target_modules": self.targets,
            "task_type": null,
        });
        if self.method.keeps_bias() {
            fields["bias"] = bias.into();
            fields["layers_pattern"] = Value::Null;
            fields["layers_to_transform"] = Value::Null;
        }
        if let (Value::Object(fields), Value::Object(own)) = (&mut fields, own) {
            fields.extend(own);
        }
        Some(fields)
    }
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
        let peft_type = match map.get("peft_type").and_then(Value::as_str) {
            Some(word) => word,
            None => return Err(problem("expected PEFT's adapter config, found no `peft_type`".into())),
        };
        let mut fields = Fields::new(map, text);
        fields.refuse("modules_to_save", "whole layers beside the adapter");
        let mut readers = methods::readers().filter(|reader| reader.peft_type == peft_type);
        let Some(method) = readers.find_map(|reader| (reader.read)(&mut fields)) else {
            let known = methods::peft_types();
            let (last, others) = known.split_last().expect("there are methods");
            return Err(problem(format!(
                "expected an adapter of peft_type {} or {last}, found {peft_type}",
                others.join(", ")
            )));
        };
        let bias = match fields.set("bias") {
            None => Bias::None,
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
        fields.finish();
        if !fields.problems.is_empty() {
            return Err(problem(fields.problems.join("\n")));
        }
        Ok(Self {
            method,
            bias,
            targets: value["target_modules"].clone(),
            base_model: value["base_model_name_or_path"].as_str().map(str::to_string),
            notes: fields.notes,
            class: value["auto_mapping"]["base_model_class"].as_str().map(str::to_string),
        })
    }

    /// What `target_modules` names that none of the layers is, each given by its name in the file.
    pub(super) fn idle_targets(&self, layers: &[&str]) -> Vec<String> {
        match &self.targets {
            Value::Array(words) => {
                let is_of = |layer: &str, word: &str| {
                    layer.strip_suffix(word).is_some_and(|start| start.is_empty() || start.ends_with('.'))
                };
                let words = words.iter().filter_map(Value::as_str);
                words
                    .filter(|word| !layers.iter().any(|layer| is_of(layer, word)))
                    .map(String::from)
                    .collect()
            }
            // A pattern in Python's syntax that is not understood says nothing.
            Value::String(pattern) if pattern != "all-linear" => {
                let idle = whole_pattern(pattern)
                    .is_some_and(|regex| !layers.iter().any(|layer| regex.is_match(layer)));
                idle.then(|| pattern.clone()).into_iter().collect()
            }
            _ => Vec::new(),
        }
    }

    /// The whole config, when the method's settings are settled.
    pub(super) fn finish(self) -> AdapterConfig {
        let Self { method, bias, targets, base_model, .. } = self;
        AdapterConfig { method: method.into(), bias, targets, base_model }
    }
}
