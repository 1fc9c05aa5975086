//! `[frontier]` in a plan: the grid of each cell.

use crate::lab::compare::plan::{Planner, short};
use crate::lab::compare::task::{Task, TaskFrontier, TaskSet};
use crate::lab::results::{PlannedFrontier, Set};

impl Planner<'_> {
    /// The grid of a cell of the tables: the validation prompts choose a point of it, the test prompts tell its scores.
    pub(super) fn frontier(&self, task: &Task) -> Option<TaskFrontier> {
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
