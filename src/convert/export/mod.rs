//! Adapters in other programs' forms: PEFT folders, LoRA files, whole models. Each output is read back, and what it does to
//! the weights is compared with what the adapters do.

mod report;

pub use report::{Approximation, ReadBack, Written};

use crate::adapter::combine::{How, combine};
use crate::adapter::lora_file::{self, LayerProduct, Style};
use crate::adapter::methods::lora::LoraConfig;
use crate::adapter::peft::{self, AdapterConfig, Bias};
use crate::adapter::peft_patterns::Exceptions;
use crate::adapter::{Form, Method};
use crate::attach::fixed::{AttachReport, Effect, effects};
use crate::attach::loaded::{HOMES, LoadedAdapter, peft_files};
use crate::convert::single_file::{self, Replaced};
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::model::layers::{Layers, Module};
use crate::model::text::in_own_tower;
use crate::platform::choice::{Choice, Named, named};
use crate::platform::{files, host, hub};
use crate::weights::part::Part;
use crate::weights::source::Source;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportForm {
    /// PEFT folder of the adapter's own method
    Peft,
    /// PEFT folder of a LoRA with the same effect
    PeftLora,
    /// LoRA file for diffusers' `load_lora_weights`
    DiffusersLora,
    /// LoRA file for A1111, ComfyUI and kohya's scripts
    KohyaLora,
    /// The whole model as a Hugging Face folder
    Merged,
    /// The whole model as one checkpoint file for A1111 and ComfyUI
    Checkpoint,
}

impl Choice for ExportForm {
    const CHOICES: &'static [Named<Self>] = &[
        named(Self::Peft, "peft", &[], "PEFT folder of the adapter's own method"),
        named(Self::PeftLora, "peft-lora", &[], "PEFT folder of a LoRA with the same effect"),
        named(Self::DiffusersLora, "diffusers-lora", &[], "LoRA file for diffusers' `load_lora_weights`"),
        named(Self::KohyaLora, "kohya-lora", &[], "LoRA file for A1111, ComfyUI and kohya's scripts"),
        named(Self::Merged, "merged", &[], "The whole model as a Hugging Face folder"),
        named(
            Self::Checkpoint,
            "checkpoint",
            &[],
            "The whole model as one checkpoint file for A1111 and ComfyUI",
        ),
    ];
}

/// What to write, and from what.
#[derive(Debug)]
pub struct ExportRequest {
    /// Adapters with their strengths, in their order.
    pub adapters: Vec<(PathBuf, f64)>,
    /// The form.
    pub to: ExportForm,
    /// Folder or file; must not be there yet.
    pub output: PathBuf,
    /// Number format; `None`: f32 for adapters, that of the model's files for models.
    pub kind: Option<Kind>,
    /// Rank of a LoRA in place of a change that is not low-rank.
    pub rank: Option<i64>,
}

/// Rank of an approximating LoRA where none is asked for.
const DEFAULT_RANK: i64 = 64;

/// What one layer's weight becomes, f64 or f32 on the CPU.
struct Goal {
    part: Part,
    /// Shape of the weight.
    shape: Vec<i64>,
    form: Form,
}

/// Everything that the adapters make of the model.
#[derive(Default)]
struct Goals {
    layers: BTreeMap<String, Goal>,
    /// New biases, and scales and shifts of norms, by tensor name.
    vectors: BTreeMap<String, (Part, Tensor)>,
}

/// Writes what is asked for.
pub fn export(model: &mut StableDiffusion, request: &ExportRequest) -> Result<Written> {
    let _guard = tch::no_grad_guard();
    files::refuse_existing(&request.output)?;
    let adapters = read(model, &request.adapters)?;
    if let Some((alone, _)) = adapters.iter().find(|(adapter, _)| adapter.is_control_alone) {
        return Err(Error::config(format!(
            "{}: a control encoder alone changes nothing of the model; there is nothing to write",
            alone.path.display()
        )));
    }
    let fingerprint = model.fingerprint()?;
    let warnings = adapters.iter().filter_map(|(adapter, _)| adapter.other_base(&fingerprint)).collect();
    let (goals, adapters) = goals(model, adapters)?;
    let (mut what, mut notes, mut approximation) = ("adapter", Vec::new(), None);
    let read_back = match request.to {
        ExportForm::Merged | ExportForm::Checkpoint => {
            what = "model";
            let (said, read_back) = write_model(request, model, &goals)?;
            notes = said;
            read_back
        }
        ExportForm::Peft | ExportForm::PeftLora | ExportForm::DiffusersLora | ExportForm::KohyaLora => {
            if request.to == ExportForm::Peft {
                write_peft(model, request, &fingerprint)?;
            } else {
                what = "LoRA";
                approximation = write_lora(model, request, &goals, &fingerprint)?;
            }
            let written = read(model, &[(request.output.clone(), 1.0)])?;
            let (found, _) = self::goals(model, written)?;
            compare(model, &goals, &found)
        }
    };
    Ok(Written { what, path: request.output.clone(), adapters, warnings, notes, approximation, read_back })
}

fn read(model: &mut StableDiffusion, adapters: &[(PathBuf, f64)]) -> Result<Vec<(LoadedAdapter, f64)>> {
    let names = model.layer_names()?;
    adapters.iter().map(|(path, s)| Ok((LoadedAdapter::read(path, &names)?, *s))).collect()
}

/// What adapters make of a model, without touching it.
fn goals(
    model: &mut StableDiffusion,
    mut adapters: Vec<(LoadedAdapter, f64)>,
) -> Result<(Goals, Vec<AttachReport>)> {
    let mut of_text: BTreeMap<String, Part> = BTreeMap::new();
    for tower in &mut model.texts {
        let part = tower.part;
        of_text.extend(tower.encoder.modules_mut().into_iter().map(|module| match module {
            Module::Layer(layer) => (layer.name.clone(), part),
            Module::Norm(norm) => (norm.name.clone(), part),
        }));
    }
    let part = |name: &str| of_text.get(name).copied().unwrap_or(Part::UNet);
    let mut goals = Goals::default();
    let reports = effects(model, &mut adapters, &mut |effect| {
        let mut vector = |name: &str, what: &str, tensor: Option<Tensor>| {
            if let Some(tensor) = tensor {
                goals.vectors.insert(format!("{name}.{what}"), (part(name), tensor));
            }
        };
        match effect {
            Effect::Norm { norm, scale, shift } => {
                vector(&norm.name, "weight", scale);
                vector(&norm.name, "bias", shift);
            }
            Effect::Layer { layer, form, bias } => {
                vector(&layer.name, "bias", bias);
                let form = form.map(|form| match form {
                    // A whole network's weights in f64 would be twice the model.
                    Form::Dense(merged) => Form::Dense(merged.to_kind(Kind::Float)),
                    low_rank => low_rank,
                });
                if let Some(form) = form {
                    let goal = Goal { part: part(&layer.name), shape: layer.weight().size(), form };
                    goals.layers.insert(layer.name.clone(), goal);
                }
            }
        }
        Ok(())
    })?;
    Ok((goals, reports))
}

/// How far the weights of a file are from those that were to be written, over all layers.
fn compare(model: &mut StableDiffusion, goals: &Goals, found: &Goals) -> ReadBack {
    let (mut largest, mut off, mut moved) = (0f64, 0f64, 0f64);
    let mut missing = found.layers.keys().filter(|name| !goals.layers.contains_key(*name)).count();
    for layer in model.layers_mut() {
        let Some(goal) = goals.layers.get(&layer.name) else { continue };
        let Some(own) = found.layers.get(&layer.name) else {
            missing += 1;
            continue;
        };
        let weight = host::wide(&layer.matrix());
        let wide = |form: &Form| form.merged(&weight).to_kind(Kind::Double);
        let (expected, found) = (wide(&goal.form), wide(&own.form));
        let difference = found - &expected;
        largest = largest.max(host::number(&difference.abs().max()));
        off += host::number(&difference.square().sum(Kind::Double));
        moved += host::number(&(expected - weight).square().sum(Kind::Double));
    }
    for (name, (_, expected)) in &goals.vectors {
        match found.vectors.get(name) {
            Some((_, own)) => largest = largest.max(host::number(&(own - expected).abs().max())),
            None => missing += 1,
        }
    }
    let relative = off.sqrt() / moved.sqrt().max(f64::MIN_POSITIVE);
    ReadBack { largest_difference: largest, relative_difference: Some(relative), missing, tensors: None }
}

/// The adapter in its own method, at its strength.
fn write_peft(model: &StableDiffusion, request: &ExportRequest, fingerprint: &str) -> Result<()> {
    let [(path, strength)] = &request.adapters[..] else {
        return Err(Error::config("--to peft: expected one adapter, found several")
            .with_hint("`hra merge` makes one of them, or use --to peft-lora"));
    };
    let read =
        peft_files(path, "use --to peft-lora, or --to merged or checkpoint for what fits into no LoRA")?;
    let kind = request.kind.unwrap_or(Kind::Float);
    files::stage_dir(&request.output, |dir| {
        for (place, class) in HOMES {
            for (_, file) in read.files.iter().filter(|(home, _)| *home == place) {
                let (mut config, tensors) = if *strength == 1.0 {
                    (file.config.clone(), file.tensors())
                } else {
                    combine(&[(file, *strength)], How::Chain)?
                };
                config.base_model = base_name(model);
                files::create_dir_all(&dir.join(place))?;
                let text = metadata(fingerprint, request);
                peft::write(&dir.join(place), &config, class, &tensors, kind, &text)?;
            }
        }
        Ok(())
    })
}

/// What PEFT calls the base model: its name on the hub, or its path.
fn base_name(model: &StableDiffusion) -> Option<String> {
    hub::repository_of(&model.dir).or_else(|| model.dir.to_str().map(str::to_string))
}

/// What a file says of where it comes from. A LoRA made from an orthogonal adapter belongs to one base model.
fn metadata(fingerprint: &str, request: &ExportRequest) -> Vec<(&'static str, String)> {
    // The name alone: files are shared, and where they lay on a disk is nobody's business.
    let name =
        |path: &PathBuf| path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let from = request.adapters.iter().map(|(path, s)| format!("{}={s}", name(path)));
    vec![
        ("base_fingerprint", fingerprint.to_string()),
        ("made_from", from.collect::<Vec<_>>().join(", ")),
        ("software", format!("hra {}", env!("CARGO_PKG_VERSION"))),
    ]
}

/// A LoRA with the adapters' effect: exact where the change of a weight is of low rank, the best of its rank otherwise.
fn write_lora(
    model: &mut StableDiffusion,
    request: &ExportRequest,
    goals: &Goals,
    fingerprint: &str,
) -> Result<Option<Approximation>> {
    if let Some(name) = goals.vectors.keys().next() {
        return Err(Error::config(format!(
            "a LoRA changes weights of layers only, but the adapter has trained biases or norms, such as \
             {name}"
        ))
        .with_hint("use --to merged or --to checkpoint"));
    }
    let ldm: BTreeMap<String, Option<String>> = model.layer_names()?.unet.into_iter().collect();
    let mut changes = Vec::new();
    let mut energy: Vec<(f64, String)> = Vec::new();
    for layer in model.layers_mut() {
        let Some(goal) = goals.layers.get(&layer.name) else { continue };
        let (down, up) = match &goal.form {
            Form::LowRank { down, up } => (down.shallow_clone(), up.shallow_clone()),
            Form::Dense(merged) => {
                let weight = host::wide(&layer.matrix());
                let (down, up, kept) = truncated(&(merged.to_kind(Kind::Double) - weight), request.rank);
                energy.push((kept, layer.name.clone()));
                (down, up)
            }
        };
        let (mut a, mut b) = (down.size(), up.size());
        if goal.shape.len() == 4 {
            a = [&a[..1], &goal.shape[1..]].concat();
            b.extend([1, 1]);
        }
        changes.push(LayerProduct {
            part: goal.part,
            layer: in_own_tower(&layer.name).to_string(),
            ldm: ldm.get(&layer.name).cloned().flatten(),
            down: down.reshape(a).to_kind(Kind::Float),
            up: up.reshape(b).to_kind(Kind::Float),
            magnitude: None,
        });
    }
    let text = metadata(fingerprint, request);
    let kind = request.kind.unwrap_or(Kind::Float);
    match request.to {
        ExportForm::PeftLora => write_peft_lora(model, request, &changes, &text)?,
        ExportForm::KohyaLora => {
            let text = [&text[..], &family_of(model)].concat();
            let style = if model.is_xl() { Style::KohyaXl } else { Style::Kohya };
            lora_file::write(&request.output, style, &changes, kind, &text)?;
        }
        _ => {
            let is_file = request.output.extension().is_some_and(|e| e == "safetensors");
            let write = |file: &Path| lora_file::write(file, Style::Diffusers, &changes, kind, &text);
            if is_file {
                write(&request.output)?;
            } else {
                files::stage_dir(&request.output, |dir| write(&dir.join(lora_file::DIFFUSERS_FILE)))?;
            }
        }
    }
    let least = energy.iter().min_by(|a, b| a.0.total_cmp(&b.0));
    Ok(least.map(|(kept, layer)| Approximation {
        layers: energy.len(),
        rank: request.rank.unwrap_or(DEFAULT_RANK),
        mean_energy: energy.iter().map(|(kept, _)| kept).sum::<f64>() / energy.len() as f64,
        least_energy: *kept,
        least_layer: layer.clone(),
    }))
}

/// What A1111 goes by, which shows a LoRA with models of its family only: Stable Diffusion 2 is known by the width of its text.
fn family_of(model: &StableDiffusion) -> Vec<(&'static str, String)> {
    let second = if model.unet.context_width() == 1024 { "True" } else { "False" };
    let xl = model.is_xl().then(|| ("ss_base_model_version", "sdxl_base_v1-0".to_string()));
    [("ss_v2", second.to_string())].into_iter().chain(xl).collect()
}

/// The best approximation of a change `(d_out, d_in)` of a rank: `down (r, d_in)`, `up (d_out, r)`, and the share of the
/// squared norm that it keeps.
fn truncated(change: &Tensor, rank: Option<i64>) -> (Tensor, Tensor, f64) {
    let (left, singular, right) = change.svd(true, true);
    let rank = rank.unwrap_or(DEFAULT_RANK).min(singular.size()[0]);
    let root = singular.narrow(0, 0, rank).sqrt();
    let energy = |t: &Tensor| host::number(&t.square().sum(Kind::Double));
    let kept = energy(&singular.narrow(0, 0, rank)) / energy(&singular).max(f64::MIN_POSITIVE);
    ((right.narrow(1, 0, rank) * &root).tr(), left.narrow(1, 0, rank) * root, kept)
}

fn write_peft_lora(
    model: &StableDiffusion,
    request: &ExportRequest,
    changes: &[LayerProduct],
    text: &[(&str, String)],
) -> Result<()> {
    let kind = request.kind.unwrap_or(Kind::Float);
    files::stage_dir(&request.output, |dir| {
        for (part, (place, class)) in Part::ADAPTED.into_iter().zip(HOMES) {
            let own: Vec<&LayerProduct> = changes.iter().filter(|change| change.part == part).collect();
            let Some(rank) = own.iter().map(|change| change.down.size()[0]).max() else { continue };
            let mut exceptions = Exceptions::default();
            for change in own.iter().filter(|change| change.down.size()[0] != rank) {
                let r = change.down.size()[0];
                exceptions.rank.insert(change.layer.clone(), r);
                exceptions.alpha.insert(change.layer.clone(), r as f64);
            }
            let alpha = rank as f64; // a scale of 1
            let config = AdapterConfig {
                method: Method::new(LoraConfig { exceptions, ..LoraConfig::new(rank, alpha) }),
                bias: Bias::None,
                targets: own.iter().map(|change| change.layer.clone()).collect::<Vec<_>>().into(),
                base_model: base_name(model),
            };
            let tensors: Vec<(String, Tensor)> = own
                .iter()
                .flat_map(|change| {
                    let name = |half: &str| format!("{}.lora_{half}.weight", change.layer);
                    [(name("A"), change.down.shallow_clone()), (name("B"), change.up.shallow_clone())]
                })
                .collect();
            files::create_dir_all(&dir.join(place))?;
            peft::write(&dir.join(place), &config, class, &tensors, kind, text)?;
        }
        Ok(())
    })
}

/// The model with the adapters in its weights; notes on its files.
fn write_model(
    request: &ExportRequest,
    model: &mut StableDiffusion,
    goals: &Goals,
) -> Result<(Vec<String>, ReadBack)> {
    let mut replaced = Replaced::new();
    for layer in model.layers_mut() {
        if let Some(goal) = goals.layers.get(&layer.name) {
            let weight = host::wide(&layer.matrix());
            let merged = goal.form.merged(&weight).to_kind(Kind::Float).reshape(&goal.shape[..]);
            replaced.insert((goal.part, format!("{}.weight", in_own_tower(&layer.name))), merged);
        }
    }
    for (name, (part, tensor)) in &goals.vectors {
        replaced.insert((*part, in_own_tower(name).to_string()), tensor.to_kind(Kind::Float));
    }
    let notes = match request.to {
        ExportForm::Checkpoint => {
            single_file::write_checkpoint(&model.source, &replaced, request.kind, &request.output)?
        }
        _ => single_file::write_folder(&model.source, &replaced, request.kind, &request.output)?,
    };
    let written = Source::open(&request.output, None)?;
    let (mut largest, mut compared) = (0f64, 0);
    for part in written.parts() {
        let tensors = written.tensors(part)?;
        for ((_, name), expected) in
            replaced.range((part, String::new())..).take_while(|((p, _), _)| *p == part)
        {
            let found = tensors.read(name)?.to_kind(Kind::Float).reshape(&expected.size()[..]);
            largest = largest.max(host::number(&(found - expected).abs().max()));
            compared += 1;
        }
    }
    let tensors = Some(compared);
    Ok((notes, ReadBack { largest_difference: largest, relative_difference: None, missing: 0, tensors }))
}
