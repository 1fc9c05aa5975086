//! A VAE of its own: a folder as diffusers writes it, or one file with diffusers' keys or those of LDM's checkpoints.

use crate::error::{Error, Result};
use crate::weights::config::VaeConfig;
use crate::weights::infer;
use crate::weights::ldm::{LdmNames, VAE};
use crate::weights::part::{Part, Text, read_below};
use crate::weights::pickle::refuse_pickle;
use crate::weights::tensor_file::{self, TensorFile};
use crate::weights::tensors::{Tensors, current_name};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What the latents of Stable Diffusion 1.x and 2.x are multiplied by.
pub const USUAL_SCALE: f64 = 0.18215;

/// A VAE that takes the place of a model's own.
#[derive(Debug)]
pub struct VaeFile {
    /// Folder or file.
    place: PathBuf,
    layout: VaeLayout,
    config: Text,
    /// What a user should know, one sentence each.
    pub notes: Vec<String>,
}

#[derive(Debug)]
enum VaeLayout {
    Folder,
    /// One file with the keys that a folder's has.
    Today(Arc<TensorFile>),
    /// One file with LDM's keys behind this prefix.
    Ldm(Arc<TensorFile>, &'static str),
}

impl VaeFile {
    /// Opens the VAE at `path` for a model whose own VAE has the config `own`, if it says, and which is of Stable Diffusion XL or not.
    ///
    /// A file's config is the one beside it, else what its metadata hold, else the model's own, else what the shapes tell. Errors: no
    /// VAE is there, or its latents are scaled otherwise than the model's, as those of other families are.
    pub fn open(path: &Path, own: Option<&Text>, is_xl: bool) -> Result<Self> {
        let usual = if is_xl { infer::XL_SCALE } else { USUAL_SCALE };
        let inner = path.join(Part::Vae.folder());
        let place = if inner.is_dir() { inner } else { path.to_path_buf() };
        let (layout, config) = if place.is_dir() {
            (VaeLayout::Folder, of_folder(&place)?)
        } else {
            of_file(&place, own, usual)?
        };
        let (own, found) = (own.map(VaeConfig::parse).transpose()?, VaeConfig::parse(&config)?);
        if own.as_ref().is_some_and(|own| !own.shifts_as(&found)) {
            let problem = "expected a VAE whose latents are shifted as the model's are (shift_factor, latents_mean, latents_std), found \
                           another one";
            return Err(Error::format(&place, problem).with_hint("--vae takes one of this model's family"));
        }
        let (expected, found) = (own.map_or(usual, |own| own.scaling_factor), found.scaling_factor);
        if (found / expected - 1.0).abs() > 1e-3 {
            let problem = format!(
                "expected a VAE whose latents are scaled by {expected}, as the model's are, found one with {found}"
            );
            return Err(Error::format(&place, problem)
                .with_hint("it is of another family of models (Stable Diffusion XL has 0.13025): --vae takes one of this model's"));
        }
        let mut notes = vec![format!("the VAE is that of {}", path.display())];
        let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
        if !place.is_dir() && name.contains("xl") && expected > infer::XL_SCALE * 1.001 {
            notes.push(format!(
                "{}: its name sounds like a VAE of Stable Diffusion XL, whose latents are others; the file itself does not tell",
                path.display()
            ));
        }
        Ok(Self { place, layout, config, notes })
    }

    /// Its `config.json`, or what stands for it.
    pub fn config(&self) -> &Text {
        &self.config
    }

    /// Its tensors, by today's names.
    pub fn tensors(&self) -> Result<Tensors> {
        let today = |key: &str| current_name(Part::Vae, key);
        match &self.layout {
            VaeLayout::Folder => Tensors::in_folder(&self.place, Part::Vae.stem(), today),
            VaeLayout::Today(file) => Ok(Tensors::in_file(file, today)),
            VaeLayout::Ldm(file, prefix) => {
                let config = VaeConfig::parse(&self.config)?;
                let names = LdmNames::vae(config.block_out_channels.len(), config.layers_per_block);
                Ok(Tensors::in_checkpoint(file, &names.behind(prefix), None))
            }
        }
    }
}

fn of_folder(dir: &Path) -> Result<Text> {
    let config = read_below(dir, "config.json")?.ok_or_else(|| {
        Error::format(dir, "expected a VAE folder with config.json and diffusion_pytorch_model.safetensors, found no config.json")
    })?;
    let value: serde_json::Value =
        serde_json::from_str(&config.content).map_err(|e| Error::format(&config.path, e.to_string()))?;
    match value["_class_name"].as_str() {
        None | Some("AutoencoderKL") => Ok(config),
        Some(other) => {
            Err(Error::format(&config.path, format!("expected a VAE (AutoencoderKL), found {other}")))
        }
    }
}

/// One file's; where nothing says how its latents are scaled, by `usual`.
fn of_file(path: &Path, own: Option<&Text>, usual: f64) -> Result<(VaeLayout, Text)> {
    // A pipe is not opened: it would block for ever.
    if path.is_file() {
        refuse_pickle(path)?;
    }
    let file = Arc::new(TensorFile::open(path)?);
    let names = file.names();
    let has = |start: &str| names.iter().any(|name| name.starts_with(start));
    let layout = if has(&format!("{VAE}decoder.")) {
        VaeLayout::Ldm(file.clone(), VAE)
    } else if has("decoder.up.") && has("encoder.down.") {
        VaeLayout::Ldm(file.clone(), "")
    } else if has("decoder.up_blocks.") && has("encoder.down_blocks.") {
        VaeLayout::Today(file.clone())
    } else {
        let problem = format!("expected a VAE, encoder and decoder, found {}", tensor_file::list(&names));
        return Err(Error::format(path, problem)
            .with_hint("--vae takes a folder of diffusers' (config.json beside its weights), a file of one, or a checkpoint that has one"));
    };
    let beside = path.parent().map(|dir| read_below(dir, "config.json")).transpose()?.flatten();
    let beside = beside.filter(|text| text.content.contains("AutoencoderKL"));
    let embedded = file.text("hra/vae/config.json").map(|text| text.to_string());
    let inferred = || {
        let mut config = match &layout {
            VaeLayout::Ldm(_, prefix) => infer::vae(&file, prefix),
            _ => infer::vae_of_today(&file),
        }?;
        config["scaling_factor"] = usual.into();
        Ok::<_, Error>(config)
    };
    let content = match (beside, embedded, own) {
        (Some(text), _, _) => return Ok((layout, text)),
        (None, Some(text), _) => text,
        (None, None, Some(own)) => return Ok((layout, own.clone())),
        (None, None, None) => format!("{:#}\n", inferred()?),
    };
    Ok((layout, Text { content, path: path.join("vae/config.json") }))
}
