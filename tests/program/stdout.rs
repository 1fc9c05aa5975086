//! What becomes of an answer that the standard output does not take: a full disk is an error, a reader who has enough is none.

use crate::support::base::root;
use crate::support::finished::{Finished, finished};
use crate::support::scratch::Scratch;
use crate::support::training::tiny_sd;
use std::fs::File;
use std::process::Stdio;

/// One command line of each way in which something is written to the standard output.
fn answers(scratch: &Scratch) -> Vec<Vec<String>> {
    let of = |words: &[&str]| words.iter().map(|word| word.to_string()).collect::<Vec<_>>();
    let model = tiny_sd();
    let model = model.to_str().unwrap();
    let adapter = root().join("tests/fixtures/cases/sd15/hra-r4");
    let adapter = adapter.to_str().unwrap();
    let picture = root().join("assets/subjects/cat/train");
    // What the comparison reads, it names from the folder that it is started in.
    std::os::unix::fs::symlink(root().join("assets"), scratch.path("assets")).unwrap();
    let comparison = root().join("configs/compare-quick.toml");
    let mut all = vec![
        of(&["--help"]),
        of(&["--version"]),
        of(&["train", "--help"]),
        of(&["prepare", "canny", "--help"]),
        of(&["doctor"]),
        of(&["doctor", "--json"]),
        of(&["inspect", adapter]),
        of(&["inspect", adapter, "--json"]),
        of(&["merge", adapter, "--output", scratch.path("merged").to_str().unwrap()]),
        of(&["prepare", "canny", picture.to_str().unwrap(), "--output", "edges"]),
        of(&["compare", comparison.to_str().unwrap(), "--dry-run", "--output-dir", "compared"]),
        of(&["sample", "--model", model, "--prompt", "a cat", "--steps", "1", "--output", "drawn"]),
        of(&["sample", "--model", model, "--prompt", "a cat", "--steps", "1", "--output", "drawn", "--json"]),
    ];
    all.push(scratch.train_flags("run", &["--print-config"]));
    all.push(scratch.train_flags("trained", &["--max_train_steps", "1"]));
    all
}

fn with_stdout(scratch: &Scratch, args: &[String], stdout: impl Into<Stdio>) -> Finished {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    finished(scratch.command(&args).stdout(stdout).output().unwrap())
}

#[test]
fn an_answer_to_a_full_disk_is_an_error() {
    let scratch = Scratch::new();
    for args in answers(&scratch) {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let done = with_stdout(&scratch, &args, full);
        assert_eq!(done.code, 2, "{args:?}: {}", done.err);
        let told = "error: cannot write to the standard output: No space left on device";
        assert!(done.err.lines().any(|line| line.starts_with(told)), "{args:?}: {}", done.err);
        assert!(!done.err.contains("defect of hra"), "{args:?}: {}", done.err);
    }
}

#[test]
fn a_reader_who_has_read_enough_is_no_error() {
    let scratch = Scratch::new();
    for args in answers(&scratch) {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let done = with_stdout(&scratch, &args, writer);
        assert_eq!(done.code, 0, "{args:?}: {}", done.err);
        assert!(!done.err.contains("error"), "{args:?}: {}", done.err);
    }
}
