//! Training: [`prepare`] makes what a run needs, by parts; [`trainer`] is the loop: batch, loss, gradient, step, record, save.

pub mod base;
mod batches;
pub mod checkpoint;
mod class_images;
pub mod config;
mod fit;
pub mod loss;
pub mod loss_scale;
pub mod optim;
mod picture_source;
mod pictures;
mod prepare;
mod preview;
mod recent_loss;
pub mod run;
mod setup;
pub mod tensorboard;
mod totals;
mod trainer;

pub use checkpoint::Resume;
pub use class_images::missing as missing_class_images;
pub use trainer::Outcome;

use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::Result;
use crate::platform::observer::Observer;
use crate::train::config::TrainConfig;
use class_images::ClassImages;
use trainer::Trainer;

/// Trains as `config` says, from the start or from a checkpoint of the run in `config.output_dir`.
pub fn train(config: TrainConfig, resume: Option<&Resume>, observer: &dyn Observer) -> Result<Outcome> {
    Trainer::new(prepare::prepare(config, resume, observer)?, observer).run()
}

/// Makes the class pictures that a training as `config` says would begin with, where they are missing; says what was done.
/// `model` is the base model.
pub fn make_class_images(
    model: &StableDiffusion,
    config: &TrainConfig,
    observer: &dyn Observer,
) -> Result<String> {
    let resolution = setup::resolution(config, model)?;
    ClassImages::check(model, config, resolution, &model.fingerprint()?)?.make(model, config, observer)
}
