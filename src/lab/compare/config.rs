//! The settings of a comparison: a TOML file of a few tables. `[train]` takes every key of `hra train`, for all methods alike;
//! a `[[method]]` takes the same keys for itself. No tensors and no paths opened here.

use crate::diffusion::sample::Strength;
use crate::diffusion::sampler::SamplerKind;
use crate::error::{Error, Result};
use crate::lab::compare::control::{self, ControlEntry};
use crate::lab::evaluate::TowerPaths;
use crate::model::control::Passes;
use crate::platform::files;
use crate::train::config::{TrainConfig, own_names};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What the keys of `[train]` and `[[method]]` may not be: the comparison sets them itself.
const OURS: [&str; 13] = [
    "output_dir",
    "seed",
    "instance_data_dir",
    "instance_prompt",
    "held_out_data_dir",
    "train_data_dir",
    "validation_image",
    "class_prompt",
    "class_data_dir",
    "validation_prompt",
    "validation_steps",
    "checkpoints_total_limit",
    "init_adapter",
];

/// What a `[[method]]` may say: the method and what it is trained by. Everything else is the same for all.
const METHODS_OWN: [&str; 18] = [
    "method",
    "rank",
    "block_size",
    "lora_alpha",
    "use_rslora",
    "init_lora_weights",
    "coft_eps",
    "hra_lambda",
    "gram_schmidt",
    "hra_init",
    "allow_odd_rank",
    "target_modules",
    "bias",
    "learning_rate",
    "train_text_encoder",
    "text_target_modules",
    "text_encoder_lr",
    "control_lr",
];

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

/// A whole comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompareConfig {
    /// Heading of the report.
    pub title: String,
    /// Folder of the comparison.
    pub output_dir: PathBuf,
    /// What a reader of the report must know, a sentence each.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Seeds of the trainings.
    #[serde(default = "first_seed")]
    pub seeds: Vec<u64>,
    /// Cells that run at once on this machine.
    #[serde(default = "one")]
    pub jobs: usize,
    /// Steps after which a cell is scored; the last step always is.
    #[serde(default)]
    pub score_steps: Vec<i64>,
    /// How scores are computed.
    #[serde(default)]
    pub protocol: Protocol,
    /// Remove what was trained once it is scored (whole UNets are large).
    #[serde(default)]
    pub remove_weights: bool,
    /// Settings of `hra train` for every method.
    pub train: toml::Table,
    /// How pictures are drawn.
    pub draw: Draw,
    /// The towers that score.
    #[serde(default)]
    pub scores: TowerPaths,
    /// How learning rates are chosen; without it each method says its own.
    pub search: Option<Search>,
    /// What is taught.
    #[serde(default, rename = "subject")]
    pub subjects: Vec<SubjectEntry>,
    /// Pairs of picture and condition, in place of `[[subject]]`: control is taught.
    #[serde(default, rename = "control")]
    pub controls: Vec<ControlEntry>,
    /// Subjects and prompts of a folder like google/dreambooth's `dataset/`, in place of `[[subject]]`.
    pub dreambooth: Option<DreamBooth>,
    /// Rows of the table.
    #[serde(rename = "method")]
    pub methods: Vec<MethodEntry>,
}

/// How scores are computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// On pictures that were not trained on, after the last step, with prompts as they were drawn.
    #[default]
    Default,
    /// What the HRA authors' scripts computed: against all pictures, those trained on, CLIP-T with the rare token and the
    /// list of live subjects, the best of all scored steps.
    Paper,
}

/// How pictures are drawn for the scores. In prompts `{subject}` stands for the rare token and the class, `{class}` for the
/// class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Draw {
    /// For the tables.
    #[serde(default)]
    pub prompts: Vec<String>,
    /// To choose learning rates by; in no table.
    #[serde(default)]
    pub validation_prompts: Vec<String>,
    /// Without the subject, for drift.
    #[serde(default)]
    pub drift_prompts: Vec<String>,
    /// Pictures for each prompt of the tables.
    #[serde(default = "four")]
    pub num_images: usize,
    /// Pictures for each validation prompt.
    #[serde(default = "four")]
    pub num_validation_images: usize,
    /// Pictures for each prompt without the subject.
    #[serde(default = "four")]
    pub num_drift_images: usize,
    /// Seed of the first picture of each prompt, the same for all methods and seeds.
    #[serde(default)]
    pub seed: u64,
    /// The model's, where it is not set.
    pub scheduler: Option<SamplerKind>,
    /// Sampling steps.
    #[serde(default = "thirty")]
    pub steps: usize,
    /// Classifier-free guidance.
    #[serde(default = "usual_guidance")]
    pub guidance: f64,
    /// What a control adds is multiplied by this.
    #[serde(default = "whole")]
    pub control_scale: f64,
    /// Which of guidance's passes see the condition.
    #[serde(default)]
    pub control_passes: Passes,
}

impl Draw {
    /// How conditions steer.
    pub fn control(&self) -> Strength {
        Strength { scale: self.control_scale, passes: self.control_passes, ..Strength::default() }
    }
}

/// The same search for every method, on validation prompts and pictures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Search {
    /// Rates that every method tries.
    #[serde(default)]
    pub learning_rates: Vec<f64>,
    /// In place of them: multiples of each method's own `learning_rate`.
    #[serde(default)]
    pub factors: Vec<f64>,
    /// Seeds of the search.
    #[serde(default = "first_seed")]
    pub seeds: Vec<u64>,
    /// Subjects of the search; all, where it is empty.
    #[serde(default)]
    pub subjects: Vec<String>,
    /// What is maximised: a sum of scores with these weights. The similarity to a picture (of DINO, else CLIP) and to the
    /// prompt, where it is empty.
    #[serde(default)]
    pub objective: BTreeMap<String, f64>,
    /// Search, and train nothing for the tables.
    #[serde(default)]
    pub only: bool,
}

/// A subject with its pictures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubjectEntry {
    /// Its name, unique, usable as a folder.
    pub name: String,
    /// What it is one of, such as `dog`.
    pub class: String,
    /// The rare token.
    #[serde(default = "usual_token")]
    pub token: String,
    /// Its pictures. Of five or more the last is left out of training for validation.
    pub data_dir: PathBuf,
    /// Pictures for the tables. Without it, one picture of `data_dir` is left out of training for them.
    pub test_data_dir: Option<PathBuf>,
    /// Others of its class, for identity. Without it: the other subjects of the class, or the base model's class pictures.
    pub look_alikes_dir: Option<PathBuf>,
    /// Where the subject is in the test pictures: white on black, the same names.
    pub masks_dir: Option<PathBuf>,
    /// What it is trained with, such as `a photo of {subject}`.
    pub instance_prompt: String,
    /// What class pictures are drawn with, such as `a photo of a {class}`.
    #[serde(default)]
    pub class_prompt: String,
    /// Its own prompts, in place of those of `[draw]`.
    #[serde(default)]
    pub prompts: Vec<String>,
    /// What a reader must know of it.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// A folder in the layout of google/dreambooth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DreamBooth {
    /// Holds `prompts_and_classes.txt` and a folder for each subject.
    pub dir: PathBuf,
    /// Which subjects; all that have a folder, where it is empty.
    #[serde(default)]
    pub subjects: Vec<String>,
    /// The rare token.
    #[serde(default = "usual_token")]
    pub token: String,
    /// How many of the 25 prompts; all, where it is not set.
    pub num_prompts: Option<usize>,
}

/// A row of the table: a heading, and keys of `hra train`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MethodEntry {
    /// Its heading.
    pub label: String,
    /// Its settings.
    #[serde(flatten)]
    pub settings: toml::Table,
}

fn first_seed() -> Vec<u64> {
    vec![0]
}
fn one() -> usize {
    1
}
pub(super) fn four() -> usize {
    4
}
fn thirty() -> usize {
    30
}
fn usual_guidance() -> f64 {
    7.5
}
fn whole() -> f64 {
    1.0
}
fn usual_token() -> String {
    "sks".into()
}
impl CompareConfig {
    /// Reads and checks a config file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = files::read_to_string(path)?;
        let config: Self = toml::from_str(&text).map_err(|e| {
            let hint = "hint: docs/compare.md explains the tables; [train] and [[method]] take the keys of `hra train`";
            Error::format(path, format!("{}\n{hint}", e.to_string().trim_end()))
        })?;
        config.validate().map_err(|e| Error::format(path, e.to_string()))?;
        Ok(config)
    }

    /// The settings of one training, without what depends on subject and seed.
    pub fn train_config(&self, method: &MethodEntry) -> Result<TrainConfig> {
        TrainConfig::from_tables(&[&self.train, &method.settings])
            .map_err(|e| Error::config(format!("method `{}`: {e}", method.label)))
    }

    /// The learning rates that a method is trained with: those of the search, or its own.
    pub fn learning_rates(&self, method: &MethodEntry) -> Result<Vec<f64>> {
        let own = self.train_config(method)?.learning_rate;
        Ok(match &self.search {
            None => vec![own],
            Some(search) if search.factors.is_empty() => search.learning_rates.clone(),
            Some(search) => search.factors.iter().map(|factor| own * factor).collect(),
        })
    }

    /// What the search maximises: weights of scores; empty without a search.
    pub fn objective(&self) -> BTreeMap<String, f64> {
        let Some(search) = &self.search else { return BTreeMap::new() };
        if !search.objective.is_empty() {
            return search.objective.clone();
        }
        let agreement: Option<BTreeSet<&str>> = self.controls.iter().map(|c| c.agreement_score()).collect();
        if let Some(keys) = agreement.filter(|keys| !keys.is_empty()) {
            return keys.into_iter().map(|key| (key.to_string(), 1.0)).collect();
        }
        let picture = if self.scores.dino.is_some() { "dino" } else { "clip_i" };
        BTreeMap::from([(picture.to_string(), 1.0), ("clip_t".to_string(), 1.0)])
    }

    /// Steps after which cells are scored, ascending; the last is the whole training.
    pub fn steps(&self) -> Result<Vec<i64>> {
        let mut steps: BTreeSet<i64> = self.score_steps.iter().copied().collect();
        steps.insert(TrainConfig::from_tables(&[&self.train])?.max_train_steps);
        Ok(steps.into_iter().collect())
    }

    /// Refuses what cannot be compared, with all problems at once.
    pub fn validate(&self) -> Result<()> {
        TrainConfig::from_tables(&[&self.train]).map_err(|e| Error::config(format!("[train]: {e}")))?;
        let mut problems = Vec::new();
        let mut check = |good: bool, problem: String| {
            if !good {
                problems.push(problem);
            }
        };
        let counts = [self.draw.num_images, self.draw.num_validation_images, self.draw.num_drift_images];
        check((1..=64).contains(&self.jobs), format!("jobs: expected 1 to 64, found {}", self.jobs));
        check(
            counts.iter().all(|n| (1..=10_000).contains(n)),
            format!("draw: expected 1 to 10000 pictures for a prompt, found {counts:?}"),
        );
        check(!self.seeds.is_empty(), "seeds: expected one or more, found none".into());
        check(!self.methods.is_empty(), "method: expected a [[method]] or more, found none".into());
        let kinds = [!self.subjects.is_empty(), self.dreambooth.is_some(), !self.controls.is_empty()];
        check(
            kinds.iter().filter(|there| **there).count() == 1,
            "expected either [[subject]] tables, a [dreambooth] table or [[control]] tables".into(),
        );
        for (what, names) in [
            ("method: label", self.methods.iter().map(|m| m.label.as_str()).collect::<Vec<_>>()),
            ("subject: name", self.subjects.iter().map(|s| s.name.as_str()).collect()),
            ("control: name", self.controls.iter().map(|c| c.name.as_str()).collect()),
        ] {
            let unique: BTreeSet<&&str> = names.iter().collect();
            check(unique.len() == names.len(), format!("{what}: expected different ones, found {names:?}"));
        }
        let seeds: BTreeSet<&u64> = self.seeds.iter().collect();
        check(
            seeds.len() == self.seeds.len(),
            format!("seeds: expected different ones, found {:?}", self.seeds),
        );
        let names = self.subjects.iter().map(|s| ("subject", &s.name));
        for (what, name) in names.chain(self.controls.iter().map(|c| ("control", &c.name))) {
            check(
                is_folder_name(name),
                format!("{what}: name: expected letters, digits, - and _, found `{name}`"),
            );
        }
        if !self.controls.is_empty() {
            control::problems(self).into_iter().for_each(|problem| check(false, problem));
        }
        for method in &self.methods {
            check(
                method.label != crate::lab::results::BASE,
                format!("method: label: `{}` is the base model's row", method.label),
            );
        }
        for (place, table) in std::iter::once(("[train]".to_string(), &self.train))
            .chain(self.methods.iter().map(|m| (format!("method `{}`", m.label), &m.settings)))
        {
            for key in OURS.iter().filter(|key| table.contains_key(**key)) {
                check(false, format!("{place}: {key} is set by the comparison itself; leave it out"));
            }
        }
        for method in &self.methods {
            for key in
                own_names(method.settings.clone()).keys().filter(|key| !METHODS_OWN.contains(&key.as_str()))
            {
                let all = "is not a method's own: set it in [train], for all methods alike";
                check(false, format!("method `{}`: {key} {all}", method.label));
            }
        }
        let validation =
            self.search.is_some() && self.draw.validation_prompts.is_empty() && self.controls.is_empty();
        check(!validation, "draw: a [search] needs validation_prompts, which no table uses".into());
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
            let towers = serde_json::to_value(&self.scores).unwrap_or_default();
            for key in self.objective().keys() {
                if !self.controls.is_empty() && CONTROL_OBJECTIVES.contains(&key.as_str()) {
                    continue;
                }
                let tower = OBJECTIVES.iter().find(|(score, _)| score == key).map(|(_, tower)| *tower);
                let known: Vec<&str> = OBJECTIVES.iter().map(|(score, _)| *score).collect();
                let found =
                    || format!("search: objective: expected one of {}, found `{key}`", known.join(", "));
                check(tower.is_some(), found());
                if let Some(tower) = tower {
                    let there = !towers[tower].is_null();
                    check(there, format!("search: objective: `{key}` needs `{tower}` in [scores]"));
                }
            }
            let rates: BTreeSet<u64> = rates.map(|r| r.to_bits()).collect();
            let seeds: BTreeSet<&u64> = search.seeds.iter().collect();
            check(
                seeds.len() == search.seeds.len()
                    && rates.len() == search.learning_rates.len() + search.factors.len(),
                "search: expected each seed and rate once".into(),
            );
            check(!search.seeds.is_empty(), "search: seeds: expected one or more, found none".into());
        }
        let mut totals = BTreeSet::new();
        for method in &self.methods {
            match self.train_config(method) {
                Err(e) => check(false, e.to_string()),
                Ok(config) => {
                    // With words in the places that the comparison fills.
                    let filled = match self.controls.is_empty() {
                        true => TrainConfig {
                            instance_data_dir: "folder".into(),
                            instance_prompt: "prompt".into(),
                            class_prompt: "prompt".into(),
                            ..config
                        },
                        false => config,
                    };
                    let of_controls = self.controls.iter().map(|entry| entry.applied_to(filled.clone()));
                    let trained: Vec<TrainConfig> =
                        if self.controls.is_empty() { vec![filled.clone()] } else { of_controls.collect() };
                    let wrong = trained.iter().find_map(|config| config.validate().err());
                    let wrong = wrong.map(|e| format!("method `{}`: {e}", method.label));
                    check(wrong.is_none(), wrong.unwrap_or_default());
                    let every = filled.checkpointing_steps;
                    let all = every < 1
                        || self.score_steps.iter().all(|s| *s == filled.max_train_steps || s % every == 0);
                    check(all, format!("score_steps: expected multiples of checkpointing_steps ({every})"));
                    check(
                        self.score_steps.is_empty() || !filled.use_ema,
                        "score_steps: checkpoints hold the adapter itself and the end of a run with use_ema its average".into(),
                    );
                    totals.insert(filled.max_train_steps);
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
        if problems.is_empty() { Ok(()) } else { Err(Error::config(problems.join("\n"))) }
    }
}

fn is_folder_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 100
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
}
