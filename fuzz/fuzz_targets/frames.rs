#![no_main]
//! See `petal_fuzz::frames`.
libfuzzer_sys::fuzz_target!(|data: &[u8]| petal_fuzz::frames(data));
