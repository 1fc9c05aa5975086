//! The command line: what the user typed, turned into calls of the library.

mod choice;
mod compare;
mod control;
mod doctor;
mod evaluate;
mod export;
mod inspect;
mod merge;
mod model_flags;
mod noise;
mod output;
mod prepare;
mod prompts;
mod sample;
mod sample_flags;
mod sample_line;
mod start;
pub mod stdout;
pub mod terminal;
mod towers;
mod train;
mod train_flags;
mod words;

use crate::cli::stdout::print_line;
use crate::error::{Error, Result};
use crate::platform::hub;
use crate::platform::observer::Observer;
use clap::{Arg, ArgAction, Command, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::ffi::OsString;

/// Fine-tune Stable Diffusion on a few pictures with Householder Reflection Adaptation (HRA) or other methods, draw with the result, and take it elsewhere.
#[derive(Debug, Parser)]
#[command(name = "hra", version, max_term_width = 110, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train an adapter on pictures of a subject, or on pairs of picture and condition
    Train(Box<train::TrainArgs>),
    /// Draw pictures from prompts
    Sample(Box<sample_flags::SampleArgs>),
    /// Make the conditions of controllable generation: edges, coloured segmentation maps, landmarks
    Prepare(prepare::PrepareArgs),
    /// Train several methods alike, score them, and write a report
    Compare(compare::CompareArgs),
    /// Score pictures, of this program or another
    Evaluate(Box<evaluate::EvaluateArgs>),
    /// Write adapters for other programs, or merge them into a model
    Export(export::ExportArgs),
    /// Make one adapter of several
    Merge(merge::MergeArgs),
    /// Say what an adapter, run or model is
    Inspect(inspect::InspectArgs),
    /// Say what this machine has and whether it computes correctly
    Doctor(doctor::DoctorArgs),
}

/// What a command line asks for besides running: text to print and the exit code.
pub enum Early {
    /// `--help`, `--version`, or a command line that clap refuses.
    Clap(clap::Error),
    /// An error of the library.
    Error(Error),
}

impl From<Error> for Early {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// The whole command line as clap knows it. A negative number is a value, and no flag.
pub fn command() -> Command {
    // Under a heading of its own, so that the flags of a verb come first.
    let refresh = Arg::new(REFRESH).long(REFRESH).action(ArgAction::SetTrue).help_heading("Hub").help(
        "Hash all cached files of the hub before they are used, weights too, and take damaged ones anew",
    );
    let command = FROM_HUB
        .iter()
        .fold(Cli::command(), |command, verb| command.mut_subcommand(verb, |verb| verb.arg(refresh.clone())));
    with_negative_numbers(command)
}

const REFRESH: &str = "refresh";
/// Verbs that take ids of the hub.
const FROM_HUB: [&str; 7] = ["train", "sample", "compare", "evaluate", "export", "merge", "inspect"];

/// The same command and those below it, `hra prepare canny` too.
fn with_negative_numbers(command: Command) -> Command {
    let takes_numbers = |arg: Arg| match arg.get_action() {
        ArgAction::Set | ArgAction::Append if !arg.is_positional() => arg.allow_negative_numbers(true),
        _ => arg,
    };
    command.mut_args(takes_numbers).mut_subcommands(with_negative_numbers)
}

/// Parses and runs a command line; `args` begins with the program's name.
///
/// Errors: what clap has to say, or the library's error.
pub fn run(args: impl IntoIterator<Item = OsString>) -> std::result::Result<(), Early> {
    let args = words::normalise(args.into_iter().collect())?;
    let matches = command().try_get_matches_from(args).map_err(Early::Clap)?;
    if matches.subcommand().is_some_and(|(verb, flags)| FROM_HUB.contains(&verb) && flags.get_flag(REFRESH)) {
        hub::refresh();
    }
    let cli = Cli::from_arg_matches(&matches).map_err(Early::Clap)?;
    let terminal = terminal::Terminal::default();
    Ok(match cli.command {
        Verb::Train(args) => train::run(&args, &terminal),
        Verb::Sample(args) => sample::run(&args, &terminal),
        Verb::Prepare(args) => prepare::run(&args, &terminal),
        Verb::Compare(args) => compare::run(&args, &terminal),
        Verb::Evaluate(args) => evaluate::run(&args, &terminal),
        Verb::Export(args) => export::run(&args, &terminal),
        Verb::Merge(args) => merge::run(&args, &terminal),
        Verb::Inspect(args) => inspect::run(&args, &terminal),
        Verb::Doctor(args) => doctor::run(&args),
    }?)
}

/// Splits `DIR=STRENGTH`; a strength of 1 where there is none. A folder of the whole name wins.
fn adapter_with_strength(text: &str) -> Result<(std::path::PathBuf, f64)> {
    let is_folder = |path: &str| std::path::Path::new(path).is_dir();
    match text.rsplit_once('=') {
        Some((dir, strength)) if !is_folder(text) => match strength.parse::<f64>() {
            Ok(number) if number.is_finite() => Ok((dir.into(), number)),
            _ if is_folder(dir) => Err(Error::config(format!(
                "--adapter: expected a number for the strength, found `{strength}`"
            ))
            .with_hint("--adapter DIR=0.8")),
            _ => Ok((text.into(), 1.0)),
        },
        _ => Ok((text.into(), 1.0)),
    }
}

/// Says of adapters with a control encoder that it stays behind.
fn note_control_left_out<'a>(
    adapters: impl IntoIterator<Item = &'a std::path::PathBuf>,
    observer: &dyn Observer,
) {
    for dir in adapters.into_iter().filter_map(|path| crate::model::control::encoder_of(path)) {
        observer.note(&format!(
            "the control encoder {} is not part of what is written; without it conditions are not seen",
            dir.display()
        ));
    }
}

/// Prints one JSON object, what `--json` gives in place of text.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::config(e.to_string()))?;
    print_line!("{text}")
}
