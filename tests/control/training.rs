//! Training control through the real binary, on pairs of the embedded set and the smallest stored model: exact resume, what
//! trains with which method, captions left out, previews, held-out loss, going on from a run, and what is refused.

use crate::support::base::root;
use crate::support::error::relative_error;
use crate::support::finished::Finished;
use crate::support::records::records;
use crate::support::scratch::Scratch;
use hra::data::image::{Grid, GridRow, RgbImage, load_rgb, resize_nearest};
use hra::data::pairs::{ConditionKind, PairFolder, PairSettings};
use hra::data::{Crop, Window};
use hra::platform::observer::Silent;
use hra::weights::tensor_file::TensorFile;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// Pixels of the squares, the model's own size.
const SIZE: u32 = 32;
const ENCODER: &str = "control_encoder/diffusion_pytorch_model.safetensors";
const ADAPTER: &str = "adapter_model.safetensors";

fn model() -> PathBuf {
    root().join("tests/fixtures/cases/sd15/pipeline")
}

fn word(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Rows of the embedded pairs, with whole paths.
fn rows(part: &str, count: usize) -> Vec<Value> {
    let folder = root().join("assets/control").join(part);
    let table = fs::read_to_string(folder.join("metadata.jsonl")).unwrap();
    let whole = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        let path = |key: &str| folder.join(row[key].as_str().unwrap());
        json!({"file_name": path("file_name"), "text": row["text"], "conditioning_image": path("conditioning_image")})
    };
    table.lines().take(count).map(whole).collect()
}

/// `rows` as a table in the folder `name`; its path.
fn table(scratch: &Scratch, name: &str, rows: &[Value]) -> PathBuf {
    let folder = scratch.path(name);
    fs::create_dir_all(&folder).unwrap();
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    fs::write(folder.join("metadata.jsonl"), lines.join("\n")).unwrap();
    folder
}

/// Flags of a short run on five pairs with their maps; what `more` gives is not given twice.
fn flags(scratch: &Scratch, out: &str, more: &[&str]) -> Vec<String> {
    let pairs = table(scratch, "pairs", &rows("train", 5));
    let mut all: Vec<String> = vec!["train".into()];
    let has_no_rank = more.iter().any(|word| ["none", "full"].contains(word));
    for (flag, value) in [
        ("--pretrained_model_name_or_path", word(&model())),
        ("--train_data_dir", word(&pairs)),
        ("--condition", "segmentation"),
        ("--output_dir", out),
        ("--rank", "4"),
        ("--learning_rate", "1e-2"),
        ("--log_every", "1"),
        ("--train_batch_size", "2"),
        ("--max_train_steps", "2"),
    ] {
        let given = more.contains(&flag) || flag == "--rank" && has_no_rank;
        if !given {
            all.extend([flag.to_string(), value.to_string()]);
        }
    }
    all.extend(more.iter().map(|s| s.to_string()));
    all
}

fn run(scratch: &Scratch, out: &str, more: &[&str]) -> Finished {
    scratch.run(&flags(scratch, out, more).iter().map(String::as_str).collect::<Vec<_>>())
}

fn train(scratch: &Scratch, out: &str, more: &[&str]) -> PathBuf {
    let done = run(scratch, out, more);
    assert_eq!(done.code, 0, "{}", done.err);
    scratch.path(out)
}

/// Whether two runs have the same bytes of a file.
fn same(file: &str, a: &Path, b: &Path) -> bool {
    fs::read(a.join(file)).unwrap() == fs::read(b.join(file)).unwrap()
}

fn tensors(path: &Path) -> Vec<(String, Tensor)> {
    let file = TensorFile::open(path).unwrap();
    file.names().iter().map(|name| (name.clone(), file.read(name).unwrap())).collect()
}

/// Final latents of `hra sample` from one seed.
fn draw(scratch: &Scratch, out: &str, more: &[&str]) -> Tensor {
    let latents = format!("{out}.safetensors");
    let model = model();
    let own =
        ["sample", "--model", word(&model), "--prompt", "a red apple", "--steps", "3", "--guidance", "4"];
    let place = ["--output", out, "--save-latents", &latents];
    scratch.ok(&[&own[..], &place[..], more].concat());
    TensorFile::open(&scratch.path(&latents)).unwrap().read("latents").unwrap()
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_bit_for_bit() {
    let scratch = Scratch::new();
    let pictures: Vec<Value> =
        rows("train", 5).iter().map(|r| json!({"file_name": r["file_name"], "text": r["text"]})).collect();
    let pairs = table(&scratch, "pictures", &pictures);
    let held_out = table(&scratch, "held-out", &pictures[3..]);
    // Everything that has state or draws of its own; edges are made.
    let more = [
        ["--train_data_dir", word(&pairs)],
        ["--condition", "canny"],
        ["--canny_low", "50"],
        ["--held_out_data_dir", word(&held_out)],
        ["--proportion_empty_prompts", "0.5"],
        ["--control_lr", "3e-2"],
        ["--gradient_accumulation_steps", "2"],
        ["--hra_lambda", "1e-3"],
        ["--checkpointing_steps", "3"],
        ["--validation_steps", "3"],
        ["--validation_inference_steps", "2"],
        ["--num_validation_images", "1"],
    ];
    let more = [more.as_flattened(), &["--use_ema", "--train_text_encoder"]].concat();
    let whole = train(&scratch, "whole", &[&more[..], &["--max_train_steps", "6"]].concat());
    let parts = train(&scratch, "parts", &[&more[..], &["--max_train_steps", "3"]].concat());
    let stopped = parts.join("checkpoints/step-000003");
    assert!(same(ADAPTER, &stopped, &whole.join("checkpoints/step-000003")));
    scratch.ok(&["train", "--resume", "latest", "--output_dir", "parts", "--max_train_steps", "6"]);
    let text = format!("text_encoder/{ADAPTER}");
    for file in [ADAPTER, &text, ENCODER, "control_encoder/config.json"] {
        assert!(same(file, &parts, &whole), "{file}");
        assert!(stopped.join(file).is_file(), "{file} is in checkpoints too");
    }
    assert!(!same(ENCODER, &stopped, &whole), "the encoder still moved");
    assert_eq!(records(&parts), records(&whole));

    let config: Value =
        serde_json::from_str(&fs::read_to_string(whole.join("control_encoder/config.json")).unwrap())
            .unwrap();
    let expected = json!({
        "_class_name": "ControlNetConditioningEmbedding",
        "conditioning_channels": 3,
        "block_out_channels": [16, 32, 96],
        "conditioning_embedding_channels": 12,
        "condition": "canny",
        "canny_thresholds": [50.0, 200.0],
    });
    assert_eq!(config, expected);
    let losses: Vec<Option<f64>> = records(&whole).iter().map(|r| r["held_out_loss"].as_f64()).collect();
    assert!(losses.iter().map(Option::is_some).eq([false, false, true, false, false, true]), "{losses:?}");
    assert_ne!(losses[2], losses[5]);
}

#[test]
fn every_method_trains_the_encoder_and_its_own_weights_and_is_drawn() {
    let scratch = Scratch::new();
    let condition = root().join("assets/control/held_out/segmentation/0000.png");
    let size = ["--width", "32", "--height", "32"];
    let base = draw(&scratch, "base", &size);
    let ways: [(&str, &[&str], &[&str]); 5] = [
        ("none", &["--method", "none"], &[]),
        ("hra", &["--method", "hra"], &[ADAPTER]),
        (
            "full",
            &["--method", "full", "--learning_rate", "1e-3"],
            &["unet/diffusion_pytorch_model.safetensors"],
        ),
        ("lora", &["--method", "lora", "--bias", "all"], &[ADAPTER]),
        ("text", &["--train_text_encoder"], &[ADAPTER, "text_encoder/adapter_model.safetensors"]),
    ];
    for (name, more, own) in ways {
        let done = run(&scratch, name, more);
        assert_eq!(done.code, 0, "{name}: {}", done.err);
        assert!(done.err.contains("and in the control encoder"), "{name}: {}", done.err);
        let folder = scratch.path(name);
        for file in [&[ENCODER, "control_encoder/config.json"], own].concat() {
            assert!(folder.join(file).is_file(), "{name}: {file}");
        }
        assert_eq!(folder.join("adapter_config.json").exists(), own.contains(&ADAPTER), "{name}");
        let trained = tensors(&folder.join(ENCODER));
        assert_eq!(trained.len(), 12, "six convolutions");
        let (_, last) = trained.iter().find(|(name, _)| name == "conv_out.weight").unwrap();
        assert!(last.abs().max().double_value(&[]) > 1e-3, "{name}: it left zero");

        let latents = |what: &str, more: &[&str]| {
            let given = ["--adapter", name, "--control", word(&condition)];
            draw(&scratch, &format!("{name}-{what}"), &[&given[..], &size, more].concat())
        };
        let (whole, without) = (latents("whole", &[]), latents("without", &["--control-scale", "0"]));
        assert!(relative_error(&whole, &without) > 1e-4, "{name}: the condition steers");
        assert_eq!(without == base, name == "none", "{name}: what is left without the condition");
        // The base model's picture is drawn without the encoder, which is not the base model's.
        assert!(relative_error(&latents("beside", &["--with-base"]), &whole) < 1e-5, "{name}");
        let pixels = |path: String| load_rgb(&scratch.path(&path)).unwrap();
        let beside = pixels(format!("{name}-beside/base/0000-0000.png"));
        let difference = |a: &RgbImage| a.iter().zip(beside.iter()).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(difference(&pixels("base/0000-0000.png".into())) <= Some(1), "{name}");
    }
    let note = scratch.ok(&[
        "sample",
        "--model",
        word(&model()),
        "--adapter",
        "none",
        "--prompt",
        "x",
        "--steps",
        "1",
        "--output",
        "x",
    ]);
    assert!(note.err.contains("control_encoder is not used: no --control IMAGE is given"), "{}", note.err);
}

#[test]
fn a_caption_that_is_left_out_is_an_empty_caption() {
    let scratch = Scratch::new();
    let mut silent = rows("train", 5);
    silent.iter_mut().for_each(|row| row["text"] = "".into());
    let silent = table(&scratch, "silent", &silent);
    let all = train(&scratch, "all", &["--proportion_empty_prompts", "1"]);
    let none = train(&scratch, "none", &["--proportion_empty_prompts", "0"]);
    let half = train(&scratch, "half", &["--proportion_empty_prompts", "0.5", "--max_train_steps", "6"]);
    let plain = train(&scratch, "plain", &["--max_train_steps", "6"]);
    let empty = train(&scratch, "empty", &["--train_data_dir", word(&silent)]);
    for file in [ADAPTER, ENCODER] {
        assert!(same(file, &all, &empty), "{file}");
        assert!(!same(file, &all, &none) && !same(file, &half, &plain), "{file}");
    }
}

#[test]
fn the_encoder_has_a_learning_rate_of_its_own() {
    let scratch = Scratch::new();
    let of = |out: &str, more: &[&str]| train(&scratch, out, &[more, &["--max_train_steps", "1"]].concat());
    let (plain, same_rate) = (of("plain", &[]), of("same", &["--control_lr", "1e-2"]));
    let faster = of("faster", &["--control_lr", "2e-2"]);
    assert!(same(ENCODER, &plain, &same_rate) && same(ADAPTER, &plain, &same_rate));
    assert!(same(ADAPTER, &plain, &faster), "after one step, that of the adapter is as it was");
    let last = |run: &Path| TensorFile::open(&run.join(ENCODER)).unwrap().read("conv_out.weight").unwrap();
    assert!(
        relative_error(&last(&faster), &(last(&plain) * 2.0)) < 1e-4,
        "Adam's first step is the rate itself"
    );
}

/// The condition of a pair as training shows it.
fn shown(pairs: &Path, index: usize) -> RgbImage {
    let settings = PairSettings { condition: ConditionKind::Segmentation, ..PairSettings::default() };
    let pairs = PairFolder::read(pairs, &settings, &Silent).unwrap();
    let window: Window = pairs.crop_window(index, SIZE, Crop::Center);
    pairs.prepare(index, SIZE, window).unwrap().1
}

#[test]
fn previews_stand_beside_their_conditions_and_disturb_nothing() {
    let scratch = Scratch::new();
    let held_out = rows("held_out", 6);
    let captions: Vec<&str> = held_out.iter().map(|row| row["text"].as_str().unwrap()).collect();
    let place = table(&scratch, "held-out", &held_out);
    let (first, second) = (
        held_out[0]["conditioning_image"].as_str().unwrap(),
        held_out[1]["conditioning_image"].as_str().unwrap(),
    );
    let look =
        ["--validation_steps", "1", "--validation_inference_steps", "2", "--num_validation_images", "2"];
    let plain = train(&scratch, "plain", &[]);
    let of_pairs =
        train(&scratch, "pairs-run", &[&look[..], &["--held_out_data_dir", word(&place)]].concat());
    let prompts = ["--validation-prompt", "a cat", "--validation-prompt", "a dog"];
    let images = ["--validation-image", first, "--validation-image", second];
    let of_prompts = train(&scratch, "prompts-run", &[&look[..], &prompts, &images].concat());
    let one_image = train(&scratch, "image-run", &[&look[..], &prompts, &images[..2]].concat());
    for run in [&of_pairs, &of_prompts, &one_image] {
        assert!(same(ENCODER, run, &plain) && same(ADAPTER, run, &plain), "{}", run.display());
    }

    // Classes keep their colours.
    let asked = |path: &str| resize_nearest(&load_rgb(Path::new(path)).unwrap(), SIZE, SIZE);
    let of_held_out = (0..4).map(|i| (captions[i], shown(&place, i))).collect::<Vec<_>>();
    let of_images = vec![("a cat", asked(first)), ("a dog", asked(second))];
    let of_one = vec![("a cat", asked(first)), ("a dog", asked(first))];
    for (run, rows) in [(of_pairs, of_held_out), (of_prompts, of_images), (one_image, of_one)] {
        for step in ["step-000001", "step-000002"] {
            let folder = run.join("samples").join(step);
            let row = |(p, (label, condition)): (usize, &(&str, RgbImage))| {
                let drawn = (0..2).map(|i| load_rgb(&folder.join(format!("{p:04}-{i:04}.png"))).unwrap());
                GridRow {
                    label: label.to_string(),
                    images: std::iter::once(condition.clone()).chain(drawn).collect(),
                }
            };
            let columns = ["condition", "seed 0", "seed 1"].map(String::from).to_vec();
            let expected = Grid { columns, rows: rows.iter().enumerate().map(row).collect() };
            assert!(load_rgb(&folder.join("grid.png")).unwrap() == expected.render(), "{}", folder.display());
        }
    }
}

#[test]
fn the_held_out_loss_sees_the_conditions() {
    let scratch = Scratch::new();
    let rows = rows("held_out", 3);
    let mut swapped = rows.clone();
    for (i, row) in swapped.iter_mut().enumerate() {
        row["conditioning_image"] = rows[(i + 1) % 3]["conditioning_image"].clone();
    }
    let loss = |out: &str, rows: &[Value]| {
        let place = table(&scratch, &format!("{out}-pairs"), rows);
        let look =
            ["--validation_steps", "2", "--validation_inference_steps", "1", "--num_validation_images", "1"];
        let more = ["--held_out_data_dir", word(&place), "--control_lr", "3e-2"];
        let folder = train(&scratch, out, &[&more[..], &look].concat());
        records(&folder)[1]["held_out_loss"].as_f64().unwrap()
    };
    let (own, others) = (loss("own", &rows), loss("others", &swapped));
    assert!(own > 0.0 && (own - others).abs() > 1e-6 * own, "{own} {others}");
    assert_eq!(own, loss("again", &rows));
}

#[test]
fn a_run_starts_from_another_control_run_and_from_nothing_else() {
    let scratch = Scratch::new();
    let first = train(&scratch, "first", &["--learning_rate", "1e-2", "--train_text_encoder"]);
    let still =
        ["--init_adapter", "first", "--learning_rate", "1e-9", "--adam_weight_decay", "0", "--seed", "9"];
    let second = train(
        &scratch,
        "second",
        &[&still[..], &["--train_text_encoder", "--max_train_steps", "1"]].concat(),
    );
    for file in [ADAPTER, "text_encoder/adapter_model.safetensors", ENCODER] {
        let (before, after) = (tensors(&first.join(file)), tensors(&second.join(file)));
        assert_eq!(before.len(), after.len());
        for ((name, a), (_, b)) in before.iter().zip(&after) {
            assert!(relative_error(b, a) < 1e-6, "{file} {name}");
        }
    }
    let told = run(&scratch, "x", &["--init_adapter", "first"]).err;
    assert!(told.contains("the adapter has one for the text encoder: give --train_text_encoder"), "{told}");
    let model = model();
    let cat = root().join("assets/subjects/cat/train");
    let subject = |out: &str, more: &[&str]| {
        let own = [
            "train",
            "--model",
            word(&model),
            "--instance_data_dir",
            word(&cat),
            "--instance_prompt",
            "a sks cat",
        ];
        scratch
            .run(&[&own[..], &["--output_dir", out, "--rank", "4", "--max_train_steps", "1"], more].concat())
    };
    train(&scratch, "control", &[]);
    let told = subject("x", &["--init_adapter", "control"]).err;
    assert!(told.contains("the adapter has one for conditions: give --train_data_dir"), "{told}");
    assert_eq!(subject("cat", &[]).code, 0);
    let told = run(&scratch, "x", &["--init_adapter", "cat"]).err;
    assert!(told.contains("the adapter has none for conditions: leave out --train_data_dir"), "{told}");
    assert!(!scratch.path("x").exists());
}

#[test]
fn bad_pairs_are_told_and_kept_in_the_run() {
    let scratch = Scratch::new();
    let mut pairs = rows("train", 4);
    pairs[1]["conditioning_image"] = "nowhere.png".into();
    pairs[2]["file_name"] = "nothing.png".into();
    let pairs = table(&scratch, "bad", &pairs);
    let done = run(&scratch, "run", &["--train_data_dir", word(&pairs)]);
    assert_eq!(done.code, 0, "{}", done.err);
    let kept = fs::read_to_string(scratch.path("run/dataset.txt")).unwrap();
    for text in [&done.err, &kept] {
        for part in [
            "2 pairs used, 2 bad",
            "conditions: segmentation; 2 pictures",
            "line 2",
            "nowhere.png",
            "line 3",
            "nothing.png",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}

#[test]
fn settings_that_contradict_each_other_are_refused_before_anything_is_written() {
    let scratch = Scratch::new();
    let cat = root().join("assets/subjects/cat/train");
    let condition = root().join("assets/control/held_out/segmentation/0000.png");
    let palette = root().join("assets/control/palette.json");
    let image = ["--validation-image", word(&condition)];
    let prompt = ["--validation-prompt", "x"];
    let counts = "validation_image: expected one for each validation_prompt, or one for all";
    let refused: [(&[&str], &str); 13] = [
        (&["--instance_data_dir", word(&cat)], "train_data_dir has pictures and captions of its own"),
        (&["--instance_prompt", "a cat"], "train_data_dir has pictures and captions of its own"),
        (&["--with_prior_preservation", "--class_prompt", "a cat"], "class pictures have no conditions"),
        (&image, counts),
        (&[prompt, image, image].concat(), counts),
        (&[prompt, prompt, prompt, image, image].concat(), counts),
        (&["--proportion_empty_prompts", "1.5"], "proportion_empty_prompts: expected a share, 0 to 1"),
        (
            &["--canny_low", "300"],
            "canny_low and canny_high: expected two numbers from 0 up, the first not above",
        ),
        (&["--make_conditions"], "make_conditions: expected condition = \"canny\", found \"segmentation\""),
        (
            &["--condition", "other", "--palette", word(&palette)],
            "palette: expected condition = \"segmentation\"",
        ),
        (&["--method", "none", "--train_text_encoder"], "method none trains the control encoder alone"),
        (&["--method", "none", "--init_adapter", "x"], "init_adapter: method none has no adapter"),
        (&["--train_data_dir", "nowhere"], "nowhere"),
    ];
    for (more, text) in refused {
        let done = run(&scratch, "run", more);
        assert_eq!(done.code, 2, "{more:?}: {}", done.err);
        assert!(done.err.contains(text), "{more:?}: {}", done.err);
        assert!(!scratch.path("run").exists(), "{more:?}");
    }
    let model = model();
    let idle = "only with train_data_dir";
    for more in [
        &["--method", "none"][..],
        &["--condition", "canny"],
        &["--control_lr", "1e-3"],
        &["--proportion_empty_prompts", "0.5"],
        &[&prompt[..], &image].concat(),
    ] {
        let own = [
            "train",
            "--model",
            word(&model),
            "--instance_data_dir",
            word(&cat),
            "--instance_prompt",
            "a sks cat",
        ];
        let done = scratch.run(&[&own[..], more].concat());
        assert!(done.code == 2 && done.err.replace('\n', " ").contains(idle), "{more:?}: {}", done.err);
    }
}

/// Maps of class numbers are coloured in training and in drawing, alone and in pairs, by the palette that the run keeps.
#[test]
fn a_run_keeps_the_palette_of_its_conditions_and_its_strength() {
    let scratch = Scratch::new();
    fs::write(scratch.path("palette.json"), "[[0, 0, 0], [250, 30, 30]]").unwrap();
    let labels = image::GrayImage::from_fn(64, 64, |x, _| image::Luma([u8::from(x > 20)]));
    labels.save(scratch.path("labels.png")).unwrap();
    let coloured = RgbImage::from_fn(64, 64, |x, _| image::Rgb(if x > 20 { [250, 30, 30] } else { [0; 3] }));
    coloured.save(scratch.path("coloured.png")).unwrap();
    let mut pairs = rows("train", 2);
    pairs.iter_mut().for_each(|row| row["conditioning_image"] = json!(scratch.path("labels.png")));
    let set = table(&scratch, "labels", &pairs);
    let more = ["--train_data_dir", word(&set), "--palette", "palette.json"];
    let run = train(&scratch, "run", &more);
    let again = table(&scratch, "coloured", &{
        pairs.iter_mut().for_each(|row| row["conditioning_image"] = json!(scratch.path("coloured.png")));
        pairs
    });
    let other = train(&scratch, "other", &["--train_data_dir", word(&again)]);
    assert!(same(ENCODER, &run, &other), "the same colours");
    fs::remove_file(scratch.path("palette.json")).unwrap();

    let own = |out: &str, map: &str| draw(&scratch, out, &["--adapter", "run", "--control", map]);
    assert_eq!(own("a", "labels.png"), own("b", "coloured.png"));
    let base = draw(&scratch, "base", &[]);
    let none = draw(
        &scratch,
        "none",
        &["--adapter", "run=0", "--control", "labels.png", "--width", "32", "--height", "32"],
    );
    assert!(relative_error(&none, &base) < 1e-6, "at strength 0 the control encoder is silent too");
}
