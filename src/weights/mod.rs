//! Tensors from and to files: which file a part of a model is in, under which names, and which sizes follow from it.

pub mod bounds;
pub mod checkpoint;
pub mod config;
mod ema;
pub mod family;
pub mod infer;
pub mod ldm;
pub mod part;
pub mod pickle;
pub mod prediction;
pub mod python_json;
pub mod request;
pub mod scope;
pub mod source;
pub mod tensor_file;
pub mod tensors;
mod vae_file;
