//! `hra sample --control` and `--pairs` through the real binary on the smallest stored model and its ControlNet: which condition
//! goes with which picture, names, what is written and told, and what is refused. Numbers are compared with Python's in
//! tests/python/test_control.py.

use crate::support::base::root;
use crate::support::error::relative_error;
use crate::support::finished::Finished;
use crate::support::scratch::Scratch;
use hra::data::image::png::read_png_text;
use hra::data::image::{Grid, GridRow, load_rgb, save_png};
use hra::weights::tensor_file::TensorFile;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tch::Tensor;

const SQUARE: [&str; 4] = ["--width", "64", "--height", "64"];

fn case(kind: &str, part: &str) -> String {
    root().join("tests/fixtures/cases").join(kind).join(part).to_str().unwrap().to_string()
}

/// A picture of the embedded pairs, 64 pixels wide.
fn asset(name: &str) -> String {
    root().join("assets/control/train").join(name).to_str().unwrap().to_string()
}

fn run(scratch: &Scratch, out: &str, more: &[&str]) -> Finished {
    let model = case("sd15", "pipeline");
    let own =
        ["sample", "--model", &model, "--steps", "3", "--guidance", "4", "--overwrite", "--output", out];
    scratch.run(&[&own[..], more].concat())
}

/// Final latents, and what was told.
fn draw(scratch: &Scratch, out: &str, more: &[&str]) -> (Tensor, String) {
    let latents = format!("{out}.safetensors");
    let done = run(scratch, out, &[more, &["--save-latents", &latents]].concat());
    assert_eq!(done.code, 0, "{more:?}: {}", done.err);
    (TensorFile::open(&scratch.path(&latents)).unwrap().read("latents").unwrap(), done.err)
}

/// A table of the first pairs, with the words of their captions that the small text encoder has room for.
fn table(scratch: &Scratch, name: &str, pictures: &[&str]) -> PathBuf {
    let row = |(i, picture): (usize, &&str)| {
        let condition = asset(&format!("segmentation/000{i}.png"));
        json!({"file_name": asset(picture), "text": format!("{i} red apples"), "conditioning_image": condition})
    };
    let rows: Vec<Value> = pictures.iter().enumerate().map(row).collect();
    fs::create_dir_all(scratch.path(name)).unwrap();
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    fs::write(scratch.path(name).join("metadata.jsonl"), lines.join("\n")).unwrap();
    scratch.path(name)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn pairs_are_drawn_under_their_names_with_their_conditions_or_the_next_ones() {
    let scratch = Scratch::new();
    let net = case("sd15", "controlnet");
    table(&scratch, "set", &["0000.png", "0001.png", "0002.png"]);
    let maps = [0, 1, 2].map(|i| asset(&format!("segmentation/000{i}.png")));
    let control = |i: usize, condition: usize| {
        let caption = format!("{i} red apples");
        let more = ["--controlnet", &net, "--prompt", &caption, "--control", &maps[condition]];
        draw(&scratch, "single", &[&more[..], &SQUARE].concat()).0
    };
    let pairs = |out: &str, more: &[&str]| {
        draw(&scratch, out, &[&["--pairs", "set", "--controlnet", &net], &SQUARE[..], more].concat()).0
    };
    let two = pairs("two", &["--num-pairs", "2"]);
    assert_eq!(two.size()[0], 2);
    assert_eq!(names(&scratch.path("two")), ["0000.png", "0001.png", "grid.png"]);
    let shuffled = pairs("shuffled", &["--shuffle-conditions"]);
    for i in 0..3 {
        let row = |t: &Tensor| t.narrow(0, i as i64, 1);
        if i < 2 {
            assert!(relative_error(&row(&two), &control(i, i)) < 1e-5, "pair {i}");
        }
        assert!(relative_error(&row(&shuffled), &control(i, (i + 1) % 3)) < 1e-5, "pair {i} shuffled");
        assert!(relative_error(&row(&shuffled), &control(i, i)) > 1e-3, "pair {i}: its own is another");
    }
    let _ = pairs("several", &["--num-pairs", "1", "--num-images", "2"]);
    assert_eq!(names(&scratch.path("several")), ["0000-0000.png", "0000-0001.png", "grid.png"]);

    // Settings are in the pictures, and the condition stands beside them.
    let text = read_png_text(&scratch.path("shuffled/0001.png")).unwrap();
    let get = |key: &str| text.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
    assert_eq!((get("prompt"), get("control_scale")), (Some("1 red apples"), Some("1")));
    assert_eq!((get("control_network"), get("control_passes")), (Some(net.as_str()), Some("both")));
    let row = |i: usize| {
        let drawn = load_rgb(&scratch.path(&format!("shuffled/000{i}.png"))).unwrap();
        let condition = load_rgb(Path::new(&maps[(i + 1) % 3])).unwrap();
        GridRow { label: format!("{i} red apples"), images: vec![condition, drawn] }
    };
    let grid = Grid { columns: vec!["condition".into(), "seed 0".into()], rows: (0..3).map(row).collect() };
    assert!(load_rgb(&scratch.path("shuffled/grid.png")).unwrap() == grid.render());
}

#[test]
fn edges_are_made_of_pairs_and_of_pictures() {
    let scratch = Scratch::new();
    let net = case("sd15", "controlnet");
    table(&scratch, "set", &["0000.png", "0001.png"]);
    fs::create_dir(scratch.path("photos")).unwrap();
    fs::copy(asset("0001.png"), scratch.path("photos/0001.png")).unwrap();
    scratch.ok(&["prepare", "canny", "photos", "--low", "300", "--high", "700"]);
    let draw =
        |out: &str, more: &[&str]| draw(&scratch, out, &[more, &SQUARE, &["--controlnet", &net]].concat()).0;
    let made = ["--condition", "canny", "--make-conditions", "--canny-low", "300", "--canny-high", "700"];
    let prompt = ["--prompt", "1 red apples"];
    let prepared = draw("prepared", &[&prompt[..], &["--control", "photos/canny/0001.png"]].concat());
    let picture = draw("picture", &[&prompt[..], &["--control", "photos/0001.png"], &made].concat());
    assert_eq!(picture, prepared);
    let pairs = draw("pairs", &[&["--pairs", "set"], &made[..]].concat());
    assert!(relative_error(&pairs.narrow(0, 1, 1), &prepared) < 1e-5);
    let other = draw("other", &[&prompt[..], &["--control", "photos/0001.png"], &made[..3]].concat());
    assert!(relative_error(&other, &prepared) > 1e-3, "the thresholds matter");
    let text = read_png_text(&scratch.path("picture/0000-0000.png")).unwrap();
    assert!(text.contains(&("control".into(), "edges of photos/0001.png".into())), "{text:?}");
}

#[test]
fn a_controlnet_steers_the_base_model_too() {
    let scratch = Scratch::new();
    let (net, adapter, map) =
        (case("sd15", "controlnet"), case("sd15", "hra-r4"), asset("segmentation/0000.png"));
    let control = ["--prompt", "x", "--controlnet", &net, "--control", &map];
    let _ = draw(&scratch, "both", &[&control[..], &["--adapter", &adapter, "--with-base"]].concat());
    let (steered, _) = draw(&scratch, "base", &control);
    let (plain, _) = draw(&scratch, "plain", &[&["--prompt", "x"], &SQUARE[..]].concat());
    let pixels = |name: &str| load_rgb(&scratch.path(name)).unwrap();
    assert!(pixels("both/base/0000-0000.png") == pixels("base/0000-0000.png"));
    assert!(pixels("both/0000-0000.png") != pixels("base/0000-0000.png"));
    // Without a size, that of the condition is drawn.
    assert_eq!((pixels("base/0000-0000.png").dimensions(), steered.size()), ((64, 64), vec![1, 4, 16, 16]));
    assert!(relative_error(&steered, &plain) > 1e-2);
    let (none, _) = draw(&scratch, "none", &[&control[..], &["--control-scale", "0"]].concat());
    assert_eq!(none, plain);
}

#[test]
fn captions_of_pairs_are_drawn_without_a_control_and_that_is_told() {
    let scratch = Scratch::new();
    table(&scratch, "set", &["0000.png"]);
    let (drawn, told) = draw(&scratch, "out", &["--pairs", "set"]);
    assert!(told.contains("nothing reads the conditions; the captions are drawn without them"), "{told}");
    assert_eq!(drawn, draw(&scratch, "plain", &["--prompt", "0 red apples"]).0);
}

#[test]
fn what_cannot_be_steered_is_refused_with_its_reason() {
    let scratch = Scratch::new();
    let map = asset("segmentation/0000.png");
    let (net, other) = (case("sd15", "controlnet"), case("sd21", "controlnet"));
    let encoder = case("sd15", "control_encoder");
    // A control run: no adapter, the stored encoder alone; another one of a wider model.
    for (run, kind) in [("run", "sd15"), ("wide", "sd21")] {
        let place = scratch.path(run).join("control_encoder");
        fs::create_dir_all(&place).unwrap();
        for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
            fs::copy(Path::new(&case(kind, "control_encoder")).join(file), place.join(file)).unwrap();
        }
    }
    fs::create_dir(scratch.path("t2i")).unwrap();
    fs::write(scratch.path("t2i/config.json"), "{\"_class_name\": \"T2IAdapter\"}").unwrap();
    fs::write(scratch.path("net.safetensors"), "x").unwrap();
    table(&scratch, "set", &["0000.png", "0001.png"]);
    table(&scratch, "twins", &["0000.png", "../held_out/0000.png"]);
    save_png(&scratch.path("grid.png"), &load_rgb(Path::new(&map)).unwrap(), &[]).unwrap();
    table(&scratch, "grids", &[scratch.path("grid.png").to_str().unwrap()]);

    let prompt = ["--prompt", "x"];
    let control = ["--prompt", "x", "--control", &map];
    let steered = ["--prompt", "x", "--control", &map, "--controlnet", &net];
    let refused: [(&[&str], &[&str], &str); 21] = [
        (
            &control,
            &[],
            "--control: nothing reads the condition\nhint: give --controlnet DIR, or an --adapter",
        ),
        (
            &prompt,
            &["--controlnet", &net],
            "--controlnet: expected a condition, found none\nhint: give --control IMAGE",
        ),
        (&steered, &["--adapter", "run"], "--control: expected one control, found "),
        (
            &control,
            &["--adapter", "run", "--adapter", "wide"],
            "run/control_encoder and wide/control_encoder",
        ),
        (
            &control,
            &["--adapter", "wide"],
            "expected a control encoder for 12 channels and 4 pixels a latent, found one for 8 and 4",
        ),
        (
            &control,
            &["--controlnet", &encoder],
            "hint: this is the control encoder of a run: give the run's folder with --adapter",
        ),
        (
            &control,
            &["--controlnet", "t2i"],
            "expected ControlNetModel, found T2IAdapter\nhint: T2I-Adapters and other controls",
        ),
        (
            &control,
            &["--controlnet", "net.safetensors"],
            "expected a ControlNet's Hugging Face folder, found a file",
        ),
        (
            &control,
            &["--controlnet", "set"],
            "expected a ControlNet's Hugging Face folder, found no config.json",
        ),
        (
            &control,
            &["--controlnet", &other],
            "expected a ControlNet for skip connections of [12, 12, 12, 20] channels, found one for [8",
        ),
        (
            &steered,
            &["--control", &map],
            "--control: expected one condition, or one for each of 1 prompts, found 2",
        ),
        (
            &steered,
            &["--prompt", "y", "--control", &map, "--control", &map],
            "one for each of 2 prompts, found 3",
        ),
        (
            &steered,
            &["--control-start", "0.5", "--control-end", "0.5"],
            "0 to 1, the first below the second, found 0.5 and 0.5",
        ),
        (
            &steered,
            &["--control-start", "0.9", "--control-end", "0.2"],
            "the first below the second, found 0.9 and 0.2",
        ),
        (&steered, &["--control-scale", "nan"], "--control-scale: expected a number up to 1e6, found NaN"),
        (
            &steered,
            &["--make-conditions"],
            "--make-conditions: only edges can be made, found conditions `other`",
        ),
        (
            &steered,
            &["--make-conditions", "--condition", "canny", "--canny-low", "300"],
            "--canny-low and --canny-high: expected",
        ),
        (
            &["--pairs", "twins"],
            &["--controlnet", &net],
            "--pairs: expected pictures of different names, found `0000` twice",
        ),
        (
            &["--pairs", "grids"],
            &["--controlnet", &net],
            "--pairs: a picture called `grid` would be in the way of grid.png",
        ),
        (
            &["--pairs", "set"],
            &["--num-pairs", "1", "--shuffle-conditions"],
            "--num-pairs: expected 1 or more, and 2 different pictures to shuffle",
        ),
        (&["--pairs", "set"], &["--control", &map], "cannot be used with"),
    ];
    for (given, more, text) in refused {
        let done = run(&scratch, "out", &[given, more].concat());
        assert_eq!(done.code, 2, "{more:?}: {}", done.err);
        assert!(done.err.contains(text), "{more:?}: {}", done.err);
        assert!(!scratch.path("out").exists(), "{more:?}");
    }
}

/// Conditions that `hra prepare` made, and pictures that `hra sample` drew, are inputs here.
#[test]
fn nothing_that_is_read_is_written_over() {
    let scratch = Scratch::new();
    let net = case("sd15", "controlnet");
    fs::create_dir(scratch.path("photos")).unwrap();
    fs::copy(asset("0001.png"), scratch.path("photos/0001.png")).unwrap();
    fs::write(scratch.path("photos/metadata.jsonl"), r#"{"file_name": "0001.png", "text": "a cat"}"#)
        .unwrap();
    scratch.ok(&["prepare", "canny", "photos"]);
    let edges = fs::read(scratch.path("photos/canny/0001.png")).unwrap();
    let done = run(&scratch, "photos/canny", &["--controlnet", &net, "--pairs", "photos/canny"]);
    assert_eq!((done.code, done.err.contains("written over one that is read")), (2, true), "{}", done.err);
    // Made by hra, but no drawing of its.
    fs::copy(scratch.path("photos/canny/0001.png"), scratch.path("photos/canny/0000-0000.png")).unwrap();
    let done = run(&scratch, "photos/canny", &["--prompt", "a cat"]);
    assert_eq!((done.code, done.err.contains("did not draw")), (2, true), "{}", done.err);
    assert_eq!(fs::read(scratch.path("photos/canny/0001.png")).unwrap(), edges);

    let _ = draw(&scratch, "drawn", &["--prompt", "a cat"]);
    let before = fs::read(scratch.path("drawn/0000-0000.png")).unwrap();
    let control = ["--controlnet", &net, "--control", "drawn/0000-0000.png"];
    for from in [&control[..], &["--image", "drawn/0000-0000.png"]] {
        let done = run(&scratch, "drawn", &[&["--prompt", "a dog"], from].concat());
        assert_eq!(
            (done.code, done.err.contains("written over one that is read")),
            (2, true),
            "{}",
            done.err
        );
    }
    assert_eq!(fs::read(scratch.path("drawn/0000-0000.png")).unwrap(), before);
}

#[test]
fn flags_without_an_effect_are_refused() {
    let scratch = Scratch::new();
    let idle = "no effect without conditions";
    for (flags, reason) in [
        (&["--num-pairs", "3"][..], "only with --pairs"),
        (&["--shuffle-conditions"], "only with --pairs"),
        (&["--control-scale", "0.5"], idle),
        (&["--make-conditions"], idle),
        (&["--palette", "nothing.json"], idle),
        (&["--control-start", "0.5"], idle),
    ] {
        let done = run(&scratch, "out", &[&["--prompt", "a cat"], flags].concat());
        assert_eq!((done.code, done.err.contains(reason)), (2, true), "{flags:?}: {}", done.err);
    }
}
