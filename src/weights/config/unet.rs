//! `unet/config.json`, and what of it a ControlNet's has.

use crate::error::{Error, Result};
use crate::weights::bounds::{MAX_FACTOR, MAX_WIDTH, is_factor};
use crate::weights::config::{MAX_LEVELS, parse_json};
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

/// Blocks of all kinds in one UNet (Stable Diffusion XL's has about 100): each costs memory before its weights are missed.
const MAX_BLOCKS: i64 = 2048;

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
    #[serde(flatten)]
    pub added: UNetAdded,
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
            added: UNetAdded::default(),
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

/// What it is told beside the timestep and the text states.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct UNetAdded {
    pub addition_embed_type: Option<String>,
    pub addition_time_embed_dim: Option<i64>,
    pub projection_class_embeddings_input_dim: Option<i64>,
}

/// Sizes of what Stable Diffusion XL adds to the timestep's embedding (diffusers `text_time`): pooled text, and numbers of the
/// picture's sizes, each shown as the timestep is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddedInputs {
    /// Values for each number.
    pub of_number: i64,
    /// Values in all.
    pub total: i64,
}

impl AddedInputs {
    /// How many numbers there are beside pooled text of this width: 6 sizes, of a refiner 4 and a score. `None` where no whole
    /// number of them fits.
    pub fn numbers(&self, pooled: i64) -> Option<i64> {
        let rest = self.total - pooled;
        (rest > 0 && rest % self.of_number == 0).then(|| rest / self.of_number)
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

    /// What is added to the timestep's embedding; `None` for Stable Diffusion 1.x and 2.x. [`Self::levels`] checks it.
    pub fn added(&self) -> Option<AddedInputs> {
        self.added.addition_embed_type.as_ref()?;
        let of_number = self.added.addition_time_embed_dim?;
        Some(AddedInputs { of_number, total: self.added.projection_class_embeddings_input_dim? })
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
            ("addition_time_embed_dim", self.added.addition_time_embed_dim.unwrap_or(1), 1, MAX_WIDTH),
            (
                "projection_class_embeddings_input_dim",
                self.added.projection_class_embeddings_input_dim.unwrap_or(1),
                1,
                MAX_WIDTH,
            ),
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

    /// What stands in the way of the added inputs.
    fn added_problems(&self) -> Vec<String> {
        let UNetAdded { addition_embed_type, addition_time_embed_dim, projection_class_embeddings_input_dim } =
            &self.added;
        let Some(kind) = addition_embed_type else { return Vec::new() };
        if kind != "text_time" {
            return vec![format!(
                "addition_embed_type: expected text_time (Stable Diffusion XL) or none, found {kind}"
            )];
        }
        [
            ("addition_time_embed_dim", addition_time_embed_dim),
            ("projection_class_embeddings_input_dim", projection_class_embeddings_input_dim),
        ]
        .into_iter()
        .filter(|(_, value)| value.is_none())
        .map(|(name, _)| {
            format!("{name}: expected a number beside addition_embed_type text_time, found none")
        })
        .collect()
    }

    /// Settings of other model families, which would change the network silently if they were passed over.
    fn unsupported(&self) -> Vec<String> {
        let mut problems = self.added_problems();
        if self.rest.get("time_cond_proj_dim").is_some_and(|value| !value.is_null()) {
            problems.push(
                "time_cond_proj_dim: a latent consistency model (LCM), whose UNet is told the guidance scale, is not supported"
                    .into(),
            );
        }
        let mut expect = |what: &str, found: &Value, allowed: &[Value]| {
            if !allowed.contains(found) {
                problems.push(format!(
                    "{what}: {found} is not supported (not a Stable Diffusion 1.x, 2.x or XL UNet?)"
                ));
            }
        };
        let none = [Value::Null, Value::Bool(false), Value::from("default"), Value::from("positional")];
        for key in [
            "class_embed_type",
            "num_class_embeds",
            "encoder_hid_dim",
            "encoder_hid_dim_type",
            "time_embedding_type",
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
