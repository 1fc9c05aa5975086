//! Putting adapters on a network's layers: new ones to train, and loaded ones to sample with.

use super::layers::{Layer, Layers};
use crate::adapter::hra::{Hra, HraConfig};
use crate::adapter::peft::{AdapterFile, Bias, LayerTensors};
use crate::adapter::target::TargetRule;
use crate::adapter::{LowRank, Reflections};
use crate::error::{Error, Result};
use crate::optim::Parameters;
use crate::seed;
use crate::tensor_file;
use std::path::{Path, PathBuf};
use tch::{Device, Kind};

/// What loading one adapter did.
#[derive(Debug, Clone)]
pub struct AttachReport {
    /// The adapter's folder.
    pub path: PathBuf,
    /// The strength it was given.
    pub strength: f64,
    /// Layers that carry it now.
    pub layers: usize,
    /// Keys of the file that fit nothing.
    pub unused: Vec<String>,
    /// Mean and largest `||W' - W|| / ||W||` over its layers.
    pub mean_change: f64,
    /// See [`Self::mean_change`].
    pub largest_change: f64,
    /// What a user should know, one sentence each.
    pub notes: Vec<String>,
}

impl std::fmt::Display for AttachReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "adapter {} (strength {}): {} layers matched, weights moved by {:.4} on average and {:.4} at most (relative)",
            self.path.display(),
            self.strength,
            self.layers,
            self.mean_change,
            self.largest_change
        )?;
        match self.unused.len() {
            0 => write!(f, ", no unused keys")?,
            n => write!(f, "\nwarning: {n} keys were not used: {}", tensor_file::list(&self.unused))?,
        }
        self.notes.iter().try_for_each(|note| write!(f, "\nwarning: {note}"))
    }
}

/// Puts new adapters on every layer that `targets` match; the layers' names in the order of the network.
pub fn attach_new(
    network: &mut dyn Layers,
    targets: &TargetRule,
    config: HraConfig,
    bias: Bias,
    run_seed: u64,
) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let mut all = Vec::new();
    for layer in network.layers_mut() {
        if !targets.matches(&layer.name) {
            all.push(layer.name.clone());
            continue;
        }
        let weight = layer.matrix();
        if config.rank > weight.size()[1] {
            return Err(Error::config(format!(
                "rank: expected at most {}, the inputs of {}, found {}",
                weight.size()[1],
                layer.name,
                config.rank
            )));
        }
        let seed = seed::derive(run_seed, "adapter start", names.len() as u64);
        let adapter = Hra::new(&weight, config, seed);
        let trained = match bias {
            Bias::None => None,
            Bias::HraOnly => layer.bias().map(|b| b.to_kind(Kind::Float).copy()),
        };
        layer.attach(Box::new(adapter), trained);
        names.push(layer.name.clone());
    }
    if names.is_empty() {
        return Err(Error::config(format!(
            "target_modules: expected names of layers, but {} matches none\nhint: layers are {}",
            targets.to_json(),
            tensor_file::list(&all)
        )));
    }
    Ok(names)
}

/// Puts a loaded adapter on a network as trainable vectors, as it was when it was saved.
pub fn attach_trained(network: &mut dyn Layers, file: &AdapterFile) -> Result<usize> {
    let mut count = 0;
    for layer in network.layers_mut() {
        if let Some(tensors) = file.layers.get(&layer.name) {
            let device = layer.matrix().device();
            check_fit(layer, tensors).map_err(Error::config)?;
            let adapter = Hra::from_vectors(tensors.hra_u.to_device(device), file.config.gram_schmidt);
            layer.attach(Box::new(adapter), tensors.bias.as_ref().map(|b| b.to_device(device)));
            count += 1;
        }
    }
    Ok(count)
}

/// Puts adapters with a strength each on a network for sampling. Several multiply, in the order given; each layer ends
/// with one low-rank product, whatever their number.
pub fn attach_fixed(network: &mut dyn Layers, adapters: &[(PathBuf, f64)]) -> Result<Vec<AttachReport>> {
    let files: Vec<AdapterFile> =
        adapters.iter().map(|(path, _)| AdapterFile::read(path)).collect::<Result<_>>()?;
    let mut reports: Vec<AttachReport> = files
        .iter()
        .zip(adapters)
        .map(|(file, (path, strength))| new_report(file, path, *strength))
        .collect();
    let mut problems = Vec::new();
    let mut matched = vec![std::collections::BTreeSet::new(); files.len()];
    for layer in network.layers_mut() {
        let name = layer.name.clone();
        let weight = layer.matrix();
        let mut chain: Option<Reflections> = None;
        let mut bias = None;
        for (i, file) in files.iter().enumerate() {
            let Some(tensors) = file.layers.get(&name) else { continue };
            matched[i].insert(name.clone());
            if let Err(problem) = check_fit(layer, tensors) {
                problems.push(problem);
                continue;
            }
            let report = &mut reports[i];
            if file.config.gram_schmidt && nearly_equal_columns(&tensors.hra_u) {
                report.note(
                    "some vectors of this Gram-Schmidt adapter are nearly equal; other programs, which orthonormalise \
                     in one pass, give something else",
                );
            }
            let mut h = Reflections::from_vectors(&tensors.hra_u, file.config.gram_schmidt);
            if report.strength != 1.0 {
                let (power, left_over) = h.power(report.strength);
                h = power;
                if left_over {
                    report.note(
                        "some layers have determinant -1 (an odd number of reflections), which no partial strength \
                         reaches by rotations alone; one direction of each is scaled instead",
                    );
                }
            }
            let change = h.relative_change(&weight);
            report.layers += 1;
            report.mean_change += change;
            report.largest_change = report.largest_change.max(change);
            chain = Some(match chain {
                None => h,
                Some(before) => before.then(&h),
            });
            if let (Some(trained), Some(frozen)) = (&tensors.bias, layer.bias()) {
                let frozen = frozen.to_device(Device::Cpu).to_kind(Kind::Float);
                // A bias moves linearly; with several adapters the moves add up.
                let start = bias.unwrap_or_else(|| frozen.shallow_clone());
                bias = Some(start + (trained - &frozen) * report.strength);
            }
        }
        if let Some(h) = chain {
            let (down, up) = h.low_rank(&weight);
            let kind = weight.kind();
            let adapter = LowRank { down: down.to_kind(kind), up: up.to_kind(kind) };
            layer.attach(Box::new(adapter), bias.map(|b| b.to_device(weight.device())));
        }
    }
    for ((report, file), matched) in reports.iter_mut().zip(&files).zip(&matched) {
        report
            .unused
            .extend(file.layers.keys().filter(|name| !matched.contains(*name)).map(|n| format!("{n}.hra_u")));
        report.mean_change /= report.layers.max(1) as f64;
        if report.layers == 0 && problems.is_empty() {
            problems.push(format!(
                "none of its {} layers is in this model, for example {}\nhint: was it trained on another kind of model?",
                file.layers.len(),
                file.layers.keys().next().map_or("", String::as_str)
            ));
        }
        if !problems.is_empty() {
            return Err(Error::Weights { path: report.path.clone(), problems });
        }
    }
    Ok(reports)
}

/// Number of values in a network's linear maps and convolutions.
pub fn weight_count(network: &mut dyn Layers) -> usize {
    network.layers_mut().iter().map(|layer| layer.matrix().numel()).sum()
}

/// Switches all adapters of a network on or off.
pub fn set_enabled(network: &mut dyn Layers, enabled: bool) {
    for layer in network.layers_mut() {
        if let Some(attached) = layer.attached_mut() {
            attached.enabled = enabled;
        }
    }
}

impl AttachReport {
    fn note(&mut self, note: &str) {
        if !self.notes.iter().any(|n| n == note) {
            self.notes.push(note.to_string());
        }
    }
}

fn new_report(file: &AdapterFile, path: &Path, strength: f64) -> AttachReport {
    AttachReport {
        path: path.to_path_buf(),
        strength,
        layers: 0,
        unused: file.unused.clone(),
        mean_change: 0.0,
        largest_change: 0.0,
        notes: Vec::new(),
    }
}

/// What does not fit between an adapter's tensors and the layer, if anything.
fn check_fit(layer: &Layer, tensors: &LayerTensors) -> std::result::Result<(), String> {
    let (expected, found) = (layer.matrix().size()[1], tensors.hra_u.size()[0]);
    if expected != found {
        return Err(format!(
            "`{}.hra_u`: expected {expected} rows for this model, found {found}",
            layer.name
        ));
    }
    match (&tensors.bias, layer.bias()) {
        (Some(own), Some(frozen)) if own.size() != frozen.size() => Err(format!(
            "`{}.base_layer.bias`: expected shape {:?} for this model, found {:?}",
            layer.name,
            frozen.size(),
            own.size()
        )),
        (Some(_), None) => {
            Err(format!("`{}.base_layer.bias`: this layer of the model has no bias", layer.name))
        }
        _ => Ok(()),
    }
}

/// Whether two columns of `v` point the same way to three digits, where one-pass Gram-Schmidt loses its footing.
fn nearly_equal_columns(v: &tch::Tensor) -> bool {
    let u = v / v.norm_scalaropt_dim(2, [0], true);
    u.tr().matmul(&u).triu(1).abs().max().double_value(&[]) > 0.999
}

/// Gives every trained tensor of a network, by its name in an adapter file, to `replace`, and puts in its place what
/// comes back.
pub fn map_parameters(
    network: &mut dyn Layers,
    replace: &mut dyn FnMut(String, &tch::Tensor) -> tch::Tensor,
) {
    for layer in network.layers_mut() {
        let name = layer.name.clone();
        let Some(attached) = layer.attached_mut() else { continue };
        let mut suffixes = attached.adapter.parameters().into_iter().map(|(suffix, _)| suffix);
        attached.adapter.replace_parameters(&mut |tensor| {
            let suffix = suffixes.next().expect("an adapter replaces the parameters that it names");
            replace(format!("{name}.{suffix}"), tensor)
        });
        if let Some(bias) = &attached.bias {
            attached.bias = Some(replace(format!("{name}.base_layer.bias"), bias));
        }
    }
}

/// Moves the trained tensors of a network into one flat tensor that an optimiser can step.
pub fn pack_parameters(network: &mut dyn Layers) -> Parameters {
    let mut tensors = Vec::new();
    map_parameters(network, &mut |name, tensor| {
        tensors.push((name, tensor.shallow_clone()));
        tensor.shallow_clone()
    });
    let parameters = Parameters::pack(&tensors);
    let mut views = parameters.views().iter();
    map_parameters(network, &mut |_, _| {
        let (_, view) = views.next().expect("the network has the tensors that were packed");
        view.shallow_clone()
    });
    parameters
}

/// The sum of all layers' regularisers, with gradient; `None` where the method has none.
pub fn regulariser(network: &mut dyn Layers) -> Option<tch::Tensor> {
    let terms: Vec<tch::Tensor> = network
        .layers_mut()
        .into_iter()
        .filter_map(|layer| layer.attached().and_then(|attached| attached.adapter.regulariser()))
        .collect();
    (!terms.is_empty()).then(|| tch::Tensor::stack(&terms, 0).sum(Kind::Float))
}

/// How far the adapters of a network have moved its weights.
#[derive(Debug, Clone, Copy, Default)]
pub struct Movement {
    /// Mean over layers of `||W' - W||_F / ||W||_F`.
    pub mean: f64,
    /// The largest of them.
    pub largest: f64,
    /// `max |H H^T - I|` over all layers.
    pub orthogonality_error: f64,
}

/// Measures [`Movement`] over all adapted layers; it looks at every weight, so not at every step.
pub fn movement(network: &mut dyn Layers) -> Movement {
    let mut result = Movement::default();
    let mut count = 0;
    for layer in network.layers_mut() {
        let Some(h) = layer.attached().and_then(|attached| attached.adapter.reflections()) else { continue };
        let change = h.relative_change(&layer.matrix());
        result.mean += change;
        result.largest = result.largest.max(change);
        result.orthogonality_error = result.orthogonality_error.max(h.orthogonality_error());
        count += 1;
    }
    result.mean /= f64::from(count.max(1));
    result
}
