//! Is there an order of the operations on one cell that explains every answer (promise P2)?
//!
//! A cell is a register. Operations are intervals; a legal order respects the intervals, and every
//! read returns the latest write before it. The search goes through the history once, in time, with
//! the set of all *configurations* that are still possible: the register's value, and which of the open
//! operations have not taken effect yet. An operation takes effect no earlier than it must (when it
//! returns) except that a read takes effect as soon as the value is right, which can never hurt.
//!
//! What keeps the set small is that written values are unique (zeros are the only value that several
//! operations write):
//! * a value that was overwritten never comes back, so as long as a read of it is still to come, no
//!   other write can take effect;
//! * an open write all of whose reads are open, too (or that is never read) can take effect together with
//!   them right before any other write, so with every write that takes effect all of these do, and a
//!   value that no later read needs is as good as any other such value;
//! * of several open writes of zeros the one with the nearest end is tried.
//!
//! Operations without an answer (the client died, or the answer left it open) may take effect at any
//! time after they were invoked, or never. If nobody ever read such a write's value it never has to.

use crate::content::{Value, ZEROS};
use crate::history::History;
use std::collections::{BTreeMap, BTreeSet};

/// In the number of an operation: it is the snapshot of the epoch that the rest of it is.
pub const SNAPSHOT: u64 = 1 << 63;

/// One operation on one cell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operation {
    /// Its number, for reports.
    pub id: u64,
    /// When it was invoked, in the history's own count.
    pub invoked: u64,
    /// The last moment at which it can have taken effect; `u64::MAX` = any time later.
    pub returned: u64,
    /// It may also never have taken effect.
    pub optional: bool,
    /// What it did.
    pub action: Action,
}

/// What an operation does to a cell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Returned this value.
    Read(Value),
    /// Sets this value.
    Write(Value),
}

/// The judgement.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// There is such an order.
    Linearizable,
    /// There is none: no order of what was invoked before explains this operation's answer.
    Violation {
        /// Position in the given history of the operation that cannot be explained.
        at: usize,
        /// Values that the cell could have had just then.
        possible: Vec<Value>,
    },
    /// The search was given up; nothing is said.
    TooHard,
}

/// More configurations than this are not searched.
const CONFIGURATIONS_MAX: usize = 300_000;
/// Open operations at one time at most.
const OPEN_MAX: usize = 512;

/// Some of the slots of open operations.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
struct Slots([u128; OPEN_MAX / 128]);

impl Slots {
    fn one(slot: usize) -> Slots {
        let mut slots = Slots::default();
        slots.0[slot / 128] = 1 << (slot % 128);
        slots
    }
    fn with(self, other: Slots) -> Slots {
        Slots(std::array::from_fn(|i| self.0[i] | other.0[i]))
    }
    fn and(self, other: Slots) -> Slots {
        Slots(std::array::from_fn(|i| self.0[i] & other.0[i]))
    }
    fn without(self, other: Slots) -> Slots {
        Slots(std::array::from_fn(|i| self.0[i] & !other.0[i]))
    }
    fn is_empty(self) -> bool {
        self.0.iter().all(|bits| *bits == 0)
    }
    fn has(self, other: Slots) -> bool {
        !self.and(other).is_empty()
    }
    fn count(self) -> u32 {
        self.0.iter().map(|bits| bits.count_ones()).sum()
    }
    fn iter(self) -> impl Iterator<Item = usize> {
        (0..).zip(self.0).flat_map(|(i, mut bits)| {
            std::iter::from_fn(move || {
                let slot = bits.trailing_zeros() as usize;
                bits &= bits.checked_sub(1)?;
                Some(i * 128 + slot)
            })
        })
    }
}

/// Judges the history of one cell that holds `initial` at first.
pub fn check(history: &[Operation], initial: Value) -> Verdict {
    let steps = steps(history);
    let mut search = Search {
        history,
        reads_to_come: reads(history),
        slots: [usize::MAX; OPEN_MAX],
        configurations: vec![Configuration { value: initial, open: Slots::default() }],
        reads: Slots::default(),
        optional: Slots::default(),
    };
    for step in steps {
        let verdict = match step.what {
            What::Invoke => search.invoke(step.operation),
            What::Return => search.finish(step.operation),
        };
        if verdict != Verdict::Linearizable {
            return verdict;
        }
    }
    Verdict::Linearizable
}

/// A judgement in words, unless it is good; `place` is whose cell it is.
pub fn complaint(
    history: &History,
    (place, cell): (&dyn std::fmt::Display, u64),
    operations: &[Operation],
    verdict: &Verdict,
) -> Option<String> {
    match verdict {
        Verdict::Linearizable => None,
        Verdict::TooHard => Some(format!(
            "linearizability of {place} at {cell} could not be judged ({} operations): make the run less crowded",
            operations.len()
        )),
        Verdict::Violation { at, possible } => Some(format!(
            "not linearizable: {place}, cell at {cell}: {} ({}) cannot be explained; the cell could have held {}. {}",
            in_words(&operations[*at]),
            history.origin(operations[*at].id),
            values_in_words(possible),
            around(operations, operations[*at].returned)
        )),
    }
}

fn values_in_words(values: &[Value]) -> String {
    let word = |v: &Value| match *v {
        ZEROS => "zeros".to_string(),
        SPENT => "something that nobody read later".into(),
        value => value.to_string(),
    };
    values.iter().map(word).collect::<Vec<_>>().join(" or ")
}

/// An operation in words.
pub fn in_words(o: &Operation) -> String {
    let until = if o.returned == u64::MAX { "?".into() } else { o.returned.to_string() };
    let doubt = if o.optional { " perhaps" } else { "" };
    let what = match o.id & SNAPSHOT {
        0 => format!("operation {}", o.id),
        _ => format!("the snapshot of e{}", o.id & !SNAPSHOT),
    };
    match o.action {
        Action::Read(value) => format!("{what} [{}..{until}] read {value}", o.invoked),
        Action::Write(value) => format!("{what} [{}..{until}]{doubt} wrote {value}", o.invoked),
    }
}

/// The operations around a moment, for a person to see what went wrong.
fn around(operations: &[Operation], moment: u64) -> String {
    let mut all: Vec<&Operation> = operations.iter().collect();
    all.sort_by_key(|o| (o.returned.min(moment.max(o.invoked)), o.invoked));
    let end = all.iter().filter(|o| o.invoked <= moment).count();
    let near = &all[end.saturating_sub(10)..(end + 4).min(all.len())];
    near.iter().map(|o| in_words(o)).collect::<Vec<_>>().join("; ")
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Invoke,
    Return,
}

struct Step {
    time: u64,
    what: What,
    operation: usize,
}

/// How often each value is read.
fn reads(history: &[Operation]) -> BTreeMap<Value, u64> {
    let mut reads = BTreeMap::new();
    for o in history {
        if let Action::Read(value) = o.action {
            *reads.entry(value).or_default() += 1;
        }
    }
    reads
}

/// Invocations and returns in order of time; unfinished writes that nobody read are left out.
fn steps(history: &[Operation]) -> Vec<Step> {
    let reads = reads(history);
    let mut steps = Vec::with_capacity(history.len() * 2);
    for (operation, o) in history.iter().enumerate() {
        let unread = matches!(o.action, Action::Write(value) if !reads.contains_key(&value));
        if o.optional && unread {
            continue;
        }
        steps.push(Step { time: o.invoked, what: What::Invoke, operation });
        if o.returned != u64::MAX {
            steps.push(Step { time: o.returned, what: What::Return, operation });
        }
    }
    steps.sort_by_key(|s| (s.time, s.what, s.operation));
    steps
}

/// A value that no read to come needs; as the first value of a cell: something that nobody knows.
pub const SPENT: Value = u64::MAX;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Configuration {
    value: Value,
    /// Slots of operations that are invoked and have not taken effect.
    open: Slots,
}

struct Search<'a> {
    history: &'a [Operation],
    /// Reads of each value that are not invoked yet.
    reads_to_come: BTreeMap<Value, u64>,
    /// Operation in each slot; `usize::MAX` = free.
    slots: [usize; OPEN_MAX],
    configurations: Vec<Configuration>,
    /// Slots that hold reads.
    reads: Slots,
    /// Slots that hold operations that may never take effect.
    optional: Slots,
}

impl Search<'_> {
    fn invoke(&mut self, operation: usize) -> Verdict {
        let Some(slot) = self.slots.iter().position(|s| *s == usize::MAX) else { return Verdict::TooHard };
        let bit = Slots::one(slot);
        self.slots[slot] = operation;
        match self.history[operation].action {
            Action::Read(value) => {
                self.reads = self.reads.with(bit);
                *self.reads_to_come.get_mut(&value).expect("it was counted") -= 1;
            }
            Action::Write(_) => {}
        }
        if self.history[operation].optional {
            self.optional = self.optional.with(bit);
        }
        for i in 0..self.configurations.len() {
            let mut c = self.configurations[i];
            c.open = c.open.with(bit);
            self.configurations[i] = self.settle_reads(c);
        }
        Verdict::Linearizable
    }

    fn finish(&mut self, operation: usize) -> Verdict {
        let slot = self.slots.iter().position(|s| *s == operation).expect("invoked before it returned");
        let bit = Slots::one(slot);
        let before = std::mem::take(&mut self.configurations);
        let after = if self.optional.has(bit) { self.give_up(&before, bit) } else { self.take_effect(&before, bit) };
        let Some(after) = after else { return Verdict::TooHard };
        if after.is_empty() {
            let mut possible: Vec<Value> = before.iter().map(|c| c.value).collect();
            possible.sort_unstable();
            possible.dedup();
            return Verdict::Violation { at: operation, possible };
        }
        self.slots[slot] = usize::MAX;
        self.reads = self.reads.without(bit);
        self.optional = self.optional.without(bit);
        self.configurations = after;
        Verdict::Linearizable
    }

    /// Its last moment passes: it has taken effect or never will.
    fn give_up(&self, before: &[Configuration], bit: Slots) -> Option<Vec<Configuration>> {
        let mut after = self.reach(before, bit)?;
        after.extend(before.iter().map(|c| Configuration { value: c.value, open: c.open.without(bit) }));
        Some(self.distinct(after))
    }

    /// It returns: every configuration in which it has not taken effect goes on to those in which it has.
    fn take_effect(&self, before: &[Configuration], bit: Slots) -> Option<Vec<Configuration>> {
        self.reach(before, bit).map(|after| self.distinct(after))
    }

    /// Configurations without `bit` that can be reached by letting open writes take effect.
    fn reach(&self, before: &[Configuration], bit: Slots) -> Option<Vec<Configuration>> {
        let whole = self.whole();
        let mut after = Vec::new();
        let mut seen = BTreeSet::new();
        let mut todo: Vec<Configuration> = before.to_vec();
        while let Some(c) = todo.pop() {
            if !c.open.has(bit) {
                after.push(c);
                continue;
            }
            if !seen.insert(c) {
                continue;
            }
            if seen.len() > CONFIGURATIONS_MAX {
                return None;
            }
            if self.is_needed(c.value) {
                continue;
            }
            let open = c.open.without(whole);
            if c.open.has(whole) {
                todo.push(Configuration { value: SPENT, open });
            }
            for slot in self.worth_trying(open.without(self.reads)).iter() {
                let Action::Write(value) = self.history[self.slots[slot]].action else { unreachable!() };
                todo.push(self.settle_reads(Configuration { value, open: open.without(Slots::one(slot)) }));
            }
        }
        Some(after)
    }

    /// A read to come returns this value, and only one operation writes it.
    fn is_needed(&self, value: Value) -> bool {
        value != ZEROS && self.reads_to_come.get(&value).is_some_and(|n| *n > 0)
    }

    /// Open writes that no read to come needs, and their reads. Where such a write has not taken effect its
    /// reads have not either; where it has, they have.
    fn whole(&self) -> Slots {
        let mut writes = Slots::default();
        let mut values = BTreeSet::new();
        let open = || self.slots.iter().enumerate().filter(|(_, o)| **o != usize::MAX);
        for (slot, operation) in open() {
            if let Action::Write(value) = self.history[*operation].action
                && value != ZEROS
                && !self.is_needed(value)
            {
                writes = writes.with(Slots::one(slot));
                values.insert(value);
            }
        }
        let read = |o: usize| matches!(self.history[o].action, Action::Read(value) if values.contains(&value));
        open().filter(|(_, o)| read(**o)).fold(writes, |all, (slot, _)| all.with(Slots::one(slot)))
    }

    /// Of several open writes of zeros only the one with the nearest end is tried: another one can take
    /// its place later, since it has more time. But one that has to take effect must be tried beside
    /// one that need not.
    fn worth_trying(&self, writes: Slots) -> Slots {
        let mut tried = writes;
        let mut nearest: [Option<(u64, Slots)>; 2] = [None; 2];
        for slot in writes.iter() {
            let (bit, operation) = (Slots::one(slot), &self.history[self.slots[slot]]);
            if operation.action == Action::Write(ZEROS) {
                tried = tried.without(bit);
                let best = &mut nearest[usize::from(operation.optional)];
                if best.is_none_or(|(returned, _)| operation.returned < returned) {
                    *best = Some((operation.returned, bit));
                }
            }
        }
        nearest.iter().flatten().fold(tried, |all, (_, bit)| all.with(*bit))
    }

    /// Lets every open read of the present value take effect.
    fn settle_reads(&self, mut c: Configuration) -> Configuration {
        for slot in c.open.and(self.reads).iter() {
            if self.history[self.slots[slot]].action == Action::Read(c.value) {
                c.open = c.open.without(Slots::one(slot));
            }
        }
        if c.value != ZEROS && !self.is_needed(c.value) {
            c.value = SPENT;
        }
        c
    }

    /// Without doubles, and without configurations that another one can only do better than: same value,
    /// same duties, and more optional operations in hand.
    fn distinct(&self, mut all: Vec<Configuration>) -> Vec<Configuration> {
        all.sort_unstable();
        all.dedup();
        let mut best: Vec<Configuration> = Vec::with_capacity(all.len());
        let duty = |c: &Configuration| (c.value, c.open.without(self.optional));
        all.sort_by_key(|c| (duty(c), std::cmp::Reverse(c.open.and(self.optional).count()), c.open));
        for c in all {
            let beaten = |b: &&Configuration| b.open.and(c.open) == c.open;
            let rivals = best.iter().rev().take_while(|b| duty(b) == duty(&c));
            if rivals.filter(beaten).count() == 0 {
                best.push(c);
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stdx::Prng;

    fn op(id: u64, invoked: u64, returned: u64, action: Action) -> Operation {
        Operation { id, invoked, returned, optional: false, action }
    }
    fn write(value: Value, invoked: u64, returned: u64) -> Operation {
        op(value, invoked, returned, Action::Write(value))
    }
    fn read(value: Value, invoked: u64, returned: u64) -> Operation {
        op(1000 + invoked, invoked, returned, Action::Read(value))
    }
    fn lost(value: Value, invoked: u64) -> Operation {
        Operation { optional: true, ..write(value, invoked, u64::MAX) }
    }
    fn good(history: &[Operation]) {
        assert_eq!(check(history, 0), Verdict::Linearizable, "{history:?}");
    }
    fn bad(history: &[Operation]) {
        assert!(matches!(check(history, 0), Verdict::Violation { .. }), "{history:?}");
    }

    #[test]
    fn a_read_returns_the_last_write() {
        good(&[write(1, 1, 2), read(1, 3, 4), write(2, 5, 6), read(2, 7, 8)]);
        bad(&[write(1, 1, 2), write(2, 3, 4), read(1, 5, 6)]);
        bad(&[write(1, 1, 2), read(0, 3, 4)]);
        bad(&[read(1, 1, 2), write(1, 3, 4)]);
        bad(&[read(7, 1, 2)]);
    }

    #[test]
    fn concurrent_writes_may_land_in_either_order_but_only_in_one() {
        let both = [write(1, 1, 4), write(2, 2, 3)];
        good(&[both[0], both[1], read(1, 5, 6)]);
        good(&[both[0], both[1], read(2, 5, 6)]);
        bad(&[both[0], both[1], read(2, 5, 6), read(1, 7, 8)]);
        good(&[both[0], write(2, 2, 9), read(1, 3, 4), read(2, 5, 6)]);
        bad(&[write(1, 1, 20), write(2, 2, 20), read(1, 3, 4), read(2, 5, 6), read(1, 7, 8)]);
    }

    #[test]
    fn a_value_that_was_seen_is_not_unseen() {
        bad(&[write(1, 1, 2), write(2, 3, 10), read(2, 4, 5), read(1, 6, 7)]);
        good(&[write(1, 1, 2), write(2, 3, 10), read(1, 4, 5), read(2, 6, 7)]);
        good(&[write(1, 1, 2), write(2, 3, 10), read(2, 4, 7), read(1, 5, 6)]);
    }

    #[test]
    fn unfinished_writes_may_land_late_or_never_but_once() {
        good(&[lost(1, 1), read(0, 2, 3)]);
        good(&[lost(1, 1), read(0, 2, 3), read(1, 4, 5)]);
        bad(&[lost(1, 1), read(1, 2, 3), read(0, 4, 5)]);
        bad(&[lost(1, 1), read(1, 2, 3), write(2, 4, 5), read(1, 6, 7)]);
        good(&[lost(1, 1), write(2, 4, 5), read(2, 6, 7), read(1, 8, 9)]);
    }

    #[test]
    fn unfinished_writes_of_a_fenced_client_do_not_land_after_the_fence() {
        let fenced = Operation { returned: 10, ..lost(1, 1) };
        good(&[fenced, read(0, 2, 3), read(1, 11, 12)]);
        good(&[fenced, read(0, 11, 12), read(0, 13, 14)]);
        bad(&[fenced, read(0, 11, 12), read(1, 13, 14)]);
    }

    #[test]
    fn zeros_may_come_from_several_operations() {
        let zero = |invoked, returned| write(0, invoked, returned);
        good(&[write(1, 1, 2), zero(3, 4), read(0, 5, 6), write(2, 7, 8), zero(9, 10), read(0, 11, 12)]);
        bad(&[write(1, 1, 2), zero(3, 4), read(0, 5, 6), read(1, 7, 8)]);
        let lost_zero = |at| Operation { optional: true, ..zero(at, u64::MAX) };
        good(&[lost_zero(1), lost_zero(2), write(1, 3, 4), read(0, 5, 6), write(2, 7, 8), read(0, 9, 10)]);
        bad(&[lost_zero(1), write(1, 3, 4), read(0, 5, 6), write(2, 7, 8), read(0, 9, 10)]);
    }

    #[test]
    fn hundreds_of_zeros_without_an_answer_are_judged() {
        let mut history: Vec<Operation> =
            (1..=300).map(|at| Operation { optional: true, ..write(ZEROS, at, u64::MAX) }).collect();
        for n in 0..100 {
            let at = 301 + 4 * n;
            history.extend([write(n + 1, at, at + 1), read(ZEROS, at + 2, at + 3)]);
        }
        good(&history);
        history.truncate(400);
        let first = history.iter().position(|o| !o.optional).unwrap();
        history.drain(49..first);
        bad(&history);
    }

    #[test]
    fn a_retry_applied_twice_is_seen() {
        // 1 is applied, acknowledged late; 2 overwrites it; the retry of 1 is applied over 2.
        bad(&[write(1, 1, 4), write(2, 5, 6), read(2, 7, 8), read(1, 9, 10)]);
    }

    /// Every order, without any cleverness.
    fn by_force(history: &[Operation], done: u32, value: Value) -> bool {
        let open = |i: usize| done & (1 << i) == 0;
        if (0..history.len()).all(|i| !open(i) || history[i].optional) {
            return true;
        }
        let horizon =
            (0..history.len()).filter(|i| open(*i) && !history[*i].optional).map(|i| history[i].returned).min();
        (0..history.len()).any(|i| {
            let o = &history[i];
            // Who takes effect now must not come after the return of one that is still to come.
            if !open(i) || o.invoked > horizon.unwrap_or(u64::MAX) {
                return false;
            }
            // An optional one whose last moment is past what was invoked of those done cannot any more.
            let late = (0..history.len()).any(|j| done & (1 << j) != 0 && history[j].invoked > o.returned);
            match o.action {
                _ if late => false,
                Action::Write(new) => by_force(history, done | 1 << i, new),
                Action::Read(seen) => seen == value && by_force(history, done | 1 << i, value),
            }
        })
    }

    #[test]
    fn the_search_agrees_with_trying_every_order() {
        let mut found = [0; 2];
        for seed in 0..20_000 {
            let mut prng = Prng::new(seed);
            let count = prng.between(2, 7);
            let mut times: Vec<u64> = (1..=2 * count).collect();
            prng.shuffle(&mut times);
            let mut history = Vec::new();
            for i in 0..count as usize {
                let (a, b) = (times[2 * i].min(times[2 * i + 1]), times[2 * i].max(times[2 * i + 1]));
                let action = match prng.below(5) {
                    0 => Action::Write(0),
                    1 | 2 => Action::Write(1 + i as u64),
                    _ => Action::Read(prng.below(count + 1)),
                };
                let is_write = matches!(action, Action::Write(_));
                let optional = is_write && prng.chance(1, 4);
                let returned = if optional && prng.chance(1, 2) { u64::MAX } else { b };
                history.push(Operation { id: i as u64, invoked: a, returned, optional, action });
            }
            let expected = by_force(&history, 0, 0);
            let verdict = check(&history, 0);
            assert_eq!(verdict == Verdict::Linearizable, expected, "seed {seed}: {history:?}: {verdict:?}");
            found[usize::from(expected)] += 1;
        }
        assert!(found[0] > 1000 && found[1] > 1000, "{found:?}");
    }

    #[test]
    fn thousands_of_operations_on_one_cell_are_judged_quickly() {
        // A register driven for real by many clients at once, with operations that never return.
        for (seed, clients) in [(9, 4), (10, 16), (11, 32)] {
            crowd(seed, clients);
        }
    }

    fn crowd(seed: u64, clients: usize) {
        let mut prng = Prng::new(seed);
        let mut history: Vec<Operation> = Vec::new();
        let mut open: Vec<(usize, bool)> = Vec::new();
        let mut value = 0;
        for time in 1..20_000u64 {
            let choice = prng.below(3);
            if choice == 0 && open.len() < clients {
                let action = match prng.below(8) {
                    0..3 => Action::Write(time),
                    3..5 => Action::Write(ZEROS),
                    _ => Action::Read(0),
                };
                history.push(Operation { id: time, invoked: time, returned: u64::MAX, optional: false, action });
                open.push((history.len() - 1, false));
            } else if choice == 1 && !open.is_empty() {
                let pick = prng.below(open.len() as u64) as usize;
                if !std::mem::replace(&mut open[pick].1, true) {
                    match &mut history[open[pick].0].action {
                        Action::Write(new) => value = *new,
                        Action::Read(seen) => *seen = value,
                    }
                }
            } else if let Some(pick) = open.iter().position(|o| o.1) {
                let (i, _) = open.swap_remove(pick);
                if prng.chance(1, 50) && matches!(history[i].action, Action::Write(_)) {
                    history[i].optional = true;
                } else {
                    history[i].returned = time;
                }
            }
        }
        history.retain(|o| o.returned != u64::MAX || o.optional);
        assert!(history.len() > 3000);
        assert_eq!(check(&history, 0), Verdict::Linearizable);
    }
}
