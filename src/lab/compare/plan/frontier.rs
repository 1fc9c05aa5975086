//! `[frontier]` in a plan: the grid of each cell.

use crate::error::{Error, Result};
use crate::lab::compare::plan::{Planner, short};
use crate::lab::compare::subject::Subject;
use crate::lab::compare::task::{Task, TaskFrontier, TaskSet};
use crate::lab::results::{PlannedFrontier, Set};

impl Planner<'_> {
    /// Fails where a search looks at the likeness to validation pictures and nothing it looks at has any.
    pub(super) fn check_validation(&self) -> Result<()> {
        let Some(search) = self.config.search.as_ref().filter(|search| search.drift.is_some()) else {
            return Ok(());
        };
        let has = |s: &Subject| s.pictures().is_some_and(|pictures| !pictures.validation.is_empty());
        if self.subjects.iter().filter(|s| search.looks_at(&s.name)).any(has) {
            return Ok(());
        }
        Err(Error::config("search: drift: expected a subject with a validation picture, found none")
            .with_hint(
                "of five pictures in data_dir or more the last is left out of training for validation",
            ))
    }

    /// Whether likeness on validation is to the pictures that are trained on too. One picture that is left out is too few for a curve:
    /// what its background has in common with a prompt's counts for more than the subject.
    pub(super) fn validates_with_train(&self) -> bool {
        self.config.frontier.is_some()
    }

    /// The grid of a cell: the validation prompts choose a point of it, or a learning rate; the test prompts tell scores for the
    /// tables.
    pub(super) fn frontier(&self, task: &Task) -> Option<TaskFrontier> {
        let entry = self.config.frontier.as_ref()?;
        let subject = self.subjects.iter().find(|s| s.name == task.cell.subject)?;
        let has_test = task.sets.iter().any(|set| set.set == Set::Test);
        if !has_test && self.config.search.as_ref().is_none_or(|search| search.drift.is_none()) {
            return None;
        }
        let is_trained = !task.cell.is_base();
        let points = if is_trained { entry.points(self.steps) } else { vec![(0, 0.0)] };
        let kinds: &[Set] = if has_test { &[Set::Validation, Set::Test] } else { &[Set::Validation] };
        let sets: Vec<TaskSet> = kinds.iter().map(|set| self.set(*set, subject, is_trained)).collect();
        // Each alone: what a search has drawn on validation serves the tables too.
        let identity = |set: &TaskSet| short(&format!("{points:?} {}", self.identity(task, set, &[])));
        let made_with = sets.iter().map(|set| (set.set, identity(set))).collect();
        Some(TaskFrontier { points, sets, made_with })
    }

    pub(super) fn planned_frontier(&self, tasks: &[Task]) -> Option<PlannedFrontier> {
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
}
