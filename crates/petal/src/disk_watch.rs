//! Watches this server's own disks: which do not answer, and which fail too often (2.5, 2.10).
//!
//! A disk that hangs holds up every write of every slot that its server is in sync in, and every read that it acts
//! for, while the ring still hears the server. So the server takes itself out of the way (`Server::leave`); it begins a
//! new life when the disk answers again.
//!
//! *Hangs*: a read or write has waited for as long as the config says (half a lease, if it says nothing) and nothing at all was answered meanwhile; for
//! half as long again, and nothing of its own kind was answered (a disk may read on while no write ends); or one has waited
//! for [`COMMAND_MAX`]. A disk under much load answers something, and is only slow. Commands of the PMap store and
//! growth may take long on a healthy disk too, and have [`SLOW_MAX`]; but when nothing but these has been waited for, in silence, the
//! disk is asked for its first block, which it may not take long for.
//! Time counts only while this server ran: after a stall every clock begins anew.
//!
//! *Fails too often*: a block that cannot be read is repaired, and a write that failed once is tried again; but a disk
//! that does this at [`READ_ERRORS_MAX`] places, or to [`WRITE_ERRORS_MAX`] writes, within an hour is not trusted any more.
//! Blocks that do not have their checksum do not count: somebody may have written over them, and they are repaired.

use crate::ids::BLOCK_SIZE;
use crate::store::{DiskCommand, DiskResult, OpId};
use std::collections::{BTreeMap, BTreeSet};
use stdx::{Duration, Instant};

/// Longest wait for one read or write, whatever else is answered.
const COMMAND_MAX: Duration = Duration::from_secs(5);
/// Longest wait for a command of the PMap store, or for a file to grow.
const SLOW_MAX: Duration = Duration::from_secs(60);
/// Time between two looks while anything is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A look that comes so late shows that this server did not run.
const LATE: Duration = Duration::from_millis(150);
/// Errors are counted for so long.
const WINDOW: Duration = Duration::from_secs(3600);
/// Places that could not be read within that time: 64 MiB lost at least, if each is an element.
const READ_ERRORS_MAX: usize = 1024;
/// Writes that had to be tried again within that time.
const WRITE_ERRORS_MAX: u32 = 16;

/// The operation of asking a disk for its first block; the store's own count from 1.
const PROBE: OpId = OpId::MAX;

/// What is wrong with a disk, in words that go behind its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// It does not answer.
    Hangs(String),
    /// It answers with errors too often.
    Fails(String),
}

/// All disks of a server.
#[derive(Debug)]
pub(crate) struct DiskWatch {
    disks: Vec<Watched>,
    /// A disk that has answered nothing for so long hangs.
    patience: Duration,
    next_look: Option<Instant>,
    /// Waiting is counted from here on at the earliest.
    runs_since: Instant,
    errors: u64,
}

#[derive(Debug)]
struct Watched {
    reads: Waiting,
    writes: Waiting,
    /// Commands that may take long, with when they were given. Numbers grow with time.
    slow: BTreeMap<OpId, Instant>,
    /// Anything at all.
    answered: Instant,
    /// When it was asked for its first block.
    probe: Option<Instant>,
    /// That is to be asked for.
    wants_probe: bool,
    window: Instant,
    unread: BTreeSet<u64>,
    unwritten: u32,
}

/// Commands of one kind.
#[derive(Debug)]
struct Waiting {
    /// Not answered, with when it was asked and where. Numbers grow with time.
    asked: BTreeMap<OpId, (Instant, u64)>,
    answered: Instant,
}

impl Waiting {
    fn oldest(&self) -> Option<Instant> {
        self.asked.first_key_value().map(|(_, (at, _))| *at)
    }
}

impl Watched {
    fn is_idle(&self) -> bool {
        self.reads.asked.is_empty() && self.writes.asked.is_empty() && self.slow.is_empty() && self.probe.is_none()
    }

    fn count(&mut self, now: Instant) -> &mut Watched {
        if now.since(self.window) > WINDOW {
            (self.window, self.unwritten) = (now, 0);
            self.unread.clear();
        }
        self
    }
}

impl DiskWatch {
    /// Of so many disks.
    pub fn new(now: Instant, disks: usize, patience: Duration) -> DiskWatch {
        let waiting = || Waiting { asked: BTreeMap::new(), answered: now };
        let watched = || Watched {
            reads: waiting(),
            writes: waiting(),
            slow: BTreeMap::new(),
            answered: now,
            probe: None,
            wants_probe: false,
            window: now,
            unread: BTreeSet::new(),
            unwritten: 0,
        };
        let disks = (0..disks).map(|_| watched()).collect();
        DiskWatch { disks, patience, next_look: None, runs_since: now, errors: 0 }
    }

    /// A command goes to a disk.
    pub fn on_command(&mut self, now: Instant, disk: usize, op: OpId, command: &DiskCommand) {
        let watched = &mut self.disks[disk];
        match command {
            DiskCommand::Read { offset, .. } => {
                watched.reads.asked.insert(op, (now, *offset));
            }
            DiskCommand::Write { offset, .. } => {
                watched.writes.asked.insert(op, (now, *offset));
            }
            _ => {
                watched.slow.insert(op, now);
            }
        }
        self.next_look.get_or_insert(now + LOOK_EVERY);
    }

    /// A disk that has been silent, while nobody reads or writes, is to be asked for its first block: the command.
    pub fn poll_probe(&mut self, now: Instant) -> Option<(usize, OpId, DiskCommand)> {
        let (disk, watched) = self.disks.iter_mut().enumerate().find(|(_, d)| d.wants_probe)?;
        (watched.wants_probe, watched.probe) = (false, Some(now));
        Some((disk, PROBE, DiskCommand::Read { offset: 0, length: BLOCK_SIZE }))
    }

    /// True if the answer is to what the watch itself asked; nobody else knows of it.
    pub fn is_probe(op: OpId) -> bool {
        op == PROBE
    }

    /// A disk has answered.
    pub fn on_answer(&mut self, now: Instant, disk: usize, op: OpId, result: &DiskResult) {
        let watched = &mut self.disks[disk];
        watched.answered = now;
        if Self::is_probe(op) {
            watched.probe = None; // An error is an answer; that this block is bad is found when it is needed.
            return;
        }
        if watched.slow.remove(&op).is_some() {
            return;
        }
        let kind = if watched.reads.asked.contains_key(&op) { &mut watched.reads } else { &mut watched.writes };
        kind.answered = now;
        let offset = kind.asked.remove(&op).map(|(_, offset)| offset);
        match (result, offset) {
            (DiskResult::Read(Err(_)), Some(offset)) => {
                watched.count(now).unread.insert(offset);
            }
            (DiskResult::Written(Err(_)), _) => watched.count(now).unwritten += 1,
            _ => return,
        }
        self.errors += 1;
    }

    /// Errors that disks have answered with, since the start.
    pub fn errors(&self) -> u64 {
        self.errors
    }

    /// When to look next.
    pub fn next_look(&self) -> Option<Instant> {
        self.next_look
    }

    /// Looks whether some disk is in trouble.
    pub fn look(&mut self, now: Instant) -> Option<(usize, Trouble)> {
        let look = self.next_look.filter(|at| *at <= now)?;
        if now.since(look) > LATE {
            self.runs_since = now;
        }
        for disk in 0..self.disks.len() {
            self.disks[disk].wants_probe = self.is_unknown(now, &self.disks[disk]);
        }
        let is_idle = self.disks.iter().all(Watched::is_idle);
        self.next_look = (!is_idle).then_some(now + LOOK_EVERY);
        self.disks.iter().enumerate().find_map(|(i, d)| Some((i, self.trouble(now, d)?)))
    }

    fn waited(&self, now: Instant, since: Instant) -> Duration {
        now.since(since.max(self.runs_since))
    }

    /// Only what may take long is waited for, and nothing was answered for so long that it may hang.
    fn is_unknown(&self, now: Instant, disk: &Watched) -> bool {
        let is_quiet = disk.reads.asked.is_empty() && disk.writes.asked.is_empty() && disk.probe.is_none();
        let since = |at: Instant| self.waited(now, at) >= self.patience;
        is_quiet && disk.slow.first_key_value().is_some_and(|(_, at)| since(*at)) && since(disk.answered)
    }

    fn trouble(&self, now: Instant, disk: &Watched) -> Option<Trouble> {
        let since = |at: Option<Instant>| at.map_or(Duration::ZERO, |at| self.waited(now, at));
        let (reads, writes, probe) = (since(disk.reads.oldest()), since(disk.writes.oldest()), since(disk.probe));
        let quick = reads.max(writes).max(probe);
        let slow = since(disk.slow.first_key_value().map(|(_, at)| *at));
        let is_silent = quick >= self.patience && since(Some(disk.answered)) >= self.patience;
        let longer = self.patience * 3 / 2;
        let hangs = |waits: Duration, kind: &Waiting| waits >= longer && since(Some(kind.answered)) >= longer;
        let is_half = hangs(reads, &disk.reads) || hangs(writes, &disk.writes);
        if is_silent || is_half || quick >= COMMAND_MAX || slow >= SLOW_MAX {
            let longest = quick.max(slow).as_millis();
            return Some(Trouble::Hangs(format!("has not answered for {longest} ms")));
        }
        if disk.unread.len() >= READ_ERRORS_MAX {
            return Some(Trouble::Fails(format!("could not be read at {READ_ERRORS_MAX} places within an hour")));
        }
        if disk.unwritten >= WRITE_ERRORS_MAX {
            return Some(Trouble::Fails(format!("failed {WRITE_ERRORS_MAX} writes within an hour")));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::HALF_LEASE;
    use crate::store::{DiskError, Table};
    use bytes::Bytes;

    const READ: DiskCommand = DiskCommand::Read { offset: 4096, length: 4096 };

    fn at(millis: u64) -> Instant {
        Instant::ZERO + Duration::from_millis(millis)
    }

    fn watch() -> DiskWatch {
        DiskWatch::new(Instant::ZERO, 2, HALF_LEASE)
    }

    /// Looks every 100 ms, from one moment to another; the moment of the first complaint.
    fn look(watch: &mut DiskWatch, from: u64, to: u64) -> Option<(u64, usize)> {
        (from / 100..=to / 100).find_map(|n| Some((n * 100, watch.look(at(n * 100))?.0)))
    }

    fn good() -> DiskResult {
        DiskResult::Read(Ok(Bytes::new()))
    }

    #[test]
    fn a_disk_that_answers_nothing_for_half_a_lease_hangs() {
        let mut watch = watch();
        watch.on_command(at(0), 1, 1, &READ);
        assert_eq!(look(&mut watch, 0, 2000), Some((500, 1)));
    }

    #[test]
    fn a_disk_that_answers_something_is_slow_until_one_command_has_waited_for_too_long() {
        let mut watch = watch();
        watch.on_command(at(0), 0, 1, &READ);
        for n in 1..100 {
            watch.on_command(at(n * 100), 0, n + 1, &READ);
            watch.on_answer(at(n * 100), 0, n + 1, &good());
            let expected = (n >= 50).then_some((n * 100, 0));
            assert_eq!(look(&mut watch, n * 100, n * 100), expected);
        }
    }

    #[test]
    fn a_disk_that_reads_on_while_no_write_ends_hangs_after_half_the_time_more() {
        let mut watch = watch();
        watch.on_command(at(0), 0, 1, &DiskCommand::Write { offset: 4096, pieces: Vec::new() });
        for n in 1..=10 {
            watch.on_command(at(n * 100), 0, n + 1, &READ);
            watch.on_answer(at(n * 100), 0, n + 1, &good());
            let expected = (n >= 8).then_some((n * 100, 0));
            assert_eq!(look(&mut watch, n * 100, n * 100), expected, "half a lease is 500 ms");
        }
    }

    #[test]
    fn a_disk_that_only_look_ups_wait_for_is_asked_for_a_block_and_hangs_if_it_does_not_give_it() {
        let get = DiskCommand::PmapGet { table: Table::Heads, key: Bytes::new() };
        let mut watch = watch();
        watch.on_command(at(0), 1, 1, &get);
        assert_eq!(look(&mut watch, 0, 400), None);
        assert!(watch.poll_probe(at(400)).is_none());
        assert_eq!(look(&mut watch, 500, 500), None);
        let (disk, op, _) = watch.poll_probe(at(500)).expect("silent for as long as it may be");
        assert!(disk == 1 && DiskWatch::is_probe(op) && watch.poll_probe(at(500)).is_none());
        assert_eq!(look(&mut watch, 600, 2000), Some((1000, 1)));
    }

    #[test]
    fn who_gives_the_block_may_take_its_time_for_look_ups() {
        let get = DiskCommand::PmapGet { table: Table::Heads, key: Bytes::new() };
        let mut watch = watch();
        watch.on_command(at(0), 1, 1, &get);
        let mut probes = 0;
        for n in 1..100 {
            assert_eq!(look(&mut watch, n * 100, n * 100), None);
            if let Some((disk, op, _)) = watch.poll_probe(at(n * 100)) {
                probes += 1;
                watch.on_answer(at(n * 100), disk, op, &good());
            }
        }
        assert_eq!(probes, 19, "one for each time of silence");
    }

    #[test]
    fn who_did_not_run_has_not_waited() {
        let mut watch = watch();
        watch.on_command(at(0), 0, 1, &READ);
        assert_eq!(watch.look(at(4000)), None, "the answer may be waiting to be taken up");
        assert_eq!(look(&mut watch, 4100, 9000), Some((4500, 0)));
    }

    #[test]
    fn a_checkpoint_may_take_its_time() {
        let mut watch = watch();
        watch.on_command(at(0), 0, 1, &DiskCommand::PmapCommit { changes: Vec::new() });
        assert_eq!(look(&mut watch, 0, 90_000), Some((60_000, 0)));
    }

    #[test]
    fn nothing_is_looked_at_when_nothing_is_waited_for() {
        let mut watch = watch();
        watch.on_command(at(0), 0, 1, &READ);
        watch.on_answer(at(1), 0, 1, &good());
        assert_eq!(watch.look(at(100)), None);
        assert_eq!(watch.next_look(), None);
    }

    #[test]
    fn errors_at_many_places_count_and_the_same_place_again_does_not() {
        let mut watch = watch();
        let errors = |watch: &mut DiskWatch, first: u64, step: u64| {
            for n in 0..READ_ERRORS_MAX as u64 {
                let command = DiskCommand::Read { offset: n * step, length: 4096 };
                watch.on_command(at(10), 0, first + n, &command);
                watch.on_answer(at(10), 0, first + n, &DiskResult::Read(Err(DiskError::Io("bad".into()))));
            }
            look(watch, 100, 300)
        };
        assert_eq!(errors(&mut watch, 1, 0), None);
        assert!(errors(&mut watch, 100_000, 4096).is_some());
        assert_eq!(watch.errors(), 2 * READ_ERRORS_MAX as u64);
    }
}
