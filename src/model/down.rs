//! The half of the UNet that a ControlNet is a copy of: first convolution, timestep embedding, the way down and the middle.

use crate::model::attention::SpatialTransformer;
use crate::model::conditioning::{Conditioning, POOLED, SIZES};
use crate::model::denoiser::Call;
use crate::model::layers::{Layer, Module, timestep_features};
use crate::model::resnet::{Downsample, Resnet, Upsample};
use crate::weights::config::{AddedInputs, UNetConfig, UNetLevel};
use crate::weights::scope::Scope;
use tch::{Kind, Tensor};

/// Residual blocks of one level, with attention after each where the level attends.
pub(super) struct Block {
    pub(super) resnets: Vec<Resnet>,
    pub(super) attentions: Vec<SpatialTransformer>,
    pub(super) downsampler: Option<Downsample>,
    pub(super) upsampler: Option<Upsample>,
}

impl Block {
    pub(super) fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        self.resnets.iter_mut().for_each(|r| r.collect(out));
        self.attentions.iter_mut().for_each(|a| a.collect(out));
        self.downsampler.iter_mut().for_each(|d| d.collect(out));
        self.upsampler.iter_mut().for_each(|u| u.collect(out));
    }

    /// One residual block and the attention after it.
    pub(super) fn layer(&self, i: usize, x: &Tensor, time: &Tensor, context: &Tensor) -> Tensor {
        let x = self.resnets[i].forward(x, Some(time));
        self.attentions.get(i).map_or_else(|| x.shallow_clone(), |a| a.forward(&x, context))
    }
}

/// Two layers of the timestep embedding.
struct TimeEmbedding {
    linear_1: Layer,
    linear_2: Layer,
}

impl TimeEmbedding {
    fn new(scope: &Scope, d_in: i64, width: i64) -> Self {
        Self {
            linear_1: Layer::linear(&scope.at("linear_1"), d_in, width, true),
            linear_2: Layer::linear(&scope.at("linear_2"), width, width, true),
        }
    }

    fn forward(&self, features: &Tensor) -> Tensor {
        self.linear_2.forward(&self.linear_1.forward(features).silu())
    }

    fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        out.extend([&mut self.linear_1, &mut self.linear_2].map(Module::Layer));
    }
}

/// What Stable Diffusion XL adds to the timestep's embedding: pooled text, and numbers of the picture's sizes (arXiv 2307.01952,
/// section 2.2; diffusers `text_time`).
struct AddEmbedding {
    inputs: AddedInputs,
    embedding: TimeEmbedding,
}

/// The first half of a UNet. Field names are the checkpoint's.
pub(super) struct DownPath {
    config: UNetConfig,
    conv_in: Layer,
    time_embedding: TimeEmbedding,
    add_embedding: Option<AddEmbedding>,
    down_blocks: Vec<Block>,
    mid_block: Block,
    /// Channels of every tensor that a skip connection carries, in the order of their making.
    pub(super) skip_channels: Vec<i64>,
    kind: Kind,
}

impl DownPath {
    pub(super) fn new(scope: &Scope, config: UNetConfig, levels: &[UNetLevel]) -> Self {
        let c0 = levels[0].channels;
        let time = 4 * c0;
        let last = levels.len() - 1;
        let mut down_blocks = Vec::new();
        let mut skip_channels = vec![c0];
        let mut channels = c0;
        for (i, level) in levels.iter().enumerate() {
            let scope = scope.at("down_blocks").at(i);
            let mut resnets = Vec::new();
            for j in 0..level.layers {
                let scope = scope.at("resnets").at(j);
                resnets.push(Resnet::new(&scope, channels, level.channels, time, 1.0, &config));
                channels = level.channels;
                skip_channels.push(channels);
            }
            let attentions = attentions(&scope, level, level.down_attends, level.layers, &config);
            let down = scope.at("downsamplers.0");
            let downsampler = (i < last).then(|| Downsample::new(&down, channels, config.downsample_padding));
            if downsampler.is_some() {
                skip_channels.push(channels);
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
        let kernel = config.conv_in_kernel;
        Self {
            conv_in: Layer::conv(
                &scope.at("conv_in"),
                config.in_channels,
                c0,
                kernel,
                1,
                same_padding(kernel),
            ),
            time_embedding: TimeEmbedding::new(&scope.at("time_embedding"), c0, time),
            add_embedding: config.added().map(|inputs| AddEmbedding {
                inputs,
                embedding: TimeEmbedding::new(&scope.at("add_embedding"), inputs.total, time),
            }),
            down_blocks,
            mid_block,
            skip_channels,
            config,
            kind: scope.numbers().compute,
        }
    }

    /// The embedding `(b, 4 c0)` of a call's timesteps, and of what is added to it, with the activation that every use of it begins
    /// with.
    pub(super) fn time(&self, call: &Call) -> Tensor {
        let features = self.features(call.timesteps, self.config.block_out_channels[0]);
        let time = self.time_embedding.forward(&features.to_kind(self.kind));
        match &self.add_embedding {
            None => time.silu(),
            Some(added) => (time + self.added(added, call.conditioning)).silu(),
        }
    }

    /// Numbers `(n)` as they are shown, `(n, width)`.
    fn features(&self, numbers: &Tensor, width: i64) -> Tensor {
        timestep_features(numbers, width, self.config.time.flip_sin_to_cos, self.config.time.freq_shift)
    }

    fn added(
        &self,
        AddEmbedding { inputs, embedding }: &AddEmbedding,
        conditioning: &Conditioning,
    ) -> Tensor {
        let told =
            |name| conditioning.get(name).expect("a conditioning is made for the UNet that it goes to");
        let (pooled, numbers) = (told(POOLED), told(SIZES));
        let features = self.features(&numbers.reshape([-1]), inputs.of_number);
        let features = features.reshape([numbers.size()[0], -1]); // [b, numbers * width]
        let all = Tensor::cat(&[pooled.to_kind(self.kind), features.to_kind(self.kind)], -1);
        embedding.forward(&all)
    }

    /// The first convolution's output `(b, c0, h, w)`, and the hint on it.
    fn first(&self, sample: &Tensor, hint: Option<&Tensor>) -> Tensor {
        let mut x = sample.to_kind(self.kind);
        if self.config.center_input_sample {
            x = x * 2.0 - 1.0;
        }
        let x = self.conv_in.forward(&x);
        hint.map_or_else(|| x.shallow_clone(), |hint| &x + hint.to_kind(self.kind))
    }

    /// What the middle gives `(b, c, h', w')` and what the skip connections carry. `hint (b, c0, h, w)` is added to the first
    /// convolution's output, and so is in the first skip connection too.
    pub(super) fn forward(
        &self,
        sample: &Tensor,
        time: &Tensor,
        context: &Tensor,
        hint: Option<&Tensor>,
    ) -> (Tensor, Vec<Tensor>) {
        let mut x = self.first(sample, hint);
        let mut skips = vec![x.shallow_clone()];
        for block in &self.down_blocks {
            for i in 0..block.resnets.len() {
                x = block.layer(i, &x, time, context);
                skips.push(x.shallow_clone());
            }
            if let Some(downsampler) = &block.downsampler {
                x = downsampler.forward(&x);
                skips.push(x.shallow_clone());
            }
        }
        x = self.mid_block.layer(0, &x, time, context);
        (self.mid_block.resnets[1].forward(&x, Some(time)), skips)
    }

    pub(super) fn config(&self) -> &UNetConfig {
        &self.config
    }

    pub(super) fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        out.push(Module::Layer(&mut self.conv_in));
        self.time_embedding.collect(out);
        self.add_embedding.iter_mut().for_each(|added| added.embedding.collect(out));
        self.down_blocks.iter_mut().for_each(|b| b.collect(out));
        self.mid_block.collect(out);
    }
}

/// Padding that keeps the size, of an odd kernel.
pub(super) fn same_padding(kernel: i64) -> i64 {
    (kernel - 1) / 2
}

pub(super) fn attentions(
    scope: &Scope,
    level: &UNetLevel,
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
