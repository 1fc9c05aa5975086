//! `rank_pattern` and `alpha_pattern` of PEFT's LoRA config: layers with another rank or alpha, by patterns of their names.

use crate::weights::tensor_file::list;
use std::collections::BTreeMap;

/// Far above the length of a layer's name: a pattern's memory while it is parsed is some hundred times its length.
const MAX_PATTERN: usize = 4096;
/// More patterns than any model has layers.
const MAX_PATTERNS: usize = 10_000;

/// A regular expression for the end of a layer's name, after a dot or whole (PEFT `get_pattern_key`); `None` if it is none, or
/// none that a file may ask for: a hostile file may hold many large ones.
pub(super) fn pattern(key: &str) -> Option<regex::Regex> {
    bounded(key, r"(?:.*\.)?")
}

/// The same for whole names (Python's `re.fullmatch`).
pub fn whole_pattern(key: &str) -> Option<regex::Regex> {
    bounded(key, "")
}

fn bounded(key: &str, before: &str) -> Option<regex::Regex> {
    if key.len() > MAX_PATTERN {
        return None;
    }
    let limit = 1 << 18;
    let whole = format!("^{before}(?:{key})$");
    regex::RegexBuilder::new(&whole).size_limit(limit).dfa_size_limit(limit).build().ok()
}

/// Layers of a LoRA, by name, that have another rank or alpha than most: PEFT's `rank_pattern` and `alpha_pattern`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Exceptions {
    /// r.
    pub rank: BTreeMap<String, i64>,
    /// alpha.
    pub alpha: BTreeMap<String, f64>,
}

/// The patterns as they stand in a file, in its order, of which the first that matches counts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Patterns {
    rank: Vec<(String, i64)>,
    alpha: Vec<(String, f64)>,
}

impl Patterns {
    /// From the text of a config: a JSON object of serde_json forgets the order of its keys. Errors: what was expected.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        #[derive(serde::Deserialize)]
        struct Both {
            rank_pattern: Option<Ordered<i64>>,
            alpha_pattern: Option<Ordered<f64>>,
        }
        let both: Both = serde_json::from_str(text).map_err(|e| {
            format!("rank_pattern, alpha_pattern: expected numbers by patterns of layer names, found {e}")
        })?;
        let rank = both.rank_pattern.map(|o| o.0).unwrap_or_default();
        let alpha = both.alpha_pattern.map(|o| o.0).unwrap_or_default();
        let most = rank.len().max(alpha.len());
        if most > MAX_PATTERNS {
            return Err(format!(
                "rank_pattern, alpha_pattern: expected at most {MAX_PATTERNS} entries, found {most}"
            ));
        }
        match rank.iter().find(|(_, r)| *r < 1) {
            Some((key, r)) => Err(format!("rank_pattern: expected positive numbers, found {r} for `{key}`")),
            None => Ok(Self { rank, alpha }),
        }
    }

    /// What the patterns say of these layers, each with its name as the file has it, by PEFT's rule: a key must match the name's end, after a dot or at its start
    /// (`get_pattern_key`); and a note on keys that match none. Errors: keys that are no regular expressions.
    pub(super) fn resolve(&self, layers: &[(&str, &str)]) -> Result<(Exceptions, Vec<String>), Vec<String>> {
        let (mut problems, mut notes) = (Vec::new(), Vec::new());
        let rank = first_matches("rank_pattern", &self.rank, layers, &mut problems, &mut notes);
        let alpha = first_matches("alpha_pattern", &self.alpha, layers, &mut problems, &mut notes);
        if problems.is_empty() { Ok((Exceptions { rank, alpha }, notes)) } else { Err(problems) }
    }
}

fn first_matches<T: Copy>(
    field: &str,
    patterns: &[(String, T)],
    layers: &[(&str, &str)],
    problems: &mut Vec<String>,
    notes: &mut Vec<String>,
) -> BTreeMap<String, T> {
    let (mut found, mut idle) = (BTreeMap::new(), Vec::new());
    for (key, value) in patterns {
        // One at a time, so that no more than one is in memory.
        match pattern(key) {
            Some(regex) => {
                let before = idle.len();
                idle.push(key.clone());
                for (layer, _) in layers.iter().filter(|(_, name)| regex.is_match(name)) {
                    found.entry((*layer).to_string()).or_insert(*value);
                    idle.truncate(before);
                }
            }
            None => {
                let start: String = key.chars().take(100).collect();
                problems.push(format!("{field}: `{start}` is not a regular expression that is understood"))
            }
        }
    }
    if !idle.is_empty() {
        notes.push(format!("{field} has keys that match no layer of the file: {}", list(&idle)));
    }
    found
}

/// The entries of a JSON object in their order.
struct Ordered<T>(Vec<(String, T)>);

impl<'de, T: serde::Deserialize<'de>> serde::Deserialize<'de> for Ordered<T> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OrderedEntries<T>(std::marker::PhantomData<T>);
        impl<'de, T: serde::Deserialize<'de>> serde::de::Visitor<'de> for OrderedEntries<T> {
            type Value = Ordered<T>;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Ordered(entries))
            }
        }
        deserializer.deserialize_map(OrderedEntries(std::marker::PhantomData))
    }
}
