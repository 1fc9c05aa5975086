//! OFT and BOFT adapters as one: rotations of the same blocks, multiplied or added up.

use crate::adapter::Method;
use crate::adapter::blocks::{Cayley, skew};
use crate::adapter::boft::BoftConfig;
use crate::adapter::combine::{Chain, Combined, ELSEWHERE, How, parameter};
use crate::adapter::oft::{Coft, OftConfig};
use crate::error::{Error, Result};
use tch::{Device, Kind, Tensor};

/// See [`super::combine`]; the result is plain OFT, as a combination need not stay in COFT's ball.
pub(super) fn oft(config: OftConfig, layers: &[(&String, Chain)], how: How) -> Result<Combined> {
    let mut tensors = Vec::new();
    for (name, chain) in layers {
        let mut factors = Vec::new();
        for (file, adapter, strength) in chain {
            let Method::Oft(own) = &file.config.method else { continue };
            if own.cayley != Cayley::Exact || own.block_share != config.block_share {
                return Err(Error::config(format!(
                    "expected OFT adapters with exact Cayley blocks, all shared or none, found {} in the form of PEFT's \
                     series (use_cayley_neumann), which is not orthogonal, or of the other kind\n{ELSEWHERE}",
                    file.config.method.describe()
                )));
            }
            let upper = parameter(*adapter, "oft_R.weight");
            factors.push((skew(&upper.to_kind(Kind::Double), size_of(&upper)), *strength));
        }
        let s = sum(name, &factors, how)?; // [n, b, b]
        let (n, b) = (s.size()[0], s.size()[1]);
        let at = Tensor::triu_indices(b, b, 1, (Kind::Int64, Device::Cpu));
        let at = at.get(0) * b + at.get(1);
        let upper = s.reshape([n, b * b]).index_select(1, &at).to_kind(Kind::Float);
        tensors.push((format!("{name}.oft_R.weight"), upper));
    }
    Ok((Method::Oft(OftConfig { coft: Coft::None, ..config }), tensors))
}

/// b of `(n, b (b - 1) / 2)`.
fn size_of(upper: &Tensor) -> i64 {
    (1 + ((1 + 8 * upper.size()[1]) as f64).sqrt() as i64) / 2
}

/// See [`super::combine`]; scales multiply.
pub(super) fn boft(config: BoftConfig, layers: &[(&String, Chain)], how: How) -> Result<Combined> {
    let mut tensors = Vec::new();
    for (name, chain) in layers {
        let mut factors = Vec::new();
        let mut scale: Option<Tensor> = None;
        for (_, adapter, strength) in chain {
            let raw = parameter(*adapter, "boft_R").to_kind(Kind::Double); // [m, n, b, b]
            if raw.size()[0] != 1 {
                return Err(Error::config(format!(
                    "{name}: expected BOFT adapters of one butterfly factor, found {}\n{ELSEWHERE}",
                    raw.size()[0]
                )));
            }
            let raw = raw.squeeze_dim(0);
            factors.push(((&raw - raw.transpose(1, 2)) * 0.5, *strength));
            let own = (parameter(*adapter, "boft_s") - 1.0) * *strength + 1.0;
            // One file may hold them as a row and the other as a column, which would make a matrix of them.
            scale = Some(scale.map_or_else(|| own.shallow_clone(), |before| &before * own.view_as(&before)));
        }
        let s = sum(name, &factors, how)?;
        tensors.push((format!("{name}.boft_R"), s.unsqueeze(0).to_kind(Kind::Float)));
        tensors.extend(scale.map(|scale| (format!("{name}.boft_s"), scale)));
    }
    Ok((Method::Boft(config), tensors))
}

/// S of the combination of exact Cayley blocks, each given by its S `(n, b, b)`, f64.
fn sum(name: &str, factors: &[(Tensor, f64)], how: How) -> Result<Tensor> {
    if factors.windows(2).any(|pair| pair[0].0.size() != pair[1].0.size()) {
        return Err(Error::config(format!(
            "{name}: expected blocks of one size in all adapters\n{ELSEWHERE}"
        )));
    }
    let combined = match (factors, how) {
        // As it is, no digit is lost.
        ([(s, 1.0)], _) => Some(s.shallow_clone()),
        (_, How::Geodesic) => {
            let log = factors.iter().map(|(s, strength)| Cayley::log(s) * *strength).reduce(|a, b| a + b);
            Cayley::of_log(&log.expect("the layer is in one of the files"))
        }
        (_, How::Chain) => {
            // W R_1^T R_2^T .. = W (.. R_2 R_1)^T
            let power = |(s, strength): &(Tensor, f64)| Cayley::Exact.power(s, *strength);
            let product = factors.iter().map(power).reduce(|before, next| next.bmm(&before));
            Cayley::inverse(&product.expect("the layer is in one of the files"))
        }
    };
    combined.ok_or_else(|| {
        Error::config(format!(
            "{name}: the combination turns a plane by half a turn, which Cayley's blocks cannot express\nhint: give \
             smaller strengths, or `hra export --to merged`"
        ))
    })
}
