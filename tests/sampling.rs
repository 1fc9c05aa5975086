//! Whole sampling runs of 12 steps with guidance against Python diffusers' pipelines.

mod support;

use clap::ValueEnum;
use hra::StableDiffusion;
use hra::sample::{Guides, Noise, Settings, sample};
use hra::sampler::SamplerKind;
use support::{cases, relative_error};
use tch::{Device, Kind, Tensor};

#[test]
fn every_scheduler_gives_the_latents_of_python() {
    let mut failures = Vec::new();
    for case in cases() {
        let model = StableDiffusion::load(&case.pipeline(), Kind::Float, Device::Cpu).unwrap();
        let json = case.json();
        let latents = case.get("sample.noise");
        for sampler in SamplerKind::value_variants() {
            let key = format!("sample.{}.latents", sampler.name());
            let steps = format!("sample.{}.step_noise", sampler.name());
            let settings = Settings {
                prompt: json["prompts"][0].as_str().unwrap().into(),
                negative_prompt: json["negative"].as_str().unwrap().into(),
                sampler: *sampler,
                spacing: None,
                karras: None,
                steps: json["steps"].as_u64().unwrap() as usize,
                guidance: json["guidance"].as_f64().unwrap(),
                width: latents.size()[3] * model.vae.factor(),
                height: latents.size()[2] * model.vae.factor(),
            };
            let steps = if case.has(&steps) {
                case.get(&steps)
            } else {
                Tensor::empty([0], (Kind::Float, Device::Cpu))
            };
            let noise = Noise { latents: latents.shallow_clone(), steps, image: None, masked_image: None };
            let pictures = sample(&model, &settings, &noise, &Guides::default(), 2, &mut || {}).unwrap();
            let found = Tensor::cat(&pictures.iter().map(|p| &p.latents).collect::<Vec<_>>(), 0);
            let error = relative_error(&found, &case.get(&key));
            println!("{} {key}: {error:.1e}", case.name);
            if error > 1e-4 {
                failures.push(format!("{} {key}: {error:.1e}", case.name));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}
