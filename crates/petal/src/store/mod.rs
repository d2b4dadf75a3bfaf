//! One physical disk, or all of a server's: durable elements, and a little durable metadata (2.10).
//!
//! [`Stores`] is what the other rooms see; `disk.rs` is one disk, `recovery.rs` how it is opened,
//! `journal.rs`, `superblock.rs`, `layout.rs` and `element.rs` the bytes, `allocator.rs` the free map.
//! docs/on-disk-format.md has the pictures.
//!
//! Invariants: I8, every address in use is referred to by exactly one element, and every other block is
//! free. I9, after a crash at any instant, with any subset of un-flushed sectors lost or torn, every
//! acknowledged write is readable.

pub mod allocator;
mod audit;
mod disk;
pub mod element;
pub mod journal;
pub mod keys;
mod labels;
pub mod layout;
#[cfg(test)]
mod model_tests;
mod place;
mod recovery;
mod room;
pub mod superblock;

use crate::ids::*;
use bytes::Bytes;
pub use place::Place;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use stdx::FastMap;

/// Checksum of a block of an element, or that it is all zeros. What replicas compare.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub enum BlockSum {
    /// All zeros, and nothing stored.
    #[default]
    Zero,
    /// CRC-32C of its 4 KiB.
    Crc(u32),
}

/// One `(lineage, epoch)` row of an element, without addresses.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RowImage {
    /// The lineage that wrote it.
    pub lineage: LineageId,
    /// The epoch that wrote it.
    pub epoch: Epoch,
    /// Its blocks.
    pub sums: [BlockSum; BLOCKS_PER_ELEMENT],
}

/// An element without addresses and data: what travels between replicas.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ElementImage {
    /// Version of the newest write.
    pub version: Version,
    /// Requests applied to it that their clients may still send again (invariant I6).
    pub ids: Vec<RequestId>,
    /// Its rows, ordered by (lineage, epoch).
    pub rows: Vec<RowImage>,
}

// ------------------------------------------------------------------------------------------------
// Between a store and the world: what a disk can be asked (io and sim carry it out).

/// Number of an operation handed to the world; unique per server life.
pub type OpId = u64;

/// The tables of the PMap store (paper 2.1: PMap). The narrow trait behind which redb sits is these
/// commands: get, range, commit.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Table {
    /// `(family, element)` -> version, ids, slot.
    Heads,
    /// `(family, element, lineage, epoch)` -> 16 blocks and a digest.
    Rows,
    /// `(gmap, slot, version, family, element)` -> (): elements newer than the lowest watermark.
    Changes,
    /// Chunks of the free map.
    Free,
    /// Everything small: watermarks, journal number reached, counters, metadata of the global state.
    Meta,
}

/// What the world is asked to do with one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskCommand {
    /// Reads `length` bytes at `offset`; both are multiples of 4 KiB.
    Read {
        /// Byte offset on the disk.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Writes the pieces one behind the other at `offset`. When it is answered the bytes are on stable
    /// storage (FUA). Offset and total length are multiples of 4 KiB. The pieces need no alignment: the
    /// engine gathers them into an aligned buffer (the one copy of the write path).
    Write {
        /// Byte offset on the disk.
        offset: u64,
        /// The bytes.
        pieces: Vec<Bytes>,
    },
    /// Makes the disk usable (written, so that later writes need no metadata of a file system) up to
    /// this byte. A raw device answers at once.
    Extend {
        /// The new frontier in bytes; a multiple of 1 MiB.
        to: u64,
        /// Not written, only allocated: for large batches, beside which zeros would be as many bytes again. What is not
        /// written reads as zeros.
        hurry: bool,
    },
    /// Value of a key of the PMap store.
    PmapGet {
        /// Table.
        table: Table,
        /// Key.
        key: Bytes,
    },
    /// Entries from `from` (inclusive) to `to` (exclusive), at most `limit`, ascending by bytes.
    PmapRange {
        /// Table.
        table: Table,
        /// First key.
        from: Bytes,
        /// Key after the last.
        to: Bytes,
        /// At most so many.
        limit: usize,
    },
    /// Puts and deletes, atomically and durably.
    PmapCommit {
        /// `(table, key, value)`; no value = delete.
        changes: Vec<(Table, Bytes, Option<Bytes>)>,
    },
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskResult {
    /// `Read`.
    Read(Result<Bytes, DiskError>),
    /// `Write`.
    Written(Result<(), DiskError>),
    /// `Extend`.
    Extended(Result<(), DiskError>),
    /// `PmapGet`.
    PmapValue(Result<Option<Bytes>, DiskError>),
    /// `PmapRange`.
    PmapRange(Result<Vec<(Bytes, Bytes)>, DiskError>),
    /// `PmapCommit`.
    PmapCommitted(Result<(), DiskError>),
}

/// Why a disk did not do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// The disk answered with an error.
    #[error("input/output error: {0}")]
    Io(String),
    /// A page of the PMap store does not match its checksum, or the PMap store is broken.
    #[error("the PMap store is damaged: {0}")]
    PmapDamaged(String),
    /// The file system below has no room for the file to grow.
    #[error("the file system that holds the disk file is full: {0}")]
    HostFull(String),
}

// ------------------------------------------------------------------------------------------------
// Between the stores and the other rooms of the server.

/// Number of a staged change; grows by one with each, over all disks of the server.
pub type Ticket = u64;

/// A block's new content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockData {
    /// Zeros: nothing is stored.
    Zero,
    /// 4 KiB, with their CRC-32C.
    Data {
        /// Checksum.
        crc: u32,
        /// The bytes.
        bytes: Bytes,
    },
}

/// A change to be made durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A write to some blocks of one row. The element must have been loaded.
    Write {
        /// The element.
        element: ElementKey,
        /// Its slot.
        slot: SlotId,
        /// Its new version (kept if the element already has a higher one).
        version: Version,
        /// Row.
        lineage: LineageId,
        /// Row.
        epoch: Epoch,
        /// Where a new row inherits from if its lineage has no earlier epoch: ancestors, nearest first.
        parents: Vec<(LineageId, Epoch)>,
        /// The request; `None` only in tests.
        id: Option<RequestId>,
        /// Ids of the same session below this number are forgotten with this write.
        finished_below: u64,
        /// Ids of these sessions, which are over, are forgotten too.
        ended: Vec<SessionId>,
        /// First block.
        first_block: u8,
        /// New contents of consecutive blocks.
        blocks: Vec<BlockData>,
        /// The slot's watermark at this replica (goes into the journal record).
        watermark: Version,
    },
    /// The whole element as it must be. Blocks whose checksum equals that of the present block at the
    /// same row and place keep their address, unless they are to be written again.
    Replace {
        /// The element.
        element: ElementKey,
        /// Its slot.
        slot: SlotId,
        /// What it must be.
        image: ElementImage,
        /// `(row index in the image, block, bytes)`.
        data: Vec<(u16, u8, Bytes)>,
        /// `(row, block, other row)`: blocks without data that are the same as that of an earlier row.
        twins: Vec<(u16, u8, u16)>,
        /// All blocks that have data are written, to other places: what is at the present ones is bad.
        again: bool,
        /// The slot's watermark at this replica.
        watermark: Version,
    },
    /// The element does not exist any more (its family ended, or an entry of nothing but zeros is
    /// known everywhere).
    Drop {
        /// The element.
        element: ElementKey,
    },
    /// Nobody can see these rows of the element any more (2.9).
    Reclaim {
        /// The element.
        element: ElementKey,
        /// The rows.
        rows: Vec<(LineageId, Epoch)>,
    },
    /// A watermark made durable by itself (end of a settlement).
    Watermark {
        /// The slot.
        slot: SlotId,
        /// The watermark.
        watermark: Version,
    },
    /// A small value of durable metadata (ring log, identity of the cluster), on two disks where the
    /// server has two.
    Meta {
        /// Key.
        key: Bytes,
        /// Value; none = delete.
        value: Option<Bytes>,
    },
}

/// Why a change cannot be staged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StageError {
    /// No free blocks, or no room for the entry.
    NoSpace,
    /// The disk that holds the element does not work.
    DiskFailed,
    /// `Replace` without data for a block that the present element does not have.
    MissingData,
}

/// Where an element's entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// In memory (it may be empty: an element that was never written has version zero and no rows).
    Ready,
    /// On its way; `Event::Loaded` will tell.
    Pending,
    /// The entry cannot be read (its disk failed).
    Failed,
}

/// Number of a read; the caller of `read` gets it and finds it in the event.
pub type ReadId = u64;

/// Blocks that travel, and `(row, block, earlier row)` of those that are the same as another's.
pub type SentAndShared = (Vec<(u16, u8)>, Vec<(u16, u8, u16)>);

/// Blocks that were read: one checksum per block, and the blocks that are not zero, in order, each
/// checked against its checksum.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ReadBlocks {
    /// One per block.
    pub sums: Vec<BlockSum>,
    /// The bytes, in pieces of whole blocks.
    pub data: Vec<Bytes>,
}

/// Why blocks could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The disk answered with an error.
    #[error(transparent)]
    Disk(DiskError),
    /// The bytes do not match the checksum of this block.
    #[error("block {0} does not match its checksum")]
    BadBlock(u8),
}

/// What the stores tell their owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// All disks are open and replayed; `Stores` answers from now on.
    Opened,
    /// A disk cannot be opened or stopped working; the sentence says why.
    DiskFailed {
        /// Which.
        disk: usize,
        /// Why.
        reason: String,
    },
    /// An element that was asked for with `load` is in memory.
    Loaded(ElementKey),
    /// Staged changes are on stable storage. Tickets of one disk come in order.
    Stable(Ticket),
    /// A read is done.
    Read {
        /// Which.
        read: ReadId,
        /// Result.
        result: Result<ReadBlocks, ReadError>,
    },
    /// A scan is done.
    Scanned {
        /// Which.
        scan: ReadId,
        /// Elements after the given one, ascending, at most the limit; with their versions.
        elements: Result<Vec<(ElementKey, Version)>, DiskError>,
    },
    /// `take_life_back` is done, as far as the disks let it.
    LifeTakenBack,
}

// ------------------------------------------------------------------------------------------------
// All disks of one server.

/// One disk, as found at start.
#[derive(Clone, Debug)]
pub struct OpenDisk {
    /// Its path, for people.
    pub path: String,
    /// Its superblock, already chosen from the two copies and checked.
    pub superblock: superblock::Superblock,
    /// Bytes that may be written without growing the file (its length); capacity for raw devices.
    pub frontier: u64,
}

/// What the stores are started with.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Clean element entries with one row kept in memory, per disk; each further row of one counts as a quarter of an entry.
    pub cache_elements: usize,
    /// A rule left out, to test the checkers. Always `Sabotage::None` in a real server.
    pub sabotage: crate::sabotage::Sabotage,
}

impl Default for StoreConfig {
    fn default() -> Self {
        StoreConfig { cache_elements: 65536, sabotage: crate::sabotage::Sabotage::None }
    }
}

/// How far a disk's watermark of a slot may fall behind before it is told although nothing is written
/// there.
const WATERMARK_LAG_MAX: u64 = 256;

/// All disks of one server, stepped: finds which disk has an element, groups staged changes into
/// batches, replays journals at start, checkpoints.
///
/// A loaded entry stays in memory at least until the next `flush`. An element lives on exactly one disk;
/// a new one goes to the disk with most room.
#[derive(Debug)]
pub struct Stores {
    disks: Vec<disk::Disk>,
    next_ticket: Ticket,
    next_read: ReadId,
    /// Disks that have not yet made a metadata value stable.
    copies: FastMap<Ticket, u8>,
    /// Disks that have not yet told whether they have an element.
    loads: FastMap<ElementKey, u8>,
    scans: BTreeMap<ReadId, MergedScan>,
    watermarks: BTreeMap<SlotId, Version>,
    generation: u64,
    opening: usize,
    /// Disks whose incarnation is being written back.
    taking_back: usize,
    events: VecDeque<Event>,
}

#[derive(Debug)]
struct MergedScan {
    waits: usize,
    limit: usize,
    elements: Result<BTreeMap<ElementKey, Version>, DiskError>,
}

impl Stores {
    /// Begins to open: first writes the incarnation to every superblock, then replays. `Event::Opened`
    /// or `Event::DiskFailed` follows.
    pub fn open(disks: Vec<OpenDisk>, incarnation: Incarnation, config: StoreConfig) -> Stores {
        let disks = disks.into_iter().map(|mut open| {
            open.superblock.incarnation = incarnation;
            let mut disk = disk::Disk::new(open, &config);
            disk.begin_recovery();
            disk
        });
        let disks: Vec<disk::Disk> = disks.collect();
        Stores {
            opening: disks.len(),
            taking_back: 0,
            disks,
            next_ticket: 1,
            next_read: 1,
            copies: FastMap::new(),
            loads: FastMap::new(),
            scans: BTreeMap::new(),
            watermarks: BTreeMap::new(),
            generation: 0,
            events: VecDeque::new(),
        }
    }

    /// A disk command is done.
    pub fn on_disk(&mut self, disk: usize, op: OpId, result: DiskResult) {
        self.disks[disk].on_result(op, result);
    }

    /// Puts what is staged into batches (group commit). Called once per round of the driver, after all
    /// inputs.
    pub fn flush(&mut self) {
        for disk in &mut self.disks {
            disk.flush();
        }
    }

    /// Next disk command.
    pub fn poll_command(&mut self) -> Option<(usize, OpId, DiskCommand)> {
        self.disks.iter_mut().enumerate().find_map(|(i, d)| d.commands.pop_front().map(|(op, c)| (i, op, c)))
    }

    /// Next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            let (i, event) =
                self.disks.iter_mut().enumerate().find_map(|(i, d)| d.events.pop_front().map(|e| (i, e)))?;
            self.on_disk_event(i, event);
        }
    }

    fn on_disk_event(&mut self, disk: usize, event: disk::DiskEvent) {
        match event {
            disk::DiskEvent::Opened => {
                self.opening -= 1;
                if self.opening == 0 {
                    self.on_all_open();
                }
            }
            disk::DiskEvent::Failed(reason) => self.events.push_back(Event::DiskFailed { disk, reason }),
            disk::DiskEvent::Loaded(element) => {
                let Some(waits) = self.loads.get_mut(&element) else { return };
                *waits -= 1;
                if *waits == 0 {
                    self.loads.remove(&element);
                    self.disks.iter_mut().for_each(|d| d.pin(element, false));
                    self.events.push_back(Event::Loaded(element));
                }
            }
            disk::DiskEvent::Stable(ticket) => {
                if let Some(copies) = self.copies.get_mut(&ticket) {
                    *copies -= 1;
                    if *copies > 0 {
                        return;
                    }
                    self.copies.remove(&ticket);
                }
                self.events.push_back(Event::Stable(ticket));
            }
            disk::DiskEvent::Read { read, result } => self.events.push_back(Event::Read { read, result }),
            disk::DiskEvent::Scanned { scan, elements } => self.on_part_scanned(scan, elements),
            disk::DiskEvent::Identified => {
                self.taking_back -= 1;
                if self.taking_back == 0 {
                    self.events.push_back(Event::LifeTakenBack);
                }
            }
        }
    }

    fn on_all_open(&mut self) {
        // 2.6: after a start a slot's watermark is the lowest that the disks show, and zero where one shows none:
        // every disk is told of every slot, so that one has lost it. What a disk lost that had acknowledged it is
        // above this, and the other replicas list it.
        let slots: BTreeSet<SlotId> = self.disks.iter().flat_map(|d| d.watermarks.keys().copied()).collect();
        for slot in slots {
            let lowest = self.disks.iter().map(|d| d.watermarks.get(&slot).copied().unwrap_or_default()).min();
            self.watermarks.insert(slot, lowest.unwrap_or_default());
        }
        self.reconcile_meta();
        self.events.push_back(Event::Opened);
    }

    /// Both copies of the metadata get the same writes in the same order, so one is a later state of the
    /// other: the one that got on further counts, the other is made equal.
    fn reconcile_meta(&mut self) {
        let copies = self.disks.len().min(META_COPIES);
        let newest = (0..copies).max_by_key(|d| self.disks[*d].meta_generation).expect("a server has a disk");
        self.generation = self.disks[newest].meta_generation;
        let right = self.disks[newest].meta.clone();
        for d in (0..copies).filter(|d| *d != newest) {
            let mut differing = Vec::new();
            let keys: BTreeSet<Bytes> = self.disks[d].meta.keys().chain(right.keys()).cloned().collect();
            for key in keys {
                if self.disks[d].meta.get(&key) == right.get(&key) {
                    continue;
                }
                differing.push(key);
            }
            // A crash in between must not make the half-made copy look as new as the right one.
            let last = differing.len().saturating_sub(1);
            for (i, key) in differing.iter().enumerate() {
                let generation = if i == last { self.generation } else { self.disks[d].meta_generation };
                self.disks[d].stage_meta(None, generation, key, right.get(key));
            }
        }
    }

    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        self.next_ticket
    }

    // --------------------------------------------------------------------------------------------
    // Entries.

    /// Brings an element's entry into memory.
    pub fn load(&mut self, element: ElementKey) -> Loaded {
        let mut missing = 0;
        for disk in &mut self.disks {
            if disk.failed.is_some() {
                return Loaded::Failed;
            }
            missing += u8::from(!disk.touch(element));
        }
        if missing == 0 {
            return Loaded::Ready;
        }
        if !self.loads.contains_key(&element) {
            // Every disk is asked that does not know; an element is on one of them or nowhere.
            self.loads.insert(element, missing);
            for disk in &mut self.disks {
                if disk.knows(element) {
                    disk.pin(element, true);
                } else {
                    disk.load(element);
                }
            }
        }
        Loaded::Pending
    }

    /// The disk that has an element, if one has it.
    pub fn home(&self, element: ElementKey) -> Option<usize> {
        self.disks.iter().position(|d| d.entry(element).is_some())
    }

    fn entry(&self, element: ElementKey) -> Option<&element::Entry> {
        self.disks.iter().find_map(|d| d.entry(element))
    }

    /// Version of a loaded element (staged changes included); zero if it does not exist.
    pub fn version(&self, element: ElementKey) -> Version {
        self.entry(element).map_or(Version::ZERO, |e| e.version)
    }

    /// Request ids of a loaded element.
    pub fn ids(&self, element: ElementKey) -> &[RequestId] {
        self.entry(element).map_or(&[], |e| &e.ids)
    }

    /// True if a loaded element has a row of this lineage and epoch.
    pub fn has_row(&self, element: ElementKey, lineage: LineageId, epoch: Epoch) -> bool {
        self.entry(element).is_some_and(|e| e.row(lineage, epoch).is_some())
    }

    /// Image of a loaded element.
    pub fn image(&self, element: ElementKey) -> ElementImage {
        self.entry(element).map_or_else(ElementImage::default, element::Entry::image)
    }

    /// The addresses that each row of a loaded element refers to, for checkers.
    pub fn addresses(&self, element: ElementKey) -> Vec<Vec<u64>> {
        self.entry(element).map_or_else(Vec::new, |e| e.rows.iter().map(|r| r.used().collect()).collect())
    }

    /// Rows of a loaded element, ascending by (lineage, epoch).
    pub fn rows(&self, element: ElementKey) -> &[element::Row] {
        self.entry(element).map_or(&[], |e| &e.rows)
    }

    /// Bit n is set if block n of the row seen by `view` is not zero. Loaded elements.
    pub fn mask(&self, element: ElementKey, view: &[(LineageId, Epoch)]) -> u16 {
        let row = self.entry(element).and_then(|e| e.row_in_view(view));
        row.map_or(0, |r| (0..BLOCKS_PER_ELEMENT).fold(0, |m, b| m | (u16::from(r.sum(b) != BlockSum::Zero) << b)))
    }

    /// Bit n is set if block n is not one and the same in both views: seen from the addresses alone, so a block that
    /// was written again with the same bytes differs. Loaded elements.
    pub fn differing(&self, element: ElementKey, view: &[(LineageId, Epoch)], other: &[(LineageId, Epoch)]) -> u16 {
        let Some(entry) = self.entry(element) else { return 0 };
        let nowhere = [element::NOWHERE; BLOCKS_PER_ELEMENT];
        let addresses = |view| entry.row_in_view(view).map_or(nowhere, |row| row.addresses);
        let both = addresses(view).into_iter().zip(addresses(other));
        (0..).zip(both).fold(0, |mask, (block, (a, b))| mask | (u16::from(a != b) << block))
    }

    // --------------------------------------------------------------------------------------------
    // Changes.

    /// Stages a change; it is in memory at once, and stable when its ticket is told. The elements of
    /// `Write`, `Replace` and `Drop` must be loaded.
    pub fn stage(&mut self, mut change: Change) -> Result<Ticket, StageError> {
        let ticket = self.ticket();
        match &mut change {
            Change::Write { element, slot, watermark, .. } | Change::Replace { element, slot, watermark, .. } => {
                let home = match self.home(*element).or_else(|| self.ghost(*element)) {
                    Some(home) => home,
                    None => self.emptiest()?,
                };
                // A disk that is new to the slot must not make its watermark look older than it is.
                let known = self.watermarks.get(slot).copied().unwrap_or_default();
                *watermark = known.max(*watermark);
                let (slot, watermark) = (*slot, *watermark);
                self.disks[home].stage(ticket, change)?;
                self.note_watermark(slot, watermark, home);
            }
            Change::Drop { element } | Change::Reclaim { element, .. } => {
                let home = self.home(*element).unwrap_or(0);
                self.disks[home].stage(ticket, change)?;
            }
            Change::Watermark { .. } => {
                // On every disk: after a start the lowest counts.
                let homes: SmallVec<[usize; 4]> = (0..self.disks.len()).collect();
                self.stage_copies(ticket, &homes, &change)?;
            }
            Change::Meta { .. } => {
                let homes: SmallVec<[usize; 4]> = (0..self.disks.len().min(META_COPIES)).collect();
                self.stage_copies(ticket, &homes, &change)?;
            }
        }
        Ok(ticket)
    }

    /// Stages a watermark or a metadata value on several disks, or on none.
    fn stage_copies(&mut self, ticket: Ticket, homes: &[usize], change: &Change) -> Result<(), StageError> {
        for home in homes {
            self.disks[*home].check_room(change)?;
        }
        if homes.len() > 1 {
            self.copies.insert(ticket, homes.len() as u8);
        }
        match change {
            Change::Watermark { slot, watermark } => {
                let known = self.watermarks.entry(*slot).or_default();
                *known = (*known).max(*watermark);
            }
            _ => self.generation += 1,
        }
        for home in homes {
            match change {
                Change::Meta { key, value } => {
                    self.disks[*home].stage_meta(Some(ticket), self.generation, key, value.as_ref());
                }
                other => self.disks[*home].stage(ticket, other.clone())?,
            }
        }
        Ok(())
    }

    fn ghost(&self, element: ElementKey) -> Option<usize> {
        self.disks.iter().position(|d| d.has_ghost(element))
    }

    fn emptiest(&self) -> Result<usize, StageError> {
        let working = (0..self.disks.len()).filter(|d| self.disks[*d].failed.is_none());
        let room = |d: &usize| (self.disks[*d].growth(), self.disks[*d].free_blocks(), usize::MAX - d);
        working.max_by_key(room).ok_or(StageError::DiskFailed)
    }

    /// The other disks are told now and then, so that none of them makes the slot's watermark look old after a
    /// start; also those that have no element of the slot: else one that has lost all of it would look the same.
    fn note_watermark(&mut self, slot: SlotId, watermark: Version, home: usize) {
        let known = self.watermarks.entry(slot).or_default();
        *known = (*known).max(watermark);
        if self.disks.len() == 1 {
            return;
        }
        for (_, disk) in self.disks.iter_mut().enumerate().filter(|(d, _)| *d != home) {
            let is_behind = match disk.watermarks.get(&slot) {
                None => true,
                Some(told) if told.term != watermark.term => watermark > *told,
                Some(told) => watermark.sequence > told.sequence + WATERMARK_LAG_MAX,
            };
            if is_behind {
                disk.stage_watermark(slot, watermark);
            }
        }
    }

    /// Every disk notes the watermark of a slot that has everything again. Nobody waits for it.
    pub fn note_caught_up(&mut self, slot: SlotId, watermark: Version) {
        let known = self.watermarks.entry(slot).or_default();
        *known = (*known).max(watermark);
        for disk in &mut self.disks {
            disk.stage_watermark(slot, watermark);
        }
    }

    /// True if a change with so many blocks can be staged now on whatever disk it goes to, if there is
    /// space at all; false while a disk's file is being grown, or a checkpoint makes room in a journal.
    /// A change that finds this true, and no more blocks wanted than are free, is not refused.
    pub fn is_ready_for(&self, blocks: u64) -> bool {
        self.disks.iter().all(|d| d.is_ready_for(blocks))
    }

    /// True if some disk's file could not grow: the file system below it is full.
    pub fn is_host_full(&self) -> bool {
        self.disks.iter().any(|d| d.host_full.is_some())
    }

    /// Somebody may have made room below: files try again to grow.
    pub fn retry_growth(&mut self) {
        for disk in &mut self.disks {
            // Full it stays until an extension has succeeded: no space is promised on a guess.
            disk.grow_again = true;
        }
    }

    // --------------------------------------------------------------------------------------------
    // Reads and scans.

    fn read_id(&mut self) -> ReadId {
        self.next_read += 1;
        self.next_read
    }

    /// Captures addresses now and reads them. The view is `(lineage, epoch)` followed by its ancestors:
    /// the first lineage with a row of that epoch or an older one answers. Loaded elements. If nothing
    /// must be read from the disk the event is there at once.
    pub fn read(&mut self, element: ElementKey, view: &[(LineageId, Epoch)], first_block: u8, blocks: u8) -> ReadId {
        let read = self.read_id();
        let home = self.home(element).unwrap_or(0);
        let row = self.disks[home].entry(element).and_then(|e| e.row_in_view(view));
        let captured: SmallVec<[(u8, u64, BlockSum); 16]> = (first_block..first_block + blocks)
            .map(|b| match row {
                Some(row) => (b, row.addresses[usize::from(b)], row.sum(usize::from(b))),
                None => (b, element::NOWHERE, BlockSum::Zero),
            })
            .collect();
        self.disks[home].read(read, &captured);
        read
    }

    /// Captures and reads single blocks of the element; one whose row is not there reads as zeros. Loaded elements.
    pub fn read_places(&mut self, element: ElementKey, places: &[Place]) -> ReadId {
        let read = self.read_id();
        let home = self.home(element).unwrap_or(0);
        let entry = self.disks[home].entry(element);
        let captured: Vec<(u8, u64, BlockSum)> = places
            .iter()
            .map(|p| match entry.and_then(|e| e.row(p.lineage, p.epoch)) {
                Some(row) => (p.block, row.addresses[usize::from(p.block)], row.sum(usize::from(p.block))),
                None => (p.block, element::NOWHERE, BlockSum::Zero),
            })
            .collect();
        self.disks[home].read(read, &captured);
        read
    }

    /// Every block of a loaded element that is stored, each once however many rows share it.
    pub fn stored(&self, element: ElementKey) -> Vec<Place> {
        self.entry(element).map_or_else(Vec::new, element::Entry::stored)
    }

    /// The places of a loaded element that share the stored block at this one, itself among them.
    pub fn sharing(&self, element: ElementKey, place: Place) -> Vec<Place> {
        self.entry(element).map_or_else(Vec::new, |e| e.sharing(place))
    }

    /// Of blocks `(row, block)` of an image of a loaded element: those to be sent, and those that share what an
    /// earlier row of the image has, `(row, block, that row)`.
    pub fn twins(&self, element: ElementKey, image: &ElementImage, blocks: &[(u16, u8)]) -> SentAndShared {
        let Some(entry) = self.entry(element) else { return (blocks.to_vec(), Vec::new()) };
        let mut first: FastMap<element::Address, u16> = FastMap::new();
        for (r, row) in image.rows.iter().enumerate() {
            for address in entry.row(row.lineage, row.epoch).into_iter().flat_map(element::Row::used) {
                first.get_or_insert_with(address, || r as u16);
            }
        }
        let (mut sent, mut shared) = (Vec::new(), Vec::new());
        for (row, block) in blocks {
            let of = &image.rows[usize::from(*row)];
            let address = entry.row(of.lineage, of.epoch).map(|r| r.addresses[usize::from(*block)]);
            match address.and_then(|a| first.get(&a)) {
                Some(other) if other < row => shared.push((*row, *block, *other)),
                _ => sent.push((*row, *block)),
            }
        }
        (sent, shared)
    }

    /// Rows of a loaded element.
    pub fn row_ids(&self, element: ElementKey) -> Vec<(LineageId, Epoch)> {
        self.entry(element).map_or_else(Vec::new, |e| e.rows.iter().map(|r| (r.lineage, r.epoch)).collect())
    }

    /// Elements of a family from `first` (inclusive) to `end` (exclusive), at most `limit`, ascending.
    pub fn scan(&mut self, family: FamilyId, first: u64, end: u64, limit: usize) -> ReadId {
        let from = ElementKey { family, element: first };
        self.begin_scan(from, Some(ElementKey { family, element: end }), limit)
    }

    /// Elements of every family after `after`, at most `limit`, ascending.
    pub fn scan_all(&mut self, after: Option<ElementKey>, limit: usize) -> ReadId {
        let from = match after {
            None => ElementKey { family: FamilyId(0), element: 0 },
            Some(ElementKey { family, element: u64::MAX }) => {
                ElementKey { family: FamilyId(family.0.saturating_add(1)), element: 0 }
            }
            Some(ElementKey { family, element }) => ElementKey { family, element: element + 1 },
        };
        self.begin_scan(from, None, limit)
    }

    fn begin_scan(&mut self, from: ElementKey, end: Option<ElementKey>, limit: usize) -> ReadId {
        let scan = self.read_id();
        self.scans.insert(scan, MergedScan { waits: self.disks.len(), limit, elements: Ok(BTreeMap::new()) });
        for disk in &mut self.disks {
            disk.scan(scan, from, end, limit);
        }
        scan
    }

    fn on_part_scanned(&mut self, scan: ReadId, part: Result<Vec<(ElementKey, Version)>, DiskError>) {
        let merged = self.scans.get_mut(&scan).expect("a part belongs to a scan");
        merged.waits -= 1;
        match (&mut merged.elements, part) {
            (Ok(all), Ok(part)) => all.extend(part),
            (elements, Err(error)) => *elements = Err(error),
            (Err(_), Ok(_)) => {}
        }
        if merged.waits == 0 {
            let merged = self.scans.remove(&scan).expect("just seen");
            // Every disk told its first `limit`, so the first `limit` of all are among them.
            let elements = merged.elements.map(|all| all.into_iter().take(merged.limit).collect());
            self.events.push_back(Event::Scanned { scan, elements });
        }
    }

    // --------------------------------------------------------------------------------------------
    // Change index, watermarks, metadata.

    /// Elements of a slot with a version above `above`, from the change index; ascending by key. `None`
    /// if the index no longer reaches back so far (then a scan must be made).
    pub fn newer(&self, slot: SlotId, above: Version) -> Option<Vec<ElementKey>> {
        let mut all = BTreeSet::new();
        for disk in &self.disks {
            if disk.floors.get(&slot).is_some_and(|floor| above < *floor) {
                return None;
            }
            let Some(index) = disk.changes.get(&slot) else { continue };
            let after = (std::ops::Bound::Excluded(above), std::ops::Bound::Unbounded);
            all.extend(index.range(after).map(|(_, element)| *element));
        }
        Some(all.into_iter().collect())
    }

    /// Nobody will ask for changes of the slot at or below this version again.
    pub fn forget_changes(&mut self, slot: SlotId, through: Version) {
        for disk in &mut self.disks {
            let Some(index) = disk.changes.get_mut(&slot) else { continue };
            let floor = disk.floors.entry(slot).or_default();
            if through <= *floor {
                continue;
            }
            *floor = through;
            while index.first_key_value().is_some_and(|(version, _)| *version <= through) {
                index.pop_first();
            }
        }
    }

    /// The newest watermark handed in for the slot; after a start the lowest that the disks show
    /// (2.6: "the lowest that its disks' last records or checkpoints show").
    pub fn watermark(&self, slot: SlotId) -> Version {
        self.watermarks.get(&slot).copied().unwrap_or(Version::ZERO)
    }

    /// The watermark that the slot has at least after a crash now: the lowest that the disks have on stable storage;
    /// zero if one has none.
    pub fn durable_watermark(&self, slot: SlotId) -> Version {
        let of = |d: &disk::Disk| d.durable_watermarks.get(&slot).copied().unwrap_or_default();
        self.disks.iter().map(of).min().unwrap_or_default()
    }

    /// A durable metadata value (staged ones included).
    pub fn meta(&self, key: &[u8]) -> Option<Bytes> {
        self.disks[0].meta.get(key).cloned()
    }

    /// All metadata whose key begins with `prefix`, ascending.
    pub fn meta_prefix(&self, prefix: &[u8]) -> Vec<(Bytes, Bytes)> {
        let from = Bytes::copy_from_slice(prefix);
        let all = self.disks[0].meta.range(from..).take_while(|(key, _)| key.starts_with(prefix));
        all.map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    // --------------------------------------------------------------------------------------------
    // Telling.

    /// Where a disk is, for people.
    pub fn path(&self, disk: usize) -> &str {
        &self.disks[disk].path
    }

    /// Rows on all disks.
    pub fn rows_stored(&self) -> u64 {
        self.disks.iter().map(|d| d.rows).sum()
    }

    /// Elements on all disks.
    pub fn elements(&self) -> u64 {
        self.disks.iter().map(|d| d.elements).sum()
    }

    /// What each disk tells of itself. Where writes of new blocks are refused, the fullest is why.
    pub fn status(&self, is_full: bool) -> Vec<crate::message::DiskStatus> {
        let fullest = self.disks.iter().map(disk::Disk::growth).min().filter(|_| is_full);
        let of = |d: &disk::Disk| crate::message::DiskStatus {
            disk: d.superblock.disk,
            path: d.path.clone(),
            capacity: d.superblock.data_capacity(),
            used: d.allocator.referenced() * BLOCK_SIZE,
            elements: d.elements,
            full: fullest == Some(d.growth()),
            error: d.failed.clone(),
        };
        self.disks.iter().map(of).collect()
    }

    /// Panics if the stores contradict themselves.
    pub fn check_invariants(&self) {
        for disk in &self.disks {
            disk.check_invariants();
        }
    }
}

/// Copies of the metadata, on the server's first disks.
pub const META_COPIES: usize = 2;
