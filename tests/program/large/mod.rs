//! Models of full size, with random weights, through the real binary. Sizes are those of the published configs; the numbers of
//! weights are the published ones, so a network that lacks a layer or has one too many fails before it computes.
//!
//! They take minutes, gigabytes of disk and memory, so they are run by hand, one at a time:
//!
//! ```text
//! cargo test --release --test program large -- --ignored --nocapture --test-threads 1
//! ```

mod fill;
mod phases;
mod sd15;
mod xl;
