//! The reference cases of this repository.

use super::base::{pin_threads, root};
use hra::weights::tensor_file::TensorFile;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::Tensor;

/// One folder of reference tensors that Python wrote (see tests/fixtures/README.md).
pub struct Case {
    pub name: String,
    pub dir: PathBuf,
    pub expected: TensorFile,
    /// Where its files are no longer than it is.
    pub _scratch: Option<Arc<tempfile::TempDir>>,
}

/// The cases of this repository.
pub fn stored_cases() -> Vec<Case> {
    pin_threads();
    cases_in(&root().join("tests/fixtures/cases"))
}

pub fn cases_in(folder: &Path) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut dirs: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().map(|e| e.unwrap().path()).collect();
    dirs.sort();
    for dir in dirs {
        let path = dir.join("expected.safetensors");
        if path.is_file() {
            let name = dir.file_name().unwrap().to_string_lossy().into_owned();
            cases.push(Case { name, expected: TensorFile::open(&path).unwrap(), dir, _scratch: None });
        }
    }
    cases
}

impl Case {
    pub fn get(&self, name: &str) -> Tensor {
        self.expected.read(name).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    pub fn pipeline(&self) -> PathBuf {
        self.dir.join("pipeline")
    }
}
