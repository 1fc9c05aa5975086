//! What a file or folder is: `hra inspect`. Reports on adapters and models; knows nothing of the screen.

use crate::adapter::lora_file::{LoraFile, LoraLayer};
use crate::adapter::peft::{self, AdapterFile};
use crate::adapter::{Adapter, Form};
use crate::attach::loaded::{self, LoadedAdapter};
use crate::diffusion::stable_diffusion::{StableDiffusion, scheduler_of};
use crate::error::{Error, ErrorKind, Result};
use crate::model::control::{CONTROL_ENCODER, EncoderConfig, FILE_STEM, encoder_of};
use crate::model::layers::Layers;
use crate::model::text::in_second_tower;
use crate::platform::adapter_layout::{AdapterForm, AdapterParts};
use crate::platform::files;
use crate::platform::host;
use crate::weights::checkpoint;
use crate::weights::family;
use crate::weights::part::Part;
use crate::weights::pickle::refuse_pickle;
use crate::weights::request::ModelRequest;
use crate::weights::source::Source;
use crate::weights::tensor_file::TensorFile;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tch::{Kind, Tensor};

/// What is known of one network's adapter, of a fully trained network, or of one part of a model.
#[derive(Debug, Default, Serialize)]
pub struct FileReport {
    /// Where it lies.
    pub path: String,
    /// What it is, such as `PEFT adapter`.
    pub what: String,
    /// Settings in words, by name, in the order of telling.
    pub facts: Vec<(String, String)>,
    /// Trained or stored values.
    pub parameters: usize,
    /// Bytes of the tensors in the file, by number format.
    pub bytes: BTreeMap<String, u64>,
    /// Each layer of an adapter.
    pub layers: Vec<LayerReport>,
    /// What is out of the ordinary, one sentence each; empty is good.
    pub odd: Vec<String>,
}

/// One layer of an adapter.
#[derive(Debug, Serialize)]
pub struct LayerReport {
    /// Its name.
    pub name: String,
    /// Trained values.
    pub parameters: usize,
    /// Root of the sum of their squares.
    pub norm: f64,
    /// `||W' - W||_F`, where the method's change does not depend on W.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub change_norm: Option<f64>,
    /// `||W' - W||_F / ||W||_F`, where a model was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relative_change: Option<f64>,
    /// The largest angle by which an orthogonal factor turns the inputs, in degrees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub largest_angle: Option<f64>,
    /// The root of the sum of the squares of all its angles, in degrees: the distance from the base model in the group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distance: Option<f64>,
    /// `max |H H^T - I|`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub orthogonality_error: Option<f64>,
}

/// Everything at the path asked for: an adapter folder (with its text encoder's), a run, a LoRA file, a model, which the rest of the
/// request is about. With `model`, each layer is told relative to its weight.
pub fn inspect(asked: &ModelRequest, mut model: Option<&mut StableDiffusion>) -> Result<Vec<FileReport>> {
    let _guard = tch::no_grad_guard();
    let path = asked.path.as_path();
    if let Some(family) = path.is_dir().then(|| family::of_folder(path)).flatten() {
        return Ok(vec![of_other_family(path, "model folder", &family)]);
    }
    if path.join("model_index.json").is_file() {
        return whole_model(asked);
    }
    let alone = path.join(format!("{FILE_STEM}.safetensors"));
    if path.file_name().is_some_and(|name| name == CONTROL_ENCODER) && alone.is_file() {
        return Ok(vec![control_encoder(path)?]);
    }
    if alone.is_file() {
        // One network of diffusers by itself: a ControlNet, a UNet.
        let config = files::read_to_string(&path.join("config.json")).unwrap_or_default();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap_or_default();
        let class = config["_class_name"].as_str().unwrap_or("a network of diffusers");
        return Ok(vec![tensors(class, &alone)?]);
    }
    let found = AdapterParts::at(path)?;
    let mut reports = Vec::new();
    for (form, place) in &found.parts {
        match form {
            AdapterForm::Peft => reports.push(peft_folder(place, model.as_deref_mut())?),
            AdapterForm::FullUNet => reports.push(tensors("fully fine-tuned UNet", place)?),
            AdapterForm::Lora => {
                refuse_pickle(place)?;
                let names = TensorFile::open(place)?.names();
                let asked = ModelRequest { path: place.clone(), ..asked.clone() };
                reports.extend(checkpoint_or_adapter(&names, &asked, model.as_deref_mut())?);
            }
        }
    }
    if let Some(dir) = encoder_of(path) {
        reports.push(control_encoder(&dir)?);
    }
    if let Some(report) = reports.first_mut() {
        report.odd.extend(found.note);
    }
    Ok(reports)
}

/// One file: a model of this family or another, a part of one, or a LoRA.
fn checkpoint_or_adapter(
    names: &[String],
    asked: &ModelRequest,
    model: Option<&mut StableDiffusion>,
) -> Result<Vec<FileReport>> {
    let path = asked.path.as_path();
    let has = |start: &str| names.iter().any(|name| name.starts_with(start));
    if checkpoint::is_model(names) && family::of_keys(names).is_none() {
        // What makes it unusable is just what was asked for.
        return whole_model(asked).or_else(|problem| match problem.kind {
            ErrorKind::Format { .. } => {
                let mut report = tensors("checkpoint", path)?;
                report.odd.insert(0, format!("cannot be used: {}", problem.reason()));
                Ok(vec![report])
            }
            _ => Err(problem),
        });
    }
    let is_lora = names.iter().any(|name| name.contains("lora"));
    if let (Some(family), false) = (family::of_keys(names), is_lora) {
        return Ok(vec![of_other_family(path, "checkpoint", family)]);
    }
    if has("decoder.") && has("encoder.") || has("first_stage_model.") {
        return Ok(vec![tensors("VAE file (--vae takes it)", path)?]);
    }
    Ok(vec![lora_file(path, model)?])
}

/// What is told of a model that is not read: its family.
fn of_other_family(path: &Path, what: &str, family: &str) -> FileReport {
    FileReport {
        path: path.display().to_string(),
        what: format!("{what} of {family}"),
        odd: vec![
            "models of this family are not supported: only Stable Diffusion 1.x, 2.x and XL are".into(),
        ],
        ..FileReport::default()
    }
}

fn peft_folder(dir: &Path, model: Option<&mut StableDiffusion>) -> Result<FileReport> {
    let weights = dir.join(peft::WEIGHTS_FILE);
    let mut report = tensors("PEFT adapter", &weights)?;
    report.path = dir.display().to_string();
    let file = match AdapterFile::read(dir) {
        Ok(file) => file,
        // What makes it unusable is just what was asked for.
        Err(problem) if matches!(problem.kind, ErrorKind::Weights { .. } | ErrorKind::Format { .. }) => {
            report.odd.push(format!("cannot be used: {problem}"));
            return Ok(report);
        }
        Err(other) => return Err(other),
    };
    let mut fact = |name: &str, value: String| report.facts.push((name.to_string(), value));
    fact("method", file.config.method.describe());
    fact("bias", format!("{:?}", file.config.bias).to_lowercase());
    fact("targets", file.config.targets.to_string());
    if let Some(base) = &file.config.base_model {
        fact("base model", base.clone());
    }
    for (key, value) in &file.metadata {
        if key != "format" {
            fact(key, value.clone());
        }
    }
    if !file.biases.is_empty() {
        fact("trained biases", file.biases.len().to_string());
    }
    report.odd.extend(file.notes.iter().cloned());
    if !file.unused.is_empty() {
        report.odd.push(format!("keys that are part of nothing: {}", file.unused.join(", ")));
    }
    if let (Some(model), Some(base)) = (&model, file.metadata.get("base_fingerprint"))
        && *base != model.fingerprint()?
    {
        report.odd.push("it was made for another base model than the one given".into());
    }
    let home = loaded::home_of(&file, dir);
    let layers = file.layers.into_iter().map(|(name, adapter)| (loaded::in_model(home, name), adapter));
    report.add_layers(&layers.collect(), model);
    Ok(report)
}

fn control_encoder(dir: &Path) -> Result<FileReport> {
    let config = EncoderConfig::read(dir)?;
    let mut report = tensors("control encoder", &dir.join(format!("{FILE_STEM}.safetensors")))?;
    report.path = dir.display().to_string();
    report.facts.push(("condition".into(), config.condition));
    if let Some([low, high]) = config.canny_thresholds {
        report.facts.push(("canny thresholds".into(), format!("{low}, {high}")));
    }
    report.facts.push(("widths".into(), format!("{:?}", config.block_out_channels)));
    report.facts.push(("added to channels".into(), config.conditioning_embedding_channels.to_string()));
    Ok(report)
}

/// A single LoRA file. Its layers have their own names, or the model's where there is one.
fn lora_file(path: &Path, model: Option<&mut StableDiffusion>) -> Result<FileReport> {
    let mut report = tensors("LoRA file", path)?;
    let file = match LoraFile::read(path) {
        Ok(file) => file,
        Err(problem) if matches!(problem.kind, ErrorKind::Weights { .. } | ErrorKind::Format { .. }) => {
            report.odd.push(format!("cannot be used: {problem}"));
            return Ok(report);
        }
        Err(other) => return Err(other),
    };
    for (key, value) in TensorFile::open(path)?.texts() {
        if key != "format" {
            report.facts.push((key, value));
        }
    }
    let ranks: BTreeSet<i64> = file.layers.iter().map(LoraLayer::rank).collect();
    report.facts.push(("rank".into(), format!("{ranks:?}").replace(['{', '}'], "")));
    let text = file.layers.iter().filter(|layer| layer.part != Part::UNet).count();
    report.facts.push((
        "layers".into(),
        format!("{} of the UNet, {text} of the text encoders", file.layers.len() - text),
    ));
    report.odd.extend(file.notes.iter().cloned());
    if !file.unused.is_empty() {
        report.odd.push(format!("keys that are part of nothing: {}", file.unused.join(", ")));
    }
    let layers = match model {
        Some(model) => {
            let names = model.layer_names()?;
            let mut loaded = LoadedAdapter::read(path, &names)?;
            report.odd.extend(loaded.other_base(&model.fingerprint()?));
            let second = names.text_encoder_2.iter().map(|(name, _)| in_second_tower(name));
            let others = names.unet.iter().chain(&names.text_encoder).map(|(name, _)| name.clone());
            let mut layers = BTreeMap::new();
            for name in others.chain(second) {
                if let Some(adapter) = loaded.take_layer(&name) {
                    layers.insert(name, adapter);
                }
            }
            report.add_layers(&layers, Some(model));
            return Ok(report);
        }
        None => file.layers.iter().map(|layer| {
            Ok((loaded::in_model(layer.part.folder(), layer.name.clone()), loaded::lora_layer(layer)?))
        }),
    };
    match layers.collect::<std::result::Result<_, String>>() {
        Ok(layers) => report.add_layers(&layers, None),
        Err(problem) => report.odd.push(format!("cannot be used: {problem}")),
    }
    Ok(report)
}

/// A model folder or checkpoint: what it is, then the tensors of each part.
fn whole_model(asked: &ModelRequest) -> Result<Vec<FileReport>> {
    let source = Source::open_as(asked)?;
    let path = source.path();
    let mut reports = Vec::new();
    for part in source.parts() {
        let tensors = source.tensors(part)?;
        let mut report = FileReport {
            path: path.display().to_string(),
            what: part.folder().into(),
            ..FileReport::default()
        };
        let name = format!("{}/config.json", part.folder());
        if let Some(config) = source.find(&name)? {
            let config: serde_json::Value = serde_json::from_str(&config.content)
                .map_err(|e| Error::format(&config.path, e.to_string()))?;
            for key in TOLD {
                if let Some(value) = config.get(key).filter(|value| !value.is_null()) {
                    report.facts.push((key.into(), value.to_string()));
                }
            }
        }
        for name in tensors.names() {
            if tensors.is_float(name) {
                report.add_tensor(name, &tensors.dtype(name), &tensors.read(name)?);
            }
        }
        report.odd.extend(tensors.problems().iter().cloned());
        if !tensors.unknown().is_empty() {
            report.odd.push(format!("keys that are part of nothing: {}", tensors.unknown().join(", ")));
        }
        reports.push(report);
    }
    if let Some(report) = reports.first_mut() {
        report.facts.insert(0, ("fingerprint".into(), source.fingerprint()?));
        for key in ["_class_name", "prediction_type", "rescale_betas_zero_snr", "timestep_spacing"] {
            if let Some(value) = source.scheduler_value(key) {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
                report.facts.push((format!("scheduler {key}"), text));
            }
        }
        report.odd.extend(source.notes());
        report.odd.extend(unusable(&source));
        report.odd.extend(source.foreign_keys().iter().map(|key| format!("`{key}` belongs to no part")));
    }
    Ok(reports)
}

/// What would be refused where the model is used, beyond its tensors: no settings, or such as contradict each other.
fn unusable(source: &Source) -> Option<String> {
    let problem = source.check_complete().and_then(|()| scheduler_of(source).map(|_| ())).err()?;
    Some(format!("cannot be used so: {}", problem.reason()))
}

/// A change, or a norm of what is trained, above this is odd: the largest of Stable Diffusion's weights have norms of some hundreds.
const HUGE: f64 = 1e6;

/// What of a part's config says most.
const TOLD: [&str; 12] = [
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "use_linear_projection",
    "sample_size",
    "latent_channels",
    "scaling_factor",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "vocab_size",
];

/// The tensors of one file: how many values, in what formats, and whether they can be numbers of a network.
fn tensors(what: &str, path: &Path) -> Result<FileReport> {
    let file = TensorFile::open(path)?;
    let mut report =
        FileReport { path: path.display().to_string(), what: what.into(), ..FileReport::default() };
    for name in file.names() {
        report.add_tensor(&name, &file.dtype(&name), &file.read(&name)?);
    }
    Ok(report)
}

impl FileReport {
    /// Counts a tensor of a file, and looks at its numbers.
    fn add_tensor(&mut self, name: &str, dtype: &str, tensor: &Tensor) {
        self.parameters += tensor.numel();
        let bytes = (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        *self.bytes.entry(dtype.to_lowercase()).or_default() += bytes;
        if !matches!(tensor.kind(), Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16) {
            return;
        }
        if !host::all_finite(tensor) {
            self.odd.push(format!("`{name}` holds numbers that are not finite (NaN or infinite)"));
        } else if tensor.numel() > 1 && name.ends_with("weight") && host::number(&tensor.abs().max()) == 0.0 {
            self.odd.push(format!("`{name}` is all zeros"));
        }
    }

    /// Adds the layers of an adapter, with what is odd about them.
    fn add_layers(
        &mut self,
        layers: &BTreeMap<String, Box<dyn Adapter>>,
        model: Option<&mut StableDiffusion>,
    ) {
        let mut weights = BTreeMap::new();
        if let Some(model) = model {
            for layer in model.layers_mut() {
                if layers.contains_key(&layer.name) {
                    weights.insert(layer.name.clone(), layer.weight().shallow_clone());
                }
            }
            let missing: Vec<&str> =
                layers.keys().filter(|name| !weights.contains_key(*name)).map(String::as_str).collect();
            if !missing.is_empty() {
                self.odd.push(format!("layers that the model does not have: {}", missing.join(", ")));
            }
        }
        let mut idle = Vec::new();
        for (name, adapter) in layers {
            let weight = weights.get(name);
            if let Some(problem) = weight.and_then(|w| adapter.check(&w.size()).err()) {
                self.odd.push(format!("`{name}`: {problem}"));
                continue;
            }
            let layer = LayerReport::new(name, adapter.as_ref(), weight);
            self.odd.extend(layer.odd());
            if layer.is_idle() {
                idle.push(name.as_str());
            }
            self.layers.push(layer);
        }
        if !idle.is_empty() {
            let all = if idle.len() == layers.len() { "every layer" } else { "some layers" };
            self.odd.push(format!(
                "{all} leave{} the base model as it is: {}",
                if all == "every layer" { "s" } else { "" },
                idle.join(", ")
            ));
        }
    }
}

impl LayerReport {
    fn new(name: &str, adapter: &dyn Adapter, weight: Option<&Tensor>) -> Self {
        let parameters = adapter.parameters();
        let squares: f64 =
            parameters.iter().map(|(_, t)| host::number(&host::wide(t).square().sum(Kind::Double))).sum();
        let rotation = adapter.rotation();
        let relative_change = weight.map(|w| {
            let w = host::wide(&w.flatten(1, -1));
            adapter.change(&w, 1.0).form.relative_change(&w)
        });
        let angles = rotation.as_ref().map(|r| &r.angles);
        Self {
            name: name.to_string(),
            parameters: parameters.iter().map(|(_, t)| t.numel()).sum(),
            norm: squares.sqrt(),
            change_norm: adapter.adds_the_same_to_any_weight().then(|| change_norm(adapter)),
            relative_change,
            largest_angle: angles.map(|a| a.first().map_or(0.0, |angle| angle.to_degrees())),
            distance: angles.map(|a| a.iter().map(|x| x * x).sum::<f64>().sqrt().to_degrees()),
            orthogonality_error: rotation.map(|r| r.orthogonality_error),
        }
    }

    /// What no training leaves behind: numbers too large to compute with, and changes beside which the weight is nothing.
    fn odd(&self) -> Option<String> {
        let numbers = [
            ("norm", Some(self.norm)),
            ("change of the weight", self.change_norm),
            ("relative change", self.relative_change),
            ("largest angle", self.largest_angle),
            ("distance", self.distance),
            ("orthogonality error", self.orthogonality_error),
        ];
        let told = numbers.iter().filter_map(|(what, value)| value.map(|value| (what, value)));
        if let Some((what, value)) = told.clone().find(|(_, value)| !value.is_finite()) {
            return Some(format!(
                "`{}`: its {what} is {value}: its numbers are too large to compute with",
                self.name
            ));
        }
        let (what, value) = told.filter(|(_, value)| *value > HUGE).max_by(|a, b| a.1.total_cmp(&b.1))?;
        Some(format!("`{}`: its {what} is {value:.1e}, far beyond what training makes", self.name))
    }

    /// Whether the layer changes nothing.
    fn is_idle(&self) -> bool {
        let nothing = |x: Option<f64>, limit: f64| x.is_some_and(|x| x < limit);
        nothing(self.relative_change, 1e-9)
            || nothing(self.change_norm, 1e-12)
            || nothing(self.largest_angle, 1e-4)
    }
}

/// `||W' - W||_F` of an adapter that adds the same to any weight.
fn change_norm(adapter: &dyn Adapter) -> f64 {
    let (d_in, d_out) = adapter.size();
    let nothing = host::zeros(&[1], Kind::Double).expand([d_out, d_in], false);
    match adapter.change(&nothing, 1.0).form {
        Form::LowRank { down, up } => {
            let squared = (up.tr().matmul(&up) * down.matmul(&down.tr())).sum(Kind::Double);
            host::number(&squared).max(0.0).sqrt()
        }
        Form::Dense(change) => host::number(&change.norm()),
    }
}
