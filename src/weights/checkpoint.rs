//! One checkpoint file with LDM's key names, open for reading: which parts it has, where its texts come from.

use crate::error::{Error, Result};
use crate::weights::ema::{self, EMA};
use crate::weights::family;
use crate::weights::ldm::{LdmText, UNET, VAE};
use crate::weights::part::{Text, read_below};
use crate::weights::prediction::{SaidPrediction, VELOCITY_MARKER, ZERO_SNR_MARKER};
use crate::weights::tensor_file::{self, TensorFile};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How the metadata keys begin under which a checkpoint holds the text files of its model.
pub const EMBEDDED: &str = "hra/";

/// A checkpoint file, with the folder that says what it does not.
#[derive(Debug)]
pub(super) struct Checkpoint {
    /// Its tensors; averaged ones by the UNet's own keys where they stand for it.
    pub(super) file: Arc<TensorFile>,
    /// Its text towers, in their order.
    pub(super) towers: Vec<LdmText>,
    /// What it says of its prediction.
    pub(super) said: SaidPrediction,
    config: Option<PathBuf>,
    /// What a user should know of its tensors, one sentence each.
    pub(super) notes: Vec<String>,
}

impl Checkpoint {
    /// Opens a `.safetensors` file. Errors: a part is missing (but the VAE, where another takes its place).
    pub(super) fn open(path: &Path, config: Option<&Path>, has_other_vae: bool) -> Result<Self> {
        if let Some(config) = config.filter(|dir| !dir.is_dir()) {
            let found = if config.exists() { "a file" } else { "nothing" };
            return Err(Error::format(
                config,
                format!("expected a folder with tokenizer/ and scheduler/, found {found}"),
            ));
        }
        let mut file = TensorFile::open(path)?;
        let mut notes = Vec::new();
        let names = file.names();
        let has = |prefix: &str| names.iter().any(|name| name.starts_with(prefix));
        if has(EMA) && has(UNET) {
            notes.push(format!(
                "the checkpoint has the UNet twice, as trained ({UNET}*) and averaged (EMA, model_ema.*); the averaged one is not \
                 used"
            ));
        } else if has(EMA) {
            file = file.renamed(ema::usual_key)?;
            notes.push(
                "the checkpoint has the UNet only averaged over its training (EMA, model_ema.*); that one is used".into(),
            );
        }
        let towers = check_parts(&file, has_other_vae)?;
        let said = SaidPrediction::of(&file, towers == [LdmText::TWO]);
        let config = config.map(Path::to_path_buf);
        Ok(Self { file: Arc::new(file), towers, said, config, notes })
    }

    /// What the user's folder or the header has of a text file. A part comes from one of them, so that no two tokenizers mix.
    pub(super) fn given(&self, name: &str) -> Result<Option<Text>> {
        let part = name.split_once('/').map_or(name, |(part, _)| part);
        if let Some(dir) = self.config.as_deref().filter(|dir| dir.join(part).exists()) {
            return read_below(dir, name);
        }
        let path = self.file.path().join(name);
        Ok(self.file.text(&format!("{EMBEDDED}{name}")).map(|text| Text { content: text.to_string(), path }))
    }

    /// Keys that belong to no part and are not known to be left over from training.
    pub(super) fn foreign_keys(&self) -> Vec<String> {
        const LEFT_OVER: [&str; 14] = [
            "model_ema.",
            "embedding_manager.",
            "cond_stage_model.logit_scale",
            "alphas_cumprod",
            "betas",
            "sqrt_",
            "log_one_minus_",
            "posterior_",
            "logvar",
            "lvlb_weights",
            "scale_factor",
            "denoiser.sigmas",
            VELOCITY_MARKER,
            ZERO_SNR_MARKER,
        ];
        let known = |key: &String| {
            let mut parts = [UNET, VAE].into_iter().chain(self.towers.iter().map(|place| place.prefix));
            parts.any(|prefix| key.starts_with(prefix))
                || LEFT_OVER.iter().any(|prefix| key.starts_with(prefix))
        };
        self.file.names().into_iter().filter(|key| !known(key)).collect()
    }
}

/// Whether a file with these keys is meant as a whole model: it has a UNet, of whatever family, or a text tower beside a VAE.
pub fn is_model(names: &[String]) -> bool {
    let has = |prefix: &str| names.iter().any(|name| name.starts_with(prefix));
    has(UNET) || has(EMA) || (has("cond_stage_model.") || has("conditioner.embedders.")) && has(VAE)
}

/// Fails unless the file has keys of all parts; otherwise, which text towers it has.
fn check_parts(file: &TensorFile, has_other_vae: bool) -> Result<Vec<LdmText>> {
    let names = file.names();
    let has = |prefix: &str| names.iter().any(|name| name.starts_with(prefix));
    let towers = LdmText::of_keys(has);
    let is_xl = has("conditioner.embedders.") || has("model.diffusion_model.label_emb.") && towers.is_empty();
    let mut missing: Vec<&str> = [UNET, VAE].into_iter().filter(|prefix| !has(prefix)).collect();
    missing.retain(|prefix| *prefix != VAE || !has_other_vae);
    match &towers[..] {
        [] if !is_xl => missing.push("cond_stage_model."),
        [] => missing.extend([LdmText::XL_FIRST.prefix, LdmText::XL_SECOND.prefix]),
        [LdmText::XL_FIRST] => missing.push(LdmText::XL_SECOND.prefix),
        [LdmText::XL_SECOND] => missing.push(LdmText::XL_FIRST.prefix),
        _ => {}
    }
    if missing.is_empty() {
        return Ok(towers);
    }
    if let Some(family) = family::of_keys(&names) {
        return Err(family::refusal(file.path(), "checkpoint", family));
    }
    let listed: Vec<String> = missing.iter().map(|prefix| format!("{prefix}*")).collect();
    let error = Error::format(
        file.path(),
        format!(
            "expected a Stable Diffusion {}checkpoint, found no {} but {}",
            if is_xl { "XL " } else { "" },
            listed.join(", no "),
            tensor_file::list(&names)
        ),
    );
    let is_adapter = names.iter().any(|name| name.contains("lora_") || name.starts_with("base_model.model."));
    Err(if missing == [VAE] {
        error.with_hint(
            "it has no VAE: give one with --vae FILE|DIR (vae in [model] of a training), such as that of the model that it was \
             made from",
        )
    } else if is_adapter {
        error.with_hint("this looks like an adapter: give it with --adapter")
    } else if has("decoder.") && has("encoder.") || has(VAE) && !has(UNET) {
        error.with_hint("this looks like a VAE: give it with --vae, beside the model")
    } else if has("down_blocks.") || has("encoder.") || has("text_model.") {
        error.with_hint("this looks like one part of a Hugging Face folder: give the folder")
    } else {
        error
    })
}
