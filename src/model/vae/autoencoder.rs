//! What a VAE needs of the network behind it.

use crate::model::layers::Module;
use tch::Tensor;

/// A network that encodes and decodes, f32 in and out, on its device.
pub(super) trait Autoencoder: Send {
    /// Pictures `(b, 3, h, w)` in [-1, 1] to mean and log-variance beside each other, `(b, 2 z, h / f, w / f)`.
    fn moments(&self, pictures: &Tensor) -> Tensor;

    /// Latents `(b, z, h, w)` to pictures `(b, 3, f h, f w)`.
    fn decode(&self, latents: &Tensor) -> Tensor;

    /// What of it can carry adapters.
    fn modules_mut(&mut self) -> Vec<Module<'_>>;
}
