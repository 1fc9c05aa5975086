//! `hra train`.

use crate::cli::sample_line;
use crate::cli::stdout::{self, print_line};
use crate::cli::terminal;
use crate::cli::towers::TowerFlags;
use crate::cli::train_flags::Typed;
use crate::error::{Error, Result};
use crate::lab::compare::checkpoints::{self, Judges, Scored, USUAL_SCALES};
use crate::lab::evaluate::TowerPaths;
use crate::lab::results::{SCORES, ScoreKind};
use crate::platform::columns::{self, Column, left, right};
use crate::platform::device::peak_process_memory;
use crate::platform::observer::Observer;
use crate::train::config::TrainConfig;
use crate::train::run::{CONFIG_FILE, RunFolder};
use crate::train::{self, Outcome, Resume, checkpoint};
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Flags of `hra train`; those of the settings are in train_flags.rs.
#[derive(Debug, Args)]
#[command(
    about = "Train an adapter on pictures of a subject, or on pairs of picture and condition",
    after_help = "Every setting is a key of the config file, with underscores, in its section (docs/settings.md); flags win over the file. The words of \
                  diffusers' DreamBooth scripts are accepted, with hyphens or underscores.\n\n\
                  Examples:\n  hra train configs/demo.toml\n  hra train configs/sd15-subject.toml configs/methods/lora.toml --model DIR --instance_data_dir photos\n  hra train --model DIR --instance_data_dir photos \
                  --instance_prompt \"a photo of sks dog\" --output_dir runs/dog\n  hra train --resume latest --output_dir \
                  runs/dog --max_train_steps 2000"
)]
pub struct TrainArgs {
    /// Config files (TOML); a later one wins over those before it
    config: Vec<PathBuf>,
    #[command(flatten)]
    settings: Typed,
    /// Go on with the run in --output_dir: latest, or the step of a checkpoint; later checkpoints and records are removed
    #[arg(
        long,
        alias = "resume-from-checkpoint",
        value_name = "WHICH",
        help_heading = "Previews and checkpoints"
    )]
    resume: Option<String>,
    /// Print every effective setting as a config file, and do nothing
    #[arg(long, help_heading = "Model and output")]
    print_config: bool,
    /// After training, draw the validation prompts from every checkpoint at some adapter scales, score them, and recommend one
    #[arg(long, help_heading = "Scores")]
    score: bool,
    #[command(flatten)]
    towers: TowerFlags,
    /// The rare token, which the texts of CLIP-T are without
    #[arg(long, value_name = "TOKEN", default_value = "sks", help_heading = "Scores")]
    token: String,
    /// Prompt without the subject, for drift from the base model; may be given several times
    #[arg(long, value_name = "PROMPT", help_heading = "Scores")]
    drift_prompt: Vec<String>,
    /// Adapter scales at which every checkpoint is drawn, 1 as trained; a step and a scale are recommended [default: 0.5,0.75,1]
    #[arg(long, value_name = "SCALES", value_delimiter = ',', help_heading = "Scores")]
    score_scales: Vec<f64>,
    /// How far what is recommended may drift, in pixels [default: half of how far the base model's pictures of several
    /// --drift-prompt are from each other]
    #[arg(long, value_name = "PIXELS", help_heading = "Scores")]
    drift_limit: Option<f64>,
    /// Print the closing report as JSON
    #[arg(long, help_heading = "Model and output")]
    json: bool,
}

/// Weights that moved by less on average, relative to themselves, draw what the base model draws: on the embedded model that ends
/// at 0.02 (docs/first-subject.md); wider weights move by less for the same change.
const BARELY_MOVED: f64 = 0.01;

/// Runs `hra train`.
pub fn run(args: &TrainArgs, observer: &dyn Observer) -> Result<()> {
    let files: Vec<&Path> = args.config.iter().map(PathBuf::as_path).collect();
    let resume: Option<Resume> = args.resume.as_deref().map(str::parse).transpose()?;
    if files.len() > 1 {
        let names: Vec<_> = files.iter().map(|path| path.display().to_string()).collect();
        observer.note(&format!("settings of {}, of which a later one wins", names.join(", ")));
    }
    let given = TrainConfig::given(&files, &args.settings.0, observer)?;
    let config = match &resume {
        None => TrainConfig::default().under(&given, observer)?.with_absolute_paths()?,
        Some(_) => {
            let named = given.get("output_dir").and_then(toml::Value::as_str).map(PathBuf::from);
            let folder = named.unwrap_or_else(|| TrainConfig::default().output_dir);
            RunFolder::check_run(&folder)?;
            let before = TrainConfig::read(&folder.join(CONFIG_FILE))?;
            let mut config = before.under(&given, observer)?;
            // The folder that was named holds the run, even if it was moved since.
            config.output_dir = folder;
            let config = config.with_absolute_paths()?;
            config.check_resume(&before, observer)?;
            config
        }
    };
    if args.print_config {
        config.validate_values()?;
        return stdout::write(format_args!("{}", config.to_toml()?));
    }
    terminal::listen()?;
    let judges = Judges {
        towers: args.towers.paths(),
        token: args.token.clone(),
        drift_prompts: args.drift_prompt.clone(),
        scales: if args.score_scales.is_empty() { USUAL_SCALES.to_vec() } else { args.score_scales.clone() },
        drift_limit: args.drift_limit,
    };
    if args.score {
        checkpoints::check(&config, &judges, observer)?;
    } else if judges.towers != TowerPaths::default()
        || !judges.drift_prompts.is_empty()
        || !args.score_scales.is_empty()
        || judges.drift_limit.is_some()
    {
        return Err(Error::config(
            "--clip, --dino, --dinov2, --lpips-*, --drift-prompt, --score-scales and --drift-limit have no effect without --score",
        ));
    }
    let outcome = train::train(config.clone(), resume.as_ref(), observer)?;
    if let Some(moved) = outcome.movement.filter(|moved| moved.mean < BARELY_MOVED) {
        observer.note(&format!(
            "the weights barely moved ({:.4} on average): pictures will be the base model's; raise --learning_rate or \
             --max_train_steps",
            moved.mean
        ));
    }
    if !args.json {
        report(&outcome, &config)?;
    }
    let scored = args.score.then(|| checkpoints::score(&config, &judges, observer)).transpose()?;
    match &scored {
        _ if args.json => return super::print_json(&json(&outcome, &config, scored.as_ref())),
        Some(scored) => report_scores(scored, &config)?,
        None => {}
    }
    Ok(())
}

fn report_scores(scored: &Scored, config: &TrainConfig) -> Result<()> {
    let keys: BTreeSet<&String> = scored.points.iter().flat_map(|p| p.evaluation.scores.keys()).collect();
    let kinds: Vec<&ScoreKind> =
        SCORES.iter().filter(|kind| keys.iter().any(|key| *key == kind.key)).collect();
    let mut rows = vec![vec!["step".to_string(), "scale".to_string()]];
    rows[0].extend(kinds.iter().map(|kind| kind.title.to_string()));
    for (number, point) in scored.points.iter().enumerate() {
        let value = |kind: &&ScoreKind| {
            point.evaluation.scores.get(kind.key).map_or("-".to_string(), |v| format!("{v:.4}"))
        };
        let mut row = vec![point.evaluation.step.to_string(), point.scale.to_string()];
        row.extend(kinds.iter().map(value));
        row.extend((scored.best == Some(number)).then(|| "best".to_string()));
        rows.push(row);
    }
    let scores = kinds.iter().map(|_| right(14).after(2));
    let all: Vec<Column> =
        [right(8), right(8).after(2)].into_iter().chain(scores).chain([left(0).after(2)]).collect();
    print_line!("scores of the validation prompts:\n{}", columns::lines(&all, &rows).join("\n"))?;
    print_line!("{}: scores.json, scores.svg and the pictures", scored.folder.display())?;
    let Some(place) = &scored.recommended else { return Ok(()) };
    let limit = scored.drift_limit.map_or_else(String::new, |limit| format!(" of {limit:.1} at most"));
    let drift = place.drift.map_or_else(String::new, |drift| format!(": drift {drift:.1}{limit}"));
    print_line!("recommended: step {} at scale {}{drift}", place.step, place.scale)?;
    print_line!("draw with it:\n  {}", sample_line::of_scored(config, place))
}

/// The closing report as numbers.
fn json(outcome: &Outcome, config: &TrainConfig, scored: Option<&Scored>) -> Value {
    let moved = outcome.movement;
    json!({
        "folder": outcome.folder,
        "method": config.adapter.method,
        "parameters": outcome.parameters,
        "steps": outcome.steps,
        "seconds": outcome.seconds,
        "loss": outcome.loss,
        "weights_moved": moved.map(|m| json!({"mean": m.mean, "largest": m.largest})),
        "orthogonality_error": moved.and_then(|m| m.orthogonality_error),
        "peak_memory": peak_process_memory(),
        "peak_device_memory": outcome.gpu.map(|gpu| gpu.reserved),
        "best_step": scored.and_then(|s| s.recommended.as_ref()).map(|place| place.step),
        "recommended": scored.and_then(|s| s.recommended.as_ref()),
        "drift_limit": scored.and_then(|s| s.drift_limit),
        "evaluations": scored.map(|s| &s.points),
        "checkpoints": checkpoint::list(&outcome.folder).unwrap_or_default(),
    })
}

fn report(outcome: &Outcome, config: &TrainConfig) -> Result<()> {
    let folder = outcome.folder.display();
    let method = config.adapter.method().ok().flatten();
    let whole = method.as_ref().map(|method| method.trains_whole_network());
    let peft = method.is_some_and(|method| method.is_known_to_peft());
    let (what, readers) = match (whole, config.is_control()) {
        (Some(true), false) => ("UNet", "loadable by diffusers"),
        (Some(true), true) => ("UNet and control encoder", "each loadable by diffusers"),
        (Some(false), false) if peft => ("adapter", "loadable by PEFT"),
        (Some(false), true) if peft => ("adapter and control encoder", "loadable by PEFT and diffusers"),
        (Some(false), false) => ("adapter", "hra export makes a LoRA or a whole model of it"),
        (Some(false), true) => {
            ("adapter and control encoder", "hra export makes a LoRA or a whole model of the adapter")
        }
        (None, _) => ("control encoder", "loadable by diffusers"),
    };
    print_line!("{what}: {folder} ({} values, {readers})", outcome.parameters)?;
    let loss = outcome.loss.map_or_else(String::new, |loss| format!("; loss {loss:.4}"));
    let moved = outcome.movement.map_or_else(String::new, |m| {
        let orthogonality = m.orthogonality_error.map(|e| format!("; max |HH^T - I| {e:.1e}"));
        let (mean, most, orthogonality) = (m.mean, m.largest, orthogonality.unwrap_or_default());
        format!("; weights moved by {mean:.4} on average, {most:.4} at most (relative){orthogonality}")
    });
    print_line!("{} steps in {:.0} s{loss}{moved}", outcome.steps, outcome.seconds)?;
    if let Some(bytes) = peak_process_memory() {
        print_line!("peak memory of the process: {:.2} GB", bytes as f64 / 1e9)?;
    }
    if let Some(gpu) = outcome.gpu {
        let [reserved, allocated] = [gpu.reserved, gpu.allocated].map(|bytes| bytes as f64 / 1e9);
        print_line!("peak memory of the GPU: {reserved:.2} GB, {allocated:.2} GB of it in tensors")?;
    }
    if let Ok(steps) = checkpoint::list(&outcome.folder)
        && !steps.is_empty()
    {
        print_line!("checkpoints: {} in {folder}/checkpoints", steps.len())?;
    }
    print_line!("draw with it:\n  {}", sample_line::of_run(config, &outcome.folder))
}
