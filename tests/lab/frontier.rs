//! `[frontier]` through the real binary: cells that are done are drawn along scales, without a training.

use crate::browser::Browser;
use crate::compare::{METHODS, config, records, scratch};
use crate::support::scratch::Scratch;
use hra::data::image::load_rgb;
use hra::lab::results::{CellRecord, Evaluation, Plan, Set};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const HRA: &str = "cells/hra-lr3e-3-cat-s0-";

/// The folder of the first method's cell on the first subject.
fn cell(scratch: &Scratch, start: &str) -> PathBuf {
    let plan = Plan::read(&scratch.path("out")).unwrap();
    let id = &plan.cells.iter().find(|c| format!("cells/{}", c.id).starts_with(start)).unwrap().id;
    scratch.path(&format!("out/cells/{id}"))
}

fn with_frontier(scratch: &Scratch, lines: &str) {
    let table = format!("[frontier]\n{lines}\n");
    std::fs::write(scratch.path("c.toml"), config("score_steps = [2]", &table, METHODS)).unwrap();
}

/// When each file of a folder that a training or a drawing makes was written.
fn written(cells: &Path) -> Vec<(PathBuf, SystemTime)> {
    let mut found = Vec::new();
    let mut folders = vec![cells.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            let name = entry.file_name().into_string().unwrap();
            if path.is_dir() {
                folders.push(path);
            } else if !["record.json", "task.json", "log.txt", "resolution.json", "drawn.json"]
                .contains(&name.as_str())
                && name != ".lock"
            {
                found.push((path.clone(), entry.metadata().unwrap().modified().unwrap()));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn finished_cells_are_drawn_along_scales_without_training() {
    let scratch = scratch(&config("score_steps = [2]", "", METHODS));
    scratch.ok(&["compare", "c.toml"]);
    let before = written(&scratch.path("out/cells"));
    let trained = records(&scratch.path("out"));

    // Checkpoints are gone when a comparison is done.
    with_frontier(&scratch, "scales = [0, 0.5, 1]");
    let refused = scratch.run(&["compare", "c.toml"]);
    assert_ne!(refused.code, 0);
    assert!(refused.err.contains("[frontier] checkpoints"), "{}", refused.err);

    with_frontier(
        &scratch,
        "scales = [0, 0.5, 1, -0.5]\ncheckpoints = [6]\ndrifts = [0.5, 300]\ndrift_limit = 200",
    );
    let planned = pictures_left(&scratch, &[]);
    let told = scratch.ok(&["compare", "c.toml"]);
    assert!(told.out.contains("HRA"), "{}", told.out);
    let after = written(&scratch.path("out/cells"));
    for old in &before {
        assert!(after.contains(old), "{} was written again", old.0.display());
    }
    let made: Vec<String> = after
        .iter()
        .filter(|file| !before.contains(file))
        .map(|(path, _)| path.to_string_lossy().into_owned())
        .collect();
    let elsewhere = |path: &&String| {
        !["/scale-0.5/", "/scale--0.5/", "/validation/"].iter().any(|part| path.contains(part))
    };
    assert_eq!(made.iter().find(elsewhere), None, "only the grid and the validation prompts are drawn");
    assert!(made.iter().all(|path| path.ends_with(".png")), "{made:?}");
    assert_eq!(planned, made.len(), "the plan counts what is drawn");
    // One picture of the validation prompt, two of each of two test prompts, one of the unrelated prompt.
    let grid = made.iter().filter(|path| path.contains("/scale-")).count();
    assert_eq!(grid, 4 * 2 * (1 + 4 + 1), "4 trainings at 2 scales");

    // Nothing of the trainings and of their scores has changed.
    let scores = |records: &[Value]| -> Vec<Value> {
        records.iter().map(|r| r["evaluations"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(scores(&records(&scratch.path("out"))), scores(&trained));
    the_grid_is_what_sample_draws(&scratch);
    the_report_has_the_curves(&scratch);
    a_point_opens_its_pictures_on_a_narrow_page(&scratch);
    a_plan_counts_what_is_to_be_drawn(&scratch);
}

/// Pictures that a plan says are to be drawn; nothing is to be trained.
fn pictures_left(scratch: &Scratch, more: &[&str]) -> usize {
    let again = scratch.ok(&[&["compare", "c.toml", "--dry-run", "--json"], more].concat()).out;
    let plan: Value = serde_json::from_str(&again).unwrap();
    assert!(!more.is_empty() || plan["trainings"] == 0, "{again}");
    plan["pictures"].as_u64().unwrap() as usize
}

fn a_plan_counts_what_is_to_be_drawn(scratch: &Scratch) {
    assert_eq!(pictures_left(scratch, &[]), 0, "all is done");
    let hra = cell(scratch, HRA);
    std::fs::remove_file(hra.join("record.json")).unwrap();
    assert_eq!(pictures_left(scratch, &[]), 0, "only scores are missing");
    std::fs::remove_dir_all(hra.join("step-000006/scale-0.5")).unwrap();
    assert_eq!(pictures_left(scratch, &[]), 1 + 4 + 1, "a place of the grid is missing");
    std::fs::remove_file(hra.join("step-000006/scale--0.5/test/01-00.png")).unwrap();
    assert_eq!(pictures_left(scratch, &[]), 6 + 2, "a picture is missing: its prompt is drawn whole");
    let settings = std::fs::read_to_string(scratch.path("c.toml")).unwrap();
    let changed = settings.replace("guidance = ", "guidance = 1");
    assert_ne!(settings, changed);
    std::fs::write(scratch.path("c.toml"), changed).unwrap();
    let class_pictures = 2 * 2;
    let afresh = pictures_left(scratch, &["--output-dir", "another"]) - class_pictures;
    assert_eq!(pictures_left(scratch, &[]), afresh, "what was drawn in another way is drawn anew");
}

fn the_grid_is_what_sample_draws(scratch: &Scratch) {
    let hra = cell(scratch, HRA);
    let base = cell(scratch, "cells/base-cat-");
    let assets = crate::support::base::root().join("assets/tiny-sd");
    for (scale, drawn) in [
        ("0", base.join("step-000000/test")),
        ("0.5", hra.join("step-000006/scale-0.5/test")),
        ("-0.5", hra.join("step-000006/scale--0.5/test")),
        ("1", hra.join("step-000006/test")),
    ] {
        let adapter = format!("{}={scale}", hra.join("run").display());
        let out = format!("again-{scale}");
        let words = ["--prompt", "a fluent 3d emoji of a sks cat face", "--num-images", "2", "--seed", "0"];
        let how = ["--scheduler", "ddim", "--steps", "2", "--guidance", "3", "--threads", "1"];
        let model = ["sample", "--model", assets.to_str().unwrap(), "--adapter", &adapter, "--output", &out];
        scratch.ok(&[&model[..], &words, &how].concat());
        for i in 0..2 {
            let ours = load_rgb(&drawn.join(format!("00-{i:02}.png"))).unwrap();
            let again = load_rgb(&scratch.path(&format!("{out}/0000-{i:04}.png"))).unwrap();
            assert!(ours == again, "scale {scale}, picture {i}");
        }
    }
}

fn the_report_has_the_curves(scratch: &Scratch) {
    let report: Value =
        serde_json::from_slice(&std::fs::read(scratch.path("out/report.json")).unwrap()).unwrap();
    let record = CellRecord::read(&cell(scratch, HRA).join("record.json")).unwrap();
    assert_eq!(record.frontier.unwrap().points.len(), 3 * 2, "three scales, two sets");
    let curve = &report["frontier"]["curves"][0];
    let rows = report["rows"].as_array().unwrap();
    let row = |label: &str| rows.iter().find(|row| row["label"] == label).unwrap();
    let points = curve["points"].as_array().unwrap();
    let scales: Vec<f64> = points.iter().map(|p| p["scale"].as_f64().unwrap()).collect();
    assert_eq!(scales, [0.0, -0.5, 0.5, 1.0]);
    let near = |a: &Value, b: &Value| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-12;
    assert!(near(&points[0]["likeness"], &row("base")["scores"]["clip_i"]["mean"]));
    assert!(near(&points[3]["likeness"], &row("HRA")["scores"]["clip_i"]["mean"]));
    assert!(near(&points[3]["drift"], &row("HRA")["scores"]["drift"]["mean"]));
    assert_eq!(points[0]["drift"], 0.0);
    // Beyond what was measured there is no value.
    assert!(curve["at_drift"][1].is_null() && curve["area"].is_null(), "{curve}");
    let text = std::fs::read_to_string(scratch.path("out/report.md")).unwrap();
    assert!(text.contains("## At the same drift"), "{text}");
}

fn a_point_opens_its_pictures_on_a_narrow_page(scratch: &Scratch) {
    let Some(mut browser) = Browser::start() else { return };
    browser.device(390, 844, false);
    browser.open(&format!("file://{}", scratch.path("out/report.html").display()));
    let first = "document.querySelector('main svg').closest('section').id";
    assert_eq!(browser.eval(first), "frontier", "the curves are the report's first plot");
    assert_eq!(browser.eval("document.documentElement.scrollWidth <= 390"), true);
    let small = "[...document.querySelectorAll('#frontier svg text')].filter((t) => { const b = t.getBoundingClientRect(); \
                 return Math.max(b.height, b.width) < 9 || b.left < 0 || b.right > 390; }).map((t) => t.textContent)";
    assert_eq!(browser.eval(small), serde_json::json!([]), "text that cannot be read");
    let lines = "[...document.querySelectorAll('#frontier .series polyline')].length";
    let points = "document.querySelectorAll('#frontier [data-opens]').length";
    // A method whose every point is worse than the base model has no line.
    assert!(browser.eval(lines).as_u64().unwrap() >= 1);
    assert_eq!(browser.eval(points), 2 * 3, "two methods at three scales");
    for (number, key) in [(0, None), (2, Some(("Enter", 13)))] {
        let point = format!("document.querySelectorAll('#frontier [data-opens]')[{number}]");
        match key {
            None => browser.eval(&format!("{point}.dispatchEvent(new MouseEvent('click'))")),
            Some((name, code)) => {
                browser.eval(&format!("{point}.focus()"));
                browser.key(name, code);
                Value::Null
            }
        };
        browser.wait(
            "document.querySelector('#large').open && document.querySelector('#large img').naturalWidth > 0",
        );
        let fact = |title: &str| {
            format!(
                "[...document.querySelectorAll('#large dt')].find((t) => t.textContent === '{title}').nextSibling.textContent"
            )
        };
        let told = browser.eval(&format!("{point}.dataset.opens")).as_str().unwrap().to_string();
        let told: Vec<&str> = told.split(',').collect();
        assert_eq!(browser.eval(&fact("method")), "HRA");
        assert_eq!(browser.eval(&fact("step")), told[2]);
        assert_eq!(browser.eval(&fact("adapter scale")), told[3]);
        let address = browser.eval("document.querySelector('#large img').getAttribute('src')");
        let place =
            if told[3] == "1" { "step-000006/test/".into() } else { format!("scale-{}/test/", told[3]) };
        assert!(address.as_str().unwrap().contains(&place), "{address} {told:?}");
        browser.click("#large [data-move=close]");
    }
    assert!(browser.complaints().is_empty(), "{:#?}", browser.complaints());
}

#[test]
fn what_a_frontier_cannot_be_is_refused_with_all_reasons() {
    let table = "[frontier]\nscales = [0, 0.5, 0.5, 9]\ncheckpoints = [3]\ndrifts = [-1]\ndrift_limit = nan";
    let wrong = config("", table, METHODS)
        .replace("drift_prompts", "# drift_prompts")
        .replace("validation_prompts", "# validation_prompts");
    let error = scratch(&wrong).run(&["compare", "c.toml"]);
    assert_eq!(error.code, 2);
    for part in ["scales:", "checkpoints:", "drifts:", "drift_limit:", "drift_prompts", "validation_prompts"]
    {
        assert!(error.err.contains(part), "{part}\n{}", error.err);
    }
}

/// Of points `(drift, likeness)`: the likeness at a drift, straight between the best point with less and the next better one with
/// more, or that of the best where none is better.
fn most_within(points: &[(f64, f64)], limit: f64) -> f64 {
    let best = |points: &[(f64, f64)]| points.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1));
    let (below, above): (Vec<_>, Vec<_>) = points.iter().partition(|point| point.0 <= limit);
    let (low, from) = best(&below).map(|(drift, likeness)| (likeness, drift)).unwrap();
    let better = above.into_iter().filter(|point| point.1 > low).min_by(|a, b| a.0.total_cmp(&b.0));
    better.map_or(low, |(drift, likeness)| low + (likeness - low) * (limit - from) / (drift - from))
}

#[test]
fn a_search_at_a_drift_looks_along_the_grid_and_every_method_has_a_row_at_the_common_rate() {
    let limit = 4.0;
    let tables = format!(
        "[search]\nlearning_rates = [1e-3, 3e-2]\nsubjects = [\"cat\"]\nseeds = [0, 1]\ndrift = {limit}\n\
         [frontier]\nscales = [0.5, 2]\n"
    );
    // Cheaper than the whole UNet.
    let methods = METHODS.replace("\"full\" }", "\"lora\", rank = 2 }");
    let scratch = scratch(&config("score_steps = [4]\ncommon_rate = 1e-3", &tables, &methods));
    scratch.ok(&["compare", "c.toml"]);
    let out = scratch.path("out");
    let report: Value = serde_json::from_slice(&std::fs::read(out.join("report.json")).unwrap()).unwrap();
    let records = Plan::read(&out).unwrap().records(&out).unwrap();
    for best in report["rates"].as_array().unwrap() {
        let method = best["method"].as_str().unwrap();
        let tried = best["rates"].as_array().unwrap();
        assert_eq!(tried.len(), 2);
        let objective = |rate: f64| {
            let cells: Vec<&CellRecord> = records
                .iter()
                .filter(|r| r.cell.method() == method && r.cell.learning_rate() == Some(rate))
                .filter(|r| r.cell.subject == "cat")
                .collect();
            assert_eq!(cells.len(), 2, "two seeds of one subject");
            // The base model: no drift, its own likeness.
            let base = records.iter().find(|r| r.cell.is_base() && r.cell.subject == "cat").unwrap();
            let own = base.evaluations.iter().find(|e| e.set == Set::Validation).unwrap();
            let mut points = vec![(0.0, own.scores["clip_i"])];
            for (step, scale) in [(4, 0.5), (4, 2.0), (6, 0.5), (6, 2.0)] {
                let at = |r: &&CellRecord| {
                    let points = &r.frontier.as_ref().unwrap().points;
                    let of = |e: &Evaluation| e.step == step && e.set == Set::Validation;
                    let here = points.iter().find(|p| p.scale == scale && of(&p.evaluation));
                    let scores = &here.unwrap().evaluation.scores;
                    (scores["drift"], scores["clip_i"])
                };
                let [a, b] = [at(&cells[0]), at(&cells[1])];
                points.push(((a.0 + b.0) / 2.0, (a.1 + b.1) / 2.0));
            }
            most_within(&points, limit)
        };
        for rate in tried {
            let expected = objective(rate["rate"].as_f64().unwrap());
            assert!((rate["objective"].as_f64().unwrap() - expected).abs() < 1e-9, "{rate} {expected}");
            assert!(rate["spread"].is_number(), "two seeds have a spread");
        }
        let reaching: Vec<&Value> =
            tried.iter().filter(|rate| rate["reach"].as_f64().unwrap() >= limit).collect();
        let counted = if reaching.is_empty() { tried.iter().collect() } else { reaching };
        let most = counted
            .iter()
            .max_by(|a, b| a["objective"].as_f64().unwrap().total_cmp(&b["objective"].as_f64().unwrap()));
        assert_eq!(best["rate"], most.unwrap()["rate"]);
    }
    // The rate that was chosen is trained for the tables, and so is the common one.
    let rows = report["rows"].as_array().unwrap();
    for method in ["HRA", "full"] {
        let rates: Vec<f64> = rows
            .iter()
            .filter(|row| row["label"].as_str().unwrap().starts_with(method))
            .map(|row| row["rate"].as_f64().unwrap())
            .collect();
        assert!(rates.contains(&1e-3), "{rows:?}");
        let curves = report["frontier"]["curves"].as_array().unwrap();
        for rate in rates {
            let mine = |c: &&Value| c["label"].as_str().unwrap().starts_with(method) && c["rate"] == rate;
            assert_eq!(curves.iter().find(mine).unwrap()["cells"], 2, "{method} {rate}: cat and robot");
        }
    }
    let text = std::fs::read_to_string(out.join("report.md")).unwrap();
    assert!(text.contains("the most likeness with a drift of 4, along the grid"), "{text}");
    // The checkpoints that the grid was drawn from are gone, and nothing is wanted of them any more.
    let made = |name: &str| std::fs::read(out.join(name)).unwrap();
    let (plan, table, before) = (made("plan.json"), made("report.json"), written(&out.join("cells")));
    scratch.ok(&["compare", "c.toml"]);
    assert!(
        plan == made("plan.json") && table == made("report.json") && before == written(&out.join("cells"))
    );
}

#[test]
fn a_search_at_a_drift_needs_a_grid_and_a_validation_picture() {
    let refused = |tables: &str, change: &dyn Fn(String) -> String| {
        let error = scratch(&change(config("", tables, METHODS))).run(&["compare", "c.toml"]);
        assert_eq!(error.code, 2);
        error.err
    };
    let same = |text: String| text;
    let search = "[search]\nlearning_rates = [1e-3]\ndrift = 4\n";
    assert!(refused(search, &same).contains("needs a table [frontier]"));
    let frontier = "[frontier]\nscales = [1]\n";
    let both = format!("{search}objective = {{ clip_i = 1.0 }}\n{frontier}");
    assert!(refused(&both, &same).contains("either an objective or a drift"));
    let zero = format!("{}{frontier}", search.replace("= 4", "= 0"));
    assert!(refused(&zero, &same).contains("search: drift: expected a positive number"));
    let robot = format!("{search}subjects = [\"robot\"]\n{frontier}");
    let said = refused(&robot, &same);
    assert!(said.contains("found none") && said.contains("hint: of five pictures"), "{said}");
    let only = format!("{search}only = true\n{frontier}");
    let common = |text: String| format!("common_rate = 1e-2\n{text}");
    assert!(refused(&only, &common).contains("must have it among its learning_rates"));
}
