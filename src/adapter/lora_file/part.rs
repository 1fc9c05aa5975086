//! The parts of Stable Diffusion that a LoRA file can be for, and where it keeps their settings.

/// Where diffusers keeps PEFT's settings.
pub(super) const METADATA: &str = "lora_adapter_metadata";

/// A part of Stable Diffusion that has layers to adapt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LoraPart {
    /// The denoiser.
    UNet,
    /// The CLIP text tower; of Stable Diffusion XL the first.
    TextEncoder,
    /// The second text tower of Stable Diffusion XL.
    TextEncoder2,
}

impl LoraPart {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::UNet, Self::TextEncoder, Self::TextEncoder2];

    /// As diffusers names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::UNet => "unet",
            Self::TextEncoder => "text_encoder",
            Self::TextEncoder2 => "text_encoder_2",
        }
    }
}
