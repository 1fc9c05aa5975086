//! (IA)^3 (arXiv 2205.05638): a trained factor for each output of a layer, or for each input of one that PEFT's config
//! calls feed-forward.
//!
//! As PEFT 0.21 (`ia3/layer.py`): factors start at 1; those of outputs multiply the bias too. A convolution's factors belong
//! to its channels.

use crate::adapter::how::ELSEWHERE;
use crate::adapter::method::{
    Combined, FileFacts, How, LayerChain, Method, MethodSettings, OwnSection, OwnSettings, Parts, PeftReader,
    RegisteredMethod,
};
use crate::adapter::peft_patterns::whole_pattern;
use crate::adapter::{Adapter, Change, Form, Frozen, Geometry};
use crate::error::{Error, Result};
use crate::platform::host;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tch::{Kind, Tensor};

const NAME: &str = "ia3_l";

/// The settings of (IA)^3.
#[derive(Debug, Clone, PartialEq)]
pub struct Ia3Config {
    /// Layers whose inputs are multiplied: a list of name endings, or a regular expression for whole names. A new adapter has
    /// none.
    pub feedforward: Value,
    /// The layers of a file that it means.
    inputs: BTreeSet<String>,
}

/// What a training says of (IA)^3: nothing.
#[derive(Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Ia3Settings {}

impl OwnSettings for Ia3Settings {
    fn method(self) -> Method {
        Method::new(Ia3Config::default())
    }
}

/// (IA)^3's line in the registry.
pub const METHOD: RegisteredMethod = RegisteredMethod {
    name: "ia3",
    about: "A factor for each output",
    own: OwnSection::of::<Ia3Settings>(),
    reader: Some(PeftReader {
        peft_type: "IA3",
        prefix: "ia3_",
        read: |fields| {
            fields.refuse("fan_in_fan_out", "weights stored the other way round");
            let feedforward = fields.set("feedforward_modules").cloned().unwrap_or_else(|| json!([]));
            let pattern = feedforward.as_str().map(whole_pattern);
            let names = feedforward.as_array().is_some_and(|list| list.iter().all(Value::is_string));
            if !names && !matches!(pattern, Some(Some(_))) {
                fields.expected("feedforward_modules", "a list of names, or a regular expression");
            }
            Some(Box::new(Ia3Config { feedforward, inputs: BTreeSet::new() }))
        },
    }),
};

impl Default for Ia3Config {
    fn default() -> Self {
        Self { feedforward: json!([]), inputs: BTreeSet::new() }
    }
}

impl MethodSettings for Ia3Config {
    fn name(&self) -> &'static str {
        METHOD.name
    }

    fn describe(&self) -> String {
        "(IA)^3".into()
    }

    fn validate(&self) -> Result<()> {
        Ok(())
    }

    fn start(&self, weight: &Tensor, _: u64) -> std::result::Result<Box<dyn Adapter>, String> {
        let d_out = weight.size()[0];
        let shape = if weight.dim() == 4 { vec![1, d_out, 1, 1] } else { vec![d_out, 1] };
        let factors = Tensor::ones(&shape[..], (Kind::Float, weight.device()));
        Ok(Box::new(Ia3 { factors, on_inputs: false }))
    }

    fn parameters_for(&self, weight: &[i64]) -> std::result::Result<usize, String> {
        Ok(weight[0] as usize)
    }

    /// PEFT's config of it has no field for them.
    fn keeps_bias(&self) -> bool {
        false
    }

    fn is_uniform(&self) -> bool {
        self.inputs.is_empty()
    }

    fn tensor_names(&self) -> &'static [&'static str] {
        &[NAME]
    }

    fn to_peft(&self) -> Option<(&'static str, Value)> {
        let own = json!({
            "fan_in_fan_out": false,
            "feedforward_modules": self.feedforward,
            "init_ia3_weights": true,
        });
        Some(("IA3", own))
    }

    /// Which layers have factors of inputs: PEFT's `_check_target_module_feedforward`.
    fn settle(&mut self, file: &FileFacts) -> std::result::Result<Vec<String>, Vec<String>> {
        let pattern = self.feedforward.as_str().and_then(whole_pattern);
        let names: Vec<&str> =
            self.feedforward.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let means = |name: &str| match &pattern {
            Some(pattern) => pattern.is_match(name),
            None => names.iter().any(|ending| name.ends_with(ending)),
        };
        let inputs = file.layers.iter().filter(|parts| means(&parts.name));
        self.inputs = inputs.map(|parts| parts.layer.clone()).collect();
        Ok(Vec::new())
    }

    fn adapter(&self, mut parts: Parts) -> std::result::Result<Box<dyn Adapter>, String> {
        let factors = parts.take(NAME)?;
        let shape = factors.size();
        let on_inputs = self.inputs.contains(&parts.layer);
        let fits = match shape[..] {
            [1, n] if on_inputs => n > 0,
            [n, 1] if !on_inputs => n > 0,
            [1, n, 1, 1] => n > 0,
            _ => false,
        };
        if !fits {
            let (what, linear) = if on_inputs { ("inputs", "(1, d_in)") } else { ("outputs", "(d_out, 1)") };
            return Err(format!(
                "{NAME}: expected factors of {what}, {linear} or (1, channels, 1, 1), found shape {shape:?}"
            ));
        }
        Ok(Box::new(Ia3 { factors, on_inputs }))
    }

    /// Factors multiply, each moved from 1 to its strength; the order and the way do not matter.
    fn combine(&self, _: &[&Method], layers: &[LayerChain], _: How) -> Result<Combined> {
        let (mut tensors, mut inputs) = (Vec::new(), BTreeSet::new());
        for (name, chain) in layers {
            let first = chain[0].get::<Ia3>();
            let mut product = first.at(chain[0].strength);
            for link in &chain[1..] {
                let next = link.get::<Ia3>();
                if next.on_inputs != first.on_inputs || next.factors.size() != first.factors.size() {
                    return Err(Error::config(format!(
                        "{name}: expected factors of outputs in all adapters, or of inputs in all, found both"
                    ))
                    .with_hint(ELSEWHERE));
                }
                product *= next.at(link.strength);
            }
            if first.on_inputs {
                inputs.insert((*name).to_string());
            }
            tensors.push((format!("{name}.{NAME}"), product.to_kind(Kind::Float)));
        }
        Ok((Method::new(Self { feedforward: json!(inputs), inputs }), tensors))
    }
}

/// The (IA)^3 adapter of one layer.
pub struct Ia3 {
    /// `(d_out, 1)` or `(1, d_in)`; of a convolution `(1, channels, 1, 1)`; f32.
    factors: Tensor,
    on_inputs: bool,
}

impl Ia3 {
    /// The factors at a strength, f64 on the CPU.
    fn at(&self, strength: f64) -> Tensor {
        let factors = host::wide(&self.factors);
        (factors - 1.0) * strength + 1.0
    }
}

impl Adapter for Ia3 {
    fn forward(&self, frozen: &Frozen, x: &Tensor) -> Tensor {
        let factors = self.factors.reshape([-1]).to_kind(x.kind());
        let factors = match frozen.geometry {
            Geometry::Linear => factors,
            Geometry::Conv { .. } => factors.view([-1, 1, 1]),
        };
        if self.on_inputs { frozen.forward(&(x * factors)) } else { frozen.forward(x) * factors }
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        vec![(NAME, self.factors.shallow_clone())]
    }

    fn replace_parameters(&mut self, replace: &mut dyn FnMut(&Tensor) -> Tensor) {
        self.factors = replace(&self.factors);
    }

    fn check(&self, weight: &[i64]) -> std::result::Result<(), String> {
        let expected = if self.on_inputs { weight[1] } else { weight[0] };
        let found = self.factors.numel() as i64;
        if found == expected && self.factors.dim() == weight.len() {
            return Ok(());
        }
        let (what, shape) = (if self.on_inputs { "inputs" } else { "outputs" }, self.factors.size());
        Err(format!("{NAME}: expected factors for {expected} {what} for this model, found {shape:?}"))
    }

    fn size(&self) -> (i64, i64) {
        let n = self.factors.numel() as i64;
        if self.on_inputs { (n, 0) } else { (0, n) }
    }

    /// On the straight line from W to W'.
    fn change(&self, weight: &Tensor, strength: f64) -> Change {
        let factors = self.at(strength).reshape([-1]);
        let factors = if self.on_inputs {
            // Of a convolution, each channel's once for every place of the kernel.
            factors.repeat_interleave_self_int(weight.size()[1] / factors.size()[0], 0, None)
        } else {
            factors.view([-1, 1])
        };
        Form::Dense(weight * factors).into()
    }

    fn change_bias(&self, bias: &Tensor, strength: f64) -> Option<Tensor> {
        (!self.on_inputs).then(|| bias * self.at(strength).reshape([-1]))
    }
}
