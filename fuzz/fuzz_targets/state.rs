#![no_main]
//! See `petal_fuzz::state`.
libfuzzer_sys::fuzz_target!(|data: &[u8]| petal_fuzz::state(data));
