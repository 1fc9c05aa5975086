//! Bounds of what a config may say: beyond them lies no model, only a broken or hostile file.

use serde::Deserialize;

/// Most channels of a layer.
pub const MAX_WIDTH: i64 = 1 << 16;
/// Far above any factor of a model; libtorch panics at those that f32 does not hold.
pub const MAX_FACTOR: f64 = 1e6;
/// Most layers of a transformer: each costs memory before its weights are missed.
const MAX_LAYERS: i64 = 256;

/// Whether a model may multiply by this.
pub fn is_factor(x: f64) -> bool {
    x.abs() <= MAX_FACTOR
}

/// A problem for each `(name, value, most)` whose value is not 1 to `most`.
pub fn out_of_range(sizes: &[(&str, i64, i64)]) -> Vec<String> {
    let outside = sizes.iter().filter(|(_, value, most)| !(1..=*most).contains(value));
    outside.map(|(name, value, most)| format!("{name}: expected 1 to {most}, found {value}")).collect()
}

/// What every transformer's config says of it.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Transformer {
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    pub layer_norm_eps: f64,
}

impl Transformer {
    /// What no model has.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = out_of_range(&[
            ("hidden_size", self.hidden_size, MAX_WIDTH),
            ("intermediate_size", self.intermediate_size, MAX_WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, self.hidden_size),
        ]);
        if self.num_attention_heads > 0 && self.hidden_size % self.num_attention_heads != 0 {
            problems.push("hidden_size does not divide into num_attention_heads".into());
        }
        if !is_factor(self.layer_norm_eps) {
            let found = self.layer_norm_eps;
            problems.push(format!("layer_norm_eps: expected a number up to {MAX_FACTOR:e}, found {found:e}"));
        }
        problems
    }
}
