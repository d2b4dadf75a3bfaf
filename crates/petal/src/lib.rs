//! The core of Petal: distributed virtual disks (Lee and Thekkath, ASPLOS 1996), stepped.
//!
//! The paper's five modules are five rooms, and nothing else is called a module of the server:
//! [`liveness`], [`global_state`], [`translator`], [`data_access`] and (with the failures that need
//! it) recovery. [`server`] owns them and is the only file that routes between them; [`store`] is
//! one physical disk. [`client`] is the other end of the data path.
//!
//! Nothing here does I/O, reads a clock, starts a thread or draws a random number.

pub mod client;
pub mod data_access;
pub mod desk;
mod disk_times;
mod disk_watch;
mod fetch;
pub mod global_state;
pub mod ids;
pub mod limits;
pub mod liveness;
pub mod message;
pub mod mover;
mod pace;
pub mod placement;
pub(crate) mod policy;
pub mod promise;
mod repair;
pub mod replan;
mod resync;
pub mod sabotage;
pub mod scrub;
pub mod server;
mod silence;
pub mod space;
pub mod store;
pub mod translator;
