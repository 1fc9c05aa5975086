//! The task of one cell: the base model's, or a training's.

use crate::error::{Error, Result};
use crate::lab::compare::config::MethodEntry;
use crate::lab::compare::draw::{DrawnPairing, Sampling};
use crate::lab::compare::plan::{Planner, short};
use crate::lab::compare::subject::{Material, Subject, slug};
use crate::lab::compare::task::{Task, TaskSet};
use crate::lab::results::{BASE, CellWork, PlannedCell, ScoredWith, Set};
use crate::platform::device::DeviceChoice;
use crate::train::config::{CheckpointsSection, DataSection, PreviewsSection, PriorSection, TrainConfig};
use std::path::Path;

/// Held-out losses are measured so many times in a training.
const HELD_OUT_LOOKS: i64 = 5;

impl Planner<'_> {
    pub(super) fn base(&self, subject: &Subject) -> Result<Task> {
        let train = self.train.clone();
        let only = self.config.search.as_ref().is_some_and(|s| s.only);
        let mut sets = Vec::new();
        if self.config.search.is_some() {
            sets.push(Set::Validation);
        }
        if !only {
            sets.push(Set::Test);
        }
        self.task(subject, BASE, train, 0, None, &sets)
    }

    pub(super) fn training(
        &self,
        method: &MethodEntry,
        subject: &Subject,
        seed: u64,
        rate: f64,
        set: Set,
    ) -> Result<Task> {
        let mut train = TrainConfig { seed, ..self.train_config(method).clone() };
        train.optimizer.learning_rate = rate;
        self.task(subject, &method.label, train, seed, Some(rate), &[set])
    }

    fn task(
        &self,
        subject: &Subject,
        method: &str,
        train: TrainConfig,
        seed: u64,
        rate: Option<f64>,
        sets: &[Set],
    ) -> Result<Task> {
        let train = self.settings(subject, train, seed);
        let id = match rate {
            None => self.base_id(subject),
            Some(rate) => self.training_id(subject, method, &train, rate)?,
        };
        let cell = PlannedCell {
            id,
            subject: subject.name.clone(),
            work: rate.map_or(CellWork::Base, |learning_rate| CellWork::Training {
                method: method.to_string(),
                seed,
                learning_rate,
            }),
        };
        // Pictures without the subject are the same for all: the first subject's base cell draws them.
        let first = self.subjects.first().map_or_else(String::new, |first| self.base_id(first));
        let draws_drift = rate.is_some() || cell.id == first;
        let draw = &self.config.draw;
        let class_prompt = &train.prior.class_prompt;
        let class = format!("{class_prompt} {}", self.class_settings());
        Ok(Task {
            class_folder: Path::new("class_images").join(format!("{}-{}", slug(class_prompt), short(&class))),
            steps: if rate.is_some() { self.steps.to_vec() } else { vec![0] },
            sets: sets.iter().map(|set| self.set(*set, subject, rate.is_some())).collect(),
            control: subject.pairs().map(|pairs| pairs.agreement.clone()),
            drift_prompts: if draws_drift { draw.drift_prompts.clone() } else { Vec::new() },
            drift_base: first,
            sampling: Sampling {
                seed: draw.seed,
                scheduler: draw.scheduler,
                steps: draw.steps,
                guidance: draw.guidance,
                control: draw.control(),
            },
            num_drift_images: draw.num_drift_images,
            towers: self.towers.clone(),
            class_look_alikes: subject.pictures().is_none_or(|p| p.look_alikes.is_empty())
                && train.prior.with_prior_preservation,
            frontier: None,
            classifier: None,
            scored_with: ScoredWith::new(),
            weight_changes: self.config.weight_changes,
            validates_with_train: self.validates_with_train(),
            remove_weights: self.config.remove_weights,
            is_final: false,
            jobs: self.config.jobs,
            cell,
            train,
        })
    }

    /// The settings of a training on a subject, and of what its base model draws.
    fn settings(&self, subject: &Subject, train: TrainConfig, seed: u64) -> TrainConfig {
        let (instance_prompt, class_prompt) = subject.pictures().map_or_else(Default::default, |pictures| {
            (pictures.instance_prompt.clone(), pictures.class_prompt.clone())
        });
        let train = TrainConfig {
            seed,
            data: DataSection { instance_prompt, ..train.data },
            prior: PriorSection { class_prompt, ..train.prior },
            previews: PreviewsSection {
                validation_prompt: Vec::new(),
                // Without prompts control would preview held-out pairs, in the time that is measured.
                num_validation_images: 0,
                validation_steps: (train.schedule.max_train_steps / HELD_OUT_LOOKS).max(1),
                ..train.previews
            },
            checkpoints: CheckpointsSection {
                checkpoints_total_limit: (self.steps.len() == 1).then_some(1),
                ..train.checkpoints
            },
            ..train
        };
        self.with_pairs(subject, train)
    }

    fn training_id(&self, subject: &Subject, method: &str, train: &TrainConfig, rate: f64) -> Result<String> {
        let pictures: Vec<&str> = match &subject.material {
            Material::Pictures(pictures) => pictures.train.iter().map(|p| p.hash.as_str()).collect(),
            Material::Pairs(pairs) => vec![&pairs.train_hash],
        };
        // Where it runs is not what it is, nor is what it would have refused.
        let data = DataSection { strict_paths: false, ..train.data.clone() };
        let what = TrainConfig { device: DeviceChoice::Auto, threads: None, data, ..train.clone() };
        let key = serde_json::to_string(&(method, what, &self.model, pictures, self.steps));
        let key = key.map_err(|e| Error::config(format!("method `{method}`: {e}")))?;
        Ok(format!("{}-lr{rate:e}-{}-s{}-{}", slug(method), subject.name, train.seed, short(&key)))
    }

    /// What class pictures depend on beside their prompt.
    pub(super) fn class_settings(&self) -> String {
        let t = &self.train;
        let how = (
            t.prior.class_steps,
            t.prior.class_guidance,
            t.prior.class_scheduler,
            t.data.resolution,
            t.prior.sample_batch_size,
        );
        let prediction = t.model.prediction.map_or_else(String::new, |prediction| format!(" {prediction}"));
        let vae = t.model.vae_dtype.map_or_else(String::new, |dtype| format!(" VAE in {dtype}"));
        format!("{} {how:?}{prediction}{vae}", self.model)
    }

    fn base_id(&self, subject: &Subject) -> String {
        let t = &self.train;
        let counts = (t.model.dtype, t.prior.with_prior_preservation, t.prior.num_class_images);
        format!("{BASE}-{}-{}", subject.name, short(&format!("{} {counts:?}", self.class_settings())))
    }

    /// The settings of a training on a subject's pairs, where it has any.
    fn with_pairs(&self, subject: &Subject, train: TrainConfig) -> TrainConfig {
        let Some(control) = subject.pairs() else { return train };
        let entry = self.config.topic.controls().iter().find(|entry| entry.name == subject.name);
        let train = match entry {
            Some(entry) => entry.applied_to(train),
            None => train,
        };
        let (train_data_dir, palette) =
            (Some(control.train_data_dir.clone()), control.settings.palette.clone());
        TrainConfig { data: DataSection { train_data_dir, palette, ..train.data }, ..train }
    }

    pub(super) fn set(&self, set: Set, subject: &Subject, is_trained: bool) -> TaskSet {
        let (prompts, num_images) = match set {
            Set::Validation => (&subject.validation_prompts, self.config.draw.num_validation_images),
            Set::Test => (&subject.prompts, self.config.draw.num_images),
        };
        let Some(control) = subject.pairs() else {
            return TaskSet { set, prompts: prompts.clone(), num_images, pairs: None };
        };
        // The base model is shown no condition, its own or another's.
        let shuffled = if is_trained { control.shuffled(set).to_vec() } else { Vec::new() };
        let conditions = control.hash(set).to_string();
        let num_images = if shuffled.is_empty() { 1 } else { 2 };
        TaskSet {
            set,
            prompts: prompts.clone(),
            num_images,
            pairs: Some(DrawnPairing { conditions, shuffled }),
        }
    }
}
