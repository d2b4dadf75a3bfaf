//! Why a stream is refused, and where.

use crate::ELEMENT_SIZE;
use crate::header::HeaderError;
use crate::record::Counts;
use core::fmt;

/// A stream that is not whole and right. Nothing that was read from it is complete.
#[derive(Debug, thiserror::Error)]
#[error("the backup stream is refused at byte {offset}, {place}: {fault}")]
pub struct StreamError {
    /// Byte of the stream, from 0, where what is wrong begins; where the stream ends if it was cut.
    pub offset: u64,
    /// The same in elements.
    pub place: Place,
    /// What is wrong there.
    pub fault: Fault,
}

/// Where in a stream, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the header.
    Header,
    /// Behind the header, before any element was whole.
    BeforeFirst,
    /// Behind this element, the last that was whole.
    After(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Header => write!(f, "in the header"),
            Place::BeforeFirst => write!(f, "before the first element"),
            Place::After(element) => {
                write!(f, "behind what belongs to the disk's first {} bytes", byte(&element.saturating_add(1)))
            }
        }
    }
}

/// Where an element begins.
fn byte(element: &u64) -> u64 {
    element.saturating_mul(ELEMENT_SIZE as u64)
}

/// What has a checksum of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The header.
    Header,
    /// The head of a record: nobody knows what it was.
    Head,
    /// The data of this element.
    Data(u64),
    /// A check mark or the end mark.
    Mark,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Header => write!(f, "the header"),
            Part::Head => write!(f, "the head of a record"),
            Part::Data(element) => write!(f, "the data of byte {} of the disk", byte(element)),
            Part::Mark => write!(f, "a check mark"),
        }
    }
}

/// What is wrong with a stream.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The bytes could not be got.
    #[error("it cannot be read: {0}")]
    Io(#[from] std::io::Error),
    /// Other first bytes.
    #[error("it does not begin like a backup stream of Petal; check that this is the right file")]
    NotAStream,
    /// Written by a newer program.
    #[error("it has format {found}, and this program knows formats up to {known}; use a newer program")]
    NewerFormat {
        /// The stream's.
        found: u32,
        /// The newest known here.
        known: u32,
    },
    /// Written by a program that is too old.
    #[error("it has format {found}, and this program knows formats from {known} on; use an older program")]
    OlderFormat {
        /// The stream's.
        found: u32,
        /// The oldest known here.
        known: u32,
    },
    /// It ends too early.
    #[error(
        "it ends here, without an end mark: it was cut, or its export did not end. It is good up to byte {good}; \
         go on with the export, or take another copy"
    )]
    Cut {
        /// End of the last check mark, or of the header.
        good: u64,
    },
    /// Not even one byte.
    #[error("it is empty: what was to write it may have failed; see what that said, and export again")]
    Empty,
    /// It ends before anything could be known of it.
    #[error("it ends here, before the end of its header: it holds nothing; take another copy, or export again")]
    NoHeader,
    /// A checksum that does not match.
    #[error("{0} does not match its checksum: the bytes were damaged; take another copy, or export again")]
    Damaged(Part),
    /// A header longer than any that is written.
    #[error("a header of {length} bytes; {limit} are the most")]
    HeaderTooLong {
        /// As claimed.
        length: usize,
        /// The most.
        limit: usize,
    },
    /// A header with the right checksum that makes no sense.
    #[error("a header that makes no sense: {0}")]
    Header(#[from] HeaderError),
    /// A record with the right checksum that makes no sense.
    #[error("a record that makes no sense: {0}")]
    Record(&'static str),
    /// Elements do not ascend.
    #[error("byte {} of the disk comes after byte {}: they must ascend", byte(element), byte(before))]
    Order {
        /// The one before.
        before: u64,
        /// This one.
        element: u64,
    },
    /// An element, or blocks of it, behind the end of the disk.
    #[error("byte {} of the disk comes with blocks outside of its {size} bytes", byte(element))]
    Outside {
        /// The element.
        element: u64,
        /// The disk's size.
        size: u64,
    },
    /// A mark counts other records than there are.
    #[error("the check mark counts {told}, and there are {found}: records are missing or too many since byte {since}")]
    Miscounted {
        /// What the mark says.
        told: Counts,
        /// What came.
        found: Counts,
        /// Where the checked part begins.
        since: u64,
    },
    /// The records are whole, but not those that were written.
    #[error(
        "what lies between byte {since} and here is not what was written, though each record is whole; take another copy"
    )]
    Hash {
        /// Where the checked part begins.
        since: u64,
    },
    /// Something follows the end mark.
    #[error("there is something behind its end; a stream ends with its end mark")]
    Trailing,
    /// The reader has refused the stream before.
    #[error("it was refused before, and nothing behind that place is looked at")]
    RefusedBefore,
}

/// Why a stream could not be written on.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The header makes no sense.
    #[error("no stream can be made with such a header")]
    Header(#[from] HeaderError),
    /// The bytes could not be put away.
    #[error("the backup stream cannot be written at byte {offset}")]
    Io {
        /// Bytes of the stream until then; how many of them arrived, only a scan tells.
        offset: u64,
        /// Why.
        source: std::io::Error,
    },
    /// A write failed before, so nobody knows where the stream ends.
    #[error("the backup stream could not be written on before; scan what was written, and go on from there")]
    FailedBefore,
}
