//! The program as users run it and the library as programs call it: training, drawing, what is told, and who may use whom in the
//! source.

#[path = "../support"]
mod support {
    pub mod background;
    pub mod base;
    pub mod copied;
    pub mod error;
    pub mod finished;
    pub mod grown;
    pub mod memory;
    pub mod process;
    pub mod records;
    pub mod scratch;
    pub mod training;
}

mod bounds;
mod cli;
mod examples;
mod img2img;
mod large;
mod layers;
mod low_memory;
mod methods_training;
mod observer;
mod promises;
mod run_folder;
mod sample;
mod session;
mod stdout;
mod stopped;
mod terminal;
mod threads;
mod torture;
mod train;
mod user_files;
mod xl_training;
