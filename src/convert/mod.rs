//! Adapters and models in other programs' forms, and what a file is.

pub mod export;
pub mod inspect;
pub mod single_file;
