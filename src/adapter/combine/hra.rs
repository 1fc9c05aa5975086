//! HRA adapters as one: a product of reflections, written as reflections.

use crate::adapter::combine::{Chain, Combined, ELSEWHERE, How, parameter};
use crate::adapter::hra::HraConfig;
use crate::adapter::peft::AdapterFile;
use crate::adapter::{Method, Reflections};
use crate::error::{Error, Result};
use tch::{Device, Kind, Tensor};

/// See [`super::combine`].
pub(super) fn combine(
    config: HraConfig,
    files: &[(&AdapterFile, f64)],
    layers: &[(&String, Chain)],
    how: How,
) -> Result<Combined> {
    let vectors: Vec<Tensor> =
        layers.iter().map(|(name, chain)| vectors(name, chain, how)).collect::<Result<_>>()?;
    let longest = vectors.iter().map(|v| v.size()[1]).max().unwrap_or(0);
    let parity = longest % 2;
    // One rank for all layers: the sum of the ranks where the number of reflections allows it.
    let ranks: i64 = files.iter().map(|(file, _)| settings(file).0).sum();
    let rank = longest.max(ranks - (ranks + parity) % 2).max(2 - parity);
    let mut tensors = Vec::new();
    for ((name, _), vectors) in layers.iter().zip(vectors) {
        let missing = rank - vectors.size()[1];
        if missing % 2 != 0 {
            return Err(Error::config(format!(
                "{name}: expected an {} number of reflections as in other layers, found the opposite (the sign of the \
                 determinant); one HRA adapter has one number for all layers\n{ELSEWHERE}",
                if parity == 0 { "even" } else { "odd" }
            )));
        }
        // Pairs of equal vectors cancel.
        let pairs = Tensor::ones([vectors.size()[0], missing], (Kind::Float, Device::Cpu));
        tensors.push((format!("{name}.hra_u"), Tensor::cat(&[vectors, pairs], 1)));
    }
    Ok((Method::Hra(HraConfig { rank, gram_schmidt: false, ..config }), tensors))
}

/// Rank and Gram-Schmidt.
fn settings(file: &AdapterFile) -> (i64, bool) {
    match &file.config.method {
        Method::Hra(config) => (config.rank, config.gram_schmidt),
        _ => (0, false),
    }
}

/// The vectors `(d_in, n)` of one layer's combination, n as small as it comes.
fn vectors(name: &str, chain: &Chain, how: How) -> Result<Tensor> {
    let raw = |file: &AdapterFile, adapter| (parameter(adapter, "hra_u"), settings(file).1);
    let factor = |file, adapter| {
        let (vectors, gram_schmidt) = raw(file, adapter);
        Reflections::from_vectors(&vectors, gram_schmidt)
    };
    let unreachable = || {
        Error::config(format!(
            "{name}: an odd number of reflections (determinant -1) has no orthogonal matrix between it and the base \
             model\nhint: give it strength 1 and `--how chain`; `hra sample --adapter DIR=S` does the nearest thing"
        ))
    };
    if how == How::Geodesic {
        let factors: Vec<(Reflections, f64)> =
            chain.iter().map(|(file, adapter, s)| (factor(file, *adapter), *s)).collect();
        return Ok(Reflections::geodesic_sum(&factors).ok_or_else(unreachable)?.vectors());
    }
    let plain: Option<Vec<Tensor>> = chain
        .iter()
        .map(|(file, adapter, s)| match raw(file, *adapter) {
            (vectors, false) if *s == 1.0 => Some(vectors),
            _ => None,
        })
        .collect();
    // As they are, no digit is lost.
    if let Some(plain) = plain {
        return Ok(Tensor::cat(&plain, 1));
    }
    let mut product: Option<Reflections> = None;
    for (file, adapter, strength) in chain {
        let (power, left_over) = factor(file, *adapter).power(*strength);
        if left_over && strength.fract() != 0.0 {
            return Err(unreachable());
        }
        product = Some(match product {
            None => power,
            Some(before) => before.then(&power),
        });
    }
    Ok(product.expect("the layer is in one of the files").vectors())
}
