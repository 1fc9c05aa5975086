//! Writing LoRA files that other programs load as they are.
//!
//! [`Style::Diffusers`] is the one spelling that diffusers' `load_lora_weights` and ComfyUI's loader have in common: attention
//! with processor names (`unet.X.attn1.processor.to_q_lora.up.weight`), other layers with `.lora.up.weight`, the text encoder
//! with `.lora_linear_layer.up.weight`; ComfyUI looks under no other name for attention, and diffusers turns these into
//! PEFT's (`convert_unet_state_dict_to_peft`). No alpha is in it, which both take as a scale of 1.
//!
//! [`Style::Kohya`] is for A1111, ComfyUI and diffusers; of Stable Diffusion XL ([`Style::KohyaXl`]) the UNet's layers have the names of
//! checkpoints, and the first text encoder is `te1`, as kohya's `sdxl_train_network.py` has them. All layers get the same alpha, the largest rank, and `up` is scaled
//! where a layer's rank is smaller: diffusers 0.42 loses the alphas of attention layers where they differ.

use crate::error::{Error, Result};
use crate::platform::host;
use crate::weights::part::Part;
use crate::weights::tensor_file;
use std::path::Path;
use tch::{Kind, Tensor};

/// How keys are spelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// `pytorch_lora_weights.safetensors` of diffusers' Stable Diffusion 1 and 2 scripts.
    Diffusers,
    /// As kohya's trainer writes it.
    Kohya,
    /// As kohya's trainer writes it for Stable Diffusion XL.
    KohyaXl,
}

/// The change of one layer's weight: `up down`, scale 1.
#[derive(Debug)]
pub struct LayerProduct {
    /// Which part the layer is of.
    pub part: Part,
    /// The layer's own name, with dots; a text encoder's with or without `text_model.`.
    pub layer: String,
    /// A UNet layer's name in checkpoints, where it is known.
    pub ldm: Option<String>,
    /// `(r, d_in)`, or `(r, c, kh, kw)` for a convolution.
    pub down: Tensor,
    /// `(d_out, r)`, or `(d_out, r, 1, 1)` for a convolution.
    pub up: Tensor,
    /// DoRA's norms of rows, `(d_out)`.
    pub magnitude: Option<Tensor>,
}

/// Writes `changes` to `path`, whole or not at all, in f32, f16 or bf16; `text` is further metadata. Halves are scaled against
/// each other, rank by rank, so that f16 neither overflows nor loses small numbers. Errors: numbers that f16 cannot hold.
pub fn write(
    path: &Path,
    style: Style,
    changes: &[LayerProduct],
    kind: Kind,
    text: &[(&str, String)],
) -> Result<()> {
    let rank = changes.iter().map(|change| change.down.size()[0]).max().unwrap_or(1);
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    let mut problems = Vec::new();
    for change in changes {
        let own = change.down.size()[0];
        let (down, mut up) = balanced(&change.down, &change.up);
        let names = match style {
            Style::Diffusers => diffusers_names(change),
            Style::Kohya | Style::KohyaXl => {
                up *= own as f64 / rank as f64;
                kohya_names(change, style == Style::KohyaXl)
            }
        };
        let mut put = |name: String, tensor: &Tensor, kind: Kind| {
            let tensor = host::to_host(tensor).to_kind(kind);
            if !host::all_finite(&tensor) {
                problems.push(format!("`{name}`: {} cannot hold its numbers", kind_name(kind)));
            }
            tensors.push((name, tensor));
        };
        put(names.down, &down, kind);
        put(names.up, &up, kind);
        if let Some(magnitude) = &change.magnitude {
            // As PEFT and LyCORIS shape them.
            let shape = match (style, down.dim()) {
                (Style::Diffusers, 4) => vec![1, -1, 1, 1],
                (Style::Diffusers, _) => vec![-1],
                (_, 4) => vec![-1, 1, 1, 1],
                _ => vec![-1, 1],
            };
            put(names.magnitude, &magnitude.reshape(shape), kind);
        }
        if let Some(name) = names.alpha {
            put(name, &host::scalar(rank as f64, Kind::Double), Kind::Float);
        }
    }
    if !problems.is_empty() {
        return Err(Error::weights(path, problems));
    }
    let mut text = text.to_vec();
    if style != Style::Diffusers {
        text.extend([
            ("ss_network_module", "networks.lora".to_string()),
            ("ss_network_dim", rank.to_string()),
            ("ss_network_alpha", format!("{:.1}", rank as f64)),
        ]);
    }
    tensor_file::write(path, &tensors, &text)
}

/// Keys of one layer.
struct Names {
    down: String,
    up: String,
    magnitude: String,
    alpha: Option<String>,
}

fn diffusers_names(change: &LayerProduct) -> Names {
    let layer = full_name(change);
    let place = format!("{}.{layer}", change.part.folder());
    let ends_in = |end: &str| layer.ends_with(end);
    let attention =
        change.part == Part::UNet && [".to_q", ".to_k", ".to_v", ".to_out.0"].into_iter().any(ends_in);
    let stem = match attention {
        _ if change.part.is_text() => format!("{place}.lora_linear_layer"),
        false => format!("{place}.lora"),
        true => {
            let (block, projection) = place.split_once(".to_").unwrap_or((&place, ""));
            format!("{block}.processor.to_{}_lora", projection.trim_end_matches(".0"))
        }
    };
    Names {
        down: format!("{stem}.down.weight"),
        up: format!("{stem}.up.weight"),
        // transformers puts the adapter's name into the key before its end, and needs an end to find.
        magnitude: match change.part.is_text() {
            false => format!("{place}.lora_magnitude_vector"),
            true => format!("{place}.lora_magnitude_vector.weight"),
        },
        alpha: None,
    }
}

fn kohya_names(change: &LayerProduct, is_xl: bool) -> Names {
    let prefix = match change.part {
        Part::TextEncoder if is_xl => "lora_te1_",
        Part::TextEncoder => "lora_te_",
        Part::TextEncoder2 => "lora_te2_",
        _ => "lora_unet_",
    };
    let name = change.ldm.clone().filter(|_| is_xl).unwrap_or_else(|| full_name(change));
    let place = format!("{prefix}{}", name.replace('.', "_"));
    Names {
        down: format!("{place}.lora_down.weight"),
        up: format!("{place}.lora_up.weight"),
        magnitude: format!("{place}.dora_scale"),
        alpha: Some(format!("{place}.alpha")),
    }
}

/// Other programs have `text_model.` before the text encoders' names, but for the second one's projection.
fn full_name(change: &LayerProduct) -> String {
    let is_bare = !["text_model.", "text_projection"].iter().any(|start| change.layer.starts_with(start));
    if change.part.is_text() && is_bare {
        return format!("text_model.{}", change.layer);
    }
    change.layer.clone()
}

/// The same product from halves whose largest numbers are about the same, rank by rank. Factors are powers of two, so that
/// nothing is rounded.
fn balanced(down: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
    let (down, up) = (down.to_kind(Kind::Float), up.to_kind(Kind::Float));
    let largest_down = down.flatten(1, -1).abs().amax([1], false); // [r]
    let largest_up = up.flatten(1, -1).abs().amax([0], false); // [r]
    // Beside a half of zeros, which has no size, the other one gets numbers about 1.
    let size = |own: &Tensor, other: &Tensor| {
        let alone = other.where_self(&other.gt(0.0), &other.ones_like()).reciprocal();
        own.where_self(&own.gt(0.0), &alone)
    };
    let ratio = size(&largest_up, &largest_down) / size(&largest_down, &largest_up);
    let factor = (ratio.log2() * 0.5).round().exp2(); // [r]
    let rows: Vec<i64> = std::iter::once(-1).chain(vec![1; down.dim() - 1]).collect();
    let columns: Vec<i64> = [1, -1].into_iter().chain(vec![1; up.dim() - 2]).collect();
    (down * factor.reshape(rows), up / factor.reshape(columns))
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Half => "f16",
        Kind::BFloat16 => "bf16",
        _ => "f32",
    }
}
