//! The disks of a stopped server, opened as the server would open them, and left as they are.
//!
//! The store replays its journals and would write: a new superblock, an open record, a checkpoint.
//! [`Overlay`] stands between it and the disk engine and keeps all writes in memory, so that what is
//! looked at is what the server would see, and the disks stay untouched (but for the PMap store's own
//! repair after a crash, which any opening does).

use crate::disk_files;
use crate::server_config::Owner;
use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use petal::data_access::told_of;
use petal::global_state::{GlobalState, Own, State};
use petal::ids::{BLOCK_SIZE, ElementKey, Incarnation, SlotId, Version};
use petal::message::VerifyPart;
use petal::store::superblock::Superblock;
use petal::store::{DiskCommand, DiskResult, Event, Loaded, OpId, OpenDisk, Stores, Table};
use petal_io::disk::Engine;
use petal_io::engine::DiskEngine;
use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::path::PathBuf;

/// Elements or rows asked for at one time.
const PAGE: usize = 1024;

/// The stores of a stopped server.
pub struct Offline {
    /// As found.
    pub disks: Vec<OpenDisk>,
    stores: Stores,
    overlay: Overlay,
    events: VecDeque<Event>,
    next_op: OpId,
}

impl Offline {
    /// Opens all disks of one server and replays their journals.
    pub async fn open(paths: &[PathBuf]) -> Result<Offline> {
        let (disks, engine) = disk_files::open(paths, Owner::default())?;
        let last = disks.iter().map(|d| d.superblock.incarnation.0).max().unwrap_or(0);
        let stores = Stores::open(disks.clone(), Incarnation(last + 1), Default::default());
        let overlay = Overlay::new(engine, disks.len());
        // Numbers of our own questions are far from those of the stores.
        let mut offline = Offline { disks, stores, overlay, events: VecDeque::new(), next_op: 1 << 62 };
        match offline.event(|e| matches!(e, Event::Opened | Event::DiskFailed { .. })).await? {
            Event::DiskFailed { disk, reason } => {
                bail!("the disk {} cannot be opened: {reason}", offline.disks[disk].path)
            }
            _ => Ok(offline),
        }
    }

    /// Entries of a table of one disk, after the checkpoint that an opening makes.
    pub async fn range(&mut self, disk: usize, table: Table, from: Bytes, limit: usize) -> Result<Vec<(Bytes, Bytes)>> {
        let op = self.next_op;
        self.next_op += 1;
        let to = Bytes::from_static(&[0xff; 64]);
        self.overlay.submit(disk, op, DiskCommand::PmapRange { table, from, to, limit });
        loop {
            if let Some(result) = self.step(Some(op)).await {
                match result {
                    DiskResult::PmapRange(entries) => return entries.context("the PMap store cannot be read"),
                    other => bail!("a question for a range was answered with {other:?}"),
                }
            }
        }
    }

    /// The first event that `wanted` wants.
    async fn event(&mut self, wanted: impl Fn(&Event) -> bool) -> Result<Event> {
        loop {
            while let Some(event) = self.stores.poll_event() {
                self.events.push_back(event);
            }
            if let Some(at) = self.events.iter().position(&wanted) {
                return self.events.remove(at).context("the event was just there");
            }
            self.step(None).await;
            ensure!(
                !self.overlay.is_idle() || !self.nothing_happened(),
                "the store waits for something that nobody will answer: this is a bug"
            );
        }
    }

    /// True if the stores have nothing to tell.
    fn nothing_happened(&mut self) -> bool {
        self.events.extend(std::iter::from_fn(|| self.stores.poll_event()));
        self.stores.flush();
        match self.stores.poll_command() {
            Some((disk, op, command)) => {
                self.overlay.submit(disk, op, command);
                false
            }
            None => self.events.is_empty(),
        }
    }

    /// One round between stores and disks; the answer to `own`, if it came.
    async fn step(&mut self, own: Option<OpId>) -> Option<DiskResult> {
        self.stores.flush();
        while let Some((disk, op, command)) = self.stores.poll_command() {
            self.overlay.submit(disk, op, command);
        }
        let mut answer = None;
        for (disk, op, result) in self.overlay.completions().await {
            if own == Some(op) {
                answer = Some(result);
            } else {
                self.stores.on_disk(disk, op, result);
            }
        }
        answer
    }

    /// Every block of every element against its checksum, and entries against the free map (I8).
    pub async fn verify(&mut self) -> Result<VerifyPart> {
        let mut found = VerifyPart::default();
        let mut after = None;
        loop {
            let elements = self.scan(after).await?;
            for (element, _) in &elements {
                self.verify_element(*element, &mut found).await?;
            }
            match elements.last() {
                Some((last, _)) => after = Some(*last),
                None => break,
            }
        }
        for disk in 0..self.disks.len() {
            let rows = self.all_rows(disk).await?;
            let path = &self.disks[disk].path;
            found.complaints.extend(self.stores.audit(disk, &rows).into_iter().map(|c| format!("{path}: {c}")));
        }
        Ok(found)
    }

    /// The global state as far as this server had it on its disks.
    pub fn state(&self) -> Result<State> {
        let Superblock { server, genesis, votes_from, .. } = &self.disks[0].superblock;
        let disks = self.disks.iter().map(|d| d.superblock.disk).collect();
        let own = Own { server: *server, disks, votes_from: *votes_from };
        let global = GlobalState::open(own, genesis, 0, self.stores.meta_prefix(b"ring/"));
        Ok(global.with_context(|| format!("the global state of {server} cannot be read"))?.state().clone())
    }

    /// What every replica has stored of a slot, as far as this server knew.
    pub fn watermark(&self, slot: SlotId) -> Version {
        self.stores.watermark(slot)
    }

    /// The next elements after one, with version and digest of what anybody sees of them.
    pub async fn tell(&mut self, state: &State, after: Option<ElementKey>) -> Result<Vec<(ElementKey, Version, u32)>> {
        let mut told = Vec::new();
        for (element, _) in self.scan(after).await? {
            // One that cannot be read is unlike every other; its server's own verification says why.
            let (version, digest) = match self.load(element).await? {
                Loaded::Failed => (Version::ZERO, 0),
                _ => told_of(state, &self.stores, element),
            };
            told.push((element, version, digest));
        }
        Ok(told)
    }

    async fn scan(&mut self, after: Option<ElementKey>) -> Result<Vec<(ElementKey, Version)>> {
        let scan = self.stores.scan_all(after, PAGE);
        match self.event(|e| matches!(e, Event::Scanned { scan: s, .. } if *s == scan)).await? {
            Event::Scanned { elements, .. } => elements.context("the elements cannot be listed"),
            _ => bail!("a scan was not answered with elements"),
        }
    }

    async fn load(&mut self, element: ElementKey) -> Result<Loaded> {
        if self.stores.load(element) == Loaded::Pending {
            self.event(|e| matches!(e, Event::Loaded(l) if *l == element)).await?;
        }
        Ok(self.stores.load(element))
    }

    async fn verify_element(&mut self, element: ElementKey, found: &mut VerifyPart) -> Result<()> {
        if self.load(element).await? == Loaded::Failed {
            found.complaints.push(format!("the entry of {element:?} cannot be read"));
            return Ok(());
        }
        found.elements += 1;
        let blocks = self.stores.stored(element);
        if blocks.is_empty() {
            return Ok(());
        }
        let read = self.stores.read_places(element, &blocks);
        let event = self.event(|e| matches!(e, Event::Read { read: r, .. } if *r == read)).await?;
        found.blocks += blocks.len() as u64;
        if let Event::Read { result: Err(error), .. } = event {
            let ElementKey { family, element: number } = element;
            let disk = self.stores.home(element).map_or("", |disk| self.stores.path(disk));
            found.complaints.push(format!(
                "element {number} of {family} on {disk}: {error}; when the server runs, `petal scrub` puts it right from \
                 another copy"
            ));
        }
        Ok(())
    }

    async fn all_rows(&mut self, disk: usize) -> Result<Vec<(Bytes, Bytes)>> {
        let mut rows: Vec<(Bytes, Bytes)> = Vec::new();
        let mut from = Bytes::new();
        loop {
            let part = self.range(disk, Table::Rows, from, PAGE).await?;
            let Some((last, _)) = part.last() else { return Ok(rows) };
            from = [last.as_ref(), &[0]].concat().into();
            rows.extend(part);
        }
    }
}

/// A disk engine whose writes stay in memory.
struct Overlay {
    engine: Engine,
    blocks: Vec<BTreeMap<u64, Bytes>>,
    tables: Vec<BTreeMap<(Table, Bytes), Option<Bytes>>>,
    /// What must be put over an answer of the engine.
    asked: BTreeMap<OpId, DiskCommand>,
    done: Vec<(usize, OpId, DiskResult)>,
}

impl Overlay {
    fn new(engine: Engine, disks: usize) -> Overlay {
        let (blocks, tables) = (vec![BTreeMap::new(); disks], vec![BTreeMap::new(); disks]);
        Overlay { engine, blocks, tables, asked: BTreeMap::new(), done: Vec::new() }
    }

    /// Nothing is under way.
    fn is_idle(&self) -> bool {
        self.asked.is_empty() && self.done.is_empty()
    }

    fn submit(&mut self, disk: usize, op: OpId, command: DiskCommand) {
        let answer = match command {
            DiskCommand::Write { offset, pieces } => {
                let bytes = Bytes::from(pieces.concat());
                for at in (0..bytes.len()).step_by(BLOCK_SIZE as usize) {
                    self.blocks[disk].insert(offset + at as u64, bytes.slice(at..at + BLOCK_SIZE as usize));
                }
                DiskResult::Written(Ok(()))
            }
            DiskCommand::Extend { .. } => DiskResult::Extended(Ok(())),
            DiskCommand::PmapCommit { changes } => {
                for (table, key, value) in changes {
                    self.tables[disk].insert((table, key), value);
                }
                DiskResult::PmapCommitted(Ok(()))
            }
            DiskCommand::PmapGet { table, ref key } if self.tables[disk].contains_key(&(table, key.clone())) => {
                DiskResult::PmapValue(Ok(self.tables[disk][&(table, key.clone())].clone()))
            }
            DiskCommand::PmapRange { table, from, to, limit } => {
                // Deleted entries must not make the answer look like the end.
                let deleted = self.tables[disk].values().filter(|v| v.is_none()).count();
                let command = DiskCommand::PmapRange { table, from, to, limit: limit + deleted };
                self.asked.insert(op, command.clone());
                return self.engine.submit(disk, op, command);
            }
            command => {
                self.asked.insert(op, command.clone());
                return self.engine.submit(disk, op, command);
            }
        };
        self.done.push((disk, op, answer));
    }

    /// Waits until something is answered.
    async fn completions(&mut self) -> Vec<(usize, OpId, DiskResult)> {
        self.engine.flush();
        if self.done.is_empty() && !self.asked.is_empty() {
            poll_fn(|cx| self.engine.poll_ready(cx)).await;
        }
        let mut from_engine = Vec::new();
        self.engine.completions(&mut from_engine);
        for (disk, op, result) in from_engine {
            let result = match self.asked.remove(&op) {
                Some(command) => self.put_over(disk, command, result),
                None => result,
            };
            self.done.push((disk, op, result));
        }
        std::mem::take(&mut self.done)
    }

    fn put_over(&self, disk: usize, command: DiskCommand, result: DiskResult) -> DiskResult {
        match (command, result) {
            (DiskCommand::Read { offset, length }, DiskResult::Read(Ok(bytes))) => {
                let mut bytes = bytes.to_vec();
                for (at, block) in self.blocks[disk].range(offset..offset + length) {
                    let start = (at - offset) as usize;
                    bytes[start..start + block.len()].copy_from_slice(block);
                }
                DiskResult::Read(Ok(bytes.into()))
            }
            (DiskCommand::PmapRange { table, from, to, limit }, DiskResult::PmapRange(Ok(entries))) => {
                // Behind the last entry of a full answer the engine has more, which is not known here.
                let full = entries.len() == limit;
                let end = entries.last().filter(|_| full).map(|(last, _)| last.clone());
                let mut merged: BTreeMap<Bytes, Bytes> = entries.into_iter().collect();
                for ((_, key), value) in self.tables[disk].range((table, from)..(table, to)) {
                    if end.as_ref().is_some_and(|end| key > end) {
                        break;
                    }
                    match value {
                        Some(value) => merged.insert(key.clone(), value.clone()),
                        None => merged.remove(key),
                    };
                }
                DiskResult::PmapRange(Ok(merged.into_iter().collect()))
            }
            (_, result) => result,
        }
    }
}
