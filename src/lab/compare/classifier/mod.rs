//! `[classifier]`: whether a model still tells classes apart that no training taught, which the model itself says
//! ([`crate::lab::evaluate::classifier`]).

pub(super) mod entry;
pub(super) mod problems;
pub(super) mod set;

pub use entry::ClassifierEntry;
pub use set::ClassifierSet;
