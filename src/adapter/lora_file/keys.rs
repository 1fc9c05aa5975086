//! Keys of LoRA files: which layer of which part a tensor belongs to, and what it is there.
//!
//! Written styles for the down half of `X = down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`:
//!
//! ```text
//! PEFT                 base_model.model.X.lora_A.weight
//! diffusers            unet.X.lora_A.weight (0.2x), unet.X.lora.down.weight (SD 1.5 scripts); `unet.` may be missing
//! attention processor  ..attn1.processor.to_q_lora.down.weight (diffusers 0.11 to 0.20), to_out_lora for to_out.0
//! kohya                lora_unet_X'.lora_down.weight, X' = X with underscores for dots, or the LDM layer's name
//! text encoder         text_encoder.text_model.Y.lora_linear_layer.down.weight, lora_te_text_model_Y'.lora_down.weight
//! ```
//!
//! What diffusers accepts is in its `loaders/lora_conversion_utils.py` and `utils/state_dict_utils.py` (0.42).

use crate::weights::part::Part;

/// What a tensor is in its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `A`, the input's half.
    Down,
    /// `B`, the output's half.
    Up,
    /// The scale's numerator.
    Alpha,
    /// DoRA's norms of rows as PEFT writes them.
    Magnitude,
    /// DoRA's norms as LyCORIS and kohya write them.
    DoraScale,
}

/// What a key says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoraKey {
    /// A tensor of a layer, named in the style's own way: dots, or underscores.
    Layer { part: Part, layer: String, role: Role },
    /// Something that would change the result and is not done here; the reason.
    Refused(&'static str),
    /// Nothing known.
    Unknown,
}

/// Endings of LoRA's own tensors; where one ends with another the longer is first.
const ROLES: [(&str, Role); 21] = [
    (".lora_A.default.weight", Role::Down),
    (".lora_B.default.weight", Role::Up),
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    ("_lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".lora.alpha", Role::Alpha),
    ("_lora.alpha", Role::Alpha),
    (".lora_linear_layer.alpha", Role::Alpha),
    (".alpha", Role::Alpha),
    (".lora_magnitude_vector.default.weight", Role::Magnitude),
    (".lora_magnitude_vector.default", Role::Magnitude),
    (".lora_magnitude_vector.weight", Role::Magnitude),
    (".lora_magnitude_vector", Role::Magnitude),
    (".dora_scale", Role::DoraScale),
];

/// Beginnings of keys that name another kind of model.
const OTHER_MODELS: [(&str, &str); 7] = [
    ("lora_te3_", "a third text encoder (SD 3), which Stable Diffusion 1, 2 and XL do not have"),
    ("text_encoder_3.", "a third text encoder (SD 3), which Stable Diffusion 1, 2 and XL do not have"),
    ("transformer.", "a diffusion transformer, which Stable Diffusion 1, 2 and XL do not have"),
    ("lora_transformer_", "a diffusion transformer, which Stable Diffusion 1, 2 and XL do not have"),
    ("lora_controlnet", "a control LoRA, which belongs to a ControlNet"),
    ("lora_prior_", "Stable Cascade, another model"),
    ("bundle_emb.", "trained tokens (a bundled embedding), which are not read"),
];

/// Parts of keys of other methods, and of LoRA's additions.
const OTHER_METHODS: [(&str, &str); 22] = [
    (
        ".lora_mid.weight",
        "a core between down and up (LyCORIS' tucker decomposition), which is not done here",
    ),
    (".lora_B.bias", "biases of the LoRA itself (lora_bias), which are not done here"),
    (".lora_up.bias", "biases of the LoRA itself (lora_bias), which are not done here"),
    (".lora.up.bias", "biases of the LoRA itself (lora_bias), which are not done here"),
    (".base_layer.bias", "trained biases, which a single LoRA file cannot have here; give the PEFT folder"),
    (".lora_embedding_", "a LoRA of token embeddings, which is not done here"),
    (".modules_to_save.", "whole trained layers (modules_to_save), which are not done here"),
    (".hra_u", "HRA vectors: give their PEFT folder"),
    (".oft_R", "OFT rotations: give their PEFT folder"),
    (".boft_R", "BOFT rotations: give their PEFT folder"),
    (".boft_s", "BOFT rotations: give their PEFT folder"),
    (".oft_blocks", "OFT of kohya or LyCORIS, which rotates outputs and is not done here"),
    (".oft_diag", "OFT of kohya or LyCORIS, which rotates outputs and is not done here"),
    (".hada_", "LoHa, which is not done here"),
    (".lokr_", "LoKr, which is not done here"),
    (".a1.weight", "GLoRA, which is not done here"),
    (".on_input", "IA3, which is not done here"),
    (".ia3_l", "IA3, which is not done here"),
    (".vera_lambda", "VeRA, which is not done here"),
    (".diff_b", "differences of whole biases, which are not done here"),
    (".diff", "differences of whole weights, which are not done here"),
    (".w_norm", "trained norms, which are not done here"),
];

/// Beginnings that say which part a layer is of; one that begins with another is the longer and comes first.
const PARTS: [(&str, Part); 9] = [
    ("unet.", Part::UNet),
    ("text_encoder.", Part::TextEncoder),
    ("text_encoder_2.", Part::TextEncoder2),
    ("lora_unet_", Part::UNet),
    ("lora_te1_", Part::TextEncoder),
    ("lora_te2_", Part::TextEncoder2),
    ("lora_te_", Part::TextEncoder),
    ("model.diffusion_model.", Part::UNet),
    ("diffusion_model.", Part::UNet),
];

/// Reads a key.
pub fn parse(key: &str) -> LoraKey {
    let bare = key.strip_prefix("base_model.model.").unwrap_or(key);
    if let Some((_, why)) = OTHER_MODELS.iter().find(|(start, _)| bare.starts_with(start)) {
        return LoraKey::Refused(why);
    }
    let ending = ROLES.iter().find_map(|(end, role)| Some((bare.strip_suffix(end)?, *role)));
    let Some((module, role)) = ending.filter(|(module, _)| !module.is_empty()) else {
        let other = OTHER_METHODS.iter().find(|(part, _)| bare.contains(part));
        return other.map_or(LoraKey::Unknown, |(_, why)| LoraKey::Refused(why));
    };
    let named = PARTS.iter().find_map(|(start, part)| Some((module.strip_prefix(start)?, *part)));
    let (module, part) = named.unwrap_or_else(|| {
        let is_text = ["text_model.", "encoder.layers."].iter().any(|start| module.starts_with(start));
        (module, if is_text { Part::TextEncoder } else { Part::UNet })
    });
    let module = module.replace(".processor.", ".");
    // The processors of old gave all attention the UNet's names.
    let renamed = match part {
        Part::UNet => &[(".to_out", ".to_out.0")][..],
        _ => &[(".to_q", ".q_proj"), (".to_k", ".k_proj"), (".to_v", ".v_proj"), (".to_out", ".out_proj")],
    };
    let renamed = renamed.iter().find_map(|(old, new)| Some(format!("{}{new}", module.strip_suffix(old)?)));
    LoraKey::Layer { part, layer: renamed.unwrap_or(module), role }
}

/// A layer's name as all styles can give it: underscores for dots, and no `text_model` before it.
pub fn canonical(layer: &str) -> String {
    let name = layer.replace('.', "_");
    name.strip_prefix("text_model_").map_or(name.clone(), str::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(key: &str) -> (Part, String, Role) {
        match parse(key) {
            LoraKey::Layer { part, layer, role } => (part, canonical(&layer), role),
            other => panic!("{key}: {other:?}"),
        }
    }

    #[test]
    fn every_style_names_the_same_layer() {
        let layer = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0";
        let dotted = "down_blocks.0.attentions.0.transformer_blocks.0.attn1";
        for key in [
            format!("base_model.model.{dotted}.to_out.0.lora_A.weight"),
            format!("unet.{dotted}.to_out.0.lora_A.weight"),
            format!("{dotted}.to_out.0.lora_A.weight"),
            format!("unet.{dotted}.to_out.0.lora.down.weight"),
            format!("unet.{dotted}.processor.to_out_lora.down.weight"),
            format!("{dotted}.processor.to_out_lora.down.weight"),
            format!("lora_unet_{layer}.lora_down.weight"),
        ] {
            assert_eq!(found(&key), (Part::UNet, layer.to_string(), Role::Down), "{key}");
        }
        let layer = "encoder_layers_3_self_attn_q_proj";
        let dotted = "encoder.layers.3.self_attn";
        for key in [
            format!("base_model.model.{dotted}.q_proj.lora_B.weight"),
            format!("base_model.model.text_model.{dotted}.q_proj.lora_B.weight"),
            format!("text_encoder.{dotted}.q_proj.lora_B.weight"),
            format!("text_encoder.text_model.{dotted}.q_proj.lora_linear_layer.up.weight"),
            format!("text_encoder.text_model.{dotted}.to_q_lora.up.weight"),
            format!("lora_te_text_model_{layer}.lora_up.weight"),
            format!("lora_te1_text_model_{layer}.lora_up.weight"),
        ] {
            assert_eq!(found(&key), (Part::TextEncoder, layer.to_string(), Role::Up), "{key}");
        }
    }

    #[test]
    fn what_is_not_done_is_told_apart_from_what_is_unknown() {
        for (key, word) in [
            ("lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight", "SD 3"),
            ("transformer.blocks.0.attn.to_q.lora_A.weight", "transformer"),
            ("lora_unet_conv_in.lora_mid.weight", "tucker"),
            ("base_model.model.conv_in.lora_B.bias", "lora_bias"),
            ("base_model.model.conv_in.hra_u", "PEFT folder"),
            ("lora_unet_conv_in.hada_w1_a", "LoHa"),
            ("lora_unet_conv_in.diff", "whole weights"),
        ] {
            match parse(key) {
                LoraKey::Refused(why) => assert!(why.contains(word), "{key}: {why}"),
                other => panic!("{key}: {other:?}"),
            }
        }
        for key in ["", ".alpha", "lora_A.weight", "x", "unet.conv_in.weight"] {
            assert_eq!(parse(key), LoraKey::Unknown, "{key}");
        }
    }
}
