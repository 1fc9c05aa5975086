//! Several adapters as one: `hra merge`, and an adapter at a strength written as a file.
//!
//! HRA: the chain `H_1^s1 H_2^s2 ..` is a product of reflections again, the geodesic sum `exp(sum s_i log H_i)` does not
//! depend on the order; both are orthogonal. OFT and BOFT: the same on each block. LoRA: the changes add up. What these
//! files can hold needs no base model; DoRA and full fine-tuning would need one.

use super::peft::{AdapterConfig, AdapterFile, Bias};
use super::reflections::Reflections;
use super::{Adapter, Form, Method};
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use tch::{Device, Kind, Tensor};

/// In what way several orthogonal adapters become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum How {
    /// One after another, in the order given: what `hra sample` does with several adapters
    Chain,
    /// The sum of their rotations: orthogonal, and the same in any order
    Geodesic,
}

/// The combination of adapters of one method, each at a strength: what a PEFT folder of it holds, tensors f32 by name.
///
/// Errors: methods that differ or cannot be combined without the base model, and the reason.
pub fn combine(files: &[(&AdapterFile, f64)], how: How) -> Result<(AdapterConfig, Vec<(String, Tensor)>)> {
    let _guard = tch::no_grad_guard();
    let Some(((first, _), rest)) = files.split_first() else {
        return Err(Error::config("expected at least one adapter to merge"));
    };
    if let Some((other, _)) = rest.iter().find(|(f, _)| f.config.method.name() != first.config.method.name()) {
        return Err(Error::config(format!(
            "expected adapters of one method, found {} and {}\n{ELSEWHERE}",
            first.config.method.describe(),
            other.config.method.describe()
        )));
    }
    if files.iter().any(|(f, _)| !f.biases.is_empty()) {
        return Err(Error::config(format!(
            "adapters with trained biases cannot be combined without the base model\n{ELSEWHERE}"
        )));
    }
    let names: BTreeSet<&String> = files.iter().flat_map(|(f, _)| f.layers.keys()).collect();
    let (method, tensors) = match &first.config.method {
        Method::Hra(_) => hra(files, &names, how)?,
        Method::Lora(config) if !config.dora => lora(files, &names)?,
        other => {
            return Err(Error::config(format!(
                "{} adapters cannot be combined without the base model\n{ELSEWHERE}",
                other.describe()
            )));
        }
    };
    let targets = files.iter().map(|(f, _)| &f.config.targets);
    let config = AdapterConfig {
        method,
        bias: Bias::None,
        targets: union(targets),
        base_model: first.config.base_model.clone(),
    };
    Ok((config, tensors))
}

const ELSEWHERE: &str = "hint: `hra export --model DIR --adapter A=0.8 --adapter B=0.6 --to merged` (or a LoRA) takes adapters of any kind";

/// All that any of the lists of names says; a pattern cannot be joined, and then the layers themselves are named.
fn union<'a>(targets: impl Iterator<Item = &'a serde_json::Value> + Clone) -> serde_json::Value {
    if targets.clone().all(serde_json::Value::is_array) {
        let words: BTreeSet<&str> =
            targets.filter_map(serde_json::Value::as_array).flatten().filter_map(|v| v.as_str()).collect();
        return words.into_iter().collect::<Vec<_>>().into();
    }
    let mut patterns: Vec<String> = targets
        .map(|value| match value.as_str() {
            Some(pattern) => format!("(?:{pattern})"),
            None => {
                let words = value.as_array().into_iter().flatten().filter_map(|v| v.as_str());
                let words: Vec<String> = words.map(regex::escape).collect();
                format!(r"(?:(?:.*\.)?(?:{}))", words.join("|"))
            }
        })
        .collect();
    patterns.dedup();
    patterns.join("|").into()
}

type Combined = (Method, Vec<(String, Tensor)>);

fn hra(files: &[(&AdapterFile, f64)], names: &BTreeSet<&String>, how: How) -> Result<Combined> {
    let mut layers = Vec::new();
    for name in names {
        layers.push(((*name).clone(), hra_vectors(files, name, how)?));
    }
    let longest = layers.iter().map(|(_, v)| v.size()[1]).max().unwrap_or(0);
    let ranks: i64 = files.iter().filter_map(|(f, _)| hra_settings(f)).map(|(rank, _)| rank).sum();
    // One rank for all layers: pairs of equal vectors, which cancel, fill up what is short.
    let odd = longest % 2;
    let rank = longest.max(ranks - (ranks + odd) % 2).max(2 - odd);
    let mut tensors = Vec::new();
    for (name, vectors) in layers {
        let missing = rank - vectors.size()[1];
        if missing % 2 != 0 {
            return Err(Error::config(format!(
                "{name}: the product has determinant {}, that of other layers the opposite one; one HRA adapter has one \
                 number of reflections for all layers\n{ELSEWHERE}",
                if odd == 0 { -1 } else { 1 }
            )));
        }
        let unit = Tensor::ones([vectors.size()[0], missing], (Kind::Float, Device::Cpu));
        tensors.push((format!("{name}.hra_u"), Tensor::cat(&[vectors, unit], 1)));
    }
    let (mut config, _) = files.iter().find_map(|(f, _)| match &f.config.method {
        Method::Hra(config) => Some((*config, ())),
        _ => None,
    }).expect("combine() checked the method");
    config.rank = rank;
    config.gram_schmidt = false;
    Ok((Method::Hra(config), tensors))
}

/// Rank and Gram-Schmidt of an HRA file.
fn hra_settings(file: &AdapterFile) -> Option<(i64, bool)> {
    match &file.config.method {
        Method::Hra(config) => Some((config.rank, config.gram_schmidt)),
        _ => None,
    }
}

/// The vectors `(d_in, n)` of one layer's combination, n as small as it comes.
fn hra_vectors(files: &[(&AdapterFile, f64)], name: &str, how: How) -> Result<Tensor> {
    let mut factors = Vec::new();
    let mut raw = Vec::new();
    for (file, strength) in files {
        let (Some(adapter), Some((_, gram_schmidt))) = (file.layers.get(name), hra_settings(file)) else { continue };
        let vectors = parameter(adapter.as_ref(), "hra_u");
        if let Some((_, first)) = factors.first().map(|(h, _): &(Reflections, f64)| ((), h.inputs()))
            && first != vectors.size()[0]
        {
            return Err(Error::config(format!(
                "{name}: expected adapters of one kind of model, found {first} and {} inputs",
                vectors.size()[0]
            )));
        }
        factors.push((Reflections::from_vectors(&vectors, gram_schmidt), *strength));
        raw.push((!gram_schmidt && *strength == 1.0).then_some(vectors));
    }
    let unreachable = || {
        Error::config(format!(
            "{name}: an odd number of reflections (determinant -1) has no orthogonal matrix between it and the base \
             model\nhint: give it strength 1, or `--how chain`; `hra sample --adapter DIR=S` does the nearest thing"
        ))
    };
    if how == How::Geodesic {
        return Ok(Reflections::geodesic_sum(&factors).ok_or_else(unreachable)?.vectors());
    }
    // As they are, no digit is lost.
    if let Some(raw) = raw.into_iter().collect::<Option<Vec<_>>>() {
        return Ok(Tensor::cat(&raw, 1));
    }
    let mut chain: Option<Reflections> = None;
    for (h, strength) in &factors {
        let (power, left_over) = h.power(*strength);
        if left_over && strength.fract() != 0.0 {
            return Err(unreachable());
        }
        chain = Some(match chain {
            None => power,
            Some(before) => before.then(&power),
        });
    }
    Ok(chain.expect("the name is in one of the files").vectors())
}

fn lora(files: &[(&AdapterFile, f64)], names: &BTreeSet<&String>) -> Result<Combined> {
    let mut layers = Vec::new();
    for name in names {
        let (mut downs, mut ups) = (Vec::new(), Vec::new());
        let mut filter = Vec::new();
        for (file, strength) in files {
            let Some(adapter) = file.layers.get(*name) else { continue };
            let (a, b) = (parameter(adapter.as_ref(), "lora_A.weight"), parameter(adapter.as_ref(), "lora_B.weight"));
            let shape = [b.size()[0], a.size()[1..].iter().product()];
            // What a LoRA adds does not depend on the weight, only its shape does.
            let weight = Tensor::zeros([1], (Kind::Double, Device::Cpu)).expand(shape, false);
            let Form::LowRank { down, up } = adapter.change(&weight, *strength).form else { continue };
            if downs.first().is_some_and(|d: &Tensor| d.size()[1] != shape[1]) {
                return Err(Error::config(format!("{name}: expected adapters of one kind of model, found two sizes")));
            }
            downs.push(down);
            ups.push(up);
            filter = a.size()[1..].to_vec();
        }
        layers.push((name, Tensor::cat(&downs, 0), Tensor::cat(&ups, 1), filter));
    }
    let rank = layers.iter().map(|(_, down, ..)| down.size()[0]).max().unwrap_or(1);
    let mut tensors = Vec::new();
    for (name, down, up, filter) in layers {
        let missing = rank - down.size()[0];
        let down = down.constant_pad_nd([0, 0, 0, missing]).to_kind(Kind::Float);
        let up = up.constant_pad_nd([0, missing]).to_kind(Kind::Float);
        let (a, b) = if filter.len() == 3 {
            (vec![rank, filter[0], filter[1], filter[2]], vec![up.size()[0], rank, 1, 1])
        } else {
            (down.size(), up.size())
        };
        tensors.push((format!("{name}.lora_A.weight"), down.reshape(a)));
        tensors.push((format!("{name}.lora_B.weight"), up.reshape(b)));
    }
    let Method::Lora(config) = &files[0].0.config.method else { unreachable!("combine() checked the method") };
    let config = super::lora::LoraConfig { rank, alpha: rank as f64, rslora: false, ..*config };
    Ok((Method::Lora(config), tensors))
}

/// A parameter of an adapter by its name in files.
fn parameter(adapter: &dyn Adapter, name: &str) -> Tensor {
    let mut parameters = adapter.parameters().into_iter();
    let found = parameters.find(|(suffix, _)| *suffix == name);
    found.map(|(_, tensor)| tensor).expect("a method has the parameters that it names")
}
