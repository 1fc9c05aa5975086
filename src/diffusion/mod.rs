//! A whole model and how it draws: noise schedule, samplers, prompts, pictures to start from, control while drawing.

pub mod noise;
pub mod picture_sizes;
pub mod prompt;
pub mod sample;
pub mod sampler;
pub mod stable_diffusion;
