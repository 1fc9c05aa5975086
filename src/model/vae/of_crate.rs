//! The `diffusers` crate's autoencoder, in f32, which needs two arrangements to serve us.
//!
//! Its `encode` hides mean and log-variance and only draws samples. So it is built with twice the latent channels: the
//! file's weights give (mean, log-variance) as the *mean* of that wider distribution, whose own log-variance is held at
//! -200 by a bias, so a draw from it is its mean to the last bit. The decoder's extra inputs have weight zero. One
//! instance serves both directions, and decoding pads the latents with zeros.

use super::autoencoder::Autoencoder;
use crate::error::{Error, Result};
use crate::model::layers::Module;
use crate::platform::host;
use crate::platform::random;
use crate::weights::config::VaeConfig;
use crate::weights::scope::Weights;
use crate::weights::tensors::current_vae_name;
use diffusers::models::vae::{AutoEncoderKL, AutoEncoderKLConfig};
use std::path::Path;
use tch::{Device, Tensor, nn};

/// Log-variance of the outer distribution: its standard deviation, exp(-100), vanishes beside any f32 number.
const NO_VARIANCE: f64 = -200.0;

/// The crate's network.
pub struct OfCrate {
    inner: AutoEncoderKL,
}

impl OfCrate {
    /// With weights of f32, of the model at `path`. The second value names tensors of the file that the network lacks.
    pub fn load(
        weights: Weights,
        config: &VaeConfig,
        path: &Path,
        device: Device,
    ) -> Result<(Self, Vec<String>)> {
        // The crate allocates before we can look, so a config that the file does not bear out is refused first.
        let blocks = config.block_out_channels.iter().enumerate();
        for ((level, &channels), block) in
            blocks.flat_map(|level| (0..config.layers_per_block).map(move |block| (level, block)))
        {
            let name = format!("encoder.down_blocks.{level}.resnets.{block}.conv2.weight");
            let expected = [channels, channels, 3, 3];
            if weights.shape(&name).is_none_or(|found| found != expected) {
                let _ = weights.root().tensor(&name, &expected);
                let other = || Error::format(path, "the VAE's weights do not fit");
                return Err(weights.finish().err().unwrap_or_else(other));
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
        Ok((Self { inner }, unused))
    }
}

impl Autoencoder for OfCrate {
    fn moments(&self, pictures: &Tensor) -> Tensor {
        self.inner.encode(pictures).sample()
    }

    fn decode(&self, latents: &Tensor) -> Tensor {
        self.inner.decode(&Tensor::cat(&[latents, &latents.zeros_like()], 1))
    }

    fn modules_mut(&mut self) -> Vec<Module<'_>> {
        Vec::new()
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
