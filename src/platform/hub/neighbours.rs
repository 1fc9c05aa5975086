//! What lies where a hub id points to as a path: with a slip of the pen it was none.

use crate::platform::hub::choice::is_plain_name;
use std::cmp::Reverse;
use std::path::Path;

/// Names that are shown.
const MOST: usize = 8;

/// A hint with the names in the folder of `path` that look most like it; `None` where no such folder is there.
pub fn of(path: &Path) -> Option<String> {
    let (folder, wanted) = (path.parent()?, path.file_name()?.to_str()?);
    let entries = folder.read_dir().ok()?.flatten();
    let mut names: Vec<String> =
        entries.filter_map(|e| e.file_name().into_string().ok()).filter(|name| is_plain_name(name)).collect();
    let alike = |name: &str| name.chars().zip(wanted.chars()).take_while(|(a, b)| a == b).count();
    names.sort_by_cached_key(|name| (Reverse(alike(name)), name.clone()));
    let more = if names.len() > MOST { ", .." } else { "" };
    names.truncate(MOST);
    (!names.is_empty())
        .then(|| format!("as a path: the folder {} holds {}{more}", folder.display(), names.join(", ")))
}
