//! How a condition steers a drawing: which control, how strongly, in which steps and passes.

use crate::data::image::{Filter, RgbImage, resize, tensor};
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::model::control::{Control, Passes};
use crate::model::{Call, Signals};
use crate::platform::host;
use tch::{Device, Tensor};

/// The conditions of the pictures that are drawn.
pub struct Steering {
    /// `(b, 3, height, width)` in [0, 1], f32: one for each picture, or one for all.
    pub conditions: Tensor,
    /// How strongly and where.
    pub strength: Strength,
}

/// How strongly a condition steers, and where.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Strength {
    /// What the control adds is multiplied by this.
    pub scale: f64,
    /// Share of the steps after which it begins.
    pub start: f64,
    /// Share of the steps after which it ends.
    pub end: f64,
    /// Which of guidance's passes see it.
    pub passes: Passes,
}

impl Default for Strength {
    fn default() -> Self {
        Self { scale: 1.0, start: 0.0, end: 1.0, passes: Passes::Both }
    }
}

impl Strength {
    /// Refuses numbers that mean nothing.
    pub fn validate(&self) -> Result<()> {
        // libtorch panics at factors that f32 does not hold.
        if !(-1e6..=1e6).contains(&self.scale) {
            let found = self.scale;
            return Err(Error::config(format!(
                "--control-scale: expected a number up to 1e6, found {found}"
            )));
        }
        let (start, end) = (self.start, self.end);
        if !(0.0..=1.0).contains(&start) || !(0.0..=1.0).contains(&end) || start >= end {
            return Err(Error::config(format!(
                "--control-start and --control-end: expected shares of the steps, 0 to 1, the first below the second, found \
                 {start} and {end}"
            )));
        }
        Ok(())
    }

    /// Whether model call `i` of `n` is steered, as diffusers decides it.
    fn covers(&self, i: usize, n: usize) -> bool {
        let share = |i: usize| i as f64 / n as f64;
        share(i) >= self.start && share(i + 1) <= self.end
    }
}

/// Pictures as conditions `(b, 3, height, width)` in [0, 1] on the CPU, resized where their size is another, as diffusers does.
pub fn conditions(pictures: &[&RgbImage], width: i64, height: i64) -> Tensor {
    let rows: Vec<Tensor> = pictures.iter().map(|picture| condition(picture, width, height)).collect();
    Tensor::cat(&rows, 0)
}

fn condition(picture: &RgbImage, width: i64, height: i64) -> Tensor {
    let (w, h) = (width as u32, height as u32);
    if picture.dimensions() != (w, h) {
        return condition(&resize(picture, w, h, Filter::Lanczos), width, height);
    }
    tensor::unit(picture)
}

/// Steers the model calls of one batch.
pub(super) struct Steered<'a> {
    control: &'a Control,
    strength: Strength,
    features: Tensor,
    calls: usize,
    /// Calls made.
    done: usize,
}

impl<'a> Steered<'a> {
    /// For pictures `start..start + length`, which take `calls` model calls.
    pub(super) fn new(
        control: &'a Control,
        steering: &Steering,
        (start, length): (i64, i64),
        calls: usize,
        device: Device,
    ) -> Self {
        let all = &steering.conditions;
        // Moved before it is repeated: memory that several entries share cannot be page-locked.
        let own = if all.size()[0] == 1 {
            host::to_device(all, device).expand([length, -1, -1, -1], false)
        } else {
            host::to_device(&all.narrow(0, start, length), device)
        };
        let features = control.features(&own);
        Self { control, strength: steering.strength, features, calls, done: 0 }
    }

    /// What is added to the next call.
    pub(super) fn next(&mut self, call: Call) -> Signals {
        let covered = self.strength.covers(self.done, self.calls);
        self.done += 1;
        if !covered || self.strength.scale == 0.0 {
            return Signals::default();
        }
        let Strength { scale, passes, .. } = self.strength;
        self.control.signals(&self.features, scale, passes, call)
    }
}

impl Steering {
    /// Refuses a control of another model, and numbers that mean nothing.
    pub(super) fn validate(&self, control: &Control, model: &StableDiffusion) -> Result<()> {
        self.strength.validate()?;
        match control.misfit(&model.unet, model.vae.factor()) {
            Some(problem) => Err(Error::config(format!("control: {problem}"))),
            None => Ok(()),
        }
    }
}
