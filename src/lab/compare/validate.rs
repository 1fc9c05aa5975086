//! What is wrong with a comparison's config, all of it at once.

use crate::error::{Error, Result};
use crate::lab::compare::config::{CompareConfig, Search, Topic};
use crate::lab::compare::{classifier, control, frontier_problems};
use crate::train::config::keys::{InComparison, keys, value};
use crate::train::config::{DataSection, PriorSection, TrainConfig};
use crate::weights::bounds::{MAX_FACTOR, is_factor};
use std::collections::BTreeSet;

/// Scores that a search may be about, and the tower that each needs. Identity is not among them: its look-alikes hold the
/// tables' pictures of other subjects.
const OBJECTIVES: [(&str, &str); 10] = [
    ("dino", "dino"),
    ("dinov2", "dinov2"),
    ("clip_i", "clip"),
    ("clip_t", "clip"),
    ("lpips_vgg", "lpips_vgg"),
    ("lpips_alex", "lpips_alex"),
    ("diversity_vgg", "lpips_vgg"),
    ("diversity_alex", "lpips_alex"),
    ("diversity_clip", "clip"),
    ("drift_clip", "clip"),
];

/// Scores of control that a search may be about; they need no tower.
const CONTROL_OBJECTIVES: [&str; 3] = ["edge_f1", "edge_iou", "subject_miou"];

impl CompareConfig {
    /// Refuses what cannot be compared, with all problems at once.
    pub fn validate(&self) -> Result<()> {
        TrainConfig::common(&self.train).map_err(|e| Error::config(format!("[train]: {e}")))?;
        let mut problems = Vec::new();
        let mut check = |good: bool, problem: String| {
            if !good && !problems.contains(&problem) {
                problems.push(problem);
            }
        };
        self.check_counts(&mut check);
        self.check_names(&mut check);
        if self.topic.is_control() {
            control::problems::problems(self).into_iter().for_each(|problem| check(false, problem));
        }
        self.frontier
            .iter()
            .flat_map(|f| frontier_problems::problems(f, self))
            .for_each(|problem| check(false, problem));
        self.classifier
            .iter()
            .flat_map(|c| classifier::problems::problems(c, self))
            .for_each(|problem| check(false, problem));
        self.check_keys(&mut check);
        self.check_search(&mut check);
        self.check_training(&mut check);
        if problems.is_empty() { Ok(()) } else { Err(Error::config(problems.join("\n"))) }
    }

    /// How many there are of what is compared.
    fn check_counts(&self, check: &mut dyn FnMut(bool, String)) {
        let counts = [self.draw.num_images, self.draw.num_validation_images, self.draw.num_drift_images];
        check((1..=64).contains(&self.jobs), format!("jobs: expected 1 to 64, found {}", self.jobs));
        check(
            counts.iter().all(|n| (1..=10_000).contains(n)),
            format!("draw: expected 1 to 10000 pictures for a prompt, found {counts:?}"),
        );
        for (name, value) in [("guidance", self.draw.guidance), ("control_scale", self.draw.control_scale)] {
            check(
                is_factor(value),
                format!("draw: {name}: expected a number up to {MAX_FACTOR:e}, found {value}"),
            );
        }
        check(!self.seeds.is_empty(), "seeds: expected one or more, found none".into());
        check(!self.methods.is_empty(), "method: expected a [[method]] or more, found none".into());
    }

    /// What is compared, and what it is called.
    fn check_names(&self, check: &mut dyn FnMut(bool, String)) {
        let (kind, taught): (&str, Vec<&str>) = match &self.topic {
            Topic::Subjects(entries) => ("subject", entries.iter().map(|s| s.name.as_str()).collect()),
            Topic::Control(entries) => ("control", entries.iter().map(|c| c.name.as_str()).collect()),
            // The names are those of its folders.
            Topic::DreamBooth(_) => ("subject", Vec::new()),
        };
        for (what, names) in [
            ("method: label".to_string(), self.methods.iter().map(|m| m.label.as_str()).collect()),
            (format!("{kind}: name"), taught.clone()),
        ] {
            let unique: BTreeSet<&&str> = names.iter().collect();
            check(unique.len() == names.len(), format!("{what}: expected different ones, found {names:?}"));
        }
        let seeds: BTreeSet<&u64> = self.seeds.iter().collect();
        check(
            seeds.len() == self.seeds.len(),
            format!("seeds: expected different ones, found {:?}", self.seeds),
        );
        for name in taught {
            check(
                is_folder_name(name),
                format!("{kind}: name: expected letters, digits, - and _, found `{name}`"),
            );
        }
    }

    /// Which settings are whose.
    fn check_keys(&self, check: &mut dyn FnMut(bool, String)) {
        for method in &self.methods {
            check(
                method.label != crate::lab::results::BASE,
                format!("method: label: `{}` is the base model's row", method.label),
            );
        }
        // Tables with other keys are told where they are read as settings.
        let read = |table: &toml::Table| TrainConfig::own_words(table).unwrap_or_default();
        let train = read(&self.train);
        for key in keys().filter(|key| value(&train, key).is_some()) {
            check(
                key.in_comparison != InComparison::SetByIt,
                format!("[train]: {} is set by the comparison itself; leave it out", key.place()),
            );
            check(
                key.in_comparison != InComparison::OfPairs || self.topic.is_control(),
                format!("[train]: {} is how pairs are read: only with [[control]]", key.place()),
            );
        }
        for method in &self.methods {
            let own = read(&method.settings);
            for key in keys().filter(|key| value(&own, key).is_some()) {
                let problem = match key.in_comparison {
                    InComparison::MethodsOwn => continue,
                    InComparison::SetByIt => "is set by the comparison itself; leave it out",
                    InComparison::Common | InComparison::OfPairs => {
                        "is not a method's own: set it in [train], for all methods alike"
                    }
                };
                check(false, format!("method `{}`: {} {problem}", method.label, key.place()));
            }
        }
    }

    /// The search for learning rates.
    fn check_search(&self, check: &mut dyn FnMut(bool, String)) {
        let chooses = self.search.is_some() || self.frontier.is_some();
        let validation = chooses && self.draw.validation_prompts.is_empty() && !self.topic.is_control();
        check(
            !validation,
            "draw: a [search] or [frontier] needs validation_prompts, which no table uses".into(),
        );
        if let Some(rate) = self.common_rate {
            check(rate.is_finite() && rate > 0.0, "common_rate: expected a positive number".into());
            let tried = |search: &Search| !search.only || search.learning_rates.contains(&rate);
            check(
                self.search.as_ref().is_none_or(tried),
                "common_rate: a [search] with only = true must have it among its learning_rates".into(),
            );
        }
        if let Some(search) = &self.search {
            check(
                search.learning_rates.is_empty() != search.factors.is_empty(),
                "search: expected either learning_rates or factors".into(),
            );
            let rates = search.learning_rates.iter().chain(&search.factors);
            check(
                rates.clone().all(|r| r.is_finite() && *r > 0.0),
                "search: expected positive numbers".into(),
            );
            if let Some(drift) = search.drift {
                check(drift.is_finite() && drift > 0.0, "search: drift: expected a positive number".into());
                check(
                    self.frontier.is_some(),
                    "search: drift: needs a table [frontier], along which it is looked for".into(),
                );
                check(
                    search.objective.is_empty(),
                    "search: expected either an objective or a drift, found both".into(),
                );
            }
            self.check_objective(check);
            let rates: BTreeSet<u64> = rates.map(|r| r.to_bits()).collect();
            let seeds: BTreeSet<&u64> = search.seeds.iter().collect();
            check(
                seeds.len() == search.seeds.len()
                    && rates.len() == search.learning_rates.len() + search.factors.len(),
                "search: expected each seed and rate once".into(),
            );
            check(!search.seeds.is_empty(), "search: seeds: expected one or more, found none".into());
        }
    }

    /// What a search is about.
    fn check_objective(&self, check: &mut dyn FnMut(bool, String)) {
        let towers = serde_json::to_value(&self.scores).unwrap_or_default();
        for (key, weight) in &self.objective() {
            check(
                is_factor(*weight),
                format!("search: objective: {key}: expected a number up to {MAX_FACTOR:e}, found {weight}"),
            );
            if self.topic.is_control() && CONTROL_OBJECTIVES.contains(&key.as_str()) {
                continue;
            }
            let tower = OBJECTIVES.iter().find(|(score, _)| score == key).map(|(_, tower)| *tower);
            let known: Vec<&str> = OBJECTIVES.iter().map(|(score, _)| *score).collect();
            let found = || format!("search: objective: expected one of {}, found `{key}`", known.join(", "));
            check(tower.is_some(), found());
            if let Some(tower) = tower {
                let there = !towers[tower].is_null();
                check(there, format!("search: objective: `{key}` needs `{tower}` in [scores]"));
            }
        }
    }

    /// What each method would be trained by.
    fn check_training(&self, check: &mut dyn FnMut(bool, String)) {
        let mut totals = BTreeSet::new();
        for method in &self.methods {
            match self.train_config(method) {
                Err(e) => check(false, e.to_string()),
                Ok(config) => {
                    // With words in the places that the comparison fills.
                    let filled = match self.topic.is_control() {
                        false => TrainConfig {
                            data: DataSection {
                                instance_data_dir: "folder".into(),
                                instance_prompt: "prompt".into(),
                                ..config.data
                            },
                            prior: PriorSection { class_prompt: "prompt".into(), ..config.prior },
                            ..config
                        },
                        true => config,
                    };
                    let of_controls =
                        self.topic.controls().iter().map(|entry| entry.applied_to(filled.clone()));
                    let trained: Vec<TrainConfig> =
                        if self.topic.is_control() { of_controls.collect() } else { vec![filled.clone()] };
                    let wrong = trained.iter().find_map(|config| config.validate().err());
                    let wrong = wrong.map(|e| format!("method `{}`: {e}", method.label));
                    check(wrong.is_none(), wrong.unwrap_or_default());
                    let every = filled.checkpoints.checkpointing_steps;
                    let all = every < 1
                        || self
                            .score_steps
                            .iter()
                            .all(|s| *s == filled.schedule.max_train_steps || s % every == 0);
                    check(all, format!("score_steps: expected multiples of checkpointing_steps ({every})"));
                    check(
                        self.score_steps.is_empty() || !filled.optimizer.use_ema,
                        "score_steps: checkpoints hold the adapter itself and the end of a run with use_ema its average".into(),
                    );
                    totals.insert(filled.schedule.max_train_steps);
                }
            }
        }
        if let Some(total) = totals.first() {
            let all = self.score_steps.iter().all(|s| (1..=*total).contains(s));
            check(
                all,
                format!("score_steps: expected steps from 1 to {total}, found {:?}", self.score_steps),
            );
        }
    }
}

fn is_folder_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 100
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
}
