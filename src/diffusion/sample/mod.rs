//! Prompts and seeds to pictures, by a [`Session`].
//!
//! A picture belongs to its seed alone: its noise is drawn on the CPU after `manual_seed(seed)`, as Python's
//! `torch.Generator("cpu").manual_seed(seed)` draws it, whatever else is in the batch. An ancestral sampler's noise of
//! each step comes from the same stream, after the first latents.

mod batch;
mod noise;
mod session;
mod settings;
mod sizes;
mod start;
mod steering;
mod texts;

pub use noise::Noise;
pub use session::{From, Made, Picture, Request, Session};
pub use settings::{SampleSettings, TextSettings};
pub use sizes::SizeSettings;
pub use start::Start;
pub use steering::{Steering, Strength, conditions};
pub use texts::KnownTexts;
