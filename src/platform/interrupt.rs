//! Ctrl-C and SIGTERM: the first asks the program to stop at the next safe point, the second ends it at once.

use crate::error::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Exit code of a program that was asked to stop, by convention 128 + SIGINT.
pub const EXIT_CODE: i32 = 130;

/// Starts listening; call once.
pub fn install() -> Result<()> {
    ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(EXIT_CODE);
        }
        eprintln!("\nstopping at the next safe point (press Ctrl-C again to end at once)");
    })
    .map_err(|e| Error::Device(format!("cannot listen for Ctrl-C: {e}")))
}

/// As [`install`], in a process that another of ours started: a second signal, which whoever manages the group may send beside
/// the parent's, does not end it before it has saved.
pub fn install_in_child() -> Result<()> {
    ctrlc::set_handler(|| REQUESTED.store(true, Ordering::SeqCst))
        .map_err(|e| Error::Device(format!("cannot listen for signals: {e}")))
}

/// Whether the user has asked to stop.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}

/// An [`Error::Interrupted`] with `message` if the user has asked to stop.
pub fn check(message: impl FnOnce() -> String) -> Result<()> {
    if requested() { Err(Error::Interrupted(message())) } else { Ok(()) }
}
