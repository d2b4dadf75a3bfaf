//! What a block device must be able to do to be served.

use bytes::Bytes;

/// An export, as a list shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The name by which clients ask for it; at most 4,096 bytes.
    pub name: String,
    /// Words for people; may be empty.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// True if it cannot be written.
    pub read_only: bool,
}

/// A set of exports by name.
///
/// Futures need not be `Send`: see the crate's notes on threads.
#[allow(async_fn_in_trait)]
pub trait Exports: 'static {
    /// An opened export.
    type Export: Export;

    /// All exports, in the order in which people should see them. The first is the default one unless
    /// the server's configuration names another.
    async fn list(&self) -> Result<Vec<ExportInfo>, OpenError>;

    /// One export, without opening it. The default looks through the list.
    async fn describe(&self, name: &str) -> Result<ExportInfo, OpenError> {
        let list = self.list().await?;
        list.into_iter().find(|e| e.name == name).ok_or_else(|| OpenError::NotFound(name.to_owned()))
    }

    /// Opens an export. Called for the first connection that wants it; the others share it until
    /// the last is gone, when [`Export::close`] is called. The future is always driven to its end.
    async fn open(&self, name: &str) -> Result<Self::Export, OpenError>;
}

/// Why an export cannot be opened or listed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is none of that name.
    #[error("there is no export '{0}'")]
    NotFound(String),
    /// Somebody else holds it; the text says who.
    #[error("{0}")]
    Busy(String),
    /// The server is about to stop.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// Anything else; the text says what, and what to do.
    #[error("{0}")]
    Failed(String),
}

/// What NBD can say of a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// EPERM: written to a read-only export.
    NotPermitted = 1,
    /// EIO.
    Io = 5,
    /// ENOMEM.
    NoMemory = 12,
    /// EINVAL: the request makes no sense.
    Invalid = 22,
    /// ENOSPC: no room, or beyond the end.
    NoSpace = 28,
    /// EOVERFLOW: too large to be answered in the form that was asked for.
    Overflow = 75,
    /// ENOTSUP: also "zeroing would not be fast".
    NotSupported = 95,
    /// ESHUTDOWN: the server is about to stop.
    ShuttingDown = 108,
}

/// Why a request failed. The reason reaches clients that negotiated structured replies.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason} ({errno:?})")]
pub struct ExportError {
    /// For programs.
    pub errno: Errno,
    /// For people. At most 4,096 bytes of it are sent.
    pub reason: String,
}

impl ExportError {
    /// An error with its reason.
    pub fn new(errno: Errno, reason: impl Into<String>) -> Self {
        ExportError { errno, reason: reason.into() }
    }
}

/// A piece of the answer to a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Bytes; they are sent without being copied.
    Data(Bytes),
    /// So many zeros, which nobody had to read. Sent as a hole where the client understands holes.
    Zero(u64),
}

impl Piece {
    /// Bytes of the disk that it stands for.
    pub fn length(&self) -> u64 {
        match self {
            Piece::Data(bytes) => bytes.len() as u64,
            Piece::Zero(length) => *length,
        }
    }
}

impl From<Bytes> for Piece {
    fn from(bytes: Bytes) -> Self {
        Piece::Data(bytes)
    }
}

/// How a range becomes zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Zeroing {
    /// The range must stay allocated (no hole), so that later writes to it find room.
    pub no_hole: bool,
    /// Rather fail with [`Errno::NotSupported`], at once, than be as slow as a write of zeros.
    pub fast_only: bool,
    /// On stable storage before the answer.
    pub fua: bool,
}

/// An opened block device.
///
/// The server has checked every request: lengths are not zero, ranges end within [`Export::size`],
/// reads and writes are of at most 32 MiB ([`crate::PAYLOAD_MAX`]), and nothing that changes data
/// comes to a read-only export. Several requests run at one time, of several connections, and their
/// order is the export's to choose, as with any disk: only a flush (and `fua`) has to cover what was
/// *answered* before it came. Because connections share the opened export, that holds across them.
#[allow(async_fn_in_trait)]
pub trait Export: 'static {
    /// Bytes. May change: each request is checked against the size of its moment.
    fn size(&self) -> u64;

    /// True if it cannot be written.
    fn read_only(&self) -> bool {
        false
    }

    /// Reads `length` bytes: pieces one behind the other, exactly `length` in sum.
    async fn read(&self, offset: u64, length: u64) -> Result<Vec<Piece>, ExportError>;

    /// Writes bytes. `data` is a slice of the buffer that was read from the socket (256 KiB, with other
    /// requests in it): who keeps it for long copies it.
    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), ExportError>;

    /// Makes bytes zero.
    async fn zero(&self, offset: u64, length: u64, how: Zeroing) -> Result<(), ExportError>;

    /// Discards bytes: afterwards they are zero or as they were, byte by byte.
    async fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<(), ExportError>;

    /// Makes stable what was answered before.
    async fn flush(&self) -> Result<(), ExportError>;

    /// Which ranges hold data: `(length, allocated)`, from `offset` on. Unallocated ranges read as
    /// zeros. The answer may end early, but must make progress; it is cut to `length`. More
    /// than 8,192 extents in one answer are of no use.
    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<(u64, bool)>, ExportError>;

    /// A hint that the range will be read soon.
    async fn cache(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        let _ = (offset, length);
        Ok(())
    }

    /// The last connection is gone. No request runs any more, and none will.
    async fn close(&self) {}
}
