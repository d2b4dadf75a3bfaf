//! An element's entry in the PMap (paper 2.1): its head, and one row per (lineage, epoch) that wrote it.
//!
//! ```text
//!  head:  version | slot | request ids
//!  row:   (lineage, epoch) | 16 x (address, CRC-32C), or zero | digest
//! ```
//!
//! A row says where each block of that state in time is. A new epoch's row begins as a copy of the one
//! before: a read looks at one row, whatever the number of snapshots. An address is free when no row of
//! its element refers to it (I8), so freeing is decided within one entry.

use super::{BlockSum, ElementImage, Place, RowImage};
use crate::ids::*;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use stdx::checksum::crc32c;

/// Number of a block within the data region.
pub type Address = u64;
/// No address: the block is all zeros.
pub const NOWHERE: Address = u64::MAX;

/// One row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The lineage that wrote it.
    pub lineage: LineageId,
    /// The epoch that wrote it.
    pub epoch: Epoch,
    /// Where each block is; `NOWHERE` = zeros.
    pub addresses: [Address; BLOCKS_PER_ELEMENT],
    /// Their checksums; 0 for zeros.
    pub crcs: [u32; BLOCKS_PER_ELEMENT],
}

/// An entry. One with version zero and no rows does not exist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Version of the newest write.
    pub version: Version,
    /// The slot that it was written in.
    pub slot: SlotId,
    /// Requests applied that may be sent again (I6).
    pub ids: SmallVec<[RequestId; 2]>,
    /// Rows, ordered by (lineage, epoch).
    pub rows: SmallVec<[Row; 1]>,
}

impl Row {
    /// A row of zeros.
    pub fn zeros(lineage: LineageId, epoch: Epoch) -> Self {
        Row { lineage, epoch, addresses: [NOWHERE; BLOCKS_PER_ELEMENT], crcs: [0; BLOCKS_PER_ELEMENT] }
    }

    /// Checksum of a block.
    pub fn sum(&self, block: usize) -> BlockSum {
        if self.addresses[block] == NOWHERE { BlockSum::Zero } else { BlockSum::Crc(self.crcs[block]) }
    }

    /// Addresses that it refers to.
    pub fn used(&self) -> impl Iterator<Item = Address> + '_ {
        self.addresses.iter().copied().filter(|a| *a != NOWHERE)
    }

    /// The row as it is kept: 16 x (6 bytes address, 4 bytes CRC), then a digest of that.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(ROW_BYTES);
        for (address, crc) in self.addresses.iter().zip(&self.crcs) {
            bytes.extend_from_slice(&address.to_le_bytes()[..6]);
            bytes.extend_from_slice(&crc.to_le_bytes());
        }
        bytes.extend_from_slice(&crc32c(&bytes).to_le_bytes());
        bytes
    }

    /// Reads a row as it was kept; `None` if it is not one.
    pub fn decode(lineage: LineageId, epoch: Epoch, bytes: &[u8]) -> Option<Row> {
        let (body, digest) = bytes.split_at_checked(ROW_BYTES - 4)?;
        if crc32c(body).to_le_bytes() != digest {
            return None;
        }
        let mut row = Row::zeros(lineage, epoch);
        for (i, cell) in body.chunks(10).enumerate() {
            let mut address = [0; 8];
            address[..6].copy_from_slice(&cell[..6]);
            let address = u64::from_le_bytes(address);
            if address != (1 << 48) - 1 {
                row.addresses[i] = address;
                row.crcs[i] = u32::from_le_bytes(cell[6..].try_into().ok()?);
            }
        }
        Some(row)
    }
}

/// Bytes of a row as it is kept.
const ROW_BYTES: usize = BLOCKS_PER_ELEMENT * 10 + 4;

impl Entry {
    /// An element that was never written.
    pub fn absent() -> Self {
        let slot = SlotId { gmap: GmapId(0), slot: 0 };
        Entry { version: Version::ZERO, slot, ids: SmallVec::new(), rows: SmallVec::new() }
    }

    /// True if it was never written, or is dropped.
    pub fn is_absent(&self) -> bool {
        self.version == Version::ZERO && self.rows.is_empty()
    }

    /// The row that a view shows: of the first lineage that has one of its epoch or an older one.
    pub fn row_in_view(&self, view: &[(LineageId, Epoch)]) -> Option<&Row> {
        view.iter().find_map(|(lineage, epoch)| {
            let above = self.rows.partition_point(|r| (r.lineage, r.epoch) <= (*lineage, *epoch));
            self.rows[..above].last().filter(|r| r.lineage == *lineage)
        })
    }

    /// The row of exactly this epoch.
    pub fn row(&self, lineage: LineageId, epoch: Epoch) -> Option<&Row> {
        let at = self.rows.binary_search_by_key(&(lineage, epoch), |r| (r.lineage, r.epoch)).ok()?;
        Some(&self.rows[at])
    }

    /// True if a write of these blocks takes more than it gives back: one of them has no place of its own in that row.
    pub fn grows(&self, lineage: LineageId, epoch: Epoch, first_block: u8, blocks: usize) -> bool {
        let Some(row) = self.row(lineage, epoch) else { return true };
        let others = || self.rows.iter().filter(|r| (r.lineage, r.epoch) != (lineage, epoch));
        let mut written = row.addresses.iter().skip(usize::from(first_block)).take(blocks);
        written.any(|a| *a == NOWHERE || others().any(|r| r.addresses.contains(a)))
    }

    /// What an entry with so many rows takes of the room for entries, in quarters of one with a single row: a further row
    /// takes a quarter of the memory.
    pub fn weight(rows: usize) -> usize {
        Entry::WEIGHT_OF_ONE - 1 + rows.max(1)
    }

    /// That of an entry with one row.
    pub const WEIGHT_OF_ONE: usize = 4;

    /// Every block that is stored, each once however many rows share it.
    pub fn stored(&self) -> Vec<Place> {
        let mut seen = std::collections::BTreeSet::new();
        let mut places = Vec::new();
        for row in &self.rows {
            for (block, address) in row.addresses.iter().enumerate() {
                if *address != NOWHERE && seen.insert(*address) {
                    places.push(Place { lineage: row.lineage, epoch: row.epoch, block: block as u8 });
                }
            }
        }
        places
    }

    /// The places that share the stored block at this one, itself among them.
    pub fn sharing(&self, place: Place) -> Vec<Place> {
        let block = usize::from(place.block);
        let address = self.row(place.lineage, place.epoch).map_or(NOWHERE, |r| r.addresses[block]);
        let shares = |r: &&Row| address != NOWHERE && r.addresses[block] == address;
        let at = |r: &Row| Place { lineage: r.lineage, epoch: r.epoch, block: place.block };
        self.rows.iter().filter(shares).map(at).collect()
    }

    /// The row of a write's epoch, made from what it inherits if there is none yet.
    pub fn row_to_write(&mut self, lineage: LineageId, epoch: Epoch, parents: &[(LineageId, Epoch)]) -> &mut Row {
        let at = match self.rows.binary_search_by_key(&(lineage, epoch), |r| (r.lineage, r.epoch)) {
            Ok(at) => at,
            Err(at) => {
                let view: SmallVec<[(LineageId, Epoch); 2]> =
                    std::iter::once((lineage, epoch)).chain(parents.iter().copied()).collect();
                let mut row = self.row_in_view(&view).cloned().unwrap_or_else(|| Row::zeros(lineage, epoch));
                (row.lineage, row.epoch) = (lineage, epoch);
                self.rows.insert(at, row);
                at
            }
        };
        &mut self.rows[at]
    }

    /// True if a row refers to the address. From the newest on: what a new row inherited the one before it has, too.
    pub fn refers_to(&self, address: Address) -> bool {
        self.rows.iter().rev().any(|r| r.addresses.contains(&address))
    }

    /// Each address that some row refers to, once.
    pub fn addresses(&self) -> Vec<Address> {
        let mut all: Vec<Address> = self.rows.iter().flat_map(Row::used).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Each address that some row refers to, and none of another entry's.
    pub fn addresses_not_in(&self, other: &Entry) -> Vec<Address> {
        let kept = other.addresses();
        let mut gone = self.addresses();
        gone.retain(|address| kept.binary_search(address).is_err());
        gone
    }

    /// Remembers a request, and forgets those of its session that are finished.
    pub fn note_id(&mut self, id: Option<RequestId>, finished_below: u64) {
        let Some(id) = id else { return };
        self.ids.retain(|i| i.session != id.session || i.number >= finished_below);
        if !self.ids.contains(&id) {
            self.ids.push(id);
            self.ids.sort_unstable();
        }
    }

    /// Forgets the requests of sessions that are over.
    pub fn forget_sessions(&mut self, ended: &[SessionId]) {
        self.ids.retain(|i| !ended.contains(&i.session));
    }

    /// What replicas compare.
    pub fn image(&self) -> ElementImage {
        let row =
            |r: &Row| RowImage { lineage: r.lineage, epoch: r.epoch, sums: std::array::from_fn(|block| r.sum(block)) };
        ElementImage { version: self.version, ids: self.ids.to_vec(), rows: self.rows.iter().map(row).collect() }
    }

    /// The head as it is kept.
    pub fn encode_head(&self) -> Vec<u8> {
        let head = (self.version, self.slot, &self.ids);
        let mut bytes = postcard::to_stdvec(&head).expect("a head can be written to memory");
        bytes.extend_from_slice(&crc32c(&bytes).to_le_bytes());
        bytes
    }

    /// Reads a head as it was kept (no rows yet); `None` if it is not one.
    pub fn decode_head(bytes: &[u8]) -> Option<Entry> {
        let (body, digest) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
        if crc32c(body).to_le_bytes() != digest {
            return None;
        }
        let (version, slot, ids) = postcard::from_bytes(body).ok()?;
        Some(Entry { version, slot, ids, rows: SmallVec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(row: &mut Row, block: usize, address: Address) {
        row.addresses[block] = address;
        row.crcs[block] = address as u32 + 1;
    }

    #[test]
    fn a_new_epoch_inherits_what_it_does_not_overwrite() {
        let mut e = Entry::absent();
        at(e.row_to_write(LineageId(1), Epoch(0), &[]), 3, 30);
        at(e.row_to_write(LineageId(1), Epoch(2), &[]), 4, 40);
        let old = e.row_in_view(&[(LineageId(1), Epoch(1))]).unwrap();
        assert_eq!((old.addresses[3], old.addresses[4]), (30, NOWHERE));
        let new = e.row_in_view(&[(LineageId(1), Epoch(9))]).unwrap();
        assert_eq!((new.addresses[3], new.addresses[4]), (30, 40));
        assert_eq!(e.addresses(), [30, 40]);
    }

    #[test]
    fn a_clone_inherits_from_its_parent_at_the_epoch_of_the_clone() {
        let mut e = Entry::absent();
        at(e.row_to_write(LineageId(1), Epoch(0), &[]), 0, 1);
        at(e.row_to_write(LineageId(1), Epoch(5), &[]), 0, 2);
        let clone = e.row_to_write(LineageId(2), Epoch(7), &[(LineageId(1), Epoch(4))]);
        assert_eq!(clone.addresses[0], 1);
    }

    #[test]
    fn heads_and_rows_are_read_as_they_were_written_and_damage_is_seen() {
        let mut e = Entry::absent();
        e.version = Version { term: 7, sequence: 9 };
        e.note_id(Some(RequestId { session: SessionId(3), number: 4 }), 0);
        at(e.row_to_write(LineageId(1), Epoch(0), &[]), 15, 123_456_789);
        let head = Entry::decode_head(&e.encode_head()).unwrap();
        assert_eq!((head.version, &head.ids), (e.version, &e.ids));
        let bytes = e.rows[0].encode();
        assert_eq!(Row::decode(LineageId(1), Epoch(0), &bytes).as_ref(), Some(&e.rows[0]));
        for i in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[i] ^= 4;
            assert_eq!(Row::decode(LineageId(1), Epoch(0), &bad), None);
        }
        assert_eq!(Entry::decode_head(&[]), None);
        assert_eq!(Row::decode(LineageId(1), Epoch(0), &[]), None);
    }

    #[test]
    fn golden_bytes_of_a_head_and_a_row() {
        let mut e = Entry::absent();
        e.version = Version { term: 7, sequence: 300 };
        e.slot = SlotId { gmap: GmapId(1), slot: 2 };
        e.note_id(Some(RequestId { session: SessionId(3), number: 4 }), 0);
        at(e.row_to_write(LineageId(1), Epoch(0), &[]), 1, 0x0102_0304_0506);
        let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
        expect_test::expect!["07ac02010201030453434f5f"].assert_eq(&hex(&e.encode_head()));
        let row = e.rows[0].encode();
        expect_test::expect!["ffffffffffff0000000006050403020107050403ffffffffffff00000000"]
            .assert_eq(&hex(&row[..30]));
        expect_test::expect!["3f5e15d6"].assert_eq(&hex(&row[160..]));
    }

    #[test]
    fn ids_of_a_session_are_forgotten_below_what_it_finished() {
        let mut e = Entry::absent();
        let id = |s, number| Some(RequestId { session: SessionId(s), number });
        e.note_id(id(1, 5), 0);
        e.note_id(id(2, 5), 0);
        e.note_id(id(1, 9), 6);
        assert_eq!(e.ids.as_slice(), &[id(1, 9).unwrap(), id(2, 5).unwrap()]);
    }
}
