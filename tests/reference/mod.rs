//! The reference cases as functions of where they are computed: on the CPU in f32 they are the parity tests (tests/numbers/parity.rs),
//! on a GPU and in half precision those of tests/cuda.rs.

pub mod adapters;
pub mod control;
pub mod networks;
pub mod samplers;
pub mod training;
pub mod xl;

use crate::support::cases::Case;
use crate::support::error::relative_error;
use hra::StableDiffusion;
use serde_json::Value;
use std::cell::RefCell;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// Where and in what the networks compute.
#[derive(Clone, Copy, PartialEq)]
pub struct Compute {
    pub device: Device,
    pub kind: Kind,
}

/// As the references were made.
pub const REFERENCE: Compute = Compute { device: Device::Cpu, kind: Kind::Float };

/// What was compared under one name: tensors of one kind, such as the gradients of an adapter.
#[derive(Default)]
pub struct Compared {
    /// Relative errors, each beside what f32 on the CPU is allowed.
    pub errors: Vec<(f64, f64)>,
}

impl Compared {
    /// The largest error, as a multiple of what f32 on the CPU is allowed.
    pub fn worst(&self) -> f64 {
        // Not `max`, which would pass over a NaN.
        self.errors
            .iter()
            .map(|(error, allowed)| error / allowed)
            .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
    }
}

impl Case {
    pub fn has(&self, name: &str) -> bool {
        self.expected.shape(name).is_some()
    }

    /// Text and numbers of expected.json.
    pub fn json(&self) -> Value {
        serde_json::from_str(&std::fs::read_to_string(self.dir.join("expected.json")).unwrap()).unwrap()
    }
}

/// Computes cases, and keeps what the comparisons gave.
pub struct Comparer {
    pub compute: Compute,
    /// What every found tensor is multiplied by: 1, or what a test of this test plants.
    pub planted: f64,
    compared: RefCell<BTreeMap<String, Compared>>,
}

impl Comparer {
    pub fn new(compute: Compute) -> Self {
        Self { compute, planted: 1.0, compared: RefCell::default() }
    }

    /// What a loss is multiplied by before its gradient is taken: in f16 small gradients vanish.
    pub fn loss_scale(&self) -> f64 {
        if self.compute.kind == Kind::Half { 4096.0 } else { 1.0 }
    }

    /// Whether what is compared can be asserted beyond rounding.
    pub fn is_reference(&self) -> bool {
        self.compute == REFERENCE
    }

    pub fn load(&self, case: &Case) -> StableDiffusion {
        let model = StableDiffusion::load(&case.pipeline(), self.compute.kind, self.compute.device).unwrap();
        assert!(model.notes.is_empty(), "{}: {:?}", case.name, model.notes);
        model
    }

    /// A stored tensor, on the device.
    pub fn input(&self, case: &Case, name: &str) -> Tensor {
        self.on_device(&case.get(name))
    }

    pub fn on_device(&self, tensor: &Tensor) -> Tensor {
        tensor.to_device(self.compute.device)
    }

    /// Compares with the stored tensor `key`; f32 on the CPU is allowed `tolerance`, and fails at once beyond it.
    pub fn compare(&self, case: &Case, what: &str, key: &str, found: &Tensor, tolerance: f64) {
        self.compare_with(&format!("{} {what}", case.name), key, found, &case.get(key), tolerance);
    }

    pub fn compare_with(&self, what: &str, key: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
        assert_eq!(found.device(), self.compute.device, "{what} {key}: computed elsewhere");
        let found = found.to_device(Device::Cpu).to_kind(Kind::Double) * self.planted;
        let error = relative_error(&found.reshape(&expected.size()[..]), expected);
        if self.is_reference() && self.planted == 1.0 {
            assert!(error <= tolerance, "{what} {key}: relative error {error:.2e}, allowed {tolerance:.0e}");
        }
        self.compared.borrow_mut().entry(what.to_string()).or_default().errors.push((error, tolerance));
    }

    pub fn finish(self) -> BTreeMap<String, Compared> {
        self.compared.into_inner()
    }
}
