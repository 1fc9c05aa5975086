//! PEFT's settings of a LoRA, as diffusers puts them into a file's metadata (`lora_adapter_metadata`, JSON): of one model, or
//! of several with the model's name before each field.

use crate::adapter::peft_fields::unknown_field;
use crate::adapter::peft_patterns::pattern;
use crate::weights::part::Part;
use regex::Regex;
use serde_json::{Map, Value};

/// More entries than any model has layers; all are in memory at once.
const MAX_PATTERNS: usize = 2_000;

/// Fields that change what a LoRA does in a way that is not done here, where they are set.
const NOT_DONE: [&str; 14] = [
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// Fields that are read.
const READ: [&str; 7] =
    ["alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "r", "rank_pattern", "use_rslora"];

/// Starts that leave the base weights as they are; others (PiSSA, CorDA, LoftQ ..) change them.
const PLAIN_STARTS: [&str; 4] = ["gaussian", "kaiming", "eva", "orthogonal"];

/// Where diffusers keeps PEFT's settings.
pub(super) const METADATA: &str = "lora_adapter_metadata";

/// What scales the layers of one part.
#[derive(Debug)]
pub struct LoraFileSettings {
    rank: Option<i64>,
    alpha: f64,
    ranks: Vec<(Regex, f64)>,
    alphas: Vec<(Regex, f64)>,
    rank_stabilised: bool,
    /// Whether the layers have magnitudes.
    pub dora: bool,
    /// What a user should know, one sentence each.
    pub notes: Vec<String>,
}

impl LoraFileSettings {
    /// The settings for `part` in `text`; none if the text is of other parts. The error is every problem.
    pub fn read(text: &str, part: Part) -> Result<Option<Self>, Vec<String>> {
        let whole: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| vec![format!("metadata `{METADATA}`: not JSON: {e}")])?;
        let prefixed = |part: Part| -> Map<String, Value> {
            let start = format!("{}.", part.folder());
            whole.iter().filter_map(|(k, v)| Some((k.strip_prefix(&start)?.to_string(), v.clone()))).collect()
        };
        let own = prefixed(part);
        let fields = match part {
            // Without a name they are those of the UNet, which alone writes so (`unet.save_lora_adapter`).
            Part::UNet if Part::ADAPTED.into_iter().all(|part| prefixed(part).is_empty()) => whole,
            _ => own,
        };
        if fields.is_empty() { Ok(None) } else { Self::from_fields(&fields).map(Some) }
    }

    fn from_fields(fields: &Map<String, Value>) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        let field = |name: &str| fields.get(name).filter(|value| !value.is_null());
        for name in NOT_DONE {
            let set = field(name).is_some_and(|value| match value {
                Value::Bool(set) => *set,
                Value::Array(list) => !list.is_empty(),
                Value::Object(map) => !map.is_empty(),
                _ => true,
            });
            if set {
                problems.push(format!("setting `{name}` is {}, which is not done here", fields[name]));
            }
        }
        let mut notes = Vec::new();
        let others =
            fields.iter().filter(|(name, _)| !NOT_DONE.iter().chain(&READ).any(|known| known == name));
        for said in others.filter_map(|(name, value)| unknown_field(name, value)) {
            match said {
                Ok(note) => notes.push(note),
                Err(problem) => problems.push(format!("setting {problem}")),
            }
        }
        if let Some(kind) = field("peft_type").and_then(Value::as_str).filter(|kind| *kind != "LORA") {
            problems.push(format!("setting `peft_type`: expected LORA, found {kind}"));
        }
        if let Some(bias) = field("bias").and_then(Value::as_str).filter(|bias| *bias != "none") {
            problems
                .push(format!("setting `bias` is {bias}: trained biases are read from PEFT folders only"));
        }
        if let Some(start) = field("init_lora_weights").and_then(Value::as_str)
            && !PLAIN_STARTS.contains(&start)
        {
            problems.push(format!(
                "setting `init_lora_weights` is {start}: the LoRA belongs to base weights that this start has changed"
            ));
        }
        let mut number = |name: &str| {
            let value = field(name)?;
            let number = value.as_f64().filter(|n| n.is_finite());
            if number.is_none() {
                problems.push(format!("setting `{name}`: expected a number, found {value}"));
            }
            number
        };
        let rank = number("r").map(|r| r as i64);
        let alpha = number("lora_alpha").unwrap_or(8.0); // PEFT's default
        let mut patterns = |name: &str| {
            let Some(Value::Object(map)) = field(name) else { return Vec::new() };
            if map.len() > MAX_PATTERNS {
                problems.push(format!(
                    "setting `{name}`: expected at most {MAX_PATTERNS} entries, found {}",
                    map.len()
                ));
                return Vec::new();
            }
            let mut found = Vec::new();
            for (key, value) in map {
                match (pattern(key), value.as_f64().filter(|n| n.is_finite())) {
                    (Some(regex), Some(value)) => found.push((regex, value)),
                    _ => problems.push(format!("setting `{name}`: cannot use the entry `{key}`: {value}")),
                }
            }
            found
        };
        let (ranks, alphas) = (patterns("rank_pattern"), patterns("alpha_pattern"));
        let flag = |name: &str| field(name).and_then(Value::as_bool).unwrap_or(false);
        let (rank_stabilised, dora) = (flag("use_rslora"), flag("use_dora"));
        let settings = Self { rank, alpha, ranks, alphas, rank_stabilised, dora, notes };
        if problems.is_empty() { Ok(settings) } else { Err(problems) }
    }

    /// Alpha and scale of a layer whose tensors have rank `rank`; the error is a rank that the settings do not say.
    pub fn scale(&self, layer: &str, rank: i64) -> Result<(f64, f64), String> {
        let of =
            |patterns: &[(Regex, f64)]| patterns.iter().find(|(p, _)| p.is_match(layer)).map(|(_, v)| *v);
        let expected = of(&self.ranks).map(|r| r as i64).or(self.rank);
        if let Some(expected) = expected.filter(|expected| *expected != rank) {
            return Err(format!("the file's settings say rank {expected}, its tensors have rank {rank}"));
        }
        let alpha = of(&self.alphas).unwrap_or(self.alpha);
        let divisor = if self.rank_stabilised { (rank as f64).sqrt() } else { rank as f64 };
        Ok((alpha, alpha / divisor))
    }
}
