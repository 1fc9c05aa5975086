//! Models by parts and whole.

use super::{pipeline, put, put_some, split, text};
use hra::StableDiffusion;
use hra::diffusion::noise::{NoiseSchedule, SchedulerConfig};
use hra::diffusion::sampler::{SamplerKind, SamplerPlan};
use hra::model::control::{ConditionEncoder, Control, ControlNet, EncoderConfig, FILE_STEM, Passes};
use hra::model::text::{TextEncoder, Tokenizer};
use hra::model::{Call, UNet, Vae};
use hra::weights::config::{TextConfig, UNetConfig, VaeConfig};
use hra::weights::part::Part;
use hra::weights::source::Source;
use std::path::Path;
use tch::{Device, Kind, Tensor};

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
        let _ = TextEncoder::load(&source, Part::TextEncoder, Kind::Float, Device::Cpu);
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
            let _ = SamplerPlan::new(kind, &settings, steps)
                .map(|plan| (plan.model_calls(), plan.noise_steps(), plan.init_noise_sigma()));
        }
        let _ = SamplerPlan::from_strength(kind, &settings, 5, 0.5)
            .map(|plan| (plan.model_calls(), plan.noise_steps()));
        let zero = || Tensor::zeros([1, 1, 1, 1], (Kind::Float, Device::Cpu));
        if let Ok(plan) = SamplerPlan::new(kind, &settings, 5) {
            let _ = plan.run(zero(), &mut |x, _| Ok(x.shallow_clone()), &mut |_| Ok(zero()), &mut |_| Ok(()));
        }
    }
}

fn encode(scratch: &Path) {
    let Ok(source) = Source::open(scratch, None) else { return };
    let Ok(tokenizer) = Tokenizer::load(&source, Part::TextEncoder, 77) else { return };
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
    for part in source.parts() {
        let _ = source.names(part);
        let Ok(tensors) = source.tensors(part) else { continue };
        for name in tensors.names() {
            let _ = (tensors.shape(name), tensors.read(name));
        }
    }
    let _ = StableDiffusion::from_source(source, Kind::Float, Device::Cpu);
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

/// A ControlNet's folder; conditions are shown to what loads.
pub fn controlnet(scratch: &Path, input: &[u8]) {
    control_files(scratch, input);
    let Ok((net, _)) = ControlNet::load(scratch, Kind::Float, Device::Cpu) else { return };
    steer(&Control::Net(Box::new(net)));
}

/// The folder of a trained control encoder, likewise.
pub fn control_encoder(scratch: &Path, input: &[u8]) {
    control_files(scratch, input);
    let _ = EncoderConfig::read(scratch).map(|config| config.to_json());
    let Ok((encoder, _)) = ConditionEncoder::load(scratch, Device::Cpu) else { return };
    steer(&Control::Encoder(encoder));
}

fn control_files(scratch: &Path, input: &[u8]) {
    let [config, weights] = split(input);
    put(scratch, "config.json", config);
    put(scratch, &format!("{FILE_STEM}.safetensors"), weights);
}

/// Shows conditions to a control that fits the stored model.
fn steer(control: &Control) {
    thread_local!(static MODEL: StableDiffusion =
        StableDiffusion::load(&pipeline(), Kind::Float, Device::Cpu).expect("a model"));
    MODEL.with(|model| {
        let factor = model.vae.factor();
        if control.misfit(&model.unet, factor).is_some() {
            return;
        }
        let _guard = tch::no_grad_guard();
        let ones = |shape: [i64; 4]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
        let (states, _) = model.encode_prompts(&["a cat"]).expect("a prompt");
        let sample = ones([1, model.denoiser().in_channels(), 8, 8]);
        let features = control.features(&ones([1, 3, 8 * factor, 8 * factor]));
        let call = Call { sample: &sample, timesteps: &Tensor::from_slice(&[500i64]), conditioning: &states };
        let _ = control.signals(&features, 0.5, Passes::Both, call);
    });
}
