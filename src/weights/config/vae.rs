//! `vae/config.json`.

use crate::error::{Error, Result};
use crate::weights::bounds::{MAX_FACTOR, MAX_WIDTH, is_factor};
use crate::weights::config::{MAX_LEVELS, parse_json};
use crate::weights::part::Text;
use serde::Deserialize;

/// `vae/config.json`.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    pub in_channels: i64,
    pub out_channels: i64,
    pub block_out_channels: Vec<i64>,
    pub down_block_types: Option<Vec<String>>,
    pub up_block_types: Option<Vec<String>>,
    pub layers_per_block: i64,
    pub latent_channels: i64,
    pub norm_num_groups: i64,
    pub scaling_factor: f64,
    pub shift_factor: Option<f64>,
    pub act_fn: String,
    pub use_quant_conv: bool,
    pub use_post_quant_conv: bool,
    pub mid_block_add_attention: bool,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            block_out_channels: vec![64],
            down_block_types: None,
            up_block_types: None,
            layers_per_block: 1,
            latent_channels: 4,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            act_fn: "silu".into(),
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl VaeConfig {
    /// Parses and checks `vae/config.json`: the crate's VAE has one architecture, other ones are refused.
    pub fn parse(text: &Text) -> Result<Self> {
        let config: Self = parse_json(text)?;
        let levels = config.block_out_channels.len();
        let mut problems = Vec::new();
        if levels == 0 || levels > MAX_LEVELS {
            problems.push(format!("block_out_channels: expected 1 to {MAX_LEVELS} numbers, found {levels}"));
        }
        for c in &config.block_out_channels {
            let divides = config.norm_num_groups > 0 && c % config.norm_num_groups == 0;
            if !(1..=MAX_WIDTH).contains(c) || !divides {
                problems
                    .push(format!("{c} channels do not divide into {} norm groups", config.norm_num_groups));
            }
        }
        for (types, plain) in
            [(&config.down_block_types, "DownEncoderBlock2D"), (&config.up_block_types, "UpDecoderBlock2D")]
        {
            if let Some(types) = types
                && (types.len() != levels || types.iter().any(|t| t != plain))
            {
                problems.push(format!("expected {levels} blocks of type {plain}, found {types:?}"));
            }
        }
        if config.in_channels != 3 || config.out_channels != 3 {
            problems.push("expected a VAE of RGB pictures (3 channels)".into());
        }
        if !(1..=64).contains(&config.layers_per_block) || !(1..=256).contains(&config.latent_channels) {
            problems.push("layers_per_block or latent_channels is out of range".into());
        }
        if !is_factor(config.scaling_factor) || config.scaling_factor <= 0.0 {
            let found = config.scaling_factor;
            problems.push(format!(
                "scaling_factor: expected a positive number up to {MAX_FACTOR:e}, found {found:e}"
            ));
        }
        let usual = config.act_fn == "silu"
            && config.use_quant_conv
            && config.use_post_quant_conv
            && config.mid_block_add_attention
            && config.shift_factor.is_none_or(|s| s == 0.0);
        if !usual {
            problems.push(
                "not the VAE of Stable Diffusion 1.x or 2.x (activation, quant_conv, shift_factor)".into(),
            );
        }
        if problems.is_empty() { Ok(config) } else { Err(Error::format(&text.path, problems.join("\n"))) }
    }

    /// Pixels along one edge of a latent.
    pub fn factor(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }
}
