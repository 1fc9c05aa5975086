//! Empty on purpose. Only one crate may declare `links = "tch"`, and that is torch-sys 0.24.
