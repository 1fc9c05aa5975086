//! `hra evaluate` as a user runs it, on the embedded pictures and CLIP, against what Python makes of the same
//! (tests/fixtures/make_evaluate_fixtures.py).

use crate::support::base::root;
use crate::support::finished::Finished;
use crate::support::scratch::Scratch;
use hra::data::image::{RgbImage, load_rgb, save_png};
use image::{Rgba, RgbaImage};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// A scratch folder with `drawn/`, the cat's training pictures, and `--token` in the prompts that are beside them.
struct Bench {
    scratch: Scratch,
    expected: Value,
}

fn asset(name: &str) -> String {
    root().join("assets").join(name).to_str().unwrap().to_string()
}

impl Bench {
    fn new() -> Self {
        let text = fs::read_to_string(root().join("tests/fixtures/evaluate.json")).unwrap();
        let bench = Self { scratch: Scratch::new(), expected: serde_json::from_str(&text).unwrap() };
        fs::create_dir(bench.path("drawn")).unwrap();
        for i in 0..5 {
            let name = format!("subjects/cat/train/0{i}.png");
            fs::copy(asset(&name), bench.path(&format!("drawn/0{i}.png"))).unwrap();
        }
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path(name)
    }

    /// The prompt of a picture as it was drawn: with the rare token.
    fn prompt(&self, i: usize) -> String {
        self.expected["prompts"][i].as_str().unwrap().replace("cat", "sks cat")
    }

    /// With --clip, on the CPU.
    fn run(&self, words: &[&str]) -> Finished {
        let clip = asset("tiny-clip");
        let mut all = vec!["evaluate", "--clip", &clip, "--device", "cpu"];
        all.extend(words);
        self.scratch.run(&all)
    }

    fn json(&self, words: &[&str]) -> Value {
        let done = self.run(&[words, &["--json"]].concat());
        assert_eq!(done.code, 0, "{}", done.err);
        serde_json::from_str(&done.out).unwrap()
    }

    /// Fails unless every picture's score is what Python found, and the mean is theirs.
    fn check(&self, found: &Value, key: &str) {
        let expected: Vec<f64> =
            self.expected[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        for (i, expected) in expected.iter().enumerate() {
            let file = format!("drawn/0{i}.png");
            let pictures = found["pictures"].as_array().unwrap();
            let picture = pictures.iter().find(|p| p["file"].as_str().unwrap().ends_with(&file)).unwrap();
            let value = picture["scores"][key].as_f64().unwrap_or_else(|| panic!("no {key} of {file}"));
            assert!((value - expected).abs() < 1e-4, "{key} of {file}: found {value}, expected {expected}");
        }
        assert_eq!(found["counts"][key], expected.len(), "{key}");
    }
}

/// Boxes on the real pictures, at half their size, with another ending's name.
fn write_masks(dir: &Path) {
    fs::create_dir(dir).unwrap();
    for i in 0..5 {
        let (width, height) =
            load_rgb(Path::new(&asset(&format!("subjects/cat/held_out/0{i}.png")))).unwrap().dimensions();
        let (width, height) = (width / 2, height / 2);
        let inside =
            |x, y| (width / 4..width * 3 / 4).contains(&x) && (height / 8..height * 7 / 8).contains(&y);
        let mask =
            RgbImage::from_fn(width, height, |x, y| if inside(x, y) { [255; 3] } else { [0; 3] }.into());
        mask.save(dir.join(format!("0{i}.bmp"))).unwrap();
    }
}

#[test]
fn every_score_of_clip_is_pythons() {
    let bench = Bench::new();
    for i in 0..5 {
        fs::write(bench.path(&format!("drawn/0{i}.txt")), format!(" {}\n", bench.prompt(i))).unwrap();
    }
    write_masks(&bench.path("masks"));
    let (real, others) = (asset("subjects/cat/held_out"), asset("subjects/robot/train"));
    let words = ["drawn", "--real", &real, "--look-alikes", &others, "--masks", "masks", "--token", "sks"];
    let found = bench.json(&words);
    let keys = ["clip_i", "clip_t", "subject_clip_i", "background_clip_i", "identity_top1", "identity_map"];
    keys.iter().for_each(|key| bench.check(&found, key));
    let mut all: Vec<&str> = found["scores"].as_object().unwrap().keys().map(String::as_str).collect();
    all.retain(|key| !keys.contains(key));
    assert_eq!(all, ["diversity_clip"]);
    assert_eq!(found["counts"]["diversity_clip"], 2);
    assert_eq!((&found["real"]["pictures"], &found["look_alikes"]["pictures"]), (&5.into(), &4.into()));

    // Means are over prompts, of the means of their pictures.
    let expected = |key: &str, i: usize| bench.expected[key][i].as_f64().unwrap();
    let mean = |key: &str| {
        let of =
            |places: &[usize]| places.iter().map(|i| expected(key, *i)).sum::<f64>() / places.len() as f64;
        (of(&[0, 4]) + of(&[1, 2, 3])) / 2.0
    };
    for key in keys {
        assert!((found["scores"][key].as_f64().unwrap() - mean(key)).abs() < 1e-4, "{key}");
    }
    for (place, prompt) in [(0, bench.prompt(0)), (1, bench.prompt(1))] {
        let scored = &found["prompts"][place];
        assert_eq!(scored["prompt"], prompt.as_str(), "in the order of the pictures");
        let diversity = bench.expected["diversity_clip"][&prompt.replace("sks ", "")].as_f64().unwrap();
        assert!((scored["scores"]["diversity_clip"].as_f64().unwrap() - diversity).abs() < 1e-4);
    }
    // The same boxes in one colour on a transparent layer.
    for i in 0..5 {
        let mask = bench.path(&format!("masks/0{i}.bmp"));
        let boxes = load_rgb(&mask).unwrap();
        let layer = RgbaImage::from_fn(boxes.width(), boxes.height(), |x, y| {
            Rgba([0, 0, 0, boxes.get_pixel(x, y).0[0]])
        });
        fs::remove_file(&mask).unwrap();
        layer.save(mask.with_extension("png")).unwrap();
    }
    assert_eq!(bench.json(&words)["scores"], found["scores"]);
    // The token changes what CLIP reads.
    let with_token = bench.json(&words[..words.len() - 2]);
    let clip_t = |found: &Value| found["pictures"][0]["scores"]["clip_t"].as_f64().unwrap();
    assert!((clip_t(&with_token) - clip_t(&found)).abs() > 1e-3);
}

#[test]
fn prompts_come_from_flags_files_and_the_pictures_themselves() {
    let bench = Bench::new();
    let prompts: Vec<String> = (0..5).map(|i| bench.prompt(i)).collect();
    fs::write(bench.path("prompts.txt"), format!("# in order\n\n{}\n", prompts.join("\n"))).unwrap();
    let found = bench.json(&["drawn", "--prompt-file", "prompts.txt", "--token", "SKS"]);
    bench.check(&found, "clip_t");

    // As hra, as A1111 writes them; one has none and is scored without.
    for (i, key, end) in [
        (0, "prompt", ""),
        (1, "parameters", "\nNegative prompt: dog\nSteps: 3, Sampler: x"),
        (2, "parameters", "\nSteps: 3"),
    ] {
        let path = bench.path(&format!("drawn/0{i}.png"));
        let text = format!("{}{end}", prompts[i]);
        save_png(&path, &load_rgb(&path).unwrap(), &[(key.to_string(), text)]).unwrap();
    }
    fs::write(bench.path("drawn/03.txt"), &prompts[3]).unwrap();
    // Not a picture of its own: what `hra sample` puts beside them.
    let grid = [("software".to_string(), "hra".to_string()), ("prompt".to_string(), "all".to_string())];
    save_png(&bench.path("drawn/grid.png"), &RgbImage::new(9, 9), &grid).unwrap();
    let done = bench.run(&["drawn", "--token", "sks", "--json"]);
    assert!(done.err.contains("1 of 5 pictures come without a prompt"), "{}", done.err);
    let found: Value = serde_json::from_str(&done.out).unwrap();
    let pictures = found["pictures"].as_array().unwrap();
    let told = |i: usize| {
        pictures.iter().find(|p| p["file"].as_str().unwrap().ends_with(&format!("0{i}.png"))).unwrap()
    };
    (0..4).for_each(|i| assert_eq!(told(i)["prompt"], prompts[i].as_str()));
    assert!(told(4)["prompt"].is_null() && told(4)["scores"].as_object().unwrap().is_empty());
    assert_eq!((pictures.len(), &found["counts"]["clip_t"]), (5, &4.into()));

    let short = bench.run(&["drawn/00.png", "drawn/01.png", "--prompt-file", "prompts.txt"]);
    assert!(short.code == 2 && short.err.contains("each of 2 pictures, found 5"), "{}", short.err);
}

#[test]
fn drift_needs_no_tower_and_counterparts_by_name() {
    let bench = Bench::new();
    fs::remove_file(bench.path("drawn/04.png")).unwrap();
    let base = asset("subjects/robot/train");
    let found = bench.json(&["drawn", "--base", &base, "--prompt", "x"]);
    ["drift", "drift_clip"].iter().for_each(|key| bench.check(&found, key));
    let alone = bench.scratch.ok(&["evaluate", "drawn", "--base", &base, "--json"]);
    let alone: Value = serde_json::from_str(&alone.out).unwrap();
    bench.check(&alone, "drift");
    assert_eq!(alone["scores"].as_object().unwrap().len(), 1);
    fs::copy(bench.path("drawn/00.png"), bench.path("drawn/other.png")).unwrap();
    let missing = bench.scratch.run(&["evaluate", "drawn", "--base", &base]);
    assert!(missing.code == 2 && missing.err.contains("other.png beside"), "{}", missing.err);
}

#[test]
fn the_table_and_the_csv_file_say_what_the_json_says() {
    let bench = Bench::new();
    let real = asset("subjects/cat/held_out");
    let words = ["drawn", "--real", &real, "--prompt", "a \"sks\", cat", "--csv", "scores.csv"];
    let found = bench.json(&words);
    let done = bench.run(&words);
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(
        done.out.starts_with("5 pictures, 1 prompt, 5 real pictures, 0 look-alikes\ntowers: clip "),
        "{}",
        done.out
    );
    let row = done.out.lines().find(|line| line.starts_with("CLIP-I ")).unwrap();
    let cells: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(cells[1], format!("{:.4}", found["scores"]["clip_i"].as_f64().unwrap()));
    assert_eq!(cells[2..], ["5", "pictures", "higher"]);
    let csv = fs::read_to_string(bench.path("scores.csv")).unwrap();
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!((lines[0], lines.len()), ("file,prompt,clip_i,clip_t,diversity_clip", 6));
    let cells: Vec<&str> = lines[3].split(',').collect();
    assert_eq!(cells[..3], ["drawn/02.png", "\"a \"\"sks\"\"", " cat\""]);
    let scores = &found["pictures"][2]["scores"];
    for (cell, value) in
        [(3, &scores["clip_i"]), (4, &scores["clip_t"]), (5, &found["scores"]["diversity_clip"])]
    {
        assert_eq!(cells[cell].parse::<f64>().unwrap(), value.as_f64().unwrap());
    }
}

#[test]
fn a_prompt_and_a_file_that_begin_like_formulas_are_text_in_the_csv_file() {
    let bench = Bench::new();
    for name in ["=1+1.png", "@2.png"] {
        fs::copy(bench.path("drawn/00.png"), bench.path(name)).unwrap();
    }
    fs::write(bench.path("prompts"), "=HYPERLINK(\"https://example.org\";\"cat\")\n-1 cat\n").unwrap();
    let done = bench.run(&["=1+1.png", "@2.png", "--prompt-file", "prompts", "--csv", "scores.csv"]);
    assert_eq!(done.code, 0, "{}", done.err);
    let mut reader = csv::Reader::from_path(bench.path("scores.csv")).unwrap();
    let rows: Vec<csv::StringRecord> = reader.records().map(|row| row.unwrap()).collect();
    let texts = |row: &csv::StringRecord| [row[0].to_string(), row[1].to_string()];
    assert_eq!(texts(&rows[0]), ["'=1+1.png", "'=HYPERLINK(\"https://example.org\";\"cat\")"]);
    assert_eq!(texts(&rows[1]), ["'@2.png", "'-1 cat"]);
    assert!(rows.iter().all(|row| row[2].parse::<f64>().is_ok()), "scores stay numbers");
}

#[test]
fn real_pictures_that_were_drawn_from_are_told() {
    let bench = Bench::new();
    let (train, held_out) = (asset("subjects/cat/train"), asset("subjects/cat/held_out"));
    let same = bench.run(&["drawn/01.png", "--real", &train]);
    assert!(
        same.err.contains("drawn/01.png and the real picture") && same.err.contains("pixel by pixel"),
        "{}",
        same.err
    );
    assert_eq!(same.err.matches("warning").count(), 1);
    assert!(!bench.run(&["drawn", "--real", &held_out]).err.contains("warning"));
}

#[test]
fn what_is_missing_is_told_before_or_instead_of_scores() {
    let bench = Bench::new();
    let real = asset("subjects/cat/held_out");
    let refused = |done: Finished, parts: &[&str]| {
        assert_eq!((done.code, done.out.as_str()), (2, ""), "{}", done.err);
        parts.iter().for_each(|part| assert!(done.err.contains(part), "expected `{part}` in: {}", done.err));
    };
    refused(
        bench.scratch.run(&["evaluate", "drawn", "--real", &real]),
        &["nothing to score with", "--clip", "--base"],
    );
    refused(bench.run(&["drawn"]), &["nothing could be scored", "--real"]);
    refused(bench.run(&["nowhere"]), &["nowhere"]);
    refused(bench.run(&["drawn", "--masks", "drawn"]), &["--real"]);
    fs::create_dir(bench.path("masks")).unwrap();
    fs::copy(bench.path("drawn/00.png"), bench.path("masks/00.png")).unwrap();
    refused(
        bench.run(&["drawn", "--real", &real, "--masks", "masks"]),
        &["expected a mask 01.png", "held_out/01.png"],
    );
    fs::write(bench.path("text.png"), "no picture").unwrap();
    refused(bench.run(&["text.png", "--real", &real]), &["text.png", "PNG"]);
    let lpips = ["evaluate", "drawn", "--real", &real, "--lpips-alex", "none.safetensors"];
    refused(bench.scratch.run(&lpips), &["none.safetensors", "tools/lpips_to_safetensors.py alex"]);
}

#[test]
fn each_tower_gives_its_own_scores_and_the_first_one_says_who_is_who() {
    let bench = Bench::new();
    write_masks(&bench.path("masks"));
    let (real, others) = (asset("subjects/cat/held_out"), asset("subjects/robot/train"));
    let tower = |name: &str| root().join("tests/fixtures/towers").join(name).to_str().unwrap().to_string();
    let (clip, dino, dinov2) = (asset("tiny-clip"), tower("dino"), tower("dinov2"));
    let score = |towers: &[&str]| -> Value {
        let words = [
            "evaluate",
            "drawn",
            "--real",
            &real,
            "--look-alikes",
            &others,
            "--masks",
            "masks",
            "--prompt",
            "x",
        ];
        let done = bench.scratch.ok(&[&words, towers, &["--device", "cpu", "--json"]].concat());
        serde_json::from_str(&done.out).unwrap()
    };
    let all = score(&["--clip", &clip, "--dino", &dino, "--dinov2", &dinov2]);
    let keys: Vec<&str> = all["scores"].as_object().unwrap().keys().map(String::as_str).collect();
    let expected = [
        "background_clip_i",
        "background_dino",
        "clip_i",
        "clip_t",
        "dino",
        "dinov2",
        "diversity_clip",
        "identity_map",
        "identity_top1",
        "subject_clip_i",
        "subject_dino",
    ];
    assert_eq!(keys, expected);
    let alone = [
        (score(&["--clip", &clip]), "clip_i"),
        (score(&["--dino", &dino]), "dino"),
        (score(&["--dinov2", &dinov2]), "dinov2"),
    ];
    for (found, key) in &alone {
        assert_eq!(found["scores"][key], all["scores"][key], "{key} does not depend on other towers");
    }
    let identity = |found: &Value| found["scores"]["identity_map"].as_f64().unwrap();
    let [clip_only, dino_only, dinov2_only] = [0, 1, 2].map(|i| identity(&alone[i].0));
    assert!(clip_only != dino_only && dino_only != dinov2_only, "{clip_only} {dino_only} {dinov2_only}");
    assert_eq!(identity(&all), dino_only);
    assert_eq!(identity(&score(&["--clip", &clip, "--dinov2", &dinov2])), dinov2_only);
    let towers = |i: usize| alone[i].0["towers"].as_str().unwrap();
    assert_eq!(all["towers"], [towers(0), towers(1), towers(2)].join(", "));
    assert!(towers(0).starts_with("clip ") && towers(2).starts_with("dinov2 "));
}
