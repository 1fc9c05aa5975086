//! From the settings of a comparison to its cells.

use crate::diffusion::stable_diffusion::scheduler_of;
use crate::error::{Error, Result};
use crate::lab::compare::config::{CompareConfig, MethodEntry, Protocol};
use crate::lab::compare::draw::{DrawnPairing, Sampling};
use crate::lab::compare::subject::{Material, Subject, SubjectPicture, SubjectPictures, hash, slug};
use crate::lab::compare::task::{Task, TaskFrontier, TaskSet};
use crate::lab::evaluate::{TowerPaths, towers};
use crate::lab::results::{
    BASE, CellWork, FORMAT, Plan, PlannedCell, PlannedFrontier, PlannedMethod, PlannedSubject, ScoredWith,
    Set,
};
use crate::model::control::Passes;
use crate::platform::choice::Choice;
use crate::platform::device::DeviceChoice;
use crate::platform::observer::Observer;
use crate::train::base;
use crate::train::config::keys::{keys, value};
use crate::train::config::{
    CheckpointsSection, DataSection, PreviewsSection, PriorSection, ScheduleSection, TrainConfig,
};
use crate::weights::source::Source;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Held-out losses are measured so many times in a training.
const HELD_OUT_LOOKS: i64 = 5;

/// A plan, and a task for each of its cells.
pub struct PlannedTasks {
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
    observer: &dyn Observer,
) -> Result<PlannedTasks> {
    let steps = config.steps()?;
    // Fetched once, before processes look for them at the same time.
    let towers = config.scores.resolved(observer)?;
    let identity = towers::identity(&towers, observer)?;
    let train = TrainConfig::common(&config.train)?;
    let source = Source::open_as(&base::request(&train.model, observer)?)?;
    source.check_complete()?;
    scheduler_of(&source)?;
    source.notes().iter().for_each(|note| observer.note(note));
    // Of the VAE too, where it is not the model's own: all pictures depend on it.
    let model = [Some(source.fingerprint()?), source.vae_fingerprint()?];
    let model = model.into_iter().flatten().collect::<Vec<_>>().join(" ");
    let of_method = |method: &MethodEntry| Ok((method.label.clone(), config.train_config(method)?));
    let configs = config.methods.iter().map(of_method).collect::<Result<_>>()?;
    let planner = Planner { config, subjects, steps: &steps, towers, identity, train, configs, model };
    let chosen = match stage {
        Stage::Tables(chosen) => Some(*chosen),
        Stage::First => None,
    };
    let tables = config.search.is_none() || chosen.is_some();
    let mut tasks = planner.tasks(chosen, tables)?;
    // Nothing follows the tables, or a search alone.
    let is_final = tables || config.search.as_ref().is_some_and(|s| s.only);
    for task in &mut tasks {
        task.scored_with = planner.identities(task);
        task.is_final = is_final;
        task.frontier = planner.frontier(task);
    }
    let mut notes = config.notes.clone();
    notes.extend(protocol_notes.iter().cloned());
    for method in &config.methods {
        let left_out = TrainConfig::left_out(&[&config.train, &method.settings])?;
        if !left_out.is_empty() {
            notes.push(format!("{} has no {}: left out of it", method.label, left_out.join(", ")));
        }
    }
    let plan = Plan {
        format: FORMAT,
        title: config.title.clone(),
        protocol: if config.protocol == Protocol::Paper { "paper" } else { "default" }.into(),
        notes,
        methods: config.methods.iter().map(|m| planner.method(m)).collect::<Result<_>>()?,
        subjects: subjects.iter().map(planned_subject).collect(),
        seeds: match &config.search {
            Some(search) if search.only => search.seeds.clone(),
            _ => config.seeds.clone(),
        },
        steps: steps.clone(),
        drift_prompts: config.draw.drift_prompts.clone(),
        objective: config.objective().into_iter().collect(),
        common: planner.common()?,
        cells: tasks.iter().map(|t| t.cell.clone()).collect(),
        scored_with: tasks.iter().map(|t| (t.cell.id.clone(), t.scored_with.clone())).collect(),
        frontier: planner.planned_frontier(&tasks),
    };
    Ok(PlannedTasks { plan, tasks })
}

struct Planner<'a> {
    config: &'a CompareConfig,
    subjects: &'a [Subject],
    steps: &'a [i64],
    towers: TowerPaths,
    identity: String,
    /// The settings of `[train]`.
    train: TrainConfig,
    /// Those of each method, by its label.
    configs: BTreeMap<String, TrainConfig>,
    /// The base model's fingerprint.
    model: String,
}

impl Planner<'_> {
    /// Every cell: the base model's, those of a search, and those of the tables, with the rates that a search has chosen.
    fn tasks(&self, chosen: Option<&BTreeMap<String, f64>>, tables: bool) -> Result<Vec<Task>> {
        let mut tasks: Vec<Task> = Vec::new();
        let mut places: HashMap<String, usize> = HashMap::new();
        let mut add = |task: Task| match places.entry(task.cell.id.clone()) {
            Entry::Vacant(place) => {
                place.insert(tasks.len());
                tasks.push(task);
            }
            // A training that serves the search and the tables is one cell with both sets.
            Entry::Occupied(place) => {
                let known = &mut tasks[*place.get()];
                known.sets.extend(task.sets);
                known.sets.sort_by_key(|s| s.set);
            }
        };
        for subject in self.subjects {
            add(self.base(subject)?);
        }
        if let Some(search) = &self.config.search {
            let searched = |s: &&Subject| search.subjects.is_empty() || search.subjects.contains(&s.name);
            if let Some(unknown) =
                search.subjects.iter().find(|n| !self.subjects.iter().any(|s| s.name == **n))
            {
                return Err(Error::config(format!(
                    "search: subjects: `{unknown}` is not a subject of this comparison (or has no folder)"
                )));
            }
            for method in &self.config.methods {
                for rate in self.config.learning_rates(method)? {
                    for subject in self.subjects.iter().filter(searched) {
                        for seed in &search.seeds {
                            add(self.training(method, subject, *seed, rate, Set::Validation)?);
                        }
                    }
                }
            }
        }
        if tables {
            // Seeds on the outside: what is there early is a whole table of the first seed.
            for seed in &self.config.seeds {
                for subject in self.subjects {
                    for method in &self.config.methods {
                        let rate = match chosen {
                            None => self.train_config(method).optimizer.learning_rate,
                            Some(chosen) => *chosen.get(&method.label).ok_or_else(|| {
                                Error::run(format!(
                                    "search: no learning rate of `{}` gave a score",
                                    method.label
                                ))
                                .with_hint("try lower ones")
                            })?,
                        };
                        add(self.training(method, subject, *seed, rate, Set::Test)?);
                    }
                }
            }
        }
        Ok(tasks)
    }

    fn train_config(&self, method: &MethodEntry) -> &TrainConfig {
        &self.configs[&method.label]
    }

    fn method(&self, method: &MethodEntry) -> Result<PlannedMethod> {
        let own = TrainConfig::own_words(&method.settings)?;
        let said = keys().filter_map(|key| Some((key.name.to_string(), value(&own, key)?)));
        let settings = said.map(|(name, value)| Ok((name, serde_json::to_value(value)?)));
        let settings = settings.collect::<serde_json::Result<_>>().map_err(|_| {
            Error::config(format!("method `{}`: settings that JSON does not hold", method.label))
        })?;
        let learning_rates = self.config.learning_rates(method)?;
        Ok(PlannedMethod { label: method.label.clone(), settings, learning_rates })
    }

    /// What is the same for every cell and a reader wants to know.
    fn common(&self) -> Result<Vec<(String, String)>> {
        let (train, draw) = (&self.train, &self.config.draw);
        let scheduler = draw.scheduler.map_or("the model's".to_string(), |s| s.to_string());
        let mut common = vec![
            ("model".to_string(), train.model.pretrained_model_name_or_path.display().to_string()),
            ("resolution".into(), train.data.resolution.map_or("the model's".into(), |r| r.to_string())),
            ("steps".into(), train.schedule.max_train_steps.to_string()),
            (
                if self.config.topic.is_control() { "pairs a step" } else { "subject pictures a step" }
                    .into(),
                (train.schedule.train_batch_size * train.schedule.gradient_accumulation_steps).to_string(),
            ),
            ("learning-rate schedule".into(), self.schedule(train)),
            ("pictures a prompt".into(), draw.num_images.to_string()),
            ("drawn with".into(), format!("{scheduler}, {} steps, guidance {}", draw.steps, draw.guidance)),
        ];
        if self.config.topic.is_control() {
            let passes = match draw.control_passes {
                Passes::Both => "both passes of guidance",
                Passes::Conditional => "the prompt's pass of guidance",
            };
            common.push(("condition".into(), format!("in {passes}, scale {}", draw.control_scale)));
            common.retain(|(key, _)| key != "pictures a prompt");
            common.push(("captions left out".into(), train.data.proportion_empty_prompts.to_string()));
        }
        let mut targets = Vec::new();
        for method in &self.config.methods {
            targets.push(self.train_config(method).adapter.target_modules.clone());
        }
        if targets.iter().all(|words| *words == train.adapter.target_modules) {
            common.push(("target modules of adapters".into(), train.adapter.target_modules.join(", ")));
        }
        if train.prior.with_prior_preservation {
            common.push((
                "class pictures".into(),
                format!("{}, weight {}", train.prior.num_class_images, train.prior.prior_loss_weight),
            ));
        }
        Ok(common)
    }

    fn schedule(&self, train: &TrainConfig) -> String {
        let ScheduleSection { lr_scheduler, lr_warmup_steps, .. } = &train.schedule;
        format!("{}, warm-up {lr_warmup_steps}", lr_scheduler.word())
    }

    fn base(&self, subject: &Subject) -> Result<Task> {
        let train = self.train.clone();
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
        let mut train = TrainConfig { seed, ..self.train_config(method).clone() };
        train.optimizer.learning_rate = rate;
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
        let (instance_prompt, class_prompt) = subject.pictures().map_or_else(Default::default, |pictures| {
            (pictures.instance_prompt.clone(), pictures.class_prompt.clone())
        });
        let train = TrainConfig {
            seed,
            data: DataSection { instance_prompt, ..train.data },
            prior: PriorSection { class_prompt: class_prompt.clone(), ..train.prior },
            previews: PreviewsSection {
                validation_prompt: Vec::new(),
                // Without prompts control would preview held-out pairs, in the time that is measured.
                num_validation_images: 0,
                validation_steps: (train.schedule.max_train_steps / HELD_OUT_LOOKS).max(1),
                ..train.previews
            },
            checkpoints: CheckpointsSection {
                checkpoints_total_limit: (self.steps.len() == 1).then_some(1),
                ..train.checkpoints
            },
            ..train
        };
        let train = self.with_pairs(subject, train);
        let id = match rate {
            None => self.base_id(subject),
            Some(rate) => {
                let pictures: Vec<&str> = match &subject.material {
                    Material::Pictures(pictures) => pictures.train.iter().map(|p| p.hash.as_str()).collect(),
                    Material::Pairs(pairs) => vec![&pairs.train_hash],
                };
                // Where it runs is not what it is, nor is what it would have refused.
                let data = DataSection { strict_paths: false, ..train.data.clone() };
                let what = TrainConfig { device: DeviceChoice::Auto, threads: None, data, ..train.clone() };
                let key = serde_json::to_string(&(method, what, &self.model, pictures, self.steps));
                let key = key.map_err(|e| Error::config(format!("method `{method}`: {e}")))?;
                format!("{}-lr{rate:e}-{}-s{seed}-{}", slug(method), subject.name, short(&key))
            }
        };
        let cell = PlannedCell {
            id,
            subject: subject.name.clone(),
            work: rate.map_or(CellWork::Base, |learning_rate| CellWork::Training {
                method: method.to_string(),
                seed,
                learning_rate,
            }),
        };
        // Pictures without the subject are the same for all: the first subject's base cell draws them.
        let first = self.subjects.first().map_or_else(String::new, |first| self.base_id(first));
        let draws_drift = rate.is_some() || cell.id == first;
        let draw = &self.config.draw;
        let class = self.class_settings();
        let class_folder = format!("{}-{}", slug(&class_prompt), short(&format!("{class_prompt} {class}")));
        Ok(Task {
            class_folder: Path::new("class_images").join(class_folder),
            steps: if rate.is_some() { self.steps.to_vec() } else { vec![0] },
            sets: sets.iter().map(|set| self.set(*set, subject, rate.is_some())).collect(),
            control: subject.pairs().map(|pairs| pairs.agreement.clone()),
            drift_prompts: if draws_drift { draw.drift_prompts.clone() } else { Vec::new() },
            drift_base: first,
            sampling: Sampling {
                seed: draw.seed,
                scheduler: draw.scheduler,
                steps: draw.steps,
                guidance: draw.guidance,
                control: draw.control(),
            },
            num_drift_images: draw.num_drift_images,
            towers: self.towers.clone(),
            class_look_alikes: subject.pictures().is_none_or(|p| p.look_alikes.is_empty())
                && train.prior.with_prior_preservation,
            frontier: None,
            scored_with: ScoredWith::new(),
            remove_weights: self.config.remove_weights,
            is_final: false,
            jobs: self.config.jobs,
            cell,
            train,
        })
    }

    /// What class pictures depend on beside their prompt.
    fn class_settings(&self) -> String {
        let t = &self.train;
        let how = (
            t.prior.class_steps,
            t.prior.class_guidance,
            t.prior.class_scheduler,
            t.data.resolution,
            t.prior.sample_batch_size,
        );
        let prediction = t.model.prediction.map_or_else(String::new, |prediction| format!(" {prediction}"));
        format!("{} {how:?}{prediction}", self.model)
    }

    fn base_id(&self, subject: &Subject) -> String {
        let t = &self.train;
        let counts = (t.model.dtype, t.prior.with_prior_preservation, t.prior.num_class_images);
        format!("{BASE}-{}-{}", subject.name, short(&format!("{} {counts:?}", self.class_settings())))
    }

    /// The settings of a training on a subject's pairs, where it has any.
    fn with_pairs(&self, subject: &Subject, train: TrainConfig) -> TrainConfig {
        let Some(control) = subject.pairs() else { return train };
        let entry = self.config.topic.controls().iter().find(|entry| entry.name == subject.name);
        let train = match entry {
            Some(entry) => entry.applied_to(train),
            None => train,
        };
        let (train_data_dir, palette) =
            (Some(control.train_data_dir.clone()), control.settings.palette.clone());
        TrainConfig { data: DataSection { train_data_dir, palette, ..train.data }, ..train }
    }

    fn set(&self, set: Set, subject: &Subject, is_trained: bool) -> TaskSet {
        let (prompts, num_images) = match set {
            Set::Validation => (&subject.validation_prompts, self.config.draw.num_validation_images),
            Set::Test => (&subject.prompts, self.config.draw.num_images),
        };
        let Some(control) = subject.pairs() else {
            return TaskSet { set, prompts: prompts.clone(), num_images, pairs: None };
        };
        // The base model is shown no condition, its own or another's.
        let shuffled = if is_trained { control.shuffled(set).to_vec() } else { Vec::new() };
        let conditions = control.hash(set).to_string();
        let num_images = if shuffled.is_empty() { 1 } else { 2 };
        TaskSet {
            set,
            prompts: prompts.clone(),
            num_images,
            pairs: Some(DrawnPairing { conditions, shuffled }),
        }
    }

    /// The grid of a cell of the tables: the validation prompts choose a point of it, the test prompts tell its scores.
    fn frontier(&self, task: &Task) -> Option<TaskFrontier> {
        let entry = self.config.frontier.as_ref()?;
        let subject = self.subjects.iter().find(|s| s.name == task.cell.subject)?;
        if task.sets.iter().all(|set| set.set != Set::Test) {
            return None;
        }
        let is_trained = !task.cell.is_base();
        let points = if is_trained { entry.points(self.steps) } else { vec![(0, 0.0)] };
        let sets: Vec<TaskSet> =
            [Set::Validation, Set::Test].map(|set| self.set(set, subject, is_trained)).into();
        let identities: Vec<String> = sets.iter().map(|set| self.identity(task, set, &[])).collect();
        let made_with = short(&format!("{points:?} {identities:?}"));
        Some(TaskFrontier { points, sets, made_with })
    }

    fn planned_frontier(&self, tasks: &[Task]) -> Option<PlannedFrontier> {
        let entry = self.config.frontier.as_ref()?;
        let made_with =
            tasks.iter().filter_map(|t| Some((t.cell.id.clone(), t.frontier.as_ref()?.made_with.clone())));
        Some(PlannedFrontier {
            scales: entry.ascending(),
            checkpoints: entry.steps(self.steps),
            drifts: entry.drifts.clone(),
            likeness: entry.likeness.clone(),
            drift_limit: entry.drift_limit,
            made_with: made_with.collect(),
        })
    }

    /// What the scores of a task depend on beside its training, for each set.
    fn identities(&self, task: &Task) -> ScoredWith {
        task.sets.iter().map(|set| (set.set, self.identity(task, set, &task.steps))).collect()
    }

    /// The same for one set, after these steps.
    fn identity(&self, task: &Task, set: &TaskSet, steps: &[i64]) -> String {
        let subject = self.subjects.iter().find(|s| s.name == task.cell.subject);
        // The other set's pictures have no say; the base model's record compares those that are trained on.
        let other = if set.set == Set::Test { "validation" } else { "test" };
        let pictures: Vec<(&str, Vec<&str>)> = subject
            .iter()
            .filter_map(|s| s.pictures())
            .flat_map(SubjectPictures::by_kind)
            .filter(|(kind, _)| *kind != other)
            .map(|(kind, p)| (kind, p.iter().map(|p| p.hash.as_str()).collect()))
            .collect();
        let batch = task.train.prior.sample_batch_size;
        let drawn = (&task.drift_prompts, task.num_drift_images, &task.sampling, batch);
        let how = (task.class_look_alikes, &task.control);
        let key = (&self.identity, pictures, set, drawn, steps, how);
        hash(format!("{key:?}").as_bytes())[..16].to_string()
    }
}

/// Enough of a hash for a folder's name.
fn short(key: &str) -> String {
    hash(key.as_bytes())[..8].to_string()
}

fn planned_subject(subject: &Subject) -> PlannedSubject {
    let place = |kind: &str, pictures: &[SubjectPicture]| {
        pictures.iter().map(|p| format!("subjects/{}/{kind}/{}", subject.name, p.name)).collect()
    };
    let none = SubjectPictures::default();
    let own = subject.pictures().unwrap_or(&none);
    PlannedSubject {
        name: subject.name.clone(),
        class: subject.class.clone(),
        instance_prompt: own.instance_prompt.clone(),
        prompts: subject.prompts.iter().map(|p| p.prompt.clone()).collect(),
        validation_prompts: subject.validation_prompts.iter().map(|p| p.prompt.clone()).collect(),
        train_pictures: place("train", &own.train),
        validation_pictures: place("validation", &own.validation),
        test_pictures: place("test", &own.test),
        notes: subject.notes.clone(),
        control: subject.pairs().map(|pairs| pairs.planned(&subject.name)),
    }
}
