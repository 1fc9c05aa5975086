//! `hra inspect`.

use crate::cli::model_flags::ModelFlags;
use crate::cli::stdout::print_line;
use crate::convert::inspect::{self, FileReport, LayerReport};
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::Result;
use crate::platform::columns::{self, Column, left, right};
use crate::platform::device;
use crate::platform::host;
use crate::platform::hub::{self, Wanted};
use crate::platform::observer::Observer;
use crate::weights::request::ModelRequest;
use crate::weights::source::Source;
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use tch::Kind;

/// Flags of `hra inspect`.
#[derive(Debug, Args)]
#[command(
    about = "Say what an adapter, run or model is",
    after_help = "For each layer of an orthogonal adapter: the largest angle by which it turns the layer's inputs, and the distance \
                  from the base model, the root of the sum of the squares of all angles. With --model, also how far each weight \
                  moves relative to its size.\n\nExamples:\n  hra inspect runs/dog\n  hra inspect lora.safetensors --model DIR --json"
)]
pub struct InspectArgs {
    /// Adapter folder, run folder, LoRA file, model folder or checkpoint
    path: PathBuf,
    /// The base model, to tell changes relative to its weights
    #[arg(long, alias = "pretrained-model-name-or-path", value_name = "DIR")]
    model: Option<PathBuf>,
    #[command(flatten)]
    files: ModelFlags,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Runs `hra inspect`.
pub fn run(args: &InspectArgs, observer: &dyn Observer) -> Result<()> {
    // On the hub it may be either.
    let adapter = hub::resolve(&args.path, Wanted::Adapter, observer);
    let path = adapter.or_else(|e| hub::resolve(&args.path, Wanted::Model, observer).map_err(|_| e))?;
    // The flags are about the base model, or where none is named about what is looked at.
    let (asked, model) = match &args.model {
        None => (args.files.on(&path, observer)?, None),
        Some(model) => (ModelRequest::of(&path), Some(args.files.request(model, observer)?)),
    };
    if args.model.is_none() && args.files.are_given() && Source::open_as(&asked).is_err() {
        observer.note("--config, --vae, --vae-dtype and --prediction have no effect: they are about a model; --model names an adapter's");
    }
    let mut model = model.map(|asked| StableDiffusion::open(&asked, Kind::Float, host::CPU)).transpose()?;
    model.iter().flat_map(|model| &model.notes).for_each(|note| observer.note(note));
    device::set_threads(None, usize::MAX)?;
    let reports = inspect::inspect(&asked, model.as_mut())?;
    if args.json {
        super::print_json(&json!({"path": args.path, "parts": reports}))?;
    } else {
        reports.iter().try_for_each(print)?;
    }
    Ok(())
}

fn print(report: &FileReport) -> Result<()> {
    print_line!("{}: {}", report.path, report.what)?;
    for (name, value) in &report.facts {
        print_line!("  {name}: {value}")?;
    }
    let bytes: Vec<String> =
        report.bytes.iter().map(|(kind, n)| format!("{:.2} MB in {kind}", *n as f64 / 1e6)).collect();
    print_line!("  values: {} ({})", report.parameters, bytes.join(", "))?;
    print_layers(&report.layers)?;
    match &report.odd[..] {
        [] => print_line!("  nothing odd"),
        odd => odd.iter().try_for_each(|line| print_line!("  odd: {line}")),
    }
}

/// A table with the columns that any layer has.
fn print_layers(layers: &[LayerReport]) -> Result<()> {
    type Value = (&'static str, fn(&LayerReport) -> Option<String>);
    const COLUMNS: [Value; 7] = [
        ("values", |l| Some(l.parameters.to_string())),
        ("norm", |l| Some(format!("{:.3}", l.norm))),
        ("||W'-W||", |l| l.change_norm.map(|x| format!("{x:.4}"))),
        ("relative", |l| l.relative_change.map(|x| format!("{x:.5}"))),
        ("angle", |l| l.largest_angle.map(|x| format!("{x:.2}°"))),
        ("distance", |l| l.distance.map(|x| format!("{x:.2}°"))),
        ("|HH^T-I|", |l| l.orthogonality_error.map(|x| format!("{x:.1e}"))),
    ];
    let shown: Vec<&Value> =
        COLUMNS.iter().filter(|(_, value)| layers.iter().any(|l| value(l).is_some())).collect();
    if layers.is_empty() {
        return Ok(());
    }
    let row = |first: &str, cell: &dyn Fn(&Value) -> String| {
        [first.to_string()].into_iter().chain(shown.iter().map(|value| cell(value))).collect::<Vec<_>>()
    };
    let mut rows = vec![row("layer", &|(name, _)| (*name).to_string())];
    rows.extend(layers.iter().map(|layer| row(&layer.name, &|(_, value)| value(layer).unwrap_or_default())));
    let all: Vec<Column> = [left(0).after(2)].into_iter().chain(shown.iter().map(|_| right(10))).collect();
    for line in columns::lines(&all, &rows) {
        print_line!("{line}")?;
    }
    Ok(())
}
