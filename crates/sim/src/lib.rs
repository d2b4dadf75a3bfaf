//! Whole clusters in one thread, in virtual time.
pub mod checkers;
pub mod clock;
pub mod content;
pub mod counters;
pub mod disk;
pub mod net;
