//! Stub.
use crate::error::Result;
use crate::image::RgbImage;
use std::path::Path;
use tch::{Device, Tensor};

/// CLIP's two towers with their projections.
pub struct Clip;

impl Clip {
    /// Loads a Hugging Face folder of a `CLIPModel` with processor and tokenizer.
    pub fn load(_dir: &Path, _device: Device) -> Result<Self> {
        unimplemented!()
    }
    /// Unit embeddings `(b, d)`, f32, CPU.
    pub fn images(&self, _pictures: &[&RgbImage]) -> Result<Tensor> {
        unimplemented!()
    }
    /// Unit embeddings `(b, d)`, f32, CPU.
    pub fn texts(&self, _texts: &[&str]) -> Result<Tensor> {
        unimplemented!()
    }
}
