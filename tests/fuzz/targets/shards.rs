//! libFuzzer on the reader `shards` (see the README).
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| hra_fuzz::run(hra_fuzz::readers::shards, input));
