//! The real binary, beside the test.

use super::scratch::Scratch;
use std::process::{Child, Stdio};

impl Scratch {
    /// Starts the program and does not wait.
    pub fn start(&self, args: &[&str]) -> Child {
        self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }
}
