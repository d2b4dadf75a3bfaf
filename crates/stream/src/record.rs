//! Records: an element, a check mark, the end mark. One head of 24 bytes for all, then a body.
//!
//! The head has a checksum of its own, so that no length is believed that was damaged. A mark has the hash of all
//! bytes since the beginning of the mark before it (of the stream, for the first) up to itself. The mark before is
//! among these bytes, so each hash stands for everything before it, and a stream can be continued from a mark alone.

use crate::error::{Fault, Part};
use crate::header::{Header, Kind};
use crate::{BLOCK_SIZE, ELEMENT_SIZE};
use core::fmt;
use stdx::checksum::crc32c;

/// Bytes of a record's head.
pub(crate) const HEAD_SIZE: usize = 24;
/// Bytes of a mark's body.
pub(crate) const MARK_BODY_SIZE: usize = 48;
/// Bytes of a whole mark.
pub(crate) const MARK_SIZE: usize = HEAD_SIZE + MARK_BODY_SIZE;

const HEAD_CRC_AT: usize = 20;

/// What a record is: the first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum RecordKind {
    /// Blocks of one element.
    Element = 1,
    /// Up to here everything is right.
    Mark = 2,
    /// The same, and nothing follows.
    End = 3,
}

/// A 256-bit BLAKE3 hash. Prints as hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hash(pub [u8; 32]);

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// How much a stream holds.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counts {
    /// Records of elements.
    pub elements: u64,
    /// Blocks with data.
    pub data_blocks: u64,
    /// Blocks that become zeros.
    pub zero_blocks: u64,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { elements, data_blocks, zero_blocks } = self;
        write!(f, "{elements} elements with {data_blocks} blocks of data and {zero_blocks} of zeros")
    }
}

/// The head of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub kind: RecordKind,
    /// Blocks that follow, lowest bit first.
    pub data: u16,
    /// Blocks that are zeros now.
    pub zero: u16,
    /// Element's number; of a mark: records of elements so far.
    pub number: u64,
    /// Checksum of the body.
    pub body_crc: u32,
}

impl Head {
    pub fn encode(&self) -> [u8; HEAD_SIZE] {
        let mut bytes = [0; HEAD_SIZE];
        bytes[0] = self.kind as u8;
        bytes[4..6].copy_from_slice(&self.data.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.zero.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.body_crc.to_le_bytes());
        let crc = crc32c(&bytes[..HEAD_CRC_AT]);
        bytes[HEAD_CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; HEAD_SIZE]) -> Result<Head, Fault> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        if crc32c(&bytes[..HEAD_CRC_AT]) != u32_at(HEAD_CRC_AT) {
            return Err(Fault::Damaged(Part::Head));
        }
        let kind = match bytes[0] {
            1 => RecordKind::Element,
            2 => RecordKind::Mark,
            3 => RecordKind::End,
            _ => return Err(Fault::Record("its kind is unknown")),
        };
        if bytes[1..4] != [0; 3] {
            return Err(Fault::Record("bytes that must be zero are not"));
        }
        let number = u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes"));
        Ok(Head { kind, data: u16_at(4), zero: u16_at(6), number, body_crc: u32_at(16) })
    }

    /// Bytes of the body.
    pub fn body_length(&self) -> usize {
        match self.kind {
            RecordKind::Element => self.data.count_ones() as usize * BLOCK_SIZE,
            RecordKind::Mark | RecordKind::End => MARK_BODY_SIZE,
        }
    }

    /// Whether such a record may come after element `last` in this stream.
    pub fn check(&self, header: &Header, last: Option<u64>) -> Result<(), Fault> {
        let Head { data, zero, number: element, .. } = *self;
        if self.kind != RecordKind::Element {
            return if data | zero == 0 { Ok(()) } else { Err(Fault::Record("a check mark with blocks")) };
        }
        if data & zero != 0 {
            return Err(Fault::Record("a block has data and is zeros"));
        }
        if data | zero == 0 {
            return Err(Fault::Record("an element without blocks"));
        }
        if zero != 0 && header.kind == Kind::Full {
            return Err(Fault::Record("zeros in a full stream, where what is not told is zeros"));
        }
        if let Some(before) = last.filter(|before| *before >= element) {
            return Err(Fault::Order { before, element });
        }
        if (data | zero) & !header.blocks_within(element) != 0 {
            return Err(Fault::Outside { element, size: header.size });
        }
        Ok(())
    }

    /// Whether what the last block has behind the end of the disk is zeros: equal disks have equal streams.
    pub fn check_tail(&self, header: &Header, body: &[u8]) -> Result<(), Fault> {
        let beyond = (BLOCK_SIZE as u64 - header.size % BLOCK_SIZE as u64) as usize % BLOCK_SIZE;
        let within = header.blocks_within(self.number);
        let has_last = self.number + 1 == header.elements() && self.data & within & !(within >> 1) != 0;
        match has_last && body[body.len() - beyond..].iter().any(|byte| *byte != 0) {
            true => Err(Fault::Record("data behind the end of the disk")),
            false => Ok(()),
        }
    }
}

/// What BLAKE3 is given at once. It hashes many of its chunks of 1 KiB side by side, but only as many as are left up to
/// an even place in its tree: bit by bit as records come (24 bytes, 4 KiB, 24 bytes, ...) it has a quarter of the speed.
const HASHED_AT_ONCE: usize = 256 << 10;

/// A running hash that waits for large pieces.
#[derive(Clone, Default)]
struct Hasher {
    /// Two kilobytes.
    hasher: Box<blake3::Hasher>,
    waiting: Vec<u8>,
}

impl Hasher {
    fn update(&mut self, bytes: &[u8]) {
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= HASHED_AT_ONCE {
            self.hasher.update(&self.waiting);
            self.waiting.clear();
        }
    }

    fn hash(&mut self) -> Hash {
        self.hasher.update(&self.waiting);
        self.waiting.clear();
        Hash(*self.hasher.finalize().as_bytes())
    }

    fn reset(&mut self) {
        self.hasher.reset();
        self.waiting.clear();
    }
}

/// What both ends count and hash alike, from the beginning of a stream to where it is.
#[derive(Clone)]
pub(crate) struct Tally {
    /// Bytes so far.
    pub offset: u64,
    pub counts: Counts,
    /// Check marks so far.
    pub marks: u64,
    /// The last element.
    pub last: Option<u64>,
    /// Where the bytes begin that the next mark's hash is of.
    pub since: u64,
    /// Where the last mark, or the header, ends.
    pub good: u64,
    /// Of the bytes since `since`.
    hasher: Hasher,
}

impl Tally {
    pub fn begin(header: &[u8]) -> Tally {
        let mut hasher = Hasher::default();
        hasher.update(header);
        let length = header.len() as u64;
        Tally { offset: length, counts: Counts::default(), marks: 0, last: None, since: 0, good: length, hasher }
    }

    /// Adds an element's record.
    pub fn element(&mut self, head: &Head, bytes: [&[u8]; 2]) {
        for part in bytes {
            self.hasher.update(part);
            self.offset += part.len() as u64;
        }
        self.counts.elements += 1;
        self.counts.data_blocks += u64::from(head.data.count_ones());
        self.counts.zero_blocks += u64::from(head.zero.count_ones());
        self.last = Some(head.number);
    }

    /// Whether there is nothing since the last mark.
    pub fn is_at_mark(&self) -> bool {
        self.offset == self.good
    }

    /// The hash that a mark here has.
    pub fn hash(&mut self) -> Hash {
        self.hasher.hash()
    }

    /// A mark as it stands here, with the hash of what comes before.
    pub fn encode_mark(&self, kind: RecordKind, hash: Hash) -> [u8; MARK_SIZE] {
        let mut bytes = [0; MARK_SIZE];
        let body = &mut bytes[HEAD_SIZE..];
        body[..8].copy_from_slice(&self.counts.data_blocks.to_le_bytes());
        body[8..16].copy_from_slice(&self.counts.zero_blocks.to_le_bytes());
        body[16..].copy_from_slice(&hash.0);
        let head = Head { kind, data: 0, zero: 0, number: self.counts.elements, body_crc: crc32c(body) };
        bytes[..HEAD_SIZE].copy_from_slice(&head.encode());
        bytes
    }

    /// Compares a mark with what came, of which this is the hash; the mark's checksums are right.
    pub fn check_mark(&self, head: &Head, body: &[u8], hash: Hash) -> Result<(), Fault> {
        let number = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("eight bytes"));
        let told = Counts { elements: head.number, data_blocks: number(0), zero_blocks: number(8) };
        if told != self.counts {
            return Err(Fault::Miscounted { told, found: self.counts, since: self.since });
        }
        if body[16..] != hash.0 {
            return Err(Fault::Hash { since: self.since });
        }
        Ok(())
    }

    /// Adds a mark: what follows is hashed from its beginning.
    pub fn mark(&mut self, bytes: &[u8; MARK_SIZE]) {
        self.since = self.offset;
        self.offset += MARK_SIZE as u64;
        self.good = self.offset;
        self.marks += 1;
        self.hasher.reset();
        self.hasher.update(bytes);
    }
}

const _: () = assert!(BLOCK_SIZE * u16::BITS as usize == ELEMENT_SIZE);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::sample;

    fn element(number: u64, data: u16, zero: u16) -> Head {
        Head { kind: RecordKind::Element, data, zero, number, body_crc: 0 }
    }

    #[test]
    fn a_head_decodes_to_what_was_encoded() {
        let head = Head { kind: RecordKind::End, data: 0x8001, zero: 0x7ffe, number: u64::MAX - 1, body_crc: 0x1234 };
        assert_eq!(Head::decode(&head.encode()).unwrap(), head);
    }

    #[test]
    fn what_comes_behind_the_disk_in_its_last_block_is_zeros() {
        let header = Header { size: 65536 + 4096 + 512, ..sample() };
        let (mut body, last) = (vec![1; 2 * BLOCK_SIZE], element(1, 0b11, 0));
        assert!(last.check_tail(&header, &body).is_err());
        body[BLOCK_SIZE + 512..].fill(0);
        assert!(last.check_tail(&header, &body).is_ok());
        body[BLOCK_SIZE + 512] = 1;
        assert!(last.check_tail(&header, &body).is_err());
        assert!(
            element(1, 0b01, 0).check_tail(&header, &[1; BLOCK_SIZE]).is_ok(),
            "the block before the last is whole"
        );
        assert!(element(0, 1 << 15, 0).check_tail(&header, &[1; BLOCK_SIZE]).is_ok());
        let whole = Header { size: 65536 + 8192, ..sample() };
        assert!(last.check_tail(&whole, &[1; 2 * BLOCK_SIZE]).is_ok());
    }

    #[test]
    fn records_that_make_no_sense_are_told_apart() {
        let full = Header { size: 65536 + 4096, ..sample() };
        let kind = Kind::Incremental { from: crate::Point { lineage: 1, epoch: 3 }, from_snapshot: "sunday".into() };
        let incremental = Header { kind, ..full.clone() };
        assert!(element(0, 1, 2).check(&incremental, None).is_ok());
        assert!(matches!(element(0, 1, 2).check(&full, None), Err(Fault::Record(_))));
        assert!(matches!(element(0, 3, 2).check(&incremental, None), Err(Fault::Record(_))));
        assert!(matches!(element(0, 0, 0).check(&incremental, None), Err(Fault::Record(_))));
        assert!(matches!(element(0, 1, 0).check(&full, Some(0)), Err(Fault::Order { before: 0, element: 0 })));
        assert!(matches!(element(1, 2, 0).check(&full, None), Err(Fault::Outside { element: 1, .. })));
        assert!(matches!(element(1, 0, 2).check(&incremental, None), Err(Fault::Outside { .. })));
        assert!(matches!(element(2, 1, 0).check(&full, None), Err(Fault::Outside { .. })));
        assert!(matches!(element(u64::MAX, 1, 0).check(&full, None), Err(Fault::Outside { .. })));
        let mark = Head { kind: RecordKind::Mark, ..element(0, 1, 0) };
        assert!(matches!(mark.check(&full, None), Err(Fault::Record(_))));
    }
}
