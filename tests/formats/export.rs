//! `hra export` and `hra inspect`, by the real program: each form is read back here and gives the adapter's weights.
//! What other programs make of the files is in tests/python.

use crate::support::all_cases::cases;
use crate::support::cases::Case;
use crate::support::error::relative_error;
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use hra::weights::tensor_file::TensorFile;
use std::path::Path;
use tch::Tensor;

struct Bench {
    scratch: Scratch,
    case: Case,
}

impl Bench {
    /// On the small case of a kind.
    fn new(kind: &str) -> Self {
        let case = cases().into_iter().find(|case| case.name == kind).unwrap();
        Self { scratch: Scratch::new(), case }
    }

    fn place(&self, name: &str) -> String {
        self.case.dir.join(name).to_str().unwrap().to_string()
    }

    fn path(&self, name: &str) -> String {
        self.scratch.path(name).to_str().unwrap().to_string()
    }

    /// What the program prints.
    fn export(&self, adapters: &[&str], to: &str, output: &str, more: &[&str]) -> String {
        let (model, output) = (self.place("pipeline"), self.path(output));
        let mut args = vec!["export", "--model", &model, "--to", to, "--output", &output];
        args.extend(adapters.iter().flat_map(|a| ["--adapter", a]));
        args.extend(more);
        self.scratch.ok(&args).out
    }

    /// Latents of two steps.
    fn latents(&self, model: &str, adapters: &[&str]) -> Tensor {
        let file = self.path("latents.safetensors");
        let mut args =
            vec!["sample", "--model", model, "--prompt", "a cat", "--scheduler", "ddim", "--steps", "2"];
        args.extend(["--width", "32", "--height", "32", "--save-latents", &file, "--output", "pictures"]);
        args.extend(adapters.iter().flat_map(|a| ["--adapter", a]));
        self.scratch.ok(&args);
        TensorFile::open(file.as_ref()).unwrap().read("latents").unwrap()
    }
}

/// The number after `what` in a program's output.
fn number(out: &str, what: &str) -> f64 {
    let rest = out.split(what).nth(1).unwrap_or_else(|| panic!("no `{what}` in {out}"));
    let word = rest.split_whitespace().next().unwrap();
    word.trim_end_matches([';', ',']).parse().unwrap_or_else(|_| panic!("{word} in {out}"))
}

#[test]
fn every_form_gives_the_adapters_latents_at_every_strength() {
    for (kind, adapters) in [
        ("sd15", &["hra-r4-conv=1", "hra-r4=-1", "hra-r4-gs=0.5"][..]),
        ("sd21", &["hra-r4=1.5", "lora-r4=0.25"]),
    ] {
        let bench = Bench::new(kind);
        let base = bench.latents(&bench.place("pipeline"), &[]);
        for (i, adapter) in adapters.iter().enumerate() {
            let adapter = bench.place(adapter);
            let wanted = bench.latents(&bench.place("pipeline"), &[&adapter]);
            assert!(relative_error(&wanted, &base) > 1e-3, "the adapter changes something");
            for to in [
                "peft",
                "peft-lora",
                "diffusers-lora",
                "kohya-lora.safetensors",
                "merged",
                "checkpoint.safetensors",
            ] {
                let output = format!("{i}-{to}");
                let out = bench.export(&[&adapter], to.trim_end_matches(".safetensors"), &output, &[]);
                assert!(
                    number(&out, if to.starts_with(['m', 'c']) { "tensors is" } else { "weight is" }) < 1e-4,
                    "{out}"
                );
                let written = bench.path(&output);
                let found = if to.starts_with(['m', 'c']) {
                    bench.latents(&written, &[])
                } else {
                    bench.latents(&bench.place("pipeline"), &[&written])
                };
                let error = relative_error(&found, &wanted);
                assert!(error < 1e-4, "{kind} {adapter} {to}: {error:.1e}");
            }
        }
    }
}

#[test]
fn changes_of_full_rank_become_the_best_lora_and_several_adapters_one_model() {
    let bench = Bench::new("sd15");
    let oft = bench.place("oft-b4-exact");
    let small = bench.export(&[&oft], "kohya-lora", "small.safetensors", &["--rank", "2"]);
    let large = bench.export(&[&oft], "kohya-lora", "large.safetensors", &[]);
    assert!(small.contains("rank 2 keeps") && large.contains("rank 64 keeps 100.00 %"), "{small}{large}");
    let off = |out: &str| number(out, "weight is");
    assert!(off(&large) < 1e-5 && off(&small) > 100.0 * off(&large), "{small}{large}");
    let both = [&format!("{oft}=0.8")[..], &bench.place("dora-r2")];
    bench.export(&both, "merged", "both", &[]);
    let wanted = bench.latents(&bench.place("pipeline"), &both);
    assert!(relative_error(&bench.latents(&bench.path("both"), &[]), &wanted) < 1e-4);
    let half = bench.export(
        &[&format!("{}=0.5", bench.place("hra-r4"))],
        "diffusers-lora",
        "half",
        &["--dtype", "f16"],
    );
    assert!(number(&half, "weight is") < 1e-2, "{half}");
}

#[test]
fn what_a_form_cannot_hold_is_refused_with_the_way_out() {
    let bench = Bench::new("sd15");
    let model = bench.place("pipeline");
    let refuse = |adapters: &[&str], to: &str, output: &str, parts: &[&str]| {
        let output = bench.path(output);
        let mut args = vec!["export", "--model", &model, "--to", to, "--output", &output];
        args.extend(adapters.iter().flat_map(|a| ["--adapter", a]));
        let done = bench.scratch.run(&args);
        assert_eq!(done.code, 2, "{}{}", done.out, done.err);
        parts.iter().for_each(|part| assert!(done.err.contains(part), "{part}: {}", done.err));
        assert!(!Path::new(&output).exists() || output.ends_with("there.safetensors"));
    };
    let old = bench.scratch.run(&[
        "export",
        "--model",
        &model,
        "--to",
        "peft",
        "--output",
        "x",
        "--adapter",
        "dir",
        "--strength",
        "-0.5",
    ]);
    assert!(old.code == 2 && old.err.contains("--adapter DIR=-0.5"), "{}", old.err);
    let hra = bench.place("hra-r4");
    refuse(&[&bench.place("hra-r4-bias")], "kohya-lora", "a.safetensors", &["trained biases", "--to merged"]);
    refuse(&[&hra, &hra], "peft", "b", &["expected one adapter", "hra merge"]);
    refuse(&[&format!("{}=0.5", bench.place("hra-r3"))], "peft", "c", &["determinant -1"]);
    refuse(&[&format!("{}=0.5", bench.place("dora-r2"))], "peft", "d", &["without the base model"]);
    refuse(&[&hra], "kohya-lora", "e.bin", &["ends with .safetensors"]);
    std::fs::write(bench.path("there.safetensors"), "mine").unwrap();
    refuse(&[&hra], "checkpoint", "there.safetensors", &["is there already"]);
    assert_eq!(std::fs::read(bench.path("there.safetensors")).unwrap(), b"mine");
}

#[test]
fn a_lora_says_that_it_belongs_to_another_base_model() {
    let (one, other) = (Bench::new("sd15"), tiny_sd());
    one.export(&[&one.place("hra-r4")], "kohya-lora", "lora.safetensors", &[]);
    let (lora, other) = (one.path("lora.safetensors"), other.to_str().unwrap().to_string());
    let done =
        one.scratch.run(&["sample", "--model", &other, "--adapter", &lora, "--prompt", "x", "--output", "o"]);
    assert_eq!(done.code, 2, "its shapes do not fit either: {}", done.err);
    // The same shapes with other weights: the base with an adapter merged into it.
    one.export(&[&one.place("hra-r4")], "merged", "merged", &[]);
    let merged = one.path("merged");
    let done = one.scratch.ok(&[
        "sample",
        "--model",
        &merged,
        "--adapter",
        &lora,
        "--prompt",
        "x",
        "--steps",
        "1",
        "--width",
        "32",
        "--height",
        "32",
        "--output",
        "o",
    ]);
    assert!(done.err.contains("made for another base model"), "{}", done.err);
}

#[test]
fn inspect_says_what_things_are_and_what_is_odd() {
    let bench = Bench::new("sd15");
    let (model, hra) = (bench.place("pipeline"), bench.place("hra-r4"));
    let json = |args: &[&str]| -> serde_json::Value {
        let out = bench.scratch.ok(&[&["inspect", "--json"], args].concat()).out;
        let whole: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}"));
        whole["parts"].clone()
    };
    let report = &json(&[&hra, "--model", &model])[0];
    let layers = report["layers"].as_array().unwrap();
    assert!(layers.len() > 10 && report["odd"].as_array().unwrap().is_empty(), "{report}");
    for layer in layers {
        assert!(layer["orthogonality_error"].as_f64().unwrap() < 5e-6);
        assert!(
            layer["largest_angle"].as_f64().unwrap() > 1.0
                && layer["relative_change"].as_f64().unwrap() > 0.01
        );
    }
    let text = bench.scratch.ok(&["inspect", &hra]).out;
    assert!(text.contains("HRA r 4") && text.contains("nothing odd") && text.contains("angle"), "{text}");

    bench.export(&[&hra], "kohya-lora", "lora.safetensors", &[]);
    let lora = bench.path("lora.safetensors");
    for report in [&json(&[&lora])[0], &json(&[&lora, "--model", &model])[0]] {
        assert_eq!(report["what"], "LoRA file");
        assert_eq!(report["layers"].as_array().unwrap().len(), layers.len());
    }
    let parts = json(&[&model]);
    assert_eq!(parts.as_array().unwrap().len(), 3);
    assert_eq!(parts[0]["what"], "unet");

    // A copy with a broken number and a key that is part of nothing.
    let broken = bench.scratch.path("broken");
    std::fs::create_dir(&broken).unwrap();
    std::fs::copy(Path::new(&hra).join("adapter_config.json"), broken.join("adapter_config.json")).unwrap();
    let file = TensorFile::open(&Path::new(&hra).join("adapter_model.safetensors")).unwrap();
    let mut tensors: Vec<(String, Tensor)> =
        file.names().into_iter().map(|n| (n.clone(), file.read(&n).unwrap())).collect();
    tensors[0].1 = &tensors[0].1 * f64::NAN;
    hra::weights::tensor_file::write(&broken.join("adapter_model.safetensors"), &tensors, &[]).unwrap();
    let odd = json(&["broken"])[0]["odd"].to_string();
    assert!(odd.contains("not finite") && odd.contains("cannot be used"), "{odd}");
    assert_eq!(bench.scratch.run(&["inspect", "nothing"]).code, 2);
}
