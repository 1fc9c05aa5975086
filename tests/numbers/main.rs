//! The arithmetic: every method as algebra, and networks, training, samplers, pictures and scores against numbers that other
//! programs made.

#[path = "../reference/mod.rs"]
mod reference;
#[path = "../support"]
mod support {
    pub mod all_cases;
    pub mod base;
    pub mod cases;
    pub mod copied;
    pub mod error;
    pub mod grown;
    pub mod process;
    pub mod stored_xl;
    pub mod xl_cases;
}

mod adapters;
mod autoencoder;
mod data;
mod each_method;
mod images;
mod methods;
mod noise;
mod parameters;
mod parity;
mod rested;
mod samplers;
mod sampling;
mod scores;
mod spectrum;
mod xl;
