//! The parts of a model, and a text that tells of one.

use crate::error::Result;
use crate::platform::files;
use std::path::{Path, PathBuf};

/// A part of a model that has weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The denoiser.
    UNet,
    /// The text tower; of Stable Diffusion XL the first, OpenAI's.
    TextEncoder,
    /// The second text tower of Stable Diffusion XL, OpenCLIP's.
    TextEncoder2,
    /// Pictures to latents and back.
    Vae,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::UNet, Self::TextEncoder, Self::TextEncoder2, Self::Vae];

    /// Those that adapters are for: what LoRA files and runs can hold.
    pub const ADAPTED: [Self; 3] = [Self::UNet, Self::TextEncoder, Self::TextEncoder2];

    /// The text towers, in the order in which their states stand beside each other.
    pub const TEXTS: [Self; 2] = [Self::TextEncoder, Self::TextEncoder2];

    /// Its folder in a model folder.
    pub fn folder(self) -> &'static str {
        match self {
            Self::UNet => "unet",
            Self::TextEncoder => "text_encoder",
            Self::TextEncoder2 => "text_encoder_2",
            Self::Vae => "vae",
        }
    }

    /// Whether it reads prompts.
    pub fn is_text(self) -> bool {
        self.tokenizer().is_some()
    }

    /// The name of its weight file, without ending.
    pub fn stem(self) -> &'static str {
        if self.is_text() { "model" } else { "diffusion_pytorch_model" }
    }

    /// Of a text tower: the folder of its tokenizer.
    pub fn tokenizer(self) -> Option<&'static str> {
        match self {
            Self::TextEncoder => Some("tokenizer"),
            Self::TextEncoder2 => Some("tokenizer_2"),
            Self::UNet | Self::Vae => None,
        }
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
