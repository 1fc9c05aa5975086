//! Pictures, conditions, and the towers that score.

use super::{fixture, put, split};
use hra::data::Crop;
use hra::data::image::landmarks::{self, read_points};
use hra::data::image::palette::{MapFile, Palette};
use hra::data::image::{LabelMap, RgbImage};
use hra::data::pairs::{ConditionKind, PairFolder, PairSettings};
use hra::lab::evaluate::clip::Clip;
use hra::lab::evaluate::vit::Vit;
use hra::platform::observer::Silent;
use std::path::Path;
use tch::Device;

/// A photograph, or a picture of ours with its settings.
pub fn picture(scratch: &Path, input: &[u8]) {
    let _ = hra::data::image::decode::decode(input, Default::default());
    put(scratch, "picture.png", input);
    let _ = hra::data::image::read_png_text(&scratch.join("picture.png"));
}

/// Landmarks of a picture, drawn at two sizes.
pub fn points(scratch: &Path, input: &[u8]) {
    put(scratch, "points.pts", input);
    let Ok(points) = read_points(&scratch.join("points.pts")) else { return };
    let _ = landmarks::draw(&points, 64, 48);
    let _ = landmarks::draw(&landmarks::square(&points, 64, 48, 16), 16, 16);
}

/// Colours of classes, used both ways.
pub fn palette(scratch: &Path, input: &[u8]) {
    put(scratch, "palette.json", input);
    let Ok(palette) = Palette::read(&scratch.join("palette.json")) else { return };
    assert!(palette.names().is_empty() || palette.names().len() == palette.colours().len());
    let _ = palette.colour(&LabelMap::new(2, 1, vec![0, u16::MAX]), None);
    let _ = palette.classes(&RgbImage::new(3, 2), None);
}

/// A segmentation map in any form, and a palette.
pub fn label_map(scratch: &Path, input: &[u8]) {
    let [map, palette] = split(input);
    put(scratch, "map.png", map);
    put(scratch, "palette.json", palette);
    let path = scratch.join("map.png");
    let palette = Palette::read(&scratch.join("palette.json")).ok();
    let Ok(map) = LabelMap::read(&path, palette.as_ref()) else { return };
    let (width, height) = map.dimensions();
    assert_eq!(map.labels().len(), width as usize * height as usize);
    let _ = map.square(8);
    let _ = palette.as_ref().map(|palette| palette.colour(&map, Some(255)));
    let _ = MapFile::read(&path).map(|file| file.subject(palette.as_ref()));
}

/// Config, processor and weights of a tower's folder.
fn tower(scratch: &Path, processor: &str, input: &[u8]) -> [RgbImage; 2] {
    let [config, settings, weights] = split(input);
    put(scratch, "config.json", config);
    put(scratch, processor, settings);
    put(scratch, "model.safetensors", weights);
    [RgbImage::new(31, 7), RgbImage::new(5, 40)]
}

/// CLIP's folder, with a tokenizer that is good; a picture or text is scored with what loads.
pub fn clip(scratch: &Path, input: &[u8]) {
    let pictures = tower(scratch, "processor_config.json", input);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        put(scratch, name, &std::fs::read(fixture("towers/clip").join(name)).expect("a fixture"));
    }
    let Ok(clip) = Clip::load(scratch, Device::Cpu) else { return };
    let _ = clip.images(&pictures.each_ref());
    let _ = clip.texts(&["a cat", ""]);
}

/// DINO's or DINOv2's folder; pictures are scored with what loads.
pub fn vit(scratch: &Path, input: &[u8]) {
    let pictures = tower(scratch, "preprocessor_config.json", input);
    let Ok(vit) = Vit::load(scratch, Device::Cpu) else { return };
    let _ = vit.images(&pictures.each_ref());
}

/// A table of pairs with a picture, a condition, points and a palette.
pub fn pairs(scratch: &Path, input: &[u8]) {
    let [table, picture, condition, points, palette] = split(input);
    let files = [("a.png", picture), ("c.png", condition), ("p.pts", points), ("palette.json", palette)];
    for (name, content) in files {
        put(scratch, name, content);
    }
    let with_palette = Some(scratch.join("palette.json"));
    let kinds = [
        (ConditionKind::Canny, None),
        (ConditionKind::Landmarks, None),
        (ConditionKind::Segmentation, with_palette),
    ];
    for (name, (condition, palette)) in ["t.csv", "t.json", "t.jsonl"].into_iter().zip(kinds) {
        put(scratch, name, table);
        let settings = PairSettings { condition, palette, ..PairSettings::default() };
        let Ok(pairs) = PairFolder::read(&scratch.join(name), &settings, &Silent) else { continue };
        let _ = pairs.report(Some(64));
        for index in 0..pairs.pairs().len().min(3) {
            let window = pairs.crop_window(index, 24, Crop::Random(7 << 32 | 7));
            let _ = (pairs.prepare(index, 24, window), pairs.at_size(index, 16, 24));
        }
    }
}
