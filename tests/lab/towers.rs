//! The towers that score pictures against transformers: pixels to the bit, embeddings of pictures and texts.
//! `tests/fixtures/make_tower_fixtures.py` made what is compared with.

use crate::support::base::{pin_threads, root};
use crate::support::refused::refused;
use hra::data::image::RgbImage;
use hra::lab::evaluate::clip::Clip;
use hra::lab::evaluate::processor::Processor;
use hra::lab::evaluate::vit::Vit;
use hra::weights::tensor_file::TensorFile;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Of unit embeddings, each number.
const TOLERANCE: f64 = 1e-5;

/// As in the script that made the fixtures.
const TEXTS: [&str; 4] = [
    "a cat",
    "A photo of a <new> dog",
    "",
    "it's the <new> robot on the moon and the dog and the cat and a very long tail",
];

fn towers() -> PathBuf {
    pin_threads();
    root().join("tests/fixtures/towers")
}

fn pictures() -> Vec<RgbImage> {
    let file = TensorFile::open(&towers().join("pictures.safetensors")).unwrap();
    let picture = |i: usize| {
        let pixels = file.read(&i.to_string()).unwrap();
        let (height, width, _) = pixels.size3().unwrap();
        let bytes = Vec::<u8>::try_from(pixels.reshape([-1])).unwrap();
        RgbImage::from_raw(width as u32, height as u32, bytes).unwrap()
    };
    (0..file.names().len()).map(picture).collect()
}

fn expected(name: &str) -> Tensor {
    TensorFile::open(&towers().join("expected.safetensors")).unwrap().read(name).unwrap()
}

/// Fails unless `found` are unit rows that equal those that Python wrote.
fn check(name: &str, found: &Tensor) {
    let expected = expected(name);
    assert_eq!(found.size(), expected.size(), "{name}");
    let worst = (found - &expected).abs().max().double_value(&[]);
    println!("{name}: {worst:.1e}");
    assert!(worst <= TOLERANCE, "{name}: off by {worst:.1e}\n{found}\n{expected}");
}

fn references(pictures: &[RgbImage]) -> Vec<&RgbImage> {
    pictures.iter().collect()
}

#[test]
fn pixels_are_those_of_transformers_to_the_bit() {
    let pictures = pictures();
    let dir = tempfile::tempdir().unwrap();
    let cases = fs::read_to_string(towers().join("processors.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&cases).unwrap();
    assert_eq!(cases.len(), 28);
    for case in cases {
        let settings = case["settings"].to_string();
        fs::write(dir.path().join("preprocessor_config.json"), &settings).unwrap();
        let processor = Processor::read(dir.path()).unwrap_or_else(|e| panic!("{settings}: {e}"));
        let (height, width) = processor.size();
        assert_eq!(json!([height, width]), case["size"], "{settings}");
        let pixels = processor.pixels(&references(&pictures)).unwrap();
        assert_eq!(pixels.size(), [pictures.len() as i64, 3, height, width]);
        for (i, expected) in case["sha256"].as_array().unwrap().iter().enumerate() {
            let values = Vec::<f32>::try_from(pixels.get(i as i64).reshape([-1])).unwrap();
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            let digest = Sha256::digest(bytes);
            let found: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(&json!(found), expected, "picture {i} under {settings}");
        }
    }
}

#[test]
fn clip_sees_and_reads_as_in_transformers() {
    let pictures = pictures();
    for name in ["clip", "clip-old"] {
        let clip = Clip::load(&towers().join(name), Device::Cpu).unwrap();
        check(&format!("{name}.images"), &clip.images(&references(&pictures)).unwrap());
        check(&format!("{name}.texts"), &clip.texts(&TEXTS).unwrap());
    }
}

#[test]
fn class_tokens_are_those_of_transformers() {
    let pictures = pictures();
    for name in ["dino", "dino-wide", "dinov2", "dinov2-gated"] {
        let vit = Vit::load(&towers().join(name), Device::Cpu).unwrap();
        check(&format!("{name}.images"), &vit.images(&references(&pictures)).unwrap());
    }
}

/// More than go through at once, and none.
#[test]
fn any_number_of_pictures_and_texts() {
    let pictures = pictures();
    let clip = Clip::load(&towers().join("clip"), Device::Cpu).unwrap();
    let few = references(&pictures);
    let times = 300 / few.len() + 1;
    let found = clip.images(&few.repeat(times)).unwrap();
    let expected = expected("clip.images").repeat([times as i64, 1]);
    assert_eq!(found.size(), expected.size());
    assert!((found - expected).abs().max().double_value(&[]) <= TOLERANCE);
    let texts = clip.texts(&TEXTS.repeat(20)).unwrap();
    assert!(
        (texts.narrow(0, 76, 4) - clip.texts(&TEXTS).unwrap()).abs().max().double_value(&[]) <= TOLERANCE
    );
    assert_eq!(clip.images(&[]).unwrap().size(), [0, 12]);
    assert_eq!(clip.texts(&[]).unwrap().size(), [0, 12]);
    let vit = Vit::load(&towers().join("dinov2"), Device::Cpu).unwrap();
    assert_eq!(vit.images(&[]).unwrap().size(), [0, 16]);
}

/// The embedded tower tells what it was trained on.
#[test]
fn the_embedded_clip_knows_its_subjects() {
    let clip = Clip::load(&root().join("assets/tiny-clip"), Device::Cpu).unwrap();
    let texts = clip.texts(&["a pixel art emoji of a cat", "a pixel art emoji of a robot"]).unwrap();
    for (i, subject) in ["cat", "robot"].into_iter().enumerate() {
        let dir = root().join("assets/subjects").join(subject);
        let mut files = support_pictures(&dir);
        assert!(!files.is_empty());
        files.truncate(4);
        let images = clip.images(&references(&files)).unwrap();
        let scores = images.matmul(&texts.tr()).mean_dim([0i64].as_slice(), false, tch::Kind::Float);
        let (own, other) = (scores.double_value(&[i as i64]), scores.double_value(&[1 - i as i64]));
        println!("{subject}: {own:.3} against {other:.3}");
        assert!(own > other + 0.02, "{subject}: {own:.3} against {other:.3}");
    }
}

/// Pictures anywhere below a folder.
fn support_pictures(dir: &Path) -> Vec<RgbImage> {
    let mut found = Vec::new();
    for path in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            found.extend(support_pictures(&path));
        } else if path.extension().is_some_and(|e| e == "png") {
            found.push(hra::data::image::load_rgb(&path).unwrap());
        }
    }
    found
}

/// A copy of a tower's folder with one JSON file changed.
fn edited(tower: &str, file: &str, edit: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(towers().join(tower)).unwrap().map(|entry| entry.unwrap()) {
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let path = dir.path().join(file);
    let mut value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
    dir
}

fn set(tower: &str, file: &str, key: &str, value: Value) -> tempfile::TempDir {
    edited(tower, file, |json| json[key] = value)
}

fn vit(dir: &Path) -> hra::Error {
    Vit::load(dir, Device::Cpu).err().expect("refused")
}

fn clip(dir: &Path) -> hra::Error {
    Clip::load(dir, Device::Cpu).err().expect("refused")
}

#[test]
fn processors_that_do_other_things_are_refused() {
    let file = "preprocessor_config.json";
    for (key, value, words) in [
        ("resample", json!(0), "resample: expected 1 (Lanczos)"),
        ("resample", json!("bicubic"), "resample"),
        ("size", json!(0), "size: expected 1 to 2048 pixels, found 0"),
        ("size", json!(-3), "size: expected a size of"),
        ("size", json!(1u64 << 40), "size: expected 1 to 2048"),
        ("size", json!({"shortest_edge": 20, "longest_edge": 30}), "size: expected a size of"),
        ("size", json!({"height": 16, "width": 0}), "size: expected 1 to 2048"),
        ("size", json!({"shortest_edge": 16}), "expected one size for all pictures"),
        ("do_resize", json!(false), "expected one size for all pictures"),
        ("do_resize", json!("yes"), "do_resize: expected true or false"),
        ("do_pad", json!(true), "do_pad"),
        ("do_flip_channel_order", json!(true), "do_flip_channel_order"),
        ("do_center_crop", json!(true), "crop_size: expected a size of height and width, found null"),
        ("image_mean", json!([0.5, 0.5]), "image_mean: expected a number or three"),
        ("image_std", json!([0.5, 0, 0.5]), "image_std: expected numbers other than 0"),
        ("image_std", json!(1e-60), "image_std: expected numbers other than 0"),
        ("image_std", json!([1e300, 1, 1]), "image_std: expected a number or three"),
        ("rescale_factor", json!(1e300), "rescale_factor: expected a number"),
        ("feature_extractor_type", json!("DPTFeatureExtractor"), "found DPTImageProcessor"),
    ] {
        refused(vit(set("dino", file, key, value).path()), &[file, words]);
    }
    let dir = set("clip", "processor_config.json", "image_processor", json!(3));
    refused(clip(dir.path()), &["processor_config.json: expected a JSON object, found 3"]);
    let dir = tempfile::tempdir().unwrap();
    refused(Processor::read(dir.path()).err().unwrap(), &["expected preprocessor_config.json", "hint:"]);
}

/// A file without the processor's kind has that of its model.
#[test]
fn a_processor_without_a_name_is_the_models() {
    let named = Processor::read(&towers().join("dino")).unwrap();
    let dir = edited("dino", "preprocessor_config.json", |json| {
        json.as_object_mut().unwrap().remove("feature_extractor_type");
    });
    let pictures = pictures();
    let pixels = |processor: &Processor| processor.pixels(&references(&pictures)).unwrap();
    assert!(pixels(&named).equal(&pixels(&Processor::read(dir.path()).unwrap())));
    fs::remove_file(dir.path().join("config.json")).unwrap();
    refused(Processor::read(dir.path()).err().unwrap(), &["image_processor_type: expected"]);
}

#[test]
fn pictures_that_would_take_all_memory_are_refused() {
    let processor = Processor::read(&towers().join("clip-old")).unwrap();
    let thin = RgbImage::new(1, 160_000);
    refused(processor.pixels(&[&thin]).unwrap_err(), &["1x160000", "too long and thin"]);
    refused(processor.pixels(&[&RgbImage::new(0, 5)]).unwrap_err(), &["0x5"]);
    assert!(processor.pixels(&[&RgbImage::new(1, 1000)]).is_ok());
    // The longer side would be 2^32.
    let dir = set("clip-old", "preprocessor_config.json", "size", json!(2048));
    let processor = Processor::read(dir.path()).unwrap();
    refused(processor.pixels(&[&RgbImage::new(1, 1 << 21)]).unwrap_err(), &["1x2097152"]);
}

#[test]
fn configs_that_no_tower_has_are_refused() {
    for (key, value, words) in [
        ("model_type", json!("dinov2_with_registers"), "model_type: expected vit (DINO) or dinov2"),
        ("patch_size", json!(0), "patch_size: expected 1 to"),
        ("patch_size", json!(-4), "patch_size: expected 1 to"),
        ("patch_size", json!(17), "patch_size: expected 1 to 16, found 17"),
        ("patch_size", json!([4, 2]), "square patches"),
        ("patch_size", json!("4"), "patch_size: expected a number or two"),
        ("image_size", json!(1i64 << 62), "image_size: expected 1 to"),
        ("image_size", json!([16, 0]), "image_size: expected 1 to"),
        ("image_size", json!(2048), "patches of a picture: expected 1 to 4096"),
        ("num_channels", json!(1), "num_channels: expected 3"),
        ("hidden_size", json!(0), "hidden_size: expected 1 to"),
        ("hidden_size", json!("16"), "invalid type"),
        ("num_attention_heads", json!(5), "does not divide"),
        ("num_attention_heads", json!(0), "num_attention_heads: expected 1 to"),
        ("num_hidden_layers", json!(1_000_000_000), "num_hidden_layers: expected 1 to 256"),
        ("num_hidden_layers", json!(3), "`encoder.layer.2.layernorm_before.weight` [16] is missing"),
        ("intermediate_size", json!(-1), "intermediate_size: expected 1 to"),
        ("intermediate_size", json!(65536), "expected shape [65536, 16], found [36, 16]"),
        ("layer_norm_eps", json!(1e300), "layer_norm_eps: expected a number"),
        ("hidden_act", json!("relu"), "hidden_act: expected gelu, found \"relu\""),
        ("qkv_bias", json!(7), "qkv_bias: expected true or false"),
    ] {
        refused(vit(set("dino", "config.json", key, value).path()), &[words]);
    }
    for (key, value, words) in [
        ("mlp_ratio", json!(1e300), "intermediate_size: expected 1 to"),
        ("mlp_ratio", json!("2"), "intermediate_size: expected 1 to"),
        ("image_size", json!([28, 24]), "expected shape [1, 43, 16], found [1, 50, 16]"),
    ] {
        refused(vit(set("dinov2", "config.json", key, value).path()), &[words]);
    }
    for (key, value, words) in [
        ("model_type", json!("clip_vision_model"), "model_type: expected clip"),
        ("projection_dim", json!(0), "projection_dim: expected 1 to"),
        ("projection_dim", json!(1i64 << 40), "projection_dim: expected 1 to"),
        ("projection_dim", json!(13), "`visual_projection.weight`: expected shape [13, 16], found [12, 16]"),
        ("text_config", Value::Null, "expected shape [49408, 512]"),
        ("text_config", json!({"vocab_size": -1}), "text_config: vocab_size: expected 1 to"),
        ("text_config", json!({"eos_token_id": [1, 2]}), "text_config: eos_token_id: expected the id"),
        (
            "vision_config",
            json!({"hidden_act": "silu"}),
            "vision_config: hidden_act: expected quick_gelu or gelu",
        ),
        ("vision_config", json!({"image_size": 16}), "vision_config: patch_size: expected 1 to 16, found 32"),
        ("vision_config", json!([]), "expected a processor that gives the 224x224 pixels"),
    ] {
        refused(clip(set("clip", "config.json", key, value).path()), &[words]);
    }
    let dir = edited("clip", "config.json", |json| json["text_config"]["eos_token_id"] = json!(5));
    refused(clip(dir.path()), &["eos_token_id: expected the id of the tokenizer's end token, 93, found 5"]);
    let dir = tempfile::tempdir().unwrap();
    refused(vit(dir.path()), &["expected config.json"]);
    refused(clip(&dir.path().join("x")), &["expected config.json", "no folder"]);
}

#[test]
fn processors_that_do_not_fit_the_tower_are_refused() {
    let file = "preprocessor_config.json";
    let dir = set("dino", file, "size", json!(3));
    refused(vit(dir.path()), &["expected 1 to 4096 patches of 4 pixels, found 0x0 in 3x3 pixels"]);
    let dir = set("dino", file, "size", json!(2048));
    refused(vit(dir.path()), &["found 512x512 in 2048x2048 pixels"]);
    let dir = set("clip-old", file, "crop_size", json!(24));
    refused(clip(dir.path()), &["18x18 pixels of config.json's image_size, found one that gives 24x24"]);
}

#[test]
fn broken_weights_are_refused() {
    let dir = edited("dino", "config.json", |_| {});
    let path = dir.path().join("model.safetensors");
    let file = TensorFile::open(&path).unwrap();
    let mut tensors: Vec<(String, Tensor)> =
        file.names().into_iter().map(|name| (name.clone(), file.read(&name).unwrap())).collect();
    let norm = tensors.iter_mut().find(|(name, _)| name == "layernorm.weight").unwrap();
    let whole = norm.1.copy();
    norm.1 = &whole * f64::NAN;
    hra::weights::tensor_file::write(&path, &tensors, &[]).unwrap();
    refused(vit(dir.path()), &["`layernorm.weight`: holds numbers that are not finite"]);
    // Each is finite, and what comes of them is not.
    tensors.iter_mut().for_each(|(name, t)| {
        if name == "layernorm.weight" {
            *t = whole.ones_like().to_kind(Kind::Float) * 3e38;
        }
    });
    hra::weights::tensor_file::write(&path, &tensors, &[]).unwrap();
    let broken = Vit::load(dir.path(), Device::Cpu).unwrap();
    refused(broken.images(&references(&pictures())).unwrap_err(), &["expected embeddings of finite numbers"]);
    tensors.retain(|(name, _)| name != "layernorm.weight");
    hra::weights::tensor_file::write(&path, &tensors, &[]).unwrap();
    refused(vit(dir.path()), &["`layernorm.weight` [16] is missing"]);
    fs::remove_file(&path).unwrap();
    refused(vit(dir.path()), &["expected model.safetensors"]);
}

/// What `transformers` with Pillow makes of real photographs is compared in tests/python/test_towers.py.
#[test]
fn towers_are_the_same_in_any_company() {
    let pictures = pictures();
    let vit = Vit::load(&towers().join("dino-wide"), Device::Cpu).unwrap();
    let together = vit.images(&references(&pictures)).unwrap();
    for (i, picture) in pictures.iter().enumerate() {
        let alone = vit.images(&[picture]).unwrap();
        assert!((alone - together.narrow(0, i as i64, 1)).abs().max().double_value(&[]) <= 1e-6);
    }
}
