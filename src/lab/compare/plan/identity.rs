//! What the scores of a task depend on beside its training: those made with other things do not count.

use crate::lab::compare::plan::Planner;
use crate::lab::compare::subject::{SubjectPictures, hash};
use crate::lab::compare::task::{Task, TaskSet};
use crate::lab::results::{ScoredWith, Set};

impl Planner<'_> {
    /// What the scores of a task depend on beside its training, for each set.
    pub(super) fn identities(&self, task: &Task) -> ScoredWith {
        task.sets.iter().map(|set| (set.set, self.identity(task, set, &task.steps))).collect()
    }

    /// The same for one set, after these steps.
    pub(super) fn identity(&self, task: &Task, set: &TaskSet, steps: &[i64]) -> String {
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
        let with_train =
            if set.set == Set::Validation && self.validates_with_train() { " with train" } else { "" };
        hash(format!("{key:?}{with_train}").as_bytes())[..16].to_string()
    }
}
