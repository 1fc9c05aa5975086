//! From a prompt to the states that the UNet attends to: tokenizer and CLIP text tower.

pub mod encoder;
pub mod tokenizer;
mod tokenizer_json;

pub use encoder::{SECOND_TEXT_ENCODER, TextEncoder, TextOutput, TextStates, in_own_tower, in_second_tower};
pub use tokenizer::Tokenizer;
