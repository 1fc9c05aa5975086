//! Numbers that are none (NaN, infinite) and numbers that no program writes, in every file and setting that has numbers: each is
//! refused by the name of the file and of the number, through the real binary.

use crate::support::base::root;
use crate::support::finished::Finished;
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use hra::platform::observer::Silent;
use hra::train::config::{TrainConfig, keys};
use hra::weights::tensor_file::{self, TensorFile};
use std::fs;
use std::path::{Path, PathBuf};
use tch::Tensor;

const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

fn refused(done: &Finished, words: &[&str]) {
    assert_eq!(done.code, 2, "{}{}", done.out, done.err);
    for word in words {
        assert!(done.err.contains(word), "expected `{word}` in\n{}", done.err);
    }
    assert!(!done.err.contains("defect of hra"), "{}", done.err);
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            copy_folder(&from, &to);
        } else {
            fs::write(to, fs::read(from).unwrap()).unwrap();
        }
    }
}

/// Writes `value` over the first number of the tensor `name`, or over all where `all` is set.
fn spoil(path: &Path, name: &str, value: f64, all: bool) {
    let file = TensorFile::open(path).unwrap();
    let texts: Vec<(String, String)> = file.texts().into_iter().collect();
    let mut tensors: Vec<(String, Tensor)> =
        file.names().into_iter().map(|name| (name.clone(), file.read(&name).unwrap())).collect();
    let (_, tensor) = tensors.iter_mut().find(|(own, _)| own == name).unwrap();
    let mut flat = tensor.view([-1]);
    let _ = if all { flat.fill_(value) } else { flat.narrow(0, 0, 1).fill_(value) };
    let texts: Vec<(&str, String)> = texts.iter().map(|(key, text)| (key.as_str(), text.clone())).collect();
    tensor_file::write(path, &tensors, &texts).unwrap();
}

fn sample(scratch: &Scratch, model: &Path, more: &[&str]) -> Finished {
    let model = model.to_str().unwrap();
    let words = ["sample", "--model", model, "--prompt", "a cat", "--steps", "1", "--output", "out"];
    scratch.run(&[&words[..], more].concat())
}

fn case() -> PathBuf {
    root().join("tests/fixtures/cases/sd15")
}

/// A number in the VAE's encoder or in a token that is not in the prompt changes no picture that is drawn; another prompt, an image to
/// start from or a training would meet it.
#[test]
fn a_model_with_a_number_that_is_none_is_refused_when_it_is_loaded() {
    let scratch = Scratch::new();
    let text = "text_encoder/model.safetensors";
    let token = TensorFile::open(&tiny_sd().join(text)).unwrap().names();
    let token = token.into_iter().find(|name| name.contains("token_embedding")).unwrap();
    let (unet, vae) = (format!("unet/{WEIGHTS}"), format!("vae/{WEIGHTS}"));
    for (file, name, value) in [
        (vae.as_str(), "encoder.conv_in.bias", f64::NAN),
        (vae.as_str(), "decoder.conv_out.bias", f64::INFINITY),
        (text, token.as_str(), f64::NAN),
        (unet.as_str(), "conv_in.bias", f64::NEG_INFINITY),
    ] {
        let model = scratch.path("model");
        copy_folder(&tiny_sd(), &model);
        spoil(&model.join(file), name, value, false);
        let words = [name, "holds numbers that are not finite", file.split('/').next().unwrap()];
        refused(&sample(&scratch, &model, &[]), &words);
        assert!(!scratch.path("out").exists(), "{file}");
        if file == vae {
            let place = model.join("vae");
            refused(&sample(&scratch, &tiny_sd(), &["--vae", place.to_str().unwrap()]), &words[..2]);
        }
        fs::remove_dir_all(model).unwrap();
    }
}

#[test]
fn files_beside_the_model_with_numbers_that_are_none_are_refused() {
    let scratch = Scratch::new();
    let model = case().join("pipeline");
    let condition = root().join("assets/control/held_out/segmentation/0000.png");
    let controlled = ["--control", condition.to_str().unwrap(), "--controlnet", "net"];
    copy_folder(&case().join("controlnet"), &scratch.path("net"));
    spoil(&scratch.path("net").join(WEIGHTS), "conv_in.bias", f64::NAN, false);
    refused(&sample(&scratch, &model, &controlled), &["net", "`conv_in.bias`", "not finite"]);

    let latents = scratch.path("latents.safetensors");
    let done = sample(&scratch, &model, &["--save-latents", latents.to_str().unwrap()]);
    assert_eq!(done.code, 0, "{}", done.err);
    spoil(&latents, "latents", f64::NAN, false);
    let given = ["--latents", latents.to_str().unwrap()];
    refused(&sample(&scratch, &model, &given), &["latents.safetensors", "`latents`", "not finite"]);

    copy_folder(&root().join("assets/tiny-clip"), &scratch.path("clip"));
    let tower = scratch.path("clip/model.safetensors");
    let name = TensorFile::open(&tower).unwrap().names();
    let name =
        name.iter().find(|name| name.ends_with("layer_norm1.bias") && name.contains("vision")).unwrap();
    spoil(&tower, name, f64::NAN, false);
    let photos = root().join("assets/subjects/cat/train");
    let words = ["evaluate", photos.to_str().unwrap(), "--prompt", "a cat", "--clip", "clip"];
    refused(&scratch.run(&words), &["clip", name, "not finite"]);
}

/// The optimiser's file of a checkpoint, with one change.
fn resumed(scratch: &Scratch, change: impl FnOnce(&Path)) -> Finished {
    let (run, copy) = (scratch.path("run"), scratch.path("copy"));
    let _ = fs::remove_dir_all(&copy);
    copy_folder(&run, &copy);
    change(&copy.join("checkpoints/step-000002/optimizer.safetensors"));
    scratch.run(&["train", "--resume", "latest", "--output_dir", "copy", "--max_train_steps", "3"])
}

#[test]
fn an_optimisers_file_that_no_step_wrote_is_refused_by_name() {
    let scratch = Scratch::new();
    scratch.train("run", &["--max_train_steps", "2", "--checkpointing_steps", "2"]);
    let file = "step-000002/optimizer.safetensors";
    for (name, value, word) in [
        ("exp_avg", f64::NAN, "not finite"),
        ("exp_avg_sq", f64::INFINITY, "not finite"),
        ("exp_avg_sq", -1.0, "expected 0 or more, found -1"),
    ] {
        let done = resumed(&scratch, |path| spoil(path, name, value, true));
        refused(&done, &[file, &format!("`{name}`"), word]);
    }
    let with_steps = |steps: f32| {
        resumed(&scratch, |path| {
            let file = TensorFile::open(path).unwrap();
            let mut all: Vec<(String, Tensor)> =
                file.names().into_iter().map(|name| (name.clone(), file.read(&name).unwrap())).collect();
            all.push(("steps".into(), Tensor::from_slice(&[steps])));
            tensor_file::write(path, &all, &[]).unwrap();
        })
    };
    for (steps, found) in [(-3.0, "found -3"), (1e30, "found 1"), (f32::NAN, "not finite")] {
        refused(&with_steps(steps), &[file, "`steps`", found]);
    }
    // Finite and possible, and beyond what a step can take: what it leaves is looked at before it is computed with.
    let done = resumed(&scratch, |path| spoil(path, "exp_avg", 3e38, true));
    refused(&done, &["step 3", "is not a finite number", "step-000002"]);
    let done = resumed(&scratch, |_| {});
    assert_eq!(done.code, 0, "{}", done.err);
}

#[test]
fn what_an_adapter_could_not_be_trained_to_is_odd_to_inspect() {
    let scratch = Scratch::new();
    for (adapter, key, value) in
        [("lora-r4", "lora_A.weight", 1e25), ("lora-r4", "lora_A.weight", 3e38), ("hra-r4", "hra_u", 3e38)]
    {
        let folder = scratch.path("adapter");
        let _ = fs::remove_dir_all(&folder);
        copy_folder(&case().join(adapter), &folder);
        let path = folder.join("adapter_model.safetensors");
        let names = TensorFile::open(&path).unwrap().names();
        spoil(&path, names.iter().find(|name| name.ends_with(key)).unwrap(), value, true);
        for more in [&[][..], &["--model", case().join("pipeline").to_str().unwrap()]] {
            let told = scratch.ok(&[&["inspect", "adapter"][..], more].concat()).out;
            assert!(
                !told.contains("nothing odd") && told.contains("far beyond what training makes"),
                "{told}"
            );
        }
    }
    let whole = case().join("lora-r4");
    assert!(scratch.ok(&["inspect", whole.to_str().unwrap()]).out.contains("nothing odd"));
}

#[test]
fn no_setting_takes_a_number_that_is_none() {
    let scratch = Scratch::new();
    let mut refusals = 0;
    for key in keys::keys() {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut file = toml::Table::new();
            key.section.of_mut(&mut file).insert(key.name.to_string(), value.into());
            let config = TrainConfig::given(&[], &file, &Silent)
                .and_then(|given| TrainConfig::default().under(&given, &Silent));
            let checked = config.and_then(|config| config.validate_values());
            let problem = checked.expect_err(key.name).to_string();
            refusals += usize::from(problem.contains(key.name));
        }
    }
    assert!(refusals > 100, "refused by name: {refusals}");
    for flag in ["--class_guidance", "--validation_guidance", "--learning_rate"] {
        let done = scratch.run(&["train", "--print-config", &format!("{flag}=nan")]);
        refused(&done, &[&flag[2..], "expected a number"]);
    }
}

#[test]
fn numbers_that_no_scheduler_has_are_refused() {
    let scratch = Scratch::new();
    let model = scratch.path("model");
    copy_folder(&tiny_sd(), &model);
    let path = model.join("scheduler/scheduler_config.json");
    let good: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value, expected) in [
        ("steps_offset", "1000000000", "expected 0 to 1000"),
        ("steps_offset", "-1", "expected a whole number"),
        ("num_train_timesteps", "1000000000", "expected 1 to 100000"),
        ("beta_start", "-0.5", "expected a number from 0 to 1"),
        ("beta_end", "1e9", "expected a number from 0 to 1"),
        ("beta_end", "NaN", "expected a number"),
        ("clip_sample_range", "Infinity", "expected a number from 0"),
        ("sigma_max", "1e300", "expected a number"),
    ] {
        let mut config = good.clone();
        config[key] = "HERE".into();
        fs::write(&path, config.to_string().replace("\"HERE\"", value)).unwrap();
        refused(&sample(&scratch, &model, &[]), &["scheduler_config.json", key, expected]);
    }
    assert!(!scratch.path("out").exists());
}
