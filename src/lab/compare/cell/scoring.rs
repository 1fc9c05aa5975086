//! From a cell's pictures to its scores, and those of the real pictures.

use crate::data::image::RgbImage;
use crate::error::Result;
use crate::lab::compare::cell::{Cell, DRIFT, Real};
use crate::lab::compare::draw::SetDrawing;
use crate::lab::compare::subjects::CLASS_LOOK_ALIKES;
use crate::lab::compare::task::TaskSet;
use crate::lab::compare::{control, score};
use crate::lab::evaluate::{ScoredSubject, Towers};
use crate::lab::results::{self, Evaluation, PromptScores, Scores, Set};
use std::collections::BTreeMap;
use std::path::PathBuf;

impl Cell<'_> {
    pub(super) fn score(&self, towers: &Towers, fingerprint: &str) -> Result<Vec<Evaluation>> {
        let drawings = self.drawings(&self.task.sets, fingerprint, self.resolution()?);
        if let Some(agreement) = &self.task.control {
            return self.score_pairs(agreement, towers, &drawings);
        }
        let subjects = self.scored_subjects(towers, &self.task.sets)?;
        let mut evaluations = Vec::new();
        for &step in &self.task.steps {
            evaluations.extend(self.score_place(
                towers,
                &subjects,
                &drawings,
                (step, self.step_folder(step)),
            )?);
        }
        Ok(evaluations)
    }

    pub(super) fn resolution(&self) -> Result<u32> {
        results::read_json(&self.folder.join("resolution.json"))
    }

    /// What the pictures of each set are compared with.
    pub(super) fn scored_subjects<'s>(
        &self,
        towers: &Towers,
        sets: &'s [TaskSet],
    ) -> Result<Vec<(&'s TaskSet, ScoredSubject)>> {
        let look_alikes = self.look_alikes()?;
        let scored = |set: &'s TaskSet| {
            let mut real = self.real_pictures(set.set.name())?;
            if set.set == Set::Validation && self.task.validates_with_train {
                real.extend(self.real_pictures("train")?);
            }
            let masks = match set.set {
                Set::Test => score::masks(&self.subject_folder().join("masks"), self.observer)?,
                _ => Vec::new(),
            };
            let look_alikes: &[RgbImage] = if real.is_empty() { &[] } else { &look_alikes };
            Ok((set, score::subject(towers, &real, look_alikes, &masks)?))
        };
        sets.iter().map(scored).collect()
    }

    /// Scores of what was drawn into one folder after a step, for each set.
    pub(super) fn score_place(
        &self,
        towers: &Towers,
        subjects: &[(&TaskSet, ScoredSubject)],
        drawings: &[(String, SetDrawing)],
        (step, place): (i64, PathBuf),
    ) -> Result<Vec<Evaluation>> {
        self.observer.check(|| "stopped while scoring".into())?;
        let base =
            results::cell_folder(self.comparison, &self.task.drift_base).join("step-000000").join(DRIFT);
        let drift = match drawings.iter().find(|(name, _)| name == DRIFT) {
            Some((_, drawing)) if !self.task.cell.is_base() => {
                score::drift(towers, drawing, &place.join(DRIFT), &base, &self.folder)?
            }
            _ => Vec::new(),
        };
        let mut evaluations = Vec::new();
        for ((set, subject), (name, drawing)) in subjects.iter().zip(drawings) {
            let folder = place.join(name);
            let places = (folder.as_path(), self.folder.as_path());
            let prompts = score::prompts(towers, subject, drawing, &set.prompts, places, self.observer)?;
            evaluations.push(score::evaluation(step, set.set, prompts, drift.clone()));
        }
        Ok(evaluations)
    }

    /// As [`Self::score`], of pictures drawn from pairs.
    fn score_pairs(
        &self,
        agreement: &control::Agreement,
        towers: &Towers,
        drawings: &[(String, SetDrawing)],
    ) -> Result<Vec<Evaluation>> {
        let judges: Vec<_> =
            self.task.sets.iter().map(|set| self.judges(agreement, towers, set)).collect::<Result<_>>()?;
        let mut evaluations = Vec::new();
        for &step in &self.task.steps {
            for ((set, judges), (name, drawing)) in self.task.sets.iter().zip(&judges).zip(drawings) {
                self.observer.check(|| "stopped while scoring".into())?;
                let prompts = {
                    let folder = self.step_folder(step).join(name);
                    judges.prompts(drawing, &folder, &self.folder, self.observer)?
                };
                evaluations.push(score::evaluation(step, set.set, prompts, Vec::new()));
            }
        }
        Ok(evaluations)
    }

    fn judges<'a>(
        &self,
        agreement: &'a control::Agreement,
        towers: &'a Towers,
        set: &TaskSet,
    ) -> Result<control::score::PairJudges<'a>> {
        let kind = set.set.name();
        let files = control::picture_places(&self.task.cell.subject, kind, set.prompts.len());
        let pictures = self.real_pictures(kind)?;
        control::score::PairJudges::new(agreement, towers, pictures, &self.conditions(set)?, files)
    }

    /// The conditions of a set of pairs; empty where it is none.
    pub(super) fn conditions(&self, set: &TaskSet) -> Result<Vec<RgbImage>> {
        match set.pairs {
            Some(_) => self.real_pictures(&format!("{}_conditions", set.set.name())),
            None => Ok(Vec::new()),
        }
    }

    /// The pictures of the pairs of the tables scored as drawn ones.
    pub(super) fn real_pairs(&self, agreement: &control::Agreement, towers: &Towers) -> Result<Real> {
        let Some(set) = self.task.sets.iter().find(|set| set.set == Set::Test) else {
            return Ok(Real::default());
        };
        let captions: Vec<String> = set.prompts.iter().map(|p| p.text.clone()).collect();
        let pictures = self.judges(agreement, towers, set)?.real(&captions, self.observer)?;
        let whole = PromptScores { prompt: String::new(), scores: Scores::new(), pictures };
        Ok(Real { scores: whole.means(), pictures: whole.pictures })
    }

    pub(super) fn real_pictures(&self, kind: &str) -> Result<Vec<RgbImage>> {
        score::pictures(&self.subject_folder().join(kind), usize::MAX, self.config.data.background)
    }

    fn subject_folder(&self) -> PathBuf {
        self.comparison.join("subjects").join(&self.task.cell.subject)
    }

    fn look_alikes(&self) -> Result<Vec<RgbImage>> {
        if self.task.class_look_alikes {
            return score::pictures(
                &self.comparison.join(&self.task.class_folder),
                CLASS_LOOK_ALIKES,
                self.config.data.background,
            );
        }
        self.real_pictures("look_alikes")
    }

    /// Scores of the pictures that are trained on against those of the tables, each against all but itself.
    pub(super) fn real(&self, towers: Towers) -> Result<Scores> {
        let (train, test) = (self.real_pictures("train")?, self.real_pictures("test")?);
        if test.is_empty() || self.task.sets.iter().all(|s| s.set != Set::Test) {
            return Ok(Scores::new());
        }
        // Photographs differ in size: no LPIPS between them.
        let towers = Towers { lpips: Vec::new(), ..towers };
        let look_alikes = self.look_alikes()?;
        let mut sums: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        for picture in &train {
            let others: Vec<RgbImage> = test.iter().filter(|other| *other != picture).cloned().collect();
            if others.is_empty() {
                continue;
            }
            let subject = score::subject(&towers, &others, &look_alikes, &[])?;
            let (_, each) = subject.score(&towers, None, std::slice::from_ref(picture), self.observer)?;
            for (key, value) in each.into_iter().flatten() {
                let (sum, count) = sums.entry(key).or_default();
                *sum += value;
                *count += 1.0;
            }
        }
        Ok(sums.into_iter().map(|(key, (sum, count))| (key, sum / count)).collect())
    }
}
