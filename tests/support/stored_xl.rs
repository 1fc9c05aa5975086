//! The reference case of Stable Diffusion XL of this repository.

use super::cases::Case;
use super::grown::grown_xl;
use hra::weights::tensor_file::TensorFile;
use std::sync::Arc;

/// It, in a folder of its own that goes with it.
pub fn stored_xl() -> Case {
    let scratch = grown_xl();
    let dir = scratch.path().join("xl");
    let expected = TensorFile::open(&dir.join("expected.safetensors")).unwrap();
    Case { name: "xl".into(), dir, expected, _scratch: Some(Arc::new(scratch)) }
}
