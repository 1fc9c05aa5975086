//! What a UNet predicts, and what a checkpoint says of it: in marker tensors, in its metadata, in its name.
//!
//! The markers are empty tensors `v_pred` and `ztsnr`, by which ComfyUI (`comfy/supported_models.py`) and Forge know checkpoints of
//! velocity prediction and of zero terminal SNR. Metadata are Stability's (github.com/Stability-AI/ModelSpec, 1.0.0).

use crate::error::{Error, Result};
use crate::platform::choice::{Choice, Named, named};
use crate::weights::python_json;
use crate::weights::tensor_file::TensorFile;
use serde_json::{Map, Value};
use std::path::Path;

/// The marker of velocity prediction.
pub const VELOCITY_MARKER: &str = "v_pred";

/// The marker of zero terminal SNR.
pub const ZERO_SNR_MARKER: &str = "ztsnr";

/// Classes of diffusers that honour `rescale_betas_zero_snr`, the one that its paper takes (arXiv 2305.08891) first.
const HONOUR_ZERO_SNR: [&str; 5] = [
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
];

/// What the UNet's output stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Prediction {
    /// The noise.
    #[serde(rename = "epsilon", alias = "eps")]
    Epsilon,
    /// The velocity sqrt(a) e - sqrt(1 - a) x_0.
    #[serde(rename = "v_prediction", alias = "v", alias = "v-prediction")]
    Velocity,
    /// The clean latents.
    #[serde(rename = "sample")]
    Sample,
}

impl Choice for Prediction {
    const CHOICES: &'static [Named<Self>] = &[
        named(Self::Epsilon, "epsilon", &["eps"], "The noise: Stable Diffusion 1.x, and 2.x of 512 pixels"),
        named(
            Self::Velocity,
            "v_prediction",
            &["v", "v-prediction"],
            "The velocity: 2.x of 768 pixels, and models with zero terminal SNR",
        ),
        named(Self::Sample, "sample", &[], "The clean latents"),
    ];
}

impl std::fmt::Display for Prediction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.word())
    }
}

/// What a checkpoint says of its prediction.
#[derive(Debug, Default)]
pub struct SaidPrediction {
    /// By a marker or metadata: what, and where it is said.
    prediction: Option<(Prediction, String)>,
    /// Whether it is marked as one of zero terminal SNR.
    zero_snr: bool,
    /// What only the file's name says.
    by_name: Option<Prediction>,
    /// Sayings that cannot be followed, one sentence each.
    odd: Vec<String>,
}

impl SaidPrediction {
    /// Reads markers and metadata; of them a marker counts first, then `modelspec.prediction_type`, then the architecture.
    ///
    /// What a name says of pixels counts where the model is one of 2.x (`is_second`): those of 1.x predict the noise at any size.
    pub fn of(file: &TensorFile, is_second: bool) -> Self {
        let has = |name: &str| file.shape(name).is_some();
        let mut said = Self { zero_snr: has(ZERO_SNR_MARKER), ..Self::default() };
        if has(VELOCITY_MARKER) {
            said.prediction = Some((Prediction::Velocity, format!("tensor `{VELOCITY_MARKER}`")));
        }
        let key = "modelspec.prediction_type";
        if let Some(word) = file.text(key) {
            match Prediction::find(word.trim()) {
                None => said
                    .odd
                    .push(format!("{key} in its metadata is `{word}`, which is not known: not followed")),
                Some(found) => match &said.prediction {
                    Some((other, place)) if *other != found => said.odd.push(format!(
                        "{key} in its metadata is `{word}`, but its {place} says {other}, which is followed"
                    )),
                    Some(_) => {}
                    None => said.prediction = Some((found, format!("{key} = {word}"))),
                },
            }
        }
        let key = "modelspec.architecture";
        if let (None, Some(text)) = (&said.prediction, file.text(key)) {
            said.prediction = by_words(text, is_second).map(|found| (found, format!("{key} = {text}")));
        }
        let name = file.path().file_name().map(|name| name.to_string_lossy().into_owned());
        said.by_name = name.as_deref().and_then(|name| by_words(name, is_second));
        said
    }

    /// What is known, from the surest to the least sure.
    pub fn best(&self) -> Option<Prediction> {
        self.prediction.as_ref().map(|(found, _)| *found).or(self.by_name)
    }

    /// The text of a scheduler's config at `path`, with what the checkpoint says and before it what the user says (`asked`) in place
    /// of what it had; and what a user should know of that. The text stays as it is where nothing changes.
    pub fn applied(
        &self,
        asked: Option<Prediction>,
        content: &str,
        path: &Path,
    ) -> Result<(String, Vec<String>)> {
        let mut values = python_json::parse(content)
            .map_err(|e| Error::format(path, format!("expected a JSON object: {e}")))?;
        let before = values.clone();
        let mut notes = self.odd.clone();
        // A prediction of the user's own that is none of zero terminal SNR sets that marker aside too.
        let overruled = asked == Some(Prediction::Epsilon);
        if let Some(found) = asked.or(self.prediction.as_ref().map(|(found, _)| *found)) {
            values.insert("prediction_type".into(), found.word().into());
        }
        if self.zero_snr && !overruled && !is_true(&values, "rescale_betas_zero_snr") {
            // Without the last timestep, which only trailing timesteps have, it would not begin at pure noise (arXiv 2305.08891,
            // section 3.3).
            values.insert("rescale_betas_zero_snr".into(), true.into());
            values.insert("timestep_spacing".into(), "trailing".into());
            // PNDM, as 1.x's folders name it, and Heun know nothing of it.
            if !values
                .get("_class_name")
                .is_some_and(|class| HONOUR_ZERO_SNR.iter().any(|name| class == name))
            {
                values.insert("_class_name".into(), HONOUR_ZERO_SNR[0].into());
            }
        }
        notes.extend(self.notes(asked, overruled, &before, &values));
        let content = if values == before { content.to_string() } else { python_json::write(&values) };
        Ok((content, notes))
    }

    fn notes(
        &self,
        asked: Option<Prediction>,
        overruled: bool,
        before: &Map<String, Value>,
        after: &Map<String, Value>,
    ) -> Vec<String> {
        let mut notes = Vec::new();
        let prediction = |values: &Map<String, Value>| {
            values.get("prediction_type").and_then(Value::as_str).unwrap_or("epsilon").to_string()
        };
        let (old, new) = (prediction(before), prediction(after));
        match (&self.prediction, asked) {
            (Some((found, place)), Some(asked)) if *found != asked => notes.push(format!(
                "the checkpoint says that it predicts `{found}` ({place}); --prediction {asked} is followed"
            )),
            (_, Some(asked)) if old != new => {
                notes.push(format!("the model's scheduler_config.json says {old}; --prediction {asked} is followed"));
            }
            (Some((found, place)), None) if old != new => notes.push(format!(
                "the checkpoint says that it predicts `{found}` ({place}), which is followed; its scheduler_config.json says \
                 {old}. --prediction says otherwise"
            )),
            (None, None) if self.by_name.is_some_and(|by_name| by_name.word() != new) => notes.push(format!(
                "the checkpoint's name sounds like one that predicts otherwise, but its scheduler_config.json says {new}, which is \
                 followed. If pictures are noise, say --prediction {}",
                self.by_name.map_or("", Choice::word)
            )),
            _ => {}
        }
        if self.zero_snr && overruled {
            notes.push(format!(
                "the checkpoint is marked as one of zero terminal SNR (tensor `{ZERO_SNR_MARKER}`), which cannot be with \
                 --prediction epsilon: not followed"
            ));
        } else if self.zero_snr && !is_true(before, "rescale_betas_zero_snr") {
            notes.push(format!(
                "the checkpoint has zero terminal SNR (tensor `{ZERO_SNR_MARKER}`): its noise schedule is rescaled, and timesteps \
                 are spread from the noisy end (trailing); the scheduler is {} unless another is asked for",
                after.get("_class_name").and_then(Value::as_str).unwrap_or("none")
            ));
        }
        notes
    }
}

/// What the name of a 2.x file or architecture says: those of 768 pixels predict velocity, those of 512 the noise, as
/// `v2-1_768-ema-pruned`, `768-v-ema`, `512-base-ema`, `stable-diffusion-2-1-base` and `stable-diffusion-v2-768-v` are called.
fn by_words(text: &str, is_second: bool) -> Option<Prediction> {
    let text = text.to_lowercase();
    let words: Vec<&str> = text.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    let has = |word: &str| words.contains(&word);
    if ["vpred", "v_pred", "v-pred"].iter().any(|word| text.contains(word)) {
        return Some(Prediction::Velocity);
    }
    match is_second {
        true if has("768") => Some(Prediction::Velocity),
        true if has("512") || has("base") => Some(Prediction::Epsilon),
        _ => None,
    }
}

fn is_true(values: &Map<String, Value>, key: &str) -> bool {
    values.get(key) == Some(&Value::Bool(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_published_files_tell_their_prediction() {
        for (name, expected) in [
            ("v2-1_768-ema-pruned.safetensors", Some(Prediction::Velocity)),
            ("768-v-ema.safetensors", Some(Prediction::Velocity)),
            ("stable-diffusion-v2-768-v", Some(Prediction::Velocity)),
            ("NoobAI-XL-Vpred-v1.0.safetensors", Some(Prediction::Velocity)),
            ("v2-1_512-ema-pruned.safetensors", Some(Prediction::Epsilon)),
            ("512-base-ema.safetensors", Some(Prediction::Epsilon)),
            ("stable-diffusion-2-1-base.safetensors", Some(Prediction::Epsilon)),
            ("stable-diffusion-v2-512", Some(Prediction::Epsilon)),
            ("v1-5-pruned-emaonly.safetensors", None),
            ("stable-diffusion-v1", None),
            ("model.safetensors", None),
        ] {
            assert_eq!(by_words(name, true), expected, "{name}");
        }
        assert_eq!(by_words("my-768-finetune.safetensors", false), None);
    }
}
