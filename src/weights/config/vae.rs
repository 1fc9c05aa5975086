//! `vae/config.json`.

use crate::error::{Error, Result};
use crate::weights::bounds::{MAX_FACTOR, MAX_WIDTH, is_factor};
use crate::weights::config::{MAX_LEVELS, parse_json};
use crate::weights::part::Text;
use serde::Deserialize;

/// What latents of one channel deviate by is far above this; below it f32 has no use for it.
const SMALLEST_DEVIATION: f64 = 1e-6;

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
    /// Taken from every number of a latent before it is scaled.
    pub shift_factor: Option<f64>,
    /// Taken from each channel of a latent in place of the shift, and what it is divided by.
    pub latents_mean: Option<Vec<f64>>,
    pub latents_std: Option<Vec<f64>>,
    /// Whether it needs f32 where the rest computes in f16.
    pub force_upcast: bool,
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
            latents_mean: None,
            latents_std: None,
            force_upcast: false,
            act_fn: "silu".into(),
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl VaeConfig {
    /// Parses and checks `vae/config.json`: diffusers' `AutoencoderKL` of pictures in RGB, other ones are refused.
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
        if config.act_fn != "silu" {
            problems.push(format!("act_fn: expected silu, found {}", config.act_fn));
        }
        problems.extend(config.latent_problems());
        if problems.is_empty() { Ok(config) } else { Err(Error::format(&text.path, problems.join("\n"))) }
    }

    /// What is wrong with the numbers that latents are shifted and divided by.
    fn latent_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Some(shift) = self.shift_factor.filter(|shift| !is_factor(*shift)) {
            problems.push(format!("shift_factor: expected a number up to {MAX_FACTOR:e}, found {shift:e}"));
        }
        let lists = [("latents_mean", &self.latents_mean), ("latents_std", &self.latents_std)];
        for (name, values) in lists.into_iter().filter_map(|(name, values)| Some((name, values.as_ref()?))) {
            let fits =
                |value: &f64| is_factor(*value) && (name == "latents_mean" || *value > SMALLEST_DEVIATION);
            if values.len() as i64 != self.latent_channels || !values.iter().all(fits) {
                problems.push(format!(
                    "{name}: expected {} numbers, one for each channel of a latent{}, found {values:?}",
                    self.latent_channels,
                    if name == "latents_mean" { "" } else { ", positive" },
                ));
            }
        }
        if self.latents_mean.is_some() != self.latents_std.is_some() {
            problems.push("expected both latents_mean and latents_std, or neither".into());
        }
        problems
    }

    /// Whether it has all that the VAE of Stable Diffusion 1.x and 2.x has.
    pub fn is_usual(&self) -> bool {
        self.use_quant_conv && self.use_post_quant_conv && self.mid_block_add_attention
    }

    /// Whether latents are shifted and divided as another's are; the factor alone may differ.
    pub fn shifts_as(&self, other: &Self) -> bool {
        let shift = |config: &Self| config.shift_factor.unwrap_or_default();
        shift(self) == shift(other)
            && self.latents_mean == other.latents_mean
            && self.latents_std == other.latents_std
    }

    /// Pixels along one edge of a latent.
    pub fn factor(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }
}
