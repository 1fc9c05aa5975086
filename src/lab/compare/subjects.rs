//! Subjects with their pictures divided: trained on, for validation, for the tables. The pictures are copied into the
//! comparison's folder, so that it is whole by itself and can lie where other machines see it.

use crate::data::ImageFolder;
use crate::data::image::Background;
use crate::error::{Error, Result};
use crate::lab::compare::config::{CompareConfig, Protocol, SubjectEntry, Topic};
use crate::lab::compare::control;
use crate::lab::compare::dreambooth;
use crate::lab::compare::subject::{Material, Prompt, Subject, SubjectPicture, SubjectPictures};
use crate::lab::evaluate::scores::without_token;
use crate::platform::files;
use crate::platform::observer::Observer;
use std::collections::BTreeSet;
use std::path::Path;

/// With so many pictures or more, one is left out of training for validation.
const ENOUGH_FOR_VALIDATION: usize = 5;
/// The base model's class pictures, so many of them, are look-alikes where there are no others.
pub const CLASS_LOOK_ALIKES: usize = 50;

/// The subjects of a comparison, and notes that the protocol brings with it.
pub fn resolve(config: &CompareConfig, observer: &dyn Observer) -> Result<(Vec<Subject>, Vec<String>)> {
    let (entries, live_prompts) = match &config.topic {
        Topic::Control(entries) => return Ok((control::resolve(config, entries, observer)?, Vec::new())),
        Topic::DreamBooth(set) => dreambooth_entries(config, set, observer)?,
        Topic::Subjects(entries) => (entries.clone(), Vec::new()),
    };
    let mut subjects = Vec::new();
    for entry in &entries {
        subjects.push(subject(config, entry, &live_prompts)?);
    }
    // The other subjects of its class are a subject's look-alikes.
    let all = subjects.clone();
    for (subject, entry) in subjects.iter_mut().zip(&entries) {
        let Material::Pictures(pictures) = &mut subject.material else { continue };
        if entry.look_alikes_dir.is_none() {
            let others = all.iter().filter(|s| s.name != subject.name && s.class == subject.class);
            for (other, theirs) in others.filter_map(|other| Some((other, other.pictures()?))) {
                for (kind, of_kind) in &theirs.by_kind()[..3] {
                    let named = |p: &SubjectPicture| SubjectPicture {
                        name: format!("{}-{kind}-{}", other.name, p.name),
                        ..p.clone()
                    };
                    pictures.look_alikes.extend(of_kind.iter().map(named));
                }
            }
            // In the paper's protocol one picture is in two sets.
            let mut seen = BTreeSet::new();
            pictures.look_alikes.retain(|p| seen.insert(p.hash.clone()));
            pictures.look_alikes.sort_by(|a, b| a.name.cmp(&b.name));
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
    let protocol = dreambooth::DreamBoothPrompts::read(&set.dir)?;
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
            return Err(Error::data(format!(
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
        return Err(Error::data(format!(
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
    let (train, validation, test) = split(config, entry, all)?;
    if config.search.is_some() && validation.is_empty() {
        notes.push(format!(
            "{}: fewer than {ENOUGH_FOR_VALIDATION} pictures, none is left out for validation; its share of the search \
             has no similarity to a picture",
            entry.name
        ));
    }
    let known = |t: &&SubjectPicture| train.iter().chain(&validation).any(|p| p.hash == t.hash);
    if config.protocol != Protocol::Paper
        && let Some(same) = test.iter().find(known)
    {
        return Err(Error::data(format!(
            "{}: {} is trained on or chosen by too; a score on it would mean nothing",
            place("test_data_dir"),
            same.path.display()
        )));
    }
    let masks = masks(entry, &test)?;
    let look_alikes = entry.look_alikes_dir.as_deref().map(|dir| pictures(dir, &place("look_alikes_dir")));
    check_templates(config, entry)?;
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
        prompts: prompts.iter().enumerate().map(prompt).collect(),
        validation_prompts: config
            .draw
            .validation_prompts
            .iter()
            .map(|t| (usize::MAX, t))
            .map(prompt)
            .collect(),
        notes,
        material: Material::Pictures(SubjectPictures {
            instance_prompt: filled(&entry.instance_prompt),
            class_prompt: filled(&entry.class_prompt),
            train,
            validation,
            test,
            look_alikes: look_alikes.transpose()?.unwrap_or_default(),
            masks,
        }),
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

/// Pictures to train on, to choose by, and for the tables.
fn split(
    config: &CompareConfig,
    entry: &SubjectEntry,
    all: Vec<SubjectPicture>,
) -> Result<(Vec<SubjectPicture>, Vec<SubjectPicture>, Vec<SubjectPicture>)> {
    if config.protocol == Protocol::Paper {
        return Ok((all.clone(), Vec::new(), all));
    }
    let enough = all.len() >= ENOUGH_FOR_VALIDATION;
    let mut train = all;
    let test = match &entry.test_data_dir {
        Some(dir) => pictures(dir, &format!("subject `{}`: test_data_dir", entry.name))?,
        None if train.len() < 2 => {
            return Err(Error::data(format!(
                "subject `{}`: data_dir: expected two pictures or more, one of them for the tables, found {}",
                entry.name,
                train.len()
            ))
            .with_hint("give a test_data_dir"));
        }
        None => train.split_off(train.len() - 1),
    };
    let validation = if enough { train.split_off(train.len() - 1) } else { Vec::new() };
    Ok((train, validation, test))
}

/// The masks of the pictures for the tables, where the subject has any.
fn masks(entry: &SubjectEntry, test: &[SubjectPicture]) -> Result<Vec<SubjectPicture>> {
    let Some(dir) = &entry.masks_dir else { return Ok(Vec::new()) };
    let place = format!("subject `{}`: masks_dir", entry.name);
    let (found, _) = files::by_stem(pictures(dir, &place)?, |picture| &picture.path);
    let mask = |test: &SubjectPicture| {
        let missing = || Error::data(format!("{place}: expected a mask for {}, found none", test.name));
        found.get(files::stem(&test.path)).cloned().ok_or_else(missing)
    };
    test.iter().map(mask).collect()
}

/// Refuses prompts with other braces than the two that are filled in.
fn check_templates(config: &CompareConfig, entry: &SubjectEntry) -> Result<()> {
    let templates =
        [&entry.prompts, &config.draw.prompts, &config.draw.validation_prompts].into_iter().flatten();
    for template in templates.chain([&entry.instance_prompt, &entry.class_prompt]) {
        if fill(template, "", "").contains(['{', '}']) {
            return Err(Error::config(format!(
                "{}: expected {{subject}} and {{class}} and no other braces, found `{template}`",
                format_args!("subject `{}`: prompts", entry.name)
            )));
        }
    }
    Ok(())
}

fn pictures(dir: &Path, what: &str) -> Result<Vec<SubjectPicture>> {
    if !dir.is_dir() {
        return Err(Error::data(format!(
            "{what}: expected a folder of pictures, found none at {}",
            dir.display()
        ))
        .with_hint("paths are relative to the folder in which hra is started"));
    }
    let folder = ImageFolder::scan(dir, Background::default())?;
    let picture = |image: &crate::data::Image| SubjectPicture::read(image.name.clone(), &image.path);
    folder.images().iter().map(picture).collect()
}

fn fill(template: &str, subject: &str, class: &str) -> String {
    template.replace("{subject}", subject).replace("{class}", class)
}
