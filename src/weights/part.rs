//! The parts of a model, and a text that tells of one.

use crate::error::Result;
use crate::platform::files;
use std::path::{Path, PathBuf};

/// A part of a model that has weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The denoiser.
    UNet,
    /// The text tower.
    TextEncoder,
    /// Pictures to latents and back.
    Vae,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::UNet, Self::TextEncoder, Self::Vae];

    /// Its folder in a model folder.
    pub fn folder(self) -> &'static str {
        match self {
            Self::UNet => "unet",
            Self::TextEncoder => "text_encoder",
            Self::Vae => "vae",
        }
    }

    /// The name of its weight file, without ending.
    pub fn stem(self) -> &'static str {
        if self == Self::TextEncoder { "model" } else { "diffusion_pytorch_model" }
    }
}

/// A text file, or what stands for one.
#[derive(Debug, Clone)]
pub struct Text {
    /// All of it.
    pub content: String,
    /// Its path, for messages; below the checkpoint's for what is not a file.
    pub path: PathBuf,
}

/// The text file `name` in the folder `dir`, if it is there.
pub fn read_below(dir: &Path, name: &str) -> Result<Option<Text>> {
    let path = dir.join(name);
    if !path.is_file() {
        return Ok(None);
    }
    Ok(Some(Text { content: files::read_to_string(&path)?, path }))
}
