//! The inner ring: consensus on the log, with the library kept in this one file (paper 2: "Paxos").
//!
//! Wraps omnipaxos 0.2.4, which is stepped and does no I/O. Its limits, and what is done about each:
//!
//! * *A ring of one is refused.* It goes its own way ([`Core::Alone`]): append, persist, apply.
//! * *A storage error is a panic*, and a write counts as done when it returns. So its storage is memory
//!   ([`Log`]) plus a list of writes; the owner makes these durable and says so.
//! * *It answers at once.* A message that depends on a write leaves only after the write is stable, in
//!   order per peer. And since a leader counts itself before its own write is stable, an entry counts as
//!   decided here only when it is stable here too: else a leader that restarts could have told of an
//!   entry that then only one member holds.
//! * *Trimming needs every member.* So snapshots are used: a state, or commands that follow it; merging is
//!   applying. Each member compacts by itself.
//! * *`sync_log` merges a delta of decided entries onto a snapshot made "up to the decided index", after it
//!   has moved that index*: it would miss entries between the compacted and the old decided index, or take
//!   undecided ones twice. [`Log::entries_between`] therefore ends at the decided index that the storage
//!   knows, which moves only with the write itself; the merged state's index is asserted.
//! * *A member that promised itself and stopped before it could ask anybody stays outside*: after its
//!   restart its promise is higher than the leader's, who therefore ignores it, while it does not stand
//!   because the others are content. It stands by itself after a while ([`TICKS_STUCK`]).
//! * *A forwarded proposal that is lost is not sent again, and buffered without bound while nobody
//!   leads.* Nothing is forwarded by it: only a leader appends, and `room.rs` retries.
//! * *Its index restarts in each configuration.* The state counts for itself: `base` + log index = state
//!   index.
//! * *Node ids size vectors*, and it indexes by what messages say: messages are checked first
//!   ([`Ring::plausible`]). Beyond that, members of the ring trust each other: Paxos survives crashes and
//!   loss, not liars.
//!
//! What is durable, all keys beginning with `ring/` (docs/on-disk-format.md):
//!
//! ```text
//!   ring/log/<sequence>         one atomic write of the library: its operations since the one before, or
//!                               everything (a reset: state, entries behind it, ballots)
//!   ring/part/<sequence>/<n>    pieces of a record too long for one value; written before it
//! ```
//!
//! One value is one atomic write, so any prefix of the writes is a state that the library has been in.
//! Opening replays the records from the last reset. Records before a reset are deleted once it is stable.
//!
//! Fails: [`RingDamaged`] if the records do not fit together; then the member must not take part, because it
//! may have forgotten a promise (counterexample F25).

use super::{Entry, State};
use crate::limits::{LOG_KEEP, PROPOSALS_MAX, RING_VALUE_MAX};
use bytes::Bytes;
use omnipaxos::ballot_leader_election::Ballot;
use omnipaxos::messages::Message;
use omnipaxos::messages::ballot_leader_election::HeartbeatMsg;
use omnipaxos::messages::sequence_paxos::{PaxosMessage, PaxosMsg};
use omnipaxos::storage::{SnapshotType, StopSign, Storage, StorageOp, StorageResult};
use omnipaxos::{ClusterConfig, OmniPaxos, ServerConfig};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use stdx::checksum::crc32c;
use stdx::{Duration, Instant};

/// Between two ticks of a ring that has a leader. An idle cluster does nothing else.
const TICK: Duration = Duration::from_millis(100);
/// Between two ticks of a ring that looks for a leader: elections take two or three rounds.
const TICK_SEARCHING: Duration = Duration::from_millis(40);
/// So many fast ticks; then slow ones, in case the round trip is longer than a fast round.
const TICKS_SEARCHING: u32 = 30;
/// A member that hears a majority and has had no leader for so many ticks, and 5 more for each step of its
/// node number, stands for election by itself; then again after as many more.
const TICKS_STUCK: u32 = 40;
/// Ticks for which a member counts as heard: two rounds.
const TICKS_HEARD: u64 = 2 * ELECTION_TICKS;
/// Ticks in a round of heartbeats: 300 ms.
const ELECTION_TICKS: u64 = 3;
/// Ticks after which an unanswered Prepare or Promise is sent again.
const RESEND_TICKS: u64 = 5;
/// Durable records after which everything is written anew, although the log is short.
const RECORDS_MAX: usize = 4 * LOG_KEEP;
/// Messages held back for one peer; beyond it, heartbeats are dropped (the disk hangs).
const HELD_MAX: usize = 4096;
/// Version of the durable records: their first byte.
const RECORD_VERSION: u8 = 1;

const LOG_PREFIX: &str = "ring/log/";
const PART_PREFIX: &str = "ring/part/";

/// A number of the library's log: entries since the configuration began.
type LogIndex = usize;
/// A durable write: no value = delete.
type Write = (Bytes, Option<Bytes>);

/// Why a member's durable state cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the durable state of the ring member is damaged: {0}; the member must not take part in the ring")]
pub struct RingDamaged(String);

fn damaged<T>(why: impl Into<String>) -> Result<T, RingDamaged> {
    Err(RingDamaged(why.into()))
}

/// What has been decided beyond an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decided {
    /// These entries follow it.
    Entries(Vec<Entry>),
    /// Its followers are compacted: this state, and the entries that follow the state.
    Jump(Arc<State>, Vec<Entry>),
}

// ------------------------------------------------------------------------------------------------
// Snapshots: a state, or commands.

/// The library's snapshot type.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(into = "SnapshotBytes", try_from = "SnapshotBytes")]
pub enum RingSnapshot {
    /// A state; and the entries that were merged into it here, so that who follows need not jump. These do
    /// not travel.
    State(Arc<State>, Vec<Entry>),
    /// Commands that follow a state.
    Commands(Vec<Entry>),
}

/// A snapshot as it travels.
#[derive(Serialize, Deserialize)]
enum SnapshotBytes {
    State(Vec<u8>),
    Commands(Vec<Entry>),
}

impl From<RingSnapshot> for SnapshotBytes {
    fn from(snapshot: RingSnapshot) -> Self {
        match snapshot {
            RingSnapshot::State(state, _) => SnapshotBytes::State(state.encode()),
            RingSnapshot::Commands(entries) => SnapshotBytes::Commands(entries),
        }
    }
}

impl TryFrom<SnapshotBytes> for RingSnapshot {
    type Error = super::StateError;
    fn try_from(bytes: SnapshotBytes) -> Result<Self, Self::Error> {
        Ok(match bytes {
            SnapshotBytes::State(state) => RingSnapshot::State(Arc::new(State::decode(&state)?), Vec::new()),
            SnapshotBytes::Commands(entries) => RingSnapshot::Commands(entries),
        })
    }
}

impl omnipaxos::storage::Entry for Entry {
    type Snapshot = RingSnapshot;
}

impl omnipaxos::storage::Snapshot<Entry> for RingSnapshot {
    fn create(entries: &[Entry]) -> Self {
        RingSnapshot::Commands(entries.to_vec())
    }
    fn merge(&mut self, delta: Self) {
        match (&mut *self, delta) {
            (RingSnapshot::State(state, tail), RingSnapshot::Commands(entries)) => {
                let state = Arc::make_mut(state);
                for entry in &entries {
                    let _ = state.apply(entry);
                }
                tail.extend(entries);
            }
            (RingSnapshot::Commands(earlier), RingSnapshot::Commands(later)) => earlier.extend(later),
            (_, state) => *self = state,
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
struct Log {
    configuration: u32,
    base: u64,
    promise: Ballot,
    accepted_round: Ballot,
    decided: LogIndex,
    compacted: LogIndex,
    /// The state at `compacted`.
    state: Arc<State>,
    /// The last entries that went into it, if they came as a delta.
    tail: Vec<Entry>,
    entries: VecDeque<Entry>,

    /// Operations since the last write was taken.
    ops: Vec<Op>,
    decided_unwritten: bool,
    /// Everything must be written anew.
    reset: bool,
    /// Number of the next write to be taken, and of the last that is stable.
    next_number: u64,
    durable: u64,
    /// Entries below the index are stable when the write of the number is. Ascending in both.
    marks: VecDeque<(LogIndex, u64)>,
    stable: LogIndex,
    /// Last write with more than appended entries: a promise, a round, a snapshot.
    control: u64,
    /// Records on the disk, with their parts.
    records: BTreeMap<u64, u32>,
    next_sequence: u64,
    /// Write number and sequence of a reset that is not stable yet.
    reset_unstable: Option<(u64, u64)>,
    deletions: Vec<Bytes>,
}

impl Log {
    fn new(genesis: State) -> Log {
        Log {
            configuration: genesis.ring.id,
            base: genesis.index,
            promise: Ballot::default(),
            accepted_round: Ballot::default(),
            decided: 0,
            compacted: 0,
            state: Arc::new(genesis),
            tail: Vec::new(),
            entries: VecDeque::new(),
            ops: Vec::new(),
            decided_unwritten: false,
            reset: false,
            next_number: 1,
            durable: 0,
            marks: VecDeque::new(),
            stable: 0,
            control: 0,
            records: BTreeMap::new(),
            next_sequence: 1,
            reset_unstable: None,
            deletions: Vec::new(),
        }
    }

    /// One past the last entry.
    fn end(&self) -> LogIndex {
        self.compacted + self.entries.len()
    }

    // -------------------------------------------------------------------------------- changes

    fn append(&mut self, entries: Vec<Entry>) {
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

    fn set_decided(&mut self, index: LogIndex) {
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

    fn need_reset(&mut self) {
        self.reset = true;
        self.control = self.next_number;
    }

    /// Compacts without the library (a ring of one).
    fn compact_alone(&mut self, index: LogIndex) {
        let entries: Vec<Entry> = self.entries.range(..index - self.compacted).cloned().collect();
        let mut snapshot = RingSnapshot::State(self.state.clone(), Vec::new());
        omnipaxos::storage::Snapshot::merge(&mut snapshot, RingSnapshot::Commands(entries));
        self.trim(index);
        self.set_snapshot(snapshot).expect("it is a state");
    }

    // -------------------------------------------------------------------------------- questions

    /// Entries from `from` to `to`, but none that is not decided: see the head of the file, `sync_log`.
    fn entries_between(&self, from: LogIndex, to: LogIndex) -> Vec<Entry> {
        let to = to.min(self.decided).min(self.end());
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
    fn decided_here(&self) -> LogIndex {
        // A snapshot is of entries that a majority held before it was made.
        self.decided.min(self.stable.max(self.compacted)).min(self.end())
    }

    fn decided_after(&self, index: u64) -> Option<Decided> {
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

    /// The write after which the entries below `index` are stable here; zero if they are.
    fn write_of(&self, index: LogIndex) -> u64 {
        if index <= self.stable.max(self.compacted) {
            return 0;
        }
        self.marks.iter().find(|(end, _)| *end >= index).map_or(self.next_number, |(_, number)| *number)
    }

    // -------------------------------------------------------------------------------- durability

    /// Takes what must be made durable, as one numbered write.
    fn take_write(&mut self, with_decided: bool) -> Option<(u64, Vec<Write>)> {
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

    fn on_persisted(&mut self, number: u64) {
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
    fn open(genesis: State, durable: &[(Bytes, Bytes)]) -> Result<Log, RingDamaged> {
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

    /// Parts whose record was never written, or is deleted already.
    fn delete_orphans(&mut self, values: &BTreeMap<&[u8], &Bytes>) {
        let known: std::collections::BTreeSet<Bytes> =
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
struct SharedLog(Arc<Mutex<Log>>);

impl SharedLog {
    fn get(&self) -> MutexGuard<'_, Log> {
        self.0.lock().expect("a panic while the log was held ends the server")
    }
}

impl Storage<Entry> for SharedLog {
    fn write_atomically(&mut self, ops: Vec<StorageOp<Entry>>) -> StorageResult<()> {
        let log = &mut *self.get();
        for op in ops {
            match op {
                StorageOp::AppendEntry(entry) => log.append(vec![entry]),
                StorageOp::AppendEntries(entries) => log.append(entries),
                StorageOp::AppendOnPrefix(from, entries) => log.append_on_prefix(from, entries)?,
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
    fn append_entry(&mut self, entry: Entry) -> StorageResult<()> {
        self.get().append(vec![entry]);
        Ok(())
    }
    fn append_entries(&mut self, entries: Vec<Entry>) -> StorageResult<()> {
        self.get().append(entries);
        Ok(())
    }
    fn append_on_prefix(&mut self, from: usize, entries: Vec<Entry>) -> StorageResult<()> {
        self.get().append_on_prefix(from, entries)
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
    fn get_entries(&self, from: usize, to: usize) -> StorageResult<Vec<Entry>> {
        Ok(self.get().entries_between(from, to))
    }
    fn get_log_len(&self) -> StorageResult<usize> {
        Ok(self.get().entries.len())
    }
    fn get_suffix(&self, from: usize) -> StorageResult<Vec<Entry>> {
        Ok(self.get().suffix(from))
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

// ------------------------------------------------------------------------------------------------
// The member.

/// Who decides.
enum Core {
    /// A ring of one: what is stable is decided.
    Alone,
    /// The library.
    Many(Box<OmniPaxos<Entry, SharedLog>>),
}

/// One member of the ring, stepped.
///
/// Inputs are `on_*`, `tick` and `propose`; then [`Ring::settle`], and the outputs: `take_writes`,
/// `poll_message`, `decided_after`. Between two `settle`s writes and messages are put together.
pub(super) struct Ring {
    node: u64,
    members: Vec<u64>,
    configuration: u32,
    log: SharedLog,
    core: Core,
    tick_at: Instant,
    /// Ticks since the start, and the one at which each member was heard last.
    ticks: u64,
    heard: BTreeMap<u64, u64>,
    ticks_searching: u32,
    /// Entries kept behind the snapshot, and records after which everything is written anew.
    keep: usize,
    records_max: usize,
    /// Messages to each peer, in order, with the write that each waits for.
    held: BTreeMap<u64, VecDeque<(u64, Bytes)>>,
    writes: VecDeque<(u64, Vec<Write>)>,
}

impl Ring {
    /// Opens with what was durable. `genesis` is the state at the configuration's start.
    pub fn open(node: u64, genesis: State, durable: &[(Bytes, Bytes)]) -> Result<Ring, RingDamaged> {
        let log = Log::open(genesis, durable)?;
        let members: Vec<u64> = log.state.ring.members.iter().map(|m| m.node).collect();
        let configuration = log.configuration;
        let log = SharedLog(Arc::new(Mutex::new(log)));
        let core = if members == [node] {
            let log = &mut *log.get();
            log.decided = log.end();
            Core::Alone
        } else {
            Core::Many(Box::new(build(node, &members, configuration, log.clone())))
        };
        Ok(Ring {
            node,
            members,
            configuration,
            log,
            core,
            tick_at: Instant::ZERO,
            ticks: 0,
            heard: BTreeMap::new(),
            ticks_searching: 0,
            keep: LOG_KEEP,
            records_max: RECORDS_MAX,
            held: BTreeMap::new(),
            writes: VecDeque::new(),
        })
    }

    /// The ring's configuration; goes with every message.
    pub fn configuration(&self) -> u32 {
        self.configuration
    }

    /// Who leads, as far as this member knows.
    pub fn leader(&self) -> Option<u64> {
        match &self.core {
            Core::Alone => Some(self.node),
            Core::Many(paxos) => paxos.get_current_leader().filter(|(_, accepted)| *accepted).map(|(node, _)| node),
        }
    }

    /// True if this member appends what is proposed.
    pub fn leads(&self) -> bool {
        self.leader() == Some(self.node)
    }

    /// Appends an entry. False: this member does not lead, or too much is undecided; ask again.
    pub fn propose(&mut self, entry: Entry) -> bool {
        let undecided = {
            let log = self.log.get();
            log.end() - log.decided
        };
        if !self.leads() || undecided >= PROPOSALS_MAX {
            return false;
        }
        match &mut self.core {
            Core::Alone => {
                self.log.get().append(vec![entry]);
                true
            }
            Core::Many(paxos) => paxos.append(entry).is_ok(),
        }
    }

    /// A message of the member `from`. What does not fit this configuration, or cannot come from there,
    /// is dropped.
    pub fn on_message(&mut self, from: u64, configuration: u32, bytes: &[u8]) {
        if configuration != self.configuration {
            return;
        }
        let Ok(message) = postcard::from_bytes::<Message<Entry>>(bytes) else { return };
        if !self.plausible(from, &message) {
            return;
        }
        self.heard.insert(from, self.ticks);
        if let Core::Many(paxos) = &mut self.core {
            paxos.handle_incoming(message);
        }
    }

    /// The connection to a member is new: what was on the old one may be lost.
    pub fn on_connected(&mut self, node: u64) {
        if let Core::Many(paxos) = &mut self.core {
            paxos.reconnected(node);
        }
    }

    /// The writes up to this number are stable.
    pub fn on_persisted(&mut self, number: u64) {
        let log = &mut *self.log.get();
        log.on_persisted(number);
        if let Core::Alone = self.core {
            let stable = log.stable.max(log.compacted);
            log.set_decided(stable);
        }
    }

    /// When the next tick is due.
    pub fn next_tick(&self) -> Option<Instant> {
        match self.core {
            // What a ring of one decided is found again without having been told.
            Core::Alone => None,
            Core::Many(_) => Some(self.tick_at),
        }
    }

    /// Heartbeats, elections; at most one tick, however late it is: a member that was stopped must first
    /// hear what waits for it before it counts silence.
    pub fn tick(&mut self, now: Instant) {
        if now < self.tick_at {
            return;
        }
        let searching = self.leader().is_none();
        self.ticks_searching = if searching { self.ticks_searching.saturating_add(1) } else { 0 };
        let fast = searching && self.ticks_searching <= TICKS_SEARCHING;
        self.tick_at = now + if fast { TICK_SEARCHING } else { TICK };
        self.ticks += 1;
        let stuck = self.stuck();
        let Core::Many(paxos) = &mut self.core else { return };
        paxos.tick();
        if stuck {
            paxos.try_become_leader();
        }
        let write = self.log.get().take_write(true);
        self.writes.extend(write);
    }

    fn stuck(&self) -> bool {
        let patience = TICKS_STUCK + 5 * self.node as u32;
        let heard = self.heard.values().filter(|tick| self.ticks - **tick <= TICKS_HEARD).count();
        self.ticks_searching > 0 && self.ticks_searching % patience == 0 && heard + 1 > self.members.len() / 2
    }

    /// Puts writes and messages together. Call before taking outputs.
    pub fn settle(&mut self) {
        self.compact();
        let write = self.log.get().take_write(false);
        self.writes.extend(write);
        self.hold_messages();
    }

    /// The next write to make durable.
    pub fn poll_write(&mut self) -> Option<(u64, Vec<Write>)> {
        self.writes.pop_front()
    }

    /// The next message that may leave: `(node, bytes)`.
    pub fn poll_message(&mut self) -> Option<(u64, Bytes)> {
        let durable = self.log.get().durable;
        let (node, queue) =
            self.held.iter_mut().find(|(_, q)| q.front().is_some_and(|(write, _)| *write <= durable))?;
        queue.pop_front().map(|(_, bytes)| (*node, bytes))
    }

    /// What is decided beyond a state index.
    pub fn decided_after(&self, index: u64) -> Option<Decided> {
        self.log.get().decided_after(index)
    }

    /// The library makes messages and counts on its writes being done; here each waits for those that it
    /// tells of.
    fn hold_messages(&mut self) {
        let Core::Many(paxos) = &mut self.core else { return };
        let mut messages = Vec::new();
        paxos.take_outgoing_messages(&mut messages);
        let log = self.log.get();
        for message in messages {
            let held = self.held.entry(message.get_receiver()).or_default();
            if held.len() >= HELD_MAX && matches!(message, Message::BLE(_)) {
                continue;
            }
            let bytes = postcard::to_stdvec(&message).expect("a message in memory can be encoded");
            held.push_back((waits_for(&log, &message), bytes.into()));
        }
    }

    fn compact(&mut self) {
        let (compacted, decided, records) = {
            let log = self.log.get();
            (log.compacted, log.decided_here(), log.records.len())
        };
        if decided - compacted.min(decided) >= 2 * self.keep {
            match &mut self.core {
                Core::Alone => self.log.get().compact_alone(decided - self.keep),
                Core::Many(paxos) => {
                    paxos.snapshot(Some(decided - self.keep), true).expect("decided and not compacted");
                }
            }
            // Who applies in order is beyond these entries.
            self.log.get().tail.clear();
        } else if records >= self.records_max && self.log.get().reset_unstable.is_none() {
            self.log.get().need_reset();
        }
    }

    /// Whether the member `from` can have sent this to this member. Also keeps the library from indexing
    /// with node numbers that are none.
    fn plausible(&self, from: u64, message: &Message<Entry>) -> bool {
        let member = |node: u64| self.members.contains(&node);
        if from == self.node || !member(from) || message.get_sender() != from || message.get_receiver() != self.node {
            return false;
        }
        match message {
            Message::BLE(m) => match &m.msg {
                HeartbeatMsg::Request(_) => true,
                HeartbeatMsg::Reply(reply) => reply.ballot.pid == from && member(reply.leader.pid),
            },
            Message::SequencePaxos(m) => self.plausible_paxos(from, m),
        }
    }

    fn plausible_paxos(&self, from: u64, message: &PaxosMessage<Entry>) -> bool {
        let member_or_none = |ballot: &Ballot| ballot.pid == 0 || self.members.contains(&ballot.pid);
        match &message.msg {
            PaxosMsg::PrepareReq(m) => member_or_none(&m.n),
            PaxosMsg::Prepare(m) => m.n.pid == from,
            PaxosMsg::Promise(m) => {
                let snapshot = m.log_sync.as_ref().and_then(|s| s.decided_snapshot.as_ref());
                m.n.pid == self.node
                    && snapshot.is_none_or(right_kind)
                    && m.log_sync.iter().all(|s| s.stopsign.is_none())
            }
            PaxosMsg::AcceptSync(m) => {
                let sync = &m.log_sync;
                let log = self.log.get();
                let fits = sync.decided_snapshot.as_ref().map_or(sync.sync_idx <= log.end(), right_kind);
                m.n.pid == from && sync.sync_idx >= log.decided && fits && sync.stopsign.is_none()
            }
            PaxosMsg::AcceptDecide(m) => m.n.pid == from,
            PaxosMsg::Accepted(m) => m.n.pid == self.node,
            PaxosMsg::NotAccepted(m) => member_or_none(&m.n),
            PaxosMsg::Decide(m) => m.n.pid == from,
            // Never sent by a member of ours.
            PaxosMsg::ProposalForward(_) | PaxosMsg::Compaction(_) => false,
            PaxosMsg::AcceptStopSign(_) | PaxosMsg::ForwardStopSign(_) => false,
        }
    }
}

/// A complete snapshot is a state, a delta is commands.
fn right_kind(snapshot: &SnapshotType<Entry>) -> bool {
    match snapshot {
        SnapshotType::Complete(s) => matches!(s, RingSnapshot::State(..)),
        SnapshotType::Delta(s) => matches!(s, RingSnapshot::Commands(_)),
    }
}

/// The write that must be stable before a message may leave.
///
/// An AcceptDecide goes out beside the leader's own append (both write at the same time, half the
/// latency): the follower's answer counts for itself. What it says is *decided* must be stable here,
/// because the leader counted itself among the majority. Everything else waits for all that was written
/// before it.
fn waits_for(log: &Log, message: &Message<Entry>) -> u64 {
    match message {
        Message::BLE(_) => log.control,
        Message::SequencePaxos(m) => match &m.msg {
            PaxosMsg::AcceptDecide(m) => log.control.max(log.write_of(m.decided_idx)),
            PaxosMsg::Decide(m) => log.control.max(log.write_of(m.decided_idx)),
            _ => log.next_number - 1,
        },
    }
}

fn build(node: u64, members: &[u64], configuration: u32, log: SharedLog) -> OmniPaxos<Entry, SharedLog> {
    let cluster = ClusterConfig { configuration_id: configuration, nodes: members.to_vec(), flexible_quorum: None };
    let server = ServerConfig {
        pid: node,
        election_tick_timeout: ELECTION_TICKS,
        resend_message_tick_timeout: RESEND_TICKS,
        buffer_size: 64,
        batch_size: 1,
        flush_batch_tick_timeout: u64::MAX,
        leader_priority: 0,
    };
    cluster.build_for_server(server, log).expect("a ring of two or more with this member in it")
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
