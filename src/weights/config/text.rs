//! The config of a CLIP text tower.

use crate::error::{Error, Result};
use crate::weights::bounds::{MAX_WIDTH, Transformer, out_of_range};
use crate::weights::config::parse_json;
use crate::weights::part::Text;
use serde::Deserialize;
use serde_json::Value;

/// Tokens of a prompt: attention to the text takes the square of it.
const MAX_TOKENS: i64 = 4096;

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
    #[serde(default)]
    projection_dim: Value,
    #[serde(default)]
    eos_token_id: Value,
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

    /// Width of the projected pooled output, of a tower that has one; transformers' default where the file does not say.
    ///
    /// Errors: a number that no tower has.
    pub fn projection(&self, text: &Text) -> Result<i64> {
        match self.projection_dim.as_i64().or(self.projection_dim.is_null().then_some(512)) {
            Some(width) if (1..=MAX_WIDTH).contains(&width) => Ok(width),
            _ => {
                let found = &self.projection_dim;
                Err(Error::format(
                    &text.path,
                    format!("projection_dim: expected 1 to {MAX_WIDTH}, found {found}"),
                ))
            }
        }
    }

    /// The token whose state is the pooled output; `None` for the largest id of a prompt, which old configs mean by 2.
    pub fn pooled_token(&self) -> Option<i64> {
        let id = self.eos_token_id.as_i64().unwrap_or(49407);
        (id != 2).then_some(id)
    }
}
