//! The fields of PEFT's `adapter_config.json`, as methods read and write their own.

use crate::adapter::blocks::Partition;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// PEFT release whose fields are known.
pub(super) const PEFT_VERSION: &str = "0.21.2";

/// Fields of PEFT's configs that say nothing of what the tensors mean: what a file is for, names of layers (the tensors tell
/// them), training alone (dropout, starts), and numbers that only settings use which are refused.
const OF_NO_EFFECT: [&str; 27] = [
    "auto_mapping",
    "base_model_name_or_path",
    "boft_dropout",
    "corda_config",
    "enable_lora",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_ia3_weights",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "module_dropout",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
];

/// Whether a field says nothing: null, false, zero or empty.
fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

/// What is to be said of a field that nothing here reads: a note where it only sets the size of something else (a number, a
/// word), a refusal where it switches something on; `None` where it is not set.
pub(super) fn unknown_field(name: &str, value: &Value) -> Option<Result<String, String>> {
    if is_neutral(value) || OF_NO_EFFECT.contains(&name) {
        return None;
    }
    Some(match value {
        Value::Number(_) | Value::String(_) => Ok(format!(
            "the setting `{name}` ({value}) is not one of PEFT {PEFT_VERSION}: it is taken to change nothing"
        )),
        _ => Err(format!(
            "`{name}`: expected a setting of PEFT {PEFT_VERSION}, found {value}, which may change what the tensors mean; if it does \
             not, write null in its place"
        )),
    })
}

/// The fields of a config, and what is wrong with them.
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Names of fields that were asked for.
    seen: RefCell<BTreeSet<String>>,
    /// The config itself, for what depends on the order of its keys.
    pub text: &'a str,
    /// What is wrong with the fields, one sentence each.
    pub problems: Vec<String>,
    /// What a user should know, one sentence each.
    pub notes: Vec<String>,
}

impl<'a> Fields<'a> {
    /// Of the config `map`, whose text is `text`.
    pub fn new(map: &'a Map<String, Value>, text: &'a str) -> Self {
        Self { map, seen: RefCell::default(), text, problems: Vec::new(), notes: Vec::new() }
    }

    /// Fields that are read from [`Self::text`].
    pub fn asked(&mut self, names: &[&str]) {
        self.seen.borrow_mut().extend(names.iter().map(|name| (*name).to_string()));
    }

    /// Says what is set in the config and was not asked for.
    pub(super) fn finish(&mut self) {
        let seen = self.seen.take();
        for (name, value) in self.map.iter().filter(|(name, _)| !seen.contains(*name)) {
            match unknown_field(name, value) {
                None => {}
                Some(Ok(note)) => self.notes.push(note),
                Some(Err(problem)) => self.problems.push(problem),
            }
        }
    }

    /// Says that `name` is not `what` it should be.
    pub fn expected(&mut self, name: &str, what: &str) {
        let found = self.map.get(name).map_or("nothing".into(), Value::to_string);
        self.problems.push(format!("{name}: expected {what}, found {found}"));
    }

    /// A field, unless it is missing or null.
    pub fn set(&self, name: &str) -> Option<&Value> {
        self.seen.borrow_mut().insert(name.to_string());
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// True or false; `default` where it is not set.
    pub fn flag(&mut self, name: &str, default: bool) -> bool {
        match self.set(name) {
            None => default,
            Some(Value::Bool(flag)) => *flag,
            Some(_) => {
                self.expected(name, "true or false");
                default
            }
        }
    }

    /// A whole number from 0 up; `default` where it is not set.
    pub fn integer(&mut self, name: &str, default: i64) -> i64 {
        match self.set(name).map(|value| value.as_i64().filter(|n| (0..=i64::from(i32::MAX)).contains(n))) {
            None => default,
            Some(Some(n)) => n,
            Some(None) => {
                self.expected(name, "a whole number");
                default
            }
        }
    }

    /// A whole number from 1 up, which must be set.
    pub fn positive(&mut self, name: &str) -> i64 {
        let n = self.integer(name, 0);
        if n < 1 {
            self.expected(name, "a positive number");
        }
        n.max(1)
    }

    /// A finite number; `default` where it is not set.
    pub fn number(&mut self, name: &str, default: f64) -> f64 {
        match self.set(name).map(|value| value.as_f64().filter(|x| x.is_finite())) {
            None => default,
            Some(Some(x)) => x,
            Some(None) => {
                self.expected(name, "a number");
                default
            }
        }
    }

    /// A field that must not be set: `why` says what it stands for.
    pub fn refuse(&mut self, name: &str, why: &str) {
        let empty = match self.set(name) {
            None | Some(Value::Bool(false)) => true,
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Object(map)) => map.is_empty(),
            Some(_) => false,
        };
        if !empty {
            let found = &self.map[name];
            self.problems.push(format!("{name}: expected none, found {found}: {why} cannot be used"));
        }
    }

    /// Blocks by their number or their size, of which the other is 0.
    pub fn partition(&mut self, blocks: &str, size: &str, default: i64) -> Partition {
        let (n, b) = (self.integer(blocks, 0), self.integer(size, default));
        match (n, b) {
            (n, 0) if n > 0 => Partition::Blocks(n),
            (0, b) if b > 0 => Partition::BlockSize(b),
            _ => {
                self.problems.push(format!(
                    "expected one of {blocks} and {size} to be 0 and the other positive, found {n} and {b}"
                ));
                Partition::Blocks(1)
            }
        }
    }
}

/// `(number of blocks, block size)` with 0 for the one that follows from the other.
pub(super) fn halves(partition: Partition) -> (i64, i64) {
    match partition {
        Partition::Blocks(n) => (n, 0),
        Partition::BlockSize(b) => (0, b),
    }
}

/// PEFT writes a factor as an integer where it is one.
pub(super) fn factor(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { Value::from(x as i64) } else { Value::from(x) }
}
