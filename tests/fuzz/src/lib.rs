//! The readers under libFuzzer, each input in a fresh folder.

#[path = "../../support/readers/mod.rs"]
pub mod readers;

/// Gives `input` to a reader.
pub fn run(reader: readers::Reader, input: &[u8]) {
    let scratch = tempfile::tempdir().expect("a scratch folder");
    reader(scratch.path(), input);
}
