//! The flags of the settings of a training: one table, from which clap's arguments are made. Names and defaults are the settings'
//! own; what was typed goes over the config files as one more table.

use crate::adapter::methods::METHODS;
use crate::adapter::methods::hra::HraInit;
use crate::adapter::methods::lora::LoraInit;
use crate::adapter::peft::Bias;
use crate::cli::choice::possible_values;
use crate::data::pairs::ConditionKind;
use crate::diffusion::sampler::SamplerKind;
use crate::platform::device::{DeviceChoice, Precision};
use crate::train::config::{MethodName, SECOND_NAMES, TrainConfig, UNSET};
use crate::train::optim::LrSchedule;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser, ValueParser};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use toml::{Table, Value};

/// A flag of a setting.
struct Flag {
    /// The setting's name; the flag has hyphens for its underscores.
    key: &'static str,
    /// What the help calls the value; empty for the key itself.
    value_name: &'static str,
    kind: Kind,
    help: &'static str,
}

/// What the value of a flag is.
#[derive(Clone, Copy)]
enum Kind {
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
    Device,
    /// One of several words.
    Words(fn() -> Vec<PossibleValue>),
}
use Kind::*;

const fn flag(key: &'static str, value_name: &'static str, kind: Kind, help: &'static str) -> Flag {
    Flag { key, value_name, kind, help }
}

/// The flags by the headings of the help.
const FLAGS: &[(&str, &[Flag])] = &[
    (
        "Model and output",
        &[
            flag(
                "pretrained_model_name_or_path",
                "MODEL",
                Text,
                "Stable Diffusion to start from: folder, checkpoint file (.safetensors), or hub id owner/name[@revision]",
            ),
            flag(
                "model_config",
                "DIR",
                File,
                "Folder with what a checkpoint file does not say: tokenizer/, scheduler/, other parts' config.json",
            ),
            flag(
                "output_dir",
                "DIR",
                File,
                "Run folder: adapter, metrics, previews and checkpoints go there and nowhere else",
            ),
            flag("seed", "", Count, "Seed of every random draw of the run"),
            flag("device", "", Device, "auto, cpu, cuda or cuda:N"),
            flag(
                "dtype",
                "",
                Words(possible_values::<Precision>),
                "Number format of the frozen model; the adapter is always f32",
            ),
            flag("threads", "", Whole32, "CPU threads"),
        ],
    ),
    (
        "Subject",
        &[
            flag("instance_data_dir", "DIR", Text, "Folder with the pictures of the subject"),
            flag(
                "instance_prompt",
                "PROMPT",
                Text,
                "Prompt of the subject, with its rare token, such as \"a photo of sks dog\"",
            ),
            flag("resolution", "", Count32, "Pictures become squares of this many pixels"),
            flag(
                "center_crop",
                "",
                Switch,
                "Cut the middle out of pictures that are not square, instead of a random square",
            ),
            flag(
                "held_out_data_dir",
                "PATH",
                File,
                "Pictures of the subject (with --train_data_dir: pairs, of which 32 are measured) that are not trained on: their loss is measured with fixed noise",
            ),
        ],
    ),
    (
        "Control",
        &[
            flag(
                "train_data_dir",
                "PATH",
                File,
                "Train control, on pairs of picture and condition: a folder with metadata.jsonl or metadata.csv, or a .jsonl, .json or .csv file",
            ),
            flag("condition", "", Words(possible_values::<ConditionKind>), "What the conditions are"),
            flag(
                "make_conditions",
                "",
                Switch,
                "Make the conditions from the pictures (canny), even where the pairs name files",
            ),
            flag("canny_low", "", Number, "Lower threshold of edges that are made"),
            flag("canny_high", "", Number, "Upper threshold of edges that are made"),
            flag(
                "palette",
                "FILE",
                File,
                "Colours of the classes (JSON), by which label maps become conditions",
            ),
            flag("image_column", "", Text, "Column of the pictures"),
            flag("caption_column", "", Text, "Column of the captions"),
            flag("conditioning_image_column", "", Text, "Column of the conditions"),
            flag(
                "proportion_empty_prompts",
                "SHARE",
                Number,
                "Share of captions that are left out, so that the condition alone must do",
            ),
            flag("control_lr", "", Number, "Peak learning rate of the control encoder"),
            flag(
                "validation_image",
                "IMAGE",
                Files,
                "Condition of a preview: one for each validation prompt, or one for all [default: the first held-out pairs]",
            ),
        ],
    ),
    (
        "Prior preservation",
        &[
            flag(
                "with_prior_preservation",
                "",
                Switch,
                "Keep the class as it was: train on class pictures too",
            ),
            flag("class_prompt", "PROMPT", Text, "Prompt of the class, such as \"a photo of a dog\""),
            flag("class_data_dir", "DIR", File, "Folder of class pictures: your own, or empty to be filled"),
            flag("num_class_images", "", Count, "Number of class pictures that the model makes"),
            flag("prior_loss_weight", "", Number, "Weight of the class pictures' loss"),
            flag("sample_batch_size", "", Count, "Pictures drawn at once, class pictures and previews"),
            flag("class_steps", "", Count, "Steps for a class picture"),
            flag(
                "class_guidance",
                "",
                Number,
                "Guidance for a class picture; nearer to 1 is nearer to what the model knows of the class",
            ),
            flag(
                "class_scheduler",
                "",
                Words(possible_values::<SamplerKind>),
                "Scheduler for class pictures",
            ),
        ],
    ),
    (
        "Adapter",
        &[
            flag("method", "", Words(method_names), "Adaptation method"),
            flag(
                "rank",
                "",
                Whole,
                "Capacity: hra reflections (even), lora and dora rank; oft, coft, boft and ether+ split a layer's inputs into this many blocks",
            ),
            flag(
                "block_size",
                "SIZE",
                Whole,
                "oft, coft, boft, ether+: size of a block, in place of the number of blocks",
            ),
            flag("lora_alpha", "ALPHA", Number, "lora, dora: the change is scaled by alpha / rank"),
            flag("use_rslora", "", Switch, "lora, dora: scale by alpha / sqrt(rank) instead"),
            flag(
                "init_lora_weights",
                "",
                Words(possible_values::<LoraInit>),
                "lora, dora: how the down projection starts",
            ),
            flag(
                "coft_eps",
                "",
                Number,
                "coft: how far a block may turn; its ball has the radius eps * b^2 / sqrt(blocks)",
            ),
            flag(
                "hra_lambda",
                "",
                Number,
                "hra: weight of the orthogonality regulariser (the paper's lambda)",
            ),
            flag(
                "gram_schmidt",
                "",
                Switch,
                "hra: orthonormalise the vectors (the paper's lambda = infinity; PEFT's apply_GS)",
            ),
            flag(
                "hra_init",
                "",
                Words(possible_values::<HraInit>),
                "hra: start of the vectors: ours, whose best learning rate does not depend on the rank, or PEFT's draw",
            ),
            flag(
                "allow_odd_rank",
                "",
                Switch,
                "hra: train an odd rank although it cannot start at the base model",
            ),
            flag(
                "target_modules",
                "NAMES",
                List,
                "Layers of the UNet to adapt: name endings separated by commas, or one regular expression for whole names",
            ),
            flag(
                "init_adapter",
                "DIR",
                File,
                "Start from the values of this adapter folder (of the same method, rank and layers)",
            ),
            flag("train_text_encoder", "", Switch, "Train the text encoder too, by the same method"),
            flag("text_target_modules", "NAMES", List, "Layers of the text encoder to adapt"),
            flag(
                "bias",
                "",
                Words(possible_values::<Bias>),
                "Biases that train beside the adapter: none, all of the network, or only those of adapted layers",
            ),
        ],
    ),
    (
        "Optimisation",
        &[
            flag("max_train_steps", "", Whole, "Optimiser steps"),
            flag(
                "train_batch_size",
                "",
                Count,
                "Subject pictures for a step (with prior preservation, as many class pictures too)",
            ),
            flag(
                "gradient_accumulation_steps",
                "",
                Count,
                "Batches whose gradients are averaged for one step",
            ),
            flag("learning_rate", "", Number, "Peak learning rate"),
            flag("text_encoder_lr", "", Number, "Peak learning rate of the text encoder"),
            flag("lr_scheduler", "", Words(possible_values::<LrSchedule>), "Learning-rate schedule"),
            flag("lr_warmup_steps", "", Whole, "Steps of linear warm-up (all schedules but constant)"),
            flag("lr_num_cycles", "", Number, "Cycles of cosine_with_restarts"),
            flag("lr_power", "", Number, "Power of the polynomial schedule"),
            flag("adam_beta1", "", Number, "AdamW beta 1"),
            flag("adam_beta2", "", Number, "AdamW beta 2"),
            flag("adam_weight_decay", "", Number, "AdamW weight decay"),
            flag("adam_epsilon", "", Number, "AdamW epsilon"),
            flag("max_grad_norm", "", Number, "Gradients are scaled down to this norm"),
            flag("snr_gamma", "", Number, "Min-SNR weighting of the loss, 5.0 in its paper"),
            flag(
                "use_ema",
                "",
                Switch,
                "Average the adapter over steps; previews and the final adapter use the average",
            ),
            flag("ema_decay", "", Number, "Memory of that average"),
        ],
    ),
    (
        "Previews and checkpoints",
        &[
            flag("validation_prompt", "PROMPT", Texts, "Prompts of previews; may be given several times"),
            flag("num_validation_images", "", Count, "Pictures for each preview prompt; 0 for no previews"),
            flag(
                "validation_steps",
                "",
                Whole,
                "Steps between previews, and between measurements of the held-out loss",
            ),
            flag("validation_inference_steps", "", Count, "Sampling steps for a preview"),
            flag("validation_guidance", "", Number, "Guidance for previews"),
            flag("validation_scheduler", "", Words(possible_values::<SamplerKind>), "Scheduler for previews"),
            flag("checkpointing_steps", "", Whole, "Steps between checkpoints"),
            flag("checkpoints_total_limit", "", Count, "Checkpoints to keep"),
            flag(
                "log_every",
                "",
                Whole,
                "Steps between records of metrics.jsonl and TensorBoard; how far the weights moved is in every tenth, and with previews",
            ),
        ],
    ),
];

fn method_names() -> Vec<PossibleValue> {
    let values = METHODS.iter().map(|entry| PossibleValue::new(entry.name).help(entry.about));
    let none = PossibleValue::new(MethodName::NONE.name()).help("No adapter: the control encoder alone");
    values.chain([none]).collect()
}

impl Kind {
    /// Reads the text of a value.
    fn parser(self) -> ValueParser {
        fn of<T: Into<Value> + 'static>(read: fn(&str) -> Result<T, String>) -> ValueParser {
            ValueParser::new(move |text: &str| read(text).map(Into::into))
        }
        fn number<T: std::str::FromStr<Err: ToString>>(text: &str) -> Result<T, String> {
            text.parse().map_err(|e: T::Err| e.to_string())
        }
        fn whole<T: std::str::FromStr<Err: ToString> + TryInto<i64>>(text: &str) -> Result<i64, String> {
            number::<T>(text)?.try_into().map_err(|_| format!("expected at most {}", i64::MAX))
        }
        match self {
            Text | Texts | List => of(|text| Ok(text.to_string())),
            File | Files => of(|text| match text {
                "" => Err("a value is required".to_string()),
                _ => Ok(text.to_string()),
            }),
            Switch => {
                PossibleValuesParser::new(["true", "false"]).map(|word| Value::from(word == "true")).into()
            }
            Count => of(whole::<u64>),
            Count32 => of(whole::<u32>),
            Whole => of(whole::<i64>),
            Whole32 => of(whole::<i32>),
            Number => of(number::<f64>),
            Device => of(|text| number::<DeviceChoice>(text).map(|choice| choice.to_string())),
            Words(values) => {
                let values = values();
                let names = values.clone();
                let own = move |word: String| {
                    let found = names.iter().find(|value| value.matches(&word, false));
                    Value::from(found.map_or(word.clone(), |value| value.get_name().to_string()))
                };
                PossibleValuesParser::new(values).map(own).into()
            }
        }
    }

    fn is_list(self) -> bool {
        matches!(self, Files | Texts | List)
    }
}

impl Flag {
    /// As clap knows it; `defaults` are those of all settings.
    fn arg(&self, heading: &'static str, defaults: &Table) -> Arg {
        let second = SECOND_NAMES.iter().filter(|(_, own)| *own == self.key);
        let default = UNSET.iter().find(|(key, default)| *key == self.key && *default != "not used");
        let help = match default {
            Some((_, default)) => format!("{} [default: {default}]", self.help),
            None => self.help.to_string(),
        };
        let name =
            if self.value_name.is_empty() { self.key.to_uppercase() } else { self.value_name.to_string() };
        let mut arg = Arg::new(self.key)
            .long(self.key.replace('_', "-"))
            .aliases(second.map(|(name, _)| name.replace('_', "-")))
            .value_name(name)
            .value_parser(self.kind.parser())
            .help_heading(heading)
            .help(help);
        if self.kind.is_list() {
            arg = arg.action(ArgAction::Append);
        }
        if matches!(self.kind, List) {
            arg = arg.value_delimiter(',');
        }
        if matches!(self.kind, Switch) {
            arg = arg.require_equals(true).num_args(0..=1).default_missing_value("true");
        }
        match defaults.get(self.key) {
            Some(Value::String(text)) if text.is_empty() => arg.default_value("").hide_default_value(true),
            Some(Value::String(text)) => arg.default_value(text.clone()),
            Some(Value::Float(number)) => arg.default_value(number.to_string()),
            Some(Value::Array(values)) => arg.default_values(
                values.iter().filter_map(Value::as_str).map(str::to_string).collect::<Vec<_>>(),
            ),
            Some(value) => arg.default_value(value.to_string()),
            None => arg,
        }
    }
}

/// Those settings that were typed.
#[derive(Debug, Clone)]
pub struct Typed(pub Table);

impl Args for Typed {
    fn augment_args(command: Command) -> Command {
        let defaults = TrainConfig::default().to_table().unwrap_or_default();
        let flags = FLAGS.iter().flat_map(|(heading, flags)| flags.iter().map(move |flag| (*heading, flag)));
        flags.fold(command, |command, (heading, flag)| command.arg(flag.arg(heading, &defaults)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Typed {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut table = Table::new();
        for flag in FLAGS.iter().flat_map(|(_, flags)| flags.iter()) {
            if matches.value_source(flag.key) != Some(ValueSource::CommandLine) {
                continue;
            }
            let mut values = matches.get_many::<Value>(flag.key).into_iter().flatten().cloned();
            let value =
                if flag.kind.is_list() { Some(Value::Array(values.collect())) } else { values.next() };
            table.extend(value.map(|value| (flag.key.to_string(), value)));
        }
        Ok(Self(table))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_setting_has_a_flag_that_it_can_be_read_from() {
        let flags: BTreeSet<&str> =
            FLAGS.iter().flat_map(|(_, flags)| flags.iter().map(|flag| flag.key)).collect();
        // serde lists all fields, also those that are not set.
        let refused =
            toml::from_str::<TrainConfig>("nope = 1").expect_err("there is no such setting").to_string();
        let (_, listed) = refused.split_once("expected one of ").expect("a list");
        let settings: BTreeSet<&str> = listed.split('`').skip(1).step_by(2).collect();
        assert_eq!(flags, settings);
        assert!(SECOND_NAMES.iter().all(|(_, own)| settings.contains(own)));
        let defaults = TrainConfig::default().to_table().expect("settings are a table");
        let unset: BTreeSet<&str> = UNSET.iter().map(|(key, _)| *key).collect();
        assert_eq!(unset, settings.iter().copied().filter(|key| !defaults.contains_key(*key)).collect());

        for flag in FLAGS.iter().flat_map(|(_, flags)| flags.iter()) {
            let word = match flag.kind {
                Words(values) => values()[0].get_name().to_string(),
                Switch => "true".into(),
                Device => "cpu".into(),
                Number => "0.5".into(),
                Count | Count32 | Whole | Whole32 => "3".into(),
                Text | File | Files | Texts | List => "text".into(),
            };
            let words = ["train".to_string(), format!("--{}={word}", flag.key.replace('_', "-"))];
            let matches = Typed::augment_args(Command::new("train")).try_get_matches_from(words);
            let typed =
                matches.and_then(|matches| Typed::from_arg_matches(&matches)).expect("it can be typed");
            assert_eq!(typed.0.keys().collect::<Vec<_>>(), [flag.key]);
            let read = TrainConfig::merged(&[], &typed.0).unwrap_or_else(|e| panic!("{}: {e}", flag.key));
            let read = read.to_table().expect("settings are a table");
            assert_eq!(read[flag.key], typed.0[flag.key], "{}", flag.key);
        }
    }
}
