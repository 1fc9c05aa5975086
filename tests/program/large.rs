//! A model of Stable Diffusion 1.5's size, with random weights, through the real binary: one training step and two
//! sampling steps at 512 px on the CPU. Sizes are those of the published configs; the numbers of weights are the published
//! ones, so a network that lacks a layer or has one too many fails before it computes.
//!
//! Takes minutes, 2.2 GB of disk and 7 GB of memory, so it is run by hand:
//!
//! ```text
//! cargo test --release --test program large -- --ignored --nocapture
//! ```

use crate::support::base::root;
use crate::support::finished::Finished;
use crate::support::memory;
use crate::support::records::records;
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

/// Values of the UNet, the text tower and the VAE of Stable Diffusion 1.5, as their model cards and papers count them.
const UNET_VALUES: i64 = 859_520_964;
const TEXT_VALUES: i64 = 123_060_480;
const VAE_VALUES: i64 = 83_653_863;
/// Values of an HRA adapter of rank 8 on its attention projections: 8 (6 * (5 * 320 + 5 * 640 + 6 * 1280) + 16 * 2 * 768).
const ADAPTER_VALUES: i64 = 795_648;
/// Attention projections: 16 transformer blocks with 2 attentions of 4.
const ADAPTED_LAYERS: usize = 128;
/// A shard of a model part is closed when it holds this many values: what is in memory at once stays small.
const SHARD_VALUES: i64 = 1 << 28;

#[test]
#[ignore = "makes 2 GB of weights and computes for minutes"]
fn a_model_of_full_size_is_trained_and_drawn_with() {
    let scratch = Scratch::new();
    let model = scratch.path("sd15");
    let started = Instant::now();
    make_model(&model);
    println!("made the model in {:.0} s", started.elapsed().as_secs_f64());

    let (model, run, out) = (text(&model), text(&scratch.path("run")), text(&scratch.path("out")));
    let pictures = text(&root().join("assets/subjects/cat/train"));
    let prompt = "a fluent 3d emoji of a sks cat face";
    let trained = measured(
        &scratch,
        "one training step",
        &[
            "train",
            "--device=cpu",
            "--pretrained_model_name_or_path",
            &model,
            "--instance_data_dir",
            &pictures,
            "--instance_prompt",
            prompt,
            "--output_dir",
            &run,
            "--max_train_steps=1",
        ],
    );
    assert!(trained.out.contains(&format!("({ADAPTER_VALUES} values")), "{}", trained.out);
    let config = std::fs::read_to_string(scratch.path("run/config.toml")).unwrap();
    assert!(config.contains("resolution = 512"), "the model's own resolution is taken\n{config}");
    let record = &records(&scratch.path("run"))[0];
    println!("{record}");
    for key in ["loss", "gradient_norm", "weight_change"] {
        assert!(record[key].as_f64().is_some_and(|v| v.is_finite() && v > 0.0), "{key} of {record}");
    }
    assert!(record["orthogonality_error"].as_f64().unwrap() < 1e-5, "{record}");

    let adapter = TensorFile::open(&scratch.path("run/adapter_model.safetensors")).unwrap();
    let names = adapter.names();
    assert_eq!(names.len(), ADAPTED_LAYERS);
    assert_eq!(names.iter().map(|n| values(&adapter.shape(n).unwrap())).sum::<i64>(), ADAPTER_VALUES);
    for name in &names {
        assert!(all_finite(&adapter.read(name).unwrap()), "{name}");
    }

    let latents = text(&scratch.path("latents.safetensors"));
    let drawn = measured(
        &scratch,
        "two sampling steps with guidance",
        &[
            "sample",
            "--device=cpu",
            "--model",
            &model,
            "--adapter",
            &run,
            "--prompt",
            prompt,
            "--steps=2",
            "--save-latents",
            &latents,
            "--output",
            &out,
        ],
    );
    assert!(drawn.err.contains(&format!("{ADAPTED_LAYERS} layers matched")), "{}", drawn.err);
    let latents = TensorFile::open(Path::new(&latents)).unwrap().read("latents").unwrap();
    assert_eq!(latents.size(), [1, 4, 64, 64]);
    assert!(all_finite(&latents));
    let picture = image::open(scratch.path("out/0000-0000.png")).unwrap().to_rgb8();
    assert_eq!(picture.dimensions(), (512, 512));
    let first = picture.get_pixel(0, 0);
    assert!(picture.pixels().any(|p| p != first), "the picture is one plain colour");
}

/// Writes a model folder of Stable Diffusion 1.5's shape, with the embedded model's tokenizer.
fn make_model(dir: &Path) {
    let config = |part: &str, name: &str, value: Value| {
        std::fs::create_dir_all(dir.join(part)).unwrap();
        std::fs::write(dir.join(part).join(name), serde_json::to_vec(&value).unwrap()).unwrap();
    };
    config(
        "unet",
        "config.json",
        json!({
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types":
                ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "layers_per_block": 2,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "norm_num_groups": 32,
        }),
    );
    config(
        "vae",
        "config.json",
        json!({
            "_class_name": "AutoencoderKL",
            "sample_size": 512,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": vec!["DownEncoderBlock2D"; 4],
            "up_block_types": vec!["UpDecoderBlock2D"; 4],
            "layers_per_block": 2,
            "latent_channels": 4,
            "norm_num_groups": 32,
            "scaling_factor": 0.18215,
        }),
    );
    config(
        "text_encoder",
        "config.json",
        json!({
            "architectures": ["CLIPTextModel"],
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
        }),
    );
    config(
        "scheduler",
        "scheduler_config.json",
        json!({
            "_class_name": "PNDMScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "set_alpha_to_one": false,
            "skip_prk_steps": true,
            "steps_offset": 1,
        }),
    );
    let tokenizer = tiny_sd().join("tokenizer");
    let settings = std::fs::read(tokenizer.join("tokenizer_config.json")).unwrap();
    let mut settings: Value = serde_json::from_slice(&settings).unwrap();
    settings["model_max_length"] = 77.into();
    config("tokenizer", "tokenizer_config.json", settings);
    for name in ["vocab.json", "merges.txt", "tokenizer.json"] {
        std::fs::copy(tokenizer.join(name), dir.join("tokenizer").join(name)).unwrap();
    }

    let device = Device::Cpu;
    let model = Source::open(dir, None).unwrap();
    let unet = fill(dir, Part::UNet, || UNet::load(&model, Kind::Float, device));
    assert_eq!(unet, UNET_VALUES, "values of the UNet");
    let vae = fill(dir, Part::Vae, || Vae::load(&model, device));
    assert_eq!(vae, VAE_VALUES, "values of the VAE");
    let text =
        fill(dir, Part::TextEncoder, || TextEncoder::load(&model, Part::TextEncoder, Kind::Float, device));
    assert_eq!(text, TEXT_VALUES, "values of the text tower");
}

/// Writes random weights, in f16 and in shards, for the network that a part's config describes; how many values it has.
/// What the network needs it says itself: loaded from an empty file, it lists every tensor as missing, with its shape.
fn fill<T>(model: &Path, part: Part, load: impl Fn() -> Result<T>) -> i64 {
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
            shard.iter().map(|(name, shape)| (name.clone(), random(name, shape))).collect();
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
    let tensor = match shape.len() {
        1 if name.ends_with("weight") => Tensor::ones(shape, options),
        1 => Tensor::zeros(shape, options),
        _ => draws::normal(seed::derive(0, name, 0), shape) * 0.02,
    };
    tensor.to_kind(Kind::Half)
}

fn values(shape: &[i64]) -> i64 {
    shape.iter().product()
}

fn all_finite(tensor: &Tensor) -> bool {
    tensor.isfinite().all().int64_value(&[]) == 1
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_string()
}

/// Runs the program on all cores, expects success, and prints how long it took and the most memory it held.
fn measured(scratch: &Scratch, what: &str, args: &[&str]) -> Finished {
    let started = Instant::now();
    let mut command = scratch.command(args);
    command.env_remove("OMP_NUM_THREADS");
    let (done, bytes) = memory::measured(scratch, command);
    assert_eq!(done.code, 0, "{what}: {}", done.err);
    println!("{what}: {:.0} s, peak memory {:.2} GB", started.elapsed().as_secs_f64(), bytes as f64 / 1e9);
    done
}
