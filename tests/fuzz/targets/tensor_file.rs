//! libFuzzer on the reader `tensor_file` (see the README).
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| hra_fuzz::run(hra_fuzz::readers::tensor_file, input));
