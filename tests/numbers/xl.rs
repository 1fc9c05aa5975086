//! Stable Diffusion XL against Python diffusers, transformers and PEFT, on stored reference cases (f32, CPU).

use crate::reference::{Comparer, REFERENCE, adapters, networks, xl};
use crate::support::xl_cases::xl_cases;

#[test]
fn both_towers_give_the_states_and_the_pooled_text_of_python() {
    for case in xl_cases() {
        xl::texts(&Comparer::new(REFERENCE), &case);
        xl::adapted_texts(&Comparer::new(REFERENCE), &case);
    }
}

#[test]
fn unet_and_vae_are_those_of_python() {
    for case in xl_cases() {
        networks::unet_and_vae(&Comparer::new(REFERENCE), &case);
    }
}

#[test]
fn adapters_have_the_outputs_and_gradients_of_peft() {
    for case in xl_cases() {
        let names = adapters::names(&case, "out");
        assert!(names.len() >= 3, "{}: {names:?}", case.name);
        for name in names {
            adapters::outputs_losses_and_gradients(&Comparer::new(REFERENCE), &case, &name);
        }
    }
}

#[test]
fn drawings_have_the_latents_of_python() {
    for case in xl_cases() {
        let here = Comparer::new(REFERENCE);
        xl::drawings(&here, &case);
        xl::adapted_drawings(&here, &case);
        xl::controlled_drawing(&here, &case);
        for (what, compared) in here.finish() {
            println!(
                "{what}: worst {:.2} of what is allowed, {} tensors",
                compared.worst(),
                compared.errors.len()
            );
        }
    }
}
