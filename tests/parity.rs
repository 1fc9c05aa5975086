//! The networks and all adapters against Python diffusers, transformers and PEFT, on stored reference cases (f32, CPU).

mod support;

use hra::StableDiffusion;
use hra::adapter::Method;
use hra::adapter::methods::full::FullConfig;
use hra::adapter::peft::{AdapterFile, Bias};
use hra::adapter::target::TargetRule;
use hra::attach;
use hra::attach::fixed::attach_fixed;
use hra::attach::loaded::{LayerNames, LoadedAdapter};
use hra::diffusion::noise::NoiseSchedule;
use hra::model::control::{CONTROL_ENCODER, ConditionEncoder, Control, ControlNet, Passes};
use hra::model::layers::Layers;
use hra::model::{Call, Conditioning, Signals};
use hra::train::loss::{Batch, training_loss};
use hra::train::optim::{AdamW, AdamWConfig, clip_factor};
use hra::weights::tensor_file::TensorFile;
use std::collections::BTreeSet;
use support::{Case, cases, relative_error};
use tch::{Device, Kind, Tensor};

fn load(case: &Case) -> StableDiffusion {
    let model = StableDiffusion::load(&case.pipeline(), Kind::Float, Device::Cpu).unwrap();
    assert!(model.notes.is_empty(), "{}: {:?}", case.name, model.notes);
    model
}

fn unet_call(case: &Case, model: &StableDiffusion) -> Tensor {
    let conditioning = Conditioning::new(case.get("unet.context"));
    model.denoiser().forward(&case.get("unet.sample"), &case.get("unet.timestep"), &conditioning)
}

#[test]
fn prompts_become_the_same_ids_and_states() {
    for case in cases() {
        let model = load(&case);
        let json = case.json();
        for (i, prompt) in json["prompts"].as_array().unwrap().iter().enumerate() {
            let prompt = prompt.as_str().unwrap();
            let (ids, cut) = model.texts[0].tokenizer.encode(prompt).unwrap();
            let expected: Vec<i64> =
                Vec::try_from(case.get(&format!("text.{i}.input_ids")).reshape([-1])).unwrap();
            assert_eq!(ids, expected, "{} `{prompt}`", case.name);
            assert_eq!(cut, 0);
            let (states, _) = model.encode_prompts(&[prompt]).unwrap();
            case.check(&format!("text.{i}.hidden"), states.states(), 1e-5);
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

/// Adapters of a case by the names of their folders, of which expectations named `NAME.{what}` are stored.
fn adapters(case: &Case, what: &str) -> Vec<String> {
    let entries = std::fs::read_dir(&case.dir).unwrap().map(|entry| entry.unwrap().path());
    let folders = entries.filter(|path| path.join("adapter_config.json").is_file());
    let mut names: Vec<String> =
        folders.map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect();
    names.retain(|name| case.has(&format!("{name}.{what}")));
    names.sort();
    names
}

fn fixed(case: &Case, adapter: &str) -> Vec<(LoadedAdapter, f64)> {
    // The names are for single LoRA files, which the cases have none of.
    vec![(LoadedAdapter::read(&case.dir.join(adapter), &LayerNames::default()).unwrap(), 1.0)]
}

#[test]
fn adapters_give_the_same_output_loss_and_gradients() {
    let mut methods = BTreeSet::new();
    for case in cases() {
        for adapter in adapters(&case, "out") {
            let mut model = load(&case);
            let file = AdapterFile::read(&case.dir.join(&adapter)).unwrap();
            methods.insert(file.config.method.name());
            assert!(file.unused.is_empty(), "{adapter}: {:?}", file.unused);
            let layers = file.layers.len();
            assert_eq!(attach::attach_trained(&mut model.unet, file).unwrap(), layers);
            let parameters = attach::pack_parameters(&mut [&mut model.unet]);
            let out = unet_call(&case, &model);
            case.check(&format!("{adapter}.out"), &out, 1e-5);
            let loss = out.square().mean(Kind::Float);
            case.check(&format!("{adapter}.loss"), &loss.reshape([1]), 1e-5);
            loss.backward();
            let prefix = format!("{adapter}.grad.base_model.model.");
            let mut compared = 0;
            for key in case.expected.names().iter().filter(|key| key.starts_with(&prefix)) {
                // PEFT's names in a live model have the adapter's name in them, and DoRA's vector is a module there.
                let name = key[prefix.len()..].replace(".default", "");
                let name = name.replace("magnitude_vector.weight", "magnitude_vector");
                let (_, tensor) = parameters
                    .views()
                    .iter()
                    .find(|(ours, _)| *ours == name)
                    .unwrap_or_else(|| panic!("{} {adapter}: nothing trains {name}", case.name));
                let grad = tensor.grad();
                case.check(key, &grad.reshape(&case.get(key).size()[..]), 2e-5);
                compared += 1;
            }
            assert!(compared >= 4, "{} {adapter}: only {compared} gradients compared", case.name);
        }
    }
    for method in ["hra", "lora", "dora", "oft", "coft", "boft"] {
        assert!(methods.contains(method), "no case has an adapter of {method}");
    }
}

#[test]
fn merged_and_fixed_weights_give_what_peft_merges() {
    for case in cases() {
        for adapter in adapters(&case, "merged.out") {
            let mut model = load(&case);
            let file = AdapterFile::read(&case.dir.join(&adapter)).unwrap();
            let mut compared = 0;
            for layer in model.unet.layers_mut() {
                let key = format!("{adapter}.merged.{}.weight", layer.name);
                if case.has(&key) {
                    let weight = layer.matrix().to_kind(Kind::Double);
                    let change = |w: &Tensor, s: f64| file.layers[&layer.name].change(w, s).form.merged(w);
                    let merged = change(&weight, 1.0);
                    case.check(&key, &merged.reshape(&case.get(&key).size()[..]), 1e-5);
                    if ["hra", "lora"].contains(&file.config.method.name()) {
                        let back = change(&merged, -1.0);
                        assert!(relative_error(&back, &weight) < 1e-9, "{adapter}: strength -1 undoes it");
                    }
                    compared += 1;
                }
            }
            assert!(compared > 0, "{} {adapter}: no merged weight compared", case.name);
            for keep_base in [true, false] {
                let mut model = load(&case);
                let reports = attach_fixed(&mut model.unet, &mut fixed(&case, &adapter), keep_base).unwrap();
                assert_eq!(reports[0].layers, file.layers.len());
                assert!(reports[0].unused.is_empty());
                let _guard = tch::no_grad_guard();
                case.check(&format!("{adapter}.merged.out"), &unet_call(&case, &model), 1e-5);
            }
        }
    }
}

#[test]
fn adapters_of_the_text_encoder_give_the_same_states() {
    for case in cases() {
        for adapter in adapters(&case, "hidden") {
            let mut model = load(&case);
            let reports =
                attach_fixed(&mut model.texts[0].encoder, &mut fixed(&case, &adapter), false).unwrap();
            assert!(reports[0].unused.is_empty());
            let json = case.json();
            let (states, _) = model.encode_prompts(&[json["prompts"][0].as_str().unwrap()]).unwrap();
            case.check(&format!("{adapter}.hidden"), states.states(), 1e-5);
        }
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
        attach::attach_trained(&mut model.unet, file).unwrap();
        let mut parameters = attach::pack_parameters(&mut [&mut model.unet]);
        for (name, view) in parameters.views() {
            let _guard = tch::no_grad_guard();
            view.shallow_clone().copy_(&case.get(&format!("step.before.{name}")));
        }
        let schedule = NoiseSchedule::new(&model.scheduler, Device::Cpu).unwrap();
        let batch = Batch {
            latents: case.get("step.latents"),
            noise: case.get("step.noise"),
            timesteps: case.get("step.timestep"),
            conditioning: Conditioning::new(case.get("step.context")),
            conditions: None,
            class_half: true,
        };
        let noisy = schedule.add_noise(&batch.latents, &batch.noise, &batch.timesteps);
        case.check("step.noisy", &noisy, 1e-5);
        case.check("step.target", &schedule.target(&batch.latents, &batch.noise, &batch.timesteps), 1e-5);

        let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };
        let mut optimizer = AdamW::new(config, &parameters);
        let mut before: Vec<Tensor> = parameters.views().iter().map(|(_, t)| t.detach().copy()).collect();
        for step in 0..3 {
            let loss = training_loss(&model.unet, None, &schedule, &batch, 0.7, None);
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
            let norm = parameters.gradient_norm();
            case.check(&format!("step.{step}.grad_norm"), &norm.reshape([1]), 1e-4);
            optimizer.step(&mut parameters, &clip_factor(&norm, 0.01), &[1e-2]);
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

/// A case with the tensors of control: they lie beside its own (make_control_fixtures.py) or among them.
fn control_case(case: &Case) -> Case {
    let path = case.dir.join("control.safetensors");
    let path = if path.is_file() { path } else { case.dir.join("expected.safetensors") };
    Case { name: case.name.clone(), dir: case.dir.clone(), expected: TensorFile::open(&path).unwrap() }
}

#[test]
fn controlnets_give_the_same_tensors() {
    let mut stored = 0;
    for case in cases() {
        let control_case = control_case(&case);
        if !control_case.has("control.out") {
            continue;
        }
        stored += usize::from(case.dir.starts_with(support::root().join("tests/fixtures")));
        let model = load(&case);
        let _guard = tch::no_grad_guard();
        let (net, unused) = ControlNet::load(&case.dir.join("controlnet"), Kind::Float, Device::Cpu).unwrap();
        assert!(unused.is_empty(), "{}: {unused:?}", case.name);
        let control = Control::Net(Box::new(net));
        assert_eq!(control.misfit(&model.unet, model.vae.factor()), None);
        let features = control.features(&control_case.get("control.image"));
        control_case.check("control.hint", &features, 1e-5);
        let (sample, timesteps) = (&case.get("unet.sample"), &case.get("unet.timestep"));
        let call = Call { sample, timesteps, conditioning: &Conditioning::new(case.get("unet.context")) };
        let signals = |scale| control.signals(&features, scale, Passes::Both, call);
        let unscaled = signals(1.0);
        // The case's single residuals have the scale of its call, 0.8.
        control_case.check("control.down.last", &(unscaled.skips.last().unwrap() * 0.8), 1e-5);
        control_case.check("control.mid", &(unscaled.middle.as_ref().unwrap() * 0.8), 1e-5);
        let out = model.denoiser().predict(call, &signals(0.8));
        control_case.check("control.out", &out, 1e-5);
        assert!(relative_error(&out, &case.get("unet.out")) > 1e-2, "{}: it steers", case.name);
    }
    assert_eq!(stored, 2, "both kinds of stored cases have a ControlNet");
}

#[test]
fn control_encoders_give_the_same_output_and_gradients() {
    let mut compared = 0;
    for case in cases() {
        let expected = control_case(&case);
        if !expected.has("encoder.out") {
            continue;
        }
        let model = load(&case);
        let dir = case.dir.join(CONTROL_ENCODER);
        let (mut encoder, unused) = ConditionEncoder::load(&dir, Device::Cpu).unwrap();
        assert!(unused.is_empty(), "{}: {unused:?}", case.name);
        let everything = TargetRule::from_words(&[".*".to_string()]).unwrap();
        attach::attach_new(&mut encoder, &everything, &Method::new(FullConfig), Bias::None, 0).unwrap();
        let parameters = attach::pack_parameters(&mut [&mut encoder]);
        let out = encoder.forward(&expected.get("control.image"));
        expected.check("encoder.out", &out, 1e-5);
        out.square().mean(Kind::Float).backward();
        let keys = expected.expected.names().iter().filter(|key| key.starts_with("encoder.grad.")).count();
        assert_eq!(keys, parameters.views().len(), "{}: as many tensors train", case.name);
        for (name, view) in parameters.views() {
            expected.check(&format!("encoder.grad.{name}"), &view.grad(), 2e-5);
        }
        let _guard = tch::no_grad_guard();
        let signals = Signals { hint: Some(out), ..Signals::default() };
        let (sample, timesteps) = (&case.get("unet.sample"), &case.get("unet.timestep"));
        let call = Call { sample, timesteps, conditioning: &Conditioning::new(case.get("unet.context")) };
        let out = model.denoiser().predict(call, &signals);
        expected.check("encoder.unet.out", &out, 1e-5);
        compared += 1;
    }
    assert!(compared >= 2, "both kinds of stored cases have a control encoder");
}
