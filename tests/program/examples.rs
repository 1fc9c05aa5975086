//! The examples do what they say: a program that trains, and one that draws.

use crate::support::base::root;
use std::path::PathBuf;
use std::process::Command;

/// Runs examples/NAME.rs; what it printed.
fn example(name: &str, words: &[&str]) -> String {
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--locked", "--quiet", "--example", name]).current_dir(root());
    let target = PathBuf::from(env!("CARGO_BIN_EXE_hra")).parent().unwrap().join("examples").join(name);
    assert!(build.status().unwrap().success());
    let done = Command::new(target).args(words).env("OMP_NUM_THREADS", "1").output().unwrap();
    let [out, err] = [done.stdout, done.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(done.status.success(), "{out}{err}");
    out
}

#[test]
fn a_program_trains_and_another_draws() {
    let lines = |name: &str| std::fs::read_to_string(root().join(format!("examples/{name}.rs"))).unwrap();
    assert!(["train_subject", "draw"].iter().all(|name| lines(name).lines().count() <= 40));
    let scratch = tempfile::tempdir().unwrap();
    let place = |name: &str| scratch.path().join(name).to_str().unwrap().to_string();
    let (model, pictures) = (root().join("assets/tiny-sd"), root().join("assets/subjects/cat/train"));
    let (model, run) = (model.to_str().unwrap(), place("run"));
    let told = example("train_subject", &[model, pictures.to_str().unwrap(), &run, "2"]);
    assert!(told.contains("step 1: loss 0.") && told.contains("step 2: loss 0."), "{told}");
    let drawn = example("draw", &[model, &run, "a photo of sks cat", &place("drawn")]);
    let picture = |name: &str| image::open(scratch.path().join("drawn").join(name)).unwrap().into_rgb8();
    assert_eq!(drawn.lines().count(), 6);
    assert_ne!(picture("0-at-1.png"), picture("0-at-0.png"), "the adapter does something");
    assert_ne!(picture("0-at-0.png"), picture("1-at-0.png"));
}
