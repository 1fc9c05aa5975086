//! Stub.
use crate::error::Result;
use crate::image::RgbImage;
use std::path::Path;
use tch::{Device, Tensor};

/// A vision transformer whose class token is the picture's embedding: DINO (`vit`) or DINOv2 (`dinov2`).
pub struct Vit;

impl Vit {
    /// Loads a Hugging Face folder; `config.json`'s `model_type` says which it is.
    pub fn load(_dir: &Path, _device: Device) -> Result<Self> {
        unimplemented!()
    }
    /// Unit class tokens of the last hidden state `(b, d)`, f32, CPU.
    pub fn images(&self, _pictures: &[&RgbImage]) -> Result<Tensor> {
        unimplemented!()
    }
}
