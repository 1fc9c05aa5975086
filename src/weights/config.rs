//! What a model folder's JSON files say about its parts. Nothing about a model comes from a flag.

use crate::error::{Error, Result};
use crate::weights::bounds::{MAX_FACTOR, MAX_WIDTH, Transformer, is_factor, out_of_range};
use crate::weights::part::Text;
use serde::Deserialize;
use serde_json::Value;

/// A number for all levels or one for each.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum PerLevel {
    /// The same everywhere.
    One(i64),
    /// One for each level, outermost first.
    Each(Vec<i64>),
}

impl PerLevel {
    /// The numbers of `levels` levels.
    fn expand(&self, levels: usize, what: &str) -> std::result::Result<Vec<i64>, String> {
        match self {
            Self::One(n) => Ok(vec![*n; levels]),
            Self::Each(list) if list.len() == levels => Ok(list.clone()),
            Self::Each(list) => Err(format!(
                "{what}: expected one number or {levels} (one for each block), found {}",
                list.len()
            )),
        }
    }
}

const MAX_LEVELS: usize = 16;
/// Blocks of all kinds in one UNet (Stable Diffusion XL's has about 100): each costs memory before its weights are missed.
const MAX_BLOCKS: i64 = 2048;
/// Tokens of a prompt: attention to the text takes the square of it.
const MAX_TOKENS: i64 = 4096;

/// `unet/config.json`, with diffusers' defaults for what it lacks.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct UNetConfig {
    pub in_channels: i64,
    pub out_channels: i64,
    pub sample_size: Option<Value>,
    pub center_input_sample: bool,
    pub down_block_types: Vec<String>,
    pub mid_block_type: Option<String>,
    pub up_block_types: Vec<String>,
    pub block_out_channels: Vec<i64>,
    pub layers_per_block: PerLevel,
    pub downsample_padding: i64,
    pub mid_block_scale_factor: f64,
    pub conv_in_kernel: i64,
    pub conv_out_kernel: i64,
    #[serde(flatten)]
    pub time: UNetTime,
    #[serde(flatten)]
    pub norm: UNetNorm,
    #[serde(flatten)]
    pub attention: UNetAttention,
    /// Every other key, for the ones that change the architecture.
    #[serde(flatten)]
    pub rest: serde_json::Map<String, Value>,
}

impl Default for UNetConfig {
    fn default() -> Self {
        let names = |list: [&str; 4]| list.map(str::to_string).to_vec();
        Self {
            in_channels: 4,
            out_channels: 4,
            sample_size: None,
            center_input_sample: false,
            down_block_types: names([
                "CrossAttnDownBlock2D",
                "CrossAttnDownBlock2D",
                "CrossAttnDownBlock2D",
                "DownBlock2D",
            ]),
            mid_block_type: Some("UNetMidBlock2DCrossAttn".into()),
            up_block_types: names([
                "UpBlock2D",
                "CrossAttnUpBlock2D",
                "CrossAttnUpBlock2D",
                "CrossAttnUpBlock2D",
            ]),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerLevel::One(2),
            downsample_padding: 1,
            mid_block_scale_factor: 1.0,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
            time: UNetTime::default(),
            norm: UNetNorm::default(),
            attention: UNetAttention::default(),
            rest: Default::default(),
        }
    }
}

/// How the timestep is shown to the UNet.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct UNetTime {
    pub flip_sin_to_cos: bool,
    pub freq_shift: f64,
    pub resnet_time_scale_shift: String,
}

impl Default for UNetTime {
    fn default() -> Self {
        Self { flip_sin_to_cos: true, freq_shift: 0.0, resnet_time_scale_shift: "default".into() }
    }
}

/// Its norms and activation.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct UNetNorm {
    pub norm_num_groups: i64,
    pub norm_eps: f64,
    pub act_fn: String,
}

impl Default for UNetNorm {
    fn default() -> Self {
        Self { norm_num_groups: 32, norm_eps: 1e-5, act_fn: "silu".into() }
    }
}

/// Its attention.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct UNetAttention {
    pub only_cross_attention: Value,
    pub cross_attention_dim: i64,
    pub transformer_layers_per_block: PerLevel,
    /// In diffusers' files of this model family this is the *number* of heads, unless `num_attention_heads` is there.
    pub attention_head_dim: PerLevel,
    pub num_attention_heads: Option<PerLevel>,
    pub use_linear_projection: bool,
    pub upcast_attention: bool,
}

impl Default for UNetAttention {
    fn default() -> Self {
        Self {
            only_cross_attention: Value::Bool(false),
            cross_attention_dim: 1280,
            transformer_layers_per_block: PerLevel::One(1),
            attention_head_dim: PerLevel::One(8),
            num_attention_heads: None,
            use_linear_projection: false,
            upcast_attention: false,
        }
    }
}

/// One level of the UNet, outermost first, with every size known.
#[derive(Debug, Clone)]
pub struct UNetLevel {
    pub channels: i64,
    pub layers: i64,
    pub heads: i64,
    pub transformers: i64,
    pub down_attends: bool,
    /// Of the up block at this level, which comes in reverse order in the file.
    pub up_attends: bool,
}

impl UNetConfig {
    /// Parses and checks `unet/config.json`; all problems are listed.
    pub fn parse(text: &Text) -> Result<(Self, Vec<UNetLevel>)> {
        let config: Self = parse_json(text)?;
        let levels = config.levels().map_err(|problems| Error::format(&text.path, problems.join("\n")))?;
        Ok((config, levels))
    }

    /// The levels, or every problem with them.
    pub fn levels(&self) -> std::result::Result<Vec<UNetLevel>, Vec<String>> {
        let n = self.block_out_channels.len();
        let mut problems = self.unsupported();
        if n == 0 || n > MAX_LEVELS || self.down_block_types.len() != n || self.up_block_types.len() != n {
            problems.push(format!(
                "expected as many down and up blocks as block_out_channels (1 to {MAX_LEVELS}), found {}, {} and {n}",
                self.down_block_types.len(),
                self.up_block_types.len(),
            ));
            return Err(problems);
        }
        problems.extend(self.out_of_range());
        let heads = self.attention.num_attention_heads.as_ref().unwrap_or(&self.attention.attention_head_dim);
        let mut expand = |value: &PerLevel, what: &str| {
            value.expand(n, what).unwrap_or_else(|problem| {
                problems.push(problem);
                vec![1; n]
            })
        };
        let layers = expand(&self.layers_per_block, "layers_per_block");
        let heads = expand(heads, "attention_head_dim");
        let transformers =
            expand(&self.attention.transformer_layers_per_block, "transformer_layers_per_block");
        let mut levels = Vec::new();
        for i in 0..n {
            let channels = self.block_out_channels[i];
            let attends = |kind: &str, with: &str, without: &str, problems: &mut Vec<String>| {
                if kind != with && kind != without {
                    problems.push(format!("block type: expected {with} or {without}, found {kind}"));
                }
                kind == with
            };
            let down =
                attends(&self.down_block_types[i], "CrossAttnDownBlock2D", "DownBlock2D", &mut problems);
            let up =
                attends(&self.up_block_types[n - 1 - i], "CrossAttnUpBlock2D", "UpBlock2D", &mut problems);
            let level = UNetLevel {
                channels,
                layers: layers[i],
                heads: heads[i],
                transformers: transformers[i],
                down_attends: down,
                up_attends: up,
            };
            problems.extend(self.level_problems(&level));
            levels.push(level);
        }
        // Few enough levels of at most 64 layers with 64 transformers each that this cannot overflow.
        let blocks: i64 =
            levels.iter().map(|l| l.layers.clamp(0, 64) * (1 + l.transformers.clamp(0, 64))).sum();
        if blocks > MAX_BLOCKS {
            problems
                .push(format!("expected at most {MAX_BLOCKS} layers and transformer blocks, found {blocks}"));
        }
        if let Some(size) = self.sample_size.as_ref().filter(|size| size.is_number())
            && !size.as_i64().is_some_and(|n| (1..=MAX_WIDTH).contains(&n))
        {
            problems.push(format!("sample_size: expected 1 to {MAX_WIDTH}, found {size}"));
        }
        if problems.is_empty() { Ok(levels) } else { Err(problems) }
    }

    /// Numbers that no network of this kind has.
    fn out_of_range(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (name, value, least, most) in [
            ("in_channels", self.in_channels, 1, MAX_WIDTH),
            ("out_channels", self.out_channels, 1, MAX_WIDTH),
            ("cross_attention_dim", self.attention.cross_attention_dim, 1, MAX_WIDTH),
            ("conv_in_kernel", self.conv_in_kernel, 1, 7),
            ("conv_out_kernel", self.conv_out_kernel, 1, 7),
            ("downsample_padding", self.downsample_padding, 0, 1),
        ] {
            if !(least..=most).contains(&value) {
                problems.push(format!("{name}: expected {least} to {most}, found {value}"));
            }
        }
        for (name, value) in [
            ("freq_shift", self.time.freq_shift),
            ("norm_eps", self.norm.norm_eps),
            ("mid_block_scale_factor", self.mid_block_scale_factor),
        ] {
            if !is_factor(value) {
                problems.push(format!("{name}: expected a number up to {MAX_FACTOR:e}, found {value:e}"));
            }
        }
        problems
    }

    fn level_problems(&self, level: &UNetLevel) -> Vec<String> {
        let mut problems = Vec::new();
        let channels = level.channels;
        let mut positive = |what: &str, value: i64, most: i64| {
            if !(1..=most).contains(&value) {
                problems.push(format!("{what}: expected 1 to {most}, found {value}"));
            }
        };
        positive("block_out_channels", channels, MAX_WIDTH);
        positive("layers_per_block", level.layers, 64);
        positive("transformer_layers_per_block", level.transformers, 64);
        positive("attention heads", level.heads, channels.max(1));
        if level.heads > 0 && channels % level.heads != 0 {
            problems.push(format!("{channels} channels do not divide into {} attention heads", level.heads));
        }
        if self.norm.norm_num_groups < 1 || channels % self.norm.norm_num_groups != 0 {
            problems.push(format!(
                "{channels} channels do not divide into {} norm groups",
                self.norm.norm_num_groups
            ));
        }
        problems
    }

    /// Settings of other model families, which would change the network silently if they were passed over.
    fn unsupported(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut expect = |what: &str, found: &Value, allowed: &[Value]| {
            if !allowed.contains(found) {
                problems.push(format!(
                    "{what}: {found} is not supported (not a Stable Diffusion 1.x or 2.x UNet?)"
                ));
            }
        };
        let none = [Value::Null, Value::Bool(false), Value::from("default"), Value::from("positional")];
        for key in [
            "addition_embed_type",
            "class_embed_type",
            "num_class_embeds",
            "encoder_hid_dim",
            "encoder_hid_dim_type",
            "time_embedding_type",
            "time_cond_proj_dim",
            "time_embedding_dim",
            "time_embedding_act_fn",
            "timestep_post_act",
            "dual_cross_attention",
            "resnet_skip_time_act",
            "cross_attention_norm",
            "attention_type",
            "class_embeddings_concat",
            "mid_block_only_cross_attention",
            "reverse_transformer_layers_per_block",
        ] {
            expect(key, self.rest.get(key).unwrap_or(&Value::Null), &none);
        }
        expect(
            "act_fn",
            &Value::from(self.norm.act_fn.clone()),
            &[Value::from("silu"), Value::from("swish")],
        );
        expect(
            "only_cross_attention",
            &self.attention.only_cross_attention,
            &[Value::Bool(false), Value::Null],
        );
        let mid = self.mid_block_type.clone().map_or(Value::Null, Value::from);
        expect("mid_block_type", &mid, &[Value::from("UNetMidBlock2DCrossAttn")]);
        let shift = Value::from(self.time.resnet_time_scale_shift.clone());
        expect("resnet_time_scale_shift", &shift, &[Value::from("default"), Value::from("scale_shift")]);
        problems
    }
}

/// `text_encoder/config.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct TextConfig {
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    #[serde(default = "text_length")]
    pub max_position_embeddings: i64,
    #[serde(default = "quick_gelu")]
    pub hidden_act: String,
    #[serde(default = "text_eps")]
    pub layer_norm_eps: f64,
}

fn text_length() -> i64 {
    77
}

fn quick_gelu() -> String {
    "quick_gelu".into()
}

fn text_eps() -> f64 {
    1e-5
}

impl TextConfig {
    /// Parses and checks `text_encoder/config.json`.
    pub fn parse(text: &Text) -> Result<Self> {
        let config: Self = parse_json(text)?;
        let sizes = [
            ("vocab_size", config.vocab_size, 1 << 24),
            ("max_position_embeddings", config.max_position_embeddings, MAX_TOKENS),
        ];
        let mut problems = out_of_range(&sizes);
        problems.extend(
            Transformer {
                hidden_size: config.hidden_size,
                intermediate_size: config.intermediate_size,
                num_hidden_layers: config.num_hidden_layers,
                num_attention_heads: config.num_attention_heads,
                layer_norm_eps: config.layer_norm_eps,
            }
            .problems(),
        );
        if !["quick_gelu", "gelu"].contains(&config.hidden_act.as_str()) {
            problems.push(format!("hidden_act: expected quick_gelu or gelu, found {}", config.hidden_act));
        }
        if problems.is_empty() { Ok(config) } else { Err(Error::format(&text.path, problems.join("\n"))) }
    }
}

/// `vae/config.json`.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    pub in_channels: i64,
    pub out_channels: i64,
    pub block_out_channels: Vec<i64>,
    pub down_block_types: Option<Vec<String>>,
    pub up_block_types: Option<Vec<String>>,
    pub layers_per_block: i64,
    pub latent_channels: i64,
    pub norm_num_groups: i64,
    pub scaling_factor: f64,
    pub shift_factor: Option<f64>,
    pub act_fn: String,
    pub use_quant_conv: bool,
    pub use_post_quant_conv: bool,
    pub mid_block_add_attention: bool,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            block_out_channels: vec![64],
            down_block_types: None,
            up_block_types: None,
            layers_per_block: 1,
            latent_channels: 4,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            act_fn: "silu".into(),
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl VaeConfig {
    /// Parses and checks `vae/config.json`: the crate's VAE has one architecture, other ones are refused.
    pub fn parse(text: &Text) -> Result<Self> {
        let config: Self = parse_json(text)?;
        let levels = config.block_out_channels.len();
        let mut problems = Vec::new();
        if levels == 0 || levels > MAX_LEVELS {
            problems.push(format!("block_out_channels: expected 1 to {MAX_LEVELS} numbers, found {levels}"));
        }
        for c in &config.block_out_channels {
            let divides = config.norm_num_groups > 0 && c % config.norm_num_groups == 0;
            if !(1..=MAX_WIDTH).contains(c) || !divides {
                problems
                    .push(format!("{c} channels do not divide into {} norm groups", config.norm_num_groups));
            }
        }
        for (types, plain) in
            [(&config.down_block_types, "DownEncoderBlock2D"), (&config.up_block_types, "UpDecoderBlock2D")]
        {
            if let Some(types) = types
                && (types.len() != levels || types.iter().any(|t| t != plain))
            {
                problems.push(format!("expected {levels} blocks of type {plain}, found {types:?}"));
            }
        }
        if config.in_channels != 3 || config.out_channels != 3 {
            problems.push("expected a VAE of RGB pictures (3 channels)".into());
        }
        if !(1..=64).contains(&config.layers_per_block) || !(1..=256).contains(&config.latent_channels) {
            problems.push("layers_per_block or latent_channels is out of range".into());
        }
        if !is_factor(config.scaling_factor) || config.scaling_factor <= 0.0 {
            let found = config.scaling_factor;
            problems.push(format!(
                "scaling_factor: expected a positive number up to {MAX_FACTOR:e}, found {found:e}"
            ));
        }
        let usual = config.act_fn == "silu"
            && config.use_quant_conv
            && config.use_post_quant_conv
            && config.mid_block_add_attention
            && config.shift_factor.is_none_or(|s| s == 0.0);
        if !usual {
            problems.push(
                "not the VAE of Stable Diffusion 1.x or 2.x (activation, quant_conv, shift_factor)".into(),
            );
        }
        if problems.is_empty() { Ok(config) } else { Err(Error::format(&text.path, problems.join("\n"))) }
    }

    /// Pixels along one edge of a latent.
    pub fn factor(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }
}

fn parse_json<T: serde::de::DeserializeOwned>(text: &Text) -> Result<T> {
    serde_json::from_str(&text.content).map_err(|e| Error::format(&text.path, e.to_string()))
}
