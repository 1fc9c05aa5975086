//! Flags whose value is one of several words.

use crate::platform::choice::Choice;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

/// The words as clap lists them.
pub fn possible_values<T: Choice>() -> Vec<PossibleValue> {
    let value = |choice: &crate::platform::choice::Named<T>| {
        let value = PossibleValue::new(choice.name).aliases(choice.others.iter().copied());
        if choice.about.is_empty() { value } else { value.help(choice.about) }
    };
    T::CHOICES.iter().map(value).collect()
}

/// Reads one of the words.
pub fn choice<T: Choice + Send + Sync>() -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(possible_values::<T>())
        .try_map(|word| T::find(&word).ok_or_else(|| format!("there is no `{word}`")))
}
