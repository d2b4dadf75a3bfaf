//! Whole clusters in one thread, in virtual time, decided by a seed (docs/testing.md).
//!
//! The cores that ship run here unchanged; sockets, disks, clocks and the people who use them are
//! pretended. [`run_seed`] draws a cluster and its troubles from a seed, lets clients work while
//! servers crash, then stops the troubles and asks whether every promise was kept. The same seed gives
//! the same run, event by event, for ever: a complaint comes with the seed that shows it again.
//!
//! Read next: `world.rs` (what happens), `options.rs` (what is drawn), `checkers/` (what must hold).

mod ask;
pub mod checkers;
pub mod clock;
mod codec;
pub mod content;
pub mod counters;
pub mod disk;
pub mod ending;
mod event;
pub mod families;
mod formatting;
pub mod history;
mod host;
pub mod judge;
mod keeper;
mod nemesis;
pub mod net;
pub mod options;
mod panics;
mod run;
pub mod scale;
pub mod scenario;
pub mod trace;
pub mod workload;
mod world;

pub use run::{Report, Summary, compare_runs, run_many, run_seed};
