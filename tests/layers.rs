//! Modules import downwards only: the order that src/lib.rs draws.

mod support;

use std::path::{Path, PathBuf};

/// A module may use those before it, and itself. `error`, `files`, `seed`, `interrupt` and `progress` are everybody's.
const ORDER: [&str; 33] = [
    "error",
    "files",
    "seed",
    "interrupt",
    "progress",
    "hub",
    "results",
    "cuda",
    "tensorboard",
    "device",
    "image",
    "data",
    "tensor_file",
    "noise",
    "sampler",
    "adapter",
    "optim",
    "model",
    "single_file",
    "text",
    "stable_diffusion",
    "sample",
    "run",
    "checkpoint",
    "config",
    "train",
    "evaluate",
    "report",
    "doctor",
    "compare",
    "export",
    "inspect",
    "cli",
];

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found
}

#[test]
fn nothing_imports_upwards() {
    let src = support::root().join("src");
    let level =
        |name: &str| ORDER.iter().position(|m| *m == name).unwrap_or_else(|| panic!("`{name}` has no level"));
    let mut wrong = Vec::new();
    let mut seen = 0;
    for path in sources(&src) {
        let place = path.strip_prefix(&src).unwrap();
        let module = place.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        if ["lib", "main"].contains(&module) {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for used in text.split("crate::").skip(1) {
            let name: String = used.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            if name.is_empty() {
                continue; // `crate::Error`, `crate::{..}`
            }
            seen += 1;
            if level(&name) > level(module) {
                wrong.push(format!("{} uses {name}", place.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen > 100, "only {seen} imports were found");
}
