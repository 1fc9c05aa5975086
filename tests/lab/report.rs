//! The report of a comparison: its numbers against numbers that are worked out in another way, and what it says of parts that
//! are not there.

use crate::comparison::{Comparison, Shape, Written, close, each_score, rename};
use hra::lab::report;
use hra::lab::results::*;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

const FILES: [&str; 5] = ["report.html", "report.csv", "report-cells.csv", "report.json", "report.md"];

/// The rows of a CSV file by heading, read by hand: no field of these has a comma, quote or line break.
fn simple_csv(text: &str) -> Vec<BTreeMap<String, String>> {
    let mut lines = text.lines().map(|line| line.split(',').map(String::from).collect::<Vec<_>>());
    let head = lines.next().unwrap();
    lines
        .map(|fields| {
            assert_eq!(fields.len(), head.len());
            head.iter().cloned().zip(fields).collect()
        })
        .collect()
}

/// Means and spreads from the pictures of `report.csv`, step by step, as one would in a spreadsheet.
#[test]
fn the_table_follows_from_the_pictures() {
    let written = Written::new(&Comparison::new(&Shape::small()));
    let rows = simple_csv(&written.text("report.csv"));
    // 2 base cells and 12 trained ones with 2 steps; 4 test and 1 validation prompt, 2 drift prompts for each set; 2 pictures.
    assert_eq!(rows.len(), (2 + 12 * 2) * (4 + 1 + 2 * 2) * 2);
    for (method, step) in [("HRA", "600"), ("LoRA", "600"), ("base", "0")] {
        for (key, kind) in [("dino", "subject"), ("lpips_vgg", "subject"), ("drift", "drift")] {
            let mut of_seeds: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
            for row in &rows {
                if [&row["method"], &row["step"], &row["set"], &row["kind"]] == [method, step, "test", kind] {
                    of_seeds.entry(&row["seed"]).or_default().push(row[key].parse().unwrap());
                }
            }
            // Every prompt has as many pictures, so the mean over all is the mean of means.
            let seeds: Vec<f64> = of_seeds.values().map(|v| v.iter().sum::<f64>() / v.len() as f64).collect();
            let mean = seeds.iter().sum::<f64>() / seeds.len() as f64;
            let told = &written.row(method)["scores"][key];
            close(told["mean"].as_f64().unwrap(), mean);
            if method == "base" {
                assert!(told["spread"].is_null());
                continue;
            }
            // Of three values a, b, c: variance = ((a-b)^2 + (b-c)^2 + (c-a)^2) / 6.
            let [a, b, c] = seeds[..] else { panic!("{seeds:?}") };
            let spread = (((a - b).powi(2) + (b - c).powi(2) + (c - a).powi(2)) / 6.0).sqrt();
            close(told["spread"].as_f64().unwrap(), spread);
            let digits = if key == "drift" { 2 } else { 3 };
            let cell = format!("{mean:.digits$} ± {spread:.digits$}");
            for file in ["report.md", "report.html"] {
                let shown = written.text(file).replace("<span class=\"spread\">", "");
                assert!(shown.contains(&cell), "{file}: {cell}");
            }
            assert!(written.summary.text.contains(&cell), "{}", written.summary.text);
        }
    }
}

#[test]
fn cells_have_their_means_and_budgets() {
    let written = Written::new(&Comparison::new(&Shape::small()));
    let pictures = simple_csv(&written.text("report.csv"));
    let cells = simple_csv(&written.text("report-cells.csv"));
    assert_eq!(cells.len(), 2 * 2 + 12 * 2 * 2);
    for cell in &cells {
        let same = |row: &&BTreeMap<String, String>| {
            row["kind"] == "subject" && ["cell", "step", "set"].iter().all(|key| row[*key] == cell[*key])
        };
        let values: Vec<f64> =
            pictures.iter().filter(same).map(|row| row["clip_t"].parse().unwrap()).collect();
        assert_eq!(cell["pictures"], values.len().to_string());
        close(cell["clip_t"].parse().unwrap(), values.iter().sum::<f64>() / values.len() as f64);
    }
    let lora = cells.iter().find(|c| c["method"] == "LoRA" && c["seed"] == "2").unwrap();
    assert_eq!([&lora["parameters"], &lora["seconds"], &lora["interrupted"]], ["1600000", "92", "false"]);
    assert_eq!(cells[0]["parameters"], "", "the base model has no budget");
    // Seeds 0, 1, 2 took 60, 61 and 62 seconds.
    close(written.row("HRA")["budget"]["seconds"].as_f64().unwrap(), 61.0);
}

#[test]
fn interrupted_cells_count_for_scores_and_not_for_times() {
    let mut comparison = Comparison::new(&Shape::small());
    let whole = Written::new(&comparison);
    for record in comparison.records.iter_mut().filter(|r| r.cell.method() == "HRA" && r.cell.seed() == 0) {
        let budget = record.budget.as_mut().unwrap();
        *budget =
            Budget { interrupted: true, seconds: Some(9e9), peak_memory: Some(9 << 40), ..budget.clone() };
    }
    let written = Written::new(&comparison);
    let (before, after) = (whole.row("HRA"), written.row("HRA"));
    assert_eq!(after["interrupted"], 2);
    assert_eq!(after["scores"], before["scores"]);
    close(after["budget"]["seconds"].as_f64().unwrap(), 61.5);
    assert_eq!(after["budget"]["peak_memory"], before["budget"]["peak_memory"]);
    assert!(written.text("report.md").contains("| HRA \\*"), "{}", written.text("report.md"));
    assert!(written.summary.text.contains("2 cells interrupted"), "{}", written.summary.text);
    // Times from two machines are said to be so.
    let note = "the cells ran in 2 different ways";
    assert!(!written.text("report.html").contains(note));
    comparison.records[3].environment.jobs = 2;
    assert!(Written::new(&comparison).text("report.html").contains(note));
}

#[test]
fn the_same_records_give_the_same_bytes() {
    let written = Written::new(&Comparison::new(&Shape::small()));
    let read = || FILES.map(|name| std::fs::read(written.dir.path().join(name)).unwrap());
    let first = read();
    report::write(written.dir.path()).unwrap();
    assert_eq!(read(), first);
}

/// LoRA's pictures are made HRA's plus a constant: the difference has no width, whatever else varies.
#[test]
fn a_constant_difference_is_found_exactly() {
    let mut comparison = Comparison::new(&Shape::small());
    let hra: Vec<CellRecord> =
        comparison.records.iter().filter(|r| r.cell.method() == "HRA").cloned().collect();
    for record in comparison.records.iter_mut().filter(|r| r.cell.method() == "LoRA") {
        let twin =
            |r: &&CellRecord| r.cell.subject == record.cell.subject && r.cell.seed() == record.cell.seed();
        record.evaluations = hra.iter().find(twin).unwrap().evaluations.clone();
        each_score(record, |_, key, value| match key {
            "dino" => *value += 0.125,
            "clip_t" => *value -= 0.25,
            "drift" => *value += 2.0,
            _ => {}
        });
    }
    // One prompt of one cell lacks a picture's score: that picture counts in neither.
    let lacking = comparison.records.iter_mut().find(|r| r.cell.method() == "LoRA").unwrap();
    let last = lacking.evaluations.len() - 1;
    lacking.evaluations[last].prompts[0].pictures[1].scores.remove("dino");
    let written = Written::new(&comparison);
    // Two subjects, three seeds, four prompts; two drift prompts.
    for (key, expected, n) in
        [("dino", 0.125, 24), ("clip_t", -0.25, 24), ("drift", 2.0, 12), ("clip_i", 0.0, 24)]
    {
        let (value, interval, found) = written.difference("LoRA", key);
        close(value, expected);
        close(interval[0], expected);
        close(interval[1], expected);
        assert_eq!(found, n, "{key}");
    }
    let findings = &written.json["findings"].as_array().unwrap()[1];
    assert_eq!(
        findings,
        "HRA against LoRA: better on CLIP-T (+0.250), drift (\u{2212}2.00); worse on DINO (\u{2212}0.125); no difference seen on \
         CLIP-I, LPIPS, diversity"
    );
    let seeds = &written.row("LoRA")["differences"]["dino"]["seeds"];
    assert_eq!(seeds.as_array().unwrap().len(), 3);
}

/// Five subjects of which one differs by 1: a resample's mean is k/5 with k binomial(5, 1/5). P(k <= 2) = 0.942 and
/// P(k <= 3) = 0.993, P(0) = 0.328: the interval is [0, 0.6].
#[test]
fn from_five_subjects_up_subjects_are_drawn() {
    let mut comparison = Comparison::new(&Shape { subjects: 5, ..Shape::small() });
    for record in comparison.records.iter_mut() {
        let value = f64::from(record.cell.method() == "LoRA" && record.cell.subject == "cat");
        each_score(record, |_, key, score| {
            if key == "dino" {
                *score = value;
            }
        });
    }
    let written = Written::new(&comparison);
    let (value, interval, n) = written.difference("LoRA", "dino");
    close(value, 0.2);
    close(interval[0], 0.0);
    close(interval[1], 0.6);
    assert_eq!((n, &written.json["resampled"]), (5, &Value::from("subjects")));
    assert!(written.text("report.html").contains("from n subjects"));
    assert!(
        !written.text("report.html").contains("class=\"seeds\""),
        "seeds are shown below five subjects only"
    );
}

/// Below five subjects the pairs of prompt and seed are drawn within each subject. One subject, five pairs, one of which
/// differs by 1: the same binomial.
#[test]
fn below_five_subjects_prompts_and_seeds_are_drawn() {
    let shape = Shape { subjects: 1, seeds: vec![4], prompts: 5, ..Shape::small() };
    let mut comparison = Comparison::new(&shape);
    for record in comparison.records.iter_mut() {
        each_score(record, |_, key, score| {
            if key == "dino" {
                *score = 0.0;
            }
        });
        if record.cell.method() == "LoRA" {
            for evaluation in &mut record.evaluations {
                let prompt = evaluation.prompts.last_mut().unwrap();
                prompt.pictures.iter_mut().for_each(|p| *p.scores.get_mut("dino").unwrap() = 1.0);
                evaluation.summarise();
            }
        }
    }
    let written = Written::new(&comparison);
    let (value, interval, n) = written.difference("LoRA", "dino");
    close(value, 0.2);
    close(interval[1], 0.6);
    assert_eq!((interval[0], n), (0.0, 5));
    assert!(written.row("LoRA")["scores"]["dino"]["spread"].is_null(), "one seed has no spread");
    // 24 pairs of two subjects are told as such.
    let two = Written::new(&Comparison::new(&Shape::small()));
    assert_eq!(two.json["resampled"], "pairs of prompt and seed within each subject");
}

#[test]
fn what_is_missing_is_named() {
    let mut comparison = Comparison::new(&Shape::small());
    let gone = comparison.records.remove(5).cell.id;
    let unscored = &mut comparison.records[7];
    unscored.evaluations.retain(|e| e.step != 600);
    let unscored = unscored.cell.id.clone();
    let written = Written::new(&comparison);
    assert_eq!((written.summary.there, written.summary.planned), (13, 14));
    assert_eq!(written.summary.missing, std::slice::from_ref(&gone));
    for name in [&gone, &unscored] {
        for told in [
            &written.summary.text,
            &written.text("report.html"),
            &written.text("report.md").replace('\\', ""),
        ] {
            assert!(told.contains(name.as_str()), "{name}\n{told}");
        }
    }
    assert_eq!(written.json["unscored"], serde_json::json!([unscored]));
    // The pairs of five trainings with five, as two subjects: four prompts each.
    assert_eq!(written.difference("LoRA", "dino").2, 16);
}

#[test]
fn small_comparisons_have_a_report_too() {
    let one = Shape {
        methods: vec!["HRA"],
        subjects: 1,
        seeds: vec![0],
        prompts: 1,
        pictures: 1,
        ..Shape::small()
    };
    let written = Written::new(&Comparison::new(&one));
    assert!(written.row("base")["differences"]["dino"]["interval"].is_null(), "one pair has no interval");
    assert!(written.text("report.html").contains("no interval"));

    // Only LPIPS: neither CLIP nor DINO.
    let written = Written::new(&Comparison::new(&Shape { keys: vec!["lpips_vgg"], ..Shape::small() }));
    assert!(!written.text("report.html").contains("CLIP"));
    assert!(!written.text("report.html").contains("LPIPS against parameters"), "LPIPS is no likeness");

    // No record at all; then only the base model's.
    let mut comparison = Comparison::new(&Shape::small());
    let records = std::mem::take(&mut comparison.records);
    let written = Written::new(&comparison);
    assert_eq!((written.summary.there, written.summary.missing.len()), (0, 14));
    assert!(written.row("HRA")["scores"].as_object().unwrap().is_empty());
    comparison.records = records.into_iter().filter(|r| r.cell.method() == BASE).collect();
    assert_eq!(Written::new(&comparison).json["set"], "test");

    // No prompt was drawn, and no method was planned.
    comparison.plan.methods.clear();
    comparison.plan.subjects.clear();
    comparison.plan.cells.clear();
    comparison.records.clear();
    Written::new(&comparison);
}

#[test]
fn names_and_prompts_are_text_and_nothing_else() {
    let mut comparison = Comparison::new(&Shape::small());
    let evil = "<script>alert(\"1\")</script>'|\n`x`&amp;";
    comparison.plan.title = evil.into();
    comparison.plan.notes = vec![evil.into()];
    comparison.plan.common.push((evil.into(), evil.into()));
    comparison.plan.subjects[0].prompts[0] = evil.into();
    comparison.plan.subjects[0].train_pictures = vec!["https://example.org/x.png\"onerror=\"alert(1)".into()];
    comparison.plan.methods[0].label = evil.into();
    for cell in comparison.plan.cells.iter_mut().filter(|c| c.method() == "HRA") {
        rename(cell, evil);
    }
    for record in &mut comparison.records {
        record.environment.device = evil.into();
        if record.cell.method() == "HRA" {
            rename(&mut record.cell, evil);
        }
        record.evaluations[0].prompts[0].prompt = evil.into();
        record.evaluations[0].prompts[0].pictures[0].file = "../../a\"b<c>.png".into();
        record.evaluations[0].scores.insert(evil.into(), 1.0);
    }
    let written = Written::new(&comparison);
    let page = written.text("report.html");
    assert!(!page.contains("<script>alert") && !page.contains("\"onerror"), "unescaped");
    assert!(page.contains("&lt;script&gt;alert(&quot;1&quot;)"), "escaped, but there");
    assert!(page.contains("./https%3A//example.org/x.png%22onerror"));
    // A closing tag inside the data would end it: each block parses whole.
    let blocks = page.split("<script type=\"application/json\"").skip(1);
    let parsed = blocks.map(|b| {
        let json = b.split_once('>').unwrap().1.split_once("</script>").unwrap().0;
        serde_json::from_str::<Value>(json).unwrap()
    });
    let parsed: Vec<Value> = parsed.collect();
    assert_eq!(parsed.len(), 3);
    assert_eq!(parsed[0]["methods"][0], evil);
    let markdown = written.text("report.md");
    assert!(!markdown.contains("<script>") && !markdown.contains("'|\n"), "{markdown}");
    assert!(!written.summary.text.contains("|\n"), "line breaks of labels are not printed");
    // CSV: one library writes it, another way reads it.
    let csv = written.text("report.csv");
    assert!(csv.contains("\"<script>alert(\"\"1\"\")</script>'|\n`x`&amp;\""), "quoted as RFC 4180 says");
}

/// A spreadsheet runs a cell that begins with one of these; with an apostrophe before it, it shows the text.
#[test]
fn prompts_and_names_that_begin_like_formulas_are_shown_by_spreadsheets_and_not_run() {
    let mut comparison = Comparison::new(&Shape::small());
    let (prompt, label) = ("=HYPERLINK(\"https://example.org\")", "+HRA");
    comparison.plan.methods[0].label = label.into();
    for cell in comparison.plan.cells.iter_mut().filter(|c| c.method() == "HRA") {
        rename(cell, label);
    }
    for record in &mut comparison.records {
        if record.cell.method() == "HRA" {
            rename(&mut record.cell, label);
        }
        record.environment.device = "@cpu".into();
        let evaluation = &mut record.evaluations[0];
        evaluation.prompts[0].prompt = prompt.into();
        evaluation.scores.insert("-key".into(), 1.0);
        evaluation.prompts[0].pictures[0].scores.insert("-key".into(), -0.5);
    }
    let written = Written::new(&comparison);
    for (file, texts) in [("report.csv", &[prompt, label][..]), ("report-cells.csv", &["@cpu", label][..])] {
        let text = written.text(file);
        let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(text.as_bytes());
        let mut fields = Vec::new();
        for row in reader.records() {
            fields.extend(row.unwrap().iter().map(str::to_string));
        }
        for text in texts {
            assert!(fields.contains(&format!("'{text}")), "{text} in {file}");
        }
        let run = |field: &&String| field.starts_with(['=', '+', '-', '@']) && field.parse::<f64>().is_err();
        assert_eq!(fields.iter().find(run), None, "{file}");
    }
    assert!(written.text("report.csv").contains(",-0.5\n"), "numbers stay numbers");
}

#[test]
fn folders_that_are_no_comparison_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |dir: &Path| report::write(dir).unwrap_err().to_string();
    assert!(refused(dir.path()).contains("found no plan.json"));
    let mut comparison = Comparison::new(&Shape::small());
    let CellWork::Training { seed, .. } = &mut comparison.records[3].cell.work else { panic!("a base cell") };
    *seed = 77;
    comparison.write(dir.path());
    let told = refused(dir.path());
    assert!(told.contains("record.json: expected the record of a cell of the plan"), "{told}");
    let path = cell_folder(dir.path(), &comparison.records[3].cell.id).join(RECORD_FILE);
    for broken in ["", "[]", "{\"format\": 1}", "\u{0}", "{\"format\": 1, \"cell\": 1e999}"] {
        std::fs::write(&path, broken).unwrap();
        assert!(refused(dir.path()).contains("record.json"), "{broken}");
    }
    assert!(!dir.path().join("report.html").exists());
}

/// Numbers that no training gives must neither panic nor hang.
#[test]
fn absurd_numbers_are_survived() {
    let mut comparison = Comparison::new(&Shape::small());
    comparison.plan.steps = vec![i64::MIN, 300, 600, i64::MAX];
    let absurd = [f64::MAX, f64::MIN, 5e-324, -0.0, 1e300, 0.0];
    let mut at = 0;
    for record in &mut comparison.records {
        each_score(record, |_, _, score| {
            at += 1;
            *score = absurd[at % absurd.len()];
        });
        if let Some(budget) = &mut record.budget {
            *budget = Budget {
                parameters: u64::MAX,
                bytes: 0,
                seconds: Some(-1.0),
                seconds_per_step: Some(f64::MAX),
                ..budget.clone()
            };
        }
        record.losses.push(LossPoint { step: i64::MAX, loss: f64::MAX, held_out: Some(f64::MIN) });
        // Means overflow to infinity, which JSON cannot hold.
        record.evaluations.iter_mut().for_each(|e| e.scores.retain(|_, v| v.is_finite()));
    }
    Written::new(&comparison);
    comparison.plan.steps = vec![600];
    Written::new(&comparison);
}
