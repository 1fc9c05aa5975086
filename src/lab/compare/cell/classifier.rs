//! A cell's model as a classifier: drawn from nothing, trained by nothing, asked once for each picture and adapter scale.

use crate::data::image::tensor;
use crate::data::{Crop, ImageFolder};
use crate::diffusion::sample::Session;
use crate::error::{Error, ErrorKind, Result};
use crate::lab::compare::cell::{Cell, adapter_folder, has_weights};
use crate::lab::compare::draw;
use crate::lab::compare::task::{Task, TaskClassifier};
use crate::lab::evaluate::DiffusionClassifier;
use crate::lab::results::{
    self, CLASSIFIER_PICTURES, ClassifiedPicture, ClassifierPoint, ClassifierRecord, PlannedClassifier,
};
use std::path::Path;
use tch::Tensor;

/// In each cell's folder: answers so far.
pub(super) const ANSWERS_FILE: &str = "classifier.json";

impl Cell<'_> {
    /// The answers, of which those that are there are not asked for again. Errors: weights that are gone; this starts no training.
    pub(super) fn classify(&self) -> Result<Option<ClassifierRecord>> {
        let Some(wanted) = &self.task.classifier else { return Ok(None) };
        let mut record = kept(&self.folder, wanted);
        if wanted.is_answered(&record) {
            return Ok(Some(record));
        }
        let _guard = tch::no_grad_guard();
        let mut session = draw::open(&self.config, &self.compute, self.observer)?;
        let latents = self.latents(&session, &wanted.asked)?;
        let (done, begun) =
            std::mem::take(&mut record.points).into_iter().partition(ClassifierPoint::is_done);
        record.points = done;
        for &scale in &wanted.scales {
            if record.at(scale).is_some() {
                continue;
            }
            if let Some(adapter) = self.adapter(wanted.step) {
                if !has_weights(&adapter) {
                    return Err(gone(&adapter));
                }
                draw::put_on(&mut session, &self.config, &adapter, scale)?;
            }
            let begun = begun.iter().find(|point| point.scale == scale).cloned();
            let point = begun.unwrap_or_else(|| ClassifierPoint {
                step: wanted.step,
                scale,
                errors: Vec::new(),
                accuracy: None,
                failure: None,
            });
            let point = self.rest(point, &session, &latents, &wanted.asked, &record)?;
            record.points.push(point);
        }
        Ok(Some(record))
    }

    /// A point with the rest of its answers, each kept beside the record's as soon as it is there.
    fn rest(
        &self,
        mut point: ClassifierPoint,
        session: &Session,
        latents: &[Tensor],
        asked: &PlannedClassifier,
        record: &ClassifierRecord,
    ) -> Result<ClassifierPoint> {
        let keep = |point: &ClassifierPoint| {
            let points = record.points.iter().chain([point]).cloned().collect();
            let record = ClassifierRecord { made_with: record.made_with.clone(), points };
            results::write_json(&self.folder.join(ANSWERS_FILE), &record)
        };
        let (noise, batch) = ((asked.num_noises, asked.seed), self.config.prior.sample_batch_size);
        let shape = latents.first().map(Tensor::size).unwrap_or_default();
        let classifier = DiffusionClassifier::new(session.model(), &asked.prompts, noise, &shape, batch)?;
        for latents in latents.iter().skip(point.errors.len()) {
            match classifier.errors(latents, self.observer) {
                // A scale too far is a point that is missing; the base model has none.
                Err(Error { kind: ErrorKind::NotFinite(why), .. }) if !self.task.cell.is_base() => {
                    let why = why.lines().next().unwrap_or_default().to_string();
                    self.observer
                        .note(&format!("scale {}: no answers of the classifier: {why}", point.scale));
                    point.failure = Some(why);
                    break;
                }
                errors => point.errors.push(errors?),
            }
            keep(&point)?;
        }
        if point.failure.is_none() {
            let right = point.right(&asked.pictures);
            let count = right.iter().filter(|right| **right).count();
            point.accuracy = Some(count as f64 / right.len() as f64);
            let (scale, all) = (point.scale, right.len());
            self.observer.say(&format!("classifier, scale {scale}: {count} of {all} pictures told right"));
        }
        keep(&point)?;
        Ok(point)
    }

    /// The middle of each picture as scaled latents, the mean of what the VAE says, `(1, c, h, w)`.
    fn latents(&self, session: &Session, asked: &PlannedClassifier) -> Result<Vec<Tensor>> {
        let model = session.model();
        let resolution = self.config.data.resolution.unwrap_or(model.native_size() as u32);
        let folder =
            ImageFolder::scan(&self.comparison.join(CLASSIFIER_PICTURES), self.config.data.background)?;
        let latents = |picture: &ClassifiedPicture| {
            let path = self.comparison.join(&picture.file);
            let missing = || {
                Error::data(format!("{}: expected a picture of the classifier, found none", path.display()))
            };
            let index = folder.images().iter().position(|image| image.path == path).ok_or_else(missing)?;
            let window = folder.crop_window(index, resolution, Crop::Center);
            let (mean, _) = model.vae.encode(&tensor::signed(&folder.prepare(index, resolution, window)?));
            Ok(model.vae.scaling().to_unet(&mean))
        };
        if asked.pictures.is_empty() {
            return Err(Error::data("classifier: expected pictures to classify, found none"));
        }
        asked.pictures.iter().map(latents).collect()
    }
}

/// The answers to the same question that a cell's folder holds.
fn kept(folder: &Path, wanted: &TaskClassifier) -> ClassifierRecord {
    let made_with = &wanted.asked.made_with;
    let found = results::read_json::<ClassifierRecord>(&folder.join(ANSWERS_FILE)).ok();
    found
        .filter(|found| found.made_with == *made_with)
        .unwrap_or_else(|| ClassifierRecord { made_with: made_with.clone(), points: Vec::new() })
}

/// Rows of the network's calls that a task's answers still need; `None` where it is asked nothing.
pub fn questions(comparison: &Path, task: &Task) -> Option<usize> {
    let wanted = task.classifier.as_ref()?;
    let record = kept(&results::cell_folder(comparison, &task.cell.id), wanted);
    let PlannedClassifier { prompts, pictures, num_noises, .. } = &wanted.asked;
    let left = |scale: &f64| match record.at(*scale) {
        Some(point) if point.is_done() => 0,
        Some(point) => pictures.len().saturating_sub(point.errors.len()),
        None => pictures.len(),
    };
    Some(wanted.scales.iter().map(left).sum::<usize>() * prompts.len() * num_noises)
}

/// Fails where the model of a training that is done cannot be asked: its weights were removed since.
pub(super) fn check_weights(comparison: &Path, task: &Task) -> Result<()> {
    let Some(wanted) = &task.classifier else { return Ok(()) };
    let adapter = adapter_folder(&task.train_config(comparison), wanted.step);
    let folder = results::cell_folder(comparison, &task.cell.id);
    if wanted.is_answered(&kept(&folder, wanted)) || has_weights(&adapter) {
        return Ok(());
    }
    Err(gone(&adapter))
}

fn gone(adapter: &Path) -> Error {
    Error::run(format!(
        "{}: expected trained weights to ask as a classifier, found none: remove_weights removes them when a comparison is done",
        adapter.display()
    ))
    .with_hint("leave [classifier] as it was; or take the cell's folder away, to train it anew")
}
