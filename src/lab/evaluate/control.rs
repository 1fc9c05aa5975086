//! The formulas of how well pictures keep to their conditions; [`crate::lab::results::SCORES`] is their list.
//!
//! Edges: intersection over union and F1 of two edge masks, as the HRA authors' eval_canny.py, whose result is the plain mean over
//! pictures. Segmentation: one confusion matrix over all pictures (MMSegmentation's IoUMetric). Landmarks: mean distance over
//! points, as the authors' eval_landmark.py. No tensors here.

use crate::data::image::landmarks::Point;
use crate::data::image::{LabelMap, Mask, RgbImage};
use std::collections::{BTreeMap, BTreeSet};

/// A pixel whose channels all differ by so much or less from the border's colour is background. Of 4, 8, .. 48 the best on the
/// 450 embedded training maps (mean IoU 0.9352); neither a flood fill from the border nor other distances did better.
const NEAR: u8 = 20;

/// How far two masks agree.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Overlap {
    /// Intersection over union.
    pub iou: f64,
    /// Harmonic mean of precision and recall: 2 I / (A + B).
    pub f1: f64,
}

/// The overlap of two masks of one size: 1 where both are empty, which agree, and 0 where one is.
///
/// # Panics
/// If their sizes differ.
pub fn overlap(truth: &Mask, found: &Mask) -> Overlap {
    assert_eq!(truth.dimensions(), found.dimensions(), "masks of one size");
    let both = truth.pixels().iter().zip(found.pixels()).filter(|(a, b)| **a && **b).count() as f64;
    let sum = (truth.count() + found.count()) as f64;
    if sum == 0.0 {
        return Overlap { iou: 1.0, f1: 1.0 };
    }
    Overlap { iou: both / (sum - both), f1: 2.0 * both / sum }
}

/// Where the subject is in a picture with a plain background: what is not near to the colour of the picture's border (the
/// median of its pixels, channel by channel).
pub fn subject_mask(image: &RgbImage) -> Mask {
    let (width, height) = image.dimensions();
    let border = |x: u32, y: u32| x == 0 || y == 0 || x + 1 == width || y + 1 == height;
    let mut colours: [Vec<u8>; 3] = Default::default();
    for (_, _, pixel) in image.enumerate_pixels().filter(|(x, y, _)| border(*x, *y)) {
        colours.iter_mut().zip(pixel.0).for_each(|(values, value)| values.push(value));
    }
    let background = colours.map(|mut values| {
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or_default()
    });
    Mask::of(image, |pixel| pixel.iter().zip(background).any(|(value, of)| value.abs_diff(of) > NEAR))
}

/// Mean of the IoU of the subject and that of the background. Masks of one size; a part that neither has counts 1.
pub fn subject_miou(truth: &Mask, found: &Mask) -> f64 {
    let outside = |mask: &Mask| {
        let (width, height) = mask.dimensions();
        Mask::new(width, height, mask.pixels().iter().map(|yes| !yes).collect())
    };
    (overlap(truth, found).iou + overlap(&outside(truth), &outside(found)).iou) / 2.0
}

/// Which labels of the true maps count.
#[derive(Debug, Clone, Copy, Default)]
pub struct Labels {
    /// How many classes there are, if known; else all that occur are classes.
    pub classes: Option<usize>,
    /// True label of pixels that do not count.
    pub ignored: Option<u16>,
    /// True label 0 does not count and the others are one less, as ADE20K's files have it; predictions stay.
    pub reduce_zero: bool,
}

/// How often each true class was predicted as which, over any number of pictures.
#[derive(Debug, Clone, Default)]
pub struct Confusion {
    /// Keyed by true and predicted class; `None` for a prediction that is no class.
    counts: BTreeMap<(u16, Option<u16>), u64>,
}

/// Scores of a [`Confusion`].
#[derive(Debug, Clone, PartialEq)]
pub struct Segmentation {
    /// Mean of [`Self::iou`].
    pub miou: f64,
    /// Mean over the true classes of the share of their pixels that was predicted right.
    pub macc: f64,
    /// Share of all pixels that was predicted right.
    pub aacc: f64,
    /// Intersection over union of each class that occurs in the truth or in a prediction.
    pub iou: BTreeMap<u16, f64>,
}

impl Confusion {
    /// Counts the pixels of a picture. The error is a sentence: sizes that differ, or a true label that is no class.
    pub fn add(&mut self, truth: &LabelMap, found: &LabelMap, labels: Labels) -> Result<(), String> {
        let ((width, height), (wide, high)) = (truth.dimensions(), found.dimensions());
        if (wide, high) != (width, height) {
            return Err(format!(
                "expected a prediction of {width}x{height} pixels as the truth, found {wide}x{high}"
            ));
        }
        let is_class = |label: u16| labels.classes.is_none_or(|classes| usize::from(label) < classes);
        let mut pairs = truth.labels().iter().copied().zip(found.labels().iter().copied()).peekable();
        while let Some((truth, found)) = pairs.next() {
            // Most neighbours have the same labels.
            let mut pixels = 1;
            while pairs.next_if_eq(&(truth, found)).is_some() {
                pixels += 1;
            }
            let class = match truth {
                ignored if Some(ignored) == labels.ignored => continue,
                0 if labels.reduce_zero => continue,
                label if labels.reduce_zero => label - 1,
                label => label,
            };
            if !is_class(class) {
                let most = labels.classes.unwrap_or_default().saturating_sub(1);
                return Err(format!("expected classes 0 to {most} in the truth, found {class}"));
            }
            let found = Some(found).filter(|found| Some(*found) != labels.ignored && is_class(*found));
            *self.counts.entry((class, found)).or_default() += pixels;
        }
        Ok(())
    }

    /// The scores; `None` before any pixel counted.
    pub fn scores(&self) -> Option<Segmentation> {
        let sum = |wanted: &dyn Fn(u16, Option<u16>) -> bool| -> f64 {
            let counted = self.counts.iter().filter(|((truth, found), _)| wanted(*truth, *found));
            counted.map(|(_, count)| *count).sum::<u64>() as f64
        };
        let occurring: BTreeSet<u16> =
            self.counts.keys().flat_map(|(truth, found)| [Some(*truth), *found]).flatten().collect();
        let (mut iou, mut accuracies) = (BTreeMap::new(), Vec::new());
        for class in occurring {
            let both = sum(&|truth, found| truth == class && found == Some(class));
            let either = sum(&|truth, found| truth == class || found == Some(class));
            let all = sum(&|truth, _| truth == class);
            iou.insert(class, both / either);
            // A class that is only predicted has no accuracy.
            accuracies.extend((all > 0.0).then(|| both / all));
        }
        let right = sum(&|truth, found| found == Some(truth));
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        (!iou.is_empty()).then(|| Segmentation {
            miou: mean(&iou.values().copied().collect::<Vec<_>>()),
            macc: mean(&accuracies),
            aacc: right / sum(&|_, _| true),
            iou,
        })
    }
}

/// Mean distance in pixels between points of the same number; `truth` is multiplied by `scale` first, as the authors halve points of
/// pictures twice as large. `None` where there are none, or not equally many.
pub fn landmark_error(truth: &[Point], found: &[Point], scale: f64) -> Option<f64> {
    let distance = |(t, f): (&Point, &Point)| (t.x * scale - f.x).hypot(t.y * scale - f.y);
    let comparable = !truth.is_empty() && truth.len() == found.len();
    comparable.then(|| truth.iter().zip(found).map(distance).sum::<f64>() / truth.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(pixels: [u8; 6]) -> Mask {
        Mask::new(3, 2, pixels.map(|p| p == 1).to_vec())
    }

    #[test]
    fn overlaps_counted_by_hand() {
        // Two of three and four: 2 / 5 and 4 / 7.
        let found = overlap(&mask([1, 1, 1, 0, 0, 0]), &mask([0, 1, 1, 1, 1, 0]));
        assert_eq!((found.iou, found.f1), (0.4, 4.0 / 7.0));
        let (none, some) = (mask([0; 6]), mask([1, 0, 0, 0, 0, 0]));
        assert_eq!(overlap(&none, &none), Overlap { iou: 1.0, f1: 1.0 });
        assert_eq!(overlap(&none, &some), Overlap { iou: 0.0, f1: 0.0 });
        // Subject 2 / 5, background 1 / 4.
        let found = subject_miou(&mask([1, 1, 1, 0, 0, 0]), &mask([0, 1, 1, 1, 1, 0]));
        assert_eq!(found, (2.0 / 5.0 + 1.0 / 4.0) / 2.0);
    }

    /// Two pictures whose own mean IoUs would have another mean than that of their joint matrix.
    #[test]
    fn the_confusion_is_that_of_all_pictures() {
        let map = |labels: &[u16]| LabelMap::new(labels.len() as u32, 1, labels.to_vec());
        let mut all = Confusion::default();
        assert_eq!(all.scores(), None);
        let labels = Labels { classes: Some(4), ignored: Some(255), reduce_zero: false };
        all.add(&map(&[0, 0, 0, 1]), &map(&[0, 0, 1, 1]), labels).unwrap();
        all.add(&map(&[1, 255, 1, 0]), &map(&[2, 0, 255, 0]), labels).unwrap();
        // Truth: four 0, three 1. Right: three 0, one 1. Predicted: three 0, two 1, one 2, one nothing.
        let scores = all.scores().unwrap();
        let iou = BTreeMap::from([(0, 3.0 / 4.0), (1, 1.0 / 4.0), (2, 0.0)]);
        assert_eq!(scores.iou, iou);
        assert_eq!(scores.miou, (3.0 / 4.0 + 1.0 / 4.0 + 0.0) / 3.0);
        assert_eq!(scores.macc, (3.0 / 4.0 + 1.0 / 3.0) / 2.0, "class 2 has no pixel, class 3 never occurs");
        assert_eq!(scores.aacc, 4.0 / 7.0);
    }

    #[test]
    fn label_zero_can_be_left_out() {
        let map = |labels: [u16; 4]| LabelMap::new(2, 2, labels.to_vec());
        let mut all = Confusion::default();
        let labels = Labels { classes: Some(2), ignored: Some(255), reduce_zero: true };
        all.add(&map([0, 1, 2, 255]), &map([0, 0, 0, 0]), labels).unwrap();
        assert_eq!(all.scores().unwrap().aacc, 0.5);
        let problem = all.add(&map([0, 1, 2, 3]), &map([0; 4]), labels).unwrap_err();
        assert_eq!(problem, "expected classes 0 to 1 in the truth, found 2");
        let problem = all.add(&map([0; 4]), &LabelMap::new(4, 1, vec![0; 4]), labels).unwrap_err();
        assert_eq!(problem, "expected a prediction of 2x2 pixels as the truth, found 4x1");
    }

    #[test]
    fn landmark_errors_are_mean_distances() {
        let point = |x, y| Point { x, y };
        let truth = [point(0.0, 0.0), point(20.0, 40.0)];
        // At half the size: (0, 0) to (3, 4) is 5, (10, 20) to (10, 21) is 1.
        assert_eq!(landmark_error(&truth, &[point(3.0, 4.0), point(10.0, 21.0)], 0.5), Some(3.0));
        assert_eq!(landmark_error(&truth, &[point(3.0, 4.0)], 0.5), None);
        assert_eq!(landmark_error(&[], &[], 1.0), None);
    }
}
