//! HRA with a trained magnitude for each output: `W' = diag(m) W H`, H the reflections of [`super::hra`], m starting at 1.
//!
//! What DoRA (arXiv 2402.09353) is to LoRA. A rotation of the inputs keeps the length of every row of W, so m is the length of each
//! new row over the old one's and no norm is computed. As in DoRA the bias is not scaled.
//!
//! PEFT has no such method: its files are read here, and `hra export` makes LoRA or whole models of them.

use crate::adapter::method::{
    Method, MethodSettings, OwnSection, OwnSettings, Parts, PeftReader, RegisteredMethod,
};
use crate::adapter::methods::hra::{self, Hra, HraConfig};
use crate::adapter::{Adapter, Change, Form, Frozen, Rotation};
use crate::platform::host;
use serde_json::Value;
use std::any::Any;
use tch::{Kind, Tensor};

const MAGNITUDE: &str = "hra_magnitude_vector";

/// The settings of HRA with magnitudes: those of its reflections.
#[derive(Debug, Clone, PartialEq)]
pub struct HraMagnitudeConfig(pub HraConfig);

/// What a training says of it: what it says of HRA.
#[derive(Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
struct HraMagnitudeSettings(HraConfig);

impl OwnSettings for HraMagnitudeSettings {
    fn method(self) -> Method {
        Method::new(HraMagnitudeConfig(self.0))
    }
}

/// Its line in the registry.
pub const METHOD: RegisteredMethod = RegisteredMethod {
    name: "hra-magnitude",
    about: "HRA with a trained magnitude for each output",
    own: OwnSection::of::<HraMagnitudeSettings>(),
    reader: Some(PeftReader {
        peft_type: "HRA_MAGNITUDE",
        prefix: "hra_",
        read: |fields| Some(Box::new(HraMagnitudeConfig(HraConfig::read(fields)))),
    }),
};

impl MethodSettings for HraMagnitudeConfig {
    fn name(&self) -> &'static str {
        METHOD.name
    }

    fn describe(&self) -> String {
        format!("{}, magnitudes", self.0.describe())
    }

    fn validate(&self) -> crate::Result<()> {
        self.0.validate()
    }

    fn start(&self, weight: &Tensor, seed: u64) -> Result<Box<dyn Adapter>, String> {
        let hra = Hra::new(&weight.flatten(1, -1), self.0, seed)?;
        let magnitude = Tensor::ones(weight.size()[0], (Kind::Float, weight.device()));
        Ok(Box::new(HraMagnitude { hra, magnitude }))
    }

    fn parameters_for(&self, weight: &[i64]) -> Result<usize, String> {
        Ok(self.0.parameters_for(weight)? + weight[0] as usize)
    }

    fn is_known_to_peft(&self) -> bool {
        false
    }

    fn tensor_names(&self) -> &'static [&'static str] {
        &[hra::VECTORS, MAGNITUDE]
    }

    fn regulariser_weight(&self) -> f64 {
        self.0.regulariser_weight()
    }

    fn to_peft(&self) -> Option<(&'static str, Value)> {
        let (_, fields) = self.0.to_peft()?;
        Some(("HRA_MAGNITUDE", fields))
    }

    fn adapter(&self, mut parts: Parts) -> Result<Box<dyn Adapter>, String> {
        let hra = self.0.hra(&mut parts)?;
        let magnitude = parts.take(MAGNITUDE)?;
        match magnitude.size()[..] {
            [n] if n > 0 => Ok(Box::new(HraMagnitude { hra, magnitude })),
            _ => Err(format!("{MAGNITUDE}: expected shape (d_out), found {:?}", magnitude.size())),
        }
    }
}

/// The adapter of one layer.
pub struct HraMagnitude {
    hra: Hra,
    /// m: `(d_out)`, f32.
    magnitude: Tensor,
}

impl HraMagnitude {
    fn all<'a>(alike: &[&'a dyn Adapter]) -> Vec<&'a Hra> {
        let of = |adapter: &&'a dyn Adapter| -> &'a Hra {
            let adapter: &'a dyn Any = *adapter;
            &adapter.downcast_ref::<Self>().expect("adapters that are alike are of one type").hra
        };
        alike.iter().map(of).collect()
    }
}

impl Adapter for HraMagnitude {
    fn forward(&self, frozen: &Frozen, x: &Tensor) -> Tensor {
        let y = self.hra.forward(&Frozen { bias: None, ..*frozen }, x);
        frozen.scaled(&y, &self.magnitude)
    }

    fn prepare(&self, alike: &[&dyn Adapter], kind: Kind) {
        self.hra.prepare_all(&Self::all(alike), kind);
    }

    fn regulariser(&self, alike: &[&dyn Adapter]) -> Option<Tensor> {
        self.hra.regulariser_of(&Self::all(alike))
    }

    fn project(&self) {
        self.hra.project();
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        let mut parameters = self.hra.parameters();
        parameters.push((MAGNITUDE, self.magnitude.shallow_clone()));
        parameters
    }

    fn replace_parameters(&mut self, replace: &mut dyn FnMut(&Tensor) -> Tensor) {
        self.hra.replace_parameters(replace);
        self.magnitude = replace(&self.magnitude);
    }

    fn check(&self, weight: &[i64]) -> Result<(), String> {
        self.hra.check(weight)?;
        match (weight[0], self.magnitude.size()[0]) {
            (expected, found) if expected == found => Ok(()),
            (expected, found) => {
                Err(format!("{MAGNITUDE}: expected {expected} values for this model, found {found}"))
            }
        }
    }

    fn size(&self) -> (i64, i64) {
        (self.hra.size().0, self.magnitude.size()[0])
    }

    /// `diag(1 + s (m - 1)) W H^s`: reflections along the geodesic, magnitudes on the straight line.
    fn change(&self, weight: &Tensor, strength: f64) -> Change {
        let (down, up, notes) = self.hra.turned(weight, strength);
        let magnitude = (host::wide(&self.magnitude) - 1.0) * strength + 1.0;
        let turned = weight + up.matmul(&down);
        Change { form: Form::Dense(turned * magnitude.view([-1, 1])), notes }
    }

    fn rotation(&self) -> Option<Rotation> {
        self.hra.rotation()
    }
}
