//! libFuzzer on the reader `lora_file` (see the README).
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| hra_fuzz::run(hra_fuzz::readers::lora_file, input));
