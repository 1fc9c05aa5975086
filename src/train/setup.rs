//! What a run needs before its first step: its files, its pictures, where it goes on, and where it starts.

use crate::adapter::Method;
use crate::adapter::methods::full::FullConfig;
use crate::adapter::peft::{AdapterConfig, Bias};
use crate::adapter::target::TargetRule;
use crate::attach;
use crate::attach::loaded::{HOMES, PeftFiles, peft_files};
use crate::attach::parameters::Parameters;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::model::control::{CONTROL_ENCODER, ConditionEncoder, EncoderConfig, FILE_STEM, PALETTE_FILE};
use crate::model::layers::Layers;
use crate::model::text::in_own_tower;
use crate::platform::hub::{self, Wanted};
use crate::platform::observer::Observer;
use crate::platform::{files, host, seed};
use crate::train::checkpoint::{self, Loaded, Resume, TrainedPart};
use crate::train::config::TrainConfig;
use crate::train::pictures::Pictures;
use crate::train::run::RunFolder;
use crate::weights::tensor_file::{self, TensorFile};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// The files that the run's trained tensors go into, in the order of the optimiser's groups.
pub(super) fn trained_parts(
    config: &TrainConfig,
    model: &mut StableDiffusion,
    targets: &TargetRule,
    text_targets: &TargetRule,
    control: Option<&EncoderConfig>,
) -> Result<Vec<TrainedPart>> {
    let mut parts = match config.adapter.method()? {
        None => Vec::new(),
        Some(method) if method.trains_whole_network() => {
            let files = vec![("config.json", model.unet_config()?)];
            vec![TrainedPart::Network { folder: "unet", files }]
        }
        Some(method) => adapter_parts(config, model, &method, targets, text_targets),
    };
    if let Some(encoder) = control {
        let mut beside = vec![("config.json", encoder.to_json()?)];
        if let Some(palette) = &config.data.palette {
            beside.push((PALETTE_FILE, files::read_to_string(palette)?));
        }
        parts.push(TrainedPart::Network { folder: CONTROL_ENCODER, files: beside });
    }
    Ok(parts)
}

fn adapter_parts(
    config: &TrainConfig,
    model: &mut StableDiffusion,
    method: &Method,
    targets: &TargetRule,
    text_targets: &TargetRule,
) -> Vec<TrainedPart> {
    let adapter = |targets: serde_json::Value| AdapterConfig {
        method: method.clone(),
        bias: config.adapter.bias,
        targets,
        base_model: config.model.pretrained_model_name_or_path.to_str().map(str::to_string),
    };
    let mut parts = Vec::new();
    for (place, class) in HOMES {
        let targets = if place.is_empty() {
            targets.to_json()
        } else {
            let tower = model.texts.iter_mut().find(|tower| tower.part.folder() == place);
            let Some(tower) = tower.filter(|_| config.adapter.train_text_encoder) else { continue };
            match text_targets {
                // A pattern means whole names, and something stands before them there; a list means their ends.
                TargetRule::Pattern(..) if !class.before.is_empty() => {
                    let names = tower
                        .encoder
                        .layers_mut()
                        .into_iter()
                        .map(|layer| in_own_tower(&layer.name).to_string());
                    names.filter(|name| text_targets.matches(name)).collect::<Vec<_>>().into()
                }
                _ => text_targets.to_json(),
            }
        };
        parts.push(TrainedPart::Peft { place, config: adapter(targets), class });
    }
    parts
}

/// A new control encoder whose convolutions train, where control does.
pub(super) fn control_encoder(
    config: &TrainConfig,
    model: &StableDiffusion,
    pictures: &Pictures,
) -> Result<Option<ConditionEncoder>> {
    if !config.is_control() {
        return Ok(None);
    }
    let thresholds = pictures.makes_conditions().then_some([config.data.canny_low, config.data.canny_high]);
    let name = config.data.condition.to_string();
    let own = EncoderConfig::new(&model.unet, model.vae.factor(), &name, thresholds);
    let seed = seed::derive(config.seed, "control encoder", 0);
    let mut encoder = ConditionEncoder::start(own, seed, model.device());
    let everything = TargetRule::from_words(&[".*".to_string()])?;
    attach::attach_new(
        &mut encoder,
        ("control encoder", &everything),
        &Method::new(FullConfig),
        Bias::None,
        0,
    )?;
    Ok(Some(encoder))
}

/// The run's own resolution, or the model's; it must fit the VAE.
pub(super) fn resolution(config: &TrainConfig, model: &StableDiffusion) -> Result<u32> {
    let factor = model.vae.factor();
    let resolution = config.data.resolution.map_or_else(|| model.native_size(), i64::from);
    if resolution < factor || resolution % factor != 0 {
        return Err(Error::config(format!(
            "resolution: expected a multiple of {factor} (pixels for one latent of this model), found {resolution}"
        )));
    }
    u32::try_from(resolution).map_err(|_| Error::config(format!("resolution: {resolution} is out of range")))
}

/// The checkpoint to go on from; none if the run was stopped before its first one, and then it starts again.
pub(super) fn find_checkpoint(
    config: &TrainConfig,
    resume: &Resume,
    observer: &dyn Observer,
) -> Result<Option<Loaded>> {
    let run = &config.output_dir;
    RunFolder::check_run(run)?;
    let steps = checkpoint::list(run)?;
    let step = match resume {
        Resume::Latest => match steps.last() {
            Some(step) => *step,
            None => {
                observer.note(&format!("{} has no checkpoint yet, the run starts at step 1", run.display()));
                return Ok(None);
            }
        },
        Resume::Step(step) if steps.contains(step) => *step,
        Resume::Step(step) => {
            return Err(Error::run(format!(
                "{}: expected a checkpoint of step {step}, found {steps:?}",
                run.display()
            )));
        }
    };
    if config.schedule.max_train_steps < step {
        return Err(Error::run(format!(
            "max_train_steps: {} has taken {step} steps already, asked for are {}",
            run.display(),
            config.schedule.max_train_steps
        )));
    }
    Loaded::read(&checkpoint::folder(run, step)).map(Some)
}

/// Tells of words of a setting that mean no layer: a slip of the pen would make the adapter smaller unnoticed.
pub(super) fn warn_of_idle_words(
    setting: &str,
    targets: &TargetRule,
    networks: &mut [&mut dyn Layers],
    observer: &dyn Observer,
) {
    let layers = networks.iter_mut().flat_map(|network| network.layers_mut());
    let names: Vec<String> = layers.map(|layer| in_own_tower(&layer.name).to_string()).collect();
    for word in targets.idle_words(&names) {
        observer.warn(&format!("{setting}: `{word}` is the name of no layer"));
    }
}

/// Puts the values of another adapter, as `init_adapter` names it, into the trained tensors. It must be of this run's
/// method and settings, and on its layers.
pub(super) fn start_from(
    config: &TrainConfig,
    fingerprint: &str,
    parts: &[TrainedPart],
    parameters: &mut Parameters,
    observer: &dyn Observer,
) -> Result<()> {
    let Some(word) = &config.adapter.init_adapter else { return Ok(()) };
    let path = hub::resolve(word, Wanted::Adapter, observer)?;
    let own = config.adapter.method()?.map_or_else(String::new, |method| method.describe());
    let mut values: BTreeMap<(String, String), Tensor> = BTreeMap::new();
    let mut problems = Vec::new();
    let PeftFiles { files, note } =
        peft_files(&path, "a training goes on from a PEFT folder, as `hra train` and PEFT write it")?;
    note.iter().for_each(|note| observer.warn(&format!("init_adapter: {note}")));
    let has_text = files.iter().any(|(place, _)| !place.is_empty());
    if has_text != config.adapter.train_text_encoder {
        let (has, flag) = if has_text { ("has one", "give") } else { ("has none", "leave out") };
        problems.push(format!("the adapter {has} for the text encoder: {flag} --train_text_encoder"));
    }
    for (place, file) in files {
        let folder = path.join(place);
        let what = file.config.method.describe();
        if what != own {
            problems.push(format!("{} is {what}, this run trains {own}", folder.display()));
        }
        if !file.config.method.is_uniform() {
            problems
                .push(format!("{} has other settings (rank, alpha ..) for some layers", folder.display()));
        }
        if file.metadata.get("base_fingerprint").is_some_and(|base| base != fingerprint) {
            observer.warn(&format!("{} was made for another base model", folder.display()));
        }
        if !file.unused.is_empty() {
            observer.warn(&format!("init_adapter: unused keys: {}", tensor_file::list(&file.unused)));
        }
        file.notes.iter().for_each(|note| observer.warn(&format!("init_adapter: {note}")));
        values.extend(file.tensors().into_iter().map(|(name, t)| ((place.to_string(), name), t)));
    }
    let encoder = path.join(CONTROL_ENCODER);
    if encoder.is_dir() != config.is_control() {
        let (has, flag) = if encoder.is_dir() { ("has one", "give") } else { ("has none", "leave out") };
        problems.push(format!("the adapter {has} for conditions: {flag} --train_data_dir"));
    } else if encoder.is_dir() {
        let file = TensorFile::open(&encoder.join(format!("{FILE_STEM}.safetensors")))?;
        for name in file.names() {
            let value = file.read_as(&name, Kind::Float)?;
            if !host::all_finite(&value) {
                problems.push(format!("`{name}`: holds numbers that are not finite"));
            }
            values.insert((CONTROL_ENCODER.to_string(), name), value);
        }
    }
    let mut rows = Vec::new();
    if problems.is_empty() {
        let places = parts.iter().map(TrainedPart::place).zip(parameters.groups());
        for (place, (name, view)) in places.flat_map(|(place, views)| views.iter().map(move |v| (place, v))) {
            match values.remove(&(place.to_string(), in_own_tower(name).to_string())) {
                Some(value) if value.size() == view.size() => rows.push(value.reshape([-1])),
                Some(value) => {
                    let (expected, found) = (view.size(), value.size());
                    problems.push(format!("`{name}`: expected shape {expected:?}, found {found:?}"));
                }
                None => problems.push(format!("`{name}` is missing")),
            }
        }
        problems.extend(values.keys().map(|(_, name)| format!("`{name}` is not trained by this run")));
    }
    if problems.is_empty() {
        parameters.set(&Tensor::cat(&rows, 0));
        return Ok(());
    }
    Err(Error::config(format!(
        "init_adapter: {} cannot be gone on from\n{}",
        path.display(),
        problems.join("\n")
    )))
}
