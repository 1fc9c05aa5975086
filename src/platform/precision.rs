//! Number formats of networks: in which their frozen weights rest, and in which they compute. The words are those of accelerate's
//! `--mixed_precision no|fp16|bf16`.

use crate::error::{Error, Result};
use crate::platform::choice::{Choice, Named, named};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use tch::{Device, Kind};

/// The number format of the frozen base model at rest; adapters and the optimiser are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    #[serde(rename = "f32", alias = "fp32", alias = "no", alias = "float32")]
    F32,
    /// Brain floats: the range of f32 with 8 bits of mantissa.
    #[serde(rename = "bf16", alias = "bfloat16")]
    Bf16,
    /// Half floats.
    #[serde(rename = "f16", alias = "fp16", alias = "float16")]
    F16,
}

impl Choice for Precision {
    const CHOICES: &'static [Named<Self>] = &[
        named(Self::F32, "f32", &["fp32", "no", "float32"], "32-bit floats"),
        named(Self::Bf16, "bf16", &["bfloat16"], "Brain floats: the range of f32 with 8 bits of mantissa"),
        named(Self::F16, "f16", &["fp16", "float16"], "Half floats"),
    ];
}

impl Precision {
    /// libtorch's name of this format.
    pub fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
            Self::F16 => Kind::Half,
        }
    }

    /// The precision with this format of libtorch's, if it is one.
    pub fn of(kind: Kind) -> Option<Self> {
        Self::CHOICES.iter().map(|choice| choice.value).find(|precision| precision.kind() == kind)
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::find_exactly(text).ok_or_else(|| {
            Error::config(format!("precision: expected f32 (fp32, no), bf16 or f16 (fp16), found `{text}`"))
        })
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// How a network holds numbers. Where the formats differ, a layer converts its weight for each pass (diffusers calls that layerwise
/// casting); vectors, which are small, are rounded as the rest and then rest as they compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbers {
    /// Of matrices and filters at rest.
    pub rest: Kind,
    /// Of what layers compute and give.
    pub compute: Kind,
}

impl From<Kind> for Numbers {
    fn from(kind: Kind) -> Self {
        Self { rest: kind, compute: kind }
    }
}

impl Numbers {
    /// Those that a network in `precision` is given on a device.
    pub fn on(device: Device, precision: Precision) -> Self {
        match device {
            Device::Cpu => Self::on_cpu(precision, precision == Precision::Bf16 && cpu_has_tiles()),
            _ => precision.kind().into(),
        }
    }

    /// Those of a CPU, which computes bf16 in matrix tiles (`tiles`) or not. Without tiles libtorch takes several times as long for bf16
    /// as for f32, and for f16 on every CPU as long or longer (`hra doctor` measures bf16; a convolution with `ONEDNN_MAX_CPU_ISA` at
    /// AVX512_CORE took 2.9 times as long, with AMX a third).
    fn on_cpu(precision: Precision, tiles: bool) -> Self {
        let rest = precision.kind();
        Self { rest, compute: if rest == Kind::BFloat16 && tiles { rest } else { Kind::Float } }
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let word = |kind| Precision::of(kind).map_or("another format", Precision::word);
        f.write_str(word(self.rest))?;
        if self.rest == self.compute { Ok(()) } else { write!(f, ", computed in {}", word(self.compute)) }
    }
}

/// Whether this CPU computes bf16 in matrix tiles (AMX), which oneDNN may have been told to leave alone (`ONEDNN_MAX_CPU_ISA`).
fn cpu_has_tiles() -> bool {
    let allowed = std::env::var("ONEDNN_MAX_CPU_ISA").map(|isa| isa.to_ascii_uppercase());
    let allowed =
        allowed.map_or(true, |isa| isa.contains("AMX") || ["", "ALL", "DEFAULT"].contains(&isa.as_str()));
    allowed && cpu_flags().iter().any(|flag| flag == "amx_bf16")
}

/// What Linux says that this CPU can (`flags` of /proc/cpuinfo on x86, `Features` on Arm); nothing elsewhere.
pub fn cpu_flags() -> Vec<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo(&info, "flags").or_else(|| cpuinfo(&info, "Features")).unwrap_or_default();
    flags.split_whitespace().map(str::to_string).collect()
}

/// The first value of a `name : value` line of /proc/cpuinfo; an Arm machine has no `model name`.
pub(crate) fn cpuinfo<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, v)| v.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precisions_have_the_names_of_other_tools() {
        for (names, precision, kind) in [
            (["f32", "fp32", "no"], Precision::F32, Kind::Float),
            (["bf16", "bfloat16", "bf16"], Precision::Bf16, Kind::BFloat16),
            (["f16", "fp16", "float16"], Precision::F16, Kind::Half),
        ] {
            for name in names {
                assert_eq!(name.parse::<Precision>().ok(), Some(precision));
                assert_eq!(serde_json::from_value::<Precision>(name.into()).ok(), Some(precision));
            }
            assert_eq!(precision.to_string(), names[0]);
            assert_eq!(serde_json::to_value(precision).ok(), Some(names[0].into()));
            assert_eq!(precision.kind(), kind);
        }
        let message = "fp8".parse::<Precision>().expect_err("fp8").to_string();
        assert_eq!(message, "precision: expected f32 (fp32, no), bf16 or f16 (fp16), found `fp8`");
    }

    #[test]
    fn a_cpu_computes_in_f32_what_it_has_no_tiles_for() {
        let on = |precision, tiles| {
            let Numbers { rest, compute } = Numbers::on_cpu(precision, tiles);
            (rest, compute)
        };
        assert_eq!(on(Precision::Bf16, true), (Kind::BFloat16, Kind::BFloat16));
        assert_eq!(on(Precision::Bf16, false), (Kind::BFloat16, Kind::Float));
        for tiles in [true, false] {
            assert_eq!(on(Precision::F16, tiles), (Kind::Half, Kind::Float));
            assert_eq!(on(Precision::F32, tiles), (Kind::Float, Kind::Float));
        }
        assert_eq!(Numbers::on_cpu(Precision::F16, true).to_string(), "f16, computed in f32");
        assert_eq!(Numbers::from(Kind::BFloat16).to_string(), "bf16");
    }
}
