//! Stable Diffusion's networks, each loaded from its part of a Hugging Face folder, and the adapters on their layers.

pub mod attach;
pub mod attention;
pub mod config;
pub mod fixed;
pub mod layers;
pub mod loaded;
pub mod resnet;
pub mod unet;
pub mod vae;
pub mod weights;

pub use unet::UNet;
pub use vae::Vae;
