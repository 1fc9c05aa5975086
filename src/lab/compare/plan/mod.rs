//! From the settings of a comparison to its cells.

mod cell_task;
mod classifier;
mod described;
mod frontier;
mod identity;

use crate::diffusion::stable_diffusion::scheduler_of;
use crate::error::{Error, Result};
use crate::lab::compare::classifier::ClassifierSet;
use crate::lab::compare::config::{CompareConfig, MethodEntry, Protocol};
use crate::lab::compare::subject::{Subject, hash};
use crate::lab::compare::task::Task;
use crate::lab::evaluate::{TowerPaths, towers};
use crate::lab::results::{FORMAT, Plan, Set};
use crate::platform::observer::Observer;
use crate::train::base;
use crate::train::config::TrainConfig;
use crate::weights::source::Source;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

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
    (subjects, classified): (&[Subject], Option<&ClassifierSet>),
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
    let planner =
        Planner { config, subjects, classified, steps: &steps, towers, identity, train, configs, model };
    planner.check_validation()?;
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
        task.classifier = planner.classifier(task);
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
        subjects: subjects.iter().map(described::planned_subject).collect(),
        seeds: match &config.search {
            Some(search) if search.only => search.seeds.clone(),
            _ => config.seeds.clone(),
        },
        steps: steps.clone(),
        drift_prompts: config.draw.drift_prompts.clone(),
        objective: config.objective().into_iter().collect(),
        search_drift: config.search.as_ref().and_then(|search| search.drift),
        common_rate: config.common_rate,
        common: planner.common()?,
        cells: tasks.iter().map(|t| t.cell.clone()).collect(),
        scored_with: tasks.iter().map(|t| (t.cell.id.clone(), t.scored_with.clone())).collect(),
        frontier: planner.planned_frontier(&tasks),
        classifier: planner.planned_classifier(),
    };
    Ok(PlannedTasks { plan, tasks })
}

struct Planner<'a> {
    config: &'a CompareConfig,
    subjects: &'a [Subject],
    /// Pictures of the classes that the model itself is asked about.
    classified: Option<&'a ClassifierSet>,
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
            // A training that serves the search and the tables is one cell with both sets; a common rate may be a method's own.
            Entry::Occupied(place) => {
                let known = &mut tasks[*place.get()];
                known.sets.extend(task.sets);
                known.sets.sort_by_key(|s| s.set);
                known.sets.dedup_by_key(|s| s.set);
            }
        };
        for subject in self.subjects {
            add(self.base(subject)?);
        }
        if let Some(search) = &self.config.search {
            if let Some(unknown) =
                search.subjects.iter().find(|n| !self.subjects.iter().any(|s| s.name == **n))
            {
                return Err(Error::config(format!(
                    "search: subjects: `{unknown}` is not a subject of this comparison (or has no folder)"
                )));
            }
            for method in &self.config.methods {
                for rate in self.config.learning_rates(method)? {
                    for subject in self.subjects.iter().filter(|s| search.looks_at(&s.name)) {
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
                        for rate in [Some(rate), self.config.common_rate].into_iter().flatten() {
                            add(self.training(method, subject, *seed, rate, Set::Test)?);
                        }
                    }
                }
            }
        }
        Ok(tasks)
    }

    fn train_config(&self, method: &MethodEntry) -> &TrainConfig {
        &self.configs[&method.label]
    }
}

/// Enough of a hash for a folder's name.
fn short(key: &str) -> String {
    hash(key.as_bytes())[..8].to_string()
}
