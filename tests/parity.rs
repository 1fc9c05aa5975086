//! The networks and all adapters against Python diffusers, transformers and PEFT, on stored reference cases (f32, CPU).

mod reference;
mod support;

use hra::attach::parameters::Parameters;
use hra::train::optim::{AdamW, AdamWConfig, clip_factor};
use reference::{Comparer, REFERENCE, adapters, control, networks, training};
use std::collections::BTreeSet;
use support::cases;
use tch::{Device, Kind, Tensor};

fn here() -> Comparer {
    Comparer::new(REFERENCE)
}

#[test]
fn prompts_become_the_same_ids_and_states() {
    cases().iter().for_each(|case| networks::texts(&here(), case));
}

#[test]
fn unet_and_vae_give_the_same_tensors() {
    cases().iter().for_each(|case| networks::unet_and_vae(&here(), case));
}

#[test]
fn adapters_give_the_same_output_loss_and_gradients() {
    let mut methods = BTreeSet::new();
    for case in cases() {
        for adapter in adapters::names(&case, "out") {
            methods.insert(adapters::outputs_losses_and_gradients(&here(), &case, &adapter));
        }
    }
    for method in ["hra", "lora", "dora", "oft", "coft", "boft"] {
        assert!(methods.contains(method), "no case has an adapter of {method}");
    }
}

#[test]
fn merged_and_fixed_weights_give_what_peft_merges() {
    cases().iter().for_each(|case| adapters::merged_and_fixed(&here(), case));
}

#[test]
fn adapters_of_the_text_encoder_give_the_same_states() {
    cases().iter().for_each(|case| adapters::of_text_encoder(&here(), case));
}

#[test]
fn three_training_steps_are_the_same() {
    cases().iter().for_each(|case| training::three_steps(&here(), case));
}

#[test]
fn controlnets_give_the_same_tensors() {
    let fixtures = support::root().join("tests/fixtures");
    let stored = cases()
        .iter()
        .filter(|case| control::controlnet(&here(), case) && case.dir.starts_with(&fixtures))
        .count();
    assert_eq!(stored, 2, "both kinds of stored cases have a ControlNet");
}

#[test]
fn control_encoders_give_the_same_output_and_gradients() {
    let compared = cases().iter().filter(|case| control::encoder(&here(), case)).count();
    assert!(compared >= 2, "both kinds of stored cases have a control encoder");
}

#[test]
fn the_loss_scale_of_f16_and_its_steps_are_those_of_torch() {
    support::pin_threads();
    training::loss_scale(&here());
}

/// The step that a GPU takes in one kernel, beside the one that a CPU takes by parts.
#[test]
fn the_fused_step_is_the_step_by_parts() {
    support::pin_threads();
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
