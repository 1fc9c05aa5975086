//! Pictures to latents and back: one interface, and two networks behind it.
//!
//! The `diffusers` crate's ([`of_crate`]) serves where it can: in f32, with the convolutions around the latents and the attention in
//! the middle. Ours ([`network`]) serves elsewhere, and is equal on what both can.

mod autoencoder;
mod network;
mod of_crate;

use crate::error::Result;
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
    shift: Tensor,
    /// As [`Self::shift`].
    deviation: Tensor,
}

impl LatentScaling {
    /// As the VAE's config says: diffusers' pipelines of Stable Diffusion XL use `latents_mean` and `latents_std`, those of later models
    /// `shift_factor`.
    fn new(config: &VaeConfig, device: Device) -> Self {
        let by_channel = |values: Option<&Vec<f64>>, for_all: f64| {
            let values = host::tensor(values.map_or(&[for_all][..], Vec::as_slice)).to_kind(Kind::Float);
            host::to_device(&values.view([1, -1, 1, 1]), device)
        };
        Self {
            factor: config.scaling_factor,
            shift: by_channel(config.latents_mean.as_ref(), config.shift_factor.unwrap_or(0.0)),
            deviation: by_channel(config.latents_std.as_ref(), 1.0),
        }
    }

    /// Latents `(b, z, h, w)` of [`Vae::encode`] as the UNet sees them.
    pub fn to_unet(&self, latents: &Tensor) -> Tensor {
        (latents - &self.shift) * self.factor / &self.deviation
    }

    /// Latents of the UNet for [`Vae::decode`]: the inverse of [`Self::to_unet`].
    pub fn from_unet(&self, latents: &Tensor) -> Tensor {
        latents * &self.deviation / self.factor + &self.shift
    }

    /// The same tensors.
    pub fn shallow_clone(&self) -> Self {
        let [shift, deviation] = [&self.shift, &self.deviation].map(Tensor::shallow_clone);
        Self { factor: self.factor, shift, deviation }
    }
}

/// Pictures to latents and back.
pub struct Vae {
    /// None after [`Vae::release`].
    network: Option<Box<dyn Autoencoder>>,
    numbers: Numbers,
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
        Self::load_in(source, config(source)?, Kind::Float.into(), device)
    }

    /// As [`Self::load`], in the format that the model's user asks for; f16 computes in f32 where the config asks for that, as
    /// diffusers' pipelines of Stable Diffusion XL do.
    pub fn load_as_asked(source: &Source, device: Device) -> Result<(Self, Vec<String>)> {
        let (config, mut numbers) = (config(source)?, Numbers::on(device, source.vae_dtype()));
        let is_raised = numbers.compute == Kind::Half && config.force_upcast;
        if is_raised {
            numbers.compute = Kind::Float;
        }
        let (vae, unused) = Self::load_in(source, config, numbers, device)?;
        Ok((Self { is_raised, ..vae }, unused))
    }

    /// What a user should know of its numbers.
    pub fn note(&self) -> Option<String> {
        self.is_raised.then(|| "the VAE computes in f32, as its config asks (force_upcast)".to_string())
    }

    /// As [`Self::load`], with our own network and other numbers: it can carry adapters.
    pub fn load_ours(
        source: &Source,
        numbers: impl Into<Numbers>,
        device: Device,
    ) -> Result<(Self, Vec<String>)> {
        Self::load_with(source, config(source)?, numbers.into(), true, device)
    }

    /// With the network that serves.
    fn load_in(
        source: &Source,
        config: VaeConfig,
        numbers: Numbers,
        device: Device,
    ) -> Result<(Self, Vec<String>)> {
        let is_ours = !config.is_usual() || numbers != Kind::Float.into();
        Self::load_with(source, config, numbers, is_ours, device)
    }

    fn load_with(
        source: &Source,
        config: VaeConfig,
        numbers: Numbers,
        is_ours: bool,
        device: Device,
    ) -> Result<(Self, Vec<String>)> {
        let scaling = LatentScaling::new(&config, device);
        let mut vae = Self { network: None, numbers, config, scaling, is_ours, is_raised: false, device };
        let unused = vae.load_network(source)?;
        Ok((vae, unused))
    }

    /// The network that serves; the answer names tensors of the file that it lacks.
    fn load_network(&mut self, source: &Source) -> Result<Vec<String>> {
        let weights = Weights::open(source, Part::Vae, self.numbers, self.device)?;
        let (network, unused): (Box<dyn Autoencoder>, _) = if self.is_ours {
            let (network, unused) = Network::load(weights, &self.config, source.path())?;
            (Box::new(network), unused)
        } else {
            let (network, unused) = OfCrate::load(weights, &self.config, source.path(), self.device)?;
            (Box::new(network), unused)
        };
        self.network = Some(network);
        Ok(unused)
    }

    /// Lets the weights go. Until [`Self::bring_back`] nothing can be encoded or decoded; what latents are stays known.
    pub fn release(&mut self) {
        self.network = None;
        host::give_memory_back();
    }

    /// Loads weights that were let go, of the same source and as they were: without what was put on them.
    pub fn bring_back(&mut self, source: &Source) -> Result<()> {
        if self.network.is_none() {
            let _guard = tch::no_grad_guard();
            self.load_network(source)?;
        }
        Ok(())
    }

    /// Whether its weights are there.
    pub fn is_there(&self) -> bool {
        self.network.is_some()
    }

    fn network(&self) -> &dyn Autoencoder {
        self.network.as_deref().expect("a VAE that was let go is brought back before it is used")
    }

    /// Pictures `(b, 3, h, w)` in [-1, 1] to mean and log-variance, each `(b, z, h/f, w/f)`, as the network gives them.
    pub fn encode(&self, pictures: &Tensor) -> (Tensor, Tensor) {
        let _guard = tch::no_grad_guard();
        let pictures = host::to_device(pictures, self.device).to_kind(Kind::Float);
        let halves = self.network().moments(&pictures).chunk(2, 1);
        (halves[0].shallow_clone(), halves[1].clamp(-30.0, 20.0))
    }

    /// Latents `(b, z, h, w)` as [`Self::encode`] gives them to pictures `(b, 3, f h, f w)`, about [-1, 1].
    pub fn decode(&self, latents: &Tensor) -> Tensor {
        let _guard = tch::no_grad_guard();
        self.network().decode(&host::to_device(latents, self.device).to_kind(Kind::Float))
    }

    /// How latents are changed for the UNet.
    pub fn scaling(&self) -> &LatentScaling {
        &self.scaling
    }

    /// What its weights rest and it computes in.
    pub fn numbers(&self) -> Numbers {
        self.numbers
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
    /// None where the crate's network serves, or none does.
    fn modules_mut(&mut self) -> Vec<Module<'_>> {
        self.network.as_mut().map_or_else(Vec::new, |network| network.modules_mut())
    }
}

fn config(source: &Source) -> Result<VaeConfig> {
    VaeConfig::parse(&source.text("vae/config.json")?)
}
