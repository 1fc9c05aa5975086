//! Every setting of a training in one table: its section in a config file, its name, which is diffusers' word, and what it is.
//! The command line makes its flags of it.

use crate::adapter::methods::METHODS;
use crate::adapter::methods::hra::HraInit;
use crate::adapter::methods::lora::LoraInit;
use crate::adapter::peft::Bias;
use crate::data::pairs::ConditionKind;
use crate::diffusion::sampler::SamplerKind;
use crate::platform::choice::{Word, words};
use crate::platform::precision::Precision;
use crate::train::config::{MethodName, TrainConfig};
use crate::train::optim::LrSchedule;
use crate::weights::prediction::Prediction;
use toml::{Table, Value};

/// A section of a config file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// What stands before the first section.
    Run,
    Model,
    Data,
    Prior,
    Adapter,
    Optimizer,
    Schedule,
    Previews,
    Checkpoints,
}

impl Section {
    /// Those with a name.
    const NAMED: [(Self, &'static str); 8] = [
        (Self::Model, "model"),
        (Self::Data, "data"),
        (Self::Prior, "prior"),
        (Self::Adapter, "adapter"),
        (Self::Optimizer, "optimizer"),
        (Self::Schedule, "schedule"),
        (Self::Previews, "previews"),
        (Self::Checkpoints, "checkpoints"),
    ];

    /// Its name in a file; `None` for what stands before the first.
    pub fn name(self) -> Option<&'static str> {
        Self::NAMED.iter().find(|(section, _)| *section == self).map(|(_, name)| *name)
    }

    /// The name of the section that someone who wrote `name` may have meant.
    pub fn nearest(name: &str) -> Option<&'static str> {
        let names = Self::NAMED.iter().map(|(_, own)| (likeness(own, name), *own));
        names.filter(|(likeness, _)| *likeness >= LIKE).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, own)| own)
    }

    /// The names of all.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::NAMED.iter().map(|(_, own)| *own)
    }

    /// The section of this name.
    pub fn find(name: &str) -> Option<Self> {
        Self::NAMED.iter().find(|(_, own)| *own == name).map(|(section, _)| *section)
    }

    /// Its part of a file, made where there is none; the whole file for what stands before the first section.
    pub fn of_mut(self, file: &mut Table) -> &mut Table {
        let Some(name) = self.name() else { return file };
        let entry = file.entry(name).or_insert_with(|| Value::Table(Table::new()));
        entry.as_table_mut().expect("sections are tables")
    }
}

/// Names less alike than this (Jaro and Winkler's measure, 1 for the same) are not taken for one another's misspelling.
const LIKE: f64 = 0.8;

fn likeness(own: &str, name: &str) -> f64 {
    strsim::jaro_winkler(own, name)
}

/// The setting that someone who wrote `name` in `section` may have meant.
pub fn nearest(name: &str, section: Section) -> Option<&'static Key> {
    let of = |key: &Key| {
        let names = std::iter::once(&key.name).chain(key.others);
        let nearest = names.map(|own| likeness(own, name)).fold(0.0, f64::max);
        // Among equals that of the same section.
        (nearest >= LIKE).then_some(nearest + if key.section == section { 1e-3 } else { 0.0 })
    };
    let alike = keys().filter_map(|key| Some((of(key)?, key)));
    alike.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, key)| key)
}

/// The value of a setting in a file.
pub fn value<'a>(file: &'a Table, key: &Key) -> Option<&'a Value> {
    match key.section.name() {
        Some(section) => file.get(section)?.get(key.name),
        None => file.get(key.name),
    }
}

/// A setting.
pub struct Key {
    pub section: Section,
    /// Its name in a file; its flag has hyphens for the underscores.
    pub name: &'static str,
    /// What the help calls the value; empty for the name itself.
    pub value_name: &'static str,
    pub kind: ValueKind,
    /// What it is, for whoever has to choose.
    pub about: &'static str,
    /// Names of other programs, which are accepted too.
    pub others: &'static [&'static str],
    /// What happens where it is not set; empty for a setting that has a default value.
    pub unset: &'static str,
    pub in_comparison: InComparison,
}

/// Whose a setting is in a comparison of methods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InComparison {
    /// The same for all methods.
    Common,
    /// Each method may have its own.
    MethodsOwn,
    /// The comparison sets it itself.
    SetByIt,
    /// How pairs are read: as [`Self::Common`], but a comparison of control says it with each set of pairs.
    OfPairs,
}

/// What a value is.
#[derive(Clone, Copy)]
pub enum ValueKind {
    /// Any text, also none.
    Text,
    /// A path, not empty.
    File,
    /// A path, several times.
    Files,
    /// A text, several times.
    Texts,
    /// Texts, separated by commas.
    List,
    /// With no value it is on.
    Switch,
    /// A whole number from 0 up.
    Count,
    Count32,
    /// A whole number.
    Whole,
    Whole32,
    Number,
    /// A number, or several separated by commas.
    Numbers,
    Device,
    /// A [`Background`](crate::data::image::Background).
    Colour,
    /// One of several words.
    Words(fn() -> Vec<Word>),
}
use ValueKind::*;

impl ValueKind {
    /// What messages expect in a file.
    pub fn expected(self) -> &'static str {
        match self {
            Text | File | Device | Colour | Words(_) => "a text between quotes",
            Files | Texts | List => "a list of texts, such as [\"a\", \"b\"]",
            Switch => "true or false",
            Count | Count32 => "a whole number from 0 up",
            Whole | Whole32 => "a whole number",
            Number => "a number",
            Numbers => "a number, or a list of numbers",
        }
    }
}

impl Key {
    /// How messages call it: `[optimizer] learning_rate`.
    pub fn place(&self) -> String {
        self.section
            .name()
            .map_or_else(|| self.name.to_string(), |section| format!("[{section}] {}", self.name))
    }

    /// Whether it is called so, by its own name or by another program's.
    pub fn is_called(&self, name: &str) -> bool {
        self.name == name || self.others.contains(&name)
    }

    const fn also(mut self, others: &'static [&'static str]) -> Self {
        self.others = others;
        self
    }

    const fn of_comparison(mut self) -> Self {
        self.in_comparison = InComparison::SetByIt;
        self
    }

    const fn of_pairs(mut self) -> Self {
        self.in_comparison = InComparison::OfPairs;
        self
    }

    const fn of_method(mut self) -> Self {
        self.in_comparison = InComparison::MethodsOwn;
        self
    }

    const fn unset(mut self, then: &'static str) -> Self {
        self.unset = then;
        self
    }
}

const fn key(
    section: Section,
    name: &'static str,
    value_name: &'static str,
    kind: ValueKind,
    about: &'static str,
) -> Key {
    Key {
        section,
        name,
        value_name,
        kind,
        about,
        others: &[],
        unset: "",
        in_comparison: InComparison::Common,
    }
}

/// All settings, by the headings of the help.
pub const KEYS: &[(&str, &[Key])] = &[
    (
        "Model and output",
        &[
            key(Section::Model, "pretrained_model_name_or_path", "MODEL", Text, "Stable Diffusion to start from: folder, checkpoint file (.safetensors), or hub id owner/name[@revision]").also(&["model"]),
            key(Section::Model, "model_config", "DIR", File, "Folder with what a checkpoint file does not say: tokenizer/, scheduler/, other parts' config.json").unset("not used"),
            key(Section::Model, "vae", "VAE", File, "VAE in place of the model's own: folder of diffusers', file (diffusers' keys, or those of checkpoints), or hub id").also(&["pretrained_vae_model_name_or_path"]).unset("the model's"),
            key(Section::Model, "vae_dtype", "", Words(words::<Precision>), "Number format of the VAE; f16 computes in f32 where its config asks for that (force_upcast)").unset("f32"),
            key(Section::Model, "prediction", "", Words(words::<Prediction>), "What the model predicts").also(&["prediction_type"]).unset("what its files say"),
            key(Section::Run, "output_dir", "DIR", File, "Run folder: adapter, metrics, previews and checkpoints go there and nowhere else").also(&["output"]).of_comparison(),
            key(Section::Run, "seed", "", Count, "Seed of every random draw of the run").of_comparison(),
            key(Section::Run, "device", "", Device, "auto, cpu, cuda or cuda:N"),
            key(Section::Model, "dtype", "", Words(words::<Precision>), "Number format of the frozen model at rest; a CPU computes in f32 what it is slow in (f16, and bf16 without AMX); the adapter is always f32").also(&["mixed_precision"]),
            key(Section::Run, "threads", "", Whole32, "CPU threads, 1024 at most, also for reading pictures; those that wait for work soon sleep, unless OMP_WAIT_POLICY or GOMP_SPINCOUNT says otherwise").unset("libtorch's choice"),
        ],
    ),
    (
        "Subject",
        &[
            key(Section::Data, "instance_data_dir", "DIR", Text, "Folder with the pictures of the subject").of_comparison(),
            key(Section::Data, "instance_prompt", "PROMPT", Text, "Prompt of the subject, with its rare token, such as \"a photo of sks dog\"").of_comparison(),
            key(Section::Data, "resolution", "", Count32, "Pictures become squares of this many pixels").unset("what the model was trained at"),
            key(Section::Data, "center_crop", "", Switch, "Cut the middle out of pictures that are not square, instead of a random square"),
            key(Section::Data, "background", "COLOUR", Colour, "Colour behind pictures with transparent parts: white, black, grey or #rrggbb"),
            key(Section::Data, "held_out_data_dir", "PATH", File, "Pictures of the subject (with --train_data_dir: pairs, of which 32 are measured) that are not trained on: their loss is measured with fixed noise").unset("not used").of_comparison(),
        ],
    ),
    (
        "Control",
        &[
            key(Section::Data, "train_data_dir", "PATH", File, "Train control, on pairs of picture and condition: a folder with metadata.jsonl or metadata.csv, or a .jsonl, .json or .csv file").unset("not used").of_comparison(),
            key(Section::Data, "condition", "", Words(words::<ConditionKind>), "What the conditions are").of_pairs(),
            key(Section::Data, "make_conditions", "", Switch, "Make the conditions from the pictures (canny), even where the pairs name files").of_pairs(),
            key(Section::Data, "canny_low", "", Number, "Lower threshold of edges that are made").of_pairs(),
            key(Section::Data, "canny_high", "", Number, "Upper threshold of edges that are made").of_pairs(),
            key(Section::Data, "palette", "FILE", File, "Colours of the classes (JSON), by which label maps become conditions").of_pairs().unset("not used"),
            key(Section::Data, "image_column", "", Text, "Column of the pictures").of_pairs(),
            key(Section::Data, "caption_column", "", Text, "Column of the captions").of_pairs(),
            key(Section::Data, "conditioning_image_column", "", Text, "Column of the conditions").of_pairs(),
            key(Section::Data, "strict_paths", "", Switch, "Refuse pairs whose files lie outside the folder of their table (absolute paths, `..`, links)").of_pairs(),
            key(Section::Data, "proportion_empty_prompts", "SHARE", Number, "Share of captions that are left out, so that the condition alone must do"),
            key(Section::Optimizer, "control_lr", "", Number, "Peak learning rate of the control encoder").unset("that of the UNet").of_method(),
            key(Section::Previews, "validation_image", "IMAGE", Files, "Condition of a preview: one for each validation prompt, or one for all [default: the first held-out pairs]").of_comparison(),
        ],
    ),
    (
        "Prior preservation",
        &[
            key(Section::Prior, "with_prior_preservation", "", Switch, "Keep the class as it was: train on class pictures too"),
            key(Section::Prior, "class_prompt", "PROMPT", Text, "Prompt of the class, such as \"a photo of a dog\"").of_comparison(),
            key(Section::Prior, "class_data_dir", "DIR", File, "Folder of class pictures: your own, or empty to be filled").unset("class_images in the run folder").of_comparison(),
            key(Section::Prior, "num_class_images", "", Count, "Number of class pictures that the model makes"),
            key(Section::Prior, "prior_loss_weight", "", Number, "Weight of the class pictures' loss"),
            key(Section::Prior, "sample_batch_size", "", Count, "Pictures drawn at once, class pictures and previews; in a batch of another size pixels may be off by a level of 255"),
            key(Section::Prior, "class_steps", "", Count, "Steps for a class picture"),
            key(Section::Prior, "class_guidance", "", Number, "Guidance for a class picture; nearer to 1 is nearer to what the model knows of the class"),
            key(Section::Prior, "class_scheduler", "", Words(words::<SamplerKind>), "Scheduler for class pictures").unset("the model's"),
        ],
    ),
    (
        "Adapter",
        &[
            key(Section::Adapter, "method", "", Words(method_words), "Adaptation method").of_method(),
            key(Section::Adapter, "rank", "", Whole, "Capacity: hra and hra-magnitude reflections (even), hra-free directions, lora and dora rank; oft, coft, boft and ether+ split a layer's inputs into this many blocks").also(&["hra_r", "network_dim"]).of_method(),
            key(Section::Adapter, "block_size", "SIZE", Whole, "oft, coft, boft, ether+: size of a block, in place of the number of blocks").also(&["oft_block_size", "boft_block_size"]).unset("not used").of_method(),
            key(Section::Adapter, "lora_alpha", "ALPHA", Number, "lora, dora: the change is scaled by alpha / rank").also(&["network_alpha"]).unset("the rank").of_method(),
            key(Section::Adapter, "use_rslora", "", Switch, "lora, dora: scale by alpha / sqrt(rank) instead").of_method(),
            key(Section::Adapter, "init_lora_weights", "", Words(words::<LoraInit>), "lora, dora: how the down projection starts").of_method(),
            key(Section::Adapter, "coft_eps", "", Number, "coft: how far a block may turn; its ball has the radius eps * b^2 / sqrt(blocks)").also(&["eps", "oft_eps"]).of_method(),
            key(Section::Adapter, "hra_lambda", "", Number, "hra, hra-magnitude: weight of the orthogonality regulariser (the paper's lambda)").also(&["lambda"]).of_method(),
            key(Section::Adapter, "gram_schmidt", "", Switch, "hra, hra-magnitude: orthonormalise the vectors (the paper's lambda = infinity; PEFT's apply_GS)").also(&["apply_gs", "apply_GS", "hra_apply_gs", "hra_apply_GS"]).of_method(),
            key(Section::Adapter, "hra_init", "", Words(words::<HraInit>), "hra, hra-magnitude: start of the vectors: ours, within the same bound at every rank, or PEFT's draw").of_method(),
            key(Section::Adapter, "allow_odd_rank", "", Switch, "hra, hra-magnitude: train an odd rank although it cannot start at the base model").of_method(),
            key(Section::Adapter, "target_modules", "NAMES", List, "Layers of the UNet to adapt: name endings separated by commas, or one regular expression for whole names").of_method(),
            key(Section::Adapter, "init_adapter", "DIR", File, "Start from the values of this adapter folder (of the same method, rank and layers)").unset("not used").of_comparison(),
            key(Section::Adapter, "train_text_encoder", "", Switch, "Train the text encoder too (of Stable Diffusion XL both), by the same method").of_method(),
            key(Section::Adapter, "text_target_modules", "NAMES", List, "Layers of the text encoders to adapt").of_method(),
            key(Section::Adapter, "bias", "", Words(words::<Bias>), "Biases that train beside the adapter: none, all of the network, or only those of adapted layers").also(&["hra_bias", "lora_bias"]).of_method(),
        ],
    ),
    (
        "Optimisation",
        &[
            key(Section::Schedule, "max_train_steps", "", Whole, "Optimiser steps"),
            key(Section::Schedule, "train_batch_size", "", Count, "Subject pictures for a step (with prior preservation, as many class pictures too)"),
            key(Section::Schedule, "gradient_accumulation_steps", "", Count, "Batches whose gradients are averaged for one step"),
            key(Section::Optimizer, "learning_rate", "", Number, "Peak learning rate").also(&["lr", "unet_lr"]).of_method(),
            key(Section::Optimizer, "text_encoder_lr", "RATE", Numbers, "Peak learning rate of the text encoders: one for all, or with a comma one for each of Stable Diffusion XL's").also(&["learning_rate_text"]).unset("that of the UNet").of_method(),
            key(Section::Schedule, "lr_scheduler", "", Words(words::<LrSchedule>), "Learning-rate schedule"),
            key(Section::Schedule, "lr_warmup_steps", "", Whole, "Steps of linear warm-up (all schedules but constant)"),
            key(Section::Schedule, "lr_num_cycles", "", Number, "Cycles of cosine_with_restarts"),
            key(Section::Schedule, "lr_power", "", Number, "Power of the polynomial schedule"),
            key(Section::Optimizer, "adam_beta1", "", Number, "AdamW beta 1"),
            key(Section::Optimizer, "adam_beta2", "", Number, "AdamW beta 2"),
            key(Section::Optimizer, "adam_weight_decay", "", Number, "AdamW weight decay"),
            key(Section::Optimizer, "adam_epsilon", "", Number, "AdamW epsilon"),
            key(Section::Optimizer, "max_grad_norm", "", Number, "Gradients are scaled down to this norm"),
            key(Section::Optimizer, "snr_gamma", "", Number, "Min-SNR weighting of the loss, 5.0 in its paper").also(&["min_snr_gamma"]).unset("off"),
            key(Section::Optimizer, "use_ema", "", Switch, "Average the adapter over steps; previews and the final adapter use the average"),
            key(Section::Optimizer, "ema_decay", "", Number, "Memory of that average"),
        ],
    ),
    (
        "Previews and checkpoints",
        &[
            key(Section::Previews, "validation_prompt", "PROMPT", Texts, "Prompts of previews; may be given several times").of_comparison(),
            key(Section::Previews, "num_validation_images", "", Count, "Pictures for each preview prompt; 0 for no previews").of_comparison(),
            key(Section::Previews, "validation_steps", "", Whole, "Steps between previews, and between measurements of the held-out loss").of_comparison(),
            key(Section::Previews, "validation_inference_steps", "", Count, "Sampling steps for a preview").of_comparison(),
            key(Section::Previews, "validation_guidance", "", Number, "Guidance for previews").of_comparison(),
            key(Section::Previews, "validation_scheduler", "", Words(words::<SamplerKind>), "Scheduler for previews").of_comparison().unset("the model's"),
            key(Section::Checkpoints, "checkpointing_steps", "", Whole, "Steps between checkpoints"),
            key(Section::Checkpoints, "checkpoints_total_limit", "", Count, "Checkpoints to keep").unset("all").of_comparison(),
            key(Section::Checkpoints, "log_every", "", Whole, "Steps between records of metrics.jsonl and TensorBoard; how far the weights moved is in every tenth, and with previews"),
        ],
    ),
];

/// All settings, in the order of [`KEYS`].
pub fn keys() -> impl Iterator<Item = &'static Key> {
    KEYS.iter().flat_map(|(_, keys)| keys.iter())
}

/// What settings are where nothing is said, those of every method among them, as one file; those that may be left out are not
/// in it.
pub fn defaults() -> Table {
    let mut file = TrainConfig::default().to_table().unwrap_or_default();
    let adapter = Section::Adapter.of_mut(&mut file);
    // Of methods that share a setting, the first says its value.
    for entry in METHODS.iter().rev() {
        adapter.extend((entry.own.whole)(&Table::new()).unwrap_or_default());
    }
    file
}

/// The setting of this name, its own or another program's.
pub fn find(name: &str) -> Option<&'static Key> {
    keys().find(|key| key.is_called(name))
}

fn method_words() -> Vec<Word> {
    let words = METHODS.iter().map(|entry| Word { name: entry.name, others: &[], about: entry.about });
    let about = "No adapter: the control encoder alone";
    words.chain([Word { name: MethodName::NONE.name(), others: &[], about }]).collect()
}
