//! Bytes to messages and back. Knows no meaning: what a message does is said in `petal`.
//!
//! A connection carries frames: a fixed header ([`header`]), a postcard body, and bulk data that
//! nobody serialises or copies together. It begins with a [`hello`] in each direction. What is
//! decoded has been [`validate`]d: the cores rely on the shapes that are checked there (a block lies
//! within its element, a checksum for each block, data as long as the body says).
//!
//! No bytes from the network can make this panic, or hold more memory than [`Limits`] say and the
//! peer really sent. Every refusal is a [`WireError`]; after one the connection is of no use, since
//! nobody knows where the next frame begins.
//!
//! docs/wire-protocol.md has the pictures. A change of anything here needs a new [`VERSION`], a line
//! there, and new golden bytes in the tests.

pub mod error;
pub mod frame;
pub mod header;
pub mod hello;
pub mod validate;

pub use error::WireError;
pub use frame::{Decoded, Frame, Limits, decode, encode, encode_hello, encode_reject};
pub use hello::{Hello, Reject, RejectCode, Role, check_hello};
pub use validate::validate;

/// Version of the protocol that this program speaks best.
pub const VERSION: u16 = 6;
/// Oldest version that it still speaks.
pub const VERSION_MIN: u16 = 6;
