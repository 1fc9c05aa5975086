//! The pictures that scores are computed from: every picture from a seed of its own, the same for all methods.

use crate::attach;
use crate::attach::loaded::LoadedAdapter;
use crate::data::image::{RgbImage, png};
use crate::diffusion::sample::{Request, SampleSettings, Session, Steering, Strength, conditions};
use crate::diffusion::sampler::SamplerKind;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::Result;
use crate::lab::results;
use crate::model::control::{CONTROL_ENCODER, ConditionEncoder, Control};
use crate::platform::device::{self, Compute};
use crate::platform::files;
use crate::platform::observer::Observer;
use crate::train::base;
use crate::train::config::{MethodName, TrainConfig};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What says in a folder of pictures how they were drawn.
pub(super) const MANIFEST_FILE: &str = "drawn.json";

/// How pictures are drawn, whatever the prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Of the first picture of each prompt.
    pub seed: u64,
    /// The model's, where it is `None`.
    pub scheduler: Option<SamplerKind>,
    /// Sampling steps.
    pub steps: usize,
    /// Classifier-free guidance.
    pub guidance: f64,
    /// How conditions steer.
    pub control: Strength,
}

/// What the pictures of a folder depend on beside the network that drew them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SetDrawing {
    /// Sampler, steps, guidance and first seed.
    pub sampling: Sampling,
    /// The base model's fingerprint.
    pub model: String,
    /// Side of a picture in pixels.
    pub resolution: u32,
    /// Pictures drawn at once: part of what they are, to the last bit.
    pub batch: usize,
    /// In the order of the files.
    pub prompts: Vec<String>,
    /// Pictures for each prompt.
    pub num_images: usize,
    /// Where each prompt is the caption of a pair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pairs: Option<DrawnPairing>,
}

/// What the pictures of pairs depend on beside their captions. A pair's noise belongs to its number, and is the same for its
/// pictures: the first is drawn with its own condition, the second with another pair's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DrawnPairing {
    /// Identity of the conditions.
    pub conditions: String,
    /// For each pair the number of the one whose condition the second picture is drawn with.
    pub shuffled: Vec<usize>,
}

/// Loads the base model of a training, to draw with.
pub fn open(config: &TrainConfig, compute: &Compute, observer: &dyn Observer) -> Result<Session> {
    let asked = base::request(&config.model, observer)?;
    let mut model = StableDiffusion::open(&asked, compute.numbers, compute.device)?;
    model.expect_text_to_image()?;
    device::set_threads(config.threads, attach::weight_count(&mut model.unet))?;
    Session::open(model, Vec::new(), None)
}

/// Puts what was trained into `adapter` on the model at a scale (0 is the base model, 1 as trained), in place of what was on
/// it before.
pub fn put_on(session: &mut Session, config: &TrainConfig, adapter: &Path, scale: f64) -> Result<()> {
    // A control encoder may have been trained alone.
    if config.adapter.method == MethodName::NONE {
        session.take_off()?;
    } else {
        let loaded = LoadedAdapter::read(adapter, session.layer_names()?)?;
        session.put_on(vec![(loaded, scale)])?;
    }
    if config.is_control() {
        let device = session.model().device();
        let (encoder, _) = ConditionEncoder::load(&adapter.join(CONTROL_ENCODER), device)?;
        session.set_control(Some(Control::Encoder(encoder)));
    }
    Ok(())
}

/// Name of a picture in its folder.
pub fn file_name(prompt: usize, picture: usize) -> String {
    format!("{prompt:02}-{picture:02}.png")
}

impl SetDrawing {
    /// Seeds of the pictures of a prompt.
    pub fn seeds(&self, prompt: usize) -> Vec<u64> {
        let first = self.sampling.seed;
        match self.pairs {
            Some(_) => vec![first.wrapping_add(prompt as u64); self.num_images],
            None => (0..self.num_images as u64).map(|i| first.wrapping_add(i)).collect(),
        }
    }

    /// Whether every picture is in `folder`, drawn in this way.
    pub fn is_done(&self, folder: &Path) -> bool {
        self.is_the_same(folder) && (0..self.prompts.len()).all(|prompt| self.has_prompt(folder, prompt))
    }

    /// Pictures that [`Self::draw`] draws into `folder`, whatever the model and the resolution are, which are not looked at.
    pub fn undrawn(&self, folder: &Path) -> usize {
        let as_found =
            |found: Self| Self { model: found.model, resolution: found.resolution, ..self.clone() };
        let found = results::read_json::<Self>(&folder.join(MANIFEST_FILE)).ok();
        let is_the_same = found.is_some_and(|found| as_found(found.clone()) == found);
        let lacking = |prompt: &usize| !is_the_same || !self.has_prompt(folder, *prompt);
        self.num_images * (0..self.prompts.len()).filter(lacking).count()
    }

    /// Draws the pictures that are missing. A folder drawn in another way is drawn anew. A prompt whose pictures are not all
    /// there is drawn whole, so that an interrupted drawing ends in the same pictures.
    ///
    /// `by` is what the pictures say of the adapter. `shown` are the conditions of all pairs, which a control encoder sees.
    /// Errors: an interrupt, latents that are not finite.
    pub fn draw(
        &self,
        session: &mut Session,
        shown: &[RgbImage],
        by: &str,
        folder: &Path,
        observer: &dyn Observer,
    ) -> Result<()> {
        if folder.is_dir() && !self.is_the_same(folder) {
            files::remove_dir_all(folder)?;
        }
        files::create_dir_all(folder)?;
        results::write_json(&folder.join(MANIFEST_FILE), self)?;
        for (p, prompt) in self.prompts.iter().enumerate() {
            if self.has_prompt(folder, p) {
                continue;
            }
            let s = &self.sampling;
            let settings = {
                let model = session.model();
                SampleSettings::square(model, prompt, s.scheduler, s.steps, s.guidance, self.resolution)?
            };
            let seeds = self.seeds(p);
            let mut request = Request::new(&settings, &seeds, self.batch);
            request.steering = if session.has_control() { self.steering(shown, p) } else { None };
            let pictures = session.draw(&request, observer)?;
            for (i, picture) in pictures.iter().enumerate() {
                let text = settings.to_text(Some(seeds[i]), &session.model().name(), by);
                png::save_png(&folder.join(file_name(p, i)), &picture.image, &text)?;
            }
        }
        Ok(())
    }

    fn steering(&self, shown: &[RgbImage], prompt: usize) -> Option<Steering> {
        let pairs = self.pairs.as_ref()?;
        let own = std::iter::once(prompt).chain(pairs.shuffled.get(prompt).copied());
        let pictures: Vec<&RgbImage> = own.take(self.num_images).map(|pair| &shown[pair]).collect();
        let side = i64::from(self.resolution);
        let conditions = conditions(&pictures, side, side);
        Some(Steering { conditions, strength: self.sampling.control })
    }

    fn is_the_same(&self, folder: &Path) -> bool {
        results::read_json::<Self>(&folder.join(MANIFEST_FILE)).is_ok_and(|found| found == *self)
    }

    fn has_prompt(&self, folder: &Path, prompt: usize) -> bool {
        (0..self.num_images).all(|i| folder.join(file_name(prompt, i)).is_file())
    }
}
