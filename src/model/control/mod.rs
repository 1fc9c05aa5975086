//! How a picture (edges, a map, landmarks) steers the UNet.
//!
//! A [`ConditionEncoder`] is HRA's and OFT's way: a small trained network whose answer is added once, after the UNet's first
//! convolution; adapters on the UNet learn to follow it. A [`ControlNet`] (arXiv 2302.05543) is a copy of half the UNet whose
//! answers are added to all skip connections. Both give [`Signals`].

mod encoder;
mod net;

pub use encoder::{CONTROL_ENCODER, ConditionEncoder, EncoderConfig, FILE_STEM, PALETTE_FILE, encoder_of};
pub use net::ControlNet;

use crate::model::UNet;
use crate::model::denoiser::{Call, Signals};
use crate::platform::choice::{Choice, Named, named};
use tch::Tensor;

/// Each row after as many rows of zeros as there are rows: nothing is added to the first half of a batch.
fn in_second_half(signals: Signals) -> Signals {
    let below = |t: Tensor| Tensor::cat(&[t.zeros_like(), t], 0);
    Signals {
        hint: signals.hint.map(below),
        skips: signals.skips.into_iter().map(below).collect(),
        middle: signals.middle.map(below),
    }
}

/// Which of guidance's two passes see the condition.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Passes {
    /// Both, as the HRA authors' and ControlNet's scripts do
    #[default]
    Both,
    /// The prompt's alone, so that guidance strengthens the condition too
    Conditional,
}

impl Choice for Passes {
    const CHOICES: &'static [Named<Self>] = &[
        named(Self::Both, "both", &[], "Both, as the HRA authors' and ControlNet's scripts do"),
        named(
            Self::Conditional,
            "conditional",
            &[],
            "The prompt's alone, so that guidance strengthens the condition too",
        ),
    ];
}

/// A control of either kind.
pub enum Control {
    /// Added once, after the first convolution.
    Encoder(ConditionEncoder),
    /// Added to all skip connections.
    Net(Box<ControlNet>),
}

impl Control {
    /// What is the same for every step: features `(b, c, h, w)` of conditions `(b, 3, H, W)` in [0, 1].
    pub fn features(&self, conditions: &Tensor) -> Tensor {
        match self {
            Self::Encoder(encoder) => encoder.forward(conditions),
            Self::Net(net) => net.features(conditions),
        }
    }

    /// The signals, times `scale`, for a call on `n` samples with `features` of `b` pictures: `n` is `b`, or `2 b`
    /// with guidance, where the first half are the passes of the negative prompt.
    pub fn signals(&self, features: &Tensor, scale: f64, passes: Passes, call: Call) -> Signals {
        let (n, b) = (call.sample.size()[0], features.size()[0]);
        let second_half = n == 2 * b && passes == Passes::Conditional;
        let features = if n == b || second_half {
            features.shallow_clone()
        } else {
            Tensor::cat(&[features, features], 0)
        };
        let signals = match self {
            Self::Encoder(_) => Signals { hint: Some(features * scale), ..Signals::default() },
            Self::Net(net) if second_half => {
                let (sample, timesteps) = (call.sample.narrow(0, b, b), call.timesteps.narrow(0, b, b));
                let conditioning = &call.conditioning.narrow(b, b);
                let seen = Call { sample: &sample, timesteps: &timesteps, conditioning };
                net.forward(seen, &features, scale)
            }
            Self::Net(net) => net.forward(call, &features, scale),
        };
        if second_half { in_second_half(signals) } else { signals }
    }

    /// Why it cannot steer this UNet, whose latents are `factor` pixels wide, if so.
    pub fn misfit(&self, unet: &UNet, factor: i64) -> Option<String> {
        match self {
            Self::Encoder(encoder) => encoder.misfit(unet, factor),
            Self::Net(net) => net.misfit(unet, factor),
        }
    }
}
