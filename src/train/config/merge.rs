//! Where the settings come from and go to: the command line over files over defaults, and the copy in a run folder.

use crate::adapter::methods;
use crate::error::{Error, Result};
use crate::platform::files;
use crate::platform::observer::Observer;
use crate::train::config::keys::{self, Key, Section, value};
use crate::train::config::{MethodName, TrainConfig};
use std::path::Path;
use toml::{Table, Value};

/// What is wrong with settings, a line each.
type Problems = Vec<String>;

impl TrainConfig {
    /// What was typed wins over `files`, of which a later one wins over an earlier one; the defaults come last. Where a method
    /// takes the place of another one, those settings of the other that it has not are left out, and that is told.
    pub fn merged(files: &[&Path], typed: &Table, observer: &dyn Observer) -> Result<Self> {
        Self::default().under(&Self::given(files, typed, observer)?, observer)
    }

    /// What files and the command line say together, as [`Self::merged`] has it, without defaults.
    pub fn given(files: &[&Path], typed: &Table, observer: &dyn Observer) -> Result<Table> {
        let mut given = Table::new();
        let mut add = |table: Table| {
            // Alone first: a mistake is told with the file it is in.
            let table = in_own_words(table)?;
            typed_values(&table)?;
            if names_method(&table) {
                let (method, own) = method_and_own(&table);
                method.map_or(Ok(Table::new()), |method| whole(method, &own))?;
            }
            over(&mut given, table).tell(observer);
            Ok::<_, Problems>(())
        };
        for path in files {
            let wrong = |problems: Problems| {
                let hint = "docs/settings.md lists the sections; keys are the long flags of `hra train --help`, with underscores";
                Error::format(path, problems.join("\n")).with_hint(hint)
            };
            let table: Table = toml::from_str(&read_typed(path)?)
                .map_err(|e| wrong(vec![e.to_string().trim_end().to_string()]))?;
            if TABLES_OF_COMPARISONS.iter().any(|name| table.contains_key(*name)) {
                let problem = "expected the settings of one training, found those of a comparison";
                let word = files::shell_word(&path.to_string_lossy());
                return Err(Error::format(path, problem).with_hint(format!("hra compare {word}")));
            }
            add(table).map_err(wrong)?;
        }
        add(typed.clone()).map_err(refused)?;
        Ok(given)
    }

    /// These settings where `given`, as [`Self::given`] returns it, says nothing.
    pub fn under(&self, given: &Table, observer: &dyn Observer) -> Result<Self> {
        let mut merged = self.to_table()?;
        over(&mut merged, given.clone()).tell(observer);
        Self::from_sections(merged).map_err(refused)
    }

    /// The same with all of the method's own settings, defaults where they are not set.
    pub(crate) fn whole(mut self) -> Result<Self> {
        self.adapter.own = whole(self.adapter.method, &self.adapter.own).map_err(refused)?;
        Ok(self)
    }

    /// Reads a resolved config, as a run folder holds it.
    pub fn read(path: &Path) -> Result<Self> {
        let problem = |problem: String| Error::format(path, problem);
        let table: Table = toml::from_str(&files::read_to_string(path)?)
            .map_err(|e| problem(e.to_string().trim_end().to_string()))?;
        // A run of an earlier version has no sections, and names the settings of all methods.
        let table = if table.values().any(Value::is_table) { table } else { in_sections(table) };
        let read = in_own_words(table).and_then(Self::from_sections);
        read.map_err(|problems| problem(problems.join("\n")))
    }

    /// The settings that a table says for several methods: those of methods alone are left to the methods, unless it names one.
    pub fn common(table: &Table) -> Result<Self> {
        let mut table = Self::own_words(table)?;
        typed_values(&table).map_err(refused)?;
        if !names_method(&table) {
            Section::Adapter.of_mut(&mut table).retain(|name, _| !is_some_methods(name));
        }
        Self::from_sections(table).map_err(refused)
    }

    /// What [`Self::from_tables`] leaves out, because the method of a later table has it not.
    pub fn left_out(tables: &[&Table]) -> Result<Vec<String>> {
        Self::laid_over(tables).map(|(_, left_out)| left_out)
    }

    /// The settings of several tables, of which a later one wins over an earlier one, over the defaults.
    pub fn from_tables(tables: &[&Table]) -> Result<Self> {
        Self::from_sections(Self::laid_over(tables)?.0).map_err(refused)
    }

    /// The tables as one, and what was left out for it.
    fn laid_over(tables: &[&Table]) -> Result<(Table, Vec<String>)> {
        let (mut merged, mut left_out) = (Table::new(), Vec::new());
        for table in tables {
            left_out.extend(over(&mut merged, Self::own_words(table)?).left_out);
        }
        Ok((merged, left_out))
    }

    /// The settings of a table in sections by their own names, where other programs call them otherwise. Errors: what is no
    /// setting, or stands where it does not belong.
    pub fn own_words(table: &Table) -> Result<Table> {
        in_own_words(table.clone()).map_err(refused)
    }

    /// As a config file. What is not set is named in a comment, with what happens then.
    pub fn to_toml(&self) -> Result<String> {
        let cannot = |e| Error::config(format!("the settings cannot be written as TOML: {e}"));
        let mut text = toml::to_string(self).map_err(cannot)?;
        let table = self.to_table()?;
        let method = self.adapter.method.name();
        for key in keys::keys().filter(|key| !key.unset.is_empty() && value(&table, key).is_none()) {
            if belongs_to(method, key.name) {
                text += &format!("# {} is not set: {}\n", key.place(), key.unset);
            }
        }
        Ok(text)
    }

    /// As a table of a config file.
    pub fn to_table(&self) -> Result<Table> {
        Table::try_from(self)
            .map_err(|e| Error::config(format!("the settings cannot be written as TOML: {e}")))
    }

    /// From sections with the settings' own names.
    fn from_sections(mut table: Table) -> std::result::Result<Self, Problems> {
        let mut problems = typed_values(&table).err().unwrap_or_default();
        let (method, own) = method_and_own(&table);
        if let (Some(method), true) = (method, problems.is_empty()) {
            match whole(method, &own) {
                Ok(own) => Section::Adapter.of_mut(&mut table).extend(own),
                Err(more) => problems.extend(more),
            }
        }
        if problems.is_empty() {
            // Each value was read alone before.
            return table.try_into().map_err(|e: toml::de::Error| vec![e.message().to_string()]);
        }
        Err(problems)
    }
}

/// What the file of a comparison has, and no training: its topics, and how they are drawn.
const TABLES_OF_COMPARISONS: [&str; 5] = ["subject", "dreambooth", "control", "draw", "train"];

/// The text of a config file that the user named.
fn read_typed(path: &Path) -> Result<String> {
    files::read_to_string(path).map_err(|error| match path.exists() {
        true => error,
        false => error.with_hint(
            "words without a flag are config files; put a text of several words between quotes, and write --switch=false",
        ),
    })
}

/// Problems that belong to no file.
fn refused(problems: Problems) -> Error {
    Error::config(problems.join("\n"))
}

/// Every key by its own name, where other programs call it otherwise. Errors: a line for each key that is no setting, or stands
/// where it does not belong.
fn in_own_words(table: Table) -> std::result::Result<Table, Problems> {
    let (mut read, mut problems) = (Table::new(), Problems::new());
    for (name, value) in table {
        match (Section::find(&name), value) {
            (Some(section), Value::Table(settings)) => {
                let own = section.of_mut(&mut read);
                for (name, value) in settings {
                    match keys::find(&name) {
                        Some(key) if key.section == section => {
                            if own.insert(key.name.to_string(), value).is_some() {
                                problems.push(twice(key));
                            }
                        }
                        found => problems.push(misplaced(section, &name, found)),
                    }
                }
            }
            (Some(_), value) => {
                let flat = keys::find(&name)
                    .map_or_else(String::new, |key| format!("; write {} = {value}", key.place()));
                problems
                    .push(format!("{name}: expected a section [{name}], found {}{flat}", value.type_str()));
            }
            (None, Value::Table(_)) if keys::find(&name).is_none() => {
                let near = Section::nearest(&name).map_or_else(
                    || format!("the sections are [{}]", Section::names().collect::<Vec<_>>().join("], [")),
                    |nearest| format!("the nearest is [{nearest}]"),
                );
                problems.push(format!("[{name}]: unknown section; {near}"));
            }
            (None, value) => match keys::find(&name) {
                Some(key) if key.section == Section::Run => {
                    if read.insert(key.name.to_string(), value).is_some() {
                        problems.push(twice(key));
                    }
                }
                found => problems.push(misplaced(Section::Run, &name, found)),
            },
        }
    }
    if problems.is_empty() { Ok(read) } else { Err(problems) }
}

/// Says that a setting is there by two of its names.
fn twice(key: &Key) -> String {
    format!("{}: given twice, by two of its names: {}, {}", key.place(), key.name, key.others.join(", "))
}

/// Says where a setting belongs, or which one comes nearest.
fn misplaced(section: Section, name: &str, found: Option<&Key>) -> String {
    let place = section.name().map_or_else(|| name.to_string(), |section| format!("[{section}] {name}"));
    if let Some(key) = found {
        return match key.section {
            Section::Run => format!("{place}: it stands before the first section: {}", key.name),
            _ if section == Section::Run => format!("{place}: settings have sections now: {}", key.place()),
            _ => format!("{place}: it belongs to another section: {}", key.place()),
        };
    }
    let near = keys::nearest(name, section).map(|key| format!("; the nearest is {}", key.place()));
    format!("{place}: unknown field{}", near.unwrap_or_default())
}

/// `table` without sections, as earlier versions wrote it, in sections: of the methods' own settings those of its method.
fn in_sections(table: Table) -> Table {
    let method = table.get("method").and_then(Value::as_str).map(str::to_string);
    let own = |name: &str| method.as_deref().is_none_or(|method| belongs_to(method, name));
    let (mut sections, mut unknown) = (Table::new(), Table::new());
    for (name, value) in table {
        match keys::find(&name) {
            Some(key) if key.section == Section::Adapter && !own(key.name) => {}
            Some(key) if Section::find(&name).is_none() => {
                key.section.of_mut(&mut sections).insert(name, value);
            }
            _ => {
                unknown.insert(name, value);
            }
        }
    }
    // They are told where the sections are read.
    sections.extend(unknown);
    sections
}

/// Whether a setting of `[adapter]` means something to the method of this name.
fn belongs_to(method: &str, name: &str) -> bool {
    methods::having(name).any(|entry| entry.name == method) || !is_some_methods(name)
}

/// Whether a setting is some method's own, and not one that all methods have.
fn is_some_methods(name: &str) -> bool {
    methods::having(name).next().is_some()
}

/// What a method left out that took the place of another one.
struct MethodReplaced {
    by: String,
    left_out: Vec<String>,
}

impl MethodReplaced {
    fn tell(self, observer: &dyn Observer) {
        if !self.left_out.is_empty() {
            observer.note(&format!("method {} has no {}: left out", self.by, self.left_out.join(", ")));
        }
    }
}

/// Whether a table in sections says which method it is for.
fn names_method(table: &Table) -> bool {
    table.get("adapter").is_some_and(|adapter| adapter.get("method").is_some())
}

/// Puts the settings of `winner` in place of those of `table`.
fn over(table: &mut Table, winner: Table) -> MethodReplaced {
    let (before, _) = method_and_own(table);
    let mut replaced = MethodReplaced { by: String::new(), left_out: Vec::new() };
    for (name, value) in winner {
        match (Section::find(&name), value) {
            (Some(section), Value::Table(settings)) => {
                let own = section.of_mut(table);
                if section == Section::Adapter
                    && let Some(method) = settings.get("method").and_then(Value::as_str)
                    && before.map(MethodName::name) != Some(method)
                {
                    replaced.by = method.to_string();
                    replaced.left_out = own.keys().filter(|key| !belongs_to(method, key)).cloned().collect();
                    own.retain(|key, _| belongs_to(method, key));
                }
                own.extend(settings);
            }
            (_, value) => {
                table.insert(name, value);
            }
        }
    }
    replaced
}

/// The method that a table names, else the default one, and what it says of the methods' own settings; no method where its
/// word is none.
fn method_and_own(table: &Table) -> (Option<MethodName>, Table) {
    let adapter = table.get("adapter").and_then(Value::as_table).cloned().unwrap_or_default();
    let method = match adapter.get("method").map(Value::as_str) {
        None => Some(MethodName::DEFAULT),
        Some(word) => word.and_then(|word| word.parse().ok()),
    };
    let own = adapter.into_iter().filter(|(name, _)| is_some_methods(name));
    (method, own.collect())
}

/// All of a method's own settings, with defaults for those that are not given. Errors: a line for each that is not its own.
fn whole(method: MethodName, own: &Table) -> std::result::Result<Table, Problems> {
    let foreign: Problems =
        own.keys().filter(|name| !belongs_to(method.name(), name)).map(|name| foreign(name)).collect();
    match method.entry() {
        _ if !foreign.is_empty() => Err(foreign),
        None => Ok(Table::new()),
        Some(entry) => (entry.own.whole)(own).map_err(|e| vec![format!("[adapter] {}", e.message())]),
    }
}

/// Says whose setting it is.
fn foreign(name: &str) -> String {
    let of: Vec<&str> = methods::having(name).map(|entry| entry.name).collect();
    match &of[..] {
        [one] => format!("[adapter] {name}: only method {one} has it"),
        _ => format!("[adapter] {name}: only the methods {} have it", of.join(", ")),
    }
}

/// Reads every value alone, so that what is wrong is told with its place. Errors: a line for each of another type, or out of
/// its words.
fn typed_values(table: &Table) -> std::result::Result<(), Problems> {
    let mut problems = Problems::new();
    for key in keys::keys() {
        let Some(found) = value(table, key) else { continue };
        let alone = Table::from_iter([(key.name.to_string(), found.clone())]);
        let read = match (methods::having(key.name).next(), key.section.name()) {
            (Some(entry), _) => (entry.own.whole)(&alone).map(|_| ()),
            (None, Some(section)) => Table::from_iter([(section.to_string(), Value::Table(alone))])
                .try_into::<TrainConfig>()
                .map(|_| ()),
            (None, None) => alone.try_into::<TrainConfig>().map(|_| ()),
        };
        if let Err(error) = read {
            let problem = match error.message() {
                // serde's words are for programmers.
                text if text.starts_with("invalid type")
                    || text.starts_with("invalid value")
                    || text == key.kind.expected() =>
                {
                    format!("expected {}, found {found}", key.kind.expected())
                }
                text => text.to_string(),
            };
            problems.push(format!("{}: {problem}", key.place()));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}
