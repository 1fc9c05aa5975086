//! The registry: the methods there are, a file and a line each; [`super::method`] says what a method is.

pub mod boft;
pub mod dora;
pub mod ether_plus;
pub mod full;
pub mod hra;
pub mod hra_free;
pub mod hra_magnitude;
pub mod ia3;
pub mod lora;
pub mod oft;

use crate::adapter::method::{PeftReader, RegisteredMethod};

/// All methods, in the order in which they are told.
#[rustfmt::skip]
pub const METHODS: &[RegisteredMethod] = &[
    hra::METHOD,
    hra_magnitude::METHOD,
    hra_free::METHOD,
    lora::METHOD,
    dora::METHOD,
    oft::METHOD,
    oft::CONSTRAINED,
    boft::METHOD,
    ether_plus::METHOD,
    ia3::METHOD,
    full::METHOD,
];

/// The method of that name.
pub fn find(name: &str) -> Option<&'static RegisteredMethod> {
    METHODS.iter().find(|entry| entry.name == name)
}

/// The methods that have a setting of this name for their own; none have one that is common to all.
pub fn having(setting: &str) -> impl Iterator<Item = &'static RegisteredMethod> {
    METHODS.iter().filter(move |entry| (entry.own.keys)().contains(&setting))
}

/// The readers of PEFT's files.
pub fn readers() -> impl Iterator<Item = &'static PeftReader> {
    METHODS.iter().filter_map(|entry| entry.reader.as_ref())
}

/// Every `peft_type` that can be read, once.
pub fn peft_types() -> Vec<&'static str> {
    let mut types: Vec<&str> = readers().map(|reader| reader.peft_type).collect();
    types.dedup();
    types
}
