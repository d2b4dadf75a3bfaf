//! A snapshot never changes, and it is a cut (promise P6); clones begin with it, and are their own from then on (P2).
//!
//! * *It never changes*: every read of a cell of a point ([`crate::families`]), whoever was asked, whenever, and
//!   whatever had died in between, has the same value.
//! * *It is a state of its disk*: the command that took it reads every cell at a moment of its own between the call and
//!   the answer. So this read is entered into the history of the line, which must then be linearizable: what was
//!   acknowledged before the call is in the snapshot, what was asked after the answer is not. A call whose answer
//!   nobody knows ends, for a cell, when somebody has read it in the snapshot.
//! * *It is a cut*: what was acknowledged before something was asked that is in the snapshot is in it, too; also in the
//!   other snapshots of the same command. That holds for whoever learnt of the acknowledgement, by whatever way:
//!   on a disk that only one client can write that is this client, on others no write of the new epoch is complete before
//!   everybody knows of it.
//! * *Clones and rollbacks* are lines that begin with what the point holds. Where nobody has read a cell of the
//!   point, a value that was seen in a clone and that nobody wrote there tells what it is. Children are younger than
//!   their parents, so lines are judged the youngest first.

use super::durability;
use super::linearizability::{Action, Operation, SNAPSHOT, SPENT, Verdict, check, complaint, in_words};
use crate::content::{Value, ZEROS};
use crate::families::{Families, Line, Point, Shown};
use crate::history::History;
use std::collections::{BTreeMap, BTreeSet};

/// When a point was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    /// By which command: one can make several.
    pub command: usize,
    /// When it was asked for, in the history's own count.
    pub invoked: u64,
    /// When it was said to be done and settled, if that is known.
    pub returned: Option<u64>,
}

/// What a cell of a point holds.
#[derive(Clone, Copy, Debug)]
struct Known {
    value: Value,
    /// It was seen at this moment.
    seen: u64,
}

/// Judges everything that was read and written.
pub fn complaints(history: &History, families: &Families, taken: &BTreeMap<Point, Taken>) -> Vec<String> {
    let mut judge = Judge { history, families, taken, known: BTreeMap::new(), complaints: Vec::new() };
    judge.points();
    judge.lines();
    judge.cuts();
    judge.complaints
}

struct Judge<'a> {
    history: &'a History,
    families: &'a Families,
    taken: &'a BTreeMap<Point, Taken>,
    known: BTreeMap<(Point, u64), Known>,
    complaints: Vec<String>,
}

impl Judge<'_> {
    /// What was read of snapshots.
    fn points(&mut self) {
        for ((shown, cell), operations) in self.history.cells() {
            let Shown::Point(point) = *shown else { continue };
            let reads = || operations.iter().filter_map(|o| Some((o, read_value(o)?)));
            let Some((first, value)) = reads().min_by_key(|(o, _)| o.returned) else { continue };
            if let Some((other, _)) = reads().find(|(_, v)| *v != value) {
                self.complaints.push(format!(
                    "a snapshot has changed (P6): {point}, cell at {cell}: {}; {}",
                    in_words(first),
                    in_words(other)
                ));
            }
            let written = operations.iter().find(|o| read_value(o).is_none());
            if let Some(written) = written.filter(|o| !o.optional) {
                self.complaints.push(format!("a snapshot was written: {point}, cell at {cell}: {}", in_words(written)));
            }
            self.known.insert((point, *cell), Known { value, seen: first.returned });
        }
    }

    fn lines(&mut self) {
        let of_history = self.history.cells().filter_map(|((shown, cell), _)| match shown {
            Shown::Line(line) => Some((*line, *cell)),
            Shown::Point(_) => None,
        });
        let of_points = self.known.keys().map(|(point, cell)| (point.line, *cell));
        let mut cells: BTreeSet<(Line, u64)> = of_history.chain(of_points).collect();
        while let Some((line, cell)) = cells.pop_last() {
            self.line(line, cell);
            // What was seen here may have told what the parent holds.
            let parent = self.families.parent(line).filter(|p| self.known.contains_key(&(*p, cell)));
            cells.extend(parent.map(|point| (point.line, cell)));
        }
    }

    fn line(&mut self, line: Line, cell: u64) {
        let own = self.history.of_cell((Shown::Line(line), cell));
        let mut operations = own.to_vec();
        operations.extend(self.snapshots_of(line, cell));
        let parent = self.families.parent(line);
        if let Some(point) = parent {
            self.learn(point, cell, &operations);
        }
        let initial = match parent {
            None => Some(ZEROS),
            Some(point) => self.known.get(&(point, cell)).map(|k| k.value),
        };
        let verdict = match initial {
            Some(initial) => check(&operations, initial),
            // Zeros that nobody wrote here were not to be told from others: whichever explains everything.
            None => match check(&operations, SPENT) {
                Verdict::Linearizable => Verdict::Linearizable,
                _ => check(&operations, ZEROS),
            },
        };
        if let (None, Some(point), Verdict::Linearizable) = (initial, parent, &verdict) {
            self.learn_zeros(point, cell, &operations);
        }
        let place = match parent {
            None => line.to_string(),
            Some(point) => {
                let held = initial.map_or("something unknown".into(), |value| format!("{value}"));
                format!("{line} (which began as {point} with {held} there)")
            }
        };
        self.complaints.extend(complaint(self.history, (&place, cell), &operations, &verdict));
        self.complaints.extend(durability::complaint(self.history, (&place, cell), own, initial));
    }

    /// The snapshots of a line as reads of a cell of it.
    fn snapshots_of(&self, line: Line, cell: u64) -> Vec<Operation> {
        let first = Point { line, epoch: petal::ids::Epoch(0) };
        let of_line = self.known.range((first, 0)..).take_while(|((point, _), _)| point.line == line);
        let of_cell = of_line.filter(|((_, c), _)| *c == cell);
        of_cell
            .map(|((point, _), known)| {
                let taken = self.taken.get(point);
                Operation {
                    id: SNAPSHOT | u64::from(point.epoch.0),
                    invoked: taken.map_or(0, |t| t.invoked),
                    returned: taken.and_then(|t| t.returned).map_or(known.seen, |r| r.min(known.seen)),
                    optional: false,
                    action: Action::Read(known.value),
                }
            })
            .collect()
    }

    /// A value that nobody wrote in this line was there when it began.
    fn learn(&mut self, point: Point, cell: u64, operations: &[Operation]) {
        let written: BTreeSet<Value> = operations.iter().filter_map(written_value).collect();
        let strange = operations.iter().filter_map(|o| Some((read_value(o)?, o.returned)));
        let strange = strange.filter(|(value, _)| *value != ZEROS && !written.contains(value));
        if let Some((value, seen)) = strange.min_by_key(|(_, returned)| *returned) {
            self.known.entry((point, cell)).or_insert(Known { value, seen });
        }
    }

    /// The same for zeros, where only that explains everything.
    fn learn_zeros(&mut self, point: Point, cell: u64, operations: &[Operation]) {
        let zeros = operations.iter().filter(|o| read_value(o) == Some(ZEROS)).map(|o| o.returned).min();
        if let Some(seen) = zeros
            && matches!(check(operations, SPENT), Verdict::Violation { .. })
        {
            self.known.insert((point, cell), Known { value: ZEROS, seen });
        }
    }

    // --------------------------------------------------------------------------------------------
    // Cuts.

    fn cuts(&mut self) {
        let mut commands: BTreeMap<usize, BTreeMap<(Point, u64), Value>> = BTreeMap::new();
        for ((point, cell), known) in &self.known {
            if let Some(taken) = self.taken.get(point) {
                commands.entry(taken.command).or_default().insert((*point, *cell), known.value);
            }
        }
        for held in commands.values() {
            self.complaints.extend(self.cut(held));
        }
    }

    /// What the points of one command hold: is anything in them younger than something that they lack?
    fn cut(&self, held: &BTreeMap<(Point, u64), Value>) -> Option<String> {
        // When what is in the snapshots was asked for, the last of it: zeros do not tell who wrote them.
        let asked = held.iter().filter_map(|((point, cell), value)| {
            let origin = self.history.origin_of(*value)?;
            (origin.target.shown == Shown::Line(point.line)).then_some((origin.invoked, *value, *point, *cell))
        });
        let (asked, inside, inside_point, inside_cell) = asked.max()?;
        held.iter().find_map(|((point, cell), value)| {
            let operations = self.history.of_cell((Shown::Line(point.line), *cell));
            let lacks = |o: &&Operation| {
                written_value(o).is_some() && !o.optional && o.returned < asked && is_before(operations, *value, o)
            };
            let lacking = operations.iter().filter(lacks).max_by_key(|o| o.invoked)?;
            Some(format!(
                "a snapshot is no cut (P6): {inside_point}, cell at {inside_cell}, holds operation {inside} ({}), which \
                 was asked for at {asked}; {point}, cell at {cell}, holds {value} and lacks {} ({})",
                self.history.origin(inside),
                in_words(lacking),
                self.history.origin(lacking.id),
            ))
        })
    }
}

/// True if a cell that holds this value has surely not had this write yet.
fn is_before(operations: &[Operation], value: Value, write: &Operation) -> bool {
    let of_value = operations.iter().filter(|o| written_value(o) == Some(value));
    // What is there from the beginning is before everything.
    of_value.map(|o| o.returned).max().is_none_or(|end| end < write.invoked)
}

fn read_value(o: &Operation) -> Option<Value> {
    match o.action {
        Action::Read(value) => Some(value),
        Action::Write(_) => None,
    }
}

fn written_value(o: &Operation) -> Option<Value> {
    match o.action {
        Action::Write(value) => Some(value),
        Action::Read(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{Effect, End, OperationId, Target};
    use petal::global_state::State;
    use petal::ids::{Epoch, FamilyId, LineageId, VdiskId};

    const LINE: Line = Line { family: FamilyId(1), lineage: LineageId(1) };
    const CLONE: Line = Line { family: FamilyId(1), lineage: LineageId(2) };
    const POINT: Point = Point { line: LINE, epoch: Epoch(1) };

    /// A disk with a snapshot, of which there is a clone.
    struct Bench {
        history: History,
        families: Families,
        taken: BTreeMap<Point, Taken>,
    }

    impl Bench {
        fn new() -> Bench {
            let families = Families::of_test(CLONE, POINT);
            Bench { history: History::default(), families, taken: BTreeMap::new() }
        }

        fn write(&mut self, line: Line, cells: &[u64]) -> OperationId {
            let id = self.begin(line, cells);
            self.history.finish(id, End::Done);
            id
        }

        fn begin(&mut self, line: Line, cells: &[u64]) -> OperationId {
            let target = Target { vdisk: VdiskId(1), shown: Shown::Line(line), session: None };
            self.history.invoke(target, Effect::Write, cells.iter().map(|c| (*c, false)).collect())
        }

        fn read(&mut self, shown: Shown, cell: u64, value: Value) {
            let target = Target { vdisk: VdiskId(1), shown, session: None };
            let id = self.history.invoke(target, Effect::Read, Vec::new());
            self.history.saw(id, cell, value);
            self.history.finish(id, End::Done);
        }

        fn take(&mut self, point: Point) {
            self.asked(point);
            self.answered(point);
        }
        fn asked(&mut self, point: Point) {
            let invoked = self.history.moment();
            self.taken.insert(point, Taken { command: 0, invoked, returned: None });
        }
        fn answered(&mut self, point: Point) {
            self.taken.get_mut(&point).unwrap().returned = Some(self.history.moment());
        }

        fn judge(mut self) -> Vec<String> {
            self.history.close();
            complaints(&self.history, &self.families, &self.taken)
        }
    }

    /// A state with a disk, a snapshot and a clone of it.
    fn family() -> State {
        use petal::global_state::{Command, Entry, Genesis, GenesisServer, SnapshotOf};
        use petal::ids::{ClusterId, DiskId, Incarnation, ServerId};
        use petal::message::CommandId;
        use petal::translator::gmap::Scheme;
        let ring = vec![GenesisServer { server: ServerId(1), addresses: vec!["here".into()] }];
        let mut state = State::genesis(&Genesis { cluster: ClusterId(1), name: "c".into(), ring });
        let disks = vec![(DiskId(1), Incarnation(0).into(), 1 << 30)];
        let mut run = |command| {
            let id = CommandId { proposer: 1, number: state.index + 1, finished_below: 0 };
            let (result, _) = state.apply(&Entry { id, command });
            result.unwrap();
            state.clone()
        };
        let addresses = vec!["here".into()];
        run(Command::ServerUp { server: ServerId(1), incarnation: Incarnation(1), addresses, disks });
        let name = "d".to_string();
        let made = run(Command::CreateDisk { name, size: 1 << 20, scheme: Scheme::Striped, stripe_unit: 1 << 16 });
        let vdisk = made.vdisk_named("d").unwrap().id;
        let of = vec![SnapshotOf { vdisk, epoch: Epoch(1), name: "s".into() }];
        let made = run(Command::Snapshot { of, made: 0, protected: false });
        let source = made.vdisk_named("d@s").unwrap().id;
        run(Command::Clone { source, epoch: Epoch(1), name: "c".into(), made: 0 })
    }

    #[test]
    fn families_are_learnt_from_states() {
        let mut families = Families::default();
        let state = family();
        families.see(&state);
        let id = |name: &str| state.vdisk_named(name).unwrap().id;
        let point = families.point(id("d@s")).unwrap();
        assert_eq!((point.line.lineage, point.epoch), (LineageId(1), Epoch(1)));
        assert_eq!(families.first_line(id("d")), Some(point.line));
        let clone = families.first_line(id("c")).unwrap();
        assert_eq!((clone.lineage, families.parent(clone)), (LineageId(2), Some(point)));
    }

    #[test]
    fn a_snapshot_that_is_read_twice_alike_is_good_and_one_that_has_changed_is_not() {
        let run = |second: fn(OperationId, OperationId) -> Value| {
            let mut b = Bench::new();
            let a = b.write(LINE, &[0]);
            b.take(POINT);
            let w = b.write(LINE, &[0]);
            b.read(Shown::Point(POINT), 0, a);
            b.read(Shown::Point(POINT), 0, second(a, w));
            b.judge()
        };
        assert_eq!(run(|a, _| a), Vec::<String>::new());
        assert!(run(|_, w| w)[0].contains("has changed"));
    }

    #[test]
    fn what_was_acknowledged_before_is_in_it_and_what_was_asked_after_is_not() {
        let mut b = Bench::new();
        b.write(LINE, &[0]);
        b.take(POINT);
        b.read(Shown::Point(POINT), 0, ZEROS);
        assert!(b.judge()[0].contains("not linearizable"));
        let mut b = Bench::new();
        b.take(POINT);
        let w = b.write(LINE, &[0]);
        b.read(Shown::Point(POINT), 0, w);
        assert!(b.judge()[0].contains("not linearizable"));
    }

    #[test]
    fn what_was_under_way_may_be_in_it_or_not() {
        for is_in in [false, true] {
            let mut b = Bench::new();
            let w = b.begin(LINE, &[0]);
            b.take(POINT);
            b.history.finish(w, End::Done);
            b.read(Shown::Point(POINT), 0, if is_in { w } else { ZEROS });
            assert_eq!(b.judge(), Vec::<String>::new());
        }
    }

    #[test]
    fn a_call_without_an_answer_ends_for_a_cell_that_was_read() {
        let mut b = Bench::new();
        b.asked(POINT);
        let w = b.write(LINE, &[0]);
        b.read(Shown::Point(POINT), 0, w);
        assert_eq!(b.judge(), Vec::<String>::new());
        let mut b = Bench::new();
        b.asked(POINT);
        b.read(Shown::Point(POINT), 0, ZEROS);
        let w = b.write(LINE, &[0]);
        b.read(Shown::Line(CLONE), 0, w);
        assert!(!b.judge().is_empty(), "the clone began with what the snapshot holds");
    }

    #[test]
    fn a_snapshot_with_an_effect_and_without_its_cause_is_no_cut() {
        for has_cause in [true, false] {
            let mut b = Bench::new();
            b.asked(POINT);
            let cause = b.write(LINE, &[0]);
            let effect = b.write(LINE, &[4096]);
            b.answered(POINT);
            b.read(Shown::Point(POINT), 0, if has_cause { cause } else { ZEROS });
            b.read(Shown::Point(POINT), 4096, effect);
            let complaints = b.judge();
            assert_eq!(complaints.is_empty(), has_cause, "{complaints:?}");
            assert!(has_cause || complaints[0].contains("no cut"));
        }
    }

    #[test]
    fn a_clone_begins_with_the_snapshot_and_is_its_own_from_then_on() {
        for (first, later, good) in [(true, true, true), (false, true, false), (true, false, false)] {
            let mut b = Bench::new();
            let a = b.write(LINE, &[0]);
            b.take(POINT);
            let w = b.write(LINE, &[0]);
            b.read(Shown::Line(CLONE), 0, if first { a } else { w });
            let own = b.write(CLONE, &[0]);
            b.read(Shown::Line(CLONE), 0, if later { own } else { w });
            b.read(Shown::Line(LINE), 0, w);
            b.read(Shown::Point(POINT), 0, a);
            assert_eq!(b.judge().is_empty(), good);
        }
    }

    #[test]
    fn what_a_clone_shows_tells_what_an_unnamed_point_holds() {
        let mut b = Bench::new();
        let a = b.write(LINE, &[0]);
        b.write(LINE, &[0]);
        b.take(POINT);
        b.read(Shown::Line(CLONE), 0, a);
        assert!(b.judge()[0].contains("not linearizable"), "it was overwritten before");
        let mut b = Bench::new();
        b.write(LINE, &[0]);
        b.take(POINT);
        b.read(Shown::Line(CLONE), 0, ZEROS);
        assert!(b.judge()[0].contains("not linearizable"), "nobody wrote zeros in the clone");
    }
}
