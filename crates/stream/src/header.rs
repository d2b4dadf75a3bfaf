//! What a stream says of itself before its first element: which disk and which state of it, and on top of which
//! other state (design 2.9).
//!
//! A state is identified by cluster, family, lineage and epoch: snapshots never change (P6), so two streams with equal
//! identity have equal content, and an increment fits on nothing but its parent.

use crate::error::Fault;
use crate::{BLOCK_SIZE, ELEMENT_SIZE};
use core::fmt;
use serde::{Deserialize, Serialize};
use stdx::checksum::crc32c;

/// First bytes of every stream.
pub const MAGIC: [u8; 8] = *b"PETALSTR";
/// The format that this program writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

/// Bytes before the body. Magic, format and the head's checksum stay in their places in every format.
pub(crate) const HEAD_SIZE: usize = 24;
/// Bytes of the body at most: three names of 200 bytes and a dozen numbers.
pub(crate) const BODY_MAX: usize = 4096;

const FORMAT_AT: usize = 8;
const LENGTH_AT: usize = 12;
const BODY_CRC_AT: usize = 16;
const HEAD_CRC_AT: usize = 20;

/// Bytes of a name at most, as in the cluster.
const NAME_MAX: usize = 200;
/// A disk has whole sectors.
const SECTOR: u64 = 512;

/// One state in time of a family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Point {
    /// The writable member of the family.
    pub lineage: u32,
    /// The state of it.
    pub epoch: u32,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "(l{}, e{})", self.lineage, self.epoch)
    }
}

/// One state in time, wherever it was carried to: content that never changes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct StateId {
    /// The cluster in which it came to be.
    pub cluster: u128,
    /// The family there.
    pub family: u64,
    /// The state of the family.
    pub point: Point,
}

impl fmt::Display for StateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "f{} {} of cluster {:032x}", self.family, self.point, self.cluster)
    }
}

/// Whether a stream stands alone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Kind {
    /// Everything that is not zeros. New kinds are added at the end.
    Full,
    /// What differs from another state of the same family.
    Incremental {
        /// That state: the parent.
        from: Point,
        /// Name of its snapshot when the stream was made.
        from_snapshot: String,
    },
}

/// The header of a stream.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Header {
    /// Full or incremental.
    pub kind: Kind,
    /// The cluster that it comes from.
    pub cluster: u128,
    /// The disk's family there.
    pub family: u64,
    /// The state that the stream leads to.
    pub to: Point,
    /// Name of the disk.
    pub disk: String,
    /// Name of the snapshot that is streamed.
    pub snapshot: String,
    /// Bytes of the disk in that state.
    pub size: u64,
    /// Stripe unit of the family in bytes.
    pub stripe_unit: u64,
    /// Copies that its scheme keeps.
    pub copies: u8,
}

/// Why a header makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The body is no header.
    #[error("it does not decode: {0}")]
    Body(postcard::Error),
    /// More than one way to write a number, or bytes behind the last field.
    #[error("it is not written as this program writes it")]
    NotCanonical,
    /// A name with blanks or control characters, or without any, or too long.
    #[error("the name {0:?} does not have 1 to 200 visible ASCII characters")]
    Name(String),
    /// Not a size of a disk.
    #[error("a disk of {0} bytes: it has at least one sector, and whole ones of 512 bytes")]
    Size(u64),
    /// Not a stripe unit.
    #[error("a stripe unit of {0} bytes: it is a power of two, at least 65536")]
    StripeUnit(u64),
    /// No copies.
    #[error("a scheme of no copies")]
    Copies,
    /// An increment that leads nowhere, or back in time.
    #[error("it leads from state {from} to {to}")]
    Parent {
        /// The parent.
        from: Point,
        /// The state it leads to.
        to: Point,
    },
}

impl Header {
    /// Which state the stream leads to.
    pub fn state(&self) -> StateId {
        StateId { cluster: self.cluster, family: self.family, point: self.to }
    }

    /// Which state it starts from; none for a full one.
    pub fn parent(&self) -> Option<StateId> {
        match &self.kind {
            Kind::Full => None,
            Kind::Incremental { from, .. } => {
                Some(StateId { cluster: self.cluster, family: self.family, point: *from })
            }
        }
    }

    /// Whether it makes sense.
    pub fn check(&self) -> Result<(), HeaderError> {
        let from_snapshot = match &self.kind {
            Kind::Full => None,
            Kind::Incremental { from_snapshot, .. } => Some(from_snapshot),
        };
        let good = |name: &&String| (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic());
        if let Some(name) = [&self.disk, &self.snapshot].into_iter().chain(from_snapshot).find(|name| !good(name)) {
            return Err(HeaderError::Name(name.chars().take(NAME_MAX).collect()));
        }
        if self.size == 0 || !self.size.is_multiple_of(SECTOR) {
            return Err(HeaderError::Size(self.size));
        }
        if !self.stripe_unit.is_power_of_two() || self.stripe_unit < ELEMENT_SIZE as u64 {
            return Err(HeaderError::StripeUnit(self.stripe_unit));
        }
        if self.copies == 0 {
            return Err(HeaderError::Copies);
        }
        match self.kind {
            Kind::Incremental { from, .. } if from.lineage == self.to.lineage && from.epoch >= self.to.epoch => {
                Err(HeaderError::Parent { from, to: self.to })
            }
            _ => Ok(()),
        }
    }

    /// Elements that the disk has room for; every number in the stream is below.
    pub fn elements(&self) -> u64 {
        self.size.div_ceil(ELEMENT_SIZE as u64)
    }

    /// The blocks of an element that lie within the disk, at least in part.
    pub(crate) fn blocks_within(&self, element: u64) -> u16 {
        let begin = element.checked_mul(ELEMENT_SIZE as u64).filter(|b| *b < self.size);
        let blocks = begin.map_or(0, |begin| (self.size - begin).div_ceil(BLOCK_SIZE as u64).min(16));
        ((1u32 << blocks) - 1) as u16
    }

    /// The header as it stands at the beginning of a stream.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let body = postcard::to_stdvec(self).expect("numbers and strings in memory");
        let mut bytes = Vec::with_capacity(HEAD_SIZE + body.len());
        bytes.extend(MAGIC);
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend(u32::try_from(body.len()).expect("names are short").to_le_bytes());
        bytes.extend(crc32c(&body).to_le_bytes());
        bytes.extend(crc32c(&bytes).to_le_bytes());
        bytes.extend(body);
        bytes
    }

    /// Reads the head: how long the body is, and its checksum. The checksum is looked at before the format: a
    /// damaged number is not a newer version.
    pub(crate) fn decode_head(head: &[u8; HEAD_SIZE]) -> Result<(usize, u32), Fault> {
        let number = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
        if head[..FORMAT_AT] != MAGIC {
            return Err(Fault::NotAStream);
        }
        if crc32c(&head[..HEAD_CRC_AT]) != number(HEAD_CRC_AT) {
            return Err(Fault::Damaged(crate::Part::Header));
        }
        match number(FORMAT_AT) {
            FORMAT => {}
            found if found > FORMAT => return Err(Fault::NewerFormat { found, known: FORMAT }),
            found => return Err(Fault::OlderFormat { found, known: FORMAT }),
        }
        let length = number(LENGTH_AT) as usize;
        if length > BODY_MAX {
            return Err(Fault::HeaderTooLong { length, limit: BODY_MAX });
        }
        Ok((length, number(BODY_CRC_AT)))
    }

    /// Reads the body, whose checksum is right.
    pub(crate) fn decode_body(body: &[u8]) -> Result<Header, HeaderError> {
        let header: Header = postcard::from_bytes(body).map_err(HeaderError::Body)?;
        header.check()?;
        match header.encode()[HEAD_SIZE..] == *body {
            true => Ok(header),
            false => Err(HeaderError::NotCanonical),
        }
    }
}

#[cfg(test)]
pub(crate) fn sample() -> Header {
    Header {
        kind: Kind::Full,
        cluster: 7,
        family: 12,
        to: Point { lineage: 1, epoch: 4 },
        disk: "vol0".into(),
        snapshot: "monday".into(),
        size: 1 << 30,
        stripe_unit: 1 << 20,
        copies: 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused_by_its_name() {
        let refused = |change: fn(&mut Header)| {
            let mut header = sample();
            change(&mut header);
            header.check().unwrap_err()
        };
        assert_eq!(sample().check(), Ok(()));
        assert_eq!(refused(|h| h.size = 0), HeaderError::Size(0));
        assert_eq!(refused(|h| h.size = 1000), HeaderError::Size(1000));
        assert_eq!(refused(|h| h.stripe_unit = 32768), HeaderError::StripeUnit(32768));
        assert_eq!(refused(|h| h.stripe_unit = 65537), HeaderError::StripeUnit(65537));
        assert_eq!(refused(|h| h.copies = 0), HeaderError::Copies);
        assert!(matches!(refused(|h| h.disk = String::new()), HeaderError::Name(_)));
        assert!(matches!(refused(|h| h.disk = "\x1b[2J".into()), HeaderError::Name(_)));
        assert!(matches!(refused(|h| h.snapshot = "n".repeat(201)), HeaderError::Name(_)));
        let from = Point { lineage: 1, epoch: 4 };
        let kind = |from| Kind::Incremental { from, from_snapshot: "sunday".into() };
        let header = Header { kind: kind(from), ..sample() };
        assert_eq!(header.check(), Err(HeaderError::Parent { from, to: header.to }));
        assert_eq!(Header { kind: kind(Point { lineage: 1, epoch: 3 }), ..sample() }.check(), Ok(()));
        assert_eq!(Header { kind: kind(Point { lineage: 2, epoch: 9 }), ..sample() }.check(), Ok(()));
    }

    #[test]
    fn blocks_beyond_the_disk_are_not_within() {
        let header = Header { size: 65536 + 8192 + 512, ..sample() };
        assert_eq!(header.elements(), 2);
        let within: Vec<u16> = [0, 1, 2, u64::MAX].into_iter().map(|e| header.blocks_within(e)).collect();
        assert_eq!(within, [0xffff, 0b111, 0, 0]);
    }

    #[test]
    fn the_largest_disk_has_a_last_element() {
        let header = Header { size: u64::MAX - 511, ..sample() };
        assert_eq!(header.check(), Ok(()));
        assert_eq!(header.blocks_within(header.elements() - 1), 0xffff);
        assert_eq!(header.blocks_within(header.elements()), 0);
    }

    #[test]
    fn the_longest_header_fits() {
        let name = "n".repeat(NAME_MAX);
        let most = Point { lineage: u32::MAX, epoch: u32::MAX };
        let header = Header {
            kind: Kind::Incremental { from: Point { lineage: 1, ..most }, from_snapshot: name.clone() },
            cluster: u128::MAX,
            family: u64::MAX,
            to: most,
            disk: name.clone(),
            snapshot: name,
            size: u64::MAX - 511,
            stripe_unit: 1 << 63,
            copies: u8::MAX,
        };
        let bytes = header.encode();
        assert!(bytes.len() <= HEAD_SIZE + BODY_MAX);
        assert_eq!(Header::decode_body(&bytes[HEAD_SIZE..]), Ok(header));
    }

    #[test]
    fn another_way_to_write_the_same_header_is_refused() {
        let bytes = sample().encode();
        let body = &bytes[HEAD_SIZE..];
        assert_eq!(Header::decode_body(&[body, &[0]].concat()), Err(HeaderError::NotCanonical));
        // The first varint behind the kind is the cluster, 7: as two bytes it means the same.
        assert_eq!(body[..2], [0, 7]);
        let longer = [&[0, 0x87, 0], &body[2..]].concat();
        assert_eq!(Header::decode_body(&longer), Err(HeaderError::NotCanonical));
    }
}
