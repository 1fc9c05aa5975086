//! What a model folder's JSON files say about its parts. Nothing about a model comes from a flag.

mod text;
mod unet;
mod vae;

pub use text::TextConfig;
pub use unet::{AddedInputs, PerLevel, UNetAttention, UNetConfig, UNetLevel, UNetNorm, UNetTime};
pub use vae::VaeConfig;

use crate::error::{Error, Result};
use crate::weights::part::Text;

const MAX_LEVELS: usize = 16;

fn parse_json<T: serde::de::DeserializeOwned>(text: &Text) -> Result<T> {
    serde_json::from_str(&text.content).map_err(|e| Error::format(&text.path, e.to_string()))
}
