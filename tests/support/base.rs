//! What nearly every test starts with: where files are, and how many threads compute.

use std::path::PathBuf;

/// How many threads the tests compute with: `HRA_TEST_THREADS`, or one, as the references were made. Parallel tests would
/// also fight for cores.
pub fn threads() -> i32 {
    let Some(text) = std::env::var_os("HRA_TEST_THREADS").filter(|text| !text.is_empty()) else { return 1 };
    let count = text.to_str().and_then(|text| text.parse().ok()).filter(|count| *count >= 1);
    count.unwrap_or_else(|| panic!("HRA_TEST_THREADS: expected a number of threads, found {text:?}"))
}

/// Lets libtorch compute with [`threads`], in this thread and in those that it starts.
pub fn pin_threads() {
    tch::set_num_threads(threads());
}

/// The repository's root: `HRA_ROOT`, or where this was built.
pub fn root() -> PathBuf {
    std::env::var_os("HRA_ROOT").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from)
}
