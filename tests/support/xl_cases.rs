//! The reference cases of Stable Diffusion XL.

use super::all_cases::{all, is_xl};
use super::cases::Case;
use super::stored_xl::stored_xl;

/// That of this repository, and those that lie where [`all`] looks.
pub fn xl_cases() -> Vec<Case> {
    std::iter::once(stored_xl()).chain(all().into_iter().filter(is_xl)).collect()
}
