//! The settings of a training run: one struct that is the config file and the resolved copy in the run folder, in
//! [`sections`]; [`keys`] is the table of all of them, [`merge`] where they come from. No tensors and no paths opened here.

pub mod keys;
mod merge;
mod method_name;
mod resume;
mod sections;
mod validate;

pub use method_name::MethodName;
pub use sections::{
    AdapterSection, CheckpointsSection, DataSection, ModelSection, OptimizerSection, PreviewsSection,
    PriorSection, ScheduleSection, TextRates,
};

use crate::error::Result;
use crate::platform::device::DeviceChoice;
use crate::train::optim::{LearningRate, LrSchedule};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Everything that a training run depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Run folder: adapter, metrics, previews and checkpoints go there and nowhere else.
    pub output_dir: PathBuf,
    /// Seed of every random draw of the run.
    pub seed: u64,
    /// auto, cpu, cuda or cuda:N.
    pub device: DeviceChoice,
    /// CPU threads.
    pub threads: Option<i32>,
    pub model: ModelSection,
    pub data: DataSection,
    pub prior: PriorSection,
    pub adapter: AdapterSection,
    pub optimizer: OptimizerSection,
    pub schedule: ScheduleSection,
    pub previews: PreviewsSection,
    pub checkpoints: CheckpointsSection,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            output_dir: PathBuf::from("runs/hra"),
            seed: 0,
            device: DeviceChoice::Auto,
            threads: None,
            model: ModelSection::default(),
            data: DataSection::default(),
            prior: PriorSection::default(),
            adapter: AdapterSection::default(),
            optimizer: OptimizerSection::default(),
            schedule: ScheduleSection::default(),
            previews: PreviewsSection::default(),
            checkpoints: CheckpointsSection::default(),
        }
    }
}

impl TrainConfig {
    /// Whether control trains.
    pub fn is_control(&self) -> bool {
        self.data.train_data_dir.is_some()
    }

    /// The learning rates over the run: the UNet's, those of the model's `texts` text encoders, and the control encoder's, each
    /// where it trains. Errors: rates for another number of text encoders.
    pub fn learning_rates(&self, texts: usize) -> Result<Vec<LearningRate>> {
        let Self { optimizer, schedule, adapter, .. } = self;
        // diffusers' scripts give lr_num_cycles to cosine_with_restarts only; cosine is half a period.
        let cycles = if schedule.lr_scheduler == LrSchedule::Cosine { 0.5 } else { schedule.lr_num_cycles };
        let rate = |peak| LearningRate {
            peak,
            schedule: schedule.lr_scheduler,
            warmup: schedule.lr_warmup_steps,
            total: schedule.max_train_steps,
            cycles,
            power: schedule.lr_power,
        };
        let mut rates = Vec::new();
        if adapter.method != MethodName::NONE {
            rates.push(rate(optimizer.learning_rate));
        }
        if adapter.train_text_encoder {
            rates.extend(optimizer.text_rates(texts)?.into_iter().map(rate));
        }
        if self.is_control() {
            rates.push(rate(optimizer.control_lr.unwrap_or(optimizer.learning_rate)));
        }
        Ok(rates)
    }
}
