//! Every reader of a file that comes from somewhere else, as `fn(scratch, input)`: what it says of the input is ignored,
//! only that it comes back counts. `tests/fuzz.rs` runs them on a bounded corpus, `tests/fuzz/` under libFuzzer.
//!
//! Readers of several files take them in one input, with [`SEPARATOR`] between them.

use hra::StableDiffusion;
use hra::adapter::combine::{How, combine};
use hra::adapter::lora_file::{LoraFile, Part as LoraPart};
use hra::adapter::peft::AdapterFile;
use hra::checkpoint::Loaded;
use hra::config::TrainConfig;
use hra::model::config::{TextConfig, UNetConfig, VaeConfig};
use hra::model::source::{Part, Source, Text};
use hra::model::{UNet, Vae};
use hra::noise::{NoiseSchedule, SchedulerConfig};
use hra::run::Metrics;
use hra::sampler::{Plan, SamplerKind};
use hra::tensor_file::TensorFile;
use hra::text::{TextEncoder, Tokenizer};
use std::path::Path;
use tch::{Device, Kind};

/// Between the files of one input.
pub const SEPARATOR: &[u8] = b"\n=====\n";

/// Reads `input`, putting files into `scratch` where the reader wants a path.
pub type Reader = fn(scratch: &Path, input: &[u8]);

/// All of them by name.
pub const READERS: [(&str, Reader); 17] = [
    ("tensor_file", tensor_file),
    ("adapter", adapter),
    ("lora_file", lora_file),
    ("unet_config", unet_config),
    ("vae_config", vae_config),
    ("text_config", text_config),
    ("unet", unet),
    ("vae", vae),
    ("text_encoder", text_encoder),
    ("scheduler", scheduler),
    ("tokenizer", tokenizer),
    ("vocabulary", vocabulary),
    ("checkpoint", checkpoint),
    ("train_config", train_config),
    ("run", run),
    ("shards", shards),
    ("picture", picture),
];

/// Several files as one input.
#[allow(dead_code)] // the fuzz targets only take apart
pub fn join(files: &[Vec<u8>]) -> Vec<u8> {
    files.join(SEPARATOR)
}

/// The first `N` files of an input; empty ones for those that it lacks.
fn split<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut rest = Some(input);
    std::array::from_fn(|i| {
        let Some(all) = rest.take() else { return &[][..] };
        let at = all.windows(SEPARATOR.len()).position(|window| window == SEPARATOR);
        match at.filter(|_| i + 1 < N) {
            Some(at) => {
                rest = Some(&all[at + SEPARATOR.len()..]);
                &all[..at]
            }
            None => all,
        }
    })
}

/// Writes a file below `scratch` that may be missing: no content, no file.
fn put_some(scratch: &Path, name: &str, content: &[u8]) {
    if !content.is_empty() {
        put(scratch, name, content);
    }
}

/// Writes a file below `scratch`.
fn put(scratch: &Path, name: &str, content: &[u8]) {
    let path = scratch.join(name);
    std::fs::create_dir_all(path.parent().expect("below scratch")).expect("scratch can be written");
    std::fs::write(path, content).expect("scratch can be written");
}

fn text(scratch: &Path, input: &[u8]) -> Text {
    Text { content: String::from_utf8_lossy(input).into_owned(), path: scratch.join("config.json") }
}

/// A safetensors file, read whole in every way.
pub fn tensor_file(scratch: &Path, input: &[u8]) {
    put(scratch, "x.safetensors", input);
    let path = scratch.join("x.safetensors");
    let Ok(file) = TensorFile::open(&path) else { return };
    let _ = file.texts();
    for name in file.names() {
        let _ = (file.shape(&name), file.is_float(&name), file.dtype(&name), file.text(&name));
        let _ = file.read(&name);
        let _ = file.read_as(&name, Kind::Float, Device::Cpu);
        let _ = file.read_rows(&name, 2, 3);
        let _ = file.first_bytes(&name, 1, 3, 256);
    }
}

/// A PEFT folder: config and weights. What can be read is combined with itself.
pub fn adapter(scratch: &Path, input: &[u8]) {
    let [config, weights] = split(input);
    put(scratch, "adapter_config.json", config);
    put(scratch, "adapter_model.safetensors", weights);
    let Ok(file) = AdapterFile::read(scratch) else { return };
    let _ = file.tensors();
    for how in [How::Chain, How::Geodesic] {
        let _ = combine(&[(&file, 0.5), (&file, 1.0)], how);
    }
}

/// A LoRA file.
pub fn lora_file(scratch: &Path, input: &[u8]) {
    put(scratch, "lora.safetensors", input);
    let Ok(file) = LoraFile::read(&scratch.join("lora.safetensors")) else { return };
    for part in [LoraPart::UNet, LoraPart::TextEncoder] {
        let _ = file.resolve(part, &["mid_block.attentions.0.proj_in"], &[]);
    }
    for layer in &file.layers {
        let _ = (layer.rank(), layer.product());
    }
}

/// `unet/config.json`.
pub fn unet_config(scratch: &Path, input: &[u8]) {
    let _ = UNetConfig::parse(&text(scratch, input));
}

/// `vae/config.json`.
pub fn vae_config(scratch: &Path, input: &[u8]) {
    let _ = VaeConfig::parse(&text(scratch, input)).map(|config| config.factor());
}

/// `text_encoder/config.json`.
pub fn text_config(scratch: &Path, input: &[u8]) {
    let _ = TextConfig::parse(&text(scratch, input));
}

/// Config and weights of one part, in a model folder.
fn part(scratch: &Path, part: Part, input: &[u8]) -> Option<Source> {
    let [config, weights] = split(input);
    put(scratch, &format!("{}/config.json", part.folder()), config);
    put(scratch, &format!("{}/{}.safetensors", part.folder(), part.stem()), weights);
    Source::open(scratch, None).ok()
}

/// The UNet of a model folder.
pub fn unet(scratch: &Path, input: &[u8]) {
    if let Some(source) = part(scratch, Part::UNet, input) {
        let _ = UNet::load(&source, Kind::Float, Device::Cpu);
    }
}

/// The VAE of a model folder.
pub fn vae(scratch: &Path, input: &[u8]) {
    if let Some(source) = part(scratch, Part::Vae, input) {
        let _ = Vae::load(&source, Device::Cpu);
    }
}

/// The text encoder of a model folder.
pub fn text_encoder(scratch: &Path, input: &[u8]) {
    if let Some(source) = part(scratch, Part::TextEncoder, input) {
        let _ = TextEncoder::load(&source, Kind::Float, Device::Cpu);
    }
}

/// `scheduler_config.json`, for training and for every sampler.
pub fn scheduler(scratch: &Path, input: &[u8]) {
    let content = String::from_utf8_lossy(input);
    let Ok(config) = SchedulerConfig::parse(&content, &scratch.join("scheduler_config.json")) else { return };
    let config = config.for_latent_model();
    let _ = NoiseSchedule::new(&config, Device::Cpu);
    let _ = SamplerKind::from_config(&config);
    for name in ["ddim", "pndm", "euler", "euler-a", "dpm++2m", "dpm++2m-karras", "heun", "unipc"] {
        let kind: SamplerKind = name.parse().expect("a sampler's name");
        let settings = kind.settings(&config, None, None);
        for steps in [1, 2, 25] {
            let _ = Plan::new(kind, &settings, steps)
                .map(|plan| (plan.model_calls(), plan.noise_steps(), plan.init_noise_sigma()));
        }
    }
}

fn encode(scratch: &Path) {
    let Ok(source) = Source::open(scratch, None) else { return };
    let Ok(tokenizer) = Tokenizer::load(&source, 77) else { return };
    let _ = tokenizer.largest_id();
    for prompt in
        ["", "a photo of a sks dog, 4k!! <|endoftext|> \u{e9}\u{301}\u{1f415}\u{0}", &"ab ".repeat(200)]
    {
        let _ = tokenizer.encode(prompt);
    }
}

/// `tokenizer.json` and `tokenizer_config.json`.
pub fn tokenizer(scratch: &Path, input: &[u8]) {
    let [json, config] = split(input);
    put(scratch, "tokenizer/tokenizer.json", json);
    put_some(scratch, "tokenizer/tokenizer_config.json", config);
    encode(scratch);
}

/// `vocab.json`, `merges.txt`, `special_tokens_map.json` and `added_tokens.json`.
pub fn vocabulary(scratch: &Path, input: &[u8]) {
    let [vocab, merges, special, added] = split(input);
    put(scratch, "tokenizer/vocab.json", vocab);
    put(scratch, "tokenizer/merges.txt", merges);
    put_some(scratch, "tokenizer/special_tokens_map.json", special);
    put_some(scratch, "tokenizer/added_tokens.json", added);
    encode(scratch);
}

/// A single-file checkpoint, and all that it says of itself.
pub fn checkpoint(scratch: &Path, input: &[u8]) {
    put(scratch, "model.safetensors", input);
    let path = scratch.join("model.safetensors");
    let Ok(source) = Source::open(&path, None) else { return };
    let _ = (source.check_complete(), source.foreign_keys(), source.fingerprint());
    for part in Part::ALL {
        let _ = source.names(part);
        let Ok(tensors) = source.tensors(part) else { continue };
        for name in tensors.names() {
            let _ = (tensors.shape(name), tensors.read(name));
        }
    }
    let _ = StableDiffusion::from_source(source, Kind::Float, Device::Cpu);
}

/// A TOML file with the settings of a training run.
pub fn train_config(scratch: &Path, input: &[u8]) {
    put(scratch, "config.toml", input);
    let Ok(config) = TrainConfig::read(&scratch.join("config.toml")) else { return };
    if config.validate().is_ok() {
        let rates = config.learning_rates();
        let _ = rates.iter().map(|rate| rate.at(1)).sum::<f64>();
        let _ = (config.method(), config.adamw(), config.to_toml());
    }
}

/// What a run goes on from: `state.json`, `optimizer.safetensors` and `metrics.jsonl`.
pub fn run(scratch: &Path, input: &[u8]) {
    let [state, optimizer, metrics] = split(input);
    put(scratch, "state.json", state);
    put(scratch, "optimizer.safetensors", optimizer);
    put(scratch, "metrics.jsonl", metrics);
    let step = Loaded::read(scratch).map_or(0, |loaded| loaded.state.step);
    let _ = Metrics::open(scratch, step, true);
}

/// The index of a UNet's shards, with one shard beside it.
pub fn shards(scratch: &Path, input: &[u8]) {
    let [index, shard] = split(input);
    put(scratch, "unet/diffusion_pytorch_model.safetensors.index.json", index);
    put(scratch, "unet/shard-1.safetensors", shard);
    let Ok(source) = Source::open(scratch, None) else { return };
    let Ok(tensors) = source.tensors(Part::UNet) else { return };
    for name in tensors.names() {
        let _ = tensors.read(name);
    }
}

/// A photograph, or a picture of ours with its settings.
pub fn picture(scratch: &Path, input: &[u8]) {
    let _ = hra::image::decode::decode(input);
    put(scratch, "picture.png", input);
    let _ = hra::image::read_png_text(&scratch.join("picture.png"));
}
