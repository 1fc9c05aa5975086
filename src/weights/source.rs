//! Where a model comes from: a Hugging Face folder, or one checkpoint file with LDM's key names.
//!
//! A checkpoint holds weights only. What the model is comes, part by part, from the folder that the user gave
//! (`--config`), else from the texts that our own checkpoints hold in their header, else from the shapes of the tensors
//! ([`super::infer`]). Nothing that a file says leads to a path: the names that are looked up are
//! [`TEXT_FILES`], and no others.

use crate::error::{Error, Result};
use crate::platform::files;
use crate::platform::precision::Precision;
use crate::weights::checkpoint::Checkpoint;
use crate::weights::config::{TextConfig, UNetConfig, VaeConfig};
use crate::weights::family;
use crate::weights::infer;
use crate::weights::ldm::{LdmNames, LdmText, VAE};
use crate::weights::part::{Part, Text, read_below};
use crate::weights::pickle::refuse_pickle;
use crate::weights::prediction::{Prediction, SaidPrediction};
use crate::weights::python_json;
use crate::weights::request::ModelRequest;
use crate::weights::tensor_file::TensorFile;
use crate::weights::tensors::{Tensors, current_name};
use crate::weights::vae_file::VaeFile;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Every text file of a model folder that says how pictures are drawn. (`model_index.json` lists parts; ours are fixed.)
pub const TEXT_FILES: [&str; 17] = [
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "tokenizer/added_tokens.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/added_tokens.json",
    "tokenizer_2/merges.txt",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
    "tokenizer_2/vocab.json",
    "unet/config.json",
    "vae/config.json",
];

/// The scheduler's config, as folders have it.
pub const SCHEDULER: &str = "scheduler/scheduler_config.json";

/// A whole model, open for reading.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    checkpoint: Option<Checkpoint>,
    /// In place of the model's own.
    vae: Option<VaeFile>,
    vae_dtype: Precision,
    /// What the user says that it predicts.
    prediction: Option<Prediction>,
}

impl Source {
    /// Opens a model folder, or a `.safetensors` checkpoint, as [`Self::open_as`]; `config` as in [`ModelRequest`].
    pub fn open(path: &Path, config: Option<&Path>) -> Result<Self> {
        Self::open_as(&ModelRequest { config: config.map(Path::to_path_buf), ..ModelRequest::of(path) })
    }

    /// Opens a model, with what its user says of it.
    ///
    /// Errors: it is a model of another family, a pickle, or lacks a part; the VAE in place of its own is none for it.
    pub fn open_as(asked: &ModelRequest) -> Result<Self> {
        let ModelRequest { path, config, vae, vae_dtype, prediction } = asked;
        let checkpoint = if path.is_dir() {
            if let Some(config) = config {
                return Err(Error::config(format!(
                    "{} is a model folder, which says itself what it is; a folder for its configs ({}) goes with a \
                     checkpoint file only",
                    path.display(),
                    config.display()
                )));
            }
            family::check_folder(path)?;
            None
        } else {
            if !path.is_file() {
                let found = if path.exists() { "a pipe or device" } else { "nothing" };
                let problem = format!("expected a Stable Diffusion folder, found {found}");
                return Err(Error::format(path, problem).with_hint(
                    "give a folder with model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/ (Stable \
                     Diffusion XL: text_encoder_2/ and tokenizer_2/ too), or a checkpoint \
                     file (.safetensors)",
                ));
            }
            refuse_pickle(path)?;
            Some(Checkpoint::open(path, config.as_deref(), vae.is_some())?)
        };
        let mut source = Self {
            path: path.clone(),
            checkpoint,
            vae: None,
            vae_dtype: vae_dtype.unwrap_or_default(),
            prediction: *prediction,
        };
        if let Some(vae) = vae {
            let own = source.find_own("vae/config.json").ok().flatten();
            let is_xl = source.text_parts().contains(&Part::TextEncoder2);
            source.vae = Some(VaeFile::open(vae, own.as_ref(), is_xl)?);
        }
        Ok(source)
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number format that its VAE is asked for.
    pub fn vae_dtype(&self) -> Precision {
        self.vae_dtype
    }

    /// Whether this is one file.
    pub fn is_checkpoint(&self) -> bool {
        self.checkpoint.is_some()
    }

    /// Fails unless everything is there that a model needs beside weights, naming all that is missing.
    pub fn check_complete(&self) -> Result<()> {
        let there = |part: &str| match &self.checkpoint {
            None => self.path.join(part).is_dir(),
            Some(checkpoint) => TEXT_FILES
                .iter()
                .filter(|name| name.starts_with(&format!("{part}/")))
                .any(|name| !matches!(checkpoint.given(name), Ok(None))),
        };
        let texts = self.text_parts();
        let mut needed = if self.is_checkpoint() { vec![] } else { vec!["unet", "vae"] };
        needed.extend(texts.iter().filter(|_| !self.is_checkpoint()).map(|part| part.folder()));
        needed.extend(texts.iter().filter_map(|part| part.tokenizer()));
        needed.push("scheduler");
        needed.retain(|part| !there(part) && (*part != "vae" || self.vae.is_none()));
        let missing = needed;
        let kind =
            if texts.contains(&Part::TextEncoder2) { "Stable Diffusion XL" } else { "Stable Diffusion" };
        if missing.is_empty() {
            return Ok(());
        }
        let listed = missing.join("/, no ");
        let Some(checkpoint) = &self.checkpoint else {
            let error = Error::format(&self.path, format!("expected a {kind} folder, found no {listed}/"));
            return Err(if missing == ["vae"] {
                error.with_hint("give a VAE with --vae FILE|DIR (vae in [model] of a training)")
            } else {
                error
            });
        };
        let problem = format!("expected a checkpoint that holds its settings, found no {listed}/");
        let repository = infer::hub_repository(&checkpoint.file, self.prediction.or(checkpoint.said.best()));
        Err(Error::format(&self.path, problem).with_hint(format!(
            "give --config DIR (--model-config for training): a folder with {} and scheduler/, such as the JSON and text files of \
             {repository}",
            texts.iter().filter_map(|part| part.tokenizer()).map(|dir| format!("{dir}/")).collect::<Vec<_>>().join(", ")
        )))
    }

    /// One of [`TEXT_FILES`], which must be there.
    pub fn text(&self, name: &str) -> Result<Text> {
        match self.find(name)? {
            Some(text) => Ok(text),
            None if self.checkpoint.is_none() => {
                let path = self.path.join(name);
                Ok(Text { content: files::read_to_string(&path)?, path })
            }
            None => Err(Error::format(&self.path, format!("expected {name} in its metadata, found none"))),
        }
    }

    /// One of [`TEXT_FILES`], if it is there or can be inferred: the scheduler's with what the checkpoint and the user say of the
    /// prediction, the VAE's of the one in use.
    pub fn find(&self, name: &str) -> Result<Option<Text>> {
        match &self.vae {
            Some(vae) if name == "vae/config.json" => Ok(Some(vae.config().clone())),
            _ if name == SCHEDULER => Ok(self.scheduler()?.map(|(text, _)| text)),
            _ => self.find_own(name),
        }
    }

    /// The scheduler's config as it counts, and what a user should know of that.
    fn scheduler(&self) -> Result<Option<(Text, Vec<String>)>> {
        let Some(Text { content, path }) = self.find_own(SCHEDULER)? else { return Ok(None) };
        let nothing = SaidPrediction::default();
        let said = self.checkpoint.as_ref().map_or(&nothing, |checkpoint| &checkpoint.said);
        let (content, notes) = said.applied(self.prediction, &content, &path)?;
        Ok(Some((Text { content, path }, notes)))
    }

    /// As [`Self::find`], of the model's own files.
    fn find_own(&self, name: &str) -> Result<Option<Text>> {
        let Some(checkpoint) = &self.checkpoint else { return read_below(&self.path, name) };
        if let Some(text) = checkpoint.given(name)? {
            return Ok(Some(text));
        }
        let file = &checkpoint.file;
        let inferred = match name {
            "unet/config.json" => infer::unet(file, self.predicts_velocity())?,
            "vae/config.json" if has_vae(file) => infer::vae_of_checkpoint(file)?,
            _ => match checkpoint.towers.iter().find(|place| name == config_of(place.part)) {
                Some(place) => infer::text_encoder(file, *place)?,
                None => return Ok(None),
            },
        };
        Ok(Some(Text { content: format!("{inferred:#}\n"), path: self.path.join(name) }))
    }

    /// What a user should know of the files, one sentence each.
    pub fn notes(&self) -> Vec<String> {
        let of_file = self.checkpoint.iter().flat_map(|checkpoint| checkpoint.notes.clone());
        let of_scheduler = self.scheduler().ok().flatten().into_iter().flat_map(|(_, notes)| notes);
        let of_vae = self.vae.iter().flat_map(|vae| vae.notes.clone());
        of_file.chain(of_scheduler).chain(of_vae).collect()
    }

    /// The tensors of a part, by today's names.
    pub fn tensors(&self, part: Part) -> Result<Tensors> {
        match self.vae.as_ref().filter(|_| part == Part::Vae) {
            Some(vae) => vae.tensors(),
            None => self.own_tensors(part),
        }
    }

    /// Those of the model's own files.
    fn own_tensors(&self, part: Part) -> Result<Tensors> {
        let Some(checkpoint) = &self.checkpoint else {
            return Tensors::in_folder(&self.path.join(part.folder()), part.stem(), |key| {
                current_name(part, key)
            });
        };
        let mut spare = None;
        if part == Part::TextEncoder && checkpoint.towers == [LdmText::TWO] {
            let config = TextConfig::parse(&self.text(&config_of(part))?)?;
            spare = Some(format!("encoder.layers.{}.", config.num_hidden_layers));
        }
        let names = match part {
            Part::Vae => vae_names(self.find_own("vae/config.json")?.as_ref())?,
            _ => self.names(part)?,
        };
        Ok(Tensors::in_checkpoint(&checkpoint.file, &names, spare))
    }

    /// What identifies the weights, by names and first values of all tensors: a folder and the checkpoint made of it have the
    /// same, and any retraining changes it.
    ///
    /// A VAE in place of the model's own makes no other model of it: adapters fit as before ([`Self::vae_fingerprint`] tells it).
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = Sha256::new();
        for part in self.parts() {
            hash.update(part.folder());
            let tensors = match (part, &self.vae) {
                (Part::Vae, Some(vae)) if !self.has_own_vae() => vae.tensors()?,
                // Such as a folder with a pickle, for which another VAE is given.
                (Part::Vae, Some(vae)) => self.own_tensors(part).or_else(|_| vae.tensors())?,
                _ => self.own_tensors(part)?,
            };
            tensors.identify(&mut hash)?;
        }
        Ok(files::hex(hash.finalize()))
    }

    /// What identifies the VAE that is in place of the model's own; `None` where it has its own.
    pub fn vae_fingerprint(&self) -> Result<Option<String>> {
        let Some(vae) = &self.vae else { return Ok(None) };
        let mut hash = Sha256::new();
        vae.tensors()?.identify(&mut hash)?;
        hash.update(&vae.config().content);
        Ok(Some(files::hex(hash.finalize())))
    }

    fn has_own_vae(&self) -> bool {
        let in_folder = || self.path.join(Part::Vae.folder()).is_dir();
        self.checkpoint.as_ref().map_or_else(in_folder, |checkpoint| has_vae(&checkpoint.file))
    }

    /// The names of a part's tensors in this checkpoint, or in the one that would be made of this folder.
    pub fn names(&self, part: Part) -> Result<LdmNames> {
        Ok(match part {
            Part::UNet => LdmNames::unet(&UNetConfig::parse(&self.text("unet/config.json")?)?.1),
            Part::Vae => vae_names(Some(&self.text("vae/config.json")?))?,
            Part::TextEncoder | Part::TextEncoder2 => {
                let config = TextConfig::parse(&self.text(&config_of(part))?)?;
                let place = self.text_places(&config.hidden_act).into_iter().find(|place| place.part == part);
                let missing =
                    || Error::format(&self.path, format!("expected a {}, found none", part.folder()));
                LdmNames::text(place.ok_or_else(missing)?, config.num_hidden_layers)
            }
        })
    }

    /// Where the text towers lie in this checkpoint, or in the one that would be made of this folder, whose first tower has this
    /// activation.
    fn text_places(&self, activation: &str) -> Vec<LdmText> {
        let of_folder = || LdmText::of_folder(activation, &self.text_parts());
        self.checkpoint.as_ref().map_or_else(of_folder, |checkpoint| checkpoint.towers.clone())
    }

    /// The parts that this model has or should have, in the order of [`Part::ALL`].
    pub fn parts(&self) -> Vec<Part> {
        let texts = self.text_parts();
        Part::ALL.into_iter().filter(|part| part.tokenizer().is_none() || texts.contains(part)).collect()
    }

    /// The text towers that it has or should have, in their order: one of Stable Diffusion 1.x and 2.x, both of XL, the second
    /// alone of XL's refiner.
    pub fn text_parts(&self) -> Vec<Part> {
        if let Some(checkpoint) = &self.checkpoint {
            return checkpoint.towers.iter().map(|place| place.part).collect();
        }
        let unet = read_below(&self.path, "unet/config.json").ok().flatten();
        let unet: Value = unet.and_then(|text| serde_json::from_str(&text.content).ok()).unwrap_or_default();
        let is_xl = unet["addition_embed_type"] == "text_time"
            || self.path.join(Part::TextEncoder2.folder()).is_dir();
        let is_refiner = || {
            let said = self.pipeline_value("text_encoder");
            said.is_some_and(|value| value[0].is_null())
                && !self.path.join(Part::TextEncoder.folder()).is_dir()
        };
        match is_xl {
            false => vec![Part::TextEncoder],
            true if is_refiner() => vec![Part::TextEncoder2],
            true => Part::TEXTS.to_vec(),
        }
    }

    /// Whether it is of Stable Diffusion XL, its refiner among it.
    pub fn is_xl(&self) -> bool {
        self.text_parts().contains(&Part::TextEncoder2)
    }

    /// Refuses XL's refiner, for what draws from text alone.
    pub fn refuse_refiner(&self) -> Result<()> {
        if self.text_parts() != [Part::TextEncoder2] {
            return Ok(());
        }
        let problem = "expected a model that draws from text alone, found a refiner of Stable Diffusion XL, which draws from a picture";
        Err(Error::format(&self.path, problem).with_hint(
            "train and compare on XL's base model; a refiner draws with `hra sample --image FILE`",
        ))
    }

    /// A value of `model_index.json`, where there is one that can be read: of the folder, of that which says what a checkpoint is, or of
    /// the checkpoint itself.
    pub fn pipeline_value(&self, key: &str) -> Option<Value> {
        let text = match &self.checkpoint {
            None => read_below(&self.path, PIPELINE),
            Some(checkpoint) => checkpoint.given(PIPELINE),
        };
        let text = text.ok().flatten()?;
        python_json::parse(&text.content).ok()?.remove(key)
    }

    /// A text of the checkpoint's own metadata; none for a folder.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.checkpoint.as_ref().and_then(|checkpoint| checkpoint.file.text(key))
    }

    /// Keys of a checkpoint that belong to no part and are not known to be left over from training.
    pub fn foreign_keys(&self) -> Vec<String> {
        self.checkpoint.as_ref().map_or_else(Vec::new, Checkpoint::foreign_keys)
    }

    /// What counts as the model's prediction; it decides what is inferred of a checkpoint's native size, and what checkpoints are
    /// marked with. False where the scheduler's config cannot be read, which is told where it is used.
    pub fn predicts_velocity(&self) -> bool {
        self.scheduler_value("prediction_type").is_some_and(|value| value == "v_prediction")
    }

    /// A value of the scheduler's config as it counts, where that can be read.
    pub fn scheduler_value(&self, key: &str) -> Option<Value> {
        let (text, _) = self.scheduler().ok().flatten()?;
        python_json::parse(&text.content).ok()?.remove(key)
    }
}

/// Says of a folder which parts it has.
pub const PIPELINE: &str = "model_index.json";

/// The key of [`PIPELINE`] that says what no prompt becomes; true where it does not say (diffusers).
pub const FORCE_ZEROS: &str = "force_zeros_for_empty_prompt";

/// The config of a part, as folders have it.
pub fn config_of(part: Part) -> String {
    format!("{}/config.json", part.folder())
}

/// The names of a VAE with this config; without one, of none.
fn vae_names(config: Option<&Text>) -> Result<LdmNames> {
    let sizes = config.map(VaeConfig::parse).transpose()?;
    Ok(sizes.map_or_else(
        || LdmNames::vae(0, 0),
        |c| LdmNames::vae(c.block_out_channels.len(), c.layers_per_block),
    ))
}

fn has_vae(file: &TensorFile) -> bool {
    file.names().iter().any(|name| name.starts_with(VAE))
}
