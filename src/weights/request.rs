//! Which model is meant.

use crate::platform::precision::Precision;
use crate::weights::prediction::Prediction;
use std::path::{Path, PathBuf};

/// A model, and what its user says of it beyond its files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelRequest {
    /// A Hugging Face folder or a checkpoint file.
    pub path: PathBuf,
    /// Folder with what a checkpoint does not say: `tokenizer/`, `scheduler/`, other parts' `config.json`.
    pub config: Option<PathBuf>,
    /// A VAE in place of the model's own: a folder of diffusers', or a file with its keys or LDM's.
    pub vae: Option<PathBuf>,
    /// Number format of the VAE; `None` for f32.
    pub vae_dtype: Option<Precision>,
    /// What the UNet predicts, whatever the files say.
    pub prediction: Option<Prediction>,
}

impl ModelRequest {
    /// The model at `path`, as its files say.
    pub fn of(path: &Path) -> Self {
        Self { path: path.to_path_buf(), ..Self::default() }
    }
}
