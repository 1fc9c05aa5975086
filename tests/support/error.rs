//! How two tensors are compared.

use tch::{Kind, Tensor};

/// Norm of the difference over norm of the reference.
pub fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    let (found, expected) = (found.to_kind(Kind::Double), expected.to_kind(Kind::Double));
    assert_eq!(found.size(), expected.size(), "shapes");
    let norm = expected.norm().double_value(&[]);
    let difference = (found - expected).norm().double_value(&[]);
    if norm == 0.0 { difference } else { difference / norm }
}
