//! The reference case of Stable Diffusion XL, whose weights are not stored: `fixtures/make_xl_cases.py` says by which rule they grow.

use super::base::{pin_threads, root};
use super::copied::copy;
use hra::weights::tensor_file;
use std::collections::BTreeMap;
use std::path::Path;
use tch::Tensor;

const SEED: i64 = 4711;

/// The case's folder, `xl` in one that goes with it.
pub fn grown_xl() -> tempfile::TempDir {
    pin_threads();
    let stored = root().join("tests/fixtures/cases-xl/xl");
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("xl");
    copy(&stored, &dir);
    let tokenizer = root().join("assets/tiny-sd/tokenizer");
    for (folder, files) in [
        ("tokenizer", &["vocab.json", "merges.txt", "tokenizer.json"][..]),
        ("tokenizer_2", &["vocab.json", "merges.txt"]),
    ] {
        for file in files {
            std::fs::copy(tokenizer.join(file), dir.join("pipeline").join(folder).join(file)).unwrap();
        }
    }
    grow(&dir);
    scratch
}

/// Writes the files that `weights.json.gz` names.
fn grow(dir: &Path) {
    let packed = std::fs::File::open(dir.join("weights.json.gz")).unwrap();
    let text = flate2::read::GzDecoder::new(packed);
    let files: BTreeMap<String, BTreeMap<String, Vec<i64>>> = serde_json::from_reader(text).unwrap();
    let mut seed = SEED;
    for (file, tensors) in files {
        let mut grown = Vec::new();
        for (name, shape) in tensors {
            let (factor, start) = scale(&name, &shape);
            grown.push((name, uniform(seed, &shape) * factor + start));
            seed += 1;
        }
        tensor_file::write(&dir.join(file), &grown, &[]).unwrap();
    }
}

/// From [-1, 1), as a generator of Python's with this seed draws.
fn uniform(seed: i64, shape: &[i64]) -> Tensor {
    hra::platform::random::seeded(seed as u64, |draws| draws.uniform(shape, 0.0, 1.0)) * 2.0 - 1.0
}

fn scale(name: &str, shape: &[i64]) -> (f64, f64) {
    if name.contains("oft_R") || name.ends_with(".bias") {
        return (0.1, 0.0);
    }
    if shape.len() == 1 {
        return (0.2, 1.0);
    }
    let fan_in = shape.iter().product::<i64>() / shape[0];
    ((fan_in as f64).powf(-0.5), 0.0)
}
