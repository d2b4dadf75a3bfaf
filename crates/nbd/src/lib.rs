//! An NBD server (fixed newstyle) over unix sockets and TCP, in front of a trait.
//!
//! Why: NBD is how programs that we did not write (qemu, fio, nbdcopy, the kernel) reach a virtual
//! disk. This crate knows the protocol and nothing of Petal: whoever has disks implements
//! [`Exports`] and [`Export`].
//!
//! ```text
//!   listener ──> one local task per connection
//!                  negotiate.rs      options until GO, under a deadline
//!                  transmission.rs   the loop:  socket ─> Inbox ─> Slots ─> Outbox ─> socket
//!                                                 many requests     ^  one writev for all
//!                                                 per read          |  replies of a round
//!                                            futures of the export ─┘
//!   registry.rs: connections that name the same export share one opened export (multi-conn)
//! ```
//!
//! # One thread
//!
//! Everything runs on the thread of a current-thread runtime, inside a [`tokio::task::LocalSet`]:
//! connections are `spawn_local` tasks, shared state is `Rc` and `Cell`, and neither exports nor
//! their futures have to be `Send`. A request costs no task, no channel and no lock: its future sits
//! in a slot of its connection and is polled by the connection's task. Only the wakers of slots are
//! `Send`, because the type of wakers demands it, so an export may well answer from another thread.
//!
//! # How it fails
//!
//! What a client sends can do three things: be answered, be refused with the protocol's error, or end
//! its own connection. It cannot panic the server, and it cannot make it hold more than
//! [`Config`] allows, and beyond that one request of each connection. An export that fails a request fails that request alone; one that panics ends
//! the connection whose request it was.
//!
//! # Invariants
//!
//! 1. Every request that was accepted gets exactly one final reply, or its connection ends.
//! 2. A connection that ends first lets its requests in flight finish; the export is closed after the
//!    last of its connections has ended, and never while a request runs on it.
//! 3. Bytes held for one connection stay below [`Config::bytes_in_flight_max`], except that one
//!    request of up to 32 MiB is always let through.
//!
//! Source: the NBD project's protocol document (`doc/proto.md`), including extended headers.

mod export;
mod inbox;
mod memory;
mod negotiate;
mod outbox;
mod protocol;
mod registry;
mod server;
mod slots;
mod transmission;

pub use export::{Errno, Export, ExportError, ExportInfo, Exports, OpenError, Piece, Zeroing};
pub use memory::{MemoryExport, NullExport, StaticExports};
pub use protocol::PAYLOAD_MAX;
pub use server::{Config, Listener, Server};
