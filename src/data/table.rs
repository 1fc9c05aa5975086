//! The table of a set of pairs: which picture, caption and condition belong together, line by line.
//!
//! Read are `metadata.jsonl` and `metadata.csv` of a Hugging Face image folder (`file_name`, `text`,
//! `conditioning_image`), and JSON lines or one JSON array of ControlNet's `{source, target, prompt}` (`source` is the
//! condition) and of CelebA's `{image, prompt}`, in which OFT's and HRA's data sets are given. Paths are relative to the
//! folder of the table; those that lead out of it are told, or refused.

use std::fmt;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::data::caption::bounded;
use crate::data::pair_settings::{COLUMNS, PairSettings};
use crate::platform::files::{self, Kind};
use crate::platform::observer::Observer;
use crate::{Error, Result};

/// The tables that are looked for in a folder.
const NAMES: [&str; 2] = ["metadata.jsonl", "metadata.csv"];
/// What columns are called in ControlNet's and CelebA's forms.
const OTHER_NAMES: [&[&str]; 3] = [&["target", "image"], &["prompt"], &["source"]];

/// A table and its rows.
pub struct Table {
    /// Its file; paths are relative to the folder of that.
    pub file: PathBuf,
    /// In their order.
    pub rows: Vec<Row>,
}

/// A line of a table.
pub struct Row {
    /// Where it is, such as `line 3`.
    pub place: String,
    /// What it says, or why that is no pair.
    pub entry: std::result::Result<TableEntry, String>,
}

/// What a row says.
pub struct TableEntry {
    /// Path of the picture.
    pub image: String,
    /// Empty where the row has nothing in its column.
    pub caption: String,
    /// Path of the condition.
    pub condition: Option<String>,
    /// Whether its caption is the first of several.
    pub first_of_several: bool,
}

impl Table {
    /// The folder to which its paths are relative.
    pub fn root(&self) -> &Path {
        self.file.parent().unwrap_or(Path::new(""))
    }

    /// Says once how many pictures, and `conditions` where they are read, lie outside the table's folder; where `strict`, that is
    /// an [`ErrorKind::Data`](crate::ErrorKind::Data). A table from elsewhere can so name any file that its reader may read.
    pub fn confine(&self, strict: bool, conditions: bool, observer: &dyn Observer) -> Result<()> {
        let root = if self.root().as_os_str().is_empty() { Path::new(".") } else { self.root() };
        let whole = root.canonicalize().map_err(|e| Error::io("find", root, e))?;
        let named = self.rows.iter().filter_map(|row| Some((&row.place, row.entry.as_ref().ok()?)));
        let paths = named.flat_map(|(place, entry)| {
            let condition = entry.condition.as_ref().filter(|_| conditions);
            std::iter::once(&entry.image).chain(condition).map(move |path| (place, path))
        });
        let mut outside = paths.filter(|(_, path)| leads_out(path, root, &whole));
        let Some((place, first)) = outside.next() else { return Ok(()) };
        let (more, table) = (outside.count(), self.file.display());
        let one = format!("{place} names `{first}`");
        let found = if more == 0 { one } else { format!("{one}, and {more} more do so") };
        if strict {
            let problem =
                format!("{table}: expected files in the folder of the table, found others: {found}");
            let hint = "leave strict_paths out if you trust the table, or put the files into its folder";
            return Err(Error::data(problem).with_hint(hint));
        }
        observer.note(&format!(
            "{table}: files outside the folder of the table are read: {found} (strict_paths refuses that)"
        ));
        Ok(())
    }
}

/// Whether a table in the folder `root`, which is at `whole`, names a file outside of it by `path`: an absolute one, by `..`, or
/// through a link.
fn leads_out(path: &str, root: &Path, whole: &Path) -> bool {
    if let Ok(found) = root.join(path).canonicalize() {
        return !found.starts_with(whole);
    }
    // Nothing is there yet that could be followed.
    let mut depth = 0;
    Path::new(path).components().any(|part| {
        depth += match part {
            Component::Normal(_) => 1,
            Component::ParentDir => -1,
            Component::CurDir => 0,
            Component::RootDir | Component::Prefix(_) => return true,
        };
        depth < 0
    })
}

/// The table of a folder of pictures, by the usual columns; `None` where the folder has none.
///
/// Errors: two tables, an empty one, one that cannot be trusted as a whole.
pub fn of_pictures(dir: &Path) -> Result<Option<Table>> {
    if !NAMES.iter().any(|name| dir.join(name).is_file()) {
        return Ok(None);
    }
    read(dir, &PairSettings::default()).map(Some)
}

/// Reads the table at `path`, or that of the folder at `path`.
pub(super) fn read(path: &Path, settings: &PairSettings) -> Result<Table> {
    let file = find(path)?;
    let text = files::read_to_string(&file)?;
    let text = text.trim_start_matches('\u{feff}');
    let columns = Columns::new(settings);
    let is_csv = has_ending(&file, "csv");
    let rows = if is_csv {
        csv_rows(text, &columns).map_err(|problem| Error::format(&file, problem))?
    } else if text.trim_start().starts_with('[') {
        let entries: Vec<TableFields> =
            serde_json::from_str(text).map_err(|e| Error::format(&file, format!("broken JSON: {e}")))?;
        let numbered = entries.into_iter().zip(1..);
        numbered
            .map(|(fields, n)| Row { place: format!("entry {n}"), entry: columns.entry(fields) })
            .collect()
    } else {
        let numbered = text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty());
        numbered
            .map(|(line, n)| Row { place: format!("line {n}"), entry: json_line(line, &columns) })
            .collect()
    };
    if rows.is_empty() {
        return Err(Error::format(&file, "expected pairs of picture and condition, found an empty table"));
    }
    Ok(Table { file, rows })
}

fn has_ending(path: &Path, ending: &str) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case(ending))
}

/// The table that `path` is or that lies in it.
fn find(path: &Path) -> Result<PathBuf> {
    const FORMS: &str = "metadata.jsonl or metadata.csv with file_name, text and conditioning_image, or give a \
                         .jsonl, .json or .csv file";
    match files::kind(path) {
        Some(Kind::File) if ["jsonl", "json", "csv"].iter().any(|e| has_ending(path, e)) => Ok(path.into()),
        Some(Kind::File | Kind::Other) => Err(Error::format(
            path,
            "expected a folder of pairs, or their table as a .jsonl, .json or .csv file, found another kind of file",
        )),
        None => Err(Error::data(format!(
            "expected a folder of pairs or their table, found nothing at {}",
            path.display()
        ))
        .with_hint("paths are relative to the folder in which hra is started")),
        Some(Kind::Folder) => {
            let found: Vec<PathBuf> =
                NAMES.iter().map(|name| path.join(name)).filter(|file| file.is_file()).collect();
            match &found[..] {
                [one] => Ok(one.clone()),
                [] => {
                    let parquet = path.join("metadata.parquet").is_file();
                    let deeper = files::list_dir(path)?.into_iter().find(|entry| {
                        entry.kind == Kind::Folder && NAMES.iter().any(|name| entry.path.join(name).is_file())
                    });
                    let hint = match deeper {
                        Some(entry) => format!("its folder {} has one: give that", entry.path.display()),
                        None if parquet => {
                            "metadata.parquet cannot be read: write it as metadata.jsonl (pandas: to_json with \
                             orient=\"records\", lines=True)".into()
                        }
                        None => format!("put {FORMS}"),
                    };
                    Err(Error::format(path, "expected a table of pairs, found none").with_hint(hint))
                }
                _ => Err(Error::format(path, "expected one table, found metadata.jsonl and metadata.csv")
                    .with_hint("give the path of one of them")),
            }
        }
    }
}

/// The names under which picture, caption and condition are looked for.
struct Columns<'a>([Vec<&'a str>; 3]);

impl<'a> Columns<'a> {
    /// A name that the user chose stands alone; the usual one also has those of the other forms.
    fn new(settings: &'a PairSettings) -> Self {
        let own = [&settings.image_column, &settings.caption_column, &settings.conditioning_image_column];
        Self(std::array::from_fn(|i| {
            let mut names = vec![own[i].as_str()];
            if own[i] == COLUMNS[i] {
                names.extend(OTHER_NAMES[i]);
            }
            names
        }))
    }

    /// What the columns of one row say.
    fn entry(&self, TableFields(fields): TableFields) -> std::result::Result<TableEntry, String> {
        let mut taken: [Option<Value>; 3] = [None, None, None];
        let keys: Vec<&str> = fields.iter().map(|(key, _)| key.as_str()).collect();
        let places: [Option<usize>; 3] = std::array::from_fn(|i| {
            self.0[i].iter().find_map(|name| keys.iter().position(|key| key == name))
        });
        for (i, place) in places.into_iter().enumerate() {
            let Some(place) = place else { continue };
            if keys.iter().filter(|key| **key == keys[place]).count() > 1 {
                return Err(format!("`{}` is there more than once", keys[place]));
            }
            taken[i] = Some(fields[place].1.clone());
        }
        let missing = |i: usize| {
            let list = if keys.is_empty() { "none".to_string() } else { keys.join(", ") };
            format!("expected a column `{}`, found {list}", self.0[i][0])
        };
        let [image, caption, condition] = taken;
        let image = match image.ok_or_else(|| missing(0))? {
            Value::String(path) if !path.is_empty() => path,
            other => return Err(format!("expected a file name as picture, found {}", kind_of(&other))),
        };
        let (caption, first_of_several) = caption_of(caption.ok_or_else(|| missing(1))?)?;
        let condition = match condition {
            None | Some(Value::Null) => None,
            Some(Value::String(path)) => (!path.is_empty()).then_some(path),
            Some(other) => {
                return Err(format!("expected a file name as condition, found {}", kind_of(&other)));
            }
        };
        Ok(TableEntry { image, caption, condition, first_of_several })
    }
}

/// The caption that is used, and whether it is the first of several; nothing is an empty one.
fn caption_of(value: Value) -> std::result::Result<(String, bool), String> {
    match value {
        Value::Null => Ok((String::new(), false)),
        Value::String(text) => Ok((caption(&text)?, false)),
        Value::Array(texts) => {
            let several = texts.len() > 1;
            match texts.into_iter().next() {
                None => Ok((String::new(), false)),
                Some(Value::String(text)) => Ok((caption(&text)?, several)),
                Some(other) => Err(format!("expected texts as captions, found {}", kind_of(&other))),
            }
        }
        other => Err(format!("expected a text as caption, found {}", kind_of(&other))),
    }
}

/// A caption without the space around it; an error for one that no model reads.
fn caption(text: &str) -> std::result::Result<String, String> {
    let text = text.trim();
    bounded(text).map(|()| text.to_string())
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(text) if text.is_empty() => "an empty text",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn json_line(line: &str, columns: &Columns) -> std::result::Result<TableEntry, String> {
    let fields = serde_json::from_str(line).map_err(|e| format!("broken JSON: {e}"))?;
    columns.entry(fields)
}

/// The keys of a JSON object in their order, those that come twice too: a map would keep the last and say nothing.
struct TableFields(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for TableFields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = TableFields;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object with a picture and a caption")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<TableFields, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(TableFields(fields))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

/// The rows of a CSV table with a header; an error where the table as a whole cannot be trusted.
fn csv_rows(text: &str, columns: &Columns) -> std::result::Result<Vec<Row>, String> {
    // A quote that is never closed makes one field of the rest of the table, and no reader of CSV complains. Then this
    // line, put after the end, is in that field.
    const END: &str = "end";
    let text = text.as_bytes().chain(b"\n".as_slice()).chain(END.as_bytes());
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(text);
    let header = reader.headers().map_err(|e| e.to_string())?.clone();
    let mut rows = Vec::new();
    let mut end_seen = None;
    for record in reader.into_records() {
        let record = record.map_err(|e| e.to_string())?;
        let line = record.position().map_or(0, csv::Position::line);
        end_seen = if record == [END][..] { Ok(()) } else { Err(line) }.into();
        let value = |text: &str| Value::String(text.to_string());
        let entry = if record.len() == header.len() {
            columns
                .entry(TableFields(header.iter().map(str::to_string).zip(record.iter().map(value)).collect()))
        } else {
            Err(format!("expected {} fields, found {}", header.len(), record.len()))
        };
        rows.push(Row { place: format!("line {line}"), entry });
    }
    match end_seen {
        Some(Ok(())) => {
            rows.pop();
            Ok(rows)
        }
        Some(Err(line)) => Err(format!("a quote that line {line} opens is never closed")),
        // The header took it, or there is none.
        None => Ok(rows),
    }
}
