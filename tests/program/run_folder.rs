//! What a run's folder holds at its end.

use std::path::{Path, PathBuf};

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
