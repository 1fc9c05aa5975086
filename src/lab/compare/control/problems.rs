//! What cannot be said beside `[[control]]` in a comparison's config.

use crate::lab::compare::config::{CompareConfig, Protocol, four};
use crate::train::config::TrainConfig;
use crate::train::config::keys::{InComparison, keys, value};

/// What is wrong with a comparison of control, beside what is wrong with its trainings.
pub fn problems(config: &CompareConfig) -> Vec<String> {
    let mut problems = Vec::new();
    let mut check = |good: bool, problem: &str| {
        if !good {
            problems.push(problem.to_string());
        }
    };
    let draw = &config.draw;
    check(
        config.protocol == Protocol::Default,
        "protocol: paper is for subjects; leave it out with [[control]]",
    );
    // Tables with other keys are told where they are read as settings.
    let said = TrainConfig::own_words(&config.train).unwrap_or_default();
    let train = TrainConfig::common(&said).unwrap_or_default();
    check(
        train.data.resolution.is_some(),
        "[train]: [data] resolution is needed with [[control]]: pairs are rendered at it",
    );
    for key in keys().filter(|key| value(&said, key).is_some()) {
        check(
            key.in_comparison != InComparison::OfPairs,
            &format!("[train]: {} is said in [[control]]; leave it out", key.place()),
        );
    }
    check(
        !train.prior.with_prior_preservation,
        "[train]: with_prior_preservation: class pictures have no conditions; leave it out with [[control]]",
    );
    let texts = [&draw.prompts, &draw.validation_prompts, &draw.drift_prompts];
    check(
        texts.iter().all(|prompts| prompts.is_empty()),
        "draw: prompts, validation_prompts and drift_prompts are for subjects: with [[control]] the pairs' captions are drawn",
    );
    let counts = [draw.num_images, draw.num_validation_images, draw.num_drift_images];
    check(
        counts == [four(); 3],
        "draw: num_images, num_validation_images and num_drift_images are for subjects: with [[control]] each pair is drawn once \
         (num_test and num_validation of the table say how many pairs)",
    );
    for entry in config.topic.controls() {
        let place = |what: &str| format!("control `{}`: {what}", entry.name);
        let none = [entry.num_test, entry.num_validation].contains(&Some(0));
        check(!none, &place("num_test and num_validation: expected 1 or more"));
        check(
            config.search.is_none() || entry.validation_data_dir.is_some(),
            &place("validation_data_dir: a [search] needs pairs that no table uses"),
        );
        check(
            entry.num_validation.is_none() || entry.validation_data_dir.is_some(),
            &place("num_validation: only with validation_data_dir"),
        );
    }
    problems
}
