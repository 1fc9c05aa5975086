//! Comparisons with invented scores and small pictures of plain colours, for tests of the report.

use hra::lab::report::{self, Summary};
use hra::lab::results::*;
use hra::platform::seed;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// How large the comparison is.
pub struct Shape {
    pub methods: Vec<&'static str>,
    pub subjects: usize,
    pub seeds: Vec<u64>,
    pub prompts: usize,
    pub pictures: usize,
    pub steps: Vec<i64>,
    pub rates: Vec<f64>,
    pub sets: Vec<Set>,
    /// Scores of each picture.
    pub keys: Vec<&'static str>,
}

impl Shape {
    /// Two methods, two subjects, three seeds, four prompts of two pictures.
    pub fn small() -> Self {
        Self {
            methods: vec!["HRA", "LoRA"],
            subjects: 2,
            seeds: vec![0, 1, 2],
            prompts: 4,
            pictures: 2,
            steps: vec![300, 600],
            rates: vec![1e-3],
            sets: vec![Set::Validation, Set::Test],
            keys: vec!["dino", "clip_i", "clip_t", "lpips_vgg"],
        }
    }
}

/// A plan with the records of all its cells.
pub struct Comparison {
    pub plan: Plan,
    pub records: Vec<CellRecord>,
}

/// A number between 0 and 1 that belongs to these names.
fn noise(names: &str) -> f64 {
    (seed::derive(7, names, 0) % 10_000) as f64 / 10_000.0
}

/// The invented score of one picture: better with every method, best at the middle rate, and noise.
fn score(plan: &Plan, cell: &PlannedCell, key: &str, place: &str) -> f64 {
    let method = plan.methods.iter().position(|m| m.label == cell.method()).map_or(0, |i| i + 1) as f64;
    let of_subject = noise(&format!("{key} {}", cell.subject));
    let of_seed = noise(&format!("{key} {} {} {}", cell.method(), cell.subject, cell.seed()));
    let wrong = cell.learning_rate().map_or(0.0, |r| ((r / 1e-3).log10() * 0.1).powi(2));
    let of_picture = noise(&format!("{key} {} {place}", cell.id));
    let value = 0.5 + 0.03 * method + 0.1 * of_subject + 0.02 * of_seed + 0.1 * of_picture - wrong;
    let value = if key == "drift" { 30.0 * value } else { value };
    (value * 1e4).round() / 1e4
}

impl Comparison {
    /// Invents plan and records.
    pub fn new(shape: &Shape) -> Self {
        let mut plan = Plan {
            frontier: None,
            search_drift: None,
            common_rate: None,
            classifier: None,
            format: FORMAT,
            title: "HRA and others on the embedded model".into(),
            protocol: "default".into(),
            notes: vec!["the pictures are invented".into()],
            methods: shape.methods.iter().map(|label| method(label, &shape.rates)).collect(),
            subjects: (0..shape.subjects).map(|number| subject(number, shape.prompts)).collect(),
            seeds: shape.seeds.clone(),
            steps: shape.steps.clone(),
            drift_prompts: vec!["a photo of a tree".into(), "a city at night".into()],
            objective: vec![("dino".into(), 1.0), ("clip_t".into(), 1.0)],
            common: vec![("batch".into(), "2".into()), ("scheduler".into(), "ddim, 30 steps".into())],
            cells: Vec::new(),
            scored_with: Default::default(),
        };
        for subject in &plan.subjects {
            plan.cells.push(PlannedCell {
                id: format!("base-{}", subject.name),
                subject: subject.name.clone(),
                work: CellWork::Base,
            });
        }
        for (number, method) in plan.methods.iter().enumerate() {
            for subject in &plan.subjects {
                for &seed in &plan.seeds {
                    for &rate in &method.learning_rates {
                        plan.cells.push(PlannedCell {
                            id: format!("m{number}-{}-s{seed}-r{rate:e}", subject.name),
                            subject: subject.name.clone(),
                            work: CellWork::Training {
                                method: method.label.clone(),
                                seed,
                                learning_rate: rate,
                            },
                        });
                    }
                }
            }
        }
        let records = plan.cells.iter().map(|cell| record(&plan, shape, cell)).collect();
        Self { plan, records }
    }

    /// Makes the first subject a set of pairs, one for each prompt, and the others vanish; with scores of edges, of pictures
    /// with their own and with shuffled conditions. Prompts are the same twice.
    pub fn into_control(mut self) -> Self {
        self.plan.subjects.truncate(1);
        let subject = &mut self.plan.subjects[0];
        let count = subject.prompts.len();
        subject.prompts[1] = subject.prompts[0].clone();
        (subject.train_pictures, subject.test_pictures) = (Vec::new(), Vec::new());
        let places = |folder: &str| {
            (0..count).map(|i| format!("subjects/{}/{folder}/{i:05}.png", subject.name)).collect()
        };
        subject.control = Some(PlannedControl {
            condition: "canny".into(),
            trained_pairs: 450,
            test: PlannedPairs {
                pictures: places("test"),
                conditions: places("test_conditions"),
                shuffled: (0..count).map(|i| (i + 1) % count).collect(),
            },
            validation: PlannedPairs::default(),
        });
        let (name, prompts) = (subject.name.clone(), subject.prompts.clone());
        self.plan.cells.retain(|cell| cell.subject == name);
        self.records.retain(|record| record.cell.subject == name);
        self.plan.drift_prompts.clear();
        for record in &mut self.records {
            let base = record.cell.method() == BASE;
            record.evaluations.retain(|e| e.set == Set::Test);
            for evaluation in &mut record.evaluations {
                evaluation.drift.clear();
                for (i, prompt) in evaluation.prompts.iter_mut().enumerate() {
                    prompt.prompt = prompts[i].clone();
                    prompt.scores.clear();
                    prompt.pictures.truncate(if base { 1 } else { 2 });
                    for (which, picture) in prompt.pictures.iter_mut().enumerate() {
                        let key = ["edge_f1", "edge_f1_shuffled"][which];
                        let value = picture.scores.values().next().copied().unwrap() / (which + 1) as f64;
                        picture.scores = BTreeMap::from([(key.to_string(), value)]);
                        picture.seed = i as u64;
                    }
                }
                evaluation.summarise();
            }
            record.real.clear();
            if base {
                let picture = |i: usize| PictureScores {
                    seed: 0,
                    file: format!("subjects/{name}/test/{i:05}.png"),
                    scores: BTreeMap::from([("edge_f1".to_string(), 0.9 + 0.01 * i as f64)]),
                };
                record.real_pictures = (0..count).map(picture).collect();
                let mean = 0.9 + 0.01 * (count - 1) as f64 / 2.0;
                record.real = BTreeMap::from([("edge_f1".to_string(), mean)]);
            }
        }
        self
    }

    /// Writes plan and records, without pictures.
    pub fn write(&self, dir: &Path) {
        write_json(&dir.join(PLAN_FILE), &self.plan).unwrap();
        for record in &self.records {
            let folder = cell_folder(dir, &record.cell.id);
            std::fs::create_dir_all(&folder).unwrap();
            write_json(&folder.join(RECORD_FILE), record).unwrap();
        }
    }

    /// Draws every picture that plan and records name.
    pub fn draw(&self, dir: &Path) {
        for file in self.plan.subjects.iter().flat_map(|s| s.train_pictures.iter().chain(&s.test_pictures)) {
            plain(&dir.join(file), file);
        }
        let pairs = self.plan.subjects.iter().filter_map(|s| Some(&s.control.as_ref()?.test));
        for file in pairs.flat_map(|pairs| pairs.pictures.iter().chain(&pairs.conditions)) {
            plain(&dir.join(file), file);
        }
        for record in &self.records {
            let folder = cell_folder(dir, &record.cell.id);
            for prompt in record.evaluations.iter().flat_map(|e| e.prompts.iter().chain(&e.drift)) {
                for picture in &prompt.pictures {
                    plain(&folder.join(&picture.file), &format!("{} {}", record.cell.id, picture.file));
                }
            }
        }
    }
}

fn method(label: &str, rates: &[f64]) -> PlannedMethod {
    let settings = serde_json::json!({"method": label.to_lowercase(), "rank": 8});
    let serde_json::Value::Object(settings) = settings else { unreachable!() };
    PlannedMethod { label: label.into(), settings, learning_rates: rates.to_vec() }
}

fn subject(number: usize, prompts: usize) -> PlannedSubject {
    let name = ["robot", "cat", "dog", "can", "clock", "vase", "boot"][number % 7];
    let name = if number < 7 { name.to_string() } else { format!("{name}{number}") };
    let file = |kind: &str, i: usize| format!("subjects/{name}/{kind}/{i:02}.png");
    let places = ["on a blue background", "in the jungle", "in the snow", "on the beach", "with a red hat"];
    PlannedSubject {
        class: name.clone(),
        instance_prompt: format!("a photo of sks {name}"),
        prompts: (0..prompts).map(|i| format!("a sks {name} {} {i}", places[i % 5])).collect(),
        validation_prompts: vec![format!("a sks {name} in a room")],
        train_pictures: (0..4).map(|i| file("train", i)).collect(),
        validation_pictures: Vec::new(),
        test_pictures: (0..2).map(|i| file("test", i)).collect(),
        notes: Vec::new(),
        control: None,
        name,
    }
}

fn record(plan: &Plan, shape: &Shape, cell: &PlannedCell) -> CellRecord {
    let trained = cell.learning_rate().is_some();
    let steps = if trained { shape.steps.clone() } else { vec![0] };
    let mut evaluations = Vec::new();
    for &step in &steps {
        for &set in &shape.sets {
            evaluations.push(evaluation(plan, shape, cell, step, set));
        }
    }
    let number = plan.methods.iter().position(|m| m.label == cell.method()).unwrap_or(0) as u64;
    CellRecord {
        frontier: None,
        changes: None,
        classifier: None,
        format: FORMAT,
        cell: cell.clone(),
        budget: trained.then(|| Budget {
            parameters: 200_000 * (number + 1).pow(3),
            bytes: 800_000 * (number + 1),
            steps: steps[steps.len() - 1],
            seconds: Some(60.0 + 30.0 * number as f64 + cell.seed() as f64),
            seconds_per_step: Some(0.1 + 0.05 * number as f64),
            peak_memory: Some(1_500_000_000 + 100_000_000 * number),
            peak_device_memory: None,
            interrupted: false,
        }),
        losses: if trained { losses(steps[steps.len() - 1], cell) } else { Vec::new() },
        evaluations,
        failure: None,
        real_pictures: Vec::new(),
        scored_with: Default::default(),
        real: shape
            .keys
            .iter()
            .filter(|k| !trained && **k != "clip_t")
            .map(|k| (k.to_string(), 0.8))
            .collect(),
        environment: Environment {
            version: "0.1.0".into(),
            device: "cpu".into(),
            dtype: "f32".into(),
            threads: 1,
            jobs: 1,
        },
    }
}

fn losses(steps: i64, cell: &PlannedCell) -> Vec<LossPoint> {
    let point = |step: i64| LossPoint {
        step,
        loss: 0.1 + 0.2 / (1.0 + step as f64 / 50.0) + 0.02 * noise(&format!("loss {} {step}", cell.id)),
        held_out: None,
    };
    (1..=20).map(|i| point(i * steps / 20)).collect()
}

fn evaluation(plan: &Plan, shape: &Shape, cell: &PlannedCell, step: i64, set: Set) -> Evaluation {
    let subject = plan.subjects.iter().find(|s| s.name == cell.subject).unwrap();
    let folder = format!("step-{step:06}");
    let prompt = |number: usize, text: &String, kind: &str, keys: &[&str]| PromptScores {
        prompt: text.clone(),
        scores: Scores::new(),
        pictures: (0..shape.pictures)
            .map(|i| {
                let file = format!("{folder}/{kind}/{number:02}-{i:02}.png");
                let scores: BTreeMap<String, f64> =
                    keys.iter().map(|key| (key.to_string(), score(plan, cell, key, &file))).collect();
                PictureScores { seed: 1000 + i as u64, file, scores }
            })
            .collect(),
    };
    let texts = if set == Set::Test { &subject.prompts } else { &subject.validation_prompts };
    let drift_keys = ["drift"];
    let mut evaluation = Evaluation {
        step,
        set,
        prompts: texts.iter().enumerate().map(|(i, t)| prompt(i, t, set.name(), &shape.keys)).collect(),
        drift: plan
            .drift_prompts
            .iter()
            .enumerate()
            .map(|(i, t)| prompt(i, t, "drift", &drift_keys))
            .collect(),
        scores: Scores::new(),
    };
    for prompt in &mut evaluation.prompts {
        prompt.scores.insert(
            "diversity_vgg".into(),
            (noise(&format!("{} {}", cell.id, prompt.prompt)) * 1e4).round() / 1e4,
        );
    }
    evaluation.summarise();
    evaluation
}

/// A picture with a disc, in colours that belong to its name.
fn plain(path: &Path, name: &str) {
    let [hue, place] = [noise(name), noise(&format!("{name} place"))];
    let picture = image::RgbImage::from_fn(48, 48, |x, y| {
        let (dx, dy) = (f64::from(x) - 14.0 - 20.0 * place, f64::from(y) - 24.0);
        let inside = dx * dx + dy * dy < 150.0;
        let level = |shift: f64| (127.0 + 100.0 * (std::f64::consts::TAU * (hue + shift)).sin()) as u8;
        if inside {
            image::Rgb([level(0.0), level(0.33), level(0.66)])
        } else {
            image::Rgb([level(0.5), 200, level(0.2)])
        }
    });
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    picture.save(path).unwrap();
}

/// A comparison with its report.
pub struct Written {
    pub dir: tempfile::TempDir,
    pub summary: Summary,
    pub json: Value,
}

impl Written {
    pub fn new(comparison: &Comparison) -> Self {
        let dir = tempfile::tempdir().unwrap();
        comparison.write(dir.path());
        let summary = report::write(dir.path()).unwrap();
        let json = serde_json::from_str(&text(dir.path(), "report.json")).unwrap();
        Self { dir, summary, json }
    }

    pub fn text(&self, name: &str) -> String {
        text(self.dir.path(), name)
    }

    pub fn row(&self, label: &str) -> &Value {
        let rows = self.json["rows"].as_array().unwrap();
        rows.iter().find(|r| r["label"] == label).unwrap_or_else(|| panic!("no row {label}: {rows:#?}"))
    }

    pub fn difference(&self, label: &str, key: &str) -> (f64, [f64; 2], u64) {
        let d = &self.row(label)["differences"][key];
        let interval = [0, 1].map(|i| d["interval"][i].as_f64().unwrap());
        (d["value"].as_f64().unwrap(), interval, d["n"].as_u64().unwrap())
    }
}

fn text(dir: &Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name)).unwrap()
}

pub fn close(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-9, "{a} {b}");
}

/// Every score of every picture and prompt, changed in place.
pub fn each_score(record: &mut CellRecord, mut change: impl FnMut(Set, &str, &mut f64)) {
    for evaluation in &mut record.evaluations {
        let set = evaluation.set;
        for prompt in evaluation.prompts.iter_mut().chain(&mut evaluation.drift) {
            let own = prompt.scores.iter_mut();
            for (key, value) in own.chain(prompt.pictures.iter_mut().flat_map(|p| p.scores.iter_mut())) {
                change(set, key, value);
            }
        }
        evaluation.summarise();
    }
}

/// Gives a trained cell another method's name.
pub fn rename(cell: &mut PlannedCell, name: &str) {
    if let CellWork::Training { method, .. } = &mut cell.work {
        *method = name.into();
    }
}
