//! What predicts: the network that training, drawing and control see.

use crate::model::conditioning::Conditioning;
use crate::model::layers::Layers;
use crate::platform::precision::Numbers;
use tch::{Device, Tensor};

/// What a denoiser is asked about.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    /// `(b, c, h, w)`, of any dtype.
    pub sample: &'a Tensor,
    /// One for each sample, `(b)`.
    pub timesteps: &'a Tensor,
    /// A row for each sample.
    pub conditioning: &'a Conditioning,
}

/// What a control adds to one call of a denoiser.
#[derive(Debug, Default)]
pub struct Signals {
    /// To the output of the first convolution, `(b, c0, h, w)`.
    pub hint: Option<Tensor>,
    /// To the skip connections, in the order of their making.
    pub skips: Vec<Tensor>,
    /// To the output of the middle.
    pub middle: Option<Tensor>,
}

/// A network that predicts noise, or what else it was trained on.
pub trait Denoiser: Layers {
    /// Its answer, f32 `(b, out_channels, h, w)`, with what a control adds on the way.
    fn predict(&self, call: Call, signals: &Signals) -> Tensor;

    /// As [`Self::predict`], without a control.
    fn forward(&self, sample: &Tensor, timesteps: &Tensor, conditioning: &Conditioning) -> Tensor {
        self.predict(Call { sample, timesteps, conditioning }, &Signals::default())
    }

    /// Channels that it takes: those of the latents, and of what an inpainting model sees beside them.
    fn in_channels(&self) -> i64;

    /// Channels of its answer.
    fn out_channels(&self) -> i64;

    /// Where its weights are.
    fn device(&self) -> Device;

    /// How it holds numbers.
    fn numbers(&self) -> Numbers;
}
