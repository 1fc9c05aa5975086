//! `hra sample` through the real binary on the embedded model: names, seeds, batches, strength, what it tells and writes.

use crate::support::base::root;
use crate::support::error::relative_error;
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use hra::data::image::load_rgb;
use hra::data::image::png::read_png_text;
use hra::weights::tensor_file::TensorFile;
use std::path::Path;
use tch::Tensor;

fn sample(scratch: &Scratch, out: &str, more: &[&str]) -> String {
    let model = tiny_sd();
    let mut args = vec![
        "sample",
        "--model",
        model.to_str().unwrap(),
        "--steps",
        "4",
        "--guidance",
        "4",
        "--output",
        out,
    ];
    args.extend(more);
    scratch.ok(&args).err
}

fn latents(path: &Path) -> Tensor {
    TensorFile::open(path).unwrap().read("latents").unwrap()
}

fn largest_difference(a: &Path, b: &Path) -> u8 {
    let (a, b) = (load_rgb(a).unwrap(), load_rgb(b).unwrap());
    assert_eq!(a.dimensions(), b.dimensions());
    a.as_raw().iter().zip(b.as_raw()).map(|(x, y)| x.abs_diff(*y)).max().unwrap()
}

#[test]
fn a_seed_gives_its_picture_to_a_level_in_any_batch_and_to_the_bit_alone() {
    let scratch = Scratch::new();
    let prompts =
        ["--prompt", "a cat face", "--prompt", "a red apple", "--scheduler", "euler-a", "--seed", "5"];
    let run = |out: &str, more: &[&str]| {
        let file = format!("{out}.safetensors");
        sample(&scratch, out, &[&prompts[..], more, &["--save-latents", &file]].concat());
        latents(&scratch.path(&file))
    };
    let together = run("together", &["--num-images", "3", "--batch-size", "3"]);
    let apart = run("apart", &["--num-images", "3", "--batch-size", "1"]);
    assert_eq!(together.size(), [6, 4, 16, 16]);
    assert!(relative_error(&together, &apart) < 1e-5);
    for prompt in 0..2 {
        for picture in 0..3 {
            let name = format!("{prompt:04}-{picture:04}.png");
            assert!(
                largest_difference(&scratch.path("together").join(&name), &scratch.path("apart").join(&name))
                    <= 1
            );
        }
    }
    // Picture 2 of seed 5 is picture 0 of seed 7.
    let seventh = ["--prompt", "a cat face", "--scheduler", "euler-a", "--seed", "7"];
    let file = ["--batch-size", "1", "--save-latents", "alone.safetensors"];
    sample(&scratch, "alone", &[&seventh[..], &file].concat());
    assert_eq!(latents(&scratch.path("alone.safetensors")), apart.narrow(0, 2, 1));
    let again = scratch.path("alone/0000-0000.png");
    assert!(largest_difference(&again, &scratch.path("together/0000-0002.png")) <= 1);
    assert!(largest_difference(&again, &scratch.path("together/0000-0001.png")) > 20);
    let text = read_png_text(&again).unwrap();
    let get = |key: &str| text.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
    assert_eq!(
        (get("prompt"), get("seed"), get("scheduler")),
        (Some("a cat face"), Some("7"), Some("euler-a"))
    );
    assert!(
        get("parameters").unwrap().contains("Steps: 4, Sampler: euler-a, CFG scale: 4, Seed: 7, Size: 64x64")
    );
    assert!(scratch.path("together/grid.png").is_file());
}

#[test]
fn strength_goes_from_the_base_model_to_the_adapter_and_what_was_loaded_is_told() {
    let scratch = Scratch::new();
    scratch.train("run", &["--max_train_steps", "3", "--learning_rate", "3e-2"]);
    let run = |out: &str, adapters: &[&str], more: &[&str]| {
        let file = format!("{out}.safetensors");
        let mut args = vec!["--prompt", "a cat face", "--save-latents", &file];
        adapters.iter().for_each(|a| args.extend(["--adapter", a]));
        args.extend(more);
        let told = sample(&scratch, out, &args);
        (latents(&scratch.path(&file)), told)
    };
    let (base, _) = run("base-only", &[], &[]);
    let (full, told) = run("full", &["run"], &["--with-base"]);
    assert!(
        told.contains("56 layers matched")
            && told.contains("no unused keys")
            && told.contains("weights moved by"),
        "{told}"
    );
    assert!(relative_error(&full, &base) > 1e-2);
    assert!(relative_error(&run("none", &["run=0"], &[]).0, &base) < 1e-5);
    let half = run("half", &["run=0.5"], &[]).0;
    assert!(relative_error(&half, &base) > 1e-3 && relative_error(&half, &full) > 1e-3);
    // Half and half again is the whole; an adapter and its inverse are nothing.
    assert!(relative_error(&run("twice", &["run=0.5", "run=0.5"], &[]).0, &full) < 1e-4);
    assert!(relative_error(&run("undone", &["run", "run=-1"], &[]).0, &base) < 1e-4);
    let model = tiny_sd();
    let typo = [
        "sample",
        "--model",
        model.to_str().unwrap(),
        "--prompt",
        "x",
        "--output",
        "typo",
        "--adapter",
        "run=1,5",
    ];
    let refused = scratch.run(&typo);
    assert!(
        refused.code == 2 && refused.err.contains("expected a number for the strength, found `1,5`"),
        "{}",
        refused.err
    );
    // --with-base draws the base model's pictures from the same noise.
    let pair = [scratch.path("full/base/0000-0000.png"), scratch.path("base-only/0000-0000.png")];
    assert_eq!(largest_difference(&pair[0], &pair[1]), 0);
}

#[test]
fn given_noise_is_used_for_every_prompt_and_a_prompt_file_is_read() {
    let scratch = Scratch::new();
    let noise = hra::platform::random::normal(5, &[2, 4, 10, 14]);
    let file = [("latents".to_string(), noise.shallow_clone())];
    hra::weights::tensor_file::write(&scratch.path("noise.safetensors"), &file, &[]).unwrap();
    std::fs::write(scratch.path("prompts.txt"), "# a comment\n\na red apple\na red apple\n").unwrap();
    let more = [
        "--prompt-file",
        "prompts.txt",
        "--latents",
        "noise.safetensors",
        "--save-latents",
        "out.safetensors",
        "--height",
        "40",
        "--width",
        "56",
    ];
    sample(&scratch, "out", &more);
    let found = latents(&scratch.path("out.safetensors"));
    assert_eq!(found.size(), [4, 4, 10, 14]);
    assert!(relative_error(&found.narrow(0, 0, 2), &found.narrow(0, 2, 2)) < 1e-6);
    assert_eq!(load_rgb(&scratch.path("out/0001-0001.png")).unwrap().dimensions(), (56, 40));
}

#[test]
fn a_file_that_is_not_ours_is_never_replaced() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.path("out")).unwrap();
    std::fs::copy(root().join("assets/subjects/cat/train/00.png"), scratch.path("out/0000-0000.png"))
        .unwrap();
    let model = tiny_sd();
    let args =
        ["sample", "--model", model.to_str().unwrap(), "--steps", "1", "--prompt", "x", "--output", "out"];
    let done = scratch.run(&args);
    assert_eq!(done.code, 2);
    assert!(done.err.contains("0000-0000.png") && done.err.contains("another --output"), "{}", done.err);
}

#[test]
fn adapters_that_do_not_fit_the_model_are_refused_with_every_problem() {
    let scratch = Scratch::new();
    scratch.train("run", &["--max_train_steps", "1", "--bias", "hra_only"]);
    let model = tiny_sd();
    let path = scratch.path("run/adapter_model.safetensors");
    let file = TensorFile::open(&path).unwrap();
    let tensors: Vec<(String, Tensor)> =
        file.names().iter().map(|n| (n.clone(), file.read(n).unwrap())).collect();
    let refuse = |change: &dyn Fn(&str, &Tensor) -> Tensor, parts: &[&str]| {
        let changed: Vec<_> = tensors.iter().map(|(n, t)| (n.clone(), change(n, t))).collect();
        hra::weights::tensor_file::write(&path, &changed, &[]).unwrap();
        let args = [
            "sample",
            "--model",
            model.to_str().unwrap(),
            "--prompt",
            "x",
            "--output",
            "out",
            "--adapter",
            "run",
        ];
        let done = scratch.run(&args);
        assert_eq!(done.code, 2, "{}", done.err);
        parts.iter().for_each(|part| assert!(done.err.contains(part), "{part}: {}", done.err));
        assert!(!scratch.path("out").exists());
    };
    let is_bias = |name: &str| name.ends_with(".bias");
    refuse(
        &|n, t| if is_bias(n) { t.narrow(0, 0, 3) } else { t.shallow_clone() },
        &["14 problems", "expected a bias of shape [128]"],
    );
    refuse(&|n, t| if is_bias(n) { t * f64::NAN } else { t.shallow_clone() }, &["not finite"]);
    refuse(
        &|n, t| if is_bias(n) { t.shallow_clone() } else { t.narrow(0, 0, 5) },
        &["56 problems", "found 5"],
    );
    refuse(
        &|n, t| if is_bias(n) { t.shallow_clone() } else { t.narrow(1, 0, 3) },
        &["expected shape (d_in, 8)"],
    );
    refuse(&|n, t| if is_bias(n) { t.shallow_clone() } else { t.zeros_like() }, &["length zero"]);
}

#[test]
fn half_precision_draws_nearly_the_same_picture() {
    let scratch = Scratch::new();
    for dtype in ["f32", "bf16", "f16"] {
        let file = format!("{dtype}.safetensors");
        let told =
            sample(&scratch, dtype, &["--prompt", "a red apple", "--dtype", dtype, "--save-latents", &file]);
        // Of bf16 it depends on the CPU.
        assert!(
            dtype == "bf16" || told.contains("weights in f16, computed in f32") == (dtype == "f16"),
            "{told}"
        );
    }
    let of = |dtype: &str| latents(&scratch.path(&format!("{dtype}.safetensors")));
    assert!(relative_error(&of("bf16"), &of("f32")) < 0.1);
    assert!(relative_error(&of("f16"), &of("f32")) < 0.01);
}
