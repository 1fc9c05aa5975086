//! What a training starts from and goes on from.

use super::{pipeline, put, split};
use hra::StableDiffusion;
use hra::adapter::{Adapter, Full};
use hra::attach::loaded::FULL_UNET;
use hra::attach::parameters::Parameters;
use hra::diffusion::sample::Noise;
use hra::platform::observer::Silent;
use hra::train::checkpoint::{Loaded, TrainedPart};
use hra::train::config::TrainConfig;
use hra::train::make_class_images;
use hra::train::optim::{AdamW, AdamWConfig, Ema};
use hra::train::run::Metrics;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// A TOML file with the settings of a training run.
pub fn train_config(scratch: &Path, input: &[u8]) {
    put(scratch, "config.toml", input);
    let path = scratch.join("config.toml");
    let given = TrainConfig::merged(&[&path], &toml::Table::new(), &Silent);
    for config in [given, TrainConfig::read(&path)].into_iter().flatten() {
        let _ = (
            config.adapter.method().map(|m| m.map(|m| m.describe())),
            config.to_toml(),
            config.check_resume(&config, &Silent),
        );
        if config.validate().is_err() {
            continue;
        }
        for shape in [[8, 8], [320, 768]] {
            let Ok(Some(method)) = config.adapter.method() else { continue };
            let _ = method.parameters_for(&shape);
            let weight = Tensor::ones(shape, (Kind::Float, Device::Cpu));
            let _ = method.start(&weight, config.seed).map(|adapter| adapter.project());
        }
        for rate in [1, 2].into_iter().flat_map(|texts| config.learning_rates(texts)).flatten() {
            let _ = [0, 1, config.schedule.max_train_steps].map(|step| rate.at(step));
        }
        let _ = config.optimizer.adamw();
    }
}

/// What a run goes on from: `state.json`, `optimizer.safetensors` and `metrics.jsonl`.
pub fn run(scratch: &Path, input: &[u8]) {
    let [state, optimizer, metrics] = split(input);
    put(scratch, "state.json", state);
    put(scratch, "optimizer.safetensors", optimizer);
    put(scratch, "metrics.jsonl", metrics);
    let loaded = Loaded::read(scratch);
    let step = loaded.as_ref().map_or(0, |loaded| loaded.state.step);
    if let Ok(loaded) = loaded {
        put(scratch, FULL_UNET, optimizer);
        let (name, weight) =
            Full::new(Tensor::ones([4, 2], (Kind::Float, Device::Cpu))).parameters().remove(0);
        let mut parameters = Parameters::pack(&[vec![(name.to_string(), weight)]]);
        let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
        let (mut adam, mut ema) = (AdamW::new(config, &parameters), Ema::new(0.9, &parameters));
        let parts = [TrainedPart::Network { folder: "unet", files: Vec::new() }];
        if loaded.restore(&parts, &mut parameters, &mut adam, Some(&mut ema), None).is_ok() {
            adam.step(&mut parameters, &Tensor::from(1f32), &[1e-3], None).unwrap();
            ema.update(&parameters, 1);
        }
    }
    let _ = Metrics::open(scratch, step, true, &Silent);
}

/// `class_images.json` beside as many pictures as are wanted: it says whether they may be used.
pub fn class_images(scratch: &Path, input: &[u8]) {
    put(scratch, "class/class_images.json", input);
    put(scratch, "class/class-00000.png", b"is not looked at");
    make_classes(scratch);
}

/// Makes the one class picture below `scratch` that a training would begin with.
pub fn make_classes(scratch: &Path) {
    thread_local!(static MODEL: StableDiffusion =
        StableDiffusion::load(&pipeline(), Kind::Float, Device::Cpu).expect("a model"));
    let mut config = TrainConfig { output_dir: scratch.join("run"), ..TrainConfig::default() };
    config.data.resolution = Some(16);
    config.prior.class_prompt = "a cat".into();
    config.prior.class_data_dir = Some(scratch.join("class"));
    config.prior.num_class_images = 1;
    config.prior.class_steps = 1;
    MODEL.with(|model| drop(make_class_images(model, &config, &Silent)));
}

/// Latents and the noise of steps that another program drew.
pub fn latents(scratch: &Path, input: &[u8]) {
    let [latents, steps] = split(input);
    let files = [("latents.safetensors", latents), ("steps.safetensors", steps)];
    for (name, content) in files {
        put(scratch, name, content);
    }
    let [latents, steps] = files.map(|(name, _)| scratch.join(name));
    for steps in [None, Some(steps.as_path())] {
        let Ok(noise) = Noise::read(&latents, steps) else { continue };
        assert!(noise.latents.dim() == 4 && noise.latents.numel() > 0);
    }
}
