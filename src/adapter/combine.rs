//! Several adapters as one: `hra merge`, and an adapter at a strength written as a file.
//!
//! HRA: the chain `H_1^s1 H_2^s2 ..` is a product of reflections again, the geodesic sum `exp(sum s_i log H_i)` does not
//! depend on the order; both are orthogonal. OFT and BOFT: the same on each block. LoRA: the changes add up. What these
//! files can hold needs no base model; DoRA and full fine-tuning would need one.

use crate::adapter::how::ELSEWHERE;
use crate::adapter::method::{LayerChain, Link, Method};
use crate::adapter::peft::{AdapterConfig, AdapterFile, Bias};
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use tch::Tensor;

pub use crate::adapter::how::How;

/// The combination of adapters of one method, each at a strength: what a PEFT folder of it holds, tensors f32 by name.
///
/// Errors: methods that differ or cannot be combined without the base model, and the reason.
pub fn combine(files: &[(&AdapterFile, f64)], how: How) -> Result<(AdapterConfig, Vec<(String, Tensor)>)> {
    let _guard = tch::no_grad_guard();
    let Some(((first, _), rest)) = files.split_first() else {
        return Err(Error::config("expected at least one adapter to merge"));
    };
    let method = &first.config.method;
    if let Some((other, _)) = rest.iter().find(|(f, _)| !f.config.method.is_like(method)) {
        return Err(Error::config(format!(
            "expected adapters of one method, found {} and {}",
            method.describe(),
            other.config.method.describe()
        ))
        .with_hint(ELSEWHERE));
    }
    if files.iter().any(|(f, _)| !f.biases.is_empty()) {
        return Err(Error::config("adapters with trained biases cannot be combined without the base model")
            .with_hint(ELSEWHERE));
    }
    let methods: Vec<&Method> = files.iter().map(|(file, _)| &file.config.method).collect();
    let (method, tensors) = method.combine(&methods, &layers(files)?, how)?;
    let config = AdapterConfig {
        method,
        bias: Bias::None,
        targets: union(files.iter().map(|(f, _)| &f.config.targets)),
        base_model: first.config.base_model.clone(),
    };
    Ok((config, tensors))
}

/// Every layer of any of the files, with its adapters. Errors: a layer that has another size in another file.
fn layers<'a>(files: &[(&'a AdapterFile, f64)]) -> Result<Vec<LayerChain<'a>>> {
    let names: BTreeSet<&String> = files.iter().flat_map(|(f, _)| f.layers.keys()).collect();
    let layer = |name: &'a String| {
        let link = |(file, strength): &(&'a AdapterFile, f64)| {
            let adapter = file.layers.get(name)?.as_ref();
            Some(Link { method: &file.config.method, adapter, strength: *strength })
        };
        let chain: Vec<Link> = files.iter().filter_map(link).collect();
        let sizes: Vec<(i64, i64)> = chain.iter().map(|link| link.adapter.size()).collect();
        match sizes.windows(2).find(|pair| pair[0] != pair[1]) {
            None => Ok((name.as_str(), chain)),
            Some(_) => Err(Error::config(format!(
                "{name}: expected adapters for one kind of model, found layers of other sizes"
            ))
            .with_hint(ELSEWHERE)),
        }
    };
    names.into_iter().map(layer).collect()
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
