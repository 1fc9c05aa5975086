//! Stable Diffusion XL against Python diffusers, transformers and PEFT, on stored reference cases (f32, CPU).

use crate::reference::{Comparer, REFERENCE, adapters, networks, training, xl};
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
fn three_training_steps_are_those_of_python() {
    let trained: Vec<_> = xl_cases().into_iter().filter(|case| case.has("step.latents")).collect();
    assert!(!trained.is_empty());
    for case in trained {
        let here = Comparer::new(REFERENCE);
        training::three_steps(&here, &case);
        let compared = here.finish();
        let count = |what: &str| compared.get(&format!("{} {what}", case.name)).map_or(0, |c| c.errors.len());
        assert!(count("training losses") == 6 && count("training predictions") == 3, "{:?}", compared.keys());
        // The norm of each step, and tensors; what each of the stored tensors was changed by, in each step.
        assert!(count("training gradients") > 3 || count("training moves") > 100);
        assert!(count("training moves") >= 3 * 8, "the projections of one block at least");
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
