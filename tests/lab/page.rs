//! The report's page in a real browser. Without a Chromium (`HRA_CHROMIUM`, or on the path) these tests say that they are
//! skipped.

use crate::browser::Browser;
use crate::comparison::{Comparison, Shape, rename};
use hra::lab::report::{self, MarkedPlace};
use hra::lab::results::{FrontierPoint, Set};
use serde_json::{Value, json};
use std::path::Path;

fn written(comparison: &Comparison) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    comparison.write(dir.path());
    comparison.draw(dir.path());
    report::write(dir.path()).unwrap();
    dir
}

fn address(dir: &Path) -> String {
    format!("file://{}/report.html", dir.display())
}

/// The first column of the summary table, from top to bottom.
fn order(browser: &mut Browser) -> Vec<String> {
    let found =
        browser.eval("[...document.querySelectorAll('#summary tbody th')].map((h) => h.dataset.value)");
    found.as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_string()).collect()
}

fn text(browser: &mut Browser, selector: &str) -> String {
    let found = browser.eval(&format!("document.querySelector({}).textContent", json!(selector)));
    found.as_str().unwrap().to_string()
}

/// The setting of the large picture with this title.
fn fact(browser: &mut Browser, title: &str) -> Value {
    browser.eval(&format!(
        "[...document.querySelectorAll('#large dt')].find((t) => t.textContent === {})?.nextSibling.textContent",
        json!(title)
    ))
}

/// Asked nothing of anybody, and nothing to say on the console.
fn quiet(browser: &Browser) {
    assert!(browser.complaints().is_empty(), "{:#?}", browser.complaints());
    let away: Vec<_> = browser.requests().into_iter().filter(|url| !url.starts_with("file://")).collect();
    assert!(away.is_empty(), "{away:?}");
    assert!(!browser.requests().is_empty());
}

#[test]
fn the_page_renders_and_its_table_sorts() {
    let Some(mut browser) = Browser::start() else { return };
    let dir = written(&Comparison::new(&Shape { methods: vec!["HRA", "LoRA", "OFT"], ..Shape::small() }));
    browser.device(1300, 900, false);
    browser.open(&address(dir.path()));
    assert_eq!(browser.eval("document.title"), "HRA and others on the embedded model");
    assert!(text(&mut browser, ".notes").contains("the pictures are invented"));
    assert_eq!(order(&mut browser), ["real training pictures", "base", "HRA", "LoRA", "OFT"]);
    // Invented scores rise with the method's number; real pictures have 0.8.
    browser.click("#summary th:nth-child(2) button");
    assert_eq!(text(&mut browser, "#summary th:nth-child(2)"), "DINO\u{a0}\u{2191}");
    assert_eq!(order(&mut browser), ["real training pictures", "OFT", "LoRA", "HRA", "base"]);
    let sorted = "document.querySelector('#summary th:nth-child(2)').getAttribute('aria-sort')";
    assert_eq!(browser.eval(sorted), "descending");
    // By the keyboard, the other way; then by parameters: what has none stays last.
    browser.eval("document.querySelector('#summary th:nth-child(2) button').focus()");
    browser.key("Enter", 13);
    assert_eq!(browser.eval(sorted), "ascending");
    assert_eq!(order(&mut browser), ["base", "HRA", "LoRA", "OFT", "real training pictures"]);
    // What it cost stands behind the scores.
    let titles =
        browser.eval("[...document.querySelectorAll('#summary thead th')].map((h) => h.textContent)");
    let titles: Vec<&str> = titles.as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    let costs = titles.iter().position(|title| *title == "parameters").unwrap() + 1;
    assert_eq!(titles[costs - 1..], ["parameters", "MB", "s/step", "minutes", "memory GB"]);
    for first in ["HRA", "OFT"] {
        browser.click(&format!("#summary th:nth-child({costs}) button"));
        let rows = order(&mut browser);
        assert_eq!(rows[0], first);
        assert!(rows[3..].contains(&"base".to_string()), "{rows:?}");
    }
    assert_eq!(browser.eval(sorted), "none");
    // Every chart has its name and drew marks, each with its numbers.
    let charts = "[...document.querySelectorAll('#plots svg')].every((s) => s.getAttribute('aria-label') && \
                  s.querySelector('.mark title').textContent && s.getBoundingClientRect().height > 100)";
    assert_eq!(browser.eval(charts), true);
    assert!(browser.eval("document.querySelectorAll('#plots svg').length").as_u64().unwrap() >= 6);
    let pictures_first = "!!(document.getElementById('pictures').compareDocumentPosition(document.getElementById('plots')) & 4)";
    assert_eq!(browser.eval(pictures_first), true);
    quiet(&browser);
}

#[test]
fn a_table_that_is_wider_than_the_window_says_so_until_its_end_is_seen() {
    let Some(mut browser) = Browser::start() else { return };
    let dir = written(&Comparison::new(&Shape::small()));
    let more = "[document.querySelector('#summary .more').hidden, document.querySelector('#summary .more').offsetHeight > 0]";
    let small = written(&Comparison::new(&Shape { seeds: vec![0], keys: vec!["dino"], ..Shape::small() }));
    browser.device(1400, 900, false);
    browser.open(&address(small.path()));
    assert_eq!(browser.eval(more), json!([true, false]), "there is room for all of it");
    browser.device(800, 900, false);
    browser.open(&address(dir.path()));
    browser.wait("!document.querySelector('#summary .more').hidden");
    assert_eq!(browser.eval(more), json!([false, true]));
    browser.eval("document.querySelector('#summary .scroll').scrollLeft = 1e6");
    browser.wait("document.querySelector('#summary .more').hidden");
    quiet(&browser);
}

#[test]
fn charts_have_numbers_on_both_axes_and_keep_their_marks_inside_and_their_rows_full() {
    let Some(mut browser) = Browser::start() else { return };
    for (methods, keys) in [
        (vec!["HRA", "LoRA"], vec!["clip_i"]),
        (vec!["HRA", "LoRA", "OFT"], vec!["dino", "clip_t"]),
        (vec!["HRA"], vec!["dino", "clip_t", "drift"]),
    ] {
        let mut comparison = Comparison::new(&Shape { methods, keys, ..Shape::small() });
        // Methods with nearly as many parameters: less than a decade of a logarithmic axis, and no round number in it.
        for (number, record) in comparison.records.iter_mut().enumerate() {
            if let Some(budget) = &mut record.budget {
                budget.parameters = 75_264 + 100 * (number as u64 % 2);
            }
        }
        let dir = written(&comparison);
        browser.device(1400, 900, false);
        browser.open(&address(dir.path()));
        let ticks = "[...document.querySelectorAll('#plots svg')].map((s) => \
                     [...s.querySelectorAll('.tick')].filter((t) => t.getAttribute('text-anchor') === 'middle').length)";
        let across = browser.eval(ticks);
        assert!(across.as_array().unwrap().iter().all(|n| n.as_u64().unwrap() >= 1), "{across}");
        let down = browser.eval(&ticks.replace("middle", "end"));
        assert!(down.as_array().unwrap().iter().all(|n| n.as_u64().unwrap() >= 2), "{down}");
        assert!(browser.eval(&format!("{ticks}[0]")).as_u64().unwrap() >= 2, "a short logarithmic axis");
        let outside = "[...document.querySelectorAll('#plots svg')].flatMap((s) => [...s.querySelectorAll('.mark')].filter((m) => { \
                       const b = m.getBBox(); return b.x < 52 || b.x + b.width > 366 || b.y < 12 || b.y + b.height > 226; }) \
                       .map((m) => m.textContent))";
        assert_eq!(browser.eval(outside), json!([]));
        for width in [1400, 900, 390] {
            browser.device(width, 900, false);
            browser.open(&address(dir.path()));
            let gaps = "(() => { const box = document.querySelector('.figures').getBoundingClientRect(); const ends = new Map(); \
                        for (const f of document.querySelectorAll('.figures figure')) { \
                          const r = f.getBoundingClientRect(); ends.set(r.top, Math.max(ends.get(r.top) ?? 0, r.right)); } \
                        return [...ends.values()].filter((end) => Math.abs(end - box.right) > 2); })()";
            assert_eq!(browser.eval(gaps), json!([]), "rows of cards that end before the others, at {width}");
        }
    }
    quiet(&browser);
}

/// Two methods whose losses are the same: the second line is dashed, so that the first shows between its dashes.
#[test]
fn lines_that_lie_on_each_other_are_both_seen() {
    let Some(mut browser) = Browser::start() else { return };
    let mut comparison = Comparison::new(&Shape::small());
    let losses = comparison.records.iter().find(|r| !r.losses.is_empty()).unwrap().losses.clone();
    comparison.records.iter_mut().filter(|r| !r.losses.is_empty()).for_each(|r| r.losses = losses.clone());
    let dir = written(&comparison);
    browser.device(1300, 900, false);
    browser.open(&address(dir.path()));
    let lines = "[...document.querySelectorAll('#plots svg[aria-label=\"Training loss\"] .curve polyline, \
                 #plots svg[aria-label=\"Training loss\"] .series:has(.mark) polyline')]";
    let points = browser.eval(&format!("{lines}.map((l) => l.getAttribute('points'))"));
    assert!(points[0].is_string() && points[0] == points[1], "{points}");
    let dashes = browser.eval(&format!("{lines}.map((l) => getComputedStyle(l).strokeDasharray)"));
    assert!(dashes[0] == "none" && dashes[1] != "none", "{dashes}");
    quiet(&browser);
}

#[test]
fn pictures_open_large_with_their_settings() {
    let Some(mut browser) = Browser::start() else { return };
    let comparison = Comparison::new(&Shape::small());
    let dir = written(&comparison);
    browser.device(1300, 900, false);
    browser.open(&address(dir.path()));
    let headings = browser.eval("[...document.querySelectorAll('#grid thead th')].map((h) => h.textContent)");
    assert_eq!(headings, json!(["prompt", "base", "HRA", "LoRA"]));
    // Second seed, second picture.
    for (id, value) in [("seed", "1"), ("picture", "1")] {
        browser.eval(&format!("{id}.value = '{value}'; {id}.dispatchEvent(new Event('change'))"));
    }
    browser.click("#grid tbody tr:nth-child(2) td:nth-child(3) .thumbnail");
    browser.wait("large.open && large.querySelector('img').naturalWidth === 48");
    let record = comparison.records.iter().find(|r| r.cell.id == "m0-robot-s1-r1e-3").unwrap();
    let prompt = &record.evaluations.last().unwrap().prompts[1];
    let picture = &prompt.pictures[1];
    assert_eq!(text(&mut browser, "#large .prompt"), prompt.prompt);
    let expected = [
        ("method", "HRA".to_string()),
        ("learning rate", "1e-3".into()),
        ("step", "600".into()),
        ("training seed", "1".into()),
        ("picture", format!("2, seed {}", picture.seed)),
        ("DINO", format!("{:.3}", picture.scores["dino"])),
        ("diversity", format!("{:.3}", prompt.scores["diversity_vgg"])),
    ];
    for (title, value) in expected {
        assert_eq!(fact(&mut browser, title), value, "{title}");
    }
    let shown = browser.eval("decodeURI(large.querySelector('img').src)");
    assert!(
        shown.as_str().unwrap().ends_with(&format!("/cells/{}/{}", record.cell.id, picture.file)),
        "{shown}"
    );
    // Arrow keys walk over the grid and stop at its ends.
    let walk = [
        ("ArrowRight", 39, "LoRA"),
        ("ArrowRight", 39, "LoRA"),
        ("ArrowLeft", 37, "HRA"),
        ("ArrowLeft", 37, "base"),
    ];
    for (key, code, method) in walk {
        browser.key(key, code);
        assert_eq!(fact(&mut browser, "method"), method, "{key}");
    }
    assert!(fact(&mut browser, "learning rate").is_null(), "the base model has none");
    let texts = &comparison.plan.subjects[0].prompts;
    for (key, code, row) in [("ArrowDown", 40, 2), ("ArrowUp", 38, 1), ("ArrowUp", 38, 0), ("ArrowUp", 38, 0)]
    {
        browser.key(key, code);
        assert_eq!(text(&mut browser, "#large .prompt"), texts[row], "{key}");
    }
    browser.key("Escape", 27);
    browser.wait("!large.open");
    // The subject's own pictures open as well; the other subject has others.
    browser.click("#own figure:nth-child(2) .thumbnail");
    browser.wait("large.open");
    assert_eq!(fact(&mut browser, "picture"), "test 1");
    browser.click("#large [data-move=close]");
    browser.wait("!large.open");
    browser.eval("subject.value = '1'; subject.dispatchEvent(new Event('change'))");
    assert_eq!(text(&mut browser, "#grid tbody th"), comparison.plan.subjects[1].prompts[0]);
    // Prompts that are not about the subject, and the other step.
    browser.eval("set.value = 'drift'; set.dispatchEvent(new Event('change'))");
    assert_eq!(text(&mut browser, "#grid tbody th"), "a photo of a tree");
    browser.wait(
        "[...document.querySelectorAll('#grid img')].every((i) => i.complete && i.naturalWidth === 48)",
    );
    quiet(&browser);
}

#[test]
fn phones_and_dark_rooms() {
    let Some(mut browser) = Browser::start() else { return };
    let mut shape = Shape { rates: vec![1e-4, 1e-3, 1e-2], ..Shape::small() };
    shape.methods.extend(["OFT", "a method with a name that is rather long for a table", "COFT"]);
    let dir = written(&Comparison::new(&shape));
    browser.device(360, 740, false);
    browser.open(&address(dir.path()));
    let width = "[document.documentElement.scrollWidth, document.body.scrollWidth]";
    assert_eq!(browser.eval(width), json!([360, 360]));
    let boxes =
        "[...document.querySelectorAll('.scroll')].every((b) => b.getBoundingClientRect().right <= 360)";
    assert_eq!(browser.eval(boxes), true);
    // A row is a block: every value of a method is there, with its heading, and nothing lies beside the window.
    let values =
        "[...document.querySelectorAll('#summary tbody tr:nth-child(3) td')].filter((d) => d.dataset.value)";
    let seen = format!(
        "{values}.every((d) => d.getBoundingClientRect().right <= 360 && d.getBoundingClientRect().height > 10)"
    );
    assert_eq!(browser.eval(&seen), true);
    let titles = browser.eval(&format!("{values}.map((d) => getComputedStyle(d, '::before').content)"));
    let titles: Vec<&str> = titles.as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert!(titles.len() > 6 && titles[1].contains("DINO") && titles.contains(&"\"s/step\""), "{titles:?}");
    let scrolls = "document.querySelector('#grid').scrollWidth > 360";
    assert_eq!(browser.eval(scrolls), true, "the pictures scroll in their own box");
    // All rates of one method side by side.
    browser.eval("const rates = document.getElementById('rates-of'); rates.value = '1'; rates.dispatchEvent(new Event('change'))");
    let headings = browser.eval("[...document.querySelectorAll('#grid thead th')].map((h) => h.textContent)");
    assert_eq!(headings, json!(["prompt", "base", "LoRA 1e-4", "LoRA 1e-3", "LoRA 1e-2"]));
    browser.click("#grid .thumbnail");
    browser.wait("large.open");
    assert_eq!(browser.eval("large.getBoundingClientRect().width <= 360"), true);
    browser.key("Escape", 27);

    let paper = "getComputedStyle(document.body).backgroundColor";
    let light = browser.eval(paper);
    browser.click("#theme");
    let dark = browser.eval(paper);
    assert_ne!(light, dark);
    let ink = |browser: &mut Browser| browser.eval("getComputedStyle(document.querySelector('.tick')).fill");
    let dark_ink = ink(&mut browser);
    browser.click("#theme");
    assert_eq!(browser.eval(paper), light);
    assert_ne!(ink(&mut browser), dark_ink, "charts follow");
    browser.eval("localStorage.clear()");
    // The system's own choice.
    browser.device(360, 740, true);
    browser.open(&address(dir.path()));
    assert_eq!(browser.eval(paper), dark);
    assert_eq!(ink(&mut browser), dark_ink);
    quiet(&browser);
}

/// Each prompt's picture of the step that the protocol chose; one training is not there and keeps its column.
#[test]
fn the_papers_protocol_shows_what_it_scored() {
    let Some(mut browser) = Browser::start() else { return };
    let mut comparison = Comparison::new(&Shape { steps: vec![200, 400, 600], ..Shape::small() });
    comparison.plan.protocol = "paper".into();
    comparison.records.retain(|r| r.cell.id != "m1-robot-s0-r1e-3");
    let dir = written(&comparison);
    browser.device(1300, 900, false);
    browser.open(&address(dir.path()));
    let json: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("report.json")).unwrap()).unwrap();
    let steps = json["chosen_steps"]["m0-robot-s0-r1e-3"].as_array().unwrap();
    assert!(steps.iter().any(|s| *s != steps[0]), "another choice for another prompt: {steps:?}");
    for (row, step) in steps.iter().enumerate() {
        let image = format!("#grid tbody tr:nth-child({}) td:nth-child(3) img", row + 1);
        let shown = browser.eval(&format!("document.querySelector('{image}').src"));
        assert!(
            shown.as_str().unwrap().contains(&format!("/step-{:06}/", step.as_i64().unwrap())),
            "{shown}"
        );
    }
    assert_eq!(text(&mut browser, "#grid thead th:nth-child(4)"), "LoRA");
    assert_eq!(text(&mut browser, "#grid tbody td:nth-child(4)"), "\u{2013}");
    browser.eval("step.value = '400'; step.dispatchEvent(new Event('change'))");
    assert_eq!(browser.eval("[...document.querySelectorAll('#grid td:nth-child(3) img')].every((i) => /step-000400/.test(i.src))"), true);
    quiet(&browser);
}

/// Text from plans and records never becomes markup or script, and addresses never leave the folder.
#[test]
fn hostile_text_does_nothing() {
    let Some(mut browser) = Browser::start() else { return };
    let mut comparison = Comparison::new(&Shape::small());
    let evil = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\"";
    comparison.plan.title = evil.into();
    comparison.plan.methods[0].label = evil.into();
    comparison.plan.cells.iter_mut().filter(|c| c.method() == "HRA").for_each(|c| rename(c, evil));
    for record in &mut comparison.records {
        if record.cell.method() == "HRA" {
            rename(&mut record.cell, evil);
        }
        for evaluation in &mut record.evaluations {
            evaluation.prompts[0].prompt = evil.into();
            evaluation.prompts[0].pictures[0].file = "a\"#?<b> %20.png".into();
        }
    }
    let dir = written(&comparison);
    browser.device(1300, 900, false);
    browser.open(&address(dir.path()));
    assert_eq!(text(&mut browser, "h1"), evil);
    assert_eq!(text(&mut browser, "#grid tbody th"), evil);
    browser.click("#grid .thumbnail");
    browser.wait("large.open && large.querySelector('img').naturalWidth === 48");
    assert_eq!(text(&mut browser, "#large .prompt"), evil);
    assert!(browser.eval("window.hacked").is_null());
    assert_eq!(browser.eval("document.querySelectorAll('[onerror]').length"), 0);
    quiet(&browser);
    // The policy itself: a script that gets in all the same does not run, a picture from elsewhere is not asked for.
    let injected = "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s); \
                    const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i); \
                    new Promise((done) => { i.onerror = () => done(window.hacked === undefined); })";
    assert_eq!(browser.eval(injected), true);
    let blocked =
        browser.complaints().iter().filter(|e| e.to_string().contains("Content Security Policy")).count();
    assert!(blocked >= 2, "{:#?}", browser.complaints());
}

/// 30 subjects x 25 prompts x 4 pictures: only what is near the window is loaded.
#[test]
fn thousands_of_pictures() {
    let Some(mut browser) = Browser::start() else { return };
    let shape =
        Shape { subjects: 30, prompts: 25, pictures: 4, seeds: vec![0], steps: vec![1000], ..Shape::small() };
    let dir = tempfile::tempdir().unwrap();
    let mut comparison = Comparison::new(&shape);
    comparison.write(dir.path());
    report::write(dir.path()).unwrap();
    // Pictures of the last subject alone are drawn: nothing else may be asked for once it is chosen.
    let last = comparison.plan.subjects[29].name.clone();
    comparison.records.retain(|r| r.cell.subject == last);
    comparison.draw(dir.path());
    browser.device(1300, 700, false);
    browser.open(&address(dir.path()));
    assert_eq!(browser.eval("document.querySelectorAll('#grid img').length"), 25 * 3);
    let asked = |browser: &Browser| browser.requests().iter().filter(|url| url.contains("/cells/")).count();
    assert!(asked(&browser) < 25 * 3, "{}", asked(&browser));
    // Pictures near the window are asked for some time after the page is loaded, so the choice leaves a mark among the events.
    browser.eval(
        "console.debug('chosen'); subject.value = '29'; subject.dispatchEvent(new Event('change')); grid.scrollIntoView()",
    );
    browser.wait("document.querySelector('#grid img').naturalWidth === 48");
    let mark = browser.events.iter().position(|e| e["method"] == "Runtime.consoleAPICalled").unwrap();
    browser.events.drain(..mark);
    let elsewhere: Vec<_> = browser.requests().into_iter().filter(|url| !url.contains(&last)).collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?}");
}

/// A drawing of its own is well-formed XML that a browser shows.
#[test]
fn the_plot_of_one_run_is_an_svg_file() {
    let Some(mut browser) = Browser::start() else { return };
    let comparison = Comparison::new(&Shape { steps: vec![100, 200, 300], ..Shape::small() });
    let record = comparison.records.iter().find(|r| r.cell.method() == "HRA").unwrap();
    let test = record.evaluations.iter().filter(|e| e.set == Set::Test).cloned();
    let points: Vec<_> = test.map(|evaluation| FrontierPoint { scale: 1.0, evaluation }).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("scores.svg");
    let best = points.iter().position(|point| point.evaluation.step == 200);
    let marked = MarkedPlace { best, drift_limit: None };
    std::fs::write(&path, report::run_plot("run <\"dog\" & cat>", &points, marked)).unwrap();
    browser.open(&format!("file://{}", path.display()));
    assert_eq!(browser.eval("document.documentElement.tagName"), "svg");
    assert_eq!(browser.eval("document.querySelectorAll('parsererror').length"), 0);
    // DINO against drift, and DINO, CLIP-T and drift against steps, three marks each.
    assert_eq!(browser.eval("document.querySelectorAll('polyline').length"), 4);
    assert_eq!(browser.eval("document.querySelectorAll('.mark').length"), 12);
    let best =
        browser.eval("[...document.querySelectorAll('.rule')].map((r) => r.nextElementSibling.textContent)");
    assert_eq!(best, json!(["best: 200, scale 1", "best: 200, scale 1", "best: 200, scale 1"]));
    assert_eq!(browser.eval("getComputedStyle(document.querySelector('polyline')).stroke !== 'none'"), true);
    quiet(&browser);
}
