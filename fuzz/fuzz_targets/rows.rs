#![no_main]
//! See `petal_fuzz::rows`.
libfuzzer_sys::fuzz_target!(|data: &[u8]| petal_fuzz::rows(data));
