//! Progress on the standard error: a bar on a terminal, a line now and then elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Without a terminal a line is written at most this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// A count of units of work with speed, time left and a message.
pub struct Progress {
    bar: ProgressBar,
    /// Where there is no terminal: what is counted, and when the last line was written.
    lines: Option<(String, Instant)>,
    started: Instant,
    first: u64,
}

impl Progress {
    /// Counts from `first` to `total` units of `what`.
    pub fn new(what: &str, first: u64, total: u64) -> Self {
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
        Self {
            bar,
            lines: (!terminal).then(|| (what.to_string(), Instant::now())),
            started: Instant::now(),
            first,
        }
    }

    /// Says that `done` units are done, with a message beside the bar.
    pub fn set(&mut self, done: u64, message: &str) {
        self.bar.set_position(done);
        self.bar.set_message(message.to_string());
        let (total, elapsed, new) =
            (self.bar.length().unwrap_or(done), self.started.elapsed(), done - self.first);
        if let Some((what, last)) = &mut self.lines
            && (last.elapsed() >= LINE_EVERY || done == total)
        {
            *last = Instant::now();
            let left = elapsed.as_secs_f64() / new.max(1) as f64 * (total - done) as f64;
            eprintln!("{what} {done}/{total}, {left:.0} s left {message}");
        }
    }

    /// Writes a line above the bar.
    pub fn say(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
