//! Samplers against Python diffusers 0.42.1 (`fixtures/make_sampler_fixtures.py` made the numbers) and against the
//! `diffusers` crate.

use crate::reference::samplers::{config, final_latents, fixture, sample, tensors, toy};
use crate::support::base::pin_threads;
use crate::support::error::relative_error;
use diffusers::schedulers::{PredictionType, ddim, pndm};
use hra::diffusion::sampler::{SamplerKind, SamplerPlan};
use hra::{Error, ErrorKind};
use serde_json::{Map, Value, json};
use tch::Device;

/// Every case, or none where diffusers gives no usable latents: then the plan must refuse.
#[test]
fn final_latents_are_those_of_python() {
    pin_threads();
    let mut found = final_latents(Device::Cpu, usize::MAX);
    for (sampler, errors) in &found.errors {
        let worst = errors.iter().max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
        println!("{sampler}: worst {:.1e}, {}", worst.0, worst.2);
        let bad = errors.iter().filter(|(error, allowed, _)| error.is_nan() || error > allowed);
        found.problems.extend(bad.map(|(error, _, key)| format!("{key}: relative error {error:.1e}")));
    }
    assert!(found.problems.is_empty(), "{} problems\n{}", found.problems.len(), found.problems.join("\n"));
    assert_eq!((found.cases, found.refused), (3314, 240));
}

/// Plans that start on the way, from a picture's noised latents or, for inpainting at strength 1, from noise; the latter
/// keep what the mask leaves out (`fixtures/make_start_fixtures.py`).
#[test]
fn starts_from_a_picture_are_those_of_python() {
    pin_threads();
    let path = fixture("starts.safetensors");
    let configs =
        hra::weights::tensor_file::TensorFile::open(&path).unwrap().text("configs").unwrap().to_string();
    let configs: Map<String, Value> = serde_json::from_str(&configs).unwrap();
    let expected = tensors("starts.safetensors");
    let [clean, noise, step_noise, mask] =
        ["clean", "noise", "step_noise", "mask"].map(|name| &expected[name]);
    let (mut cases, mut problems) = (0, Vec::new());
    for (key, latents) in expected.iter().filter(|(key, _)| key.contains('|')) {
        let parts: Vec<&str> = key.split('|').collect();
        let [sampler, name, kind, steps, strength] = parts[..] else { panic!("{key}") };
        let (steps, strength): (usize, f64) = (steps.parse().unwrap(), strength.parse().unwrap());
        let config = config(&configs[name]);
        let plan = SamplerPlan::from_strength(sampler.parse().unwrap(), &config, steps, strength).unwrap();
        let inpaint = kind == "inpaint";
        let x = if inpaint && strength == 1.0 {
            noise * plan.init_noise_sigma()
        } else {
            plan.add_noise(0, clean, noise)
        };
        let found = plan.run_keeping(
            x,
            &mut |x, t| Ok(toy(x, t)),
            &mut |i| Ok(step_noise.get(i as i64)),
            &mut |calls, x| {
                if inpaint { (1.0 - mask) * plan.add_noise(calls, clean, noise) + mask * x } else { x }
            },
            &mut |_| Ok(()),
        );
        let error = relative_error(&found.unwrap(), latents);
        if error.is_nan() || error > 1e-5 {
            problems.push(format!("{key}: relative error {error:.1e}"));
        }
        cases += 1;
    }
    assert!(problems.is_empty(), "{} problems\n{}", problems.len(), problems.join("\n"));
    assert_eq!(cases, 578);
}

#[test]
fn strengths_that_leave_no_step_are_refused() {
    let plan =
        |kind, values: &Value, strength| SamplerPlan::from_strength(kind, &config(values), 10, strength);
    for strength in [0.0, -0.5, 1.01, f64::NAN] {
        let message = plan(SamplerKind::Ddim, &sd15(), strength).unwrap_err().to_string();
        assert!(message.contains("strength: expected a number above 0 and up to 1, found"), "{message}");
    }
    let message = plan(SamplerKind::Heun, &sd15(), 0.09).unwrap_err().to_string();
    assert!(message.contains("0.09 of 10 steps is less than one step"), "{message}");
    let mut runge_kutta = sd15();
    runge_kutta["skip_prk_steps"] = json!(false);
    let message = plan(SamplerKind::Pndm, &runge_kutta, 0.5).unwrap_err().to_string();
    assert!(message.contains("pndm expects 1 with this scheduler config"), "{message}");
    // Cut off, not rounded: 0.29 of 100 is 28.999999999999996 in f64.
    let calls = |strength| {
        SamplerPlan::from_strength(SamplerKind::Ddim, &config(&sd15()), 100, strength).unwrap().model_calls()
    };
    assert_eq!((calls(0.29), calls(0.5), calls(1.0)), (28, 50, 100));
}

fn sd15() -> Value {
    json!({
        "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1, "clip_sample": false,
        "timestep_spacing": "leading"
    })
}

fn refusal(kind: SamplerKind, values: &Value, steps: usize) -> String {
    SamplerPlan::new(kind, &config(values), steps).unwrap_err().to_string()
}

/// The crate's schedulers hold their table in f64 where Python holds f32.
#[test]
fn ddim_and_pndm_agree_with_the_diffusers_crate() {
    let noise = &tensors("samplers.safetensors")["noise"];
    for (prediction, name) in
        [(PredictionType::Epsilon, "epsilon"), (PredictionType::VPrediction, "v_prediction")]
    {
        let mut values = sd15();
        values["prediction_type"] = json!(name);
        for steps in [2, 7, 20, 50] {
            let plan = |kind| SamplerPlan::new(kind, &config(&values), steps).unwrap();
            let crate_config =
                ddim::DDIMSchedulerConfig { prediction_type: prediction, ..Default::default() };
            let scheduler = ddim::DDIMScheduler::new(steps, crate_config);
            let mut x = noise.copy();
            for &t in scheduler.timesteps() {
                x = scheduler.step(&toy(&x, t as f64), t, &x);
            }
            let error = relative_error(&sample(&plan(SamplerKind::Ddim), noise, noise).unwrap(), &x);
            assert!(error < 2e-5, "ddim {name} {steps}: {error:.1e}");

            let crate_config =
                pndm::PNDMSchedulerConfig { prediction_type: prediction, ..Default::default() };
            let mut scheduler = pndm::PNDMScheduler::new(steps, crate_config);
            let mut x = noise.copy();
            for t in scheduler.timesteps().to_vec() {
                x = scheduler.step(&toy(&x, t as f64), t, &x);
            }
            let error = relative_error(&sample(&plan(SamplerKind::Pndm), noise, noise).unwrap(), &x);
            assert!(error < 2e-5, "pndm {name} {steps}: {error:.1e}");
        }
    }
}

#[test]
fn names_and_aliases() {
    for (name, kind) in [
        ("ddim", SamplerKind::Ddim),
        ("PNDM", SamplerKind::Pndm),
        ("euler", SamplerKind::Euler),
        ("euler-a", SamplerKind::EulerAncestral),
        ("euler_a", SamplerKind::EulerAncestral),
        ("dpm++2m", SamplerKind::DpmPp2m),
        ("dpmpp_2m", SamplerKind::DpmPp2m),
        ("dpm++2m-karras", SamplerKind::DpmPp2mKarras),
        ("dpmpp_2m_karras", SamplerKind::DpmPp2mKarras),
        ("heun", SamplerKind::Heun),
        ("unipc", SamplerKind::UniPc),
    ] {
        assert_eq!(name.parse::<SamplerKind>().unwrap(), kind);
        assert_eq!(kind.to_string().parse::<SamplerKind>().unwrap(), kind);
    }
    let message = "lms".parse::<SamplerKind>().unwrap_err().to_string();
    assert_eq!(
        message,
        "sampler: expected one of ddim, pndm, euler, euler-a, dpm++2m, dpm++2m-karras, heun, unipc, found lms"
    );
}

#[test]
fn the_models_own_sampler() {
    let named = |values: Value| SamplerKind::from_config(&config(&values)).unwrap();
    for (class, kind) in [
        ("DDIMScheduler", SamplerKind::Ddim),
        ("PNDMScheduler", SamplerKind::Pndm),
        ("EulerDiscreteScheduler", SamplerKind::Euler),
        ("EulerAncestralDiscreteScheduler", SamplerKind::EulerAncestral),
        ("DPMSolverMultistepScheduler", SamplerKind::DpmPp2m),
        ("HeunDiscreteScheduler", SamplerKind::Heun),
        ("UniPCMultistepScheduler", SamplerKind::UniPc),
    ] {
        assert_eq!(named(json!({ "_class_name": class })), (kind, None));
    }
    let karras = json!({ "_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": true });
    assert_eq!(named(karras), (SamplerKind::DpmPp2mKarras, None));
    let (kind, note) = named(json!({ "_class_name": "LMSDiscreteScheduler" }));
    assert_eq!(kind, SamplerKind::Ddim);
    assert!(note.unwrap().contains("LMSDiscreteScheduler"));
}

#[test]
fn model_calls_are_known_before_sampling() {
    let calls = |kind, values: &Value| SamplerPlan::new(kind, &config(values), 10).unwrap().model_calls();
    let mut runge_kutta = sd15();
    runge_kutta["skip_prk_steps"] = json!(false);
    assert_eq!(calls(SamplerKind::Ddim, &sd15()), 10);
    assert_eq!(calls(SamplerKind::Pndm, &sd15()), 11);
    assert_eq!(calls(SamplerKind::Pndm, &runge_kutta), 19);
    assert_eq!(calls(SamplerKind::Heun, &sd15()), 19);
    let plan = |kind| SamplerPlan::new(kind, &config(&sd15()), 10).unwrap();
    assert_eq!(plan(SamplerKind::EulerAncestral).noise_steps(), 9);
    assert_eq!(plan(SamplerKind::Euler).noise_steps(), 0);
}

#[test]
fn what_cannot_be_sampled_is_refused_before_the_first_call() {
    let with = |key: &str, value: Value| {
        let mut values = sd15();
        values[key] = value;
        values
    };
    let sample = with("prediction_type", json!("sample"));
    let cases = [
        (SamplerKind::Ddim, sd15(), 0, "steps: expected 1 to 1000, the timesteps of the model, found 0"),
        (
            SamplerKind::Euler,
            sd15(),
            1001,
            "steps: expected 1 to 1000, the timesteps of the model, found 1001",
        ),
        (SamplerKind::Ddim, sd15(), 1000, "asks for timestep 1000, but the model has 0 to 999"),
        (SamplerKind::DpmPp2m, sd15(), 1000, "1000 steps are too many for this sampler"),
        (SamplerKind::UniPc, sd15(), 999, "would divide by zero"),
        (SamplerKind::Pndm, with("skip_prk_steps", json!(false)), 3, "pndm expects 4 or more"),
        (SamplerKind::Pndm, sample.clone(), 9, "pndm expects epsilon or v_prediction, found sample"),
        (SamplerKind::EulerAncestral, sample, 9, "euler-a expects epsilon or v_prediction, found sample"),
        (
            SamplerKind::Ddim,
            with("thresholding", json!(true)),
            9,
            "thresholding: this setting is not supported",
        ),
        (SamplerKind::Euler, with("use_beta_sigmas", json!(true)), 9, "use_beta_sigmas: this setting"),
        (SamplerKind::DpmPp2m, with("algorithm_type", json!("sde-dpmsolver++")), 9, "expected dpmsolver++"),
        (
            SamplerKind::DpmPp2m,
            with("solver_order", json!(3)),
            9,
            "solver_order: dpm++2m expects 1 or 2, found 3",
        ),
        (SamplerKind::DpmPp2m, with("lambda_min_clipped", json!(20)), 9, "which leaves none"),
        (
            SamplerKind::Heun,
            with("steps_offset", json!(5000)),
            9,
            "steps_offset: expected 0 to 1000, found 5000",
        ),
        (SamplerKind::UniPc, with("predict_x0", json!(false)), 9, "predict_x0: unipc expects true"),
        (
            SamplerKind::Heun,
            with("timestep_spacing", json!("even")),
            9,
            "timestep_spacing: expected linspace or",
        ),
    ];
    for (kind, values, steps, expected) in cases {
        let message = refusal(kind, &values, steps);
        assert!(message.contains(expected), "{kind} {steps}: {message}");
    }
    // PNDM has no thresholding, so the key says nothing about it.
    assert!(SamplerPlan::new(SamplerKind::Pndm, &config(&with("thresholding", json!(true))), 9).is_ok());
}

#[test]
fn errors_stop_the_sampling_and_the_callers_noise_stays() {
    let noise = &tensors("samplers.safetensors")["noise"];
    for name in ["ddim", "pndm", "euler", "euler-a", "dpm++2m", "heun", "unipc"] {
        let plan = SamplerPlan::new(name.parse().unwrap(), &config(&sd15()), 6).unwrap();
        let before = noise.copy();
        let (mut calls, mut told) = (0, Vec::new());
        let result = plan.run(
            noise.shallow_clone(),
            &mut |x, t| {
                calls += 1;
                Ok(toy(x, t))
            },
            &mut |_| Ok(noise.shallow_clone()),
            &mut |done| {
                told.push(done);
                if done == 3 { Err(Error::interrupted("stopped")) } else { Ok(()) }
            },
        );
        assert!(matches!(result, Err(Error { kind: ErrorKind::Interrupted(_), .. })), "{name}");
        assert_eq!((calls, told), (3, vec![1, 2, 3]), "{name}");
        assert!(noise.equal(&before), "{name} changed the tensor it was given");
    }
}
