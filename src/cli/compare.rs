//! `hra compare`.

use crate::cli::stdout::{self, print_line};
use crate::cli::terminal;
use crate::error::{Error, Result};
use crate::lab::compare::{self, CompareConfig, ComparisonOutcome, Estimate, Shard, duration};
use crate::lab::report;
use crate::lab::results::{self, Plan};
use crate::platform::observer::Observer;
use clap::{Args, Subcommand};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Flags of `hra compare`. The settings themselves are [`CompareConfig`]'s.
#[derive(Debug, Args)]
#[command(
    about = "Train several methods alike, score them, and write a report",
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "A config file names methods, subjects, seeds and prompts; docs/compare.md explains it. Every training is a process \
                  of its own. What is done is not done again: the same command goes on after an interruption.\n\n\
                  Examples:\n  hra compare configs/compare-quick.toml\n  hra compare configs/compare.toml --dry-run\n  \
                  hra compare configs/compare.toml --shard 0/4\n  hra compare report runs/compare"
)]
pub struct CompareArgs {
    #[command(subcommand)]
    verb: Option<CompareVerb>,
    /// Config file (TOML)
    #[arg(required = true)]
    config: Option<PathBuf>,
    /// Folder of the comparison [default: the config file's]
    #[arg(long, alias = "output", value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Trainings at once on this machine [default: the config file's]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Seeds of the trainings of the tables, such as 0,1,2 [default: the config file's]
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    seeds: Option<Vec<u64>>,
    /// Show the plan and how long it may take, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Do only this share of the trainings: I/N, I from 0; or auto, from Slurm's array or Kubernetes' index
    #[arg(long, value_name = "I/N")]
    shard: Option<String>,
    /// Number of shares, where the environment does not say
    #[arg(long, value_name = "N")]
    shard_count: Option<usize>,
    /// Refuse pictures that lie outside the folder of their table, in every [[control]] and in [classifier]
    #[arg(long)]
    strict_paths: bool,
    /// Print what came out as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum CompareVerb {
    /// Write the report of a comparison anew, from its records alone
    Report(ReportArgs),
    /// Do one cell of a comparison
    #[command(hide = true)]
    Cell(CellArgs),
}

#[derive(Debug, Args)]
struct ReportArgs {
    /// Folder of the comparison
    folder: PathBuf,
    /// Print what came out as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct CellArgs {
    folder: PathBuf,
    id: String,
}

/// Runs `hra compare`.
pub fn run(args: &CompareArgs, observer: &dyn Observer) -> Result<()> {
    match &args.verb {
        Some(CompareVerb::Report(args)) => return report(&args.folder, args.json),
        Some(CompareVerb::Cell(args)) => {
            terminal::listen_in_child()?;
            return compare::cell::run(&args.folder, &args.id, observer);
        }
        None => {}
    }
    let path = args.config.as_deref().ok_or_else(|| Error::config("expected a config file"))?;
    let mut config = CompareConfig::read(path)?;
    if let Some(dir) = &args.output_dir {
        config.output_dir = dir.clone();
    }
    if let Some(jobs) = args.jobs {
        config.jobs = jobs;
    }
    if let Some(seeds) = &args.seeds {
        if config.search.as_ref().is_some_and(|search| search.only) {
            let problem = "--seeds: are those of the tables, and a [search] with only = true has none";
            return Err(Error::config(problem).with_hint("its own are [search] seeds"));
        }
        config.seeds.clone_from(seeds);
    }
    if args.strict_paths {
        config.refuse_outside_paths()?;
    }
    config.validate()?;
    let shard = Shard::from_flags(args.shard.as_deref(), args.shard_count, |name| std::env::var(name).ok())?;
    if args.dry_run {
        let (plan, estimate) = compare::dry_run(&config, shard, observer)?;
        return show_plan(&config, &plan, &estimate, args.json);
    }
    terminal::listen()?;
    let outcome = compare::run(&config, shard, observer)?;
    finish(&config, &outcome, args.json)
}

fn finish(config: &CompareConfig, outcome: &ComparisonOutcome, json: bool) -> Result<()> {
    let folder = &config.output_dir;
    if outcome.missing > 0 && outcome.failures.is_empty() {
        // Other workers may be writing; whoever comes last, or the user, joins the records.
        if json {
            return super::print_json(&json!({"folder": folder, "cells_of_other_shares": outcome.missing}));
        }
        print_line!("this share is done; of other shares {} to come", results::cell_count(outcome.missing))?;
        if outcome.searching {
            print_line!(
                "when they are, the same command trains for the tables with the rates that the search chose"
            )?;
            return Ok(());
        }
        print_line!(
            "when they are: hra compare report {}",
            crate::platform::files::shell_word(&folder.to_string_lossy())
        )?;
        return Ok(());
    }
    report(folder, json)?;
    if outcome.failures.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = outcome.failures.iter().map(|f| format!("  {}: {}", f.id, f.why)).collect();
    Err(Error::run(format!("{} could not be done\n{}", results::cell_count(list.len()), list.join("\n")))
        .with_hint("the same command tries them again"))
}

fn report(folder: &Path, json: bool) -> Result<()> {
    let summary = report::write(folder)?;
    if json {
        return super::print_json(&summary);
    }
    stdout::write(format_args!("{}", summary.text))?;
    print_line!("report: {}", summary.page.display())?;
    Ok(())
}

fn show_plan(config: &CompareConfig, plan: &Plan, estimate: &Estimate, json: bool) -> Result<()> {
    let trainings = plan.cells.iter().filter(|cell| cell.learning_rate().is_some()).count();
    if json {
        let value = json!({
            "plan": plan,
            "trainings": estimate.trainings,
            "done": estimate.done,
            "steps": estimate.steps,
            "pictures": estimate.pictures,
            "seconds": estimate.seconds,
        });
        return super::print_json(&value);
    }
    print_line!("{}\n  into {}", plan.title, config.output_dir.display())?;
    for method in &plan.methods {
        let rates: Vec<String> = method.learning_rates.iter().map(|rate| format!("{rate:e}")).collect();
        print_line!("  {}: learning rate {}", method.label, rates.join(", "))?;
    }
    for subject in &plan.subjects {
        if let Some(control) = &subject.control {
            print_line!(
                "  {}: condition {}; {} pairs trained on, {} for validation, {} for the tables",
                subject.name,
                control.condition,
                control.trained_pairs,
                control.validation.pictures.len(),
                control.test.pictures.len()
            )?;
            continue;
        }
        print_line!(
            "  {}: {} pictures trained on, {} for validation, {} for the tables; {} prompts, {} validation prompts",
            subject.name,
            subject.train_pictures.len(),
            subject.validation_pictures.len(),
            subject.test_pictures.len(),
            subject.prompts.len(),
            subject.validation_prompts.len()
        )?;
    }
    print_line!("  seeds {:?}, scored after steps {:?}", plan.seeds, plan.steps)?;
    if config.search.as_ref().is_some_and(|s| !s.only) {
        let tables = plan.seeds.len() * plan.subjects.len() * plan.methods.len();
        print_line!(
            "  first the search, which is what is counted below; then up to {tables} trainings for the tables with \
             its rates"
        )?;
    }
    for note in plan.notes.iter().chain(plan.subjects.iter().flat_map(|s| &s.notes)) {
        print_line!("  note: {note}")?;
    }
    print_line!(
        "{trainings} trainings planned; of this share {} are done, {} are left: {} steps, {} pictures",
        estimate.done,
        estimate.trainings,
        estimate.steps,
        estimate.pictures
    )?;
    print_line!("about {} ({})", duration(estimate.seconds), estimate.from)?;
    Ok(())
}
