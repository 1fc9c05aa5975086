//! LoRA adapters as one: `sum s_i B_i A_i = [s_1 B_1, s_2 B_2, ..] [A_1; A_2; ..]`.

use crate::adapter::combine::{Chain, Combined, parameter};
use crate::adapter::lora::LoraConfig;
use crate::adapter::{Form, Method};
use crate::error::Result;
use tch::{Device, Kind, Tensor};

/// See [`super::combine`]; the scales go into B, so that alpha is the rank.
pub(super) fn combine(config: LoraConfig, layers: &[(&String, Chain)]) -> Result<Combined> {
    let mut stacked = Vec::new();
    for (name, chain) in layers {
        let (mut downs, mut ups) = (Vec::new(), Vec::new());
        for (_, adapter, strength) in chain {
            let (d_in, d_out) = super::size(*adapter);
            // What a LoRA adds does not depend on the weight, only its shape does.
            let weight = Tensor::zeros([1], (Kind::Double, Device::Cpu)).expand([d_out, d_in], false);
            if let Form::LowRank { down, up } = adapter.change(&weight, *strength).form {
                downs.push(down.to_kind(Kind::Float));
                ups.push(up.to_kind(Kind::Float));
            }
        }
        let filter = parameter(chain[0].1, "lora_A.weight").size()[1..].to_vec();
        stacked.push((name, Tensor::cat(&downs, 0), Tensor::cat(&ups, 1), filter));
    }
    // One rank for all layers: rows and columns of zeros add nothing.
    let rank = stacked.iter().map(|(_, down, ..)| down.size()[0]).max().unwrap_or(1);
    let mut tensors = Vec::new();
    for (name, down, up, filter) in stacked {
        let missing = rank - down.size()[0];
        let (down, up) = (down.constant_pad_nd([0, 0, 0, missing]), up.constant_pad_nd([0, missing]));
        let (mut a, mut b) = (vec![rank], up.size());
        a.extend(&filter);
        if filter.len() == 3 {
            b.extend([1, 1]); // the 1x1 convolution after one with `rank` filters
        }
        tensors.push((format!("{name}.lora_A.weight"), down.reshape(a)));
        tensors.push((format!("{name}.lora_B.weight"), up.reshape(b)));
    }
    Ok((Method::Lora(LoraConfig { rank, alpha: rank as f64, rslora: false, ..config }), tensors))
}
