//! The `hra` program: start-up, the command line, and how it ends: 0 done, 2 error, 130 stopped by the user.

use hra::cli::{self, Early, stdout, terminal};
use hra::error::{Error, ErrorKind, OUT_OF_MEMORY};
use hra::platform::device;
use std::io::Write;
use std::process::ExitCode;

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod memory;
#[cfg(target_os = "linux")]
mod waiting;

/// Exit code of every error that is the user's to mend.
const ERROR: u8 = 2;

fn main() -> ExitCode {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    memory::watch();
    device::start();
    // An operation inside libtorch that cannot be done (no memory left, above all) arrives as a panic with a C++ backtrace.
    std::panic::set_hook(Box::new(|_| {}));
    let result = match std::panic::catch_unwind(|| cli::run(std::env::args_os())) {
        Ok(result) => result,
        Err(cause) => return ExitCode::from(tell(&*cause)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Early::Clap(said)) => match stdout::print_clap(&said) {
            Ok(()) => ExitCode::from(if said.use_stderr() { ERROR } else { 0 }),
            Err(error) => ExitCode::from(end(&error)),
        },
        Err(Early::Error(error)) => ExitCode::from(end(&error)),
    }
}

/// Says what the error is; the exit code.
fn end(error: &Error) -> u8 {
    if let ErrorKind::Interrupted(_) = error.kind {
        say(&error.to_string());
        return terminal::EXIT_CODE;
    }
    say(&format!("error: {error}"));
    ERROR
}

/// A line on the standard error; where that takes none, there is nobody to tell.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Says in a line or two what a panic was about; the exit code.
fn tell(cause: &(dyn std::any::Any + Send)) -> u8 {
    let text =
        cause.downcast_ref::<String>().map(String::as_str).or_else(|| cause.downcast_ref::<&str>().copied());
    let text = text.unwrap_or("unknown cause");
    if let Some(told) = hra::error::out_of_memory(text) {
        say(&format!("error: {told}"));
        say(&format!("hint: {}", OUT_OF_MEMORY.1));
        return ERROR;
    }
    let first = || text.lines().next().unwrap_or(text).to_string();
    let line = hra::error::in_panic(text).map_or_else(first, |said| format!("libtorch: {said}"));
    say(&format!("error: {line}"));
    let defect = "this is a defect of hra; please report it with the command that led here";
    say(&format!("hint: {}", hra::error::hint(text).unwrap_or(defect)));
    ERROR
}
