//! libFuzzer on the reader `text_encoder` (see the README).
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| hra_fuzz::run(hra_fuzz::readers::text_encoder, input));
