//! Stable Diffusion's networks: layers that may carry an adapter, the UNet, the CLIP text tower, the VAE, control networks.

pub mod attention;
pub mod control;
mod down;
pub mod layers;
pub mod resnet;
pub mod text;
pub mod unet;
pub mod vae;

pub use unet::UNet;
pub use vae::Vae;
