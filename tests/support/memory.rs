//! How much memory a program took.

use super::finished::Finished;
use super::scratch::Scratch;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};

/// What a program of `scratch` left, and the most memory that it held, in bytes.
pub fn measured(scratch: &Scratch, mut command: Command) -> (Finished, u64) {
    // Into files: `wait4`, which alone tells the memory of one child, reads no pipes meanwhile.
    let [out, err] = ["stdout.txt", "stderr.txt"].map(|name| scratch.path(name));
    command.stdout(std::fs::File::create(&out).unwrap()).stderr(std::fs::File::create(&err).unwrap());
    #[allow(clippy::zombie_processes)] // wait4 below waits for it
    let child = command.spawn().unwrap();
    let mut status = 0;
    // SAFETY: `rusage` is plain numbers, for which zeros are a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: waits for our own child, which nothing else waits for, and writes to two live locals.
    let waited = unsafe { libc::wait4(child.id() as i32, &mut status, 0, &mut usage) };
    assert_eq!(waited, child.id() as i32);
    let status = ExitStatus::from_raw(status);
    let code = status.code().unwrap_or_else(|| -status.signal().unwrap());
    let read = |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
    (Finished { code, out: read(&out), err: read(&err) }, usage.ru_maxrss as u64 * 1024)
}
