//! What the clients asked and were told, in the one order in which the world saw it.
//!
//! Operations are recorded per cell ([`crate::content`]), because that is what the checker judges.
//! Moments are the history's own count, not virtual time: two things that happen in one nanosecond
//! have an order too.

use crate::checkers::linearizability::{Action, Operation};
use crate::content::{Value, ZEROS};
use crate::families::Shown;
use petal::ids::{SessionId, VdiskId};
use std::collections::{BTreeMap, BTreeSet};

/// Number of an operation, and the value that it writes. From 1.
pub type OperationId = u64;

/// A cell of a line or of a point: its first byte.
pub type Cell = (Shown, u64);

/// Whose cells an operation is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// The disk or snapshot: what is fenced.
    pub vdisk: VdiskId,
    /// What the session sees of it: where the cells are.
    pub shown: Shown,
    /// The session; `None`: nobody's.
    pub session: Option<SessionId>,
}

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
    target: Target,
    effect: Effect,
    invoked: u64,
    /// Cells, and whether the operation may leave this one as it was even when it is acknowledged.
    cells: Vec<(u64, bool)>,
    /// A fence returned at this moment.
    fenced: Option<u64>,
    /// It was fenced before it was invoked.
    dead: bool,
}

/// Who did what, when, and where.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// Who, and where.
    pub target: Target,
    /// What.
    pub effect: Effect,
    /// When it was invoked.
    pub invoked: u64,
}

/// The history of a run.
#[derive(Default)]
pub struct History {
    clock: u64,
    next: OperationId,
    open: BTreeMap<OperationId, Open>,
    /// Sessions of the disk that are older than this one are over.
    fences: BTreeMap<VdiskId, SessionId>,
    /// These are over, too.
    ended: BTreeSet<SessionId>,
    complaints: Vec<String>,
    origins: BTreeMap<OperationId, Origin>,
    cells: BTreeMap<Cell, Vec<Operation>>,
    finished: u64,
    unknown: u64,
}

impl History {
    /// An operation begins. Each cell says whether the operation may leave it alone (a discard of part
    /// of a block).
    pub fn invoke(&mut self, target: Target, effect: Effect, cells: Vec<(u64, bool)>) -> OperationId {
        self.next += 1;
        let invoked = self.tick();
        self.origins.insert(self.next, Origin { target, effect, invoked });
        let fence = self.fences.get(&target.vdisk).copied();
        let is_over = |session| fence.is_some_and(|fence| session < fence) || self.ended.contains(&session);
        let dead = target.session.is_some_and(is_over);
        self.open.insert(self.next, Open { target, effect, invoked, cells, fenced: None, dead });
        self.next
    }

    /// The number of the newest operation.
    pub fn last(&self) -> OperationId {
        self.next
    }

    /// A moment, between all others.
    pub fn moment(&mut self) -> u64 {
        self.tick()
    }

    /// A read saw this in one of its cells. Called before `finish`.
    pub fn saw(&mut self, id: OperationId, cell: u64, value: Value) {
        let returned = self.clock + 1;
        let open = &self.open[&id];
        debug_assert_eq!(open.effect, Effect::Read);
        let read = Operation { id, invoked: open.invoked, returned, optional: false, action: Action::Read(value) };
        self.cells.entry((open.target.shown, cell)).or_default().push(read);
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
                let Target { vdisk, session, .. } = open.target;
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
            self.cells.entry((open.target.shown, cell)).or_default().push(write);
        }
    }

    /// A fencing call for the disk returned with session `keep`: what older sessions have not finished
    /// takes effect before now or never, and what they ask from now on never does (promise P5).
    pub fn fence(&mut self, vdisk: VdiskId, keep: SessionId) {
        let now = self.tick();
        let fence = self.fences.entry(vdisk).or_insert(keep);
        *fence = keep.max(*fence);
        self.end_all(now, |target| target.vdisk == vdisk && target.session.is_some_and(|s| s < keep));
    }

    /// A call returned that has ended this session: the same for what it has asked.
    pub fn end_session(&mut self, session: SessionId) {
        let now = self.tick();
        self.ended.insert(session);
        self.end_all(now, |target| target.session == Some(session));
    }

    fn end_all(&mut self, now: u64, is_over: impl Fn(&Target) -> bool) {
        for open in self.open.values_mut().filter(|open| is_over(&open.target)) {
            open.fenced.get_or_insert(now);
        }
    }

    /// Who did an operation, when and where; `None` for what nobody did.
    pub fn origin_of(&self, id: OperationId) -> Option<&Origin> {
        self.origins.get(&id)
    }

    /// What an operation was, in words.
    pub fn origin(&self, id: OperationId) -> String {
        match self.origins.get(&id) {
            Some(Origin { target: Target { session: Some(session), .. }, effect, .. }) => {
                format!("{effect:?} of {session}")
            }
            Some(origin) => format!("{:?} of no session", origin.effect),
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

    /// Operations on one cell.
    pub fn of_cell(&self, cell: Cell) -> &[Operation] {
        self.cells.get(&cell).map_or(&[], |operations| operations)
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
impl Target {
    /// A disk that is its family's only one.
    pub(crate) fn of(vdisk: VdiskId, session: Option<SessionId>) -> Target {
        let line = crate::families::Line { family: petal::ids::FamilyId(vdisk.0), lineage: petal::ids::LineageId(1) };
        Target { vdisk, shown: Shown::Line(line), session }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::linearizability::{Verdict, check};

    const DISK: VdiskId = VdiskId(5);

    fn target(session: Option<u64>) -> Target {
        Target::of(DISK, session.map(SessionId))
    }

    fn verdict(history: &History, cell: u64) -> Verdict {
        let found = history.cells().find(|(c, _)| **c == (target(None).shown, cell)).expect("the cell was used");
        check(found.1, ZEROS)
    }

    #[test]
    fn acknowledged_values_are_found_and_lost_ones_may_be() {
        let mut h = History::default();
        let a = h.invoke(target(None), Effect::Write, vec![(0, false), (512, false)]);
        h.finish(a, End::Done);
        let b = h.invoke(target(None), Effect::Write, vec![(0, false)]);
        h.finish(b, End::Unknown);
        let r = h.invoke(target(None), Effect::Read, vec![]);
        h.saw(r, 0, b);
        h.saw(r, 512, a);
        h.finish(r, End::Done);
        assert_eq!(verdict(&h, 512), Verdict::Linearizable);
        let r = h.invoke(target(None), Effect::Read, vec![]);
        h.saw(r, 0, a);
        h.finish(r, End::Done);
        h.close();
        assert!(matches!(verdict(&h, 0), Verdict::Violation { .. }));
    }

    #[test]
    fn a_session_that_was_ended_changes_nothing_any_more() {
        let mut h = History::default();
        let w = h.invoke(target(Some(1)), Effect::Write, vec![(0, false)]);
        let other = h.invoke(target(Some(2)), Effect::Write, vec![(4096, false)]);
        h.end_session(SessionId(1));
        for (cell, seen) in [(0, ZEROS), (0, w), (4096, ZEROS), (4096, other)] {
            let r = h.invoke(target(Some(2)), Effect::Read, vec![]);
            h.saw(r, cell, seen);
            h.finish(r, End::Done);
        }
        let w = h.invoke(target(Some(1)), Effect::Write, vec![(0, false)]);
        h.finish(w, End::Done);
        assert_eq!(h.complaints().len(), 1);
        h.close();
        assert!(matches!(verdict(&h, 0), Verdict::Violation { .. }));
        assert_eq!(verdict(&h, 4096), Verdict::Linearizable);
    }

    #[test]
    fn an_operation_of_a_fenced_session_is_never_acknowledged() {
        let mut h = History::default();
        h.fence(DISK, SessionId(2));
        let w = h.invoke(target(Some(1)), Effect::Write, vec![(0, false)]);
        h.finish(w, End::Done);
        assert_eq!(h.complaints().len(), 1);
        let w = h.invoke(target(Some(2)), Effect::Write, vec![(0, false)]);
        h.finish(w, End::Done);
        assert_eq!(h.complaints().len(), 1);
    }

    #[test]
    fn a_fenced_write_that_lands_late_is_a_violation() {
        let late = |fenced: bool| {
            let mut h = History::default();
            let w = h.invoke(target(Some(1)), Effect::Write, vec![(0, false)]);
            if fenced {
                h.fence(DISK, SessionId(2));
            }
            for seen in [ZEROS, w] {
                let r = h.invoke(target(Some(2)), Effect::Read, vec![]);
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
