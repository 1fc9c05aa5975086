//! `[classifier]` through the real binary: what the model itself still tells apart, asked of cells that are done.

use crate::compare::{METHODS, config, records, scratch};
use crate::support::base::root;
use crate::support::scratch::Scratch;
use hra::attach::loaded::LoadedAdapter;
use hra::data::image::{load_rgb, tensor};
use hra::diffusion::sample::Session;
use hra::lab::evaluate::DiffusionClassifier;
use hra::lab::results::{CellRecord, Plan};
use hra::platform::observer::Silent;
use hra::{Error, StableDiffusion};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use tch::{Device, Kind, Tensor};

const CLASSES: [&str; 3] = ["screwdriver", "a telephone, noto emoji", "a twemoji emoji of a sloth"];

/// The table, by default on pictures of the repository.
fn table(lines: &str) -> String {
    let data = root().join("assets/control/held_out");
    format!("[classifier]\ndata_dir = {data:?}\nprompts = {CLASSES:?}\n{lines}\n")
}

fn with_table(scratch: &Scratch, table: &str) {
    std::fs::write(scratch.path("c.toml"), config("", table, METHODS)).unwrap();
}

/// When each file of the cells was written, but for those that every look at a cell writes.
fn written(folder: &Path) -> BTreeMap<PathBuf, SystemTime> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            found.extend(written(&path));
        } else if !["record.json", "task.json", "log.txt", ".lock"]
            .contains(&entry.file_name().to_str().unwrap())
        {
            found.insert(path, entry.metadata().unwrap().modified().unwrap());
        }
    }
    found
}

/// The files that were written since.
fn made(scratch: &Scratch, before: &BTreeMap<PathBuf, SystemTime>) -> Vec<String> {
    let now = written(&scratch.path("out/cells"));
    let new = now.iter().filter(|(path, when)| before.get(*path) != Some(when));
    new.map(|(path, _)| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
}

fn by_cell(scratch: &Scratch) -> BTreeMap<String, CellRecord> {
    let plan = Plan::read(&scratch.path("out")).unwrap();
    let records = plan.records(&scratch.path("out")).unwrap();
    records.into_iter().map(|record| (record.cell.id.clone(), record)).collect()
}

/// The errors of a record at a scale.
fn errors(record: &CellRecord, scale: f64) -> &Vec<Vec<f64>> {
    &record.classifier.as_ref().unwrap().at(scale).unwrap().errors
}

#[test]
fn finished_cells_are_asked_without_training_or_drawing() {
    let scratch = scratch(&config("", "", METHODS));
    scratch.ok(&["compare", "c.toml"]);
    let before = written(&scratch.path("out/cells"));
    let trained = records(&scratch.path("out"));

    with_table(&scratch, &table("num_noises = 3"));
    scratch.ok(&["compare", "c.toml"]);
    assert_eq!(made(&scratch, &before), ["classifier.json"; 5], "four trainings and the first base model");
    let without = |records: Vec<Value>| -> Vec<Value> {
        let strip = |mut record: Value| {
            record.as_object_mut().unwrap().remove("classifier");
            record
        };
        records.into_iter().map(strip).collect()
    };
    assert_eq!(without(records(&scratch.path("out"))), trained, "nothing else is another");
    the_report_is_what_the_csv_says(&scratch);
    no_adapter_is_the_base_model_bit_for_bit(&scratch);

    // Done is done; another scale leaves the answers that are there, another count of noises none.
    let asked = by_cell(&scratch);
    let before = written(&scratch.path("out/cells"));
    scratch.ok(&["compare", "c.toml"]);
    assert_eq!(made(&scratch, &before), [""; 0]);
    with_table(&scratch, &table("num_noises = 3\nscales = [0, 0.5, 1]"));
    scratch.ok(&["compare", "c.toml"]);
    assert_eq!(made(&scratch, &before), ["classifier.json"; 4], "the base model has no other scale");
    for (id, record) in by_cell(&scratch).iter().filter(|(_, record)| !record.cell.is_base()) {
        assert_eq!(errors(record, 1.0), errors(&asked[id], 1.0));
        assert_ne!(errors(record, 0.5), errors(record, 1.0));
    }
    goes_on_where_it_was_stopped(&scratch);
    with_table(&scratch, &table("num_noises = 2"));
    let before = written(&scratch.path("out/cells"));
    scratch.ok(&["compare", "c.toml"]);
    assert_eq!(made(&scratch, &before), ["classifier.json"; 5]);
    let anew = by_cell(&scratch);
    let base = |all: &BTreeMap<String, CellRecord>| {
        let base = all.values().find(|record| record.cell.is_base() && record.classifier.is_some());
        errors(base.unwrap(), 0.0).clone()
    };
    assert_ne!(base(&anew), base(&asked));
    assert!(anew.values().filter_map(|r| r.classifier.as_ref()).all(|c| c.points.len() == 1));
    removed_weights_are_told(&scratch);
}

/// Accuracy and what the base model tells right, from the CSV alone.
fn the_report_is_what_the_csv_says(scratch: &Scratch) {
    let report: Value =
        serde_json::from_slice(&std::fs::read(scratch.path("out/report.json")).unwrap()).unwrap();
    let mut rows = csv::Reader::from_path(scratch.path("out/classifier.csv")).unwrap();
    // For each cell and picture the class with the least error.
    let mut best: BTreeMap<[String; 4], (f64, bool)> = BTreeMap::new();
    let mut count = 0;
    for row in rows.records().map(Result::unwrap) {
        let key = [0, 2, 3, 6].map(|column| row[column].to_string());
        let (error, right) = (row[9].parse::<f64>().unwrap(), row[7] == row[8]);
        let own = best.entry(key).or_insert((f64::INFINITY, false));
        if error < own.0 {
            *own = (error, right);
        }
        count += 1;
    }
    assert_eq!(count, 5 * CLASSES.len() * CLASSES.len(), "a picture of each class");
    let base_right: BTreeMap<&str, bool> = best
        .iter()
        .filter(|(key, _)| key[0] == "base")
        .map(|(key, (_, right))| (key[3].as_str(), *right))
        .collect();
    let told = &report["classifier"];
    assert_eq!(told["base_right"], base_right.values().filter(|right| **right).count());
    for (label, scale, cells) in [("base", 0.0, 1), ("HRA", 1.0, 2), ("full <b>\"fine\"</b>", 1.0, 2)] {
        let row = told["rows"].as_array().unwrap().iter().find(|row| row["label"] == label).unwrap();
        let point = &row["scales"][0];
        let own: Vec<_> = best.iter().filter(|(key, _)| key[0] == label).collect();
        let right = own.iter().filter(|(_, (_, right))| *right).count() as f64;
        let still =
            own.iter().filter(|(key, (_, right))| *right && base_right[key[3].as_str()]).count() as f64;
        assert_eq!((&point["scale"], &point["cells"]), (&scale.into(), &cells.into()), "{label}");
        let near = |found: &Value, expected: f64| (found.as_f64().unwrap() - expected).abs() < 1e-12;
        assert!(near(&point["accuracy"], right / own.len() as f64), "{point}");
        assert!(near(&point["still_right"], still / f64::from(cells)), "{point}");
        if scale == 1.0 {
            let rows = report["rows"].as_array().unwrap();
            let row = rows.iter().find(|row| row["label"] == label).unwrap();
            assert!(near(&point["drift"], row["scores"]["drift"]["mean"].as_f64().unwrap()), "{point}");
        }
    }
    let text = std::fs::read_to_string(scratch.path("out/report.md")).unwrap();
    let page = std::fs::read_to_string(scratch.path("out/report.html")).unwrap();
    assert!(text.contains("## Classes still told apart") && text.contains("2303.16203"), "{text}");
    assert!(page.contains("Classes still told apart") && page.contains("classifier.csv"));
}

/// The errors of the model in a session, of every picture of a plan.
fn measured(session: &Session, plan: &Plan, out: &Path) -> Vec<Vec<f64>> {
    let (model, asked) = (session.model(), plan.classifier.as_ref().unwrap());
    let latents = |file: &str| -> Tensor {
        let picture = load_rgb(&out.join(file)).unwrap();
        model.vae.scaling().to_unet(&model.vae.encode(&tensor::signed(&picture)).0)
    };
    let latents: Vec<Tensor> = asked.pictures.iter().map(|picture| latents(&picture.file)).collect();
    let noise = (asked.num_noises, asked.seed);
    let classifier = DiffusionClassifier::new(model, &asked.prompts, noise, &latents[0].size(), 4).unwrap();
    latents.iter().map(|latents| classifier.errors(latents, &Silent).unwrap()).collect()
}

fn no_adapter_is_the_base_model_bit_for_bit(scratch: &Scratch) {
    let out = scratch.path("out");
    let plan = Plan::read(&out).unwrap();
    let records = by_cell(scratch);
    let model = StableDiffusion::load(&root().join("assets/tiny-sd"), Kind::Float, Device::Cpu).unwrap();
    let mut session = Session::open(model, Vec::new(), None).unwrap();
    let base = measured(&session, &plan, &out);
    let far = |a: &[Vec<f64>], b: &[Vec<f64>]| {
        let each = a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs() / b.abs());
        each.fold(0.0, f64::max)
    };
    for (id, record) in records.iter().filter(|(_, record)| record.classifier.is_some()) {
        if record.cell.is_base() {
            assert!(far(errors(record, 0.0), &base) < 1e-5);
            continue;
        }
        let mut put_on = |scale: f64| -> Result<Vec<Vec<f64>>, Error> {
            let adapter =
                LoadedAdapter::read(&out.join("cells").join(id).join("run"), session.layer_names()?)?;
            session.put_on(vec![(adapter, scale)])?;
            Ok(measured(&session, &plan, &out))
        };
        assert_eq!(put_on(0.0).unwrap(), base, "{id} at scale 0");
        let whole = put_on(1.0).unwrap();
        assert!(far(errors(record, 1.0), &whole) < 1e-5, "{id}");
        assert!(far(&whole, &base) > 1e-3, "{id}: what was trained is seen");
    }
}

/// An answer that is there is not asked for again, and the others come out as they were.
fn goes_on_where_it_was_stopped(scratch: &Scratch) {
    let whole = by_cell(scratch);
    let (id, record) = whole.iter().find(|(_, r)| !r.cell.is_base()).unwrap();
    let folder = scratch.path(&format!("out/cells/{id}"));
    let edit = |name: &str, change: &dyn Fn(&mut Value)| {
        let mut value = serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap();
        change(&mut value);
        std::fs::write(folder.join(name), value.to_string()).unwrap();
    };
    let kept = serde_json::json!([7.0, 8.0, 9.0]);
    edit("record.json", &|record| {
        record.as_object_mut().unwrap().remove("classifier");
    });
    edit("classifier.json", &|answers| {
        let points = answers["points"].as_array_mut().unwrap();
        let last = points.iter_mut().find(|point| point["scale"] == 0.5).unwrap();
        last.as_object_mut().unwrap().remove("accuracy");
        last["errors"] = serde_json::json!([kept]);
    });
    scratch.ok(&["compare", "c.toml"]);
    let again = &by_cell(scratch)[id];
    assert_eq!(errors(again, 1.0), errors(record, 1.0));
    assert_eq!(errors(again, 0.5)[0], [7.0, 8.0, 9.0]);
    assert_eq!(errors(again, 0.5)[1..], errors(record, 0.5)[1..]);
}

fn removed_weights_are_told(scratch: &Scratch) {
    let hra = by_cell(scratch).into_values().find(|r| r.cell.method() == "HRA").unwrap();
    let run = scratch.path(&format!("out/cells/{}/run", hra.cell.id));
    std::fs::remove_file(run.join("adapter_model.safetensors")).unwrap();
    std::fs::remove_file(run.join("adapter_config.json")).unwrap();
    scratch.ok(&["compare", "c.toml"]);
    with_table(scratch, &table("num_noises = 4"));
    let refused = scratch.run(&["compare", "c.toml"]);
    assert_ne!(refused.code, 0);
    assert!(refused.err.contains("[classifier]") && refused.err.contains("none"), "{}", refused.err);
}

#[test]
fn what_a_classifier_cannot_be_is_refused_with_all_reasons() {
    let wrong = "[classifier]\ndata_dir = \"x\"\nprompts = [\"a\", \"a\", \" b\", \"\"]\nnum_pictures = 0\nnum_noises = 0\n\
                 scales = [0, 9, 9]";
    let error = scratch(&config("", wrong, METHODS)).run(&["compare", "c.toml"]);
    assert_eq!(error.code, 2);
    for part in [
        "two different classes",
        "without space",
        "num_pictures: expected",
        "num_noises: expected",
        "scales: expected",
    ] {
        assert!(error.err.contains(part), "{part}\n{}", error.err);
    }
    let unknown = table("noises = 3");
    let error = scratch(&config("", &unknown, METHODS)).run(&["compare", "c.toml"]);
    assert!(error.err.contains("noises"), "{}", error.err);
}

#[test]
fn pictures_that_say_nothing_are_refused() {
    let told = |table: &str, words: &[&str], parts: &[&str]| {
        let scratch = scratch(&config("", table, METHODS));
        let cat = std::fs::read(root().join("assets/subjects/cat/train/00.png")).unwrap();
        std::fs::create_dir(scratch.path("taught")).unwrap();
        std::fs::write(scratch.path("taught/a.png"), cat).unwrap();
        let rows = "{\"file_name\": \"a.png\", \"text\": \"a cat\"}\n{\"file_name\": \"../c.png\", \"text\": \"other\"}\n";
        std::fs::write(scratch.path("taught/metadata.jsonl"), rows).unwrap();
        std::fs::copy(root().join("assets/control/held_out/0003.png"), scratch.path("c.png")).unwrap();
        let refused = scratch.run(&[&["compare", "c.toml", "--dry-run"], words].concat());
        assert_ne!(refused.code, 0, "{table}");
        for part in parts {
            assert!(refused.err.contains(part), "{part}\n{}", refused.err);
        }
    };
    let other_class = table("").replace("screwdriver", "a screwdriver");
    told(&other_class, &[], &["caption `a screwdriver`", "whole caption"]);
    let taught = "[classifier]\ndata_dir = \"taught\"\nprompts = [\"a cat\", \"other\"]";
    told(taught, &[], &["a.png is trained on too", "subject `cat`"]);
    told(taught, &["--strict-paths"], &["expected files in the folder of the table", "../c.png"]);
    let nothing = taught.replace("\"taught\"", "\"nowhere\"");
    told(&nothing, &[], &["classifier: data_dir", "nowhere"]);
}
