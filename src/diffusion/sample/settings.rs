//! What a set of pictures is drawn from, beside noise.

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
    /// In pixels.
    pub width: i64,
    /// In pixels.
    pub height: i64,
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
            width: size,
            height: size,
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
        Ok(())
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
        [
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
        ]
        .into_iter()
        .map(|(key, value)| (key.to_string(), value))
        .collect()
    }
}
