//! x
pub mod loss;
