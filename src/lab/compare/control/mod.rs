//! Control in a comparison: sets of pairs, those of the tables rendered at the drawn size into the comparison's folder, where
//! they are conditions, truth and thumbnails at once. The pairs that are trained on stay where they are.

mod entry;
pub(super) mod score;

pub use entry::{ControlEntry, problems};

use crate::data::Crop;
use crate::data::image::decode::MAX_FILE_BYTES;
use crate::data::image::edges::Thresholds;
use crate::data::image::palette::Palette;
use crate::data::image::png::save_png;
use crate::data::pairs::{ConditionKind, ConditionSource, PairFolder, PairSettings, shuffled};
use crate::error::{Error, Result};
use crate::lab::compare::config::CompareConfig;
use crate::lab::compare::subjects::{Prompt, Subject, hash};
use crate::lab::results::{PlannedControl, PlannedPairs, Set};
use crate::platform::files;
use crate::platform::observer::Observer;
use crate::train::config::TrainConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How drawn pictures are compared with their conditions; a part of a cell's task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// What the conditions are.
    pub condition: ConditionKind,
    /// Of the edges that are compared.
    pub thresholds: Thresholds,
    /// The background's colours in segmentation maps.
    pub background: Vec<[u8; 3]>,
}

/// Pairs of a subject of a comparison, looked at.
#[derive(Debug, Clone)]
pub struct ControlSet {
    /// How they are read.
    pub settings: PairSettings,
    /// Table or folder of the pairs that are trained on, absolute.
    pub train_data_dir: PathBuf,
    /// Of all files that are trained on.
    pub train_hash: String,
    /// How many they are.
    pub trained_pairs: usize,
    /// How pictures are scored.
    pub agreement: Agreement,
    /// For the tables.
    pub test: DrawnPairs,
    /// To choose by; may be none.
    pub validation: Option<DrawnPairs>,
}

/// Pairs that are drawn from.
#[derive(Debug, Clone)]
pub struct DrawnPairs {
    folder: Arc<PairFolder>,
    /// The first so many.
    count: usize,
    /// Side of the squares in pixels.
    resolution: u32,
    /// Of their files and how they are rendered.
    pub hash: String,
    /// For each pair the one whose condition it is drawn with too; see [`shuffled`].
    pub shuffled: Vec<usize>,
}

/// Subjects of a comparison of control.
pub fn resolve(config: &CompareConfig, observer: &dyn Observer) -> Result<Vec<Subject>> {
    let resolution = TrainConfig::from_tables(&[&config.train])?.resolution;
    let resolution =
        resolution.ok_or_else(|| Error::config("[train]: resolution is needed with [[control]]"))?;
    config.controls.iter().map(|entry| subject(config, entry, resolution, observer)).collect()
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
        let named = |e: Error| match e {
            Error::Data(text) => Error::Data(format!("{}: {text}", place(what))),
            other => other,
        };
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
            return Err(Error::Data(format!("{}: {name} {twin}", place(what))));
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
        prompts: test.prompts(),
        validation_prompts: validation.as_ref().map(DrawnPairs::prompts).unwrap_or_default(),
        notes,
        control: Some(ControlSet {
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
        ..Subject::default()
    })
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

impl DrawnPairs {
    fn prompts(&self) -> Vec<Prompt> {
        let prompt = |i| {
            let caption = self.folder.caption(i).to_string();
            Prompt { prompt: caption.clone(), text: caption }
        };
        (0..self.count).map(prompt).collect()
    }

    /// Renders pictures and conditions into `subject` as KIND/ and KIND_conditions/, and their table KIND.jsonl, unless the
    /// same are there.
    fn render(&self, subject: &Path, kind: &str, settings: &PairSettings) -> Result<()> {
        let (done, table) = (subject.join(format!("{kind}.hash")), table(subject, kind));
        if done.is_file() && table.is_file() && files::read_to_string(&done)? == self.hash {
            return Ok(());
        }
        let folders = [subject.join(kind), subject.join(format!("{kind}_conditions"))];
        for folder in &folders {
            files::remove_dir_all(folder)?;
            files::create_dir_all(folder)?;
        }
        let mut lines = String::new();
        for i in 0..self.count {
            let window = self.folder.crop_window(i, self.resolution, Crop::Center);
            let (picture, condition) = self.folder.prepare(i, self.resolution, window)?;
            for (folder, image) in folders.iter().zip([&picture, &condition]) {
                save_png(&folder.join(file_name(i)), image, &[])?;
            }
            let row = [
                (&settings.image_column, format!("{kind}/{}", file_name(i))),
                (&settings.caption_column, self.folder.caption(i).to_string()),
                (&settings.conditioning_image_column, format!("{kind}_conditions/{}", file_name(i))),
            ];
            let row: Map<String, Value> =
                row.into_iter().map(|(column, text)| (column.clone(), text.into())).collect();
            lines += &format!("{}\n", Value::Object(row));
        }
        files::write_atomic(&table, lines.as_bytes())?;
        files::write_atomic(&done, self.hash.as_bytes())
    }

    fn planned(&self, name: &str, kind: &str) -> PlannedPairs {
        PlannedPairs {
            pictures: picture_places(name, kind, self.count),
            conditions: picture_places(name, &format!("{kind}_conditions"), self.count),
            shuffled: self.shuffled.clone(),
        }
    }
}

fn file_name(pair: usize) -> String {
    format!("{pair:05}.png")
}

/// Where the pictures of `count` pairs are in the comparison's folder.
pub fn picture_places(subject: &str, folder: &str, count: usize) -> Vec<String> {
    (0..count).map(|i| format!("subjects/{subject}/{folder}/{}", file_name(i))).collect()
}

/// The table of rendered pairs in a subject's folder.
pub fn table(subject: &Path, kind: &str) -> PathBuf {
    subject.join(format!("{kind}.jsonl"))
}

impl ControlSet {
    /// Renders the pairs that are drawn from into the comparison's folder.
    pub fn copy_into(&self, subject: &Path) -> Result<()> {
        files::create_dir_all(subject)?;
        self.test.render(subject, "test", &self.settings)?;
        match &self.validation {
            Some(pairs) => pairs.render(subject, "validation", &self.settings),
            None => {
                // Of an earlier plan: held-out losses would be measured on it.
                files::remove_file(&table(subject, "validation"))?;
                files::remove_dir_all(&subject.join("validation"))?;
                files::remove_dir_all(&subject.join("validation_conditions"))
            }
        }
    }

    /// Identity of the pairs of a set; empty where there are none.
    pub fn hash(&self, set: Set) -> &str {
        match set {
            Set::Test => &self.test.hash,
            Set::Validation => self.validation.as_ref().map_or("", |pairs| &pairs.hash),
        }
    }

    /// For each pair of a set the one whose condition it is drawn with too.
    pub fn shuffled(&self, set: Set) -> &[usize] {
        match set {
            Set::Test => &self.test.shuffled,
            Set::Validation => self.validation.as_ref().map_or(&[], |pairs| &pairs.shuffled),
        }
    }

    /// For readers of the plan.
    pub fn planned(&self, name: &str) -> PlannedControl {
        PlannedControl {
            condition: self.agreement.condition.to_string(),
            trained_pairs: self.trained_pairs,
            test: self.test.planned(name, "test"),
            validation: self.validation.as_ref().map(|v| v.planned(name, "validation")).unwrap_or_default(),
        }
    }
}
