//! Which other family of models a file, a folder or an adapter is of, told by what only that family has.
//!
//! Names of tensors: `comfy/model_detection.py` of ComfyUI and `loaders/single_file_utils.py` of diffusers look for the same ones.

use crate::error::{Error, Result};
use crate::platform::adapter_layout::PEFT_CONFIG;
use crate::platform::files;
use serde_json::Value;
use std::path::Path;

/// A family that is not read here.
struct OtherFamily {
    name: &'static str,
    /// How keys of its checkpoints begin, behind `model.diffusion_model.` where that is there. One of these lists, all of it.
    keys: &'static [&'static [&'static str]],
    /// How the classes of its folders begin, those of pipelines and of networks.
    classes: &'static [&'static str],
    /// Parts of the keys of its adapters.
    adapter: &'static [&'static str],
    /// Parts of what metadata call it, in small letters.
    words: &'static [&'static str],
}

/// What is told where only so much is known.
const TRANSFORMER: &str = "a diffusion transformer, such as Flux or Stable Diffusion 3";

/// Of two that share a name the narrower is first.
const FAMILIES: [OtherFamily; 9] = [
    OtherFamily {
        name: "HunyuanVideo",
        keys: &[&["txt_in.individual_token_refiner."]],
        classes: &["HunyuanVideo"],
        adapter: &["individual_token_refiner"],
        words: &["hunyuan"],
    },
    OtherFamily {
        name: "Chroma",
        keys: &[&["distilled_guidance_layer."]],
        classes: &["Chroma"],
        adapter: &["distilled_guidance_layer"],
        words: &["chroma"],
    },
    OtherFamily {
        name: "Flux.2",
        keys: &[&["double_stream_modulation_img."]],
        classes: &["Flux2"],
        adapter: &[],
        words: &["flux-2", "flux.2"],
    },
    OtherFamily {
        name: "Flux",
        keys: &[&["double_blocks."], &["single_blocks."], &["single_transformer_blocks."]],
        classes: &["Flux"],
        adapter: &["double_blocks", "single_blocks", "single_transformer_blocks"],
        words: &["flux"],
    },
    OtherFamily {
        name: "Stable Diffusion 3",
        keys: &[&["joint_blocks."], &["transformer_blocks.0.ff_context."], &["text_encoders.clip_g."]],
        classes: &["StableDiffusion3", "SD3"],
        adapter: &["joint_blocks", "lora_te3_", "text_encoder_3."],
        words: &["stable-diffusion-3", "stable-diffusion-v3", "sd3"],
    },
    OtherFamily {
        name: "PixArt",
        keys: &[&["y_embedder."], &["pos_embed.proj.", "adaln_single."]],
        classes: &["PixArt"],
        adapter: &["adaln_single"],
        words: &["pixart"],
    },
    OtherFamily {
        name: "Stable Cascade",
        keys: &[
            &["clip_txt_mapper."],
            &["clip_txt_pooled_mapper."],
            &["down_blocks.0.0.channelwise."],
            &["down_blocks.1.0.channelwise."],
        ],
        classes: &["StableCascade", "Wuerstchen"],
        adapter: &["lora_prior_"],
        words: &["stable-cascade", "wuerstchen"],
    },
    OtherFamily {
        name: "AuraFlow",
        keys: &[&["double_layers."]],
        classes: &["AuraFlow"],
        adapter: &["double_layers"],
        words: &["auraflow"],
    },
    OtherFamily {
        name: TRANSFORMER,
        keys: &[&["transformer_blocks.0."]],
        classes: &[],
        adapter: &["lora_transformer_", "transformer.transformer_blocks.", "add_k_proj", "ff_context"],
        words: &[],
    },
];

/// The family of a checkpoint with these keys; `None` where it may be Stable Diffusion, or is no model.
pub fn of_keys(names: &[String]) -> Option<&'static str> {
    // The text towers of 1.x and 2.x, and of XL.
    let own = ["cond_stage_model.", "conditioner.embedders."];
    if names.iter().any(|name| own.iter().any(|start| name.starts_with(start))) {
        return None;
    }
    let inner = |name: &'_ str| name.strip_prefix("model.diffusion_model.").unwrap_or(name).to_string();
    let names: Vec<String> = names.iter().map(|name| inner(name)).collect();
    let has = |start: &&str| names.iter().any(|name| name.starts_with(start));
    let is = |family: &&OtherFamily| family.keys.iter().any(|all| all.iter().all(has));
    FAMILIES.iter().find(is).map(|family| family.name)
}

/// The family of an adapter with these keys, whose metadata call its base model `said`.
pub fn of_adapter(names: &[String], said: &[&str]) -> Option<&'static str> {
    let by_keys = |family: &&OtherFamily| {
        family.adapter.iter().any(|part| names.iter().any(|name| name.contains(part)))
    };
    let by_words = |family: &&OtherFamily| {
        let said = said.iter().map(|text| text.to_lowercase());
        said.into_iter().any(|text| family.words.iter().any(|word| text.contains(word)))
    };
    let found = FAMILIES.iter().find(by_keys);
    let sure = found.filter(|family| family.name != TRANSFORMER);
    sure.or_else(|| FAMILIES.iter().find(by_words)).or(found).map(|family| family.name)
}

/// Whether metadata that call a model so mean Stable Diffusion XL.
pub fn names_xl(said: &str) -> bool {
    let said = said.to_lowercase();
    said.contains("stable-diffusion-xl") || said.contains("sdxl")
}

/// Whether metadata that call a model so mean Stable Diffusion 1.x or 2.x.
pub fn names_one_or_two(said: &str) -> bool {
    let said = said.to_lowercase();
    ["stable-diffusion-v1", "stable-diffusion-v2", "sd_v1", "sd_v2"]
        .iter()
        .any(|start| said.starts_with(start))
}

/// The family of a model folder: by the class that its `model_index.json` names, else by the folders in it.
pub fn of_folder(dir: &Path) -> Option<String> {
    let class = |name: &str| {
        let value: Value = serde_json::from_str(&files::read_to_string(&dir.join(name)).ok()?).ok()?;
        value["_class_name"].as_str().map(str::to_string)
    };
    let classes = ["model_index.json", "transformer/config.json"].map(class);
    let of_class = |name: &String| {
        let is = |family: &&OtherFamily| family.classes.iter().any(|start| name.starts_with(start));
        FAMILIES.iter().find(is).map(|family| family.name.to_string())
    };
    if let Some(family) = classes.iter().flatten().find_map(of_class) {
        return Some(family);
    }
    // Adapters of several networks lie in folders of the same names.
    let has = |part: &str| dir.join(part).is_dir() && !dir.join(part).join(PEFT_CONFIG).is_file();
    if has("transformer") && !has("unet") {
        let named = classes.into_iter().flatten().next();
        return Some(named.unwrap_or_else(|| TRANSFORMER.into()));
    }
    None
}

/// The refusal of `what` (a checkpoint, a model folder) at `path`, which is of `family`.
pub fn refusal(path: &Path, what: &str, family: &str) -> Error {
    let problem = format!(
        "expected a Stable Diffusion 1.x, 2.x or XL model, found a {what} of another family ({family})"
    );
    Error::format(path, problem)
        .with_hint("models of this family are not supported; give one of 1.x, 2.x or XL")
}

/// What is wrong with an adapter of `family`.
pub fn adapter_problem(family: &str) -> String {
    format!("it is an adapter for models of another family ({family}), which are not supported")
}

/// Refuses a folder of another family.
pub fn check_folder(dir: &Path) -> Result<()> {
    of_folder(dir).map_or(Ok(()), |family| Err(refusal(dir, "model folder", &family)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(keys: &[&str]) -> Vec<String> {
        keys.iter().map(|key| key.to_string()).collect()
    }

    /// Keys that stand in the published files.
    #[test]
    fn published_checkpoints_are_named() {
        for (key, family) in [
            ("double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
            ("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
            ("single_transformer_blocks.0.proj_mlp.weight", "Flux"),
            ("joint_blocks.0.context_block.adaLN_modulation.1.bias", "Stable Diffusion 3"),
            (
                "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias",
                "Stable Diffusion 3",
            ),
            ("y_embedder.y_proj.fc1.weight", "PixArt"),
            ("clip_txt_mapper.weight", "Stable Cascade"),
            ("down_blocks.1.0.channelwise.0.weight", "Stable Cascade"),
        ] {
            assert_eq!(of_keys(&names(&[key])), Some(family), "{key}");
        }
        for own in [
            "down_blocks.0.resnets.0.conv1.weight",
            "model.diffusion_model.out.2.weight",
            "model.diffusion_model.label_emb.0.0.weight",
            "conditioner.embedders.1.model.ln_final.bias",
        ] {
            assert_eq!(of_keys(&names(&[own])), None, "{own}");
        }
    }

    #[test]
    fn adapters_are_named_by_their_keys_or_by_their_metadata() {
        for (key, family) in [
            ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux"),
            ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
            ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "Stable Diffusion 3"),
            ("transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight", TRANSFORMER),
        ] {
            assert_eq!(of_adapter(&names(&[key]), &[]), Some(family), "{key}");
        }
        let plain = names(&["lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight"]);
        assert_eq!(of_adapter(&plain, &["sd_v1"]), None);
        assert_eq!(of_adapter(&plain, &["stable-diffusion-v1/lora"]), None);
        assert_eq!(of_adapter(&plain, &["sdxl_base_v1-0"]), None);
        assert_eq!(of_adapter(&plain, &["stable-diffusion-3-medium"]), Some("Stable Diffusion 3"));
    }
}
