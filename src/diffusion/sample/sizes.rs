//! The sizes that Stable Diffusion XL is told of a picture that is drawn, where its user asks for others than its own.

use crate::diffusion::picture_sizes::PictureSizes;
use crate::error::{Error, Result};
use crate::weights::bounds::MAX_WIDTH;

/// The score that a refiner is told of the picture, and of what it is to avoid (diffusers' defaults).
const AESTHETIC_SCORES: [f32; 2] = [6.0, 2.5];

/// The sizes that are told, where they are not those of the picture that is drawn. Height before width, top before left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SizeSettings {
    /// Of the picture before it was cropped; small ones give blurred pictures.
    pub original: Option<[i64; 2]>,
    /// Where it was cropped; 0, 0 gives centred subjects.
    pub crop: Option<[i64; 2]>,
    /// Of the result.
    pub target: Option<[i64; 2]>,
    /// The same for what is to be avoided; both sizes together, or none.
    pub negative_original: Option<[i64; 2]>,
    /// See [`Self::negative_original`].
    pub negative_crop: Option<[i64; 2]>,
    /// See [`Self::negative_original`].
    pub negative_target: Option<[i64; 2]>,
}

/// What the numbers are told about.
#[derive(Debug, Clone, Copy)]
pub(super) struct ToldPicture {
    /// Height and width.
    pub(super) size: [i64; 2],
    /// Whether it starts from a picture.
    pub(super) has_start: bool,
    /// Whether a score takes the place of the target size.
    pub(super) is_refiner: bool,
}

impl SizeSettings {
    /// Whether all of them are the picture's.
    pub fn are_usual(&self) -> bool {
        *self == Self::default()
    }

    /// Refuses numbers that no picture has, and those of which diffusers would use none.
    pub(super) fn check(&self, is_refiner: bool) -> Result<()> {
        for (flag, size, least) in [
            ("--original-size", self.original, 1),
            ("--crop", self.crop, 0),
            ("--target-size", self.target, 1),
            ("--negative-original-size", self.negative_original, 1),
            ("--negative-crop", self.negative_crop, 0),
            ("--negative-target-size", self.negative_target, 1),
        ] {
            if let Some(found) = size.into_iter().flatten().find(|n| !(least..=MAX_WIDTH).contains(n)) {
                return Err(Error::config(format!("{flag}: expected {least} to {MAX_WIDTH}, found {found}")));
            }
        }
        if is_refiner && self.target.or(self.negative_target).is_some() {
            return Err(Error::config("--target-size: a refiner is told an aesthetic score in its place"));
        }
        if !is_refiner && self.negative_original.is_some() != self.negative_target.is_some() {
            return Err(Error::config(
                "--negative-original-size and --negative-target-size: expected both or none, found one",
            ));
        }
        Ok(())
    }

    /// What is told of the prompt, as diffusers' pipelines put it together: original height and width, top and left of the crop, target
    /// height and width, or a score.
    pub(super) fn of_prompt(&self, told: ToldPicture) -> Vec<f32> {
        let (original, target) = (self.original.unwrap_or(told.size), self.target.unwrap_or(told.size));
        numbers(
            original,
            self.crop.unwrap_or_default(),
            target,
            told.is_refiner.then_some(AESTHETIC_SCORES[0]),
        )
    }

    /// The same of what is to be avoided: as of the prompt, unless negative sizes are given.
    ///
    /// Without a crop of its own it has that of the prompt where a picture is started from, and none with negative sizes else: the
    /// text-to-image pipeline takes its default there, the others the prompt's.
    pub(super) fn of_negative(&self, told: ToldPicture) -> Vec<f32> {
        let original = self.negative_original.or(self.original).unwrap_or(told.size);
        let target = self.negative_target.or(self.target).unwrap_or(told.size);
        let usual = match (told.is_refiner, told.has_start, self.negative_original) {
            (true, ..) | (false, false, Some(_)) => None,
            (false, true, _) | (false, false, None) => self.crop,
        };
        let crop = self.negative_crop.or(usual).unwrap_or_default();
        numbers(original, crop, target, told.is_refiner.then_some(AESTHETIC_SCORES[1]))
    }

    /// For a PNG: what is not usual, by the names of the flags.
    pub fn to_text(&self) -> Vec<(&'static str, String)> {
        let size = |[height, width]: [i64; 2]| format!("{width}x{height}");
        let place = |[top, left]: [i64; 2]| format!("{top},{left}");
        [
            ("original_size", self.original.map(size)),
            ("crop_top_left", self.crop.map(place)),
            ("target_size", self.target.map(size)),
            ("negative_original_size", self.negative_original.map(size)),
            ("negative_crop_top_left", self.negative_crop.map(place)),
            ("negative_target_size", self.negative_target.map(size)),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
    }
}

fn numbers(original: [i64; 2], crop: [i64; 2], target: [i64; 2], score: Option<f32>) -> Vec<f32> {
    let mut numbers = PictureSizes { original, crop, target }.numbers().to_vec();
    if let Some(score) = score {
        numbers.splice(numbers.len() - target.len().., [score]);
    }
    numbers
}
