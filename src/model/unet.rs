//! The denoising UNet of Stable Diffusion 1.x and 2.x (diffusers `UNet2DConditionModel`), any sizes and block types.
//!
//! Field names are the checkpoint's. A timestep belongs to each sample of a batch. Compute dtype f32, bf16 or f16.

use super::attention::SpatialTransformer;
use super::config::{Level, UNetConfig};
use super::layers::{Layer, Layers, Module, Norm, timestep_features};
use super::resnet::{Downsample, Resnet, Upsample};
use super::source::{Part, Source};
use super::weights::{Scope, Weights};
use crate::error::Result;
use tch::{Device, Kind, Tensor};

/// Residual blocks of one level, with attention after each where the level attends.
struct Block {
    resnets: Vec<Resnet>,
    attentions: Vec<SpatialTransformer>,
    downsampler: Option<Downsample>,
    upsampler: Option<Upsample>,
}

impl Block {
    fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        self.resnets.iter_mut().for_each(|r| r.collect(out));
        self.attentions.iter_mut().for_each(|a| a.collect(out));
        self.downsampler.iter_mut().for_each(|d| d.collect(out));
        self.upsampler.iter_mut().for_each(|u| u.collect(out));
    }

    /// One residual block and the attention after it.
    fn layer(&self, i: usize, x: &Tensor, time: &Tensor, context: &Tensor) -> Tensor {
        let x = self.resnets[i].forward(x, time);
        self.attentions.get(i).map_or_else(|| x.shallow_clone(), |a| a.forward(&x, context))
    }
}

/// The UNet with its frozen weights and whatever adapters are on its layers.
pub struct UNet {
    config: UNetConfig,
    conv_in: Layer,
    time_embedding: (Layer, Layer),
    down_blocks: Vec<Block>,
    mid_block: Block,
    up_blocks: Vec<Block>,
    conv_norm_out: Norm,
    conv_out: Layer,
    kind: Kind,
    device: Device,
}

impl UNet {
    /// Loads the UNet of `source`. The second value names tensors of the file that the network lacks.
    pub fn load(source: &Source, kind: Kind, device: Device) -> Result<(Self, Vec<String>)> {
        let (config, levels) = UNetConfig::parse(&source.text("unet/config.json")?)?;
        let weights = Weights::open(source, Part::UNet, kind, device)?;
        let unet = Self::new(&weights.root(), config, &levels, kind, device);
        Ok((unet, weights.finish()?))
    }

    fn new(scope: &Scope, config: UNetConfig, levels: &[Level], kind: Kind, device: Device) -> Self {
        let c0 = levels[0].channels;
        let time = 4 * c0;
        let last = levels.len() - 1;
        let pad = |kernel: i64| (kernel - 1) / 2;

        let mut down_blocks = Vec::new();
        // Channels of every tensor that a skip connection carries, in the order of their making.
        let mut skips = vec![c0];
        let mut channels = c0;
        for (i, level) in levels.iter().enumerate() {
            let scope = scope.at("down_blocks").at(i);
            let mut resnets = Vec::new();
            for j in 0..level.layers {
                let scope = scope.at("resnets").at(j);
                resnets.push(Resnet::new(&scope, channels, level.channels, time, 1.0, &config));
                channels = level.channels;
                skips.push(channels);
            }
            let attentions = attentions(&scope, level, level.down_attends, level.layers, &config);
            let down = scope.at("downsamplers.0");
            let downsampler = (i < last).then(|| Downsample::new(&down, channels, config.downsample_padding));
            if downsampler.is_some() {
                skips.push(channels);
            }
            down_blocks.push(Block { resnets, attentions, downsampler, upsampler: None });
        }

        let mid = scope.at("mid_block");
        let scale = config.mid_block_scale_factor;
        let mid_block = Block {
            resnets: (0..2)
                .map(|j| Resnet::new(&mid.at("resnets").at(j), channels, channels, time, scale, &config))
                .collect(),
            attentions: attentions(&mid, &levels[last], true, 1, &config),
            downsampler: None,
            upsampler: None,
        };

        let mut up_blocks = Vec::new();
        for (i, level) in levels.iter().rev().enumerate() {
            let scope = scope.at("up_blocks").at(i);
            let mut resnets = Vec::new();
            for j in 0..=level.layers {
                let skip = skips.pop().unwrap_or(c0);
                let scope = scope.at("resnets").at(j);
                resnets.push(Resnet::new(&scope, channels + skip, level.channels, time, 1.0, &config));
                channels = level.channels;
            }
            let attentions = attentions(&scope, level, level.up_attends, level.layers + 1, &config);
            let upsampler = (i < last).then(|| Upsample::new(&scope.at("upsamplers.0"), channels));
            up_blocks.push(Block { resnets, attentions, downsampler: None, upsampler });
        }

        let (k_in, k_out) = (config.conv_in_kernel, config.conv_out_kernel);
        Self {
            conv_in: Layer::conv(&scope.at("conv_in"), config.in_channels, c0, k_in, 1, pad(k_in)),
            time_embedding: (
                Layer::linear(&scope.at("time_embedding.linear_1"), c0, time, true),
                Layer::linear(&scope.at("time_embedding.linear_2"), time, time, true),
            ),
            down_blocks,
            mid_block,
            up_blocks,
            conv_norm_out: Norm::groups(
                &scope.at("conv_norm_out"),
                config.norm_num_groups,
                c0,
                config.norm_eps,
            ),
            conv_out: Layer::conv(&scope.at("conv_out"), c0, config.out_channels, k_out, 1, pad(k_out)),
            config,
            kind,
            device,
        }
    }

    /// Predicts noise (or velocity): `sample (b, in_channels, h, w)` of any dtype, `timesteps (b)`, `context (b, n, d)`,
    /// result in f32 `(b, out_channels, h, w)`.
    pub fn forward(&self, sample: &Tensor, timesteps: &Tensor, context: &Tensor) -> Tensor {
        let context = context.to_kind(self.kind);
        let mut x = sample.to_kind(self.kind);
        if self.config.center_input_sample {
            x = x * 2.0 - 1.0;
        }
        let width = self.conv_in_channels();
        let features =
            timestep_features(timesteps, width, self.config.flip_sin_to_cos, self.config.freq_shift);
        let time = self.time_embedding.0.forward(&features.to_kind(self.kind)).silu();
        // Every use of the embedding applies the activation first, so it is applied once here.
        let time = self.time_embedding.1.forward(&time).silu(); // [b, 4 c0]

        let mut x = self.conv_in.forward(&x);
        let mut skips = vec![x.shallow_clone()];
        for block in &self.down_blocks {
            for i in 0..block.resnets.len() {
                x = block.layer(i, &x, &time, &context);
                skips.push(x.shallow_clone());
            }
            if let Some(downsampler) = &block.downsampler {
                x = downsampler.forward(&x);
                skips.push(x.shallow_clone());
            }
        }
        x = self.mid_block.layer(0, &x, &time, &context);
        x = self.mid_block.resnets[1].forward(&x, &time);
        for block in &self.up_blocks {
            for i in 0..block.resnets.len() {
                let skip = skips.pop().expect("as many skips are taken as were made");
                x = block.layer(i, &Tensor::cat(&[x, skip], 1), &time, &context);
            }
            if let Some(upsampler) = &block.upsampler {
                let size = skips.last().expect("an upsampler has a level above it").size();
                x = upsampler.forward(&x, (size[2], size[3]));
            }
        }
        self.conv_out.forward(&self.conv_norm_out.forward(&x).silu()).to_kind(Kind::Float)
    }

    /// Channels that the network takes: those of the latents, and of what an inpainting model sees beside them.
    pub fn in_channels(&self) -> i64 {
        self.config.in_channels
    }

    /// Channels of its answer.
    pub fn out_channels(&self) -> i64 {
        self.config.out_channels
    }

    /// Latent height or width that the model was trained at, where its file says.
    pub fn sample_size(&self) -> Option<i64> {
        self.config.sample_size.as_ref().and_then(serde_json::Value::as_i64)
    }

    /// Width of the text states that it attends to.
    pub fn context_width(&self) -> i64 {
        self.config.cross_attention_dim
    }

    /// Where its weights are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The compute dtype.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    fn conv_in_channels(&self) -> i64 {
        self.config.block_out_channels[0]
    }
}

impl Layers for UNet {
    fn modules_mut(&mut self) -> Vec<Module<'_>> {
        let mut out: Vec<Module> =
            [&mut self.conv_in, &mut self.time_embedding.0, &mut self.time_embedding.1]
                .map(Module::Layer)
                .into();
        self.down_blocks.iter_mut().for_each(|b| b.collect(&mut out));
        self.mid_block.collect(&mut out);
        self.up_blocks.iter_mut().for_each(|b| b.collect(&mut out));
        out.extend([Module::Norm(&mut self.conv_norm_out), Module::Layer(&mut self.conv_out)]);
        out
    }
}

fn attentions(
    scope: &Scope,
    level: &Level,
    attends: bool,
    count: i64,
    config: &UNetConfig,
) -> Vec<SpatialTransformer> {
    let count = if attends { count } else { 0 };
    (0..count)
        .map(|j| {
            let scope = scope.at("attentions").at(j);
            SpatialTransformer::new(&scope, level.channels, level.heads, level.transformers, config)
        })
        .collect()
}
