//! Why bytes are not a frame. Each sentence is for a log line that already names the peer.

/// Why bytes are not a frame that may come now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The first four bytes are others.
    #[error(
        "the other side does not speak Petal's protocol: a frame begins with {0:02x?}; check address and port (NBD has a port of its own)"
    )]
    NotPetal([u8; 4]),
    /// A message of a version that was not agreed on.
    #[error("a message in protocol version {theirs}, but version {agreed} was agreed on")]
    Version {
        /// Of the frame.
        theirs: u16,
        /// Of the connection.
        agreed: u16,
    },
    /// A kind of frame that this version does not have.
    #[error("unknown kind of frame: {0}")]
    UnknownKind(u8),
    /// Something in the header that must be zero is not.
    #[error("a frame header with bits set that mean nothing in this version")]
    ReservedBits,
    /// The body is longer than this peer may send.
    #[error("a frame body of {length} bytes; this peer may send {limit}")]
    BodyTooLong {
        /// As claimed, or as it came out.
        length: usize,
        /// The most.
        limit: usize,
    },
    /// The payload is longer than this peer may send.
    #[error("a payload of {length} bytes; this peer may send {limit}")]
    PayloadTooLong {
        /// As claimed, or as it came out.
        length: usize,
        /// The most.
        limit: usize,
    },
    /// Header or body was damaged on the way.
    #[error("checksum mismatch in a frame: the header says {expected:08x}, the bytes have {found:08x}")]
    Checksum {
        /// In the header.
        expected: u32,
        /// Of the bytes.
        found: u32,
    },
    /// The body is no message.
    #[error("a frame body that does not decode: {0}")]
    Body(postcard::Error),
    /// The message ends before its frame does.
    #[error("{0} bytes behind the end of a message")]
    TrailingBytes(usize),
    /// A payload where the message has none.
    #[error("a {0} message with a payload")]
    UnexpectedPayload(&'static str),
    /// The message is well-formed and makes no sense.
    #[error("a {message} message that makes no sense: {why}")]
    Invalid {
        /// Name of the message.
        message: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A message where a hello must come first.
    #[error("a message before the hello")]
    MessageBeforeHello,
    /// A hello on a connection that had one.
    #[error("a second hello on one connection")]
    SecondHello,
    /// A hello that is too short or names a role that does not exist.
    #[error("a malformed hello: {0}")]
    BadHello(&'static str),
}
