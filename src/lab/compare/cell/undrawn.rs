//! How many pictures a task lacks, as far as its folders tell without its model.

use crate::lab::compare::cell::{DRIFT, frontier, is_scored, step_folder};
use crate::lab::compare::draw;
use crate::lab::compare::task::{Task, TaskSet};
use crate::lab::results;
use std::path::Path;

/// Pictures that a task is still to draw: of its steps and of its grid. Those that are there but were drawn in another way, and are
/// drawn anew, do not count.
pub fn undrawn(comparison: &Path, task: &Task) -> usize {
    if is_scored(comparison, task) {
        return 0;
    }
    let cell = results::cell_folder(comparison, &task.cell.id);
    let steps = task.steps.iter().map(|step| at_place(task, &task.sets, &step_folder(&cell, *step)));
    let grid = task.frontier.iter().filter(|_| !task.cell.is_base()).map(|grid| {
        let of_its_own = grid.points.iter().filter(|(_, scale)| *scale != 1.0);
        let place = |step: &i64, scale: &f64| frontier::scale_folder(&step_folder(&cell, *step), *scale);
        of_its_own.map(|(step, scale)| at_place(task, &grid.sets, &place(step, scale))).sum()
    });
    steps.chain(grid).sum()
}

fn at_place(task: &Task, sets: &[TaskSet], place: &Path) -> usize {
    let drift = (DRIFT, task.drift_prompts.len(), task.num_drift_images);
    let sets = sets.iter().map(|set| (set.set.name(), set.prompts.len(), set.num_images));
    let lacking = |(name, prompts, images): (&str, usize, usize)| {
        let folder = place.join(name);
        images * (0..prompts).filter(|prompt| !draw::has_prompt(&folder, *prompt, images)).count()
    };
    sets.chain([drift]).map(lacking).sum()
}
