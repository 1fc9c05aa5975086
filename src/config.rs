//! The settings of a training run: one struct that is the config file, the command line, and the resolved copy in the run
//! folder. Names are those of diffusers' DreamBooth scripts where they have one. No tensors and no paths opened here.

use crate::adapter::hra::{HraConfig, HraInit};
use crate::adapter::peft::Bias;
use crate::adapter::target::{ATTENTION, TargetRule};
use crate::device::{DeviceChoice, Precision};
use crate::error::{Error, Result};
use crate::optim::{AdamWConfig, LearningRate, LrSchedule};
use crate::sampler::SamplerKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, FromArgMatches};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// How the base model is adapted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Householder Reflection Adaptation
    Hra,
}

/// Everything that a training run depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Args)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Stable Diffusion folder or checkpoint file (.safetensors) to start from
    #[arg(long, alias = "model", value_name = "DIR|FILE", default_value = "", value_parser = any_path, hide_default_value = true, help_heading = "Model and output")]
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
    /// Pictures of the subject that are not trained on: their loss is measured with fixed noise
    #[arg(long, value_name = "DIR", help_heading = "Subject")]
    pub held_out_data_dir: Option<PathBuf>,

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
    #[arg(long, value_enum, default_value_t = Method::Hra, help_heading = "Adapter")]
    pub method: Method,
    /// Number of reflections; even
    #[arg(long, alias = "hra-r", default_value_t = 8, help_heading = "Adapter")]
    pub rank: i64,
    /// Weight of the orthogonality regulariser (the paper's lambda)
    #[arg(long, alias = "lambda", default_value_t = 0.0, help_heading = "Adapter")]
    pub hra_lambda: f64,
    /// Orthonormalise the vectors (the paper's lambda = infinity; PEFT's apply_GS)
    #[arg(long, aliases = ["apply-gs", "apply-GS", "hra-apply-gs", "hra-apply-GS"], require_equals = true, num_args = 0..=1, default_value_t = false, default_missing_value = "true", help_heading = "Adapter")]
    pub gram_schmidt: bool,
    /// Start of the vectors: ours, whose best learning rate does not depend on the rank, or PEFT's draw
    #[arg(long, value_enum, default_value_t = HraInit::Auto, help_heading = "Adapter")]
    pub hra_init: HraInit,
    /// Train an odd rank although it cannot start at the base model
    #[arg(long, require_equals = true, num_args = 0..=1, default_value_t = false, default_missing_value = "true", help_heading = "Adapter")]
    pub allow_odd_rank: bool,
    /// Layers to adapt: name endings separated by commas, or one regular expression for whole names
    #[arg(long, value_delimiter = ',', value_name = "NAMES", default_values_t = ATTENTION.map(String::from), help_heading = "Adapter")]
    pub target_modules: Vec<String>,
    /// Biases that train beside the adapter
    #[arg(long, alias = "hra-bias", value_enum, default_value_t = Bias::None, help_heading = "Adapter")]
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
    /// Pictures for each preview prompt
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

/// Settings that may differ when a run is resumed: they do not change the steps already made.
const FREE_ON_RESUME: [&str; 15] = [
    "output_dir",
    "device",
    "threads",
    "max_train_steps",
    "held_out_data_dir",
    "sample_batch_size",
    "validation_prompt",
    "num_validation_images",
    "validation_steps",
    "validation_inference_steps",
    "validation_guidance",
    "validation_scheduler",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "log_every",
];

impl TrainConfig {
    /// What was typed wins over `files`, of which a later one wins over an earlier one; the defaults come last.
    pub fn from_matches(matches: &ArgMatches, files: &[&Path]) -> Result<Self> {
        let typed = Self::from_arg_matches(matches).map_err(|e| Error::config(e.to_string()))?;
        let mut merged = toml::Table::new();
        for path in files {
            let text = crate::files::read_to_string(path)?;
            let problem = |e: toml::de::Error| {
                let hint = "hint: keys are the long flags of `hra train --help`, with underscores";
                Error::format(path, format!("{}\n{hint}", e.to_string().trim_end()))
            };
            let mut table: toml::Table = toml::from_str(&text).map_err(problem)?;
            // The command line's second names are keys too.
            for arg in arguments().get_arguments() {
                for alias in arg.get_all_aliases().unwrap_or_default() {
                    if let Some(value) = table.remove(&alias.replace('-', "_")) {
                        table.insert(arg.get_id().to_string(), value);
                    }
                }
            }
            // Alone over the defaults first, so that a mistake is told with the file it is in.
            over(typed.to_table()?, &table).try_into::<Self>().map_err(problem)?;
            merged = over(merged, &table);
        }
        let mut typed_only = typed.to_table()?;
        let mut defaults = typed_only.clone();
        typed_only.retain(|key, _| matches.value_source(key) == Some(ValueSource::CommandLine));
        defaults.retain(|key, _| !typed_only.contains_key(key));
        let merged = over(over(defaults, &merged), &typed_only);
        merged.try_into().map_err(|e: toml::de::Error| Error::config(e.to_string()))
    }

    /// Reads a resolved config, as a run folder holds it.
    pub fn read(path: &Path) -> Result<Self> {
        let text = crate::files::read_to_string(path)?;
        toml::from_str(&text).map_err(|e| Error::format(path, e.to_string().trim_end().to_string()))
    }

    /// The same settings with every path made absolute, so that a run can be resumed from any folder.
    pub fn with_absolute_paths(mut self) -> Result<Self> {
        let absolute = |path: &mut PathBuf| {
            if !path.as_os_str().is_empty() {
                *path = std::path::absolute(&*path).map_err(|e| Error::io("find", path, e))?;
            }
            Ok::<(), Error>(())
        };
        absolute(&mut self.pretrained_model_name_or_path)?;
        self.model_config.as_mut().map_or(Ok(()), absolute)?;
        absolute(&mut self.output_dir)?;
        absolute(&mut self.instance_data_dir)?;
        self.class_data_dir.as_mut().map_or(Ok(()), absolute)?;
        self.held_out_data_dir.as_mut().map_or(Ok(()), absolute)?;
        Ok(self)
    }

    /// As a config file. What is not set is named in a comment, with what happens then.
    pub fn to_toml(&self) -> Result<String> {
        let cannot = |e| Error::config(format!("the settings cannot be written as TOML: {e}"));
        let mut text = toml::to_string(self).map_err(cannot)?;
        let table = self.to_table()?;
        for arg in arguments().get_arguments().filter(|arg| !table.contains_key(arg.get_id().as_str())) {
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            let default =
                help.split_once("[default: ").map_or("not used", |(_, rest)| rest.trim_end_matches(']'));
            text += &format!("# {} is not set: {default}\n", arg.get_id());
        }
        Ok(text)
    }

    /// Checks everything that can be checked without opening a file; all problems are listed.
    pub fn validate(&self) -> Result<()> {
        let mut problems = Vec::new();
        let mut require = |ok: bool, problem: &str| {
            if !ok {
                problems.push(problem.to_string());
            }
        };
        let given = |path: &Path| !path.as_os_str().is_empty();
        require(
            given(&self.pretrained_model_name_or_path),
            "pretrained_model_name_or_path: a model folder is needed",
        );
        require(
            given(&self.instance_data_dir),
            "instance_data_dir: a folder with the subject's pictures is needed",
        );
        require(
            !self.instance_prompt.trim().is_empty(),
            "instance_prompt: a prompt is needed, such as \"a photo of sks dog\"",
        );
        require(given(&self.output_dir), "output_dir: a folder is needed");
        if self.with_prior_preservation {
            require(!self.class_prompt.trim().is_empty(), "class_prompt: needed for prior preservation");
            require(self.num_class_images >= 1, "num_class_images: expected 1 or more");
            require(self.class_steps >= 1, "class_steps: expected 1 or more");
        }
        require(
            self.resolution.is_none_or(|r| (8..=4096).contains(&r)),
            "resolution: expected 8 to 4096 pixels",
        );
        // Far above any use, and far below what would overflow a count or fill a memory.
        require(self.num_class_images <= 1_000_000, "num_class_images: expected at most 1000000");
        require(self.num_validation_images <= 10_000, "num_validation_images: expected at most 10000");
        require(self.train_batch_size <= 4096, "train_batch_size: expected at most 4096");
        require(self.sample_batch_size <= 4096, "sample_batch_size: expected at most 4096");
        require(self.max_train_steps <= 1_000_000_000, "max_train_steps: expected at most 1000000000");
        require(self.max_train_steps >= 1, "max_train_steps: expected 1 or more");
        require(self.train_batch_size >= 1, "train_batch_size: expected 1 or more");
        require(self.sample_batch_size >= 1, "sample_batch_size: expected 1 or more");
        require(self.gradient_accumulation_steps >= 1, "gradient_accumulation_steps: expected 1 or more");
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let natural = |x: f64| x.is_finite() && x >= 0.0;
        require(positive(self.learning_rate), "learning_rate: expected a number above 0");
        require(natural(self.adam_weight_decay), "adam_weight_decay: expected 0 or more");
        require(positive(self.adam_epsilon), "adam_epsilon: expected a number above 0");
        require(positive(self.max_grad_norm), "max_grad_norm: expected a number above 0");
        require(natural(self.prior_loss_weight), "prior_loss_weight: expected 0 or more");
        require(natural(self.hra_lambda), "hra_lambda: expected 0 or more");
        require(
            self.hra_lambda == 0.0 || !self.gram_schmidt,
            "hra_lambda has no effect with gram_schmidt: use one of them",
        );
        require(self.snr_gamma.is_none_or(positive), "snr_gamma: expected a number above 0");
        require((0.0..1.0).contains(&self.adam_beta1), "adam_beta1: expected 0 up to 1");
        require((0.0..1.0).contains(&self.adam_beta2), "adam_beta2: expected 0 up to 1");
        require((0.0..1.0).contains(&self.ema_decay), "ema_decay: expected 0 up to 1");
        require(self.lr_warmup_steps >= 0, "lr_warmup_steps: expected 0 or more");
        require(
            natural(self.lr_num_cycles) && natural(self.lr_power),
            "lr_num_cycles and lr_power: expected 0 or more",
        );
        require(self.num_validation_images >= 1, "num_validation_images: expected 1 or more");
        require(self.validation_steps >= 1, "validation_steps: expected 1 or more");
        require(self.checkpointing_steps >= 1, "checkpointing_steps: expected 1 or more");
        require(self.checkpoints_total_limit != Some(0), "checkpoints_total_limit: expected 1 or more");
        require(self.log_every >= 1, "log_every: expected 1 or more");
        require(!self.target_modules.is_empty(), "target_modules: expected at least one name");
        problems.extend(self.hra().validate().err().map(|e| e.to_string()));
        problems.extend(TargetRule::from_words(&self.target_modules).err().map(|e| e.to_string()));
        if problems.is_empty() { Ok(()) } else { Err(Error::config(problems.join("\n"))) }
    }

    /// Fails with every setting that would change the steps that `before` has already made.
    pub fn check_resume(&self, before: &Self) -> Result<()> {
        let (new, old) = (self.to_table()?, before.to_table()?);
        let mut differences = Vec::new();
        let mut keys: Vec<&String> = new.keys().chain(old.keys()).collect();
        keys.sort();
        keys.dedup();
        for key in keys {
            let show = |v: Option<&toml::Value>| v.map_or("nothing".to_string(), ToString::to_string);
            if !FREE_ON_RESUME.contains(&key.as_str()) && new.get(key) != old.get(key) {
                differences.push(format!(
                    "{key}: the run has {}, asked for is {}",
                    show(old.get(key)),
                    show(new.get(key))
                ));
            }
        }
        if differences.is_empty() {
            let whole = [LrSchedule::Constant, LrSchedule::ConstantWithWarmup];
            if self.max_train_steps != before.max_train_steps && !whole.contains(&self.lr_scheduler) {
                eprintln!(
                    "note: the learning rate now follows its schedule over {} steps",
                    self.max_train_steps
                );
            }
            return Ok(());
        }
        Err(Error::Run(format!(
            "a resumed run continues with its own settings, but these differ\n{}\nhint: leave them out, or start a new run in another output_dir",
            differences.join("\n")
        )))
    }

    /// The adapter's settings.
    pub fn hra(&self) -> HraConfig {
        HraConfig {
            rank: self.rank,
            gram_schmidt: self.gram_schmidt,
            init: self.hra_init,
            allow_odd_rank: self.allow_odd_rank,
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

    /// The learning rate over the run.
    pub fn learning_rate(&self) -> LearningRate {
        // diffusers' scripts give lr_num_cycles to cosine_with_restarts only; cosine is half a period.
        let cycles = if self.lr_scheduler == LrSchedule::Cosine { 0.5 } else { self.lr_num_cycles };
        LearningRate {
            peak: self.learning_rate,
            schedule: self.lr_scheduler,
            warmup: self.lr_warmup_steps,
            total: self.max_train_steps,
            cycles,
            power: self.lr_power,
        }
    }

    fn to_table(&self) -> Result<toml::Table> {
        toml::Table::try_from(self)
            .map_err(|e| Error::config(format!("the settings cannot be written as TOML: {e}")))
    }
}

/// The settings as clap knows them.
fn arguments() -> clap::Command {
    TrainConfig::augment_args(clap::Command::new("train"))
}

/// `table` with the entries of `winner` in place of its own.
fn over(mut table: toml::Table, winner: &toml::Table) -> toml::Table {
    table.extend(winner.iter().map(|(key, value)| (key.clone(), value.clone())));
    table
}

/// A path that may be empty, which clap's own parser refuses.
fn any_path(text: &str) -> std::result::Result<PathBuf, std::convert::Infallible> {
    Ok(PathBuf::from(text))
}
