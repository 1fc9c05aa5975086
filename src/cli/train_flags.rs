//! The flags of the settings of a training, made from their table: names and defaults are the settings' own; what was typed goes
//! over the config files as one more table.

use crate::cli::choice::possible_values;
use crate::data::image::Background;
use crate::platform::device::DeviceChoice;
use crate::train::config::keys::ValueKind::{self, *};
use crate::train::config::keys::{KEYS, Key, defaults, keys, value};
use clap::builder::{PossibleValuesParser, TypedValueParser, ValueParser};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use toml::{Table, Value};

/// Reads the text of a value.
fn parser(kind: ValueKind) -> ValueParser {
    fn of<T: Into<Value> + 'static>(read: fn(&str) -> Result<T, String>) -> ValueParser {
        ValueParser::new(move |text: &str| read(text).map(Into::into))
    }
    fn number<T: std::str::FromStr<Err: ToString>>(text: &str) -> Result<T, String> {
        text.parse().map_err(|e: T::Err| e.to_string())
    }
    fn whole<T: std::str::FromStr<Err: ToString> + TryInto<i64>>(text: &str) -> Result<i64, String> {
        number::<T>(text)?.try_into().map_err(|_| format!("expected at most {}", i64::MAX))
    }
    match kind {
        Text | Texts | List => of(|text| Ok(text.to_string())),
        File | Files => of(|text| match text {
            "" => Err("a value is required".to_string()),
            _ => Ok(text.to_string()),
        }),
        Switch => PossibleValuesParser::new(["true", "false"]).map(|word| Value::from(word == "true")).into(),
        Count => of(whole::<u64>),
        Count32 => of(whole::<u32>),
        Whole => of(whole::<i64>),
        Whole32 => of(whole::<i32>),
        Number => of(number::<f64>),
        Numbers => of(|text| number::<f64>(text.trim())),
        Colour => of(|text| number::<Background>(text).map(|colour| colour.to_string())),
        Device => of(|text| number::<DeviceChoice>(text).map(|choice| choice.to_string())),
        Words(values) => {
            let values = possible_values(values());
            let names = values.clone();
            let own = move |word: String| {
                let found = names.iter().find(|value| value.matches(&word, false));
                Value::from(found.map_or(word.clone(), |value| value.get_name().to_string()))
            };
            PossibleValuesParser::new(values).map(own).into()
        }
    }
}

fn is_list(kind: ValueKind) -> bool {
    matches!(kind, Files | Texts | List)
}

/// A setting's flag as clap knows it; `defaults` are those of all settings.
fn arg(heading: &'static str, key: &Key, defaults: &Table) -> Arg {
    let help = match key.unset {
        "" | "not used" => key.about.to_string(),
        default => format!("{} [default: {default}]", key.about),
    };
    let name = if key.value_name.is_empty() { key.name.to_uppercase() } else { key.value_name.to_string() };
    let mut arg = Arg::new(key.name)
        .long(key.name.replace('_', "-"))
        .aliases(key.others.iter().map(|name| name.replace('_', "-")))
        .value_name(name)
        .value_parser(parser(key.kind))
        .help_heading(heading)
        .help(help);
    if is_list(key.kind) {
        arg = arg.action(ArgAction::Append);
    }
    if matches!(key.kind, List) {
        arg = arg.value_delimiter(',');
    }
    if matches!(key.kind, Numbers) {
        arg = arg.value_delimiter(',');
    }
    if matches!(key.kind, Switch) {
        arg = arg.require_equals(true).num_args(0..=1).default_missing_value("true");
    }
    match value(defaults, key) {
        Some(Value::String(text)) if text.is_empty() => arg.default_value("").hide_default_value(true),
        Some(Value::String(text)) => arg.default_value(text.clone()),
        Some(Value::Float(number)) => arg.default_value(number.to_string()),
        Some(Value::Array(values)) => arg
            .default_values(values.iter().filter_map(Value::as_str).map(str::to_string).collect::<Vec<_>>()),
        Some(value) => arg.default_value(value.to_string()),
        None => arg,
    }
}

/// Those settings that were typed.
#[derive(Debug, Clone)]
pub struct Typed(pub Table);

impl Args for Typed {
    fn augment_args(command: Command) -> Command {
        let defaults = defaults();
        let keys = KEYS.iter().flat_map(|(heading, keys)| keys.iter().map(move |key| (*heading, key)));
        keys.fold(command, |command, (heading, key)| command.arg(arg(heading, key, &defaults)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Typed {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut table = Table::new();
        for key in keys() {
            if matches.value_source(key.name) != Some(ValueSource::CommandLine) {
                continue;
            }
            let mut values: Vec<Value> =
                matches.get_many::<Value>(key.name).into_iter().flatten().cloned().collect();
            let several = is_list(key.kind) || matches!(key.kind, Numbers) && values.len() > 1;
            let value = if several { Some(Value::Array(values)) } else { values.pop() };
            key.section.of_mut(&mut table).extend(value.map(|value| (key.name.to_string(), value)));
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
    use crate::adapter::methods;
    use crate::platform::observer::Silent;
    use crate::train::config::TrainConfig;

    #[test]
    fn every_setting_can_be_typed_and_is_read() {
        for key in keys() {
            let word = match key.kind {
                Words(values) => values()[0].name.to_string(),
                Switch => "true".into(),
                Device => "cpu".into(),
                Number => "0.5".into(),
                Numbers => "0.5,0.25".into(),
                Count | Count32 | Whole | Whole32 => "3".into(),
                Colour => "black".into(),
                Text | File | Files | Texts | List => "text".into(),
            };
            let method = methods::having(key.name).next().map(|entry| format!("--method={}", entry.name));
            let typed = format!("--{}={word}", key.name.replace('_', "-"));
            let words = std::iter::once("train".to_string()).chain(method).chain([typed]);
            let matches = Typed::augment_args(Command::new("train")).try_get_matches_from(words);
            let typed =
                matches.and_then(|matches| Typed::from_arg_matches(&matches)).expect("it can be typed");
            let found = value(&typed.0, key).unwrap_or_else(|| panic!("{} is not in the table", key.name));
            let read =
                TrainConfig::merged(&[], &typed.0, &Silent).unwrap_or_else(|e| panic!("{}: {e}", key.name));
            let read = read.to_table().expect("settings are a table");
            assert_eq!(value(&read, key), Some(found), "{}", key.name);
        }
    }
}
