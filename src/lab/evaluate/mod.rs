//! Scores of pictures. `processor` turns pictures into what a tower sees, `clip`, `vit` and `lpips` are the towers (ours, on
//! libtorch, loaded from Hugging Face folders), `vision` what the first two share, `scores` are the formulas; [`Towers`] holds what is loaded.
//! `control` has the formulas of conditions, which need no tower; `classifier` asks the diffusion model itself.

pub mod classifier;
pub mod clip;
pub mod control;
pub mod lpips;
pub mod processor;
pub mod scores;
pub mod towers;
mod vision;
pub mod vit;

pub use classifier::DiffusionClassifier;
pub use scores::ScoredSubject;
pub use towers::{TowerPaths, Towers};
