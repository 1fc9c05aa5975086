//! Cells of a comparison whose process was killed: nobody waits for them any more, and they end.

use crate::compare::{METHODS, config};
use crate::support::scratch::Scratch;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Waits for what `there` finds.
fn wait_for<T>(there: impl Fn() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = there() {
            return found;
        }
        assert!(started.elapsed() < Duration::from_secs(300), "waited too long");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// State and parent of a process (proc_pid_stat(5)); `None` if there is none.
fn process(pid: u32) -> Option<(char, u32)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// The cells that a comparison has started.
fn children(parent: &Child) -> Option<Vec<u32>> {
    let all = std::fs::read_dir("/proc").unwrap();
    let pids = all.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let own: Vec<u32> = pids.filter(|pid| process(*pid).is_some_and(|(_, of)| of == parent.id())).collect();
    (!own.is_empty()).then_some(own)
}

/// Whether it has ended; whether somebody has asked how is not ours.
fn has_ended(pid: u32) -> bool {
    process(pid).is_none_or(|(state, _)| "ZX".contains(state))
}

/// A comparison whose trainings do not end while the test lasts.
fn comparison(scratch: &Scratch) -> Command {
    let text = config("jobs = 1", "", METHODS).replace("max_train_steps = 6", "max_train_steps = 6000");
    std::fs::write(scratch.path("c.toml"), text).unwrap();
    scratch.command(&["compare", "c.toml"])
}

/// What the cells have written.
fn cells(scratch: &Scratch, name: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(scratch.path("out/cells")).into_iter().flatten();
    entries.map(|cell| cell.unwrap().path().join(name)).filter(|path| path.exists()).collect()
}

#[test]
fn the_cells_of_a_killed_comparison_end() {
    let scratch = Scratch::new();
    let mut parent = comparison(&scratch).spawn().unwrap();
    wait_for(|| (!cells(&scratch, "run/metrics.jsonl").is_empty()).then_some(()));
    let cells = wait_for(|| children(&parent));
    parent.kill().unwrap();
    parent.wait().unwrap();
    wait_for(|| cells.iter().all(|pid| has_ended(*pid)).then_some(()));
}

/// A library that makes a started process wait before it asks to be told of its parent's end.
fn slow_prctl(dir: &Path) -> PathBuf {
    let (source, library) = (dir.join("slow.c"), dir.join("slow.so"));
    let text = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
#define PR_SET_PDEATHSIG 1
int prctl(int op, unsigned long a, unsigned long b, unsigned long c, unsigned long d) {
    if (op == PR_SET_PDEATHSIG) sleep(1);
    return ((int (*)(int, unsigned long, unsigned long, unsigned long, unsigned long))dlsym(RTLD_NEXT, "prctl"))(op, a, b, c, d);
}
"#;
    std::fs::write(&source, text).unwrap();
    let made =
        Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status().unwrap();
    assert!(made.success());
    library
}

#[test]
fn a_comparison_killed_while_it_starts_a_cell_leaves_none() {
    let scratch = Scratch::new();
    let slow = slow_prctl(scratch.dir.path());
    let mut parent = comparison(&scratch).env("LD_PRELOAD", slow).spawn().unwrap();
    let cells_started = wait_for(|| children(&parent));
    parent.kill().unwrap();
    parent.wait().unwrap();
    wait_for(|| cells_started.iter().all(|pid| has_ended(*pid)).then_some(()));
    assert!(cells(&scratch, ".lock").is_empty(), "no cell has begun");
}
