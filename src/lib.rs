//! Householder Reflection Adaptation (HRA) for Stable Diffusion: training on a few pictures, sampling, and the parts of
//! both, on libtorch.
//!
//! Data flows one way; a room (a folder) imports only from those below it; no files import each other in a circle (`tests/program/layers.rs`):
//!
//! ```text
//! cli/        what the user typed, turned into calls; the terminal: how progress looks, Ctrl-C
//! lab/        methods under equal conditions (compare), scores (evaluate), their files (results), pages and tables (report)
//! convert/    adapters and models in other programs' forms (export, single_file); what a file is (inspect)
//! train/      config -> data -> model + adapter -> loss -> optim -> checkpoint, run (metrics), previews, class pictures
//! diffusion/  a whole model; prompts, seeds, a picture to start from -> sampler -> pictures; noise schedule
//! attach/     adapters on networks: for training, for drawing (fixed), from files (loaded); the tensors that train
//! model/      networks: layers that may carry an adapter, unet, text tower and tokenizer, vae, control networks
//! adapter/    hra, lora, oft .. and their algebra, PEFT folders, LoRA files: knows a weight and an input, no network
//! weights/    tensors from and to files: parts, names, sizes
//! data/       pictures, folders, pairs, tables, conditions
//! platform/   device, cuda, doctor, hub, files, seed, observer: what everything stands on
//! ```

// The terminal is the command line's: whatever the library has to say goes to an observer.
#![deny(clippy::print_stdout, clippy::print_stderr)]
// Values cross between the host and the device in platform/ (clippy.toml has the list); unit tests may do so anywhere.
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod adapter;
pub mod attach;
#[allow(clippy::print_stderr)]
pub mod cli;
pub mod convert;
pub mod data;
pub mod diffusion;
pub mod error;
pub mod lab;
pub mod model;
#[allow(clippy::disallowed_methods)]
pub mod platform;
pub mod train;
pub mod weights;

pub use diffusion::stable_diffusion::StableDiffusion;
pub use error::{Error, ErrorKind, Result};
