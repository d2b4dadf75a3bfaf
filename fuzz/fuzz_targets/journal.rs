#![no_main]
//! See `petal_fuzz::journal`.
libfuzzer_sys::fuzz_target!(|data: &[u8]| petal_fuzz::journal(data));
