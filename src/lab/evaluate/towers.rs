//! The towers that are loaded, where they come from, and what tells them apart from others.

use crate::error::{Error, ErrorKind, Result};
use crate::lab::evaluate::clip::Clip;
use crate::lab::evaluate::lpips::{Lpips, Net};
use crate::lab::evaluate::vit::Vit;
use crate::platform::files;
use crate::platform::host;
use crate::platform::hub::{self, Wanted};
use crate::platform::observer::Observer;
use crate::weights::scope::Weights;
use crate::weights::tensor_file::TensorFile;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use tch::{Device, Kind};

/// Where the towers are; a score whose tower is not given is left out. The `[scores]` table of a comparison.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TowerPaths {
    /// CLIP (any CLIPModel): folder or hub id, such as openai/clip-vit-large-patch14; scores clip_i and clip_t.
    pub clip: Option<PathBuf>,
    /// DINO: folder or hub id, such as facebook/dino-vits16.
    pub dino: Option<PathBuf>,
    /// DINOv2: folder or hub id, such as facebook/dinov2-base.
    pub dinov2: Option<PathBuf>,
    /// LPIPS with VGG, as tools/lpips_to_safetensors.py writes it.
    pub lpips_vgg: Option<PathBuf>,
    /// LPIPS with AlexNet, as tools/lpips_to_safetensors.py writes it.
    pub lpips_alex: Option<PathBuf>,
}

/// The towers that are loaded.
#[derive(Default)]
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
    /// Loads what `paths` names, from the hub where need be.
    pub fn load(paths: &TowerPaths, device: Device, observer: &dyn Observer) -> Result<Self> {
        let paths = paths.resolved(observer)?;
        let mut lpips = Vec::new();
        for (net, file) in paths.lpips() {
            lpips.push((net, Lpips::load(file, net, device)?));
        }
        Ok(Self {
            clip: paths.clip.as_deref().map(|dir| Clip::load(dir, device)).transpose()?,
            dino: paths.dino.as_deref().map(|dir| Vit::load(dir, device)).transpose()?,
            dinov2: paths.dinov2.as_deref().map(|dir| Vit::load(dir, device)).transpose()?,
            lpips,
        })
    }

    /// Whether nothing is loaded.
    pub fn is_empty(&self) -> bool {
        self.clip.is_none() && self.dino.is_none() && self.dinov2.is_none() && self.lpips.is_empty()
    }
}

impl TowerPaths {
    /// The same with local folders in place of hub ids, downloaded where need be. What is local already asks nobody.
    pub fn resolved(&self, observer: &dyn Observer) -> Result<Self> {
        let local = |flag: &str, path: &Option<PathBuf>, known: &str| {
            let path = path.as_deref().map(|path| hub::resolve(path, Wanted::Tower, observer));
            path.transpose().map_err(|e| told(e, flag, known))
        };
        let clip = "openai/clip-vit-large-patch14 (the usual one) or openai/clip-vit-base-patch32";
        Ok(Self {
            clip: local("clip", &self.clip, clip)?,
            dino: local("dino", &self.dino, "facebook/dino-vits16")?,
            dinov2: local("dinov2", &self.dinov2, "facebook/dinov2-base")?,
            ..self.clone()
        })
    }

    fn lpips(&self) -> impl Iterator<Item = (Net, &Path)> {
        let files = [(Net::Vgg, &self.lpips_vgg), (Net::Alex, &self.lpips_alex)];
        files.into_iter().filter_map(|(net, file)| Some((net, file.as_deref()?)))
    }
}

/// The error with the flag that it is about, and the repositories that would do.
fn told(error: Error, flag: &str, known: &str) -> Error {
    match error.kind {
        ErrorKind::Hub(_) => error
            .at(format!("--{flag}"))
            .with_hint(format!("the tower that scores are usually made with: {known}")),
        _ => error,
    }
}

/// What tells these towers from others, such as `clip 0123456789abcdef, lpips_vgg ..`: scores that were made with towers of
/// another identity cannot be compared. Made of each tower's settings, and of the name, dtype and first values of each of its
/// tensors.
pub fn identity(paths: &TowerPaths, observer: &dyn Observer) -> Result<String> {
    const TEXTS: [&str; 9] = [
        "added_tokens.json",
        "config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ];
    let paths = paths.resolved(observer)?;
    let mut found = Vec::new();
    for (name, dir) in [("clip", &paths.clip), ("dino", &paths.dino), ("dinov2", &paths.dinov2)] {
        let Some(dir) = dir else { continue };
        let mut hash = Sha256::new();
        for text in TEXTS.map(|name| dir.join(name)).iter().filter(|path| path.is_file()) {
            hash.update(files::read_to_string(text)?);
        }
        Weights::in_folder(dir, "model", Kind::Float.into(), host::CPU)?.identify(&mut hash)?;
        found.push(format!("{name} {}", short(hash)));
    }
    for (net, file) in paths.lpips() {
        let mut hash = Sha256::new();
        let file = TensorFile::open(file)?;
        for name in file.names() {
            hash.update(format!("{name}:{}\n", file.dtype(&name)));
            hash.update(file.first_bytes(&name, 0, 1, 256)?);
        }
        found.push(format!("{} {}", net.key(), short(hash)));
    }
    Ok(found.join(", "))
}

fn short(hash: Sha256) -> String {
    files::hex(&hash.finalize()[..8])
}
