//! How well pictures keep to their conditions: edges and subjects of the pictures themselves, segmentation and landmarks from what
//! another program predicted. Files are paired by their names without the ending.

use crate::cli::prepare::{no_strip, thresholds};
use crate::data::image::landmarks::read_points;
use crate::data::image::palette::MapFile;
use crate::data::image::resize::resize_covering;
use crate::data::image::{Filter, LabelMap, Mask, Palette, RgbImage, Thresholds, canny, load_rgb};
use crate::error::{Error, Result};
use crate::lab::evaluate::control::{
    Confusion, Labels, Segmentation, landmark_error, overlap, subject_mask, subject_miou,
};
use crate::lab::results::{PictureScores, PromptScores, Scores};
use crate::platform::files;
use crate::platform::observer::Observer;
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Scores that a [`Confusion`] gives.
const SEGMENTATION: [&str; 3] = ["seg_miou", "seg_macc", "seg_aacc"];
/// So many names are listed in a message.
const MAX_NAMES: usize = 20;

/// Flags about conditions.
#[derive(Debug, Args)]
#[command(next_help_heading = "Conditions")]
pub struct ConditionArgs {
    /// The pictures that conditions were made of, with the same names: agreement of Canny edges
    #[arg(long, value_name = "DIR", requires = "pictures")]
    edges_of: Option<PathBuf>,
    /// Lower threshold of the edges
    #[arg(long, value_name = "N", default_value_t = 100.0, requires = "edges_of")]
    canny_low: f64,
    /// Upper threshold of the edges
    #[arg(long, value_name = "N", default_value_t = 200.0, requires = "edges_of")]
    canny_high: f64,
    /// Segmentation maps or masks with the same names: agreement of subject and background (the
    /// palette's first colour, and black where it is no class's; of class numbers 0)
    #[arg(long, value_name = "DIR", requires = "pictures")]
    subject_masks: Option<PathBuf>,
    /// True segmentation maps
    #[arg(long, value_name = "DIR", requires = "segmentation_predictions")]
    segmentation_truth: Option<PathBuf>,
    /// Predicted maps of the same names: PNG with a class for each pixel, or colours of --palette
    #[arg(long, value_name = "DIR", requires = "segmentation_truth")]
    segmentation_predictions: Option<PathBuf>,
    /// Colours of the classes: JSON, {"name": [r, g, b], ..} or [[r, g, b], ..]
    #[arg(long, value_name = "FILE")]
    palette: Option<PathBuf>,
    /// True label of pixels that do not count; in colours they are black, where that is no class's
    #[arg(long, value_name = "N", default_value_t = 255, requires = "segmentation_truth")]
    ignore_label: u16,
    /// True label 0 does not count and the others are one less (ADE20K); predictions count from 0
    #[arg(long, requires = "segmentation_truth")]
    reduce_zero_label: bool,
    /// True landmarks: .pts, JSON or text files
    #[arg(long, value_name = "DIR", requires = "landmarks_predictions")]
    landmarks_truth: Option<PathBuf>,
    /// Predicted landmarks of the same names; those without are counted and left out
    #[arg(long, value_name = "DIR", requires = "landmarks_truth")]
    landmarks_predictions: Option<PathBuf>,
    /// What true coordinates are multiplied by: 0.5 where they belong to pictures twice as large
    #[arg(long, value_name = "X", default_value_t = 1.0, requires = "landmarks_truth")]
    truth_scale: f64,
}

impl ConditionArgs {
    /// Whether none was given.
    pub fn nothing(&self) -> bool {
        [&self.edges_of, &self.subject_masks, &self.segmentation_truth, &self.landmarks_truth]
            .into_iter()
            .all(Option::is_none)
    }

    fn palette(&self) -> Result<Option<Palette>> {
        self.palette.as_deref().map(Palette::read).transpose()
    }
}

/// Files of a folder by their names without the ending.
type FilesByName = BTreeMap<OsString, PathBuf>;

/// What pictures are scored against, each with a file of its own.
pub struct ConditionFlags {
    edges: Option<(FilesByName, Thresholds)>,
    subjects: Option<FilesByName>,
    palette: Option<Palette>,
}

impl ConditionFlags {
    /// Finds the counterparts of the pictures. An error lists those that are missing.
    pub fn of<'a>(args: &ConditionArgs, pictures: impl Iterator<Item = &'a Path> + Clone) -> Result<Self> {
        let beside = |dir: &Option<PathBuf>, flag: &str| {
            let found = dir.as_deref().map(|dir| named(dir, &["txt", "json", "jsonl", "csv"])).transpose()?;
            if let (Some(dir), Some(found)) = (dir, &found) {
                all_there(flag, dir, found, pictures.clone())?;
            }
            Ok::<_, Error>(found)
        };
        let thresholds = thresholds(args.canny_low, args.canny_high, ["--canny-low", "--canny-high"])?;
        Ok(Self {
            edges: beside(&args.edges_of, "--edges-of")?.map(|found| (found, thresholds)),
            subjects: beside(&args.subject_masks, "--subject-masks")?,
            palette: args.palette()?,
        })
    }

    /// The scores of the picture that was read from `path`. Counterparts of another size are resized and cut as conditions are.
    pub fn score(&self, path: &Path, picture: &RgbImage) -> Result<Scores> {
        let counterpart = |found: &'_ FilesByName| found.get(files::stem(path)).cloned();
        let mut scores = Scores::new();
        if let Some((files, thresholds)) = &self.edges
            && let Some(source) = counterpart(files)
        {
            let truth = load_rgb(&source)?;
            let shown = picture.dimensions();
            let truth = if truth.dimensions() == shown {
                truth
            } else {
                no_strip(&source, truth.dimensions())?;
                resize_covering(&truth, shown, Filter::Bilinear)
            };
            let edges = overlap(&canny(&truth, *thresholds), &canny(picture, *thresholds));
            scores.extend([("edge_f1".to_string(), edges.f1), ("edge_iou".to_string(), edges.iou)]);
        }
        if let Some(files) = &self.subjects
            && let Some(source) = counterpart(files)
        {
            let truth: Mask = MapFile::read(&source)?.subject(self.palette.as_ref());
            no_strip(&source, truth.dimensions())?;
            let (width, height) = picture.dimensions();
            let truth = truth.covering(width, height);
            scores.insert("subject_miou".to_string(), subject_miou(&truth, &subject_mask(picture)));
        }
        Ok(scores)
    }
}

/// Scores of files that other programs predicted.
#[derive(Default)]
pub struct FileScores {
    /// With the number of maps and the names of classes.
    segmentation: Option<(Segmentation, usize, Vec<String>)>,
    landmarks: Option<Landmarks>,
}

/// Files of landmarks, each with its error or named among those that have none.
#[derive(Default)]
struct Landmarks {
    pictures: Vec<PictureScores>,
    /// Without a prediction: no file, or a file without points.
    missing: Vec<String>,
    /// Without points in the true file.
    pointless: Vec<String>,
}

impl FileScores {
    /// Reads and scores all files.
    pub fn of(args: &ConditionArgs, observer: &dyn Observer) -> Result<Self> {
        let segmentation =
            match args.segmentation_truth.as_deref().zip(args.segmentation_predictions.as_deref()) {
                Some((truth, predictions)) => Some(segmentation(args, truth, predictions, observer)?),
                None => None,
            };
        let mut landmarks = None;
        if let Some((truth, predictions)) =
            args.landmarks_truth.as_deref().zip(args.landmarks_predictions.as_deref())
        {
            if !(args.truth_scale.is_finite() && args.truth_scale > 0.0) {
                let scale = args.truth_scale;
                return Err(Error::config(format!(
                    "--truth-scale: expected a number above 0, found {scale}"
                )));
            }
            landmarks = Some(landmark_errors(truth, predictions, args.truth_scale)?);
        }
        Ok(Self { segmentation, landmarks })
    }

    /// Each landmark file that has an error, as a picture.
    pub fn pictures(&self) -> Option<PromptScores> {
        let pictures = self.landmarks.as_ref()?.pictures.clone();
        Some(PromptScores { prompt: String::new(), scores: Scores::new(), pictures })
    }

    /// Those of all maps together.
    pub fn scores(&self) -> Scores {
        let Some((scores, ..)) = &self.segmentation else { return Scores::new() };
        let values = [scores.miou, scores.macc, scores.aacc];
        SEGMENTATION.into_iter().zip(values).map(|(key, value)| (key.to_string(), value)).collect()
    }

    /// How many maps the score `key` is of; `None` if it is none of maps.
    pub fn maps(&self, key: &str) -> Option<usize> {
        self.segmentation.as_ref().filter(|_| SEGMENTATION.contains(&key)).map(|(_, maps, _)| *maps)
    }

    /// What a reader of the table must know.
    pub fn note(&self) -> Option<String> {
        let Landmarks { pictures, missing, pointless } = self.landmarks.as_ref()?;
        let (scored, pointless) = (pictures.len(), pointless.len());
        let all = scored + missing.len() + pointless;
        let none = if pointless > 0 {
            format!("; {pointless} left out: no points in the truth")
        } else {
            String::new()
        };
        Some(format!("landmarks: {scored} of {all} pictures have a prediction{none}"))
    }

    /// IoU of each class.
    pub fn segmentation_json(&self) -> Value {
        let Some((scores, maps, names)) = &self.segmentation else { return Value::Null };
        let class = |(class, iou): (&u16, &f64)| json!({"class": class, "name": names.get(usize::from(*class)), "iou": iou});
        json!({"maps": maps, "classes": scores.iou.iter().map(class).collect::<Vec<_>>()})
    }

    /// Which pictures have no prediction.
    pub fn landmarks_json(&self) -> Value {
        let Some(Landmarks { pictures, missing, pointless }) = &self.landmarks else { return Value::Null };
        let all = pictures.len() + missing.len() + pointless.len();
        json!({"pictures": all, "without_prediction": missing, "without_truth": pointless})
    }
}

fn segmentation(
    args: &ConditionArgs,
    truth: &Path,
    predictions: &Path,
    observer: &dyn Observer,
) -> Result<(Segmentation, usize, Vec<String>)> {
    let not_maps = ["txt", "json", "jsonl", "csv"];
    let (truth, found) = (named(truth, &not_maps)?, named(predictions, &not_maps)?);
    all_there("--segmentation-predictions", predictions, &found, truth.values().map(PathBuf::as_path))?;
    let palette = args.palette()?;
    let labels = Labels {
        classes: palette.as_ref().map(|palette| palette.colours().len()),
        ignored: Some(args.ignore_label),
        reduce_zero: args.reduce_zero_label,
    };
    let mut confusion = Confusion::default();
    for (stem, path) in &truth {
        observer.check(|| "stopped; nothing was written".to_string())?;
        let Some(predicted) = found.get(stem) else { continue };
        let true_map = LabelMap::read_truth(path, palette.as_ref(), args.ignore_label)?;
        let counted = confusion.add(&true_map, &LabelMap::read(predicted, palette.as_ref())?, labels);
        counted
            .map_err(|problem| Error::format(predicted, format!("{problem} (truth: {})", path.display())))?;
    }
    let scores = confusion.scores().ok_or_else(|| {
        let folder = args.segmentation_truth.as_deref().unwrap_or(Path::new("")).display();
        Error::data(format!("{folder}: expected maps with labels that count, found none"))
    })?;
    Ok((scores, truth.len(), palette.map(|palette| palette.names().to_vec()).unwrap_or_default()))
}

fn landmark_errors(truth: &Path, predictions: &Path, scale: f64) -> Result<Landmarks> {
    let not_points = ["jsonl", "csv", "png", "jpg", "jpeg"];
    let (truth_dir, truth, found) = (truth, named(truth, &not_points)?, named(predictions, &not_points)?);
    let Landmarks { mut pictures, mut missing, mut pointless } = Landmarks::default();
    for (stem, path) in &truth {
        let points = read_points(path)?;
        if points.is_empty() {
            pointless.push(stem.to_string_lossy().into_owned());
            continue;
        }
        let predicted = found.get(stem).map(|path| Ok::<_, Error>((path, read_points(path)?))).transpose()?;
        let Some((file, predicted)) = predicted.filter(|(_, points)| !points.is_empty()) else {
            missing.push(stem.to_string_lossy().into_owned());
            continue;
        };
        let error = landmark_error(&points, &predicted, scale).ok_or_else(|| {
            let (expected, found) = (points.len(), predicted.len());
            Error::format(file, format!("expected {expected} points as {}, found {found}", path.display()))
        })?;
        let scores = Scores::from([("landmark_error".to_string(), error)]);
        pictures.push(PictureScores { seed: 0, file: file.to_string_lossy().into_owned(), scores });
    }
    if pictures.is_empty() {
        return Err(Error::data(format!(
            "{}: expected predictions of the files in {}, found none of {}",
            predictions.display(),
            truth_dir.display(),
            truth.len()
        )));
    }
    Ok(Landmarks { pictures, missing, pointless })
}

/// The files of a folder by their names without the ending, but those with these endings.
fn named(dir: &Path, others: &[&str]) -> Result<FilesByName> {
    let all = files::list_files(dir, |end| !others.contains(&end))?;
    let (found, again) = files::by_stem(all, |path| path);
    if let Some(two) = again.first() {
        let (one, two) = (found[files::stem(two)].display(), two.display());
        return Err(Error::data(format!("expected one file of a name, found {one} and {two}")));
    }
    if found.is_empty() {
        return Err(Error::data(format!("{}: expected files to score with, found none", dir.display())));
    }
    Ok(found)
}

/// Fails if a file has no counterpart, and lists them.
fn all_there<'a>(
    flag: &str,
    dir: &Path,
    found: &FilesByName,
    of: impl Iterator<Item = &'a Path>,
) -> Result<()> {
    let missing: Vec<&Path> = of.filter(|path| !found.contains_key(files::stem(path))).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: String =
        missing.iter().take(MAX_NAMES).map(|path| format!("\n  {}", path.display())).collect();
    let more = missing.len().saturating_sub(MAX_NAMES);
    let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
    Err(Error::data(format!(
        "{flag}: expected a file of the same name, but for the ending, in {} for each; {} have none:{names}{more}",
        dir.display(),
        missing.len()
    )))
}
