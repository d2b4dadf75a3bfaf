//! An export that was interrupted goes on where it was, if it went to a file.
//!
//! The file itself is the only memory: it is read from its beginning, every checksum and hash is looked at, and what
//! lies behind the last good check mark is thrown away. Nothing is kept beside it that could belong to another file.
//! The snapshot has not changed since, so what is appended is what would have been written at first; whether it *is*
//! the same snapshot, the caller sees in the header.

use crate::error::{Fault, StreamError};
use crate::header::Header;
use crate::reader::{Item, Reader, Summary};
use crate::record::{Counts, Tally};
use std::io::Read;

/// What a file holds.
pub enum Scan {
    /// A whole stream.
    Whole(Summary),
    /// The beginning of one.
    Interrupted(Interrupted),
}

/// The beginning of a stream, good up to a check mark (or up to the end of the header).
pub struct Interrupted {
    pub(crate) header: Header,
    pub(crate) tally: Tally,
    refused: StreamError,
}

impl Interrupted {
    /// The header: it must be the one that would be written now.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes that stay. What the file has behind them is cut off before the stream goes on.
    pub fn offset(&self) -> u64 {
        self.tally.offset
    }

    /// The last element that stays.
    pub fn last_element(&self) -> Option<u64> {
        self.tally.last
    }

    /// How much stays.
    pub fn counts(&self) -> Counts {
        self.tally.counts
    }

    /// Why the rest does not stay: cut, usually; but perhaps the file was damaged, which is worth telling.
    pub fn refused(&self) -> &StreamError {
        &self.refused
    }
}

/// Reads what there is of a stream. An error if there is not even a whole header, or if the input could not be read:
/// then nobody knows what the file holds, and it must not be cut.
pub fn scan<R: Read>(input: R) -> Result<Scan, StreamError> {
    let mut reader = Reader::open(input)?;
    let mut tally = reader.tally().clone();
    loop {
        match reader.next_item() {
            Ok(Item::Element(_)) => {}
            Ok(Item::Mark(_)) => tally = reader.tally().clone(),
            Ok(Item::End(summary)) => return Ok(Scan::Whole(summary)),
            Err(refused) if matches!(refused.fault, Fault::Io(_)) => return Err(refused),
            Err(refused) => {
                let header = reader.header().clone();
                return Ok(Scan::Interrupted(Interrupted { header, tally, refused }));
            }
        }
    }
}
