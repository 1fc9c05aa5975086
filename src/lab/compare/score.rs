//! From drawn pictures to an [`Evaluation`].

use crate::data::image::decode::load_mask;
use crate::data::image::{Background, RgbImage, load_rgb};
use crate::data::{Image, ImageFolder};
use crate::error::Result;
use crate::lab::compare::draw::{SetDrawing, file_name};
use crate::lab::compare::subject::Prompt;
use crate::lab::evaluate::scores::{self, References};
use crate::lab::evaluate::{ScoredSubject, Towers};
use crate::lab::results::{Evaluation, PictureScores, PromptScores, Scores, Set};
use crate::platform::observer::Observer;
use std::path::{Path, PathBuf};

/// Prompts whose pictures [`spread`] compares, each with each.
const MOST_SPREAD: usize = 16;

/// The pictures of a folder, in the order of their names; none, where there is no folder.
pub fn pictures(folder: &Path, at_most: usize, background: Background) -> Result<Vec<RgbImage>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let scanned = ImageFolder::scan(folder, background)?;
    (0..scanned.images().len().min(at_most)).map(|i| scanned.load(i)).collect()
}

/// The masks of a folder, in the order of their names, as [`load_mask`] reads them; none, where there is no folder.
pub fn masks(folder: &Path, observer: &dyn Observer) -> Result<Vec<RgbImage>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mask = |image: &Image| {
        let (mask, note) = load_mask(&image.path)?;
        note.into_iter().for_each(|note| observer.note(&format!("{}: {note}", image.path.display())));
        Ok(mask)
    };
    ImageFolder::scan(folder, Background::default())?.images().iter().map(mask).collect()
}

/// Embeds real pictures, look-alikes and masks of a subject.
pub fn subject(
    towers: &Towers,
    real: &[RgbImage],
    look_alikes: &[RgbImage],
    masks: &[RgbImage],
) -> Result<ScoredSubject> {
    let references = References {
        real: real.iter().collect(),
        look_alikes: look_alikes.iter().collect(),
        masks: (!masks.is_empty()).then(|| masks.iter().collect()),
    };
    ScoredSubject::new(towers, &references)
}

/// Scores what was drawn into `folder`, of which pictures are named relative to `root`.
pub fn prompts(
    towers: &Towers,
    subject: &ScoredSubject,
    drawing: &SetDrawing,
    texts: &[Prompt],
    (folder, root): (&Path, &Path),
    observer: &dyn Observer,
) -> Result<Vec<PromptScores>> {
    let mut all = Vec::new();
    for (p, prompt) in texts.iter().enumerate() {
        let drawn = drawn(drawing, folder, p)?;
        let (together, each) = subject.score(towers, Some(&prompt.text), &drawn, observer)?;
        all.push(prompt_scores(drawing, p, together, each, folder, root));
    }
    Ok(all)
}

/// Drift of what was drawn into `folder` from the same prompts and noise in `base`.
pub fn drift(
    towers: &Towers,
    drawing: &SetDrawing,
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

/// How far pictures of different prompts in `folder` are from each other: what drift is compared with. `None` of one prompt, whose
/// pictures may be much alike.
pub fn spread(drawing: &SetDrawing, folder: &Path) -> Result<Option<f64>> {
    let mut first = Vec::new();
    for p in 0..drawing.prompts.len().min(MOST_SPREAD) {
        first.push(drawn(drawing, folder, p)?);
    }
    let (mut sum, mut pairs) = (0.0, 0.0);
    for (i, of_a) in first.iter().enumerate() {
        for of_b in &first[..i] {
            for (a, b) in of_a.iter().zip(of_b) {
                sum += scores::pixel_difference(a, b)?;
                pairs += 1.0;
            }
        }
    }
    Ok((pairs > 0.0).then(|| sum / pairs))
}

/// Puts an evaluation together, with its means.
pub fn evaluation(step: i64, set: Set, prompts: Vec<PromptScores>, drift: Vec<PromptScores>) -> Evaluation {
    let mut evaluation = Evaluation { step, set, prompts, drift, scores: Scores::new() };
    evaluation.summarise();
    evaluation
}

pub(super) fn drawn(drawing: &SetDrawing, folder: &Path, prompt: usize) -> Result<Vec<RgbImage>> {
    (0..drawing.num_images).map(|i| load_rgb(&folder.join(file_name(prompt, i)))).collect()
}

pub(super) fn prompt_scores(
    drawing: &SetDrawing,
    prompt: usize,
    scores: Scores,
    each: Vec<Scores>,
    folder: &Path,
    root: &Path,
) -> PromptScores {
    let relative: PathBuf = folder.strip_prefix(root).unwrap_or(folder).into();
    let pictures = drawing.seeds(prompt).into_iter().zip(each).enumerate().map(|(i, (seed, scores))| {
        let file = relative.join(file_name(prompt, i)).to_string_lossy().into_owned();
        PictureScores { seed, file, scores }
    });
    PromptScores { prompt: drawing.prompts[prompt].clone(), scores, pictures: pictures.collect() }
}
