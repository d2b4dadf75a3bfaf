//! What the cores need and the standard library lacks.
//!
//! Nothing here does I/O, reads a clock or draws randomness: these come in as arguments
//! (ARCHITECTURE.md, "cores are stepped, shells are thin").

pub mod calendar;
pub mod checksum;
pub mod fast_map;
pub mod machine;
pub mod prng;
pub mod recent;
pub mod time;
pub mod units;

pub use fast_map::{FastMap, FastSet};
pub use machine::Machine;
pub use prng::Prng;
pub use recent::Recent;
pub use time::{Duration, Instant};
