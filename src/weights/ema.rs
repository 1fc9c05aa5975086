//! The averaged UNet of a checkpoint that its training left (`model_ema.*`).
//!
//! LDM's `LitEma` names a tensor by its whole name without the dots: `diffusion_model.input_blocks.11.0.in_layers.0.weight` is
//! `model_ema.diffusion_modelinput_blocks110in_layers0weight` (`ldm/modules/ema.py`).

use crate::weights::ldm::UNET;

/// How the averaged UNet's keys begin.
pub const EMA: &str = "model_ema.diffusion_model";

/// The words of the UNet's names (`ldm/modules/diffusionmodules/openaimodel.py`, `ldm/modules/attention.py`).
const WORDS: [&str; 27] = [
    "attn1",
    "attn2",
    "bias",
    "conv",
    "emb_layers",
    "ff",
    "in_layers",
    "input_blocks",
    "middle_block",
    "net",
    "norm",
    "norm1",
    "norm2",
    "norm3",
    "op",
    "out",
    "out_layers",
    "output_blocks",
    "proj",
    "proj_in",
    "proj_out",
    "skip_connection",
    "time_embed",
    "to_out",
    "transformer_blocks",
    "weight",
    "to_",
];

/// The key under which the UNet itself has an averaged tensor; `None` for any other key.
pub fn usual_key(key: &str) -> Option<String> {
    let mut rest = key.strip_prefix(EMA).filter(|rest| !rest.is_empty())?;
    let mut parts: Vec<&str> = Vec::new();
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let word = WORDS.iter().filter(|word| rest.starts_with(**word)).map(|word| word.len()).max();
        let (part, after) = match word {
            _ if digits > 0 => rest.split_at(digits),
            // to_q, to_k, to_v.
            Some(3) if rest.starts_with("to_") => rest.split_at_checked(4)?,
            Some(length) => rest.split_at(length),
            None => return None,
        };
        match parts.last() {
            // A block has up to three modules, so its last digit is the module's.
            Some(&("input_blocks" | "output_blocks")) if digits > 1 => {
                parts.extend([&part[..digits - 1], &part[digits - 1..]]);
            }
            _ => parts.push(part),
        }
        rest = after;
    }
    Some(format!("{UNET}{}", parts.join(".")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_come_back() {
        for key in [
            "input_blocks.0.0.weight",
            "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
            "input_blocks.11.0.in_layers.0.weight",
            "input_blocks.3.0.op.bias",
            "middle_block.1.norm.weight",
            "middle_block.1.transformer_blocks.10.norm3.bias",
            "middle_block.2.out_layers.3.bias",
            "output_blocks.5.2.conv.weight",
            "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0.bias",
            "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
            "output_blocks.11.1.transformer_blocks.0.ff.net.2.weight",
            "output_blocks.9.0.skip_connection.weight",
            "output_blocks.9.1.proj_in.weight",
            "input_blocks.4.0.emb_layers.1.weight",
            "time_embed.2.bias",
            "out.0.weight",
            "out.2.bias",
        ] {
            let flat = format!("{EMA}{}", key.replace('.', ""));
            assert_eq!(usual_key(&flat), Some(format!("{UNET}{key}")), "{flat}");
        }
        for other in
            ["model_ema.decay", "model_ema.num_updates", "model_ema.diffusion_modelmystery0weight", EMA]
        {
            assert_eq!(usual_key(other), None, "{other}");
        }
    }
}
