//! Watches this server's own disks: which do not answer, and which fail too often (2.5, 2.10).
//!
//! A disk that hangs holds up every write of every slot that its server is in sync in, and every read that it acts
//! for, while the ring still hears the server. So the server takes itself out of the way (`Server::leave`); it begins a
//! new life when the disk answers again.
//!
//! *Hangs*: a read or write has waited for as long as the config says (half a lease, if it says nothing) and nothing at all was answered meanwhile; or one has waited
//! for [`COMMAND_MAX`]. A disk under much load answers something, and is only slow. Commands of the PMap store and
//! growth, which take long on a healthy disk too and which nobody waits for at once, have [`SLOW_MAX`].
//! Time counts only while this server ran: after a stall every clock begins anew.
//!
//! *Fails too often*: a block that cannot be read is repaired, and a write that failed once is tried again; but a disk
//! that does this at [`READ_ERRORS_MAX`] places, or to [`WRITE_ERRORS_MAX`] writes, within an hour is not trusted any more.
//! Blocks that do not have their checksum do not count: somebody may have written over them, and they are repaired.

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
    /// What was not answered, with when it was asked and where; those that may take long apart. Numbers grow with time.
    quick: BTreeMap<OpId, (Instant, u64)>,
    slow: BTreeMap<OpId, Instant>,
    answered: Instant,
    window: Instant,
    unread: BTreeSet<u64>,
    unwritten: u32,
}

impl Watched {
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
        let watched = || Watched {
            quick: BTreeMap::new(),
            slow: BTreeMap::new(),
            answered: now,
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
            DiskCommand::Read { offset, .. } | DiskCommand::Write { offset, .. } => {
                watched.quick.insert(op, (now, *offset));
            }
            _ => {
                watched.slow.insert(op, now);
            }
        }
        self.next_look.get_or_insert(now + LOOK_EVERY);
    }

    /// A disk has answered.
    pub fn on_answer(&mut self, now: Instant, disk: usize, op: OpId, result: &DiskResult) {
        let watched = &mut self.disks[disk];
        watched.answered = now;
        watched.slow.remove(&op);
        let offset = watched.quick.remove(&op).map(|(_, offset)| offset);
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
        let is_idle = self.disks.iter().all(|d| d.quick.is_empty() && d.slow.is_empty());
        self.next_look = (!is_idle).then_some(now + LOOK_EVERY);
        self.disks.iter().enumerate().find_map(|(i, d)| Some((i, self.trouble(now, d)?)))
    }

    fn trouble(&self, now: Instant, disk: &Watched) -> Option<Trouble> {
        let waited = |since: Instant| now.since(since.max(self.runs_since));
        let quick = disk.quick.first_key_value().map_or(Duration::ZERO, |(_, (at, _))| waited(*at));
        let slow = disk.slow.first_key_value().map_or(Duration::ZERO, |(_, at)| waited(*at));
        let is_silent = quick >= self.patience && waited(disk.answered) >= self.patience;
        if is_silent || quick >= COMMAND_MAX || slow >= SLOW_MAX {
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
    use crate::store::DiskError;
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
