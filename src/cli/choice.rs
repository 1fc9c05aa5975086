//! Flags whose value is one of several words.

use crate::platform::choice::{Choice, Word, words};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

/// The words as clap lists them.
pub fn possible_values(words: Vec<Word>) -> Vec<PossibleValue> {
    let value = |word: Word| {
        let value = PossibleValue::new(word.name).aliases(word.others.iter().copied());
        if word.about.is_empty() { value } else { value.help(word.about) }
    };
    words.into_iter().map(value).collect()
}

/// Reads one of the words.
pub fn choice<T: Choice + Send + Sync>() -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(possible_values(words::<T>()))
        .try_map(|word| T::find(&word).ok_or_else(|| format!("there is no `{word}`")))
}
