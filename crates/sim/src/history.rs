//! What the clients asked and were told, in the one order in which the world saw it.
//!
//! Operations are recorded per cell ([`crate::content`]), because that is what the checker judges.
//! Moments are the history's own count, not virtual time: two things that happen in one nanosecond
//! have an order too.

use crate::checkers::linearizability::{Action, Operation};
use crate::content::{Value, ZEROS};
use petal::ids::{SessionId, VdiskId};
use std::collections::BTreeMap;

/// Number of an operation, and the value that it writes. From 1.
pub type OperationId = u64;

/// A cell of a disk: its first byte.
pub type Cell = (VdiskId, u64);

/// How an operation ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Acknowledged.
    Done,
    /// Nobody knows: its client died, or the answer said that it may or may not have been done.
    Unknown,
}

/// What an operation changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Nothing: a read.
    Read,
    /// Sets these cells to its own number.
    Write,
    /// Sets these cells to zero.
    Zero,
}

struct Open {
    vdisk: VdiskId,
    session: Option<SessionId>,
    effect: Effect,
    invoked: u64,
    /// Cells, and whether the operation may leave this one as it was even when it is acknowledged.
    cells: Vec<(u64, bool)>,
    /// A fence returned at this moment.
    fenced: Option<u64>,
    /// It was fenced before it was invoked.
    dead: bool,
}

/// The history of a run.
#[derive(Default)]
pub struct History {
    clock: u64,
    next: OperationId,
    open: BTreeMap<OperationId, Open>,
    /// Sessions of the disk that are older than this one are over.
    fences: BTreeMap<VdiskId, SessionId>,
    complaints: Vec<String>,
    /// Who did it and what it was, for reports.
    origins: BTreeMap<OperationId, (Option<SessionId>, Effect)>,
    cells: BTreeMap<Cell, Vec<Operation>>,
    finished: u64,
    unknown: u64,
}

impl History {
    /// An operation begins. Each cell says whether the operation may leave it alone (a discard of part
    /// of a block).
    pub fn invoke(
        &mut self,
        vdisk: VdiskId,
        session: Option<SessionId>,
        effect: Effect,
        cells: Vec<(u64, bool)>,
    ) -> OperationId {
        self.next += 1;
        let invoked = self.tick();
        self.origins.insert(self.next, (session, effect));
        let fence = self.fences.get(&vdisk);
        let dead = fence.zip(session).is_some_and(|(fence, session)| session < *fence);
        self.open.insert(self.next, Open { vdisk, session, effect, invoked, cells, fenced: None, dead });
        self.next
    }

    /// A read saw this in one of its cells. Called before `finish`.
    pub fn saw(&mut self, id: OperationId, cell: u64, value: Value) {
        let returned = self.clock + 1;
        let open = &self.open[&id];
        debug_assert_eq!(open.effect, Effect::Read);
        let read = Operation { id, invoked: open.invoked, returned, optional: false, action: Action::Read(value) };
        self.cells.entry((open.vdisk, cell)).or_default().push(read);
    }

    /// An operation ends.
    pub fn finish(&mut self, id: OperationId, end: End) {
        let now = self.tick();
        if end == End::Unknown {
            // It stays open: a later fence says when it can have taken effect at the latest.
            self.unknown += 1;
            return;
        }
        let Some(open) = self.open.remove(&id) else { return };
        self.finished += 1;
        self.record(id, open, Some(now));
    }

    /// Enters an operation into the cells that it changes; without a moment if it was not acknowledged.
    fn record(&mut self, id: OperationId, open: Open, acknowledged: Option<u64>) {
        let value = match open.effect {
            Effect::Read => return,
            Effect::Write => id,
            Effect::Zero => ZEROS,
        };
        if open.dead {
            // (A discard that may leave all of its cells alone need not ask anybody.)
            if acknowledged.is_some() && open.cells.iter().any(|c| !c.1) {
                let (vdisk, session) = (open.vdisk, open.session);
                let words =
                    format!("operation {id} on {vdisk} was acknowledged although {session:?} was fenced before");
                self.complaints.push(words);
            }
            // It never takes effect: whoever reads its value reads what nobody wrote.
            return;
        }
        for (cell, may_skip) in open.cells {
            let returned = open.fenced.or(acknowledged).unwrap_or(u64::MAX);
            let optional = may_skip || acknowledged.is_none();
            let write = Operation { id, invoked: open.invoked, returned, optional, action: Action::Write(value) };
            self.cells.entry((open.vdisk, cell)).or_default().push(write);
        }
    }

    /// A fencing call for the disk returned with session `keep`: what older sessions have not finished
    /// takes effect before now or never, and what they ask from now on never does (promise P5).
    pub fn fence(&mut self, vdisk: VdiskId, keep: SessionId) {
        let now = self.tick();
        let fence = self.fences.entry(vdisk).or_insert(keep);
        *fence = keep.max(*fence);
        for open in self.open.values_mut() {
            if open.vdisk == vdisk && open.session.is_some_and(|s| s < keep) && open.fenced.is_none() {
                open.fenced = Some(now);
            }
        }
    }

    /// What an operation was, in words.
    pub fn origin(&self, id: OperationId) -> String {
        match self.origins.get(&id) {
            Some((Some(session), effect)) => format!("{effect:?} of {session}"),
            Some((None, effect)) => format!("{effect:?} of no session"),
            None => "nobody".into(),
        }
    }

    /// What is wrong by itself, whatever the cells say.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// The run is over: what is open is unknown.
    pub fn close(&mut self) {
        for (id, open) in std::mem::take(&mut self.open) {
            self.record(id, open, None);
        }
    }

    /// Every cell with its operations.
    pub fn cells(&self) -> impl Iterator<Item = (&Cell, &Vec<Operation>)> {
        self.cells.iter()
    }

    /// Acknowledged operations.
    pub fn finished(&self) -> u64 {
        self.finished
    }

    /// Operations of which nobody knows what became.
    pub fn unknown(&self) -> u64 {
        self.unknown
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::linearizability::{Verdict, check};

    const DISK: VdiskId = VdiskId(5);

    fn verdict(history: &History, cell: u64) -> Verdict {
        let found = history.cells().find(|(c, _)| **c == (DISK, cell)).expect("the cell was used");
        check(found.1, ZEROS)
    }

    #[test]
    fn acknowledged_values_are_found_and_lost_ones_may_be() {
        let mut h = History::default();
        let a = h.invoke(DISK, None, Effect::Write, vec![(0, false), (512, false)]);
        h.finish(a, End::Done);
        let b = h.invoke(DISK, None, Effect::Write, vec![(0, false)]);
        h.finish(b, End::Unknown);
        let r = h.invoke(DISK, None, Effect::Read, vec![]);
        h.saw(r, 0, b);
        h.saw(r, 512, a);
        h.finish(r, End::Done);
        assert_eq!(verdict(&h, 512), Verdict::Linearizable);
        let r = h.invoke(DISK, None, Effect::Read, vec![]);
        h.saw(r, 0, a);
        h.finish(r, End::Done);
        h.close();
        assert!(matches!(verdict(&h, 0), Verdict::Violation { .. }));
    }

    #[test]
    fn an_operation_of_a_fenced_session_is_never_acknowledged() {
        let mut h = History::default();
        h.fence(DISK, SessionId(2));
        let w = h.invoke(DISK, Some(SessionId(1)), Effect::Write, vec![(0, false)]);
        h.finish(w, End::Done);
        assert_eq!(h.complaints().len(), 1);
        let w = h.invoke(DISK, Some(SessionId(2)), Effect::Write, vec![(0, false)]);
        h.finish(w, End::Done);
        assert_eq!(h.complaints().len(), 1);
    }

    #[test]
    fn a_fenced_write_that_lands_late_is_a_violation() {
        let late = |fenced: bool| {
            let mut h = History::default();
            let w = h.invoke(DISK, Some(SessionId(1)), Effect::Write, vec![(0, false)]);
            if fenced {
                h.fence(DISK, SessionId(2));
            }
            for seen in [ZEROS, w] {
                let r = h.invoke(DISK, Some(SessionId(2)), Effect::Read, vec![]);
                h.saw(r, 0, seen);
                h.finish(r, End::Done);
            }
            h.close();
            verdict(&h, 0)
        };
        assert_eq!(late(false), Verdict::Linearizable);
        assert!(matches!(late(true), Verdict::Violation { .. }));
    }
}
