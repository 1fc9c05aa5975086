//! Tests that look at their whole process: its memory, its output, its panics.

use std::process::Command;

/// Does a test's work in a process of its own: this binary again, with the test `name` alone.
pub fn alone(name: &str, work: impl FnOnce()) {
    const CHILD: &str = "HRA_TEST_ALONE";
    if std::env::var_os(CHILD).is_some() {
        return work();
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    let done = child.args(["--exact", name, "--nocapture"]).env(CHILD, "1").output().unwrap();
    let text = [done.stdout, done.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    // Indented, so that nobody takes its lines for those of this process.
    text.lines().for_each(|line| println!("    {line}"));
    assert!(
        done.status.success() && text.contains("\ntest result: ok. 1 passed"),
        "{name} alone: {}",
        done.status
    );
}
