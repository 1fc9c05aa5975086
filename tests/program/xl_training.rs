//! Stable Diffusion XL, trained, controlled and compared by the real binary, on the small model of the reference case.

use crate::run_folder::leftovers;
use crate::support::base::root;
use crate::support::grown::grown_xl;
use crate::support::records::records;
use crate::support::scratch::Scratch;
use hra::weights::tensor_file::TensorFile;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// The files of a run on all three networks.
const ADAPTERS: [&str; 3] = [
    "adapter_model.safetensors",
    "text_encoder/adapter_model.safetensors",
    "text_encoder_2/adapter_model.safetensors",
];

fn word(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn pipeline(case: &TempDir) -> PathBuf {
    case.path().join("xl/pipeline")
}

/// Flags of a short training of `case`.
fn flags(scratch: &Scratch, case: &TempDir, out: &str, more: &[&str]) -> Vec<String> {
    let model = pipeline(case);
    let own = ["--pretrained_model_name_or_path", word(&model), "--resolution", "32"];
    scratch.train_flags(out, &[&own, more].concat())
}

fn train(scratch: &Scratch, case: &TempDir, out: &str, more: &[&str]) -> PathBuf {
    let all = flags(scratch, case, out, more);
    scratch.ok(&all.iter().map(String::as_str).collect::<Vec<_>>());
    scratch.path(out)
}

fn assert_same(a: &Path, b: &Path, files: &[&str]) {
    for file in files {
        assert_eq!(std::fs::read(a.join(file)).unwrap(), std::fs::read(b.join(file)).unwrap(), "{file}");
    }
}

/// Everything that has state of its own.
const WHOLE: [&str; 16] = [
    "--train_text_encoder",
    "--text_encoder_lr",
    "1e-3,2e-3",
    "--use_ema",
    "--snr_gamma",
    "5",
    "--gradient_accumulation_steps",
    "2",
    "--checkpointing_steps",
    "1",
    "--validation_prompt",
    "a cat",
    "--validation_inference_steps",
    "2",
    "--num_validation_images",
    "1",
];

fn resume(scratch: &Scratch, run: &Path) {
    scratch.ok(&["train", "--resume", "latest", "--output_dir", word(run), "--max_train_steps", "6"]);
}

#[test]
fn a_run_on_all_three_networks_goes_on_bit_for_bit() {
    let (scratch, case) = (Scratch::new(), grown_xl());
    let held_out = root().join("assets/subjects/cat/held_out");
    let more = [&WHOLE[..], &["--held_out_data_dir", word(&held_out), "--validation_steps", "2"]].concat();
    let whole = train(&scratch, &case, "whole", &more);
    let parts = train(&scratch, &case, "parts", &[&more[..], &["--max_train_steps", "4"]].concat());
    resume(&scratch, &parts);
    assert_same(&parts, &whole, &ADAPTERS);
    assert_same(&parts, &whole, &["samples/step-000006/grid.png"]);
    assert_eq!(records(&parts), records(&whole));
}

#[test]
fn a_kill_loses_only_the_steps_since_the_last_checkpoint() {
    let (scratch, case) = (Scratch::new(), grown_xl());
    let whole = train(&scratch, &case, "whole", &WHOLE);
    let all = flags(&scratch, &case, "killed", &WHOLE);
    let killed = scratch.path("killed");
    // At moments that the machine chooses: loading, training, saving.
    for millis in [400, 800, 1500] {
        let mut child = match killed.join("config.toml").is_file() {
            false => scratch.start(&all.iter().map(String::as_str).collect::<Vec<_>>()),
            true => scratch.start(&["train", "--resume", "latest", "--output_dir", word(&killed)]),
        };
        std::thread::sleep(Duration::from_millis(millis));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    match killed.join("config.toml").is_file() {
        true => resume(&scratch, &killed),
        false => drop(train(&scratch, &case, "killed", &WHOLE)),
    }
    assert_same(&killed, &whole, &ADAPTERS);
    assert_eq!(leftovers(&killed), Vec::<PathBuf>::new());
}

/// Text encoders and VAE are let go after what they make is made; the previews are drawn as if they had stayed.
#[test]
fn what_is_let_go_changes_no_picture_and_no_value() {
    let (scratch, case) = (Scratch::new(), grown_xl());
    let more = ["--validation_prompt", "a robot", "--num_validation_images", "2", "--validation_steps", "2"];
    let drawn = ["--validation_inference_steps", "3", "--validation_guidance", "4", "--seed", "7"];
    let run = train(&scratch, &case, "run", &[&more[..], &drawn].concat());
    let model = pipeline(&case);
    let flags =
        ["sample", "--model", word(&model), "--adapter", word(&run), "--prompt", "a robot", "--steps", "3"];
    let size = ["--guidance", "4", "--seed", "7", "--num-images", "2", "--width", "32", "--height", "32"];
    scratch.ok(&[&flags[..], &size, &["--output", "pictures"]].concat());
    for i in 0..2 {
        let of = |path: PathBuf| image::open(path).unwrap().to_rgb8();
        let preview = of(run.join(format!("samples/step-000006/0000-{i:04}.png")));
        let own = of(scratch.path(&format!("pictures/0000-{i:04}.png")));
        let most = preview.iter().zip(own.iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        // An adapter that trains and one that is fixed round otherwise.
        assert!(most <= 1, "{most} levels");
    }
}

/// Whole networks, and no adapter at all.
#[test]
fn full_fine_tuning_writes_a_unet_that_draws() {
    let (scratch, case) = (Scratch::new(), grown_xl());
    let run = train(
        &scratch,
        &case,
        "full",
        &["--method", "full", "--max_train_steps", "2", "--learning_rate", "1e-3"],
    );
    let model = pipeline(&case);
    let tuned = TensorFile::open(&run.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    let base = TensorFile::open(&model.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    assert_eq!(tuned.names(), base.names());
    let added = "add_embedding.linear_1.weight";
    assert!(!tuned.read(added).unwrap().equal(&base.read(added).unwrap()), "what reads the sizes trains too");
    let words =
        ["sample", "--model", word(&model), "--adapter", word(&run), "--prompt", "a cat", "--steps", "2"];
    scratch.ok(&[&words[..], &["--width", "32", "--height", "32", "--output", "out"]].concat());
}

/// Both towers have layers of one name, and a projection that the second one alone has.
#[test]
fn an_adapter_on_everything_of_both_towers_is_read_again_and_told_whole() {
    let (scratch, case) = (Scratch::new(), grown_xl());
    let pattern =
        ["--train_text_encoder", "--text_target_modules", ".*_proj.*", "--method", "lora", "--rank", "2"];
    let run = train(&scratch, &case, "run", &[&pattern[..], &["--max_train_steps", "2"]].concat());
    let model = pipeline(&case);
    let file = run.join("text_encoder_2/adapter_model.safetensors");
    let names = TensorFile::open(&file).unwrap().names();
    assert!(names.contains(&"base_model.model.text_projection.lora_A.weight".to_string()), "{names:?}");
    let count = |path: &Path, more: &[&str]| {
        let told = scratch.ok(&[&["inspect", word(path), "--json"], more].concat());
        let told: Value = serde_json::from_str(&told.out).unwrap();
        let parts = told["parts"].as_array().unwrap();
        let odd: Vec<&Value> = parts.iter().flat_map(|part| part["odd"].as_array().unwrap()).collect();
        assert!(odd.iter().all(|odd| !odd.as_str().unwrap().contains("does not have")), "{odd:?}");
        let changed = |layer: &&Value| more.is_empty() || layer["relative_change"].is_number();
        let layers = |part: &Value| part["layers"].as_array().unwrap().iter().filter(changed).count();
        parts.iter().map(layers).sum::<usize>()
    };
    let all = count(&run, &[]);
    assert_eq!(all, count(&run, &["--model", word(&model)]));
    let out = scratch.path("lora.safetensors");
    let flags = ["export", "--model", word(&model), "--adapter", word(&run), "--to", "kohya-lora"];
    scratch.ok(&[&flags[..], &["--output", word(&out)]].concat());
    assert_eq!(all, count(&out, &[]));
    assert_eq!(all, count(&out, &["--model", word(&model)]));
    let words =
        ["sample", "--model", word(&model), "--adapter", word(&run), "--prompt", "a cat", "--steps", "2"];
    scratch.ok(&[&words[..], &["--width", "32", "--height", "32", "--output", "out"]].concat());
}

#[test]
fn rates_of_other_encoders_than_the_models_are_refused_before_anything_is_made() {
    let scratch = Scratch::new();
    let all = scratch.train_flags("run", &["--train_text_encoder", "--text_encoder_lr", "1e-4,1e-5"]);
    let done = scratch.run(&all.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(done.code, 2, "{}", done.err);
    let words = "one for each of the model's 1 text encoders, found 2";
    assert!(done.err.contains(words), "{}", done.err);
    assert!(!scratch.path("run").exists());
}

#[test]
fn control_trains_and_draws() {
    let (scratch, case) = (Scratch::new(), grown_xl());
    let model = pipeline(&case);
    let pairs = root().join("assets/control/train");
    let rows = std::fs::read_to_string(pairs.join("metadata.jsonl")).unwrap();
    let whole = |line: &str| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        for key in ["file_name", "conditioning_image"] {
            row[key] = word(&pairs.join(row[key].as_str().unwrap())).into();
        }
        row.to_string()
    };
    let table = scratch.path("pairs.jsonl");
    std::fs::write(&table, rows.lines().take(4).map(whole).collect::<Vec<_>>().join("\n")).unwrap();
    let run = |out: &str, more: &[&str]| {
        let own =
            ["train", "--pretrained_model_name_or_path", word(&model), "--train_data_dir", word(&table)];
        let flags = ["--condition", "segmentation", "--resolution", "32", "--learning_rate", "1e-2"];
        let steps = ["--train_batch_size", "2", "--max_train_steps", "4", "--checkpointing_steps", "2"];
        let empty = ["--proportion_empty_prompts", "0.3", "--output_dir", out];
        scratch.ok(&[&own[..], &flags, &steps, &empty, more].concat());
        scratch.path(out)
    };
    let done = run("run", &[]);
    let other = run("text", &["--train_text_encoder"]);
    let encoder = "control_encoder/diffusion_pytorch_model.safetensors";
    for folder in [&done, &other] {
        let file = TensorFile::open(&folder.join(encoder)).unwrap();
        let last = file.read("conv_out.weight").unwrap();
        assert!(f64::try_from(last.abs().max()).unwrap() > 0.0, "the last convolution starts at zero");
    }
    assert!(other.join("text_encoder_2/adapter_model.safetensors").is_file());
    let alone = run("alone", &["--method", "none"]);
    assert!(alone.join(encoder).is_file() && !alone.join("adapter_model.safetensors").exists());
    let first = std::fs::read_to_string(&table).unwrap().lines().next().unwrap().to_string();
    let condition: Value = serde_json::from_str(&first).unwrap();
    let words =
        ["sample", "--model", word(&model), "--adapter", word(&done), "--prompt", "a cat", "--steps", "2"];
    let control = ["--control", condition["conditioning_image"].as_str().unwrap(), "--output", "out"];
    scratch.ok(&[&words[..], &control].concat());
    assert!(scratch.path("out/0000-0000.png").is_file());
}

#[test]
fn a_comparison_of_two_methods_makes_its_report() {
    let (scratch, case) = (Scratch::new(), grown_xl());
    let (model, assets) = (pipeline(&case), root().join("assets"));
    let (model, assets) = (model.display(), assets.display());
    let text = format!(
        r#"
title = "XL"
output_dir = "out"
[train]
threads = 1
[train.model]
pretrained_model_name_or_path = "{model}"
[train.data]
resolution = 32
[train.prior]
with_prior_preservation = true
num_class_images = 2
class_steps = 2
[train.schedule]
max_train_steps = 2
[train.checkpoints]
checkpointing_steps = 1
[draw]
prompts = ["a {{subject}} on a red background"]
validation_prompts = ["a {{subject}}"]
drift_prompts = ["a noto emoji of a dog face"]
num_images = 2
num_validation_images = 1
num_drift_images = 1
scheduler = "euler"
steps = 2
guidance = 3.0
[frontier]
scales = [0, 0.5, 1]
checkpoints = [2]
[classifier]
data_dir = "{assets}/control/train"
prompts = ["a noto emoji of a bird", "a noto emoji of a gorilla"]
num_pictures = 1
num_noises = 2
scales = [1]
[scores]
clip = "{assets}/tiny-clip"
[[subject]]
name = "cat"
class = "cat face"
data_dir = "{assets}/subjects/cat/train"
test_data_dir = "{assets}/subjects/cat/held_out"
instance_prompt = "a fluent 3d emoji of a {{subject}}"
class_prompt = "a fluent 3d emoji of a {{class}}"
[[method]]
label = "HRA"
adapter = {{ method = "hra", rank = 4, train_text_encoder = true }}
optimizer = {{ learning_rate = 3e-3 }}
[[method]]
label = "OFT"
adapter = {{ method = "oft", block_size = 4 }}
optimizer = {{ learning_rate = 1e-3 }}
"#
    );
    std::fs::write(scratch.path("c.toml"), text).unwrap();
    let done = scratch.ok(&["compare", "c.toml"]);
    assert!(done.out.contains("HRA") && done.out.contains("OFT"), "{}", done.out);
    let table = std::fs::read_to_string(scratch.path("out/report.csv")).unwrap();
    assert!(table.lines().count() > 2, "{table}");
    assert!(scratch.path("out/report.html").is_file());
    // The size that is told is that of all three files and their settings.
    let cells = std::fs::read_dir(scratch.path("out/cells")).unwrap().map(|cell| cell.unwrap().path());
    let cell = cells.into_iter().find(|cell| cell.join("run/text_encoder_2").is_dir()).unwrap();
    let record: Value =
        serde_json::from_str(&std::fs::read_to_string(cell.join("record.json")).unwrap()).unwrap();
    let configs = ADAPTERS.map(|file| file.replace("adapter_model.safetensors", "adapter_config.json"));
    let files = ADAPTERS.map(str::to_string).into_iter().chain(configs);
    let bytes: u64 = files.map(|file| cell.join("run").join(file).metadata().unwrap().len()).sum();
    assert_eq!(record["budget"]["bytes"], bytes);
}
