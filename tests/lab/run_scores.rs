//! `hra train --score` through the real binary: which pictures are drawn, which place is recommended, and what it refuses.

use crate::support::base::root;
use crate::support::finished::Finished;
use crate::support::scratch::Scratch;
use hra::data::image::load_rgb;
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

const PROMPT: &str = "a fluent 3d emoji of a sks cat face";

fn asset(name: &str) -> String {
    root().join("assets").join(name).to_str().unwrap().to_string()
}

/// What is drawn and scored, for a new run or one that goes on.
fn scoring(more: &[&str]) -> Vec<String> {
    let (clip, held_out) = (asset("tiny-clip"), asset("subjects/cat/held_out"));
    let words =
        ["--num_validation_images", "2", "--validation_inference_steps", "2", "--validation_steps", "4"];
    let pictures = ["--validation-prompt", PROMPT, "--held_out_data_dir", &held_out, "--clip", &clip];
    let drift =
        ["--drift-prompt", "a noto emoji of a dog face", "--drift-prompt", "a twemoji emoji of a pizza"];
    [&words[..], &pictures, &drift, more].concat().iter().map(|word| word.to_string()).collect()
}

/// Trains four steps with two checkpoints, and scores them.
fn trained(scratch: &Scratch, more: &[&str]) -> Finished {
    let few = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--score"];
    let words = [few.map(String::from).to_vec(), scoring(more)].concat();
    scratch.train("run", &words.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Scores the run again.
fn again(scratch: &Scratch, more: &[&str]) -> Finished {
    let run = scratch.path("run").to_str().unwrap().to_string();
    let words = ["train", "--resume", "latest", "--output_dir", &run, "--score"].map(String::from).to_vec();
    let words = [words, scoring(more)].concat();
    scratch.ok(&words.iter().map(String::as_str).collect::<Vec<_>>())
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn score(evaluation: &Value, key: &str) -> f64 {
    evaluation["scores"][key].as_f64().unwrap()
}

/// The place with the most likeness that drifts no further than `limit`, worked out here.
fn expected(evaluations: &[Value], limit: f64) -> Option<&Value> {
    let within = evaluations.iter().filter(|e| score(e, "drift") <= limit);
    within.max_by(|a, b| score(a, "clip_i").total_cmp(&score(b, "clip_i")))
}

fn same_pictures(ours: &Path, again: &Path) {
    for i in 0..2 {
        let (ours, again) = (ours.join(format!("00-{i:02}.png")), again.join(format!("0000-{i:04}.png")));
        assert!(
            load_rgb(&ours).unwrap() == load_rgb(&again).unwrap(),
            "{} {}",
            ours.display(),
            again.display()
        );
    }
}

fn folder(step: &Value, scale: &Value) -> String {
    let scale = if scale == 1.0 { String::new() } else { format!("scale-{scale}/") };
    format!("run/scores/step-{:06}/{scale}validation", step.as_i64().unwrap())
}

#[test]
fn every_checkpoint_of_a_run_is_scored_at_each_scale_and_one_is_recommended() {
    let scratch = Scratch::new();
    let told = trained(&scratch, &[]).out;
    let scored = json(&scratch.path("run/scores/scores.json"));
    let evaluations = scored["evaluations"].as_array().unwrap();
    let places: Vec<(i64, f64)> =
        evaluations.iter().map(|e| (e["step"].as_i64().unwrap(), e["scale"].as_f64().unwrap())).collect();
    assert_eq!(places, [(2, 0.5), (2, 0.75), (2, 1.0), (4, 0.5), (4, 0.75), (4, 1.0)]);
    for evaluation in evaluations {
        assert!(score(evaluation, "drift") > 0.0);
        assert_eq!(evaluation["prompts"][0]["pictures"].as_array().unwrap().len(), 2);
    }
    let limit = scored["drift_limit"].as_f64().unwrap();
    assert!((limit - 0.5 * scored["base_spread"].as_f64().unwrap()).abs() < 1e-12);
    let best = expected(evaluations, limit).unwrap();
    let recommended = json(&scratch.path("run/recommended.json"));
    assert_eq!(recommended, scored["recommended"]);
    assert_eq!((&recommended["step"], &recommended["scale"]), (&best["step"], &best["scale"]));
    assert_eq!(recommended["likeness"], best["scores"]["clip_i"]);
    assert_eq!(recommended["drift"], best["scores"]["drift"]);
    assert_eq!(scored["best"], best["step"]);
    let step = best["step"].as_i64().unwrap();
    assert_eq!(recommended["adapter"], format!("checkpoints/step-{step:06}"));
    let marked: Vec<Vec<&str>> =
        told.lines().filter(|line| line.ends_with("best")).map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(marked.len(), 1, "{told}");
    assert_eq!(
        marked[0][..2],
        [step.to_string(), best["scale"].to_string()].map(|word| word.replace(".0", ""))
    );
    let plot = std::fs::read_to_string(scratch.path("run/scores/scores.svg")).unwrap();
    assert!(plot.starts_with("<svg") && plot.contains(&format!("best: {step}, scale")));
    assert!(plot.contains("step 2, scale 0.5: CLIP-I"), "likeness against drift");

    // The line that is told draws what was scored, and a scale is what `hra sample` makes of it.
    the_told_line_draws(&scratch, &told, &folder(&best["step"], &best["scale"]));
    for (step, scale, adapter) in [(2, 0.5, "run/checkpoints/step-000002=0.5"), (4, 1.0, "run")] {
        let out = format!("again-{step}");
        let model = ["sample", "--model", &asset("tiny-sd"), "--adapter", adapter, "--prompt", PROMPT];
        let how = ["--num-images", "2", "--steps", "2", "--guidance", "7.5", "--output", &out];
        scratch.ok(&[&model[..], &how].concat());
        same_pictures(&scratch.path(&folder(&step.into(), &scale.into())), &scratch.path(&out));
    }
    only_what_is_missing_is_drawn_again(&scratch);
    a_limit_of_drift_is_kept(&scratch);
}

fn the_told_line_draws(scratch: &Scratch, told: &str, drawn: &str) {
    let line = told.lines().rev().find(|line| line.trim().starts_with("hra sample")).unwrap();
    let binary = Path::new(env!("CARGO_BIN_EXE_hra")).parent().unwrap();
    let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap());
    let threads = crate::support::base::threads().to_string();
    let shell =
        Command::new("sh").args(["-c", line]).env("PATH", path).env("OMP_NUM_THREADS", threads).output();
    let shell = shell.unwrap();
    assert!(shell.status.success(), "{line}\n{}", String::from_utf8_lossy(&shell.stderr));
    same_pictures(&scratch.path(drawn), &scratch.path("run/pictures"));
}

fn pictures(folder: &Path) -> Vec<(String, SystemTime)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            found.extend(pictures(&path));
        } else if path.extension().is_some_and(|e| e == "png") {
            let when = entry.metadata().unwrap().modified().unwrap();
            found.push((path.to_str().unwrap().to_string(), when));
        }
    }
    found
}

fn only_what_is_missing_is_drawn_again(scratch: &Scratch) {
    let before = pictures(&scratch.path("run/scores"));
    let told = again(scratch, &["--score-scales", "1,0.25,0.5", "--json"]).out;
    let after = pictures(&scratch.path("run/scores"));
    let new: Vec<&String> = after.iter().filter(|file| !before.contains(file)).map(|file| &file.0).collect();
    assert!(before.iter().all(|file| after.contains(file)), "a picture was drawn again");
    // Two steps, two pictures of the subject and of each of two other prompts.
    assert_eq!(new.len(), 2 * (2 + 2 * 2), "{new:?}");
    assert!(new.iter().all(|path| path.contains("/scale-0.25/")), "{new:?}");
    let told: Value = serde_json::from_str(&told).unwrap();
    let scales: Vec<f64> =
        told["evaluations"].as_array().unwrap().iter().map(|e| e["scale"].as_f64().unwrap()).collect();
    assert_eq!(scales, [0.25, 0.5, 1.0, 0.25, 0.5, 1.0]);
    let step = told["best_step"].as_i64().unwrap();
    assert_eq!(told["recommended"]["step"], step);
    let adapter = scratch.path(&format!("run/checkpoints/step-{step:06}"));
    assert_eq!(
        told["recommended"]["adapter"].as_str().unwrap(),
        adapter.canonicalize().unwrap().to_str().unwrap()
    );
}

fn a_limit_of_drift_is_kept(scratch: &Scratch) {
    let scored = json(&scratch.path("run/scores/scores.json"));
    let evaluations = scored["evaluations"].as_array().unwrap();
    let mut drifts: Vec<f64> = evaluations.iter().map(|e| score(e, "drift")).collect();
    drifts.sort_by(f64::total_cmp);
    for limit in [drifts[1], drifts[3]] {
        let best = expected(evaluations, limit).unwrap();
        let told = again(scratch, &["--score-scales", "1,0.25,0.5", "--drift-limit", &limit.to_string()]).out;
        let recommended = json(&scratch.path("run/recommended.json"));
        assert_eq!((&recommended["step"], &recommended["scale"]), (&best["step"], &best["scale"]), "{told}");
        assert!(recommended["drift"].as_f64().unwrap() <= limit);
    }
    let none =
        again(scratch, &["--score-scales", "1,0.25,0.5", "--drift-limit", &(drifts[0] / 2.0).to_string()]);
    assert!(
        none.err.contains("no place is recommended") && none.err.contains("--drift-limit"),
        "{}",
        none.err
    );
    assert!(!none.out.contains("recommended:"), "{}", none.out);
    assert!(!scratch.path("run/recommended.json").exists(), "the recommendation of before");
}

#[test]
fn what_cannot_be_scored_is_refused_before_the_training() {
    let scratch = Scratch::new();
    let refused = |more: &[&str]| {
        let words = [scoring(&[]), more.iter().map(|word| word.to_string()).collect()].concat();
        let flags = scratch.train_flags("run", &words.iter().map(String::as_str).collect::<Vec<_>>());
        let error = scratch.run(&flags.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(error.code != 0 && !scratch.path("run").exists(), "{more:?}\n{}", error.err);
        error.err
    };
    // Flags of scores alone would be passed over in silence.
    assert!(refused(&[]).contains("without --score"));
    for flags in [["--score-scales", "0.5"], ["--drift-limit", "3"]] {
        let plain = scratch.train_flags("run", &flags);
        let error = scratch.run(&plain.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(error.code != 0 && error.err.contains("without --score"), "{}", error.err);
    }
    for scales in ["nan", "inf", "0", "-1", "0.5,0.5", "9", "", ",", "half"] {
        let error = refused(&["--score", "--score-scales", scales]);
        assert!(error.contains("--score-scales"), "{scales}: {error}");
    }
    for limit in ["nan", "inf", "0", "-3", "", "far"] {
        let error = refused(&["--score", "--drift-limit", limit]);
        assert!(error.contains("--drift-limit"), "{limit}: {error}");
    }
    let words =
        ["--score", "--validation-prompt", PROMPT, "--clip", &asset("tiny-clip"), "--drift-limit", "3"];
    let flags = scratch.train_flags("run", &words);
    let error = scratch.run(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(error.code != 0 && error.err.contains("--drift-prompt"), "{}", error.err);
}

#[test]
fn a_run_at_a_rate_that_destroys_the_model_says_that_it_is_lost() {
    let scratch = Scratch::new();
    let words = ["--method", "lora", "--rank", "4", "--max_train_steps", "2", "--score"];
    let prompts = ["--validation-prompt", "a cat face", "--drift-prompt", "a noto emoji of a dog face"];
    let prompts = [&prompts[..], &["--drift-prompt", "a twemoji emoji of a pizza"]].concat();
    let few = ["--validation_inference_steps", "2", "--num_validation_images", "2"];
    let train = |name: &str, rate: &str| {
        let told = scratch.train(name, &[&words[..], &prompts, &few, &["--learning_rate", rate]].concat());
        let file = std::fs::read(scratch.path(name).join("scores/scores.json")).unwrap();
        (told.err, serde_json::from_slice::<Value>(&file).unwrap()["lost"].clone())
    };
    let (told, lost) = train("wild", "1e-1");
    assert!(told.contains("the model is lost from step 2 on") && told.contains("--learning_rate"), "{told}");
    assert_eq!(lost, serde_json::json!([2]));
    let (told, lost) = train("mild", "1e-4");
    assert!(!told.contains("lost") && lost == serde_json::json!([]), "{told}");
}
