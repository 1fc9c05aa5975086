//! The noise schedule against the numbers of Python diffusers (`fixtures/make_sampler_fixtures.py`).

use std::collections::HashMap;
use std::path::Path;

use hra::diffusion::noise::{NoiseSchedule, SchedulerConfig};
use tch::{Device, Kind, Tensor};

const KINDS: [&str; 2] = ["sd15", "sd21"];

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn tensors() -> HashMap<String, Tensor> {
    Tensor::read_safetensors(fixture("noise.safetensors")).unwrap().into_iter().collect()
}

/// sd15 predicts noise, sd21 velocity.
fn schedule(kind: &str) -> NoiseSchedule {
    let text = std::fs::read_to_string(fixture("samplers.json")).unwrap();
    let groups: serde_json::Value = serde_json::from_str(&text).unwrap();
    let config = groups[kind]["config"].to_string();
    let config = SchedulerConfig::parse(&config, Path::new("scheduler_config.json")).unwrap();
    NoiseSchedule::new(&config, Device::Cpu).unwrap()
}

fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    ((found - expected).norm() / expected.norm()).double_value(&[])
}

#[test]
fn the_table_is_pythons() {
    let expected = tensors();
    for kind in KINDS {
        let table = &expected[&format!("{kind}.noise.alphas_cumprod")];
        let schedule = schedule(kind);
        assert_eq!(schedule.train_timesteps(), 1000);
        assert!(relative_error(schedule.alphas_cumprod(), table) < 1e-7);
    }
}

#[test]
fn noising_and_targets_take_a_timestep_for_each_sample() {
    let expected = tensors();
    for kind in KINDS {
        let get = |name: &str| &expected[&format!("{kind}.step.{name}")];
        let (latents, noise, timesteps) = (get("latents"), get("noise"), get("timestep"));
        let schedule = schedule(kind);
        let noisy = schedule.add_noise(latents, noise, timesteps);
        assert!(relative_error(&noisy, get("noisy")) < 1e-6);
        let target = schedule.target(latents, noise, timesteps);
        assert!(relative_error(&target, get("target")) < 1e-6);
        for i in 0..timesteps.size()[0] {
            let one = |x: &Tensor| x.narrow(0, i, 1);
            let alone = schedule.add_noise(&one(latents), &one(noise), &one(timesteps));
            assert!(alone.equal(&one(&noisy)));
        }
    }
}

#[test]
fn min_snr_weights_are_pythons() {
    let expected = tensors();
    for kind in KINDS {
        let timesteps = &expected[&format!("{kind}.snr.timestep")];
        let weights = schedule(kind).snr_weights(timesteps, 5.0);
        assert!(relative_error(&weights, &expected[&format!("{kind}.snr.min5.weight")]) < 1e-5);
    }
}

#[test]
fn half_precision_latents_keep_their_kind_and_exact_factors() {
    let expected = tensors();
    let get = |name: &str| &expected[&format!("sd15.step.{name}")];
    let half = |name: &str| get(name).to_kind(Kind::BFloat16);
    let noisy = schedule("sd15").add_noise(&half("latents"), &half("noise"), get("timestep"));
    assert_eq!(noisy.kind(), Kind::BFloat16);
    // bf16 holds 8 bits; a table in bf16 would lose timesteps near 0 altogether.
    assert!(relative_error(&noisy.to_kind(Kind::Float), get("noisy")) < 4e-3);
    let (zero, one) = (Tensor::zeros([1, 1, 1, 1], (Kind::BFloat16, Device::Cpu)), 1.0);
    let start = schedule("sd15").add_noise(&zero, &(&zero + one), &Tensor::from_slice(&[0i64]));
    let factor = start.to_kind(Kind::Float).double_value(&[0, 0, 0, 0]);
    assert!((factor - 0.00085f64.sqrt()).abs() < 4e-3 * factor, "{factor}");
}
