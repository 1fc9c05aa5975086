//! `[classifier]` in a plan: what each cell is asked.

use crate::lab::compare::plan::{Planner, short};
use crate::lab::compare::task::{Task, TaskClassifier};
use crate::lab::results::{PlannedClassifier, Set};

impl Planner<'_> {
    /// The question to a training of the tables, or to the first subject's base model: it is the same for all.
    pub(super) fn classifier(&self, task: &Task) -> Option<TaskClassifier> {
        let asked = self.planned_classifier()?;
        let is_base = task.cell.is_base();
        if task.sets.iter().all(|set| set.set != Set::Test) || is_base && task.cell.id != task.drift_base {
            return None;
        }
        let scales = asked.scales.iter().copied().filter(|scale| (*scale == 0.0) == is_base).collect();
        Some(TaskClassifier { step: *task.steps.last()?, scales, asked })
    }

    pub(super) fn planned_classifier(&self) -> Option<PlannedClassifier> {
        let (entry, set) = (self.config.classifier.as_ref()?, self.classified?);
        let (num_noises, seed) = (entry.num_noises, self.config.draw.seed);
        // Scales are not among it: one more measures nothing twice.
        let key = (&entry.prompts, set.identity(), set.background, num_noises, seed);
        let model = (self.class_settings(), self.train.model.dtype);
        Some(PlannedClassifier {
            prompts: entry.prompts.clone(),
            pictures: set.pictures(),
            num_noises,
            seed,
            scales: entry.ascending(),
            made_with: short(&format!("{key:?} {model:?}")),
        })
    }
}
