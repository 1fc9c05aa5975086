//! Random weights of full size, and runs of the program that are measured.

use crate::support::finished::Finished;
use crate::support::memory;
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use hra::model::text::TextEncoder;
use hra::model::{UNet, Vae};
use hra::platform::{random as draws, seed};
use hra::weights::part::Part;
use hra::weights::source::Source;
use hra::weights::tensor_file::{self, TensorFile};
use hra::{Error, ErrorKind, Result};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Values of the VAE of [`vae`], and of the text tower of [`clip_l`], as model cards and papers count them.
const VAE_VALUES: i64 = 83_653_863;
pub const CLIP_L_VALUES: i64 = 123_060_480;

/// A shard of a model part is closed when it holds this many values: what is in memory at once stays small.
const SHARD_VALUES: i64 = 1 << 28;

/// Writes a part's config.
pub fn config(dir: &Path, part: &str, name: &str, value: Value) {
    std::fs::create_dir_all(dir.join(part)).unwrap();
    std::fs::write(dir.join(part).join(name), serde_json::to_vec(&value).unwrap()).unwrap();
}

/// The embedded model's tokenizer, for prompts of 77 tokens, padded with `pad` where it is given.
pub fn tokenizer(dir: &Path, part: &str, pad: Option<&str>) {
    let from = tiny_sd().join("tokenizer");
    let settings = std::fs::read(from.join("tokenizer_config.json")).unwrap();
    let mut settings: Value = serde_json::from_slice(&settings).unwrap();
    settings["model_max_length"] = 77.into();
    if let Some(pad) = pad {
        settings["pad_token"] = pad.into();
    }
    config(dir, part, "tokenizer_config.json", settings);
    for name in ["vocab.json", "merges.txt", "tokenizer.json"] {
        std::fs::copy(from.join(name), dir.join(part).join(name)).unwrap();
    }
}

/// The VAE's config, whose latents are scaled by `scale`.
pub fn vae(dir: &Path, sample_size: i64, scale: f64) {
    let value = json!({
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": vec!["DownEncoderBlock2D"; 4],
        "up_block_types": vec!["UpDecoderBlock2D"; 4],
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": scale,
    });
    config(dir, "vae", "config.json", value);
}

/// The config of a text tower of OpenAI's CLIP, ViT-L/14.
pub fn clip_l(dir: &Path) {
    let value = json!({
        "architectures": ["CLIPTextModel"],
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
    });
    config(dir, "text_encoder", "config.json", value);
}

/// Writes random weights in `kind` for every part of the model in `dir`, each of which must have as many values as is published.
pub fn weights(dir: &Path, kind: Kind, unet: i64, texts: &[(Part, i64)]) {
    let (device, model) = (Device::Cpu, Source::open(dir, None).unwrap());
    let found = fill(dir, Part::UNet, kind, || UNet::load(&model, kind, device));
    assert_eq!(found, unet, "values of the UNet");
    let found = fill(dir, Part::Vae, kind, || Vae::load_ours(&model, kind, device));
    assert_eq!(found, VAE_VALUES, "values of the VAE");
    for (part, expected) in texts {
        let found = fill(dir, *part, kind, || TextEncoder::load(&model, *part, kind, device));
        assert_eq!(found, *expected, "values of {}", part.folder());
    }
}

/// Writes random weights, in shards, for the network that a part's config describes; how many values it has.
/// What the network needs it says itself: loaded from an empty file, it lists every tensor as missing, with its shape.
fn fill<T>(model: &Path, part: Part, kind: Kind, load: impl Fn() -> Result<T>) -> i64 {
    let (dir, stem) = (model.join(part.folder()), part.stem());
    let empty = dir.join(format!("{stem}.safetensors"));
    tensor_file::write(&empty, &[], &[]).unwrap();
    let problems = match load() {
        Err(Error { kind: ErrorKind::Weights { problems, .. }, .. }) => problems,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("a network was loaded from an empty file"),
    };
    std::fs::remove_file(&empty).unwrap();

    let mut shards: Vec<Vec<(String, Vec<i64>)>> = Vec::new();
    let (mut total, mut room) = (0, 0);
    for problem in &problems {
        let (name, shape) = missing(problem).unwrap_or_else(|| panic!("not a missing tensor: {problem}"));
        let count = values(&shape);
        if room <= 0 {
            shards.push(Vec::new());
            room = SHARD_VALUES;
        }
        room -= count;
        total += count;
        shards.last_mut().unwrap().push((name, shape));
    }
    let mut map = serde_json::Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("{stem}-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        let tensors: Vec<(String, Tensor)> =
            shard.iter().map(|(name, shape)| (name.clone(), random(name, shape).to_kind(kind))).collect();
        tensor_file::write(&dir.join(&file), &tensors, &[]).unwrap();
        map.extend(shard.iter().map(|(name, _)| (name.clone(), Value::from(file.clone()))));
    }
    let index = serde_json::to_vec(&json!({ "metadata": {}, "weight_map": map })).unwrap();
    std::fs::write(dir.join(format!("{stem}.safetensors.index.json")), index).unwrap();
    total
}

/// Name and shape out of "`NAME` [2, 3] is missing".
fn missing(problem: &str) -> Option<(String, Vec<i64>)> {
    let (name, shape) = problem.strip_prefix('`')?.strip_suffix(" is missing")?.split_once("` ")?;
    Some((name.to_string(), serde_json::from_str(shape).ok()?))
}

/// Norms (weights of one dimension) do nothing yet, biases are zero, all else is normal with the deviation that CLIP's and
/// diffusers' own initialisers have: the norms before every layer keep the numbers finite.
fn random(name: &str, shape: &[i64]) -> Tensor {
    let options = (Kind::Float, Device::Cpu);
    match shape.len() {
        1 if name.ends_with("weight") => Tensor::ones(shape, options),
        1 => Tensor::zeros(shape, options),
        _ => draws::normal(seed::derive(0, name, 0), shape) * 0.02,
    }
}

pub fn values(shape: &[i64]) -> i64 {
    shape.iter().product()
}

/// The finite latents and the picture of more than one colour that a drawing of `side` pixels left.
pub fn assert_drawn(latents: &Path, out: &Path, side: u32) {
    let latents = TensorFile::open(latents).unwrap().read("latents").unwrap();
    assert_eq!(latents.size(), [1, 4, i64::from(side / 8), i64::from(side / 8)]);
    assert!(all_finite(&latents));
    let picture = image::open(out.join("0000-0000.png")).unwrap().to_rgb8();
    assert_eq!(picture.dimensions(), (side, side));
    let first = picture.get_pixel(0, 0);
    assert!(picture.pixels().any(|p| p != first), "the picture is one plain colour");
}

pub fn all_finite(tensor: &Tensor) -> bool {
    tensor.isfinite().all().int64_value(&[]) == 1
}

pub fn text(path: &Path) -> String {
    path.to_str().unwrap().to_string()
}

/// Runs the program on all cores, expects success, and prints how long it took and the most memory it held, in bytes.
pub fn measured(scratch: &Scratch, what: &str, args: &[&str], more: &[(&str, &str)]) -> (Finished, u64) {
    let started = Instant::now();
    let mut command = scratch.command(args);
    command.env_remove("OMP_NUM_THREADS").envs(more.iter().copied());
    let (done, bytes) = memory::measured(scratch, command);
    assert_eq!(done.code, 0, "{what}: {}", done.err);
    println!("{what}: {:.0} s, peak memory {:.2} GB", started.elapsed().as_secs_f64(), bytes as f64 / 1e9);
    (done, bytes)
}
