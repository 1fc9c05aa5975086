//! Stub.
use crate::error::Result;
use crate::image::RgbImage;
use std::path::Path;
use tch::Tensor;

/// What a tower's folder says about its input.
#[derive(Debug, Clone)]
pub struct Processor;

impl Processor {
    /// Reads `preprocessor_config.json` of a tower's folder.
    pub fn read(_dir: &Path) -> Result<Self> {
        unimplemented!()
    }
    /// Pictures of any sizes to `(b, 3, h, w)`, f32, CPU.
    pub fn pixels(&self, _pictures: &[&RgbImage]) -> Result<Tensor> {
        unimplemented!()
    }
}
