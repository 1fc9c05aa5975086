//! What `make torture` does, for some seconds; and that it sees what it looks for.

use crate::support::base::root;
use crate::support::finished::{Finished, finished};
use crate::support::scratch::Scratch;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// Runs `tools/torture` on a program, with as many cases as `counts` (kills, limits, inputs).
fn torture(scratch: &Scratch, program: &Path, counts: [u32; 3], more: &[&str]) -> Finished {
    let python = std::env::var_os("PYTHON").filter(|word| !word.is_empty()).unwrap_or("python3".into());
    let mut command = Command::new(python);
    command.arg(root().join("tools/torture")).arg("--program").arg(program);
    command.arg("--work").arg(scratch.path("work")).args(["--seed", "1", "--jobs", "2"]);
    for (flag, count) in ["--kills", "--limits", "--inputs"].into_iter().zip(counts) {
        command.arg(flag).arg(count.to_string());
    }
    finished(command.args(more).output().unwrap())
}

/// Few of each, and none that needs a run to start from.
const SHORT: [&str; 12] = [
    "--scenario",
    "train",
    "--scenario",
    "merge",
    "--recipe",
    "adapter-inspect",
    "--recipe",
    "model-sample",
    "--recipe",
    "train-config",
    "--recipe",
    "picture",
];

#[test]
fn a_few_kills_and_damaged_files_do_no_harm() {
    let scratch = Scratch::new();
    let done = torture(&scratch, Path::new(env!("CARGO_BIN_EXE_hra")), [2, 0, 10], &SHORT);
    assert_eq!(done.code, 0, "{}{}", done.out, done.err);
    assert!(done.out.contains("inputs tried: 0 lost, 0 wrong, 0 panics (seed 1)"), "{}", done.out);
    assert!(!done.out.contains("not all that was asked for"), "{}", done.out);
}

/// The program with a shell script around it that does what no program should.
fn bad_program(scratch: &Scratch, name: &str, script: &str) -> std::path::PathBuf {
    let path = scratch.path(name);
    let script = script.replace("HRA", env!("CARGO_BIN_EXE_hra"));
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn what_no_program_should_do_is_seen() {
    let scratch = Scratch::new();
    for (name, script, recipe, expected) in [
        (
            "panics",
            "HRA \"$@\"; code=$?; [ $code = 0 ] || echo \"thread 'main' panicked at\" >&2; exit $code",
            "adapter-inspect",
            "panic: ",
        ),
        // Says that all is well, and draws something else.
        (
            "lies",
            "HRA \"$@\" 2>/dev/null; mkdir -p out; date +%N > out/x.txt; exit 0",
            "merge",
            "without a word",
        ),
        (
            "writes",
            "HRA \"$@\"; code=$?; echo x >> ../escaped; echo x > escaped; exit $code",
            "adapter-inspect",
            "outside",
        ),
    ] {
        let program = bad_program(&scratch, name, script);
        let done = torture(&scratch, &program, [0, 0, 6], &["--recipe", recipe]);
        assert_eq!(done.code, 1, "{name}: {}{}", done.out, done.err);
        assert!(
            done.out.contains(expected) && !done.out.contains("0 lost, 0 wrong, 0 panics"),
            "{}",
            done.out
        );
        assert!(scratch.path("work").read_dir().unwrap().count() > 0, "the files are kept");
    }
}
