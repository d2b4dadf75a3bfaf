#![no_main]
//! See `petal_fuzz::superblock`.
libfuzzer_sys::fuzz_target!(|data: &[u8]| petal_fuzz::superblock(data));
