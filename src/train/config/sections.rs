//! The sections of a training's settings, as a config file has them. Names are those of diffusers' DreamBooth scripts where they
//! have one.

use crate::adapter::method::Method;
use crate::adapter::peft::Bias;
use crate::adapter::target::{ATTENTION, TEXT_ATTENTION};
use crate::data::image::Background;
use crate::data::image::edges::Thresholds;
use crate::data::pairs::{ConditionKind, PairSettings};
use crate::diffusion::sampler::SamplerKind;
use crate::error::{Error, Result};
use crate::platform::precision::Precision;
use crate::train::config::MethodName;
use crate::train::optim::{AdamWConfig, LrSchedule};
use crate::weights::prediction::Prediction;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// `[model]`: what is trained from, and in which number format.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSection {
    /// Stable Diffusion to start from: folder, checkpoint file (.safetensors), or hub id owner/name[@revision].
    pub pretrained_model_name_or_path: PathBuf,
    /// Folder with what a checkpoint file does not say: tokenizer/, scheduler/, other parts' config.json.
    pub model_config: Option<PathBuf>,
    /// VAE in place of the model's own: folder of diffusers', file (diffusers' keys, or those of checkpoints), or hub id.
    pub vae: Option<PathBuf>,
    /// Number format of the VAE; f32 where it does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae_dtype: Option<Precision>,
    /// What the model predicts.
    pub prediction: Option<Prediction>,
    /// Number format of the frozen model; the adapter is always f32.
    pub dtype: Precision,
}

impl Default for ModelSection {
    fn default() -> Self {
        Self {
            pretrained_model_name_or_path: PathBuf::new(),
            model_config: None,
            vae: None,
            vae_dtype: None,
            prediction: None,
            dtype: Precision::F32,
        }
    }
}

/// `[data]`: the pictures: of a subject, or pairs of picture and condition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataSection {
    /// Folder with the pictures of the subject.
    pub instance_data_dir: PathBuf,
    /// Prompt of the subject, with its rare token, such as "a photo of sks dog".
    pub instance_prompt: String,
    /// Pictures become squares of this many pixels.
    pub resolution: Option<u32>,
    /// Cut the middle out of pictures that are not square, instead of a random square.
    pub center_crop: bool,
    /// Colour behind pictures with transparent parts.
    pub background: Background,
    /// Pictures of the subject (with `train_data_dir`: pairs, of which 32 are measured) that are not trained on: their loss is measured with fixed noise.
    pub held_out_data_dir: Option<PathBuf>,
    /// Train control, on pairs of picture and condition: a folder with metadata.jsonl or metadata.csv, or a .jsonl, .json or .csv file.
    pub train_data_dir: Option<PathBuf>,
    /// What the conditions are.
    pub condition: ConditionKind,
    /// Make the conditions from the pictures (canny), even where the pairs name files.
    pub make_conditions: bool,
    /// Lower threshold of edges that are made.
    pub canny_low: f64,
    /// Upper threshold of edges that are made.
    pub canny_high: f64,
    /// Colours of the classes (JSON), by which label maps become conditions.
    pub palette: Option<PathBuf>,
    /// Column of the pictures.
    pub image_column: String,
    /// Column of the captions.
    pub caption_column: String,
    /// Column of the conditions.
    pub conditioning_image_column: String,
    /// Refuse pairs whose files lie outside the folder of their table. Left out where it is not set: cells of a comparison are named by
    /// their settings, and keep their names.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub strict_paths: bool,
    /// Share of captions that are left out, so that the condition alone must do.
    pub proportion_empty_prompts: f64,
}

impl Default for DataSection {
    fn default() -> Self {
        let pairs = PairSettings::default();
        Self {
            instance_data_dir: PathBuf::new(),
            instance_prompt: String::new(),
            resolution: None,
            center_crop: false,
            background: pairs.background,
            held_out_data_dir: None,
            train_data_dir: None,
            condition: pairs.condition,
            make_conditions: pairs.make_conditions,
            canny_low: pairs.thresholds.low,
            canny_high: pairs.thresholds.high,
            palette: pairs.palette,
            image_column: pairs.image_column,
            caption_column: pairs.caption_column,
            conditioning_image_column: pairs.conditioning_image_column,
            strict_paths: pairs.strict_paths,
            proportion_empty_prompts: 0.0,
        }
    }
}

impl DataSection {
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
            background: self.background,
            strict_paths: self.strict_paths,
        }
    }
}

/// `[prior]`: class pictures, which keep the class as it was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PriorSection {
    /// Keep the class as it was: train on class pictures too.
    pub with_prior_preservation: bool,
    /// Prompt of the class, such as "a photo of a dog".
    pub class_prompt: String,
    /// Folder of class pictures: your own, or empty to be filled.
    pub class_data_dir: Option<PathBuf>,
    /// Number of class pictures that the model makes.
    pub num_class_images: usize,
    /// Weight of the class pictures' loss.
    pub prior_loss_weight: f64,
    /// Pictures drawn at once, class pictures and previews.
    pub sample_batch_size: usize,
    /// Steps for a class picture.
    pub class_steps: usize,
    /// Guidance for a class picture; nearer to 1 is nearer to what the model knows of the class.
    pub class_guidance: f64,
    /// Scheduler for class pictures.
    pub class_scheduler: Option<SamplerKind>,
}

impl Default for PriorSection {
    fn default() -> Self {
        Self {
            with_prior_preservation: false,
            class_prompt: String::new(),
            class_data_dir: None,
            num_class_images: 100,
            prior_loss_weight: 1.0,
            sample_batch_size: 4,
            class_steps: 50,
            class_guidance: 4.0,
            class_scheduler: None,
        }
    }
}

/// `[adapter]`: the method with its own settings, and what all methods have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterSection {
    /// Adaptation method.
    pub method: MethodName,
    /// Layers of the UNet to adapt: name endings, or one regular expression for whole names.
    pub target_modules: Vec<String>,
    /// Start from the values of this adapter folder (of the same method, rank and layers).
    pub init_adapter: Option<PathBuf>,
    /// Train the text encoder too, by the same method.
    pub train_text_encoder: bool,
    /// Layers of the text encoder to adapt.
    pub text_target_modules: Vec<String>,
    /// Biases that train beside the adapter: none, all of the network, or only those of adapted layers.
    pub bias: Bias,
    /// The method's own settings, of the type that its line in the registry names.
    #[serde(flatten)]
    pub own: toml::Table,
}

impl Default for AdapterSection {
    fn default() -> Self {
        Self {
            method: MethodName::DEFAULT,
            target_modules: ATTENTION.map(String::from).to_vec(),
            init_adapter: None,
            train_text_encoder: false,
            text_target_modules: TEXT_ATTENTION.map(String::from).to_vec(),
            bias: Bias::None,
            own: toml::Table::new(),
        }
    }
}

impl AdapterSection {
    /// The method with its settings; none where the control encoder trains alone. Errors: a setting that it has not.
    pub fn method(&self) -> Result<Option<Method>> {
        let method = self.method.entry().map(|entry| (entry.own.method)(&self.own)).transpose();
        method.map_err(|e| Error::config(format!("[adapter] {}", e.message())))
    }
}

/// Peak learning rates of text encoders.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a number, or a list of numbers")]
pub enum TextRates {
    /// One for all.
    All(f64),
    /// One for each, in their order.
    Each(Vec<f64>),
}

impl TextRates {
    /// All that are named.
    pub fn named(&self) -> &[f64] {
        match self {
            Self::All(rate) => std::slice::from_ref(rate),
            Self::Each(rates) => rates,
        }
    }

    /// One for each of `count` text encoders. Errors: another number of them is named.
    fn of(&self, count: usize) -> Result<Vec<f64>> {
        match self.named() {
            [rate] => Ok(vec![*rate; count]),
            rates if rates.len() == count => Ok(rates.to_vec()),
            rates => Err(Error::config(format!(
                "text_encoder_lr: expected one rate, or one for each of the model's {count} text encoders, found {}",
                rates.len()
            ))),
        }
    }
}

/// `[optimizer]`: rates, AdamW, and what is minimised and averaged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerSection {
    /// Peak learning rate of the control encoder.
    pub control_lr: Option<f64>,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Peak learning rate of the text encoders.
    pub text_encoder_lr: Option<TextRates>,
    /// AdamW beta 1.
    pub adam_beta1: f64,
    /// AdamW beta 2.
    pub adam_beta2: f64,
    /// AdamW weight decay.
    pub adam_weight_decay: f64,
    /// AdamW epsilon.
    pub adam_epsilon: f64,
    /// Gradients are scaled down to this norm.
    pub max_grad_norm: f64,
    /// Min-SNR weighting of the loss, 5.0 in its paper.
    pub snr_gamma: Option<f64>,
    /// Average the adapter over steps; previews and the final adapter use the average.
    pub use_ema: bool,
    /// Memory of that average.
    pub ema_decay: f64,
}

impl Default for OptimizerSection {
    fn default() -> Self {
        Self {
            control_lr: None,
            learning_rate: 1e-4,
            text_encoder_lr: None,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_weight_decay: 1e-2,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            snr_gamma: None,
            use_ema: false,
            ema_decay: 0.999,
        }
    }
}

impl OptimizerSection {
    /// The peak learning rates of `count` text encoders: what is said, or the UNet's. Errors: another number of them is named.
    pub fn text_rates(&self, count: usize) -> Result<Vec<f64>> {
        self.text_encoder_lr.as_ref().map_or(Ok(vec![self.learning_rate; count]), |rates| rates.of(count))
    }

    /// AdamW's own settings.
    pub fn adamw(&self) -> AdamWConfig {
        AdamWConfig {
            beta1: self.adam_beta1,
            beta2: self.adam_beta2,
            epsilon: self.adam_epsilon,
            weight_decay: self.adam_weight_decay,
        }
    }
}

/// `[schedule]`: how many steps of how many pictures, and how the rates change over them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleSection {
    /// Optimiser steps.
    pub max_train_steps: i64,
    /// Subject pictures for a step (with prior preservation, as many class pictures too).
    pub train_batch_size: usize,
    /// Batches whose gradients are averaged for one step.
    pub gradient_accumulation_steps: usize,
    /// Learning-rate schedule.
    pub lr_scheduler: LrSchedule,
    /// Steps of linear warm-up (all schedules but constant).
    pub lr_warmup_steps: i64,
    /// Cycles of cosine_with_restarts.
    pub lr_num_cycles: f64,
    /// Power of the polynomial schedule.
    pub lr_power: f64,
}

impl Default for ScheduleSection {
    fn default() -> Self {
        Self {
            max_train_steps: 1000,
            train_batch_size: 1,
            gradient_accumulation_steps: 1,
            lr_scheduler: LrSchedule::Constant,
            lr_warmup_steps: 0,
            lr_num_cycles: 1.0,
            lr_power: 1.0,
        }
    }
}

/// `[previews]`: what is drawn and measured while it trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PreviewsSection {
    /// Condition of a preview: one for each validation prompt, or one for all.
    pub validation_image: Vec<PathBuf>,
    /// Prompts of previews; may be given several times.
    pub validation_prompt: Vec<String>,
    /// Pictures for each preview prompt; 0 for no previews.
    pub num_validation_images: usize,
    /// Steps between previews, and between measurements of the held-out loss.
    pub validation_steps: i64,
    /// Sampling steps for a preview.
    pub validation_inference_steps: usize,
    /// Guidance for previews.
    pub validation_guidance: f64,
    /// Scheduler for previews.
    pub validation_scheduler: Option<SamplerKind>,
}

impl Default for PreviewsSection {
    fn default() -> Self {
        Self {
            validation_image: Vec::new(),
            validation_prompt: Vec::new(),
            num_validation_images: 4,
            validation_steps: 100,
            validation_inference_steps: 25,
            validation_guidance: 7.5,
            validation_scheduler: None,
        }
    }
}

/// `[checkpoints]`: what is kept of the way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointsSection {
    /// Steps between checkpoints.
    pub checkpointing_steps: i64,
    /// Checkpoints to keep.
    pub checkpoints_total_limit: Option<usize>,
    /// Steps between records of metrics.jsonl and TensorBoard; how far the weights moved is in every tenth, and with previews.
    pub log_every: i64,
}

impl Default for CheckpointsSection {
    fn default() -> Self {
        Self { checkpointing_steps: 100, checkpoints_total_limit: None, log_every: 10 }
    }
}
