//! Subjects with their pictures divided: trained on, for validation, for the tables. The pictures are copied into the
//! comparison's folder, so that it is whole by itself and can lie where other machines see it.

use crate::data::ImageFolder;
use crate::data::image::decode::MAX_FILE_BYTES;
use crate::data::image::load_rgb;
use crate::error::{Error, Result};
use crate::lab::compare::config::{CompareConfig, Protocol, SubjectEntry};
use crate::lab::compare::control::{self, ControlSet};
use crate::lab::compare::dreambooth;
use crate::lab::evaluate::scores::without_token;
use crate::platform::files;
use crate::platform::observer::Observer;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// With so many pictures or more, one is left out of training for validation.
const ENOUGH_FOR_VALIDATION: usize = 5;
/// The base model's class pictures, so many of them, are look-alikes where there are no others.
pub const CLASS_LOOK_ALIKES: usize = 50;

/// A prompt as it is drawn, and as CLIP reads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prompt {
    /// With the rare token.
    pub prompt: String,
    /// Without it (protocol `paper`: with it).
    pub text: String,
}

/// A picture of the user's: where it is, and what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Name of the file.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Of its pixels.
    pub hash: String,
}

/// A subject, resolved; or a set of pairs, whose captions are the prompts and which has no pictures of its own here.
#[derive(Debug, Clone, Default)]
pub struct Subject {
    /// Its name.
    pub name: String,
    /// What it is one of.
    pub class: String,
    /// What it is trained with.
    pub instance_prompt: String,
    /// What class pictures are drawn with.
    pub class_prompt: String,
    /// For the tables.
    pub prompts: Vec<Prompt>,
    /// To choose by.
    pub validation_prompts: Vec<Prompt>,
    /// Trained on.
    pub train: Vec<Picture>,
    /// Seen by validation only; may be empty.
    pub validation: Vec<Picture>,
    /// Seen by the tables only.
    pub test: Vec<Picture>,
    /// Others of its class; empty where the class pictures take their place.
    pub look_alikes: Vec<Picture>,
    /// Where the subject is in each of [`Self::test`].
    pub masks: Vec<Picture>,
    /// What a reader must know of it.
    pub notes: Vec<String>,
    /// Its pairs, where control is taught.
    pub control: Option<ControlSet>,
}

impl Subject {
    /// Every kind of picture with the folder it has in `subjects/NAME/`.
    pub fn pictures(&self) -> [(&'static str, &[Picture]); 5] {
        [
            ("train", &self.train),
            ("validation", &self.validation),
            ("test", &self.test),
            ("look_alikes", &self.look_alikes),
            ("masks", &self.masks),
        ]
    }

    /// Copies its pictures into the comparison's folder.
    pub fn copy_into(&self, comparison: &Path) -> Result<()> {
        if let Some(control) = &self.control {
            return control.copy_into(&comparison.join("subjects").join(&self.name));
        }
        for (kind, pictures) in self.pictures() {
            let folder = comparison.join("subjects").join(&self.name).join(kind);
            if pictures.is_empty() {
                files::remove_dir_all(&folder)?;
            } else if folder.is_dir() {
                // What an earlier plan put there and this one does not; hidden files are another worker's, half written.
                for entry in files::list_dir(&folder)? {
                    let name = entry.name.to_string_lossy();
                    if !name.starts_with('.') && !pictures.iter().any(|p| p.name == name) {
                        files::remove_file(&entry.path)?;
                    }
                }
            } else {
                files::create_dir_all(&folder)?;
            }
            for picture in pictures {
                let to = folder.join(&picture.name);
                let bytes = files::read(&picture.path, MAX_FILE_BYTES)?;
                if !to.is_file() || files::read(&to, MAX_FILE_BYTES)? != bytes {
                    files::write_atomic(&to, &bytes)?;
                }
            }
        }
        Ok(())
    }
}

/// The subjects of a comparison, and notes that the protocol brings with it.
pub fn resolve(config: &CompareConfig, observer: &dyn Observer) -> Result<(Vec<Subject>, Vec<String>)> {
    if !config.controls.is_empty() {
        return Ok((control::resolve(config, observer)?, Vec::new()));
    }
    let (entries, live_prompts) = match &config.dreambooth {
        Some(set) => dreambooth_entries(config, set, observer)?,
        None => (config.subjects.clone(), Vec::new()),
    };
    let mut subjects = Vec::new();
    for entry in &entries {
        subjects.push(subject(config, entry, &live_prompts)?);
    }
    // The other subjects of its class are a subject's look-alikes.
    let all = subjects.clone();
    for (subject, entry) in subjects.iter_mut().zip(&entries) {
        if entry.look_alikes_dir.is_none() {
            for other in all.iter().filter(|s| s.name != subject.name && s.class == subject.class) {
                for (kind, pictures) in &other.pictures()[..3] {
                    let named = |p: &Picture| Picture {
                        name: format!("{}-{kind}-{}", other.name, p.name),
                        ..p.clone()
                    };
                    subject.look_alikes.extend(pictures.iter().map(named));
                }
            }
            // In the paper's protocol one picture is in two sets.
            let mut seen = BTreeSet::new();
            subject.look_alikes.retain(|p| seen.insert(p.hash.clone()));
            subject.look_alikes.sort_by(|a, b| a.name.cmp(&b.name));
        }
    }
    let notes =
        if config.protocol == Protocol::Paper { PAPER_NOTES.map(String::from).to_vec() } else { Vec::new() };
    Ok((subjects, notes))
}

/// What `protocol = "paper"` means, for readers of the report.
const PAPER_NOTES: [&str; 3] = [
    "Protocol paper: similarities are measured on the pictures that were trained on, CLIP-T with the rare token and, for a \
     DreamBooth folder, as in the authors' script, with the prompts for live subjects also where an object was drawn.",
    "Protocol paper: for each prompt the scored step with the largest sum of normalised scores is taken, as in the authors' \
     script: a choice made on the test scores themselves, which flatters every method.",
    "Protocol paper, not reproduced: one training serves all prompts of a subject (the scripts train the same run anew for \
     each); each picture has a seed of its own (theirs are four draws of one generator of seed 0); LPIPS is measured at the drawn \
     size with the photographs cropped (theirs are stretched to 512x512); no safety checker blacks pictures out; the softened \
     start of the paper's rank 7 is not hra's.",
];

/// Subjects of a DreamBooth folder as entries, and the list of live prompts.
fn dreambooth_entries(
    config: &CompareConfig,
    set: &super::config::DreamBooth,
    observer: &dyn Observer,
) -> Result<(Vec<SubjectEntry>, Vec<String>)> {
    let protocol = dreambooth::Protocol::read(&set.dir)?;
    let wanted = |name: &str| set.subjects.is_empty() || set.subjects.iter().any(|s| s == name);
    if let Some(unknown) = set.subjects.iter().find(|s| !protocol.subjects.iter().any(|(name, _)| name == *s))
    {
        return Err(Error::config(format!(
            "dreambooth: subjects: `{unknown}` is not in prompts_and_classes.txt"
        )));
    }
    let mut entries = Vec::new();
    for (name, class) in protocol.subjects.iter().filter(|(name, _)| wanted(name)) {
        let data_dir = set.dir.join(name);
        if !data_dir.is_dir() {
            if set.subjects.is_empty() {
                continue;
            }
            return Err(Error::Data(format!(
                "dreambooth: expected a folder {}, found none",
                data_dir.display()
            )));
        }
        let prompts = protocol.prompts(class);
        entries.push(SubjectEntry {
            name: name.clone(),
            class: class.clone(),
            token: set.token.clone(),
            data_dir,
            test_data_dir: None,
            look_alikes_dir: None,
            masks_dir: None,
            instance_prompt: "a photo of {subject}".into(),
            class_prompt: "a photo of {class}".into(),
            prompts: prompts.iter().take(set.num_prompts.unwrap_or(prompts.len())).cloned().collect(),
            notes: Vec::new(),
        });
    }
    let listed = protocol.subjects.iter().filter(|(name, _)| wanted(name)).count();
    if entries.len() < listed {
        let (found, dir) = (entries.len(), set.dir.display());
        observer.note(&format!(
            "dreambooth: {found} of {listed} subjects have a folder in {dir}; the others are left out"
        ));
    }
    if entries.is_empty() {
        return Err(Error::Data(format!(
            "dreambooth: no subject of the list has a folder in {}",
            set.dir.display()
        )));
    }
    let live = if config.protocol == Protocol::Paper { protocol.live_prompts } else { Vec::new() };
    Ok((entries, live))
}

fn subject(config: &CompareConfig, entry: &SubjectEntry, live_prompts: &[String]) -> Result<Subject> {
    let place = |what: &str| format!("subject `{}`: {what}", entry.name);
    let all = pictures(&entry.data_dir, &place("data_dir"))?;
    let mut notes = entry.notes.clone();
    let mut train = all.clone();
    let (validation, test) = if config.protocol == Protocol::Paper {
        (Vec::new(), all)
    } else {
        let test = match &entry.test_data_dir {
            Some(dir) => pictures(dir, &place("test_data_dir"))?,
            None if train.len() < 2 => {
                return Err(Error::Data(format!(
                    "{}: expected two pictures or more, one of them for the tables, found {}\nhint: give a test_data_dir",
                    place("data_dir"),
                    train.len()
                )));
            }
            None => train.split_off(train.len() - 1),
        };
        let validation =
            if all.len() >= ENOUGH_FOR_VALIDATION { train.split_off(train.len() - 1) } else { Vec::new() };
        (validation, test)
    };
    if config.search.is_some() && validation.is_empty() {
        notes.push(format!(
            "{}: fewer than {ENOUGH_FOR_VALIDATION} pictures, none is left out for validation; its share of the search \
             has no similarity to a picture",
            entry.name
        ));
    }
    let known = |t: &&Picture| train.iter().chain(&validation).any(|p| p.hash == t.hash);
    if config.protocol != Protocol::Paper
        && let Some(same) = test.iter().find(known)
    {
        return Err(Error::Data(format!(
            "{}: {} is trained on or chosen by too; a score on it would mean nothing",
            place("test_data_dir"),
            same.path.display()
        )));
    }
    let masks = match &entry.masks_dir {
        None => Vec::new(),
        Some(dir) => {
            let found = pictures(dir, &place("masks_dir"))?;
            let mask = |test: &Picture| {
                let same = |p: &&Picture| Path::new(&p.name).file_stem() == Path::new(&test.name).file_stem();
                found.iter().find(same).cloned().ok_or_else(|| {
                    Error::Data(format!(
                        "{}: expected a mask for {}, found none",
                        place("masks_dir"),
                        test.name
                    ))
                })
            };
            test.iter().map(mask).collect::<Result<_>>()?
        }
    };
    let look_alikes = entry.look_alikes_dir.as_deref().map(|dir| pictures(dir, &place("look_alikes_dir")));
    let templates =
        [&entry.prompts, &config.draw.prompts, &config.draw.validation_prompts].into_iter().flatten();
    for template in templates.chain([&entry.instance_prompt, &entry.class_prompt]) {
        if fill(template, "", "").contains(['{', '}']) {
            return Err(Error::config(format!(
                "{}: expected {{subject}} and {{class}} and no other braces, found `{template}`",
                place("prompts")
            )));
        }
    }
    let filled = |template: &str| fill(template, &format!("{} {}", entry.token, entry.class), &entry.class);
    let prompts = if entry.prompts.is_empty() { &config.draw.prompts } else { &entry.prompts };
    let paper = config.protocol == Protocol::Paper;
    let prompt = |(i, template): (usize, &String)| {
        let prompt = filled(template);
        let text = match live_prompts.get(i) {
            Some(live) if paper => filled(live),
            _ if paper => prompt.clone(),
            _ => without_token(&prompt, &entry.token),
        };
        Prompt { prompt, text }
    };
    let subject = Subject {
        name: entry.name.clone(),
        class: entry.class.clone(),
        instance_prompt: filled(&entry.instance_prompt),
        class_prompt: filled(&entry.class_prompt),
        prompts: prompts.iter().enumerate().map(prompt).collect(),
        validation_prompts: config
            .draw
            .validation_prompts
            .iter()
            .map(|t| (usize::MAX, t))
            .map(prompt)
            .collect(),
        train,
        validation,
        test,
        look_alikes: look_alikes.transpose()?.unwrap_or_default(),
        masks,
        notes,
        control: None,
    };
    if let Some(both) = subject.validation_prompts.iter().find(|p| subject.prompts.contains(p)) {
        return Err(Error::config(format!(
            "draw: `{}` of subject `{}` is among both prompts and validation_prompts",
            both.prompt, subject.name
        )));
    }
    if subject.prompts.is_empty() && config.search.as_ref().is_none_or(|s| !s.only) {
        return Err(Error::config("draw: prompts: expected one or more, found none"));
    }
    Ok(subject)
}

fn pictures(dir: &Path, what: &str) -> Result<Vec<Picture>> {
    if !dir.is_dir() {
        return Err(Error::Data(format!(
            "{what}: expected a folder of pictures, found none at {}\nhint: paths are relative to the folder in which hra is started",
            dir.display()
        )));
    }
    let folder = ImageFolder::scan(dir)?;
    let picture = |image: &crate::data::Image| {
        let pixels = load_rgb(&image.path)?;
        let size = [pixels.width().to_le_bytes(), pixels.height().to_le_bytes()].concat();
        let hash = hash(&[&size, pixels.as_raw()].map(|part| &part[..]).concat());
        Ok(Picture { name: image.name.clone(), path: image.path.clone(), hash })
    };
    folder.images().iter().map(picture).collect()
}

fn fill(template: &str, subject: &str, class: &str) -> String {
    template.replace("{subject}", subject).replace("{class}", class)
}

/// SHA-256 in hexadecimal.
pub fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// A name for folders: lower case, digits and single hyphens.
pub fn slug(text: &str) -> String {
    let mut slug = String::new();
    for c in text.to_lowercase().chars() {
        if c.is_ascii_alphanumeric() || c == '.' && !slug.is_empty() {
            slug.push(c);
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
    }
    let slug: String = slug.trim_matches(['-', '.']).chars().take(60).collect();
    if slug.is_empty() { "x".into() } else { slug }
}
