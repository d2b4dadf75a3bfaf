//! Opening a disk: superblock, what the last checkpoint reached, and the journal after it (2.10).
//!
//! ```text
//!  Identity (the new life is written) -> Pmap (watermarks, free map, change index, metadata)
//!    -> Ring (the journal is read) -> Tail (data of batches that may not be durable is checked)
//!    -> Loading (entries that the journal touches) -> replay -> open record -> open
//! ```
//!
//! The open record is an empty batch that says where the journal ended. Nothing is allocated before it
//! is durable: else a second crash could let the end move back, behind something that was acknowledged
//! in between. Time is bounded by the journal, not by the disk.

use super::disk::Disk;
use super::journal::{self, Found, Position, Record};
use super::*;
use crate::sabotage::Sabotage;
use std::collections::{BTreeMap, BTreeSet};
use stdx::checksum::crc32c;

/// Bytes of the ring read at a time.
const RING_READ: u64 = 1 << 20;
/// Bytes that a batch takes at most, as a part of the ring: records end it when they have a sixteenth, and one has at
/// most an eighth.
const BATCH_PART: u64 = 4;
/// Blocks of the ring that may be unreadable. A disk with more is going to fail, and each may take it seconds.
const UNREADABLE_MAX: usize = 16;

/// What the last checkpoint reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// The journal up to here is in the PMap store.
    pub position: Position,
    /// Elements then.
    pub elements: u64,
    /// Rows then.
    pub rows: u64,
    /// Generation of the metadata then.
    pub generation: u64,
}

impl Reached {
    /// As it is kept.
    pub fn encode(&self) -> Bytes {
        postcard::to_stdvec(self).expect("it can be written to memory").into()
    }
}

/// What an operation was for.
#[derive(Debug)]
enum Asked {
    Identity,
    Table(Table),
    Ring { at: u64, length: u64 },
    Block { batch: usize, record: usize, crc: u32 },
}

impl Asked {
    fn what(&self) -> &'static str {
        match self {
            Asked::Identity => "the superblock cannot be written",
            Asked::Table(_) => "the PMap store cannot be read",
            Asked::Ring { .. } => "the journal cannot be read",
            Asked::Block { .. } => "data of the last writes cannot be read",
        }
    }
}

#[derive(Debug)]
struct Question {
    asked: Asked,
    /// To be asked once more if it fails; none the second time.
    again: Option<DiskCommand>,
}

/// An opening in progress.
#[derive(Debug, Default)]
pub(super) struct Recovery {
    asked: BTreeMap<OpId, Question>,
    ring: Vec<u8>,
    /// Blocks of the ring, as bytes from its start, that cannot be read.
    unreadable: BTreeSet<u64>,
    reached: Reached,
    found: Vec<(journal::Header, Vec<Record>, Position)>,
    known_durable: u64,
    /// Records, as (batch, record), whose data does not match.
    broken: BTreeSet<(usize, usize)>,
    loading: usize,
}

impl Disk {
    /// Begins to open the disk.
    pub fn begin_recovery(&mut self) {
        self.recovery = Some(Box::default());
        self.superblock.generation += 1;
        let offset = superblock::Superblock::copy_offset(self.superblock.generation);
        let pieces = vec![self.superblock.encode()];
        self.ask(Asked::Identity, DiskCommand::Write { offset, pieces });
    }

    fn recovery(&mut self) -> &mut Recovery {
        self.recovery.as_mut().expect("asked only while the disk is being opened")
    }

    fn ask(&mut self, asked: Asked, command: DiskCommand) {
        let op = self.command(command.clone());
        self.recovery().asked.insert(op, Question { asked, again: Some(command) });
    }

    pub(super) fn on_recovery_result(&mut self, op: OpId, result: DiskResult) {
        let Some(Question { asked, again }) = self.recovery().asked.remove(&op) else { return };
        if self.failed.is_some() {
            return;
        }
        // PMap errors are final: that store is dead after the first.
        if let (Some(command), DiskResult::Written(Err(_)) | DiskResult::Read(Err(_))) = (again, &result) {
            let op = self.command(command);
            self.recovery().asked.insert(op, Question { asked, again: None });
            return;
        }
        match (asked, result) {
            (Asked::Identity, DiskResult::Written(Ok(()))) => self.read_pmap(),
            (Asked::Table(table), DiskResult::PmapRange(Ok(rows))) => {
                if let Err(what) = self.take_table(table, rows) {
                    return self.fail_as_lost(&format!("the PMap store is damaged: {what}"));
                }
                if self.recovery().asked.is_empty() {
                    self.read_ring();
                }
            }
            (Asked::Ring { at, .. }, DiskResult::Read(Ok(bytes))) => {
                self.recovery().ring[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
                if self.recovery().asked.is_empty() {
                    self.follow_journal();
                }
            }
            // One bad sector may lie where nothing is any more.
            (Asked::Ring { at, length }, DiskResult::Read(Err(_))) if length > BLOCK_SIZE => {
                (at..at + length).step_by(BLOCK_SIZE as usize).for_each(|at| self.read_of_ring(at, BLOCK_SIZE));
            }
            (Asked::Ring { at, .. }, DiskResult::Read(Err(_))) => {
                self.recovery().unreadable.insert(at);
                if self.recovery().unreadable.len() > UNREADABLE_MAX {
                    return self.fail_as_lost("cannot be opened (the journal cannot be read at many places)");
                }
                if self.recovery().asked.is_empty() {
                    self.follow_journal();
                }
            }
            // An error is no answer: what cannot be read may well have been acknowledged.
            (Asked::Block { batch, record, crc }, DiskResult::Read(Ok(bytes))) => {
                if crc32c(&bytes) != crc {
                    self.recovery().broken.insert((batch, record));
                }
                if self.recovery().asked.is_empty() {
                    self.end_journal();
                }
            }
            (
                asked,
                DiskResult::Written(Err(e))
                | DiskResult::Read(Err(e))
                | DiskResult::PmapRange(Err(e))
                | DiskResult::PmapValue(Err(e)),
            ) => self.fail_as_lost(&format!("cannot be opened ({}): {e}", asked.what())),
            (asked, result) => unreachable!("{result:?} does not answer {asked:?}"),
        }
    }

    fn fail_as_lost(&mut self, why: &str) {
        let (server, path) = (self.superblock.server, &self.path);
        self.fail(format!(
            "{why}; if the disk is lost, make it anew with `petal rejoin {server} --lost {path}`: its data is copied back \
             from the other servers"
        ));
    }

    fn read_pmap(&mut self) {
        for table in [Table::Meta, Table::Free, Table::Changes] {
            // Longer than every key of these tables.
            let (from, to) = (Bytes::new(), Bytes::from_static(&[0xff; 64]));
            self.ask(Asked::Table(table), DiskCommand::PmapRange { table, from, to, limit: usize::MAX });
        }
    }

    fn take_table(&mut self, table: Table, rows: Vec<(Bytes, Bytes)>) -> Result<(), &'static str> {
        for (key, value) in rows {
            match table {
                Table::Free => {
                    let index = key.as_ref().try_into().map(u32::from_be_bytes).map_err(|_| "a key of the free map")?;
                    self.allocator.load_chunk(index, &value).map_err(|_| "a chunk of the free map")?;
                }
                Table::Changes => {
                    let (slot, version, element) = keys::change_parts(&key).ok_or("a key of the change index")?;
                    self.changes.entry(slot).or_default().insert(version, element);
                    self.saved_changes.insert((slot, version, element));
                }
                Table::Meta if key == keys::reached() => {
                    let reached: Reached = postcard::from_bytes(&value).map_err(|_| "the checkpoint's position")?;
                    let Position { number, next, .. } = reached.position;
                    let ring = self.superblock.layout.journal.length;
                    if next > ring || !next.is_multiple_of(BLOCK_SIZE) || number > u64::MAX / 2 {
                        return Err("the checkpoint's position");
                    }
                    self.recovery().reached = reached;
                    (self.elements, self.rows) = (reached.elements, reached.rows);
                    self.meta_generation = reached.generation;
                }
                Table::Meta => match keys::watermark_slot(&key) {
                    Some(slot) => {
                        let (watermark, floor) = keys::versions_from(&value).ok_or("a watermark")?;
                        self.watermarks.insert(slot, watermark);
                        self.durable_watermarks.insert(slot, watermark);
                        self.floors.insert(slot, floor);
                    }
                    None if key.first() == Some(&b's') => {
                        let (family, from, to) = keys::split_parts(&key, &value).ok_or("a family's map")?;
                        self.splits.insert(family, (from, to));
                    }
                    None => {
                        let key = key.strip_prefix(b"m").ok_or("a key of the metadata")?;
                        self.meta.insert(Bytes::copy_from_slice(key), value);
                    }
                },
                Table::Heads | Table::Rows => unreachable!("read when they are needed"),
            }
        }
        Ok(())
    }

    fn read_ring(&mut self) {
        let ring = self.superblock.layout.journal;
        self.recovery().ring = vec![0; ring.length as usize];
        for at in (0..ring.length).step_by(RING_READ as usize) {
            self.read_of_ring(at, RING_READ.min(ring.length - at));
        }
    }

    fn read_of_ring(&mut self, at: u64, length: u64) {
        let offset = self.superblock.layout.journal.offset + at;
        self.ask(Asked::Ring { at, length }, DiskCommand::Read { offset, length });
    }

    /// Whether the batch after the last one found may be in blocks that cannot be read: behind it, or, where it may not
    /// have fitted, at the start of the ring.
    fn may_go_on_unreadably(&mut self, end: u64) -> bool {
        let ring = self.superblock.layout.journal.length;
        let part = ring / BATCH_PART;
        let unreadable = &self.recovery().unreadable;
        let is_in = |at: u64| unreadable.range(at..at + part).next().is_some();
        is_in(end) || end + part > ring && is_in(0)
    }

    fn follow_journal(&mut self) {
        let disk = self.superblock.disk;
        let chained = self.sabotage != Sabotage::NoChain;
        let all = self.sabotage == Sabotage::ReplayDropsRecords;
        let reached = self.recovery().reached.position;
        let ring = std::mem::take(&mut self.recovery().ring);
        let Some(Found { batches, known_durable }) = journal::follow(disk, &ring, reached, chained) else {
            return self.fail("the journal has records of a newer format; start the newer program".into());
        };
        self.recovery().ring = ring;
        let data_start = self.superblock.layout.data.offset;
        let mut checks = Vec::new();
        let known_durable = known_durable.max(self.superblock.journal_mark);
        for (b, (header, records, _)) in batches.iter().enumerate() {
            if header.number <= known_durable && !all {
                continue; // It was vouched for: damage there is found when it is read, and repaired.
            }
            for (r, record) in records.iter().enumerate() {
                checks.extend(fresh_blocks(record).map(|(address, crc)| (b, r, address, crc)));
            }
        }
        let recovery = self.recovery();
        (recovery.found, recovery.known_durable) = (batches, known_durable);
        for (batch, record, address, crc) in checks {
            let offset = data_start + address * BLOCK_SIZE;
            self.ask(Asked::Block { batch, record, crc }, DiskCommand::Read { offset, length: BLOCK_SIZE });
        }
        if self.recovery().asked.is_empty() {
            self.end_journal();
        }
    }

    /// The journal ends at the first batch whose data does not match: nothing from there on was
    /// acknowledged, because acknowledgements are in order.
    fn end_journal(&mut self) {
        let disk = self.superblock.disk;
        let drops = self.sabotage == Sabotage::ReplayDropsRecords;
        let recovery = self.recovery();
        if drops {
            for (b, r) in std::mem::take(&mut recovery.broken).into_iter().rev() {
                recovery.found[b].1.remove(r);
            }
        } else if let Some((first, _)) = recovery.broken.first() {
            let first = *first;
            recovery.found.truncate(first);
        }
        let end = recovery.found.last().map_or(recovery.reached.position, |(_, _, position)| *position);
        if self.may_go_on_unreadably(end.next) {
            return self.fail_as_lost("cannot be opened (the journal cannot be read where it ends)");
        }
        let recovery = self.recovery();
        let ring = std::mem::take(&mut recovery.ring);
        let tail = recovery.reached.position;
        let is_short = end.number < self.superblock.journal_mark || journal::is_damaged(disk, &ring, end.number);
        if !drops && self.sabotage != Sabotage::NoChain && is_short {
            let what = format!("journal batch {} was durable once and cannot be read", end.number + 1);
            return self.fail_as_lost(&what);
        }
        self.last_issued = end;
        self.durable_through = end.number;
        self.tail = tail;
        self.load_touched();
    }

    fn load_touched(&mut self) {
        let recovery = self.recovery();
        let touched: BTreeSet<ElementKey> =
            recovery.found.iter().flat_map(|(_, records, _)| records.iter().filter_map(touched)).collect();
        recovery.loading = touched.len();
        for element in &touched {
            self.load(*element);
        }
        if touched.is_empty() {
            self.replay();
        }
    }

    pub(super) fn on_recovery_loaded(&mut self) {
        if self.failed.is_some() {
            return;
        }
        let recovery = self.recovery();
        recovery.loading -= 1;
        if recovery.loading == 0 {
            self.replay();
        }
    }

    fn replay(&mut self) {
        for (_, records, _) in std::mem::take(&mut self.recovery().found) {
            for record in records {
                for (address, _) in fresh_blocks(&record) {
                    if address >= self.allocator.capacity() || self.allocator.is_referenced(address) {
                        return self.fail(format!("the journal and the PMap store disagree about block {address}"));
                    }
                    self.allocator.mark(address);
                }
                self.apply(record);
            }
        }
        if let Some(block) = self.allocator.beyond_frontier() {
            let start = self.superblock.layout.data.offset;
            let (end, used) = (start + self.allocator.frontier() * BLOCK_SIZE, start + block * BLOCK_SIZE);
            return self
                .fail_as_lost(&format!("was truncated: it ends at byte {end}, and what is at byte {used} is in use"));
        }
        self.discard_open_batch();
        self.durable_watermarks.clone_from(&self.watermarks);
        if self.sabotage == Sabotage::NoOpenRecord {
            self.opened();
        } else {
            self.issue_open_record();
        }
    }
}

/// Blocks whose data was written with the record's batch.
fn fresh_blocks(record: &Record) -> impl Iterator<Item = (u64, u32)> + '_ {
    let (written, replaced) = match record {
        Record::Write { blocks, .. } => (Some(blocks.iter().flatten().copied()), None),
        Record::Replace { rows, fresh, .. } => {
            let block = |(r, b): &(u16, u8)| {
                let row = rows.get(usize::from(*r))?;
                Some((*row.addresses.get(usize::from(*b))?, row.crcs[usize::from(*b)]))
            };
            (None, Some(fresh.iter().filter_map(block)))
        }
        _ => (None, None),
    };
    written.into_iter().flatten().chain(replaced.into_iter().flatten())
}

fn touched(record: &Record) -> Option<ElementKey> {
    match record {
        Record::Write { element, .. }
        | Record::Replace { element, .. }
        | Record::Drop { element }
        | Record::Reclaim { element, .. } => Some(*element),
        Record::Watermark { .. } | Record::Meta { .. } | Record::Split { .. } => None,
    }
}
