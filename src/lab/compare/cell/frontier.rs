//! A trained cell along the grid of `[frontier]`: drawn and scored, never trained.

use crate::diffusion::sample::Session;
use crate::error::{Error, ErrorKind, Result};
use crate::lab::compare::cell::{Cell, adapter_folder, all_drawn, has_weights, step_folder};
use crate::lab::compare::draw;
use crate::lab::compare::task::{Task, TaskFrontier, TaskSet};
use crate::lab::evaluate::Towers;
use crate::lab::results::{self, Evaluation, FrontierPoint, FrontierRecord};
use std::path::{Path, PathBuf};

impl Cell<'_> {
    /// Draws what is missing of the grid. Errors: weights that are gone; a grid starts no training.
    pub(super) fn draw_frontier(
        &self,
        session: &mut Session,
        fingerprint: &str,
        resolution: u32,
    ) -> Result<()> {
        let Some(TaskFrontier { points, sets, .. }) = &self.task.frontier else { return Ok(()) };
        let drawings = self.drawings(sets, fingerprint, resolution);
        for &(step, scale) in points {
            let place = self.point_folder(step, scale);
            if all_drawn(&drawings, &place) {
                continue;
            }
            let mut by = self.by(step);
            if let Some(adapter) = self.adapter(step) {
                if !has_weights(&adapter) {
                    return Err(gone(&adapter));
                }
                draw::put_on(session, &self.config, &adapter, scale)?;
                by += &format!(", scale {scale}");
            }
            for (name, drawing) in &drawings {
                match drawing.draw(session, &[], &by, &place.join(name), self.observer) {
                    // A scale too far is a point that is missing; what was trained is as good as before.
                    Err(Error { kind: ErrorKind::NotFinite(why), .. }) => {
                        let why = why.lines().next().unwrap_or_default().to_string();
                        self.observer
                            .note(&format!("step {step}, scale {scale}: no point of the frontier: {why}"));
                        break;
                    }
                    drawn => drawn?,
                }
            }
        }
        Ok(())
    }

    /// Scores of the grid; `scored` are those of the steps, which are not computed again.
    pub(super) fn score_frontier(
        &self,
        towers: &Towers,
        fingerprint: &str,
        scored: &[Evaluation],
    ) -> Result<Option<FrontierRecord>> {
        let Some(frontier) = &self.task.frontier else { return Ok(None) };
        let drawings = self.drawings(&frontier.sets, fingerprint, self.resolution()?);
        let subjects = self.scored_subjects(towers, &frontier.sets)?;
        let mut points = Vec::new();
        for &(step, scale) in &frontier.points {
            let place = self.point_folder(step, scale);
            if !all_drawn(&drawings, &place) {
                continue;
            }
            let at_hand = |e: &&Evaluation| is_scored_step(self.task, scale) && e.step == step;
            let known: Vec<Evaluation> = scored.iter().filter(at_hand).cloned().collect();
            let evaluations = if frontier.sets.iter().all(|s| known.iter().any(|e| e.set == s.set)) {
                known
            } else {
                self.score_place(towers, &subjects, &drawings, (step, place))?
            };
            points.extend(evaluations.into_iter().map(|evaluation| FrontierPoint { scale, evaluation }));
        }
        Ok(Some(FrontierRecord { made_with: frontier.made_with.clone(), points }))
    }

    fn point_folder(&self, step: i64, scale: f64) -> PathBuf {
        point_folder(self.task, &self.folder, step, scale)
    }
}

/// Where a place of the grid is drawn, below the folder of its cell.
pub(super) fn point_folder(task: &Task, cell: &Path, step: i64, scale: f64) -> PathBuf {
    let place = step_folder(cell, step);
    if is_scored_step(task, scale) { place } else { scale_folder(&place, scale) }
}

/// Whether a place of the grid is that of a scored step: as trained, or the base model.
fn is_scored_step(task: &Task, scale: f64) -> bool {
    scale == 1.0 || task.cell.is_base()
}

fn scale_folder(step: &Path, scale: f64) -> PathBuf {
    step.join(format!("scale-{scale}"))
}

/// Fails where the grid of a training that is done cannot be drawn: its weights, or a checkpoint, were removed since. Pictures that were
/// drawn before need none; whether they are those that are wanted is seen when they would be drawn.
pub(super) fn check_weights(comparison: &Path, task: &Task) -> Result<()> {
    let Some(frontier) = task.frontier.as_ref().filter(|_| super::scored(comparison, task).is_none()) else {
        return Ok(());
    };
    let config = task.train_config(comparison);
    let missing = frontier.points.iter().find_map(|(step, scale)| {
        let adapter = adapter_folder(&config, *step);
        let place =
            scale_folder(&step_folder(&results::cell_folder(comparison, &task.cell.id), *step), *scale);
        let has_pictures = |set: &TaskSet| place.join(set.set.name()).join(draw::MANIFEST_FILE).is_file();
        let drawn = *scale == 1.0 && task.steps.contains(step) || frontier.sets.iter().all(has_pictures);
        (!drawn && !has_weights(&adapter)).then_some(adapter)
    });
    missing.map_or(Ok(()), |adapter| Err(gone(&adapter)))
}

fn gone(adapter: &Path) -> Error {
    Error::run(format!(
        "{}: expected trained weights to draw the frontier from, found none: they are removed when a comparison is done",
        adapter.display()
    ))
    .with_hint("leave earlier steps out of [frontier] checkpoints; or take the cell's folder away, to train it anew")
}
