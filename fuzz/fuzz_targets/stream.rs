#![no_main]
//! See `petal_fuzz::stream`.
libfuzzer_sys::fuzz_target!(|data: &[u8]| petal_fuzz::stream(data));
