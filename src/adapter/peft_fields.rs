//! The fields of PEFT's `adapter_config.json`, as methods read and write their own.

use crate::adapter::blocks::Partition;
use serde_json::{Map, Value};

/// The fields of a config, and what is wrong with them.
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
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
        Self { map, text, problems: Vec::new(), notes: Vec::new() }
    }

    /// Says that `name` is not `what` it should be.
    pub fn expected(&mut self, name: &str, what: &str) {
        let found = self.map.get(name).map_or("nothing".into(), Value::to_string);
        self.problems.push(format!("{name}: expected {what}, found {found}"));
    }

    /// A field, unless it is missing or null.
    pub fn set(&self, name: &str) -> Option<&Value> {
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
