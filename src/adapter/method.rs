//! The methods and their settings, and a new adapter by them.

use crate::adapter::blocks::Cayley;
use crate::adapter::boft::BoftConfig;
use crate::adapter::hra::HraConfig;
use crate::adapter::lora::LoraConfig;
use crate::adapter::oft::{Coft, OftConfig};
use crate::adapter::{Adapter, Boft, Dora, Full, Hra, Lora, Oft, matrix_shape};
use crate::error::Result;
use tch::{Kind, Tensor};

/// A method with its settings.
#[derive(Debug, Clone, PartialEq)]
pub enum Method {
    /// Householder Reflection Adaptation.
    Hra(HraConfig),
    /// LoRA, and DoRA.
    Lora(LoraConfig),
    /// OFT, and COFT.
    Oft(OftConfig),
    /// BOFT.
    Boft(BoftConfig),
    /// The weights themselves.
    Full,
}

impl Method {
    /// The word that names it on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hra(_) => "hra",
            Self::Lora(LoraConfig { dora: false, .. }) => "lora",
            Self::Lora(_) => "dora",
            Self::Oft(OftConfig { coft: Coft::None, .. }) => "oft",
            Self::Oft(_) => "coft",
            Self::Boft(_) => "boft",
            Self::Full => "full",
        }
    }

    /// In a few words, such as `HRA r 8`.
    pub fn describe(&self) -> String {
        match self {
            Self::Hra(HraConfig { rank, gram_schmidt: false, .. }) => format!("HRA r {rank}"),
            Self::Hra(HraConfig { rank, .. }) => format!("HRA r {rank}, Gram-Schmidt"),
            Self::Lora(LoraConfig { rank, alpha, rslora, dora, .. }) => format!(
                "{}{} r {rank}, alpha {alpha}",
                if *rslora { "rs" } else { "" },
                if *dora { "DoRA" } else { "LoRA" }
            ),
            Self::Oft(OftConfig { partition, cayley, coft, block_share }) => {
                let shared = if *block_share { ", shared" } else { "" };
                let series = if *cayley == Cayley::Exact { "" } else { ", Cayley-Neumann series" };
                let partition = partition.describe();
                match coft {
                    Coft::None => format!("OFT {partition}{shared}{series}"),
                    Coft::Paper { eps } => format!("COFT {partition}{shared}{series}, eps {eps}"),
                    Coft::Peft { eps } => format!("PEFT's COFT {partition}{shared}{series}, eps {eps}"),
                }
            }
            Self::Boft(BoftConfig { partition, factors: 1 }) => format!("BOFT {}", partition.describe()),
            Self::Boft(BoftConfig { partition, factors }) => {
                format!("BOFT {}, {factors} factors", partition.describe())
            }
            Self::Full => "full fine-tuning".into(),
        }
    }

    /// Refuses settings that cannot be trained on any layer.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Hra(config) => config.validate(),
            Self::Lora(config) => config.validate(),
            Self::Oft(config) => config.validate(),
            Self::Boft(config) => config.validate(),
            Self::Full => Ok(()),
        }
    }

    /// A new adapter for the frozen `weight`, `(d_out, d_in)` or `(d_out, c, kh, kw)`; draws on the CPU from `seed` alone.
    ///
    /// Errors: why this weight cannot be adapted so, and with which settings it could be.
    pub fn start(&self, weight: &Tensor, seed: u64) -> std::result::Result<Box<dyn Adapter>, String> {
        let (shape, device) = (weight.size(), weight.device());
        Ok(match self {
            Self::Hra(config) => Box::new(Hra::new(&weight.flatten(1, -1), *config, seed)?),
            Self::Lora(config) if config.dora => Box::new(Dora::new(weight, *config, seed)?),
            Self::Lora(config) => Box::new(Lora::new(&shape, device, *config, seed)?),
            Self::Oft(config) => Box::new(Oft::new(&shape, device, *config)?),
            Self::Boft(config) => Box::new(Boft::new(&shape, device, *config)?),
            Self::Full => Box::new(Full::new(weight.to_kind(Kind::Float).copy())),
        })
    }

    /// Number of values that train on a weight of this shape, `(d_out, d_in)` or `(d_out, c, kh, kw)`.
    ///
    /// Errors: those of [`Self::start`].
    pub fn parameters_for(&self, weight: &[i64]) -> std::result::Result<usize, String> {
        let (d_out, d_in) = matrix_shape(weight);
        let count = match self {
            Self::Hra(config) if config.rank > d_in => {
                return Err(format!(
                    "rank: expected at most {d_in}, the layer's inputs, found {}",
                    config.rank
                ));
            }
            Self::Hra(config) => config.rank * d_in,
            Self::Lora(config) => {
                config.check_rank(weight)?;
                config.rank * (d_in + d_out) + if config.dora { d_out } else { 0 }
            }
            Self::Oft(config) => {
                let (n, b) = config.shape(d_in)?;
                n * (b * (b - 1) / 2)
            }
            Self::Boft(config) => {
                let (n, b) = config.partition.of(d_in)?;
                config.factors * n * b * b + d_out
            }
            Self::Full => d_out * d_in,
        };
        Ok(count as usize)
    }

    /// What PEFT's config has no field for, as text for the tensor file.
    pub fn metadata(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Oft(OftConfig { coft: Coft::Paper { eps }, .. }) => vec![("coft_eps", eps.to_string())],
            _ => Vec::new(),
        }
    }
}
