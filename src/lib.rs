//! Householder Reflection Adaptation (HRA) for Stable Diffusion: training on a few pictures, sampling, and the parts of
//! both, on libtorch.
//!
//! Data flows one way, and each level imports only from levels below it:
//!
//! ```text
//! cli -> train -> sample, checkpoint, run -> stable_diffusion -> text -> model -> adapter -> tensor_file -> files
//!                 data (-> image)            sampler -> noise    optim, seed, device, config
//! ```

pub mod adapter;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod cuda;
pub mod data;
pub mod device;
pub mod doctor;
pub mod error;
pub mod files;
pub mod image;
pub mod interrupt;
pub mod model;
pub mod noise;
pub mod optim;
pub mod progress;
pub mod run;
pub mod sample;
pub mod sampler;
pub mod seed;
pub mod stable_diffusion;
pub mod tensor_file;
pub mod tensorboard;
pub mod text;
pub mod train;

pub use error::{Error, Result};
pub use stable_diffusion::StableDiffusion;
