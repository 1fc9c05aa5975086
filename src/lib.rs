//! Householder Reflection Adaptation for Stable Diffusion.
pub mod error;
pub use error::{Error, Result};
