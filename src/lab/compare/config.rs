//! The settings of a comparison: a TOML file of a few tables. `[train]` takes the sections of `hra train`, for all methods alike; a
//! `[[method]]` what of them is a method's own. No tensors and no paths opened here.

use crate::diffusion::sample::Strength;
use crate::diffusion::sampler::SamplerKind;
use crate::error::{Error, Result};
use crate::lab::compare::classifier::entry::ClassifierEntry;
use crate::lab::compare::control::entry::ControlEntry;
use crate::lab::compare::frontier::FrontierEntry;
use crate::lab::evaluate::TowerPaths;
use crate::model::control::Passes;
use crate::platform::files;
use crate::train::config::TrainConfig;
use crate::train::config::keys::Section;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Most trainings of a comparison: years of a machine. All are planned before the first begins.
pub const MAX_TRAININGS: usize = 100_000;

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
    /// Measure what each training changed in the weights: singular value decompositions of every adapted layer, on the CPU.
    #[serde(default = "yes")]
    pub weight_changes: bool,
    /// Settings of `hra train` for every method.
    pub train: toml::Table,
    /// How pictures are drawn.
    pub draw: Draw,
    /// The towers that score.
    #[serde(default)]
    pub scores: TowerPaths,
    /// A learning rate that every method is trained at beside its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub common_rate: Option<f64>,
    /// How learning rates are chosen; without it each method says its own.
    pub search: Option<Search>,
    /// Along which grid of scales and checkpoints every trained cell is drawn too.
    pub frontier: Option<FrontierEntry>,
    /// Which classes the model itself is asked to tell apart.
    pub classifier: Option<ClassifierEntry>,
    /// What is taught.
    #[serde(flatten)]
    pub topic: Topic,
    /// Rows of the table.
    #[serde(rename = "method")]
    pub methods: Vec<MethodEntry>,
}

/// What a comparison teaches: one of these kinds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Topic {
    /// Subjects, each with its pictures: `[[subject]]`.
    #[serde(rename = "subject")]
    Subjects(Vec<SubjectEntry>),
    /// Subjects and prompts of a folder like google/dreambooth's `dataset/`: `[dreambooth]`.
    #[serde(rename = "dreambooth")]
    DreamBooth(DreamBooth),
    /// Control, by pairs of picture and condition: `[[control]]`.
    #[serde(rename = "control")]
    Control(Vec<ControlEntry>),
}

/// All kinds of [`Topic`], of which a file has one.
#[derive(Deserialize)]
struct TopicTables {
    subject: Option<Vec<SubjectEntry>>,
    dreambooth: Option<DreamBooth>,
    control: Option<Vec<ControlEntry>>,
}

impl Topic {
    /// The sets of pairs; none where subjects are taught.
    pub fn controls(&self) -> &[ControlEntry] {
        match self {
            Self::Control(entries) => entries,
            Self::Subjects(_) | Self::DreamBooth(_) => &[],
        }
    }

    /// Whether control is taught.
    pub fn is_control(&self) -> bool {
        matches!(self, Self::Control(_))
    }
}

/// How scores are computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// In place of an objective: the likeness to a picture that is had with no more than this drift (pixels), anywhere on the grid
    /// of `[frontier]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drift: Option<f64>,
    /// Search, and train nothing for the tables.
    #[serde(default)]
    pub only: bool,
}

impl Search {
    /// Whether a subject is searched on.
    pub fn looks_at(&self, subject: &str) -> bool {
        self.subjects.is_empty() || self.subjects.iter().any(|name| name == subject)
    }
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

pub(super) fn yes() -> bool {
    true
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
        let wrong = |e: toml::de::Error| {
            let hint = "docs/compare.md explains the tables; [train] and [[method]] take the sections of `hra train`";
            // What is wrong with the whole file is told with the place of its first line.
            let whole = e.span().is_none_or(|span| span.start == 0);
            let text = if whole { e.message().to_string() } else { e.to_string() };
            Error::format(path, text.trim_end()).with_hint(hint)
        };
        let table: toml::Table = toml::from_str(&text).map_err(wrong)?;
        if !table.contains_key("train") && Section::names().any(|name| table.contains_key(name)) {
            let problem = "expected the file of a comparison, found the settings of one training";
            let word = files::shell_word(&path.to_string_lossy());
            return Err(Error::format(path, problem).with_hint(format!("hra train {word}")));
        }
        // Alone first: where several kinds may stand, what is wrong with one is not told with its place.
        let TopicTables { subject, dreambooth, control } = toml::from_str(&text).map_err(wrong)?;
        let empty = [subject.as_ref().map(Vec::len), control.as_ref().map(Vec::len)].contains(&Some(0));
        let kinds = [subject.is_some(), dreambooth.is_some(), control.is_some()];
        if empty || kinds.iter().filter(|there| **there).count() != 1 {
            let problem = "expected either [[subject]] tables, a [dreambooth] table or [[control]] tables";
            return Err(Error::format(path, problem));
        }
        let config: Self = toml::from_str(&text).map_err(wrong)?;
        config.validate().map_err(|e| Error::format(path, e.kind.to_string()).with_hints(e.hints()))?;
        Ok(config)
    }

    /// Sets `strict_paths` of everything that tables name; an error where there are none.
    pub fn refuse_outside_paths(&mut self) -> Result<()> {
        if let Topic::Control(entries) = &mut self.topic {
            entries.iter_mut().for_each(|entry| entry.strict_paths = true);
            return Ok(());
        }
        let classifier = self.classifier.as_mut().ok_or_else(|| {
            Error::config(
                "--strict-paths: only with [[control]] or [classifier], whose pictures are named by tables",
            )
        })?;
        classifier.strict_paths = true;
        Ok(())
    }

    /// Refuses more trainings than [`MAX_TRAININGS`] for so many subjects.
    pub fn check_size(&self, subjects: usize) -> Result<()> {
        let search = self.search.as_ref();
        let rates = 1 + usize::from(self.common_rate.is_some());
        let tables = if search.is_some_and(|s| s.only) { 0 } else { self.seeds.len().saturating_mul(rates) };
        let mut searched = 0;
        if let Some(search) = search {
            let rates = search.learning_rates.len() + search.factors.len();
            searched = rates.saturating_mul(search.seeds.len());
        }
        let each = searched.saturating_add(tables);
        let found = each.saturating_mul(subjects).saturating_mul(self.methods.len());
        if found <= MAX_TRAININGS {
            return Ok(());
        }
        let methods = self.methods.len();
        Err(Error::config(format!(
            "expected a comparison of at most {MAX_TRAININGS} trainings, found {found}: methods {methods}, subjects {subjects}, seeds \
             and rates {each}"
        ))
        .with_hint("compare fewer seeds, rates or methods, or in several comparisons"))
    }

    /// The settings of one training, without what depends on subject and seed.
    pub fn train_config(&self, method: &MethodEntry) -> Result<TrainConfig> {
        TrainConfig::from_tables(&[&self.train, &method.settings])
            .map_err(|e| Error::config(format!("method `{}`: {e}", method.label)))
    }

    /// The learning rates that a method is trained with: those of the search, or its own.
    pub fn learning_rates(&self, method: &MethodEntry) -> Result<Vec<f64>> {
        let own = self.train_config(method)?.optimizer.learning_rate;
        Ok(match &self.search {
            None => vec![own],
            Some(search) if search.factors.is_empty() => search.learning_rates.clone(),
            Some(search) => search.factors.iter().map(|factor| own * factor).collect(),
        })
    }

    /// What the search maximises: weights of scores; empty without a search, or where it looks along the grid of `[frontier]`.
    pub fn objective(&self) -> BTreeMap<String, f64> {
        let Some(search) = self.search.as_ref().filter(|search| search.drift.is_none()) else {
            return BTreeMap::new();
        };
        if !search.objective.is_empty() {
            return search.objective.clone();
        }
        let agreement: Option<BTreeSet<&str>> =
            self.topic.controls().iter().map(|c| c.agreement_score()).collect();
        if let Some(keys) = agreement.filter(|keys| !keys.is_empty()) {
            return keys.into_iter().map(|key| (key.to_string(), 1.0)).collect();
        }
        let picture = if self.scores.dino.is_some() { "dino" } else { "clip_i" };
        BTreeMap::from([(picture.to_string(), 1.0), ("clip_t".to_string(), 1.0)])
    }

    /// Steps after which cells are scored, ascending; the last is the whole training.
    pub fn steps(&self) -> Result<Vec<i64>> {
        let mut steps: BTreeSet<i64> = self.score_steps.iter().copied().collect();
        steps.insert(TrainConfig::common(&self.train)?.schedule.max_train_steps);
        Ok(steps.into_iter().collect())
    }
}
