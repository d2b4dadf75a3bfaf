//! The inner ring: consensus on the log, with the library kept in this one folder (paper 2: "Paxos";
//! docs/decisions/0008-consensus-library.md).
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
//!   undecided ones twice. `Log::entries_between` therefore ends at the decided index that the storage
//!   knows, which moves only with the write itself; the merged state's index is asserted.
//! * *A member that promised itself and stopped before it could ask anybody stays outside*: after its
//!   restart its promise is higher than the leader's, who therefore ignores it, while it does not stand
//!   because the others are content. It stands by itself after a while ([`TICKS_STUCK`]).
//! * *An AcceptSync may answer a promise older than the last one*, and its delta then begins before what has
//!   been merged since. So commands in a snapshot are numbered, and merging skips those it has.
//! * *A forwarded proposal that is lost is not sent again, and buffered without bound while nobody
//!   leads.* Nothing is forwarded by it: only a leader appends, and `room.rs` retries.
//! * *Its index restarts in each configuration.* The state counts for itself: `base` + log index = state
//!   index. Its own stop-sign is not used: a command that may begin a new configuration (2.4) is appended only
//!   where nothing follows it before it is decided (`room.rs`), so an old configuration decides nothing behind it.
//! * *Node ids size vectors*, and it indexes by what messages say: messages are checked first
//!   ([`Ring::plausible`]). Beyond that, members of the ring trust each other: Paxos survives crashes and
//!   loss, not liars.
//!
//! What is durable, and how, is in `log.rs`.
//!
//! Promise: what [`Ring::decided_after`] tells is decided for ever, in one order, on all members, whoever
//! crashes when, as long as each member's writes survive once they are reported stable.

mod log;

pub(super) use log::Decided;
pub use log::RingDamaged;

use super::{Entry, State};
use crate::ids::ServerId;
use crate::limits::{LOG_KEEP, PROPOSALS_MAX};
use bytes::Bytes;
use log::{Log, Numbered, SharedLog, Write};
use omnipaxos::ballot_leader_election::Ballot;
use omnipaxos::messages::Message;
use omnipaxos::messages::ballot_leader_election::HeartbeatMsg;
use omnipaxos::messages::sequence_paxos::{PaxosMessage, PaxosMsg};
use omnipaxos::util::LogSync;
use omnipaxos::{ClusterConfig, OmniPaxos, ServerConfig};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
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
// ------------------------------------------------------------------------------------------------
// The member.

/// Who decides.
enum Core {
    /// A ring of one: what is stable is decided.
    Alone,
    /// The library.
    Many(Box<OmniPaxos<Numbered, SharedLog>>),
}

/// What a server's durable records of the ring are.
pub(super) enum Votes {
    /// It is a member.
    Member(Ring),
    /// It is none, or what it voted is lost.
    None(Forgotten),
}

/// Records that count for nothing, and how they are numbered: new ones must come behind them.
pub(super) struct Forgotten(Log);

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
    /// The highest ballot that another member was heard to follow.
    told: Ballot,
    /// Entries kept behind the snapshot, and records after which everything is written anew.
    keep: usize,
    records_max: usize,
    /// Messages to each peer, in order, with the write that each waits for.
    held: BTreeMap<u64, VecDeque<(u64, Bytes)>>,
    writes: VecDeque<(u64, Vec<Write>)>,
}

impl Ring {
    /// Opens with what was durable. `genesis` is the state at the first configuration's start. Of configurations
    /// below `votes_from` nothing counts, whole or damaged.
    pub fn open(
        me: ServerId,
        genesis: State,
        durable: &[(Bytes, Bytes)],
        votes_from: u32,
    ) -> Result<Votes, RingDamaged> {
        let log = match Log::open(genesis.clone(), durable) {
            Ok(log) => log,
            Err(_) if votes_from > 0 && Log::newest_configuration(durable) < votes_from => {
                return Ok(Votes::None(Forgotten(Log::numbered_behind(genesis, durable))));
            }
            Err(damaged) => return Err(damaged),
        };
        if log.configuration < votes_from || log.state.ring.node_of(me).is_none() {
            return Ok(Votes::None(Forgotten(log)));
        }
        Ok(Ring::with(me, log).map_or_else(|| unreachable!("it is a member"), Votes::Member))
    }

    /// Begins in a configuration in which the server has voted nothing yet, with a state of it; `None` if it is
    /// no member. Nothing leaves before that state is stable. What it has of older ones is replaced.
    pub fn begin(me: ServerId, state: State, old: Option<&Ring>, forgotten: Option<Forgotten>) -> Option<Ring> {
        let log = match (old, forgotten) {
            (Some(old), _) => old.log.get().succeeded_by(state),
            (None, Some(Forgotten(log))) => log.succeeded_by(state),
            (None, None) => Log::new(state.clone()).succeeded_by(state),
        };
        Ring::with(me, log)
    }

    /// Takes no part any more; its records stay until others replace them.
    pub fn forget(self) -> Forgotten {
        let log = self.log.get();
        Forgotten(log.succeeded_by((*log.state).clone()))
    }

    fn with(me: ServerId, log: Log) -> Option<Ring> {
        let node = log.state.ring.node_of(me)?;
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
        Some(Ring {
            node,
            members,
            configuration,
            log,
            core,
            tick_at: Instant::ZERO,
            ticks: 0,
            heard: BTreeMap::new(),
            ticks_searching: 0,
            told: Ballot::default(),
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

    /// Who leads, as far as this member knows: it may have been told by others whom they follow now, and not have heard of that
    /// one itself. (Where a link between two members is cut, one may be replaced by the other, who cannot tell it.)
    pub fn leader(&self) -> Option<u64> {
        match &self.core {
            Core::Many(paxos) if self.told > paxos.get_promise() && self.told.pid != self.node => Some(self.told.pid),
            _ => self.elected(),
        }
    }

    /// Whom this member follows.
    fn elected(&self) -> Option<u64> {
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
            Core::Many(paxos) => paxos.append(entry.into()).is_ok(),
        }
    }

    /// A message of the member `from`. What does not fit this configuration, or cannot come from there,
    /// is dropped.
    pub fn on_message(&mut self, from: u64, configuration: u32, bytes: &[u8]) {
        if configuration != self.configuration {
            return;
        }
        let Ok(message) = postcard::from_bytes::<Message<Numbered>>(bytes) else { return };
        if !self.plausible(from, &message) {
            return;
        }
        self.heard.insert(from, self.ticks);
        self.told = self.told.max(followed(&message).unwrap_or_default());
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
        let searching = self.elected().is_none();
        self.ticks_searching = if searching { self.ticks_searching.saturating_add(1) } else { 0 };
        let fast = searching && self.ticks_searching <= TICKS_SEARCHING;
        self.tick_at = now + if fast { TICK_SEARCHING } else { TICK };
        self.ticks += 1;
        let stuck = self.stuck() && !broken(Broken::NeverStands);
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
        self.ticks_searching > 0 && self.ticks_searching.is_multiple_of(patience) && heard + 1 > self.members.len() / 2
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

    /// Looks at every entry of the accepted log behind a state index, decided or not, stable or not; false
    /// if some of them are compacted.
    pub fn each_accepted_after(&self, index: u64, mut look: impl FnMut(u64, &Entry)) -> bool {
        match self.log.get().accepted_after(index) {
            Some(entries) => {
                entries.for_each(|(index, entry)| look(index, entry));
                true
            }
            None => false,
        }
    }

    /// State index of the last entry in the accepted log.
    pub fn accepted_end(&self) -> u64 {
        self.log.get().accepted_end()
    }

    /// How many entries are known decided, if this member has more of them on stable storage: then a majority may have
    /// them too, and the leader has not said so.
    pub fn undecided(&self) -> Option<u64> {
        let log = self.log.get();
        (log.stable > log.decided).then_some(log.decided as u64)
    }

    /// Stands for election now: the leader is known to be gone. The others promise the highest ballot; two
    /// that stand at one time settle it by their node numbers.
    pub fn stand(&mut self) {
        if let Core::Many(paxos) = &mut self.core {
            paxos.try_become_leader();
        }
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
    fn plausible(&self, from: u64, message: &Message<Numbered>) -> bool {
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

    fn plausible_paxos(&self, from: u64, message: &PaxosMessage<Numbered>) -> bool {
        let member_or_none = |ballot: &Ballot| ballot.pid == 0 || self.members.contains(&ballot.pid);
        match &message.msg {
            PaxosMsg::PrepareReq(m) => member_or_none(&m.n),
            PaxosMsg::Prepare(m) => m.n.pid == from,
            PaxosMsg::Promise(m) => {
                // A leader that is past the prepare phase looks only at how far the other's log goes.
                let leads = self.elected() == Some(self.node);
                let takes = leads || m.log_sync.as_ref().is_none_or(|sync| self.takes(sync));
                m.n.pid == self.node && takes
            }
            PaxosMsg::AcceptSync(m) => {
                let stale = m.log_sync.sync_idx < self.log.get().decided;
                m.n.pid == from && !stale && self.takes(&m.log_sync)
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

    /// Whether the log can be brought in line with what another member sends.
    fn takes(&self, sync: &LogSync<Numbered>) -> bool {
        let log = self.log.get();
        let fits = match &sync.decided_snapshot {
            Some(snapshot) => log.takes(snapshot, sync.sync_idx),
            None => (log.compacted..=log.end()).contains(&sync.sync_idx),
        };
        fits && sync.stopsign.is_none()
    }
}

/// The ballot of somebody else that the sender of a message follows, if it says so. One that only its owner knows of is
/// no leader's: a member that promised itself, and stopped before it could ask anybody, goes on to name it.
fn followed(message: &Message<Numbered>) -> Option<Ballot> {
    let ballot = match message {
        Message::BLE(m) => match &m.msg {
            HeartbeatMsg::Reply(reply) if reply.happy => Some(reply.leader),
            _ => None,
        },
        Message::SequencePaxos(m) => match &m.msg {
            PaxosMsg::NotAccepted(m) => Some(m.n),
            _ => None,
        },
    };
    ballot.filter(|ballot| ballot.pid != message.get_sender())
}

/// The write that must be stable before a message may leave.
///
/// An AcceptDecide goes out beside the leader's own append (both write at the same time, half the
/// latency): the follower's answer counts for itself. What it says is *decided* must be stable here,
/// because the leader counted itself among the majority. Everything else waits for all that was written
/// before it.
fn waits_for(log: &Log, message: &Message<Numbered>) -> u64 {
    if broken(Broken::MessagesBeforeStable) {
        return 0;
    }
    match message {
        Message::BLE(_) => log.control,
        Message::SequencePaxos(m) => match &m.msg {
            PaxosMsg::AcceptDecide(m) => log.control.max(log.write_of(m.decided_idx)),
            PaxosMsg::Decide(m) => log.control.max(log.write_of(m.decided_idx)),
            _ => log.next_number - 1,
        },
    }
}

fn build(node: u64, members: &[u64], configuration: u32, log: SharedLog) -> OmniPaxos<Numbered, SharedLog> {
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

/// Rules that a test switches off, to see that the random walks would notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
enum Broken {
    /// A leader counts itself before its own write is stable.
    DecidedBeforeStable,
    /// Messages leave before what they tell of is stable.
    MessagesBeforeStable,
    /// The library's own way of making a snapshot (`sync_log`, above).
    UndecidedInSnapshot,
    /// A delta is merged whole, wherever it begins.
    DeltaMergedTwice,
    /// A member that promised itself and stopped stays outside.
    NeverStands,
}

#[cfg(not(test))]
const fn broken(_: Broken) -> bool {
    false
}

#[cfg(test)]
use tests::broken;

#[cfg(test)]
mod tests;
