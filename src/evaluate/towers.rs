//! Stub.
use super::clip::Clip;
use super::lpips::{Lpips, Net};
use super::vit::Vit;
use crate::error::Result;
use clap::Args;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use tch::Device;

/// Where the towers are; a score whose tower is not given is left out. Flags of `hra evaluate` and `hra train --score`, and
/// the `[scores]` table of a comparison.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, Args)]
#[serde(deny_unknown_fields, default)]
pub struct TowerPaths {
    /// CLIP folder (any CLIPModel): CLIP-I, CLIP-T
    #[arg(long, value_name = "DIR", help_heading = "Scores")]
    pub clip: Option<PathBuf>,
    /// DINO folder (facebook/dino-vits16)
    #[arg(long, value_name = "DIR", help_heading = "Scores")]
    pub dino: Option<PathBuf>,
    /// DINOv2 folder (facebook/dinov2-base)
    #[arg(long, value_name = "DIR", help_heading = "Scores")]
    pub dinov2: Option<PathBuf>,
    /// LPIPS with VGG, as safetensors
    #[arg(long, value_name = "FILE", help_heading = "Scores")]
    pub lpips_vgg: Option<PathBuf>,
    /// LPIPS with AlexNet, as safetensors
    #[arg(long, value_name = "FILE", help_heading = "Scores")]
    pub lpips_alex: Option<PathBuf>,
}

/// The towers that are loaded.
pub struct Towers {
    /// CLIP-I and CLIP-T.
    pub clip: Option<Clip>,
    /// DINO.
    pub dino: Option<Vit>,
    /// DINOv2.
    pub dinov2: Option<Vit>,
    /// LPIPS networks.
    pub lpips: Vec<(Net, Lpips)>,
}

impl Towers {
    /// Loads what `paths` names.
    pub fn load(_paths: &TowerPaths, _device: Device) -> Result<Self> {
        Err(crate::Error::config("no towers yet"))
    }
}

/// Stub.
pub fn identity(_paths: &TowerPaths) -> Result<String> {
    Ok("stub".into())
}
