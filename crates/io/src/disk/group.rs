//! Which writes one sync covers: group commit, one level below the journal's.
//!
//! A sync makes durable what had ended before it began. While one runs, further writes end and wait for
//! the next. One more rule saves half the syncs: the next sync also waits for those writes that were
//! already on their way when the first of its group ended, because a journal record and its data are
//! issued together and nobody is helped when only one of them is durable. A write that is issued later
//! is not waited for, so no stream of writes can hold up a sync.
//!
//! ```text
//! issue 1 2        3 4          5 6
//! end       2   1       4    3       ...
//! sync          |-{1,2}-|    |-{3,4}-|
//! ```

use std::collections::BTreeSet;

/// The writes of one disk between their issue and their answer. `T` is what the engine wants to have
/// back with the answer.
#[derive(Debug)]
pub(super) struct Group<T> {
    next_serial: u64,
    in_flight: BTreeSet<u64>,
    /// Ended, not yet durable.
    ended: Vec<T>,
    /// Writes below this serial that are in flight are waited for; set by the first of `ended`.
    gate: u64,
    /// What the running sync covers.
    syncing: Option<Vec<T>>,
}

impl<T> Default for Group<T> {
    fn default() -> Self {
        Group { next_serial: 0, in_flight: BTreeSet::new(), ended: Vec::new(), gate: 0, syncing: None }
    }
}

impl<T> Group<T> {
    /// A write is issued; its serial number.
    pub(super) fn issued(&mut self) -> u64 {
        self.next_serial += 1;
        self.in_flight.insert(self.next_serial);
        self.next_serial
    }

    /// A write ended well: it waits for a sync.
    pub(super) fn ended(&mut self, serial: u64, what: T) {
        if self.ended.is_empty() {
            self.gate = self.next_serial + 1;
        }
        self.dropped(serial);
        self.ended.push(what);
    }

    /// A write ended badly, and is answered at once.
    pub(super) fn dropped(&mut self, serial: u64) {
        assert!(self.in_flight.remove(&serial), "write {serial} ended twice");
    }

    /// True if a sync must be issued now; it is then running.
    pub(super) fn begin_sync(&mut self) -> bool {
        let waits = self.in_flight.first().is_some_and(|first| *first < self.gate);
        if self.syncing.is_some() || self.ended.is_empty() || waits {
            return false;
        }
        self.syncing = Some(std::mem::take(&mut self.ended));
        true
    }

    /// The sync ended: these writes can be answered.
    pub(super) fn sync_ended(&mut self) -> Vec<T> {
        self.syncing.take().expect("a sync was running")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_issued_together_shares_a_sync() {
        let mut group = Group::default();
        let (data, record) = (group.issued(), group.issued());
        group.ended(record, "record");
        assert!(!group.begin_sync(), "the data is still on its way");
        group.ended(data, "data");
        assert!(group.begin_sync());
        assert_eq!(group.sync_ended(), ["record", "data"]);
        assert!(!group.begin_sync());
    }

    #[test]
    fn what_ends_during_a_sync_waits_for_the_next() {
        let mut group = Group::default();
        let (first, second) = (group.issued(), group.issued());
        group.ended(first, 1);
        group.dropped(second);
        assert!(group.begin_sync());
        let third = group.issued();
        group.ended(third, 3);
        assert!(!group.begin_sync());
        assert_eq!(group.sync_ended(), [1]);
        assert!(group.begin_sync());
        assert_eq!(group.sync_ended(), [3]);
    }

    #[test]
    fn a_stream_of_later_writes_does_not_hold_up_a_sync() {
        let mut group = Group::default();
        let first = group.issued();
        group.ended(first, 1);
        let _later = group.issued();
        assert!(group.begin_sync());
    }
}
