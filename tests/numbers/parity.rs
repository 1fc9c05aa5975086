//! The networks and all adapters against Python diffusers, transformers and PEFT, on stored reference cases (f32, CPU).

use crate::reference::{Comparer, REFERENCE, adapters, control, networks, training};
use crate::support::all_cases::cases;
use crate::support::base::{pin_threads, root};
use crate::support::cases::Case;
use hra::attach::parameters::Parameters;
use hra::train::optim::{AdamW, AdamWConfig, clip_factor};
use std::collections::BTreeSet;
use tch::{Device, Kind, Tensor};

/// Computes every case; a comparison fails where it is made, and there must be some.
fn over_cases(mut compute: impl FnMut(&Comparer, &Case)) {
    let here = Comparer::new(REFERENCE);
    cases().iter().for_each(|case| compute(&here, case));
    let compared = here.finish();
    assert!(!compared.is_empty() && compared.values().all(|compared| compared.worst() <= 1.0));
}

#[test]
fn prompts_become_the_same_ids_and_states() {
    over_cases(networks::texts);
}

#[test]
fn unet_and_vae_give_the_same_tensors() {
    over_cases(networks::unet_and_vae);
}

#[test]
fn adapters_give_the_same_output_loss_and_gradients() {
    let mut methods = BTreeSet::new();
    over_cases(|here, case| {
        for adapter in adapters::names(case, "out") {
            methods.insert(adapters::outputs_losses_and_gradients(here, case, &adapter));
        }
    });
    for method in ["hra", "lora", "dora", "oft", "coft", "boft"] {
        assert!(methods.contains(method), "no case has an adapter of {method}");
    }
}

#[test]
fn merged_and_fixed_weights_give_what_peft_merges() {
    over_cases(adapters::merged_and_fixed);
}

#[test]
fn adapters_of_the_text_encoder_give_the_same_states() {
    over_cases(adapters::of_text_encoder);
}

#[test]
fn three_training_steps_are_the_same() {
    over_cases(training::three_steps);
}

#[test]
fn controlnets_give_the_same_tensors() {
    let fixtures = root().join("tests/fixtures");
    let mut stored = 0;
    over_cases(|here, case| {
        stored += usize::from(control::controlnet(here, case) && case.dir.starts_with(&fixtures));
    });
    assert_eq!(stored, 2, "both kinds of stored cases have a ControlNet");
}

#[test]
fn control_encoders_give_the_same_output_and_gradients() {
    let mut compared = 0;
    over_cases(|here, case| compared += usize::from(control::encoder(here, case)));
    assert!(compared >= 2, "both kinds of stored cases have a control encoder");
}

#[test]
fn the_loss_scale_of_f16_and_its_steps_are_those_of_torch() {
    pin_threads();
    training::loss_scale(&Comparer::new(REFERENCE));
}

/// The step that a GPU takes in one kernel, beside the one that a CPU takes by parts.
#[test]
fn the_fused_step_is_the_step_by_parts() {
    pin_threads();
    let start = |name: &str| (name.to_string(), Tensor::arange(40, (Kind::Float, Device::Cpu)) / 40.0 - 0.3);
    let run = |fused: bool| -> Vec<f32> {
        let mut parameters = Parameters::pack(&[vec![start("a")], vec![start("b")]]);
        let config = AdamWConfig { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.05 };
        let mut optimizer = AdamW::new(config, &parameters);
        let good = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        for _ in 0..5 {
            parameters.zero_gradient();
            let views = parameters.views();
            ((views[0].1.sin() * &views[1].1).sum(Kind::Float) * 30.0).backward();
            let factor = clip_factor(&parameters.gradient_norm(), 1.0);
            optimizer.step(&mut parameters, &factor, &[1e-2, 3e-2], fused.then_some(&good)).unwrap();
        }
        Vec::try_from(parameters.flat()).unwrap()
    };
    for (fused, by_parts) in run(true).iter().zip(run(false)) {
        assert!((fused - by_parts).abs() <= 1e-6, "{fused} beside {by_parts}");
    }
}
