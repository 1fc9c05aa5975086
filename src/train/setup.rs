//! What a run needs before its first step: its files, its pictures, where it goes on, and where it starts.

use super::Resume;
use crate::adapter::Method;
use crate::adapter::peft::{AdapterConfig, AdapterFile, Exceptions};
use crate::adapter::target::TargetRule;
use crate::checkpoint::{self, Loaded, TEXT_CLASS, TrainedPart, UNET_CLASS};
use crate::config::TrainConfig;
use crate::data::ImageFolder;
use crate::error::{Error, Result};
use crate::hub::{self, Wanted};
use crate::model::layers::Layers;
use crate::model::loaded::TEXT_ENCODER;
use crate::optim::Parameters;
use crate::run::RunFolder;
use crate::stable_diffusion::StableDiffusion;
use std::collections::BTreeMap;
use std::path::Path;
use tch::Tensor;

/// The files that the run's trained tensors go into, in the order of the optimiser's groups.
pub(super) fn trained_parts(
    config: &TrainConfig,
    model: &StableDiffusion,
    targets: &TargetRule,
    text_targets: &TargetRule,
) -> Result<Vec<TrainedPart>> {
    if config.method() == Method::Full {
        return Ok(vec![TrainedPart::UNet { config: model.unet_config()? }]);
    }
    let adapter = |targets: &TargetRule| AdapterConfig {
        method: config.method(),
        bias: config.bias,
        targets: targets.to_json(),
        base_model: config.pretrained_model_name_or_path.to_str().map(str::to_string),
        exceptions: Exceptions::default(),
    };
    let mut parts = vec![TrainedPart::Peft { place: "", config: adapter(targets), class: UNET_CLASS }];
    if config.train_text_encoder {
        let config = adapter(text_targets);
        parts.push(TrainedPart::Peft { place: TEXT_ENCODER, config, class: TEXT_CLASS });
    }
    Ok(parts)
}

/// Pictures of the folder that `setting` names.
pub(super) fn scan(setting: &str, dir: &Path) -> Result<ImageFolder> {
    if !dir.is_dir() {
        return Err(Error::Data(format!(
            "{setting}: expected a folder of pictures, found {} at {}\nhint: paths are relative to the folder in which hra is started",
            if dir.exists() { "a file" } else { "nothing" },
            dir.display()
        )));
    }
    ImageFolder::scan(dir)
}

/// The run's own resolution, or the model's; it must fit the VAE.
pub(super) fn resolution(config: &TrainConfig, model: &StableDiffusion) -> Result<u32> {
    let factor = model.vae.factor();
    let resolution = config.resolution.map_or_else(|| model.native_size(), i64::from);
    if resolution < factor || resolution % factor != 0 {
        return Err(Error::config(format!(
            "resolution: expected a multiple of {factor} (pixels for one latent of this model), found {resolution}"
        )));
    }
    u32::try_from(resolution).map_err(|_| Error::config(format!("resolution: {resolution} is out of range")))
}

/// The checkpoint to go on from; none if the run was stopped before its first one, and then it starts again.
pub(super) fn find_checkpoint(config: &TrainConfig, resume: &Resume) -> Result<Option<Loaded>> {
    let run = &config.output_dir;
    RunFolder::check_run(run)?;
    let steps = checkpoint::list(run)?;
    let step = match resume {
        Resume::Latest => match steps.last() {
            Some(step) => *step,
            None => {
                eprintln!("note: {} has no checkpoint yet, the run starts at step 1", run.display());
                return Ok(None);
            }
        },
        Resume::Step(step) if steps.contains(step) => *step,
        Resume::Step(step) => {
            return Err(Error::Run(format!(
                "{}: expected a checkpoint of step {step}, found {steps:?}",
                run.display()
            )));
        }
    };
    if config.max_train_steps < step {
        return Err(Error::Run(format!(
            "max_train_steps: {} has taken {step} steps already, asked for are {}",
            run.display(),
            config.max_train_steps
        )));
    }
    Loaded::read(&checkpoint::folder(run, step)).map(Some)
}

/// Tells of words of a setting that mean no layer: a slip of the pen would make the adapter smaller unnoticed.
pub(super) fn warn_of_idle_words(setting: &str, targets: &TargetRule, network: &mut dyn Layers) {
    let names: Vec<String> = network.layers_mut().iter().map(|layer| layer.name.clone()).collect();
    for word in targets.idle_words(&names) {
        eprintln!("warning: {setting}: `{word}` is the name of no layer");
    }
}

/// Puts the values of another adapter, as `init_adapter` names it, into the trained tensors. It must be of this run's
/// method and settings, and on its layers.
pub(super) fn start_from(config: &TrainConfig, fingerprint: &str, parameters: &mut Parameters) -> Result<()> {
    let Some(word) = &config.init_adapter else { return Ok(()) };
    let path = hub::resolve(word, Wanted::Adapter)?;
    let own = config.method().describe();
    let mut values: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut problems = Vec::new();
    for place in ["", TEXT_ENCODER] {
        let folder = path.join(place);
        let there = place.is_empty() || folder.is_dir();
        if !place.is_empty() && there != config.train_text_encoder {
            let (has, flag) = if there { ("has one", "give") } else { ("has none", "leave out") };
            problems.push(format!("the adapter {has} for the text encoder: {flag} --train_text_encoder"));
        } else if there {
            let file = AdapterFile::read(&folder)?;
            let what = file.config.method.describe();
            if what != own {
                problems.push(format!("{} is {what}, this run trains {own}", folder.display()));
            }
            if file.config.exceptions != Exceptions::default() {
                problems.push(format!("{} has other ranks or alphas for some layers", folder.display()));
            }
            if file.metadata.get("base_fingerprint").is_some_and(|base| base != fingerprint) {
                eprintln!("warning: {} was made for another base model", folder.display());
            }
            values.extend(file.tensors());
        }
    }
    let mut rows = Vec::new();
    if problems.is_empty() {
        for (name, view) in parameters.views() {
            match values.remove(name) {
                Some(value) if value.size() == view.size() => rows.push(value.reshape([-1])),
                Some(value) => {
                    let (expected, found) = (view.size(), value.size());
                    problems.push(format!("`{name}`: expected shape {expected:?}, found {found:?}"));
                }
                None => problems.push(format!("`{name}` is missing")),
            }
        }
        problems.extend(values.keys().map(|name| format!("`{name}` is not trained by this run")));
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
