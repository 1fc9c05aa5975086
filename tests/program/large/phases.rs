//! How much memory a run holds, phase by phase: looked at many times a second, while its progress says where it is.

use crate::support::finished::Finished;
use crate::support::scratch::Scratch;
use std::fs::File;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

/// A part of a run.
pub struct Phase {
    pub name: String,
    pub seconds: f64,
    /// The most bytes of its own that the process held in it; pages of files do not count.
    pub most: u64,
    /// What it held in the end.
    pub last: u64,
}

/// Runs a command whose progress, in lines that begin with one of `names`, begins a phase; before the first it is `loading`.
pub fn watched(scratch: &Scratch, args: &[&str], names: &[&str]) -> (Finished, Vec<Phase>) {
    let [out, err] = ["stdout.txt", "stderr.txt"].map(|name| scratch.path(name));
    let mut command = scratch.command(args);
    command.env_remove("OMP_NUM_THREADS");
    command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
    let mut child = command.spawn().unwrap();
    let mut phases: Vec<Phase> = Vec::new();
    let mut began = Instant::now();
    let status: ExitStatus = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        let said = std::fs::read_to_string(&err).unwrap_or_default();
        let begun = said.lines().rev().find_map(|line| names.iter().find(|name| line.starts_with(**name)));
        let name = begun.copied().unwrap_or("loading");
        if phases.last().is_none_or(|phase| phase.name != name) {
            began = Instant::now();
            phases.push(Phase { name: name.to_string(), seconds: 0.0, most: 0, last: 0 });
        }
        if let (Some(phase), Some(bytes)) = (phases.last_mut(), own_bytes(child.id())) {
            phase.seconds = began.elapsed().as_secs_f64();
            phase.most = phase.most.max(bytes);
            phase.last = bytes;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let read = |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
    (Finished { code: status.code().unwrap_or(-1), out: read(&out), err: read(&err) }, phases)
}

fn own_bytes(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}
