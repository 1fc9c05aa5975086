//! Adapters as they lie on disk, whatever their form: PEFT folders of both networks, single LoRA files, and fully fine-tuned
//! UNets ([`crate::platform::adapter_layout`] finds them). By layer name; what no layer asked for fitted nothing.

use crate::adapter::lora_file::{LoraFile, LoraLayer};
use crate::adapter::peft::{AdapterFile, PythonClass};
use crate::adapter::{Adapter, Dora, Full, Lora};
use crate::error::{Error, Result};
use crate::model::control::{EncoderConfig, FILE_STEM, encoder_of};
use crate::model::text::{SECOND_TEXT_ENCODER, in_second_tower};
use crate::platform::adapter_layout::{AdapterForm, AdapterParts};
use crate::platform::files;
use crate::platform::host;
use crate::weights::family;
use crate::weights::part::Part;
use crate::weights::pickle::refuse_pickle;
use crate::weights::tensor_file::TensorFile;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// The UNet's class in Python.
pub const UNET_CLASS: PythonClass = PythonClass {
    name: "UNet2DConditionModel",
    module: "diffusers.models.unets.unet_2d_condition",
    before: "",
};
/// The text encoder's, as transformers 5 has its layers.
const TEXT_CLASS: PythonClass =
    PythonClass { name: "CLIPTextModel", module: "transformers.models.clip.modeling_clip", before: "" };
/// That of the second text encoder of Stable Diffusion XL, whose transformer has a name of its own.
const SECOND_TEXT_CLASS: PythonClass =
    PythonClass { name: "CLIPTextModelWithProjection", before: "text_model.", ..TEXT_CLASS };
/// Where a run keeps its text encoder's adapter, below the UNet's.
pub const TEXT_ENCODER: &str = "text_encoder";
/// Where a run keeps the adapters of its networks, and their classes.
pub const HOMES: [(&str, PythonClass); 3] =
    [("", UNET_CLASS), (TEXT_ENCODER, TEXT_CLASS), (SECOND_TEXT_ENCODER, SECOND_TEXT_CLASS)];
/// A fully fine-tuned UNet in a run folder, as diffusers' `from_pretrained(RUN, subfolder="unet")` reads it.
pub const FULL_UNET: &str = "unet/diffusion_pytorch_model.safetensors";

/// What messages call the text encoder, of Stable Diffusion XL the first.
const FIRST_TOWER: &str = "text encoder";

/// Beginnings of layers of the UNet's outermost level that attend, with underscores, in both spellings.
const OUTER_ATTENTION: [&str; 3] = ["down_blocks_0_attentions_", "input_blocks_1_1_", "input_blocks_2_1_"];

/// Parts of keys by which the control networks of other tools are known.
const OF_OTHER_CONTROLS: [&str; 4] =
    ["controlnet_cond_embedding", "control_model.", "input_hint_block", "controlnet_down_blocks"];

/// What a model's layers are called, by which the layers of a LoRA file are found.
#[derive(Debug, Default)]
pub struct LayerNames {
    /// Of the UNet, each with its name in LDM checkpoints where it has one.
    pub unet: Vec<(String, Option<String>)>,
    /// Of the text encoder.
    pub text_encoder: Vec<(String, Option<String>)>,
    /// Of the second text encoder of Stable Diffusion XL, without [`SECOND_TEXT_ENCODER`] before them.
    pub text_encoder_2: Vec<(String, Option<String>)>,
    /// Whether the model is of Stable Diffusion XL; `None` where none is known.
    pub is_xl: Option<bool>,
}

/// An adapter that was read and is not on a network yet.
pub struct LoadedAdapter {
    /// Where it was read from.
    pub path: PathBuf,
    /// What it is, such as `HRA r 8`.
    pub what: String,
    /// Keys of its files that are part of nothing.
    pub unused: Vec<String>,
    /// What a user should know, one sentence each.
    pub notes: Vec<String>,
    /// The base model that it was made for, where it says: [`crate::StableDiffusion::fingerprint`].
    pub base_fingerprint: Option<String>,
    /// It is a control encoder alone, which changes no layer of the model.
    pub is_control_alone: bool,
    layers: BTreeMap<String, Box<dyn Adapter>>,
    biases: BTreeMap<String, Tensor>,
    /// A whole network is read layer by layer, when a layer asks for it.
    full: Option<TensorFile>,
    /// Layers, biases and tensors of the whole network that fitted something.
    used: BTreeSet<String>,
    used_biases: BTreeSet<String>,
}

/// The adapter of a layer: held in memory, or read for the occasion.
pub enum LayerAdapter<'a> {
    /// In memory.
    Held(&'a (dyn Adapter + 'static)),
    /// A weight of a fully fine-tuned network.
    Read(Full),
}

impl std::ops::Deref for LayerAdapter<'_> {
    type Target = dyn Adapter;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Held(adapter) => *adapter,
            Self::Read(adapter) => adapter,
        }
    }
}

impl LoadedAdapter {
    /// Reads what is at `path`, for a model with these layers.
    pub fn read(path: &Path, names: &LayerNames) -> Result<Self> {
        let mut loaded = Self {
            path: path.to_path_buf(),
            what: String::new(),
            unused: Vec::new(),
            notes: Vec::new(),
            base_fingerprint: None,
            is_control_alone: false,
            layers: BTreeMap::new(),
            biases: BTreeMap::new(),
            full: None,
            used: BTreeSet::new(),
            used_biases: BTreeSet::new(),
        };
        if path.is_dir() {
            refuse_controlnet(path)?;
        }
        let found = AdapterParts::at(path)?;
        loaded.notes.extend(found.note);
        for (form, place) in &found.parts {
            match form {
                AdapterForm::Peft => loaded.add(AdapterFile::read(place)?, place, names)?,
                AdapterForm::Lora => {
                    refuse_pickle(place)?;
                    loaded.add_lora(place, names)?;
                }
                AdapterForm::FullUNet => {
                    let file = TensorFile::open(place)?;
                    loaded.describe("full fine-tuning", None);
                    loaded.base_fingerprint = file.texts().remove("base_fingerprint");
                    loaded.full = Some(file);
                }
            }
        }
        if let Some(control) = encoder_of(path).filter(|_| found.parts.is_empty()) {
            let condition = EncoderConfig::read(&control)?.condition;
            loaded.what = format!("control encoder ({condition}) alone");
            let weights = TensorFile::open(&control.join(format!("{FILE_STEM}.safetensors")))?;
            loaded.base_fingerprint = weights.texts().remove("base_fingerprint");
            loaded.is_control_alone = true;
        }
        Ok(loaded)
    }

    /// Adds to what it is: a part that is `what`.
    fn describe(&mut self, what: &str, text_encoder: Option<&str>) {
        let before = std::mem::take(&mut self.what);
        self.what = match (before.is_empty(), text_encoder) {
            (true, None) => what.to_string(),
            (true, Some(tower)) => format!("{what}, of the {tower}"),
            (false, Some(tower)) if before == what => format!("{what} and {tower}"),
            (false, Some(_)) if before == format!("{what} and {FIRST_TOWER}") => {
                format!("{what} and both text encoders")
            }
            (false, Some(tower)) => format!("{before}, and {what} of the {tower}"),
            (false, None) => format!("{before}, and {what}"),
        };
    }

    fn add(&mut self, file: AdapterFile, place: &Path, names: &LayerNames) -> Result<()> {
        let home = home_of(&file, place);
        let found: Vec<&str> = file.layers.keys().map(String::as_str).collect();
        names.check_family(place, home == SECOND_TEXT_ENCODER, &found, &[])?;
        let tower = match home {
            TEXT_ENCODER => Some(FIRST_TOWER),
            SECOND_TEXT_ENCODER => Some("second text encoder"),
            _ => None,
        };
        self.describe(&file.config.method.describe(), tower);
        self.unused.extend(file.unused);
        self.notes.extend(file.notes);
        for (name, adapter) in file.layers {
            self.add_layer(in_model(home, name), adapter, place)?;
        }
        self.biases.extend(file.biases.into_iter().map(|(name, bias)| (in_model(home, name), bias)));
        let fingerprint = file.metadata.get("base_fingerprint").cloned();
        self.base_fingerprint = self.base_fingerprint.take().or(fingerprint);
        Ok(())
    }

    fn add_layer(&mut self, name: String, adapter: Box<dyn Adapter>, place: &Path) -> Result<()> {
        if self.layers.contains_key(&name) {
            let problem =
                format!("`{name}` is adapted twice, here and in another part of {}", self.path.display());
            return Err(Error::format(place, problem)
                .with_hint("give the one you mean, or each with its own --adapter"));
        }
        self.layers.insert(name, adapter);
        Ok(())
    }

    fn add_lora(&mut self, path: &Path, names: &LayerNames) -> Result<()> {
        let keys = TensorFile::open(path)?.names();
        if let Some(key) = keys.iter().find(|key| OF_OTHER_CONTROLS.iter().any(|part| key.contains(part))) {
            return Err(Error::format(
                path,
                format!("expected an adapter, found another tool's control network (`{key}`)"),
            )
            .with_hint(
                "a ControlNet is given as a Hugging Face folder with --controlnet; the HRA and OFT authors' \
                         checkpoints hold a whole model under other names",
            ));
        }
        let file = LoraFile::read(path)?;
        let is_second = |layer: &LoraLayer| layer.part == Part::TextEncoder2;
        let of_unet = file.layers.iter().filter(|layer| layer.part == Part::UNet);
        let found: Vec<&str> = of_unet.map(|layer| layer.name.as_str()).collect();
        names.check_family(path, file.layers.iter().any(is_second), &found, &file.said)?;
        let mut matched = false;
        let parts = [
            (Part::UNet, &names.unet),
            (Part::TextEncoder, &names.text_encoder),
            (Part::TextEncoder2, &names.text_encoder_2),
        ];
        for (part, names) in parts {
            let own: Vec<&str> = names.iter().map(|(name, _)| name.as_str()).collect();
            let ldm: Vec<(&str, &str)> =
                names.iter().filter_map(|(name, ldm)| Some((ldm.as_deref()?, name.as_str()))).collect();
            let resolved = file.resolve(part, &own, &ldm)?;
            self.unused.extend(resolved.unmatched.iter().map(|layer| layer.name.clone()));
            for (name, layer) in resolved.layers {
                let adapter = lora_layer(layer)
                    .map_err(|problem| Error::format(path, format!("`{}`: {problem}", layer.name)))?;
                self.add_layer(in_model(part.folder(), name), adapter, path)?;
                matched = true;
            }
        }
        let ranks: BTreeSet<i64> = file.layers.iter().map(LoraLayer::rank).collect();
        let ranks: Vec<String> = ranks.iter().map(i64::to_string).collect();
        let dora = file.layers.iter().any(|layer| layer.magnitude.is_some());
        self.describe(&format!("{} file, r {}", if dora { "DoRA" } else { "LoRA" }, ranks.join(", ")), None);
        if !matched {
            return Err(Error::format(
                path,
                format!(
                    "none of its {} layers is in this model, for example {}",
                    file.layers.len(),
                    file.layers[0].name
                ),
            )
            .with_hint("was it made for another kind of model?"));
        }
        self.unused.extend(file.unused);
        self.notes.extend(file.notes);
        let fingerprint = TensorFile::open(path)?.texts().remove("base_fingerprint");
        self.base_fingerprint = self.base_fingerprint.take().or(fingerprint);
        Ok(())
    }

    /// Forgets what was used, to be put on (again).
    pub fn begin(&mut self) {
        self.used.clear();
        self.used_biases.clear();
    }

    /// The adapter of a layer.
    pub fn layer(&mut self, name: &str) -> Result<Option<LayerAdapter<'_>>> {
        if self.full.is_some() {
            return Ok(self.whole(format!("{name}.weight"))?.map(|t| LayerAdapter::Read(Full::new(t))));
        }
        let Some(adapter) = self.layers.get(name) else { return Ok(None) };
        self.used.insert(name.to_string());
        Ok(Some(LayerAdapter::Held(adapter.as_ref())))
    }

    /// What to tell the user if this was made for another base model than the one with this fingerprint.
    pub fn other_base(&self, fingerprint: &str) -> Option<String> {
        let own = self.base_fingerprint.as_deref().filter(|own| *own != fingerprint)?;
        Some(format!(
            "{} was made for another base model ({}.., not {}..): its effect will be another one",
            self.path.display(),
            &own.get(..12).unwrap_or(own),
            &fingerprint[..12]
        ))
    }

    /// The adapter of a layer, for good; none of a fully fine-tuned network.
    pub fn take_layer(&mut self, name: &str) -> Option<Box<dyn Adapter>> {
        self.layers.remove(name)
    }

    /// The trained bias of a layer or norm `(n)`.
    pub fn bias(&mut self, name: &str) -> Result<Option<Tensor>> {
        if self.full.is_some() {
            return self.whole(format!("{name}.bias"));
        }
        let Some(bias) = self.biases.get(name) else { return Ok(None) };
        self.used_biases.insert(name.to_string());
        Ok(Some(bias.shallow_clone()))
    }

    /// The trained scale of a norm `(n)`.
    pub fn scale(&mut self, name: &str) -> Result<Option<Tensor>> {
        if self.full.is_some() { self.whole(format!("{name}.weight")) } else { Ok(None) }
    }

    /// Names of what fitted nothing so far.
    pub fn left(&self) -> Vec<String> {
        let full = self.full.iter().flat_map(TensorFile::names).filter(|key| !self.used.contains(key));
        let layers = self.layers.keys().filter(|name| !self.used.contains(*name));
        let biases = self.biases.keys().filter(|name| !self.used_biases.contains(*name));
        layers.chain(biases).cloned().chain(full).collect()
    }

    /// A tensor of a fully fine-tuned network.
    fn whole(&mut self, key: String) -> Result<Option<Tensor>> {
        let Some(file) = self.full.as_ref().filter(|file| file.shape(&key).is_some()) else {
            return Ok(None);
        };
        let tensor = file.read_as(&key, Kind::Float)?;
        if !host::all_finite(&tensor) {
            let problem = format!("`{key}`: holds numbers that are not finite");
            return Err(Error::format(file.path(), problem));
        }
        self.used.insert(key);
        Ok(Some(tensor))
    }
}

/// The name that a layer of an adapter at this place of [`HOMES`] has in a whole model.
pub fn in_model(home: &str, name: String) -> String {
    if home == SECOND_TEXT_ENCODER { in_second_tower(name) } else { name }
}

/// Where a run keeps an adapter that was read at `place`: the second text encoder's is known by its class, or by its folder.
pub fn home_of(file: &AdapterFile, place: &Path) -> &'static str {
    // Below its network's folder may be one of a step, or of a name.
    let in_folder = || place.iter().rev().take(2).any(|part| part == SECOND_TEXT_ENCODER);
    let is_second = || file.class.as_deref() == Some(SECOND_TEXT_CLASS.name) || in_folder();
    match file.is_of_text_encoder() {
        false => "",
        true if is_second() => SECOND_TEXT_ENCODER,
        true => TEXT_ENCODER,
    }
}

impl LayerNames {
    /// Refuses an adapter of Stable Diffusion XL for a model of 1.x or 2.x, and the reverse: `unet` are its layers there, `said` is what
    /// its metadata call its base model.
    fn check_family(&self, path: &Path, has_second: bool, unet: &[&str], said: &[String]) -> Result<()> {
        let Some(is_xl) = self.is_xl else { return Ok(()) };
        let said_xl = said.iter().any(|text| family::names_xl(text));
        let said_other = !said_xl && said.iter().any(|text| family::names_one_or_two(text));
        let plain = |name: &str| name.replace('.', "_");
        let own = self.unet.iter().flat_map(|(name, ldm)| [Some(name), ldm.as_ref()]).flatten();
        let own: BTreeSet<String> = own.map(|name| plain(name)).collect();
        let foreign: Vec<String> =
            unet.iter().map(|name| plain(name)).filter(|name| !own.contains(name)).collect();
        let is_deep =
            |name: &String| name.contains("_transformer_blocks_") && !name.contains("_transformer_blocks_0_");
        // XL has no attention at its outermost level.
        let is_outer = |name: &String| OUTER_ATTENTION.iter().any(|start| name.starts_with(start));
        let of_xl = has_second || said_xl || foreign.iter().any(is_deep);
        let of_other = said_other || foreign.iter().any(is_outer);
        let [own, found] = match (is_xl, of_xl, of_other) {
            (false, true, false) => ["1.x or 2.x", "XL"],
            (true, false, true) => ["XL", "1.x or 2.x"],
            _ => return Ok(()),
        };
        let problem = format!(
            "expected an adapter for Stable Diffusion {own}, as the model is, found one for Stable Diffusion {found}"
        );
        Err(Error::format(path, problem).with_hint("give the model that it was trained on"))
    }
}

/// The PEFT folders of an adapter.
pub struct PeftFiles {
    /// Each with the place in [`HOMES`] of its network.
    pub files: Vec<(&'static str, AdapterFile)>,
    /// What a user should know of files that are passed over.
    pub note: Option<String>,
}

/// Reads the PEFT folders of the adapter at `path`.
///
/// Errors: an adapter of another form, of which `hint` says what can be done with it; whatever is wrong with a file.
pub fn peft_files(path: &Path, hint: &str) -> Result<PeftFiles> {
    let found = AdapterParts::at(path)?;
    let mut files: Vec<(&'static str, AdapterFile)> = Vec::new();
    for (form, place) in &found.parts {
        let other = match form {
            AdapterForm::Peft => None,
            AdapterForm::Lora => Some("a LoRA file"),
            AdapterForm::FullUNet => Some("a fully fine-tuned UNet"),
        };
        if let Some(other) = other {
            refuse_pickle(place)?;
            return Err(
                Error::format(place, format!("expected a PEFT folder, found {other}")).with_hint(hint)
            );
        }
        let file = AdapterFile::read(place)?;
        let home = home_of(&file, place);
        if files.iter().any(|(other, _)| *other == home) {
            return Err(Error::format(path, "expected an adapter for each network, found two for one"));
        }
        files.push((home, file));
    }
    if files.is_empty() {
        return Err(
            Error::format(path, "expected a PEFT folder, found a control encoder alone").with_hint(hint)
        );
    }
    Ok(PeftFiles { files, note: found.note })
}

/// Refuses the folder of a ControlNet or the like, which changes no layer of the model.
fn refuse_controlnet(path: &Path) -> Result<()> {
    let config = path.join("config.json");
    if !config.is_file() {
        return Ok(());
    }
    let value: serde_json::Value = serde_json::from_str(&files::read_to_string(&config)?).unwrap_or_default();
    let class = value["_class_name"].as_str().unwrap_or_default();
    let hint = match class {
        "ControlNetModel" => "it goes with --controlnet DIR --control IMAGE",
        "ControlNetConditioningEmbedding" => "this is the control encoder of a run: give the run's folder",
        _ if class.contains("Control") || class.contains("Adapter") => {
            "this kind of control is not supported"
        }
        _ => return Ok(()),
    };
    Err(Error::format(path, format!("expected an adapter, found {class}")).with_hint(hint))
}

/// The adapter of one layer of a LoRA file. Errors: shapes that do not go together.
pub fn lora_layer(layer: &LoraLayer) -> std::result::Result<Box<dyn Adapter>, String> {
    let lora = Lora::from_tensors(layer.down.shallow_clone(), layer.up.shallow_clone(), layer.scale)?;
    Ok(match &layer.magnitude {
        None => Box::new(lora),
        Some(magnitude) => Box::new(Dora::from_tensors(lora, magnitude.shallow_clone())?),
    })
}
