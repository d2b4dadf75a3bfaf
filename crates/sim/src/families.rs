//! What the log says of families: which line a session of a disk writes, and which point a snapshot shows.
//!
//! ```text
//!  line (f9, l1)   --e1--e2--e3-->     vol0 writes here
//!                      |   `- point (f9, l1, e2)   vol0@monday shows it
//!                      `- line (f9, l2), parent point (f9, l1, e1)   a clone writes here
//! ```
//!
//! The checkers judge *lines*, each with a history of its own, and *points*, which never change. A disk that is
//! rolled back goes on in another line; a session sees one line only, because nobody has a disk attached while it is
//! rolled back. Learnt from the states of the servers, which are the same everywhere (`checkers/global_state.rs`), so
//! that it is right although the answer to a command is lost.

use petal::global_state::State;
use petal::ids::{Epoch, FamilyId, LineageId, SessionId, StateIndex, VdiskId};
use std::collections::{BTreeMap, BTreeSet};

/// A writable line of states.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Line {
    /// The family.
    pub family: FamilyId,
    /// The lineage.
    pub lineage: LineageId,
}

/// The state in which a line was when an epoch of it was over.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Point {
    /// The line.
    pub line: Line,
    /// The epoch.
    pub epoch: Epoch,
}

/// What a session sees.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Shown {
    /// Of a disk: what is written there.
    Line(Line),
    /// Of a snapshot: what never changes.
    Point(Point),
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.family, self.lineage)
    }
}

impl std::fmt::Display for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.line, self.epoch)
    }
}

impl std::fmt::Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Shown::Line(line) => write!(f, "{line}"),
            Shown::Point(point) => write!(f, "{point}"),
        }
    }
}

/// All that was seen of families.
#[derive(Default)]
pub struct Families {
    seen: BTreeSet<StateIndex>,
    /// The line of a disk, from a state index on.
    lines: BTreeMap<VdiskId, BTreeMap<StateIndex, Line>>,
    points: BTreeMap<VdiskId, Point>,
    parents: BTreeMap<Line, Point>,
    /// Lines that need nothing of their parents any more.
    flattened: BTreeSet<Line>,
}

impl Families {
    /// Looks at a state, whoever has it.
    pub fn see(&mut self, state: &State) {
        if !self.seen.insert(state.index) {
            return;
        }
        for disk in state.vdisks.values() {
            let line = Line { family: disk.family, lineage: disk.lineage };
            if disk.is_snapshot() {
                self.points.insert(disk.id, Point { line, epoch: disk.epoch });
            } else {
                self.lines.entry(disk.id).or_default().insert(disk.stands_on, line);
            }
        }
        let lineages =
            state.families.values().flat_map(|f| f.lineages.iter().map(move |(id, l)| (f.id, *id, l.parent)));
        for (family, lineage, parent) in lineages {
            let line = Line { family, lineage };
            if let Some((lineage, epoch)) = parent {
                self.parents.insert(line, Point { line: Line { family, lineage }, epoch });
            } else if self.parents.contains_key(&line) {
                self.flattened.insert(line);
            }
        }
    }

    /// What a session of this disk or snapshot sees.
    pub fn shown(&self, vdisk: VdiskId, session: SessionId) -> Option<Shown> {
        if let Some(point) = self.points.get(&vdisk) {
            return Some(Shown::Point(*point));
        }
        let (_, line) = self.lines.get(&vdisk)?.range(..=session.0).next_back()?;
        Some(Shown::Line(*line))
    }

    /// The point that a snapshot shows.
    pub fn point(&self, snapshot: VdiskId) -> Option<Point> {
        self.points.get(&snapshot).copied()
    }

    /// The first line of a disk.
    pub fn first_line(&self, disk: VdiskId) -> Option<Line> {
        self.lines.get(&disk)?.values().next().copied()
    }

    /// How many lines were cut off from their parents.
    pub fn flattened(&self) -> usize {
        self.flattened.len()
    }

    /// Where a line began.
    pub fn parent(&self, line: Line) -> Option<Point> {
        self.parents.get(&line).copied()
    }
}

#[cfg(test)]
impl Families {
    /// Of a line that began at a point.
    pub(crate) fn of_test(line: Line, parent: Point) -> Families {
        Families { parents: BTreeMap::from([(line, parent)]), ..Families::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_sees_the_line_that_the_disk_had_when_it_began() {
        let line = |lineage| Line { family: FamilyId(4), lineage: LineageId(lineage) };
        let mut families = Families::default();
        families.lines.insert(VdiskId(4), BTreeMap::from([(0, line(1)), (20, line(2))]));
        let shown = |session| families.shown(VdiskId(4), SessionId(session));
        assert_eq!(shown(19), Some(Shown::Line(line(1))));
        assert_eq!(shown(21), Some(Shown::Line(line(2))));
        assert_eq!(families.shown(VdiskId(5), SessionId(30)), None);
    }
}
