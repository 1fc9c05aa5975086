//! The flags that name the towers of scores.

use crate::lab::evaluate::TowerPaths;
use clap::Args;
use std::path::PathBuf;

/// Flags of `hra evaluate` and `hra train --score`.
#[derive(Debug, Clone, Args)]
pub struct TowerFlags {
    /// CLIP (any CLIPModel): folder or hub id, such as openai/clip-vit-large-patch14; scores clip_i and clip_t
    #[arg(long, value_name = "DIR", help_heading = "Scores")]
    clip: Option<PathBuf>,
    /// DINO: folder or hub id, such as facebook/dino-vits16
    #[arg(long, value_name = "DIR", help_heading = "Scores")]
    dino: Option<PathBuf>,
    /// DINOv2: folder or hub id, such as facebook/dinov2-base
    #[arg(long, value_name = "DIR", help_heading = "Scores")]
    dinov2: Option<PathBuf>,
    /// LPIPS with VGG, as tools/lpips_to_safetensors.py writes it
    #[arg(long, value_name = "FILE", help_heading = "Scores")]
    lpips_vgg: Option<PathBuf>,
    /// LPIPS with AlexNet, as tools/lpips_to_safetensors.py writes it
    #[arg(long, value_name = "FILE", help_heading = "Scores")]
    lpips_alex: Option<PathBuf>,
}

impl TowerFlags {
    /// What they name.
    pub fn paths(&self) -> TowerPaths {
        let Self { clip, dino, dinov2, lpips_vgg, lpips_alex } = self.clone();
        TowerPaths { clip, dino, dinov2, lpips_vgg, lpips_alex }
    }
}
