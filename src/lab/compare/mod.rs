//! Comparing methods under equal conditions: the same pictures, prompts, seeds, order of data, steps and batch for each, the
//! same noise for what is drawn, one process for each training.
//!
//! `config` -> `subjects` (pictures divided) or `control` (pairs) -> `plan` (cells) -> `pool` (processes) -> `cell` (train, `draw`, `score`) ->
//! `crate::lab::results` on disk -> `crate::lab::report`.

pub mod cell;
pub mod checkpoints;
pub mod classifier;
pub mod config;
pub mod control;
pub mod draw;
pub mod dreambooth;
mod estimate;
pub mod frontier;
mod frontier_problems;
mod plan;
mod pool;
pub mod recommended;
mod score;
pub mod shard;
mod subject;
pub mod subjects;
pub mod task;
mod validate;

pub use config::CompareConfig;
pub use estimate::Estimate;
pub use pool::{CellFailure, duration};
pub use shard::Shard;

use crate::error::{Error, Result};
use crate::lab::report::best_rates;
use crate::lab::results::{self, CellRecord, PLAN_FILE, Plan};
use crate::platform::observer::Observer;
use crate::platform::{device, files};
use crate::train::config::TrainConfig;
use classifier::ClassifierSet;
use plan::{PlannedTasks, Stage};
use std::path::Path;
use subject::Subject;
use task::Task;

/// How a comparison ended.
#[derive(Debug)]
pub struct ComparisonOutcome {
    /// Cells that could not be done.
    pub failures: Vec<CellFailure>,
    /// Cells of other shares that are not done yet.
    pub missing: usize,
    /// They are of the search: the trainings for the tables come after it.
    pub searching: bool,
}

/// Does this worker's share of a comparison; what is done is not done again.
pub fn run(config: &CompareConfig, shard: Shard, observer: &dyn Observer) -> Result<ComparisonOutcome> {
    let folder =
        std::path::absolute(&config.output_dir).map_err(|e| Error::io("find", &config.output_dir, e))?;
    let LookedAt { subjects, classified, notes } = looked_at(config, observer)?;
    let pictures = (&subjects[..], classified.as_ref());
    check_folder(&folder, config)?;
    files::create_dir_all(&folder)?;
    let planned = plan::plan(config, pictures, &notes, &Stage::First, observer)?;
    let searched = config.search.as_ref().is_some_and(|s| !s.only) && is_complete(&folder, &planned);
    // Before anything else: by it a folder is known as a comparison's.
    if !searched {
        results::write_json(&folder.join(PLAN_FILE), &planned.plan)?;
    }
    for subject in &subjects {
        subject.copy_into(&folder)?;
    }
    classified.iter().try_for_each(|set| set.copy_into(&folder))?;
    if !searched {
        let outcome = stage(&folder, config, &planned, shard, observer)?;
        let more = config.search.as_ref().is_some_and(|s| !s.only);
        if !more || outcome.missing > 0 || !outcome.failures.is_empty() {
            return Ok(ComparisonOutcome { searching: more, ..outcome });
        }
    }
    let records: Vec<CellRecord> = planned.plan.records(&folder)?;
    let chosen =
        best_rates(&planned.plan, &records).into_iter().map(|best| (best.method, best.rate)).collect();
    let planned = plan::plan(config, pictures, &notes, &Stage::Tables(&chosen), observer)?;
    results::write_json(&folder.join(PLAN_FILE), &planned.plan)?;
    let outcome = stage(&folder, config, &planned, shard, observer)?;
    if outcome.missing == 0 && outcome.failures.is_empty() {
        // The search kept what the tables might have been drawn from.
        planned.tasks.iter().try_for_each(|task| cell::clean(&folder, task))?;
    }
    Ok(outcome)
}

/// The pictures of a comparison, and what is to be said of them.
struct LookedAt {
    subjects: Vec<Subject>,
    classified: Option<ClassifierSet>,
    notes: Vec<String>,
}

/// The subjects with their pictures, not more than can be compared, and what the model itself is asked to tell apart.
fn looked_at(config: &CompareConfig, observer: &dyn Observer) -> Result<LookedAt> {
    let train = TrainConfig::common(&config.train)?;
    device::set_threads(train.threads, usize::MAX)?;
    let (subjects, notes) = subjects::resolve(config, observer)?;
    config.check_size(subjects.len())?;
    let classified = config.classifier.as_ref();
    let classified =
        classified.map(|entry| ClassifierSet::resolve(entry, train.data.background, &subjects, observer));
    Ok(LookedAt { subjects, classified: classified.transpose()?, notes })
}

fn is_complete(folder: &Path, planned: &PlannedTasks) -> bool {
    planned.tasks.iter().all(|task| cell::is_done(folder, task))
}

/// The plan without doing any of it, and how long it may take.
pub fn dry_run(config: &CompareConfig, shard: Shard, observer: &dyn Observer) -> Result<(Plan, Estimate)> {
    let LookedAt { subjects, classified, notes } = looked_at(config, observer)?;
    let pictures = (&subjects[..], classified.as_ref());
    let planned = plan::plan(config, pictures, &notes, &Stage::First, observer)?;
    let estimate = Estimate::of(config, &planned.tasks, shard, observer)?;
    Ok((planned.plan, estimate))
}

fn stage(
    folder: &Path,
    config: &CompareConfig,
    planned: &PlannedTasks,
    shard: Shard,
    observer: &dyn Observer,
) -> Result<ComparisonOutcome> {
    let is_base = |task: &&Task| task.cell.is_base();
    let mine: Vec<&Task> = planned
        .tasks
        .iter()
        .filter(|task| !is_base(task))
        .enumerate()
        .filter(|(i, _)| shard.has(*i))
        .map(|(_, task)| task)
        .collect();
    // Drift is measured from the first subject's base pictures.
    let needed = |base: &&Task| {
        mine.iter().any(|t| t.cell.subject == base.cell.subject || t.drift_base == base.cell.id)
            || shard == Shard::WHOLE
    };
    let bases: Vec<&Task> = planned.tasks.iter().filter(is_base).filter(needed).collect();
    let is_due = |task: &&Task| !cell::is_done(folder, task) || cell::lacks_changes(folder, task);
    let due = [bases, mine].map(|tasks| tasks.into_iter().filter(is_due).collect::<Vec<&Task>>());
    due.iter().flatten().try_for_each(|task| cell::check_weights(folder, task))?;
    let mut failures = Vec::new();
    for todo in due {
        if todo.is_empty() {
            continue;
        }
        for task in &todo {
            task.write(folder)?;
        }
        failures.extend(pool::run(folder, &todo, config.jobs, observer)?);
        if !failures.is_empty() && todo.iter().all(is_base) {
            // Every other cell stands on these.
            return Ok(ComparisonOutcome { failures, missing: planned.tasks.len(), searching: false });
        }
    }
    let missing = planned.tasks.iter().filter(|task| !cell::is_done(folder, task)).count();
    Ok(ComparisonOutcome { missing: missing.saturating_sub(failures.len()), failures, searching: false })
}

/// Refuses a folder that holds something else.
fn check_folder(folder: &Path, config: &CompareConfig) -> Result<()> {
    if folder.exists() && !folder.is_dir() {
        return Err(Error::run(format!(
            "{}: expected a folder for the comparison, found a file",
            folder.display()
        )));
    }
    // Listed before the plan is looked for: another worker writes it before anything else.
    let is_somebodys = |e: &files::DirEntry| !e.name.to_string_lossy().starts_with('.');
    let used = folder.is_dir() && files::list_dir(folder)?.iter().any(is_somebodys);
    if folder.join(PLAN_FILE).is_file() {
        let found = Plan::read(folder)?.title;
        if found != config.title {
            return Err(Error::run(format!("{} holds another comparison, `{found}`", folder.display()))
                .with_hint("give another --output_dir"));
        }
    } else if used {
        return Err(Error::run(format!("{} is not empty and holds no comparison", folder.display()))
            .with_hint("give another --output_dir"));
    }
    Ok(())
}
