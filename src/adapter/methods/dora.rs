//! DoRA (arXiv 2402.09353): `W' = m (W + s B A) / |W + s B A|`, row by row: a length for each output beside LoRA's change.
//!
//! As in PEFT 0.21 (`lora/dora.py`) the norm is a constant in the backward pass (paper section 4.3) and the bias is not
//! scaled. The norm needs no dense `B A`:
//!
//! ```text
//! |W_i + s (B A)_i|^2 = |W_i|^2 + 2 s <(W A^T)_i, B_i> + s^2 <B_i (A A^T), B_i>
//! ```

use crate::adapter::method::{
    FileFacts, Method, MethodSettings, OwnSection, OwnSettings, Parts, PeftReader, RegisteredMethod,
};
use crate::adapter::methods::lora::{Lora, LoraConfig, LoraSettings};
use crate::adapter::{Adapter, Change, Form, Frozen};
use crate::platform::host;
use serde_json::Value;
use tch::{Kind, Tensor};

/// The settings of DoRA: those of its LoRA.
#[derive(Debug, Clone, PartialEq)]
pub struct DoraConfig(pub LoraConfig);

/// What a training says of DoRA: what it says of LoRA.
#[derive(Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
struct DoraSettings(LoraSettings);

impl OwnSettings for DoraSettings {
    fn method(self) -> Method {
        Method::new(DoraConfig(self.0.into()))
    }
}

/// DoRA's line in the registry.
pub const METHOD: RegisteredMethod = RegisteredMethod {
    name: "dora",
    about: "LoRA with a trained magnitude for each output",
    own: OwnSection::of::<DoraSettings>(),
    reader: Some(PeftReader {
        peft_type: "LORA",
        prefix: "lora_",
        read: |fields| match fields.flag("use_dora", false) {
            true => Some(Box::new(DoraConfig(LoraConfig::read(fields)))),
            false => None,
        },
    }),
};

impl MethodSettings for DoraConfig {
    fn name(&self) -> &'static str {
        METHOD.name
    }

    fn describe(&self) -> String {
        self.0.describe_as("DoRA")
    }

    fn validate(&self) -> crate::Result<()> {
        self.0.validate()
    }

    fn start(&self, weight: &Tensor, seed: u64) -> Result<Box<dyn Adapter>, String> {
        Ok(Box::new(Dora::new(weight, &self.0, seed)?))
    }

    fn parameters_for(&self, weight: &[i64]) -> Result<usize, String> {
        Ok(self.0.parameters_for(weight)? + weight[0] as usize)
    }

    fn is_uniform(&self) -> bool {
        self.0.is_uniform()
    }

    fn tensor_names(&self) -> &'static [&'static str] {
        &["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]
    }

    fn to_peft(&self) -> Option<(&'static str, Value)> {
        Some(("LORA", self.0.peft_fields(true)))
    }

    fn settle(&mut self, file: &FileFacts) -> Result<Vec<String>, Vec<String>> {
        self.0.settle(file)
    }

    fn adapter(&self, mut parts: Parts) -> Result<Box<dyn Adapter>, String> {
        let lora = self.0.lora(&mut parts)?;
        Ok(Box::new(Dora::from_tensors(lora, parts.take("lora_magnitude_vector")?)?))
    }
}

/// The DoRA adapter of one layer.
pub struct Dora {
    lora: Lora,
    /// m: `(d_out)`, or `(1, d_out, 1, 1)` for a convolution, f32.
    magnitude: Tensor,
}

impl Dora {
    /// An adapter with the given numbers; `magnitude` is `(d_out)` or `(1, d_out, 1, 1)`.
    ///
    /// Errors: what is wrong with its shape.
    pub fn from_tensors(lora: Lora, magnitude: Tensor) -> Result<Self, String> {
        let d_out = lora.parameters()[1].1.size()[0];
        let (flat, found) = ([d_out], magnitude.size());
        if found[..] != flat[..] && found != [1, d_out, 1, 1] {
            return Err(format!(
                "lora_magnitude_vector: expected shape {flat:?}, or [1, {d_out}, 1, 1] of a convolution, found {found:?}"
            ));
        }
        Ok(Self { lora, magnitude })
    }

    /// A new adapter for the frozen `weight`, whose row norms the magnitudes start at.
    pub fn new(weight: &Tensor, config: &LoraConfig, seed: u64) -> Result<Self, String> {
        let _guard = tch::no_grad_guard();
        let lora = Lora::new(&weight.size(), weight.device(), config, seed)?;
        let norms = weight.flatten(1, -1).norm_scalaropt_dim_dtype(2, [1], false, Kind::Float);
        let magnitude = if weight.dim() == 4 { norms.view([1, -1, 1, 1]) } else { norms };
        Self::from_tensors(lora, magnitude)
    }

    /// `|W + s B A|` of each row, `(d_out)` f32, without gradient.
    fn norms(&self, frozen: &Frozen, kind: Kind) -> Tensor {
        let _guard = tch::no_grad_guard();
        let (a, b) = self.lora.factors(); // [r, d_in], [d_out, r] with s in it
        let weight = frozen.matrix(kind);
        let own = weight.norm_scalaropt_dim_dtype(2, [1], false, Kind::Float).to_kind(Kind::Double).square();
        let wa = weight.matmul(&a.to_kind(weight.kind()).tr()); // [d_out, r]
        let b = b.to_kind(Kind::Double);
        let gram = a.matmul(&a.tr()).to_kind(Kind::Double);
        // The three terms may cancel, so they are added in f64; the products with d_in terms are in the weight's dtype.
        let sums = (wa.to_kind(Kind::Double) * 2.0 + b.matmul(&gram)) * &b;
        let squares = own + sums.sum_dim_intlist(1, false, Kind::Double);
        squares.clamp_min(1e-30).sqrt().to_kind(Kind::Float)
    }
}

impl Adapter for Dora {
    fn forward(&self, frozen: &Frozen, x: &Tensor) -> Tensor {
        let scale = self.magnitude.view(-1) / self.norms(frozen, x.kind()); // [d_out]
        let y = self.lora.product(frozen, x);
        frozen.scaled(&y, &scale)
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        let mut parameters = self.lora.parameters();
        parameters.push(("lora_magnitude_vector", self.magnitude.shallow_clone()));
        parameters
    }

    fn replace_parameters(&mut self, replace: &mut dyn FnMut(&Tensor) -> Tensor) {
        self.lora.replace_parameters(replace);
        self.magnitude = replace(&self.magnitude);
    }

    fn check(&self, weight: &[i64]) -> Result<(), String> {
        self.lora.check(weight)
    }

    fn size(&self) -> (i64, i64) {
        self.lora.size()
    }

    /// On the straight line from W to W'.
    fn change(&self, weight: &Tensor, strength: f64) -> Change {
        let (down, up) = self.lora.wide();
        let moved = weight + up.matmul(&down);
        let norms = moved.norm_scalaropt_dim(2, [1], true).clamp_min(1e-30);
        let magnitude = host::wide(&self.magnitude).view([-1, 1]);
        let own = moved * (magnitude / norms);
        Form::Dense(weight + (own - weight) * strength).into()
    }
}
