//! The denoising UNet of Stable Diffusion 1.x, 2.x and XL (diffusers `UNet2DConditionModel`), any sizes and block types.
//!
//! Field names are the checkpoint's. A timestep belongs to each sample of a batch. Compute dtype f32, bf16 or f16.

use crate::error::Result;
use crate::model::denoiser::{Call, Denoiser, Signals};
use crate::model::down::{Block, DownPath, attentions, same_padding};
use crate::model::layers::{Layer, Layers, Module, Norm};
use crate::model::resnet::{Resnet, Upsample};
use crate::platform::precision::Numbers;
use crate::weights::config::{AddedInputs, UNetConfig, UNetLevel};
use crate::weights::part::Part;
use crate::weights::scope::{Scope, Weights};
use crate::weights::source::Source;
use tch::{Device, Kind, Tensor};

/// The UNet with its frozen weights and whatever adapters are on its layers.
pub struct UNet {
    down: DownPath,
    up_blocks: Vec<Block>,
    conv_norm_out: Norm,
    conv_out: Layer,
    numbers: Numbers,
    device: Device,
}

impl UNet {
    /// Loads the UNet of `source`. The second value names tensors of the file that the network lacks.
    pub fn load(source: &Source, numbers: impl Into<Numbers>, device: Device) -> Result<(Self, Vec<String>)> {
        let (config, levels) = UNetConfig::parse(&source.text("unet/config.json")?)?;
        let weights = Weights::open(source, Part::UNet, numbers.into(), device)?;
        let unet = Self::new(&weights.root(), config, &levels, device);
        Ok((unet, weights.finish()?))
    }

    fn new(scope: &Scope, config: UNetConfig, levels: &[UNetLevel], device: Device) -> Self {
        let down = DownPath::new(scope, config.clone(), levels);
        let c0 = levels[0].channels;
        let last = levels.len() - 1;
        let mut skips = down.skip_channels.clone();
        let mut channels = levels[last].channels;
        let mut up_blocks = Vec::new();
        for (i, level) in levels.iter().rev().enumerate() {
            let scope = scope.at("up_blocks").at(i);
            let mut resnets = Vec::new();
            for j in 0..=level.layers {
                let skip = skips.pop().unwrap_or(c0);
                let scope = scope.at("resnets").at(j);
                resnets.push(Resnet::new(&scope, channels + skip, level.channels, 4 * c0, 1.0, &config));
                channels = level.channels;
            }
            let attentions = attentions(&scope, level, level.up_attends, level.layers + 1, &config);
            let upsampler = (i < last).then(|| Upsample::new(&scope.at("upsamplers.0"), channels));
            up_blocks.push(Block { resnets, attentions, downsampler: None, upsampler });
        }
        let (kernel, groups) = (config.conv_out_kernel, config.norm.norm_num_groups);
        let (conv_out, pad) = (scope.at("conv_out"), same_padding(kernel));
        Self {
            down,
            up_blocks,
            conv_norm_out: Norm::groups(&scope.at("conv_norm_out"), groups, c0, config.norm.norm_eps),
            conv_out: Layer::conv(&conv_out, c0, config.out_channels, kernel, 1, pad),
            numbers: scope.numbers(),
            device,
        }
    }

    /// Channels after the first convolution, where a control encoder's hint is added.
    pub fn first_channels(&self) -> i64 {
        self.down.config().block_out_channels[0]
    }

    /// Channels of every skip connection, in the order of their making.
    pub fn skip_channels(&self) -> &[i64] {
        &self.down.skip_channels
    }

    /// Latent height or width that the model was trained at, where its file says.
    pub fn sample_size(&self) -> Option<i64> {
        self.down.config().sample_size.as_ref().and_then(serde_json::Value::as_i64)
    }

    /// What it is told beside the timestep and the text states; `None` for Stable Diffusion 1.x and 2.x.
    pub fn added(&self) -> Option<AddedInputs> {
        self.down.config().added()
    }

    /// Width of the text states that it attends to.
    pub fn context_width(&self) -> i64 {
        self.down.config().attention.cross_attention_dim
    }

    /// The middle's output and the skip connections with what a control adds to them.
    fn steered(&self, middle: Tensor, mut skips: Vec<Tensor>, signals: &Signals) -> (Tensor, Vec<Tensor>) {
        for (skip, signal) in skips.iter_mut().zip(&signals.skips) {
            *skip = &*skip + signal.to_kind(self.numbers.compute);
        }
        let middle = match &signals.middle {
            Some(signal) => middle + signal.to_kind(self.numbers.compute),
            None => middle,
        };
        (middle, skips)
    }

    /// The way up, from the middle's output `(b, c, h', w')` to `(b, c0, h, w)`.
    fn up(&self, middle: Tensor, mut skips: Vec<Tensor>, time: &Tensor, context: &Tensor) -> Tensor {
        let mut x = middle;
        for block in &self.up_blocks {
            for i in 0..block.resnets.len() {
                let skip = skips.pop().expect("as many skips are taken as were made");
                x = block.layer(i, &Tensor::cat(&[x, skip], 1), time, context);
            }
            if let Some(upsampler) = &block.upsampler {
                let size = skips.last().expect("an upsampler has a level above it").size();
                x = upsampler.forward(&x, (size[2], size[3]));
            }
        }
        x
    }
}

impl Denoiser for UNet {
    fn predict(&self, call: Call, signals: &Signals) -> Tensor {
        let context = call.conditioning.states().to_kind(self.numbers.compute);
        let time = self.down.time(&call);
        let (middle, skips) = self.down.forward(call.sample, &time, &context, signals.hint.as_ref());
        let (middle, skips) = self.steered(middle, skips, signals);
        let x = self.up(middle, skips, &time, &context);
        self.conv_out.forward(&self.conv_norm_out.forward(&x).silu()).to_kind(Kind::Float)
    }

    fn in_channels(&self) -> i64 {
        self.down.config().in_channels
    }

    fn out_channels(&self) -> i64 {
        self.down.config().out_channels
    }

    fn device(&self) -> Device {
        self.device
    }

    fn numbers(&self) -> Numbers {
        self.numbers
    }
}

impl Layers for UNet {
    fn modules_mut(&mut self) -> Vec<Module<'_>> {
        let mut out = Vec::new();
        self.down.collect(&mut out);
        self.up_blocks.iter_mut().for_each(|b| b.collect(&mut out));
        out.extend([Module::Norm(&mut self.conv_norm_out), Module::Layer(&mut self.conv_out)]);
        out
    }
}
