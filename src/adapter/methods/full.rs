//! Full fine-tuning as an adapter: the trained weight itself, in the place of the frozen one.

use crate::adapter::method::{Method, MethodSettings, OwnSection, OwnSettings, Parts, RegisteredMethod};
use crate::adapter::{Adapter, Change, Form, Frozen};
use crate::platform::host;
use serde_json::Value;
use tch::{Kind, Tensor};

/// Full fine-tuning; it has no settings of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FullConfig;

/// What a training says of full fine-tuning: nothing.
#[derive(Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct FullSettings {}

impl OwnSettings for FullSettings {
    fn method(self) -> Method {
        Method::new(FullConfig)
    }
}

/// Full fine-tuning's line in the registry.
pub const METHOD: RegisteredMethod = RegisteredMethod {
    name: "full",
    about: "All weights of the UNet, without an adapter",
    own: OwnSection::of::<FullSettings>(),
    reader: None,
};

impl MethodSettings for FullConfig {
    fn name(&self) -> &'static str {
        METHOD.name
    }

    fn describe(&self) -> String {
        "full fine-tuning".into()
    }

    fn validate(&self) -> crate::Result<()> {
        Ok(())
    }

    fn start(&self, weight: &Tensor, _: u64) -> Result<Box<dyn Adapter>, String> {
        Ok(Box::new(Full::new(weight.to_kind(Kind::Float).copy())))
    }

    fn parameters_for(&self, weight: &[i64]) -> Result<usize, String> {
        Ok(weight.iter().product::<i64>() as usize)
    }

    fn trains_whole_network(&self) -> bool {
        true
    }

    fn tensor_names(&self) -> &'static [&'static str] {
        &["weight"]
    }

    fn to_peft(&self) -> Option<(&'static str, Value)> {
        None
    }

    fn adapter(&self, _: Parts) -> Result<Box<dyn Adapter>, String> {
        Err("expected an adapter, found a whole weight".into())
    }
}

/// A whole weight.
pub struct Full {
    /// In the shape of the frozen weight: f32 in training; in the compute dtype where it is only used.
    weight: Tensor,
}

impl Full {
    /// The given weight.
    pub fn new(weight: Tensor) -> Self {
        Self { weight }
    }
}

impl Adapter for Full {
    fn forward(&self, frozen: &Frozen, x: &Tensor) -> Tensor {
        frozen.apply(x, &self.weight.to_kind(x.kind()), frozen.bias)
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![("weight", self.weight.shallow_clone())]
    }

    fn replace_parameters(&mut self, replace: &mut dyn FnMut(&Tensor) -> Tensor) {
        self.weight = replace(&self.weight);
    }

    fn bias_name(&self) -> &'static str {
        "bias"
    }

    fn check(&self, weight: &[i64]) -> Result<(), String> {
        let found = self.weight.size();
        if found == weight {
            Ok(())
        } else {
            Err(format!("expected shape {weight:?} for this model, found {found:?}"))
        }
    }

    fn moves_from_base(&self) -> bool {
        true
    }

    /// On the straight line from the frozen weight to the trained one.
    fn change(&self, weight: &Tensor, strength: f64) -> Change {
        let own = host::wide(&self.weight).reshape(&weight.size()[..]);
        Form::Dense(weight + (own - weight) * strength).into()
    }
}
