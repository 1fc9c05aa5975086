//! libFuzzer on the reader `control_encoder` (see the README).
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| hra_fuzz::run(hra_fuzz::readers::control_encoder, input));
