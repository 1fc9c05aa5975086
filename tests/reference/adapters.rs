//! Adapters of every method against PEFT's: outputs, losses, gradients, merged weights.

use super::Comparer;
use super::networks::unet_call;
use crate::support::cases::Case;
use crate::support::error::relative_error;
use hra::adapter::peft::AdapterFile;
use hra::attach;
use hra::attach::fixed::attach_fixed;
use hra::attach::loaded::{LayerNames, LoadedAdapter};
use hra::model::layers::Layers;
use tch::{Device, Kind, Tensor};

/// Adapters of a case by the names of their folders, of which expectations named `NAME.{what}` are stored.
pub fn names(case: &Case, what: &str) -> Vec<String> {
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

/// Output, loss and gradients with one adapter; the name of its method.
pub fn outputs_losses_and_gradients(here: &Comparer, case: &Case, adapter: &str) -> &'static str {
    let mut model = here.load(case);
    let file = AdapterFile::read(&case.dir.join(adapter)).unwrap();
    let method = file.config.method.name();
    assert!(file.unused.is_empty(), "{adapter}: {:?}", file.unused);
    let layers = file.layers.len();
    assert_eq!(attach::attach_trained(&mut model.unet, file).unwrap(), layers);
    let parameters = attach::pack_parameters(&mut [&mut model.unet]);
    let out = unet_call(here, case, &model);
    here.compare(case, &format!("{adapter} output"), &format!("{adapter}.out"), &out, 1e-5);
    let loss = out.square().mean(Kind::Float);
    here.compare(case, &format!("{adapter} loss"), &format!("{adapter}.loss"), &loss, 1e-5);
    (loss * here.loss_scale()).backward();
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
        here.compare(case, &format!("{adapter} gradients"), key, &(tensor.grad() / here.loss_scale()), 2e-5);
        compared += 1;
    }
    assert!(compared >= 4, "{} {adapter}: only {compared} gradients compared", case.name);
    method
}

pub fn merged_and_fixed(here: &Comparer, case: &Case) {
    let f32_weights = here.compute.kind == Kind::Float;
    for adapter in names(case, "merged.out") {
        let mut model = here.load(case);
        let file = AdapterFile::read(&case.dir.join(&adapter)).unwrap();
        let mut compared = 0;
        for layer in model.unet.layers_mut() {
            let key = format!("{adapter}.merged.{}.weight", layer.name);
            // Merging computes in f64 on the CPU, of weights in f32.
            if f32_weights && case.has(&key) {
                let weight = layer.matrix().to_device(Device::Cpu).to_kind(Kind::Double);
                let change = |w: &Tensor, s: f64| file.layers[&layer.name].change(w, s).form.merged(w);
                let merged = change(&weight, 1.0);
                here.compare(case, &format!("{adapter} merged"), &key, &here.on_device(&merged), 1e-5);
                if ["hra", "lora"].contains(&file.config.method.name()) {
                    let back = change(&merged, -1.0);
                    assert!(relative_error(&back, &weight) < 1e-9, "{adapter}: strength -1 undoes it");
                }
                compared += 1;
            }
        }
        assert!(!f32_weights || compared > 0, "{} {adapter}: no merged weight compared", case.name);
        for keep_base in [true, false] {
            let mut model = here.load(case);
            let reports = attach_fixed(&mut model.unet, &mut fixed(case, &adapter), keep_base).unwrap();
            assert_eq!(reports[0].layers, file.layers.len());
            assert!(reports[0].unused.is_empty());
            let _guard = tch::no_grad_guard();
            let (what, key) = (format!("{adapter} fixed"), format!("{adapter}.merged.out"));
            here.compare(case, &what, &key, &unet_call(here, case, &model), 1e-5);
        }
    }
}

pub fn of_text_encoder(here: &Comparer, case: &Case) {
    for adapter in names(case, "hidden") {
        let mut model = here.load(case);
        let reports = attach_fixed(&mut model.texts[0].encoder, &mut fixed(case, &adapter), false).unwrap();
        assert!(reports[0].unused.is_empty());
        let json = case.json();
        let (states, _) = model.encode_prompts(&[json["prompts"][0].as_str().unwrap()]).unwrap();
        here.compare(case, &format!("{adapter} states"), &format!("{adapter}.hidden"), states.states(), 1e-5);
    }
}
