//! Running the real binary in a scratch folder.
#![allow(dead_code)] // each test binary uses its own part

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// A scratch folder, removed at the end, in which the program runs on the embedded model.
pub struct Scratch {
    pub dir: tempfile::TempDir,
}

/// What a finished program left.
pub struct Finished {
    pub code: i32,
    pub out: String,
    pub err: String,
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
        command.env("OMP_NUM_THREADS", super::threads().to_string());
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

    /// Starts the program and does not wait.
    pub fn start(&self, args: &[&str]) -> Child {
        self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Flags of a short training run on the cat into `out`, with prior preservation from pictures that are there.
    pub fn train_flags(&self, out: &str, more: &[&str]) -> Vec<String> {
        let assets = super::root().join("assets");
        let asset = |name: &str| assets.join(name).to_str().unwrap().to_string();
        let mut flags: Vec<String> = vec!["train".into()];
        for (flag, value) in [
            ("--pretrained_model_name_or_path", asset("tiny-sd")),
            ("--instance_data_dir", asset("subjects/cat/train")),
            ("--instance_prompt", "a fluent 3d emoji of a sks cat face".into()),
            ("--class_data_dir", asset("subjects/robot/train")),
            ("--class_prompt", "a fluent 3d emoji of a robot".into()),
            ("--output_dir", self.path(out).to_str().unwrap().into()),
            ("--learning_rate", "3e-3".into()),
            ("--log_every", "1".into()),
            ("--max_train_steps", "6".into()),
        ] {
            if !more.contains(&flag) {
                flags.extend([flag.to_string(), value]);
            }
        }
        flags.push("--with_prior_preservation".into());
        flags.extend(more.iter().map(|s| s.to_string()));
        flags
    }

    /// Trains with [`Self::train_flags`] and expects success.
    pub fn train(&self, out: &str, more: &[&str]) -> Finished {
        let flags = self.train_flags(out, more);
        self.ok(&flags.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

pub fn finished(output: Output) -> Finished {
    use std::os::unix::process::ExitStatusExt;
    Finished {
        code: output.status.code().unwrap_or_else(|| -output.status.signal().unwrap()),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The records of a run without what depends on the clock.
pub fn records(run: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .map(|mut record| {
            record.as_object_mut().unwrap().remove("seconds");
            record
        })
        .collect()
}

/// SHA-256 of a run's adapter: two runs have the same adapter if this is the same.
pub fn adapter(run: &Path) -> String {
    use sha2::Digest;
    let bytes = std::fs::read(run.join("adapter_model.safetensors")).unwrap();
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Files below `dir` whose names say that a write did not end.
pub fn leftovers(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().map(|e| e.unwrap().path()) {
        if entry.file_name().unwrap().to_string_lossy().starts_with(".tmp-") {
            found.push(entry.clone());
        }
        if entry.is_dir() {
            found.extend(leftovers(&entry));
        }
    }
    found
}
