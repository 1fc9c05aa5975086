//! The networks and HRA against Python diffusers, transformers and PEFT, on stored reference cases (f32, CPU).

mod support;

use hra::StableDiffusion;
use hra::adapter::Reflections;
use hra::adapter::peft::AdapterFile;
use hra::model::attach;
use hra::model::layers::Layers;
use hra::noise::NoiseSchedule;
use hra::optim::{AdamW, AdamWConfig, clip};
use hra::train::loss::{Batch, training_loss};
use support::{Case, cases, relative_error};
use tch::{Device, Kind, Tensor};

fn load(case: &Case) -> StableDiffusion {
    let model = StableDiffusion::load(&case.pipeline(), Kind::Float, Device::Cpu).unwrap();
    assert!(model.notes.is_empty(), "{}: {:?}", case.name, model.notes);
    model
}

fn unet_call(case: &Case, model: &StableDiffusion) -> Tensor {
    model.unet.forward(&case.get("unet.sample"), &case.get("unet.timestep"), &case.get("unet.context"))
}

#[test]
fn prompts_become_the_same_ids_and_states() {
    for case in cases() {
        let model = load(&case);
        let json = case.json();
        for (i, prompt) in json["prompts"].as_array().unwrap().iter().enumerate() {
            let prompt = prompt.as_str().unwrap();
            let (ids, cut) = model.tokenizer.encode(prompt).unwrap();
            let expected: Vec<i64> =
                Vec::try_from(case.get(&format!("text.{i}.input_ids")).reshape([-1])).unwrap();
            assert_eq!(ids, expected, "{} `{prompt}`", case.name);
            assert_eq!(cut, 0);
            let (states, _) = model.encode_prompts(&[prompt]).unwrap();
            case.check(&format!("text.{i}.hidden"), &states, 1e-5);
        }
    }
}

#[test]
fn unet_and_vae_give_the_same_tensors() {
    for case in cases() {
        let model = load(&case);
        let _guard = tch::no_grad_guard();
        case.check("unet.out", &unet_call(&case, &model), 1e-5);
        let (mean, logvar) = model.vae.encode(&case.get("vae.image"));
        case.check("vae.mean", &mean, 1e-5);
        case.check("vae.logvar", &logvar, 1e-5);
        case.check("vae.decoded", &model.vae.decode(&case.get("vae.mean")), 1e-5);
    }
}

#[test]
fn hra_gives_the_same_output_loss_and_gradients() {
    for case in cases() {
        for adapter in ["hra-r4", "hra-r3", "hra-r4-gs", "hra-r4-bias", "hra-r4-conv"] {
            if !case.has(&format!("{adapter}.out")) {
                continue;
            }
            let mut model = load(&case);
            let file = AdapterFile::read(&case.dir.join(adapter)).unwrap();
            assert!(file.unused.is_empty());
            assert_eq!(attach::attach_trained(&mut model.unet, &file).unwrap(), file.layers.len());
            let parameters = attach::pack_parameters(&mut model.unet);
            let out = unet_call(&case, &model);
            case.check(&format!("{adapter}.out"), &out, 1e-5);
            let loss = out.square().mean(Kind::Float);
            case.check(&format!("{adapter}.loss"), &loss.reshape([1]), 1e-5);
            loss.backward();
            let prefix = format!("{adapter}.grad.base_model.model.");
            let mut compared = 0;
            for (name, tensor) in parameters.views() {
                let live = if name.ends_with("hra_u") { format!("{name}.default") } else { name.clone() };
                let key = format!("{prefix}{live}");
                if case.has(&key) {
                    case.check(&key, &tensor.grad(), 2e-5);
                    compared += 1;
                }
            }
            assert!(compared >= 8, "{} {adapter}: only {compared} gradients compared", case.name);
        }
    }
}

#[test]
fn merged_and_folded_weights_give_what_peft_merges() {
    for case in cases() {
        for adapter in ["hra-r4", "hra-r3", "hra-r4-gs", "hra-r4-bias", "hra-r4-conv"] {
            if !case.has(&format!("{adapter}.merged.out")) {
                continue;
            }
            let mut model = load(&case);
            let file = AdapterFile::read(&case.dir.join(adapter)).unwrap();
            for layer in model.unet.layers_mut() {
                let key = format!("{adapter}.merged.{}.weight", layer.name);
                if case.has(&key) {
                    let h =
                        Reflections::from_vectors(&file.layers[&layer.name].hra_u, file.config.gram_schmidt);
                    let merged = h.merge(&layer.matrix());
                    case.check(&key, &merged.reshape(&case.get(&key).size()[..]), 1e-5);
                    let back = h.inverse().merge(&merged);
                    assert!(relative_error(&back, &layer.matrix()) < 1e-5, "the inverse undoes it");
                }
            }
            let reports = attach::attach_fixed(&mut model.unet, &[(case.dir.join(adapter), 1.0)]).unwrap();
            assert_eq!(reports[0].layers, file.layers.len());
            assert!(reports[0].unused.is_empty());
            let _guard = tch::no_grad_guard();
            case.check(&format!("{adapter}.merged.out"), &unet_call(&case, &model), 1e-5);
        }
    }
}

#[test]
fn hra_on_the_text_encoder_gives_the_same_states() {
    for case in cases() {
        if !case.has("text-hra-r4.hidden") {
            continue;
        }
        let mut model = load(&case);
        let adapters = [(case.dir.join("text-hra-r4"), 1.0)];
        let reports = attach::attach_fixed(&mut model.text_encoder, &adapters).unwrap();
        assert!(reports[0].unused.is_empty());
        let json = case.json();
        let (states, _) = model.encode_prompts(&[json["prompts"][0].as_str().unwrap()]).unwrap();
        case.check("text-hra-r4.hidden", &states, 1e-5);
    }
}

#[test]
fn three_training_steps_are_the_same() {
    for case in cases() {
        if !case.has("step.latents") {
            continue;
        }
        let mut model = load(&case);
        let file = AdapterFile::read(&case.dir.join("hra-r4")).unwrap();
        attach::attach_trained(&mut model.unet, &file).unwrap();
        let mut parameters = attach::pack_parameters(&mut model.unet);
        for (name, view) in parameters.views() {
            let _guard = tch::no_grad_guard();
            view.shallow_clone().copy_(&case.get(&format!("step.before.{name}")));
        }
        let schedule = NoiseSchedule::new(&model.scheduler, Device::Cpu).unwrap();
        let batch = Batch {
            latents: case.get("step.latents"),
            noise: case.get("step.noise"),
            timesteps: case.get("step.timestep"),
            context: case.get("step.context"),
            class_half: true,
        };
        let noisy = schedule.add_noise(&batch.latents, &batch.noise, &batch.timesteps);
        case.check("step.noisy", &noisy, 1e-5);
        case.check("step.target", &schedule.target(&batch.latents, &batch.noise, &batch.timesteps), 1e-5);

        let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };
        let mut optimizer = AdamW::new(config, &parameters);
        let mut before: Vec<Tensor> = parameters.views().iter().map(|(_, t)| t.detach().copy()).collect();
        for step in 0..3 {
            let loss = training_loss(&model.unet, &schedule, &batch, 0.7, None);
            case.check(&format!("step.{step}.pred"), &loss.prediction, if step == 0 { 1e-5 } else { 1e-3 });
            case.check(&format!("step.{step}.loss.instance"), &loss.instance.reshape([1]), 1e-5);
            case.check(&format!("step.{step}.loss.prior"), &loss.prior.as_ref().unwrap().reshape([1]), 1e-5);
            let regulariser = attach::regulariser(&mut model.unet).unwrap();
            case.check(&format!("step.{step}.regulariser"), &regulariser.reshape([1]), 1e-5);
            let total = &loss.total + regulariser * 1e-3;
            case.check(&format!("step.{step}.total"), &total.reshape([1]), 1e-5);
            parameters.zero_gradient();
            total.backward();
            for (name, view) in parameters.views() {
                let key = format!("step.{step}.grad.{name}");
                if case.has(&key) {
                    // After an optimiser step, Adam's division by the root of tiny moments has amplified rounding.
                    case.check(&key, &view.grad(), if step == 0 { 2e-5 } else { 1e-3 });
                }
            }
            let (gradient, norm) = clip(&parameters.gradient(), 0.01);
            case.check(&format!("step.{step}.grad_norm"), &norm.reshape([1]), 1e-4);
            optimizer.step(&mut parameters, &gradient, 1e-2);
            for (i, (name, view)) in parameters.views().iter().enumerate() {
                let after = case.get(&format!("step.{step}.after.{name}"));
                let expected_before = match step {
                    0 => case.get(&format!("step.before.{name}")),
                    _ => case.get(&format!("step.{}.after.{name}", step - 1)),
                };
                let error = relative_error(&(view - &before[i]), &(after - expected_before));
                assert!(error < 1e-3, "{} step {step} {name}: {error:.2e}", case.name);
                before[i] = view.detach().copy();
            }
        }
    }
}
