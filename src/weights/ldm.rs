//! The tensor names of single-file checkpoints (CompVis/latent-diffusion and Stability-AI/stablediffusion), beside today's.
//!
//! Both layouts hold the same modules; LDM numbers the UNet's blocks through from end to end, counts the VAE's decoder
//! levels from the picture up, and has OpenCLIP's text tower with query, key and value stacked in one matrix. The tables
//! follow from a model's config, so any number of levels, layers and transformer blocks is served. Published in the
//! architectures themselves: `ldm/modules/diffusionmodules/{openaimodel,model}.py`, `open_clip/transformer.py`.

use crate::weights::config::UNetLevel;
use crate::weights::part::Part;
use std::collections::HashMap;

/// How the tensor of one layout comes out of the other's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorForm {
    /// The same tensor, but for dimensions of size 1 at its end.
    Same,
    /// This third of the rows: query, key and value lie in one LDM tensor.
    Third(usize),
    /// The transposed matrix.
    Transposed,
}

/// The layout of a checkpoint's text tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LdmTextTower {
    /// OpenAI's CLIP by transformers' names (Stable Diffusion 1.x).
    Clip,
    /// OpenCLIP's own (Stable Diffusion 2.x).
    OpenClip,
}

impl LdmTextTower {
    /// The tower that LDM's code builds for this activation: it is not among the weights, so it decides.
    pub fn of_activation(hidden_act: &str) -> Self {
        if hidden_act == "gelu" { Self::OpenClip } else { Self::Clip }
    }
}

/// A text tower's place in checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LdmText {
    /// Which tower it is in a folder.
    pub part: Part,
    /// How its tensors are named.
    pub tower: LdmTextTower,
    /// How its keys begin.
    pub prefix: &'static str,
}

impl LdmText {
    /// Of Stable Diffusion 1.x.
    pub const ONE: Self =
        Self { part: Part::TextEncoder, tower: LdmTextTower::Clip, prefix: "cond_stage_model.transformer." };
    /// Of Stable Diffusion 2.x.
    pub const TWO: Self =
        Self { part: Part::TextEncoder, tower: LdmTextTower::OpenClip, prefix: "cond_stage_model.model." };
    /// The first of Stable Diffusion XL.
    pub const XL_FIRST: Self = Self {
        part: Part::TextEncoder,
        tower: LdmTextTower::Clip,
        prefix: "conditioner.embedders.0.transformer.",
    };
    /// The second of Stable Diffusion XL.
    pub const XL_SECOND: Self = Self {
        part: Part::TextEncoder2,
        tower: LdmTextTower::OpenClip,
        prefix: "conditioner.embedders.1.model.",
    };
    /// The only one of Stable Diffusion XL's refiner, which is the second of its folder.
    pub const REFINER: Self = Self { prefix: "conditioner.embedders.0.model.", ..Self::XL_SECOND };

    /// Those of a model in its folder's order: `activation` is the first tower's, `parts` are the text towers that it has.
    pub fn of_folder(activation: &str, parts: &[Part]) -> Vec<Self> {
        match parts {
            [Part::TextEncoder] if LdmTextTower::of_activation(activation) == LdmTextTower::Clip => {
                vec![Self::ONE]
            }
            [Part::TextEncoder] => vec![Self::TWO],
            [Part::TextEncoder2] => vec![Self::REFINER],
            _ => vec![Self::XL_FIRST, Self::XL_SECOND],
        }
    }

    /// Those of a checkpoint whose keys begin so.
    pub fn of_keys(has: impl Fn(&str) -> bool) -> Vec<Self> {
        let one = |place: &Self| has(place.prefix);
        if let Some(single) = [Self::TWO, Self::ONE].into_iter().find(one) {
            return vec![single];
        }
        [Self::REFINER, Self::XL_FIRST, Self::XL_SECOND].into_iter().filter(one).collect()
    }
}

/// How the UNet's keys begin.
pub const UNET: &str = "model.diffusion_model.";

/// How the VAE's keys begin.
pub const VAE: &str = "first_stage_model.";

/// The names of one model part in both layouts.
#[derive(Debug)]
pub struct LdmNames {
    prefix: &'static str,
    /// Modules, and tensors that are not simply a module's: today's name to LDM's.
    to_ldm: HashMap<String, (String, TensorForm)>,
    to_today: HashMap<String, Vec<(String, TensorForm)>>,
}

impl LdmNames {
    /// The UNet's, by its levels (outermost first).
    pub fn unet(levels: &[UNetLevel]) -> Self {
        let mut names = Self::empty(UNET);
        for (today, ldm) in [
            ("conv_in", "input_blocks.0.0"),
            ("time_embedding.linear_1", "time_embed.0"),
            ("time_embedding.linear_2", "time_embed.2"),
            ("conv_norm_out", "out.0"),
            ("conv_out", "out.2"),
            ("mid_block.attentions.0", "middle_block.1"),
            ("add_embedding.linear_1", "label_emb.0.0"),
            ("add_embedding.linear_2", "label_emb.0.2"),
        ] {
            names.pair(today, ldm);
        }
        names.unet_resnet("mid_block.resnets.0", "middle_block.0");
        names.unet_resnet("mid_block.resnets.1", "middle_block.2");
        let last = levels.len().saturating_sub(1);
        let mut n = 1;
        for (i, level) in levels.iter().enumerate() {
            for j in 0..level.layers {
                names.unet_resnet(&format!("down_blocks.{i}.resnets.{j}"), &format!("input_blocks.{n}.0"));
                if level.down_attends {
                    names.pair(&format!("down_blocks.{i}.attentions.{j}"), &format!("input_blocks.{n}.1"));
                }
                n += 1;
            }
            if i < last {
                let today = format!("down_blocks.{i}.downsamplers.0.conv");
                names.pair(&today, &format!("input_blocks.{n}.0.op"));
                n += 1;
            }
        }
        n = 0;
        for (i, level) in levels.iter().rev().enumerate() {
            for j in 0..=level.layers {
                names.unet_resnet(&format!("up_blocks.{i}.resnets.{j}"), &format!("output_blocks.{n}.0"));
                if level.up_attends {
                    names.pair(&format!("up_blocks.{i}.attentions.{j}"), &format!("output_blocks.{n}.1"));
                }
                if i < last && j == level.layers {
                    // After the attention, or in its place.
                    let place = 1 + i64::from(level.up_attends);
                    let today = format!("up_blocks.{i}.upsamplers.0.conv");
                    names.pair(&today, &format!("output_blocks.{n}.{place}.conv"));
                }
                n += 1;
            }
        }
        names
    }

    /// The VAE's, by the number of its levels and of the encoder's layers in each (the decoder has one more).
    pub fn vae(levels: usize, layers: i64) -> Self {
        let mut names = Self::empty(VAE);
        names.pair("quant_conv", "quant_conv");
        names.pair("post_quant_conv", "post_quant_conv");
        for side in ["encoder", "decoder"] {
            names.pair(&format!("{side}.conv_in"), &format!("{side}.conv_in"));
            names.pair(&format!("{side}.conv_norm_out"), &format!("{side}.norm_out"));
            names.pair(&format!("{side}.conv_out"), &format!("{side}.conv_out"));
            for j in 0..2 {
                let ldm = format!("{side}.mid.block_{}", j + 1);
                names.vae_resnet(&format!("{side}.mid_block.resnets.{j}"), &ldm);
            }
            let (today, ldm) = (format!("{side}.mid_block.attentions.0"), format!("{side}.mid.attn_1"));
            for (new, old) in [
                ("group_norm", "norm"),
                ("to_q", "q"),
                ("to_k", "k"),
                ("to_v", "v"),
                ("to_out.0", "proj_out"),
            ] {
                names.pair(&format!("{today}.{new}"), &format!("{ldm}.{old}"));
            }
        }
        for i in 0..levels {
            for j in 0..layers {
                let ldm = format!("encoder.down.{i}.block.{j}");
                names.vae_resnet(&format!("encoder.down_blocks.{i}.resnets.{j}"), &ldm);
            }
            let ldm = format!("encoder.down.{i}.downsample.conv");
            names.pair(&format!("encoder.down_blocks.{i}.downsamplers.0.conv"), &ldm);
            let up = levels - 1 - i;
            for j in 0..=layers {
                let ldm = format!("decoder.up.{up}.block.{j}");
                names.vae_resnet(&format!("decoder.up_blocks.{i}.resnets.{j}"), &ldm);
            }
            let ldm = format!("decoder.up.{up}.upsample.conv");
            names.pair(&format!("decoder.up_blocks.{i}.upsamplers.0.conv"), &ldm);
        }
        names
    }

    /// A text tower's, by its number of layers. OpenCLIP's has a block more in its table: Stable Diffusion 2.x takes
    /// the states before the last of 24 blocks, and Hugging Face folders leave that one out.
    pub fn text(place: LdmText, layers: i64) -> Self {
        let mut names = Self::empty(place.prefix);
        if place.tower == LdmTextTower::Clip {
            for module in ["embeddings", "encoder", "final_layer_norm"] {
                names.pair(module, &format!("text_model.{module}"));
            }
            names.pair("text_projection", "text_projection");
            return names;
        }
        names.pair("embeddings.token_embedding", "token_embedding");
        names.pair("embeddings.position_embedding.weight", "positional_embedding");
        names.pair("final_layer_norm", "ln_final");
        names.put("text_projection.weight".into(), "text_projection".into(), TensorForm::Transposed);
        for i in 0..=layers {
            let (today, ldm) = (format!("encoder.layers.{i}"), format!("transformer.resblocks.{i}"));
            for (new, old) in [
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
                ("self_attn.out_proj", "attn.out_proj"),
            ] {
                names.pair(&format!("{today}.{new}"), &format!("{ldm}.{old}"));
            }
            for (third, projection) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
                for tensor in ["weight", "bias"] {
                    let new = format!("{today}.self_attn.{projection}.{tensor}");
                    names.put(new, format!("{ldm}.attn.in_proj_{tensor}"), TensorForm::Third(third));
                }
            }
        }
        names
    }

    /// The same names behind another prefix, as files of one part have them.
    pub fn behind(self, prefix: &'static str) -> Self {
        Self { prefix, ..self }
    }

    /// How this part's keys begin.
    pub fn prefix(&self) -> &'static str {
        self.prefix
    }

    /// The LDM name of a layer, without [`Self::prefix`]; `None` if LDM has no such layer (OpenCLIP's query, key and value
    /// are parts of one).
    pub fn layer(&self, name: &str) -> Option<String> {
        heads(name).find_map(|(head, rest)| {
            self.to_ldm
                .get(head)
                .filter(|(_, form)| *form == TensorForm::Same)
                .map(|(ldm, _)| format!("{ldm}{rest}"))
        })
    }

    /// The checkpoint's key of a tensor, and what of that key's tensor it is.
    pub fn key(&self, name: &str) -> Option<(String, TensorForm)> {
        heads(name).find_map(|(head, rest)| {
            let (ldm, form) = self.to_ldm.get(head)?;
            Some((format!("{}{ldm}{rest}", self.prefix), *form))
        })
    }

    /// Today's tensors that a checkpoint's key holds; none, if it is not one of this part.
    pub fn tensors(&self, key: &str) -> Vec<(String, TensorForm)> {
        let Some(key) = key.strip_prefix(self.prefix) else { return Vec::new() };
        heads(key)
            .find_map(|(head, rest)| {
                let found = self.to_today.get(head)?;
                Some(found.iter().map(|(name, form)| (format!("{name}{rest}"), *form)).collect())
            })
            .unwrap_or_default()
    }

    fn empty(prefix: &'static str) -> Self {
        Self { prefix, to_ldm: HashMap::new(), to_today: HashMap::new() }
    }

    fn pair(&mut self, today: &str, ldm: &str) {
        self.put(today.to_string(), ldm.to_string(), TensorForm::Same);
    }

    fn put(&mut self, today: String, ldm: String, form: TensorForm) {
        self.to_today.entry(ldm.clone()).or_default().push((today.clone(), form));
        self.to_ldm.insert(today, (ldm, form));
    }

    fn unet_resnet(&mut self, today: &str, ldm: &str) {
        for (new, old) in [
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
            ("conv_shortcut", "skip_connection"),
        ] {
            self.pair(&format!("{today}.{new}"), &format!("{ldm}.{old}"));
        }
    }

    fn vae_resnet(&mut self, today: &str, ldm: &str) {
        for same in ["norm1", "conv1", "norm2", "conv2"] {
            self.pair(&format!("{today}.{same}"), &format!("{ldm}.{same}"));
        }
        self.pair(&format!("{today}.conv_shortcut"), &format!("{ldm}.nin_shortcut"));
    }
}

/// A dotted name split at its end, then at ever earlier dots.
fn heads(name: &str) -> impl Iterator<Item = (&str, &str)> {
    std::iter::successors(Some(name.len()), |&end| name[..end].rfind('.')).map(|at| name.split_at(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stable Diffusion's levels: attention in all but the innermost.
    fn levels() -> Vec<UNetLevel> {
        let level = |channels, attends| UNetLevel {
            channels,
            layers: 2,
            heads: 8,
            transformers: 1,
            down_attends: attends,
            up_attends: attends,
        };
        vec![level(320, true), level(640, true), level(1280, true), level(1280, false)]
    }

    /// Keys that stand in the published files of Stable Diffusion 1.5 (v1-5-pruned-emaonly) and 2.1.
    #[test]
    fn published_keys_are_met() {
        let unet = LdmNames::unet(&levels());
        let vae = LdmNames::vae(4, 2);
        let clip = LdmNames::text(LdmText::ONE, 12);
        let open = LdmNames::text(LdmText::TWO, 23);
        let same = [
            (
                &unet,
                "down_blocks.0.downsamplers.0.conv.bias",
                "model.diffusion_model.input_blocks.3.0.op.bias",
            ),
            (
                &unet,
                "down_blocks.3.resnets.1.conv2.weight",
                "model.diffusion_model.input_blocks.11.0.out_layers.3.weight",
            ),
            (
                &unet,
                "up_blocks.0.upsamplers.0.conv.weight",
                "model.diffusion_model.output_blocks.2.1.conv.weight",
            ),
            (
                &unet,
                "up_blocks.1.upsamplers.0.conv.weight",
                "model.diffusion_model.output_blocks.5.2.conv.weight",
            ),
            (
                &unet,
                "up_blocks.3.resnets.2.conv_shortcut.weight",
                "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
            ),
            (
                &unet,
                "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0.bias",
                "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_out.0.bias",
            ),
            (
                &unet,
                "mid_block.resnets.1.time_emb_proj.bias",
                "model.diffusion_model.middle_block.2.emb_layers.1.bias",
            ),
            (&unet, "conv_norm_out.weight", "model.diffusion_model.out.0.weight"),
            (
                &vae,
                "decoder.up_blocks.0.upsamplers.0.conv.weight",
                "first_stage_model.decoder.up.3.upsample.conv.weight",
            ),
            (
                &vae,
                "decoder.up_blocks.3.resnets.0.conv_shortcut.bias",
                "first_stage_model.decoder.up.0.block.0.nin_shortcut.bias",
            ),
            (
                &vae,
                "encoder.mid_block.attentions.0.to_out.0.weight",
                "first_stage_model.encoder.mid.attn_1.proj_out.weight",
            ),
            (&vae, "post_quant_conv.bias", "first_stage_model.post_quant_conv.bias"),
            (
                &clip,
                "encoder.layers.11.self_attn.q_proj.bias",
                "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.bias",
            ),
            (&open, "embeddings.position_embedding.weight", "cond_stage_model.model.positional_embedding"),
            (&open, "embeddings.token_embedding.weight", "cond_stage_model.model.token_embedding.weight"),
            (
                &open,
                "encoder.layers.22.mlp.fc2.bias",
                "cond_stage_model.model.transformer.resblocks.22.mlp.c_proj.bias",
            ),
        ];
        for (names, today, key) in same {
            assert_eq!(names.key(today), Some((key.to_string(), TensorForm::Same)), "{today}");
            assert_eq!(names.tensors(key), [(today.to_string(), TensorForm::Same)], "{key}");
        }
    }

    #[test]
    fn open_clips_projections_are_stacked_or_turned() {
        let open = LdmNames::text(LdmText::TWO, 23);
        let key = "cond_stage_model.model.transformer.resblocks.7.attn.in_proj_bias";
        let stacked = ["q", "k", "v"].map(|p| format!("encoder.layers.7.self_attn.{p}_proj.bias"));
        for (i, name) in stacked.iter().enumerate() {
            assert_eq!(open.key(name), Some((key.to_string(), TensorForm::Third(i))));
            assert_eq!(open.tensors(key)[i], (name.clone(), TensorForm::Third(i)));
        }
        let (key, form) = open.key("text_projection.weight").unwrap();
        assert_eq!((key.as_str(), form), ("cond_stage_model.model.text_projection", TensorForm::Transposed));
    }

    #[test]
    fn layers_have_names_and_what_is_foreign_has_none() {
        let unet = LdmNames::unet(&levels());
        let layer = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q";
        let ldm = "output_blocks.3.1.transformer_blocks.0.attn1.to_q";
        assert_eq!(unet.layer(layer).as_deref(), Some(ldm));
        assert_eq!(unet.layer("down_blocks.3.attentions.0.proj_in"), None, "that level does not attend");
        let open = LdmNames::text(LdmText::TWO, 2);
        assert_eq!(open.layer("encoder.layers.0.self_attn.q_proj"), None);
        assert_eq!(
            open.layer("encoder.layers.0.self_attn.out_proj").as_deref(),
            Some("transformer.resblocks.0.attn.out_proj")
        );
        for key in ["model.diffusion_model.input_blocks.12.0.weight", "betas", "model.diffusion_model.", ""] {
            assert!(unet.tensors(key).is_empty(), "{key}");
        }
    }
}
