//! Who watches a piece of work: whatever the library has to say, and the question whether to stop, goes through an [`Observer`].
//! The library itself prints nothing.

use crate::error::{Error, Result};
use std::path::Path;

/// What is said. A text is a line or several, without the last line's end.
#[derive(Debug, Clone, PartialEq)]
pub enum Event<'a> {
    /// What was found, decided or done.
    Said(&'a str),
    /// What has no effect, or was done otherwise than one might expect.
    Note(&'a str),
    /// What is probably not meant.
    Warning(&'a str),
    /// From here on units of `what` are counted, `done` of `total` having been done before.
    Started { what: &'a str, done: u64, total: u64 },
    /// So many are done, and a word about the last one.
    Progress { what: &'a str, done: u64, total: u64, message: &'a str },
    /// Nothing of `what` is counted any more.
    Finished { what: &'a str },
    /// A class picture, or the contact sheet of previews, was written.
    Picture(&'a Path),
    /// A record of a training: the line of `metrics.jsonl`.
    Metrics(&'a serde_json::Value),
}

/// Hears events, perhaps from several threads, and may ask the work to stop at its next safe point.
pub trait Observer: Sync {
    /// Takes an event.
    fn tell(&self, event: Event);

    /// Whether the work is to stop.
    fn asks_to_stop(&self) -> bool {
        false
    }
}

/// Hears nothing and never stops anything.
pub struct Silent;

impl Observer for Silent {
    fn tell(&self, _: Event) {}
}

impl dyn Observer + '_ {
    /// Tells [`Event::Said`].
    pub fn say(&self, text: &str) {
        self.tell(Event::Said(text));
    }

    /// Tells [`Event::Note`].
    pub fn note(&self, text: &str) {
        self.tell(Event::Note(text));
    }

    /// Tells [`Event::Warning`].
    pub fn warn(&self, text: &str) {
        self.tell(Event::Warning(text));
    }

    /// An [`ErrorKind::Interrupted`] with `message` if the work is to stop.
    pub fn check(&self, message: impl FnOnce() -> String) -> Result<()> {
        if self.asks_to_stop() { Err(Error::interrupted(message())) } else { Ok(()) }
    }
}

/// A count of units of work, told to an observer.
pub struct Counter<'a> {
    observer: &'a dyn Observer,
    what: &'a str,
    total: u64,
}

impl<'a> Counter<'a> {
    /// Counts from `first` to `total` units of `what`.
    pub fn new(observer: &'a dyn Observer, what: &'a str, first: u64, total: u64) -> Self {
        observer.tell(Event::Started { what, done: first, total });
        Self { observer, what, total }
    }

    /// Says that `done` units are done, with a word about the last one.
    pub fn set(&self, done: u64, message: &str) {
        self.observer.tell(Event::Progress { what: self.what, done, total: self.total, message });
    }
}

impl Drop for Counter<'_> {
    fn drop(&mut self) {
        self.observer.tell(Event::Finished { what: self.what });
    }
}
