//! A trained cell along the grid of `[frontier]`: drawn and scored, never trained.

use crate::diffusion::sample::Session;
use crate::error::{Error, Result};
use crate::lab::compare::cell::{Cell, weight_files};
use crate::lab::compare::draw;
use crate::lab::compare::frontier::TaskFrontier;
use crate::lab::evaluate::Towers;
use crate::lab::results::{Evaluation, FrontierPoint, FrontierRecord};
use std::path::PathBuf;

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
            if drawings.iter().all(|(name, drawing)| drawing.is_done(&place.join(name))) {
                continue;
            }
            let mut by = self.by(step);
            if let Some(adapter) = self.adapter(step) {
                if !weight_files(&adapter).iter().any(|path| path.is_file()) {
                    return Err(gone(&adapter, step == self.config.schedule.max_train_steps));
                }
                draw::put_on(session, &self.config, &adapter, scale)?;
                by += &format!(", scale {scale}");
            }
            for (name, drawing) in &drawings {
                drawing.draw(session, &[], &by, &place.join(name), self.observer)?;
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
            let at_hand = |e: &&Evaluation| self.is_scored_step(scale) && e.step == step;
            let known: Vec<Evaluation> = scored.iter().filter(at_hand).cloned().collect();
            let evaluations = if frontier.sets.iter().all(|s| known.iter().any(|e| e.set == s.set)) {
                known
            } else {
                self.score_place(towers, &subjects, &drawings, (step, self.point_folder(step, scale)))?
            };
            points.extend(evaluations.into_iter().map(|evaluation| FrontierPoint { scale, evaluation }));
        }
        Ok(Some(FrontierRecord { made_with: frontier.made_with.clone(), points }))
    }

    /// Whether a place of the grid is that of a scored step: as trained, or the base model.
    fn is_scored_step(&self, scale: f64) -> bool {
        scale == 1.0 || self.task.cell.is_base()
    }

    fn point_folder(&self, step: i64, scale: f64) -> PathBuf {
        let place = self.step_folder(step);
        if self.is_scored_step(scale) { place } else { place.join(format!("scale-{scale}")) }
    }
}

fn gone(adapter: &std::path::Path, last: bool) -> Error {
    let hint = if last {
        "`remove_weights = true` removed them when the cell was done; its folder taken away, the cell is trained anew"
    } else {
        "checkpoints are removed when a comparison is done; leave this one out of [frontier] checkpoints, or take the \
         cell's folder away to train it anew"
    };
    Error::run(format!("{}: expected trained weights to draw from, found none", adapter.display()))
        .with_hint(hint)
}
