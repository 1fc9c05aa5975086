//! LoRA in one `.safetensors` file, in the styles that trainers and programs write: PEFT, diffusers new and old, attention
//! processors, kohya with diffusers' or LDM's layer names ([`keys`] has the table). No network is known here: names are
//! matched against lists that the caller gives.
//!
//! A layer's change is `scale * up down`, `scale = alpha / r`. Alpha is a tensor of the layer, or comes from PEFT's settings
//! in the metadata; where a file has neither, the scale is 1, as diffusers and ComfyUI take it. With DoRA the layer's weight is
//! `m (W + scale * up down) / |W + scale * up down|`, norms by rows.

mod keys;
mod settings;
mod write;

use crate::error::{Error, Result};
use crate::platform::host;
use crate::weights::family;
use crate::weights::part::Part;
use crate::weights::tensor_file::TensorFile;
use keys::{LoraKey, Role};
use settings::LoraFileSettings;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Kind, Tensor};

pub use crate::platform::adapter_layout::DIFFUSERS_LORA as DIFFUSERS_FILE;
pub use keys::canonical;
pub use write::{LayerProduct, Style, write};

/// Far above any layer of a network (numbers of one tensor, numbers along one dimension).
const MAX_NUMBERS: i64 = 1 << 27;
const MAX_DIMENSION: i64 = 1 << 20;

/// The LoRA of one layer, f32 on the CPU.
#[derive(Debug)]
pub struct LoraLayer {
    /// Which part the layer is of.
    pub part: Part,
    /// The layer's name as every style can give it (see [`canonical`]).
    pub name: String,
    /// `(r, d_in)`, or `(r, c, kh, kw)` for a convolution.
    pub down: Tensor,
    /// `(d_out, r)`, or `(d_out, r, 1, 1)` for a convolution.
    pub up: Tensor,
    /// As the file has it; `None` if it does not say.
    pub alpha: Option<f64>,
    /// What `up down` is multiplied by.
    pub scale: f64,
    /// DoRA's norm of each row of the adapted weight, `(d_out)`.
    pub magnitude: Option<Tensor>,
}

impl LoraLayer {
    /// Inner dimension.
    pub fn rank(&self) -> i64 {
        self.down.size()[0]
    }

    /// `scale * up down` as a matrix `(d_out, d_in)`; without DoRA the change of the weight.
    pub fn product(&self) -> Tensor {
        self.up.flatten(1, -1).matmul(&self.down.flatten(1, -1)) * self.scale
    }
}

/// A whole file.
#[derive(Debug)]
pub struct LoraFile {
    /// By part and name.
    pub layers: Vec<LoraLayer>,
    /// Keys that are part of nothing.
    pub unused: Vec<String>,
    /// What a user should know, one sentence each.
    pub notes: Vec<String>,
    /// What its trainers call the base model (kohya's scripts, Stability's specification).
    pub said: Vec<String>,
}

/// Layers of a file by the names of a model's layers.
#[derive(Debug)]
pub struct Resolved<'a> {
    /// By the model's own name.
    pub layers: BTreeMap<String, &'a LoraLayer>,
    /// Those that the model does not have.
    pub unmatched: Vec<&'a LoraLayer>,
}

/// The keys of one layer while a file is read.
#[derive(Default)]
struct FoundTensor {
    /// As the style writes it, which PEFT's patterns match.
    layer: String,
    keys: BTreeMap<&'static str, String>,
}

impl LoraFile {
    /// Reads a file. Everything that is wrong, or cannot be honoured, is told by its key.
    pub fn read(path: &Path) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let mut found: BTreeMap<(Part, String), FoundTensor> = BTreeMap::new();
        let mut refused: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        let (mut unused, mut problems) = (Vec::new(), Vec::new());
        for key in file.names() {
            match keys::parse(&key) {
                LoraKey::Unknown => unused.push(key),
                LoraKey::Refused(why) => refused.entry(why).or_default().push(key),
                LoraKey::Layer { part, layer, role } => {
                    let entry = found.entry((part, canonical(&layer))).or_default();
                    entry.layer = layer;
                    if let Some(other) = entry.keys.insert(role_name(role), key.clone()) {
                        problems.push(format!("`{key}` says the same of a layer as `{other}`"));
                    }
                }
            }
        }
        let keys = ["modelspec.architecture", "ss_base_model_version"];
        let said: Vec<&str> = keys.iter().filter_map(|key| file.text(key)).collect();
        if let Some(family) = family::of_adapter(&file.names(), &said) {
            problems.insert(0, family::adapter_problem(family));
        }
        for (why, keys) in refused {
            let more = if keys.len() > 1 { format!(" and {} more", keys.len() - 1) } else { String::new() };
            problems.push(format!("`{}`{more}: {why}", keys[0]));
        }
        let settings = read_settings(&file, &mut problems);
        let mut layers = Vec::new();
        for ((part, name), mut entry) in found {
            if entry.keys.keys().eq(["alpha"].iter()) {
                unused.extend(entry.keys.into_values());
                continue;
            }
            let settings = settings.iter().find(|(p, _)| *p == part).map(|(_, s)| s);
            match read_layer(&file, part, name, &mut entry, settings) {
                Ok(layer) => layers.push(layer),
                Err(mut found) => problems.append(&mut found),
            }
        }
        if layers.is_empty() && problems.is_empty() {
            problems.push(format!(
                "expected LoRA tensors, found {}",
                crate::weights::tensor_file::list(&file.names())
            ));
        }
        if !problems.is_empty() {
            return Err(Error::weights(path, problems));
        }
        unused.sort();
        let mut notes: Vec<String> = settings.into_iter().flat_map(|(_, settings)| settings.notes).collect();
        notes.sort();
        notes.dedup();
        let bare = layers.iter().filter(|layer| layer.alpha.is_none()).count();
        if bare > 0 && bare < layers.len() {
            notes.push(format!("{bare} of {} layers have no alpha; their scale is 1", layers.len()));
        }
        if bare > 0 && file.names().iter().any(|key| key.starts_with("base_model.model.")) {
            notes.push(
                "PEFT's tensors without adapter_config.json, which has their alpha: the scale is taken as 1"
                    .to_string(),
            );
        }
        let said = said.into_iter().map(String::from).collect();
        Ok(Self { layers, unused, notes, said })
    }

    /// Finds the layers of `part` in a model. `names` are the model's own; `ldm` gives further names (first) of some of them
    /// (second), such as those in a single-file checkpoint. The error is a layer that is meant twice.
    pub fn resolve(&self, part: Part, names: &[&str], ldm: &[(&str, &str)]) -> Result<Resolved<'_>> {
        let own = names.iter().map(|name| (canonical(name), *name));
        let further = ldm
            .iter()
            .map(|(ldm, name)| (canonical(ldm.strip_prefix("model.diffusion_model.").unwrap_or(ldm)), *name));
        let places: BTreeMap<String, &str> = further.chain(own).collect();
        let mut resolved = Resolved { layers: BTreeMap::new(), unmatched: Vec::new() };
        for layer in self.layers.iter().filter(|layer| layer.part == part) {
            match places.get(&layer.name) {
                None => resolved.unmatched.push(layer),
                Some(name) => {
                    if let Some(other) = resolved.layers.insert(name.to_string(), layer) {
                        return Err(Error::config(format!(
                            "the LoRA's layers `{}` and `{}` are both the model's `{name}`",
                            other.name, layer.name
                        )));
                    }
                }
            }
        }
        Ok(resolved)
    }
}

/// What a layer can have once.
fn role_name(role: Role) -> &'static str {
    match role {
        Role::Down => "down",
        Role::Up => "up",
        Role::Alpha => "alpha",
        Role::Magnitude => "magnitude",
        Role::DoraScale => "dora_scale",
    }
}

fn read_settings(file: &TensorFile, problems: &mut Vec<String>) -> Vec<(Part, LoraFileSettings)> {
    let mut found = Vec::new();
    if let Some(text) = file.text(settings::METADATA) {
        for part in Part::ADAPTED {
            match LoraFileSettings::read(text, part) {
                Ok(settings) => found.extend(settings.map(|settings| (part, settings))),
                Err(mut wrong) => {
                    wrong.retain(|problem| !problems.contains(problem));
                    problems.append(&mut wrong);
                }
            }
        }
    }
    found
}

/// One layer, checked; the error is every problem of it.
fn read_layer(
    file: &TensorFile,
    part: Part,
    name: String,
    found: &mut FoundTensor,
    settings: Option<&LoraFileSettings>,
) -> std::result::Result<LoraLayer, Vec<String>> {
    let (down_key, up_key) = match (found.keys.remove("down"), found.keys.remove("up")) {
        (Some(down), Some(up)) => (down, up),
        (Some(key), None) => return Err(vec![format!("`{key}` has no up half")]),
        (None, Some(key)) => return Err(vec![format!("`{key}` has no down half")]),
        (None, None) => {
            let key = found.keys.values().next().cloned().unwrap_or_default();
            return Err(vec![format!("`{key}` has no down and up halves")]);
        }
    };
    let down = matrix(file, &down_key)?;
    let up = matrix(file, &up_key)?;
    let (down_size, up_size) = (down.size(), up.size());
    let rank = down_size[0];
    if up_size[1] != rank {
        return Err(vec![format!(
            "`{up_key}`: expected shape (d_out, {rank}) beside `{down_key}` of shape {down_size:?}, found {up_size:?}"
        )]);
    }
    if up_size[2..].iter().any(|size| *size != 1) {
        return Err(vec![format!("`{up_key}`: expected a kernel of 1x1, found shape {up_size:?}")]);
    }
    let magnitude = read_magnitude(file, found, up_size[0])?;
    let tensor =
        found.keys.remove("alpha").map(|key| read_alpha(file, &key).map(|alpha| (key, alpha))).transpose()?;
    let said = settings.map(|settings| settings.scale(&found.layer, rank)).transpose();
    let said = said.map_err(|why| vec![format!("`{down_key}`: {why}")])?;
    let (alpha, scale) = match (tensor, said) {
        (Some((key, alpha)), Some((other, _))) if alpha != other => {
            return Err(vec![format!("`{key}` is {alpha}, but the file's settings say {other}")]);
        }
        (_, Some((alpha, scale))) => (Some(alpha), scale),
        (Some((_, alpha)), None) => (Some(alpha), alpha / rank as f64),
        (None, None) => (None, 1.0),
    };
    if let Some(settings) = settings.filter(|settings| settings.dora != magnitude.is_some()) {
        let [said, found] = if settings.dora { ["with", "none"] } else { ["without", "one"] };
        return Err(vec![format!(
            "`{down_key}`: the file's settings are {said} DoRA, expected a magnitude accordingly, found {found}"
        )]);
    }
    Ok(LoraLayer { part, name, down, up, alpha, scale, magnitude })
}

/// A half: two dimensions, or four for a convolution.
fn matrix(file: &TensorFile, key: &str) -> std::result::Result<Tensor, Vec<String>> {
    let shape = file.shape(key).unwrap_or_default();
    let wrong = |expected: &str| Err(vec![format!("`{key}`: expected {expected}, found shape {shape:?}")]);
    if shape.len() != 2 && shape.len() != 4 {
        return wrong("two dimensions, or four for a convolution");
    }
    if shape.contains(&0) {
        return wrong("a rank and sizes of 1 or more");
    }
    if shape.iter().any(|size| *size > MAX_DIMENSION) || shape.iter().product::<i64>() > MAX_NUMBERS {
        return wrong("the size of a layer");
    }
    numbers(file, key)
}

fn read_alpha(file: &TensorFile, key: &str) -> std::result::Result<f64, Vec<String>> {
    let shape = file.shape(key).unwrap_or_default();
    if shape.iter().product::<i64>() != 1 {
        return Err(vec![format!("`{key}`: expected one number, found shape {shape:?}")]);
    }
    let alpha = host::number(&file.read(key).map_err(|e| vec![format!("`{key}`: {e}")])?);
    if alpha.is_finite() {
        Ok(alpha)
    } else {
        Err(vec![format!("`{key}`: expected a finite number, found {alpha}")])
    }
}

/// DoRA's norms of rows, under either name; `(d_out)`.
fn read_magnitude(
    file: &TensorFile,
    found: &mut FoundTensor,
    d_out: i64,
) -> std::result::Result<Option<Tensor>, Vec<String>> {
    let read = |key: String, shapes: &[Vec<i64>]| {
        let shape = file.shape(&key).unwrap_or_default();
        if shapes.contains(&shape) {
            return numbers(file, &key).map(|tensor| tensor.flatten(0, -1));
        }
        let columns = if key.ends_with(".dora_scale") && shape.first() == Some(&1) {
            "; norms of columns (LyCORIS without wd_on_output) are not done here"
        } else {
            ""
        };
        Err(vec![format!("`{key}`: expected {d_out} norms of rows, found shape {shape:?}{columns}")])
    };
    let rows = [vec![d_out], vec![d_out, 1], vec![d_out, 1, 1, 1]];
    let peft = [&rows[..], &[vec![1, d_out, 1, 1]]].concat();
    let scale = found.keys.remove("dora_scale").map(|key| read(key, &rows)).transpose()?;
    let Some(key) = found.keys.remove("magnitude") else { return Ok(scale) };
    let magnitude = read(key.clone(), &peft)?;
    match scale {
        Some(scale) if !host::same(&scale, &magnitude) => Err(vec![format!(
            "`{key}`: expected the same numbers as in the layer's dora_scale, found others"
        )]),
        _ => Ok(Some(magnitude)),
    }
}

fn numbers(file: &TensorFile, key: &str) -> std::result::Result<Tensor, Vec<String>> {
    if !file.is_float(key) {
        return Err(vec![format!("`{key}`: expected floating point, found {}", file.dtype(key))]);
    }
    let tensor = file.read_as(key, Kind::Float).map_err(|e| vec![format!("`{key}`: {e}")])?;
    if !host::all_finite(&tensor) {
        return Err(vec![format!("`{key}`: holds numbers that are not finite")]);
    }
    Ok(tensor)
}
