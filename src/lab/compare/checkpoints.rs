//! `hra train --score`: every checkpoint of one run drawn from at some adapter scales and scored, after the training;
//! `recommended` says which to draw with.

use crate::data::image::RgbImage;
use crate::diffusion::sample::{Session, Strength};
use crate::error::{Error, ErrorKind, Result};
use crate::lab::compare::draw::{self, Sampling, SetDrawing};
use crate::lab::compare::recommended::Recommended;
use crate::lab::compare::score;
use crate::lab::compare::subject::Prompt;
use crate::lab::evaluate::scores::without_token;
use crate::lab::evaluate::{TowerPaths, Towers};
use crate::lab::report::{MarkedPlace, best_place, likeness_key, run_plot};
use crate::lab::results::{self, Evaluation, FrontierPoint, Set};
use crate::platform::observer::Observer;
use crate::platform::{device, files};
use crate::train::checkpoint;
use crate::train::config::TrainConfig;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const FOLDER: &str = "scores";
/// Scales that are drawn where none are asked for: as trained, and less of it.
pub const USUAL_SCALES: [f64; 3] = [0.5, 0.75, 1.0];
/// Beyond this nobody draws.
const LARGEST_SCALE: f64 = 4.0;
/// How far a recommended place may drift, as a share of the base model's spread. Below a half a picture is, in the mean, nearer to
/// the base model's of its own prompt than to that of any other: by the triangle inequality the other is at least `spread - drift`
/// away.
const DRIFT_SHARE: f64 = 0.5;

/// What to score a run's checkpoints by, beside the settings of its previews.
#[derive(Debug, Clone)]
pub struct Judges {
    /// The towers.
    pub towers: TowerPaths,
    /// The rare token, which CLIP-T's texts are without.
    pub token: String,
    /// Prompts without the subject, for drift; may be empty.
    pub drift_prompts: Vec<String>,
    /// Adapter scales at which each checkpoint is drawn from, 1 as trained.
    pub scales: Vec<f64>,
    /// How far the recommended place may drift, in pixels; half of the base model's spread where it is `None`.
    pub drift_limit: Option<f64>,
}

/// The scores of a run.
#[derive(Debug)]
pub struct Scored {
    /// `scores/` of the run folder: `scores.json`, `scores.svg`, and the pictures.
    pub folder: PathBuf,
    /// By step, then by scale, both ascending.
    pub points: Vec<FrontierPoint>,
    /// The number of the point to draw with; `None` where nothing says which, or every point drifts too far.
    pub best: Option<usize>,
    /// The same, as it is told.
    pub recommended: Option<Recommended>,
    /// How far it may drift, where that is known.
    pub drift_limit: Option<f64>,
    /// Steps whose pictures of `--drift-prompt` as trained are further from the base model's than those are from each other.
    pub lost: Vec<i64>,
}

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
    judges.check_numbers()?;
    if config.optimizer.use_ema {
        return Err(Error::config(
            "--score: checkpoints hold the adapter itself and the end of a run with --use_ema its average, which do \
             not compare",
        ).with_hint("leave one of them out"));
    }
    crate::lab::evaluate::towers::identity(&judges.towers, observer).map(|_| ())
}

impl Judges {
    fn check_numbers(&self) -> Result<()> {
        let known = self.scales.iter().all(|scale| *scale > 0.0 && *scale <= LARGEST_SCALE);
        let different: BTreeSet<u64> = self.scales.iter().map(|scale| scale.to_bits()).collect();
        if self.scales.is_empty() || !known || different.len() != self.scales.len() {
            return Err(Error::config(format!(
                "--score-scales: expected different numbers above 0 and up to {LARGEST_SCALE}, found {:?}",
                self.scales
            ))
            .with_hint("--score-scales 0.5,0.75,1; at 0 there is only the base model"));
        }
        let Some(limit) = self.drift_limit else { return Ok(()) };
        if !limit.is_finite() || limit <= 0.0 {
            return Err(Error::config(format!(
                "--drift-limit: expected a positive number of pixels, found {limit}"
            )));
        }
        if self.drift_prompts.is_empty() {
            return Err(Error::config(
                "--drift-limit: expected a --drift-prompt, from which drift is measured",
            ));
        }
        Ok(())
    }

    fn ascending(&self) -> Vec<f64> {
        let mut scales = self.scales.clone();
        scales.sort_by(f64::total_cmp);
        scales
    }
}

/// Draws the validation prompts from every checkpoint that the run has, and from its end, at every scale, scores them against the
/// held-out pictures, and writes what is recommended. What was drawn before is not drawn again.
pub fn score(config: &TrainConfig, judges: &Judges, observer: &dyn Observer) -> Result<Scored> {
    check(config, judges, observer)?;
    let compute = device::resolve(config.device, Some(config.model.dtype))?;
    let mut session = draw::open(config, &compute, observer)?;
    let drawings = RunDrawings::new(config, judges, &session)?;
    let folder = config.output_dir.join(FOLDER);
    let base_drift = folder.join("base");
    drawings.drift.draw(&mut session, &[], "", &base_drift, observer)?;

    let towers = Towers::load(&judges.towers, compute.device, observer)?;
    let _guard = tch::no_grad_guard();
    let real: Vec<RgbImage> = match &config.data.held_out_data_dir {
        Some(dir) => score::pictures(dir, usize::MAX, config.data.background)?,
        None => Vec::new(),
    };
    let subject = score::subject(&towers, &real, &[], &[])?;
    let prompts = &config.previews.validation_prompt;
    let text =
        |prompt: &String| Prompt { prompt: prompt.clone(), text: without_token(prompt, &judges.token) };
    let texts: Vec<Prompt> = prompts.iter().map(text).collect();
    let mut points = Vec::new();
    for (step, adapter) in trained(config)? {
        for scale in judges.ascending() {
            observer.check(|| {
                "stopped while scoring; what was drawn is kept, --resume latest with --score goes on".into()
            })?;
            let place = ScoredPlace::new(&folder, step, scale);
            if !place.draw(&drawings, &mut session, config, &adapter, observer)? {
                continue;
            }
            let pictures = (place.pictures.as_path(), folder.as_path());
            let prompts = score::prompts(&towers, &subject, &drawings.own, &texts, pictures, observer)?;
            let drifts = score::drift(&towers, &drawings.drift, &place.unrelated, &base_drift, &folder)?;
            let evaluation = score::evaluation(step, Set::Validation, prompts, drifts);
            points.push(FrontierPoint { scale, evaluation });
        }
    }
    let spread = score::spread(&drawings.drift, &base_drift)?;
    conclude(config, judges, points, spread, observer)
}

/// What is drawn at every place.
struct RunDrawings {
    own: SetDrawing,
    drift: SetDrawing,
}

impl RunDrawings {
    fn new(config: &TrainConfig, judges: &Judges, session: &Session) -> Result<Self> {
        let previews = &config.previews;
        let model = session.model();
        let resolution = config.data.resolution.unwrap_or(model.native_size() as u32);
        let fingerprint = model.fingerprint()?;
        let drawing = |prompts: &[String]| SetDrawing {
            sampling: Sampling {
                seed: config.seed,
                scheduler: previews.validation_scheduler,
                steps: previews.validation_inference_steps,
                guidance: previews.validation_guidance,
                control: Strength::default(),
            },
            model: fingerprint.clone(),
            resolution,
            batch: config.prior.sample_batch_size,
            prompts: prompts.to_vec(),
            num_images: previews.num_validation_images,
            pairs: None,
        };
        Ok(Self { own: drawing(&previews.validation_prompt), drift: drawing(&judges.drift_prompts) })
    }
}

/// A step at a scale, and where its pictures lie: at scale 1 in the step's folder, else in one below it.
struct ScoredPlace {
    step: i64,
    scale: f64,
    pictures: PathBuf,
    unrelated: PathBuf,
}

impl ScoredPlace {
    fn new(folder: &Path, step: i64, scale: f64) -> Self {
        let place = folder.join(format!("step-{step:06}"));
        let place = if scale == 1.0 { place } else { place.join(format!("scale-{scale}")) };
        Self { step, scale, pictures: place.join(Set::Validation.name()), unrelated: place.join("drift") }
    }

    /// Draws what is missing; whether all of it is numbers. A scale too far is a place that is missing.
    fn draw(
        &self,
        drawings: &RunDrawings,
        session: &mut Session,
        config: &TrainConfig,
        adapter: &Path,
        observer: &dyn Observer,
    ) -> Result<bool> {
        let RunDrawings { own, drift } = drawings;
        if own.is_done(&self.pictures) && drift.is_done(&self.unrelated) {
            return Ok(true);
        }
        draw::put_on(session, config, adapter, self.scale)?;
        let mut by = format!("{} at step {}", config.output_dir.display(), self.step);
        if self.scale != 1.0 {
            by += &format!(", scale {}", self.scale);
        }
        let drawn = own
            .draw(session, &[], &by, &self.pictures, observer)
            .and_then(|()| drift.draw(session, &[], &by, &self.unrelated, observer));
        session.take_off()?;
        match drawn {
            Err(Error { kind: ErrorKind::NotFinite(why), .. }) => {
                let why = why.lines().next().unwrap_or_default().to_string();
                observer.note(&format!("step {}, scale {}: not scored: {why}", self.step, self.scale));
                Ok(false)
            }
            drawn => drawn.map(|()| true),
        }
    }
}

/// What the scores say, and the files that say it.
fn conclude(
    config: &TrainConfig,
    judges: &Judges,
    points: Vec<FrontierPoint>,
    spread: Option<f64>,
    observer: &dyn Observer,
) -> Result<Scored> {
    let (run, folder) = (&config.output_dir, config.output_dir.join(FOLDER));
    let drift_limit = judges.drift_limit.or(spread.map(|spread| DRIFT_SHARE * spread));
    let best = best_place(&points, drift_limit);
    let likeness = likeness_key(&points);
    let recommended = best.map(|i| Recommended::new(run, &points[i], likeness));
    tell(judges, &points, best, drift_limit, observer);
    let lost = lost(&points, spread, observer);
    let relative = recommended.as_ref().map(|recommended| recommended.within(run));
    results::write_json(
        &folder.join("scores.json"),
        &serde_json::json!({
            "best": recommended.as_ref().map(|place| place.step),
            "recommended": relative,
            "drift_limit": drift_limit,
            "lost": lost,
            "base_spread": spread,
            "evaluations": points,
        }),
    )?;
    let title = run.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let plot = run_plot(&title, &points, MarkedPlace { best, drift_limit });
    files::write_atomic(&folder.join("scores.svg"), plot.as_bytes())?;
    Recommended::write(run, relative.as_ref())?;
    Ok(Scored { folder, points, best, recommended, drift_limit, lost })
}

/// Says why nothing is recommended, or that drift had no limit.
fn tell(
    judges: &Judges,
    points: &[FrontierPoint],
    best: Option<usize>,
    drift_limit: Option<f64>,
    observer: &dyn Observer,
) {
    let drift = |point: &FrontierPoint| point.evaluation.scores.get("drift").copied();
    let within = points.iter().filter_map(drift).any(|drift| drift_limit.is_none_or(|limit| drift <= limit));
    let drifts = points.iter().filter_map(drift);
    match (best, drift_limit, drifts.reduce(f64::min)) {
        _ if points.is_empty() => observer.note(
            "no place is recommended: none gave pictures of finite numbers; lower --learning_rate, or smaller --score-scales",
        ),
        (Some(_), None, Some(_)) if judges.drift_prompts.len() == 1 => observer.note(
            "drift has no say: one --drift-prompt does not tell how far the base model's pictures are from each other; give another \
             one, or --drift-limit",
        ),
        (None, Some(limit), Some(least)) if !within => observer.note(&format!(
            "no place is recommended: the least drift is {least:.1}, the limit {limit:.1}; smaller --score-scales, earlier \
             checkpoints or a larger --drift-limit leave some"
        )),
        (None, ..) => observer.note(
            "no place is recommended: nothing tells one from another; --clip or --dino, with --held_out_data_dir, do",
        ),
        _ => {}
    }
}

/// The steps at which nothing of the base model is left in pictures of other things as trained, and says so. Drift of trainings that
/// went well stays below 0.72 of `spread` (`docs/troubleshooting.md`).
fn lost(points: &[FrontierPoint], spread: Option<f64>, observer: &dyn Observer) -> Vec<i64> {
    let Some(spread) = spread else { return Vec::new() };
    let as_trained = points.iter().filter(|point| point.scale == 1.0).map(|point| &point.evaluation);
    let drift = |e: &Evaluation| e.scores.get("drift").copied().filter(|drift| *drift > spread);
    let lost: Vec<(i64, f64)> = as_trained.filter_map(|e| Some((e.step, drift(e)?))).collect();
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
