//! The backup stream: a snapshot of a virtual disk, or what changed from one state of it to another, as one
//! sequence of bytes that verifies itself. `petal export` writes it, `petal import` reads it, and `petal stream
//! verify` judges it without a cluster.
//!
//! A stream is a [`Header`], records of elements in ascending order with check marks between them, and an end mark.
//! [`Writer`] and [`Reader`] are the two ends; [`scan`] finds from where an interrupted file is continued;
//! [`Header::fit`] says whether a target may take a stream. docs/stream-format.md has the pictures of the bytes.
//!
//! Nothing here opens a file, reads a clock or knows a cluster: bytes come from a [`std::io::Read`] and go to a
//! [`std::io::Write`].
//!
//! Failures: whatever is read may be cut, damaged or made up. It is refused with a [`StreamError`] that names the
//! byte and the element where it went wrong; nothing panics. What a caller of [`Writer`] gets wrong about
//! order or lengths is a programmer's error and does.
//!
//! * S1 What ends with [`Item::End`] is bit for bit what a writer finished: every byte is under a CRC-32C, and under
//!   a hash that chains from check mark to check mark; an encoding other than the writer's is refused.
//! * S2 Elements ascend, and lie within the disk.
//! * S3 Nothing is complete before the end mark, and the end of the input behind it.
//! * S4 A reader's memory is bounded, whatever it reads: one record of 64 KiB, one header, one buffer.
//!
//! Read next: `header.rs`, `record.rs`, `writer.rs`, `reader.rs`.

mod element;
mod error;
mod header;
mod reader;
mod record;
mod resume;
mod target;
mod writer;

pub use element::{Element, Run};
pub use error::{Fault, Part, Place, StreamError, WriteError};
pub use header::{FORMAT, Header, HeaderError, Kind, MAGIC, Point, StateId};
pub use reader::{Item, Mark, Reader, Summary, verify};
pub use record::{Counts, Hash};
pub use resume::{Interrupted, Scan, scan};
pub use target::{Fit, Misfit, Target};
pub use writer::{MARK_EVERY, Writer};

/// Bytes of a block: the cluster's unit of checksum and allocation.
pub const BLOCK_SIZE: usize = 4096;
/// Blocks of an element.
pub const BLOCKS_PER_ELEMENT: usize = 16;
/// Bytes of an element.
pub const ELEMENT_SIZE: usize = BLOCK_SIZE * BLOCKS_PER_ELEMENT;
