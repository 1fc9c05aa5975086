//! Ways of making one adapter of several.

use crate::platform::choice::{Choice, Named, named};

/// In what way several orthogonal adapters become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// One after another, in the order given: what `hra sample` does with several adapters
    Chain,
    /// The sum of their rotations: orthogonal, and the same in any order
    Geodesic,
}

impl Choice for How {
    const CHOICES: &'static [Named<Self>] = &[
        named(
            Self::Chain,
            "chain",
            &[],
            "One after another, in the order given: what `hra sample` does with several adapters",
        ),
        named(
            Self::Geodesic,
            "geodesic",
            &[],
            "The sum of their rotations: orthogonal, and the same in any order",
        ),
    ];
}

/// Where to go with what cannot be combined here.
pub(super) const ELSEWHERE: &str =
    "`hra export --model DIR --adapter A=0.8 --adapter B=0.6 --to merged` takes adapters of any kind";
