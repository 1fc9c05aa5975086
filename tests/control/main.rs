//! Control: conditions and pairs, what steers a drawing, how it is trained, compared and scored.

#[path = "../support"]
mod support {
    pub mod base;
    pub mod cases;
    pub mod error;
    pub mod finished;
    pub mod records;
    pub mod scratch;
}

mod compare;
mod conditions;
mod networks;
mod outside;
mod pairs;
mod prepare;
mod sampling;
mod scoring;
mod training;
