//! Adapters as they lie on disk, whatever their form: PEFT folders, run folders with a text encoder's adapter, and fully
//! fine-tuned networks. By layer name; a layer's adapter is taken out when it is used, and what is left fitted nothing.

use crate::adapter::peft::{self, AdapterFile};
use crate::adapter::{Adapter, Full};
use crate::error::{Error, Result};
use crate::tensor_file::TensorFile;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Where a run keeps its text encoder's adapter, below the UNet's.
pub const TEXT_ENCODER: &str = "text_encoder";
/// A fully fine-tuned UNet in a run folder, as diffusers' `from_pretrained(RUN, subfolder="unet")` reads it.
pub const FULL_UNET: &str = "unet/diffusion_pytorch_model.safetensors";

/// An adapter that was read and is not on a network yet.
pub struct LoadedAdapter {
    /// Where it was read from.
    pub path: PathBuf,
    /// What it is, such as `HRA r 8`.
    pub what: String,
    /// Keys of its files that are part of nothing.
    pub unused: Vec<String>,
    /// What a user should know, one sentence each.
    pub notes: Vec<String>,
    /// The base model that it was made for, where it says: [`crate::StableDiffusion::fingerprint`].
    pub base_fingerprint: Option<String>,
    layers: BTreeMap<String, Box<dyn Adapter>>,
    biases: BTreeMap<String, Tensor>,
    /// A whole network is read layer by layer, when a layer asks for it.
    full: Option<WholeNetwork>,
}

/// The file of a fully fine-tuned network, and the tensors that were not taken yet.
struct WholeNetwork {
    file: TensorFile,
    left: BTreeSet<String>,
}

impl LoadedAdapter {
    /// Reads what is at `path`.
    pub fn read(path: &Path) -> Result<Self> {
        let mut loaded = Self {
            path: path.to_path_buf(),
            what: String::new(),
            unused: Vec::new(),
            notes: Vec::new(),
            base_fingerprint: None,
            layers: BTreeMap::new(),
            biases: BTreeMap::new(),
            full: None,
        };
        let full = path.join(FULL_UNET);
        let text = path.join(TEXT_ENCODER);
        if full.is_file() && !path.join(peft::CONFIG_FILE).is_file() {
            let file = TensorFile::open(&full)?;
            loaded.what = "full fine-tuning".into();
            loaded.base_fingerprint = file.texts().remove("base_fingerprint");
            loaded.full = Some(WholeNetwork { left: file.names().into_iter().collect(), file });
            return Ok(loaded);
        }
        let unet = path.join(peft::CONFIG_FILE).is_file();
        let text = text.join(peft::CONFIG_FILE).is_file().then_some(text);
        if unet || text.is_none() {
            loaded.add(AdapterFile::read(path)?, "");
        }
        if let Some(text) = text {
            loaded.add(AdapterFile::read(&text)?, " and text encoder");
        }
        Ok(loaded)
    }

    fn add(&mut self, file: AdapterFile, suffix: &str) {
        if self.what.is_empty() {
            self.what = file.config.method.describe();
        }
        self.what += suffix;
        self.unused.extend(file.unused);
        self.notes.extend(file.notes);
        self.layers.extend(file.layers);
        self.biases.extend(file.biases);
        let fingerprint = file.metadata.get("base_fingerprint").cloned();
        self.base_fingerprint = self.base_fingerprint.take().or(fingerprint);
    }

    /// The adapter of a layer, for good.
    pub fn take_layer(&mut self, name: &str) -> Result<Option<Box<dyn Adapter>>> {
        match &mut self.full {
            None => Ok(self.layers.remove(name)),
            Some(full) => {
                Ok(full.take(format!("{name}.weight"))?.map(|t| Box::new(Full::new(t)) as Box<dyn Adapter>))
            }
        }
    }

    /// The trained bias of a layer or norm `(n)`, for good.
    pub fn take_bias(&mut self, name: &str) -> Result<Option<Tensor>> {
        match &mut self.full {
            None => Ok(self.biases.remove(name)),
            Some(full) => full.take(format!("{name}.bias")),
        }
    }

    /// The trained scale of a norm `(n)`, for good.
    pub fn take_scale(&mut self, name: &str) -> Result<Option<Tensor>> {
        self.full.as_mut().map_or(Ok(None), |full| full.take(format!("{name}.weight")))
    }

    /// Names of what was not taken.
    pub fn left(&self) -> Vec<String> {
        let full = self.full.iter().flat_map(|f| f.left.iter().cloned());
        self.layers.keys().chain(self.biases.keys()).cloned().chain(full).collect()
    }
}

impl WholeNetwork {
    fn take(&mut self, key: String) -> Result<Option<Tensor>> {
        if !self.left.remove(&key) {
            return Ok(None);
        }
        let tensor = self.file.read_as(&key, Kind::Float, Device::Cpu)?;
        if tensor.isfinite().all().int64_value(&[]) == 0 {
            let problem = format!("`{key}`: holds numbers that are not finite");
            return Err(Error::format(self.file.path(), problem));
        }
        Ok(Some(tensor))
    }
}
