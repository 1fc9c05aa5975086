//! What a set of pictures is drawn from, beside noise.

use crate::diffusion::prompt::PromptTexts;
use crate::diffusion::sample::sizes::SizeSettings;
use crate::diffusion::sampler::{SamplerKind, SamplerPlan, Spacing};
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::weights::bounds::{MAX_FACTOR, is_factor};

/// What a set of pictures is drawn from.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleSettings {
    pub prompt: String,
    pub negative_prompt: String,
    pub sampler: SamplerKind,
    /// How timesteps are spread, where it is not the sampler's own way.
    pub spacing: Option<Spacing>,
    /// Whether Karras' noise levels are used, where it is not the sampler's own choice.
    pub karras: Option<bool>,
    pub steps: usize,
    /// Classifier-free guidance; 1 or less means none, and half the work.
    pub guidance: f64,
    /// How far the guided prediction's deviation is brought back to that of the prompt's alone (arXiv 2305.08891, section 3.4): 0 not
    /// at all, 1 wholly.
    pub guidance_rescale: f64,
    /// In pixels.
    pub width: i64,
    /// In pixels.
    pub height: i64,
    /// How texts are read.
    pub texts: TextSettings,
    /// What Stable Diffusion XL is told of sizes.
    pub sizes: SizeSettings,
}

/// How texts are read, beyond what one text encoder needs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TextSettings {
    /// For the second text encoder of Stable Diffusion XL, in place of the prompt.
    pub prompt_2: Option<String>,
    /// The same of the negative prompt.
    pub negative_prompt_2: Option<String>,
    /// So many layers of the text encoders are left out for the prompt, and none for the negative prompt: [`crate::diffusion::stable_diffusion::Tokens::skipping`].
    pub clip_skip: usize,
}

impl SampleSettings {
    /// For square pictures that training draws on its own: no negative prompt, the model's sampler unless one is given.
    pub fn square(
        model: &StableDiffusion,
        prompt: &str,
        sampler: Option<SamplerKind>,
        steps: usize,
        guidance: f64,
        size: u32,
    ) -> Result<Self> {
        let sampler = match sampler {
            Some(kind) => kind,
            None => SamplerKind::from_config(&model.scheduler)?.0,
        };
        let size = i64::from(size);
        Ok(Self {
            prompt: prompt.to_string(),
            negative_prompt: String::new(),
            sampler,
            spacing: None,
            karras: None,
            steps,
            guidance,
            guidance_rescale: 0.0,
            width: size,
            height: size,
            texts: TextSettings::default(),
            sizes: SizeSettings::default(),
        })
    }

    /// Refuses sizes, numbers and steps that the model cannot draw.
    pub fn validate(&self, model: &StableDiffusion) -> Result<()> {
        self.check_numbers(model)?;
        self.plan(model).map(|_| ())
    }

    /// Refuses sizes and numbers that the model cannot draw.
    pub(super) fn check_numbers(&self, model: &StableDiffusion) -> Result<()> {
        let factor = model.vae.factor();
        for (flag, size) in [("--width", self.width), ("--height", self.height)] {
            if size < factor || size % factor != 0 || size > 8192 {
                return Err(Error::config(format!(
                    "{flag}: expected a multiple of {factor} (pixels for one latent of this model) up to 8192, found {size}"
                )));
            }
        }
        if !is_factor(self.guidance) {
            return Err(Error::config(format!(
                "--guidance: expected a number up to {MAX_FACTOR:e}, found {}",
                self.guidance
            )));
        }
        if !(0.0..=1.0).contains(&self.guidance_rescale) {
            let found = self.guidance_rescale;
            return Err(Error::config(format!("--guidance-rescale: expected 0 to 1, found {found}")));
        }
        self.check_texts(model)
    }

    /// Refuses what the model's text encoders cannot do, and what would have no effect on it.
    fn check_texts(&self, model: &StableDiffusion) -> Result<()> {
        let (found, most) = (self.texts.clip_skip, model.most_skipped());
        if found > most {
            return Err(Error::config(format!(
                "--clip-skip: expected 0 to {most} (the model's text encoder has no more layers), found {found}"
            )));
        }
        let TextSettings { prompt_2, negative_prompt_2, .. } = &self.texts;
        if model.texts.len() == 1 && prompt_2.as_ref().or(negative_prompt_2.as_ref()).is_some() {
            return Err(Error::config(
                "--prompt-2 and --negative-prompt-2: this model has one text encoder, which reads --prompt and \
                 --negative-prompt",
            ));
        }
        if negative_prompt_2.is_some() && self.negative_prompt.is_empty() {
            return Err(Error::config(
                "--negative-prompt-2: expected a --negative-prompt beside it, found none",
            ));
        }
        if !model.is_xl() && !self.sizes.are_usual() {
            return Err(Error::config(
                "--original-size, --crop and --target-size: only a model of Stable Diffusion XL is told sizes, and this is none",
            ));
        }
        self.sizes.check(model.is_refiner())
    }

    /// What the text encoders read of the prompt.
    pub fn positive(&self) -> PromptTexts<'_> {
        both(&self.prompt, self.texts.prompt_2.as_deref())
    }

    /// What the text encoders read of the negative prompt.
    pub fn negative(&self) -> PromptTexts<'_> {
        both(&self.negative_prompt, self.texts.negative_prompt_2.as_deref())
    }

    /// Whether the negative prompt has a say.
    pub fn is_guided(&self) -> bool {
        self.guidance > 1.0
    }

    /// The sampler's steps for this model.
    pub fn plan(&self, model: &StableDiffusion) -> Result<SamplerPlan> {
        self.plan_from(model, None)
    }

    /// The same, or with a strength the last of them, for a picture to start from.
    pub(super) fn plan_from(&self, model: &StableDiffusion, strength: Option<f64>) -> Result<SamplerPlan> {
        let config = self.sampler.settings(&model.scheduler, self.spacing, self.karras);
        match strength {
            None => SamplerPlan::new(self.sampler, &config, self.steps),
            Some(strength) => SamplerPlan::from_strength(self.sampler, &config, self.steps, strength),
        }
    }

    /// Shape of one picture's latents, `(1, c, h, w)`.
    pub fn latent_shape(&self, model: &StableDiffusion) -> [i64; 4] {
        let factor = model.vae.factor();
        [1, model.vae.latent_channels(), self.height / factor, self.width / factor]
    }

    /// For a PNG: one entry for each setting, and all in the one line that A1111 and ComfyUI read.
    pub fn to_text(&self, seed: Option<u64>, model: &str, adapters: &str) -> Vec<(String, String)> {
        let seed_text = seed.map_or_else(|| "given latents".to_string(), |s| s.to_string());
        let mut line = self.prompt.clone();
        if !self.negative_prompt.is_empty() {
            line += &format!("\nNegative prompt: {}", self.negative_prompt);
        }
        line += &format!(
            "\nSteps: {}, Sampler: {}, CFG scale: {}, Seed: {seed_text}, Size: {}x{}, Model: {model}",
            self.steps, self.sampler, self.guidance, self.width, self.height
        );
        if self.texts.clip_skip > 0 {
            // A1111 counts the layers from the end, the last one as 1.
            line += &format!(", Clip skip: {}", self.texts.clip_skip + 1);
        }
        let usual = [
            ("parameters", line),
            ("prompt", self.prompt.clone()),
            ("negative_prompt", self.negative_prompt.clone()),
            ("scheduler", self.sampler.to_string()),
            ("steps", self.steps.to_string()),
            ("guidance_scale", self.guidance.to_string()),
            ("seed", seed_text),
            ("timestep_spacing", self.spacing.map_or("the sampler's", |s| s.name()).to_string()),
            ("karras_sigmas", self.karras.map_or("the sampler's".to_string(), |k| k.to_string())),
            ("model", model.to_string()),
            ("adapters", adapters.to_string()),
            ("software", format!("hra {}", env!("CARGO_PKG_VERSION"))),
        ];
        let all = usual.into_iter().chain(self.unusual());
        all.map(|(key, value)| (key.to_string(), value)).collect()
    }

    /// Entries of what most pictures are drawn without.
    fn unusual(&self) -> Vec<(&'static str, String)> {
        let texts = &self.texts;
        let set = |is_set: bool, value: &dyn Fn() -> String| is_set.then(value);
        let mut all: Vec<(&str, String)> = [
            ("prompt_2", texts.prompt_2.clone()),
            ("negative_prompt_2", texts.negative_prompt_2.clone()),
            ("clip_skip", set(texts.clip_skip > 0, &|| texts.clip_skip.to_string())),
            ("guidance_rescale", set(self.guidance_rescale > 0.0, &|| self.guidance_rescale.to_string())),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect();
        all.extend(self.sizes.to_text());
        all
    }
}

/// An empty second text is none, as in diffusers.
fn both<'a>(first: &'a str, second: Option<&'a str>) -> PromptTexts<'a> {
    PromptTexts { first, second: second.filter(|text| !text.is_empty()).unwrap_or(first) }
}
