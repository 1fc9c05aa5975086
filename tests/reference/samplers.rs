//! Final latents of every sampler, with a function in the UNet's place, against Python diffusers
//! (`fixtures/make_sampler_fixtures.py`).

use crate::support::base::root;
use crate::support::error::relative_error;
use hra::Result;
use hra::diffusion::noise::SchedulerConfig;
use hra::diffusion::sampler::{SamplerKind, SamplerPlan};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use tch::{Device, Tensor};

pub fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures").join(name)
}

pub fn tensors(name: &str) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(fixture(name)).unwrap().into_iter().collect()
}

pub fn config(values: &Value) -> SchedulerConfig {
    SchedulerConfig::parse(&values.to_string(), Path::new("scheduler_config.json")).unwrap()
}

/// The stand-in for a UNet: 0.6 x cos(t / 400) + 0.2 sin(x + t / 150).
pub fn toy(x: &Tensor, t: f64) -> Tensor {
    x * (0.6 * (t / 400.0).cos()) + (x + t / 150.0).sin() * 0.2
}

pub fn sample(plan: &SamplerPlan, noise: &Tensor, step_noise: &Tensor) -> Result<Tensor> {
    let (mut calls, mut asked) = (0, 0);
    let latents = plan.run(
        noise * plan.init_noise_sigma(),
        &mut |x, t| Ok(toy(x, t)),
        &mut |i| {
            asked += 1;
            Ok(step_noise.get(i as i64 % step_noise.size()[0]))
        },
        &mut |done| {
            calls = done;
            Ok(())
        },
    );
    if latents.is_ok() {
        assert_eq!((calls, asked), (plan.model_calls(), plan.noise_steps()));
    }
    latents
}

/// One fixture group: a config and what it is run with.
#[derive(serde::Deserialize)]
pub struct Group {
    pub config: Map<String, Value>,
    samplers: Vec<String>,
    predictions: Vec<Option<String>>,
    spacings: Vec<Option<String>>,
    steps: Vec<usize>,
}

impl Group {
    /// Samplers, predictions and spacings, each with each.
    fn combinations(&self) -> impl Iterator<Item = (&String, &Option<String>, &Option<String>)> {
        self.samplers.iter().flat_map(move |sampler| {
            self.predictions.iter().flat_map(move |prediction| {
                self.spacings.iter().map(move |spacing| (sampler, prediction, spacing))
            })
        })
    }

    fn config(&self, prediction: &Option<String>, spacing: &Option<String>) -> SchedulerConfig {
        let mut values = self.config.clone();
        for (key, value) in [("prediction_type", prediction), ("timestep_spacing", spacing)] {
            if let Some(value) = value {
                values.insert(key.to_string(), json!(value));
            }
        }
        config(&Value::Object(values))
    }
}

/// On the machine that made the fixtures the worst is 1.5e-6, and DDIM, PNDM and Euler ancestral have no error at all. But
/// libtorch's square root may differ in the last bit between processors, which adds up over hundreds of steps; and at
/// zero terminal SNR, Euler subtracts numbers near 4096 to get one near 1.
pub fn tolerance(group: &str, kind: SamplerKind, steps: usize) -> f64 {
    match kind {
        SamplerKind::Euler | SamplerKind::EulerAncestral if group == "zero-snr" => 1e-3,
        _ if steps >= 200 => 3e-5,
        _ => 1e-5,
    }
}

/// What was computed of the stored cases of at most `most_steps` steps.
#[derive(Default)]
pub struct Found {
    pub cases: usize,
    /// Those that diffusers gives no usable latents for, and that are refused here.
    pub refused: usize,
    /// Those that should have been refused, or should not.
    pub problems: Vec<String>,
    /// By sampler: each error, what is allowed, and the case.
    pub errors: BTreeMap<&'static str, Vec<(f64, f64, String)>>,
}

/// Computes the stored cases on `device`.
pub fn final_latents(device: Device, most_steps: usize) -> Found {
    let text = std::fs::read_to_string(fixture("samplers.json")).unwrap();
    let groups: BTreeMap<String, Group> = serde_json::from_str(&text).unwrap();
    let expected = tensors("samplers.safetensors");
    let [noise, step_noise] = ["noise", "step_noise"].map(|name| expected[name].to_device(device));
    let mut found = Found::default();
    for (name, group) in &groups {
        for (sampler, prediction, spacing) in group.combinations() {
            let kind: SamplerKind = sampler.parse().unwrap();
            let word = |word: &Option<String>| word.clone().unwrap_or_default();
            let key = format!("{name}|{sampler}|{}|{}", word(prediction), word(spacing));
            let config = group.config(prediction, spacing);
            for (i, &steps) in group.steps.iter().enumerate().filter(|(_, steps)| **steps <= most_steps) {
                found.cases += 1;
                let expected = expected[&key].get(i as i64);
                let is_refused = bool::try_from(expected.isnan().any()).unwrap();
                match SamplerPlan::new(kind, &config, steps) {
                    Err(_) if is_refused => found.refused += 1,
                    Err(e) => found.problems.push(format!("{key} {steps}: {e}")),
                    Ok(_) if is_refused => found.problems.push(format!("{key} {steps}: not refused")),
                    Ok(plan) => {
                        let latents = sample(&plan, &noise, &step_noise).unwrap();
                        assert_eq!(latents.device(), device);
                        let error = relative_error(&latents.to_device(Device::Cpu), &expected);
                        let allowed = tolerance(name, kind, steps);
                        let errors = found.errors.entry(kind.name()).or_default();
                        errors.push((error, allowed, format!("{key} {steps}")));
                    }
                }
            }
        }
    }
    found
}
