//! Several adapters as one: `hra merge`, and an adapter at a strength written as a file.
//!
//! HRA: the chain `H_1^s1 H_2^s2 ..` is a product of reflections again, the geodesic sum `exp(sum s_i log H_i)` does not
//! depend on the order; both are orthogonal. OFT and BOFT: the same on each block. LoRA: the changes add up. What these
//! files can hold needs no base model; DoRA and full fine-tuning would need one.

mod blocks;
mod hra;
mod lora;

use crate::adapter::peft::{AdapterConfig, AdapterFile, Bias, Exceptions};
use crate::adapter::{Adapter, Method};
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use tch::Tensor;

/// In what way several orthogonal adapters become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum How {
    /// One after another, in the order given: what `hra sample` does with several adapters
    Chain,
    /// The sum of their rotations: orthogonal, and the same in any order
    Geodesic,
}

/// Where to go with what cannot be combined here.
const ELSEWHERE: &str =
    "hint: `hra export --model DIR --adapter A=0.8 --adapter B=0.6 --to merged` takes adapters of any kind";

/// A method with its tensors by name.
type Combined = (Method, Vec<(String, Tensor)>);

/// One layer's adapters with their strengths, in the order given.
type Chain<'a> = Vec<(&'a AdapterFile, &'a dyn Adapter, f64)>;

/// The combination of adapters of one method, each at a strength: what a PEFT folder of it holds, tensors f32 by name.
///
/// Errors: methods that differ or cannot be combined without the base model, and the reason.
pub fn combine(files: &[(&AdapterFile, f64)], how: How) -> Result<(AdapterConfig, Vec<(String, Tensor)>)> {
    let _guard = tch::no_grad_guard();
    let Some(((first, _), rest)) = files.split_first() else {
        return Err(Error::config("expected at least one adapter to merge"));
    };
    let family = |method: &Method| std::mem::discriminant(method);
    let method = &first.config.method;
    if let Some((other, _)) = rest.iter().find(|(f, _)| family(&f.config.method) != family(method)) {
        return Err(Error::config(format!(
            "expected adapters of one method, found {} and {}\n{ELSEWHERE}",
            method.describe(),
            other.config.method.describe()
        )));
    }
    if files.iter().any(|(f, _)| !f.biases.is_empty()) {
        return Err(Error::config(format!(
            "adapters with trained biases cannot be combined without the base model\n{ELSEWHERE}"
        )));
    }
    let dora = |f: &AdapterFile| matches!(&f.config.method, Method::Lora(config) if config.dora);
    let layers = layers(files)?;
    let (method, tensors) = match method {
        Method::Hra(config) => hra::combine(*config, files, &layers, how)?,
        Method::Lora(config) if !files.iter().any(|(f, _)| dora(f)) => lora::combine(*config, &layers)?,
        Method::Oft(config) => blocks::oft(*config, &layers, how)?,
        Method::Boft(config) => blocks::boft(*config, &layers, how)?,
        Method::Lora(_) | Method::Full => {
            return Err(Error::config(format!(
                "{} adapters cannot be combined without the base model\n{ELSEWHERE}",
                method.describe()
            )));
        }
    };
    let config = AdapterConfig {
        method,
        bias: Bias::None,
        targets: union(files.iter().map(|(f, _)| &f.config.targets)),
        base_model: first.config.base_model.clone(),
        exceptions: Exceptions::default(),
    };
    Ok((config, tensors))
}

/// Every layer of any of the files, with its adapters. Errors: a layer that has another size in another file.
fn layers<'a>(files: &[(&'a AdapterFile, f64)]) -> Result<Vec<(&'a String, Chain<'a>)>> {
    let names: BTreeSet<&String> = files.iter().flat_map(|(f, _)| f.layers.keys()).collect();
    let layer = |name: &'a String| {
        let chain: Chain =
            files.iter().filter_map(|(file, s)| Some((*file, file.layers.get(name)?.as_ref(), *s))).collect();
        let sizes: Vec<(i64, i64)> = chain.iter().map(|(_, adapter, _)| size(*adapter)).collect();
        match sizes.windows(2).find(|pair| pair[0] != pair[1]) {
            None => Ok((name, chain)),
            Some(_) => Err(Error::config(format!(
                "{name}: expected adapters for one kind of model, found layers of other sizes\n{ELSEWHERE}"
            ))),
        }
    };
    names.into_iter().map(layer).collect()
}

/// `(d_in, d_out)` as far as an adapter's tensors tell; 0 where they do not.
fn size(adapter: &dyn Adapter) -> (i64, i64) {
    let mut size = (0, 0);
    for (name, tensor) in adapter.parameters() {
        let shape = tensor.size();
        match name {
            "hra_u" => size.0 = shape[0],
            "lora_A.weight" => size.0 = shape[1..].iter().product(),
            "lora_B.weight" => size.1 = shape[0],
            "boft_R" => size.0 = shape[1] * shape[2],
            "boft_s" => size.1 = tensor.numel() as i64,
            _ => {}
        }
    }
    size
}

/// All that any of the lists of names says; where one is a pattern, a pattern for all.
fn union<'a>(targets: impl Iterator<Item = &'a serde_json::Value> + Clone) -> serde_json::Value {
    let words =
        |value: &'a serde_json::Value| value.as_array().into_iter().flatten().filter_map(|v| v.as_str());
    if targets.clone().all(serde_json::Value::is_array) {
        return targets.flat_map(words).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().into();
    }
    let patterns: BTreeSet<String> = targets
        .map(|value| match value.as_str() {
            Some(pattern) => format!("(?:{pattern})"),
            None => {
                let words: Vec<String> = words(value).map(regex::escape).collect();
                format!(r"(?:(?:.*\.)?(?:{}))", words.join("|"))
            }
        })
        .collect();
    patterns.into_iter().collect::<Vec<_>>().join("|").into()
}

/// A parameter of an adapter by its name in files.
fn parameter(adapter: &dyn Adapter, name: &str) -> Tensor {
    let found = adapter.parameters().into_iter().find(|(suffix, _)| *suffix == name);
    found.map(|(_, tensor)| tensor).expect("a method has the parameters that it names")
}
