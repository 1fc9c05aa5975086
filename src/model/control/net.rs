//! A ControlNet as diffusers saves it (`ControlNetModel`): for drawing, not for training.

use crate::error::{Error, Result};
use crate::model::UNet;
use crate::model::control::encoder::{
    CONTROL_ENCODER, ConditionEncoder, EncoderConfig, FILE_STEM, encoder_of,
};
use crate::model::denoiser::{Call, Denoiser, Signals};
use crate::model::down::DownPath;
use crate::model::layers::Layer;
use crate::platform::files;
use crate::platform::precision::Numbers;
use crate::weights::config::UNetConfig;
use crate::weights::part::Text;
use crate::weights::scope::Weights;
use serde_json::Value;
use std::path::Path;
use tch::{Device, Kind, Tensor};

const CLASS: &str = "ControlNetModel";

/// A copy of the UNet's first half, with a convolution for each skip connection.
pub struct ControlNet {
    down: DownPath,
    embedding: ConditionEncoder,
    down_blocks: Vec<Layer>,
    mid_block: Layer,
    reversed_channels: bool,
    kind: Kind,
}

impl ControlNet {
    /// Loads the ControlNet in the folder `dir`. The second value names tensors of the file that it lacks.
    pub fn load(dir: &Path, numbers: impl Into<Numbers>, device: Device) -> Result<(Self, Vec<String>)> {
        let (config, embedding, reversed_channels) = read_config(dir)?;
        let levels = config
            .levels()
            .map_err(|problems| Error::format(&dir.join("config.json"), problems.join("\n")))?;
        let numbers = numbers.into();
        let weights = Weights::in_folder(dir, FILE_STEM, numbers, device)?;
        let root = weights.root();
        let down = DownPath::new(&root, config, &levels);
        let conv = |name: String, c: i64| Layer::conv(&root.at(name), c, c, 1, 1, 0);
        let skips = down.skip_channels.iter().enumerate();
        let down_blocks = skips.map(|(i, c)| conv(format!("controlnet_down_blocks.{i}"), *c)).collect();
        let mid_block = conv("controlnet_mid_block".into(), levels[levels.len() - 1].channels);
        let embedding = ConditionEncoder::new(&root.at("controlnet_cond_embedding"), embedding);
        let kind = numbers.compute;
        let net = Self { down, embedding, down_blocks, mid_block, reversed_channels, kind };
        Ok((net, weights.finish()?))
    }

    /// Features `(b, c0, h, w)` of conditions `(b, 3, H, W)` in [0, 1].
    pub fn features(&self, conditions: &Tensor) -> Tensor {
        let conditions = conditions.to_kind(self.kind);
        let conditions = if self.reversed_channels { conditions.flip([1]) } else { conditions };
        self.embedding.forward(&conditions)
    }

    /// The signals for one UNet call, times `scale`.
    pub fn forward(&self, call: Call, features: &Tensor, scale: f64) -> Signals {
        let time = self.down.time(&call);
        let context = call.conditioning.states().to_kind(self.kind);
        let (middle, skips) = self.down.forward(call.sample, &time, &context, Some(features));
        let skips = skips.iter().zip(&self.down_blocks).map(|(x, conv)| conv.forward(x) * scale).collect();
        Signals { hint: None, skips, middle: Some(self.mid_block.forward(&middle) * scale) }
    }

    /// Why it cannot steer this UNet, whose latents are `factor` pixels wide, if so.
    pub fn misfit(&self, unet: &UNet, factor: i64) -> Option<String> {
        let own = self.down.config();
        let (expected, found) = (unet.skip_channels(), &self.down.skip_channels[..]);
        let problem = if expected != found {
            format!(
                "expected a ControlNet for skip connections of {expected:?} channels, found one for {found:?}"
            )
        } else if own.attention.cross_attention_dim != unet.context_width() {
            let (expected, found) = (unet.context_width(), own.attention.cross_attention_dim);
            format!("cross_attention_dim: expected {expected}, found {found}")
        } else if own.added() != unet.added() {
            "expected one that is told the same beside the timestep".to_string()
        } else if own.in_channels != unet.out_channels() {
            format!("in_channels: expected {}, found {}", unet.out_channels(), own.in_channels)
        } else {
            return self.embedding.misfit(unet, factor);
        };
        Some(format!("{problem}; a ControlNet belongs to one kind of model (1.5, 2.1, XL ..)"))
    }
}

/// The UNet's settings, the embedding's, and whether conditions are shown as BGR.
fn read_config(dir: &Path) -> Result<(UNetConfig, EncoderConfig, bool)> {
    let path = dir.join("config.json");
    if !dir.is_dir() || !path.is_file() {
        let holds = format!("the folder holds config.json and {FILE_STEM}.safetensors");
        let (what, hint) = if dir.is_file() {
            let convert = "ControlNetModel.from_single_file(FILE).save_pretrained(DIR)";
            ("a file", format!("{holds}; diffusers converts a single file: {convert}"))
        } else if !dir.exists() {
            ("nothing", holds)
        } else if encoder_of(dir).is_some() {
            ("a run with a control encoder", "give it with --adapter".to_string())
        } else {
            ("no config.json", holds)
        };
        let problem = format!("expected a ControlNet's Hugging Face folder, found {what}");
        return Err(Error::format(dir, problem).with_hint(hint));
    }
    let problem = |text: String| Error::format(&path, text);
    let mut value: Value = serde_json::from_str(&files::read_to_string(&path)?)
        .map_err(|e| problem(format!("not a ControlNet's config: {e}")))?;
    let class = value["_class_name"].as_str().unwrap_or("none");
    if class != CLASS {
        let hint = if dir.file_name().is_some_and(|name| name == CONTROL_ENCODER) {
            "this is the control encoder of a run: give the run's folder with --adapter"
        } else {
            "T2I-Adapters and other controls are not supported"
        };
        return Err(problem(format!("_class_name: expected {CLASS}, found {class}")).with_hint(hint));
    }
    if value["global_pool_conditions"] == true {
        return Err(problem("global_pool_conditions is not supported".into()));
    }
    let order = value["controlnet_conditioning_channel_order"].as_str().unwrap_or("rgb").to_string();
    if order != "rgb" && order != "bgr" {
        return Err(problem(format!(
            "controlnet_conditioning_channel_order: expected rgb or bgr, found {order}"
        )));
    }
    let numbers = |key: &str, default: Vec<i64>| match &value[key] {
        Value::Null => Ok(default),
        list => serde_json::from_value(list.clone())
            .map_err(|e| problem(format!("{key}: expected a list of numbers: {e}"))),
    };
    let embedding_channels = numbers("conditioning_embedding_out_channels", vec![16, 32, 96, 256])?;
    // The way up, which a ControlNet does not have, mirrors the way down.
    let down: Vec<String> = match &value["down_block_types"] {
        Value::Null => UNetConfig::default().down_block_types,
        list => serde_json::from_value(list.clone())
            .map_err(|e| problem(format!("down_block_types: expected a list of names: {e}")))?,
    };
    let up = |name: &String| if name.starts_with("CrossAttn") { "CrossAttnUpBlock2D" } else { "UpBlock2D" };
    value["up_block_types"] = down.iter().rev().map(up).collect::<Vec<_>>().into();
    let text = Text { content: value.to_string(), path: path.clone() };
    let (config, _) = UNetConfig::parse(&text)?;
    let embedding = EncoderConfig {
        class_name: String::new(),
        conditioning_channels: value["conditioning_channels"].as_i64().unwrap_or(3),
        block_out_channels: embedding_channels,
        conditioning_embedding_channels: config.block_out_channels[0],
        condition: String::new(),
        canny_thresholds: None,
    };
    embedding.check().map_err(problem)?;
    Ok((config, embedding, order == "bgr"))
}
