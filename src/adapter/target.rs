//! Which layers an adapter is put on, by PEFT's rules.
//!
//! A list of names matches a layer whose name is one of them or ends with `.` and one of them; a single string is a
//! regular expression that must match the whole name (PEFT `tuners_utils.check_target_module_exists`).

use crate::error::{Error, Result};
use serde_json::Value;

/// The projections of every attention block: q, k, v and out, the layers that the HRA paper adapts.
pub const ATTENTION: [&str; 4] = ["to_q", "to_k", "to_v", "to_out.0"];

/// The same in a CLIP text encoder.
pub const TEXT_ATTENTION: [&str; 4] = ["q_proj", "k_proj", "v_proj", "out_proj"];

/// A rule that says which layer names match.
#[derive(Debug, Clone)]
pub enum TargetRule {
    /// Names or name endings.
    Suffixes(Vec<String>),
    /// A regular expression for whole names, with its text.
    Pattern(String, regex::Regex),
}

impl TargetRule {
    /// From words of a command line or config: one word with characters that no layer name has is a pattern.
    pub fn from_words(words: &[String]) -> Result<Self> {
        match words {
            [word] if word.contains(|c: char| "*+?()[]|\\^$".contains(c)) => Self::pattern(word),
            _ => Ok(Self::Suffixes(words.to_vec())),
        }
    }

    /// As PEFT writes it.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Suffixes(words) => Value::from(words.clone()),
            Self::Pattern(text, _) => Value::from(text.clone()),
        }
    }

    /// Words of a list that no layer of these names is meant by; lists of other programs name layers that are not there.
    pub fn idle_words(&self, names: &[String]) -> Vec<&str> {
        match self {
            Self::Suffixes(words) => {
                let idle = |word: &&String| !names.iter().any(|name| ends_with(name, word));
                words.iter().filter(idle).map(String::as_str).collect()
            }
            Self::Pattern(..) => Vec::new(),
        }
    }

    /// Whether a layer of this name is meant.
    pub fn matches(&self, name: &str) -> bool {
        match self {
            Self::Suffixes(words) => words.iter().any(|word| ends_with(name, word)),
            Self::Pattern(_, regex) => regex.is_match(name),
        }
    }

    fn pattern(text: &str) -> Result<Self> {
        let regex = regex::Regex::new(&format!("^(?:{text})$")).map_err(|e| {
            Error::config(format!("target_modules: `{text}` is not a regular expression: {e}"))
        })?;
        Ok(Self::Pattern(text.to_string(), regex))
    }
}

/// Whether a layer's name is `word`, or ends with a dot and `word`.
fn ends_with(name: &str, word: &str) -> bool {
    name == word || name.strip_suffix(word).is_some_and(|head| head.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0";

    #[test]
    fn a_list_matches_whole_names_and_endings_after_a_dot() {
        let rule = TargetRule::Suffixes(vec!["to_out.0".into(), "conv_in".into()]);
        assert!(rule.matches(LAYER));
        assert!(rule.matches("conv_in"));
        assert!(!rule.matches("my_conv_in"));
        assert!(!rule.matches("a.to_out.00"));
        assert_eq!(rule.idle_words(&[LAYER.to_string()]), ["conv_in"]);
    }

    #[test]
    fn a_string_matches_the_whole_name_as_a_pattern() {
        let rule = TargetRule::from_words(&[r".*attn1\.to_(q|out\.0)".into()]).unwrap();
        assert!(rule.matches(LAYER));
        assert!(!rule.matches(&format!("{LAYER}.base_layer")));
        assert!(!rule.matches("down.attn2.to_q"));
    }

    #[test]
    fn one_plain_word_is_a_name_and_a_broken_pattern_is_an_error() {
        let rule = TargetRule::from_words(&["to_q".into()]).unwrap();
        assert!(matches!(rule, TargetRule::Suffixes(_)));
        assert!(TargetRule::from_words(&["to_(q".into()]).is_err());
    }
}
