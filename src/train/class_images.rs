//! Class pictures for prior preservation: the user's own, or made by the base model.
//!
//! Pictures that we make are seeded one by one, so an interrupted set is finished later and a larger one extends it. A
//! manifest beside them says from what they were made; a folder whose manifest says otherwise is refused, not mixed.

use crate::config::TrainConfig;
use crate::error::{Error, Result};
use crate::files;
use crate::image::png;
use crate::progress::Progress;
use crate::sample::{self, Noise, Settings};
use crate::sampler::SamplerKind;
use crate::seed;
use crate::stable_diffusion::StableDiffusion;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const MANIFEST_FILE: &str = "class_images.json";

/// What made class pictures depend on.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Manifest {
    model_fingerprint: String,
    prompt: String,
    scheduler: String,
    steps: usize,
    guidance: f64,
    resolution: u32,
    seed: u64,
}

/// Where the class pictures of this run are or will be.
pub fn folder(config: &TrainConfig) -> PathBuf {
    config.class_data_dir.clone().unwrap_or_else(|| config.output_dir.join("class_images"))
}

/// Makes sure that the class pictures are there, and says what was done.
pub fn ensure(model: &StableDiffusion, config: &TrainConfig, resolution: u32) -> Result<String> {
    let dir = folder(config);
    let scheduler = match config.class_scheduler {
        Some(kind) => kind,
        None => SamplerKind::from_config(&model.scheduler)?.0,
    };
    let manifest = Manifest {
        model_fingerprint: model.fingerprint()?,
        prompt: config.class_prompt.clone(),
        scheduler: scheduler.to_string(),
        steps: config.class_steps,
        guidance: config.class_guidance,
        resolution,
        seed: config.seed,
    };
    let path = dir.join(MANIFEST_FILE);
    if path.is_file() {
        check(&path, &manifest)?;
    } else if dir.is_dir() && !files::list_dir(&dir)?.is_empty() {
        return Ok(format!("class pictures: your own, in {}", dir.display()));
    } else {
        files::create_dir_all(&dir)?;
        let json = serde_json::to_string_pretty(&manifest).map_err(|e| Error::Data(e.to_string()))?;
        files::write_atomic(&path, json.as_bytes())?;
    }
    let missing: Vec<usize> = (0..config.num_class_images).filter(|i| !file(&dir, *i).is_file()).collect();
    if missing.is_empty() {
        return Ok(format!("class pictures: {} made before, in {}", config.num_class_images, dir.display()));
    }
    let made = missing.len();
    generate(model, config, &manifest, scheduler, &dir, &missing)?;
    Ok(format!(
        "class pictures: {made} made, {} there before, in {}",
        config.num_class_images - made,
        dir.display()
    ))
}

fn file(dir: &Path, index: usize) -> PathBuf {
    dir.join(format!("class-{index:05}.png"))
}

fn generate(
    model: &StableDiffusion,
    config: &TrainConfig,
    manifest: &Manifest,
    sampler: SamplerKind,
    dir: &Path,
    missing: &[usize],
) -> Result<()> {
    let settings = Settings {
        prompt: manifest.prompt.clone(),
        negative_prompt: String::new(),
        sampler,
        spacing: None,
        karras: None,
        steps: manifest.steps,
        guidance: manifest.guidance,
        width: i64::from(manifest.resolution),
        height: i64::from(manifest.resolution),
    };
    settings.validate(model)?;
    let name = model.dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let mut progress = Progress::new("class pictures", 0, missing.len() as u64);
    let mut done = 0;
    for indices in missing.chunks(config.sample_batch_size) {
        let seeds: Vec<u64> =
            indices.iter().map(|i| seed::derive(config.seed, "class image", *i as u64)).collect();
        let noise = Noise::draw(&seeds, &settings, model)?;
        let pictures = sample::sample(model, &settings, &noise, seeds.len(), &mut || {}).map_err(|e| match e {
            Error::Interrupted(_) => Error::Interrupted(format!(
                "stopped after {done} of {} class pictures\nhint: go on with `hra train --resume latest --output_dir {}`",
                missing.len(),
                config.output_dir.display()
            )),
            other => other,
        })?;
        for ((index, seed), picture) in indices.iter().zip(&seeds).zip(&pictures) {
            png::save_png(&file(dir, *index), &picture.image, &settings.to_text(Some(*seed), &name, ""))?;
        }
        done += indices.len();
        progress.set(done as u64, "");
    }
    progress.finish();
    Ok(())
}

/// Fails with every setting in which the pictures that are there differ from what this run would make.
fn check(path: &Path, wanted: &Manifest) -> Result<()> {
    let text = files::read_to_string(path)?;
    let found: Manifest = serde_json::from_str(&text).map_err(|e| Error::format(path, e.to_string()))?;
    if found == *wanted {
        return Ok(());
    }
    let json = |m: &Manifest| serde_json::to_value(m).map_err(|e| Error::format(path, e.to_string()));
    let (found, wanted) = (json(&found)?, json(wanted)?);
    let differences: Vec<String> = wanted
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, value)| found[key.as_str()] != **value)
        .map(|(key, value)| format!("{key}: made with {}, wanted is {value}", found[key.as_str()]))
        .collect();
    Err(Error::format(
        path,
        format!(
            "the class pictures there were made from other settings\n{}\nhint: give another --class_data_dir, or remove this folder",
            differences.join("\n")
        ),
    ))
}
