//! The variational autoencoder, in f32: the `diffusers` crate's, which needs two arrangements to serve us.
//!
//! Its `encode` hides mean and log-variance and only draws samples. So it is built with twice the latent channels: the
//! file's weights give (mean, log-variance) as the *mean* of that wider distribution, whose own log-variance is held at
//! -200 by a bias, so a draw from it is its mean to the last bit. The decoder's extra inputs have weight zero. One
//! instance serves both directions, and decoding pads the latents with zeros.

use crate::error::{Error, Result};
use crate::platform::host;
use crate::platform::random;
use crate::weights::config::VaeConfig;
use crate::weights::part::Part;
use crate::weights::scope::Weights;
use crate::weights::source::Source;
use crate::weights::tensors::current_vae_name;
use diffusers::models::vae::{AutoEncoderKL, AutoEncoderKLConfig};
use tch::{Device, Kind, Tensor, nn};

/// Log-variance of the outer distribution: its standard deviation, exp(-100), vanishes beside any f32 number.
const NO_VARIANCE: f64 = -200.0;

/// Pictures to latents and back.
pub struct Vae {
    inner: AutoEncoderKL,
    config: VaeConfig,
    device: Device,
}

impl Vae {
    /// Loads the VAE of `source`. The second value names tensors of the file that the network lacks.
    pub fn load(source: &Source, device: Device) -> Result<(Self, Vec<String>)> {
        let config = VaeConfig::parse(&source.text("vae/config.json")?)?;
        let weights = Weights::open(source, Part::Vae, Kind::Float, device)?;
        // The crate allocates before we can look, so a config that the file does not bear out is refused first.
        let blocks = config.block_out_channels.iter().enumerate();
        for ((level, &channels), block) in
            blocks.flat_map(|level| (0..config.layers_per_block).map(move |block| (level, block)))
        {
            let name = format!("encoder.down_blocks.{level}.resnets.{block}.conv2.weight");
            let expected = [channels, channels, 3, 3];
            if weights.shape(&name).is_none_or(|found| found != expected) {
                let _ = weights.root().tensor(&name, &expected);
                return Err(weights
                    .finish()
                    .err()
                    .unwrap_or_else(|| Error::format(source.path(), "the VAE's weights do not fit")));
            }
        }
        let mut store = nn::VarStore::new(device);
        let z = config.latent_channels;
        let sizes = AutoEncoderKLConfig {
            block_out_channels: config.block_out_channels.clone(),
            layers_per_block: config.layers_per_block,
            latent_channels: 2 * z,
            norm_num_groups: config.norm_num_groups,
        };
        // The crate draws numbers for its weights, which others drawing meanwhile would miss.
        let (root, channels) = (store.root(), (config.in_channels, config.out_channels));
        let inner = random::seeded(0, |_| AutoEncoderKL::new(root, channels.0, channels.1, sizes));
        store.freeze();
        let _guard = tch::no_grad_guard();
        for (name, mut variable) in store.variables() {
            // The crate spells the attention layers as diffusers did in 2022.
            let current = current_vae_name(&name).unwrap_or(name);
            fill(&mut variable, &current, &weights, z);
        }
        let unused = weights.finish()?;
        Ok((Self { inner, config, device }, unused))
    }

    /// Pictures `(b, 3, h, w)` in [-1, 1] to mean and log-variance, each `(b, z, h/f, w/f)`, without scaling factor.
    pub fn encode(&self, pictures: &Tensor) -> (Tensor, Tensor) {
        let _guard = tch::no_grad_guard();
        let moments =
            self.inner.encode(&host::to_device(pictures, self.device).to_kind(Kind::Float)).sample();
        let halves = moments.chunk(2, 1);
        (halves[0].shallow_clone(), halves[1].clamp(-30.0, 20.0))
    }

    /// Latents `(b, z, h, w)` without scaling factor to pictures `(b, 3, f h, f w)`, about [-1, 1].
    pub fn decode(&self, latents: &Tensor) -> Tensor {
        let _guard = tch::no_grad_guard();
        let latents = host::to_device(latents, self.device).to_kind(Kind::Float);
        self.inner.decode(&Tensor::cat(&[&latents, &latents.zeros_like()], 1))
    }

    /// What latents are multiplied by for the UNet.
    pub fn scaling_factor(&self) -> f64 {
        self.config.scaling_factor
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

/// Copies the file's tensor into the crate's variable, which has more rows or columns for five of the names.
fn fill(variable: &mut Tensor, name: &str, weights: &Weights, z: i64) {
    let mut shape = variable.size();
    match name {
        // outputs (mean, log-variance) only
        "encoder.conv_out.weight" | "encoder.conv_out.bias" => shape[0] = 2 * z,
        "quant_conv.weight" => (shape[0], shape[1]) = (2 * z, 2 * z),
        "quant_conv.bias" => shape[0] = 2 * z,
        "post_quant_conv.weight" => (shape[0], shape[1]) = (z, z),
        "post_quant_conv.bias" => shape[0] = z,
        "decoder.conv_in.weight" => shape[1] = z,
        _ => {}
    }
    let scope = weights.root();
    let tensor = scope.tensor(name, &shape);
    if shape == variable.size() {
        host::copy_into(variable, &tensor);
        return;
    }
    let outer = if name == "quant_conv.bias" { NO_VARIANCE } else { 0.0 };
    let _ = variable.fill_(outer);
    let mut part = variable.narrow(0, 0, shape[0]);
    if shape.len() > 1 {
        part = part.narrow(1, 0, shape[1]);
    }
    host::copy_into(&part, &tensor);
}
