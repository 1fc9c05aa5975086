//! Three training steps, from noise to the optimiser's step, against PyTorch's.

use super::Comparer;
use crate::support::base::root;
use crate::support::cases::Case;
use hra::adapter::peft::AdapterFile;
use hra::attach;
use hra::attach::parameters::Parameters;
use hra::diffusion::noise::NoiseSchedule;
use hra::model::Conditioning;
use hra::model::conditioning::{POOLED, SIZES};
use hra::train::loss::{Batch, training_loss};
use hra::train::loss_scale::LossScale;
use hra::train::optim::{AdamW, AdamWConfig, clip_factor};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// The steps of a case that has them.
pub fn three_steps(here: &Comparer, case: &Case) {
    if !case.has("step.latents") {
        return;
    }
    let mut model = here.load(case);
    let file = AdapterFile::read(&case.dir.join("hra-r4")).unwrap();
    attach::attach_trained(&mut model.unet, file).unwrap();
    let mut parameters = attach::pack_parameters(&mut [&mut model.unet]);
    for (name, view) in parameters.views() {
        let _guard = tch::no_grad_guard();
        // Cases without it start from the adapter as it is stored.
        let key = format!("step.before.{name}");
        if case.has(&key) {
            view.shallow_clone().copy_(&case.get(&key));
        }
    }
    let schedule = NoiseSchedule::new(&model.scheduler, here.compute.device).unwrap();
    let batch = Batch {
        latents: here.input(case, "step.latents"),
        noise: here.input(case, "step.noise"),
        timesteps: here.input(case, "step.timestep"),
        conditioning: conditioning(here, case),
        conditions: None,
        class_half: true,
    };
    let compare = |what: &str, key: &str, found: &Tensor, tolerance: f64| {
        here.compare(case, &format!("training {what}"), &format!("step.{key}"), found, tolerance);
    };
    compare("noise", "noisy", &schedule.add_noise(&batch.latents, &batch.noise, &batch.timesteps), 1e-5);
    if case.has("step.target") {
        let target = schedule.target(&batch.latents, &batch.noise, &batch.timesteps);
        compare("noise", "target", &target, 1e-5);
    }
    // Those of Stable Diffusion XL train without the regulariser, and are clipped at less.
    let is_regular = case.has("step.0.regulariser");
    let most = if is_regular { 0.01 } else { 0.001 };

    let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };
    let mut optimizer = AdamW::new(config, &parameters);
    let on_cpu = |t: &Tensor| t.detach().to_device(Device::Cpu).copy();
    let mut before: Vec<Tensor> = parameters.views().iter().map(|(_, t)| on_cpu(t)).collect();
    let mut stored: Vec<Tensor> = before.iter().map(Tensor::shallow_clone).collect();
    for step in 0..3 {
        attach::prepare(&mut model.unet);
        let loss = training_loss(&model.unet, None, &schedule, &batch, 0.7, None);
        // After an optimiser step, Adam's division by the root of tiny moments has amplified rounding.
        let later = |first: f64| if step == 0 { first } else { 1e-3 };
        compare("predictions", &format!("{step}.pred"), &loss.prediction, later(1e-5));
        compare("losses", &format!("{step}.loss.instance"), &loss.instance, 1e-5);
        compare("losses", &format!("{step}.loss.prior"), loss.prior.as_ref().unwrap(), 1e-5);
        let mut total = loss.total.shallow_clone();
        if is_regular {
            let regulariser = attach::regulariser(&mut model.unet).unwrap();
            compare("losses", &format!("{step}.regulariser"), &regulariser, 1e-5);
            total += regulariser * 1e-3;
            compare("losses", &format!("{step}.total"), &total, 1e-5);
        }
        parameters.zero_gradient();
        (total * here.loss_scale()).backward();
        for (name, view) in parameters.views() {
            if case.has(&format!("step.{step}.grad.{name}")) {
                compare(
                    "gradients",
                    &format!("{step}.grad.{name}"),
                    &(view.grad() / here.loss_scale()),
                    later(2e-5),
                );
            }
        }
        let norm = parameters.gradient_norm() / here.loss_scale();
        compare("gradients", &format!("{step}.grad_norm"), &norm, 1e-4);
        let factor = clip_factor(&norm, most) / here.loss_scale();
        optimizer.step(&mut parameters, &factor, &[1e-2], None).unwrap();
        for (i, (name, view)) in parameters.views().iter().enumerate() {
            let key = format!("step.{step}.after.{name}");
            if !case.has(&key) {
                continue;
            }
            let after = case.get(&key);
            let expected_before =
                if step == 0 { before[i].shallow_clone() } else { stored[i].shallow_clone() };
            stored[i] = after.shallow_clone();
            let moved = view.detach() - here.on_device(&before[i]);
            let what = format!("{} training moves", case.name);
            here.compare_with(&what, name, &moved, &(after - expected_before), 1e-3);
            before[i] = on_cpu(view);
        }
    }
}

/// What is said of the batch; of Stable Diffusion XL with pooled text and sizes.
fn conditioning(here: &Comparer, case: &Case) -> Conditioning {
    let states = Conditioning::new(here.input(case, "step.context"));
    if !case.has("step.pooled") {
        return states;
    }
    let [pooled, sizes] = ["step.pooled", "step.time_ids"].map(|key| here.input(case, key));
    states.with(POOLED, pooled).with(SIZES, sizes)
}

/// torch's GradScaler and fused AdamW on made-up gradients, of which some overflow (`fixtures/make_loss_scale_fixtures.py`).
pub fn loss_scale(here: &Comparer) {
    let text = std::fs::read_to_string(root().join("tests/fixtures/loss_scale.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let numbers = |value: &Value| -> Tensor {
        let values: Vec<f32> = value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        Tensor::from_slice(&values)
    };
    let number = |value: &Value| value.as_f64().unwrap();
    let start = here.on_device(&numbers(&expected["start"]));
    let mut parameters = Parameters::pack(&[vec![("values".to_string(), start)]]);
    let weight_decay = number(&expected["weight_decay"]);
    let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay };
    let mut optimizer = AdamW::new(config, &parameters);
    let mut scaling = LossScale::new(here.compute.device);
    let gradient = here.on_device(&numbers(&expected["gradient"]));
    for (i, step) in expected["steps"].as_array().unwrap().iter().enumerate() {
        let factor: f64 = step["factor"].as_str().unwrap().parse().unwrap();
        parameters.zero_gradient();
        let loss = (&parameters.views()[0].1 * &gradient * factor).sum(Kind::Float);
        (loss * scaling.scale.get(0)).backward();
        let scale = scaling.scale.get(0).copy();
        let norm = parameters.gradient_norm() / &scale;
        let overflow = LossScale::overflow(&norm);
        let factor = clip_factor(&norm, number(&expected["clip"])) / scale;
        let rate = number(&expected["learning_rate"]);
        optimizer.step(&mut parameters, &factor, &[rate], Some(&overflow)).unwrap();
        scaling.update(&overflow);
        let what = format!("values after step {i}");
        here.compare_with("loss scale", &what, parameters.flat(), &numbers(&step["values"]), 1e-6);
        assert_eq!(scaling.scale.double_value(&[0]), number(&step["scale"]), "step {i}");
        assert_eq!(scaling.good_steps.int64_value(&[0]), number(&step["good_steps"]) as i64, "step {i}");
        assert_eq!(optimizer.steps.double_value(&[0]), number(&step["steps"]), "step {i}");
    }
    for _ in 0..expected["good_steps"].as_i64().unwrap() {
        scaling.update(&Tensor::zeros([1], (Kind::Float, here.compute.device)));
    }
    assert_eq!(scaling.scale.double_value(&[0]), number(&expected["scale_after"]));
    assert_eq!(scaling.good_steps.int64_value(&[0]), number(&expected["good_steps_after"]) as i64);
}
