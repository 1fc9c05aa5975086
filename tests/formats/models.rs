//! Whole models in either form: opening, reading all of it, comparing.

use crate::support::cases::Case;
use hra::StableDiffusion;
use hra::convert::single_file::{Replaced, write_checkpoint};
use hra::weights::part::Part;
use hra::weights::source::Source;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

pub fn open(path: &Path) -> Source {
    Source::open(path, None).unwrap()
}

pub fn load(path: &Path) -> StableDiffusion {
    let model = StableDiffusion::load(path, Kind::Float, Device::Cpu).unwrap();
    assert!(model.notes.is_empty(), "{}: {:?}", path.display(), model.notes);
    model
}

/// The case's checkpoint, in a folder of its own.
pub fn checkpoint(case: &Case, dir: &Path) -> PathBuf {
    let path = dir.join(format!("{}.safetensors", case.name));
    let notes = write_checkpoint(&open(&case.pipeline()), &Replaced::new(), None, &path).unwrap();
    assert!(notes.is_empty(), "{notes:?}");
    path
}

/// Every weight of a model by part and today's name.
pub fn weights(path: &Path) -> BTreeMap<(Part, String), Tensor> {
    let source = open(path);
    let mut all = BTreeMap::new();
    for part in source.parts() {
        let tensors = source.tensors(part).unwrap();
        for name in tensors.names().filter(|name| !name.ends_with("position_ids")) {
            all.insert((part, name.to_string()), tensors.read(name).unwrap());
        }
    }
    all
}

/// The same names, dtypes and values; a 1x1 convolution may be a matrix.
pub fn assert_same(found: &Path, expected: &Path) {
    let (found, expected) = (weights(found), weights(expected));
    let names = |all: &BTreeMap<(Part, String), Tensor>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected));
    for (name, tensor) in &expected {
        let other = &found[name];
        assert_eq!(other.kind(), tensor.kind(), "{name:?}");
        assert!(other.reshape(tensor.size()).equal(tensor), "{name:?}");
    }
}
