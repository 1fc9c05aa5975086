//! What `hra sample` draws from: seeds, or noise that another program made.

use crate::diffusion::sample::{From, Noise, SampleSettings, Session, Start};
use crate::error::{Error, Result};

/// Where the noise comes from.
pub enum NoiseSource {
    /// Seeds of the pictures of a prompt.
    Seeds(Vec<u64>),
    /// The same noise for each prompt.
    Given(Noise),
}

impl NoiseSource {
    /// `given` noise, else `count` seeds from `first` on.
    pub fn new(count: usize, first: u64, given: Option<Noise>) -> Self {
        let seeds = || (0..count as u64).map(|i| first.wrapping_add(i)).collect();
        given.map_or_else(|| Self::Seeds(seeds()), Self::Given)
    }

    /// Refuses noise that does not fit, and adds that of the steps where a sampler takes it and none is given.
    pub fn check(
        &mut self,
        asked: (Option<usize>, u64),
        session: &mut Session,
        settings: &SampleSettings,
        start: Option<&Start>,
    ) -> Result<()> {
        let Self::Given(noise) = self else { return Ok(()) };
        let (expected, found) = (settings.latent_shape(session.model()), noise.latents.size());
        if found[1..] != expected[1..] {
            return Err(Error::config(format!(
                "--latents: expected (b, {}, {}, {}) for this model at {}x{} pixels, found {found:?}",
                expected[1], expected[2], expected[3], settings.width, settings.height
            )));
        }
        let (count, seed) = asked;
        if count.is_some_and(|n| n as i64 != found[0]) {
            return Err(Error::config(format!(
                "--num-images: --latents holds {} pictures; leave it out",
                found[0]
            )));
        }
        let needed = session.plan(settings, start)?.noise_steps();
        if needed > 0 && noise.steps.dim() != 5 {
            // Without the noise of each step, picture i takes it from seed + i as it would without --latents.
            let seeds: Vec<u64> = (0..found[0] as u64).map(|i| seed.wrapping_add(i)).collect();
            noise.steps = session.noise(&seeds, settings, start)?.steps;
        } else if needed > 0 && noise.steps.size()[0] < needed as i64 {
            let found = noise.steps.size()[0];
            return Err(Error::config(format!(
                "--step-noise: expected noise for {needed} steps, found {found}"
            )));
        }
        Ok(())
    }

    /// Number of pictures of a prompt.
    pub fn count(&self) -> usize {
        match self {
            Self::Seeds(seeds) => seeds.len(),
            Self::Given(noise) => noise.latents.size()[0] as usize,
        }
    }

    /// As a request has it.
    pub fn from(&self) -> From<'_> {
        match self {
            Self::Seeds(seeds) => From::Seeds(seeds),
            Self::Given(noise) => From::Noise(noise),
        }
    }

    /// What the contact sheet calls the pictures.
    pub fn labels(&self) -> Vec<String> {
        match self {
            Self::Seeds(seeds) => seeds.iter().map(|seed| format!("seed {seed}")).collect(),
            Self::Given(_) => (0..self.count()).map(|i| format!("latents {i}")).collect(),
        }
    }
}
