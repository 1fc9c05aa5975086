//! The standard output: what cannot be written is an error, but for a pipe that its reader has closed.

use crate::error::{Error, Result};
use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::path::Path;

/// Writes `text` to the standard output and waits until the system has it, as nothing tells of what a buffer loses at the end.
///
/// Errors: it cannot be written (no space left, above all). A closed pipe is none: `hra doctor | head` has read enough.
pub fn write(text: Arguments) -> Result<()> {
    let mut out = io::stdout().lock();
    checked(out.write_fmt(text).and_then(|()| out.flush()))
}

fn checked(written: io::Result<()>) -> Result<()> {
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::io("write to", Path::new("the standard output"), error))
        }
        _ => Ok(()),
    }
}

/// Prints what clap has to say: help and version to the standard output, as [`write`]; a refusal to the standard error.
pub fn print_clap(said: &clap::Error) -> Result<()> {
    let written = said.print().and_then(|()| io::stdout().flush());
    if said.use_stderr() { Ok(()) } else { checked(written) }
}

/// [`write`] with a format, its values, and the end of the line.
macro_rules! print_line {
    ($($line:tt)*) => {
        $crate::cli::stdout::write(format_args!("{}\n", format_args!($($line)*)))
    };
}
pub(super) use print_line;
