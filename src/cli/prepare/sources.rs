//! Which files conditions are made of: those of a folder, or those that its metadata names, with their captions.

use crate::data::table::{self, Row};
use crate::error::Result;
use crate::platform::files;
use crate::platform::observer::Observer;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::path::{Component, Path, PathBuf};

/// Endings of files that describe pictures and are none.
const TEXTS: [&str; 6] = ["txt", "json", "jsonl", "csv", "toml", "pts"];

/// Whether a file of this ending, in lower case, may be a picture or a map.
pub fn is_picture(ending: &str) -> bool {
    !TEXTS.contains(&ending)
}

/// A file that a condition is made of.
pub struct PictureFile {
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
    pub sources: Vec<PictureFile>,
    pub bad: Vec<Bad>,
}

/// How the tables of pictures are taken.
pub struct Tables<'a> {
    /// Whether files outside their folders are refused.
    pub strict_paths: bool,
    pub observer: &'a dyn Observer,
}

impl Tables<'_> {
    /// The pictures of a folder: those that its metadata names, or else all.
    pub fn of_pictures(&self, dir: &Path) -> Result<Sources> {
        let mut found = Sources::default();
        if let Some(table) = table::of_pictures(dir)? {
            table.confine(self.strict_paths, false, self.observer)?;
            for Row { place, entry } in table.rows {
                match entry {
                    Err(problem) => found.bad.push(Bad::new(&table.file, format!("{place}: {problem}"))),
                    Ok(row) => {
                        let path = dir.join(&row.image);
                        let name = inside(Path::new(&row.image));
                        if path.is_file() {
                            let caption = Some(row.caption);
                            found.sources.push(PictureFile {
                                name,
                                picture: Some(path.clone()),
                                path,
                                caption,
                            });
                        } else {
                            let reason =
                                format!("named in {place} of {}, is not there", table.file.display());
                            found.bad.push(Bad::new(&path, reason));
                        }
                    }
                }
            }
            return Ok(found);
        }
        for path in files::list_files(dir, is_picture)? {
            let name = inside(Path::new(path.file_name().unwrap_or_default()));
            found.sources.push(PictureFile { name, picture: Some(path.clone()), path, caption: None });
        }
        Ok(found)
    }

    /// The files of `dir`, maps or points as `wanted` says of their endings, each with the picture of its name; a folder in the
    /// picture's name is one of `dir` where that has it.
    pub fn beside(
        &self,
        dir: &Path,
        pictures: Option<&Path>,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Sources> {
        let listed = |dir: &Path| files::list_files(dir, &wanted);
        let Some(pictures) = pictures else {
            let source = |path: PathBuf| {
                let name = inside(Path::new(path.file_name().unwrap_or_default()));
                PictureFile { name, path, picture: None, caption: None }
            };
            return Ok(Sources { sources: listed(dir)?.into_iter().map(source).collect(), bad: Vec::new() });
        };
        let of_pictures = self.of_pictures(pictures)?;
        let mut found = Sources { sources: Vec::new(), bad: of_pictures.bad };
        let mut folders: BTreeMap<PathBuf, BTreeMap<OsString, PathBuf>> = BTreeMap::new();
        let mut used = BTreeSet::new();
        for picture in of_pictures.sources {
            let parent = picture.name.parent().filter(|parent| !parent.as_os_str().is_empty());
            let within = parent.map(|parent| dir.join(parent)).filter(|path| path.is_dir());
            let folder = within.unwrap_or_else(|| dir.to_path_buf());
            if !folders.contains_key(&folder) {
                let (files, others) = files::by_stem(listed(&folder)?, |path| path);
                for path in others {
                    let first = files[files::stem(&path)].display();
                    let reason = format!("expected one file of a name, found {first} too, which is used");
                    found.bad.push(Bad::new(&path, reason));
                }
                folders.insert(folder.clone(), files);
            }
            let stem = picture.name.file_name().unwrap_or_default();
            match folders.get(&folder).and_then(|files| files.get(stem)) {
                Some(path) => {
                    used.insert(path.clone());
                    found.sources.push(PictureFile { path: path.clone(), ..picture });
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
    let stem = PathBuf::from(files::stem(file));
    if normal { file.with_file_name(&stem) } else { stem }
}
