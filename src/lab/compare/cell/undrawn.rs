//! How many pictures a task is still to draw, as far as its folders tell without its model.

use crate::lab::compare::cell::{drawings, frontier, is_scored, step_folder};
use crate::lab::compare::task::Task;
use crate::lab::results;
use std::collections::BTreeMap;
use std::path::Path;

/// Of its steps and of its grid; a folder that was drawn in another way counts whole, since it is drawn anew.
pub fn undrawn(comparison: &Path, task: &Task) -> usize {
    if is_scored(comparison, task) {
        return 0;
    }
    let cell = results::cell_folder(comparison, &task.cell.id);
    let steps = task.steps.iter().map(|step| (step_folder(&cell, *step), &task.sets));
    let grid = task.frontier.iter().flat_map(|grid| {
        let folder = |(step, scale): &(i64, f64)| frontier::point_folder(task, &cell, *step, *scale);
        grid.points.iter().map(folder).map(|place| (place, &grid.sets)).collect::<Vec<_>>()
    });
    // The grid has places of steps too.
    let mut folders = BTreeMap::new();
    for (place, sets) in steps.chain(grid) {
        let all = drawings(task, sets, "", 0).into_iter();
        folders.extend(all.map(|(name, drawing)| (place.join(name), drawing)));
    }
    folders.iter().map(|(folder, drawing)| drawing.undrawn(folder)).sum()
}
