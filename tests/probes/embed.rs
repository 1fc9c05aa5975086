//! What a tower makes of image files, so that `tests/python` can compare this crate with transformers.
//!
//! `embed DIR OUT.safetensors PICTURE ..`: `pixels` (b, 3, h, w) and `images` (b, d) of a CLIP, DINO or DINOv2 folder.

use std::path::Path;

use anyhow::bail;
use hra::data::image::{RgbImage, load_rgb};
use hra::lab::evaluate::clip::Clip;
use hra::lab::evaluate::processor::Processor;
use hra::lab::evaluate::vit::Vit;
use hra::weights::tensor_file;
use tch::Device;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, output, pictures @ ..] = &arguments[..] else {
        bail!("usage: embed DIR OUT.safetensors PICTURE ..");
    };
    let dir = Path::new(dir);
    let pictures = pictures.iter().map(|path| load_rgb(Path::new(path))).collect::<hra::Result<Vec<_>>>()?;
    let pictures: Vec<&RgbImage> = pictures.iter().collect();
    let pixels = Processor::read(dir)?.pixels(&pictures)?;
    let images = if dir.join("tokenizer_config.json").exists() {
        Clip::load(dir, Device::Cpu)?.images(&pictures)?
    } else {
        Vit::load(dir, Device::Cpu)?.images(&pictures)?
    };
    tensor_file::write(Path::new(output), &[("pixels".into(), pixels), ("images".into(), images)], &[])?;
    Ok(())
}
