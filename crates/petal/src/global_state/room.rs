//! The room: owns the state and, on ring members, the ring; talks to the other servers.
//!
//! *Inside* the ring members decide the log (`ring/`). *Outside* every server learns it, ring members
//! that lag included, by one rule: whoever has applied more answers `Learn` with the entries that follow,
//! or with the whole state if it no longer has them.
//!
//! ```text
//!   propose ----Propose----> leader ==ring==> decided --Entries--> every connected server outside the ring
//!      ^                                         |
//!      +---- until `executed` says so            +-- applied --Applied--> the server's other rooms
//! ```
//!
//! A new entry reaches a learner without a timer: the leader pushes it when it applies it. What was lost
//! with a connection is found by the state index in every message: [`GlobalState::on_index`] notes who has
//! more, and `Learn` asks.
//!
//! Nothing waits for an answer for ever: proposals and `Learn` are sent again, with growing delays, to
//! one server after the other. Commands are idempotent, entries are numbered, so twice does no harm.
//!
//! *A new configuration of the ring* (2.4) begins with the command that asks for it: whoever applies that command drops
//! what it has of the old one and, if it is a member, opens the new one with the state at hand ([`Ring::begin`]). The
//! old one decides nothing behind that command, because a leader appends nothing behind it before it is decided
//! (and then, if it was refused, goes on); who has not heard of it learns it like any other entry.
//!
//! Driving it: hand in `on_index` before `on_message` of the same message, then drain `poll_output`; what
//! came in between two drains is put together. The state moves inside `poll_output`, one
//! [`GlobalOutput::Applied`] per entry, in order.
//!
//! Fails: never; a member whose durable state is damaged does not open ([`RingDamaged`]).
//!
//! Invariants: `Applied` comes once for each index, in order, except over a `Jumped`; an entry is applied only
//! when a majority of the ring holds it durably. Paper 2 (global state module).

use super::ring::{Decided, Forgotten, Ring, RingDamaged, Votes};
use super::{Command, CommandError, Effects, Entry, Genesis, State};
use crate::ids::*;
use crate::limits::{COMMAND_MAX, ENTRIES_PER_MESSAGE_MAX, LOG_KEEP, PROPOSALS_MAX, RETRY_MAX, RETRY_MIN};
use crate::message::{self, Body, CommandId};
use crate::sabotage::Sabotage;
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use stdx::{Duration, Instant};

/// How often a leader tells its index to learners when nothing happens: what a push lost without a
/// broken connection would be missed for at most this long.
const ANNOUNCE: Duration = Duration::from_secs(1);
/// Between two elections for which this member stands by itself.
const STAND_AGAIN: Duration = Duration::from_millis(300);
/// How long entries may be undecided before a member stands for election. A server that has not applied what was
/// accepted half a lease ago gets no lease, and the one that it has lasts for another lease; and a leader whose disk
/// answers nothing at all goes out of the way by itself after half a lease.
const STANDSTILL_MIN: Duration = Duration::from_millis(700);
/// The longest time between two tries.
const STANDSTILL_MAX: Duration = Duration::from_secs(8);
/// More proposals of its own than a server ever has under way.
const OWN_MAX: usize = 4096;
/// An entry that may end the configuration is decided within so long, or its leader stands anew; the next time it waits
/// for twice as long.
const ENDING_MIN: Duration = Duration::from_millis(300);
const ENDING_MAX: Duration = Duration::from_secs(5);

/// What the room wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GlobalOutput {
    /// Send to a server (dropped if it is not connected; the room sends again what matters).
    Send {
        /// To whom.
        to: ServerId,
        /// What.
        body: Body,
    },
    /// Make these durable, in this order, then call `on_persisted(number)`. Messages that depend on them
    /// are held back until then. A crash may leave any prefix of them.
    Persist {
        /// Grows by one with each.
        number: u64,
        /// `(key, value)`; no value = delete. All keys begin with `ring/`.
        writes: Vec<(Bytes, Option<Bytes>)>,
    },
    /// The state has moved by one entry.
    Applied {
        /// The new index.
        index: StateIndex,
        /// Which command it was; `State::result` has what came of it.
        id: CommandId,
        /// What changed.
        effects: Effects,
    },
    /// The state has jumped (a snapshot was installed): everything may have changed.
    Jumped,
    /// Keep connections to these servers: addresses are known or have changed.
    Dial {
        /// Server and its addresses.
        server: ServerId,
        /// The best first.
        addresses: Vec<String>,
    },
}

/// What a ring member has accepted beyond what it applied, decided or not: what it must heed when it grants
/// leases (2.5).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// State index of the last entry.
    pub end: StateIndex,
    /// Servers that an entry suspects or takes down: no grants.
    pub forbidden: BTreeSet<ServerId>,
    /// Servers that an entry names, and the last that does.
    pub names: BTreeMap<ServerId, StateIndex>,
    /// Some entries cannot be looked at for a moment, or one may end the ring's configuration: no grants to anybody.
    pub unknown: bool,
}

/// A command that this server wants decided.
#[derive(Clone, Debug)]
struct Proposal {
    id: CommandId,
    command: Command,
    /// Tries so far.
    tries: u32,
    delay: Duration,
    next_try: Instant,
}

/// A `Learn` that is not answered yet.
#[derive(Clone, Copy, Debug)]
struct Asked {
    whom: ServerId,
    delay: Duration,
    again_at: Instant,
}

/// Who a server is, for its part in the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// Its id.
    pub server: ServerId,
    /// Its disks.
    pub disks: BTreeSet<DiskId>,
    /// The first configuration in which it may vote: what it voted in earlier ones is lost (zero: nothing).
    pub votes_from: u32,
}

/// An entry that was applied here not long ago.
pub struct RecentEntry {
    /// It.
    pub entry: Entry,
    /// Why it was a no-op, if it was. (The state forgets what its proposer need not know any more.)
    pub refused: Option<CommandError>,
    /// When that was; nothing if it was found at the start.
    pub applied: Option<Instant>,
}

/// The global-state room of one server.
pub struct GlobalState {
    me: ServerId,
    /// Its disks: a life on others than those that the state names votes in nothing new.
    disks: BTreeSet<DiskId>,
    /// See [`Own::votes_from`].
    votes_from: u32,
    /// Records of the ring that say nothing any more, until the next configuration replaces them.
    forgotten: Option<Forgotten>,
    state: State,
    ring: Option<Ring>,
    /// The ring's configuration that `ring` is of, or that this server is no member of.
    configuration: u32,
    /// The last entries applied, for learners and people: those up to `state.index`.
    recent: VecDeque<RecentEntry>,
    /// Connected servers, with the index that each told last.
    peers: BTreeMap<ServerId, StateIndex>,
    dialled: BTreeMap<ServerId, Vec<String>>,
    proposer: u64,
    next_number: u64,
    proposals: BTreeMap<(u64, u64), Proposal>,
    /// Commands that this leader appended and has not applied, and when.
    appended: BTreeMap<(u64, u64), Instant>,
    /// Who led when last looked; for a learner, who pushed last.
    led_by: Option<ServerId>,
    /// The last applied command that names each server (2.5), and the index below which that is not known
    /// any more: it holds for all.
    named: BTreeMap<ServerId, StateIndex>,
    named_floor: StateIndex,
    /// When this member stood for election by itself.
    stood_at: Option<Instant>,
    /// Since when this leader waits for an entry that may end the configuration.
    ending_since: Option<(Instant, Duration)>,
    standstill: Standstill,
    asked: Option<Asked>,
    /// When a lag was seen first; ring members give the ring a moment to close it.
    behind_since: Option<Instant>,
    announce_at: Instant,
    now: Instant,
    /// What is applied was decided before the start.
    is_opening: bool,
    /// Something came in since the outputs were put together.
    dirty: bool,
    sabotage: Sabotage,
    outputs: VecDeque<GlobalOutput>,
}

// ------------------------------------------------------------------------------------------------
// Inputs.

impl GlobalState {
    /// `durable` is every metadata value whose key begins with `ring/`, as persisted before.
    /// `proposer` is this server life's own proposer id (server id and incarnation mixed into 64 bits).
    pub fn open(
        own: Own,
        genesis: &Genesis,
        proposer: u64,
        durable: Vec<(Bytes, Bytes)>,
    ) -> Result<GlobalState, RingDamaged> {
        let (me, state) = (own.server, State::genesis(genesis));
        let votes = Ring::open(me, state.clone(), &durable, own.votes_from)?;
        let (ring, forgotten) = match votes {
            Votes::Member(ring) => (Some(ring), None),
            Votes::None(forgotten) => (None, Some(forgotten)),
        };
        let configuration = ring.as_ref().map_or(state.ring.id, Ring::configuration);
        let mut room = GlobalState {
            me,
            disks: own.disks,
            votes_from: own.votes_from,
            forgotten,
            state,
            ring,
            configuration,
            recent: VecDeque::new(),
            peers: BTreeMap::new(),
            dialled: BTreeMap::new(),
            proposer,
            next_number: 1,
            proposals: BTreeMap::new(),
            appended: BTreeMap::new(),
            led_by: None,
            named: BTreeMap::new(),
            named_floor: 0,
            stood_at: None,
            ending_since: None,
            standstill: Standstill::default(),
            asked: None,
            behind_since: None,
            announce_at: Instant::ZERO,
            now: Instant::ZERO,
            is_opening: true,
            dirty: true,
            sabotage: Sabotage::None,
            outputs: VecDeque::new(),
        };
        room.apply_decided();
        // What was applied before the start is no news.
        room.outputs.clear();
        room.dialled.clear();
        room.dial();
        room.is_opening = false;
        Ok(room)
    }

    /// Leaves out a rule (`sabotage.rs`).
    pub fn leave_out(&mut self, sabotage: Sabotage) {
        self.sabotage = sabotage;
    }

    /// The state as applied.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Who leads the ring, as far as this server knows.
    pub fn leader(&self) -> Option<ServerId> {
        match &self.ring {
            Some(ring) => ring.leader().and_then(|node| self.state.ring.server_of(node)),
            None => self.led_by,
        }
    }

    /// True if this server is a member of the ring.
    pub fn is_member(&self) -> bool {
        self.ring.is_some()
    }

    /// True if this server leads the ring, as far as it knows.
    pub fn leads(&self) -> bool {
        self.ring.as_ref().is_some_and(Ring::leads)
    }

    /// State index of the last applied command that names a server, or of one not before it.
    pub fn named(&self, server: ServerId) -> StateIndex {
        self.named.get(&server).copied().unwrap_or(0).max(self.named_floor)
    }

    /// State index of the last accepted entry; of a learner, which accepts nothing, of the last applied.
    pub fn accepted_end(&self) -> StateIndex {
        self.ring.as_ref().map_or(self.state.index, |ring| ring.accepted_end().max(self.state.index))
    }

    /// What this member has accepted and not applied.
    pub fn accepted(&self) -> Accepted {
        let mut accepted = Accepted { end: self.accepted_end(), ..Accepted::default() };
        let Some(ring) = &self.ring else { return accepted };
        let (state, mut forbidden, mut names, mut ends) = (&self.state, BTreeSet::new(), BTreeMap::new(), false);
        let known = ring.each_accepted_after(state.index, |index, entry| match &entry.command {
            Command::Suspect { server, .. }
            | Command::ServerDown { server, .. }
            | Command::Goodbye { server, .. }
            | Command::DiskFailed { server, .. } => {
                forbidden.insert(*server);
                names.insert(*server, index);
            }
            Command::Reinstate { server, .. } | Command::ServerUp { server, .. } => {
                names.insert(*server, index);
            }
            // With this one the configuration may end, and its grants with it.
            command if command.may_change_ring() => ends = true,
            Command::InSync { slots, .. } | Command::TakeOut { slots, .. } => {
                let members = slots.iter().filter_map(|(slot, _)| state.slot(*slot)).flat_map(|slot| &slot.tuple);
                names.extend(members.map(|member| (member.server, index)));
                if let Command::InSync { server, .. } | Command::TakeOut { server, .. } = &entry.command {
                    names.insert(*server, index); // Its membership may not be applied here yet.
                }
            }
            // Whom they concern may follow from entries that are not applied here yet.
            Command::Fence { .. } | Command::Moved { .. } | Command::AbortReconfiguration { .. } => {
                names.extend(state.servers.keys().map(|server| (*server, index)));
            }
            _ => {}
        });
        (accepted.forbidden, accepted.names, accepted.unknown) = (forbidden, names, ends || !known);
        accepted
    }

    /// The last entries applied, oldest first, with their indexes: at most [`LOG_KEEP`].
    pub fn recent(&self) -> impl Iterator<Item = (StateIndex, &RecentEntry)> {
        (self.state.index + 1 - self.recent.len() as u64..).zip(&self.recent)
    }

    /// Whether every connected server has told that it applied this entry.
    pub fn is_known_to_all(&self, index: StateIndex) -> bool {
        self.peers.values().all(|told| *told >= index)
    }

    /// The leader is known to be gone: stand for election, unless this member did so a moment ago.
    pub fn on_leader_gone(&mut self, now: Instant) {
        self.note(now);
        let may = self.stood_at.is_none_or(|at| at + STAND_AGAIN <= self.now);
        if let (Some(ring), true) = (&mut self.ring, may) {
            self.stood_at = Some(self.now);
            ring.stand();
        }
    }

    /// Ring, Propose, Learn, Entries, Snapshot messages; others are none of this room's.
    pub fn on_message(&mut self, now: Instant, from: ServerId, body: Body) {
        self.note(now);
        match body {
            Body::Ring(m) => self.on_ring(from, m),
            Body::Propose(m) => self.on_propose(from, m),
            Body::Learn(m) => self.on_learn(from, m),
            Body::Entries(m) => self.on_entries(from, m),
            Body::Snapshot(m) => self.on_snapshot(from, m),
            _ => {}
        }
    }

    /// A peer told its state index (it comes with every message); a higher one starts catching up.
    pub fn on_index(&mut self, now: Instant, from: ServerId, index: StateIndex) {
        if let Some(told) = self.peers.get_mut(&from) {
            *told = index;
        }
        if index > self.state.index {
            self.note(now);
        }
    }

    /// True if a server that knows this index shows that this one, which decides everything alone, has forgotten what it
    /// decided: its disk is of an earlier moment of this life. In a larger ring a leader that was replaced is told such indexes too.
    pub fn has_forgotten(&self, index: StateIndex) -> bool {
        self.ring.is_some() && self.state.ring.members.len() == 1 && index > self.accepted_end()
    }

    /// A connection to a server is up (also: a new one instead of the old).
    pub fn on_connected(&mut self, now: Instant, server: ServerId) {
        self.note(now);
        self.on_disconnected(now, server);
        self.peers.insert(server, 0);
        self.send(server, Body::Index);
        let node = self.state.ring.node_of(server);
        if let (Some(ring), Some(node)) = (&mut self.ring, node) {
            ring.on_connected(node);
        }
        if node.is_some() {
            self.retry_proposals();
        }
    }

    /// The connection to a server is gone.
    pub fn on_disconnected(&mut self, now: Instant, server: ServerId) {
        self.note(now);
        self.peers.remove(&server);
        self.asked = self.asked.filter(|asked| asked.whom != server);
        if self.ring.is_none() && self.led_by == Some(server) {
            self.led_by = None;
        }
    }

    /// The writes of `Persist { number }` are stable (and all before).
    pub fn on_persisted(&mut self, number: u64) {
        self.dirty = true;
        if let Some(ring) = &mut self.ring {
            ring.on_persisted(number);
        }
    }

    /// Keeps proposing the command until the state says that it was executed: at once if it was
    /// (`State::result` tells), else `Applied` with its id will come. Of [`PROPOSALS_MAX`] at one time,
    /// one more is not taken; its caller's deadline tells.
    pub fn propose(&mut self, now: Instant, id: CommandId, command: Command) {
        self.note(now);
        // What this server proposes itself is little, and it counts on its being under way.
        let has_room = self.proposals.len() < PROPOSALS_MAX || id.proposer == self.proposer;
        if self.state.is_executed(&id) || !has_room || !small(&command) {
            return;
        }
        let proposal = Proposal { id, command, tries: 0, delay: RETRY_MIN, next_try: now };
        self.proposals.entry((id.proposer, id.number)).or_insert(proposal);
    }

    /// Proposes a command of this server itself; its number is drawn here.
    pub fn propose_own(&mut self, now: Instant, command: Command) -> CommandId {
        let number = self.next_number;
        self.next_number += 1;
        let own = (self.proposer, 0)..=(self.proposer, u64::MAX);
        let finished_below = self.proposals.range(own).next().map_or(number, |((_, oldest), _)| *oldest);
        let id = CommandId { proposer: self.proposer, number, finished_below };
        self.propose(now, id, command);
        id
    }

    /// Nobody waits for the command any more; it may still be decided.
    pub fn forget_proposal(&mut self, id: &CommandId) {
        self.proposals.remove(&(id.proposer, id.number));
    }

    /// Elections, retries.
    pub fn tick(&mut self, now: Instant) {
        self.note(now);
        let Some(ring) = &mut self.ring else { return };
        ring.tick(now);
        let undecided = ring.undecided().filter(|_| !ring.leads());
        if self.standstill.look(now, undecided) {
            ring.stand();
        }
        // An entry that nothing may follow, and whose message was lost, would never be asked for again.
        if !ring.leads() || !may_end(ring, self.state.index) {
            self.ending_since = None;
            return;
        }
        let (since, patience) = *self.ending_since.get_or_insert((now, ENDING_MIN));
        if since + patience <= now {
            self.ending_since = Some((now, (patience * 2).min(ENDING_MAX)));
            ring.stand();
        }
    }

    /// When `tick` has something to do.
    pub fn next_timeout(&self) -> Option<Instant> {
        let ring = self.ring.as_ref().and_then(Ring::next_tick);
        let proposal = self.proposals.values().map(|p| p.next_try).min();
        let learn = self.learn_at();
        let announce = self.announces().then_some(self.announce_at);
        [ring, proposal, learn, announce].into_iter().flatten().min()
    }

    /// The next output, until `None`.
    pub fn poll_output(&mut self) -> Option<GlobalOutput> {
        if self.outputs.is_empty() && self.dirty {
            self.dirty = false;
            self.maintain();
        }
        self.outputs.pop_front()
    }

    /// Panics if the room contradicts itself.
    pub fn check_invariants(&self) {
        if let Some(complaint) = self.state.complaint() {
            panic!("{} at {}: {complaint}", self.me, self.state.index);
        }
        assert!(self.recent.len() as u64 <= self.state.index, "more entries than were applied");
        assert!(self.recent.len() <= LOG_KEEP && self.proposals.len() <= PROPOSALS_MAX + OWN_MAX, "bounds");
        assert!(self.named.values().all(|at| *at <= self.state.index), "named by what is not applied");
        assert!(self.proposals.values().all(|p| !self.state.is_executed(&p.id)), "proposes what is executed");
    }

    fn note(&mut self, now: Instant) {
        self.now = self.now.max(now);
        self.dirty = true;
    }
}

// ------------------------------------------------------------------------------------------------
// Messages.

impl GlobalState {
    fn on_ring(&mut self, from: ServerId, m: message::Ring) {
        let node = self.state.ring.node_of(from);
        if let (Some(ring), Some(node)) = (&mut self.ring, node) {
            ring.on_message(node, m.configuration, &m.bytes);
        }
    }

    fn on_propose(&mut self, from: ServerId, m: message::Propose) {
        if self.state.is_executed(&m.id) {
            // It will find out by learning.
            self.send(from, Body::Index);
            return;
        }
        if self.append(m.id, &m.command) {
            return;
        }
        // One step on, and once: the sender may not know the ring, or may be cut off from its leader.
        let leader = self.leader().filter(|leader| *leader != self.me && *leader != from);
        if let (Some(leader), false, Some(_)) = (leader, m.forwarded, &self.ring) {
            self.send(leader, Body::Propose(message::Propose { forwarded: true, ..m }));
        }
    }

    fn on_learn(&mut self, from: ServerId, m: message::Learn) {
        if m.from >= self.state.index {
            self.send(from, Body::Index);
            return;
        }
        let body = match self.entries_after(m.from) {
            Some(entries) => Body::Entries(message::Entries { from: m.from, entries }),
            None => Body::Snapshot(message::Snapshot { state: self.state.encode() }),
        };
        self.send(from, body);
    }

    fn on_entries(&mut self, from: ServerId, m: message::Entries) {
        if self.ring.is_none() && self.state.ring.node_of(from).is_some() && self.asked.is_none() {
            // Not an answer, so a push: only a leader does that.
            self.led_by = Some(from);
        }
        let Some(known) = self.state.index.checked_sub(m.from) else {
            // A gap: the index in front of the message has told that something is missing.
            return;
        };
        let news = m.entries.into_iter().skip(usize::try_from(known).unwrap_or(usize::MAX));
        let before = self.state.index;
        for entry in news {
            self.apply(entry);
        }
        self.learnt(from, before);
    }

    fn on_snapshot(&mut self, from: ServerId, m: message::Snapshot) {
        let Ok(state) = State::decode(&m.state) else { return };
        if state.cluster != self.state.cluster || state.index <= self.state.index {
            return;
        }
        let before = self.state.index;
        self.jump(state);
        self.learnt(from, before);
    }

    /// An answer, or a push, has come: ask for more at once if it was not all.
    fn learnt(&mut self, from: ServerId, before: StateIndex) {
        if self.state.index > before && self.asked.is_some_and(|asked| asked.whom == from) {
            self.asked = None;
        }
    }

    fn send(&mut self, to: ServerId, body: Body) {
        if self.peers.contains_key(&to) {
            self.outputs.push_back(GlobalOutput::Send { to, body });
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Putting in order, after every round of inputs.

impl GlobalState {
    fn maintain(&mut self) {
        let before = self.state.index;
        self.try_proposals();
        if let Some(ring) = &mut self.ring {
            ring.settle();
        }
        self.apply_decided();
        self.watch_leader();
        self.push_to_learners(before);
        self.ring_outputs();
        self.learn();
    }

    fn ring_outputs(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        while let Some((number, writes)) = ring.poll_write() {
            self.outputs.push_back(GlobalOutput::Persist { number, writes });
        }
        while let Some((node, bytes)) = ring.poll_message() {
            let to = self.state.ring.server_of(node).filter(|to| self.peers.contains_key(to));
            if let Some(to) = to {
                let ring = message::Ring { configuration: ring.configuration(), bytes: bytes.into() };
                self.outputs.push_back(GlobalOutput::Send { to, body: Body::Ring(ring) });
            }
        }
    }

    fn apply_decided(&mut self) {
        let Some(decided) = self.ring.as_ref().and_then(|ring| ring.decided_after(self.state.index)) else { return };
        let entries = match decided {
            Decided::Entries(entries) => entries,
            Decided::Jump(state, entries) => {
                self.jump(State::clone(&state));
                entries
            }
        };
        for entry in entries {
            self.apply(entry);
        }
    }

    fn apply(&mut self, entry: Entry) {
        let (result, effects) = self.state.apply(&entry);
        let id = entry.id;
        // With this one every older command of the proposer that it called finished is done, too.
        let state = &self.state;
        let of_proposer = (id.proposer, 0)..=(id.proposer, u64::MAX);
        let is_done = |(key, p): (&(u64, u64), &Proposal)| state.is_executed(&p.id).then_some(*key);
        let done: Vec<(u64, u64)> = self.proposals.range(of_proposer).filter_map(is_done).collect();
        done.iter().for_each(|key| drop(self.proposals.remove(key)));
        self.appended.remove(&(id.proposer, id.number));
        self.recent.push_back(RecentEntry {
            entry,
            refused: result.err(),
            applied: (!self.is_opening).then_some(self.now),
        });
        if self.recent.len() > LOG_KEEP {
            self.recent.pop_front();
        }
        let servers_changed = !effects.servers.is_empty();
        self.named.extend(effects.names.iter().map(|server| (*server, self.state.index)));
        self.outputs.push_back(GlobalOutput::Applied { index: self.state.index, id, effects });
        if servers_changed {
            self.dial();
        }
        self.follow_ring();
    }

    /// The state has moved, perhaps into another configuration of the ring: see the head of the file.
    fn follow_ring(&mut self) {
        if self.state.ring.id == self.configuration {
            return;
        }
        let led = self.leads();
        self.configuration = self.state.ring.id;
        let old = self.ring.take();
        // Old disks of a server that was given others may have been started: it has voted with those others since.
        let named = self.state.servers.get(&self.me).map(|s| &s.disks);
        let is_itself = named.is_some_and(|named| named.is_empty() || named.keys().eq(&self.disks));
        let may_vote = is_itself && self.configuration >= self.votes_from;
        if may_vote && self.state.ring.node_of(self.me).is_some() {
            self.ring = Ring::begin(self.me, self.state.clone(), old.as_ref(), self.forgotten.take());
        } else if let Some(old) = old {
            self.forgotten = Some(old.forget());
        }
        self.appended.clear();
        self.dirty = true;
        if let (true, Some(ring)) = (led, &mut self.ring) {
            ring.stand();
        }
    }

    fn jump(&mut self, state: State) {
        self.state = state;
        self.named.clear();
        self.named_floor = self.state.index;
        self.recent.clear();
        let state = &self.state;
        self.proposals.retain(|_, p| !state.is_executed(&p.id));
        self.appended.clear();
        self.outputs.push_back(GlobalOutput::Jumped);
        self.dial();
        self.follow_ring();
    }

    /// Asks for connections to servers that are new or have moved.
    fn dial(&mut self) {
        let is_gone = |server: &&ServerId| !self.state.servers.contains_key(server);
        for server in self.dialled.keys().filter(is_gone).copied().collect::<Vec<_>>() {
            self.dialled.remove(&server);
            self.outputs.push_back(GlobalOutput::Dial { server, addresses: Vec::new() });
        }
        for (server, known) in self.state.servers.iter().filter(|(server, _)| **server != self.me) {
            if self.dialled.get(server) != Some(&known.addresses) {
                self.dialled.insert(*server, known.addresses.clone());
                let addresses = known.addresses.clone();
                self.outputs.push_back(GlobalOutput::Dial { server: *server, addresses });
            }
        }
    }

    fn watch_leader(&mut self) {
        if self.ring.is_none() {
            return;
        }
        let leader = self.leader();
        if leader != self.led_by {
            self.led_by = leader;
            self.appended.clear();
            self.announce_at = self.now;
            self.retry_proposals();
        }
    }

    // -------------------------------------------------------------------------------- learners

    fn learners(&self) -> impl Iterator<Item = ServerId> + '_ {
        self.peers.keys().copied().filter(|server| self.state.ring.node_of(*server).is_none())
    }

    fn announces(&self) -> bool {
        self.leads() && self.learners().next().is_some()
    }

    /// Sends what was applied since `before` to everybody outside the ring; with nothing new, now and then,
    /// an empty message, which has the index and tells who leads.
    fn push_to_learners(&mut self, before: StateIndex) {
        if !self.leads() || (self.state.index == before && self.now < self.announce_at) {
            return;
        }
        self.announce_at = self.now + ANNOUNCE;
        // After a jump: nothing to push, the index tells.
        let entries = self.entries_after(before).unwrap_or_default();
        let from = if entries.is_empty() { self.state.index } else { before };
        for learner in self.learners().collect::<Vec<_>>() {
            let entries = message::Entries { from, entries: entries.clone() };
            self.send(learner, Body::Entries(entries));
        }
    }

    /// Entries that follow an index, at most one message full; `None` if they are no longer here.
    fn entries_after(&self, index: StateIndex) -> Option<Vec<Entry>> {
        let missing = usize::try_from(self.state.index.checked_sub(index)?).ok()?;
        let first = self.recent.len().checked_sub(missing)?;
        Some(self.recent.iter().skip(first).take(ENTRIES_PER_MESSAGE_MAX).map(|r| r.entry.clone()).collect())
    }

    fn behind(&self) -> bool {
        self.peers.values().any(|told| *told > self.state.index)
    }

    /// When to ask (again) for what is missing.
    fn learn_at(&self) -> Option<Instant> {
        if !self.behind() {
            return None;
        }
        // The ring tells its members; only what it does not tell soon is asked for.
        let patience = if self.ring.is_some() { RETRY_MIN } else { Duration::ZERO };
        let first = self.behind_since.unwrap_or(self.now) + patience;
        Some(self.asked.map_or(first, |asked| asked.again_at))
    }

    fn learn(&mut self) {
        if !self.behind() {
            (self.behind_since, self.asked) = (None, None);
            return;
        }
        self.behind_since = self.behind_since.or(Some(self.now));
        if self.learn_at().is_none_or(|at| at > self.now) {
            return;
        }
        let ahead: Vec<ServerId> =
            self.peers.iter().filter(|(_, told)| **told > self.state.index).map(|(server, _)| *server).collect();
        // Another one than last time, if there is another.
        let last = self.asked.map(|asked| asked.whom);
        let whom = ahead.iter().find(|s| last.is_some_and(|last| **s > last)).or(ahead.first());
        let Some(whom) = whom.copied() else { return };
        let delay = self.asked.map_or(RETRY_MIN, |asked| (asked.delay * 2).min(RETRY_MAX));
        self.asked = Some(Asked { whom, delay, again_at: self.now + delay });
        self.send(whom, Body::Learn(message::Learn { from: self.state.index }));
    }

    // -------------------------------------------------------------------------------- proposals

    /// The leader appends a command, unless it has done so a moment ago.
    fn append(&mut self, id: CommandId, command: &Command) -> bool {
        let key = (id.proposer, id.number);
        let Some(ring) = self.ring.as_mut().filter(|ring| ring.leads()) else { return false };
        if !small(command) || self.appended.get(&key).is_some_and(|at| self.now < *at + RETRY_MAX) {
            return true;
        }
        let mut may_end = false;
        let known = ring.each_accepted_after(self.state.index, |_, entry| may_end |= entry.command.may_change_ring());
        if may_end || !known {
            return true; // What is not appended now is proposed again.
        }
        let mut command = command.clone();
        if self.sabotage == Sabotage::InSyncUnconditional {
            make_unconditional(&self.state, &mut command);
        }
        if ring.propose(Entry { id, command }) {
            self.appended.insert(key, self.now);
        }
        true
    }

    fn retry_proposals(&mut self) {
        for proposal in self.proposals.values_mut() {
            (proposal.delay, proposal.next_try) = (RETRY_MIN, self.now);
        }
        self.dirty |= !self.proposals.is_empty();
    }

    fn try_proposals(&mut self) {
        let due: Vec<(u64, u64)> =
            self.proposals.iter().filter(|(_, p)| p.next_try <= self.now).map(|(key, _)| *key).collect();
        for key in due {
            let proposal = self.proposals.get_mut(&key).expect("collected above");
            proposal.next_try = self.now + proposal.delay;
            proposal.delay = (proposal.delay * 2).min(RETRY_MAX);
            proposal.tries = proposal.tries.wrapping_add(1);
            let (id, tries, command) = (proposal.id, proposal.tries, proposal.command.clone());
            if self.append(id, &command) {
                continue;
            }
            if let Some(to) = self.propose_to(tries) {
                self.send(to, Body::Propose(message::Propose { id, command, forwarded: false }));
            }
        }
    }

    /// The leader first; when that did not help, one connected member after the other.
    fn propose_to(&self, tries: u32) -> Option<ServerId> {
        let members: BTreeSet<ServerId> = self.state.ring.members.iter().map(|m| m.server).collect();
        let reachable: Vec<ServerId> = members.into_iter().filter(|s| self.peers.contains_key(s)).collect();
        let leader = self.leader().filter(|leader| reachable.contains(leader));
        match (leader, reachable.as_slice()) {
            (_, []) => None,
            (Some(leader), _) if tries % 2 == 1 => Some(leader),
            (_, reachable) => Some(reachable[tries as usize / 2 % reachable.len()]),
        }
    }
}

/// Entries on stable storage here that the leader does not decide. Its disk may hang while it is heard: soon
/// nobody would be granted a lease any more (2.5), for whoever has not applied them lags.
#[derive(Debug, Default)]
struct Standstill {
    /// Entries that are decided, since when it is these, and how long that may be.
    at: Option<(u64, Instant, Duration)>,
    looked: Instant,
}

impl Standstill {
    /// True if it is time to stand for election. `undecided`: see [`Ring::undecided`]; `None` at the leader.
    fn look(&mut self, now: Instant, undecided: Option<u64>) -> bool {
        // Who did not run has not heard either.
        let is_late = now.since(std::mem::replace(&mut self.looked, now)) > STANDSTILL_MIN / 2;
        let Some(decided) = undecided else {
            self.at = None;
            return false;
        };
        match &mut self.at {
            Some((known, since, patience)) if *known == decided && !is_late => {
                let stands = *since + *patience <= now;
                if stands {
                    (*since, *patience) = (now, (*patience * 2).min(STANDSTILL_MAX));
                }
                stands
            }
            at => {
                *at = Some((decided, now, STANDSTILL_MIN));
                false
            }
        }
    }
}

/// Whether an entry that may end the configuration is accepted and not applied, as far as this member knows.
fn may_end(ring: &Ring, applied: StateIndex) -> bool {
    let mut found = false;
    let is_known = ring.each_accepted_after(applied, |_, entry| found |= entry.command.may_change_ring());
    found || !is_known
}

/// An `InSync` of long ago becomes one of now.
fn make_unconditional(state: &State, command: &mut Command) {
    let Command::InSync { server, incarnation, slots } = command else { return };
    if let Some(present) = state.servers.get(server) {
        *incarnation = present.incarnation;
    }
    for (id, term) in slots {
        *term = state.slot(*id).map_or(*term, |slot| slot.term);
    }
}

/// Whether a command may go into the log at all.
pub(crate) fn check_length(command: &Command) -> Result<(), CommandError> {
    match postcard::to_stdvec(command).map_or(usize::MAX, |bytes| bytes.len()) {
        bytes if bytes > COMMAND_MAX => Err(CommandError::TooLong { bytes, limit: COMMAND_MAX }),
        _ => Ok(()),
    }
}

fn small(command: &Command) -> bool {
    check_length(command).is_ok()
}

#[cfg(test)]
#[path = "room_tests.rs"]
mod tests;
