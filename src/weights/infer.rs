//! What a checkpoint's shapes say of its model, as the config files that a Hugging Face folder would have.
//!
//! Shapes tell sizes and blocks, not numbers of heads, activations or norm groups. Those are the ones of the families that were
//! published as checkpoints, told apart by the width of the text states: 768 is Stable Diffusion 1.x, 1024 is 2.x, 2048 is XL and
//! 1280 its refiner. For any other width the user has to give the files.

use crate::error::{Error, Result};
use crate::weights::ldm::{LdmText, LdmTextTower, VAE};
use crate::weights::part::Part;
use crate::weights::prediction::Prediction;
use crate::weights::tensor_file::TensorFile;
use serde_json::{Value, json};

/// Values in a head of attention, wherever a family has a fixed width and not a fixed number of them.
const HEAD: i64 = 64;

/// Layers of OpenCLIP's tower that Stable Diffusion 2.x uses: all but the last of 24.
const OPEN_CLIP_LAYERS: usize = 23;

/// What the latents of Stable Diffusion XL are multiplied by.
pub const XL_SCALE: f64 = 0.13025;

/// Channels of the latents of Stable Diffusion 1.x, 2.x and XL, whose VAEs all have the convolutions around the latents.
const USUAL_CHANNELS: i64 = 4;

/// Values for each of the numbers of sizes that Stable Diffusion XL is told.
const SIZE_FEATURES: i64 = 256;

#[derive(Clone, Copy, PartialEq, Eq)]
enum ModelFamily {
    One,
    Two,
    Xl,
    Refiner,
}

impl ModelFamily {
    fn is_xl(self) -> bool {
        matches!(self, Self::Xl | Self::Refiner)
    }
}

/// The hub's repository whose settings fit the file, for a hint; `prediction` is what is known of it.
pub fn hub_repository(file: &TensorFile, prediction: Option<Prediction>) -> &'static str {
    // Latents, a mask and a masked picture.
    let inpainting =
        dimension_of(file, "model.diffusion_model.input_blocks.0.0.weight", 1).is_ok_and(|n| n == 9);
    match (context_width(file), inpainting, prediction) {
        (Some(2048), true, _) => "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        (Some(2048), false, _) => "stabilityai/stable-diffusion-xl-base-1.0",
        (Some(1280), ..) => "stabilityai/stable-diffusion-xl-refiner-1.0",
        (Some(1024), true, _) => "stabilityai/stable-diffusion-2-inpainting",
        (Some(1024), false, Some(Prediction::Velocity)) => "stabilityai/stable-diffusion-2-1",
        (Some(1024), false, Some(_)) => "stabilityai/stable-diffusion-2-1-base",
        (Some(1024), false, None) => {
            "stabilityai/stable-diffusion-2-1-base (512 pixels) or stabilityai/stable-diffusion-2-1 (768 pixels), and say which by \
             --prediction epsilon (512) or --prediction v_prediction (768): the file does not tell. The page that it is from does, \
             mostly by its size; with the wrong one pictures are noise or blobs"
        }
        (_, false, _) => "stable-diffusion-v1-5/stable-diffusion-v1-5",
        (_, true, _) => "stable-diffusion-v1-5/stable-diffusion-inpainting",
    }
}

/// `unet/config.json`. Its size is what the metadata say (`modelspec.resolution`); else a second-generation model that predicts
/// velocity was trained at 768 pixels, all others at 512.
pub fn unet(file: &TensorFile, velocity: bool) -> Result<Value> {
    let family = family(file)?;
    let at = |name: &str| format!("model.diffusion_model.{name}");
    let size = |name: &str, dimension: usize| dimension_of(file, &at(name), dimension);
    let has = |name: &str| file.shape(&at(name)).is_some();

    let mut channels = Vec::new();
    let (mut layers, mut attends, mut depths) = (vec![0], Vec::new(), Vec::new());
    let mut n = 1;
    while has(&format!("input_blocks.{n}.0.out_layers.3.weight"))
        || has(&format!("input_blocks.{n}.0.op.weight"))
    {
        if has(&format!("input_blocks.{n}.0.op.weight")) {
            layers.push(0);
        } else if layers[layers.len() - 1] == 0 {
            channels.push(size(&format!("input_blocks.{n}.0.out_layers.3.weight"), 0)?);
            attends.push(has(&format!("input_blocks.{n}.1.proj_in.weight")));
            depths.push(depth(file, &at(&format!("input_blocks.{n}.1"))));
            *layers.last_mut().expect("never empty") = 1;
        } else {
            *layers.last_mut().expect("never empty") += 1;
        }
        n += 1;
    }
    if channels.is_empty() || layers.contains(&0) || layers.len() != channels.len() {
        return Err(Error::format(
            file.path(),
            "expected the blocks of a UNet, found others (input_blocks.*)",
        ));
    }
    let levels = channels.len();
    let mut up = Vec::new();
    n = 0;
    for level in (0..levels).rev() {
        up.push(has(&format!("output_blocks.{n}.1.proj_in.weight")));
        depths[level] = depths[level].max(depth(file, &at(&format!("output_blocks.{n}.1"))));
        n += layers[level] + 1;
    }
    // The middle takes its depth from the innermost level, which need not attend itself.
    depths[levels - 1] = depths[levels - 1].max(depth(file, &at("middle_block.1")));
    let named = |list: &[bool], with: &str, without: &str| -> Vec<String> {
        list.iter().map(|a| if *a { with.to_string() } else { without.to_string() }).collect()
    };
    let linear = file.shape(&at("middle_block.1.proj_in.weight")).is_some_and(|shape| shape.len() == 2);
    let heads: Value = match family {
        ModelFamily::One => 8.into(),
        _ => channels.iter().map(|c| c / HEAD).collect(),
    };
    let usual_size = match family {
        ModelFamily::Xl | ModelFamily::Refiner => 128,
        ModelFamily::Two if velocity => 96,
        ModelFamily::One | ModelFamily::Two => 64,
    };
    let mut config = json!({
        "_class_name": "UNet2DConditionModel",
        "in_channels": size("input_blocks.0.0.weight", 1)?,
        "out_channels": size("out.2.weight", 0)?,
        "sample_size": size_of_metadata(file).unwrap_or(usual_size),
        "block_out_channels": channels,
        "layers_per_block": one_or_each(layers),
        "transformer_layers_per_block": one_or_each(depths.iter().map(|d| (*d).max(1)).collect()),
        "down_block_types": named(&attends, "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": named(&up, "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": context_width(file),
        "attention_head_dim": heads,
        "use_linear_projection": linear,
        // 2.1's scores leave the range of f16.
        "upcast_attention": family == ModelFamily::Two,
        "norm_num_groups": 32,
        "act_fn": "silu",
    });
    if family.is_xl() {
        config["addition_embed_type"] = "text_time".into();
        config["addition_time_embed_dim"] = SIZE_FEATURES.into();
        config["projection_class_embeddings_input_dim"] = size("label_emb.0.0.weight", 1)?.into();
    }
    Ok(config)
}

/// Latents along one edge of the square pictures that the metadata name (`512x512`), as published files have it.
fn size_of_metadata(file: &TensorFile) -> Option<i64> {
    let (width, height) = file.text("modelspec.resolution")?.split_once('x')?;
    let pixels =
        width.trim().parse::<i64>().ok().filter(|pixels| pixels % 8 == 0 && (64..=4096).contains(pixels))?;
    (height.trim() == width.trim()).then_some(pixels / 8)
}

/// `vae/config.json` of a whole checkpoint.
pub fn vae_of_checkpoint(file: &TensorFile) -> Result<Value> {
    let mut config = vae(file, VAE)?;
    if family(file)?.is_xl() {
        config["scaling_factor"] = XL_SCALE.into();
        config["force_upcast"] = true.into();
        config["sample_size"] = 1024.into();
    }
    Ok(config)
}

/// `vae/config.json` of Stable Diffusion 1.x or 2.x, of LDM's keys behind `prefix`.
pub fn vae(file: &TensorFile, prefix: &str) -> Result<Value> {
    vae_of(file, &|i, j| format!("{prefix}encoder.down.{i}.block.{j}.conv2.weight"), prefix)
}

/// `vae/config.json`, of a file with the keys that folders have.
pub fn vae_of_today(file: &TensorFile) -> Result<Value> {
    vae_of(file, &|i, j| format!("encoder.down_blocks.{i}.resnets.{j}.conv2.weight"), "")
}

/// The same; `block` names the encoder's layers by level and number.
fn vae_of(file: &TensorFile, block: &dyn Fn(usize, usize) -> String, prefix: &str) -> Result<Value> {
    let at = |name: &str| format!("{prefix}{name}");
    let size = |name: &str, dimension: usize| dimension_of(file, &at(name), dimension);
    let has = |i: usize, j: usize| file.shape(&block(i, j)).is_some();
    let levels = count(|i| has(i, 0));
    // Where one alone is there, or the latents are those of Stable Diffusion, the other is missing.
    let there = |name: &&str| file.shape(&at(&format!("{name}.weight"))).is_some();
    let is_usual = size("decoder.conv_in.weight", 1).is_ok_and(|channels| channels == USUAL_CHANNELS);
    let is_quantised = is_usual || ["quant_conv", "post_quant_conv"].iter().any(there);
    let channels: Vec<i64> =
        (0..levels).map(|i| dimension_of(file, &block(i, 0), 0)).collect::<Result<_>>()?;
    Ok(json!({
        "_class_name": "AutoencoderKL",
        "in_channels": size("encoder.conv_in.weight", 1)?,
        "out_channels": size("decoder.conv_out.weight", 0)?,
        "block_out_channels": channels,
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "layers_per_block": count(|j| has(0, j)),
        "latent_channels": if is_quantised { size("post_quant_conv.weight", 0)? } else { size("decoder.conv_in.weight", 1)? },
        "use_quant_conv": is_quantised,
        "use_post_quant_conv": is_quantised,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
        "sample_size": 512,
        "act_fn": "silu",
    }))
}

/// The `config.json` of a text tower.
pub fn text_encoder(file: &TensorFile, LdmText { part, tower, prefix }: LdmText) -> Result<Value> {
    let family = family(file)?;
    let plain = file.shape(&format!("{prefix}embeddings.token_embedding.weight")).is_some();
    let [tokens, positions, hidden, block] = match tower {
        LdmTextTower::OpenClip => {
            ["token_embedding.weight", "positional_embedding", "mlp.c_fc.weight", "transformer.resblocks"]
        }
        LdmTextTower::Clip => [
            "embeddings.token_embedding.weight",
            "embeddings.position_embedding.weight",
            "mlp.fc1.weight",
            "encoder.layers",
        ],
    };
    let inner = if tower == LdmTextTower::Clip && !plain { "text_model." } else { "" };
    let at = |name: &str| format!("{prefix}{inner}{name}");
    let layers = count(|i| file.shape(&at(&format!("{block}.{i}.{hidden}"))).is_some());
    let width = dimension_of(file, &at(tokens), 1)?;
    let two = family == ModelFamily::Two;
    let projects = part == Part::TextEncoder2;
    let projected = || dimension_of(file, &at("text_projection"), 1);
    Ok(json!({
        "architectures": [if projects { "CLIPTextModelWithProjection" } else { "CLIPTextModel" }],
        "model_type": "clip_text_model",
        "vocab_size": dimension_of(file, &at(tokens), 0)?,
        "hidden_size": width,
        "projection_dim": if projects { projected()? } else if two { width / 2 } else { width },
        "intermediate_size": dimension_of(file, &at(&format!("{block}.0.{hidden}")), 0)?,
        "num_hidden_layers": if two { layers.min(OPEN_CLIP_LAYERS) } else { layers },
        "num_attention_heads": width / HEAD,
        "max_position_embeddings": dimension_of(file, &at(positions), 0)?,
        "hidden_act": if tower == LdmTextTower::OpenClip { "gelu" } else { "quick_gelu" },
        "layer_norm_eps": 1e-5,
    }))
}

/// One number where all are the same, as published files have it: not every reader takes a list.
fn one_or_each(numbers: Vec<usize>) -> Value {
    if numbers.iter().all(|n| *n == numbers[0]) { numbers[0].into() } else { numbers.into() }
}

fn family(file: &TensorFile) -> Result<ModelFamily> {
    match context_width(file) {
        Some(768) => Ok(ModelFamily::One),
        Some(1024) => Ok(ModelFamily::Two),
        Some(2048) => Ok(ModelFamily::Xl),
        Some(1280) => Ok(ModelFamily::Refiner),
        found => Err(Error::format(
            file.path(),
            format!("expected a UNet that attends to text states of width 768 (Stable Diffusion 1.x), 1024 (2.x), \
                     2048 (XL) or 1280 (its refiner), found {}", found.map_or("none".to_string(), |width| width.to_string())),
        ).with_hint("for another model give --config DIR (--model-config for training): a folder with \
                     unet/config.json, vae/config.json, text_encoder/config.json, tokenizer/ and scheduler/")),
    }
}

/// The width of the text states that the UNet's middle attends to.
fn context_width(file: &TensorFile) -> Option<i64> {
    let key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight";
    file.shape(key)?.get(1).copied()
}

/// Transformer blocks of the attention module at `place`; none, if there is no such module.
fn depth(file: &TensorFile, place: &str) -> usize {
    count(|i| file.shape(&format!("{place}.transformer_blocks.{i}.norm1.weight")).is_some())
}

fn count(there: impl Fn(usize) -> bool) -> usize {
    (0..).take_while(|i| there(*i)).count()
}

fn dimension_of(file: &TensorFile, key: &str, dimension: usize) -> Result<i64> {
    let shape = file.shape(key);
    shape.as_ref().and_then(|shape| shape.get(dimension).copied()).ok_or_else(|| {
        let found = shape.map_or("nothing".to_string(), |shape| format!("{shape:?}"));
        Error::format(
            file.path(),
            format!("`{key}`: expected a size in dimension {dimension}, found {found}"),
        )
    })
}
