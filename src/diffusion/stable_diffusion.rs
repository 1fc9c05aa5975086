//! A whole model: a folder with `model_index.json`, `unet/`, `vae/`, `text_encoder/`, `tokenizer/` and `scheduler/`, or
//! one checkpoint file.

use crate::attach::loaded::LayerNames;
use crate::diffusion::noise::SchedulerConfig;
use crate::error::{Error, Result};
use crate::model::layers::{Layer, Layers, Module};
use crate::model::text::{TextEncoder, Tokenizer};
use crate::model::{Conditioning, Denoiser, UNet, Vae};
use crate::platform::host;
use crate::platform::hub;
use crate::weights::ldm::LdmNames;
use crate::weights::part::Part;
use crate::weights::request::ModelRequest;
use crate::weights::source::{SCHEDULER, Source};
use crate::weights::tensor_file;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// A tokenizer and the encoder that reads its ids.
pub struct TextTower {
    /// Prompts to ids.
    pub tokenizer: Tokenizer,
    /// Ids to states.
    pub encoder: TextEncoder,
}

/// Ids of prompts, `(b, n)` for each text tower.
pub struct Tokens(Vec<Tensor>);

/// Stable Diffusion 1.x or 2.x, frozen.
pub struct StableDiffusion {
    /// Where it was loaded from, a folder or a checkpoint file.
    pub dir: PathBuf,
    /// Its files, open for reading.
    pub source: Source,
    /// What reads prompts, in the order in which their states stand beside each other.
    pub texts: Vec<TextTower>,
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
    /// Loads a folder, or a checkpoint that says itself what it is; UNet and text encoder in `kind`, the VAE in f32.
    pub fn load(path: &Path, kind: Kind, device: Device) -> Result<Self> {
        Self::load_with(path, None, kind, device)
    }

    /// As [`Self::load`]; `config` is a folder with what a checkpoint does not say (see [`Source::open`]).
    pub fn load_with(path: &Path, config: Option<&Path>, kind: Kind, device: Device) -> Result<Self> {
        Self::from_source(Source::open(path, config)?, kind, device)
    }

    /// As [`Self::load`], with what its user says of it.
    pub fn open(asked: &ModelRequest, kind: Kind, device: Device) -> Result<Self> {
        Self::from_source(Source::open_as(asked)?, kind, device)
    }

    /// As [`Self::load`], of what is open already.
    pub fn from_source(source: Source, kind: Kind, device: Device) -> Result<Self> {
        source.check_complete()?;
        let _guard = tch::no_grad_guard();
        let scheduler = scheduler_of(&source)?;
        let mut notes = source.notes();
        let mut note = |part: &str, unused: Vec<String>| {
            if !unused.is_empty() {
                notes.push(format!("{part}: tensors that were not used: {}", tensor_file::list(&unused)));
            }
        };
        // The UNet first: it is the largest, and reading the others on top of it keeps the peak low.
        let (unet, unused) = UNet::load(&source, kind, device)?;
        note("unet", unused);
        let (encoder, unused) = TextEncoder::load(&source, kind, device)?;
        note("text_encoder", unused);
        let (vae, unused) = Vae::load(&source, device)?;
        note("vae", unused);
        note("checkpoint", source.foreign_keys());
        let tokenizer = Tokenizer::load(&source, encoder.length() as usize)?;
        let texts = vec![TextTower { tokenizer, encoder }];
        let dir = source.path().to_path_buf();
        let model = Self { dir, source, texts, unet, vae, scheduler, notes };
        model.check_fit()?;
        Ok(model)
    }

    /// What prompts become, and a warning for each prompt that was cut.
    pub fn encode_prompts(&self, prompts: &[&str]) -> Result<(Conditioning, Vec<String>)> {
        let (tokens, warnings) = self.tokens(prompts)?;
        Ok((self.conditioning(&tokens), warnings))
    }

    /// Tokens of prompts, and a warning for each prompt that was cut.
    pub fn tokens(&self, prompts: &[&str]) -> Result<(Tokens, Vec<String>)> {
        let mut warnings = Vec::new();
        let mut ids = Vec::new();
        for tower in &self.texts {
            let mut rows = Vec::new();
            for prompt in prompts {
                let (row, cut) = tower.tokenizer.encode(prompt)?;
                if cut > 0 {
                    let room = tower.tokenizer.length() - 2;
                    warnings.push(format!(
                        "prompt `{prompt}` has {cut} tokens more than the {room} that fit; they are left out"
                    ));
                }
                rows.push(host::tensor(&row));
            }
            ids.push(Tensor::stack(&rows, 0));
        }
        Ok((Tokens(ids), warnings))
    }

    /// What tokens become, in the compute dtype, without gradient.
    pub fn conditioning(&self, tokens: &Tokens) -> Conditioning {
        let _guard = tch::no_grad_guard();
        self.conditioning_with_gradient(tokens)
    }

    /// As [`Self::conditioning`], where text encoders train.
    pub fn conditioning_with_gradient(&self, tokens: &Tokens) -> Conditioning {
        let states = self.texts.iter().zip(&tokens.0).map(|(tower, ids)| tower.encoder.forward(ids));
        let beside = states.reduce(|left, right| Tensor::cat(&[left, right], -1));
        Conditioning::new(beside.expect("a model has a text encoder"))
    }

    /// The network that predicts.
    pub fn denoiser(&self) -> &dyn Denoiser {
        &self.unet
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.unet.device()
    }

    /// What identifies the base model's weights: [`Source::fingerprint`].
    pub fn fingerprint(&self) -> Result<String> {
        self.source.fingerprint()
    }

    /// The UNet's `config.json`, which a checkpoint file may only imply.
    pub fn unet_config(&self) -> Result<String> {
        Ok(self.source.text("unet/config.json")?.content)
    }

    /// What the layers of the UNet and the text encoder are called, also in LDM checkpoints.
    pub fn layer_names(&mut self) -> Result<LayerNames> {
        let (unet, text) = (self.source.names(Part::UNet)?, self.source.names(Part::TextEncoder)?);
        let named = |layers: Vec<&mut Layer>, names: LdmNames| {
            layers.into_iter().map(|layer| (layer.name.clone(), names.layer(&layer.name))).collect()
        };
        let towers = self.texts.iter_mut().flat_map(|tower| tower.encoder.layers_mut()).collect();
        Ok(LayerNames { unet: named(self.unet.layers_mut(), unet), text_encoder: named(towers, text) })
    }

    /// The folder's or file's own name, or its repository's on the hub, for the settings that a picture carries.
    pub fn name(&self) -> String {
        let own = || {
            let name =
                self.dir.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            name.strip_suffix(".safetensors").map_or(name.clone(), str::to_string)
        };
        hub::repository_of(&self.dir).unwrap_or_else(own)
    }

    /// Width and height in pixels that the model was trained at; 512 where its files do not say.
    pub fn native_size(&self) -> i64 {
        self.unet.sample_size().map_or(512, |size| size * self.vae.factor())
    }

    /// Whether the UNet sees a mask and a masked picture beside its latents, as those of inpainting checkpoints do.
    pub fn is_inpainting(&self) -> bool {
        self.unet.in_channels() == 2 * self.vae.latent_channels() + 1
    }

    /// Refuses a model of [`Self::is_inpainting`], for what shows a UNet latents alone.
    pub fn expect_text_to_image(&self) -> Result<()> {
        if !self.is_inpainting() {
            return Ok(());
        }
        Err(Error::format(
            &self.dir,
            format!("expected a model that draws from text alone, found one for inpainting (its UNet has {} input \
                     channels)", self.unet.in_channels()),
        ).with_hint("train and compare on the plain model; this one draws with `hra sample --image FILE --mask FILE`"))
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
            self.texts.iter().map(|tower| tower.encoder.width()).sum(),
            self.unet.context_width(),
        );
        if !self.is_inpainting() {
            expect(
                "unet: in_channels (latent channels of the VAE)",
                self.vae.latent_channels(),
                self.unet.in_channels(),
            );
        }
        expect(
            "unet: out_channels (latent channels of the VAE)",
            self.vae.latent_channels(),
            self.unet.out_channels(),
        );
        for TextTower { tokenizer, encoder } in &self.texts {
            let (largest, known) = (tokenizer.largest_id(), encoder.vocabulary());
            if i64::from(largest) >= known {
                problems.push(format!(
                    "tokenizer: ids up to {largest}, but the text encoder knows {known} tokens"
                ));
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::format(&self.dir, problems.join("\n"))) }
    }
}

impl Layers for StableDiffusion {
    /// Of the UNet, then of the text encoders; their names do not meet.
    fn modules_mut(&mut self) -> Vec<Module<'_>> {
        let mut parts = self.unet.modules_mut();
        parts.extend(self.texts.iter_mut().flat_map(|tower| tower.encoder.modules_mut()));
        parts
    }
}

/// The scheduler's config as it counts for drawing and training. Errors: it cannot be read, or contradicts itself
/// ([`SchedulerConfig::check_terminal_snr`]).
pub fn scheduler_of(source: &Source) -> Result<SchedulerConfig> {
    let text = source.text(SCHEDULER)?;
    let scheduler = SchedulerConfig::parse(&text.content, &text.path)?;
    scheduler.check_numbers()?;
    let scheduler = scheduler.for_latent_model();
    scheduler.check_terminal_snr()?;
    Ok(scheduler)
}
