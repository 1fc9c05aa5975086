//! What a program that ended has left.

use std::process::Output;

/// What a finished program left.
pub struct Finished {
    pub code: i32,
    pub out: String,
    pub err: String,
}

pub fn finished(output: Output) -> Finished {
    use std::os::unix::process::ExitStatusExt;
    Finished {
        code: output.status.code().unwrap_or_else(|| -output.status.signal().unwrap()),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
