//! Files as users have them, through the real binary: each test is named after what lay on a disk, and says what must come of it.

mod adapters;
mod commands;
mod models;
mod pictures;
mod xl;

use crate::support::base::root;
use crate::support::copied::copy;
use crate::support::finished::Finished;
use crate::support::scratch::Scratch;
use std::path::PathBuf;

/// A folder of the very small Stable Diffusion of the fixtures.
fn case(name: &str) -> PathBuf {
    root().join("tests/fixtures/cases/sd15").join(name)
}

/// The paths of `(folder of the fixtures, place)` in a new folder of the scratch folder.
fn folder(scratch: &Scratch, name: &str, parts: &[(&str, &str)]) -> String {
    for (from, place) in parts {
        copy(&case(from), &scratch.path(name).join(place));
    }
    scratch.path(name).to_str().unwrap().to_string()
}

/// Refused: exit code 2, these words, and nothing of a defect.
fn refused(done: &Finished, words: &[&str]) {
    assert_eq!(done.code, 2, "{}\n{}", done.out, done.err);
    for word in words {
        assert!(done.err.contains(word), "expected `{word}` in: {}", done.err);
    }
    assert!(!done.err.contains("panicked") && !done.err.contains("defect"), "{}", done.err);
}

/// Some words in what was said.
fn said(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "expected `{word}` in: {text}");
    }
}
