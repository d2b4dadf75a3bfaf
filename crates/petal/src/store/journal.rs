//! The journal of one disk: a ring of batches (2.10).
//!
//! ```text
//!  batch, a multiple of 4 KiB:
//!  | magic | flags | disk id | run | number | hash before | durable_through | length | CRC | records ... | zeros |
//! ```
//!
//! Batches are acknowledged in the order of their numbers. Each has the hash of the one before, so that
//! leftovers of an earlier life or lap never continue a chain, and `durable_through`: the last batch
//! that was known durable with all before it when this one was issued. The journal ends at the first
//! batch that is missing or does not chain, or, after the highest `durable_through` found before it,
//! whose data does not match its checksums: nothing from there on was acknowledged.
//!
//! A batch that is whole, lies behind that end, and vouches for a batch at or before which the end was
//! found, shows that something durable is broken: damage, not a tail.

use super::element::{Address, Row};
use crate::ids::*;
use serde::{Deserialize, Serialize};
use stdx::checksum::{crc32c, crc32c_append};

/// Bytes of a batch's header.
pub const HEADER_BYTES: usize = 64;
const MAGIC: u32 = u32::from_le_bytes(*b"PJB1");

/// One change, as the journal keeps it. New kinds are added at the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// Blocks of one row.
    Write {
        /// The element.
        element: ElementKey,
        /// Its slot.
        slot: SlotId,
        /// Its new version.
        version: Version,
        /// Row.
        lineage: LineageId,
        /// Row.
        epoch: Epoch,
        /// Where a new row inherits from.
        parents: Vec<(LineageId, Epoch)>,
        /// The request.
        id: Option<RequestId>,
        /// Requests of the session below this are finished.
        finished_below: u64,
        /// Sessions that are over.
        ended: Vec<SessionId>,
        /// The slot's watermark at this replica.
        watermark: Version,
        /// First block.
        first_block: u8,
        /// Address and checksum of each; `None` = zeros.
        blocks: Vec<Option<(Address, u32)>>,
    },
    /// A whole entry.
    Replace {
        /// The element.
        element: ElementKey,
        /// Its slot.
        slot: SlotId,
        /// Version.
        version: Version,
        /// Request ids.
        ids: Vec<RequestId>,
        /// Rows.
        rows: Vec<Row>,
        /// Blocks whose data was written with this batch.
        fresh: Vec<(u16, u8)>,
        /// The slot's watermark at this replica.
        watermark: Version,
    },
    /// The element does not exist any more.
    Drop {
        /// The element.
        element: ElementKey,
    },
    /// A watermark by itself.
    Watermark {
        /// The slot.
        slot: SlotId,
        /// The watermark.
        watermark: Version,
    },
    /// A metadata value.
    Meta {
        /// Counts the writes of metadata of this server, over all disks.
        generation: u64,
        /// Key.
        key: Vec<u8>,
        /// Value; none = deleted.
        value: Option<Vec<u8>>,
    },
    /// Rows of an element are gone.
    Reclaim {
        /// The element.
        element: ElementKey,
        /// The rows.
        rows: Vec<(LineageId, Epoch)>,
    },
    /// A family has another GMap from here on, with as many slots.
    Split {
        /// The family.
        family: FamilyId,
        /// The GMap that it left.
        from: GmapId,
        /// The one that it has.
        to: GmapId,
    },
}

/// Where a batch stands in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Position {
    /// Number of the last batch; 0 = none yet.
    pub number: u64,
    /// Its hash; 0 for none.
    pub hash: u64,
    /// Where the next one goes, in bytes from the start of the ring.
    pub next: u64,
}

/// A batch's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Life of the server that wrote it.
    pub run: u64,
    /// Its number.
    pub number: u64,
    /// Hash of the batch before.
    pub hash_before: u64,
    /// Last batch known durable with all before it.
    pub durable_through: u64,
    /// Bytes of records.
    pub length: u32,
}

/// Bytes that a batch with so many bytes of records takes.
pub fn batch_bytes(records: usize) -> u64 {
    ((HEADER_BYTES + records) as u64).next_multiple_of(BLOCK_SIZE)
}

/// Puts a batch together; its hash too.
pub fn encode_batch(disk: DiskId, header: Header, records: &[u8]) -> (Vec<u8>, u64) {
    let mut bytes = Vec::with_capacity(batch_bytes(records.len()) as usize);
    bytes.extend_from_slice(&MAGIC.to_le_bytes());
    bytes.extend_from_slice(&0u32.to_le_bytes());
    bytes.extend_from_slice(&disk.0.to_le_bytes());
    for field in [header.run, header.number, header.hash_before, header.durable_through] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    bytes.extend_from_slice(&(records.len() as u32).to_le_bytes());
    let crc = crc32c_append(crc32c(&bytes), records);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.resize(HEADER_BYTES, 0);
    bytes.extend_from_slice(records);
    bytes.resize(batch_bytes(records.len()) as usize, 0);
    let hash = hash_of(&bytes[..HEADER_BYTES], records);
    (bytes, hash)
}

/// 64 bits: the batch's own checksum and one over the same bytes from another start. The header has the
/// hash of the batch before, so a hash stands for everything up to here.
fn hash_of(header: &[u8], records: &[u8]) -> u64 {
    let low = u32::from_le_bytes(header[60..64].try_into().expect("four bytes"));
    let high = crc32c_append(crc32c_append(0x9e37_79b9, header), records);
    u64::from(high) << 32 | u64::from(low)
}

/// Reads a batch at the start of `bytes`: header, records, hash. `None` if there is no whole one.
pub fn decode_batch(disk: DiskId, bytes: &[u8]) -> Option<(Header, &[u8], u64)> {
    let head = bytes.get(..HEADER_BYTES)?;
    let u32_at = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
    let u64_at = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    if u32_at(0) != MAGIC || head[8..24] != disk.0.to_le_bytes() {
        return None;
    }
    let length = u32_at(56);
    let records = bytes.get(HEADER_BYTES..HEADER_BYTES + length as usize)?;
    if crc32c_append(crc32c(&head[..60]), records) != u32_at(60) {
        return None;
    }
    let header =
        Header { run: u64_at(24), number: u64_at(32), hash_before: u64_at(40), durable_through: u64_at(48), length };
    Some((header, records, hash_of(head, records)))
}

/// Reads the records of a batch whose checksum is right; `None` if they are of a newer format.
pub fn decode_records(mut bytes: &[u8]) -> Option<Vec<Record>> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let (record, rest) = postcard::take_from_bytes(bytes).ok()?;
        records.push(record);
        bytes = rest;
    }
    Some(records)
}

/// Batches found in a ring from a position on, as long as they chain.
pub struct Found {
    /// Header, records, and the position after it.
    pub batches: Vec<(Header, Vec<Record>, Position)>,
    /// The highest `durable_through` of these.
    pub known_durable: u64,
}

/// Follows the chain. `chained` is false only for a `must_fail` test.
pub fn follow(disk: DiskId, ring: &[u8], from: Position, chained: bool) -> Option<Found> {
    let mut at = from;
    let mut found = Found { batches: Vec::new(), known_durable: from.number };
    loop {
        let here = ring.get(at.next as usize..).and_then(|b| decode_batch(disk, b)).map(|b| (b, at.next));
        let fits =
            |header: &Header, _: u64| header.number == at.number + 1 && (!chained || header.hash_before == at.hash);
        // A batch that did not fit behind the last one is at the start of the ring.
        let next = match here {
            Some(((header, records, hash), offset)) if fits(&header, offset) => Some((header, records, hash, offset)),
            _ => decode_batch(disk, ring).filter(|(h, _, _)| fits(h, 0)).map(|(h, r, hash)| (h, r, hash, 0)),
        };
        let Some((header, records, hash, offset)) = next else { return Some(found) };
        at = Position { number: header.number, hash, next: offset + batch_bytes(records.len()) };
        found.known_durable = found.known_durable.max(header.durable_through);
        found.batches.push((header, decode_records(records)?, at));
    }
}

/// True if some whole batch behind `end` vouches for the batch after `end`: then that was durable once.
pub fn is_damaged(disk: DiskId, ring: &[u8], end: u64) -> bool {
    (0..ring.len()).step_by(BLOCK_SIZE as usize).any(|offset| {
        decode_batch(disk, &ring[offset..]).is_some_and(|(h, _, _)| h.number > end && h.durable_through > end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: DiskId = DiskId(7);

    fn batch(number: u64, hash_before: u64, durable_through: u64) -> (Vec<u8>, u64) {
        let record = Record::Watermark { slot: SlotId { gmap: GmapId(1), slot: 2 }, watermark: Version::ZERO };
        let records = postcard::to_stdvec(&record).unwrap();
        let header = Header { run: 1, number, hash_before, durable_through, length: 0 };
        encode_batch(DISK, header, &records)
    }

    #[test]
    fn a_batch_is_read_as_it_was_written() {
        let (bytes, hash) = batch(5, 77, 4);
        assert_eq!(bytes.len(), 4096);
        let (header, records, again) = decode_batch(DISK, &bytes).unwrap();
        assert_eq!((header.number, header.hash_before, header.durable_through, again), (5, 77, 4, hash));
        assert_eq!(decode_records(records).unwrap().len(), 1);
        assert!(decode_batch(DiskId(8), &bytes).is_none());
        assert!(decode_batch(DISK, &bytes[..50]).is_none());
    }

    #[test]
    fn golden_bytes_of_a_batch() {
        let (bytes, _) = batch(5, 77, 4);
        let hex: String = bytes[..80].iter().map(|b| format!("{b:02x}")).collect();
        expect_test::expect!["504a42310000000007000000000000000000000000000000010000000000000005000000000000004d0000000000000004000000000000000500000058f3258c03010200000000000000000000000000"].assert_eq(&hex);
    }

    #[test]
    fn golden_bytes_of_records() {
        let element = ElementKey { family: FamilyId(5), element: 300 };
        let slot = SlotId { gmap: GmapId(1), slot: 2 };
        let version = Version { term: 3, sequence: 4 };
        let id = RequestId { session: SessionId(6), number: 7 };
        let mut row = Row::zeros(LineageId(1), Epoch(2));
        (row.addresses[3], row.crcs[3]) = (200, 0x0102_0304);
        let write = Record::Write {
            element,
            slot,
            version,
            lineage: LineageId(1),
            epoch: Epoch(2),
            parents: vec![(LineageId(8), Epoch(9))],
            id: Some(id),
            finished_below: 7,
            ended: Vec::new(),
            watermark: version,
            first_block: 14,
            blocks: vec![Some((200, 0x0102_0304)), None],
        };
        let replace = Record::Replace {
            element,
            slot,
            version,
            ids: vec![id],
            rows: vec![row],
            fresh: vec![(0, 3)],
            watermark: version,
        };
        let meta = Record::Meta { generation: 1, key: b"k".to_vec(), value: Some(b"v".to_vec()) };
        let hex = |record: &Record| -> String {
            let bytes = postcard::to_stdvec(record).unwrap();
            assert_eq!(decode_records(&bytes).as_deref(), Some(std::slice::from_ref(record)));
            bytes.iter().map(|b| format!("{b:02x}")).collect()
        };
        expect_test::expect!["0005ac02010203040102010809010607070003040e0201c8018486880800"].assert_eq(&hex(&write));
        expect_test::expect!["0105ac0201020304010607010102ffffffffffffffffff01ffffffffffffffffff01ffffffffffffffffff01c801ffffffffffffffffff01ffffffffffffffffff01ffffffffffffffffff01ffffffffffffffffff01ffffffffffffffffff01ffffffffffffffffff01ffffffffffffffffff01ffffffffffffffffff01ffffffffffffffffff01ffffffffffffffffff01ffffffffffffffffff01ffffffffffffffffff01000000848688080000000000000000000000000100030304"].assert_eq(&hex(&replace));
        expect_test::expect!["0205ac02"].assert_eq(&hex(&Record::Drop { element }));
        expect_test::expect!["0401016b010176"].assert_eq(&hex(&meta));
    }

    #[test]
    fn the_chain_ends_where_the_hash_does_not_match() {
        let (one, hash1) = batch(1, 0, 0);
        let (two, hash2) = batch(2, hash1, 1);
        let (three, _) = batch(3, hash2 ^ 1, 2);
        let ring = [one, two, three, vec![0; 4096]].concat();
        let found = follow(DISK, &ring, Position::default(), true).unwrap();
        assert_eq!(found.batches.len(), 2);
        assert_eq!(found.known_durable, 1);
        assert_eq!(follow(DISK, &ring, Position::default(), false).unwrap().batches.len(), 3);
    }

    #[test]
    fn a_batch_that_vouches_for_a_broken_one_shows_damage() {
        let (one, hash1) = batch(1, 0, 0);
        let (mut two, hash2) = batch(2, hash1, 1);
        let (three, _) = batch(3, hash2, 2);
        two[100] ^= 1;
        two[70] ^= 1;
        two[30] ^= 1;
        let ring = [one, two, three].concat();
        let found = follow(DISK, &ring, Position::default(), true).unwrap();
        assert_eq!(found.batches.len(), 1);
        assert!(is_damaged(DISK, &ring, 1));
        assert!(!is_damaged(DISK, &ring, 3));
    }
}
