//! Where a model comes from: a Hugging Face folder, or one checkpoint file with LDM's key names.
//!
//! A checkpoint holds weights only. What the model is comes, part by part, from the folder that the user gave
//! (`--config`), else from the texts that our own checkpoints hold in their header, else from the shapes of the tensors
//! ([`super::infer`]). Nothing that a file says leads to a path: the names that are looked up are
//! [`TEXT_FILES`], and no others.

use crate::error::{Error, Result};
use crate::platform::disguise::pickle_line;
use crate::platform::files;
use crate::weights::config::{TextConfig, UNetConfig, VaeConfig};
use crate::weights::infer;
use crate::weights::ldm::{LdmNames, LdmTextTower, UNET, VAE};
use crate::weights::part::{Part, Text};
use crate::weights::tensor_file::{self, TensorFile};
use crate::weights::tensors::{Tensors, current_name};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Every text file of a model folder that says how pictures are drawn. (`model_index.json` lists parts; ours are fixed.)
pub const TEXT_FILES: [&str; 10] = [
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/added_tokens.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "vae/config.json",
];

/// How the metadata keys begin under which a checkpoint holds the text files of its model.
pub const EMBEDDED: &str = "hra/";

/// A whole model, open for reading.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    checkpoint: Option<Checkpoint>,
}

#[derive(Debug)]
struct Checkpoint {
    file: Arc<TensorFile>,
    tower: LdmTextTower,
    config: Option<PathBuf>,
}

impl Source {
    /// Opens a model folder, or a `.safetensors` checkpoint. `config` is a folder with what the checkpoint does not say:
    /// `tokenizer/`, `scheduler/` and, if need be, the other parts' `config.json`.
    pub fn open(path: &Path, config: Option<&Path>) -> Result<Self> {
        if path.is_dir() {
            if let Some(config) = config {
                return Err(Error::config(format!(
                    "{} is a model folder, which says itself what it is; a folder for its configs ({}) goes with a \
                     checkpoint file only",
                    path.display(),
                    config.display()
                )));
            }
            return Ok(Self { path: path.to_path_buf(), checkpoint: None });
        }
        if !path.is_file() {
            let found = if path.exists() { "a pipe or device" } else { "nothing" };
            return Err(Error::format(path, format!("expected a Stable Diffusion folder, found {found}"))
                .with_hint(
                    "give a folder with model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/, or \
                     a checkpoint file (.safetensors)",
                ));
        }
        if let Some(config) = config.filter(|dir| !dir.is_dir()) {
            let found = if config.exists() { "a file" } else { "nothing" };
            return Err(Error::format(
                config,
                format!("expected a folder with tokenizer/ and scheduler/, found {found}"),
            ));
        }
        refuse_pickle(path)?;
        let file = TensorFile::open(path)?;
        let tower = check_parts(&file)?;
        let checkpoint = Checkpoint { file: Arc::new(file), tower, config: config.map(Path::to_path_buf) };
        Ok(Self { path: path.to_path_buf(), checkpoint: Some(checkpoint) })
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        &self.path
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
        let needed: &[&str] = match self.checkpoint {
            None => &["unet", "vae", "text_encoder", "tokenizer", "scheduler"],
            Some(_) => &["tokenizer", "scheduler"],
        };
        let missing: Vec<&str> = needed.iter().copied().filter(|part| !there(part)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let missing = missing.join("/, no ");
        Err(match &self.checkpoint {
            None => {
                Error::format(&self.path, format!("expected a Stable Diffusion folder, found no {missing}/"))
            }
            Some(checkpoint) => {
                let problem = format!("expected a checkpoint that holds its settings, found no {missing}/");
                Error::format(&self.path, problem).with_hint(format!(
                    "give --config DIR (--model-config for training): a folder with tokenizer/ and scheduler/, such as \
                     the JSON and text files of {}",
                    infer::hub_repository(&checkpoint.file)
                ))
            }
        })
    }

    /// One of [`TEXT_FILES`], which must be there.
    pub fn text(&self, name: &str) -> Result<Text> {
        if self.checkpoint.is_none() {
            let path = self.path.join(name);
            return Ok(Text { content: files::read_to_string(&path)?, path });
        }
        self.find(name)?
            .ok_or_else(|| Error::format(&self.path, format!("expected {name} in its metadata, found none")))
    }

    /// One of [`TEXT_FILES`], if it is there or can be inferred.
    pub fn find(&self, name: &str) -> Result<Option<Text>> {
        let Some(checkpoint) = &self.checkpoint else { return read_below(&self.path, name) };
        if let Some(text) = checkpoint.given(name)? {
            return Ok(Some(text));
        }
        let file = &checkpoint.file;
        let inferred = match name {
            "unet/config.json" => infer::unet(file, self.predicts_velocity()?)?,
            "vae/config.json" => infer::vae(file)?,
            "text_encoder/config.json" => infer::text_encoder(file, checkpoint.tower)?,
            _ => return Ok(None),
        };
        Ok(Some(Text { content: format!("{inferred:#}\n"), path: self.path.join(name) }))
    }

    /// The tensors of a part, by today's names.
    pub fn tensors(&self, part: Part) -> Result<Tensors> {
        let Some(checkpoint) = &self.checkpoint else {
            return Tensors::in_folder(&self.path.join(part.folder()), part.stem(), |key| {
                current_name(part, key)
            });
        };
        let mut spare = None;
        if part == Part::TextEncoder && checkpoint.tower == LdmTextTower::OpenClip {
            let config = TextConfig::parse(&self.text("text_encoder/config.json")?)?;
            spare = Some(format!("encoder.layers.{}.", config.num_hidden_layers));
        }
        Ok(Tensors::in_checkpoint(&checkpoint.file, &self.names(part)?, spare))
    }

    /// What identifies the weights, by names and first values of all tensors: a folder and the checkpoint made of it have the
    /// same, and any retraining changes it.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = Sha256::new();
        for part in Part::ALL {
            hash.update(part.folder());
            self.tensors(part)?.identify(&mut hash)?;
        }
        Ok(files::hex(hash.finalize()))
    }

    /// The names of a part's tensors in this checkpoint, or in the one that would be made of this folder.
    pub fn names(&self, part: Part) -> Result<LdmNames> {
        Ok(match part {
            Part::UNet => LdmNames::unet(&UNetConfig::parse(&self.text("unet/config.json")?)?.1),
            Part::Vae => {
                let config = VaeConfig::parse(&self.text("vae/config.json")?)?;
                LdmNames::vae(config.block_out_channels.len(), config.layers_per_block)
            }
            Part::TextEncoder => {
                let config = TextConfig::parse(&self.text("text_encoder/config.json")?)?;
                let tower = self.checkpoint.as_ref().map(|checkpoint| checkpoint.tower);
                let tower = tower.unwrap_or_else(|| LdmTextTower::of_activation(&config.hidden_act));
                LdmNames::text(tower, config.num_hidden_layers)
            }
        })
    }

    /// A text of the checkpoint's own metadata; none for a folder.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.checkpoint.as_ref().and_then(|checkpoint| checkpoint.file.text(key))
    }

    /// Keys of a checkpoint that belong to no part and are not known to be left over from training.
    pub fn foreign_keys(&self) -> Vec<String> {
        const LEFT_OVER: [&str; 13] = [
            "model_ema.",
            "embedding_manager.",
            "cond_stage_model.logit_scale",
            "alphas_cumprod",
            "betas",
            "sqrt_",
            "log_one_minus_",
            "posterior_",
            "logvar",
            "lvlb_weights",
            "scale_factor",
            "v_pred",
            "ztsnr",
        ];
        let Some(checkpoint) = &self.checkpoint else { return Vec::new() };
        let known = |key: &String| {
            let parts = [UNET, VAE, checkpoint.tower.prefix()];
            parts.iter().chain(&LEFT_OVER).any(|prefix| key.starts_with(prefix))
        };
        checkpoint.file.names().into_iter().filter(|key| !known(key)).collect()
    }

    /// Whether the scheduler's file says so; it decides what is inferred of a checkpoint's native size.
    fn predicts_velocity(&self) -> Result<bool> {
        let text = self.find("scheduler/scheduler_config.json")?;
        let value: Option<Value> = text.and_then(|text| serde_json::from_str(&text.content).ok());
        Ok(value.is_some_and(|value| value["prediction_type"] == "v_prediction"))
    }
}

impl Checkpoint {
    /// What the user's folder or the header has. A part comes from one of them, so that no two tokenizers mix.
    fn given(&self, name: &str) -> Result<Option<Text>> {
        let part = name.split_once('/').map_or(name, |(part, _)| part);
        if let Some(dir) = self.config.as_deref().filter(|dir| dir.join(part).exists()) {
            return read_below(dir, name);
        }
        let path = self.file.path().join(name);
        Ok(self.file.text(&format!("{EMBEDDED}{name}")).map(|text| Text { content: text.to_string(), path }))
    }
}

/// The text file `name` in the folder `dir`, if it is there.
pub fn read_below(dir: &Path, name: &str) -> Result<Option<Text>> {
    let path = dir.join(name);
    if !path.is_file() {
        return Ok(None);
    }
    Ok(Some(Text { content: files::read_to_string(&path)?, path }))
}

/// Refuses PyTorch's own formats, by the file's ending and by its first bytes.
pub fn refuse_pickle(path: &Path) -> Result<()> {
    let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    let mut first = Vec::new();
    let file = std::fs::File::open(path).map_err(|e| Error::io("open", path, e))?;
    if tensor_file::disguise_of(&file).is_some() {
        // What it is in truth is told where it is opened.
        return Ok(());
    }
    file.take(4).read_to_end(&mut first).map_err(|e| Error::io("read", path, e))?;
    // A zip, or a pickle of protocol 2 to 5. The size with which a safetensors file begins may look like either.
    let pickled = first.starts_with(b"PK\x03\x04") || matches!(first[..], [0x80, 2..=5, ..]);
    let pickled = pickled && ending != "safetensors";
    if !pickled && !["ckpt", "pt", "pth", "bin", "pkl"].contains(&ending.as_str()) {
        return Ok(());
    }
    let problem = "expected a .safetensors file, found PyTorch's pickle format: to load it is to run code that is in it, so it \
                   is not read";
    let [from, to] =
        [path, &path.with_extension("safetensors")].map(|path| files::shell_word(&path.to_string_lossy()));
    Err(Error::format(path, problem).with_hint(format!(
        "convert it with Python, which loads nothing but tensors here:\n  {}",
        pickle_line(&from, &to)
    )))
}

/// Fails unless the file has keys of all parts; otherwise, which text tower it has.
fn check_parts(file: &TensorFile) -> Result<LdmTextTower> {
    let names = file.names();
    let has = |prefix: &str| names.iter().any(|name| name.starts_with(prefix));
    let tower = [LdmTextTower::OpenClip, LdmTextTower::Clip].into_iter().find(|tower| has(tower.prefix()));
    let mut missing: Vec<&str> = [(UNET, "UNet"), (VAE, "VAE")]
        .into_iter()
        .filter(|(prefix, _)| !has(prefix))
        .map(|(prefix, _)| prefix)
        .collect();
    if tower.is_none() {
        missing.push("cond_stage_model.");
    }
    if let (Some(tower), true) = (tower, missing.is_empty()) {
        return Ok(tower);
    }
    let hint = if has("conditioner.embedders.") {
        Some("this is a checkpoint of another family (Stable Diffusion XL), which is not supported")
    } else if names.iter().any(|name| name.contains("lora_") || name.starts_with("base_model.model.")) {
        Some("this looks like an adapter: give it with --adapter")
    } else if has("down_blocks.") || has("encoder.") || has("text_model.") {
        Some("this looks like one part of a Hugging Face folder: give the folder")
    } else {
        None
    };
    let missing: Vec<String> = missing.iter().map(|prefix| format!("{prefix}*")).collect();
    Err(Error::format(
        file.path(),
        format!(
            "expected a Stable Diffusion checkpoint, found no {} but {}",
            missing.join(", no "),
            tensor_file::list(&names)
        ),
    )
    .with_hints(hint))
}
