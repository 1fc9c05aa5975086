//! Our own autoencoder (diffusers `AutoencoderKL`): any sizes, with or without the convolutions around the latents and the
//! attention in the middle, in any numbers, and able to carry adapters. Field names are the checkpoint's.

use super::autoencoder::Autoencoder;
use crate::error::{Error, Result};
use crate::model::attention::{Sees, attend, join_heads, split_heads};
use crate::model::layers::{Layer, Module, Norm};
use crate::model::resnet::{Downsample, Resnet, Upsample};
use crate::weights::config::VaeConfig;
use crate::weights::scope::{Scope, Weights};
use std::path::Path;
use tch::{Kind, Tensor};

/// Of every norm in it.
const EPS: f64 = 1e-6;

/// Encoder and decoder, and the convolutions around the latents.
pub struct Network {
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Option<Layer>,
    post_quant_conv: Option<Layer>,
    kind: Kind,
}

impl Network {
    /// With the weights of the model at `path`. The second value names tensors of the file that it lacks; those of a part that the
    /// config says is not there are an error.
    pub fn load(weights: Weights, config: &VaeConfig, path: &Path) -> Result<(Self, Vec<String>)> {
        let network = Self::new(&weights.root(), config);
        let unused = weights.finish()?;
        let switched_off = |name: &&String| {
            name.starts_with("quant_conv.")
                || name.starts_with("post_quant_conv.")
                || name.contains(".mid_block.attentions.")
        };
        if let Some(name) = unused.iter().find(switched_off) {
            let problem = format!("the VAE's config says that it has no `{name}`, but its weights have it");
            return Err(Error::format(path, problem)
                .with_hint("vae/config.json: use_quant_conv, use_post_quant_conv and mid_block_add_attention say what there is"));
        }
        Ok((network, unused))
    }

    fn new(scope: &Scope, config: &VaeConfig) -> Self {
        let z = config.latent_channels;
        let conv = |name: &str, channels: i64| Layer::conv(&scope.at(name), channels, channels, 1, 1, 0);
        Self {
            encoder: Encoder::new(&scope.at("encoder"), config),
            decoder: Decoder::new(&scope.at("decoder"), config),
            quant_conv: config.use_quant_conv.then(|| conv("quant_conv", 2 * z)),
            post_quant_conv: config.use_post_quant_conv.then(|| conv("post_quant_conv", z)),
            kind: scope.numbers().compute,
        }
    }
}

impl Autoencoder for Network {
    fn moments(&self, pictures: &Tensor) -> Tensor {
        let moments = self.encoder.forward(&pictures.to_kind(self.kind));
        through(&self.quant_conv, moments).to_kind(Kind::Float)
    }

    fn decode(&self, latents: &Tensor) -> Tensor {
        let latents = through(&self.post_quant_conv, latents.to_kind(self.kind));
        self.decoder.forward(&latents).to_kind(Kind::Float)
    }

    fn modules_mut(&mut self) -> Vec<Module<'_>> {
        let mut out = Vec::new();
        self.encoder.collect(&mut out);
        self.decoder.collect(&mut out);
        out.extend(self.quant_conv.iter_mut().chain(&mut self.post_quant_conv).map(Module::Layer));
        out
    }
}

/// `x` after the convolution, where there is one.
fn through(conv: &Option<Layer>, x: Tensor) -> Tensor {
    match conv {
        Some(conv) => conv.forward(&x),
        None => x,
    }
}

/// Residual blocks of one level, and what leads to the next.
struct Level {
    resnets: Vec<Resnet>,
    downsampler: Option<Downsample>,
    upsampler: Option<Upsample>,
}

impl Level {
    fn new(scope: &Scope, count: i64, (c_in, c_out): (i64, i64), groups: i64) -> Self {
        let resnet = |i| {
            let from = if i == 0 { c_in } else { c_out };
            Resnet::without_time(&scope.at("resnets").at(i), from, c_out, groups, EPS)
        };
        Self { resnets: (0..count).map(resnet).collect(), downsampler: None, upsampler: None }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let x = self.resnets.iter().fold(x.shallow_clone(), |x, resnet| resnet.forward(&x, None));
        match (&self.downsampler, &self.upsampler) {
            (Some(downsampler), _) => downsampler.forward(&x),
            (None, Some(upsampler)) => {
                let size = x.size();
                upsampler.forward(&x, (2 * size[2], 2 * size[3]))
            }
            (None, None) => x,
        }
    }

    fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        self.resnets.iter_mut().for_each(|resnet| resnet.collect(out));
        self.downsampler.iter_mut().for_each(|d| d.collect(out));
        self.upsampler.iter_mut().for_each(|u| u.collect(out));
    }
}

/// Two residual blocks with attention of the pixels to each other between, at the coarsest level.
struct Middle {
    first: Resnet,
    attention: Option<PixelAttention>,
    second: Resnet,
}

impl Middle {
    fn new(scope: &Scope, channels: i64, config: &VaeConfig) -> Self {
        let groups = config.norm_num_groups;
        let resnet = |i| Resnet::without_time(&scope.at("resnets").at(i), channels, channels, groups, EPS);
        let attention = &scope.at("attentions.0");
        Self {
            first: resnet(0),
            attention: config
                .mid_block_add_attention
                .then(|| PixelAttention::new(attention, channels, groups)),
            second: resnet(1),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let x = self.first.forward(x, None);
        let x = self.attention.as_ref().map_or_else(|| x.shallow_clone(), |attention| attention.forward(&x));
        self.second.forward(&x, None)
    }

    fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        self.first.collect(out);
        self.attention.iter_mut().for_each(|attention| attention.collect(out));
        self.second.collect(out);
    }
}

/// Attention with one head over all pixels, with a norm before and a skip around.
struct PixelAttention {
    group_norm: Norm,
    to_q: Layer,
    to_k: Layer,
    to_v: Layer,
    to_out: Layer,
}

impl PixelAttention {
    fn new(scope: &Scope, channels: i64, groups: i64) -> Self {
        let linear = |name: &str| Layer::linear(&scope.at(name), channels, channels, true);
        Self {
            group_norm: Norm::groups(&scope.at("group_norm"), groups, channels, EPS),
            to_q: linear("to_q"),
            to_k: linear("to_k"),
            to_v: linear("to_v"),
            to_out: linear("to_out.0"),
        }
    }

    /// `(b, c, h, w)` to the same shape.
    fn forward(&self, x: &Tensor) -> Tensor {
        let size = x.size();
        let tokens = self.group_norm.forward(x).flatten(2, 3).transpose(1, 2); // [b, h*w, c]
        let head = |layer: &Layer| split_heads(&layer.forward(&tokens), 1);
        let y = attend(&head(&self.to_q), &head(&self.to_k), &head(&self.to_v), Sees::All, false);
        let y = self.to_out.forward(&join_heads(&y));
        x + y.transpose(1, 2).reshape(&size[..])
    }

    fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        out.push(Module::Norm(&mut self.group_norm));
        out.extend([&mut self.to_q, &mut self.to_k, &mut self.to_v, &mut self.to_out].map(Module::Layer));
    }
}

/// Pictures to what mean and log-variance are made of.
struct Encoder {
    conv_in: Layer,
    down_blocks: Vec<Level>,
    mid_block: Middle,
    conv_norm_out: Norm,
    conv_out: Layer,
}

impl Encoder {
    fn new(scope: &Scope, config: &VaeConfig) -> Self {
        let (channels, groups) = (&config.block_out_channels, config.norm_num_groups);
        let last = channels.len() - 1;
        let level = |i: usize| {
            let (scope, from) = (scope.at("down_blocks").at(i), channels[i.saturating_sub(1)]);
            let mut level = Level::new(&scope, config.layers_per_block, (from, channels[i]), groups);
            let down = scope.at("downsamplers.0");
            level.downsampler = (i < last).then(|| Downsample::new(&down, channels[i], 0));
            level
        };
        Self {
            conv_in: Layer::conv(&scope.at("conv_in"), config.in_channels, channels[0], 3, 1, 1),
            down_blocks: (0..=last).map(level).collect(),
            mid_block: Middle::new(&scope.at("mid_block"), channels[last], config),
            conv_norm_out: Norm::groups(&scope.at("conv_norm_out"), groups, channels[last], EPS),
            conv_out: Layer::conv(&scope.at("conv_out"), channels[last], 2 * config.latent_channels, 3, 1, 1),
        }
    }

    /// `(b, 3, h, w)` to `(b, 2 z, h / f, w / f)`.
    fn forward(&self, pictures: &Tensor) -> Tensor {
        let x = self.conv_in.forward(pictures);
        let x = self.down_blocks.iter().fold(x, |x, level| level.forward(&x));
        let x = self.mid_block.forward(&x);
        self.conv_out.forward(&self.conv_norm_out.forward(&x).silu())
    }

    fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        out.push(Module::Layer(&mut self.conv_in));
        self.down_blocks.iter_mut().for_each(|level| level.collect(out));
        self.mid_block.collect(out);
        out.extend([Module::Norm(&mut self.conv_norm_out), Module::Layer(&mut self.conv_out)]);
    }
}

/// Latents to pictures.
struct Decoder {
    conv_in: Layer,
    mid_block: Middle,
    up_blocks: Vec<Level>,
    conv_norm_out: Norm,
    conv_out: Layer,
}

impl Decoder {
    fn new(scope: &Scope, config: &VaeConfig) -> Self {
        let groups = config.norm_num_groups;
        let channels: Vec<i64> = config.block_out_channels.iter().rev().copied().collect();
        let last = channels.len() - 1;
        let level = |i: usize| {
            let (scope, from) = (scope.at("up_blocks").at(i), channels[i.saturating_sub(1)]);
            let mut level = Level::new(&scope, config.layers_per_block + 1, (from, channels[i]), groups);
            level.upsampler = (i < last).then(|| Upsample::new(&scope.at("upsamplers.0"), channels[i]));
            level
        };
        Self {
            conv_in: Layer::conv(&scope.at("conv_in"), config.latent_channels, channels[0], 3, 1, 1),
            mid_block: Middle::new(&scope.at("mid_block"), channels[0], config),
            up_blocks: (0..=last).map(level).collect(),
            conv_norm_out: Norm::groups(&scope.at("conv_norm_out"), groups, channels[last], EPS),
            conv_out: Layer::conv(&scope.at("conv_out"), channels[last], config.out_channels, 3, 1, 1),
        }
    }

    /// `(b, z, h, w)` to `(b, 3, f h, f w)`.
    fn forward(&self, latents: &Tensor) -> Tensor {
        let x = self.mid_block.forward(&self.conv_in.forward(latents));
        let x = self.up_blocks.iter().fold(x, |x, level| level.forward(&x));
        self.conv_out.forward(&self.conv_norm_out.forward(&x).silu())
    }

    fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        out.push(Module::Layer(&mut self.conv_in));
        self.mid_block.collect(out);
        self.up_blocks.iter_mut().for_each(|level| level.collect(out));
        out.extend([Module::Norm(&mut self.conv_norm_out), Module::Layer(&mut self.conv_out)]);
    }
}
