//! Converts a model between a Hugging Face folder and one checkpoint file, with or without another number format.
//!
//! `convert MODEL OUT [--dtype f32|f16|bf16] [--config DIR]`: OUT is a checkpoint if its name ends with `.safetensors`, and
//! a folder otherwise. `--config` is for a checkpoint that does not say what it is: a folder with `tokenizer/` and
//! `scheduler/`.

use std::path::{Path, PathBuf};

use clap::Parser;
use hra::convert::single_file::{self, Replaced};
use hra::weights::source::Source;
use tch::Kind;

#[derive(Parser)]
struct Words {
    /// Hugging Face folder or checkpoint (.safetensors)
    model: PathBuf,
    /// Checkpoint, if the name ends with .safetensors; otherwise a folder
    out: PathBuf,
    /// f32, f16 or bf16 [default: as in MODEL]
    #[arg(long, value_parser = ["f32", "f16", "bf16"])]
    dtype: Option<String>,
    /// Folder with tokenizer/ and scheduler/, for a checkpoint that does not hold them
    #[arg(long)]
    config: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let words = Words::parse();
    let kind = words.dtype.as_deref().map(|name| match name {
        "f16" => Kind::Half,
        "bf16" => Kind::BFloat16,
        _ => Kind::Float,
    });
    let source = Source::open(&words.model, words.config.as_deref())?;
    let checkpoint = words.out.extension() == Some("safetensors".as_ref());
    let write = if checkpoint { single_file::write_checkpoint } else { single_file::write_folder };
    for note in write(&source, &Replaced::new(), kind, Path::new(&words.out))? {
        eprintln!("note: {note}");
    }
    Ok(())
}
