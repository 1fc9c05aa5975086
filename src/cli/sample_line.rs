//! The `hra sample` line that draws with what was trained, to be pasted.

use crate::lab::compare::recommended::Recommended;
use crate::platform::device::DeviceChoice;
use crate::platform::files::shell_word;
use crate::platform::precision::Precision;
use crate::train::config::TrainConfig;
use std::path::{Path, PathBuf};

/// Draws the subject, or from a condition, with the end of a run.
pub fn of_run(config: &TrainConfig, run: &Path) -> String {
    format!(
        "{} --prompt {} --guidance {} --output {}",
        with_adapter(config, &run.to_string_lossy()),
        // A condition has a size of its own.
        if config.is_control() {
            "CAPTION --control IMAGE".to_string()
        } else {
            shell_word(&config.data.instance_prompt) + &flags(size(config))
        },
        config.previews.validation_guidance,
        pictures(run)
    )
}

/// Draws what was scored at a place, picture for picture.
pub fn of_scored(config: &TrainConfig, place: &Recommended) -> String {
    let TrainConfig { previews, model, .. } = config;
    let prompts = previews.validation_prompt.iter().map(|prompt| format!(" --prompt {}", shell_word(prompt)));
    let others = [
        ("scheduler", previews.validation_scheduler.map(|kind| kind.to_string())),
        ("dtype", (model.dtype != Precision::F32).then(|| model.dtype.to_string())),
        ("device", (config.device != DeviceChoice::Auto).then(|| config.device.to_string())),
        ("threads", config.threads.map(|threads| threads.to_string())),
    ];
    format!(
        "{}{} --num-images {} --seed {} --steps {} --guidance {} --batch-size {}{} --output {}",
        with_adapter(config, &format!("{}={}", place.adapter.to_string_lossy(), place.scale)),
        prompts.collect::<String>(),
        previews.num_validation_images,
        config.seed,
        previews.validation_inference_steps,
        previews.validation_guidance,
        config.prior.sample_batch_size,
        flags(size(config)) + &flags(others),
        pictures(&config.output_dir)
    )
}

/// The size that was trained at, where it was asked for; without it pictures have that of the model.
fn size(config: &TrainConfig) -> [(&'static str, Option<String>); 2] {
    ["width", "height"].map(|side| (side, config.data.resolution.map(|pixels| pixels.to_string())))
}

/// The verb, the model with what belongs to it, and the adapter.
fn with_adapter(config: &TrainConfig, adapter: &str) -> String {
    let model = &config.model;
    let path = |path: &PathBuf| shell_word(&path.to_string_lossy());
    let beyond = [
        ("config", model.model_config.as_ref().map(path)),
        ("vae", model.vae.as_ref().map(path)),
        ("vae-dtype", model.vae_dtype.map(|dtype| dtype.to_string())),
        ("prediction", model.prediction.map(|prediction| prediction.to_string())),
    ];
    format!(
        "hra sample --model {}{} --adapter {}",
        path(&model.pretrained_model_name_or_path),
        flags(beyond),
        shell_word(adapter)
    )
}

fn flags<const N: usize>(values: [(&str, Option<String>); N]) -> String {
    values.into_iter().filter_map(|(flag, value)| Some(format!(" --{flag} {}", value?))).collect()
}

fn pictures(run: &Path) -> String {
    shell_word(&run.join("pictures").to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_is_drawn_in_the_size_that_it_was_trained_at_and_a_condition_has_its_own() {
        let mut config = TrainConfig::default();
        config.data.instance_prompt = "a sks dog".into();
        let line = |config: &TrainConfig| of_run(config, Path::new("runs/dog"));
        assert!(!line(&config).contains("--width"));
        config.data.resolution = Some(128);
        assert!(
            line(&config).contains("--prompt 'a sks dog' --width 128 --height 128 --guidance"),
            "{}",
            line(&config)
        );
        config.data.train_data_dir = Some("pairs".into());
        assert!(line(&config).contains("--control IMAGE --guidance"), "{}", line(&config));
    }
}
