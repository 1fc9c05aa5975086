//! Pictures to latents and back: one interface, and two networks behind it.
//!
//! The `diffusers` crate's ([`of_crate`]) serves where it can: in f32, with the convolutions around the latents and the attention in
//! the middle. Ours ([`network`]) serves elsewhere, and is equal on what both can.

mod autoencoder;
mod network;
mod of_crate;

use crate::error::{Error, Result};
use crate::model::layers::{Layers, Module};
use crate::platform::host;
use crate::platform::precision::Numbers;
use crate::weights::config::VaeConfig;
use crate::weights::part::Part;
use crate::weights::scope::Weights;
use crate::weights::source::Source;
use autoencoder::Autoencoder;
use network::Network;
use of_crate::OfCrate;
use tch::{Device, Kind, Tensor};

/// Between a VAE's latents and those that a UNet sees: `(z - shift) * factor / deviation`.
pub struct LatentScaling {
    factor: f64,
    /// `(1, z, 1, 1)`, or one for all channels.
    shift: Option<Tensor>,
    /// `(1, z, 1, 1)`
    deviation: Option<Tensor>,
}

impl LatentScaling {
    /// As the VAE's config says: diffusers' pipelines of Stable Diffusion XL use `latents_mean` and `latents_std`, those of later models
    /// `shift_factor`.
    fn new(config: &VaeConfig, device: Device) -> Self {
        let by_channel = |values: &[f64]| {
            let values = host::tensor(values).to_kind(Kind::Float);
            host::to_device(&values.view([1, -1, 1, 1]), device)
        };
        let mean = config.latents_mean.as_deref().map(by_channel);
        let one = || config.shift_factor.filter(|shift| *shift != 0.0).map(|shift| by_channel(&[shift]));
        Self {
            factor: config.scaling_factor,
            shift: mean.or_else(one),
            deviation: config.latents_std.as_deref().map(by_channel),
        }
    }

    /// Latents `(b, z, h, w)` of [`Vae::encode`] as the UNet sees them.
    pub fn to_unet(&self, latents: &Tensor) -> Tensor {
        let shifted = self.shift.as_ref().map_or_else(|| latents.shallow_clone(), |shift| latents - shift);
        let scaled = shifted * self.factor;
        self.deviation.as_ref().map_or_else(|| scaled.shallow_clone(), |deviation| &scaled / deviation)
    }

    /// Latents of the UNet for [`Vae::decode`]: the inverse of [`Self::to_unet`].
    pub fn from_unet(&self, latents: &Tensor) -> Tensor {
        let widened = self.deviation.as_ref().map_or_else(|| latents.shallow_clone(), |d| latents * d);
        let scaled = widened / self.factor;
        self.shift.as_ref().map_or_else(|| scaled.shallow_clone(), |shift| &scaled + shift)
    }

    /// The same tensors.
    pub fn shallow_clone(&self) -> Self {
        let same = |tensor: &Option<Tensor>| tensor.as_ref().map(Tensor::shallow_clone);
        Self { factor: self.factor, shift: same(&self.shift), deviation: same(&self.deviation) }
    }
}

/// Pictures to latents and back.
pub struct Vae {
    network: Box<dyn Autoencoder>,
    config: VaeConfig,
    scaling: LatentScaling,
    is_ours: bool,
    /// Whether f16 was asked for, and it computes in f32.
    is_raised: bool,
    device: Device,
}

impl Vae {
    /// Loads the VAE of `source` in f32. The second value names tensors of the file that the network lacks.
    pub fn load(source: &Source, device: Device) -> Result<(Self, Vec<String>)> {
        Self::load_in(source, Kind::Float, device)
    }

    /// As [`Self::load`], in the format that the model's user asks for; f16 computes in f32 where the config asks for that, as
    /// diffusers' pipelines of Stable Diffusion XL do.
    pub fn load_as_asked(source: &Source, device: Device) -> Result<(Self, Vec<String>)> {
        let asked = source.vae_dtype();
        let mut numbers = Numbers::on(device, asked);
        let is_raised = numbers.compute == Kind::Half && config(source)?.force_upcast;
        if is_raised {
            numbers.compute = Kind::Float;
        }
        let (mut vae, unused) = Self::load_in(source, numbers, device)?;
        vae.is_raised = is_raised;
        Ok((vae, unused))
    }

    /// What a user should know of its numbers.
    pub fn note(&self) -> Option<String> {
        self.is_raised.then(|| "the VAE computes in f32, as its config asks (force_upcast)".to_string())
    }

    /// As [`Self::load`], with other numbers.
    pub fn load_in(
        source: &Source,
        numbers: impl Into<Numbers>,
        device: Device,
    ) -> Result<(Self, Vec<String>)> {
        let (config, numbers) = (config(source)?, numbers.into());
        if !config.is_usual() || numbers != Kind::Float.into() {
            return Self::load_ours(source, numbers, device);
        }
        let weights = Weights::open(source, Part::Vae, numbers, device)?;
        let (network, unused) = OfCrate::load(weights, &config, source.path(), device)?;
        Ok((Self::new(Box::new(network), config, false, device), unused))
    }

    /// As [`Self::load_in`], with our own network wherever it could be the crate's: it can carry adapters.
    pub fn load_ours(
        source: &Source,
        numbers: impl Into<Numbers>,
        device: Device,
    ) -> Result<(Self, Vec<String>)> {
        let config = config(source)?;
        let weights = Weights::open(source, Part::Vae, numbers.into(), device)?;
        let network = Network::new(&weights.root(), &config);
        let unused = weights.finish()?;
        let switched_off = |name: &&String| {
            name.starts_with("quant_conv.")
                || name.starts_with("post_quant_conv.")
                || name.contains(".mid_block.attentions.")
        };
        if let Some(name) = unused.iter().find(switched_off) {
            let problem = format!("the VAE's config says that it has no `{name}`, but its weights have it");
            return Err(Error::format(source.path(), problem)
                .with_hint("vae/config.json: use_quant_conv, use_post_quant_conv and mid_block_add_attention say what there is"));
        }
        Ok((Self::new(Box::new(network), config, true, device), unused))
    }

    fn new(network: Box<dyn Autoencoder>, config: VaeConfig, is_ours: bool, device: Device) -> Self {
        let scaling = LatentScaling::new(&config, device);
        Self { network, config, scaling, is_ours, is_raised: false, device }
    }

    /// Pictures `(b, 3, h, w)` in [-1, 1] to mean and log-variance, each `(b, z, h/f, w/f)`, as the network gives them.
    pub fn encode(&self, pictures: &Tensor) -> (Tensor, Tensor) {
        let _guard = tch::no_grad_guard();
        let pictures = host::to_device(pictures, self.device).to_kind(Kind::Float);
        let halves = self.network.moments(&pictures).chunk(2, 1);
        (halves[0].shallow_clone(), halves[1].clamp(-30.0, 20.0))
    }

    /// Latents `(b, z, h, w)` as [`Self::encode`] gives them to pictures `(b, 3, f h, f w)`, about [-1, 1].
    pub fn decode(&self, latents: &Tensor) -> Tensor {
        let _guard = tch::no_grad_guard();
        self.network.decode(&host::to_device(latents, self.device).to_kind(Kind::Float))
    }

    /// How latents are changed for the UNet.
    pub fn scaling(&self) -> &LatentScaling {
        &self.scaling
    }

    /// Whether our own network serves, and not the crate's.
    pub fn is_ours(&self) -> bool {
        self.is_ours
    }

    /// Pixels along one edge of a latent.
    pub fn factor(&self) -> i64 {
        self.config.factor()
    }

    /// Channels of a latent.
    pub fn latent_channels(&self) -> i64 {
        self.config.latent_channels
    }
}

impl Layers for Vae {
    /// None where the crate's network serves.
    fn modules_mut(&mut self) -> Vec<Module<'_>> {
        self.network.modules_mut()
    }
}

fn config(source: &Source) -> Result<VaeConfig> {
    VaeConfig::parse(&source.text("vae/config.json")?)
}
