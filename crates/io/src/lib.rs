//! The world outside the cores: clock, sockets, disks, and the loops that drive a core with them.
//!
//! Everything that decides is in `petal`; what is here only carries out. A process has one thread
//! with one [`runtime`], on which the driver of the core, every connection and the disk engine live:
//! with few cores, handing work from thread to thread costs more than the work.
//!
//! * [`clock`]: the time;
//! * [`transport`]: connections, hello, framing of bytes, dialling;
//! * [`engine`]: the interface to disks;
//! * `disk`: the engines themselves;
//! * [`server`]: drives `petal::server::Server`;
//! * `client`: drives `petal::client::Client`.

pub mod clock;
pub mod disk;
pub mod engine;
