//! Adapters in training: new ones on a network's layers, their parameters as one tensor, and how far they moved.

pub mod fixed;
pub mod loaded;
pub mod parameters;
pub mod spectrum;

use crate::adapter::peft::{AdapterFile, Bias};
use crate::adapter::target::TargetRule;
use crate::adapter::{Adapter, Method};
use crate::attach::parameters::Parameters;
use crate::error::{Error, Result};
use crate::model::layers::{Layer, Layers, Module};
use crate::model::text::in_own_tower;
use crate::platform::host;
use crate::platform::seed;
use crate::weights::tensor_file;
use std::any::{Any, TypeId};
use tch::{Kind, Tensor};

/// Puts new adapters on every layer that the targets of a setting match (full fine-tuning: on every layer and norm); the number of them.
pub fn attach_new(
    network: &mut dyn Layers,
    (setting, targets): (&str, &TargetRule),
    method: &Method,
    bias: Bias,
    run_seed: u64,
) -> Result<usize> {
    let _guard = tch::no_grad_guard();
    let full = method.trains_whole_network();
    let mut count = 0;
    let mut others = Vec::new();
    let mut problems = Vec::new();
    let own = |t: &Tensor| t.to_kind(Kind::Float).copy();
    for module in network.modules_mut() {
        match module {
            Module::Norm(norm) if full => norm.attach(Some(own(norm.weight())), Some(own(norm.bias()))),
            Module::Norm(norm) if bias == Bias::All => norm.attach(None, Some(own(norm.bias()))),
            Module::Norm(_) => {}
            Module::Layer(layer) if full || targets.matches(in_own_tower(&layer.name)) => {
                let seed = seed::derive(run_seed, "adapter start", count as u64);
                match method.start(layer.weight(), seed) {
                    Ok(adapter) => {
                        let trained = if full || bias != Bias::None { layer.bias().map(own) } else { None };
                        layer.attach(Some(adapter), trained);
                    }
                    Err(problem) => problems.push((problem, layer.name.clone())),
                }
                count += 1;
            }
            Module::Layer(layer) => {
                if bias == Bias::All
                    && let Some(trained) = layer.bias().map(own)
                {
                    layer.attach(None, Some(trained));
                }
                others.push(layer.name.clone());
            }
        }
    }
    if !problems.is_empty() {
        return Err(Error::config(grouped(&problems)));
    }
    if count == 0 {
        return Err(Error::config(format!(
            "{setting}: expected names of layers, but {} matches none",
            targets.to_json()
        ))
        .with_hint(format!("layers are {}", tensor_file::list(&others))));
    }
    Ok(count)
}

/// Many layers have the same problem: it is told once, with the layers that have it.
pub fn grouped(problems: &[(String, String)]) -> String {
    let mut texts: Vec<&String> = problems.iter().map(|(text, _)| text).collect();
    texts.dedup();
    texts.sort();
    texts.dedup();
    let lines = texts.into_iter().map(|text| {
        let layers: Vec<String> =
            problems.iter().filter(|(t, _)| t == text).map(|(_, layer)| layer.clone()).collect();
        format!("{text}\n  on {}", tensor_file::list(&layers))
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Puts a loaded adapter on a network as trainable tensors, as it was when it was saved; the number of layers.
pub fn attach_trained(network: &mut dyn Layers, mut file: AdapterFile) -> Result<usize> {
    let mut count = 0;
    for module in network.modules_mut() {
        match module {
            Module::Layer(layer) => {
                let device = layer.weight().device();
                let bias = file.biases.remove(&layer.name).map(|b| host::to_device(&b, device));
                check_bias(&layer.name, bias.as_ref(), layer.bias())?;
                let mut adapter = file.layers.remove(&layer.name);
                if let Some(adapter) = &mut adapter {
                    let fits = adapter.check(&layer.weight().size());
                    fits.map_err(|problem| Error::config(format!("{}: {problem}", layer.name)))?;
                    adapter.replace_parameters(&mut |t| host::to_device(t, device));
                    count += 1;
                }
                if adapter.is_some() || bias.is_some() {
                    layer.attach(adapter, bias);
                }
            }
            Module::Norm(norm) => {
                if let Some(bias) = file.biases.remove(&norm.name) {
                    check_bias(&norm.name, Some(&bias), Some(norm.bias()))?;
                    norm.attach(None, Some(host::to_device(&bias, norm.bias().device())));
                }
            }
        }
    }
    Ok(count)
}

fn check_bias(name: &str, trained: Option<&Tensor>, frozen: Option<&Tensor>) -> Result<()> {
    let (expected, found) = (frozen.map(Tensor::size), trained.map(Tensor::size));
    if found.is_none() || expected == found {
        return Ok(());
    }
    let (expected, found) = (expected.unwrap_or_default(), found.unwrap_or_default());
    Err(Error::config(format!(
        "{name}: expected a bias of shape {expected:?} for this model, found {found:?}"
    )))
}

/// Number of values in a network's linear maps and convolutions.
pub fn weight_count(network: &mut dyn Layers) -> usize {
    network.layers_mut().iter().map(|layer| layer.weight().numel()).sum()
}

/// Takes everything off that is attached to a network: it is the base model's again, unless new weights took the place of the
/// frozen ones.
pub fn detach(network: &mut dyn Layers) {
    network.modules_mut().into_iter().for_each(Module::detach);
}

/// Switches everything that is attached to a network on or off.
pub fn set_enabled(network: &mut dyn Layers, enabled: bool) {
    for module in network.modules_mut() {
        match module {
            Module::Layer(layer) => {
                if let Some(attached) = layer.attached_mut() {
                    attached.enabled = enabled;
                }
            }
            Module::Norm(norm) => {
                if let Some(attached) = norm.attached_mut() {
                    attached.enabled = enabled;
                }
            }
        }
    }
}

/// Gives every trained tensor of a network, by its name in an adapter file, to `replace`, and puts in its place what
/// comes back.
pub fn map_parameters(network: &mut dyn Layers, replace: &mut dyn FnMut(String, &Tensor) -> Tensor) {
    for module in network.modules_mut() {
        match module {
            Module::Layer(layer) => {
                let name = layer.name.clone();
                let Some(attached) = layer.attached_mut() else { continue };
                let mut bias_name = "bias";
                if let Some(adapter) = &mut attached.adapter {
                    bias_name = adapter.bias_name();
                    let mut suffixes = adapter.parameters().into_iter().map(|(suffix, _)| suffix);
                    adapter.replace_parameters(&mut |tensor| {
                        let suffix =
                            suffixes.next().expect("an adapter replaces the parameters that it names");
                        replace(format!("{name}.{suffix}"), tensor)
                    });
                }
                if let Some(bias) = &attached.bias {
                    attached.bias = Some(replace(format!("{name}.{bias_name}"), bias));
                }
            }
            Module::Norm(norm) => {
                let name = norm.name.clone();
                let Some(attached) = norm.attached_mut() else { continue };
                if let Some(weight) = &attached.weight {
                    attached.weight = Some(replace(format!("{name}.weight"), weight));
                }
                if let Some(bias) = &attached.bias {
                    attached.bias = Some(replace(format!("{name}.bias"), bias));
                }
            }
        }
    }
}

/// Moves the trained tensors of networks into one flat tensor that an optimiser can step, a group for each network.
pub fn pack_parameters(networks: &mut [&mut dyn Layers]) -> Parameters {
    let mut groups = Vec::new();
    for network in networks.iter_mut() {
        let mut tensors = Vec::new();
        map_parameters(*network, &mut |name, tensor| {
            tensors.push((name, tensor.shallow_clone()));
            tensor.shallow_clone()
        });
        groups.push(tensors);
    }
    let parameters = Parameters::pack(&groups);
    drop(groups);
    let mut views = parameters.views().iter();
    for network in networks {
        map_parameters(*network, &mut |_, _| {
            let (_, view) = views.next().expect("the networks have the tensors that were packed");
            view.shallow_clone()
        });
    }
    parameters
}

/// Lets the frozen weights of a fully fine-tuned network go: the trained ones take their place for good.
pub fn release_base(network: &mut dyn Layers) {
    for layer in network.layers_mut() {
        let trained = layer.attached().and_then(|attached| attached.adapter.as_ref()).map(|a| a.parameters());
        if let Some([(_, weight)]) = trained.as_deref() {
            layer.set_frozen(weight.detach(), None);
        }
    }
}

/// Lets the adapters of a network compute together what a step's forwards take of their parameters ([`Adapter::prepare`]), once
/// for each backward pass; [`project`], after the step, forgets it.
pub fn prepare(network: &mut dyn Layers) {
    for Alike { kind, adapters, .. } in alike(network) {
        adapters[0].prepare(&adapters, kind);
    }
}

/// The sum of all layers' regularisers, with gradient; `None` where the method has none.
pub fn regulariser(network: &mut dyn Layers) -> Option<Tensor> {
    let groups = alike(network);
    let terms: Vec<Tensor> =
        groups.iter().filter_map(|group| group.adapters[0].regulariser(&group.adapters)).collect();
    (!terms.is_empty()).then(|| Tensor::stack(&terms, 0).sum(Kind::Float))
}

/// Adapters of one type, with tensors of the same shapes, on layers that compute in one dtype.
struct Alike<'a> {
    of: TypeId,
    shapes: Vec<Vec<i64>>,
    kind: Kind,
    adapters: Vec<&'a dyn Adapter>,
}

/// The adapters of a network that are switched on.
fn alike(network: &mut dyn Layers) -> Vec<Alike<'_>> {
    let mut groups: Vec<Alike> = Vec::new();
    for layer in network.layers_mut() {
        let kind = layer.kind();
        let layer: &Layer = layer;
        let Some(attached) = layer.attached().filter(|attached| attached.enabled) else { continue };
        let Some(adapter) = attached.adapter.as_deref() else { continue };
        let of = (adapter as &dyn Any).type_id();
        let shapes: Vec<_> = adapter.parameters().iter().map(|(_, tensor)| tensor.size()).collect();
        match groups.iter_mut().find(|group| group.of == of && group.kind == kind && group.shapes == shapes) {
            Some(group) => group.adapters.push(adapter),
            None => groups.push(Alike { of, shapes, kind, adapters: vec![adapter] }),
        }
    }
    groups
}

/// How far the adapters of a network have moved its weights.
#[derive(Debug, Clone, Copy, Default)]
pub struct Movement {
    /// Mean over layers of `||W' - W||_F / ||W||_F`.
    pub mean: f64,
    /// The largest of them.
    pub largest: f64,
    /// `max |H H^T - I|` over all layers; `None` where the method has no orthogonal factor.
    pub orthogonality_error: Option<f64>,
}

/// Measures [`Movement`] over all adapted layers; it looks at every weight, so not at every step.
pub fn movement(network: &mut dyn Layers) -> Movement {
    let _guard = tch::no_grad_guard();
    let mut result = Movement::default();
    let mut count = 0;
    for layer in network.layers_mut() {
        let Some(adapter) = layer.attached().and_then(|attached| attached.adapter.as_ref()) else { continue };
        let weight = host::wide(&layer.matrix());
        let change = adapter.change(&weight, 1.0).form.relative_change(&weight);
        result.mean += change;
        result.largest = result.largest.max(change);
        if let Some(error) = adapter.orthogonality_error() {
            result.orthogonality_error = Some(result.orthogonality_error.map_or(error, |e| e.max(error)));
        }
        count += 1;
    }
    result.mean /= f64::from(count.max(1));
    result
}

/// Lets all adapters of a network know that an optimiser step was taken ([`Adapter::project`]).
pub fn project(network: &mut dyn Layers) {
    let _guard = tch::no_grad_guard();
    for layer in network.layers_mut() {
        if let Some(adapter) = layer.attached().and_then(|attached| attached.adapter.as_ref()) {
            adapter.project();
        }
    }
}
