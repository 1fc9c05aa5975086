//! From a prompt to the states that the UNet attends to: tokenizer and CLIP text tower.

pub mod encoder;
pub mod tokenizer;
mod tokenizer_json;

pub use encoder::TextEncoder;
pub use tokenizer::Tokenizer;
