//! The terminal as an observer: what is said goes to the standard error, counts become a bar, or a line now and then where there is
//! no terminal; Ctrl-C and SIGTERM ask to stop.

use crate::error::{Error, Result};
use crate::platform::observer::{Event, Observer};
use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use std::fmt::Write;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
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
    /// What the bar ends with; a message of the bar's own would draw it a second time.
    message: Arc<Mutex<String>>,
    /// When the last line was written, where there is no terminal.
    last_line: Option<Instant>,
    started: Instant,
    first: u64,
}

/// Listens to Ctrl-C and SIGTERM: the first asks the program to stop at the next safe point, the second ends it at once. Call once.
pub fn listen() -> Result<()> {
    ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            // What `exit` takes down first, the thread that computes still needs, and would call a defect.
            // SAFETY: ends the process; files are written whole or not at all, whatever ends it.
            unsafe { libc::_exit(i32::from(EXIT_CODE)) };
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
        let message = Arc::new(Mutex::new(String::new()));
        let bar = if terminal { ProgressBar::new(total) } else { ProgressBar::hidden() };
        let bar = bar.with_style(style(&message)).with_prefix(what.to_string()).with_position(first);
        bar.reset_eta();
        bar.tick();
        if !terminal {
            eprintln!("{what} {first}/{total}");
        }
        let (last_line, started) = ((!terminal).then(Instant::now), Instant::now());
        Self { what: what.to_string(), bar, message, last_line, started, first }
    }

    fn set(&mut self, done: u64, total: u64, message: &str) {
        *self.message.lock().unwrap_or_else(PoisonError::into_inner) = message.to_string();
        self.bar.set_position(done);
        if let Some(last) = &mut self.last_line
            && (last.elapsed() >= LINE_EVERY || done == total)
        {
            *last = Instant::now();
            eprintln!("{}", self.line(done, total, message));
        }
    }

    /// What a line says; how long it takes is known once something is done.
    fn line(&self, done: u64, total: u64, message: &str) -> String {
        let mut parts = vec![format!("{} {done}/{total}", self.what)];
        if let new @ 1.. = done.saturating_sub(self.first) {
            let left = self.started.elapsed().as_secs_f64() / new as f64 * total.saturating_sub(done) as f64;
            parts.push(format!("{left:.0} s left"));
        }
        parts.extend((!message.is_empty()).then(|| message.to_string()));
        parts.join(", ")
    }
}

/// How a bar looks; how long it takes is shown once it is known.
fn style(message: &Arc<Mutex<String>>) -> ProgressStyle {
    let message = message.clone();
    let left = |state: &ProgressState, out: &mut dyn Write| {
        let seconds = state.eta().as_secs();
        if seconds > 0 {
            let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
            let _ = write!(out, ", {hours:02}:{minutes:02}:{seconds:02} left");
        }
    };
    let said = move |_: &ProgressState, out: &mut dyn Write| {
        let _ = out.write_str(&message.lock().unwrap_or_else(PoisonError::into_inner));
    };
    ProgressStyle::with_template("{prefix} {wide_bar:.cyan/dim} {pos}/{len} [{elapsed_precise}{left}] {said}")
        .expect("the template is well formed")
        .with_key("left", left)
        .with_key("said", said)
}
