//! Class pictures for prior preservation: the user's own, or made by the base model.
//!
//! Pictures that we make are seeded one by one, so an interrupted set is finished later and a larger one extends it. What is
//! missing is drawn with the neighbours that it would have had, because a picture's last bits depend on the batch. A
//! manifest beside them says from what they were made; a folder whose manifest says otherwise is refused, not mixed.

use crate::data::ImageFolder;
use crate::data::image::png;
use crate::diffusion::sample::{Request, SampleSettings, Session};
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, ErrorKind, Result};
use crate::model::control::Control;
use crate::platform::observer::{Counter, Event, Observer};
use crate::platform::{files, seed};
use crate::train::config::TrainConfig;
use crate::weights::prediction::Prediction;
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::path::{Path, PathBuf};

const MANIFEST_FILE: &str = "class_images.json";

/// What made class pictures depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Manifest {
    model_fingerprint: String,
    prompt: String,
    scheduler: String,
    steps: usize,
    guidance: f64,
    resolution: u32,
    /// Where the settings say it over the model's files.
    prediction: Option<Prediction>,
    /// Of the VAE in place of the model's own: [`Source::vae_fingerprint`](crate::weights::source::Source::vae_fingerprint).
    vae: Option<String>,
    /// Of the run that began the set; a run with another seed goes on with this one.
    seed: u64,
}

/// The class pictures of a run, checked but not made yet.
pub struct ClassImages {
    dir: PathBuf,
    /// `None` if the pictures are the user's own.
    manifest: Option<Manifest>,
    settings: SampleSettings,
}

/// Where the class pictures of this run are or will be.
pub fn folder(config: &TrainConfig) -> PathBuf {
    config.prior.class_data_dir.clone().unwrap_or_else(|| config.output_dir.join("class_images"))
}

/// How many of `total` pictures that we make are not in `dir`.
pub fn missing(dir: &Path, total: usize) -> usize {
    (0..total).filter(|index| !file(dir, *index).is_file()).count()
}

fn file(dir: &Path, index: usize) -> PathBuf {
    dir.join(format!("class-{index:05}.png"))
}

impl ClassImages {
    /// Refuses settings that the model cannot draw, pictures made from others, and own folders without a picture.
    pub fn check(
        model: &StableDiffusion,
        config: &TrainConfig,
        resolution: u32,
        fingerprint: &str,
    ) -> Result<Self> {
        let dir = folder(config);
        let settings = SampleSettings::square(
            model,
            &config.prior.class_prompt,
            config.prior.class_scheduler,
            config.prior.class_steps,
            config.prior.class_guidance,
            resolution,
        )?;
        settings.validate(model)?;
        let mut manifest = Manifest {
            model_fingerprint: fingerprint.to_string(),
            prompt: config.prior.class_prompt.clone(),
            scheduler: settings.sampler.to_string(),
            steps: config.prior.class_steps,
            guidance: config.prior.class_guidance,
            resolution,
            prediction: config.model.prediction,
            vae: model.source.vae_fingerprint()?,
            seed: config.seed,
        };
        let path = dir.join(MANIFEST_FILE);
        if path.is_file() {
            manifest.seed = same_settings(&path, &manifest)?;
        } else if has_files(&dir)? {
            ImageFolder::scan(&dir, config.data.background)?;
            return Ok(Self { dir, manifest: None, settings });
        }
        Ok(Self { dir, manifest: Some(manifest), settings })
    }

    /// Makes the pictures that are missing, and says what was done.
    pub fn make(
        &self,
        model: &StableDiffusion,
        config: &TrainConfig,
        observer: &dyn Observer,
    ) -> Result<String> {
        let dir = self.dir.display();
        let Some(manifest) = &self.manifest else { return Ok(format!("class pictures: your own, in {dir}")) };
        files::create_dir_all(&self.dir)?;
        let json = serde_json::to_string_pretty(manifest).map_err(|e| Error::data(e.to_string()))?;
        files::write_atomic(&self.dir.join(MANIFEST_FILE), json.as_bytes())?;
        let total = config.prior.num_class_images;
        let missing = missing(&self.dir, total);
        if missing == 0 {
            return Ok(format!("class pictures: {total} made before, in {dir}"));
        }
        self.generate(model, config, manifest.seed, missing, observer)?;
        Ok(format!("class pictures: {missing} made, {} there before, in {dir}", total - missing))
    }

    fn is_missing(&self, index: usize) -> bool {
        !self.file(index).is_file()
    }

    fn file(&self, index: usize) -> PathBuf {
        file(&self.dir, index)
    }

    fn generate(
        &self,
        model: &StableDiffusion,
        config: &TrainConfig,
        seed: u64,
        missing: usize,
        observer: &dyn Observer,
    ) -> Result<()> {
        let name = model.name();
        let mut session: Session<_, Control> = Session::over(model, None);
        let progress = Counter::new(observer, "class pictures", 0, missing as u64);
        let mut done = 0u64;
        let all: Vec<usize> = (0..config.prior.num_class_images).collect();
        for indices in all.chunks(config.prior.sample_batch_size) {
            let missing_here: Vec<usize> = indices.iter().copied().filter(|i| self.is_missing(*i)).collect();
            if missing_here.is_empty() {
                continue;
            }
            let seeds: Vec<u64> =
                indices.iter().map(|i| seed::derive(seed, "class image", *i as u64)).collect();
            let request = Request::new(&self.settings, &seeds, seeds.len());
            let (calls, called) = (session.calls(&request)?, Cell::new(0));
            let tick = || {
                called.set(called.get() + 1);
                let drawing = format!("drawing {}, call {} of {calls}", seeds.len(), called.get());
                progress.set(done, &drawing);
            };
            let drawn = session.draw(&Request { tick: Some(&tick), ..request }, observer);
            let pictures = drawn.map_err(|e| match e.kind {
                ErrorKind::Interrupted(_) => {
                    let folder = files::shell_word(&config.output_dir.to_string_lossy());
                    Error::interrupted(format!("stopped after {done} of {missing} class pictures"))
                        .with_hint(format!("go on with `hra train --resume latest --output_dir {folder}`"))
                }
                _ => e,
            })?;
            let drawn = indices.iter().zip(&seeds).zip(&pictures);
            for ((index, seed), picture) in drawn.filter(|((index, _), _)| missing_here.contains(index)) {
                let text = self.settings.to_text(Some(*seed), &name, "");
                png::save_png(&self.file(*index), &picture.image, &text)?;
                observer.tell(Event::Picture(&self.file(*index)));
            }
            done += missing_here.len() as u64;
            progress.set(done, "");
        }
        Ok(())
    }
}

/// Whether a folder holds anything but hidden files.
fn has_files(dir: &Path) -> Result<bool> {
    Ok(dir.is_dir()
        && files::list_dir(dir)?.iter().any(|entry| !entry.name.to_string_lossy().starts_with('.')))
}

/// The seed of the pictures that are there, or an error with every setting in which they differ from `wanted`.
fn same_settings(path: &Path, wanted: &Manifest) -> Result<u64> {
    let text = files::read_to_string(path)?;
    let found: Manifest = serde_json::from_str(&text).map_err(|e| Error::format(path, e.to_string()))?;
    let seed = found.seed;
    let json = |m: &Manifest| serde_json::to_value(m).map_err(|e| Error::format(path, e.to_string()));
    let (found, wanted) = (json(&found)?, json(&Manifest { seed, ..wanted.clone() })?);
    let differences: Vec<String> = wanted
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, value)| found[key.as_str()] != **value)
        .map(|(key, value)| format!("{key}: made with {}, wanted is {value}", found[key.as_str()]))
        .collect();
    if differences.is_empty() {
        return Ok(seed);
    }
    Err(Error::format(
        path,
        format!("the class pictures there were made from other settings\n{}", differences.join("\n")),
    )
    .with_hint("give another --class_data_dir, or remove this folder"))
}
