//! Tables that name files outside their folder, through the real binary: told where they are read, refused with --strict-paths.

use crate::support::base::root;
use crate::support::finished::Finished;
use crate::support::scratch::Scratch;
use hra::data::image::{RgbImage, save_png};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;

/// Stripes, which have edges.
fn stripes() -> RgbImage {
    RgbImage::from_fn(64, 64, |x, _| image::Rgb([if x / 8 % 2 == 0 { 0 } else { 255 }; 3]))
}

/// A picture beside the folder `photos`, one in it and one behind a link out of it, and a table of these rows.
fn table(rows: &[Value]) -> Scratch {
    let scratch = Scratch::new();
    fs::create_dir_all(scratch.path("photos/in")).unwrap();
    fs::create_dir(scratch.path("elsewhere")).unwrap();
    for name in ["elsewhere/secret.png", "photos/one.png"] {
        save_png(&scratch.path(name), &stripes(), &[]).unwrap();
    }
    symlink(scratch.path("elsewhere"), scratch.path("photos/in/link")).unwrap();
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    fs::write(scratch.path("photos/metadata.jsonl"), lines.join("\n")).unwrap();
    scratch
}

fn row(picture: &str) -> Value {
    json!({"file_name": picture, "text": "a red apple"})
}

fn refused(done: &Finished, named: &str) {
    assert_eq!(done.code, 2, "{}", done.err);
    let expected =
        format!("metadata.jsonl: expected files in the folder of the table, found others: {named}");
    assert!(done.err.contains(&expected), "{}", done.err);
}

#[test]
fn a_file_outside_the_tables_folder_is_told_once_and_refused_where_the_user_says_so() {
    for way in ["../elsewhere/secret.png", "in/link/secret.png", "absolute"] {
        let scratch = table(&[]);
        let whole = scratch.path("elsewhere/secret.png");
        let path = if way == "absolute" { whole.to_str().unwrap() } else { way };
        let lines = [row("one.png"), row(path), row(path)].map(|row| row.to_string());
        fs::write(scratch.path("photos/metadata.jsonl"), lines.join("\n")).unwrap();
        let named = format!("line 2 names `{path}`, and 1 more do so");
        let words = ["prepare", "canny", "photos", "--output", "out"];
        refused(&scratch.run(&[&words[..], &["--strict-paths"]].concat()), &named);
        assert!(!scratch.path("out").exists(), "nothing was read");
        let told = scratch.ok(&words).err;
        let expected = format!("files outside the folder of the table are read: {named} (strict_paths");
        assert_eq!(told.matches(&expected).count(), 1, "{told}");
        assert!(scratch.path("out/one.png").is_file());
    }
}

#[test]
fn paths_that_stay_in_the_tables_folder_are_none_of_it() {
    let scratch = table(&[]);
    symlink("one.png", scratch.path("photos/other.png")).unwrap();
    let whole = scratch.path("photos/one.png");
    let paths = ["./in/../one.png", "other.png", "../photos/one.png", whole.to_str().unwrap(), "gone.png"];
    let lines: Vec<String> = paths.map(|path| row(path).to_string()).into();
    fs::write(scratch.path("photos/metadata.jsonl"), lines.join("\n")).unwrap();
    let done = scratch.ok(&["prepare", "canny", "photos", "--output", "out", "--strict-paths"]);
    assert!(!done.err.contains("outside"), "{}", done.err);
    assert!(scratch.path("out/in").exists() || scratch.path("out/one.png").is_file());
}

/// Every other verb that reads tables, by its flag and by its key.
#[test]
fn training_drawing_and_comparing_refuse_a_condition_outside_too() {
    let mut pair = row("one.png");
    pair["conditioning_image"] = json!("in/link/secret.png");
    let scratch = table(&[pair]);
    let model = root().join("tests/fixtures/cases/sd15/pipeline");
    let model = model.to_str().unwrap();
    let named = "line 1 names `in/link/secret.png`\n";
    let train = ["train", "--pretrained_model_name_or_path", model, "--train_data_dir", "photos"];
    let short = ["--output_dir", "run", "--max_train_steps", "1", "--rank", "2"];
    let train = [&train[..], &short].concat();
    refused(&scratch.run(&[&train[..], &["--strict_paths"]].concat()), named);
    fs::write(scratch.path("strict.toml"), "[data]\nstrict_paths = true\n").unwrap();
    refused(&scratch.run(&[&train[..1], &["strict.toml"], &train[1..]].concat()), named);
    assert!(!scratch.path("run").exists());
    let told = scratch.ok(&train).err;
    assert!(told.contains("files outside the folder of the table are read: line 1 names"), "{told}");
    let made = [&train[..], &["--strict-paths", "--condition", "canny", "--make_conditions"]].concat();
    let made: Vec<&str> = made.iter().map(|word| if *word == "run" { "made" } else { word }).collect();
    scratch.ok(&made);

    let draw = ["sample", "--model", model, "--pairs", "photos", "--steps", "1", "--output", "out"];
    refused(&scratch.run(&[&draw[..], &["--strict-paths"]].concat()), named);
    let idle =
        scratch.run(&["sample", "--model", model, "--prompt", "x", "--output", "out", "--strict-paths"]);
    assert!(idle.code == 2 && idle.err.contains("only with --pairs"), "{}", idle.err);

    let config = format!(
        "title = \"t\"\noutput_dir = \"comparison\"\n[train.model]\npretrained_model_name_or_path = \"{model}\"\n\
         [train.data]\nresolution = 64\n[draw]\n[[control]]\nname = \"set\"\ndata_dir = \"photos\"\n\
         test_data_dir = \"photos\"\nSTRICT\n[[method]]\nlabel = \"HRA\"\nadapter = {{ method = \"hra\", rank = 2 }}\n"
    );
    fs::write(scratch.path("c.toml"), config.replace("STRICT", "")).unwrap();
    refused(&scratch.run(&["compare", "c.toml", "--dry-run", "--strict-paths"]), named);
    fs::write(scratch.path("c.toml"), config.replace("STRICT", "strict_paths = true")).unwrap();
    refused(&scratch.run(&["compare", "c.toml", "--dry-run"]), named);
}
