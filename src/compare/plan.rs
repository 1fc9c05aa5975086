//! From the settings of a comparison to its cells.

use super::config::{CompareConfig, MethodEntry, Protocol};
use super::subjects::{Subject, hash, slug};
use super::task::{Task, TaskSet};
use crate::config::TrainConfig;
use crate::error::{Error, Result};
use crate::evaluate::{TowerPaths, towers};
use crate::results::{BASE, FORMAT, Plan, PlannedCell, PlannedMethod, PlannedSubject, Set};
use std::collections::BTreeMap;
use std::path::Path;

/// Held-out losses are measured so many times in a training.
const HELD_OUT_LOOKS: i64 = 5;

/// A plan, and a task for each of its cells.
pub struct Planned {
    /// For readers.
    pub plan: Plan,
    /// For processes, in the order of the plan's cells.
    pub tasks: Vec<Task>,
}

/// What is planned at a time.
pub enum Stage<'a> {
    /// The search; without one, the tables with each method's own rate.
    First,
    /// The tables, after a search, with the rate that was chosen for each method.
    Tables(&'a BTreeMap<String, f64>),
}

/// Plans the cells. After a search the plan holds the search's cells too.
pub fn plan(
    config: &CompareConfig,
    subjects: &[Subject],
    protocol_notes: &[String],
    stage: &Stage,
) -> Result<Planned> {
    let steps = config.steps()?;
    // Fetched once, before processes look for them at the same time.
    let towers = config.scores.resolved()?;
    let identity = towers::identity(&towers)?;
    let planner = Planner { config, subjects, steps: &steps, towers, identity };
    let chosen = match (stage, &config.search) {
        (Stage::Tables(chosen), _) => Some(*chosen),
        (Stage::First, _) => None,
    };
    let tables = config.search.is_none() || chosen.is_some();
    let mut tasks: Vec<Task> = Vec::new();
    let mut add = |task: Task| {
        // A training that serves the search and the tables is one cell with both sets.
        if let Some(known) = tasks.iter_mut().find(|t| t.cell.id == task.cell.id) {
            known.sets.extend(task.sets);
            known.sets.sort_by_key(|s| s.set);
        } else {
            tasks.push(task);
        }
    };
    for subject in subjects {
        add(planner.base(subject)?);
    }
    if let Some(search) = &config.search {
        let searched = |s: &&Subject| search.subjects.is_empty() || search.subjects.contains(&s.name);
        if let Some(unknown) = search.subjects.iter().find(|n| !subjects.iter().any(|s| s.name == **n)) {
            return Err(Error::config(format!("search: subjects: `{unknown}` is not a subject")));
        }
        for method in &config.methods {
            for rate in config.learning_rates(method)? {
                for subject in subjects.iter().filter(searched) {
                    for seed in &search.seeds {
                        add(planner.training(method, subject, *seed, rate, Set::Validation)?);
                    }
                }
            }
        }
    }
    if tables {
        // Seeds on the outside: what is there early is a whole table of the first seed.
        for seed in &config.seeds {
            for subject in subjects {
                for method in &config.methods {
                    let own = planner.train_config(method)?.learning_rate;
                    let rate = chosen.and_then(|c| c.get(&method.label).copied()).unwrap_or(own);
                    add(planner.training(method, subject, *seed, rate, Set::Test)?);
                }
            }
        }
    }
    for task in &mut tasks {
        task.scored_with = planner.identity(task);
    }
    let mut notes = config.notes.clone();
    notes.extend(protocol_notes.iter().cloned());
    let plan = Plan {
        format: FORMAT,
        title: config.title.clone(),
        protocol: if config.protocol == Protocol::Paper { "paper" } else { "default" }.into(),
        notes,
        methods: config.methods.iter().map(|m| planner.method(m)).collect::<Result<_>>()?,
        subjects: subjects.iter().map(planned_subject).collect(),
        seeds: config.seeds.clone(),
        steps: steps.clone(),
        drift_prompts: config.draw.drift_prompts.clone(),
        objective: config.search.iter().flat_map(|s| s.objective.clone()).collect(),
        common: planner.common()?,
        cells: tasks.iter().map(|t| t.cell.clone()).collect(),
    };
    Ok(Planned { plan, tasks })
}

struct Planner<'a> {
    config: &'a CompareConfig,
    subjects: &'a [Subject],
    steps: &'a [i64],
    towers: TowerPaths,
    identity: String,
}

impl Planner<'_> {
    fn train_config(&self, method: &MethodEntry) -> Result<TrainConfig> {
        self.config.train_config(method)
    }

    fn method(&self, method: &MethodEntry) -> Result<PlannedMethod> {
        let settings = serde_json::to_value(&method.settings)
            .ok()
            .and_then(|value| value.as_object().cloned())
            .ok_or_else(|| {
                Error::config(format!("method `{}`: settings that JSON does not hold", method.label))
            })?;
        let learning_rates = self.config.learning_rates(method)?;
        Ok(PlannedMethod { label: method.label.clone(), settings, learning_rates })
    }

    /// What is the same for every cell and a reader wants to know.
    fn common(&self) -> Result<Vec<(String, String)>> {
        let train = TrainConfig::from_tables(&[&self.config.train])?;
        let draw = &self.config.draw;
        let scheduler = draw.scheduler.map_or("the model's".to_string(), |s| s.to_string());
        let mut common = vec![
            ("model".to_string(), train.pretrained_model_name_or_path.display().to_string()),
            ("steps".into(), train.max_train_steps.to_string()),
            (
                "subject pictures a step".into(),
                (train.train_batch_size * train.gradient_accumulation_steps).to_string(),
            ),
            ("learning-rate schedule".into(), self.schedule(&train)?),
            ("target modules".into(), train.target_modules.join(", ")),
            ("pictures a prompt".into(), draw.num_images.to_string()),
            ("drawn with".into(), format!("{scheduler}, {} steps, guidance {}", draw.steps, draw.guidance)),
        ];
        if train.with_prior_preservation {
            common.push((
                "class pictures".into(),
                format!("{}, weight {}", train.num_class_images, train.prior_loss_weight),
            ));
        }
        Ok(common)
    }

    fn schedule(&self, train: &TrainConfig) -> Result<String> {
        let table = train.to_table()?;
        let name = table.get("lr_scheduler").and_then(|v| v.as_str()).unwrap_or_default();
        Ok(format!("{name}, warm-up {}", train.lr_warmup_steps))
    }

    fn base(&self, subject: &Subject) -> Result<Task> {
        let train = TrainConfig::from_tables(&[&self.config.train])?;
        let only = self.config.search.as_ref().is_some_and(|s| s.only);
        let mut sets = Vec::new();
        if self.config.search.is_some() {
            sets.push(Set::Validation);
        }
        if !only {
            sets.push(Set::Test);
        }
        self.task(subject, BASE, train, 0, None, &sets)
    }

    fn training(
        &self,
        method: &MethodEntry,
        subject: &Subject,
        seed: u64,
        rate: f64,
        set: Set,
    ) -> Result<Task> {
        let train = TrainConfig { learning_rate: rate, seed, ..self.train_config(method)? };
        self.task(subject, &method.label, train, seed, Some(rate), &[set])
    }

    fn task(
        &self,
        subject: &Subject,
        method: &str,
        train: TrainConfig,
        seed: u64,
        rate: Option<f64>,
        sets: &[Set],
    ) -> Result<Task> {
        let mut train = TrainConfig {
            instance_prompt: subject.instance_prompt.clone(),
            class_prompt: subject.class_prompt.clone(),
            validation_prompt: Vec::new(),
            validation_steps: (train.max_train_steps / HELD_OUT_LOOKS).max(1),
            checkpoints_total_limit: (self.steps.len() == 1).then_some(1),
            ..train
        };
        let id = |cell: &str, train: &TrainConfig| -> Result<String> {
            let hashes =
                |p: &[super::subjects::Picture]| p.iter().map(|p| p.hash.clone()).collect::<Vec<_>>();
            // Where it runs is not what it is.
            let what = TrainConfig { device: Default::default(), threads: None, ..train.clone() };
            let steps = if rate.is_some() { self.steps } else { &[0] };
            let key = serde_json::to_string(&(method, what, hashes(&subject.train), steps));
            let key = key.map_err(|e| Error::config(format!("method `{method}`: {e}")))?;
            Ok(format!("{cell}-{}", &hash(key.as_bytes())[..8]))
        };
        let name = match rate {
            None => format!("{BASE}-{}", subject.name),
            Some(rate) => format!("{}-lr{rate:e}-{}-s{seed}", slug(method), subject.name),
        };
        train.seed = seed;
        let id_of_cell = if rate.is_none() { name.clone() } else { id(&name, &train)? };
        let first = self.subjects.first().map_or("", |s| s.name.as_str());
        let cell = PlannedCell {
            id: id_of_cell,
            method: method.to_string(),
            subject: subject.name.clone(),
            seed,
            learning_rate: rate,
        };
        let draws_drift = rate.is_some() || subject.name == first;
        let class_look_alikes = subject.look_alikes.is_empty() && train.with_prior_preservation;
        Ok(Task {
            class_folder: subject.class_folder(Path::new("")),
            steps: if rate.is_some() { self.steps.to_vec() } else { vec![0] },
            sets: sets.iter().map(|set| self.set(*set, subject)).collect(),
            drift_prompts: if draws_drift { self.config.draw.drift_prompts.clone() } else { Vec::new() },
            drift_base: format!("{BASE}-{first}"),
            draw: self.config.draw.clone(),
            towers: self.towers.clone(),
            class_look_alikes,
            scored_with: String::new(),
            remove_weights: self.config.remove_weights,
            jobs: self.config.jobs,
            cell,
            train,
        })
    }

    fn set(&self, set: Set, subject: &Subject) -> TaskSet {
        let (prompts, num_images) = match set {
            Set::Validation => (&subject.validation_prompts, self.config.draw.num_validation_images),
            Set::Test => (&subject.prompts, self.config.draw.num_images),
        };
        TaskSet { set, prompts: prompts.clone(), num_images }
    }

    /// What the scores of a task depend on beside its training.
    fn identity(&self, task: &Task) -> String {
        let subject = self.subjects.iter().find(|s| s.name == task.cell.subject);
        let pictures: Vec<(&str, Vec<&str>)> = subject
            .iter()
            .flat_map(|s| s.pictures())
            .map(|(kind, p)| (kind, p.iter().map(|p| p.hash.as_str()).collect()))
            .collect();
        let key = format!(
            "{} {:?} {:?} {:?} {:?} {:?} {}",
            self.identity,
            pictures,
            task.sets,
            task.drift_prompts,
            task.draw,
            task.steps,
            task.class_look_alikes
        );
        hash(key.as_bytes())[..16].to_string()
    }
}

fn planned_subject(subject: &Subject) -> PlannedSubject {
    let place = |kind: &str, pictures: &[super::subjects::Picture]| {
        pictures.iter().map(|p| format!("subjects/{}/{kind}/{}", subject.name, p.name)).collect()
    };
    PlannedSubject {
        name: subject.name.clone(),
        class: subject.class.clone(),
        instance_prompt: subject.instance_prompt.clone(),
        prompts: subject.prompts.iter().map(|p| p.prompt.clone()).collect(),
        validation_prompts: subject.validation_prompts.iter().map(|p| p.prompt.clone()).collect(),
        train_pictures: place("train", &subject.train),
        validation_pictures: place("validation", &subject.validation),
        test_pictures: place("test", &subject.test),
        notes: subject.notes.clone(),
    }
}
