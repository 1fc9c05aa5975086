//! `hra compare` through the real binary: one folder whatever happens on the way, shares, the search, and what it refuses.

use crate::support::base::root;
use crate::support::scratch::Scratch;
use hra::lab::compare::config::Topic;
use hra::lab::compare::{CompareConfig, Shard};
use hra::lab::results::{BASE, CellRecord, Plan, Set};
use hra::platform::observer::Silent;
use serde_json::Value;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

/// Two methods and two subjects on the embedded model, of a few steps; `extra` goes before the tables.
pub fn config(extra: &str, search: &str, methods: &str) -> String {
    let assets = root().join("assets");
    let assets = assets.display();
    format!(
        r#"
title = "small"
output_dir = "out"
{extra}
[train]
threads = 1

[train.model]
pretrained_model_name_or_path = "{assets}/tiny-sd"

[train.prior]
with_prior_preservation = true
num_class_images = 2
class_steps = 2

[train.schedule]
max_train_steps = 6

[train.checkpoints]
checkpointing_steps = 2
log_every = 2
[draw]
prompts = ["a fluent 3d emoji of a {{subject}}", "a {{subject}} on a red background"]
validation_prompts = ["a {{subject}}"]
drift_prompts = ["a noto emoji of a dog face"]
num_images = 2
num_validation_images = 1
num_drift_images = 1
scheduler = "ddim"
steps = 2
guidance = 3.0
{search}
[scores]
clip = "{assets}/tiny-clip"
[[subject]]
name = "cat"
class = "cat face"
data_dir = "{assets}/subjects/cat/train"
test_data_dir = "{assets}/subjects/cat/held_out"
instance_prompt = "a fluent 3d emoji of a {{subject}}"
class_prompt = "a fluent 3d emoji of a {{class}}"
[[subject]]
name = "robot"
class = "robot"
data_dir = "{assets}/subjects/robot/train"
instance_prompt = "a fluent 3d emoji of a {{subject}}"
class_prompt = "a fluent 3d emoji of a {{class}}"
{methods}
"#
    )
}

pub const METHODS: &str = r#"
[[method]]
label = "HRA"
adapter = { method = "hra", rank = 4 }
optimizer = { learning_rate = 3e-3 }
[[method]]
label = "full <b>\"fine\"</b>"
adapter = { method = "full" }
optimizer = { learning_rate = 1e-4 }
"#;

pub fn scratch(text: &str) -> Scratch {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("c.toml"), text).unwrap();
    scratch
}

/// The records of a folder without what may differ from run to run: times and memory.
pub fn records(folder: &Path) -> Vec<Value> {
    let plan = Plan::read(folder).unwrap();
    let mut records: Vec<CellRecord> = plan.records(folder).unwrap();
    assert_eq!(records.len(), plan.cells.len(), "a record for every cell");
    records
        .iter_mut()
        .map(|record| {
            if let Some(budget) = &mut record.budget {
                (budget.seconds, budget.seconds_per_step) = (None, None);
                (budget.peak_memory, budget.interrupted) = (None, false);
            }
            serde_json::to_value(record).unwrap()
        })
        .collect()
}

fn signal(child: &Child, name: &str) {
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args([name, &pid]).status().unwrap().success());
}

/// Waits until `there` is true, or the child has ended.
fn wait_for(child: &mut Child, there: impl Fn() -> bool) {
    let started = Instant::now();
    while !there() && child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < Duration::from_secs(300), "waited too long");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_quick_config_makes_a_report_and_is_not_done_twice() {
    let scratch = Scratch::new();
    let out = scratch.path("quick");
    let out = out.to_str().unwrap();
    let run = || {
        let mut command = scratch.command(&["compare", "configs/compare-quick.toml", "--output_dir", out]);
        let done = command.current_dir(root()).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    };
    let told = run();
    assert!(told.contains("HRA r 8") && told.contains("LoRA r 4"), "{told}");
    let plan = Plan::read(Path::new(out)).unwrap();
    let records = plan.records(Path::new(out)).unwrap();
    assert_eq!(plan.cells.len(), 3, "the base model and two trainings");
    for record in &records {
        let base = record.cell.method() == BASE;
        let scores = &record.evaluations.last().unwrap().scores;
        for key in ["clip_i", "clip_t", "diversity_clip", "identity_top1", "identity_map"] {
            assert!(scores[key].is_finite(), "{key}");
        }
        assert_eq!(scores.contains_key("drift"), !base, "the base model is what drift is measured from");
        let steps: Vec<i64> = record.evaluations.iter().map(|e| e.step).collect();
        assert_eq!(steps, if base { vec![0] } else { vec![30, 60] });
        if let Some(budget) = &record.budget {
            assert!(budget.seconds.unwrap() > 0.0 && budget.peak_memory.unwrap() > 50_000_000);
            assert_eq!(budget.steps, 60);
        }
    }
    // 56 projections of the UNet: methods.md's counts for this model.
    let count = |i: usize| records[i].budget.as_ref().unwrap().parameters;
    assert_eq!((count(1), count(2)), (76_800, 75_264));
    assert!(records[1].losses.len() > 3 && records[0].losses.is_empty());
    assert!(!records[0].real.is_empty(), "what the training pictures themselves reach");

    let report = |name: &str| std::fs::read(Path::new(out).join(name)).unwrap();
    let before: Vec<Vec<u8>> = ["report.html", "report.csv", "report.json", "report.md"].map(report).into();
    let cell = Path::new(out).join("cells").join(&plan.cells[1].id).join("record.json");
    let written = std::fs::metadata(&cell).unwrap().modified().unwrap();
    run();
    assert_eq!(std::fs::metadata(&cell).unwrap().modified().unwrap(), written, "nothing is done twice");
    for name in ["report.html", "report.csv"] {
        std::fs::remove_file(Path::new(out).join(name)).unwrap();
    }
    scratch.ok(&["compare", "report", out]);
    let after: Vec<Vec<u8>> = ["report.html", "report.csv", "report.json", "report.md"].map(report).into();
    assert!(before == after, "the same records make the same report");
}

#[test]
fn interrupted_and_shared_comparisons_end_in_the_same_records() {
    let text = config("jobs = 2\nscore_steps = [4]", "", METHODS);
    let whole = scratch(&text);
    whole.ok(&["compare", "c.toml"]);
    let expected = records(&whole.path("out"));
    assert_eq!(expected.len(), 2 + 4);

    // Stopped politely in a training, killed in another moment, and gone on with.
    let broken = scratch(&text);
    let cells = broken.path("out/cells");
    let any = |name: &str| {
        let has = |e: std::io::Result<std::fs::DirEntry>| e.is_ok_and(|e| e.path().join(name).exists());
        std::fs::read_dir(&cells).is_ok_and(|mut entries| entries.any(has))
    };
    for (when, how, code) in [
        ("run/metrics.jsonl", "-TERM", Some(130)),
        ("run/checkpoints/step-000002", "-KILL", None),
        ("step-000004/test/00-00.png", "-INT", Some(130)),
    ] {
        let mut child = broken.start(&["compare", "c.toml"]);
        wait_for(&mut child, || any(when));
        if child.try_wait().unwrap().is_some() {
            continue; // faster than we are; the others are enough
        }
        signal(&child, how);
        let ended = child.wait().unwrap();
        assert_eq!(ended.code(), code, "{how}");
    }
    broken.ok(&["compare", "c.toml"]);
    assert_eq!(records(&broken.path("out")), expected);
    let plan = Plan::read(&broken.path("out")).unwrap();
    let marked = |r: &CellRecord| r.budget.as_ref().is_some_and(|b| b.interrupted);
    for record in plan.records(&broken.path("out")).unwrap().iter().filter(|r| marked(r)) {
        let budget = record.budget.as_ref().unwrap();
        assert!(budget.seconds.is_none() && budget.peak_memory.is_none(), "no timing of an interrupted cell");
    }

    // Two workers that share nothing but the folder, one named by flags, one by Slurm's variables.
    let shared = scratch(&text);
    let mut first = shared.start(&["compare", "c.toml", "--shard", "0/2"]);
    let mut second = shared.command(&["compare", "c.toml", "--shard", "auto"]);
    let slurm = [("ID", "4"), ("MIN", "3"), ("COUNT", "2")];
    second.envs(slurm.map(|(name, value)| (format!("SLURM_ARRAY_TASK_{name}"), value)));
    let second = second.output().unwrap();
    assert!(second.status.success(), "{}", String::from_utf8_lossy(&second.stderr));
    assert!(first.wait().unwrap().success());
    assert_eq!(records(&shared.path("out")), expected);
    shared.ok(&["compare", "report", "out"]);
}

#[test]
fn a_search_looks_at_validation_only_and_its_choice_is_trained() {
    let search = "[search]\nlearning_rates = [1e-6, 1e-2]\nsubjects = [\"cat\"]\nobjective = { clip_i = 1.0, clip_t = 0.5 }";
    let scratch = scratch(&config("", search, METHODS));
    scratch.ok(&["compare", "c.toml"]);
    let out = scratch.path("out");
    let plan = Plan::read(&out).unwrap();
    let records = plan.records(&out).unwrap();
    let of_sets = |record: &CellRecord| record.evaluations.iter().map(|e| e.set).collect::<Vec<_>>();
    for method in ["HRA", "full <b>\"fine\"</b>"] {
        let tried: Vec<&CellRecord> =
            records.iter().filter(|r| r.cell.method() == method && r.cell.subject == "cat").collect();
        assert_eq!(tried.len(), 2, "the chosen one serves the search and the tables");
        let value = |r: &CellRecord| {
            let e = r.evaluations.iter().find(|e| e.set == Set::Validation).unwrap();
            e.scores["clip_i"] + 0.5 * e.scores["clip_t"]
        };
        let best = if value(tried[0]) >= value(tried[1]) { 0 } else { 1 };
        assert_eq!(of_sets(tried[best]), [Set::Validation, Set::Test]);
        assert_eq!(of_sets(tried[1 - best]), [Set::Validation]);
        let folder = out.join("cells").join(&tried[1 - best].cell.id);
        assert!(
            !folder.join("step-000006/test").exists(),
            "no prompt of the tables was drawn for the search"
        );
        let robot = records.iter().find(|r| r.cell.method() == method && r.cell.subject == "robot").unwrap();
        assert_eq!(robot.cell.learning_rate(), tried[best].cell.learning_rate());
    }
}

#[test]
fn a_training_that_diverges_is_a_record_and_stops_nothing() {
    let methods = METHODS.replace("1e-4", "1e30");
    let scratch = scratch(&config("", "", &methods));
    let done = scratch.ok(&["compare", "c.toml"]);
    let out = scratch.path("out");
    let records = Plan::read(&out).unwrap().records(&out).unwrap();
    let failed: Vec<&CellRecord> = records.iter().filter(|r| r.failure.is_some()).collect();
    assert_eq!(failed.len(), 2, "{}", done.err);
    assert!(failed.iter().all(|r| r.cell.method().starts_with("full") && r.evaluations.is_empty()));
    assert!(std::fs::read_to_string(out.join("report.md")).unwrap().contains("not a finite number"));
}

#[test]
fn a_dry_run_tells_the_plan_and_writes_nothing() {
    let scratch = scratch(&config("seeds = [0, 1]", "", METHODS));
    let told = scratch.ok(&["compare", "c.toml", "--dry-run"]).out;
    for part in [
        "8 trainings planned",
        "48 steps",
        "cat: 4 pictures trained on, 1 for validation, 5 for the tables",
        "about",
    ] {
        assert!(told.contains(part), "{part}\n{told}");
    }
    assert!(!scratch.path("out").exists());
    let json: Value =
        serde_json::from_str(&scratch.ok(&["compare", "c.toml", "--dry-run", "--json"]).out).unwrap();
    assert_eq!(json["trainings"], 8);
    // Of the robot's four pictures one is kept for the tables and none for validation.
    assert!(told.contains("robot: 3 pictures trained on, 0 for validation, 1 for the tables"), "{told}");
}

#[test]
fn what_cannot_be_compared_is_refused_with_all_reasons() {
    let wrong = config("jobs = 0\nseeds = [1, 1]", "", METHODS)
        .replace("optimizer = {", "schedule = { max_train_steps = 9 }\noptimizer = {")
        .replace("threads = 1", "threads = 1\nseed = 3");
    let error = scratch(&wrong).run(&["compare", "c.toml"]);
    assert_eq!(error.code, 2);
    for part in
        ["jobs:", "seeds:", "max_train_steps is not a method's own", "[train]: seed is set by the comparison"]
    {
        assert!(error.err.contains(part), "{part}\n{}", error.err);
    }
    // The same picture for training and for the tables.
    let leak = config("", "", METHODS).replace("cat/held_out", "cat/train");
    let error = scratch(&leak).run(&["compare", "c.toml"]);
    assert!(error.err.contains("is trained on or chosen by too"), "{}", error.err);
    // A folder that holds something else.
    let busy = scratch(&config("", "", METHODS));
    std::fs::create_dir(busy.path("out")).unwrap();
    std::fs::write(busy.path("out/thesis.txt"), "mine").unwrap();
    let error = busy.run(&["compare", "c.toml"]);
    assert!(error.err.contains("holds no comparison"), "{}", error.err);
    let error = busy.run(&["compare", "report", "out"]);
    assert!(error.err.contains("plan.json"), "{}", error.err);
}

#[test]
fn shares_come_from_flags_or_the_environment() {
    let nothing = |_: &str| None;
    let shard = |flag: Option<&str>, count, vars: &[(&str, &str)]| {
        let look = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        Shard::from_flags(flag, count, look).map(|s| (s.index, s.count))
    };
    assert_eq!(Shard::from_flags(None, None, nothing).unwrap(), Shard::WHOLE);
    assert_eq!(shard(Some("2/5"), None, &[]).unwrap(), (2, 5));
    assert_eq!(shard(Some("2"), Some(5), &[]).unwrap(), (2, 5));
    let slurm =
        [("SLURM_ARRAY_TASK_ID", "12"), ("SLURM_ARRAY_TASK_MIN", "10"), ("SLURM_ARRAY_TASK_COUNT", "4")];
    assert_eq!(shard(Some("auto"), None, &slurm).unwrap(), (2, 4));
    assert_eq!(shard(None, Some(3), &[("JOB_COMPLETION_INDEX", "1")]).unwrap(), (1, 3));
    for (flag, count, vars) in [
        (Some("5/5"), None, &[][..]),
        (Some("a/5"), None, &[]),
        (Some("1"), None, &[]),
        (Some("auto"), None, &[]),
        (Some("auto"), None, &[("JOB_COMPLETION_INDEX", "1")]),
        (Some("auto"), Some(2), &[("JOB_COMPLETION_INDEX", "2")]),
        (Some("auto"), Some(2), &[("JOB_COMPLETION_INDEX", "x")]),
    ] {
        assert!(shard(flag, count, vars).is_err(), "{flag:?} {count:?} {vars:?}");
    }
    // Every cell is in exactly one share.
    for cell in 0..20 {
        assert_eq!((0..3).filter(|i| Shard { index: *i, count: 3 }.has(cell)).count(), 1);
    }
}

#[test]
fn the_dreambooth_folder_is_read_where_it_is_there() {
    use hra::lab::compare::subjects::resolve;
    let dataset = root().join("../shared/dreambooth/dataset");
    if !dataset.is_dir() {
        eprintln!("skipped: no {}", dataset.display());
        return;
    }
    let read = |name: &str| {
        let mut config = CompareConfig::read(&root().join("configs").join(name)).unwrap();
        let Topic::DreamBooth(set) = &mut config.topic else { panic!("{:?}", config.topic) };
        set.dir = dataset.clone();
        config
    };
    let mut config = read("compare-dreambooth.toml");
    config.search = None;
    let (subjects, _) = resolve(&config, &Silent).unwrap();
    let names: Vec<(&str, &str)> = subjects.iter().map(|s| (s.name.as_str(), s.class.as_str())).collect();
    assert_eq!(names, [("dog", "dog"), ("vase", "vase")], "of 30 subjects two have a folder");
    for subject in &subjects {
        assert_eq!(subject.prompts.len(), 25);
        let own = subject.pictures().unwrap();
        let pictures = own.train.len() + own.validation.len() + own.test.len();
        assert_eq!((own.validation.len(), own.test.len()), (1, 1), "of {pictures}");
        assert_eq!(pictures, if subject.name == "dog" { 5 } else { 6 });
    }
    let (dog, vase) = (&subjects[0], &subjects[1]);
    assert_eq!(dog.pictures().unwrap().instance_prompt, "a photo of qwe dog");
    assert_eq!(dog.pictures().unwrap().class_prompt, "a photo of dog");
    assert_eq!(dog.prompts[10].prompt, "a qwe dog wearing a red hat");
    assert_eq!(dog.prompts[10].text, "a dog wearing a red hat");
    assert_eq!(vase.prompts[10].prompt, "a qwe vase with a wheat field in the background");
    assert_eq!(vase.prompts[24].text, "a cube shaped vase");

    // The authors' scripts: all pictures for both, the token stays, and objects are scored against the live list.
    let (subjects, notes) = resolve(&read("compare-paper.toml"), &Silent).unwrap();
    let vase = &subjects[1];
    let own = vase.pictures().unwrap();
    assert_eq!((own.train.len(), own.test.len()), (6, 6));
    assert_eq!(vase.prompts[10].prompt, "a qwe vase with a wheat field in the background");
    assert_eq!(vase.prompts[10].text, "a qwe vase wearing a red hat");
    assert!(notes.iter().any(|note| note.contains("test scores themselves")));
}
