//! The parts of Stable Diffusion that a LoRA file can be for, and where it keeps their settings.

/// Where diffusers keeps PEFT's settings.
pub(super) const METADATA: &str = "lora_adapter_metadata";

/// A part of Stable Diffusion that has layers to adapt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LoraPart {
    /// The denoiser.
    UNet,
    /// The CLIP text tower.
    TextEncoder,
}

impl LoraPart {
    /// As diffusers names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::UNet => "unet",
            Self::TextEncoder => "text_encoder",
        }
    }
}
