//! A whole model folder: `model_index.json`, `unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`.

use crate::error::{Error, Result};
use crate::files;
use crate::hub;
use crate::model::layers::{Layers, Module};
use crate::model::{UNet, Vae};
use crate::noise::SchedulerConfig;
use crate::tensor_file;
use crate::text::{TextEncoder, Tokenizer};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Stable Diffusion 1.x or 2.x, frozen.
pub struct StableDiffusion {
    /// Where it was loaded from.
    pub dir: PathBuf,
    /// Prompts to ids.
    pub tokenizer: Tokenizer,
    /// Ids to states.
    pub text_encoder: TextEncoder,
    /// The denoiser.
    pub unet: UNet,
    /// Pictures to latents and back, f32.
    pub vae: Vae,
    /// The noise schedule and how the model was trained on it.
    pub scheduler: SchedulerConfig,
    /// What a user should know about the files, one sentence each.
    pub notes: Vec<String>,
}

impl StableDiffusion {
    /// Loads a folder; UNet and text encoder in `kind`, the VAE in f32.
    pub fn load(dir: &Path, kind: Kind, device: Device) -> Result<Self> {
        check_layout(dir)?;
        let _guard = tch::no_grad_guard();
        let scheduler =
            SchedulerConfig::read(&dir.join("scheduler/scheduler_config.json"))?.for_latent_model();
        let mut notes = Vec::new();
        let mut note = |part: &str, unused: Vec<String>| {
            if !unused.is_empty() {
                notes.push(format!("{part}: tensors that were not used: {}", tensor_file::list(&unused)));
            }
        };
        // The UNet first: it is the largest, and reading the others on top of it keeps the peak low.
        let (unet, unused) = UNet::load(&dir.join("unet"), kind, device)?;
        note("unet", unused);
        let (text_encoder, unused) = TextEncoder::load(&dir.join("text_encoder"), kind, device)?;
        note("text_encoder", unused);
        let (vae, unused) = Vae::load(&dir.join("vae"), device)?;
        note("vae", unused);
        let tokenizer = Tokenizer::load(&dir.join("tokenizer"), text_encoder.length() as usize)?;
        let model = Self { dir: dir.to_path_buf(), tokenizer, text_encoder, unet, vae, scheduler, notes };
        model.check_fit()?;
        Ok(model)
    }

    /// States of prompts, `(b, n, width)` in the compute dtype, and a warning for each prompt that was cut.
    pub fn encode_prompts(&self, prompts: &[&str]) -> Result<(Tensor, Vec<String>)> {
        let (ids, warnings) = self.prompt_ids(prompts)?;
        Ok((self.text_states(&ids), warnings))
    }

    /// Ids of prompts `(b, n)`, and a warning for each prompt that was cut.
    pub fn prompt_ids(&self, prompts: &[&str]) -> Result<(Tensor, Vec<String>)> {
        let mut warnings = Vec::new();
        let mut rows = Vec::new();
        for prompt in prompts {
            let (ids, cut) = self.tokenizer.encode(prompt)?;
            if cut > 0 {
                let room = self.tokenizer.length() - 2;
                warnings.push(format!(
                    "prompt `{prompt}` has {cut} tokens more than the {room} that fit; they are left out"
                ));
            }
            rows.push(Tensor::from_slice(&ids));
        }
        Ok((Tensor::stack(&rows, 0), warnings))
    }

    /// States `(b, n, width)` of ids `(b, n)`, without gradient.
    pub fn text_states(&self, ids: &Tensor) -> Tensor {
        let _guard = tch::no_grad_guard();
        self.text_encoder.forward(ids)
    }

    /// What identifies the base model's weights: SHA-256 over name, size, and the first and last 64 KiB of each weight
    /// file. Changes with any retraining, and costs milliseconds where hashing all of it would cost seconds.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = Sha256::new();
        for part in ["unet", "text_encoder", "vae"] {
            let dir = self.dir.join(part);
            for entry in files::list_dir(&dir)? {
                let name = entry.name.to_string_lossy();
                if name.ends_with(".safetensors") {
                    let (length, ends) = tensor_file::ends(&entry.path)?;
                    hash.update(format!("{part}/{name}:{length}\n"));
                    hash.update(&ends);
                }
            }
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The bytes of the UNet's `config.json`.
    pub fn unet_config(&self) -> Result<Vec<u8>> {
        files::read(&self.dir.join("unet/config.json"), 1 << 24)
    }

    /// The folder's own name, or its repository's on the hub, for the settings that a picture carries.
    pub fn name(&self) -> String {
        let own =
            || self.dir.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        hub::repository_of(&self.dir).unwrap_or_else(own)
    }

    /// Width and height in pixels that the model was trained at; 512 where its files do not say.
    pub fn native_size(&self) -> i64 {
        self.unet.sample_size().map_or(512, |size| size * self.vae.factor())
    }

    fn check_fit(&self) -> Result<()> {
        let mut problems = Vec::new();
        let mut expect = |what: &str, expected: i64, found: i64| {
            if expected != found {
                problems.push(format!("{what}: expected {expected}, found {found}"));
            }
        };
        expect(
            "unet: cross_attention_dim (width of the text encoder)",
            self.text_encoder.width(),
            self.unet.context_width(),
        );
        expect(
            "unet: in_channels (latent channels of the VAE)",
            self.vae.latent_channels(),
            self.unet.in_channels(),
        );
        expect(
            "unet: out_channels (latent channels of the VAE)",
            self.vae.latent_channels(),
            self.unet.out_channels(),
        );
        if i64::from(self.tokenizer.largest_id()) >= self.text_encoder.vocabulary() {
            problems.push(format!(
                "tokenizer: ids up to {}, but the text encoder knows {} tokens",
                self.tokenizer.largest_id(),
                self.text_encoder.vocabulary()
            ));
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::format(&self.dir, problems.join("\n"))) }
    }
}

impl Layers for StableDiffusion {
    /// Of the UNet, then of the text encoder; their names do not meet.
    fn modules_mut(&mut self) -> Vec<Module<'_>> {
        let mut parts = self.unet.modules_mut();
        parts.extend(self.text_encoder.modules_mut());
        parts
    }
}

fn check_layout(dir: &Path) -> Result<()> {
    if !dir.is_dir() {
        let what = if dir.exists() { "a file" } else { "nothing" };
        return Err(Error::format(
            dir,
            format!(
                "expected a Stable Diffusion folder, found {what}\nhint: give a folder with model_index.json, unet/, vae/, \
                 text_encoder/, tokenizer/ and scheduler/"
            ),
        ));
    }
    let missing: Vec<&str> = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]
        .into_iter()
        .filter(|part| !dir.join(part).is_dir())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::format(
        dir,
        format!("expected a Stable Diffusion folder, found no {}", missing.join("/, no ") + "/"),
    ))
}
