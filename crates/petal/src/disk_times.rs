//! How long a server's own disks take: what tells a slow one from a busy one is the comparison with the others, which
//! `petal status` makes (2.13, fail-slow). Clients need none of this: they see how long each server takes, whatever
//! the reason, and read from another copy (`client/link.rs`).
//!
//! Times are those of the commands as the core gives and gets them back, so a driver that comes late counts, too.
//! Never fails; decides nothing.

use crate::ids::ELEMENT_SIZE;
use crate::store::{DiskCommand, OpId};
use std::collections::BTreeMap;
use stdx::{Duration, Instant, Recent};

/// What was measured longer ago says nothing about now.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);

/// Reads or writes of one disk.
#[derive(Debug, Default)]
struct Times {
    recent: Recent,
    last: Instant,
}

/// Of all disks of a server.
#[derive(Debug, Default)]
pub(crate) struct DiskTimes {
    /// Of each disk: reads, writes.
    disks: BTreeMap<usize, [Times; 2]>,
    /// Commands on their way, as many as the store lets be.
    begun: BTreeMap<(usize, OpId), (usize, Instant)>,
}

impl DiskTimes {
    /// A command goes to a disk.
    pub fn begun(&mut self, now: Instant, disk: usize, op: OpId, command: &DiskCommand) {
        let kind = match command {
            // What a start reads of the journal, all at one time, says nothing of the disk.
            DiskCommand::Read { length, .. } if *length > ELEMENT_SIZE => return,
            DiskCommand::Read { .. } => 0,
            DiskCommand::Write { .. } => 1,
            _ => return,
        };
        self.begun.insert((disk, op), (kind, now));
    }

    /// It was answered.
    pub fn ended(&mut self, now: Instant, disk: usize, op: OpId) {
        if let Some((kind, begun)) = self.begun.remove(&(disk, op)) {
            let times = &mut self.disks.entry(disk).or_default()[kind];
            times.recent.add(now.since(begun));
            times.last = now;
        }
    }

    /// What 95 of 100 reads, and writes, took lately at the slowest disk, in microseconds; zero where little was
    /// asked. A command that has been waiting for longer counts as taking that long.
    pub fn worst(&self, now: Instant) -> [u64; 2] {
        let mut worst = [0; 2];
        for times in self.disks.values() {
            for (kind, times) in times.iter().enumerate() {
                if let Some(p95) = times.recent.p95().filter(|_| now.since(times.last) < FORGOTTEN_AFTER) {
                    worst[kind] = worst[kind].max(micros(p95));
                }
            }
        }
        for (kind, begun) in self.begun.values() {
            let waits = now.since(*begun);
            if waits >= WAITS_LONG {
                worst[*kind] = worst[*kind].max(micros(waits));
            }
        }
        worst
    }
}

/// A command that has waited for less may just have come.
const WAITS_LONG: Duration = Duration::from_millis(500);

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Instant {
        Instant::from_nanos(millis * 1_000_000)
    }

    fn read(times: &mut DiskTimes, disk: usize, op: u64, from: u64, to: u64) {
        times.begun(at(from), disk, op, &DiskCommand::Read { offset: 0, length: 4096 });
        times.ended(at(to), disk, op);
    }

    #[test]
    fn the_slowest_disk_counts_and_old_times_do_not() {
        let mut times = DiskTimes::default();
        for n in 0..20 {
            read(&mut times, 0, n, n * 10, n * 10 + 1);
            read(&mut times, 1, n, n * 10, n * 10 + 8);
        }
        assert_eq!(times.worst(at(300)), [8000, 0]);
        assert_eq!(times.worst(at(61_000)), [0, 0]);
    }

    #[test]
    fn a_disk_that_does_not_answer_shows_by_what_waits_for_it() {
        let mut times = DiskTimes::default();
        times.begun(at(0), 0, 1, &DiskCommand::Write { offset: 0, pieces: vec![] });
        assert_eq!(times.worst(at(400)), [0, 0]);
        assert_eq!(times.worst(at(2400)), [0, 2_400_000]);
        times.ended(at(2500), 0, 1);
        assert_eq!(times.worst(at(2600)), [0, 0], "one is not enough to judge by");
    }
}
