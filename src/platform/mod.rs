//! What everything stands on: the machine, files, the hub, seeds, and how a run is watched and stopped.

pub mod adapter_layout;
pub mod choice;
pub mod columns;
pub mod cuda;
pub mod device;
pub mod disguise;
pub mod doctor;
pub mod files;
pub mod host;
pub mod hub;
pub mod observer;
pub mod precision;
pub mod random;
pub mod seed;
pub mod spreadsheet;
