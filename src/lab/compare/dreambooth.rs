//! The layout of google/dreambooth's `dataset/`: a folder of photographs for each subject, and `prompts_and_classes.txt` with
//! the class of each subject and two lists of prompts, written as Python code (one for objects, one for live subjects).

use crate::error::{Error, Result};
use crate::platform::files;
use regex::Regex;
use std::path::Path;

/// Classes, and of them those to which the list for live subjects belongs: the file itself does not say.
const LIVE_CLASSES: [&str; 2] = ["cat", "dog"];
const FILE: &str = "prompts_and_classes.txt";

/// What the file says. Prompts hold `{subject}` where Python has the rare token and the class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DreamBoothPrompts {
    /// Folder name and class.
    pub subjects: Vec<(String, String)>,
    /// For objects.
    pub object_prompts: Vec<String>,
    /// For animals.
    pub live_prompts: Vec<String>,
}

impl DreamBoothPrompts {
    /// Reads the file of a data set.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        if !path.is_file() {
            return Err(Error::data(format!("dreambooth: expected {FILE} in {}, found none", dir.display()))
                .with_hint("give the `dataset` folder of github.com/google/dreambooth"));
        }
        Self::parse(&files::read_to_string(&path)?).map_err(|problem| Error::format(&path, problem))
    }

    /// Whether the list for live subjects belongs to a class.
    pub fn is_live(class: &str) -> bool {
        LIVE_CLASSES.contains(&class)
    }

    /// The list that belongs to a class.
    pub fn prompts(&self, class: &str) -> &[String] {
        if Self::is_live(class) { &self.live_prompts } else { &self.object_prompts }
    }

    fn parse(text: &str) -> std::result::Result<Self, String> {
        let mut protocol =
            Self { subjects: Vec::new(), object_prompts: Vec::new(), live_prompts: Vec::new() };
        let prompt = Regex::new(r#"^\s*(?:'([^']*)'|"([^"]*)")\.format\("#).expect("a correct expression");
        let mut place = "";
        for line in text.lines().map(str::trim) {
            let lower = line.to_lowercase();
            if lower == "classes" || lower.ends_with("prompts") {
                place = match lower.as_str() {
                    "classes" => "classes",
                    "object prompts" => "objects",
                    "live subject prompts" => "live",
                    _ => "",
                };
            } else if place == "classes" {
                match line.split_once(',') {
                    Some(("subject_name", _)) | None => {}
                    Some((name, class)) => protocol.subjects.push((name.trim().into(), class.trim().into())),
                }
            } else if let Some(found) = prompt.captures(line) {
                let format = found.get(1).or(found.get(2)).map_or("", |m| m.as_str());
                // The lists differ in form only here: `{0} {1}`.
                let prompt = format.replace("{0} {1}", "{subject}").replace("{1}", "{class}");
                match place {
                    "objects" => protocol.object_prompts.push(prompt),
                    "live" => protocol.live_prompts.push(prompt),
                    _ => {}
                }
            }
        }
        for (what, found) in [
            ("a list of classes", protocol.subjects.len()),
            ("object prompts", protocol.object_prompts.len()),
            ("live subject prompts", protocol.live_prompts.len()),
        ] {
            if found == 0 {
                return Err(format!("expected {what}, found none"));
            }
        }
        if let Some((name, _)) = protocol.subjects.iter().find(|(name, _)| !is_plain(name)) {
            return Err(format!("expected a folder's name for a subject, found `{name}`"));
        }
        Ok(protocol)
    }
}

fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
}
