//! From a prompt to the states that the UNet attends to: tokenizer and CLIP text tower.

pub mod encoder;
pub mod tokenizer;

pub use encoder::TextEncoder;
pub use tokenizer::Tokenizer;
