#![no_main]
//! See `petal_fuzz::commands`.
libfuzzer_sys::fuzz_target!(|data: &[u8]| petal_fuzz::commands(data));
