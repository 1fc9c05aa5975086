//! The model as a classifier in `plan.json` and `record.json`: which classes it is asked to tell apart, and its errors.

use serde::{Deserialize, Serialize};

/// What the model is asked: which of these prompts a picture belongs to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedClassifier {
    /// The classes.
    pub prompts: Vec<String>,
    /// What is classified.
    pub pictures: Vec<ClassifiedPicture>,
    /// Pairs of timestep and noise, the same for every picture and class.
    pub num_noises: usize,
    /// Of the noise: `randn(num_noises, c, h, w)` after it is the generator's seed.
    pub seed: u64,
    /// Adapter scales, ascending; 0 is the base model, measured once.
    pub scales: Vec<f64>,
    /// Of everything that errors depend on beside the adapter and its scale; those made with other things do not count.
    pub made_with: String,
}

/// A picture and its class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassifiedPicture {
    /// Relative to the comparison's folder.
    pub file: String,
    /// Number of its prompt.
    pub class: usize,
}

/// The answers of a cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassifierRecord {
    /// See [`PlannedClassifier::made_with`].
    pub made_with: String,
    /// In the order in which they were measured; those of scales that are planned no more stay.
    pub points: Vec<ClassifierPoint>,
}

/// The answers at one adapter scale.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassifierPoint {
    /// Optimiser steps; 0 of the base model.
    pub step: i64,
    /// Of the adapter; 0 of the base model.
    pub scale: f64,
    /// Mean squared error of the prediction, `[picture][class]`, in the plan's order.
    pub errors: Vec<Vec<f64>>,
    /// Share of the pictures whose own class has the least error; `None` before all are measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Why there are no answers, such as errors that are not finite numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

impl ClassifierRecord {
    /// What was measured at a scale.
    pub fn at(&self, scale: f64) -> Option<&ClassifierPoint> {
        self.points.iter().find(|point| point.scale == scale)
    }
}

impl ClassifierPoint {
    /// Whether nothing is left to measure.
    pub fn is_done(&self) -> bool {
        self.accuracy.is_some() || self.failure.is_some()
    }

    /// For each picture whether its own class has the least error; of equal ones the first class wins.
    pub fn right(&self, pictures: &[ClassifiedPicture]) -> Vec<bool> {
        let least = |errors: &Vec<f64>| (0..errors.len()).min_by(|a, b| errors[*a].total_cmp(&errors[*b]));
        self.errors
            .iter()
            .zip(pictures)
            .map(|(errors, picture)| least(errors) == Some(picture.class))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_of_the_least_error_wins() {
        let errors = vec![vec![0.2, 0.1, 0.3], vec![0.1, 0.2, 0.3], vec![0.5, 0.5, 0.6]];
        let point = ClassifierPoint { step: 0, scale: 0.0, errors, accuracy: None, failure: None };
        let of = |classes: [usize; 3]| {
            let pictures = classes.map(|class| ClassifiedPicture { file: String::new(), class });
            point.right(&pictures)
        };
        assert_eq!(of([1, 0, 0]), [true, true, true]);
        assert_eq!(of([1, 1, 1]), [true, false, false]);
        assert_eq!(of([2, 2, 2]), [false, false, false]);
    }
}
