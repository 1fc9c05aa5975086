//! What is wrong with `[classifier]` in a comparison.

use crate::data::caption::bounded;
use crate::lab::compare::classifier::entry::ClassifierEntry;
use crate::lab::compare::config::CompareConfig;
use crate::lab::compare::frontier::SCALES;
use std::collections::BTreeSet;

/// More say nothing that these do not.
const NOISES: std::ops::RangeInclusive<usize> = 1..=1000;

/// What is wrong with it in this comparison.
pub fn problems(entry: &ClassifierEntry, config: &CompareConfig) -> Vec<String> {
    let mut problems = Vec::new();
    let mut check = |good: bool, problem: &str| {
        if !good {
            problems.push(format!("classifier: {problem}"));
        }
    };
    check(
        !config.topic.is_control(),
        "is for subjects: what is trained with [[control]] predicts with a condition, which its pictures have none of",
    );
    check(
        config.search.as_ref().is_none_or(|search| !search.only),
        "a [search] with only = true trains nothing for it",
    );
    let unique: BTreeSet<&String> = entry.prompts.iter().collect();
    check(
        entry.prompts.len() > 1 && unique.len() == entry.prompts.len(),
        &format!("prompts: expected two different classes or more, found {:?}", entry.prompts),
    );
    for prompt in &entry.prompts {
        check(
            !prompt.is_empty() && prompt.trim() == prompt,
            &format!("prompts: expected captions without space around them, found {prompt:?}"),
        );
        bounded(prompt).unwrap_or_else(|problem| check(false, &format!("prompts: {problem}")));
    }
    check(entry.num_pictures != Some(0), "num_pictures: expected 1 or more, found 0");
    check(
        NOISES.contains(&entry.num_noises),
        &format!("num_noises: expected 1 to {}, found {}", NOISES.end(), entry.num_noises),
    );
    let once: BTreeSet<u64> = entry.scales.iter().map(|scale| (scale + 0.0).to_bits()).collect();
    let numbers = entry.scales.iter().all(|scale| SCALES.contains(scale)) && once.len() == entry.scales.len();
    check(
        numbers && !entry.trained_scales().is_empty(),
        &format!(
            "scales: expected different numbers from -4 to 4, one or more beside 0, which is the base model, found {:?}",
            entry.scales
        ),
    );
    problems
}
