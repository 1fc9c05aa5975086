//! `hra export`.

use crate::attach;
use crate::cli::adapter_with_strength;
use crate::cli::choice::choice;
use crate::cli::model_flags::ModelFlags;
use crate::cli::stdout::print_line;
use crate::convert::export::{self, ExportForm, ExportRequest};
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::platform::device;
use crate::platform::files;
use crate::platform::host;
use crate::platform::hub::{self, Wanted};
use crate::platform::observer::Observer;
use crate::platform::precision::Precision;
use clap::Args;
use std::path::PathBuf;
use tch::Kind;

/// Flags of `hra export`.
#[derive(Debug, Args)]
#[command(
    about = "Write adapters for other programs, or merge them into a model",
    after_help = "The effect of an HRA adapter on one base model is a LoRA exactly; it belongs to that base model. OFT, BOFT and DoRA \
                  become the best LoRA of --rank; trained biases and full fine-tuning need merged or checkpoint. Each output is read back and compared.\n\nExamples:\n  \
                  hra export --model DIR --adapter runs/dog --to kohya-lora --output dog.safetensors --dtype f16\n  hra export \
                  --model DIR --adapter runs/dog=0.8 --to checkpoint --output dog-model.safetensors"
)]
pub struct ExportArgs {
    /// The base model: folder, checkpoint file, or hub id owner/name[@revision]
    #[arg(long, alias = "pretrained-model-name-or-path", value_name = "MODEL")]
    model: PathBuf,
    #[command(flatten)]
    files: ModelFlags,
    /// Adapter folder or LoRA file, with a strength; several act one after another
    #[arg(long, required = true, value_name = "DIR[=STRENGTH]")]
    adapter: Vec<String>,
    /// What to write
    #[arg(long, value_parser = choice::<ExportForm>())]
    to: ExportForm,
    /// Folder, or file for a LoRA or checkpoint; must not be there yet
    #[arg(long, value_name = "PATH")]
    output: PathBuf,
    /// Number format [default: f32 for adapters, that of the model's files for models]
    #[arg(long, value_parser = choice::<Precision>())]
    dtype: Option<Precision>,
    /// Earlier versions' word for the strength of a single adapter
    #[arg(long, hide = true, allow_hyphen_values = true)]
    strength: Option<String>,
    /// Rank of a LoRA in place of changes that are not of low rank [default: 64]
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..))]
    rank: Option<i64>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Runs `hra export`.
pub fn run(args: &ExportArgs, observer: &dyn Observer) -> Result<()> {
    if let Some(strength) = &args.strength {
        return Err(Error::config(format!(
            "--strength: an adapter's strength stands beside it: --adapter DIR={strength}"
        )));
    }
    let file = matches!(args.to, ExportForm::KohyaLora | ExportForm::Checkpoint);
    if file && args.output.extension().is_none_or(|e| e != "safetensors") {
        return Err(Error::config(format!(
            "--output: expected a file name that ends with .safetensors, found {}",
            args.output.display()
        )));
    }
    files::refuse_existing(&args.output)?;
    files::create_parent(&args.output)?;
    files::check_place_writable(&args.output)?;
    let mut adapters: Vec<(PathBuf, f64)> =
        args.adapter.iter().map(|a| adapter_with_strength(a)).collect::<Result<_>>()?;
    for (word, _) in &mut adapters {
        *word = hub::resolve(word, Wanted::Adapter, observer)?;
    }
    let request = ExportRequest {
        adapters,
        to: args.to,
        output: args.output.clone(),
        kind: args.dtype.map(Precision::kind),
        rank: args.rank,
    };
    super::note_control_left_out(request.adapters.iter().map(|(path, _)| path), observer);
    let asked = args.files.request(&args.model, observer)?;
    let mut model = StableDiffusion::open(&asked, Kind::Float, host::CPU)?;
    model.notes.iter().for_each(|note| eprintln!("note: {note}"));
    device::set_threads(None, attach::weight_count(&mut model.unet))?;
    let written = export::export(&mut model, &request)?;
    if args.json {
        return super::print_json(&written);
    }
    print_line!("{written}")?;
    Ok(())
}
