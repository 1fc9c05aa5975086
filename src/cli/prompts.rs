//! Prompts as a user writes them: one on each line of a file, perhaps with the syntax of another program.

use crate::data::caption::bounded;
use crate::error::{Error, Result};
use crate::platform::files;
use crate::platform::observer::Observer;
use regex::Regex;
use std::path::Path;

/// Most prompts of a file: more than are drawn or scored in months.
const MAX_PROMPTS: usize = 1_000_000;

/// The prompts of a file; empty lines and lines that begin with # are passed over. Errors: a longer line than a prompt may be, more
/// than [`MAX_PROMPTS`].
pub fn read(path: &Path) -> Result<Vec<String>> {
    let text = files::read_to_string(path)?;
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim).zip(1..);
    let mut prompts = Vec::new();
    for (line, number) in lines.filter(|(line, _)| !line.is_empty() && !line.starts_with('#')) {
        bounded(line).map_err(|problem| Error::format(path, format!("line {number}: {problem}")))?;
        if prompts.len() == MAX_PROMPTS {
            return Err(Error::format(path, format!("expected at most {MAX_PROMPTS} prompts, found more")));
        }
        prompts.push(line.to_string());
    }
    Ok(prompts)
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
