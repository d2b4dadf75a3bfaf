//! The ring's log: memory for the consensus library, and the writes that make it durable.
//!
//! What is durable, all keys beginning with `ring/` (docs/on-disk-format.md):
//!
//! ```text
//!   ring/log/<sequence>         one atomic write of the library: its operations since the one before, or
//!                               everything (a reset: state, entries behind it, ballots)
//!   ring/part/<sequence>/<n>    pieces of a record too long for one value; written before it
//!
//!   record   version:u8, postcard(RecordHeader), payload          sequence: 16 hexadecimal digits
//!   payload  postcard(Vec<Op>) or postcard(Reset)                 n: 4 hexadecimal digits
//! ```
//!
//! The library writes several things atomically (a round together with the entries that it replaces), and
//! the store promises order, not atomicity, for several values. So one value is one atomic write, and any
//! prefix of the writes is a state that the library has been in. Opening replays the records from the last
//! reset on. Records before a reset are deleted once it is stable.
//!
//! Fails: [`RingDamaged`] if the records do not fit together; then the member must not take part, because it
//! may have forgotten a promise (counterexample F25).
//!
//! Invariants: compacted <= decided (once the library has run), compacted <= end, stable <= end; the state is
//! that of index `base + compacted`; a deleted record is older than a stable reset.

use super::{Broken, broken};
use crate::global_state::{Entry, State, StateError};
use crate::ids::StateIndex;
use crate::limits::RING_VALUE_MAX;
use bytes::Bytes;
use omnipaxos::ballot_leader_election::Ballot;
use omnipaxos::storage::{SnapshotType, StopSign, Storage, StorageOp, StorageResult};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use stdx::checksum::crc32c;

/// Version of the durable records: their first byte.
const RECORD_VERSION: u8 = 3;

const LOG_PREFIX: &str = "ring/log/";
const PART_PREFIX: &str = "ring/part/";

/// A number of the library's log: entries since the configuration began.
pub(super) type LogIndex = usize;
/// A durable write: no value = delete.
pub(super) type Write = (Bytes, Option<Bytes>);

/// Why a member's durable state cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the durable state of the ring member is damaged: {0}; the member must not take part in the ring; if the program is the right one, make its disks anew with `petal rejoin --lost`"
)]
pub struct RingDamaged(String);

fn damaged<T>(why: impl Into<String>) -> Result<T, RingDamaged> {
    Err(RingDamaged(why.into()))
}

/// What has been decided beyond an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::global_state) enum Decided {
    /// These entries follow it.
    Entries(Vec<Entry>),
    /// Its followers are compacted: this state, and the entries that follow the state.
    Jump(Arc<State>, Vec<Entry>),
}

// ------------------------------------------------------------------------------------------------
// Snapshots: a state, or commands.

/// An entry as the library sees it. The storage tells its index on the way out, so that a delta of entries
/// knows where it belongs; it is no part of the entry and does not travel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Numbered {
    pub(super) entry: Entry,
    #[serde(skip)]
    index: StateIndex,
}

impl From<Entry> for Numbered {
    fn from(entry: Entry) -> Self {
        Numbered { entry, index: 0 }
    }
}

impl omnipaxos::storage::Entry for Numbered {
    type Snapshot = RingSnapshot;
}

/// The library's snapshot type.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(into = "SnapshotBytes", try_from = "SnapshotBytes")]
pub enum RingSnapshot {
    /// A state; and the entries that were merged into it here, so that who follows need not jump. These do
    /// not travel.
    State(Arc<State>, Vec<Entry>),
    /// Commands that follow a state, and the index of the first.
    Commands(StateIndex, Vec<Entry>),
}

/// A snapshot as it travels.
#[derive(Serialize, Deserialize)]
enum SnapshotBytes {
    State(Vec<u8>),
    Commands(StateIndex, Vec<Entry>),
}

impl From<RingSnapshot> for SnapshotBytes {
    fn from(snapshot: RingSnapshot) -> Self {
        match snapshot {
            RingSnapshot::State(state, _) => SnapshotBytes::State(state.encode()),
            RingSnapshot::Commands(first, entries) => SnapshotBytes::Commands(first, entries),
        }
    }
}

impl TryFrom<SnapshotBytes> for RingSnapshot {
    type Error = StateError;
    fn try_from(bytes: SnapshotBytes) -> Result<Self, Self::Error> {
        Ok(match bytes {
            SnapshotBytes::State(state) => RingSnapshot::State(Arc::new(State::decode(&state)?), Vec::new()),
            SnapshotBytes::Commands(first, entries) => RingSnapshot::Commands(first, entries),
        })
    }
}

impl omnipaxos::storage::Snapshot<Numbered> for RingSnapshot {
    fn create(entries: &[Numbered]) -> Self {
        let first = entries.first().map_or(0, |e| e.index);
        RingSnapshot::Commands(first, entries.iter().map(|e| e.entry.clone()).collect())
    }
    /// Idempotent: an answer to an old promise may begin before what has been merged since. (Entries that
    /// do not follow are left out; the index of the result tells.)
    fn merge(&mut self, delta: Self) {
        let (RingSnapshot::State(state, tail), RingSnapshot::Commands(first, entries)) = (&mut *self, delta) else {
            debug_assert!(false, "the log always has a state, and a delta is commands");
            return;
        };
        let state = Arc::make_mut(state);
        for (index, entry) in (first..).zip(entries) {
            if index == state.index + 1 || broken(Broken::DeltaMergedTwice) {
                let _ = state.apply(&entry);
                tail.push(entry);
            }
        }
    }
    fn use_snapshots() -> bool {
        true
    }
}

// ------------------------------------------------------------------------------------------------
// The log in memory, and what of it is durable.

/// One operation of a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Op {
    /// The log is cut at `from`, then continues with these.
    Append { from: u64, entries: Vec<Entry> },
    /// A ballot was promised.
    Promise(Ballot),
    /// The entries were accepted in this round.
    AcceptedRound(Ballot),
    /// So many entries are decided. Written lazily: it can be learnt again.
    Decided(u64),
}

/// Everything, as one record.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Reset {
    base: u64,
    promise: Ballot,
    accepted_round: Ballot,
    decided: u64,
    /// Index of the state within the log; `entries` begin here.
    compacted: u64,
    state: Vec<u8>,
    entries: Vec<Entry>,
}

/// What stands in front of a record's payload, or instead of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct RecordHeader {
    configuration: u32,
    kind: RecordKind,
    /// Zero: the payload follows. Else it is in so many parts.
    parts: u32,
    /// CRC-32C of the payload.
    crc: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum RecordKind {
    Ops,
    Reset,
}

/// The library's storage: memory, the writes that make it durable, and which of them are.
///
/// ```text
///   0 ........ compacted ........ decided ........ end      (log index; base + it = state index)
///      state       |     entries                   |
///                  +-- stable: entries below are on stable storage here
/// ```
#[derive(Debug)]
pub(super) struct Log {
    pub(super) configuration: u32,
    base: u64,
    promise: Ballot,
    accepted_round: Ballot,
    pub(super) decided: LogIndex,
    pub(super) compacted: LogIndex,
    /// The state at `compacted`.
    pub(super) state: Arc<State>,
    /// The last entries that went into it, if they came as a delta.
    pub(super) tail: Vec<Entry>,
    entries: VecDeque<Entry>,

    /// Operations since the last write was taken.
    ops: Vec<Op>,
    decided_unwritten: bool,
    /// Everything must be written anew.
    reset: bool,
    /// Number of the next write to be taken, and of the last that is stable.
    pub(super) next_number: u64,
    pub(super) durable: u64,
    /// Entries below the index are stable when the write of the number is. Ascending in both.
    marks: VecDeque<(LogIndex, u64)>,
    pub(super) stable: LogIndex,
    /// Last write with more than appended entries: a promise, a round, a snapshot.
    pub(super) control: u64,
    /// Records on the disk, with their parts.
    pub(super) records: BTreeMap<u64, u32>,
    next_sequence: u64,
    /// Write number and sequence of a reset that is not stable yet.
    pub(super) reset_unstable: Option<(u64, u64)>,
    deletions: Vec<Bytes>,
}

impl Log {
    /// The log of a member that has voted nothing yet, and knows a state of the configuration.
    pub(super) fn new(state: State) -> Log {
        let known = state.index.checked_sub(state.ring.base).expect("a state is not older than its ring") as usize;
        Log {
            configuration: state.ring.id,
            base: state.ring.base,
            promise: Ballot::default(),
            accepted_round: Ballot::default(),
            decided: known,
            compacted: known,
            state: Arc::new(state),
            tail: Vec::new(),
            entries: VecDeque::new(),
            ops: Vec::new(),
            decided_unwritten: false,
            reset: false,
            next_number: 1,
            durable: 0,
            marks: VecDeque::new(),
            stable: known,
            control: 0,
            records: BTreeMap::new(),
            next_sequence: 1,
            reset_unstable: None,
            deletions: Vec::new(),
        }
    }

    /// The log of the next configuration, which begins with everything that is written: from then on the records of
    /// this one say nothing. Writes are numbered on, and records, too.
    pub(super) fn succeeded_by(&self, state: State) -> Log {
        let mut next = Log {
            next_number: self.next_number,
            durable: self.durable,
            records: self.records.clone(),
            next_sequence: self.next_sequence,
            deletions: self.deletions.clone(),
            ..Log::new(state)
        };
        next.need_reset();
        next
    }

    /// One past the last entry.
    pub(super) fn end(&self) -> LogIndex {
        self.compacted + self.entries.len()
    }

    // -------------------------------------------------------------------------------- changes

    pub(super) fn append(&mut self, entries: Vec<Entry>) {
        if entries.is_empty() {
            return;
        }
        self.ops.push(Op::Append { from: self.end() as u64, entries: entries.clone() });
        self.entries.extend(entries);
        self.mark();
    }

    fn append_on_prefix(&mut self, from: LogIndex, entries: Vec<Entry>) -> StorageResult<()> {
        if from < self.compacted || from > self.end() {
            return Err(format!("append at {from} to a log of {}..{}", self.compacted, self.end()).into());
        }
        self.ops.push(Op::Append { from: from as u64, entries: entries.clone() });
        self.control = self.next_number;
        self.cut(from);
        self.entries.extend(entries);
        self.mark();
        Ok(())
    }

    fn cut(&mut self, from: LogIndex) {
        self.entries.truncate(from - self.compacted);
        self.stable = self.stable.min(from);
        while self.marks.back().is_some_and(|(end, _)| *end > from) {
            let (_, number) = self.marks.pop_back().expect("looked at");
            let below = self.marks.back().map_or(self.stable, |(end, _)| *end);
            if below < from {
                self.marks.push_back((from, number));
            }
        }
    }

    /// The entries up to the end are stable when the next write is.
    fn mark(&mut self) {
        let end = self.end();
        match self.marks.back_mut() {
            Some((last, number)) if *number == self.next_number => *last = end,
            _ if end > self.stable => self.marks.push_back((end, self.next_number)),
            _ => {}
        }
    }

    fn set_promise(&mut self, ballot: Ballot) {
        if self.promise != ballot {
            self.promise = ballot;
            self.control = self.next_number;
            self.ops.push(Op::Promise(ballot));
        }
    }

    fn set_accepted_round(&mut self, ballot: Ballot) {
        if self.accepted_round != ballot {
            self.accepted_round = ballot;
            self.control = self.next_number;
            self.ops.push(Op::AcceptedRound(ballot));
        }
    }

    pub(super) fn set_decided(&mut self, index: LogIndex) {
        self.decided_unwritten |= self.decided != index;
        self.decided = index;
    }

    /// Drops the entries below `index`; the state that replaces them follows in the same write.
    fn trim(&mut self, index: LogIndex) {
        if index <= self.compacted {
            return;
        }
        self.entries.drain(..(index - self.compacted).min(self.entries.len()));
        self.compacted = index;
        if self.entries.is_empty() {
            self.marks.clear();
        }
        self.need_reset();
    }

    fn set_snapshot(&mut self, snapshot: RingSnapshot) -> StorageResult<()> {
        let RingSnapshot::State(state, tail) = snapshot else {
            return Err("a snapshot in the log is a state".into());
        };
        assert_eq!(state.index, self.base + self.compacted as u64, "a snapshot is the state at the compacted index");
        self.state = state;
        self.tail = tail;
        self.need_reset();
        Ok(())
    }

    pub(super) fn need_reset(&mut self) {
        self.reset = true;
        self.control = self.next_number;
    }

    /// Compacts without the library (a ring of one).
    pub(super) fn compact_alone(&mut self, index: LogIndex) {
        let entries: Vec<Entry> = self.entries.range(..index - self.compacted).cloned().collect();
        let mut snapshot = RingSnapshot::State(self.state.clone(), Vec::new());
        let first = self.base + self.compacted as u64 + 1;
        omnipaxos::storage::Snapshot::merge(&mut snapshot, RingSnapshot::Commands(first, entries));
        self.trim(index);
        self.set_snapshot(snapshot).expect("it is a state");
    }

    // -------------------------------------------------------------------------------- questions

    /// Whether a snapshot of another member can be merged here, to be that of the log index `sync`.
    pub(super) fn takes(&self, snapshot: &SnapshotType<Numbered>, sync: LogIndex) -> bool {
        let Some(end) = self.base.checked_add(sync as u64) else { return false };
        match snapshot {
            SnapshotType::Complete(RingSnapshot::State(state, _)) => {
                state.index == end && state.cluster == self.state.cluster
            }
            SnapshotType::Delta(RingSnapshot::Commands(first, entries)) => {
                let follows = *first <= self.base + self.decided as u64 + 1;
                follows && first.checked_add(entries.len() as u64) == Some(end + 1)
            }
            _ => false,
        }
    }

    /// Entries from `from` to `to`, but none that is not decided: see the head of the file, `sync_log`.
    fn entries_between(&self, from: LogIndex, to: LogIndex) -> Vec<Entry> {
        let limit = if broken(Broken::UndecidedInSnapshot) { self.end() } else { self.decided.min(self.end()) };
        let to = to.min(limit);
        if from < self.compacted || from >= to {
            return Vec::new();
        }
        self.entries.range(from - self.compacted..to - self.compacted).cloned().collect()
    }

    fn suffix(&self, from: LogIndex) -> Vec<Entry> {
        if from < self.compacted || from >= self.end() {
            return Vec::new();
        }
        self.entries.range(from - self.compacted..).cloned().collect()
    }

    /// Entries that are decided and, where it matters, stable here.
    pub(super) fn decided_here(&self) -> LogIndex {
        if broken(Broken::DecidedBeforeStable) {
            return self.decided.min(self.end());
        }
        // A snapshot is of entries that a majority held before it was made.
        self.decided.min(self.stable.max(self.compacted)).min(self.end())
    }

    pub(super) fn decided_after(&self, index: u64) -> Option<Decided> {
        let decided = self.base + self.decided_here() as u64;
        if decided <= index {
            return None;
        }
        let start = self.base + self.compacted as u64;
        let behind_state = |from: u64| self.entries_between((from - self.base) as usize, self.decided_here());
        if index >= start {
            return Some(Decided::Entries(behind_state(index)));
        }
        let missing = (start - index) as usize;
        Some(match self.tail.len().checked_sub(missing) {
            Some(known) => {
                let mut entries = self.tail[known..].to_vec();
                entries.extend(behind_state(start));
                Decided::Entries(entries)
            }
            None => Decided::Jump(self.state.clone(), behind_state(start)),
        })
    }

    /// What follows a state index in the accepted log, decided or not; `None`: some of it is compacted.
    pub(super) fn accepted_after(&self, index: StateIndex) -> Option<impl Iterator<Item = (StateIndex, &Entry)>> {
        let skip = usize::try_from(index.checked_sub(self.base + self.compacted as u64)?).ok()?;
        Some((index + 1..).zip(self.entries.iter().skip(skip)))
    }

    /// State index of the last entry in the accepted log.
    pub(super) fn accepted_end(&self) -> StateIndex {
        self.base + self.end() as u64
    }

    /// The write after which the entries below `index` are stable here; zero if they are.
    pub(super) fn write_of(&self, index: LogIndex) -> u64 {
        if index <= self.stable.max(self.compacted) {
            return 0;
        }
        self.marks.iter().find(|(end, _)| *end >= index).map_or(self.next_number, |(_, number)| *number)
    }

    // -------------------------------------------------------------------------------- durability

    /// Takes what must be made durable, as one numbered write.
    pub(super) fn take_write(&mut self, with_decided: bool) -> Option<(u64, Vec<Write>)> {
        let record = self.reset || !self.ops.is_empty() || (with_decided && self.decided_unwritten);
        if !record && self.deletions.is_empty() {
            return None;
        }
        let number = self.next_number;
        self.next_number += 1;
        // Deletions first: a part that a crash left behind may have the key of a part of this record.
        let mut writes: Vec<Write> = self.deletions.drain(..).map(|key| (key, None)).collect();
        if record {
            self.write_record(number, &mut writes);
        }
        Some((number, writes))
    }

    fn write_record(&mut self, number: u64, writes: &mut Vec<Write>) {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let (kind, payload) = if self.reset {
            self.reset_unstable = Some((number, sequence));
            (RecordKind::Reset, postcard::to_stdvec(&self.to_reset()))
        } else {
            if self.decided_unwritten {
                self.ops.push(Op::Decided(self.decided as u64));
            }
            (RecordKind::Ops, postcard::to_stdvec(&self.ops))
        };
        let payload = payload.expect("a record in memory can be encoded");
        self.ops.clear();
        (self.reset, self.decided_unwritten) = (false, false);
        let parts = encode_record(self.configuration, kind, sequence, payload, writes);
        self.records.insert(sequence, parts);
    }

    fn to_reset(&self) -> Reset {
        Reset {
            base: self.base,
            promise: self.promise,
            accepted_round: self.accepted_round,
            decided: self.decided as u64,
            compacted: self.compacted as u64,
            state: self.state.encode(),
            entries: self.entries.iter().cloned().collect(),
        }
    }

    pub(super) fn on_persisted(&mut self, number: u64) {
        self.durable = self.durable.max(number);
        while self.marks.front().is_some_and(|(_, n)| *n <= self.durable) {
            let (end, _) = self.marks.pop_front().expect("looked at");
            self.stable = self.stable.max(end);
        }
        if let Some((write, sequence)) = self.reset_unstable.filter(|(write, _)| *write <= self.durable) {
            debug_assert!(write <= self.durable);
            self.reset_unstable = None;
            self.delete_before(sequence);
        }
    }

    /// Records before a stable reset say nothing any more. Newest last: what a crash leaves is ignored.
    fn delete_before(&mut self, sequence: u64) {
        let kept = self.records.split_off(&sequence);
        for (old, parts) in std::mem::replace(&mut self.records, kept) {
            self.deletions.push(record_key(old));
            self.deletions.extend((0..parts).map(|part| part_key(old, part)));
        }
    }

    /// What was durable.
    pub(super) fn open(genesis: State, durable: &[(Bytes, Bytes)]) -> Result<Log, RingDamaged> {
        let values: BTreeMap<&[u8], &Bytes> = durable.iter().map(|(k, v)| (&k[..], v)).collect();
        let mut log = Log::new(genesis);
        let mut headers = BTreeMap::new();
        for (key, value) in
            values.range(LOG_PREFIX.as_bytes()..).take_while(|(k, _)| k.starts_with(LOG_PREFIX.as_bytes()))
        {
            let sequence =
                std::str::from_utf8(&key[LOG_PREFIX.len()..]).ok().and_then(|s| u64::from_str_radix(s, 16).ok());
            let Some(sequence) = sequence else { return damaged("a record has no number") };
            headers.insert(sequence, decode_header(value)?);
        }
        let first = headers.iter().rev().find(|(_, (h, _))| h.kind == RecordKind::Reset).map_or(1, |(s, _)| *s);
        for (expected, (sequence, (header, rest))) in (first..).zip(headers.range(first..)) {
            if *sequence != expected {
                return damaged(format!("record {expected} is missing"));
            }
            if header.kind == RecordKind::Reset {
                log.configuration = header.configuration;
            }
            if header.configuration != log.configuration {
                return damaged(format!("record {sequence} is of ring configuration {}", header.configuration));
            }
            let payload = record_payload(&values, *sequence, header, rest)?;
            match header.kind {
                RecordKind::Reset => log.replay_reset(decode(&payload)?)?,
                RecordKind::Ops => {
                    for op in decode::<Vec<Op>>(&payload)? {
                        log.replay(op)?;
                    }
                }
            }
        }
        log.decided = log.decided.min(log.end());
        log.stable = log.end();
        log.records = headers.iter().map(|(sequence, (header, _))| (*sequence, header.parts)).collect();
        log.next_sequence = headers.last_key_value().map_or(1, |(sequence, _)| sequence + 1);
        log.delete_before(first);
        log.delete_orphans(&values);
        Ok(log)
    }

    /// The newest configuration that some record is of, as far as they can be read; `u32::MAX` if one cannot.
    pub(super) fn newest_configuration(durable: &[(Bytes, Bytes)]) -> u32 {
        let records = durable.iter().filter(|(key, _)| key.starts_with(LOG_PREFIX.as_bytes()));
        records.map(|(_, value)| decode_header(value).map_or(u32::MAX, |(h, _)| h.configuration)).max().unwrap_or(0)
    }

    /// An empty log whose records come behind those that are there, which are deleted with the first reset.
    pub(super) fn numbered_behind(genesis: State, durable: &[(Bytes, Bytes)]) -> Log {
        let values: BTreeMap<&[u8], &Bytes> = durable.iter().map(|(k, v)| (&k[..], v)).collect();
        let mut log = Log::new(genesis);
        let number = |key: &[u8]| {
            let digits = std::str::from_utf8(key.strip_prefix(LOG_PREFIX.as_bytes())?).ok()?;
            u64::from_str_radix(digits, 16).ok()
        };
        log.records = values.keys().filter_map(|key| Some((number(key)?, 0))).collect();
        log.next_sequence = log.records.last_key_value().map_or(1, |(sequence, _)| sequence.saturating_add(1));
        log.delete_orphans(&values);
        log
    }

    /// Parts whose record was never written, or is deleted already.
    fn delete_orphans(&mut self, values: &BTreeMap<&[u8], &Bytes>) {
        let known: BTreeSet<Bytes> =
            self.records.iter().flat_map(|(s, parts)| (0..*parts).map(|part| part_key(*s, part))).collect();
        let part = |key: &&&[u8]| key.starts_with(PART_PREFIX.as_bytes()) && !known.contains(**key);
        self.deletions.extend(values.keys().filter(part).map(|key| Bytes::copy_from_slice(key)));
    }

    fn replay(&mut self, op: Op) -> Result<(), RingDamaged> {
        match op {
            Op::Append { from, entries } => {
                let from = usize::try_from(from).unwrap_or(usize::MAX);
                if from < self.compacted || from > self.end() {
                    return damaged(format!("entries at {from} do not follow the log"));
                }
                self.entries.truncate(from - self.compacted);
                self.entries.extend(entries);
            }
            Op::Promise(ballot) => self.promise = ballot,
            Op::AcceptedRound(ballot) => self.accepted_round = ballot,
            Op::Decided(index) => self.decided = usize::try_from(index).unwrap_or(usize::MAX),
        }
        Ok(())
    }

    fn replay_reset(&mut self, reset: Reset) -> Result<(), RingDamaged> {
        let state = State::decode(&reset.state).map_err(|e| RingDamaged(e.to_string()))?;
        if reset.base.checked_add(reset.compacted) != Some(state.index) || state.cluster != self.state.cluster {
            return damaged("the state does not belong to the log");
        }
        self.base = reset.base;
        self.promise = reset.promise;
        self.accepted_round = reset.accepted_round;
        self.decided = reset.decided as usize;
        self.compacted = reset.compacted as usize;
        self.state = Arc::new(state);
        self.entries = reset.entries.into();
        Ok(())
    }
}

fn record_key(sequence: u64) -> Bytes {
    format!("{LOG_PREFIX}{sequence:016x}").into()
}

fn part_key(sequence: u64, part: u32) -> Bytes {
    format!("{PART_PREFIX}{sequence:016x}/{part:04x}").into()
}

/// Adds a record's writes, parts first; tells the number of parts.
fn encode_record(
    configuration: u32,
    kind: RecordKind,
    sequence: u64,
    payload: Vec<u8>,
    writes: &mut Vec<Write>,
) -> u32 {
    let crc = crc32c(&payload);
    let payload = Bytes::from(payload);
    let parts = if payload.len() <= RING_VALUE_MAX { 0 } else { payload.len().div_ceil(RING_VALUE_MAX) as u32 };
    for part in 0..parts {
        let start = part as usize * RING_VALUE_MAX;
        let piece = payload.slice(start..payload.len().min(start + RING_VALUE_MAX));
        writes.push((part_key(sequence, part), Some(piece)));
    }
    let header = RecordHeader { configuration, kind, parts, crc };
    let mut value = postcard::to_extend(&header, vec![RECORD_VERSION]).expect("a header can be encoded");
    if parts == 0 {
        value.extend_from_slice(&payload);
    }
    writes.push((record_key(sequence), Some(value.into())));
    parts
}

fn decode_header(value: &[u8]) -> Result<(RecordHeader, &[u8]), RingDamaged> {
    match value.split_first() {
        Some((&RECORD_VERSION, rest)) => {
            postcard::take_from_bytes(rest).or_else(|_| damaged("a record has a malformed header"))
        }
        Some((version, _)) => damaged(format!("a record has format version {version}")),
        None => damaged("a record is empty"),
    }
}

fn record_payload(
    values: &BTreeMap<&[u8], &Bytes>,
    sequence: u64,
    header: &RecordHeader,
    rest: &[u8],
) -> Result<Vec<u8>, RingDamaged> {
    let mut payload = rest.to_vec();
    for part in 0..header.parts {
        match values.get(&part_key(sequence, part)[..]) {
            Some(piece) => payload.extend_from_slice(piece),
            None => return damaged(format!("part {part} of record {sequence} is missing")),
        }
    }
    if crc32c(&payload) == header.crc {
        Ok(payload)
    } else {
        damaged(format!("record {sequence} has a wrong checksum"))
    }
}

fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, RingDamaged> {
    postcard::from_bytes(bytes).or_else(|_| damaged("a record is malformed"))
}

/// The log, shared with the library, which owns its storage and shows it to nobody. Never contended: one
/// thread steps a server.
#[derive(Clone, Debug)]
pub(super) struct SharedLog(pub(super) Arc<Mutex<Log>>);

impl SharedLog {
    pub(super) fn get(&self) -> MutexGuard<'_, Log> {
        self.0.lock().expect("a panic while the log was held ends the server")
    }
}

fn plain(entries: Vec<Numbered>) -> Vec<Entry> {
    entries.into_iter().map(|e| e.entry).collect()
}

fn numbered(first: StateIndex, entries: Vec<Entry>) -> Vec<Numbered> {
    (first..).zip(entries).map(|(index, entry)| Numbered { entry, index }).collect()
}

impl Storage<Numbered> for SharedLog {
    fn write_atomically(&mut self, ops: Vec<StorageOp<Numbered>>) -> StorageResult<()> {
        let log = &mut *self.get();
        for op in ops {
            match op {
                StorageOp::AppendEntry(entry) => log.append(vec![entry.entry]),
                StorageOp::AppendEntries(entries) => log.append(plain(entries)),
                StorageOp::AppendOnPrefix(from, entries) => log.append_on_prefix(from, plain(entries))?,
                StorageOp::SetPromise(ballot) => log.set_promise(ballot),
                StorageOp::SetDecidedIndex(index) => log.set_decided(index),
                StorageOp::SetAcceptedRound(ballot) => log.set_accepted_round(ballot),
                // The trim before it has moved the index.
                StorageOp::SetCompactedIdx(index) => debug_assert_eq!(index, log.compacted),
                StorageOp::Trim(index) => log.trim(index),
                StorageOp::SetSnapshot(Some(snapshot)) => log.set_snapshot(snapshot)?,
                StorageOp::SetSnapshot(None) => return Err("there is always a state".into()),
                StorageOp::SetStopsign(None) => {}
                StorageOp::SetStopsign(Some(_)) => return Err("the ring does not change yet".into()),
            }
        }
        Ok(())
    }
    fn append_entry(&mut self, entry: Numbered) -> StorageResult<()> {
        self.get().append(vec![entry.entry]);
        Ok(())
    }
    fn append_entries(&mut self, entries: Vec<Numbered>) -> StorageResult<()> {
        self.get().append(plain(entries));
        Ok(())
    }
    fn append_on_prefix(&mut self, from: usize, entries: Vec<Numbered>) -> StorageResult<()> {
        self.get().append_on_prefix(from, plain(entries))
    }
    fn set_promise(&mut self, ballot: Ballot) -> StorageResult<()> {
        self.get().set_promise(ballot);
        Ok(())
    }
    fn set_decided_idx(&mut self, index: usize) -> StorageResult<()> {
        self.get().set_decided(index);
        Ok(())
    }
    fn get_decided_idx(&self) -> StorageResult<usize> {
        Ok(self.get().decided)
    }
    fn set_accepted_round(&mut self, ballot: Ballot) -> StorageResult<()> {
        self.get().set_accepted_round(ballot);
        Ok(())
    }
    fn get_accepted_round(&self) -> StorageResult<Option<Ballot>> {
        Ok(Some(self.get().accepted_round).filter(|b| *b != Ballot::default()))
    }
    fn get_entries(&self, from: usize, to: usize) -> StorageResult<Vec<Numbered>> {
        let log = self.get();
        Ok(numbered(log.base + from as u64 + 1, log.entries_between(from, to)))
    }
    fn get_log_len(&self) -> StorageResult<usize> {
        Ok(self.get().entries.len())
    }
    fn get_suffix(&self, from: usize) -> StorageResult<Vec<Numbered>> {
        let log = self.get();
        Ok(numbered(log.base + from as u64 + 1, log.suffix(from)))
    }
    fn get_promise(&self) -> StorageResult<Option<Ballot>> {
        Ok(Some(self.get().promise).filter(|b| *b != Ballot::default()))
    }
    fn set_stopsign(&mut self, stop: Option<StopSign>) -> StorageResult<()> {
        if stop.is_some() { Err("the ring does not change yet".into()) } else { Ok(()) }
    }
    fn get_stopsign(&self) -> StorageResult<Option<StopSign>> {
        Ok(None)
    }
    fn trim(&mut self, _: usize) -> StorageResult<()> {
        Err("the log is compacted with its snapshot, never trimmed alone".into())
    }
    fn set_compacted_idx(&mut self, _: usize) -> StorageResult<()> {
        Err("the log is compacted with its snapshot, never trimmed alone".into())
    }
    fn get_compacted_idx(&self) -> StorageResult<usize> {
        Ok(self.get().compacted)
    }
    fn set_snapshot(&mut self, snapshot: Option<RingSnapshot>) -> StorageResult<()> {
        self.get().set_snapshot(snapshot.ok_or("there is always a state")?)
    }
    fn get_snapshot(&self) -> StorageResult<Option<RingSnapshot>> {
        Ok(Some(RingSnapshot::State(self.get().state.clone(), Vec::new())))
    }
}
