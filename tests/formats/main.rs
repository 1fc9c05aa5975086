//! The files that are read and written: each form comes back with what was put in, as other programs have it, and no broken or
//! hostile file gets further than an error.

#[path = "../support"]
mod support {
    pub mod all_cases;
    pub mod base;
    pub mod cases;
    pub mod error;
    pub mod finished;
    pub mod process;
    pub mod readers;
    pub mod records;
    pub mod refused;
    pub mod scratch;
    pub mod training;
}

mod combine;
mod corpus;
mod export;
mod files;
mod fuzz;
mod hostile;
mod hub;
mod hub_cache;
mod hub_server;
mod json;
mod lora_file;
mod models;
mod mutate;
mod not_finite;
mod peft;
mod single_file;
mod single_file_reading;
mod tensorboard;
