//! `hra train --score`: every checkpoint of one run drawn from and scored, after the training.

use crate::data::image::RgbImage;
use crate::diffusion::sample::Strength;
use crate::error::{Error, Result};
use crate::lab::compare::draw::{self, Sampling, SetDrawing};
use crate::lab::compare::score;
use crate::lab::compare::subject::Prompt;
use crate::lab::evaluate::scores::without_token;
use crate::lab::evaluate::{TowerPaths, Towers};
use crate::lab::report::{best_step, steps_plot};
use crate::lab::results::{self, Evaluation, Set};
use crate::platform::observer::Observer;
use crate::platform::{device, files};
use crate::train::checkpoint;
use crate::train::config::TrainConfig;
use std::path::{Path, PathBuf};

const FOLDER: &str = "scores";

/// What to score a run's checkpoints by, beside the settings of its previews.
#[derive(Debug, Clone)]
pub struct Judges {
    /// The towers.
    pub towers: TowerPaths,
    /// The rare token, which CLIP-T's texts are without.
    pub token: String,
    /// Prompts without the subject, for drift; may be empty.
    pub drift_prompts: Vec<String>,
}

/// The scores of a run.
#[derive(Debug)]
pub struct Scored {
    /// `scores/` of the run folder: `scores.json`, `scores.svg`, and the pictures.
    pub folder: PathBuf,
    /// By step, ascending.
    pub evaluations: Vec<Evaluation>,
    /// The step with the largest sum of picture and text similarity; `None` where neither is measured.
    pub best: Option<i64>,
    /// Steps whose pictures of `--drift-prompt` are further from the base model's than those are from each other.
    pub lost: Vec<i64>,
}

/// Similarities that the best step is chosen by, each the first that is there.
const CHOICES: [&[&str]; 2] = [&["dino", "dinov2", "clip_i"], &["clip_t"]];

/// Fails for settings that leave nothing to score; for a look before the training.
pub fn check(config: &TrainConfig, judges: &Judges, observer: &dyn Observer) -> Result<()> {
    if config.is_control() {
        return Err(Error::config("--score: expected a training on a subject, found one of control")
            .with_hint("`hra compare` scores control (docs/compare.md)"));
    }
    if config.previews.validation_prompt.is_empty() || config.previews.num_validation_images == 0 {
        return Err(Error::config(
            "--score: expected a --validation-prompt or more, which every checkpoint is drawn from",
        ));
    }
    if judges.towers == TowerPaths::default() && judges.drift_prompts.is_empty() {
        return Err(Error::config("--score: expected something to score with, found none")
            .with_hint("give --clip DIR, --dino DIR or --drift-prompt TEXT"));
    }
    if config.optimizer.use_ema {
        return Err(Error::config(
            "--score: checkpoints hold the adapter itself and the end of a run with --use_ema its average, which do \
             not compare",
        ).with_hint("leave one of them out"));
    }
    crate::lab::evaluate::towers::identity(&judges.towers, observer).map(|_| ())
}

/// Draws the validation prompts from every checkpoint that the run has, and from its end, and scores them against the
/// held-out pictures. What was drawn before is not drawn again.
pub fn score(config: &TrainConfig, judges: &Judges, observer: &dyn Observer) -> Result<Scored> {
    check(config, judges, observer)?;
    let run = &config.output_dir;
    let compute = device::resolve(config.device, Some(config.model.dtype))?;
    let mut session = draw::open(config, &compute, observer)?;
    let resolution = config.data.resolution.unwrap_or(session.model().native_size() as u32);
    let fingerprint = session.model().fingerprint()?;
    let drawing = |prompts: &[String]| -> Result<SetDrawing> {
        let sampling = Sampling {
            seed: config.seed,
            scheduler: config.previews.validation_scheduler,
            steps: config.previews.validation_inference_steps,
            guidance: config.previews.validation_guidance,
            control: Strength::default(),
        };
        Ok(SetDrawing {
            sampling,
            model: fingerprint.clone(),
            resolution,
            batch: config.prior.sample_batch_size,
            prompts: prompts.to_vec(),
            num_images: config.previews.num_validation_images,
            pairs: None,
        })
    };
    let (own, drift) = (drawing(&config.previews.validation_prompt)?, drawing(&judges.drift_prompts)?);
    let folder = run.join(FOLDER);
    let base_drift = folder.join("base");
    drift.draw(&mut session, &[], "", &base_drift, observer)?;

    let towers = Towers::load(&judges.towers, compute.device, observer)?;
    let _guard = tch::no_grad_guard();
    let real: Vec<RgbImage> = match &config.data.held_out_data_dir {
        Some(dir) => score::pictures(dir, usize::MAX, config.data.background)?,
        None => Vec::new(),
    };
    let subject = score::subject(&towers, &real, &[], &[])?;
    let texts: Vec<Prompt> = config
        .previews
        .validation_prompt
        .iter()
        .map(|prompt| Prompt { prompt: prompt.clone(), text: without_token(prompt, &judges.token) })
        .collect();
    let mut evaluations = Vec::new();
    for (step, adapter) in trained(config)? {
        observer.check(|| {
            "stopped while scoring; what was drawn is kept, --resume latest with --score goes on".into()
        })?;
        let place = folder.join(format!("step-{step:06}"));
        let (pictures, unrelated) = (place.join(Set::Validation.name()), place.join("drift"));
        if !own.is_done(&pictures) || !drift.is_done(&unrelated) {
            draw::put_on(&mut session, config, &adapter, 1.0)?;
            let by = format!("{} at step {step}", run.display());
            own.draw(&mut session, &[], &by, &pictures, observer)?;
            drift.draw(&mut session, &[], &by, &unrelated, observer)?;
            session.take_off()?;
        }
        let prompts = score::prompts(&towers, &subject, &own, &texts, (&pictures, &folder), observer)?;
        let drifts = score::drift(&towers, &drift, &unrelated, &base_drift, &folder)?;
        evaluations.push(score::evaluation(step, Set::Validation, prompts, drifts));
    }
    let best = best_step(&evaluations, &objective(&evaluations));
    let spread = score::spread(&drift, &base_drift)?;
    let lost = lost(&evaluations, spread, observer);
    results::write_json(
        &folder.join("scores.json"),
        &serde_json::json!({"best": best, "lost": lost, "base_spread": spread, "evaluations": evaluations}),
    )?;
    let title = run.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    files::write_atomic(&folder.join("scores.svg"), steps_plot(&title, &evaluations, best).as_bytes())?;
    Ok(Scored { folder, evaluations, best, lost })
}

/// The steps at which nothing of the base model is left in pictures of other things, and says so. Drift of trainings that went
/// well stays below 0.72 of `spread` (`docs/troubleshooting.md`).
fn lost(evaluations: &[Evaluation], spread: Option<f64>, observer: &dyn Observer) -> Vec<i64> {
    let Some(spread) = spread else { return Vec::new() };
    let drift = |e: &Evaluation| e.scores.get("drift").copied().filter(|drift| *drift > spread);
    let lost: Vec<(i64, f64)> = evaluations.iter().filter_map(|e| Some((e.step, drift(e)?))).collect();
    if let Some((step, drift)) = lost.first() {
        observer.note(&format!(
            "the model is lost from step {step} on: pictures of --drift-prompt differ from the base model's by {drift:.1}, more than \
             the base model's own of different prompts differ from each other ({spread:.1}); lower --learning_rate, or train fewer steps"
        ));
    }
    lost.into_iter().map(|(step, _)| step).collect()
}

/// Steps with what was trained up to them, the end last.
fn trained(config: &TrainConfig) -> Result<Vec<(i64, PathBuf)>> {
    let run: &Path = &config.output_dir;
    let last = config.schedule.max_train_steps;
    let before = checkpoint::list(run)?.into_iter().filter(|step| *step < last);
    Ok(before.map(|step| (step, checkpoint::folder(run, step))).chain([(last, run.to_path_buf())]).collect())
}

fn objective(evaluations: &[Evaluation]) -> Vec<(String, f64)> {
    let there = |key: &&&str| evaluations.iter().all(|e| e.scores.contains_key(**key));
    CHOICES.iter().filter_map(|keys| keys.iter().find(there)).map(|key| (key.to_string(), 1.0)).collect()
}
