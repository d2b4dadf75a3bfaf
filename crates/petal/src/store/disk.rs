//! One physical disk, stepped (2.10): entries in memory, the journal's open batch, batches on their way,
//! reads, checkpoints. How it is opened is `recovery.rs`.
//!
//! ```text
//!  stage -> open batch -> (flush) on its way: data writes + one journal write, issued together
//!                                   |  all durable, and all batches before it
//!                                   v
//!                         tickets are stable; what it freed may be used again when a durable batch
//!                         vouches for it and the last reader from before has gone
//! ```
//!
//! Nothing is overwritten in place. Staged changes are in memory at once; who must not see them before
//! they are complete is decided above (queues, watermarks).
//!
//! How it fails: an error of a write is tried once more, then the disk has failed: nothing more is
//! acknowledged from it. Errors of reads are answers.

mod cached;
mod growing;
mod label;
mod scan;
mod split;

use super::allocator::Allocator;
use super::element::{Address, Entry, NOWHERE, Row};
use super::journal::{self, Header, Position, Record};
use super::superblock::Superblock;
use super::*;
use super::{keys, recovery};
use crate::limits::{BATCH_DATA_MAX, BATCHES_IN_FLIGHT_MAX, CHANGES_PER_SLOT_MAX};
use crate::sabotage::Sabotage;
use cached::{Cached, Cleanness};
use scan::ScanJob;
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use stdx::checksum::crc32c;
use stdx::{FastMap, FastSet};

/// Dirty entries at which a checkpoint begins although the journal has room: bounds memory and the work
/// of one checkpoint.
const DIRTY_MAX: usize = 65536;

/// Blocks, `(row, block)`, whose data is written with the batch.
type Fresh = Vec<(u16, u8)>;

/// What a disk tells its owner.
#[derive(Debug)]
pub(super) enum DiskEvent {
    Opened,
    Failed(String),
    Loaded(ElementKey),
    Stable(Ticket),
    Read { read: ReadId, result: Result<ReadBlocks, ReadError> },
    Scanned { scan: ReadId, elements: Result<Vec<(ElementKey, Version)>, DiskError> },
    Identified,
}

/// Changes that wait for the next flush.
#[derive(Debug, Default)]
struct OpenBatch {
    records: Vec<u8>,
    data: Vec<(Address, Bytes)>,
    data_bytes: usize,
    frees: Vec<Address>,
    tickets: Vec<Ticket>,
    watermarks: Vec<(SlotId, Version)>,
}

/// A batch that was issued.
#[derive(Debug)]
struct Batch {
    number: u64,
    durable_through: u64,
    waits: usize,
    frees: Vec<Address>,
    tickets: Vec<Ticket>,
    watermarks: Vec<(SlotId, Version)>,
}

/// What an operation handed to the world was for.
#[derive(Debug)]
enum Pending {
    Batch { number: u64, offset: u64, pieces: Vec<Bytes>, again: bool },
    Read { read: ReadId, piece: usize },
    Head(ElementKey),
    Rows(ElementKey),
    Scan(ReadId),
    Commit,
    Extend { to: u64, hurry: bool },
    Label { offset: u64, piece: Bytes, again: bool },
}

#[derive(Debug)]
struct ReadJob {
    sums: Vec<BlockSum>,
    /// Per piece: block numbers (for errors) and checksums of its blocks, and the bytes when they came.
    pieces: Vec<Piece>,
    waits: usize,
    error: Option<ReadError>,
    pin: u64,
}

#[derive(Debug)]
struct Piece {
    blocks: SmallVec<[(u8, u32); 4]>,
    bytes: Bytes,
}

/// What memory was when the last of the staged batches was `number`, to be saved once that is durable.
#[derive(Debug)]
struct Checkpoint {
    number: u64,
    /// Where that batch ends; not known before it is issued.
    position: Option<Position>,
    /// Of the journal, from the tail, when the checkpoint began.
    used: u64,
    elements: u64,
    rows: u64,
    generation: u64,
    changes: Vec<(Table, Bytes, Option<Bytes>)>,
    /// Entries in `changes`, and whether the element exists there.
    keys: Vec<(ElementKey, bool)>,
    watermarks: Vec<(SlotId, Version)>,
    issued: bool,
}

/// One disk.
#[derive(Debug)]
pub(super) struct Disk {
    pub path: String,
    pub superblock: Superblock,
    label: label::Label,
    pub sabotage: Sabotage,
    pub allocator: Allocator,
    pub cache: FastMap<ElementKey, Cached>,
    /// Clock hand over clean entries.
    clock: VecDeque<ElementKey>,
    cache_max: usize,
    /// Weight of the entries in memory.
    cache_weight: usize,
    /// Entries that became dirty since the last checkpoint began.
    dirty: Vec<ElementKey>,
    /// Elements that exist here and that the PMap store does not have yet.
    fresh: BTreeSet<ElementKey>,
    pub elements: u64,
    pub rows: u64,
    loading: FastSet<ElementKey>,
    half_loaded: FastMap<ElementKey, Entry>,
    /// Families that left a GMap, and for which one.
    pub(super) splits: BTreeMap<FamilyId, (GmapId, GmapId)>,
    /// Those that the last checkpoint does not have.
    dirty_splits: BTreeSet<FamilyId>,
    pub changes: BTreeMap<SlotId, BTreeMap<Version, ElementKey>>,
    /// What of `changes` the PMap store has.
    pub(super) saved_changes: BTreeSet<(SlotId, Version, ElementKey)>,
    /// Changes at or below are forgotten.
    pub floors: BTreeMap<SlotId, Version>,
    /// Newest staged, and newest durable watermark of each slot that this disk knows.
    pub watermarks: BTreeMap<SlotId, Version>,
    pub durable_watermarks: BTreeMap<SlotId, Version>,
    pub meta: BTreeMap<Bytes, Bytes>,
    pub meta_generation: u64,
    dirty_meta: BTreeSet<Bytes>,
    open: OpenBatch,
    /// Full, and not issued yet.
    closed: VecDeque<OpenBatch>,
    /// Bytes of the journal that those will take.
    closed_bytes: u64,
    batches: VecDeque<Batch>,
    pub last_issued: Position,
    pub durable_through: u64,
    /// Journal from here on is needed: the last checkpoint's position.
    pub tail: Position,
    checkpoint: Option<Checkpoint>,
    /// Freed by a batch, waiting for a durable batch that vouches for it.
    pub(super) freed: VecDeque<(u64, Vec<Address>)>,
    /// Vouched for, waiting for readers that began before.
    pub(super) unpinned: VecDeque<(u64, Vec<Address>)>,
    next_pin: u64,
    pins: BTreeSet<u64>,
    reads: FastMap<ReadId, ReadJob>,
    scans: BTreeMap<ReadId, ScanJob>,
    extending: bool,
    /// When the file had been grown last: batches, and free blocks below the frontier.
    grown: Option<(u64, u64)>,
    /// The file could not be grown, when the journal was at this batch.
    pub host_full: Option<u64>,
    /// Try again to grow it although it is not time yet.
    pub grow_again: bool,
    pub(super) failed: Option<String>,
    pending: FastMap<OpId, Pending>,
    next_op: OpId,
    pub(super) commands: VecDeque<(OpId, DiskCommand)>,
    pub(super) events: VecDeque<DiskEvent>,
    pub(super) recovery: Option<Box<recovery::Recovery>>,
    pub(super) bad_blocks: u64,
}

impl Disk {
    pub fn new(open: OpenDisk, config: &StoreConfig) -> Self {
        let layout = open.superblock.layout;
        let mut allocator = Allocator::new(layout.data.length / BLOCK_SIZE);
        allocator.set_frontier(open.frontier.saturating_sub(layout.data.offset) / BLOCK_SIZE);
        Disk {
            path: open.path,
            superblock: open.superblock,
            label: label::Label::default(),
            sabotage: config.sabotage,
            allocator,
            cache: FastMap::new(),
            clock: VecDeque::new(),
            cache_max: config.cache_elements * Entry::WEIGHT_OF_ONE,
            cache_weight: 0,
            dirty: Vec::new(),
            fresh: BTreeSet::new(),
            elements: 0,
            rows: 0,
            loading: FastSet::new(),
            splits: BTreeMap::new(),
            dirty_splits: BTreeSet::new(),
            half_loaded: FastMap::new(),
            changes: BTreeMap::new(),
            saved_changes: BTreeSet::new(),
            floors: BTreeMap::new(),
            watermarks: BTreeMap::new(),
            durable_watermarks: BTreeMap::new(),
            meta: BTreeMap::new(),
            meta_generation: 0,
            dirty_meta: BTreeSet::new(),
            open: OpenBatch::default(),
            closed: VecDeque::new(),
            closed_bytes: 0,
            batches: VecDeque::new(),
            last_issued: Position::default(),
            durable_through: 0,
            tail: Position::default(),
            checkpoint: None,
            freed: VecDeque::new(),
            unpinned: VecDeque::new(),
            next_pin: 1,
            pins: BTreeSet::new(),
            reads: FastMap::new(),
            scans: BTreeMap::new(),
            extending: false,
            grown: None,
            host_full: None,
            grow_again: false,
            failed: None,
            pending: FastMap::new(),
            next_op: 1,
            commands: VecDeque::new(),
            events: VecDeque::new(),
            recovery: None,
            bad_blocks: 0,
        }
    }

    pub fn is_open(&self) -> bool {
        self.recovery.is_none() && self.failed.is_none()
    }

    pub(super) fn fail(&mut self, reason: String) {
        if self.failed.is_none() {
            let reason = format!("{}: {reason}", self.path);
            self.failed = Some(reason.clone());
            self.events.push_back(DiskEvent::Failed(reason));
        }
    }

    pub(super) fn command(&mut self, command: DiskCommand) -> OpId {
        let op = self.next_op;
        self.next_op += 1;
        self.commands.push_back((op, command));
        op
    }

    fn issue(&mut self, pending: Pending, command: DiskCommand) {
        let op = self.command(command);
        self.pending.insert(op, pending);
    }

    // --------------------------------------------------------------------------------------------
    // Entries.

    /// True if the entry (or that there is none) is in memory.
    pub fn knows(&self, element: ElementKey) -> bool {
        self.cache.contains_key(&element)
    }

    /// The entry in memory, if the element exists.
    pub fn entry(&self, element: ElementKey) -> Option<&Entry> {
        self.cache.get(&element).map(|c| &c.entry).filter(|e| !e.is_absent())
    }

    /// True if the element was dropped here, and a crash could still bring it back: made again elsewhere it
    /// would be there twice.
    pub fn has_ghost(&self, element: ElementKey) -> bool {
        self.cache.get(&element).is_some_and(|c| c.entry.is_absent() && c.clean != Cleanness::Clean)
    }

    /// Marks the entry as used; true if it is in memory.
    pub fn touch(&mut self, element: ElementKey) -> bool {
        match self.cache.get_mut(&element) {
            Some(cached) => {
                cached.used = true;
                true
            }
            None => false,
        }
    }

    /// Keeps the entry in memory, or lets it go when it is not used any more.
    pub fn pin(&mut self, element: ElementKey, pinned: bool) {
        if let Some(cached) = self.cache.get_mut(&element) {
            cached.pinned = pinned;
        }
    }

    /// Every entry in memory whose element exists.
    pub fn each_cached(&self, mut f: impl FnMut(ElementKey, &Entry)) {
        let mut seen = BTreeSet::new();
        for element in &self.clock {
            if let Some(entry) = self.entry(*element)
                && seen.insert(*element)
            {
                f(*element, entry);
            }
        }
    }

    /// Begins to bring an entry into memory.
    pub fn load(&mut self, element: ElementKey) {
        if self.loading.insert(element) {
            let key = keys::head(element);
            self.issue(Pending::Head(element), DiskCommand::PmapGet { table: Table::Heads, key });
        }
    }

    fn on_head(&mut self, element: ElementKey, value: Option<Bytes>) {
        let Some(value) = value else { return self.loaded(element, Entry::absent()) };
        let Some(head) = Entry::decode_head(&value) else {
            return self.fail(format!("the entry of element {element:?} is damaged"));
        };
        self.half_loaded.insert(element, head);
        let (from, to) = keys::rows_of(element);
        let command = DiskCommand::PmapRange { table: Table::Rows, from, to, limit: usize::MAX };
        self.issue(Pending::Rows(element), command);
    }

    fn on_rows(&mut self, element: ElementKey, rows: Vec<(Bytes, Bytes)>) {
        let mut entry = self.half_loaded.remove(&element).expect("rows follow a head");
        // It was saved before its family got another GMap.
        if let Some((_, to)) = self.splits.get(&element.family).filter(|(from, _)| *from == entry.slot.gmap) {
            entry.slot.gmap = *to;
        }
        for (key, value) in rows {
            let row = keys::row_ids(&key).and_then(|(lineage, epoch)| Row::decode(lineage, epoch, &value));
            let Some(row) = row else {
                return self.fail(format!("a row of element {element:?} is damaged"));
            };
            // An entry comes from the checkpoint that the free map comes from, and is unchanged since.
            if row.used().any(|a| a >= self.allocator.capacity() || !self.allocator.is_referenced(a)) {
                return self.fail(format!("a row of element {element:?} refers to a block that counts as free"));
            }
            entry.rows.push(row);
        }
        self.loaded(element, entry);
    }

    fn loaded(&mut self, element: ElementKey, entry: Entry) {
        self.loading.remove(&element);
        let pinned = self.recovery.is_none();
        self.cache_weight += Entry::weight(entry.rows.len());
        let (stale_rows, new_rows) = (SmallVec::new(), SmallVec::new());
        let cached = Cached { entry, clean: Cleanness::Clean, used: true, pinned, stale_rows, new_rows };
        if self.cache.insert(element, cached).is_none() {
            self.clock.push_back(element);
        }
        if self.recovery.is_some() {
            self.on_recovery_loaded();
        } else {
            self.events.push_back(DiskEvent::Loaded(element));
        }
    }

    /// Forgets clean entries beyond the bound: second chance.
    fn evict(&mut self) {
        // A new entry needs two passes of the hand; the more there are too many, the further it goes. Not without end:
        // there may be many that the next checkpoint has to save first.
        let excess = self.cache_weight.saturating_sub(self.cache_max);
        let mut tries = self.clock.len().min(64 + 4 * excess).min(1024);
        while self.cache_weight > self.cache_max && tries > 0 {
            tries -= 1;
            let Some(element) = self.clock.pop_front() else { return };
            let Some(cached) = self.cache.get_mut(&element) else { continue };
            if cached.pinned || cached.clean != Cleanness::Clean || std::mem::take(&mut cached.used) {
                self.clock.push_back(element);
            } else {
                self.cache_weight -= Entry::weight(cached.entry.rows.len());
                self.cache.remove(&element);
            }
        }
    }

    // --------------------------------------------------------------------------------------------
    // Staging.

    /// True if a change with so many blocks can be staged now, as far as waiting helps: for the file to
    /// grow, or for a checkpoint to make room in the journal.
    pub fn is_ready_for(&self, blocks: u64) -> bool {
        self.allocator.free_below_frontier() >= blocks && self.may_stage(0, 8)
    }

    fn allocate(&mut self, blocks: usize) -> Option<SmallVec<[Address; 16]>> {
        let mut extents = SmallVec::new();
        if blocks > 0 && !self.allocator.allocate(blocks as u32, &mut extents) {
            return None;
        }
        Some(extents.iter().flat_map(|(start, count)| *start..*start + u64::from(*count)).collect())
    }

    /// Takes a change in. Its element is in memory, and lives here if it lives anywhere.
    pub fn stage(&mut self, ticket: Ticket, change: Change) -> Result<(), StageError> {
        self.check_room(&change)?;
        match change {
            Change::Write {
                element,
                slot,
                version,
                lineage,
                epoch,
                parents,
                id,
                finished_below,
                ended,
                first_block,
                blocks,
                watermark,
            } => {
                let wanted = blocks.iter().filter(|b| matches!(b, BlockData::Data { .. })).count();
                let mut addresses = self.allocate(wanted).ok_or(StageError::NoSpace)?.into_iter();
                let mut places = Vec::with_capacity(blocks.len());
                for block in blocks {
                    places.push(match block {
                        BlockData::Zero => None,
                        BlockData::Data { crc, bytes } => {
                            let address = addresses.next().expect("one address for each block of data");
                            self.put_data(address, bytes);
                            Some((address, crc))
                        }
                    });
                }
                let record = Record::Write {
                    element,
                    slot,
                    version,
                    lineage,
                    epoch,
                    parents,
                    id,
                    finished_below,
                    ended,
                    watermark,
                    first_block,
                    blocks: places,
                };
                self.append(&record);
                self.apply(record);
            }
            Change::Replace { element, slot, image, data, twins, again, watermark } => {
                let (rows, fresh) = self.build_rows(element, &image, data, &twins, again)?;
                let ElementImage { version, ids, .. } = image;
                let record = Record::Replace { element, slot, version, ids, rows, fresh, watermark };
                self.append(&record);
                self.apply(record);
            }
            Change::Drop { element } => {
                let record = Record::Drop { element };
                self.append(&record);
                self.apply(record);
            }
            Change::Reclaim { element, rows } => {
                let record = Record::Reclaim { element, rows };
                self.append(&record);
                self.apply(record);
            }
            Change::Watermark { slot, watermark } => {
                let record = Record::Watermark { slot, watermark };
                self.append(&record);
                self.apply(record);
            }
            Change::Meta { .. } => unreachable!("metadata is staged by `stage_meta`"),
        }
        self.staged(Some(ticket));
        Ok(())
    }

    /// Whether a change may be staged, as far as the journal is concerned.
    pub fn check_room(&self, change: &Change) -> Result<(), StageError> {
        if self.failed.is_some() {
            return Err(StageError::DiskFailed);
        }
        // What gives space back and what keeps the server going has some room of its own.
        let (bytes, sixteenths) = match change {
            Change::Write { parents, blocks, .. } => (200 + parents.len() * 10 + blocks.len() * 16, 10),
            Change::Replace { image, data, .. } => {
                (200 + image.ids.len() * 20 + image.rows.len() * 256 + data.len() * 4, 10)
            }
            Change::Drop { .. } | Change::Watermark { .. } => (64, 12),
            Change::Reclaim { rows, .. } => (64 + rows.len() * 10, 12),
            Change::Meta { key, value } => (64 + key.len() + value.as_ref().map_or(0, Bytes::len), 12),
        };
        if self.may_stage(bytes, sixteenths) { Ok(()) } else { Err(StageError::NoSpace) }
    }

    /// Something was staged: batches and the journal are kept within their bounds.
    fn staged(&mut self, ticket: Option<Ticket>) {
        self.open.tickets.extend(ticket);
        let long = self.open.records.len() as u64 >= self.ring() / 16;
        if long || self.open.data_bytes >= BATCH_DATA_MAX {
            self.close_batch();
        }
        if self.is_open() {
            self.begin_checkpoint_if_due();
        }
    }

    /// Stages a metadata value.
    pub fn stage_meta(&mut self, ticket: Option<Ticket>, generation: u64, key: &Bytes, value: Option<&Bytes>) {
        let record = Record::Meta { generation, key: key.to_vec(), value: value.map(|v| v.to_vec()) };
        self.append(&record);
        self.apply(record);
        self.staged(ticket);
    }

    /// Stages a watermark that nobody waits for.
    pub fn stage_watermark(&mut self, slot: SlotId, watermark: Version) {
        let record = Record::Watermark { slot, watermark };
        if self.check_room(&Change::Watermark { slot, watermark }).is_ok() {
            self.append(&record);
            self.apply(record);
            self.staged(None);
        }
    }

    fn put_data(&mut self, address: Address, bytes: Bytes) {
        self.open.data_bytes += bytes.len();
        self.open.data.push((address, bytes));
    }

    fn append(&mut self, record: &Record) {
        let records = std::mem::take(&mut self.open.records);
        self.open.records = postcard::to_extend(record, records).expect("a record can be written to memory");
    }

    fn build_rows(
        &mut self,
        element: ElementKey,
        image: &ElementImage,
        data: Vec<(u16, u8, Bytes)>,
        told: &[(u16, u8, u16)],
        again: bool,
    ) -> Result<(Vec<Row>, Fresh), StageError> {
        let mut rows: Vec<Row> = image.rows.iter().map(|r| Row::zeros(r.lineage, r.epoch)).collect();
        let mut missing: BTreeSet<(u16, u8)> = BTreeSet::new();
        let given: BTreeSet<(u16, u8)> = data.iter().filter(|_| again).map(|(r, b, _)| (*r, *b)).collect();
        let absent = Entry::absent();
        let present = self.cache.get(&element).map_or(&absent, |c| &c.entry);
        for (r, (row, want)) in rows.iter_mut().zip(&image.rows).enumerate() {
            let old = present.row(row.lineage, row.epoch);
            for (b, sum) in want.sums.iter().enumerate() {
                let BlockSum::Crc(crc) = sum else { continue };
                match old {
                    Some(old) if old.sum(b) == *sum && !given.contains(&(r as u16, b as u8)) => {
                        row.addresses[b] = old.addresses[b];
                    }
                    _ => {
                        missing.insert((r as u16, b as u8));
                    }
                }
                row.crcs[b] = *crc;
            }
        }
        // What is told to be the same as an earlier row's is not missing, where the two agree in their checksums.
        let mut shared: Vec<(u16, u8, u16)> = Vec::new();
        for (r, b, other) in told {
            let sums = image.rows.get(usize::from(*r)).zip(image.rows.get(usize::from(*other)));
            let agree = sums.is_some_and(|(x, y)| x.sums.get(usize::from(*b)) == y.sums.get(usize::from(*b)));
            if other < r && agree && missing.remove(&(*r, *b)) {
                shared.push((*r, *b, *other));
            }
        }
        shared.sort_unstable();
        let data: BTreeMap<(u16, u8), Bytes> =
            data.into_iter().map(|(r, b, bytes)| ((r, b), bytes)).filter(|(at, _)| missing.contains(at)).collect();
        if data.len() != missing.len() {
            return Err(StageError::MissingData);
        }
        // Several rows that hold the same bytes at the same place share an address, as they did where they
        // were written: a row begins as a copy of the one before.
        let twin = |(r, b): (u16, u8), bytes: &Bytes| {
            let crc = rows[usize::from(r)].crcs[usize::from(b)];
            let same = |o: &u16| {
                rows[usize::from(*o)].crcs[usize::from(b)] == crc && data.get(&(*o, b)).is_some_and(|d| d == bytes)
            };
            (0..r).find(same)
        };
        let twins: BTreeMap<(u16, u8), u16> =
            data.iter().filter_map(|(at, bytes)| Some((*at, twin(*at, bytes)?))).collect();
        let mut addresses = self.allocate(data.len() - twins.len()).ok_or(StageError::NoSpace)?.into_iter();
        let mut fresh = Vec::with_capacity(data.len());
        for ((r, b), bytes) in data {
            let block = usize::from(b);
            rows[usize::from(r)].addresses[block] = match twins.get(&(r, b)) {
                Some(twin) => rows[usize::from(*twin)].addresses[block],
                None => {
                    let address = addresses.next().expect("one address for each block of data");
                    fresh.push((r, b));
                    self.put_data(address, bytes);
                    address
                }
            };
        }
        // Ascending by row, so that the other one has its address by now.
        for (r, b, other) in shared {
            rows[usize::from(r)].addresses[usize::from(b)] = rows[usize::from(other)].addresses[usize::from(b)];
        }
        Ok((rows, fresh))
    }

    /// What a record does to the entries in memory: the same when it is staged and when it is replayed.
    pub(super) fn apply(&mut self, record: Record) {
        match record {
            Record::Write {
                element,
                slot,
                version,
                lineage,
                epoch,
                parents,
                id,
                finished_below,
                ended,
                watermark,
                first_block,
                blocks,
            } => {
                let of_entry = self.present_slot(element, slot);
                let cached = self.cache.get_mut(&element).expect("the entry of a staged write is in memory");
                let entry = &mut cached.entry;
                let (old, was_absent) = ((entry.slot, entry.version), entry.is_absent());
                let rows_before = entry.rows.len();
                let mut released: SmallVec<[Address; 16]> = SmallVec::new();
                let row = entry.row_to_write(lineage, epoch, &parents);
                for (place, block) in blocks.iter().zip(usize::from(first_block)..BLOCKS_PER_ELEMENT) {
                    if row.addresses[block] != NOWHERE {
                        released.push(row.addresses[block]);
                    }
                    (row.addresses[block], row.crcs[block]) = place.unwrap_or((NOWHERE, 0));
                }
                released.retain(|a| !entry.refers_to(*a));
                entry.slot = of_entry;
                entry.version = entry.version.max(version);
                entry.forget_sessions(&ended);
                entry.note_id(id, finished_below);
                let new_version = entry.version;
                cached.note_new([(lineage, epoch)]);
                self.dirtied(element, was_absent, rows_before);
                self.index_change(element, old, Some((of_entry, new_version)));
                self.release(&released);
                self.note_watermark(slot, watermark);
            }
            Record::Replace { element, slot, version, ids, rows, fresh: _, watermark } => {
                let of_entry = self.present_slot(element, slot);
                let cached = self.cache.get_mut(&element).expect("the entry of a staged replacement is in memory");
                let new = Entry { version, slot: of_entry, ids: ids.into(), rows: rows.into() };
                let old = std::mem::replace(&mut cached.entry, new);
                let gone = old.rows.iter().map(|r| (r.lineage, r.epoch));
                let stale: SmallVec<[_; 4]> = gone.filter(|(l, e)| cached.entry.row(*l, *e).is_none()).collect();
                cached.note_stale(stale);
                let is_new = |r: &&Row| old.row(r.lineage, r.epoch) != Some(*r);
                let new: SmallVec<[_; 4]> =
                    cached.entry.rows.iter().filter(is_new).map(|r| (r.lineage, r.epoch)).collect();
                cached.note_new(new);
                let released = old.addresses_not_in(&cached.entry);
                self.dirtied(element, old.is_absent(), old.rows.len());
                self.index_change(element, (old.slot, old.version), Some((of_entry, version)));
                self.release(&released);
                self.note_watermark(slot, watermark);
            }
            Record::Drop { element } => {
                let Some(cached) = self.cache.get_mut(&element) else { return };
                let old = std::mem::replace(&mut cached.entry, Entry::absent());
                if old.is_absent() {
                    return;
                }
                cached.note_stale(old.rows.iter().map(|r| (r.lineage, r.epoch)));
                let released = old.addresses();
                self.dirtied(element, false, old.rows.len());
                self.index_change(element, (old.slot, old.version), None);
                self.release(&released);
            }
            Record::Reclaim { element, rows } => {
                let Some(cached) = self.cache.get_mut(&element) else { return };
                let rows_before = cached.entry.rows.len();
                let going: BTreeSet<(LineageId, Epoch)> = rows.iter().copied().collect();
                let mut released: Vec<Address> = Vec::new();
                cached.entry.rows.retain(|r| {
                    let goes = going.contains(&(r.lineage, r.epoch));
                    if goes {
                        released.extend(r.used());
                    }
                    !goes
                });
                if cached.entry.rows.len() == rows_before {
                    return;
                }
                released.sort_unstable();
                released.dedup();
                let used = cached.entry.addresses();
                released.retain(|a| used.binary_search(a).is_err());
                cached.note_stale(rows);
                self.dirtied(element, false, rows_before);
                self.release(&released);
            }
            Record::Watermark { slot, watermark } => self.note_watermark(slot, watermark),
            Record::Split { family, from, to } => self.split(family, from, to),
            Record::Meta { generation, key, value } => {
                let key = Bytes::from(key);
                self.meta_generation = self.meta_generation.max(generation);
                self.dirty_meta.insert(key.clone());
                match value {
                    Some(value) => self.meta.insert(key, value.into()),
                    None => self.meta.remove(&key),
                };
            }
        }
    }

    /// An entry has changed; it had so many rows.
    fn dirtied(&mut self, element: ElementKey, was_absent: bool, rows_before: usize) {
        let cached = self.cache.get_mut(&element).expect("a changed entry is in memory");
        let rows = cached.entry.rows.len();
        self.rows = (self.rows + rows as u64).saturating_sub(rows_before as u64);
        self.cache_weight = self.cache_weight + Entry::weight(rows) - Entry::weight(rows_before);
        cached.used = true;
        if cached.clean != Cleanness::Dirty {
            cached.clean = Cleanness::Dirty;
            self.dirty.push(element);
        }
        let is_absent = cached.entry.is_absent();
        if was_absent && !is_absent {
            self.elements += 1;
            self.fresh.insert(element);
        } else if !was_absent && is_absent {
            self.elements = self.elements.saturating_sub(1);
            self.fresh.remove(&element);
        }
    }

    /// The element's newest write is another one now, or it is gone.
    fn index_change(&mut self, element: ElementKey, old: (SlotId, Version), new: Option<(SlotId, Version)>) {
        if new == Some(old) {
            return;
        }
        if let Some(index) = self.changes.get_mut(&old.0)
            && index.get(&old.1) == Some(&element)
        {
            index.remove(&old.1);
        }
        if let Some((slot, version)) = new {
            let index = self.changes.entry(slot).or_default();
            index.insert(version, element);
            if index.len() > CHANGES_PER_SLOT_MAX {
                // A member has been away for long: a scan will tell it what it missed.
                let (version, _) = index.pop_first().expect("there are many");
                let floor = self.floors.entry(slot).or_default();
                *floor = (*floor).max(version);
            }
        }
    }

    fn note_watermark(&mut self, slot: SlotId, watermark: Version) {
        match self.watermarks.get_mut(&slot) {
            Some(newest) => *newest = (*newest).max(watermark),
            None => {
                self.watermarks.insert(slot, watermark);
            }
        }
        // One after the other mostly of the same slot: the higher one counts.
        match self.open.watermarks.last_mut() {
            Some((last, newest)) if *last == slot => *newest = (*newest).max(watermark),
            _ => self.open.watermarks.push((slot, watermark)),
        }
    }

    fn release(&mut self, addresses: &[Address]) {
        for address in addresses {
            self.allocator.release(*address);
            // What a replayed batch freed was vouched for, or has no reader any more.
            if self.sabotage == Sabotage::ReuseEarly || self.recovery.is_some() {
                self.allocator.reuse(*address);
            } else {
                self.open.frees.push(*address);
            }
        }
    }

    /// Replay goes through `apply`; nothing of it is to be written again.
    pub(super) fn discard_open_batch(&mut self) {
        self.open = OpenBatch::default();
    }

    // --------------------------------------------------------------------------------------------
    // Batches.

    /// Issues what is staged, as far as batches may be on their way.
    pub fn flush(&mut self) {
        if !self.is_open() {
            return;
        }
        self.grow_ahead();
        self.issue_staged();
        self.push_frees_on();
        self.begin_checkpoint_if_due();
        self.evict();
    }

    fn issue_staged(&mut self) {
        while self.batches.len() < BATCHES_IN_FLIGHT_MAX {
            let next = self.closed.front().unwrap_or(&self.open);
            let bytes = journal::batch_bytes(next.records.len());
            if next.is_empty() || !self.has_journal_room(bytes, self.ring() / 16) {
                return;
            }
            let batch = match self.closed.pop_front() {
                Some(closed) => {
                    self.closed_bytes -= bytes;
                    closed
                }
                None => std::mem::take(&mut self.open),
            };
            self.issue_batch(batch);
        }
    }

    /// Nothing more is added to the open batch.
    fn close_batch(&mut self) {
        if !self.open.is_empty() {
            let batch = std::mem::take(&mut self.open);
            self.closed_bytes += journal::batch_bytes(batch.records.len());
            self.closed.push_back(batch);
        }
    }

    /// Freed blocks wait for a later batch. When nothing else is written and blocks are short, an empty
    /// batch vouches for the one that freed them.
    fn push_frees_on(&mut self) {
        let idle = self.batches.is_empty() && self.open.is_empty() && self.closed.is_empty();
        if self.is_short() && idle && !self.freed.is_empty() && self.has_journal_room(BLOCK_SIZE, self.ring() / 16) {
            self.issue_batch(OpenBatch::default());
        }
    }

    /// The record of a start: an empty batch that says where the journal ended. A sixteenth of the ring is
    /// kept for these; a disk that was started more often without ever getting to a checkpoint makes one
    /// before it opens.
    pub(super) fn issue_open_record(&mut self) {
        if self.has_journal_room(BLOCK_SIZE, BLOCK_SIZE) {
            self.issue_batch(OpenBatch::default());
        } else {
            self.begin_checkpoint();
        }
    }

    fn ring(&self) -> u64 {
        self.superblock.layout.journal.length
    }

    /// Room in the ring for a batch of so many bytes, with what is lost when it does not fit at the end.
    fn has_journal_room(&self, bytes: u64, kept: u64) -> bool {
        let (ring, next) = (self.ring(), self.last_issued.next);
        let lost = if next + bytes <= ring { 0 } else { ring - next };
        self.journal_used() + lost + bytes + kept <= ring
    }

    fn journal_used(&self) -> u64 {
        (self.last_issued.next + self.ring() - self.tail.next) % self.ring()
    }

    /// The same, with what is staged.
    fn journal_staged(&self) -> u64 {
        let open = if self.open.is_empty() { 0 } else { journal::batch_bytes(self.open.records.len()) };
        self.journal_used() + self.closed_bytes + open
    }

    /// Whether a record of at most so many bytes may be staged. A checkpoint saves everything staged, and is
    /// done only when that is in the ring; so all that is staged behind the one on its way must fit into
    /// the ring when that is done: three quarters, and a quarter for what is lost at the ring's end (a batch
    /// of at most three sixteenths) and for the records of starts.
    fn may_stage(&self, record: usize, sixteenths: u64) -> bool {
        let saved = self.checkpoint.as_ref().map_or(0, |c| c.used);
        record as u64 <= self.ring() / 8
            && self.journal_staged().saturating_sub(saved) + record as u64 <= self.ring() / 16 * sixteenths
    }

    fn issue_batch(&mut self, open: OpenBatch) {
        let number = self.last_issued.number + 1;
        let header = Header {
            run: self.superblock.incarnation.0,
            number,
            hash_before: self.last_issued.hash,
            durable_through: self.durable_through,
            length: 0,
        };
        let (batch, hash) = journal::encode_batch(self.superblock.disk, header, &open.records);
        let bytes = batch.len() as u64;
        let ring = self.superblock.layout.journal;
        let at = if self.last_issued.next + bytes <= ring.length { self.last_issued.next } else { 0 };
        let data_start = self.superblock.layout.data.offset;
        let mut waits = 1;
        for (address, pieces) in coalesce(open.data) {
            waits += 1;
            self.write(number, data_start + address * BLOCK_SIZE, pieces);
        }
        self.write(number, ring.offset + at, vec![Bytes::from(batch)]);
        let (frees, tickets, watermarks) = (open.frees, open.tickets, open.watermarks);
        let durable_through = header.durable_through;
        self.batches.push_back(Batch { number, durable_through, waits, frees, tickets, watermarks });
        self.last_issued = Position { number, hash, next: at + bytes };
        if let Some(checkpoint) = self.checkpoint.as_mut().filter(|c| c.number == number) {
            checkpoint.position = Some(self.last_issued);
        }
    }

    fn write(&mut self, number: u64, offset: u64, pieces: Vec<Bytes>) {
        let pending = Pending::Batch { number, offset, pieces: pieces.clone(), again: false };
        self.issue(pending, DiskCommand::Write { offset, pieces });
    }

    fn on_batch_written(&mut self, number: u64) {
        let Some(batch) = self.batches.iter_mut().find(|b| b.number == number) else { return };
        batch.waits -= 1;
        if self.sabotage == Sabotage::AckBatchesOutOfOrder && batch.waits == 0 {
            let tickets = std::mem::take(&mut batch.tickets);
            self.events.extend(tickets.into_iter().map(DiskEvent::Stable));
        }
        while self.batches.front().is_some_and(|b| b.waits == 0) {
            let batch = self.batches.pop_front().expect("just seen");
            self.on_batch_durable(batch);
        }
    }

    fn on_batch_durable(&mut self, batch: Batch) {
        self.durable_through = batch.number;
        for (slot, watermark) in batch.watermarks {
            let durable = self.durable_watermarks.entry(slot).or_default();
            *durable = (*durable).max(watermark);
        }
        self.events.extend(batch.tickets.into_iter().map(DiskEvent::Stable));
        if !batch.frees.is_empty() {
            self.freed.push_back((batch.number, batch.frees));
        }
        // A durable batch vouches for all up to its `durable_through`: their frees hold for good.
        while self.freed.front().is_some_and(|(number, _)| *number <= batch.durable_through) {
            let (_, addresses) = self.freed.pop_front().expect("just seen");
            self.unpinned.push_back((self.next_pin, addresses));
            self.next_pin += 1;
        }
        self.reuse_unpinned();
        if self.recovery.is_some() && batch.number == self.last_issued.number {
            self.opened();
        }
        self.commit_checkpoint_if_durable();
    }

    pub(super) fn opened(&mut self) {
        self.recovery = None;
        self.events.push_back(DiskEvent::Opened);
        self.mark_journal();
        // Before anything is staged: a disk that was stopped while a checkpoint was on its way has little
        // room in its journal, and what is staged first would have to fit into it.
        self.begin_checkpoint_if_due();
    }

    fn reuse_unpinned(&mut self) {
        let oldest = self.pins.first().copied().unwrap_or(u64::MAX);
        while self.unpinned.front().is_some_and(|(stamp, _)| *stamp < oldest) {
            let (_, addresses) = self.unpinned.pop_front().expect("just seen");
            for address in addresses {
                self.allocator.reuse(address);
            }
        }
    }

    // --------------------------------------------------------------------------------------------
    // Checkpoint.

    fn begin_checkpoint_if_due(&mut self) {
        let long = self.journal_staged() > self.ring() / 2;
        if self.checkpoint.is_none() && (long || self.dirty.len() > DIRTY_MAX) {
            self.begin_checkpoint();
        }
    }

    /// Takes down what memory is now: all that is staged, so the open batch ends here.
    fn begin_checkpoint(&mut self) {
        self.close_batch();
        let mut changes = Vec::with_capacity(self.dirty.len() * 2 + 64);
        let mut keys = Vec::with_capacity(self.dirty.len());
        for key in std::mem::take(&mut self.dirty) {
            let cached = self.cache.get_mut(&key).expect("dirty entries are in memory");
            cached.clean = Cleanness::Saving;
            let exists = !cached.entry.is_absent();
            keys.push((key, exists));
            changes.push((Table::Heads, keys::head(key), exists.then(|| cached.entry.encode_head().into())));
            for (lineage, epoch) in std::mem::take(&mut cached.stale_rows) {
                changes.push((Table::Rows, keys::row(key, lineage, epoch), None));
            }
            for (lineage, epoch) in std::mem::take(&mut cached.new_rows) {
                if let Some(row) = cached.entry.row(lineage, epoch) {
                    changes.push((Table::Rows, keys::row(key, lineage, epoch), Some(row.encode().into())));
                }
            }
        }
        for (chunk, bits) in self.allocator.take_dirty() {
            changes.push((Table::Free, keys::chunk(chunk), bits));
        }
        self.save_changes(&mut changes);
        for key in std::mem::take(&mut self.dirty_meta) {
            let value = self.meta.get(&key).cloned();
            changes.push((Table::Meta, keys::meta(&key), value));
        }
        for family in std::mem::take(&mut self.dirty_splits) {
            let (from, to) = self.splits[&family];
            let (key, value) = keys::split(family, from, to);
            changes.push((Table::Meta, key, Some(value)));
        }
        let watermarks: Vec<(SlotId, Version)> = self.watermarks.iter().map(|(s, w)| (*s, *w)).collect();
        for (slot, watermark) in &watermarks {
            let floor = self.floors.get(slot).copied().unwrap_or_default();
            changes.push((Table::Meta, keys::watermark(*slot), Some(keys::versions(*watermark, floor))));
        }
        let number = self.last_issued.number + self.closed.len() as u64;
        self.checkpoint = Some(Checkpoint {
            number,
            position: self.closed.is_empty().then_some(self.last_issued),
            used: self.journal_staged(),
            elements: self.elements,
            rows: self.rows,
            generation: self.meta_generation,
            changes,
            keys,
            watermarks,
            issued: false,
        });
        self.commit_checkpoint_if_durable();
    }

    /// The change index is small while all replicas are there: the difference to what is saved is found
    /// by comparing.
    fn save_changes(&mut self, out: &mut Vec<(Table, Bytes, Option<Bytes>)>) {
        let now: BTreeSet<(SlotId, Version, ElementKey)> = self
            .changes
            .iter()
            .flat_map(|(slot, index)| index.iter().map(|(version, element)| (*slot, *version, *element)))
            .collect();
        for (slot, version, element) in self.saved_changes.difference(&now) {
            out.push((Table::Changes, keys::change(*slot, *version, *element), None));
        }
        for (slot, version, element) in now.difference(&self.saved_changes) {
            out.push((Table::Changes, keys::change(*slot, *version, *element), Some(Bytes::new())));
        }
        self.saved_changes = now;
    }

    /// Entries may be saved only when the batches that made them are durable: else the PMap store would
    /// know data that a crash can still take away.
    fn commit_checkpoint_if_durable(&mut self) {
        let Some(checkpoint) = &mut self.checkpoint else { return };
        let Some(position) = checkpoint.position else { return };
        if checkpoint.issued || self.durable_through < checkpoint.number {
            return;
        }
        checkpoint.issued = true;
        let mut changes = std::mem::take(&mut checkpoint.changes);
        let Checkpoint { elements, rows, generation, .. } = *checkpoint;
        let reached = recovery::Reached { position, elements, rows, generation };
        changes.push((Table::Meta, keys::reached(), Some(reached.encode())));
        self.issue(Pending::Commit, DiskCommand::PmapCommit { changes });
    }

    fn on_committed(&mut self) {
        let checkpoint = self.checkpoint.take().expect("a commit belongs to a checkpoint");
        self.tail = checkpoint.position.expect("known before the commit");
        for (slot, watermark) in checkpoint.watermarks {
            let durable = self.durable_watermarks.entry(slot).or_default();
            *durable = (*durable).max(watermark);
        }
        for (key, exists) in checkpoint.keys {
            let cached = self.cache.get_mut(&key).expect("an entry that is being saved is in memory");
            if cached.clean == Cleanness::Saving {
                cached.clean = Cleanness::Clean;
            }
            // What was saved as gone and made again meanwhile is fresh still.
            if exists {
                self.fresh.remove(&key);
            }
        }
        if self.recovery.is_some() {
            self.issue_open_record();
        } else {
            self.begin_checkpoint_if_due();
        }
    }

    // --------------------------------------------------------------------------------------------
    // Reads.

    /// Captures the addresses of blocks now and reads them; `(block number for errors, address, sum)`.
    pub fn read(&mut self, read: ReadId, blocks: &[(u8, Address, BlockSum)]) {
        let sums = blocks.iter().map(|(_, _, sum)| *sum).collect();
        let mut pieces: Vec<(Address, Piece)> = Vec::new();
        for (number, address, sum) in blocks {
            let BlockSum::Crc(crc) = sum else { continue };
            match pieces.last_mut() {
                Some((start, piece)) if *start + piece.blocks.len() as u64 == *address => {
                    piece.blocks.push((*number, *crc));
                }
                _ => pieces
                    .push((*address, Piece { blocks: SmallVec::from_slice(&[(*number, *crc)]), bytes: Bytes::new() })),
            }
        }
        if pieces.is_empty() {
            let result = Ok(ReadBlocks { sums, data: Vec::new() });
            return self.events.push_back(DiskEvent::Read { read, result });
        }
        let pin = self.next_pin;
        self.next_pin += 1;
        self.pins.insert(pin);
        let data_start = self.superblock.layout.data.offset;
        for (i, (address, piece)) in pieces.iter().enumerate() {
            let offset = data_start + address * BLOCK_SIZE;
            let length = piece.blocks.len() as u64 * BLOCK_SIZE;
            self.issue(Pending::Read { read, piece: i }, DiskCommand::Read { offset, length });
        }
        let waits = pieces.len();
        let pieces = pieces.into_iter().map(|(_, piece)| piece).collect();
        self.reads.insert(read, ReadJob { sums, pieces, waits, error: None, pin });
    }

    fn on_read(&mut self, read: ReadId, piece: usize, result: Result<Bytes, DiskError>) {
        let job = self.reads.get_mut(&read).expect("a piece belongs to a read");
        let piece = &mut job.pieces[piece];
        match result {
            Err(error) => job.error = Some(ReadError::Disk(error)),
            Ok(bytes) => {
                let good = bytes.len() == piece.blocks.len() * BLOCK_SIZE as usize;
                let bad =
                    piece.blocks.iter().zip(bytes.chunks(BLOCK_SIZE as usize)).find(|((_, crc), b)| crc32c(b) != *crc);
                match bad {
                    None if good => piece.bytes = bytes,
                    _ => {
                        let block = bad.map_or(piece.blocks[0].0, |((number, _), _)| *number);
                        job.error = Some(ReadError::BadBlock(block));
                    }
                }
            }
        }
        job.waits -= 1;
        if job.waits > 0 {
            return;
        }
        let job = self.reads.remove(&read).expect("just seen");
        self.pins.remove(&job.pin);
        self.reuse_unpinned();
        let result = match job.error {
            Some(error) => {
                self.bad_blocks += 1;
                Err(error)
            }
            None => Ok(ReadBlocks { sums: job.sums, data: job.pieces.into_iter().map(|p| p.bytes).collect() }),
        };
        self.events.push_back(DiskEvent::Read { read, result });
    }

    // --------------------------------------------------------------------------------------------
    // Results.

    pub fn on_result(&mut self, op: OpId, result: DiskResult) {
        if self.recovery.is_some() && !self.pending.contains_key(&op) {
            return self.on_recovery_result(op, result);
        }
        let Some(pending) = self.pending.remove(&op) else { return };
        if self.failed.is_some() && !matches!(pending, Pending::Read { .. } | Pending::Scan(_)) {
            return; // Nothing more is acknowledged.
        }
        match (pending, result) {
            (Pending::Batch { number, .. }, DiskResult::Written(Ok(()))) => self.on_batch_written(number),
            (Pending::Batch { number, offset, pieces, again: false }, DiskResult::Written(Err(_))) => {
                // The same batch again, at the same place; never on past a hole.
                let pending = Pending::Batch { number, offset, pieces: pieces.clone(), again: true };
                self.issue(pending, DiskCommand::Write { offset, pieces });
            }
            (Pending::Batch { .. }, DiskResult::Written(Err(error))) => {
                self.fail(format!("a write failed twice: {error}"));
            }
            (Pending::Read { read, piece }, DiskResult::Read(result)) => self.on_read(read, piece, result),
            (Pending::Head(element), DiskResult::PmapValue(Ok(value))) => self.on_head(element, value),
            (Pending::Rows(element), DiskResult::PmapRange(Ok(rows))) => self.on_rows(element, rows),
            (Pending::Scan(scan), DiskResult::PmapRange(result)) => self.on_scanned(scan, result),
            (Pending::Commit, DiskResult::PmapCommitted(Ok(()))) => self.on_committed(),
            (Pending::Extend { to, hurry }, DiskResult::Extended(result)) => self.on_extended(to, hurry, result),
            (Pending::Label { offset, piece, again }, DiskResult::Written(result)) => {
                self.on_labelled(offset, piece, again, result);
            }
            (
                Pending::Head(_) | Pending::Rows(_),
                DiskResult::PmapValue(Err(error)) | DiskResult::PmapRange(Err(error)),
            ) => self.fail(format!("an entry cannot be read: {error}")),
            (Pending::Commit, DiskResult::PmapCommitted(Err(error))) => {
                self.fail(format!("a checkpoint cannot be written: {error}"));
            }
            (pending, result) => unreachable!("{result:?} does not answer {pending:?}"),
        }
    }

    pub fn check_invariants(&self) {
        assert!(self.batches.len() <= BATCHES_IN_FLIGHT_MAX, "batches on their way are bounded");
        assert!(self.durable_through <= self.last_issued.number);
        assert!(self.tail.number <= self.last_issued.number);
    }
}

#[cfg(test)]
impl Disk {
    /// Number and last ticket of each batch on its way.
    pub fn tickets_on_their_way(&self) -> impl Iterator<Item = (u64, Ticket)> + '_ {
        self.batches.iter().map(|b| (b.number, b.tickets.last().copied().unwrap_or_default()))
    }

    /// True if the journal has no room for what is staged.
    pub fn is_blocked(&self) -> bool {
        self.batches.len() < BATCHES_IN_FLIGHT_MAX && !(self.open.is_empty() && self.closed.is_empty())
    }
}

impl OpenBatch {
    fn is_empty(&self) -> bool {
        self.records.is_empty()
    }
}

/// Neighbouring blocks become one write.
fn coalesce(mut data: Vec<(Address, Bytes)>) -> Vec<(Address, Vec<Bytes>)> {
    // Staged in the order in which addresses were handed out, so mostly in order already.
    data.sort_by_key(|(address, _)| *address);
    let mut runs: Vec<(Address, Vec<Bytes>)> = Vec::new();
    for (address, bytes) in data {
        match runs.last_mut() {
            Some((start, pieces)) if *start + pieces.len() as u64 == address => pieces.push(bytes),
            _ => runs.push((address, vec![bytes])),
        }
    }
    runs
}
