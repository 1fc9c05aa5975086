//! The `hra` program: start-up, the command line, and how it ends: 0 done, 2 error, 130 stopped by the user.

use hra::cli::{self, Early};
use hra::{Error, device, interrupt};
use std::process::ExitCode;

/// Exit code of every error that is the user's to mend.
const ERROR: u8 = 2;

fn main() -> ExitCode {
    device::start();
    match cli::run(std::env::args_os()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Early::Clap(error)) => {
            // A closed pipe is no error of ours.
            let _ = error.print();
            ExitCode::from(if error.use_stderr() { ERROR } else { 0 })
        }
        Err(Early::Error(error)) => {
            eprintln!("error: {error}");
            match error {
                Error::Interrupted(_) => ExitCode::from(interrupt::EXIT_CODE as u8),
                _ => ExitCode::from(ERROR),
            }
        }
    }
}
