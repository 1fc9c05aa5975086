//! The report of a comparison of control: intervals over pairs, floor and ceiling, and the page's grid of pairs.

use crate::browser::Browser;
use crate::comparison::{Comparison, Shape, Written, close};
use hra::lab::report;
use hra::lab::report::statistics::Bootstrap;
use hra::lab::results::{BASE, CellRecord};
use serde_json::{Value, json};

const CEILING: &str = "real pictures (ceiling)";
const FLOOR: &str = "base, no condition (floor)";

fn control(seeds: Vec<u64>) -> Comparison {
    Comparison::new(&Shape { seeds, prompts: 12, ..Shape::small() }).into_control()
}

/// The score of each pair in the last evaluation of a cell.
fn values(record: &CellRecord, key: &str) -> Vec<f64> {
    record.evaluations.last().unwrap().values(key)
}

#[test]
fn each_value_has_its_interval_over_pairs() {
    let comparison = control(vec![5]);
    let written = Written::new(&comparison);
    let markdown = written.text("report.md");
    let mut bootstrap = Bootstrap::default();
    let mut check = |label: &str, key: &str, title: &str, values: Vec<f64>| {
        assert_eq!(values.len(), 12, "{label} {key}");
        let told = &written.row(label)["scores"][key];
        let mean = values.iter().sum::<f64>() / 12.0;
        close(told["mean"].as_f64().unwrap(), mean);
        let (low, high) = bootstrap.interval(&[values]).unwrap();
        assert!(low < mean && mean < high);
        close(told["interval"][0].as_f64().unwrap(), low);
        close(told["interval"][1].as_f64().unwrap(), high);
        let text = format!("{mean:.3} [{low:.3}, {high:.3}]");
        let escaped = text.replace('[', "\\[").replace(']', "\\]");
        assert!(markdown.contains(&escaped), "{label} {title}: {escaped} is not in\n{markdown}");
        assert!(written.summary.text.contains(&text), "{}", written.summary.text);
    };
    for record in &comparison.records {
        let label = if record.cell.method() == BASE { FLOOR } else { record.cell.method() };
        check(label, "edge_f1", "edge F1", values(record, "edge_f1"));
        if record.cell.method() != BASE {
            check(label, "edge_f1_shuffled", "shuffled edge F1", values(record, "edge_f1_shuffled"));
        }
    }
    let real = comparison.records[0].real_pictures.iter().map(|p| p.scores["edge_f1"]).collect();
    check(CEILING, "edge_f1", "edge F1", real);
    // Differences are paired, pair by pair.
    let by_method = |method: &str| {
        let record = comparison.records.iter().find(|r| r.cell.method() == method).unwrap();
        values(record, "edge_f1")
    };
    let differences = by_method("LoRA").iter().zip(by_method("HRA")).map(|(a, b)| a - b).collect();
    let (value, [low, high], n) = written.difference("LoRA", "edge_f1");
    let expected = bootstrap.interval(&[differences]).unwrap();
    close(low, expected.0);
    close(high, expected.1);
    assert!(n == 12 && low < value && value < high);
    for words in [
        "the base model, which sees no condition",
        "trained on 450 pairs, 12 pairs for the tables",
        "the condition of another pair (shuffled)",
        "Test pairs, after 600 steps",
        "1 set of pairs, 1 seed",
    ] {
        assert!(markdown.contains(words), "{words} is not in\n{markdown}");
    }
    for words in ["subject", "rare token", "held-out pictures"] {
        let said = markdown.lines().filter(|line| line.contains(words) && !line.contains("CLIP"));
        assert_eq!(said.count(), 0, "`{words}` is of other comparisons\n{markdown}");
    }
}

#[test]
fn several_seeds_have_a_spread_instead() {
    let written = Written::new(&control(vec![0, 1, 2]));
    let score = |label: &str| &written.row(label)["scores"]["edge_f1"];
    assert!(score("HRA")["spread"].is_f64() && score("HRA")["interval"].is_null());
    // The base model and the real pictures are drawn once.
    for label in [FLOOR, CEILING] {
        assert!(score(label)["spread"].is_null() && score(label)["interval"].is_array(), "{label}");
    }
    // A comparison of subjects tells no such interval.
    let shape = Shape { seeds: vec![0], ..Shape::small() };
    let subjects = Written::new(&Comparison::new(&shape));
    assert!(subjects.row("HRA")["scores"]["dino"]["interval"].is_null());
    assert!(!subjects.text("report.md").contains("ceiling"));
}

#[test]
fn pictures_are_told_as_pairs_shuffled_or_real() {
    let comparison = control(vec![0]);
    let written = Written::new(&comparison);
    let text = written.text("report.csv");
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let head = reader.headers().unwrap().clone();
    let column = |name: &str| head.iter().position(|h| h == name).unwrap();
    let rows: Vec<csv::StringRecord> = reader.records().map(|row| row.unwrap()).collect();
    let of_kind = |kind: &str| rows.iter().filter(|row| &row[column("kind")] == kind).collect::<Vec<_>>();
    // Base once, two methods after two steps.
    assert_eq!([of_kind("pair").len(), of_kind("shuffled").len(), of_kind("real").len()], [60, 48, 12]);
    for row in of_kind("pair") {
        assert!(!row[column("edge_f1")].is_empty() && row[column("edge_f1_shuffled")].is_empty());
    }
    for row in of_kind("shuffled") {
        assert!(row[column("edge_f1")].is_empty() && !row[column("edge_f1_shuffled")].is_empty());
    }
    let prompts = &comparison.plan.subjects[0].prompts;
    for (i, row) in of_kind("real").iter().enumerate() {
        assert_eq!(&row[column("file")], format!("subjects/robot/test/{i:05}.png"));
        assert_eq!(row[column("prompt")], prompts[i]);
        assert_eq!(&row[column("method")], "real");
    }
}

#[test]
fn the_grid_shows_condition_and_real_picture_beside_the_drawn_ones() {
    let Some(mut browser) = Browser::start() else { return };
    let comparison = control(vec![0]);
    let dir = tempfile::tempdir().unwrap();
    comparison.write(dir.path());
    comparison.draw(dir.path());
    report::write(dir.path()).unwrap();
    browser.device(1300, 900, false);
    browser.open(&format!("file://{}/report.html", dir.path().display()));
    let headings = browser.eval("[...document.querySelectorAll('#grid thead th')].map((h) => h.textContent)");
    assert_eq!(headings, json!(["caption", "condition", "real", "base", "HRA", "LoRA"]));
    assert_eq!(browser.eval("document.querySelectorAll('#grid tbody tr').length"), 12);
    assert_eq!(browser.eval("document.querySelectorAll('#own img').length"), 0);
    // Captions may be the same; every row has files of its own.
    let row = |browser: &mut Browser, row: usize| -> Vec<String> {
        let script = format!(
            "[...document.querySelectorAll('#grid tbody tr:nth-child({row}) img')].map((i) => decodeURI(i.src).split('{}/').pop())",
            dir.path().display()
        );
        let found: Value = browser.eval(&script);
        found.as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_string()).collect()
    };
    let cell = |method: &str| {
        let id = &comparison.records.iter().find(|r| r.cell.method() == method).unwrap().cell.id;
        format!("cells/{id}")
    };
    let place = |kind: &str, i: usize| format!("subjects/robot/{kind}/{i:05}.png");
    let expected = |i: usize, condition: usize, which: usize| {
        vec![
            place("test_conditions", condition),
            place("test", i),
            format!("{}/step-000000/test/{i:02}-00.png", cell(BASE)),
            format!("{}/step-000600/test/{i:02}-{which:02}.png", cell("HRA")),
            format!("{}/step-000600/test/{i:02}-{which:02}.png", cell("LoRA")),
        ]
    };
    assert_eq!(row(&mut browser, 1), expected(0, 0, 0));
    assert_eq!(row(&mut browser, 2), expected(1, 1, 0));
    let ways = browser.eval("[...picture.options].map((o) => o.textContent)");
    assert_eq!(ways, json!(["its condition", "another's condition"]));
    browser.eval("picture.value = '1'; picture.dispatchEvent(new Event('change'))");
    assert_eq!(row(&mut browser, 12), expected(11, 0, 1));
    // All pictures open large and load; the walk goes from condition to real picture to the drawn ones.
    browser.click("#grid tbody tr:nth-child(3) td:nth-child(2) .thumbnail");
    browser.wait("large.open && large.querySelector('img').naturalWidth === 48");
    let facts = "Object.fromEntries([...large.querySelectorAll('dt')].map((t) => [t.textContent, t.nextSibling.textContent]))";
    assert_eq!(browser.eval("large.querySelector('img').alt.split(':')[0]"), "condition of pair 4");
    browser.key("ArrowRight", 39);
    assert_eq!(browser.eval(facts), json!({"pair": "3", "edge F1": "0.920"}));
    browser.key("ArrowRight", 39);
    assert_eq!(browser.eval(facts)["method"], "base");
    browser.key("ArrowRight", 39);
    let record = comparison.records.iter().find(|r| r.cell.method() == "HRA").unwrap();
    let score = record.evaluations.last().unwrap().prompts[2].pictures[1].scores["edge_f1_shuffled"];
    assert_eq!(browser.eval(facts)["shuffled edge F1"], format!("{score:.3}"));
    assert_eq!(browser.eval(facts)["picture"], "3, seed 2");
    assert!(browser.complaints().is_empty(), "{:#?}", browser.complaints());
    let asked = browser.requests();
    assert!(!asked.is_empty() && asked.iter().all(|url| url.starts_with("file://")), "{asked:?}");
}
