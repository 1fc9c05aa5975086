//! The methods and their settings, and a new adapter by them.

use super::hra::HraConfig;
use super::{Adapter, Full, Hra};
use crate::error::Result;
use tch::{Kind, Tensor};

/// A method with its settings.
#[derive(Debug, Clone, PartialEq)]
pub enum Method {
    /// Householder Reflection Adaptation.
    Hra(HraConfig),
    /// The weights themselves.
    Full,
}

impl Method {
    /// The word that names it on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hra(_) => "hra",
            Self::Full => "full",
        }
    }

    /// In a few words, such as `HRA r 8`.
    pub fn describe(&self) -> String {
        match self {
            Self::Hra(HraConfig { rank, gram_schmidt: false, .. }) => format!("HRA r {rank}"),
            Self::Hra(HraConfig { rank, .. }) => format!("HRA r {rank}, Gram-Schmidt"),
            Self::Full => "full fine-tuning".into(),
        }
    }

    /// Refuses settings that cannot be trained on any layer.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Hra(config) => config.validate(),
            Self::Full => Ok(()),
        }
    }

    /// A new adapter for the frozen `weight`, `(d_out, d_in)` or `(d_out, c, kh, kw)`; draws on the CPU from `seed` alone.
    ///
    /// Errors: why this weight cannot be adapted so, and with which settings it could be.
    pub fn start(&self, weight: &Tensor, seed: u64) -> std::result::Result<Box<dyn Adapter>, String> {
        Ok(match self {
            Self::Hra(config) => Box::new(Hra::new(&weight.flatten(1, -1), *config, seed)?),
            Self::Full => Box::new(Full::new(weight.to_kind(Kind::Float).copy())),
        })
    }
}
