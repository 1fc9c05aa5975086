//! Loaded adapters on a model for sampling and merging: several at once, each with a strength.

use crate::adapter::{Change, Form, Full, LowRank};
use crate::attach::loaded::LoadedAdapter;
use crate::error::{Error, Result};
use crate::model::layers::{Layer, Layers, Module, Norm};
use crate::platform::host;
use crate::weights::tensor_file;
use serde::Serialize;
use std::path::PathBuf;
use tch::{Kind, Tensor};

/// What loading one adapter did.
#[derive(Debug, Clone, Serialize)]
pub struct AttachReport {
    /// Where it came from.
    pub path: PathBuf,
    /// What it is, such as `HRA r 8`.
    pub what: String,
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
        if self.layers == 0 {
            write!(f, "adapter {} ({})", self.path.display(), self.what)?;
            return self.notes.iter().try_for_each(|note| write!(f, "\nwarning: {note}"));
        }
        write!(
            f,
            "adapter {} ({}, strength {}): {} layers matched, weights moved by {:.4} on average and {:.4} at most \
             (relative)",
            self.path.display(),
            self.what,
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

impl AttachReport {
    fn new(adapter: &LoadedAdapter, strength: f64) -> Self {
        Self {
            path: adapter.path.clone(),
            what: adapter.what.clone(),
            strength,
            layers: 0,
            unused: adapter.unused.clone(),
            mean_change: 0.0,
            largest_change: 0.0,
            notes: adapter.notes.clone(),
        }
    }

    fn add(&mut self, change: &Change, weight: &Tensor) {
        let moved = change.form.relative_change(weight);
        self.layers += 1;
        self.mean_change += moved;
        self.largest_change = self.largest_change.max(moved);
        self.note(&change.notes);
    }

    fn note(&mut self, notes: &[&'static str]) {
        for note in notes {
            if !self.notes.iter().any(|n| n == note) {
                self.notes.push((*note).to_string());
            }
        }
    }
}

/// What adapters together make of one part of a network; f64 on the CPU.
pub enum Effect<'a> {
    /// A layer: its new weight, and its new bias `(d_out)`.
    Layer { layer: &'a mut Layer, form: Option<Form>, bias: Option<Tensor> },
    /// A norm: its new scale and shift `(n)`.
    Norm { norm: &'a mut Norm, scale: Option<Tensor>, shift: Option<Tensor> },
}

/// Puts adapters with a strength each on a network. A layer ends with one low-rank product where all of its adapters have
/// one, and with one new weight otherwise.
///
/// With `keep_base` the base model can be had again by [`super::set_enabled`]; without it, new weights take the
/// place of the frozen ones and cost no memory beside them.
pub fn attach_fixed(
    network: &mut dyn Layers,
    adapters: &mut [(LoadedAdapter, f64)],
    keep_base: bool,
) -> Result<Vec<AttachReport>> {
    effects(network, adapters, &mut |effect| {
        effect.attach(keep_base);
        Ok(())
    })
}

/// Gives what adapters with a strength each make of a network to `take`, for each part that they change. They act one after
/// another in the order given: each changes the weight that those before it have made, so that HRA adapters multiply and
/// LoRA adapters add up. Fully trained weights, biases and norms add what they moved from the base model.
pub fn effects(
    network: &mut dyn Layers,
    adapters: &mut [(LoadedAdapter, f64)],
    take: &mut dyn FnMut(Effect) -> Result<()>,
) -> Result<Vec<AttachReport>> {
    let _guard = tch::no_grad_guard();
    let mut reports: Vec<AttachReport> = adapters.iter().map(|(a, s)| AttachReport::new(a, *s)).collect();
    adapters.iter_mut().for_each(|(adapter, _)| adapter.begin());
    let mut problems = vec![Vec::new(); adapters.len()];
    for module in network.modules_mut() {
        match module {
            Module::Layer(layer) => {
                let (form, bias) = layer_effect(layer, adapters, &mut reports, &mut problems)?;
                if form.is_some() || bias.is_some() {
                    take(Effect::Layer { layer, form, bias })?;
                }
            }
            Module::Norm(norm) => {
                let (scale, shift) = norm_effect(norm, adapters, &mut problems)?;
                if scale.is_some() || shift.is_some() {
                    take(Effect::Norm { norm, scale, shift })?;
                }
            }
        }
    }
    for ((report, (adapter, _)), mut problems) in reports.iter_mut().zip(&*adapters).zip(problems) {
        report.unused.extend(adapter.left());
        report.mean_change /= report.layers.max(1) as f64;
        if report.layers == 0 && problems.is_empty() && !adapter.is_control_alone {
            let left = adapter.left();
            problems.push(format!(
                "none of its {} layers is in this model, for example {}; was it trained on another kind of model?",
                left.len(),
                left.first().map_or("", String::as_str)
            ));
        }
        if !problems.is_empty() {
            return Err(Error::weights(&report.path, problems));
        }
    }
    Ok(reports)
}

fn layer_effect(
    layer: &Layer,
    adapters: &mut [(LoadedAdapter, f64)],
    reports: &mut [AttachReport],
    problems: &mut [Vec<String>],
) -> Result<(Option<Form>, Option<Tensor>)> {
    let mut base: Option<Tensor> = None; // f64, made only where it is needed
    let mut form: Option<Form> = None;
    let mut bias = None;
    for (i, (source, strength)) in adapters.iter_mut().enumerate() {
        if let Some(adapter) = source.layer(&layer.name)? {
            if let Err(problem) = adapter.check(&layer.weight().size()) {
                problems[i].push(format!("`{}`: {problem}", layer.name));
                continue;
            }
            let base = base.get_or_insert_with(|| host::wide(&layer.matrix()));
            let weight = form.as_ref().map_or_else(|| base.shallow_clone(), |form| form.merged(base));
            let change = if adapter.moves_from_base() {
                let Change { form, notes } = adapter.change(base, *strength);
                Change { form: Form::Dense(&weight + form.merged(base) - &*base), notes }
            } else {
                adapter.change(&weight, *strength)
            };
            reports[i].add(&change, &weight);
            if let Some(frozen) = layer.bias() {
                let before = bias.as_ref().map_or_else(|| host::wide(frozen), Tensor::shallow_clone);
                bias = adapter.change_bias(&before, *strength).or(bias);
            }
            reports[i].note(&adapter.notes(&layer.weight().size()));
            form = Some(match (form, change.form) {
                (None, new) => new,
                (Some(Form::LowRank { down, up }), Form::LowRank { down: d, up: u }) => {
                    Form::LowRank { down: Tensor::cat(&[down, d], 0), up: Tensor::cat(&[up, u], 1) }
                }
                (Some(_), Form::Dense(merged)) => Form::Dense(merged),
                (Some(Form::Dense(_)), new) => Form::Dense(new.merged(&weight)),
            });
        }
        if let Some(trained) = source.bias(&layer.name)? {
            match layer.bias() {
                Some(frozen) if frozen.size() == trained.size() => {
                    moved(&mut bias, &host::wide(frozen), &host::wide(&trained), *strength);
                }
                Some(frozen) => problems[i].push(format!(
                    "`{}`: expected a bias of shape {:?} for this model, found {:?}",
                    layer.name,
                    frozen.size(),
                    trained.size()
                )),
                None => problems[i].push(format!("`{}`: this layer of the model has no bias", layer.name)),
            }
        }
    }
    Ok((form, bias))
}

fn norm_effect(
    norm: &Norm,
    adapters: &mut [(LoadedAdapter, f64)],
    problems: &mut [Vec<String>],
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let (mut scale, mut shift) = (None, None);
    for (i, (source, strength)) in adapters.iter_mut().enumerate() {
        let pairs = [
            (source.scale(&norm.name)?, norm.weight(), &mut scale),
            (source.bias(&norm.name)?, norm.bias(), &mut shift),
        ];
        for (trained, frozen, sum) in pairs {
            let Some(trained) = trained else { continue };
            if trained.size() == frozen.size() {
                moved(sum, &host::wide(frozen), &host::wide(&trained), *strength);
            } else {
                let (expected, found) = (frozen.size(), trained.size());
                problems[i].push(format!("`{}`: expected shape {expected:?}, found {found:?}", norm.name));
            }
        }
    }
    Ok((scale, shift))
}

impl Effect<'_> {
    fn attach(self, keep_base: bool) {
        match self {
            Self::Layer { layer, form, bias } => attach_layer(layer, form, bias, keep_base),
            Self::Norm { norm, scale, shift } => {
                let device = norm.bias().device();
                let narrow = |t: Tensor| host::to_device(&t.to_kind(Kind::Float), device);
                norm.attach(scale.map(narrow), shift.map(narrow));
            }
        }
    }
}

fn attach_layer(layer: &mut Layer, form: Option<Form>, bias: Option<Tensor>, keep_base: bool) {
    let (rest, device) = (layer.weight().kind(), layer.weight().device());
    let (kind, shape) = (layer.kind(), layer.weight().size());
    let narrow =
        |t: &Tensor, kind| host::to_device(&t.to_kind(Kind::Float).to_kind(kind), device).contiguous();
    let bias = bias.map(|b| host::to_device(&b.to_kind(Kind::Float), device));
    match form {
        None => layer.attach(None, bias),
        Some(Form::LowRank { down, up }) => {
            layer.attach(Some(Box::new(LowRank { down: narrow(&down, kind), up: narrow(&up, kind) })), bias);
        }
        Some(Form::Dense(merged)) => {
            let weight = narrow(&merged.reshape(&shape[..]), rest);
            if keep_base {
                layer.attach(Some(Box::new(Full::new(weight))), bias);
            } else {
                layer.set_frozen(weight, bias.map(|b| b.to_kind(kind)));
            }
        }
    }
}

/// A bias moves on a straight line; with several adapters the moves add up.
fn moved(sum: &mut Option<Tensor>, frozen: &Tensor, trained: &Tensor, strength: f64) {
    let start = sum.take().unwrap_or_else(|| frozen.shallow_clone());
    *sum = Some(start + (trained - frozen) * strength);
}
