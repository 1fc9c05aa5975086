//! The formulas of scores, on what the towers make of pictures; [`crate::lab::results::SCORES`] is their list.
//!
//! Similarity to the subject is the mean cosine over all pairs of a drawn and a real picture (DreamBooth, arXiv 2208.12242,
//! section 5; the HRA authors' evaluate.py does the same with LPIPS distances). Diversity is the mean over the pairs of one
//! prompt's pictures, as that paper defines it. Identity ranks the subject's real pictures and those of look-alikes by their
//! cosine to a drawn picture; the embedding is that of the first tower that is loaded of DINO, DINOv2 and CLIP, and a
//! look-alike goes first where two are as near. Sums are in f64.
//!
//! Covered pixels (masks) are mid grey for every tower, so that towers see the same pictures.

use crate::data::image::RgbImage;
use crate::error::{Error, Result};
use crate::lab::evaluate::towers::Towers;
use crate::lab::results::Scores;
use crate::platform::host;
use crate::platform::observer::Observer;
use regex::RegexBuilder;
use tch::{Kind, Tensor};

/// In place of what a mask covers.
const GREY: [u8; 3] = [128; 3];

/// The real pictures that scores compare with.
#[derive(Default)]
pub struct References<'a> {
    /// The subject, pictures that were not trained on; may be empty, then only text and diversity are scored.
    pub real: Vec<&'a RgbImage>,
    /// Look-alikes of its class; may be empty, then identity is not scored.
    pub look_alikes: Vec<&'a RgbImage>,
    /// For each of `real` where the subject is: white (128 or more); another size than the picture's is taken to it by its
    /// nearest pixels. `None`: no masks.
    pub masks: Option<Vec<&'a RgbImage>>,
}

/// A tower that embeds pictures, in the order of preference for identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LoadedTower {
    Dino,
    Dinov2,
    Clip,
}

impl LoadedTower {
    const ALL: [Self; 3] = [Self::Dino, Self::Dinov2, Self::Clip];

    /// Keys of the similarity to real pictures, and to those with the background and the subject covered.
    fn keys(self) -> [Option<&'static str>; 3] {
        match self {
            Self::Dino => [Some("dino"), Some("subject_dino"), Some("background_dino")],
            Self::Dinov2 => [Some("dinov2"), None, None],
            Self::Clip => [Some("clip_i"), Some("subject_clip_i"), Some("background_clip_i")],
        }
    }

    fn is_loaded(self, towers: &Towers) -> bool {
        match self {
            Self::Dino => towers.dino.is_some(),
            Self::Dinov2 => towers.dinov2.is_some(),
            Self::Clip => towers.clip.is_some(),
        }
    }

    /// Embeddings `(n, d)`; `None` of no pictures, or where the tower is not loaded.
    fn embed(self, towers: &Towers, pictures: &[&RgbImage]) -> Result<Option<Tensor>> {
        if pictures.is_empty() {
            return Ok(None);
        }
        let all = match self {
            Self::Dino => towers.dino.as_ref().map(|tower| tower.images(pictures)),
            Self::Dinov2 => towers.dinov2.as_ref().map(|tower| tower.images(pictures)),
            Self::Clip => towers.clip.as_ref().map(|tower| tower.images(pictures)),
        };
        all.transpose()
    }
}

/// The real pictures of a subject and what surrounds them, embedded once.
///
/// LPIPS has no embedding: its features depend on the size of the drawn pictures, and are computed anew for each prompt.
pub struct ScoredSubject {
    real: Vec<RgbImage>,
    embedded: Vec<Embedded>,
}

/// What one tower makes of the references.
struct Embedded {
    tower: LoadedTower,
    /// In the order of [`LoadedTower::keys`].
    real: [Option<Tensor>; 3],
    look_alikes: Option<Tensor>,
}

impl ScoredSubject {
    /// Embeds the references.
    pub fn new(towers: &Towers, references: &References) -> Result<Self> {
        let References { real, look_alikes, masks } = references;
        let covered = match masks {
            None => None,
            Some(masks) => Some([cover_all(real, masks, false)?, cover_all(real, masks, true)?]),
        };
        let mut embedded = Vec::new();
        for tower in LoadedTower::ALL.into_iter().filter(|tower| tower.is_loaded(towers)) {
            let mut similar = [tower.embed(towers, real)?, None, None];
            if let Some(covered) = &covered {
                for (i, pictures) in covered.iter().enumerate().filter(|(i, _)| tower.keys()[i + 1].is_some())
                {
                    similar[i + 1] = tower.embed(towers, &pictures.iter().collect::<Vec<_>>())?;
                }
            }
            // One tower tells who is who.
            let look_alikes = if embedded.is_empty() { tower.embed(towers, look_alikes)? } else { None };
            embedded.push(Embedded { tower, real: similar, look_alikes });
        }
        let keep = !towers.lpips.is_empty();
        let real = real.iter().filter(|_| keep).map(|picture| (*picture).clone()).collect();
        Ok(Self { real, embedded })
    }

    /// Scores the pictures of one prompt: those that they have together, and each one's own. `text` is the prompt as CLIP
    /// is to read it; `None`: no CLIP-T. `towers` are those that the references were embedded with.
    pub fn score(
        &self,
        towers: &Towers,
        text: Option<&str>,
        pictures: &[RgbImage],
        observer: &dyn Observer,
    ) -> Result<(Scores, Vec<Scores>)> {
        let drawn: Vec<&RgbImage> = pictures.iter().collect();
        let mut together = Scores::new();
        let mut each = vec![Scores::new(); drawn.len()];
        for known in &self.embedded {
            let Some(rows) = known.tower.embed(towers, &drawn)? else { continue };
            for (key, real) in known.tower.keys().into_iter().zip(&known.real) {
                if let (Some(key), Some(real)) = (key, real) {
                    set(&mut each, key, cosines(&rows, real)?.iter().map(|row| mean(row)));
                }
            }
            if let (Some(real), Some(others)) = (&known.real[0], &known.look_alikes) {
                let (own, others) = (cosines(&rows, real)?, cosines(&rows, others)?);
                let ranked = || own.iter().zip(&others);
                set(&mut each, "identity_top1", ranked().map(|(own, others)| top1(own, others)));
                set(&mut each, "identity_map", ranked().map(|(own, others)| average_precision(own, others)));
            }
            if let (LoadedTower::Clip, Some(clip)) = (known.tower, &towers.clip) {
                if let Some(text) = text {
                    let text = clip.texts(&[text])?;
                    set(&mut each, "clip_t", cosines(&rows, &text)?.iter().map(|row| mean(row)));
                }
                if let Some(similarity) = mean_of_pairs(&cosines(&rows, &rows)?) {
                    together.insert("diversity_clip".into(), 1.0 - similarity);
                }
            }
        }
        self.score_distances(towers, &drawn, (&mut together, &mut each), observer)?;
        Ok((together, each))
    }

    /// LPIPS of every network.
    fn score_distances(
        &self,
        towers: &Towers,
        drawn: &[&RgbImage],
        (together, each): (&mut Scores, &mut [Scores]),
        observer: &dyn Observer,
    ) -> Result<()> {
        let (n, m) = (drawn.len(), self.real.len());
        let pictures: Vec<&RgbImage> = drawn.iter().copied().chain(&self.real).collect();
        let to_real = (0..n).flat_map(|i| (0..m).map(move |j| (i, n + j)));
        let within = (0..n).flat_map(|i| (i + 1..n).map(move |j| (i, j)));
        let pairs: Vec<(usize, usize)> = to_real.chain(within).collect();
        for (net, lpips) in &towers.lpips {
            let distances = lpips.pairs(&pictures, &pairs, observer)?;
            let (to_real, within) = distances.split_at(n * m);
            if m > 0 {
                set(each, net.key(), to_real.chunks(m).map(mean));
            }
            if !within.is_empty() {
                together.insert(net.diversity_key().into(), mean(within));
            }
        }
        Ok(())
    }
}

/// `drift` and `drift_clip` of each picture from the base model's picture of the same prompt and noise.
pub fn drift(towers: &Towers, pictures: &[RgbImage], base: &[RgbImage]) -> Result<Vec<Scores>> {
    if pictures.len() != base.len() {
        let (found, expected) = (base.len(), pictures.len());
        return Err(Error::data(format!(
            "drift: expected {expected} pictures of the base model, found {found}"
        )));
    }
    let mut each = vec![Scores::new(); pictures.len()];
    let pixels: Vec<f64> = pictures
        .iter()
        .zip(base)
        .map(|(picture, base)| pixel_difference(picture, base))
        .collect::<Result<_>>()?;
    set(&mut each, "drift", pixels.into_iter());
    let embed = |pictures: &[RgbImage]| LoadedTower::Clip.embed(towers, &pictures.iter().collect::<Vec<_>>());
    if let (Some(rows), Some(base)) = (embed(pictures)?, embed(base)?) {
        let cosines = cosines(&rows, &base)?;
        set(&mut each, "drift_clip", (0..cosines.len()).map(|i| 1.0 - cosines[i][i]));
    }
    Ok(each)
}

/// `prompt` without the rare token, for CLIP-T: `a sks dog` becomes `a dog`. Whole words only, in any case; a prompt without
/// it stays as it is.
pub fn without_token(prompt: &str, token: &str) -> String {
    let token = token.trim();
    let matcher = RegexBuilder::new(&regex::escape(token)).case_insensitive(true).build();
    let Some(matcher) = matcher.ok().filter(|_| !token.is_empty()) else { return prompt.to_string() };
    let in_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut kept, mut from, mut at) = (String::new(), 0, 0);
    while let Some(found) = matcher.find_at(prompt, at) {
        let before = prompt[..found.start()].chars().next_back();
        let after = prompt[found.end()..].chars().next();
        if before.is_some_and(in_word) || after.is_some_and(in_word) {
            // It may begin again within itself.
            at = found.start() + prompt[found.start()..].chars().next().map_or(1, char::len_utf8);
            continue;
        }
        kept.push_str(&prompt[from..found.start()]);
        (from, at) = (found.end(), found.end());
        // `a sks, red` becomes `a, red`.
        if after.is_some_and(|c| ",.;:!?".contains(c)) {
            kept.truncate(kept.trim_end().len());
        }
    }
    if from == 0 {
        return prompt.to_string();
    }
    kept.push_str(&prompt[from..]);
    kept.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Cosines of every row of `a (n, d)` with every row of `b (m, d)`: `n` rows of `m`.
pub fn cosines(a: &Tensor, b: &Tensor) -> Result<Vec<Vec<f64>>> {
    let unit = |rows: &Tensor| -> Result<Tensor> {
        let rows = rows.f_to_kind(Kind::Double)?;
        let norms = rows.f_square()?.f_sum_dim_intlist([1i64].as_slice(), true, Kind::Double)?.f_sqrt()?;
        Ok(rows.f_div(&norms.f_clamp_min(f64::MIN_POSITIVE)?)?)
    };
    let similarities = unit(a)?.f_matmul(&unit(b)?.f_tr()?)?;
    (0..similarities.size()[0]).map(|row| host::values(&similarities.get(row))).collect()
}

/// 1 if the nearest of all is one of the subject's, 0 if it is a look-alike's; similarities to one drawn picture.
pub fn top1(own: &[f64], others: &[f64]) -> f64 {
    let best = |values: &[f64]| values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    f64::from(u8::from(best(own) > best(others)))
}

/// Mean over the subject's pictures of the share of them among all that are ranked as high or higher.
pub fn average_precision(own: &[f64], others: &[f64]) -> f64 {
    let mut own = own.to_vec();
    own.sort_by(|a, b| b.total_cmp(a));
    let precision = |(before, similarity): (usize, &f64)| {
        let look_alikes = others.iter().filter(|other| *other >= similarity).count();
        (before + 1) as f64 / (before + 1 + look_alikes) as f64
    };
    mean(&own.iter().enumerate().map(precision).collect::<Vec<_>>())
}

/// Mean of the values above the diagonal of a square table; `None` if there are none.
pub fn mean_of_pairs(table: &[Vec<f64>]) -> Option<f64> {
    let pairs: Vec<f64> =
        table.iter().enumerate().flat_map(|(i, row)| row.iter().skip(i + 1)).copied().collect();
    (!pairs.is_empty()).then(|| mean(&pairs))
}

/// Mean absolute difference of the pixels of two pictures of one size, 0 to 255.
pub fn pixel_difference(a: &RgbImage, b: &RgbImage) -> Result<f64> {
    if a.dimensions() != b.dimensions() {
        let ((aw, ah), (bw, bh)) = (a.dimensions(), b.dimensions());
        return Err(Error::data(format!(
            "drift: expected a picture of the base model of {aw}x{ah} pixels, found one of {bw}x{bh}"
        )));
    }
    let sum: u64 = a.as_raw().iter().zip(b.as_raw()).map(|(x, y)| u64::from(x.abs_diff(*y))).sum();
    Ok(sum as f64 / a.as_raw().len().max(1) as f64)
}

/// `picture` with grey in place of the subject, or of all but the subject. The mask is white (128 or more, mean of the
/// channels) where the subject is; nearest pixels are taken where its size is another.
pub fn cover(picture: &RgbImage, mask: &RgbImage, subject: bool) -> RgbImage {
    let (width, height) = picture.dimensions();
    let (mask_width, mask_height) = mask.dimensions();
    // The mask's pixel under the middle of this one.
    let nearest =
        |i: u32, n: u32, of: u32| ((2 * u64::from(i) + 1) * u64::from(of) / (2 * u64::from(n))) as u32;
    RgbImage::from_fn(width, height, |x, y| {
        let there = mask.get_pixel(nearest(x, width, mask_width), nearest(y, height, mask_height));
        if is_white(&there.0) == subject { GREY.into() } else { *picture.get_pixel(x, y) }
    })
}

fn is_white(pixel: &[u8; 3]) -> bool {
    pixel.iter().map(|&v| u32::from(v)).sum::<u32>() >= 3 * 128
}

fn cover_all(real: &[&RgbImage], masks: &[&RgbImage], subject: bool) -> Result<Vec<RgbImage>> {
    if real.len() != masks.len() {
        let (expected, found) = (real.len(), masks.len());
        return Err(Error::data(format!(
            "expected a mask for each of {expected} real pictures, found {found}"
        )));
    }
    for (i, mask) in masks.iter().enumerate() {
        let whites = mask.pixels().filter(|pixel| is_white(&pixel.0)).count();
        if whites == 0 || whites == mask.pixels().len() {
            return Err(Error::data(format!(
                "mask {} of {}: expected white on the subject and black elsewhere, found all {}",
                i + 1,
                masks.len(),
                if whites == 0 { "black" } else { "white" }
            )));
        }
    }
    Ok(real.iter().zip(masks).map(|(picture, mask)| cover(picture, mask, subject)).collect())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn set(each: &mut [Scores], key: &str, values: impl Iterator<Item = f64>) {
    for (scores, value) in each.iter_mut().zip(values) {
        scores.insert(key.into(), value);
    }
}
