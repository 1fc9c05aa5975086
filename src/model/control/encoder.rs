//! The control encoder: 3x3 convolutions with SiLU between, of stride 2 once for each halving of the VAE, the last one zero at
//! the start (ControlNet's first layers, which OFT and HRA use alone). It sees neither timestep nor text.

use crate::data::image::Thresholds;
use crate::error::{Error, Result};
use crate::model::UNet;
use crate::model::layers::{Layer, Layers, Module};
use crate::platform::{files, host, random, seed};
use crate::weights::scope::{Scope, Weights};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// The control encoder's folder in a run or checkpoint.
pub const CONTROL_ENCODER: &str = "control_encoder";
/// The colours of the classes of its conditions, beside its weights, where label maps are coloured.
pub const PALETTE_FILE: &str = "palette.json";
/// Name of its weight file, and of diffusers' ControlNets', without ending.
pub const FILE_STEM: &str = "diffusion_pytorch_model";

/// The folder of the control encoder that the run or checkpoint at `path` has.
pub fn encoder_of(path: &Path) -> Option<PathBuf> {
    Some(path.join(CONTROL_ENCODER)).filter(|dir| dir.join("config.json").is_file())
}

/// Its class in diffusers, whose parameter names are ours.
const CLASS: &str = "ControlNetConditioningEmbedding";
/// Widths before each halving; the last one is kept beyond.
const CHANNELS: [i64; 4] = [16, 32, 96, 256];
const MAX_HALVINGS: usize = 6;
const MAX_CHANNELS: i64 = 1 << 12;

/// `config.json` of a control encoder: diffusers' arguments, and what the conditions are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EncoderConfig {
    /// Which class of diffusers has these parameters.
    #[serde(rename = "_class_name")]
    pub class_name: String,
    /// Channels of a condition: 3.
    pub conditioning_channels: i64,
    /// Widths, one more than halvings.
    pub block_out_channels: Vec<i64>,
    /// The UNet's width after its first convolution.
    pub conditioning_embedding_channels: i64,
    /// What the conditions are, such as `canny`.
    pub condition: String,
    /// Thresholds of Canny, where its edges were made for the training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canny_thresholds: Option<[f64; 2]>,
}

impl EncoderConfig {
    /// For a UNet and a VAE whose latents are `factor` pixels wide.
    pub fn new(unet: &UNet, factor: i64, condition: &str, canny_thresholds: Option<[f64; 2]>) -> Self {
        let halvings = factor.max(1).ilog2() as usize;
        let width = |i: usize| CHANNELS[i.min(CHANNELS.len() - 1)];
        Self {
            class_name: CLASS.into(),
            conditioning_channels: 3,
            block_out_channels: (0..=halvings).map(width).collect(),
            conditioning_embedding_channels: unet.first_channels(),
            condition: condition.into(),
            canny_thresholds,
        }
    }

    /// Reads and checks the `config.json` in `dir`.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let problem = |text: String| {
            Error::format(&path, text).with_hint("a folder control_encoder/ that `hra train` wrote is expected; a ControlNet goes with --controlnet")
        };
        let config: Self = serde_json::from_str(&files::read_to_string(&path)?)
            .map_err(|e| problem(format!("not a control encoder's config: {e}")))?;
        if config.class_name != CLASS {
            return Err(problem(format!("_class_name: expected {CLASS}, found {}", config.class_name)));
        }
        config.check().map_err(problem)?;
        let possible = |[low, high]: [f64; 2]| Thresholds { low, high }.are_possible();
        if config.canny_thresholds.is_some_and(|found| !possible(found)) {
            let max = Thresholds::MAX;
            return Err(problem(format!(
                "canny_thresholds: expected two numbers, 0 <= low <= high <= {max}"
            )));
        }
        Ok(config)
    }

    /// Refuses sizes that no control encoder has.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        let (widths, last) = (&self.block_out_channels, self.conditioning_embedding_channels);
        let possible = |c: &i64| (1..=MAX_CHANNELS).contains(c);
        if self.conditioning_channels == 3
            && (1..=MAX_HALVINGS + 1).contains(&widths.len())
            && widths.iter().chain([&last]).all(possible)
        {
            return Ok(());
        }
        Err(format!(
            "expected 3 conditioning_channels and 1 to {} widths up to {MAX_CHANNELS}, found {}, {widths:?} and {last}",
            MAX_HALVINGS + 1,
            self.conditioning_channels
        ))
    }

    /// As JSON, as [`Self::read`] reads it.
    pub fn to_json(&self) -> Result<String> {
        let text = serde_json::to_string_pretty(self).map_err(|e| Error::config(e.to_string()))?;
        Ok(text + "\n")
    }

    /// Pixels along one edge of what becomes one latent.
    fn factor(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }

    /// Name, inputs, outputs and stride of every convolution, in order.
    fn convolutions(&self) -> Vec<(String, i64, i64, i64)> {
        let widths = &self.block_out_channels;
        let mut all = vec![("conv_in".to_string(), self.conditioning_channels, widths[0], 1)];
        for (i, pair) in widths.windows(2).enumerate() {
            all.push((format!("blocks.{}", 2 * i), pair[0], pair[0], 1));
            all.push((format!("blocks.{}", 2 * i + 1), pair[0], pair[1], 2));
        }
        all.push(("conv_out".to_string(), widths[widths.len() - 1], self.conditioning_embedding_channels, 1));
        all
    }
}

/// Conditions to features that are added after the UNet's first convolution; f32.
pub struct ConditionEncoder {
    config: EncoderConfig,
    convolutions: Vec<Layer>,
}

impl ConditionEncoder {
    /// A new one, whose answer is zero: all but the last convolution are drawn from `seed` alone.
    pub fn start(config: EncoderConfig, seed: u64, device: Device) -> Self {
        let _guard = tch::no_grad_guard();
        let convolutions = config.convolutions();
        let last = convolutions.len() - 1;
        let layer = |(i, (name, c_in, c_out, stride)): (usize, (String, i64, i64, i64))| {
            // Kaiming's bound for a rectifier keeps the size of what sparse edges excite; PyTorch's own start of a convolution
            // shrinks it threefold at each of them.
            let bound = if i == last { 0.0 } else { (6.0 / (c_in * 9) as f64).sqrt() };
            let draw = |draws: &random::Draws| draws.uniform(&[c_out, c_in, 3, 3], 0.0, 1.0);
            let unit = random::seeded(seed::derive(seed, &name, 0), draw);
            let weight = host::to_device(&((unit * 2.0 - 1.0) * bound), device);
            let bias = Tensor::zeros([c_out], (Kind::Float, device));
            Layer::conv_of(name, weight, bias, stride, 1)
        };
        let convolutions = convolutions.into_iter().enumerate().map(layer).collect();
        Self { config, convolutions }
    }

    /// Loads the control encoder in the folder `dir`. The second value names tensors that it lacks.
    pub fn load(dir: &Path, device: Device) -> Result<(Self, Vec<String>)> {
        let config = EncoderConfig::read(dir)?;
        let weights = Weights::in_folder(dir, FILE_STEM, Kind::Float.into(), device)?;
        let encoder = Self::new(&weights.root(), config);
        Ok((encoder, weights.finish()?))
    }

    /// With the weights below `scope`.
    pub(super) fn new(scope: &Scope, config: EncoderConfig) -> Self {
        let layer = |(name, c_in, c_out, stride): (String, i64, i64, i64)| {
            Layer::conv(&scope.at(name), c_in, c_out, 3, stride, 1)
        };
        Self { convolutions: config.convolutions().into_iter().map(layer).collect(), config }
    }

    /// Conditions `(b, 3, H, W)` in [0, 1] to `(b, c0, H / factor, W / factor)`, with gradient.
    pub fn forward(&self, conditions: &Tensor) -> Tensor {
        let (last, inner) = self.convolutions.split_last().expect("there are two convolutions or more");
        let kind = self.convolutions[0].kind();
        let x = inner.iter().fold(conditions.to_kind(kind), |x, layer| layer.forward(&x).silu());
        last.forward(&x)
    }

    /// What it is.
    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// Why it cannot steer this UNet, if so.
    pub fn misfit(&self, unet: &UNet, factor: i64) -> Option<String> {
        let own = (self.config.conditioning_embedding_channels, self.config.factor());
        (own != (unet.first_channels(), factor)).then(|| {
            format!(
                "expected a control encoder for {} channels and {factor} pixels a latent, found one for {} and {}; was it \
                 trained on another kind of model?",
                unet.first_channels(),
                own.0,
                own.1
            )
        })
    }
}

impl Layers for ConditionEncoder {
    fn modules_mut(&mut self) -> Vec<Module<'_>> {
        self.convolutions.iter_mut().map(Module::Layer).collect()
    }
}
