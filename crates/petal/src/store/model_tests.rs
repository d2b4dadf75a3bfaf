//! The store against a plain map, through crashes (I8, I9).
//!
//! A seeded walk stages changes, reads, scans and crashes at any point, on a pretended disk that keeps
//! the promises of [`DiskCommand`] and not one more: what was answered is durable; at a crash an
//! unanswered write is kept, lost or torn in any subset of its sectors; unanswered commits of the PMap
//! store are applied up to any one of them. After each start the elements of each disk must be what
//! they were after *some* prefix of the changes staged there, and none that was told stable is missing.
//!
//! The same walk with a rule left out (`Sabotage`) must complain: else the walk proves nothing.
//!
//! `PETAL_STORE_SEEDS=n` runs n seeds of each kind; `PETAL_STORE_SEED=n` one, with its options told.

use super::superblock::Superblock;
use super::*;
use crate::global_state::{Genesis, GenesisServer};
use crate::sabotage::Sabotage;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Once, OnceLock};
use stdx::Prng;
use stdx::checksum::crc32c;
use stdx::units::MIB;

const SECTOR: usize = 512;
const PAGE: usize = 4096;
/// Few contents, so that the same bytes come back at the same place.
const CONTENTS: usize = 5;

type Verdict = Result<(), String>;

macro_rules! ensure {
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err(format!($($why)+));
        }
    };
}

fn contents() -> &'static [(Bytes, u32)] {
    static CONTENT: OnceLock<Vec<(Bytes, u32)>> = OnceLock::new();
    CONTENT.get_or_init(|| {
        let block = |seed| {
            let mut prng = Prng::new(seed as u64 + 1);
            let bytes: Vec<u8> = (0..PAGE / 8).flat_map(|_| prng.next_u64().to_le_bytes()).collect();
            let crc = crc32c(&bytes);
            (Bytes::from(bytes), crc)
        };
        (0..CONTENTS).map(block).collect()
    })
}

// ------------------------------------------------------------------------------------------------
// The disk.

#[derive(Debug, Default)]
struct SimDisk {
    pages: FastMap<u64, Box<[u8; PAGE]>>,
    tables: [BTreeMap<Bytes, Bytes>; 5],
    frontier: u64,
    pending: BTreeMap<OpId, DiskCommand>,
    commits: u64,
    /// Pages that cannot be read until they are written.
    unreadable: BTreeSet<u64>,
    /// The file system under the file has room up to here.
    host_end: Option<u64>,
    /// How the file was to grow: by how much, in a hurry or not, and whether it did.
    steps: Vec<(u64, bool, bool)>,
}

/// What becomes of unanswered writes.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Kept,
    Lost,
    EachForItself,
}

impl SimDisk {
    fn read(&self, offset: u64, length: u64) -> Vec<u8> {
        assert!(offset.is_multiple_of(PAGE as u64) && length.is_multiple_of(PAGE as u64) && length > 0);
        let pages = (offset / PAGE as u64)..((offset + length) / PAGE as u64);
        pages.flat_map(|page| self.pages.get(&page).map_or([0; PAGE], |p| **p)).collect()
    }

    fn write(&mut self, offset: u64, bytes: &[u8], mut keeps: impl FnMut() -> bool) {
        assert!(offset.is_multiple_of(PAGE as u64) && bytes.len().is_multiple_of(PAGE) && !bytes.is_empty());
        for (i, sector) in bytes.chunks(SECTOR).enumerate() {
            if keeps() {
                let at = offset as usize + i * SECTOR;
                let page = self.pages.get_or_insert_with((at / PAGE) as u64, || Box::new([0; PAGE]));
                page[at % PAGE..at % PAGE + SECTOR].copy_from_slice(sector);
                self.unreadable.remove(&((at / PAGE) as u64));
            }
        }
    }

    fn commit(&mut self, changes: Vec<(Table, Bytes, Option<Bytes>)>) {
        self.commits += 1;
        for (table, key, value) in changes {
            match value {
                Some(value) => self.tables[table as usize].insert(key, value),
                None => self.tables[table as usize].remove(&key),
            };
        }
    }

    fn carry_out(&mut self, command: DiskCommand) -> DiskResult {
        match command {
            DiskCommand::Read { offset, length }
                if self.unreadable.range(offset / PAGE as u64..(offset + length) / PAGE as u64).next().is_some() =>
            {
                DiskResult::Read(Err(DiskError::Io("unreadable".into())))
            }
            DiskCommand::Read { offset, length } => DiskResult::Read(Ok(self.read(offset, length).into())),
            DiskCommand::Write { offset, pieces } => {
                self.write(offset, &pieces.concat(), || true);
                DiskResult::Written(Ok(()))
            }
            DiskCommand::Extend { to, hurry } => {
                let fits = self.host_end.is_none_or(|end| to <= end);
                self.steps.push((to - self.frontier.min(to), hurry, fits));
                if !fits {
                    return DiskResult::Extended(Err(DiskError::HostFull("no room".into())));
                }
                self.frontier = self.frontier.max(to);
                DiskResult::Extended(Ok(()))
            }
            DiskCommand::PmapGet { table, key } => {
                DiskResult::PmapValue(Ok(self.tables[table as usize].get(&key).cloned()))
            }
            DiskCommand::PmapRange { table, from, to, limit } => {
                let range = self.tables[table as usize].range(from..to).take(limit);
                DiskResult::PmapRange(Ok(range.map(|(k, v)| (k.clone(), v.clone())).collect()))
            }
            DiskCommand::PmapCommit { changes } => {
                self.commit(changes);
                DiskResult::PmapCommitted(Ok(()))
            }
        }
    }

    /// An error; the bytes may be there or not.
    fn fail(&mut self, command: DiskCommand, prng: &mut Prng) -> DiskResult {
        let error = DiskError::Io("injected".into());
        match command {
            DiskCommand::Read { .. } => DiskResult::Read(Err(error)),
            DiskCommand::Write { offset, pieces } => {
                self.write(offset, &pieces.concat(), || prng.chance(1, 2));
                DiskResult::Written(Err(error))
            }
            DiskCommand::Extend { .. } => DiskResult::Extended(Err(DiskError::HostFull("injected".into()))),
            DiskCommand::PmapGet { .. } => DiskResult::PmapValue(Err(error)),
            DiskCommand::PmapRange { .. } => DiskResult::PmapRange(Err(error)),
            DiskCommand::PmapCommit { changes } => {
                if prng.chance(1, 2) {
                    self.commit(changes);
                }
                DiskResult::PmapCommitted(Err(error))
            }
        }
    }

    /// The next command to be answered: any, but those of the PMap store in order.
    fn choose(&mut self, prng: &mut Prng) -> Option<(OpId, DiskCommand)> {
        if self.pending.is_empty() {
            return None;
        }
        let is_pmap = |c: &DiskCommand| {
            matches!(c, DiskCommand::PmapGet { .. } | DiskCommand::PmapRange { .. } | DiskCommand::PmapCommit { .. })
        };
        let (op, command) = self.pending.iter().nth(prng.below(self.pending.len() as u64) as usize)?;
        let op = match is_pmap(command) {
            true => *self.pending.iter().find(|(_, c)| is_pmap(c))?.0,
            false => *op,
        };
        Some((op, self.pending.remove(&op)?))
    }

    fn crash(&mut self, fate: Fate, prng: &mut Prng) {
        let mut commits = true;
        for (_, command) in std::mem::take(&mut self.pending) {
            let kept = match fate {
                Fate::Kept => 0,
                Fate::Lost => 1,
                Fate::EachForItself => prng.below(3),
            };
            match command {
                DiskCommand::Write { offset, pieces } => {
                    self.write(offset, &pieces.concat(), || kept == 0 || (kept == 2 && prng.chance(1, 2)));
                }
                DiskCommand::PmapCommit { changes } => {
                    commits &= kept == 0 || (kept == 2 && prng.chance(1, 2));
                    if commits {
                        self.commit(changes);
                    }
                }
                DiskCommand::Extend { to, .. } if kept == 0 => self.frontier = self.frontier.max(to),
                _ => {}
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------
// The model.

type Rows = BTreeMap<(LineageId, Epoch), [BlockSum; BLOCKS_PER_ELEMENT]>;

#[derive(Clone, PartialEq, Eq, Debug)]
struct Element {
    slot: SlotId,
    version: Version,
    ids: BTreeSet<RequestId>,
    rows: Rows,
}

impl Element {
    fn image(&self) -> ElementImage {
        let row = |((lineage, epoch), sums): (&(LineageId, Epoch), &[BlockSum; 16])| RowImage {
            lineage: *lineage,
            epoch: *epoch,
            sums: *sums,
        };
        ElementImage {
            version: self.version,
            ids: self.ids.iter().copied().collect(),
            rows: self.rows.iter().map(row).collect(),
        }
    }

    fn seen(&self, view: &[(LineageId, Epoch)]) -> Option<[BlockSum; BLOCKS_PER_ELEMENT]> {
        view.iter().find_map(|(l, e)| self.rows.range((*l, Epoch(0))..=(*l, *e)).next_back().map(|(_, sums)| *sums))
    }
}

/// What one disk has; or, where there are two, all metadata.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct State {
    elements: BTreeMap<ElementKey, Element>,
    meta: BTreeMap<Bytes, Bytes>,
}

#[derive(Clone, Debug)]
enum Step {
    Element(ElementKey, Option<Element>),
    Meta(Bytes, Option<Bytes>),
}

impl State {
    fn take(&mut self, step: &Step) {
        match step.clone() {
            Step::Element(key, Some(element)) => drop(self.elements.insert(key, element)),
            Step::Element(key, None) => drop(self.elements.remove(&key)),
            Step::Meta(key, Some(value)) => drop(self.meta.insert(key, value)),
            Step::Meta(key, None) => drop(self.meta.remove(&key)),
        }
    }
}

/// The changes staged in this life, in order.
#[derive(Debug, Default)]
struct Log {
    base: State,
    steps: Vec<Step>,
    now: State,
    /// So many of `steps` were told stable.
    stable: usize,
    waits: VecDeque<(Ticket, usize)>,
    /// So many of the steps of the life before were there at the start.
    matched: usize,
    /// Steps that are in the journal up to and with a batch.
    batches: BTreeMap<u64, usize>,
}

#[derive(Clone, Debug)]
struct Options {
    disks: usize,
    journal: u64,
    blocks: u64,
    frontier: u64,
    cache: usize,
    elements: u64,
    steps: u64,
    /// One in so many steps; 0 = never.
    crash: u64,
    error: u64,
    answers: u64,
    flushes: u64,
    sabotage: Sabotage,
}

impl Options {
    fn draw(prng: &mut Prng, disks: usize, sabotage: Sabotage) -> Options {
        let blocks = prng.between(90, 400);
        Options {
            disks,
            journal: *prng.pick(&[64 << 10, 64 << 10, 128 << 10, 256 << 10, MIB]),
            blocks,
            frontier: if prng.chance(1, 4) { prng.below(blocks) } else { blocks },
            cache: *prng.pick(&[1, 3, 8, 1000]),
            elements: prng.between(1, 12),
            steps: prng.between(50, 1200),
            crash: *prng.pick(&[0, 15, 30, 100, 300]),
            error: if prng.chance(1, 4) { prng.between(50, 500) } else { 0 },
            answers: prng.between(1, 6),
            flushes: prng.between(1, 5),
            sabotage,
        }
    }
}

#[derive(Default, Debug, Clone, Copy)]
struct Coverage {
    crashes: u64,
    replays: u64,
    cut: u64,
    commits: u64,
    laps: u64,
    no_space: u64,
    reads: u64,
    scans: u64,
    failures: u64,
    journal_full: u64,
    stable: u64,
    ghosts: u64,
    reclaimed: u64,
}

struct Scan {
    from: ElementKey,
    end: Option<ElementKey>,
    limit: usize,
    before: BTreeMap<ElementKey, Version>,
    changed: BTreeSet<ElementKey>,
}

struct Walk {
    prng: Prng,
    options: Options,
    disks: Vec<SimDisk>,
    stores: Stores,
    lives: u64,
    /// One per disk, and one more for metadata if there are several.
    logs: Vec<Log>,
    sequences: BTreeMap<SlotId, Version>,
    terms: u64,
    request: u64,
    /// Highest watermark ever handed in, and the highest seen durable.
    handed: BTreeMap<SlotId, Version>,
    durable: BTreeMap<SlotId, Version>,
    floors: BTreeMap<SlotId, Version>,
    watermark_tickets: BTreeMap<Ticket, (SlotId, Version)>,
    reads: BTreeMap<ReadId, Vec<BlockSum>>,
    scans: BTreeMap<ReadId, Scan>,
    opened: bool,
    failed: Option<String>,
    errors_told: u64,
    /// The batch before the record of the last start.
    /// A family that got slots of its own.
    gone: Option<FamilyId>,
    opened_at: u64,
    coverage: Coverage,
}

fn slot(n: u64) -> SlotId {
    SlotId { gmap: GmapId(1 + n % 2), slot: n as u32 }
}

impl Walk {
    fn new(seed: u64, disks: usize, sabotage: Sabotage) -> Walk {
        let mut prng = Prng::new(seed);
        let options = Options::draw(&mut prng, disks, sabotage);
        Walk::with(prng, options)
    }

    fn with(prng: Prng, options: Options) -> Walk {
        let journal = layout::Region { offset: MIB, length: options.journal };
        let pmap = layout::Region { offset: journal.end(), length: MIB };
        let data = layout::Region { offset: pmap.end(), length: options.blocks * BLOCK_SIZE };
        let layout = layout::Layout { size: data.end(), journal, pmap, data };
        let ids: Vec<DiskId> = (0..options.disks).map(|d| DiskId(d as u128 + 1)).collect();
        let server = GenesisServer { server: ServerId(1), addresses: vec!["a:1".into()] };
        let genesis = Genesis { cluster: ClusterId(1), name: "test".into(), ring: vec![server] };
        let disk = |id: &DiskId| {
            let mut disk = SimDisk { frontier: data.offset + options.frontier * BLOCK_SIZE, ..SimDisk::default() };
            for generation in 0..2 {
                let superblock = Superblock {
                    generation,
                    genesis: genesis.clone(),
                    server: ServerId(1),
                    incarnation: Incarnation(0),
                    disk: *id,
                    disks: ids.clone(),
                    layout,
                    votes_from: 0,
                    journal_mark: 0,
                    taken: Incarnation(0),
                    open: Vec::new(),
                };
                disk.write(Superblock::copy_offset(generation), &superblock.encode(), || true);
            }
            disk
        };
        let logs = if options.disks == 1 { 1 } else { options.disks + 1 };
        Walk {
            prng,
            disks: ids.iter().map(disk).collect(),
            stores: Stores::open(Vec::new(), Incarnation(0), StoreConfig::default()),
            lives: 0,
            logs: (0..logs).map(|_| Log::default()).collect(),
            options,
            sequences: BTreeMap::new(),
            terms: 0,
            request: 0,
            handed: BTreeMap::new(),
            durable: BTreeMap::new(),
            floors: BTreeMap::new(),
            watermark_tickets: BTreeMap::new(),
            reads: BTreeMap::new(),
            scans: BTreeMap::new(),
            opened: false,
            failed: None,
            errors_told: 0,
            opened_at: 0,
            gone: None,
            coverage: Coverage::default(),
        }
    }

    // ---- driving

    fn pump(&mut self) -> Verdict {
        loop {
            while let Some((disk, op, command)) = self.stores.poll_command() {
                self.disks[disk].pending.insert(op, command);
            }
            let Some(event) = self.stores.poll_event() else { return Ok(()) };
            self.on_event(event)?;
        }
    }

    fn answer(&mut self, disk: usize) -> Result<bool, String> {
        let Some((op, command)) = self.disks[disk].choose(&mut self.prng) else { return Ok(false) };
        let fails = self.options.error > 0 && self.prng.chance(1, self.options.error);
        self.errors_told += u64::from(fails);
        let result = match fails {
            true => self.disks[disk].fail(command, &mut self.prng),
            false => self.disks[disk].carry_out(command),
        };
        self.stores.on_disk(disk, op, result);
        self.pump()?;
        Ok(true)
    }

    fn answer_any(&mut self) -> Result<bool, String> {
        let first = self.prng.below(self.disks.len() as u64) as usize;
        for d in 0..self.disks.len() {
            if self.answer((first + d) % self.disks.len())? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn flush(&mut self) -> Verdict {
        let before: Vec<u64> = self.stores.disks.iter().map(|d| d.last_issued.next).collect();
        self.stores.flush();
        self.note_batches();
        for (disk, before) in self.stores.disks.iter().zip(before) {
            self.coverage.laps += u64::from(disk.last_issued.next < before);
            self.coverage.journal_full += u64::from(disk.is_blocked());
        }
        self.pump()
    }

    /// Which steps are in the journal up to which batch.
    fn note_batches(&mut self) {
        for (log, disk) in self.logs.iter_mut().zip(&self.stores.disks) {
            for (number, last) in disk.tickets_on_their_way() {
                let last = log.waits.iter().rev().find(|(ticket, _)| *ticket <= last);
                log.batches.insert(number, last.map_or(log.stable, |(_, step)| step + 1));
            }
        }
    }

    fn quiet(&mut self) -> Verdict {
        loop {
            self.flush()?;
            if !self.answer_any()? {
                return Ok(());
            }
        }
    }

    fn on_event(&mut self, event: Event) -> Verdict {
        match event {
            Event::Opened => self.opened = true,
            Event::LifeTakenBack => return Err("nobody took a life back".into()),
            Event::DiskFailed { reason, .. } => self.failed = Some(reason),
            Event::Loaded(element) => {
                ensure!(self.stores.load(element) == Loaded::Ready, "{element:?} is told loaded, and is not");
            }
            Event::Stable(ticket) => {
                self.coverage.stable += 1;
                if let Some((slot, watermark)) = self.watermark_tickets.remove(&ticket) {
                    ensure!(
                        self.stores.durable_watermark(slot) >= watermark,
                        "a watermark is told stable and is not: {slot:?} {watermark:?}"
                    );
                    return Ok(());
                }
                let found = self.logs.iter_mut().find(|log| log.waits.iter().any(|(t, _)| *t == ticket));
                let Some(log) = found else { return Err(format!("ticket {ticket} is stable, and nobody waits")) };
                let (first, step) = log.waits.pop_front().expect("just seen");
                ensure!(first == ticket, "ticket {ticket} is told before {first}");
                log.stable = step + 1;
            }
            Event::Read { read, result } => {
                let Some(expected) = self.reads.remove(&read) else { return Err("a read is told twice".into()) };
                self.coverage.reads += 1;
                match result {
                    Ok(blocks) => check_read(&expected, &blocks)?,
                    Err(ReadError::Disk(DiskError::Io(_))) if self.errors_told > 0 => {}
                    Err(error) => return Err(format!("a stable block cannot be read: {error:?}")),
                }
            }
            Event::Scanned { scan, elements } => {
                let scan = self.scans.remove(&scan).ok_or("a scan is told twice")?;
                match elements {
                    Ok(elements) => self.check_scan(&scan, &elements)?,
                    Err(DiskError::Io(_)) if self.errors_told > 0 => {}
                    Err(error) => return Err(format!("a scan failed: {error:?}")),
                }
            }
        }
        Ok(())
    }

    fn check_scan(&mut self, scan: &Scan, got: &[(ElementKey, Version)]) -> Verdict {
        self.coverage.scans += 1;
        ensure!(got.len() <= scan.limit && got.is_sorted_by_key(|(key, _)| *key), "a scan out of order: {got:?}");
        let last = got.last().map(|(key, _)| *key).filter(|_| got.len() == scan.limit);
        let in_range = |key: &ElementKey| {
            *key >= scan.from && scan.end.is_none_or(|e| *key < e) && last.is_none_or(|last| *key <= last)
        };
        let known = |key: &ElementKey| in_range(key) && !scan.changed.contains(key);
        let expected: Vec<_> = scan.before.iter().filter(|(key, _)| known(key)).map(|(k, v)| (*k, *v)).collect();
        let got: Vec<_> = got.iter().filter(|(key, _)| known(key)).copied().collect();
        ensure!(expected == got, "a scan found {got:?} instead of {expected:?}");
        Ok(())
    }

    // ---- life and death

    /// Starts, with crashes on the way, until it is open; then compares everything.
    fn start(&mut self) -> Verdict {
        loop {
            self.lives += 1;
            (self.opened, self.failed) = (false, None);
            let open = |(d, disk): (usize, &SimDisk)| {
                let [a, b] = [0, 1].map(|g| disk.read(Superblock::copy_offset(g), PAGE as u64));
                let superblock = Superblock::choose(&a, &b).map_err(|e| format!("superblock of disk {d}: {e}"))?;
                Ok(OpenDisk { path: format!("disk{d}"), superblock, frontier: disk.frontier })
            };
            let disks: Result<Vec<_>, String> = self.disks.iter().enumerate().map(open).collect();
            let config = StoreConfig { cache_elements: self.options.cache, sabotage: self.options.sabotage };
            self.stores = Stores::open(disks?, Incarnation(self.lives), config);
            let dies = self.options.crash > 0 && self.prng.chance(1, 3);
            let mut left = if dies { self.prng.below(60) } else { u64::MAX };
            self.pump()?;
            while !self.opened && self.failed.is_none() && left > 0 {
                left -= 1;
                ensure!(self.answer_any()?, "the start hangs");
            }
            if self.opened {
                ensure!(
                    self.stores.is_ready_for(0) || self.options.frontier < self.options.blocks,
                    "open and not ready"
                );
                self.note_batches();
                self.opened_at = self.stores.disks[0].durable_through.saturating_sub(1);
                return self.observe();
            }
            if let Some(why) = &self.failed
                && self.options.error == 0
            {
                return Err(format!("a sound disk is refused: {why}"));
            }
            self.die();
        }
    }

    fn die(&mut self) {
        self.coverage.crashes += 1;
        let fate = *self.prng.pick(&[Fate::Kept, Fate::Lost, Fate::EachForItself, Fate::EachForItself]);
        for disk in &mut self.disks {
            disk.crash(fate, &mut self.prng);
        }
        self.reads.clear();
        self.scans.clear();
        self.watermark_tickets.clear();
        for log in &mut self.logs {
            log.waits.clear();
        }
    }

    fn ready(&mut self, element: ElementKey) -> Verdict {
        while self.stores.load(element) == Loaded::Pending {
            self.pump()?;
            ensure!(self.failed.is_some() || self.answer_any()?, "{element:?} is never loaded");
            if let Some(why) = &self.failed {
                return Err(format!("disk failed: {why}"));
            }
        }
        Ok(())
    }

    /// After a start: what is there must be some prefix of what was staged.
    fn observe(&mut self) -> Verdict {
        let errors = std::mem::take(&mut self.options.error);
        let result = self.observe_soundly();
        self.options.error = errors;
        result
    }

    fn observe_soundly(&mut self) -> Verdict {
        let mut found: Vec<BTreeMap<ElementKey, ElementImage>> = vec![BTreeMap::new(); self.disks.len()];
        let mut all = BTreeSet::new();
        let mut after = None;
        loop {
            let scan = self.stores.scan_all(after, 4);
            let elements = self.wait_for_scan(scan)?;
            all.extend(elements.iter().map(|(key, _)| *key));
            for (key, version) in &elements {
                self.ready(*key)?;
                let home = self.stores.home(*key).ok_or(format!("{key:?} is scanned and does not exist"))?;
                let homes = self.stores.disks.iter().filter(|d| d.entry(*key).is_some()).count();
                ensure!(homes == 1, "{key:?} is on {homes} disks");
                let image = self.stores.image(*key);
                ensure!(image.version == *version, "scan and entry differ");
                found[home].insert(*key, image);
            }
            match elements.last() {
                Some((last, _)) if elements.len() == 4 => after = Some(*last),
                _ => break,
            }
        }
        let disks = self.disks.len();
        let meta: BTreeMap<Bytes, Bytes> = self.stores.meta_prefix(b"").into_iter().collect();
        found.resize(self.logs.len(), BTreeMap::new());
        for (l, elements) in found.iter().enumerate() {
            let has_meta = disks == 1 || l == disks;
            let meta = if has_meta { meta.clone() } else { BTreeMap::new() };
            self.match_prefix(l, elements, &meta)?;
        }
        for key in all {
            self.read_everything(key)?;
        }
        for (slot, durable) in &self.durable {
            let now = self.stores.watermark(*slot);
            ensure!(now >= *durable, "the watermark of {slot:?} was {durable:?} and is {now:?} after a start");
            ensure!(now <= self.handed[slot], "the watermark of {slot:?} is ahead of what was handed in");
        }
        self.check_index()?;
        self.stores.check_invariants();
        Ok(())
    }

    fn match_prefix(
        &mut self,
        l: usize,
        elements: &BTreeMap<ElementKey, ElementImage>,
        meta: &BTreeMap<Bytes, Bytes>,
    ) -> Verdict {
        let log = &mut self.logs[l];
        let mut state = log.base.clone();
        let equal = |state: &State| {
            state.meta == *meta
                && state.elements.len() == elements.len()
                && state.elements.iter().zip(elements).all(|((k, e), (key, image))| k == key && e.image() == *image)
        };
        let mut fits = None;
        for n in 0..=log.steps.len() {
            if n > 0 {
                state.take(&log.steps[n - 1]);
            }
            if n >= log.stable && equal(&state) {
                fits = Some((n, state.clone()));
            }
        }
        let Some((n, state)) = fits else {
            return Err(format!(
                "log {l}: {} of {} changes were stable; after the start there is something else: {elements:?} {meta:?}",
                log.stable,
                log.steps.len()
            ));
        };
        self.coverage.replays += u64::from(n > 0);
        self.coverage.cut += u64::from(n < log.steps.len());
        *log = Log { base: state.clone(), now: state, matched: n, ..Log::default() };
        Ok(())
    }

    fn wait_for_scan(&mut self, scan: ReadId) -> Result<Vec<(ElementKey, Version)>, String> {
        loop {
            while let Some((disk, op, command)) = self.stores.poll_command() {
                self.disks[disk].pending.insert(op, command);
            }
            match self.stores.poll_event() {
                Some(Event::Scanned { scan: id, elements }) if id == scan => {
                    return elements.map_err(|e| format!("a scan failed: {e:?}"));
                }
                Some(event) => self.on_event(event)?,
                None => {
                    let d = (0..self.disks.len()).find(|d| !self.disks[*d].pending.is_empty());
                    let d = d.ok_or("a scan is never answered")?;
                    let (op, command) = self.disks[d].choose(&mut self.prng).expect("something is pending");
                    let result = self.disks[d].carry_out(command);
                    self.stores.on_disk(d, op, result);
                }
            }
        }
    }

    fn read_everything(&mut self, key: ElementKey) -> Verdict {
        self.ready(key)?;
        let rows = self.stores.image(key).rows;
        for row in &rows {
            let place = |block| Place { lineage: row.lineage, epoch: row.epoch, block };
            let read = self.stores.read_places(key, &(0..16).map(place).collect::<Vec<_>>());
            self.reads.insert(read, row.sums.to_vec());
        }
        self.pump()?;
        while !self.reads.is_empty() {
            ensure!(self.answer_any()?, "a read is never answered");
        }
        Ok(())
    }

    /// The change index, above its floor, is exactly what the elements say.
    fn check_index(&mut self) -> Verdict {
        for n in 0..3 {
            let slot = slot(n);
            let floor = self.floors.get(&slot).copied().unwrap_or_default();
            let newest = self.sequences.get(&slot).copied().unwrap_or_default();
            let above = Version { term: newest.term, sequence: self.prng.below(newest.sequence + 2) };
            let above = if self.prng.chance(1, 3) { floor } else { above };
            let Some(got) = self.stores.newer(slot, above) else {
                ensure!(above < floor, "the change index of {slot:?} does not reach back to its floor");
                continue;
            };
            let all = self.logs.iter().flat_map(|log| log.now.elements.iter());
            let expected: BTreeSet<ElementKey> = all
                .filter(|(key, e)| e.slot == slot && e.version > above && self.gone != Some(key.family))
                .map(|(key, _)| *key)
                .collect();
            let got: BTreeSet<ElementKey> = got.into_iter().collect();
            ensure!(expected == got, "newer than {above:?} in {slot:?}: {got:?} instead of {expected:?}");
        }
        Ok(())
    }

    /// I8, where nothing is staged or on its way.
    fn audit(&mut self) -> Verdict {
        for (d, disk) in self.disks.iter().enumerate() {
            let rows: Vec<(Bytes, Bytes)> =
                disk.tables[Table::Rows as usize].iter().map(|(k, v)| (k.clone(), v.clone())).collect();
            let complaints = self.stores.audit(d, &rows);
            ensure!(complaints.is_empty(), "disk {d}: {complaints:?}");
            self.stores.disks[d].allocator.check_invariants();
        }
        Ok(())
    }

    // ---- changes

    fn home_log(&self, key: ElementKey) -> Option<usize> {
        self.logs.iter().position(|log| log.now.elements.contains_key(&key))
    }

    fn present(&self, key: ElementKey) -> Option<&Element> {
        self.home_log(key).map(|l| &self.logs[l].now.elements[&key])
    }

    fn any_key(&mut self) -> ElementKey {
        let n = self.prng.below(self.options.elements);
        ElementKey { family: FamilyId(1 + n % 2), element: n / 2 * 3 }
    }

    fn next_version(&mut self, slot: SlotId) -> Version {
        // A term belongs to one slot.
        let fresh = !self.sequences.contains_key(&slot) || self.prng.chance(1, 60);
        self.terms += u64::from(fresh);
        let v = self.sequences.entry(slot).or_default();
        *v = if fresh { Version { term: self.terms, sequence: 2 } } else { Version { sequence: v.sequence + 2, ..*v } };
        *v
    }

    fn next_watermark(&mut self, slot: SlotId) -> Version {
        let newest = self.sequences[&slot];
        let behind = self.prng.below(6);
        Version { term: newest.term, sequence: newest.sequence.saturating_sub(behind) }
    }

    fn log_step(&mut self, l: usize, ticket: Ticket, step: Step) {
        if let Step::Element(key, _) = &step {
            for scan in self.scans.values_mut() {
                scan.changed.insert(*key);
            }
        }
        let log = &mut self.logs[l];
        log.now.take(&step);
        log.waits.push_back((ticket, log.steps.len()));
        log.steps.push(step);
    }

    /// Stages a change to an element; what the model says of it follows, or nothing at all.
    fn stage(&mut self, key: ElementKey, change: Change, becomes: Option<Element>) -> Verdict {
        let before = self.home_log(key);
        let used: Vec<(u64, u64)> =
            self.stores.disks.iter().map(|d| (d.allocator.referenced(), d.allocator.free())).collect();
        if let Change::Write { slot, watermark, .. } | Change::Replace { slot, watermark, .. } = &change {
            let handed = self.handed.entry(*slot).or_default();
            *handed = (*handed).max(*watermark);
        }
        let ghost = self.stores.ghost(key).is_some();
        let wanted = match &change {
            Change::Write { blocks, .. } => blocks.iter().filter(|b| **b != BlockData::Zero).count(),
            Change::Replace { data, .. } => data.len(),
            _ => 0,
        };
        let sure = self.stores.is_ready_for(wanted as u64) && wanted as u64 <= self.stores.free_blocks();
        match self.stores.stage(change) {
            Ok(ticket) => {
                self.coverage.ghosts += u64::from(ghost && before.is_none());
                let home = before.or(self.stores.home(key)).unwrap_or(0);
                self.log_step(home, ticket, Step::Element(key, becomes));
            }
            Err(StageError::NoSpace) => {
                self.coverage.no_space += 1;
                let now: Vec<(u64, u64)> =
                    self.stores.disks.iter().map(|d| (d.allocator.referenced(), d.allocator.free())).collect();
                ensure!(used == now, "a refused change has taken blocks");
                ensure!(!sure, "a change is refused that there is room for");
            }
            Err(StageError::DiskFailed) if self.failed.is_some() => {}
            Err(error) => return Err(format!("a change is refused: {error:?}")),
        }
        let expected = self.present(key).map_or_else(ElementImage::default, Element::image);
        let got = self.stores.image(key);
        ensure!(expected == got, "{key:?} is {got:?} instead of {expected:?}");
        if self.failed.is_none() {
            let rows: u64 = self.logs.iter().flat_map(|l| l.now.elements.values()).map(|e| e.rows.len() as u64).sum();
            ensure!(
                self.stores.rows_stored() == rows,
                "{} rows are counted, and there are {rows}",
                self.stores.rows_stored()
            );
        }
        Ok(())
    }

    fn lineage(&mut self) -> (LineageId, Epoch, Vec<(LineageId, Epoch)>) {
        let (lineage, epoch) = (self.prng.between(1, 2) as u32, self.prng.below(3) as u32);
        let parents = if lineage == 2 { vec![(LineageId(1), Epoch(1))] } else { Vec::new() };
        (LineageId(lineage), Epoch(epoch), parents)
    }

    fn write(&mut self, key: ElementKey) -> Verdict {
        let slot = slot(key.element % 3);
        let version = self.next_version(slot);
        let (lineage, epoch, parents) = self.lineage();
        let first = self.prng.below(16);
        let count = if self.prng.chance(1, 2) { 1 } else { self.prng.between(1, 16 - first) };
        let zeros = self.prng.chance(1, 5);
        let blocks: Vec<BlockData> = (0..count)
            .map(|_| {
                if zeros || self.prng.chance(1, 10) {
                    return BlockData::Zero;
                }
                let (bytes, crc) = self.prng.pick(contents()).clone();
                BlockData::Data { crc, bytes }
            })
            .collect();
        // Writes of clients leave the reserve alone.
        if blocks.len() as u64 > self.stores.free_blocks() && !zeros {
            self.coverage.no_space += 1;
            return Ok(());
        }
        self.request += 1;
        let id = RequestId { session: SessionId(self.prng.below(2)), number: self.request };
        let finished_below = self.request.saturating_sub(self.prng.below(9));
        let mut element = self.present(key).cloned().unwrap_or_else(|| Element {
            slot,
            version: Version::ZERO,
            ids: BTreeSet::new(),
            rows: Rows::new(),
        });
        let view: Vec<_> = std::iter::once((lineage, epoch)).chain(parents.iter().copied()).collect();
        let inherited = element.seen(&view).unwrap_or_default();
        let row = element.rows.entry((lineage, epoch)).or_insert(inherited);
        for (sum, block) in row[first as usize..].iter_mut().zip(&blocks) {
            *sum = match block {
                BlockData::Zero => BlockSum::Zero,
                BlockData::Data { crc, .. } => BlockSum::Crc(*crc),
            };
        }
        element.slot = slot;
        element.version = element.version.max(version);
        element.ids.retain(|i| i.session != id.session || i.number >= finished_below);
        element.ids.insert(id);
        let watermark = self.next_watermark(slot);
        let change = Change::Write {
            element: key,
            slot,
            version,
            lineage,
            epoch,
            parents,
            id: Some(id),
            finished_below,
            ended: Vec::new(),
            first_block: first as u8,
            blocks,
            watermark,
        };
        self.stage(key, change, Some(element))
    }

    fn replace(&mut self, key: ElementKey) -> Verdict {
        let old = self.present(key).cloned();
        let slot = if self.prng.chance(1, 8) { slot(self.prng.below(3)) } else { slot(key.element % 3) };
        let mut version = self.next_version(slot);
        if let Some(old) = &old
            && old.slot == slot
            && old.version.sequence.is_multiple_of(2)
            && self.prng.chance(1, 4)
        {
            version = Version { sequence: old.version.sequence - 1, ..old.version }; // Settled back.
        }
        let mut rows = old.as_ref().map_or_else(Rows::new, |o| o.rows.clone());
        if self.prng.chance(1, 3) {
            rows.retain(|_, _| self.prng.chance(1, 2));
        }
        for _ in 0..self.prng.below(3) {
            let (lineage, epoch, _) = self.lineage();
            let twin = rows.values().next().copied().unwrap_or_default();
            let row = rows.entry((lineage, epoch)).or_insert(twin);
            for sum in row.iter_mut() {
                if self.prng.chance(1, 6) {
                    *sum = BlockSum::Crc(self.prng.pick(contents()).1);
                } else if self.prng.chance(1, 6) {
                    *sum = BlockSum::Zero;
                }
            }
        }
        let ids: BTreeSet<RequestId> =
            (0..self.prng.below(3)).map(|number| RequestId { session: SessionId(9), number }).collect();
        let element = Element { slot, version, ids, rows };
        let image = element.image();
        let mut data = Vec::new();
        let mut needed = 0;
        for (r, row) in image.rows.iter().enumerate() {
            let before = old.as_ref().and_then(|o| o.rows.get(&(row.lineage, row.epoch)));
            for (b, sum) in row.sums.iter().enumerate() {
                let BlockSum::Crc(crc) = sum else { continue };
                let kept = before.is_some_and(|before| before[b] == *sum);
                if !kept || self.prng.chance(1, 8) {
                    let bytes = contents().iter().find(|(_, c)| c == crc).expect("one of ours").0.clone();
                    data.push((r as u16, b as u8, bytes));
                    needed += usize::from(!kept);
                }
            }
        }
        // What an earlier row has at the same place may be told instead of sent.
        let mut twins = Vec::new();
        data.retain(|(r, b, _)| {
            let (row, block) = (usize::from(*r), usize::from(*b));
            let sum = image.rows[row].sums[block];
            let other = (0..row).find(|o| image.rows[*o].sums[block] == sum);
            match other {
                Some(other) if self.prng.chance(1, 2) => {
                    twins.push((*r, *b, other as u16));
                    false
                }
                _ => true,
            }
        });
        let watermark = self.next_watermark(slot);
        if needed > 0 && self.prng.chance(1, 10) {
            let (data, twins) = (Vec::new(), Vec::new());
            let change = Change::Replace { element: key, slot, image, data, twins, again: false, watermark };
            let refused = self.stores.stage(change);
            ensure!(
                matches!(refused, Err(StageError::MissingData | StageError::NoSpace)),
                "a replacement without data is taken: {refused:?}"
            );
            return Ok(());
        }
        let change = Change::Replace { element: key, slot, image, data, twins, again: false, watermark };
        self.stage(key, change, Some(element))
    }

    /// Some rows are seen by nobody any more.
    fn reclaim(&mut self, key: ElementKey) -> Verdict {
        let Some(mut element) = self.present(key).cloned() else { return Ok(()) };
        let rows: Vec<_> = element.rows.keys().copied().filter(|_| self.prng.chance(1, 2)).collect();
        element.rows.retain(|row, _| !rows.contains(row));
        self.coverage.reclaimed += rows.len() as u64;
        self.stage(key, Change::Reclaim { element: key, rows }, Some(element))
    }

    fn change_something(&mut self) -> Verdict {
        let key = self.any_key();
        match self.prng.below(20) {
            0 | 1 => {
                let key = Bytes::from(vec![b'k', self.prng.below(4) as u8]);
                let length = self.prng.below(40) as usize;
                let value = self.prng.chance(3, 4).then(|| Bytes::from(vec![self.request as u8; length]));
                let ready = self.stores.is_ready_for(0);
                let Ok(ticket) = self.stores.stage(Change::Meta { key: key.clone(), value: value.clone() }) else {
                    ensure!(!ready || self.failed.is_some(), "metadata is refused that there is room for");
                    return Ok(());
                };
                ensure!(self.stores.meta(&key) == value, "metadata is not there at once");
                let log = if self.disks.len() == 1 { 0 } else { self.disks.len() };
                self.log_step(log, ticket, Step::Meta(key, value));
            }
            2 => {
                let slot = slot(self.prng.below(3));
                if !self.sequences.contains_key(&slot) {
                    return Ok(());
                }
                let watermark = self.next_watermark(slot);
                if let Ok(ticket) = self.stores.stage(Change::Watermark { slot, watermark }) {
                    let handed = self.handed.entry(slot).or_default();
                    *handed = (*handed).max(watermark);
                    self.watermark_tickets.insert(ticket, (slot, watermark));
                    ensure!(self.stores.watermark(slot) >= watermark, "a watermark is not there at once");
                }
            }
            3 => {
                let slot = slot(self.prng.below(3));
                let through = self.stores.durable_watermark(slot);
                self.stores.forget_changes(slot, through);
                let floor = self.floors.entry(slot).or_default();
                *floor = (*floor).max(through);
            }
            _ if self.stores.load(key) != Loaded::Ready => {}
            4 => self.stage(key, Change::Drop { element: key }, None)?,
            5 => self.reclaim(key)?,
            6..=8 => self.replace(key)?,
            _ => self.write(key)?,
        }
        Ok(())
    }

    fn read_something(&mut self) -> Verdict {
        let key = self.any_key();
        if self.stores.load(key) != Loaded::Ready {
            return Ok(());
        }
        let (lineage, epoch, parents) = self.lineage();
        let view: Vec<_> = std::iter::once((lineage, epoch)).chain(parents).collect();
        let (first, expected) = match self.home_log(key) {
            None => (0, [BlockSum::Zero; 16]),
            Some(l) => {
                // Blocks of a write that is not stable yet are nobody's to read.
                let log = &self.logs[l];
                let busy = |s: &Step| matches!(s, Step::Element(k, _) if *k == key);
                if log.steps[log.stable..].iter().any(busy) {
                    return Ok(());
                }
                (self.prng.below(16), log.now.elements[&key].seen(&view).unwrap_or_default())
            }
        };
        let mask = (0..16).filter(|b| expected[*b] != BlockSum::Zero).fold(0u16, |m, b| m | 1 << b);
        ensure!(self.stores.mask(key, &view) == mask, "a wrong mask of {key:?}");
        let blocks = self.prng.between(1, 16 - first);
        let expected = expected[first as usize..(first + blocks) as usize].to_vec();
        let read = self.stores.read(key, &view, first as u8, blocks as u8);
        self.reads.insert(read, expected);
        self.pump()
    }

    fn scan_something(&mut self) -> Verdict {
        if self.scans.len() >= 3 {
            return Ok(());
        }
        let limit = *self.prng.pick(&[1, 2, 5, 100]);
        let before = self.logs.iter().flat_map(|l| l.now.elements.iter()).map(|(k, e)| (*k, e.version)).collect();
        let (scan, from, end) = if self.prng.chance(1, 2) {
            let scan = self.stores.scan_all(None, limit);
            (scan, ElementKey { family: FamilyId(0), element: 0 }, None)
        } else {
            let (first, length) = (self.prng.below(9), self.prng.below(12));
            let scan = self.stores.scan(FamilyId(1), first, first + length, limit);
            let of = |element| ElementKey { family: FamilyId(1), element };
            (scan, of(first), Some(of(first + length)))
        };
        self.scans.insert(scan, Scan { from, end, limit, before, changed: BTreeSet::new() });
        self.pump()
    }

    // ---- the walk

    fn step(&mut self) -> Verdict {
        let Options { crash, answers, flushes, .. } = self.options;
        if crash > 0 && self.prng.chance(1, crash) {
            self.die();
            return self.start();
        }
        match self.prng.below(10 + answers * 3 + flushes) {
            0..6 => self.change_something()?,
            6..8 => self.read_something()?,
            8 => self.scan_something()?,
            9 if self.prng.chance(1, 4) => self.stores.mark_journals(),
            9 => self.check_index()?,
            n if n < 10 + flushes => self.flush()?,
            _ => drop(self.answer_any()?),
        }
        self.pump()?;
        self.stores.check_invariants();
        for n in 0..3 {
            let durable = self.stores.durable_watermark(slot(n));
            let before = self.durable.entry(slot(n)).or_default();
            ensure!(durable >= *before, "a durable watermark went back from {before:?} to {durable:?}");
            *before = durable;
            let handed = self.handed.entry(slot(n)).or_default();
            ensure!(durable <= *handed, "a durable watermark is ahead of what was handed in");
        }
        if self.failed.is_some() {
            ensure!(self.options.error > 0, "a sound disk failed: {:?}", self.failed);
            self.coverage.failures += 1;
            self.die();
            self.start()?;
        }
        Ok(())
    }

    fn run(&mut self) -> Verdict {
        self.start()?;
        for n in 0..self.options.steps {
            self.step().map_err(|why| format!("step {n}: {why}"))?;
        }
        self.options.error = 0;
        self.finish()
    }

    /// In the end everything works, nothing is lost, and what is dropped comes back as free space.
    fn finish(&mut self) -> Verdict {
        self.quiet()?;
        if self.failed.is_some() {
            self.die();
            self.start()?;
            self.quiet()?;
        }
        ensure!(self.logs.iter().all(|l| l.stable == l.steps.len()), "something never became stable");
        self.audit()?;
        self.die();
        self.start()?;
        self.quiet()?;
        self.audit()?;
        if self.disks.len() > 1 {
            ensure!(self.stores.disks[0].meta == self.stores.disks[1].meta, "the metadata differs");
        }
        let keys: BTreeSet<ElementKey> = self.logs.iter().flat_map(|l| l.now.elements.keys().copied()).collect();
        for key in keys {
            self.ready(key)?;
            self.stage(key, Change::Drop { element: key }, None)?;
            self.flush()?;
        }
        for disk in &self.disks {
            self.coverage.commits += disk.commits;
        }
        for n in 0..3 {
            self.quiet()?;
            for d in 0..self.disks.len() {
                self.stores.disks[d].stage_watermark(slot(0), Version { term: 0, sequence: n });
            }
        }
        self.quiet()?;
        for disk in &self.stores.disks {
            let (free, capacity) = (disk.allocator.free(), disk.allocator.capacity());
            ensure!(free == capacity, "{free} of {capacity} blocks are free where nothing is left");
            ensure!(disk.elements == 0, "{} elements are counted where none is left", disk.elements);
        }
        Ok(())
    }
}

// ---- damage

/// What becomes of a start from damaged bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Aftermath {
    /// The disk is refused, with a sentence.
    Refused,
    /// Less than was told stable, but all that a whole batch or the last checkpoint vouches for.
    Shorter,
    /// Everything is there.
    Whole,
}

impl Walk {
    /// The highest batch that something on the disk says was durable.
    fn vouched(&self) -> u64 {
        let disk = &self.stores.disks[0];
        let journal = disk.superblock.layout.journal;
        let ring = self.disks[0].read(journal.offset, journal.length);
        let batches = (0..ring.len()).step_by(PAGE).filter_map(|at| journal::decode_batch(DiskId(1), &ring[at..]));
        let reached = self.disks[0].tables[Table::Meta as usize].get(&keys::reached());
        let reached = reached.map_or(0, |r| postcard::from_bytes::<recovery::Reached>(r).unwrap().position.number);
        let [a, b] = [0, 1].map(|g| self.disks[0].read(Superblock::copy_offset(g), PAGE as u64));
        let marked = Superblock::choose(&a, &b).expect("the superblock is whole").journal_mark;
        batches.map(|(header, _, _)| header.durable_through).max().unwrap_or(0).max(reached).max(marked)
    }

    fn rot_journal(&mut self) {
        let journal = self.stores.disks[0].superblock.layout.journal;
        let disk = &mut self.disks[0];
        let pages: Vec<u64> = (journal.offset / PAGE as u64..journal.end() / PAGE as u64)
            .filter(|page| disk.pages.contains_key(page))
            .collect();
        for _ in 0..self.prng.between(1, 3) {
            // Mostly where something is: a batch's rest is zeros.
            let bytes = if self.prng.chance(3, 4) { 300 } else { PAGE as u64 };
            let bit = self.prng.below(bytes * 8) as usize;
            if !pages.is_empty() {
                let page = disk.pages.get_mut(self.prng.pick(&pages)).expect("just seen");
                page[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    /// Somebody writes over the journal, from some page on or all of it.
    fn overwrite_journal(&mut self) {
        let journal = self.stores.disks[0].superblock.layout.journal;
        let blocks = journal.length / PAGE as u64;
        let from = if self.prng.chance(1, 2) { 0 } else { self.prng.below(blocks) };
        for block in from..blocks {
            let junk = [self.prng.next_u64() as u8; PAGE];
            self.disks[0].write(journal.offset + block * PAGE as u64, &junk, || true);
        }
    }

    fn rot_pmap(&mut self, table: Table) {
        let values = &mut self.disks[0].tables[table as usize];
        if values.is_empty() {
            return;
        }
        let nth = self.prng.below(values.len() as u64) as usize;
        let value = values.values_mut().nth(nth).expect("just counted");
        if !value.is_empty() {
            let mut bytes = value.to_vec();
            bytes[self.prng.below(value.len() as u64) as usize] ^= 1 << self.prng.below(8);
            *value = bytes.into();
        }
    }

    /// A walk that ends with damage, and the start after it.
    fn run_and_rot(&mut self) -> Result<Aftermath, String> {
        self.options.error = 0;
        self.start()?;
        for n in 0..self.options.steps {
            self.step().map_err(|why| format!("step {n}: {why}"))?;
        }
        self.die();
        self.options.crash = 0;
        let kind = self.prng.below(6);
        match kind {
            0 => self.rot_pmap(Table::Heads),
            1 => self.rot_pmap(Table::Rows),
            2..4 => self.overwrite_journal(),
            _ => self.rot_journal(),
        }
        // Damage behind what was noted last cannot be told from a tail.
        let vouched = self.vouched();
        let may_go_back = vouched < self.opened_at;
        let log = &mut self.logs[0];
        let stable = log.stable;
        log.stable = stable.min(log.batches.range(..=vouched).next_back().map_or(0, |(_, steps)| *steps));
        self.durable.clear(); // As much shorter.
        match self.start() {
            Ok(()) if self.logs[0].matched < stable => Ok(Aftermath::Shorter),
            Ok(()) => Ok(Aftermath::Whole),
            Err(why) if self.failed.is_some() => {
                let sentence = self.failed.as_deref().unwrap_or_default();
                ensure!(sentence.starts_with("disk0: ") && sentence.len() > 20, "no sentence: {sentence} ({why})");
                Ok(Aftermath::Refused)
            }
            Err(why) if why.contains("PmapDamaged") => Ok(Aftermath::Refused), // An answer to a scan.
            Err(_) if may_go_back => Ok(Aftermath::Shorter),
            Err(why) => Err(why),
        }
    }

    /// Damage below the checksums of pages must not happen; if it does, a start may say anything but panic.
    fn run_and_rot_anything(&mut self) {
        self.options.error = 0;
        self.options.steps = 200;
        if self.start().is_ok() && (0..self.options.steps).all(|_| self.step().is_ok()) {
            self.die();
            for _ in 0..3 {
                let table = *self.prng.pick(&[
                    Table::Heads,
                    Table::Rows,
                    Table::Changes,
                    Table::Free,
                    Table::Meta,
                    Table::Meta,
                ]);
                self.rot_pmap(table);
            }
            let _ = self.start();
        }
    }
}

fn check_read(expected: &[BlockSum], got: &ReadBlocks) -> Verdict {
    ensure!(got.sums == expected, "read {:?} instead of {expected:?}", got.sums);
    let bytes = got.data.concat();
    let mut blocks = bytes.chunks(PAGE);
    for sum in expected {
        if let BlockSum::Crc(crc) = sum {
            ensure!(blocks.next().is_some_and(|b| crc32c(b) == *crc), "the bytes do not match");
        }
    }
    ensure!(blocks.next().is_none(), "more bytes than blocks");
    Ok(())
}

// ------------------------------------------------------------------------------------------------
// The tests.

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn seeds(default: u64) -> std::ops::Range<u64> {
    match number("PETAL_STORE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("PETAL_STORE_SEEDS").unwrap_or(default),
    }
}

thread_local! {
    static PANICS_ARE_FINDINGS: Cell<bool> = const { Cell::new(false) };
}

fn run(seed: u64, disks: usize, sabotage: Sabotage) -> (Verdict, Options, Coverage) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !PANICS_ARE_FINDINGS.get() {
                before(info);
            }
        }));
    });
    PANICS_ARE_FINDINGS.set(sabotage != Sabotage::None);
    let mut walk = Walk::new(seed, disks, sabotage);
    let verdict = catch_unwind(AssertUnwindSafe(|| walk.run())).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.or(panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default())
    });
    (verdict, walk.options, walk.coverage)
}

fn walks(disks: usize, default: u64) {
    let mut all = Vec::new();
    for seed in seeds(default) {
        let (verdict, options, coverage) = run(seed, disks, Sabotage::None);
        if let Err(why) = verdict {
            panic!("seed {seed} ({disks} disks): {why}\n{options:?}\n{coverage:?}");
        }
        all.push(coverage);
    }
    let sum = |f: fn(&Coverage) -> u64| all.iter().map(f).sum::<u64>();
    let reached = [
        ("crashes", sum(|c| c.crashes)),
        ("replays", sum(|c| c.replays)),
        ("cut tails", sum(|c| c.cut)),
        ("commits", sum(|c| c.commits)),
        ("laps", sum(|c| c.laps)),
        ("no space", sum(|c| c.no_space)),
        ("reads", sum(|c| c.reads)),
        ("scans", sum(|c| c.scans)),
        ("failed disks", sum(|c| c.failures)),
        ("journal full", sum(|c| c.journal_full)),
        ("stable", sum(|c| c.stable)),
        ("made again where dropped", sum(|c| c.ghosts)),
        ("rows reclaimed", sum(|c| c.reclaimed)),
    ];
    println!("{reached:?}");
    if all.len() >= 50 {
        for (what, count) in reached {
            assert!(count > 0, "no walk came to: {what}");
        }
    }
}

#[test]
fn one_disk_agrees_with_a_map_through_crashes() {
    walks(1, 600);
}

#[test]
fn two_disks_agree_with_a_map_through_crashes() {
    walks(2, 200);
}

#[test]
fn damage_is_told_and_never_taken_for_the_end_of_the_journal() {
    let mut found: BTreeMap<Aftermath, u64> = BTreeMap::new();
    for seed in seeds(300) {
        let mut walk = Walk::new(seed, 1, Sabotage::None);
        match walk.run_and_rot() {
            Ok(aftermath) => *found.entry(aftermath).or_default() += 1,
            Err(why) => panic!("seed {seed}: {why}\n{:?}", walk.options),
        }
    }
    println!("{found:?}");
    assert!(found.len() == 3 || number("PETAL_STORE_SEED").is_some(), "not every aftermath: {found:?}");
}

#[test]
fn no_damage_makes_a_start_panic() {
    for seed in seeds(300) {
        Walk::new(seed, 1, Sabotage::None).run_and_rot_anything();
    }
}

#[path = "single_tests.rs"]
mod single;

/// Seeds until a store without the rule is found out.
fn must_fail(sabotage: Sabotage, bound: u64) {
    let found = (0..bound).find_map(|seed| run(seed, 1, sabotage).0.err().map(|why| (seed, why)));
    let (seed, why) = found.unwrap_or_else(|| panic!("{} was not noticed in {bound} walks", sabotage.name()));
    println!("{}: {} walks: {}", sabotage.name(), seed + 1, why.chars().take(160).collect::<String>());
}

#[test]
fn replay_that_drops_single_records_is_found_out() {
    must_fail(Sabotage::ReplayDropsRecords, 500);
}

#[test]
fn batches_acknowledged_out_of_order_are_found_out() {
    must_fail(Sabotage::AckBatchesOutOfOrder, 500);
}

#[test]
fn a_journal_without_a_chain_is_found_out() {
    must_fail(Sabotage::NoChain, 500);
}

#[test]
fn blocks_reused_too_early_are_found_out() {
    must_fail(Sabotage::ReuseEarly, 500);
}

#[test]
fn a_start_without_an_open_record_is_found_out() {
    must_fail(Sabotage::NoOpenRecord, 3000);
}
