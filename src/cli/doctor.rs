//! `hra doctor`.

use crate::cli::stdout;
use crate::error::{Error, Result};
use crate::platform::doctor;
use clap::Args;

/// Flags of `hra doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Runs `hra doctor`: the report to standard output, as text or as JSON.
///
/// Errors: an operation that fails or computes something wrong; no GPU is no error.
pub fn run(args: &DoctorArgs) -> Result<()> {
    let report = doctor::examine();
    let text = if args.json {
        serde_json::to_string_pretty(&report).map_err(|e| Error::device(format!("report: {e}")))? + "\n"
    } else {
        report.to_string()
    };
    stdout::write(format_args!("{text}"))?;
    report.verdict()
}
