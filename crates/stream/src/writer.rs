//! The writing end.
//!
//! ```text
//!  create ----+                  element, mark         finish
//!             +--> between records -------> ... ------> end mark written
//!  resume ----+          |
//!                        | a write failed
//!                        v
//!                     failed: scan what arrived, resume from there
//! ```

use crate::error::WriteError;
use crate::header::Header;
use crate::reader::{Mark, Summary};
use crate::record::{Counts, HEAD_SIZE, Head, RecordKind, Tally};
use crate::resume::Interrupted;
use crate::{BLOCK_SIZE, ELEMENT_SIZE};
use std::io::Write;
use stdx::checksum::crc32c;

/// Bytes of a stream between two check marks. What an interruption costs is at most so much work, 16 MiB or 256 whole
/// elements, for 72 bytes: a 200,000th.
pub const MARK_EVERY: u64 = 16 << 20;

/// What is put together before it is handed on: some elements, so that small ones do not cost a call each.
const BUFFER_SIZE: usize = 4 * ELEMENT_SIZE;

/// Writes a stream, element after element.
pub struct Writer<W: Write> {
    output: W,
    header: Header,
    tally: Tally,
    buffer: Vec<u8>,
    mark_every: u64,
    failed: bool,
}

impl<W: Write> Writer<W> {
    /// Begins a stream. `output` is empty, or a pipe.
    pub fn create(output: W, header: Header) -> Result<Writer<W>, WriteError> {
        header.check()?;
        let bytes = header.encode();
        let tally = Tally::begin(&bytes);
        let mut writer = Writer::at(output, header, tally);
        writer.buffer.extend(bytes);
        Ok(writer)
    }

    /// Goes on with a stream that ended too early. `output` ends at [`Interrupted::offset`]: a file is cut there first.
    /// The next element is the first behind [`Interrupted::last_element`].
    pub fn resume(output: W, interrupted: Interrupted) -> Writer<W> {
        Writer::at(output, interrupted.header, interrupted.tally)
    }

    fn at(output: W, header: Header, tally: Tally) -> Writer<W> {
        let buffer = Vec::with_capacity(BUFFER_SIZE + HEAD_SIZE + ELEMENT_SIZE);
        Writer { output, header, tally, buffer, mark_every: MARK_EVERY, failed: false }
    }

    /// Sets the distance of check marks in bytes, instead of [`MARK_EVERY`].
    pub fn with_mark_every(mut self, bytes: u64) -> Writer<W> {
        self.mark_every = bytes;
        self
    }

    /// Adds an element: the blocks of mask `data`, one behind the other in `bytes`, and the blocks of mask `zero` that
    /// are zeros now. In a full stream, zeros are what is not told.
    ///
    /// # Panics
    ///
    /// If the element does not come after the one before, lies outside of the disk, or its masks and bytes contradict
    /// each other.
    pub fn element(&mut self, number: u64, data: u16, zero: u16, bytes: &[u8]) -> Result<(), WriteError> {
        self.check_usable()?;
        assert_eq!(bytes.len(), data.count_ones() as usize * BLOCK_SIZE, "element {number}: data for {data:016b}");
        let head = Head { kind: RecordKind::Element, data, zero, number, body_crc: crc32c(bytes) };
        let fits = head.check(&self.header, self.tally.last).and_then(|()| head.check_tail(&self.header, bytes));
        fits.unwrap_or_else(|fault| panic!("element {number} cannot be exported: {fault}"));
        let encoded = head.encode();
        self.tally.element(&head, [&encoded, bytes]);
        self.buffer.extend(encoded);
        self.buffer.extend(bytes);
        if self.tally.offset - self.tally.good >= self.mark_every {
            self.mark()?;
        } else if self.buffer.len() >= BUFFER_SIZE {
            self.put()?;
        }
        Ok(())
    }

    /// Puts a check mark here, beyond those that come by themselves, and hands everything on: what is written up to
    /// here need not be written again. Without an element since the last one nothing happens.
    pub fn mark(&mut self) -> Result<Option<Mark>, WriteError> {
        self.check_usable()?;
        if self.tally.is_at_mark() {
            return Ok(None);
        }
        let mark = self.end_section(RecordKind::Mark)?;
        Ok(Some(mark))
    }

    /// Ends the stream. What `output` keeps in memory of its own was flushed; making it durable is the caller's part.
    pub fn finish(mut self) -> Result<(W, Summary), WriteError> {
        self.check_usable()?;
        let mark = self.end_section(RecordKind::End)?;
        let Tally { counts, marks, offset, .. } = self.tally;
        let summary = Summary { header: self.header, counts, marks, bytes: offset, hash: mark.hash };
        Ok((self.output, summary))
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes so far.
    pub fn offset(&self) -> u64 {
        self.tally.offset
    }

    /// The last element so far.
    pub fn last_element(&self) -> Option<u64> {
        self.tally.last
    }

    /// How much there is so far.
    pub fn counts(&self) -> Counts {
        self.tally.counts
    }

    fn end_section(&mut self, kind: RecordKind) -> Result<Mark, WriteError> {
        let mark = Mark::at(&mut self.tally);
        let bytes = self.tally.encode_mark(kind, mark.hash);
        self.tally.mark(&bytes);
        self.buffer.extend(bytes);
        self.put()?;
        let flushed = self.output.flush();
        self.judge(flushed)?;
        Ok(mark)
    }

    fn put(&mut self) -> Result<(), WriteError> {
        let written = self.output.write_all(&self.buffer);
        self.buffer.clear();
        self.judge(written)
    }

    fn judge(&mut self, result: std::io::Result<()>) -> Result<(), WriteError> {
        self.failed |= result.is_err();
        result.map_err(|source| WriteError::Io { offset: self.tally.offset, source })
    }

    fn check_usable(&self) -> Result<(), WriteError> {
        if self.failed { Err(WriteError::FailedBefore) } else { Ok(()) }
    }
}
