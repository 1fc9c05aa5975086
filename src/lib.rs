//! Householder Reflection Adaptation (HRA) for Stable Diffusion: training on a few pictures, sampling, and the parts of
//! both, on libtorch.
//!
//! Data flows one way; a module imports only from those to the right of it and below (`tests/layers.rs` checks it):
//!
//! ```text
//! cli        train, sample, prepare, evaluate, compare, export, merge, inspect, doctor: what the user typed
//! compare    methods under equal conditions: plan -> cells as processes -> results;  report: pages and tables from results
//! evaluate   towers (CLIP, DINO, LPIPS) and scores of pictures;  results: the files of a comparison
//! export     adapters in other programs' forms;  inspect: what a file is
//! report     a comparison's files (results) -> tables, plots, a page
//! train      config -> data -> model + adapter -> loss -> optim -> checkpoint, run (metrics)
//! sample     prompts, seeds, a picture to start from -> text -> sampler -> model -> pictures
//! model      unet, vae and the layers that carry an adapter;  text: tokenizer, CLIP;  stable_diffusion: a whole model
//! single_file  whole models written: one checkpoint or a folder
//! adapter    hra, lora, oft .. and their algebra, PEFT folders, LoRA files: knows a weight and an input, no network
//! noise      beta table, targets, SNR weights;  sampler: schedulers;  optim: AdamW;  image, data: pictures
//! hub        owner/name on the Hugging Face hub -> files in its cache
//! device     cuda, tensor_file, files, seed, interrupt, progress, tensorboard, error: what everything stands on
//! ```

pub mod adapter;
pub mod checkpoint;
pub mod cli;
pub mod compare;
pub mod config;
pub mod cuda;
pub mod data;
pub mod device;
pub mod doctor;
pub mod error;
pub mod evaluate;
pub mod export;
pub mod files;
pub mod hub;
pub mod image;
pub mod inspect;
pub mod interrupt;
pub mod model;
pub mod noise;
pub mod optim;
pub mod progress;
pub mod report;
pub mod results;
pub mod run;
pub mod sample;
pub mod sampler;
pub mod seed;
pub mod single_file;
pub mod stable_diffusion;
pub mod tensor_file;
pub mod tensorboard;
pub mod text;
pub mod train;

pub use error::{Error, Result};
pub use stable_diffusion::StableDiffusion;
