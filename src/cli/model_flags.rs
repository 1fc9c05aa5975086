//! The flags that say of a model what its files do not.

use crate::cli::choice::choice;
use crate::error::Result;
use crate::platform::hub::{self, Wanted};
use crate::platform::observer::Observer;
use crate::platform::precision::Precision;
use crate::weights::prediction::Prediction;
use crate::weights::request::ModelRequest;
use clap::Args;
use std::path::{Path, PathBuf};

/// Beside `--model`, in every verb that reads one.
#[derive(Debug, Args)]
pub struct ModelFlags {
    /// Folder with what a checkpoint file does not say: tokenizer/, scheduler/, other parts' config.json
    #[arg(long, alias = "model-config", value_name = "DIR")]
    config: Option<PathBuf>,
    /// VAE in place of the model's own: folder of diffusers', file (diffusers' keys, or those of checkpoints), or hub id
    #[arg(long, alias = "pretrained-vae-model-name-or-path", value_name = "VAE")]
    vae: Option<PathBuf>,
    /// Number format of the VAE [default: f32]; f16 computes in f32 where its config asks for that (force_upcast)
    #[arg(long, value_parser = choice::<Precision>())]
    vae_dtype: Option<Precision>,
    /// What the model predicts [default: what its files say]
    #[arg(long, alias = "prediction-type", value_parser = choice::<Prediction>())]
    prediction: Option<Prediction>,
}

impl ModelFlags {
    /// Whether any of them was given.
    pub fn are_given(&self) -> bool {
        self.config.is_some() || self.vae.is_some() || self.vae_dtype.is_some() || self.prediction.is_some()
    }

    /// The model at `model`, a path or hub id, as these flags ask for it; fetched where it is on the hub.
    pub fn request(&self, model: &Path, observer: &dyn Observer) -> Result<ModelRequest> {
        Ok(ModelRequest { path: hub::resolve(model, Wanted::Model, observer)?, ..self.on(model, observer)? })
    }

    /// The same of what is on this machine.
    pub fn on(&self, path: &Path, observer: &dyn Observer) -> Result<ModelRequest> {
        let vae = self.vae.as_deref().map(|word| hub::resolve(word, Wanted::Vae, observer)).transpose()?;
        Ok(ModelRequest {
            path: path.to_path_buf(),
            config: self.config.clone(),
            vae,
            vae_dtype: self.vae_dtype,
            prediction: self.prediction,
        })
    }
}
