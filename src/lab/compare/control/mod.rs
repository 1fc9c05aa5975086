//! Control in a comparison: sets of pairs, those of the tables rendered at the drawn size into the comparison's folder, where
//! they are conditions, truth and thumbnails at once. The pairs that are trained on stay where they are.

pub(super) mod entry;
pub(super) mod problems;
pub(super) mod score;
pub(super) mod set;

pub use entry::ControlEntry;
pub use set::{Agreement, ControlSet, DrawnPairs, picture_places, table};

use crate::data::image::decode::MAX_FILE_BYTES;
use crate::data::image::palette::Palette;
use crate::data::pairs::{ConditionSource, PairFolder, shuffled};
use crate::error::{Error, ErrorKind, Result};
use crate::lab::compare::config::CompareConfig;
use crate::lab::compare::subject::{Material, Prompt, Subject, hash};
use crate::platform::files;
use crate::platform::observer::Observer;
use crate::train::config::TrainConfig;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Subjects of a comparison of control.
pub fn resolve(
    config: &CompareConfig,
    entries: &[ControlEntry],
    observer: &dyn Observer,
) -> Result<Vec<Subject>> {
    let resolution = TrainConfig::common(&config.train)?.data.resolution;
    let resolution =
        resolution.ok_or_else(|| Error::config("[train]: resolution is needed with [[control]]"))?;
    entries.iter().map(|entry| subject(config, entry, resolution, observer)).collect()
}

fn subject(
    config: &CompareConfig,
    entry: &ControlEntry,
    resolution: u32,
    observer: &dyn Observer,
) -> Result<Subject> {
    let place = |what: &str| format!("control `{}`: {what}", entry.name);
    let mut settings = entry.settings();
    settings.palette = settings.palette.as_deref().map(absolute).transpose()?;
    let palette = settings.palette.as_deref().map(Palette::read).transpose()?;
    let mut notes = entry.notes.clone();
    let read = |what: &str, path: &Path| {
        let named = |e: Error| if matches!(e.kind, ErrorKind::Data(_)) { e.at(place(what)) } else { e };
        PairFolder::read(path, &settings, observer).map_err(named)
    };
    let train = read("data_dir", &entry.data_dir)?;
    // The same files are other conditions where they are read as another kind, or coloured otherwise.
    let read_as = format!("{} {:?}", entry.condition, palette.as_ref().map(Palette::colours));
    let of_train = hashes(&train, train.pairs().len(), &read_as)?;
    let mut bad = vec![train.bad().len()];
    // What a picture, by its hash, must not be used for a second time.
    let mut taken = HashMap::new();
    let why = "is trained on too, as";
    take(&mut taken, &train, &of_train, |name| format!("{why} {name}; a score on it would mean nothing"));
    let mut drawn = |what: &str, path: &Path, most: Option<usize>| -> Result<DrawnPairs> {
        let folder = read(what, path)?;
        bad.push(folder.bad().len());
        let count = most.unwrap_or(usize::MAX).min(folder.pairs().len());
        let own = hashes(&folder, count, &read_as)?;
        let mut hashed = own.pictures.iter().zip(folder.pairs());
        if let Some((name, twin)) = hashed.find_map(|(hash, pair)| Some((&pair.name, taken.get(hash)?))) {
            return Err(Error::data(format!("{}: {name} {twin}", place(what))));
        }
        let why = "is among the pairs of the tables too, as";
        take(&mut taken, &folder, &own, |name| format!("{why} {name}; a search must not choose by them"));
        let key = format!("{} {resolution} {:?}", own.all, settings.thresholds);
        let shuffled = shuffled(&own.pictures);
        Ok(DrawnPairs { folder: Arc::new(folder), count, resolution, hash: hash(key.as_bytes()), shuffled })
    };
    // Those of the tables first: pairs to choose by must be none of them.
    let test = drawn("test_data_dir", &entry.test_data_dir, entry.num_test)?;
    let searched = config.search.as_ref().and(entry.validation_data_dir.as_deref());
    let validation =
        searched.map(|path| drawn("validation_data_dir", path, entry.num_validation)).transpose()?;
    let bad: usize = bad.iter().sum();
    if bad > 0 {
        let pairs = if bad == 1 { "1 pair" } else { &format!("{bad} pairs") };
        notes.push(format!("{pairs} could not be used and {} left out", if bad == 1 { "is" } else { "are" }));
    }
    if entry.agreement_score().is_none() {
        notes.push(format!(
            "conditions are of the kind `{}`: whether pictures follow them is not scored here",
            entry.condition
        ));
    }
    Ok(Subject {
        name: entry.name.clone(),
        class: entry.condition.to_string(),
        prompts: prompts(&test),
        validation_prompts: validation.as_ref().map(prompts).unwrap_or_default(),
        notes,
        material: Material::Pairs(ControlSet {
            train_data_dir: absolute(&entry.data_dir)?,
            train_hash: of_train.all,
            trained_pairs: train.pairs().len(),
            agreement: Agreement {
                condition: entry.condition,
                thresholds: settings.thresholds,
                background: palette.map_or(vec![[0; 3]], |palette| palette.background()),
            },
            settings,
            test,
            validation,
        }),
    })
}

/// The captions as prompts.
fn prompts(pairs: &DrawnPairs) -> Vec<Prompt> {
    pairs.captions().map(|caption| Prompt { prompt: caption.into(), text: caption.into() }).collect()
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::io("find", path, e))
}

struct Hashes {
    all: String,
    /// Of the picture of each pair.
    pictures: Vec<String>,
}

/// Notes why the pictures of pairs must not be used again; `why` is told their names.
fn take(taken: &mut HashMap<String, String>, pairs: &PairFolder, own: &Hashes, why: impl Fn(&str) -> String) {
    for (hash, pair) in own.pictures.iter().zip(pairs.pairs()) {
        taken.entry(hash.clone()).or_insert_with(|| why(&pair.name));
    }
}

/// Of everything that the first `count` pairs are, and of how they are read.
fn hashes(pairs: &PairFolder, count: usize, read_as: &str) -> Result<Hashes> {
    let mut text = format!("{read_as}\n");
    let mut pictures = Vec::new();
    let of_file = |path: &Path| files::read(path, MAX_FILE_BYTES).map(|bytes| hash(&bytes));
    for pair in &pairs.pairs()[..count] {
        let picture = of_file(&pair.image)?;
        let condition = match &pair.condition {
            ConditionSource::Made => "made".to_string(),
            ConditionSource::Picture { path, .. } => format!("picture {}", of_file(path)?),
            ConditionSource::Labels { path, .. } => format!("labels {}", of_file(path)?),
            ConditionSource::Points { points, .. } => format!("points {points:?}"),
        };
        text += &format!("{picture} {condition} {:?}\n", pair.caption);
        pictures.push(picture);
    }
    Ok(Hashes { all: hash(text.as_bytes()), pictures })
}
