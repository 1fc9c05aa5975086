//! Running the real binary in a scratch folder.

use super::base::threads;
use super::finished::{Finished, finished};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A scratch folder, removed at the end, in which the program runs on the embedded model.
pub struct Scratch {
    pub dir: tempfile::TempDir,
}

impl Scratch {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The program with `args`, on as many threads as the tests.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hra"));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env("OMP_NUM_THREADS", threads().to_string());
        command
    }

    pub fn run(&self, args: &[&str]) -> Finished {
        finished(self.command(args).output().unwrap())
    }

    /// Runs and expects success.
    pub fn ok(&self, args: &[&str]) -> Finished {
        let done = self.run(args);
        assert_eq!(done.code, 0, "{args:?}\n{}", done.err);
        done
    }
}
