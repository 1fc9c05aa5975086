//! libFuzzer on the reader `class_images` (see the README).
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| hra_fuzz::run(hra_fuzz::readers::class_images, input));
