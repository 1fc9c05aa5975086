//! Command lines: words of other programs, seeds, pictures that are there already, checkpoints that broke.

use super::{case, copy};
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use hra::data::image::png::read_png_text;
use hra::weights::tensor_file::{self, TensorFile};

fn sample<'a>(model: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args =
        vec!["sample", "--model", model, "--prompt", "a red apple", "--steps", "2", "--output", out];
    args.extend(more);
    args
}

#[test]
fn seed_minus_one() {
    let (scratch, model) = (Scratch::new(), tiny_sd());
    let model = model.to_str().unwrap();
    let seed = |out: &str, flags: &[&str]| {
        let done = scratch.ok(&sample(model, out, flags));
        let text = read_png_text(&scratch.path(out).join("0000-0000.png")).unwrap();
        let seed = text.into_iter().find(|(key, _)| key == "seed").unwrap().1;
        assert!(done.err.contains(&format!("note: --seed -1: seed {seed} was drawn")), "{}", done.err);
        seed
    };
    assert_ne!(seed("a", &["--seed", "-1"]), seed("b", &["--seed=-1"]));
}

#[test]
fn negative_numbers_without_an_equals_sign() {
    let scratch = Scratch::new();
    let done = scratch.run(&sample("none", "out", &["--guidance", "-3", "--timestep-spacing", "-1"]));
    // The number is read; it is the word after it that is wrong.
    assert!(done.err.contains("'-1'") && done.err.contains("--timestep-spacing"), "{}", done.err);
    let done = scratch.run(&["prepare", "canny", "none", "--low", "-5"]);
    assert!(done.err.contains("expected 0 <= low <= high, found -5"), "{}", done.err);
}

#[test]
fn words_of_a1111_and_kohya() {
    let (scratch, model) = (Scratch::new(), tiny_sd());
    let model = model.to_str().unwrap();
    let done = scratch.ok(&sample(model, "out", &["--sampler", "ddim", "--cfg_scale", "3"]));
    assert!(!done.err.contains("read as it stands"), "{}", done.err);
    let text = read_png_text(&scratch.path("out/0000-0000.png")).unwrap();
    let value = |name: &str| text.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    assert_eq!((value("scheduler"), value("guidance_scale")), (Some("ddim"), Some("3")), "{text:?}");
    let args = ["train", "--model", model, "--lr", "3e-4", "--network_dim", "6", "--print-config"];
    let printed = scratch.ok(&args).out;
    assert!(printed.contains("learning_rate = 0.0003") && printed.contains("rank = 6"), "{printed}");
}

#[test]
fn prompts_with_weights_and_names_of_files() {
    let (scratch, model) = (Scratch::new(), tiny_sd());
    let model = model.to_str().unwrap();
    for (n, (syntax, prompt)) in [
        ("(red:1.3)", "a (red:1.3) apple"),
        ("<lora:pixel:0.8>", "an apple <lora:pixel:0.8>"),
        ("((red))", "a ((red)) apple"),
    ]
    .iter()
    .enumerate()
    {
        let out = format!("out{n}");
        let done = scratch.ok(&sample(model, &out, &["--prompt", prompt, "--prompt", prompt]));
        let said = done.err.matches("is read as it stands").count();
        assert!(said == 1 && done.err.contains(&format!("note: `{syntax}` is read")), "{}", done.err);
    }
    let done = scratch.ok(&sample(model, "plain", &["--prompt", "a cat (big), at 12:30"]));
    assert!(!done.err.contains("read as it stands"), "{}", done.err);
}

#[test]
fn a_folder_with_pictures_of_an_earlier_drawing() {
    let (scratch, model) = (Scratch::new(), tiny_sd());
    let run = scratch.path("run");
    scratch.train("run", &["--max_train_steps", "1"]);
    let flags = ["--adapter", run.to_str().unwrap(), "--with-base"];
    let model = model.to_str().unwrap();
    scratch.ok(&sample(model, "out", &flags));
    let bytes = |name: &str| std::fs::read(scratch.path("out").join(name)).unwrap();
    let before = ["0000-0000.png", "grid.png", "base/0000-0000.png"].map(bytes);
    let again = scratch.ok(&sample(model, "out", &["--seed", "5"]));
    assert!(
        again.err.contains("note: out has pictures: the new ones are counted on from 0001"),
        "{}",
        again.err
    );
    assert!(["0000-0000.png", "grid.png", "base/0000-0000.png"].map(bytes) == before);
    assert!(bytes("0001-0000.png") != before[0] && scratch.path("out/grid-0001.png").exists());
    scratch.ok(&sample(model, "out", &["--seed", "5", "--overwrite"]));
    assert!(bytes("0000-0000.png") != before[0]);
    assert!(
        !scratch.path("out/base/0000-0000.png").exists(),
        "the base model's picture belongs to the old one"
    );
}

#[test]
fn a_training_at_the_default_rate_for_a_few_steps() {
    let scratch = Scratch::new();
    let said = |out: &str, rate: &str| {
        let done = scratch.train(out, &["--learning_rate", rate, "--max_train_steps", "4"]);
        done.err.contains("note: the weights barely moved") && done.err.contains("raise --learning_rate")
    };
    assert!(said("still", "1e-5"));
    assert!(!said("moved", "1e-2"));
}

/// Told before the weights are loaded, which takes long for a real model: that the VAE is broken comes to light later.
#[test]
fn a_rank_that_no_layer_has_room_for() {
    let scratch = Scratch::new();
    copy(&case("pipeline"), &scratch.path("model"));
    std::fs::write(scratch.path("model/vae/diffusion_pytorch_model.safetensors"), "broken").unwrap();
    for (method, text_too, rank, largest) in [
        ("hra", false, "4000", "12"),
        ("lora", false, "4000", "12"),
        ("oft", false, "64", "4"),
        ("hra", true, "40", "12"),
    ] {
        let text_too = format!("--train_text_encoder={text_too}");
        let more =
            ["--pretrained_model_name_or_path", "model", "--method", method, "--rank", rank, &text_too];
        let flags = scratch.train_flags("run", &more);
        let done = scratch.run(&flags.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(done.code, 2);
        let hint = format!("hint: the largest rank that fits every layer is {largest}\n");
        assert!(
            done.err.contains(&format!("found {rank}")) && done.err.contains(&hint),
            "{method}: {}",
            done.err
        );
    }
}

#[test]
fn a_newest_checkpoint_that_broke() {
    let scratch = Scratch::new();
    let steps = ["--checkpointing_steps", "1"];
    scratch.train("run", &[&["--max_train_steps", "2"], &steps[..]].concat());
    for (file, bytes) in [("adapter_model.safetensors", 50), ("optimizer.safetensors", 9), ("state.json", 10)]
    {
        let path = scratch.path("run/checkpoints/step-000002").join(file);
        let whole = std::fs::read(&path).unwrap_or_else(|e| panic!("{file}: {e}"));
        std::fs::write(&path, &whole[..bytes]).unwrap();
        let resume = |which: &str| {
            ["train", "--output_dir", "run", "--max_train_steps", "3", "--resume", which].map(str::to_string)
        };
        let words = resume("latest");
        let done = scratch.run(&words.each_ref().map(String::as_str));
        assert_eq!(done.code, 2, "{file}");
        for part in [&format!("step-000002/{file}"), "hint: --resume 1 goes on from the checkpoint before"] {
            assert!(done.err.contains(part), "{file}: {}", done.err);
        }
        std::fs::write(&path, whole).unwrap();
    }
    // Whole files with numbers that no step left there.
    for (file, tensor) in [("adapter_model.safetensors", None), ("optimizer.safetensors", Some("exp_avg"))] {
        let path = scratch.path("run/checkpoints/step-000002").join(file);
        let (whole, opened) = (std::fs::read(&path).unwrap(), TensorFile::open(&path).unwrap());
        let infinite = |name: String| {
            let found = opened.read(&name).unwrap();
            let damaged = tensor.is_none_or(|tensor| tensor == name);
            (name, if damaged { found / 0.0 } else { found })
        };
        let tensors: Vec<_> = opened.names().into_iter().map(infinite).collect();
        tensor_file::write(&path, &tensors, &[]).unwrap();
        let done =
            scratch.run(&["train", "--output_dir", "run", "--max_train_steps", "3", "--resume", "latest"]);
        assert_eq!(done.code, 2, "{file}");
        let said = [&format!("step-000002/{file}: `"), "not finite", "hint: --resume 1 goes on from"];
        assert!(said.iter().all(|part| done.err.contains(part)), "{file}: {}", done.err);
        std::fs::write(&path, whole).unwrap();
    }
    let path = scratch.path("run/checkpoints/step-000002/adapter_model.safetensors");
    std::fs::write(&path, "damaged").unwrap();
    scratch.ok(&["train", "--output_dir", "run", "--max_train_steps", "3", "--resume", "1"]);
}
