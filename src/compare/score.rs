//! From drawn pictures to an [`Evaluation`].

use super::draw::{Drawing, file_name};
use super::subjects::Prompt;
use crate::error::Result;
use crate::evaluate::scores::{self, References};
use crate::evaluate::{Subject, Towers};
use crate::files;
use crate::image::{RgbImage, load_rgb};
use crate::results::{Evaluation, PictureScores, PromptScores, Scores, Set};
use std::path::{Path, PathBuf};

/// The pictures of some folders, in the order of their names.
pub fn pictures(folder: &Path, at_most: usize) -> Result<Vec<RgbImage>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = files::list_dir(folder)?;
    let is_picture = |path: &Path| {
        path.extension().is_some_and(|e| !e.eq_ignore_ascii_case("json"))
            && path.file_name().is_some_and(|n| !n.to_string_lossy().starts_with('.'))
    };
    entries.iter().filter(|e| is_picture(&e.path)).take(at_most).map(|e| load_rgb(&e.path)).collect()
}

/// Embeds real pictures, look-alikes and masks of a subject.
pub fn subject(
    towers: &Towers,
    real: &[RgbImage],
    look_alikes: &[RgbImage],
    masks: &[RgbImage],
) -> Result<Subject> {
    let references = References {
        real: real.iter().collect(),
        look_alikes: look_alikes.iter().collect(),
        masks: (!masks.is_empty()).then(|| masks.iter().collect()),
    };
    Subject::new(towers, &references)
}

/// Scores what was drawn into `folder`, of which pictures are named relative to `root`.
pub fn prompts(
    towers: &Towers,
    subject: &Subject,
    drawing: &Drawing,
    texts: &[Prompt],
    folder: &Path,
    root: &Path,
) -> Result<Vec<PromptScores>> {
    let mut all = Vec::new();
    for (p, prompt) in texts.iter().enumerate() {
        let drawn = drawn(drawing, folder, p)?;
        let (together, each) = subject.score(towers, Some(&prompt.text), &drawn)?;
        all.push(prompt_scores(drawing, p, together, each, folder, root));
    }
    Ok(all)
}

/// Drift of what was drawn into `folder` from the same prompts and noise in `base`.
pub fn drift(
    towers: &Towers,
    drawing: &Drawing,
    folder: &Path,
    base: &Path,
    root: &Path,
) -> Result<Vec<PromptScores>> {
    let mut all = Vec::new();
    for p in 0..drawing.prompts.len() {
        let each = scores::drift(towers, &drawn(drawing, folder, p)?, &drawn(drawing, base, p)?)?;
        all.push(prompt_scores(drawing, p, Scores::new(), each, folder, root));
    }
    Ok(all)
}

/// Puts an evaluation together, with its means.
pub fn evaluation(step: i64, set: Set, prompts: Vec<PromptScores>, drift: Vec<PromptScores>) -> Evaluation {
    let mut evaluation = Evaluation { step, set, prompts, drift, scores: Scores::new() };
    evaluation.summarise();
    evaluation
}

fn drawn(drawing: &Drawing, folder: &Path, prompt: usize) -> Result<Vec<RgbImage>> {
    (0..drawing.num_images).map(|i| load_rgb(&folder.join(file_name(prompt, i)))).collect()
}

fn prompt_scores(
    drawing: &Drawing,
    prompt: usize,
    scores: Scores,
    each: Vec<Scores>,
    folder: &Path,
    root: &Path,
) -> PromptScores {
    let relative: PathBuf = folder.strip_prefix(root).unwrap_or(folder).into();
    let pictures = drawing.seeds().into_iter().zip(each).enumerate().map(|(i, (seed, scores))| {
        let file = relative.join(file_name(prompt, i)).to_string_lossy().into_owned();
        PictureScores { seed, file, scores }
    });
    PromptScores { prompt: drawing.prompts[prompt].clone(), scores, pictures: pictures.collect() }
}
