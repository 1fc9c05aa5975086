//! The terminal as an observer: what is said goes to the standard error, counts become a bar, or a line now and then where there is
//! no terminal; Ctrl-C and SIGTERM ask to stop.

use crate::error::{Error, Result};
use crate::platform::observer::{Event, Observer};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Exit code of a program that was asked to stop, by convention 128 + SIGINT.
pub const EXIT_CODE: u8 = 130;
/// Without a terminal a line is written at most this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// The standard error, and the signals of this process.
#[derive(Default)]
pub struct Terminal {
    counts: Mutex<Vec<Count>>,
}

/// Something that is counted.
struct Count {
    what: String,
    bar: ProgressBar,
    /// When the last line was written, where there is no terminal.
    last_line: Option<Instant>,
    started: Instant,
    first: u64,
}

/// Listens to Ctrl-C and SIGTERM: the first asks the program to stop at the next safe point, the second ends it at once. Call once.
pub fn listen() -> Result<()> {
    ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(EXIT_CODE));
        }
        eprintln!("\nstopping at the next safe point (press Ctrl-C again to end at once)");
    })
    .map_err(|e| Error::device(format!("cannot listen for Ctrl-C: {e}")))
}

/// As [`listen`], in a process that another of ours started: a second signal, which whoever manages the group may send beside
/// the parent's, does not end it before it has saved.
pub fn listen_in_child() -> Result<()> {
    ctrlc::set_handler(|| REQUESTED.store(true, Ordering::SeqCst))
        .map_err(|e| Error::device(format!("cannot listen for signals: {e}")))
}

impl Observer for Terminal {
    fn tell(&self, event: Event) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Said(text) => say(&counts, text),
            Event::Note(text) => say(&counts, &format!("note: {text}")),
            Event::Warning(text) => say(&counts, &format!("warning: {text}")),
            Event::Started { what, done, total } => counts.push(Count::new(what, done, total)),
            Event::Progress { what, done, total, message } => {
                if let Some(count) = counts.iter_mut().rev().find(|count| count.what == what) {
                    count.set(done, total, message);
                }
            }
            Event::Finished { what } => {
                if let Some(at) = counts.iter().rposition(|count| count.what == what) {
                    counts.remove(at).bar.finish_and_clear();
                }
            }
            Event::Picture(_) | Event::Metrics(_) => {}
        }
    }

    fn asks_to_stop(&self) -> bool {
        REQUESTED.load(Ordering::SeqCst)
    }
}

/// Writes a line, above the bar where there is one.
fn say(counts: &[Count], text: &str) {
    match counts.last() {
        Some(count) => count.bar.suspend(|| eprintln!("{text}")),
        None => eprintln!("{text}"),
    }
}

impl Count {
    fn new(what: &str, first: u64, total: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new(total) } else { ProgressBar::hidden() };
        bar.set_length(total);
        let template =
            "{prefix} {wide_bar:.cyan/dim} {pos}/{len} [{elapsed_precise}, {eta_precise} left] {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(what.to_string());
        bar.set_position(first);
        bar.reset_eta();
        let (last_line, started) = ((!terminal).then(Instant::now), Instant::now());
        Self { what: what.to_string(), bar, last_line, started, first }
    }

    fn set(&mut self, done: u64, total: u64, message: &str) {
        self.bar.set_position(done);
        self.bar.set_message(message.to_string());
        if let Some(last) = &mut self.last_line
            && (last.elapsed() >= LINE_EVERY || done == total)
        {
            *last = Instant::now();
            let new = done - self.first;
            let left = self.started.elapsed().as_secs_f64() / new.max(1) as f64 * (total - done) as f64;
            eprintln!("{} {done}/{total}, {left:.0} s left {message}", self.what);
        }
    }
}
