//! Writes a run that was resumed, for TensorBoard's own reader: tests/python/test_tensorboard.py runs this test with
//! HRA_EVENTS set to a folder and reads what is in it.

use std::path::PathBuf;

use hra::train::tensorboard::EventWriter;

#[test]
fn a_resumed_run() {
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let dir = std::env::var_os("HRA_EVENTS").map_or_else(|| scratch.path().join("logs"), PathBuf::from);
    let mut first = EventWriter::create(&dir, 0).expect("the folder is made");
    for step in 1..=6 {
        // The last two are not in any checkpoint: the run was killed and resumed from step 4.
        let value = if step > 4 { 99.0 } else { 1.0 / step as f32 };
        first.scalar("train/loss", value, step, 1000.0 + step as f64).expect("the disk has room");
    }
    drop(first);
    let mut second = EventWriter::create(&dir, 5).expect("the folder is there");
    for step in 5..=8 {
        second
            .scalar("train/loss", 1.0 / step as f32, step, 2000.0 + step as f64)
            .expect("the disk has room");
    }
    second.flush().expect("the disk has room");
    let written = std::fs::metadata(second.path()).expect("the file is there").len();
    // Two opening records and four scalars are in the file although the writer is still open.
    assert!(written > 6 * 16, "{written} bytes");
}
