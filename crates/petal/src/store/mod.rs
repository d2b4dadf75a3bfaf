//! One physical disk, or all of a server's: durable elements, and a little durable metadata.
//!
//! See docs/on-disk-format.md for the bytes. (API skeleton.)

pub mod allocator;
pub mod layout;
pub mod superblock;

use crate::ids::*;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

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
        /// First block.
        first_block: u8,
        /// New contents of consecutive blocks.
        blocks: Vec<BlockData>,
        /// The slot's watermark at this replica (goes into the journal record).
        watermark: Version,
    },
    /// The whole element as it must be. Blocks whose checksum equals that of the present block at the
    /// same row and place, and that have no data here, keep their address.
    Replace {
        /// The element.
        element: ElementKey,
        /// Its slot.
        slot: SlotId,
        /// What it must be.
        image: ElementImage,
        /// `(row index in the image, block, bytes)`.
        data: Vec<(u16, u8, Bytes)>,
        /// The slot's watermark at this replica.
        watermark: Version,
    },
    /// The element does not exist any more (its family ended, or an entry of nothing but zeros is
    /// known everywhere).
    Drop {
        /// The element.
        element: ElementKey,
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadError {
    /// The disk answered with an error.
    Disk(DiskError),
    /// The bytes do not match the checksum of this block.
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

/// Bounds of memory.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Clean element entries kept in memory, over all disks.
    pub cache_elements: usize,
}

/// All disks of one server, stepped: finds which disk has an element, groups staged changes into
/// batches, replays journals at start, checkpoints.
///
/// A loaded entry stays in memory at least until the next `flush`.
pub struct Stores;

#[allow(unused_variables, missing_docs, clippy::unimplemented)]
impl Stores {
    /// Begins to open: first writes the incarnation to every superblock, then replays. `Event::Opened`
    /// or `Event::DiskFailed` follows.
    pub fn open(disks: Vec<OpenDisk>, incarnation: Incarnation, config: StoreConfig) -> Stores {
        unimplemented!()
    }
    /// A disk command is done.
    pub fn on_disk(&mut self, disk: usize, op: OpId, result: DiskResult) {
        unimplemented!()
    }
    /// Puts what is staged into batches (group commit). Called once per round of the driver, after all inputs.
    pub fn flush(&mut self) {
        unimplemented!()
    }
    /// Next disk command.
    pub fn poll_command(&mut self) -> Option<(usize, OpId, DiskCommand)> {
        unimplemented!()
    }
    /// Next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        unimplemented!()
    }
    /// Brings an element's entry into memory.
    pub fn load(&mut self, element: ElementKey) -> Loaded {
        unimplemented!()
    }
    /// Version of a loaded element (staged changes included); zero if it does not exist.
    pub fn version(&self, element: ElementKey) -> Version {
        unimplemented!()
    }
    /// Request ids of a loaded element.
    pub fn ids(&self, element: ElementKey) -> &[RequestId] {
        unimplemented!()
    }
    /// Image of a loaded element.
    pub fn image(&self, element: ElementKey) -> ElementImage {
        unimplemented!()
    }
    /// Bit n is set if block n of the row seen by `view` is not zero. Loaded elements.
    pub fn mask(&self, element: ElementKey, view: &[(LineageId, Epoch)]) -> u16 {
        unimplemented!()
    }
    /// Stages a change; it is in memory at once, and stable when its ticket is told. The elements of
    /// `Write`, `Replace` and `Drop` must be loaded.
    pub fn stage(&mut self, change: Change) -> Result<Ticket, StageError> {
        unimplemented!()
    }
    /// Captures addresses now and reads them. The view is `(lineage, epoch)` followed by its ancestors:
    /// the first lineage with a row of that epoch or an older one answers. Loaded elements. If nothing
    /// must be read from the disk the event is there at once.
    pub fn read(&mut self, element: ElementKey, view: &[(LineageId, Epoch)], first_block: u8, blocks: u8) -> ReadId {
        unimplemented!()
    }
    /// Captures and reads single blocks of the element's image, `(row, block)`. Loaded elements.
    pub fn read_image(&mut self, element: ElementKey, blocks: &[(u16, u8)]) -> ReadId {
        unimplemented!()
    }
    /// Elements of a family from `first` (inclusive) to `end` (exclusive), at most `limit`, ascending.
    pub fn scan(&mut self, family: FamilyId, first: u64, end: u64, limit: usize) -> ReadId {
        unimplemented!()
    }
    /// Elements of every family after `after`, at most `limit`, ascending.
    pub fn scan_all(&mut self, after: Option<ElementKey>, limit: usize) -> ReadId {
        unimplemented!()
    }
    /// Elements of a slot with a version above `above`, from the change index; ascending by key. `None`
    /// if the index no longer reaches back so far (then a scan must be made).
    pub fn newer(&self, slot: SlotId, above: Version) -> Option<Vec<ElementKey>> {
        unimplemented!()
    }
    /// Nobody will ask for changes of the slot at or below this version again.
    pub fn forget_changes(&mut self, slot: SlotId, through: Version) {
        unimplemented!()
    }
    /// The newest watermark handed in for the slot; after a start the lowest that the disks show
    /// (2.6: "the lowest that its disks' last records or checkpoints show").
    pub fn watermark(&self, slot: SlotId) -> Version {
        unimplemented!()
    }
    /// The watermark of the slot that is on stable storage.
    pub fn durable_watermark(&self, slot: SlotId) -> Version {
        unimplemented!()
    }
    /// A durable metadata value (staged ones included).
    pub fn meta(&self, key: &[u8]) -> Option<Bytes> {
        unimplemented!()
    }
    /// All metadata whose key begins with `prefix`, ascending.
    pub fn meta_prefix(&self, prefix: &[u8]) -> Vec<(Bytes, Bytes)> {
        unimplemented!()
    }
    /// Free blocks on the fullest disk, beyond the reserve for deletes, settlements and metadata.
    pub fn free_blocks(&self) -> u64 {
        unimplemented!()
    }
    /// What each disk tells of itself.
    pub fn status(&self) -> Vec<crate::message::DiskStatus> {
        unimplemented!()
    }
    /// Earliest moment at which something must be done without an input (none so far).
    pub fn check_invariants(&self) {
        unimplemented!()
    }
}
