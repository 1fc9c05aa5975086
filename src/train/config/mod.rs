//! The settings of a training run: one struct that is the config file, the command line, and the resolved copy in the run
//! folder ([`merge`]). Names are those of diffusers' DreamBooth scripts where they have one. No tensors and no paths opened here.

mod merge;
mod method_name;
mod validate;

pub use merge::own_names;
pub use method_name::MethodName;

use crate::adapter::Method;
use crate::adapter::methods::hra::HraInit;
use crate::adapter::methods::lora::LoraInit;
use crate::adapter::peft::Bias;
use crate::adapter::target::{ATTENTION, TEXT_ATTENTION};
use crate::data::image::edges::Thresholds;
use crate::data::pairs::{ConditionKind, PairSettings};
use crate::diffusion::sampler::SamplerKind;
use crate::error::Result;
use crate::platform::device::{DeviceChoice, Precision};
use crate::train::optim::{AdamWConfig, LearningRate, LrSchedule};
use clap::Args;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Everything that a training run depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Args)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Stable Diffusion to start from: folder, checkpoint file (.safetensors), or hub id owner/name[@revision]
    #[arg(long, alias = "model", value_name = "MODEL", default_value = "", value_parser = any_path, hide_default_value = true, help_heading = "Model and output")]
    pub pretrained_model_name_or_path: PathBuf,
    /// Folder with what a checkpoint file does not say: tokenizer/, scheduler/, other parts' config.json
    #[arg(long, value_name = "DIR", help_heading = "Model and output")]
    pub model_config: Option<PathBuf>,
    /// Run folder: adapter, metrics, previews and checkpoints go there and nowhere else
    #[arg(
        long,
        alias = "output",
        value_name = "DIR",
        default_value = "runs/hra",
        help_heading = "Model and output"
    )]
    pub output_dir: PathBuf,
    /// Seed of every random draw of the run
    #[arg(long, default_value_t = 0, help_heading = "Model and output")]
    pub seed: u64,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value_t = DeviceChoice::Auto, help_heading = "Model and output")]
    pub device: DeviceChoice,
    /// Number format of the frozen model; the adapter is always f32
    #[arg(long, alias = "mixed-precision", value_enum, default_value_t = Precision::F32, help_heading = "Model and output")]
    pub dtype: Precision,
    /// CPU threads [default: libtorch's choice]
    #[arg(long, help_heading = "Model and output")]
    pub threads: Option<i32>,

    /// Folder with the pictures of the subject
    #[arg(long, value_name = "DIR", default_value = "", value_parser = any_path, hide_default_value = true, help_heading = "Subject")]
    pub instance_data_dir: PathBuf,
    /// Prompt of the subject, with its rare token, such as "a photo of sks dog"
    #[arg(
        long,
        value_name = "PROMPT",
        default_value = "",
        hide_default_value = true,
        help_heading = "Subject"
    )]
    pub instance_prompt: String,
    /// Pictures become squares of this many pixels [default: what the model was trained at]
    #[arg(long, help_heading = "Subject")]
    pub resolution: Option<u32>,
    /// Cut the middle out of pictures that are not square, instead of a random square
    #[arg(long, require_equals = true, num_args = 0..=1, default_value_t = false, default_missing_value = "true", help_heading = "Subject")]
    pub center_crop: bool,
    /// Pictures of the subject (with --train_data_dir: pairs, of which 32 are measured) that are not trained on: their loss is
    /// measured with fixed noise
    #[arg(long, value_name = "PATH", help_heading = "Subject")]
    pub held_out_data_dir: Option<PathBuf>,

    /// Train control, on pairs of picture and condition: a folder with metadata.jsonl or metadata.csv, or a .jsonl, .json or .csv file
    #[arg(long, value_name = "PATH", help_heading = "Control")]
    pub train_data_dir: Option<PathBuf>,
    /// What the conditions are
    #[arg(long, value_enum, default_value_t = ConditionKind::Other, help_heading = "Control")]
    pub condition: ConditionKind,
    /// Make the conditions from the pictures (canny), even where the pairs name files
    #[arg(long, require_equals = true, num_args = 0..=1, default_value_t = false, default_missing_value = "true", help_heading = "Control")]
    pub make_conditions: bool,
    /// Lower threshold of edges that are made
    #[arg(long, default_value_t = Thresholds::default().low, help_heading = "Control")]
    pub canny_low: f64,
    /// Upper threshold of edges that are made
    #[arg(long, default_value_t = Thresholds::default().high, help_heading = "Control")]
    pub canny_high: f64,
    /// Colours of the classes (JSON), by which label maps become conditions
    #[arg(long, value_name = "FILE", help_heading = "Control")]
    pub palette: Option<PathBuf>,
    /// Column of the pictures
    #[arg(long, default_value = "file_name", help_heading = "Control")]
    pub image_column: String,
    /// Column of the captions
    #[arg(long, default_value = "text", help_heading = "Control")]
    pub caption_column: String,
    /// Column of the conditions
    #[arg(long, default_value = "conditioning_image", help_heading = "Control")]
    pub conditioning_image_column: String,
    /// Share of captions that are left out, so that the condition alone must do
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", help_heading = "Control")]
    pub proportion_empty_prompts: f64,
    /// Peak learning rate of the control encoder [default: that of the UNet]
    #[arg(long, help_heading = "Control")]
    pub control_lr: Option<f64>,
    /// Condition of a preview: one for each validation prompt, or one for all [default: the first held-out pairs]
    #[arg(long = "validation-image", value_name = "IMAGE", help_heading = "Control")]
    #[serde(default)]
    pub validation_image: Vec<PathBuf>,

    /// Keep the class as it was: train on class pictures too
    #[arg(long, require_equals = true, num_args = 0..=1, default_value_t = false, default_missing_value = "true", help_heading = "Prior preservation")]
    pub with_prior_preservation: bool,
    /// Prompt of the class, such as "a photo of a dog"
    #[arg(
        long,
        value_name = "PROMPT",
        default_value = "",
        hide_default_value = true,
        help_heading = "Prior preservation"
    )]
    pub class_prompt: String,
    /// Folder of class pictures: your own, or empty to be filled [default: class_images in the run folder]
    #[arg(long, value_name = "DIR", help_heading = "Prior preservation")]
    pub class_data_dir: Option<PathBuf>,
    /// Number of class pictures that the model makes
    #[arg(long, default_value_t = 100, help_heading = "Prior preservation")]
    pub num_class_images: usize,
    /// Weight of the class pictures' loss
    #[arg(long, default_value_t = 1.0, help_heading = "Prior preservation")]
    pub prior_loss_weight: f64,
    /// Pictures drawn at once, class pictures and previews
    #[arg(long, default_value_t = 4, help_heading = "Prior preservation")]
    pub sample_batch_size: usize,
    /// Steps for a class picture
    #[arg(long, default_value_t = 50, help_heading = "Prior preservation")]
    pub class_steps: usize,
    /// Guidance for a class picture; nearer to 1 is nearer to what the model knows of the class
    #[arg(long, default_value_t = 4.0, help_heading = "Prior preservation")]
    pub class_guidance: f64,
    /// Scheduler for class pictures [default: the model's]
    #[arg(long, value_enum, help_heading = "Prior preservation")]
    pub class_scheduler: Option<SamplerKind>,

    /// Adaptation method
    #[arg(long, value_parser = MethodName::parser(), default_value_t = MethodName::DEFAULT, help_heading = "Adapter")]
    pub method: MethodName,
    /// Capacity: hra reflections (even), lora and dora rank; oft, coft, boft and ether+ split a layer's inputs into this many blocks
    #[arg(long, alias = "hra-r", default_value_t = 8, help_heading = "Adapter")]
    pub rank: i64,
    /// oft, coft, boft, ether+: size of a block, in place of the number of blocks
    #[arg(long, aliases = ["oft-block-size", "boft-block-size"], value_name = "SIZE", help_heading = "Adapter")]
    pub block_size: Option<i64>,
    /// lora, dora: the change is scaled by alpha / rank [default: the rank]
    #[arg(long, value_name = "ALPHA", help_heading = "Adapter")]
    pub lora_alpha: Option<f64>,
    /// lora, dora: scale by alpha / sqrt(rank) instead
    #[arg(long, require_equals = true, num_args = 0..=1, default_value_t = false, default_missing_value = "true", help_heading = "Adapter")]
    pub use_rslora: bool,
    /// lora, dora: how the down projection starts
    #[arg(long, value_enum, default_value_t = LoraInit::Gaussian, help_heading = "Adapter")]
    pub init_lora_weights: LoraInit,
    /// coft: how far a block may turn; its ball has the radius eps * b^2 / sqrt(blocks)
    #[arg(long, aliases = ["eps", "oft-eps"], default_value_t = 6e-5, help_heading = "Adapter")]
    pub coft_eps: f64,
    /// hra: weight of the orthogonality regulariser (the paper's lambda)
    #[arg(long, alias = "lambda", default_value_t = 0.0, help_heading = "Adapter")]
    pub hra_lambda: f64,
    /// hra: orthonormalise the vectors (the paper's lambda = infinity; PEFT's apply_GS)
    #[arg(long, aliases = ["apply-gs", "apply-GS", "hra-apply-gs", "hra-apply-GS"], require_equals = true, num_args = 0..=1, default_value_t = false, default_missing_value = "true", help_heading = "Adapter")]
    pub gram_schmidt: bool,
    /// hra: start of the vectors: ours, whose best learning rate does not depend on the rank, or PEFT's draw
    #[arg(long, value_enum, default_value_t = HraInit::Auto, help_heading = "Adapter")]
    pub hra_init: HraInit,
    /// hra: train an odd rank although it cannot start at the base model
    #[arg(long, require_equals = true, num_args = 0..=1, default_value_t = false, default_missing_value = "true", help_heading = "Adapter")]
    pub allow_odd_rank: bool,
    /// Layers of the UNet to adapt: name endings separated by commas, or one regular expression for whole names
    #[arg(long, value_delimiter = ',', value_name = "NAMES", default_values_t = ATTENTION.map(String::from), help_heading = "Adapter")]
    pub target_modules: Vec<String>,
    /// Start from the values of this adapter folder (of the same method, rank and layers)
    #[arg(long, value_name = "DIR", help_heading = "Adapter")]
    pub init_adapter: Option<PathBuf>,
    /// Train the text encoder too, by the same method
    #[arg(long, require_equals = true, num_args = 0..=1, default_value_t = false, default_missing_value = "true", help_heading = "Adapter")]
    pub train_text_encoder: bool,
    /// Layers of the text encoder to adapt
    #[arg(long, value_delimiter = ',', value_name = "NAMES", default_values_t = TEXT_ATTENTION.map(String::from), help_heading = "Adapter")]
    pub text_target_modules: Vec<String>,
    /// Biases that train beside the adapter: none, all of the network, or only those of adapted layers
    #[arg(long, aliases = ["hra-bias", "lora-bias"], value_enum, default_value_t = Bias::None, help_heading = "Adapter")]
    pub bias: Bias,

    /// Optimiser steps
    #[arg(long, default_value_t = 1000, help_heading = "Optimisation")]
    pub max_train_steps: i64,
    /// Subject pictures for a step (with prior preservation, as many class pictures too)
    #[arg(long, default_value_t = 1, help_heading = "Optimisation")]
    pub train_batch_size: usize,
    /// Batches whose gradients are averaged for one step
    #[arg(long, default_value_t = 1, help_heading = "Optimisation")]
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate
    #[arg(long, default_value_t = 1e-4, help_heading = "Optimisation")]
    pub learning_rate: f64,
    /// Peak learning rate of the text encoder [default: that of the UNet]
    #[arg(long, alias = "learning-rate-text", help_heading = "Optimisation")]
    pub text_encoder_lr: Option<f64>,
    /// Learning-rate schedule
    #[arg(long, value_enum, default_value_t = LrSchedule::Constant, help_heading = "Optimisation")]
    pub lr_scheduler: LrSchedule,
    /// Steps of linear warm-up (all schedules but constant)
    #[arg(long, default_value_t = 0, help_heading = "Optimisation")]
    pub lr_warmup_steps: i64,
    /// Cycles of cosine_with_restarts
    #[arg(long, default_value_t = 1.0, help_heading = "Optimisation")]
    pub lr_num_cycles: f64,
    /// Power of the polynomial schedule
    #[arg(long, default_value_t = 1.0, help_heading = "Optimisation")]
    pub lr_power: f64,
    /// AdamW beta 1
    #[arg(long, default_value_t = 0.9, help_heading = "Optimisation")]
    pub adam_beta1: f64,
    /// AdamW beta 2
    #[arg(long, default_value_t = 0.999, help_heading = "Optimisation")]
    pub adam_beta2: f64,
    /// AdamW weight decay
    #[arg(long, default_value_t = 1e-2, help_heading = "Optimisation")]
    pub adam_weight_decay: f64,
    /// AdamW epsilon
    #[arg(long, default_value_t = 1e-8, help_heading = "Optimisation")]
    pub adam_epsilon: f64,
    /// Gradients are scaled down to this norm
    #[arg(long, default_value_t = 1.0, help_heading = "Optimisation")]
    pub max_grad_norm: f64,
    /// Min-SNR weighting of the loss, 5.0 in its paper [default: off]
    #[arg(long, help_heading = "Optimisation")]
    pub snr_gamma: Option<f64>,
    /// Average the adapter over steps; previews and the final adapter use the average
    #[arg(long, require_equals = true, num_args = 0..=1, default_value_t = false, default_missing_value = "true", help_heading = "Optimisation")]
    pub use_ema: bool,
    /// Memory of that average
    #[arg(long, default_value_t = 0.999, help_heading = "Optimisation")]
    pub ema_decay: f64,

    /// Prompts of previews; may be given several times
    #[arg(long = "validation-prompt", value_name = "PROMPT", help_heading = "Previews and checkpoints")]
    #[serde(default)]
    pub validation_prompt: Vec<String>,
    /// Pictures for each preview prompt; 0 for no previews
    #[arg(long, default_value_t = 4, help_heading = "Previews and checkpoints")]
    pub num_validation_images: usize,
    /// Steps between previews, and between measurements of the held-out loss
    #[arg(long, default_value_t = 100, help_heading = "Previews and checkpoints")]
    pub validation_steps: i64,
    /// Sampling steps for a preview
    #[arg(long, default_value_t = 25, help_heading = "Previews and checkpoints")]
    pub validation_inference_steps: usize,
    /// Guidance for previews
    #[arg(long, default_value_t = 7.5, help_heading = "Previews and checkpoints")]
    pub validation_guidance: f64,
    /// Scheduler for previews [default: the model's]
    #[arg(long, value_enum, help_heading = "Previews and checkpoints")]
    pub validation_scheduler: Option<SamplerKind>,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 100, help_heading = "Previews and checkpoints")]
    pub checkpointing_steps: i64,
    /// Checkpoints to keep [default: all]
    #[arg(long, help_heading = "Previews and checkpoints")]
    pub checkpoints_total_limit: Option<usize>,
    /// Steps between records of metrics.jsonl and TensorBoard; how far the weights moved is in every tenth, and with previews
    #[arg(long, default_value_t = 10, help_heading = "Previews and checkpoints")]
    pub log_every: i64,
}

impl TrainConfig {
    /// The method with its settings; none where the control encoder trains alone.
    pub fn method(&self) -> Result<Option<Method>> {
        self.method.entry().map(|entry| (entry.from_settings)(&self.to_table()?)).transpose()
    }

    /// Whether control trains.
    pub fn is_control(&self) -> bool {
        self.train_data_dir.is_some()
    }

    /// How pairs are read.
    pub fn pair_settings(&self) -> PairSettings {
        PairSettings {
            image_column: self.image_column.clone(),
            caption_column: self.caption_column.clone(),
            conditioning_image_column: self.conditioning_image_column.clone(),
            condition: self.condition,
            make_conditions: self.make_conditions,
            thresholds: Thresholds { low: self.canny_low, high: self.canny_high },
            palette: self.palette.clone(),
        }
    }

    /// The optimiser's settings.
    pub fn adamw(&self) -> AdamWConfig {
        AdamWConfig {
            beta1: self.adam_beta1,
            beta2: self.adam_beta2,
            epsilon: self.adam_epsilon,
            weight_decay: self.adam_weight_decay,
        }
    }

    /// The learning rates over the run: the UNet's, the text encoder's and the control encoder's, each where it trains.
    pub fn learning_rates(&self) -> Vec<LearningRate> {
        // diffusers' scripts give lr_num_cycles to cosine_with_restarts only; cosine is half a period.
        let cycles = if self.lr_scheduler == LrSchedule::Cosine { 0.5 } else { self.lr_num_cycles };
        let rate = |peak| LearningRate {
            peak,
            schedule: self.lr_scheduler,
            warmup: self.lr_warmup_steps,
            total: self.max_train_steps,
            cycles,
            power: self.lr_power,
        };
        let mut rates = Vec::new();
        if self.method != MethodName::NONE {
            rates.push(rate(self.learning_rate));
        }
        if self.train_text_encoder {
            rates.push(rate(self.text_encoder_lr.unwrap_or(self.learning_rate)));
        }
        if self.is_control() {
            rates.push(rate(self.control_lr.unwrap_or(self.learning_rate)));
        }
        rates
    }
}

/// A path that may be empty, which clap's own parser refuses.
fn any_path(text: &str) -> std::result::Result<PathBuf, std::convert::Infallible> {
    Ok(PathBuf::from(text))
}
