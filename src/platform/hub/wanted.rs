//! What a repository can be.

/// What a repository is to be used as, which decides the files that are downloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// A Stable Diffusion folder.
    Model,
    /// A PEFT folder, with a control encoder where there is one, or a single LoRA file.
    Adapter,
    /// A tower that scores pictures: CLIP, DINO, DINOv2.
    Tower,
    /// A ControlNet folder.
    ControlNet,
    /// A VAE's folder.
    Vae,
}
