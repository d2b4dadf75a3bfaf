//! A disk that keeps the promises of [`DiskCommand`] and not one more.
//!
//! What is promised: a command that was answered is durable. What is not: the order of commands in
//! flight, and anything about a command that a crash overtook. So at a crash every unanswered write is
//! kept, lost, or torn in any subset of its 512-byte sectors; unanswered PMap commits are durable up
//! to any one of them, each wholly or not at all (redb makes them one after the other); an extension
//! is there or not. A read that overlaps a write in flight sees any mixture of old and new sectors.
//!
//! Commands that break the contract from the other side (unaligned, beyond the frontier) are bugs of
//! the store and panic, which the world reports with its seed.

use crate::counters::{Counters, Kind};
use bytes::Bytes;
use petal::store::superblock::{SUPERBLOCK_SIZE, Superblock};
use petal::store::{DiskCommand, DiskError, DiskResult, OpId, Table};
use std::collections::{BTreeMap, VecDeque};
use stdx::{Duration, FastMap, Instant, Prng};

/// What a crash keeps or loses independently.
pub const SECTOR: usize = 512;
const PAGE: usize = 4096;
const TABLES: usize = 5;
/// Both copies of the superblock.
const SUPERBLOCKS: u64 = 2 * SUPERBLOCK_SIZE as u64;
/// Batches of the journal after which a page was written a while ago: more than are on their way at once.
const OLD: u64 = 12;

/// Commands between two writes that fail, and how many may: fewer than a server bears.
const STEADY: Ticket = 64;
const STUMBLES_MAX: u32 = 8;

/// Number of a command in flight on one disk; grows with each.
pub type Ticket = u64;

/// How long a disk takes.
#[derive(Clone, Copy, Debug)]
pub struct DiskTimes {
    /// Shortest answer.
    pub min: Duration,
    /// Longest answer.
    pub max: Duration,
    /// A PMap commit takes so many times longer.
    pub commit_factor: u32,
}

/// What is wrong with a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Bad {
    /// A bit was turned over.
    Rotten { at: usize, bit: u64 },
    /// Reads of it fail.
    Unreadable,
}

/// What was there before something that was answered.
enum Before {
    Pages(Vec<(u64, Box<[u8; PAGE]>, Option<Bad>)>),
    Entries(Vec<(Table, Bytes, Option<Bytes>)>),
}

/// Answered commands that a disk that lies may lose.
const LOSABLE_MAX: usize = 40;

/// One physical disk: what is durable, and what is in flight.
pub struct SimDisk {
    prng: Prng,
    times: DiskTimes,
    /// Slower by this factor until that moment.
    slow: (u32, Instant),
    pages: BTreeMap<u64, Box<[u8; PAGE]>>,
    /// Pages that cannot be read as they were written.
    bad: BTreeMap<u64, Bad>,
    /// Batches of the journal that were answered, and how many there were when a page was written last, or was to be.
    batches: u64,
    written: FastMap<u64, u64>,
    pmap: [BTreeMap<Bytes, Bytes>; TABLES],
    frontier: u64,
    size: u64,
    pending: BTreeMap<Ticket, (OpId, DiskCommand)>,
    next_ticket: Ticket,
    newest_answered: Ticket,
    last_commit_done: Instant,
    /// Where blocks of data begin, in bytes. Only these go bad: a journal that does not read costs the whole disk.
    pub data_start: u64,
    /// Answers every command with an error.
    pub failing: bool,
    /// Answers nothing before that moment, or only reads.
    hung_until: Instant,
    reads_on: bool,
    /// The next write fails, and leaves any of its sectors behind.
    stumbles: bool,
    /// It may do so again from this command on.
    steady_until: Ticket,
    stumbled: u32,
    /// It keeps in mind what it could lose of what it has answered; the newest last.
    pub lies: bool,
    losable: VecDeque<Before>,
}

impl SimDisk {
    /// An empty disk of `size` bytes of which `frontier` may be written without growing.
    pub fn new(size: u64, frontier: u64, times: DiskTimes, prng: Prng) -> SimDisk {
        assert!(frontier <= size);
        SimDisk {
            prng,
            times,
            slow: (1, Instant::ZERO),
            pages: BTreeMap::new(),
            bad: BTreeMap::new(),
            batches: 0,
            written: FastMap::new(),
            pmap: Default::default(),
            frontier,
            size,
            pending: BTreeMap::new(),
            next_ticket: 1,
            newest_answered: 0,
            last_commit_done: Instant::ZERO,
            data_start: 0,
            failing: false,
            hung_until: Instant::ZERO,
            reads_on: false,
            stumbles: false,
            steady_until: 0,
            stumbled: 0,
            lies: false,
            losable: VecDeque::new(),
        }
    }

    /// Bytes that may be written without growing.
    pub fn frontier(&self) -> u64 {
        self.frontier
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Makes the disk `factor` times slower until `until`.
    pub fn slow_down(&mut self, factor: u32, until: Instant) {
        self.slow = (factor, until);
    }

    /// Answers nothing before that moment; or goes on to answer reads, as where a flush does not end.
    pub fn hang(&mut self, until: Instant, reads_on: bool) {
        (self.hung_until, self.reads_on) = (until, reads_on);
    }

    /// This command is not answered yet, however long ago it was given.
    pub fn withholds(&self, ticket: Ticket, now: Instant) -> bool {
        let is_read = |command: &DiskCommand| {
            matches!(command, DiskCommand::Read { .. } | DiskCommand::PmapGet { .. } | DiskCommand::PmapRange { .. })
        };
        self.is_hung(now) && !(self.reads_on && self.pending.get(&ticket).is_some_and(|(_, command)| is_read(command)))
    }

    /// The next write will fail: not soon after the last one that did, since the same write failing twice is a disk
    /// that fails, and not often, since that is one, too.
    pub fn stumble(&mut self) -> bool {
        let may = !self.stumbles && self.next_ticket > self.steady_until && self.stumbled < STUMBLES_MAX;
        self.stumbles |= may;
        may
    }

    /// No write is to fail any more.
    pub fn steady(&mut self) {
        self.stumbles = false;
    }

    /// There is something that it does not answer.
    pub fn is_hung(&self, now: Instant) -> bool {
        now < self.hung_until
    }

    /// Takes a command; it will be done at the returned moment, when `finish` must be called.
    pub fn submit(&mut self, now: Instant, op: OpId, command: DiskCommand) -> (Ticket, Instant) {
        self.check(&command);
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let mut delay = self.prng.between(self.times.min.as_nanos() as u64, self.times.max.as_nanos() as u64);
        let commit = matches!(command, DiskCommand::PmapCommit { .. });
        if commit {
            delay *= u64::from(self.times.commit_factor);
        }
        if now < self.slow.1 {
            delay *= u64::from(self.slow.0);
        }
        let mut done = now + Duration::from_nanos(delay);
        if commit {
            done = done.max(self.last_commit_done + Duration::from_nanos(1));
            self.last_commit_done = done;
        }
        self.pending.insert(ticket, (op, command));
        (ticket, done)
    }

    /// Does a command in flight and answers it. `None` if a crash came first.
    pub fn finish(&mut self, ticket: Ticket, counters: &mut Counters) -> Option<(OpId, DiskResult)> {
        let (op, command) = self.pending.remove(&ticket)?;
        if ticket < self.newest_answered {
            counters.count(Kind::DiskReordered);
        }
        self.newest_answered = self.newest_answered.max(ticket);
        if let DiskCommand::Write { offset, pieces } = &command
            && std::mem::take(&mut self.stumbles)
        {
            (self.steady_until, self.stumbled) = (self.next_ticket + STEADY, self.stumbled + 1);
            let mut subset = self.prng.fork();
            self.write(*offset, &gather(pieces), |_| subset.chance(1, 2));
            return Some((op, failed(&command, DiskError::Io("this write failed".into()))));
        }
        self.remember(&command);
        Some((op, self.execute(command)))
    }

    /// Does a command at once.
    pub fn execute(&mut self, command: DiskCommand) -> DiskResult {
        let broken = || DiskError::Io("the simulator was told to fail this disk".into());
        if self.failing {
            return failed(&command, broken());
        }
        match command {
            DiskCommand::Read { offset, length } => {
                let pages = offset / PAGE as u64..(offset + length) / PAGE as u64;
                match self.bad.range(pages).any(|(_, bad)| *bad == Bad::Unreadable) {
                    true => DiskResult::Read(Err(DiskError::Io("this block cannot be read".into()))),
                    false => DiskResult::Read(Ok(self.read(offset, length))),
                }
            }
            DiskCommand::Write { offset, pieces } => {
                // The superblock's copies are no batches: who dies again and again while it opens its disks writes
                // nothing else.
                self.batches += u64::from((SUPERBLOCKS..self.data_start).contains(&offset));
                self.write(offset, &gather(&pieces), |_| true);
                DiskResult::Written(Ok(()))
            }
            DiskCommand::Extend { to, .. } if to > self.size => {
                DiskResult::Extended(Err(DiskError::HostFull(format!("{} bytes is all there is", self.size))))
            }
            DiskCommand::Extend { to, .. } => {
                self.frontier = self.frontier.max(to);
                DiskResult::Extended(Ok(()))
            }
            DiskCommand::PmapGet { table, key } => DiskResult::PmapValue(Ok(self.table(table).get(&key).cloned())),
            DiskCommand::PmapRange { table, from, to, limit } => {
                let found = if from < to {
                    self.table(table).range(from..to).take(limit).map(|(k, v)| (k.clone(), v.clone())).collect()
                } else {
                    Vec::new()
                };
                DiskResult::PmapRange(Ok(found))
            }
            DiskCommand::PmapCommit { changes } => {
                self.commit(changes);
                DiskResult::PmapCommitted(Ok(()))
            }
        }
    }

    /// The power goes, or the process is killed: what is in flight is kept, lost or torn.
    pub fn crash(&mut self, counters: &mut Counters) {
        let weights = [*self.prng.pick(&[0, 1, 3]), *self.prng.pick(&[0, 1, 3]), 1];
        let pending = std::mem::take(&mut self.pending);
        let mut commits_end = false;
        for (_, command) in pending.into_values() {
            match command {
                DiskCommand::Write { offset, pieces } => self.crash_write(offset, &gather(&pieces), weights, counters),
                DiskCommand::PmapCommit { changes } => {
                    commits_end |= self.prng.chance(1, 2);
                    if commits_end {
                        counters.count(Kind::CommitLost);
                    } else {
                        self.commit(changes);
                        counters.count(Kind::CommitKept);
                    }
                }
                DiskCommand::Extend { to, .. } if to <= self.size => {
                    if self.prng.chance(1, 2) {
                        self.frontier = self.frontier.max(to);
                    } else {
                        counters.count(Kind::ExtendLost);
                    }
                }
                DiskCommand::Extend { .. }
                | DiskCommand::Read { .. }
                | DiskCommand::PmapGet { .. }
                | DiskCommand::PmapRange { .. } => {}
            }
        }
        self.newest_answered = self.next_ticket;
        self.last_commit_done = Instant::ZERO;
        self.slow = (1, Instant::ZERO);
    }

    /// Notes what a command replaces. Lives are kept: a disk of an earlier one is refused, which is another case.
    fn remember(&mut self, command: &DiskCommand) {
        if !self.lies || self.failing {
            return;
        }
        let before = match command {
            DiskCommand::Write { offset, pieces } if *offset < SUPERBLOCKS && self.begins_a_life(pieces) => {
                return self.losable.clear();
            }
            DiskCommand::Write { offset, pieces } => {
                let pages = pieces.iter().map(Bytes::len).sum::<usize>() as u64 / PAGE as u64;
                let first = offset / PAGE as u64;
                let of = |n: u64| {
                    let page = self.pages.get(&n).cloned().unwrap_or_else(|| Box::new([0; PAGE]));
                    (n, page, self.bad.get(&n).copied())
                };
                Before::Pages((first..first + pages).map(of).collect())
            }
            DiskCommand::PmapCommit { changes } => {
                let of = |(table, key, _): &(Table, Bytes, Option<Bytes>)| {
                    (*table, key.clone(), self.table(*table).get(key).cloned())
                };
                Before::Entries(changes.iter().map(of).collect())
            }
            _ => return,
        };
        self.losable.push_back(before);
        if self.losable.len() > LOSABLE_MAX {
            self.losable.pop_front();
        }
    }

    fn begins_a_life(&self, label: &[Bytes]) -> bool {
        let life = |copy: Result<Superblock, _>| copy.ok().map(|s| s.incarnation);
        let page = |n| self.pages.get(&n).map_or(&[][..], |page| &page[..]);
        life(Superblock::choose(page(0), page(1))) != life(Superblock::decode(&label.concat()))
    }

    /// The power goes, and with it what the disk had answered and only had in its cache: the newest commands, all
    /// from some moment on. True if anything was lost.
    pub fn lose(&mut self) -> bool {
        self.pending.clear();
        let count = self.prng.below(self.losable.len() as u64 + 1);
        for _ in 0..count {
            match self.losable.pop_back().expect("counted") {
                Before::Pages(pages) => {
                    for (number, page, bad) in pages {
                        self.pages.insert(number, page);
                        match bad {
                            Some(bad) => self.bad.insert(number, bad),
                            None => self.bad.remove(&number),
                        };
                    }
                }
                Before::Entries(entries) => self.commit(entries),
            }
        }
        self.losable.clear();
        count > 0
    }

    /// Draws a page of data that was written a while ago, is good, and is not empty.
    pub fn draw_page(&mut self) -> Option<(u64, &[u8; PAGE])> {
        let first = self.data_start / PAGE as u64;
        let count = self.pages.range(first..).count() as u64;
        if count == 0 {
            return None;
        }
        let at = self.prng.below(count) as usize;
        let (number, page) = self.pages.range(first..).nth(at).expect("counted");
        // The blocks of the last batches are read when the disk is opened, to see where its journal ends: one that
        // is bad then is a disk that loses acknowledged writes, which is another fault.
        let is_old = self.written.get(number).is_some_and(|written| self.batches - written >= OLD);
        let is_empty = page.iter().all(|b| *b == 0);
        (is_old && !is_empty && !self.bad.contains_key(number)).then_some((*number, page))
    }

    /// True if some good page has this content.
    pub fn has(&self, content: &[u8; PAGE]) -> bool {
        self.pages.iter().any(|(number, page)| **page == *content && !self.bad.contains_key(number))
    }

    /// Makes a page bad: a bit of it turns over, or it cannot be read any more, until it is written again.
    pub fn spoil(&mut self, number: u64, how: Kind) {
        if how == Kind::Unreadable {
            self.bad.insert(number, Bad::Unreadable);
            return;
        }
        let (at, bit) = (self.prng.below(PAGE as u64) as usize, self.prng.below(8));
        self.page_mut(number)[at] ^= 1 << bit;
        self.bad.insert(number, Bad::Rotten { at, bit });
    }

    /// Another disk of the same kind takes its place, with nothing on it.
    pub fn wipe(&mut self) {
        let raw = self.frontier == self.size;
        let (times, prng) = (self.times, self.prng.fork());
        *self = SimDisk::new(self.size, if raw { self.size } else { 0 }, times, prng);
    }

    /// Makes all pages good again.
    pub fn mend(&mut self) {
        for (number, bad) in std::mem::take(&mut self.bad) {
            if let Bad::Rotten { at, bit } = bad {
                self.page_mut(number)[at] ^= 1 << bit;
            }
        }
    }

    fn crash_write(&mut self, offset: u64, data: &[u8], weights: [u64; 3], counters: &mut Counters) {
        let draw = self.prng.below(weights.iter().sum());
        if draw < weights[0] {
            counters.count(Kind::WriteKept);
            self.write(offset, data, |_| true);
        } else if draw < weights[0] + weights[1] {
            counters.count(Kind::WriteLost);
            // The journal's record of it may be there: this page is one of the last batch's nevertheless. A block that
            // was bad before is readable again, and as it was: for a second fault there the whole disk is refused.
            self.write(offset, data, |_| false);
        } else {
            counters.count(Kind::WriteTorn);
            // Three ways to tear: any subset, a prefix, all but one.
            let sectors = (data.len() / SECTOR) as u64;
            let way = self.prng.below(3);
            let mark = self.prng.below(sectors);
            let mut subset = self.prng.fork();
            self.write(offset, data, |sector| match way {
                0 => subset.chance(1, 2),
                1 => sector < mark,
                _ => sector != mark,
            });
        }
    }

    /// A command that no store of ours may give.
    fn check(&self, command: &DiskCommand) {
        let aligned = |offset: u64, length: u64| {
            offset.is_multiple_of(PAGE as u64) && length.is_multiple_of(PAGE as u64) && length > 0
        };
        match command {
            DiskCommand::Read { offset, length } => {
                assert!(aligned(*offset, *length), "unaligned disk read of {length} bytes at {offset}");
                assert!(offset + length <= self.size, "disk read beyond the end: {length} bytes at {offset}");
            }
            DiskCommand::Write { offset, pieces } => {
                let length = pieces.iter().map(|p| p.len() as u64).sum::<u64>();
                assert!(aligned(*offset, length), "unaligned disk write of {length} bytes at {offset}");
                assert!(
                    offset + length <= self.frontier,
                    "disk write beyond the frontier {}: {length} bytes at {offset}",
                    self.frontier
                );
            }
            DiskCommand::Extend { to, .. } => {
                assert!(to % (1 << 20) == 0, "extension to {to}, not a multiple of 1 MiB")
            }
            DiskCommand::PmapGet { .. } | DiskCommand::PmapRange { .. } | DiskCommand::PmapCommit { .. } => {}
        }
    }

    /// What is durable, mixed with any sectors of writes in flight.
    fn read(&mut self, offset: u64, length: u64) -> Bytes {
        let mut out = vec![0; length as usize];
        for (i, chunk) in out.chunks_mut(PAGE).enumerate() {
            if let Some(page) = self.pages.get(&(offset / PAGE as u64 + i as u64)) {
                chunk.copy_from_slice(&page[..]);
            }
        }
        for (_, command) in self.pending.values() {
            if let DiskCommand::Write { offset: at, pieces } = command {
                let data_length = pieces.iter().map(|p| p.len() as u64).sum::<u64>();
                let (low, high) = ((*at).max(offset), (at + data_length).min(offset + length));
                if low >= high {
                    continue;
                }
                let data = gather(pieces);
                for sector in (low..high).step_by(SECTOR) {
                    if self.prng.chance(1, 2) {
                        let (to, from) = ((sector - offset) as usize, (sector - at) as usize);
                        out[to..to + SECTOR].copy_from_slice(&data[from..from + SECTOR]);
                    }
                }
            }
        }
        out.into()
    }

    /// Writes the sectors that `keep` wants.
    fn write(&mut self, offset: u64, data: &[u8], mut keep: impl FnMut(u64) -> bool) {
        for (i, chunk) in data.chunks(PAGE).enumerate() {
            let number = offset / PAGE as u64 + i as u64;
            self.bad.remove(&number);
            self.written.insert(number, self.batches);
            let page = self.page_mut(number);
            for (s, sector) in chunk.chunks(SECTOR).enumerate() {
                if keep((i * PAGE / SECTOR + s) as u64) {
                    page[s * SECTOR..s * SECTOR + sector.len()].copy_from_slice(sector);
                }
            }
        }
    }

    fn page_mut(&mut self, number: u64) -> &mut [u8; PAGE] {
        self.pages.entry(number).or_insert_with(|| Box::new([0; PAGE]))
    }

    fn table(&self, table: Table) -> &BTreeMap<Bytes, Bytes> {
        &self.pmap[table as usize]
    }

    fn commit(&mut self, changes: Vec<(Table, Bytes, Option<Bytes>)>) {
        for (table, key, value) in changes {
            let table = &mut self.pmap[table as usize];
            match value {
                Some(value) => table.insert(key, value),
                None => table.remove(&key),
            };
        }
    }
}

fn gather(pieces: &[Bytes]) -> Bytes {
    match pieces {
        [one] => one.clone(),
        many => many.concat().into(),
    }
}

fn failed(command: &DiskCommand, error: DiskError) -> DiskResult {
    match command {
        DiskCommand::Read { .. } => DiskResult::Read(Err(error)),
        DiskCommand::Write { .. } => DiskResult::Written(Err(error)),
        DiskCommand::Extend { .. } => DiskResult::Extended(Err(error)),
        DiskCommand::PmapGet { .. } => DiskResult::PmapValue(Err(error)),
        DiskCommand::PmapRange { .. } => DiskResult::PmapRange(Err(error)),
        DiskCommand::PmapCommit { .. } => DiskResult::PmapCommitted(Err(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: DiskTimes =
        DiskTimes { min: Duration::from_micros(10), max: Duration::from_micros(100), commit_factor: 3 };

    fn disk(seed: u64) -> SimDisk {
        SimDisk::new(1 << 30, 1 << 20, TIMES, Prng::new(seed))
    }

    fn write(offset: u64, byte: u8, length: usize) -> DiskCommand {
        DiskCommand::Write { offset, pieces: vec![Bytes::from(vec![byte; length])] }
    }

    fn read(disk: &mut SimDisk, offset: u64, length: u64) -> Bytes {
        match disk.execute(DiskCommand::Read { offset, length }) {
            DiskResult::Read(Ok(bytes)) => bytes,
            other => panic!("{other:?}"),
        }
    }

    fn commit(key: &'static str, value: &'static str) -> DiskCommand {
        let change = (Table::Meta, Bytes::from(key), Some(Bytes::from(value)));
        DiskCommand::PmapCommit { changes: vec![change] }
    }

    fn value(disk: &mut SimDisk, key: &'static str) -> Option<Bytes> {
        match disk.execute(DiskCommand::PmapGet { table: Table::Meta, key: key.into() }) {
            DiskResult::PmapValue(Ok(value)) => value,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn answered_writes_survive_every_crash() {
        let mut counters = Counters::default();
        for seed in 0..50 {
            let mut d = disk(seed);
            let (ticket, _) = d.submit(Instant::ZERO, 1, write(8192, 7, 8192));
            assert_eq!(d.finish(ticket, &mut counters), Some((1, DiskResult::Written(Ok(())))));
            d.submit(Instant::ZERO, 2, write(4096, 9, 4096));
            d.crash(&mut counters);
            assert!(read(&mut d, 8192, 8192).iter().all(|b| *b == 7));
        }
    }

    #[test]
    fn unanswered_writes_are_kept_lost_or_torn_by_sectors() {
        let mut counters = Counters::default();
        for seed in 0..200 {
            let mut d = disk(seed);
            let (ticket, _) = d.submit(Instant::ZERO, 1, write(0, 5, 16384));
            d.crash(&mut counters);
            assert_eq!(d.finish(ticket, &mut counters), None, "a command of a dead process is never answered");
            for sector in read(&mut d, 0, 16384).chunks(SECTOR) {
                assert!(sector.iter().all(|b| *b == sector[0]), "a sector is never torn itself");
            }
        }
        for kind in [Kind::WriteKept, Kind::WriteLost, Kind::WriteTorn] {
            assert!(counters.get(kind) > 5, "{kind:?}");
        }
    }

    /// Draws often enough to meet the page if it may go bad.
    fn may_go_bad(disk: &mut SimDisk, page: u64) -> bool {
        (0..100).any(|_| disk.draw_page().is_some_and(|(number, _)| number == page))
    }

    #[test]
    fn only_batches_of_the_journal_make_a_page_old_enough_to_go_bad() {
        let mut counters = Counters::default();
        let mut d = disk(1);
        d.data_start = 1 << 19;
        let page = d.data_start / PAGE as u64;
        d.execute(write(d.data_start, 7, PAGE));
        for _ in 0..OLD {
            d.execute(write(0, 1, PAGE)); // Lives that end before a batch of theirs is answered.
            d.submit(Instant::ZERO, 1, write(8192, 2, PAGE));
            d.crash(&mut counters);
        }
        assert!(!may_go_bad(&mut d, page));
        for batch in 0..OLD {
            d.execute(write(8192 + batch * PAGE as u64, 3, PAGE));
        }
        assert!(may_go_bad(&mut d, page));
        // A write that a crash loses may have its record in the journal: then the page is read at the start.
        let lost = counters.get(Kind::WriteLost);
        for _ in 0..20 {
            d.submit(Instant::ZERO, 2, write(d.data_start, 9, PAGE));
            d.crash(&mut counters);
            assert!(!may_go_bad(&mut d, page));
        }
        assert!(counters.get(Kind::WriteLost) > lost);
    }

    #[test]
    fn unanswered_commits_are_durable_up_to_one_of_them() {
        let mut counters = Counters::default();
        let mut seen = [false; 3];
        for seed in 0..100 {
            let mut d = disk(seed);
            d.submit(Instant::ZERO, 1, commit("a", "1"));
            d.submit(Instant::ZERO, 2, commit("b", "2"));
            d.crash(&mut counters);
            match (value(&mut d, "a").is_some(), value(&mut d, "b").is_some()) {
                (false, false) => seen[0] = true,
                (true, false) => seen[1] = true,
                (true, true) => seen[2] = true,
                (false, true) => panic!("the second transaction without the first"),
            }
        }
        assert_eq!(seen, [true; 3]);
    }

    #[test]
    fn commits_are_answered_in_order_and_writes_are_not() {
        let mut d = disk(1);
        let mut last = Instant::ZERO;
        let mut writes = Vec::new();
        for op in 0..50 {
            let (_, done) = d.submit(Instant::ZERO, op, commit("k", "v"));
            assert!(done > last);
            last = done;
            writes.push(d.submit(Instant::ZERO, 100 + op, write(op * 4096, 1, 4096)).1);
        }
        assert!(writes.windows(2).any(|w| w[0] > w[1]));
    }

    #[test]
    fn a_read_over_a_write_in_flight_sees_a_mixture_of_whole_sectors() {
        let mut d = disk(3);
        d.execute(write(0, 1, 65536));
        d.submit(Instant::ZERO, 1, write(4096, 2, 4096));
        let seen = read(&mut d, 0, 65536);
        assert!(seen[..4096].iter().chain(&seen[8192..]).all(|b| *b == 1));
        let middle: Vec<u8> = seen[4096..8192].chunks(SECTOR).map(|s| s[0]).collect();
        assert!(middle.contains(&1) && middle.contains(&2));
    }

    #[test]
    fn pages_that_were_never_written_are_zeros_and_ranges_are_half_open() {
        let mut d = disk(4);
        assert!(read(&mut d, 0, 8192).iter().all(|b| *b == 0));
        for key in ["a", "b", "c"] {
            d.execute(commit(key, "x"));
        }
        let range = |d: &mut SimDisk, from: &'static str, to: &'static str, limit| {
            let command = DiskCommand::PmapRange { table: Table::Meta, from: from.into(), to: to.into(), limit };
            match d.execute(command) {
                DiskResult::PmapRange(Ok(found)) => found.len(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((range(&mut d, "a", "c", 9), range(&mut d, "a", "z", 2), range(&mut d, "c", "a", 9)), (2, 2, 0));
    }

    #[test]
    #[should_panic(expected = "beyond the frontier")]
    fn a_write_beyond_the_frontier_is_a_bug() {
        disk(5).submit(Instant::ZERO, 1, write(1 << 20, 1, 4096));
    }

    #[test]
    fn a_failing_disk_answers_with_errors() {
        let mut d = disk(6);
        d.failing = true;
        assert!(matches!(d.execute(write(0, 1, 4096)), DiskResult::Written(Err(DiskError::Io(_)))));
    }
}
