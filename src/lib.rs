//! Householder Reflection Adaptation for Stable Diffusion.
pub mod adapter;
pub mod data;
pub mod error;
pub mod files;
pub mod image;
pub mod model;
pub mod noise;
pub mod optim;
pub mod seed;
pub mod stable_diffusion;
pub mod tensor_file;
pub mod text;
pub use error::{Error, Result};
pub mod train;
pub use stable_diffusion::StableDiffusion;
