//! Files and folders: what is read, listed and written, with errors that name the path.
//!
//! What is written appears whole or not at all: it is written beside its place under a hidden name (see
//! [`LEFTOVER_PREFIX`]), flushed to the disk and renamed. A crash or a full disk leaves the old file as it was, and at worst
//! a hidden leftover. Every error names the path and what was tried.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::platform::disguise::disguise;

/// How the names of unfinished files and folders start; what is left under such a name after a crash may be deleted.
pub const LEFTOVER_PREFIX: &str = ".tmp-";

/// The longest text that is read whole: the largest vocabularies have some megabytes.
const MAX_TEXT: u64 = 64 << 20;

/// What an entry of a folder is; links are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A pipe, socket, device or dangling link.
    Other,
}

/// One entry of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// Name inside the folder.
    pub name: OsString,
    /// The folder's path joined with the name.
    pub path: PathBuf,
    /// File, folder or neither.
    pub kind: Kind,
}

/// What `path` is; `None` if nothing is there (a dangling link is [`Kind::Other`]).
pub fn kind(path: &Path) -> Option<Kind> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => Some(Kind::File),
        Ok(meta) if meta.is_dir() => Some(Kind::Folder),
        Ok(_) => Some(Kind::Other),
        Err(_) => fs::symlink_metadata(path).ok().map(|_| Kind::Other),
    }
}

/// The whole file as text; an [`ErrorKind::Format`] if it is not UTF-8, or larger than any config or vocabulary.
pub fn read_to_string(path: &Path) -> Result<String> {
    read_text(path, MAX_TEXT)
}

/// As [`read_to_string`], of a file of at most `max_bytes`.
pub fn read_text(path: &Path, max_bytes: u64) -> Result<String> {
    String::from_utf8(read(path, max_bytes)?).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::format(path, format!("expected UTF-8 text, found another byte at offset {at}"))
    })
}

/// The whole file. Refuses what is not a regular file (a pipe would block for ever), files of more than `max_bytes`, and what
/// was saved in place of the file ([`disguise`]).
pub fn read(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let fail = |source| Error::io("read", path, source);
    let meta = fs::metadata(path).map_err(fail)?;
    if !meta.is_file() {
        let found = if meta.is_dir() { "a folder" } else { "a pipe or device" };
        return Err(Error::format(path, format!("expected a file, found {found}")));
    }
    if meta.len() > max_bytes {
        let problem = format!("expected at most {max_bytes} bytes, found {}", meta.len());
        return Err(Error::format(path, problem));
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize);
    // `take` because the file may grow while it is read.
    File::open(path).and_then(|f| f.take(max_bytes).read_to_end(&mut bytes)).map_err(fail)?;
    match disguise(&bytes) {
        None => Ok(bytes),
        Some((found, hint)) => {
            Err(Error::format(path, format!("expected the file itself, found {found}")).with_hint(hint))
        }
    }
}

/// The entries of a folder, sorted by name (byte order). Hidden ones are listed too.
pub fn list_dir(path: &Path) -> Result<Vec<DirEntry>> {
    let fail = |source| Error::io("list", path, source);
    let mut entries = Vec::new();
    for entry in fs::read_dir(path).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let path = entry.path();
        let kind = kind(&path).unwrap_or(Kind::Other);
        entries.push(DirEntry { name: entry.file_name(), path, kind });
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

/// The files of a folder whose ending, in lower case, is wanted, sorted by name; hidden ones are not.
pub fn list_files(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let usable = |entry: &DirEntry| {
        let end = entry.path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        entry.kind == Kind::File && !entry.name.as_bytes().starts_with(b".") && wanted(&end)
    };
    Ok(list_dir(dir)?.into_iter().filter(usable).map(|entry| entry.path).collect())
}

/// A file's name without folder and ending, by which files of two folders are paired.
pub fn stem(path: &Path) -> &OsStr {
    path.file_stem().unwrap_or_default()
}

/// `items` by the stems of their paths, and in their order those whose stem an earlier one has.
pub fn by_stem<T>(
    items: impl IntoIterator<Item = T>,
    path: impl Fn(&T) -> &Path,
) -> (BTreeMap<OsString, T>, Vec<T>) {
    let (mut first, mut others) = (BTreeMap::new(), Vec::new());
    for item in items {
        match first.entry(stem(path(&item)).to_os_string()) {
            Entry::Vacant(place) => drop(place.insert(item)),
            Entry::Occupied(_) => others.push(item),
        }
    }
    (first, others)
}

/// Makes the folder and those above it; fine if it is there already.
pub fn create_dir_all(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| Error::io("make the folder", path, e))
}

/// Makes the folder in one that must be there; fine if it is there already.
pub fn create_dir(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(e) if !path.is_dir() => Err(Error::io("make the folder", path, e)),
        _ => Ok(()),
    }
}

/// Fails if nothing could be written into the folder `dir`; where it is not there yet, into the nearest one above it. Leaves
/// nothing behind. For the start of what takes long.
pub fn check_folder_writable(dir: &Path) -> Result<()> {
    let whole = std::path::absolute(dir).map_err(|e| Error::io("find", dir, e))?;
    let there = whole.ancestors().find(|path| fs::symlink_metadata(path).is_ok()).unwrap_or(&whole);
    let what = if there == whole { "write into" } else { "make the folder" };
    probe(&there.join("probe")).map_err(|e| Error::io(what, dir, e))
}

/// Makes the folder that `path` is to lie in, where it is missing.
pub fn create_parent(path: &Path) -> Result<()> {
    match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => create_dir_all(parent),
        None => Ok(()),
    }
}

/// Fails if no file or folder could be written at `path`, whose folder must be there, as [`check_folder_writable`].
pub fn check_place_writable(path: &Path) -> Result<()> {
    probe(path).map_err(|e| Error::io("write", path, e))
}

/// Makes a hidden file beside `path` and removes it.
fn probe(path: &Path) -> io::Result<()> {
    Scratch::beside(path, |temp| OpenOptions::new().write(true).create_new(true).open(temp)).map(drop)
}

/// Fails if anything is at `path`, which a command is asked to make.
pub fn refuse_existing(path: &Path) -> Result<()> {
    match kind(path) {
        None => Ok(()),
        Some(_) => {
            Err(Error::run(format!("{} is there already", path.display())).with_hint("give another --output"))
        }
    }
}

/// Opens a file for appending and makes it if need be, for logs that grow line by line.
pub fn open_append(path: &Path) -> Result<File> {
    OpenOptions::new().append(true).create(true).open(path).map_err(|e| Error::io("open", path, e))
}

/// `text` as one word of a POSIX shell, for commands that a user may paste.
pub fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./=-+:,@".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_string()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// Removes what interrupted writes have left in the folder at `path`; only for a folder in which no other process writes.
pub fn remove_leftovers(path: &Path) -> Result<()> {
    for entry in list_dir(path)? {
        if entry.name.as_bytes().starts_with(LEFTOVER_PREFIX.as_bytes()) {
            let removed = match entry.kind {
                Kind::Folder => fs::remove_dir_all(&entry.path),
                _ => fs::remove_file(&entry.path),
            };
            removed.map_err(|e| Error::io("remove", &entry.path, e))?;
        }
    }
    Ok(())
}

/// Removes a folder with all that is in it; fine if it is not there.
pub fn remove_dir_all(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        _ => Ok(()),
    }
}

/// Removes a file; fine if it is not there.
pub fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        _ => Ok(()),
    }
}

/// Writes a file so that `path` holds either its old content or all of `bytes`, whatever happens.
///
/// The parent folder must exist. A link at `path` is replaced, not followed.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |file| file.write_all(bytes).map_err(|e| Error::io("write", path, e)))
}

/// As [`write_atomic`], for content that is made while it is written; where `fill` fails, `path` stays as it was.
pub fn write_atomic_with(path: &Path, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let fail = |e| Error::io("write", path, e);
    let open = |temp: &Path| OpenOptions::new().write(true).create_new(true).open(temp);
    let (mut scratch, mut file) = Scratch::beside(path, open).map_err(fail)?;
    fill(&mut file)?;
    let mut place = || -> io::Result<()> {
        file.sync_all()?;
        fs::rename(&scratch.path, path)?;
        scratch.keep();
        sync_folder(parent_of(path)?)
    };
    place().map_err(fail)
}

/// Fills a folder so that `path` is either what it was or the complete new folder.
///
/// `fill` gets an empty hidden folder beside `path`; when it succeeds, everything in it is flushed to the disk and the folder
/// takes the place of `path`, and an older folder there is removed. If `fill` fails, the hidden folder is removed.
/// Errors that name the hidden folder are told with `path` instead.
pub fn stage_dir<T>(path: &Path, fill: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let fail = |source| Error::io("write the folder", path, source);
    let (mut scratch, ()) = Scratch::beside(path, |temp| fs::create_dir(temp)).map_err(fail)?;
    let value = fill(&scratch.path).map_err(|e| told_with(e, &scratch.path, path))?;
    let mut place = || -> io::Result<()> {
        sync_tree(&scratch.path)?;
        if fs::symlink_metadata(path).is_err() {
            fs::rename(&scratch.path, path)?;
            scratch.keep();
        } else if !fs::symlink_metadata(path)?.is_dir() {
            return Err(io::Error::new(io::ErrorKind::NotADirectory, "a file is in its place"));
        } else if let Err(e) = exchange(&scratch.path, path) {
            if !matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) {
                return Err(e);
            }
            replace_by_two_renames(&scratch.path, path)?;
        }
        // After an exchange the scratch folder is the old one, and is removed with `scratch`.
        sync_folder(parent_of(path)?)
    };
    place().map_err(fail)?;
    Ok(value)
}

/// Swaps two paths in one step.
fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    let [a, b] = [CString::new(a.as_os_str().as_bytes())?, CString::new(b.as_os_str().as_bytes())?];
    // SAFETY: both are NUL-terminated strings that outlive the call.
    let rc = unsafe {
        libc::renameat2(libc::AT_FDCWD, a.as_ptr(), libc::AT_FDCWD, b.as_ptr(), libc::RENAME_EXCHANGE)
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// For file systems that cannot swap: for a moment nothing is at `path`, and the old folder lies beside it. Ends as
/// [`exchange`] does: the old folder is at `new`.
fn replace_by_two_renames(new: &Path, path: &Path) -> io::Result<()> {
    let (mut aside, ()) = Scratch::beside(path, |temp| fs::create_dir(temp))?;
    fs::rename(path, &aside.path)?;
    aside.keep();
    if let Err(e) = fs::rename(new, path) {
        fs::rename(&aside.path, path)?;
        return Err(e);
    }
    fs::rename(&aside.path, new)
}

/// A hidden file or folder that is removed when dropped, unless it was kept.
struct Scratch {
    path: PathBuf,
    kept: bool,
}

impl Scratch {
    /// `make` must fail with `AlreadyExists` when the name is taken (by a leftover, or by another process).
    fn beside<T>(target: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<(Self, T)> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        if target.file_name().is_none() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path ends in no name"));
        }
        let parent = parent_of(target)?;
        loop {
            let n = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!("{LEFTOVER_PREFIX}{}-{n}", std::process::id()));
            match make(&path) {
                Ok(made) => return Ok((Self { path, kept: false }, made)),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.kept {
            // Nothing better can be done about a failure here: the error that led to it is already being told.
            let _ = fs::remove_file(&self.path).or_else(|_| fs::remove_dir_all(&self.path));
        }
    }
}

/// `a.txt` alone lies in `.`, for which `Path::parent` gives an empty path.
fn parent_of(path: &Path) -> io::Result<&Path> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Ok(Path::new(".")),
        Some(parent) => Ok(parent),
        None => Err(io::Error::new(io::ErrorKind::InvalidInput, "the path has no parent folder")),
    }
}

/// A rename is on the disk only once its folder is.
fn sync_folder(path: &Path) -> io::Result<()> {
    match File::open(path).and_then(|f| f.sync_all()) {
        // Some network file systems cannot flush a folder.
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        other => other,
    }
}

fn sync_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else if entry.file_type()?.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync_folder(path)
}

/// The same error about `shown` where it is about `hidden`.
fn told_with(mut error: Error, hidden: &Path, shown: &Path) -> Error {
    if let ErrorKind::Io { path, .. } | ErrorKind::Format { path, .. } | ErrorKind::Weights { path, .. } =
        &mut error.kind
        && let Ok(rest) = path.strip_prefix(hidden)
    {
        *path = if rest.as_os_str().is_empty() { shown.to_path_buf() } else { shown.join(rest) };
    }
    error
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shell_words_are_quoted_where_they_must_be() {
        assert_eq!(shell_word("runs/dog=0.8"), "runs/dog=0.8");
        assert_eq!(shell_word("a \"b\" $c's"), r#"'a "b" $c'\''s'"#);
        assert_eq!(shell_word(""), "''");
    }

    /// The one thing that cannot be tested from outside: the way taken where the kernel or file system cannot swap.
    #[test]
    fn two_renames_end_as_an_exchange_does() {
        for swap in [replace_by_two_renames, exchange] {
            let dir = tempfile::tempdir().unwrap();
            let [old, new] = ["old", "new"].map(|name| dir.path().join(name));
            for path in [&old, &new] {
                fs::create_dir(path).unwrap();
                fs::write(path.join("name"), path.file_name().unwrap().as_bytes()).unwrap();
            }
            swap(&new, &old).unwrap();
            assert_eq!(fs::read(old.join("name")).unwrap(), b"new");
            assert_eq!(fs::read(new.join("name")).unwrap(), b"old");
            assert_eq!(list_dir(dir.path()).unwrap().len(), 2);
            assert!(swap(&dir.path().join("missing"), &old).is_err());
            assert_eq!(fs::read(old.join("name")).unwrap(), b"new", "a failure brings the folder back");
        }
    }
}
