//! The residual block with a time embedding, and the convolutions between levels (diffusers `ResnetBlock2D`).

use crate::model::layers::{Layer, Module, Norm};
use crate::weights::config::UNetConfig;
use crate::weights::scope::Scope;
use tch::Tensor;

/// Two convolutions with the time embedding between, and a skip around.
pub struct Resnet {
    norm1: Norm,
    conv1: Layer,
    time: Option<TimeProjection>,
    norm2: Norm,
    conv2: Layer,
    conv_shortcut: Option<Layer>,
    output_scale: f64,
}

/// What a block makes of the time embedding.
struct TimeProjection {
    time_emb_proj: Layer,
    /// Scale and shift of the second norm, in place of what is added before it.
    scale_shift: bool,
}

impl Resnet {
    /// `c_in -> c_out` channels, time embedding of width `time`.
    pub fn new(
        scope: &Scope,
        c_in: i64,
        c_out: i64,
        time: i64,
        output_scale: f64,
        config: &UNetConfig,
    ) -> Self {
        let (groups, eps) = (config.norm.norm_num_groups, config.norm.norm_eps);
        let scale_shift = config.time.resnet_time_scale_shift == "scale_shift";
        let time_out = if scale_shift { 2 * c_out } else { c_out };
        let time_emb_proj = Layer::linear(&scope.at("time_emb_proj"), time, time_out, true);
        let plain = Self::without_time(scope, c_in, c_out, groups, eps);
        Self { time: Some(TimeProjection { time_emb_proj, scale_shift }), output_scale, ..plain }
    }

    /// A block that no timestep is told, as autoencoders have.
    pub fn without_time(scope: &Scope, c_in: i64, c_out: i64, groups: i64, eps: f64) -> Self {
        Self {
            norm1: Norm::groups(&scope.at("norm1"), groups, c_in, eps),
            conv1: Layer::conv(&scope.at("conv1"), c_in, c_out, 3, 1, 1),
            time: None,
            norm2: Norm::groups(&scope.at("norm2"), groups, c_out, eps),
            conv2: Layer::conv(&scope.at("conv2"), c_out, c_out, 3, 1, 1),
            conv_shortcut: (c_in != c_out)
                .then(|| Layer::conv(&scope.at("conv_shortcut"), c_in, c_out, 1, 1, 0)),
            output_scale: 1.0,
        }
    }

    /// `x (b, c_in, h, w)`; `time (b, t)` with its activation already applied, of a block that is told it.
    pub fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Tensor {
        let h = self.conv1.forward(&self.norm1.forward(x).silu());
        let h = match self.time.as_ref().zip(time) {
            None => self.norm2.forward(&h),
            Some((TimeProjection { time_emb_proj, scale_shift }, time)) => {
                let time = time_emb_proj.forward(time).unsqueeze(-1).unsqueeze(-1); // [b, c_out, 1, 1]
                if *scale_shift {
                    let parts = time.chunk(2, 1);
                    self.norm2.forward(&h) * (&parts[0] + 1.0) + &parts[1]
                } else {
                    self.norm2.forward(&(h + time))
                }
            }
        };
        let h = self.conv2.forward(&h.silu());
        let skip = self.conv_shortcut.as_ref().map_or_else(|| x.shallow_clone(), |conv| conv.forward(x));
        let y = skip + h;
        if self.output_scale == 1.0 { y } else { y / self.output_scale }
    }

    /// Adds this module's parts to `out`.
    pub fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        out.extend([Module::Norm(&mut self.norm1), Module::Layer(&mut self.conv1)]);
        out.extend(self.time.as_mut().map(|time| Module::Layer(&mut time.time_emb_proj)));
        out.extend([Module::Norm(&mut self.norm2), Module::Layer(&mut self.conv2)]);
        out.extend(self.conv_shortcut.as_mut().map(Module::Layer));
    }
}

/// Halves height and width.
pub struct Downsample {
    conv: Layer,
    padding: i64,
}

impl Downsample {
    /// A 3x3 convolution of stride 2.
    pub fn new(scope: &Scope, channels: i64, padding: i64) -> Self {
        Self { conv: Layer::conv(&scope.at("conv"), channels, channels, 3, 2, padding), padding }
    }

    /// `(b, c, h, w)` to `(b, c, ceil(h/2), ceil(w/2))`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        if self.padding == 0 {
            self.conv.forward(&x.constant_pad_nd([0, 1, 0, 1]))
        } else {
            self.conv.forward(x)
        }
    }

    /// Adds this module's parts to `out`.
    pub fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        out.push(Module::Layer(&mut self.conv));
    }
}

/// Enlarges to the size of the level above.
pub struct Upsample {
    conv: Layer,
}

impl Upsample {
    /// A 3x3 convolution after nearest-neighbour enlargement.
    pub fn new(scope: &Scope, channels: i64) -> Self {
        Self { conv: Layer::conv(&scope.at("conv"), channels, channels, 3, 1, 1) }
    }

    /// `(b, c, h, w)` to `(b, c, height, width)`; odd sizes are why the caller gives them.
    pub fn forward(&self, x: &Tensor, (height, width): (i64, i64)) -> Tensor {
        self.conv.forward(&x.upsample_nearest2d([height, width], None, None))
    }

    /// Adds this module's parts to `out`.
    pub fn collect<'a>(&'a mut self, out: &mut Vec<Module<'a>>) {
        out.push(Module::Layer(&mut self.conv));
    }
}
