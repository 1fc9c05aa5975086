//! Whether the adapter fits the model's layers, by the shapes in the model's files: told before gigabytes are loaded.

use crate::adapter::Method;
use crate::adapter::target::TargetRule;
use crate::attach;
use crate::error::{Error, Result};
use crate::train::config::TrainConfig;
use crate::weights::part::Part;
use crate::weights::source::Source;
use std::collections::BTreeSet;
use toml::Value;

/// Refuses a method that some layer that `config` names is too small for, with the largest rank that fits all of them, and rates of
/// other text encoders than the model's.
pub(super) fn check(config: &TrainConfig, source: &Source) -> Result<()> {
    source.refuse_refiner()?;
    config.learning_rates(source.text_parts().len())?;
    let Some(method) = config.adapter.method()?.filter(|method| !method.trains_whole_network()) else {
        return Ok(());
    };
    let mut layers = named(source, Part::UNet, &config.adapter.target_modules)?;
    if config.adapter.train_text_encoder {
        for part in source.text_parts() {
            layers.extend(named(source, part, &config.adapter.text_target_modules)?);
        }
    }
    let misfit =
        |(name, shape): &(String, Vec<i64>)| Some((method.parameters_for(shape).err()?, name.clone()));
    let problems: Vec<(String, String)> = layers.iter().filter_map(misfit).collect();
    if problems.is_empty() {
        return Ok(());
    }
    let shapes: BTreeSet<&[i64]> = layers.iter().map(|(_, shape)| shape.as_slice()).collect();
    let largest =
        largest_rank(config, &shapes).map(|rank| format!("the largest rank that fits every layer is {rank}"));
    Err(Error::config(attach::grouped(&problems)).with_hints(largest))
}

/// Names and weights' shapes of the layers of a part that `words` match.
fn named(source: &Source, part: Part, words: &[String]) -> Result<Vec<(String, Vec<i64>)>> {
    let targets = TargetRule::from_words(words)?;
    let tensors = source.tensors(part)?;
    let weights = tensors.names().filter_map(|key| Some((key.strip_suffix(".weight")?, tensors.shape(key)?)));
    // Vectors are norms'.
    let matched = weights.filter(|(name, shape)| shape.len() >= 2 && targets.matches(name));
    Ok(matched.map(|(name, shape)| (name.to_string(), shape)).collect())
}

/// The largest rank below the one asked for with which the method fits weights of all shapes.
fn largest_rank(config: &TrainConfig, shapes: &BTreeSet<&[i64]>) -> Option<i64> {
    let asked = config.adapter.own.get("rank")?.as_integer()?;
    let largest_side = shapes.iter().flat_map(|shape| shape.iter()).max()?;
    let fits =
        |method: Method| method.validate().is_ok() && shapes.iter().all(|s| method.parameters_for(s).is_ok());
    (1..asked.min(largest_side + 1)).rev().find(|rank| {
        let mut adapter = config.adapter.clone();
        adapter.own.insert("rank".into(), Value::Integer(*rank));
        adapter.method().ok().flatten().is_some_and(fits)
    })
}
