//! Prompts as a user writes them: one on each line of a file, perhaps with the syntax of another program.

use crate::error::Result;
use crate::platform::files;
use crate::platform::observer::Observer;
use regex::Regex;
use std::path::Path;

/// The prompts of a file; empty lines and lines that begin with # are passed over.
pub fn read(path: &Path) -> Result<Vec<String>> {
    let text = files::read_to_string(path)?;
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim);
    Ok(lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_string).collect())
}

/// What A1111 and ComfyUI read as weights of words and as names of files; here, as in diffusers, it is text like any other.
const OTHERS_SYNTAX: &str =
    r"\([^()]+:\s*\d*\.?\d+\s*\)|\(\(.+\)\)|<(?:lora|lyco|lycoris|hypernet|ti)\s*:[^<>]+>";

/// Says once if prompts hold other programs' syntax.
pub fn note_of_syntax<'a>(prompts: impl IntoIterator<Item = &'a str>, observer: &dyn Observer) {
    let syntax = Regex::new(OTHERS_SYNTAX).expect("a regular expression");
    let found = prompts.into_iter().find_map(|prompt| syntax.find(prompt));
    if let Some(found) = found {
        observer.note(&format!(
            "`{}` is read as it stands: prompts have no weights and no file names here; an adapter is --adapter FILE=0.8",
            found.as_str()
        ));
    }
}
