//! A whole model: a folder with `model_index.json`, `unet/`, `vae/`, `text_encoder/`, `tokenizer/` and `scheduler/`, or
//! one checkpoint file.

use crate::attach::loaded::LayerNames;
use crate::diffusion::noise::SchedulerConfig;
use crate::diffusion::picture_sizes::{PictureSizes, XL_NUMBERS};
use crate::diffusion::prompt::PromptTexts;
use crate::error::{Error, Result};
use crate::model::conditioning::{POOLED, SIZES};
use crate::model::layers::{Layer, Layers, Module};
use crate::model::text::{TextEncoder, TextOutput, TextStates, Tokenizer, in_own_tower};
use crate::model::{Conditioning, Denoiser, UNet, Vae};
use crate::platform::host;
use crate::platform::hub;
use crate::platform::precision::Numbers;
use crate::weights::ldm::LdmNames;
use crate::weights::part::Part;
use crate::weights::request::ModelRequest;
use crate::weights::source::{FORCE_ZEROS, SCHEDULER, Source};
use crate::weights::tensor_file;
use serde_json::Value;
use std::path::{Path, PathBuf};
use tch::{Device, Tensor};

/// Numbers of sizes that XL's refiner is told, with the score.
const REFINER_NUMBERS: i64 = 5;

/// A tokenizer and the encoder that reads its ids.
pub struct TextTower {
    /// Which of the model's it is.
    pub part: Part,
    /// Prompts to ids.
    pub tokenizer: Tokenizer,
    /// Ids to states.
    pub encoder: TextEncoder,
}

/// Ids of prompts, and how they are read.
pub struct Tokens {
    /// `(b, n)` for each text tower.
    ids: Vec<Tensor>,
    /// So many layers of the towers more than usual are left out.
    clip_skip: usize,
}

impl Tokens {
    /// The same with so many layers of the towers left out, as diffusers counts them: 0 is usual, and A1111's `Clip skip` is one more.
    pub fn skipping(self, clip_skip: usize) -> Self {
        Self { clip_skip, ..self }
    }
}

/// Stable Diffusion 1.x, 2.x or XL, frozen.
pub struct StableDiffusion {
    /// Where it was loaded from, a folder or a checkpoint file.
    pub dir: PathBuf,
    /// Its files, open for reading.
    pub source: Source,
    /// What reads prompts, in the order in which their states stand beside each other; none after [`Self::release_texts`].
    pub texts: Vec<TextTower>,
    /// The denoiser.
    pub unet: UNet,
    /// Pictures to latents and back, f32.
    pub vae: Vae,
    /// Whether guidance away from no prompt is away from zeros, in place of what an empty text becomes.
    pub zeros_for_no_prompt: bool,
    /// The noise schedule and how the model was trained on it.
    pub scheduler: SchedulerConfig,
    /// What a user should know about the files, one sentence each.
    pub notes: Vec<String>,
    /// The most layers of the text towers that can be left out: [`Tokens::skipping`].
    most_skipped: usize,
    /// Width of the pooled text; 0 where no tower has any.
    pooled_width: i64,
}

impl StableDiffusion {
    /// Loads a folder, or a checkpoint that says itself what it is; UNet and text encoders with `numbers`, the VAE in f32 unless its user
    /// asks for another format.
    pub fn load(path: &Path, numbers: impl Into<Numbers>, device: Device) -> Result<Self> {
        Self::load_with(path, None, numbers, device)
    }

    /// As [`Self::load`]; `config` is a folder with what a checkpoint does not say (see [`Source::open`]).
    pub fn load_with(
        path: &Path,
        config: Option<&Path>,
        numbers: impl Into<Numbers>,
        device: Device,
    ) -> Result<Self> {
        Self::from_source(Source::open(path, config)?, numbers, device)
    }

    /// As [`Self::load`], with what its user says of it.
    pub fn open(asked: &ModelRequest, numbers: impl Into<Numbers>, device: Device) -> Result<Self> {
        Self::from_source(Source::open_as(asked)?, numbers, device)
    }

    /// As [`Self::load`], of what is open already.
    pub fn from_source(source: Source, numbers: impl Into<Numbers>, device: Device) -> Result<Self> {
        source.check_complete()?;
        let numbers = numbers.into();
        let _guard = tch::no_grad_guard();
        let scheduler = scheduler_of(&source)?;
        let mut notes = source.notes();
        let mut note = |part: &str, unused: Vec<String>| {
            if !unused.is_empty() {
                notes.push(format!("{part}: tensors that were not used: {}", tensor_file::list(&unused)));
            }
        };
        // The UNet first: it is the largest, and reading the others on top of it keeps the peak low.
        let (unet, unused) = UNet::load(&source, numbers, device)?;
        note("unet", unused);
        let texts = text_towers(&source, numbers, device, &mut note)?;
        let (vae, unused) = Vae::load_as_asked(&source, device)?;
        note("vae", unused);
        note("checkpoint", source.foreign_keys());
        notes.extend(vae.note());
        let dir = source.path().to_path_buf();
        let zeros_for_no_prompt =
            unet.added().is_some() && source.pipeline_value(FORCE_ZEROS) != Some(Value::Bool(false));
        let layers = texts.iter().map(|tower| tower.encoder.layers()).min().unwrap_or(0);
        // Of XL the states before the last layer's count already.
        let most_skipped = if unet.added().is_some() { layers.saturating_sub(1) } else { layers };
        let pooled_width = texts.iter().rev().find_map(|tower| tower.encoder.pooled_width()).unwrap_or(0);
        let model = Self {
            dir,
            source,
            texts,
            unet,
            vae,
            zeros_for_no_prompt,
            scheduler,
            notes,
            most_skipped,
            pooled_width,
        };
        model.check_fit()?;
        Ok(model)
    }

    /// Lets the text towers go, after which no prompt becomes anything.
    pub fn release_texts(&mut self) {
        self.texts.clear();
        host::give_memory_back();
    }

    /// What prompts become, and a warning for each prompt that was cut.
    pub fn encode_prompts(&self, prompts: &[&str]) -> Result<(Conditioning, Vec<String>)> {
        let (tokens, warnings) = self.tokens(prompts)?;
        Ok((self.conditioning(&tokens), warnings))
    }

    /// Tokens of prompts, and a warning for each prompt that was cut.
    pub fn tokens<'a, P: Copy + Into<PromptTexts<'a>>>(
        &self,
        prompts: &[P],
    ) -> Result<(Tokens, Vec<String>)> {
        if self.texts.is_empty() {
            return Err(Error::config("prompts: the text encoders were let go, and read none"));
        }
        let mut warnings: Vec<String> = Vec::new();
        let mut ids = Vec::new();
        for (i, tower) in self.texts.iter().enumerate() {
            let mut rows = Vec::new();
            for prompt in prompts {
                let prompt: PromptTexts = (*prompt).into();
                let prompt = if i == 0 { prompt.first } else { prompt.second };
                let (row, cut) = tower.tokenizer.encode(prompt)?;
                if cut > 0 {
                    let room = tower.tokenizer.length() - 2;
                    let warning = format!(
                        "prompt `{prompt}` has {cut} tokens more than the {room} that fit; they are left out"
                    );
                    if !warnings.contains(&warning) {
                        warnings.push(warning);
                    }
                }
                rows.push(host::tensor(&row));
            }
            ids.push(Tensor::stack(&rows, 0));
        }
        Ok((Tokens { ids, clip_skip: 0 }, warnings))
    }

    /// What tokens become, in the compute dtype, without gradient.
    pub fn conditioning(&self, tokens: &Tokens) -> Conditioning {
        let _guard = tch::no_grad_guard();
        self.conditioning_with_gradient(tokens)
    }

    /// As [`Self::conditioning`], where text encoders train.
    pub fn conditioning_with_gradient(&self, tokens: &Tokens) -> Conditioning {
        let skipped = tokens.clip_skip;
        let asked = if self.is_xl() { TextStates::Raw { skipped } } else { TextStates::Normed { skipped } };
        let outputs = self.texts.iter().zip(&tokens.ids).map(|(tower, ids)| tower.encoder.output(ids, asked));
        let outputs: Vec<TextOutput> = outputs.collect();
        let states: Vec<&Tensor> = outputs.iter().map(|output| &output.states).collect();
        let conditioning = Conditioning::new(Tensor::cat(&states, -1));
        match outputs.into_iter().rev().find_map(|output| output.pooled) {
            Some(pooled) if self.is_xl() => conditioning.with(POOLED, pooled),
            _ => conditioning,
        }
    }

    /// Bytes of what a text becomes, without what is told beside its states.
    pub fn bytes_of_text(&self) -> i64 {
        let length = self.texts.iter().map(|tower| tower.encoder.length()).max().unwrap_or(1);
        length * self.unet.context_width() * self.unet.numbers().compute.elt_size_in_bytes() as i64
    }

    /// The most layers of the text towers that can be left out: [`Tokens::skipping`].
    pub fn most_skipped(&self) -> usize {
        self.most_skipped
    }

    /// The same with what Stable Diffusion XL is told of a picture's sizes, a row for each; of other models as it is.
    pub fn told_sizes(&self, conditioning: Conditioning, sizes: &[PictureSizes]) -> Conditioning {
        let numbers: Vec<Vec<f32>> = sizes.iter().map(|sizes| sizes.numbers().to_vec()).collect();
        if self.is_xl() { self.told_numbers(conditioning, &numbers) } else { conditioning }
    }

    /// The same with numbers of sizes beside, a row for each.
    pub(super) fn told_numbers(&self, conditioning: Conditioning, rows: &[Vec<f32>]) -> Conditioning {
        let rows: Vec<Tensor> = rows.iter().map(|numbers| host::tensor(numbers)).collect();
        conditioning.with(SIZES, host::to_device(&Tensor::stack(&rows, 0), self.device()))
    }

    /// Whether this is Stable Diffusion XL, which is told pooled text and sizes beside the text states.
    pub fn is_xl(&self) -> bool {
        self.unet.added().is_some()
    }

    /// Whether this is XL's refiner, which is told a score of the picture.
    pub fn is_refiner(&self) -> bool {
        self.unet.added().and_then(|added| added.numbers(self.pooled_width)) == Some(REFINER_NUMBERS)
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

    /// What the layers of the UNet and the text encoders are called, also in LDM checkpoints.
    pub fn layer_names(&mut self) -> Result<LayerNames> {
        let unet = self.source.names(Part::UNet)?;
        let named = |layers: Vec<&mut Layer>, names: LdmNames| {
            let own = layers.iter().map(|layer| in_own_tower(&layer.name));
            own.map(|name| (name.to_string(), names.layer(name))).collect()
        };
        let is_xl = Some(self.is_xl());
        let unet = named(self.unet.layers_mut(), unet);
        let mut found = LayerNames { unet, is_xl, ..LayerNames::default() };
        for tower in &mut self.texts {
            let names = named(tower.encoder.layers_mut(), self.source.names(tower.part)?);
            let place = if tower.part == Part::TextEncoder2 {
                &mut found.text_encoder_2
            } else {
                &mut found.text_encoder
            };
            *place = names;
        }
        Ok(found)
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

    /// Refuses a model of [`Self::is_inpainting`], and a refiner, for what draws from text alone.
    pub fn expect_text_to_image(&self) -> Result<()> {
        self.source.refuse_refiner()?;
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
        if let Some(added) = self.unet.added() {
            let pooled = self.pooled_width;
            if ![Some(XL_NUMBERS), Some(REFINER_NUMBERS)].contains(&added.numbers(pooled)) {
                problems.push(format!(
                    "unet: projection_class_embeddings_input_dim (pooled text of {pooled} values, {} for each of \
                     {XL_NUMBERS} sizes): expected {}, found {}",
                    added.of_number,
                    pooled + XL_NUMBERS * added.of_number,
                    added.total
                ));
            }
        }
        for TextTower { tokenizer, encoder, .. } in &self.texts {
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

/// The text towers of `source`; `note` hears of tensors that were not used.
fn text_towers(
    source: &Source,
    numbers: Numbers,
    device: Device,
    note: &mut dyn FnMut(&str, Vec<String>),
) -> Result<Vec<TextTower>> {
    let tower = |part: Part| {
        let (encoder, unused) = TextEncoder::load(source, part, numbers, device)?;
        note(part.folder(), unused);
        let tokenizer = Tokenizer::load(source, part, encoder.length() as usize)?;
        Ok(TextTower { part, tokenizer, encoder })
    };
    source.text_parts().into_iter().map(tower).collect()
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
