//! Ways of making one adapter of several.

/// In what way several orthogonal adapters become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum How {
    /// One after another, in the order given: what `hra sample` does with several adapters
    Chain,
    /// The sum of their rotations: orthogonal, and the same in any order
    Geodesic,
}

/// Where to go with what cannot be combined here.
pub(super) const ELSEWHERE: &str =
    "hint: `hra export --model DIR --adapter A=0.8 --adapter B=0.6 --to merged` takes adapters of any kind";
