#![no_main]
//! See `petal_fuzz::nbd`.
libfuzzer_sys::fuzz_target!(|data: &[u8]| petal_fuzz::nbd(data));
