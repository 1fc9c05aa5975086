//! Stable Diffusion's networks, each loaded from its part of a folder or checkpoint, and the adapters on their layers.

pub mod attach;
pub mod attention;
pub mod bounds;
pub mod config;
pub mod control;
mod down;
pub mod fixed;
pub mod infer;
pub mod layers;
pub mod ldm;
pub mod loaded;
pub mod resnet;
pub mod source;
pub mod tensors;
pub mod unet;
pub mod vae;
pub mod weights;

pub use unet::UNet;
pub use vae::Vae;
