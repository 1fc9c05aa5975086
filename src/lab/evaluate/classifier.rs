//! A diffusion model as a classifier that was never trained as one (Li et al. 2023, arXiv:2303.16203): of all prompts the one
//! with which it predicts best what was added to a picture names the picture's class.
//!
//! As in the authors' code: timesteps in the middle of equal parts of the schedule, one noise for each, the same for every
//! picture and class (a difference of two classes then is not one of their noise), mean squared error, no guidance.

use crate::diffusion::noise::NoiseSchedule;
use crate::diffusion::picture_sizes::PictureSizes;
use crate::diffusion::stable_diffusion::StableDiffusion;
use crate::error::{Error, Result};
use crate::model::Conditioning;
use crate::platform::observer::Observer;
use crate::platform::{host, random};
use tch::{Kind, Tensor};

/// The classes of a model as it is now: what is put on its text encoder has its say. Another adapter needs another one.
pub struct DiffusionClassifier<'a> {
    model: &'a StableDiffusion,
    schedule: NoiseSchedule,
    /// One for each class, of one row.
    classes: Vec<Conditioning>,
    /// `(n, c, h, w)` f32, on the model's device.
    noise: Tensor,
    /// `(n)` i64, there too.
    timesteps: Tensor,
    /// Rows of one call of the network.
    batch: usize,
}

impl<'a> DiffusionClassifier<'a> {
    /// For pictures whose latents have this shape, `(1, c, h, w)`. The noise is `randn(n, c, h, w)` of `seed`. Errors: a count
    /// that the schedule has no timesteps for.
    pub fn new(
        model: &'a StableDiffusion,
        prompts: &[String],
        (count, seed): (usize, u64),
        latents: &[i64],
        batch: usize,
    ) -> Result<Self> {
        let (device, mut shape) = (model.device(), latents.to_vec());
        shape[0] = count as i64;
        let timesteps = timesteps(model.scheduler.train_timesteps()?, count)?;
        // Each alone, so that what it becomes does not depend on the others.
        let pixels = [2, 3].map(|side| latents[side] * model.vae.factor());
        let class = |prompt: &String| {
            Ok(model.told_sizes(model.encode_prompts(&[prompt])?.0, &[PictureSizes::whole(pixels)]))
        };
        Ok(Self {
            model,
            schedule: NoiseSchedule::new(&model.scheduler, device)?,
            classes: prompts.iter().map(class).collect::<Result<_>>()?,
            noise: host::to_device(&random::normal(seed, &shape), device),
            timesteps: host::to_device(&host::tensor(&timesteps), device),
            batch: batch.max(1),
        })
    }

    /// For each class the mean over timesteps of the mean squared error, f32 up to there. `latents` are scaled, `(1, c, h, w)`.
    ///
    /// Errors: an interrupt, an error that is not a finite number.
    pub fn errors(&self, latents: &Tensor, observer: &dyn Observer) -> Result<Vec<f64>> {
        let _guard = tch::no_grad_guard();
        let count = self.noise.size()[0];
        let latents = host::to_device(latents, self.noise.device()).expand_as(&self.noise);
        let noisy = self.schedule.add_noise(&latents, &self.noise, &self.timesteps);
        let target = self.schedule.target(&latents, &self.noise, &self.timesteps);
        // Every class with every noise: rows of one class are neighbours.
        let rows: Vec<(usize, i64)> =
            (0..self.classes.len()).flat_map(|class| (0..count).map(move |noise| (class, noise))).collect();
        let mut errors = Vec::with_capacity(rows.len());
        for rows in rows.chunks(self.batch) {
            observer.check(|| "stopped while classifying pictures".into())?;
            let noises: Vec<i64> = rows.iter().map(|(_, noise)| *noise).collect();
            let noises = host::to_device(&host::tensor(&noises), self.noise.device());
            let of = |all: &Tensor| all.index_select(0, &noises);
            let conditioning: Vec<&Conditioning> =
                rows.iter().map(|(class, _)| &self.classes[*class]).collect();
            let conditioning = Conditioning::cat(&conditioning);
            let prediction = self.model.denoiser().forward(&of(&noisy), &of(&self.timesteps), &conditioning);
            let error = (prediction - of(&target)).square().flatten(1, -1).mean_dim(1, false, Kind::Float); // [b]
            errors.extend(host::values::<f32>(&error)?.into_iter().map(f64::from));
        }
        if errors.iter().all(|error| error.is_finite()) {
            let mean = |of_class: &[f64]| of_class.iter().sum::<f64>() / of_class.len() as f64;
            return Ok(errors.chunks(count as usize).map(mean).collect());
        }
        Err(Error::not_finite(
            "the model's predictions for a picture of the classifier are not finite numbers",
        ))
    }
}

/// The middles of `count` equal parts of the schedule. Errors: fewer timesteps than that.
fn timesteps(train_timesteps: usize, count: usize) -> Result<Vec<i64>> {
    let part = train_timesteps.checked_div(count).unwrap_or_default();
    if part == 0 {
        return Err(Error::config(format!(
            "classifier: num_noises: expected 1 to {train_timesteps}, the timesteps that the model knows, found {count}"
        )));
    }
    Ok((0..count).map(|i| (part / 2 + i * part) as i64).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Python: `list(range(T // n // 2, T, T // n))[:n]`.
    #[test]
    fn timesteps_are_those_of_the_authors_code() {
        assert_eq!(timesteps(1000, 4).unwrap(), [125, 375, 625, 875]);
        assert_eq!(timesteps(1000, 3).unwrap(), [166, 499, 832]);
        assert_eq!(timesteps(10, 10).unwrap(), (0..10).collect::<Vec<_>>());
        assert!(timesteps(10, 11).unwrap_err().to_string().contains("1 to 10"));
        assert!(timesteps(10, 0).is_err());
    }
}
