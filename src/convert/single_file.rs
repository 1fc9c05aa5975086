//! Writing whole models: one checkpoint with LDM's key names, or a Hugging Face folder, out of a model in either form.
//!
//! Weights go from the source to the file one tensor at a time, so a model is never held; some may be replaced on the way
//! (merged adapters, full fine-tuning). A checkpoint has the keys that A1111 and ComfyUI look for. Its metadata says what it
//! is (Stability's "modelspec") and holds the model's text files, so that it loads here with nothing else at hand.

use crate::error::{Error, Result};
use crate::platform::files;
use crate::platform::host;
use crate::weights::checkpoint::EMBEDDED;
use crate::weights::config::{TextConfig, UNetConfig};
use crate::weights::ldm::{LdmText, LdmTextTower, TensorForm};
use crate::weights::part::{Part, Text};
use crate::weights::prediction::{VELOCITY_MARKER, ZERO_SNR_MARKER};
use crate::weights::python_json;
use crate::weights::source::{FORCE_ZEROS, PIPELINE, SCHEDULER, Source, TEXT_FILES, config_of};
use crate::weights::tensor_file::{self, PlannedTensor};
use crate::weights::tensors::Tensors;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Kind, Tensor};

/// Tensors that take the place of the source's: by part and today's name, such as `conv_in.weight`. Any dtype and device; a
/// 1x1 convolution may be a matrix.
pub type Replaced = BTreeMap<(Part, String), Tensor>;

/// Layers of the text tower in Stable Diffusion 2.x's folders, whose checkpoints have one block more.
const OPEN_CLIP_LAYERS: i64 = 23;

/// Writes a checkpoint to `path`, which must not be there. `kind`: number format of all weights, or as they are.
///
/// Stable Diffusion 2.x's folders leave out the last block of the text tower, which is never computed; programs that build
/// the whole tower still look for it, so the block before stands in. The answer names, one sentence each, what could not be
/// written.
pub fn write_checkpoint(
    source: &Source,
    replaced: &Replaced,
    kind: Option<Kind>,
    path: &Path,
) -> Result<Vec<String>> {
    let model = Model::open(source, replaced, kind)?;
    refuse_existing(path)?;
    let mut notes = Vec::new();
    let mut recipes: BTreeMap<String, Recipe> = BTreeMap::new();
    for (&part, tensors) in &model.tensors {
        let names = source.names(part)?;
        let mut lost = tensors.unknown().to_vec();
        for name in model.names(part) {
            match names.key(name) {
                None => lost.push(name.to_string()),
                Some((key, form)) => recipes.entry(key).or_default().push((part, name.to_string(), form)),
            }
        }
        if part == Part::TextEncoder {
            add_last_block(&mut recipes);
        }
        if !lost.is_empty() {
            let lost = tensor_file::list(&lost);
            notes.push(format!("{}: not written, for want of a key in checkpoints: {lost}", part.folder()));
        }
    }
    let mut plan = Vec::new();
    for (key, recipe) in &mut recipes {
        recipe.sort_by_key(|(_, _, form)| if let TensorForm::Third(i) = form { *i } else { 0 });
        let (part, name, form) = &recipe[0];
        let mut shape = model.shape(*part, name);
        match form {
            TensorForm::Same if is_vae_attention(*part, name) && shape.len() == 2 => shape.extend([1, 1]),
            TensorForm::Same => {}
            TensorForm::Transposed => shape.reverse(),
            TensorForm::Third(_) if recipe.len() == 3 => shape[0] *= 3,
            TensorForm::Third(_) => {
                let problem =
                    format!("expected query, key and value for `{key}`, found {} of them", recipe.len());
                return Err(Error::format(source.path(), problem));
            }
        }
        plan.push(PlannedTensor { name: key.clone(), kind: model.kind(*part, name), shape });
    }
    let markers = markers(source)?;
    plan.extend(markers.iter().map(|name| PlannedTensor {
        name: name.to_string(),
        kind: MARKER,
        shape: vec![0],
    }));
    let mut text: Vec<(String, String)> = modelspec(source, path)?;
    for name in TEXT_FILES {
        if let Some(Text { content, .. }) = source.find(name)? {
            text.push((format!("{EMBEDDED}{name}"), with_dtype(name, content, kind)));
        }
    }
    if source.is_xl() {
        // What no prompt becomes is said there alone.
        text.push((format!("{EMBEDDED}{PIPELINE}"), model_index(source)?));
    }
    let text: Vec<(&str, String)> = text.iter().map(|(key, text)| (key.as_str(), text.clone())).collect();
    let shapes: BTreeMap<String, Vec<i64>> = plan.iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
    tensor_file::write_stream(path, plan, &text, |key| {
        let mut tensors = Vec::new();
        let Some(recipe) = recipes.get(key) else { return host::empty(&[0], MARKER) };
        for (part, name, form) in recipe {
            let tensor = model.read(*part, name)?;
            tensors.push(if *form == TensorForm::Transposed { tensor.f_tr()? } else { tensor });
        }
        let whole = if tensors.len() == 1 { tensors.remove(0) } else { Tensor::f_cat(&tensors, 0)? };
        Ok(whole.f_reshape(&shapes[key][..])?)
    })?;
    Ok(notes)
}

/// Channels that a UNet for inpainting sees of latents, mask and masked latents.
const INPAINTING_CHANNELS: i64 = 9;

/// The number format of the empty tensors by which a checkpoint is marked.
const MARKER: Kind = Kind::Float;

/// The empty tensors by which other programs know velocity prediction and zero terminal SNR. Those of 2.x know its velocity prediction
/// without a marker, so that one goes into its files only with the other.
fn markers(source: &Source) -> Result<Vec<&'static str>> {
    if !source.predicts_velocity() {
        return Ok(Vec::new());
    }
    if source.scheduler_value("rescale_betas_zero_snr").is_some_and(|value| value == true) {
        return Ok(vec![VELOCITY_MARKER, ZERO_SNR_MARKER]);
    }
    Ok(if tower(source)? == LdmTextTower::Clip { vec![VELOCITY_MARKER] } else { Vec::new() })
}

/// The text tower that LDM's code builds for the model; of Stable Diffusion XL the first.
fn tower(source: &Source) -> Result<LdmTextTower> {
    let first = source.text_parts().first().copied().unwrap_or(Part::TextEncoder);
    let config = TextConfig::parse(&source.text(&config_of(first))?)?;
    Ok(LdmTextTower::of_activation(&config.hidden_act))
}

/// Writes a Hugging Face folder to `dir`, which must not be there. `kind`: number format of all weights, or as they are.
///
/// Only what draws pictures is written: its `model_index.json` has no safety checker and no other extras. The answer names,
/// one sentence each, what else was left out.
pub fn write_folder(
    source: &Source,
    replaced: &Replaced,
    kind: Option<Kind>,
    dir: &Path,
) -> Result<Vec<String>> {
    source.check_complete()?;
    let model = Model::open(source, replaced, kind)?;
    refuse_existing(dir)?;
    let mut notes = Vec::new();
    for (part, tensors) in &model.tensors {
        if !tensors.unknown().is_empty() {
            let lost = tensor_file::list(tensors.unknown());
            notes.push(format!("{}: not written, for want of a name in folders: {lost}", part.folder()));
        }
    }
    files::stage_dir(dir, |dir| {
        for &part in model.tensors.keys() {
            let folder = dir.join(part.folder());
            files::create_dir_all(&folder)?;
            model.write_part(part, &folder.join(format!("{}.safetensors", part.stem())))?;
        }
        for name in TEXT_FILES {
            let Some(Text { content, .. }) = source.find(name)? else { continue };
            let path = dir.join(name);
            files::create_dir_all(path.parent().unwrap_or(dir))?;
            files::write_atomic(&path, with_dtype(name, content, kind).as_bytes())?;
        }
        files::write_atomic(&dir.join(PIPELINE), model_index(source)?.as_bytes())?;
        Ok(notes)
    })
}

/// What goes into one key of a checkpoint: one tensor, or three.
type Recipe = Vec<(Part, String, TensorForm)>;

/// The tensors of all parts, with some replaced.
struct Model<'a> {
    source: &'a Source,
    tensors: BTreeMap<Part, Tensors>,
    replaced: &'a Replaced,
    target: Option<Kind>,
    linear_projection: bool,
}

impl<'a> Model<'a> {
    fn open(source: &'a Source, replaced: &'a Replaced, target: Option<Kind>) -> Result<Self> {
        let tensors = source
            .parts()
            .into_iter()
            .map(|part| Ok((part, source.tensors(part)?)))
            .collect::<Result<_>>()?;
        let linear_projection =
            UNetConfig::parse(&source.text("unet/config.json")?)?.0.attention.use_linear_projection;
        let model = Self { source, tensors, replaced, target, linear_projection };
        for tensors in model.tensors.values() {
            let mut problems = tensors.problems().to_vec();
            // 8-bit floats, quantised weights: nothing that could be converted, or that a reader would take as it is.
            let odd = tensors.names().filter(|name| is_weight(name) && !tensors.is_float(name));
            problems.extend(odd.map(|name| {
                let key = tensors.key(name).unwrap_or(name);
                format!("`{key}`: expected floating point, found {}", tensors.dtype(name))
            }));
            if !problems.is_empty() {
                return Err(Error::weights(tensors.place(), problems));
            }
        }
        model.check_replaced()?;
        Ok(model)
    }

    fn check_replaced(&self) -> Result<()> {
        let mut problems = Vec::new();
        for ((part, name), tensor) in self.replaced {
            match self.part(*part).shape(name) {
                None => problems
                    .push(format!("{}: no tensor `{name}` to put a new one in place of", part.folder())),
                Some(shape) if shape.iter().product::<i64>() as usize != tensor.numel() => {
                    problems.push(format!(
                        "{}: `{name}`: expected shape {shape:?}, found {:?}",
                        part.folder(),
                        tensor.size()
                    ))
                }
                Some(_) => {}
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::weights(self.source.path(), problems))
    }

    fn part(&self, part: Part) -> &Tensors {
        &self.tensors[&part]
    }

    /// What is to be written of a part.
    fn names(&self, part: Part) -> impl Iterator<Item = &str> {
        self.part(part).names().filter(|name| is_weight(name))
    }

    fn kind(&self, part: Part, name: &str) -> Kind {
        self.target.or(self.part(part).kind(name)).unwrap_or(Kind::Float)
    }

    /// Shape in a folder.
    fn shape(&self, part: Part, name: &str) -> Vec<i64> {
        let mut shape = self.part(part).shape(name).unwrap_or_default();
        let projection =
            part == Part::UNet && (name.ends_with(".proj_in.weight") || name.ends_with(".proj_out.weight"));
        if projection && !self.linear_projection && shape.len() == 2 {
            shape.extend([1, 1]);
        } else if (is_vae_attention(part, name) || projection && self.linear_projection) && shape.len() == 4 {
            shape.truncate(2);
        }
        shape
    }

    fn read(&self, part: Part, name: &str) -> Result<Tensor> {
        let tensor = match self.replaced.get(&(part, name.to_string())) {
            Some(tensor) => host::try_to_device(&tensor.detach(), host::CPU)?,
            None => self.part(part).read(name)?,
        };
        let (kind, shape) = (self.kind(part, name), self.shape(part, name));
        let converted = tensor.f_to_kind(kind)?.f_reshape(&shape[..])?;
        let overflows = || !host::all_finite(&converted) && host::all_finite(&tensor);
        if kind == Kind::Half && tensor.kind() != kind && overflows() {
            return Err(Error::not_finite(format!(
                "{}: `{name}` has values that f16 cannot hold",
                part.folder()
            ))
            .with_hint("write f32 or bf16"));
        }
        Ok(converted)
    }

    /// One weight file of a folder.
    fn write_part(&self, part: Part, path: &Path) -> Result<()> {
        let tensors = self.part(part);
        // The projection of the image-text loss is in OpenCLIP's checkpoints of 2.x only because its training file was copied.
        let is_copied = self.source.is_checkpoint() && part == Part::TextEncoder;
        let left_out =
            |name: &str| tensors.is_spare(name) || is_copied && name.starts_with("text_projection");
        let mut keys = BTreeMap::new();
        for name in self.names(part).filter(|name| !left_out(name)) {
            keys.insert(self.key_in_folder(part, name), name);
        }
        let plan = keys.iter().map(|(key, name)| PlannedTensor {
            name: key.clone(),
            kind: self.kind(part, name),
            shape: self.shape(part, name),
        });
        tensor_file::write_stream(path, plan.collect(), &[], |key| self.read(part, keys[key]))
    }

    /// Today's name; but the text towers' with the prefix that transformers 4 needs and 5 takes, unless the source is a
    /// folder that goes without.
    fn key_in_folder(&self, part: Part, name: &str) -> String {
        let prefixed = match part {
            Part::TextEncoder | Part::TextEncoder2 if self.source.is_checkpoint() => {
                name != "text_projection.weight"
            }
            Part::TextEncoder | Part::TextEncoder2 => {
                self.part(part).key(name).is_some_and(|key| key.starts_with("text_model."))
            }
            _ => false,
        };
        if prefixed { format!("text_model.{name}") } else { name.to_string() }
    }
}

/// Not so a buffer, which is a constant that old files have.
fn is_weight(name: &str) -> bool {
    !name.ends_with("position_ids")
}

fn is_vae_attention(part: Part, name: &str) -> bool {
    part == Part::Vae && name.contains(".attentions.")
}

/// The 24th block of OpenCLIP's tower, if there are only 23.
fn add_last_block(recipes: &mut BTreeMap<String, Recipe>) {
    let block = |i: i64| format!("{}transformer.resblocks.{i}.", LdmText::TWO.prefix);
    let (before, last) = (block(OPEN_CLIP_LAYERS - 1), block(OPEN_CLIP_LAYERS));
    if recipes.keys().any(|key| key.starts_with(&last)) {
        return;
    }
    let copies: Vec<(String, Recipe)> = recipes
        .iter()
        .filter_map(|(key, recipe)| Some((format!("{last}{}", key.strip_prefix(&before)?), recipe.clone())))
        .collect();
    recipes.extend(copies);
}

fn refuse_existing(path: &Path) -> Result<()> {
    match files::kind(path) {
        None => Ok(()),
        Some(_) => Err(Error::format(path, "is there already and is not overwritten")
            .with_hint("give another name, or remove it")),
    }
}

/// What Stability's specification of model metadata has for these models (github.com/Stability-AI/ModelSpec, 1.0.0).
fn modelspec(source: &Source, path: &Path) -> Result<Vec<(String, String)>> {
    let prediction = match source.find(SCHEDULER)? {
        Some(_) if source.predicts_velocity() => Some("v"),
        Some(_) => Some("epsilon"),
        None => source.metadata("modelspec.prediction_type"),
    };
    let architecture = match (tower(source)?, prediction) {
        _ if source.text_parts() == [Part::TextEncoder2] => "stable-diffusion-xl-v1-refiner",
        _ if source.is_xl() => "stable-diffusion-xl-v1-base",
        (LdmTextTower::Clip, _) => "stable-diffusion-v1",
        (LdmTextTower::OpenClip, Some("v")) => "stable-diffusion-v2-768-v",
        (LdmTextTower::OpenClip, _) => "stable-diffusion-v2-512",
    };
    let title = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let mut spec = vec![
        ("modelspec.sai_model_spec".to_string(), "1.0.0".to_string()),
        ("modelspec.architecture".to_string(), architecture.to_string()),
        ("modelspec.implementation".to_string(), "sgm".to_string()),
        ("modelspec.title".to_string(), title),
    ];
    spec.extend(prediction.map(|p| ("modelspec.prediction_type".to_string(), p.to_string())));
    Ok(spec)
}

/// `model_index.json` of a folder with the parts that the model has.
fn model_index(source: &Source) -> Result<String> {
    let scheduler = Value::from(python_json::parse(&source.text(SCHEDULER)?.content).unwrap_or_default());
    let texts = source.text_parts();
    let is_inpainting =
        UNetConfig::parse(&source.text("unet/config.json")?)?.0.in_channels == INPAINTING_CHANNELS;
    let class = match (&texts[..], is_inpainting) {
        ([Part::TextEncoder], false) => "StableDiffusionPipeline",
        ([Part::TextEncoder], true) => "StableDiffusionInpaintPipeline",
        ([Part::TextEncoder2], _) => "StableDiffusionXLImg2ImgPipeline",
        (_, false) => "StableDiffusionXLPipeline",
        (_, true) => "StableDiffusionXLInpaintPipeline",
    };
    let mut index = json!({
        "_class_name": class,
        "feature_extractor": [null, null],
        "scheduler": ["diffusers", scheduler["_class_name"].as_str().unwrap_or("DDIMScheduler")],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    });
    for (part, class) in
        [(Part::TextEncoder, "CLIPTextModel"), (Part::TextEncoder2, "CLIPTextModelWithProjection")]
    {
        let is_there = texts.contains(&part);
        if is_there || source.is_xl() {
            let entry =
                |class: &str| if is_there { json!(["transformers", class]) } else { json!([null, null]) };
            index[part.folder()] = entry(class);
            index[part.tokenizer().unwrap_or_default()] = entry("CLIPTokenizer");
        }
    }
    if source.is_xl() {
        index["image_encoder"] = json!([null, null]);
        index[FORCE_ZEROS] = source.pipeline_value(FORCE_ZEROS).unwrap_or(json!(true));
        if texts == [Part::TextEncoder2] {
            index["requires_aesthetics_score"] = json!(true);
        }
    } else {
        index["requires_safety_checker"] = json!(false);
        index["safety_checker"] = json!([null, null]);
    }
    Ok(format!("{index:#}\n"))
}

/// The text file `name`; a text tower's config with the number format that the weights now have, because transformers
/// loads them as it says.
fn with_dtype(name: &str, content: String, kind: Option<Kind>) -> String {
    let word = match kind {
        Some(Kind::Float) => "float32",
        Some(Kind::Half) => "float16",
        Some(Kind::BFloat16) => "bfloat16",
        _ => return content,
    };
    match serde_json::from_str(&content) {
        Ok(Value::Object(mut map)) if Part::TEXTS.iter().any(|part| name == config_of(*part)) => {
            // Today's key and transformers 4's.
            let key = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            map.insert(key.to_string(), json!(word));
            format!("{:#}\n", Value::from(map))
        }
        _ => content,
    }
}
