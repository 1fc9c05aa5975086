//! What the parity tests share: where reference cases are, and how two tensors are compared.
#![allow(dead_code)] // each test binary uses its own part

pub mod hub_server;
pub mod models;
pub mod program;

use hra::weights::tensor_file::TensorFile;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// How many threads the tests compute with: `HRA_TEST_THREADS`, or one, as the references were made. Parallel tests would
/// also fight for cores.
pub fn threads() -> i32 {
    let Some(text) = std::env::var_os("HRA_TEST_THREADS").filter(|text| !text.is_empty()) else { return 1 };
    let count = text.to_str().and_then(|text| text.parse().ok()).filter(|count| *count >= 1);
    count.unwrap_or_else(|| panic!("HRA_TEST_THREADS: expected a number of threads, found {text:?}"))
}

/// Lets libtorch compute with [`threads`] in this process.
pub fn pin_threads() {
    tch::set_num_threads(threads());
}

/// The repository's root: `HRA_ROOT`, or where this was built.
pub fn root() -> PathBuf {
    std::env::var_os("HRA_ROOT").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from)
}

/// One folder of reference tensors that Python wrote (see tests/fixtures/README.md).
pub struct Case {
    pub name: String,
    pub dir: PathBuf,
    pub expected: TensorFile,
}

/// The cases of this repository.
pub fn stored_cases() -> Vec<Case> {
    pin_threads();
    cases_in(&root().join("tests/fixtures/cases"))
}

/// The cases of this repository, those beside it in `../shared/cases`, and those in the folders of `HRA_CASES`.
pub fn cases() -> Vec<Case> {
    let mut cases = stored_cases();
    cases.extend(cases_in(&root().join("../shared/cases")));
    cases.extend(std::env::var_os("HRA_CASES").iter().flat_map(|folder| cases_in(folder.as_ref())));
    assert!(cases.len() >= 2, "both kinds of reference cases are in tests/fixtures/cases");
    cases
}

fn cases_in(folder: &Path) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut dirs: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().map(|e| e.unwrap().path()).collect();
    dirs.sort();
    for dir in dirs {
        let path = dir.join("expected.safetensors");
        if path.is_file() {
            let name = dir.file_name().unwrap().to_string_lossy().into_owned();
            cases.push(Case { name, expected: TensorFile::open(&path).unwrap(), dir });
        }
    }
    cases
}

impl Case {
    pub fn get(&self, name: &str) -> Tensor {
        self.expected.read(name).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    pub fn has(&self, name: &str) -> bool {
        self.expected.shape(name).is_some()
    }

    pub fn pipeline(&self) -> PathBuf {
        self.dir.join("pipeline")
    }

    /// Text and numbers of expected.json.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&std::fs::read_to_string(self.dir.join("expected.json")).unwrap()).unwrap()
    }

    /// Fails if `found` differs from the tensor `name` by more than `tolerance`, relative.
    pub fn check(&self, name: &str, found: &Tensor, tolerance: f64) {
        let error = relative_error(found, &self.get(name));
        assert!(
            error <= tolerance,
            "{} {name}: relative error {error:.2e}, allowed {tolerance:.0e}",
            self.name
        );
    }
}

/// Norm of the difference over norm of the reference.
pub fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    let (found, expected) = (found.to_kind(Kind::Double), expected.to_kind(Kind::Double));
    assert_eq!(found.size(), expected.size(), "shapes");
    let norm = expected.norm().double_value(&[]);
    let difference = (found - expected).norm().double_value(&[]);
    if norm == 0.0 { difference } else { difference / norm }
}

/// The embedded model.
pub fn tiny_sd() -> PathBuf {
    root().join("assets/tiny-sd")
}

/// A path that must exist.
pub fn existing(path: &Path) -> &Path {
    assert!(path.exists(), "{} is missing", path.display());
    path
}
