//! Which files conditions are made of: those of a folder, or those that its metadata names, with their captions.

use crate::error::{Error, Result};
use crate::files::{self, Kind};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::path::{Component, Path, PathBuf};

/// Endings of files that describe pictures and are none.
const TEXTS: [&str; 5] = ["txt", "json", "jsonl", "csv", "toml"];

/// A file that a condition is made of.
pub struct Source {
    /// Name of the condition in the output, without an ending; may have folders.
    pub name: PathBuf,
    /// The picture, map or point file.
    pub path: PathBuf,
    /// The picture that it belongs to; the same file for edges.
    pub picture: Option<PathBuf>,
    /// What the metadata says of the picture.
    pub caption: Option<String>,
}

/// A file that no condition is made of.
pub struct Bad {
    /// Where it is, or should be.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

impl Bad {
    pub fn new(path: &Path, reason: impl Into<String>) -> Self {
        Self { path: path.to_path_buf(), reason: reason.into() }
    }
}

impl fmt::Display for Bad {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.reason)
    }
}

/// What was found.
#[derive(Default)]
pub struct Sources {
    pub sources: Vec<Source>,
    pub bad: Vec<Bad>,
}

/// A row of a folder's metadata.
#[derive(Deserialize)]
struct Row {
    file_name: String,
    text: Option<Caption>,
}

/// Some data sets have several captions of a picture; the first is taken.
#[derive(Deserialize)]
#[serde(untagged)]
enum Caption {
    One(String),
    Several(Vec<String>),
}

impl Row {
    fn caption(self) -> String {
        match self.text {
            Some(Caption::One(text)) => text,
            Some(Caption::Several(texts)) => texts.into_iter().next().unwrap_or_default(),
            None => String::new(),
        }
    }
}

impl Sources {
    /// The pictures of a folder: those that its metadata names, or else all.
    pub fn of_pictures(dir: &Path) -> Result<Self> {
        let mut found = Self::default();
        if let Some((metadata, rows)) = metadata(dir)? {
            for (line, row) in rows {
                match row {
                    Err(problem) => found.bad.push(Bad::new(&metadata, format!("line {line}: {problem}"))),
                    Ok(row) => {
                        let path = dir.join(&row.file_name);
                        let name = inside(Path::new(&row.file_name));
                        if path.is_file() {
                            let caption = Some(row.caption());
                            found.sources.push(Source { name, picture: Some(path.clone()), path, caption });
                        } else {
                            let reason =
                                format!("named in line {line} of {}, is not there", metadata.display());
                            found.bad.push(Bad::new(&path, reason));
                        }
                    }
                }
            }
            return Ok(found);
        }
        for path in listed(dir, |end| !TEXTS.contains(&end))? {
            let name = inside(Path::new(path.file_name().unwrap_or_default()));
            found.sources.push(Source { name, picture: Some(path.clone()), path, caption: None });
        }
        Ok(found)
    }

    /// The files of `dir`, maps or points, each with the picture of its name; a folder in the picture's name is one of `dir`
    /// where that has it.
    pub fn beside(dir: &Path, pictures: Option<&Path>) -> Result<Self> {
        // Points may be in text files, metadata is not about points.
        let listed = |dir: &Path| listed(dir, |end| !["jsonl", "csv", "toml"].contains(&end));
        let Some(pictures) = pictures else {
            let source = |path: PathBuf| {
                let name = inside(Path::new(path.file_name().unwrap_or_default()));
                Source { name, path, picture: None, caption: None }
            };
            return Ok(Self { sources: listed(dir)?.into_iter().map(source).collect(), bad: Vec::new() });
        };
        let of_pictures = Self::of_pictures(pictures)?;
        let mut found = Self { sources: Vec::new(), bad: of_pictures.bad };
        let mut folders: BTreeMap<PathBuf, BTreeMap<OsString, PathBuf>> = BTreeMap::new();
        let mut used = BTreeSet::new();
        for picture in of_pictures.sources {
            let parent = picture.name.parent().filter(|parent| !parent.as_os_str().is_empty());
            let within = parent.map(|parent| dir.join(parent)).filter(|path| path.is_dir());
            let folder = within.unwrap_or_else(|| dir.to_path_buf());
            if !folders.contains_key(&folder) {
                let stem = |path: PathBuf| (path.file_stem().unwrap_or_default().to_os_string(), path);
                folders.insert(folder.clone(), listed(&folder)?.into_iter().map(stem).collect());
            }
            let stem = picture.name.file_name().unwrap_or_default();
            match folders.get(&folder).and_then(|files| files.get(stem)) {
                Some(path) => {
                    used.insert(path.clone());
                    found.sources.push(Source { path: path.clone(), ..picture });
                }
                None => found.bad.push(Bad::new(
                    &picture.path,
                    format!("expected a file of its name in {}, found none", folder.display()),
                )),
            }
        }
        for path in folders.values().flat_map(BTreeMap::values).filter(|path| !used.contains(*path)) {
            let reason = format!("expected a picture of its name in {}, found none", pictures.display());
            found.bad.push(Bad::new(path, reason));
        }
        Ok(found)
    }
}

/// The name of a condition for a file: without its ending, and nowhere but in the output.
fn inside(file: &Path) -> PathBuf {
    let normal = file.components().all(|part| matches!(part, Component::Normal(_)));
    let stem = PathBuf::from(file.file_stem().unwrap_or_default());
    if normal { file.with_file_name(&stem) } else { stem }
}

/// The files of a folder whose ending, in lower case, is wanted; hidden ones are not.
fn listed(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let entries = files::list_dir(dir)?.into_iter();
    let usable = entries.filter(|entry| {
        let name = entry.name.to_string_lossy();
        let end = entry.path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        entry.kind == Kind::File && !name.starts_with('.') && wanted(&end)
    });
    Ok(usable.map(|entry| entry.path).collect())
}

type Rows = Vec<(usize, std::result::Result<Row, String>)>;

/// The rows of `metadata.jsonl` or `metadata.csv` with their lines, as Hugging Face's image folders have them.
fn metadata(dir: &Path) -> Result<Option<(PathBuf, Rows)>> {
    let path = dir.join("metadata.jsonl");
    if path.is_file() {
        let text = files::read_to_string(&path)?;
        let lines = text.trim_start_matches('\u{feff}').lines().enumerate();
        let rows = lines.filter(|(_, line)| !line.trim().is_empty()).map(|(i, line)| {
            let row = serde_json::from_str(line);
            (i + 1, row.map_err(|e| format!("expected a JSON object with file_name and text: {e}")))
        });
        return Ok(Some((path, rows.collect())));
    }
    let path = dir.join("metadata.csv");
    if !path.is_file() {
        return Ok(None);
    }
    let text = files::read_to_string(&path)?;
    let mut reader = csv::Reader::from_reader(text.trim_start_matches('\u{feff}').as_bytes());
    let heads = reader.headers().map_err(|e| Error::format(&path, e.to_string()))?.clone();
    let column = |name: &str| heads.iter().position(|head| head.trim() == name);
    let (Some(file), Some(text)) = (column("file_name"), column("text")) else {
        let found: Vec<&str> = heads.iter().collect();
        let problem = format!("expected columns file_name and text, found {}", found.join(", "));
        return Err(Error::format(&path, problem));
    };
    let rows = reader.records().map(|record| match record {
        Err(e) => (e.position().map_or(0, |at| at.line() as usize), Err(e.to_string())),
        Ok(record) => {
            let value = |column: usize| record.get(column).unwrap_or_default().to_string();
            let row = Row { file_name: value(file), text: Some(Caption::One(value(text))) };
            (record.position().map_or(0, |at| at.line() as usize), Ok(row))
        }
    });
    let rows = rows.collect();
    Ok(Some((path, rows)))
}
