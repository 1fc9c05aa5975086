//! The laboratory: methods compared under equal conditions, pictures scored, results reported. It uses every other room.

pub mod compare;
pub mod evaluate;
pub mod report;
pub mod results;
