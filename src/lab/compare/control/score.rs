//! Scores of pictures that were drawn from pairs: each against its own pair's picture or map, and those of the towers.

use crate::data::image::{Mask, RgbImage, canny};
use crate::data::pairs::{ConditionKind, shuffled};
use crate::error::{Error, Result};
use crate::lab::compare::control::Agreement;
use crate::lab::compare::draw::SetDrawing;
use crate::lab::compare::score::{drawn, prompt_scores, subject};
use crate::lab::evaluate::control::{overlap, subject_mask, subject_miou};
use crate::lab::evaluate::{ScoredSubject, Towers};
use crate::lab::results::{PictureScores, PromptScores, Scores};
use crate::platform::observer::Observer;
use std::path::Path;

/// What the pictures of one pair are compared with.
enum Truth {
    Edges(Mask),
    Subject(Mask),
    Nothing,
}

/// The pairs of a set, ready to score with.
pub struct PairJudges<'a> {
    agreement: &'a Agreement,
    towers: &'a Towers,
    /// Files of the pairs' pictures, relative to the comparison's folder.
    files: Vec<String>,
    pictures: Vec<RgbImage>,
    truths: Vec<Truth>,
    /// Embedded, each alone.
    subjects: Vec<ScoredSubject>,
}

impl<'a> PairJudges<'a> {
    /// Embeds the pictures and finds edges or subjects. `files` are the pictures' places in the comparison's folder.
    pub fn new(
        agreement: &'a Agreement,
        towers: &'a Towers,
        pictures: Vec<RgbImage>,
        conditions: &[RgbImage],
        files: Vec<String>,
    ) -> Result<Self> {
        if pictures.len() != conditions.len() || pictures.len() != files.len() {
            let (found, expected) = (conditions.len(), pictures.len());
            return Err(Error::data(format!(
                "expected {expected} conditions as there are pictures, found {found}"
            )));
        }
        let truth = |(picture, condition): (&RgbImage, &RgbImage)| match agreement.condition {
            ConditionKind::Canny => Truth::Edges(canny(picture, agreement.thresholds)),
            ConditionKind::Segmentation => {
                Truth::Subject(Mask::of(condition, |colour| !agreement.background.contains(&colour)))
            }
            ConditionKind::Landmarks | ConditionKind::Other => Truth::Nothing,
        };
        let truths = pictures.iter().zip(conditions).map(truth).collect();
        let one = |picture: &RgbImage| subject(towers, std::slice::from_ref(picture), &[], &[]);
        let subjects = pictures.iter().map(one).collect::<Result<_>>()?;
        Ok(Self { agreement, towers, files, pictures, truths, subjects })
    }

    /// How far `picture` follows the condition of a pair.
    fn agreement(&self, pair: usize, picture: &RgbImage) -> Vec<(&'static str, f64)> {
        match &self.truths[pair] {
            Truth::Edges(truth) => {
                let found = overlap(truth, &canny(picture, self.agreement.thresholds));
                vec![("edge_f1", found.f1), ("edge_iou", found.iou)]
            }
            Truth::Subject(truth) => vec![("subject_miou", subject_miou(truth, &subject_mask(picture)))],
            Truth::Nothing => Vec::new(),
        }
    }

    /// The first of these scores, for a picture that has another pair's condition.
    fn shuffled(&self, pair: usize, picture: &RgbImage) -> Option<(String, f64)> {
        let (key, value) = *self.agreement(pair, picture).first()?;
        Some((format!("{key}_shuffled"), value))
    }

    /// Scores what was drawn into `folder`, of which pictures are named relative to `root`.
    pub fn prompts(
        &self,
        drawing: &SetDrawing,
        folder: &Path,
        root: &Path,
        observer: &dyn Observer,
    ) -> Result<Vec<PromptScores>> {
        let mut all = Vec::new();
        for (p, caption) in drawing.prompts.iter().enumerate() {
            let pictures = drawn(drawing, folder, p)?;
            let (_, mut each) =
                self.subjects[p].score(self.towers, Some(caption), &pictures[..1], observer)?;
            each[0].extend(
                self.agreement(p, &pictures[0]).into_iter().map(|(key, value)| (key.to_string(), value)),
            );
            each.extend(pictures[1..].iter().map(|picture| self.shuffled(p, picture).into_iter().collect()));
            all.push(prompt_scores(drawing, p, Scores::new(), each, folder, root));
        }
        Ok(all)
    }

    /// The pairs' own pictures as if they had been drawn; with shuffled conditions, the picture that the other pair has.
    pub fn real(&self, captions: &[String], observer: &dyn Observer) -> Result<Vec<PictureScores>> {
        let text_only = subject(self.towers, &[], &[], &[])?;
        let others = shuffled(&self.pictures);
        let mut all = Vec::new();
        for (p, picture) in self.pictures.iter().enumerate() {
            let own = std::slice::from_ref(picture);
            let (_, mut each) =
                text_only.score(self.towers, captions.get(p).map(String::as_str), own, observer)?;
            let mut scores = each.pop().unwrap_or_default();
            scores
                .extend(self.agreement(p, picture).into_iter().map(|(key, value)| (key.to_string(), value)));
            scores.extend(others.get(p).and_then(|other| self.shuffled(p, &self.pictures[*other])));
            all.push(PictureScores { seed: 0, file: self.files[p].clone(), scores });
        }
        Ok(all)
    }
}
