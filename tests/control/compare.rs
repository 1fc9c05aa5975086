//! `hra compare` of control through the real binary: what is drawn and scored for each pair, the search, and what it refuses.

use crate::support::base::root;
use crate::support::scratch::Scratch;
use hra::data::image::edges::{Thresholds, canny};
use hra::data::image::{Mask, RgbImage, load_rgb, resize_nearest, resize_short_side};
use hra::lab::compare::CompareConfig;
use hra::lab::compare::config::Topic;
use hra::lab::compare::control::{ControlSet, resolve};
use hra::lab::evaluate::control::{overlap, subject_mask, subject_miou};
use hra::lab::results::{BASE, CellRecord, Plan, Set, cell_folder};
use hra::platform::observer::Silent;
use std::path::{Path, PathBuf};

/// Three methods on the embedded model and pairs; `control` goes into the table, `more` before it.
fn config(control: &str, more: &str) -> String {
    let assets = root().join("assets");
    let assets = assets.display();
    format!(
        r#"
title = "small"
output_dir = "out"
[train]
threads = 1

[train.model]
pretrained_model_name_or_path = "{assets}/tiny-sd"

[train.data]
resolution = 64

[train.optimizer]
control_lr = 1e-2

[train.schedule]
max_train_steps = 4
train_batch_size = 2

[train.checkpoints]
checkpointing_steps = 2
log_every = 2
[draw]
scheduler = "ddim"
steps = 2
guidance = 3.0
seed = 40
{more}
[[control]]
name = "emoji"
data_dir = "train"
test_data_dir = "{assets}/control/held_out"
num_test = 6
{control}
[[method]]
label = "HRA"
adapter = {{ method = "hra", rank = 4 }}
optimizer = {{ learning_rate = 3e-3 }}
[[method]]
label = "encoder alone"
adapter = {{ method = "none" }}
optimizer = {{ learning_rate = 1e-2 }}
"#
    )
}

const CANNY: &str = "condition = \"canny\"\nmake_conditions = true\ncanny_low = 80\ncanny_high = 160";

/// A folder with the config and twelve pairs that are trained on.
fn scratch(text: &str) -> Scratch {
    let scratch = Scratch::new();
    let from = root().join("assets/control/train");
    let table = std::fs::read_to_string(from.join("metadata.jsonl")).unwrap();
    std::fs::create_dir_all(scratch.path("train/segmentation")).unwrap();
    let lines: Vec<&str> = table.lines().take(12).collect();
    for line in &lines {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        for key in ["file_name", "conditioning_image"] {
            let name = row[key].as_str().unwrap();
            std::fs::copy(from.join(name), scratch.path("train").join(name)).unwrap();
        }
    }
    std::fs::write(scratch.path("train/metadata.jsonl"), lines.join("\n")).unwrap();
    std::fs::write(scratch.path("c.toml"), text).unwrap();
    scratch
}

fn records(folder: &Path) -> (Plan, Vec<CellRecord>) {
    let plan = Plan::read(folder).unwrap();
    let records = plan.records(folder).unwrap();
    assert_eq!(records.len(), plan.cells.len(), "a record for every cell");
    (plan, records)
}

/// The test picture or condition number `i`, from the data set itself.
fn given(i: usize, key: &str) -> RgbImage {
    let held_out = root().join("assets/control/held_out");
    let table = std::fs::read_to_string(held_out.join("metadata.jsonl")).unwrap();
    let row: serde_json::Value = serde_json::from_str(table.lines().nth(i).unwrap()).unwrap();
    let image = load_rgb(&held_out.join(row[key].as_str().unwrap())).unwrap();
    match key {
        "file_name" => resize_short_side(&image, 64, hra::data::image::Filter::Bilinear),
        _ => resize_nearest(&image, 64, 64),
    }
}

fn drawn(folder: &Path, record: &CellRecord, pair: usize, picture: usize) -> RgbImage {
    let file = &record.evaluations[0].prompts[pair].pictures[picture].file;
    load_rgb(&cell_folder(folder, &record.cell.id).join(file)).unwrap()
}

#[test]
fn pairs_are_drawn_and_scored_with_both_conditions() {
    let clip = format!("[scores]\nclip = \"{}\"", root().join("assets/tiny-clip").display());
    let scratch = scratch(&config(CANNY, &clip));
    let told = scratch.ok(&["compare", "c.toml"]).out;
    for words in ["real pictures (ceiling)", "base, no condition (floor)", "encoder alone", "edge F1"] {
        assert!(told.contains(words), "{words} is not in\n{told}");
    }
    let out = scratch.path("out");
    let (plan, records) = records(&out);
    let control = plan.subjects[0].control.as_ref().unwrap();
    assert_eq!((control.condition.as_str(), control.trained_pairs), ("canny", 12));
    assert_eq!((control.test.pictures.len(), &control.test.shuffled[..]), (6, &[1, 2, 3, 4, 5, 0][..]));

    let thresholds = Thresholds { low: 80.0, high: 160.0 };
    for record in &records {
        let base = record.cell.method() == BASE;
        let evaluation = &record.evaluations[0];
        assert_eq!((record.evaluations.len(), evaluation.set), (1, Set::Test));
        assert_eq!(evaluation.prompts.len(), 6);
        for (i, prompt) in evaluation.prompts.iter().enumerate() {
            assert_eq!(prompt.prompt, plan.subjects[0].prompts[i]);
            assert_eq!(prompt.pictures.len(), if base { 1 } else { 2 });
            let truth = canny(&given(i, "file_name"), thresholds);
            for (which, picture) in prompt.pictures.iter().enumerate() {
                assert_eq!(picture.seed, 40 + i as u64, "noise belongs to the pair");
                let expected = overlap(&truth, &canny(&drawn(&out, record, i, which), thresholds));
                if which == 0 {
                    assert_eq!(picture.scores["edge_f1"], expected.f1);
                    assert_eq!(picture.scores["edge_iou"], expected.iou);
                    assert!(picture.scores["clip_t"].is_finite() && picture.scores["clip_i"].is_finite());
                } else {
                    assert_eq!(picture.scores.len(), 1, "{:?}", picture.scores);
                    assert_eq!(picture.scores["edge_f1_shuffled"], expected.f1);
                }
            }
        }
        let mean = evaluation.values("edge_f1").iter().sum::<f64>() / 6.0;
        assert!((evaluation.scores["edge_f1"] - mean).abs() < 1e-12);
    }
    // The ceiling, and by chance: the next pair's picture.
    let base = &records[0];
    for (i, picture) in base.real_pictures.iter().enumerate() {
        let [own, next] = [i, (i + 1) % 6].map(|pair| canny(&given(pair, "file_name"), thresholds));
        assert_eq!(picture.scores["edge_f1"], 1.0);
        assert_eq!(picture.scores["edge_f1_shuffled"], overlap(&own, &next).f1);
        assert!(out.join(&picture.file).is_file(), "{}", picture.file);
    }
    // The encoder trains: what it is shown makes a difference, of any method, and with it the budget.
    for record in &records[1..] {
        let differ = (0..6).filter(|i| drawn(&out, record, *i, 0) != drawn(&out, record, *i, 1)).count();
        assert!(differ >= 5, "{}: {differ}", record.cell.method());
        let budget = record.budget.as_ref().unwrap();
        assert!(budget.parameters > 90_000 && budget.bytes > 4 * budget.parameters);
        assert!(record.losses.iter().any(|point| point.held_out.is_some()), "on the rendered pairs");
    }
    assert!(records[1].budget.as_ref().unwrap().parameters > records[2].budget.as_ref().unwrap().parameters);

    // What is rendered is a data set; nothing is done twice.
    let table = std::fs::read_to_string(out.join("subjects/emoji/test.jsonl")).unwrap();
    assert_eq!(table.lines().count(), 6);
    let before = std::fs::metadata(cell_folder(&out, &records[1].cell.id).join("record.json")).unwrap();
    scratch.ok(&["compare", "c.toml"]);
    let after = std::fs::metadata(cell_folder(&out, &records[1].cell.id).join("record.json")).unwrap();
    assert_eq!(before.modified().unwrap(), after.modified().unwrap());
    let csv = std::fs::read_to_string(out.join("report.csv")).unwrap();
    for (kind, count) in [(",pair,", 6 * 3), (",shuffled,", 6 * 2), (",real,", 6)] {
        let rows = csv.lines().filter(|line| line.contains(&format!(",test{kind}"))).count();
        assert_eq!(rows, count, "{kind}");
    }
}

#[test]
fn maps_are_scored_by_subject_and_searches_use_other_pairs() {
    let palette = root().join("assets/control/palette.json");
    let validation = root().join("assets/control/train");
    let control = format!(
        "condition = \"segmentation\"\npalette = \"{}\"\nvalidation_data_dir = \"{}/other.jsonl\"\nnum_validation = 5",
        palette.display(),
        "train"
    );
    let search = "[search]\nlearning_rates = [1e-3, 1e-2]";
    let scratch = scratch(&config(&control, search));
    // Pairs that are not among those trained on, named from where they are.
    let table = std::fs::read_to_string(validation.join("metadata.jsonl")).unwrap();
    let others: Vec<String> = table
        .lines()
        .skip(12)
        .take(7)
        .map(|line| {
            let mut row: serde_json::Value = serde_json::from_str(line).unwrap();
            for key in ["file_name", "conditioning_image"] {
                row[key] = validation.join(row[key].as_str().unwrap()).to_str().unwrap().into();
            }
            row.to_string()
        })
        .collect();
    std::fs::write(scratch.path("train/other.jsonl"), others.join("\n")).unwrap();
    scratch.ok(&["compare", "c.toml"]);
    let out = scratch.path("out");
    let (plan, records) = records(&out);
    assert_eq!(plan.objective, [("subject_miou".to_string(), 1.0)]);
    assert_eq!(plan.subjects[0].control.as_ref().unwrap().validation.pictures.len(), 5);
    let mut tested = 0;
    for record in records.iter().filter(|r| r.cell.method() != BASE) {
        for evaluation in &record.evaluations {
            let count = if evaluation.set == Set::Validation { 5 } else { 6 };
            assert_eq!(evaluation.prompts.len(), count);
            tested += usize::from(evaluation.set == Set::Test);
        }
    }
    assert_eq!(tested, 2, "one rate of each method is in the tables");
    let base = &records[0];
    let evaluation = base.evaluations.iter().find(|e| e.set == Set::Test).unwrap();
    for (i, picture) in base.real_pictures.iter().enumerate() {
        let truth = Mask::of(&given(i, "conditioning_image"), |colour| colour != [0, 0, 0]);
        let expected = subject_miou(&truth, &subject_mask(&given(i, "file_name")));
        assert_eq!(picture.scores["subject_miou"], expected);
        let file = &evaluation.prompts[i].pictures[0].file;
        let drawn = load_rgb(&cell_folder(&out, &base.cell.id).join(file)).unwrap();
        let expected = subject_miou(&truth, &subject_mask(&drawn));
        assert_eq!(evaluation.prompts[i].pictures[0].scores["subject_miou"], expected);
    }
    assert!(base.real["subject_miou"] > 0.8, "{:?}", base.real);
}

#[test]
fn pairs_are_rendered_again_where_they_are_read_otherwise() {
    let read = |control: &str, palette: &str| -> ControlSet {
        let text = config(control, "[search]\nlearning_rates = [1e-3, 1e-2]");
        // One map of class numbers is the condition of all.
        let text =
            text.replace("[[control]]", "[[control]]\nvalidation_data_dir = \"train/validation.jsonl\"");
        let held_out = root().join("assets/control/held_out");
        let scratch = scratch(&text.replace(held_out.to_str().unwrap(), "train/test.jsonl"));
        let map = std::fs::read(root().join("tests/fixtures/conditions/palette2-4.png")).unwrap();
        std::fs::write(scratch.path("train/map.png"), map).unwrap();
        std::fs::write(scratch.path("palette.json"), palette).unwrap();
        let table = std::fs::read_to_string(scratch.path("train/metadata.jsonl")).unwrap();
        let lines: Vec<String> = table
            .lines()
            .map(|line| {
                let mut row: serde_json::Value = serde_json::from_str(line).unwrap();
                let (width, height) = load_rgb(&scratch.path("train/map.png")).unwrap().dimensions();
                let name = row["file_name"].as_str().unwrap().to_string();
                let picture = load_rgb(&scratch.path("train").join(&name)).unwrap();
                let picture =
                    hra::data::image::resize(&picture, width, height, hra::data::image::Filter::Bilinear);
                hra::data::image::save_png(&scratch.path("train").join(&name), &picture, &[]).unwrap();
                row["conditioning_image"] = "map.png".into();
                row.to_string()
            })
            .collect();
        for (name, lines) in [("metadata", &lines[..6]), ("test", &lines[6..9]), ("validation", &lines[9..])]
        {
            std::fs::write(scratch.path(&format!("train/{name}.jsonl")), lines.join("\n")).unwrap();
        }
        let mut config = CompareConfig::read(&scratch.path("c.toml")).unwrap();
        let Topic::Control(entries) = &mut config.topic else { panic!("{:?}", config.topic) };
        for entry in entries {
            for path in [&mut entry.data_dir, &mut entry.test_data_dir] {
                *path = scratch.path("train").join(path.strip_prefix("train").unwrap());
            }
            let other = entry.validation_data_dir.as_mut().unwrap();
            *other = scratch.path("train").join(other.strip_prefix("train").unwrap());
            entry.palette = entry.palette.as_ref().map(|name| scratch.path("").join(name));
        }
        let subjects = resolve(&config, config.topic.controls(), &Silent).unwrap();
        subjects[0].pairs().unwrap().clone()
    };
    let hashes = |set: &ControlSet| {
        [set.train_hash.clone(), set.hash(Set::Test).to_string(), set.hash(Set::Validation).to_string()]
    };
    let coloured = "condition = \"segmentation\"\npalette = \"palette.json\"";
    let one = hashes(&read(coloured, "[[0, 0, 0], [9, 9, 9], [1, 1, 1], [2, 2, 2]]"));
    assert_eq!(
        one,
        hashes(&read(coloured, "{\"a\": [0, 0, 0], \"b\": [9, 9, 9], \"c\": [1, 1, 1], \"d\": [2, 2, 2]}"))
    );
    let others = [
        hashes(&read(coloured, "[[0, 0, 0], [9, 9, 8], [1, 1, 1], [2, 2, 2]]")),
        hashes(&read("condition = \"segmentation\"", "")),
        hashes(&read("condition = \"canny\"", "")),
    ];
    let all: Vec<_> = std::iter::once(&one).chain(&others).collect();
    for i in 0..3 {
        let different: std::collections::BTreeSet<_> = all.iter().map(|hashes| &hashes[i]).collect();
        assert_eq!(different.len(), all.len(), "train, test or validation: {i}");
    }
}

#[test]
fn what_means_nothing_with_control_is_refused() {
    let refused = |text: &str| {
        let scratch = scratch(text);
        CompareConfig::read(&scratch.path("c.toml")).unwrap_err().to_string()
    };
    let good = config(CANNY, "");
    CompareConfig::read(&scratch(&good).path("c.toml")).unwrap();
    for (from, to, expected) in [
        ("title =", "protocol = \"paper\"\ntitle =", "protocol: paper is for subjects"),
        ("resolution = 64", "", "[train]: [data] resolution is needed with [[control]]"),
        (
            "resolution = 64",
            "resolution = 64\ncondition = \"canny\"",
            "[train]: [data] condition is said in [[control]]",
        ),
        (
            "resolution = 64",
            "resolution = 64\ntrain_data_dir = \"x\"",
            "[train]: [data] train_data_dir is set by the comparison itself",
        ),
        (
            "[train.data]",
            "[train.prior]\nwith_prior_preservation = true\n[train.data]",
            "class pictures have no conditions",
        ),
        ("seed = 40", "prompts = [\"a\"]", "with [[control]] the pairs' captions are drawn"),
        ("seed = 40", "drift_prompts = [\"a\"]", "with [[control]] the pairs' captions are drawn"),
        ("seed = 40", "num_images = 2", "with [[control]] each pair is drawn once"),
        ("num_test = 6", "num_test = 0", "num_test and num_validation: expected 1 or more"),
        ("num_test = 6", "num_validation = 2", "num_validation: only with validation_data_dir"),
        ("name = \"emoji\"", "name = \"a/b\"", "control: name: expected letters, digits, - and _"),
        (
            "[[control]]",
            "[search]\nlearning_rates = [1.0, 2.0]\n[[control]]",
            "a [search] needs pairs that no table uses",
        ),
        ("adapter = {", "data = { image_column = \"x\" }\nadapter = {", "image_column is not a method's own"),
        ("canny_low = 80", "canny_low = 800", "canny_low and canny_high: expected"),
    ] {
        let told = refused(&good.replacen(from, to, 1));
        assert!(told.contains(expected), "{expected} is not in\n{told}");
    }
    let once = refused(&good.replacen("resolution = 64", "resolution = 64\ntrain_data_dir = \"x\"", 1));
    assert_eq!(once.matches("train_data_dir").count(), 1, "told once: {once}");
    let subject = "[[subject]]\nname = \"cat\"\nclass = \"cat\"\ndata_dir = \"x\"\ninstance_prompt = \"x\"\n[[control]]";
    let both = refused(&good.replacen("[[control]]", subject, 1));
    assert!(
        both.contains("expected either [[subject]] tables, a [dreambooth] table or [[control]] tables"),
        "{both}"
    );
    let alone = good.replacen(
        "[[control]]\nname = \"emoji\"\ndata_dir = \"train\"",
        "[[control]]\nname = \"emoji\"",
        1,
    );
    assert!(refused(&alone).contains("missing field `data_dir`"));
}

#[test]
fn pairs_that_are_trained_on_are_no_test() {
    let text = config(CANNY, "");
    let held_out: PathBuf = root().join("assets/control/held_out");
    let scratch = scratch(&text.replace(held_out.to_str().unwrap(), "train"));
    let told = scratch.run(&["compare", "c.toml", "--dry-run"]).err;
    assert!(
        told.contains("control `emoji`: test_data_dir: ") && told.contains("is trained on too"),
        "{told}"
    );
    // A search must not choose by the pairs of the tables.
    let control = format!("{CANNY}\nvalidation_data_dir = \"{}\"", held_out.display());
    let search = config(&control, "[search]\nlearning_rates = [1e-3, 1e-2]");
    std::fs::write(scratch.path("c.toml"), search).unwrap();
    let told = scratch.run(&["compare", "c.toml", "--dry-run"]).err;
    assert!(
        told.contains("control `emoji`: validation_data_dir: ")
            && told.contains("is among the pairs of the tables too, as"),
        "{told}"
    );
    // What cannot be read is told with the table's name; a bad pair is a note.
    let missing = text.replacen("data_dir = \"train\"", "data_dir = \"nowhere\"", 1);
    std::fs::write(scratch.path("c.toml"), missing).unwrap();
    let told = scratch.run(&["compare", "c.toml", "--dry-run"]).err;
    assert!(told.contains("control `emoji`: data_dir: expected a folder of pairs"), "{told}");
    std::fs::write(scratch.path("c.toml"), &text).unwrap();
    let table = std::fs::read_to_string(scratch.path("train/metadata.jsonl")).unwrap();
    let more = format!("{table}\n{{\"file_name\": \"gone.png\", \"text\": \"x\"}}");
    std::fs::write(scratch.path("train/metadata.jsonl"), more).unwrap();
    let told = scratch.ok(&["compare", "c.toml", "--dry-run"]).out;
    assert!(told.contains("note: 1 pair could not be used and is left out"), "{told}");
    assert!(
        told.contains("emoji: condition canny; 12 pairs trained on, 0 for validation, 6 for the tables"),
        "{told}"
    );
}
