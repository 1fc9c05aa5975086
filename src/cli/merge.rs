//! `hra merge`.

use crate::adapter::combine::{How, combine};
use crate::adapter::peft::{self, AdapterFile, PythonClass};
use crate::attach::loaded::{HOMES, PeftFiles, TEXT_ENCODER, peft_files};
use crate::cli::adapter_with_strength;
use crate::cli::choice::choice;
use crate::cli::stdout::print_line;
use crate::error::Result;
use crate::platform::files;
use crate::platform::hub::{self, Wanted};
use crate::platform::observer::Observer;
use crate::weights::tensor_file;
use clap::Args;
use serde::Serialize;
use serde_json::json;
use std::path::{Path, PathBuf};
use tch::Kind;

/// Flags of `hra merge`.
#[derive(Debug, Args)]
#[command(
    about = "Make one adapter of several",
    after_help = "HRA, OFT and BOFT adapters multiply (chain) or add up as rotations (geodesic), and stay orthogonal; LoRA adapters \
                  add up. For other kinds, or kinds mixed, `hra export --adapter A=0.8 --adapter B=0.6 --to merged` takes the base \
                  model to it.\n\nExamples:\n  hra merge runs/dog=0.8 runs/style=0.6 --output runs/both\n  hra merge \
                  runs/a=0.5 runs/b=0.5 --how geodesic --output runs/mean"
)]
pub struct MergeArgs {
    /// Adapter folders of one method, with a strength each
    #[arg(required = true, value_name = "DIR[=STRENGTH]")]
    adapters: Vec<String>,
    /// For orthogonal methods
    #[arg(long, value_parser = choice::<How>(), default_value = "chain")]
    how: How,
    /// Folder for the new adapter; must not be there yet
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// The adapter of one network, as it was written.
#[derive(Debug, Serialize)]
struct Merged {
    network: &'static str,
    method: String,
    values: usize,
}

/// Runs `hra merge`.
pub fn run(args: &MergeArgs, observer: &dyn Observer) -> Result<()> {
    files::refuse_existing(&args.output)?;
    files::create_parent(&args.output)?;
    files::check_place_writable(&args.output)?;
    let mut adapters: Vec<(PathBuf, f64)> =
        args.adapters.iter().map(|a| adapter_with_strength(a)).collect::<Result<_>>()?;
    for (word, _) in &mut adapters {
        *word = hub::resolve(word, Wanted::Adapter, observer)?;
    }
    super::note_control_left_out(adapters.iter().map(|(path, _)| path), observer);
    let mut all = Vec::new();
    for (path, strength) in &adapters {
        all.extend(read(path, *strength, observer)?);
    }
    let mut written = Vec::new();
    files::stage_dir(&args.output, |dir| {
        for (place, class) in HOMES {
            let own: Vec<&ReadAdapter> = all.iter().filter(|adapter| adapter.place == place).collect();
            written.extend(merge_place(&own, args.how, place, class, dir)?);
        }
        Ok(())
    })?;
    if args.json {
        return super::print_json(&json!({"path": args.output, "parts": written}));
    }
    for Merged { network, method, values } in &written {
        print_line!("{network}: {method}, {values} values")?;
    }
    print_line!("adapter: {}", args.output.display())?;
    Ok(())
}

/// The adapter of one network, as it was read.
struct ReadAdapter {
    place: &'static str,
    file: AdapterFile,
    strength: f64,
}

/// The adapters at `path`; says what of them is not used.
fn read(path: &Path, strength: f64, observer: &dyn Observer) -> Result<Vec<ReadAdapter>> {
    let PeftFiles { files, note } = peft_files(
        path,
        "`hra export --model DIR --adapter A=0.8 --adapter B=0.6` makes one of any adapters: --to peft-lora, or --to merged",
    )?;
    let mut notes: Vec<String> = note.into_iter().collect();
    for (_, file) in &files {
        notes.extend(file.notes.iter().map(|note| format!("{}: {note}", path.display())));
        if !file.unused.is_empty() {
            notes.push(format!("{}: unused keys: {}", path.display(), tensor_file::list(&file.unused)));
        }
    }
    notes.iter().for_each(|note| observer.warn(note));
    Ok(files.into_iter().map(|(place, file)| ReadAdapter { place, file, strength }).collect())
}

/// The adapters of one network, as one in the same place below `dir`.
fn merge_place(
    read: &[&ReadAdapter],
    how: How,
    place: &str,
    class: PythonClass,
    dir: &Path,
) -> Result<Option<Merged>> {
    if read.is_empty() {
        return Ok(None);
    }
    let bases: Vec<&String> =
        read.iter().filter_map(|read| read.file.metadata.get("base_fingerprint")).collect();
    if bases.windows(2).any(|pair| pair[0] != pair[1]) {
        eprintln!("warning: these adapters were trained on different base models");
    }
    let chain: Vec<_> = read.iter().map(|read| (&read.file, read.strength)).collect();
    let (config, tensors) = combine(&chain, how)?;
    let folder = dir.join(place);
    files::create_dir_all(&folder)?;
    let mut text = vec![("software", format!("hra {}", env!("CARGO_PKG_VERSION")))];
    text.extend(bases.first().map(|base| ("base_fingerprint", (*base).clone())));
    peft::write(&folder, &config, class, &tensors, Kind::Float, &text)?;
    let values: usize = tensors.iter().map(|(_, t)| t.numel()).sum();
    let network = match place {
        "" => "UNet",
        TEXT_ENCODER => "text encoder",
        _ => "second text encoder",
    };
    Ok(Some(Merged { network, method: config.method.describe(), values }))
}
