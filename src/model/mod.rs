//! Networks: layers that may carry an adapter, what predicts (denoiser) and what it is told (conditioning), the UNet, the CLIP text tower, the VAE, control networks.

pub mod attention;
pub mod conditioning;
pub mod control;
pub mod denoiser;
mod down;
pub mod layers;
pub mod resnet;
pub mod text;
pub mod unet;
pub mod vae;

pub use conditioning::Conditioning;
pub use denoiser::{Call, Denoiser, Signals};
pub use unet::UNet;
pub use vae::{LatentScaling, Vae};
