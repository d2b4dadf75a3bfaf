//! Liveness: who may act (2.5). A server serves reads and acknowledges writes only while it holds a
//! [`Lease`]; here it asks for one, ring members grant them, and the ring's leader finds out who is gone.
//!
//! ```text
//!   every server --Heartbeat--> every ring member --Grant--> the server
//!        lease: a majority of one ring configuration granted what was asked for less than a lease ago
//!
//!   live --Suspect--> no more grants --Reinstate--> live
//!                          |
//!                          +-- every lease surely over --ServerDown--> down --ServerUp--> live
//! ```
//!
//! *A member grants by its accepted log, decided or not.* What is decided is in the accepted log of a
//! majority before anybody can know it; so once a `Suspect` is decided, a majority already refuses, whoever
//! restarts or leads, and every lease that the server may still hold was asked for before. Whoever sees the
//! `Suspect` applied therefore waits [`LEASE_SURELY_OVER`] from then, and no server has to be asked.
//!
//! *Silence* is counted by each ring member for itself and told to the others in its heartbeats; the leader
//! acts when no majority is left that could grant. It counts only while the member ran: after a start or a
//! stall every clock of silence begins anew. A heartbeat that shows that the sender does not hear the
//! member's answers counts as silence too, and so does, at once, a server that refuses connections: when a process
//! dies all members see that within milliseconds, and where a firewall refuses for it only one of them does.
//!
//! Fails: never. Too slow a network costs leases, never promises.
//!
//! Invariants: a grant counts from when its request was sent, by the holder's clock; grants of different ring
//! configurations are never added up; of one suspicion, who proposed `ServerDown` proposes no `Reinstate`.
//! Paper 2 (liveness module).

use crate::global_state::{Accepted, Command, GlobalState, ServerState};
use crate::ids::*;
use crate::limits::{HALF_LEASE, HEARTBEAT, LEASE, LEASE_SURELY_OVER, STALL};
use crate::message::{Body, CommandId, Grant, Heartbeat};
use crate::sabotage::Sabotage;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use stdx::Instant;

/// Heartbeats of one server whose answers it has not told to have got, remembered at most.
const UNANSWERED_MAX: usize = 64;

/// Proof that the holder had a lease at the moment at which it was asked for. Reads and
/// acknowledgements take it as an argument, so that none can forget to ask.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    at: Instant,
}

impl Lease {
    /// When it was checked.
    pub fn checked_at(self) -> Instant {
        self.at
    }
}

/// What the room wants.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant)] // Taken out at once, never kept in numbers.
pub enum LivenessOutput {
    /// Send to a server; dropped if it is not connected.
    Send {
        /// To whom.
        to: ServerId,
        /// What.
        body: Body,
    },
    /// There was no lease, and there is one.
    LeaseGained,
}

/// What a ring member knows of another server's present life.
#[derive(Debug)]
struct Heard {
    incarnation: Incarnation,
    /// When it was heard last, or when silence began to be counted.
    at: Instant,
    /// It is not there: its connection broke, and it refuses new ones.
    refuses: bool,
    /// State index that it told last.
    applied: StateIndex,
    /// Whom it does not hear (of a ring member).
    silent: Vec<ServerId>,
    /// Its heartbeats that were answered, and when, while it has not told that the answer arrived.
    unanswered: VecDeque<(u64, Instant)>,
}

impl Heard {
    fn new(now: Instant, incarnation: Incarnation) -> Heard {
        Heard { incarnation, at: now, refuses: false, applied: 0, silent: Vec::new(), unanswered: VecDeque::new() }
    }

    /// Whether *this member* has reason to think that nobody is there. A refused connection is no more than
    /// that: it may be a firewall between the two, and the others may hear it well.
    fn is_silent(&self, now: Instant) -> bool {
        self.refuses || self.at + HALF_LEASE <= now
    }
}

/// The room.
#[derive(Debug)]
pub struct Liveness {
    me: ServerId,
    incarnation: Incarnation,
    sabotage: Sabotage,
    // ---- the lease
    configuration: u32,
    members: Vec<ServerId>,
    /// Requests not older than a lease.
    asked: VecDeque<(u64, Instant)>,
    sequence: u64,
    /// When the newest request was sent that each member has granted.
    granted: BTreeMap<ServerId, Instant>,
    /// The newest request that each member has answered.
    answered: BTreeMap<ServerId, u64>,
    heartbeat_at: Instant,
    /// This server serves no more, lease or not.
    retired: bool,
    // ---- of a ring member
    /// The end of the accepted log at times past: from the last that is half a lease old.
    ends: VecDeque<(Instant, StateIndex)>,
    heard: BTreeMap<ServerId, Heard>,
    /// When silence was looked at last.
    watched_at: Instant,
    /// Servers that this life had a connection to.
    met: BTreeSet<ServerId>,
    /// Whom this member told last not to hear.
    silent: Vec<ServerId>,
    /// The command that suspects each suspected server, and when this member saw it applied.
    suspected: BTreeMap<ServerId, (StateIndex, Instant)>,
    /// What this member, as leader, wants decided about a server.
    proposed: BTreeMap<ServerId, (CommandId, Command)>,
    out: VecDeque<LivenessOutput>,
}

impl Liveness {
    /// Of a server that begins its life.
    pub fn new(now: Instant, me: ServerId, incarnation: Incarnation, sabotage: Sabotage) -> Liveness {
        Liveness {
            me,
            incarnation,
            sabotage,
            configuration: 0,
            members: Vec::new(),
            asked: VecDeque::new(),
            sequence: 0,
            granted: BTreeMap::new(),
            answered: BTreeMap::new(),
            heartbeat_at: now,
            retired: false,
            ends: VecDeque::new(),
            heard: BTreeMap::new(),
            watched_at: now,
            met: BTreeSet::new(),
            silent: Vec::new(),
            suspected: BTreeMap::new(),
            proposed: BTreeMap::new(),
            out: VecDeque::new(),
        }
    }

    /// The lease, if this server holds one at `now` (read after the request was received).
    pub fn lease(&self, now: Instant) -> Option<Lease> {
        if self.retired {
            return None;
        }
        let valid = self.granted.values().filter(|sent| **sent + LEASE > now).count();
        (valid > 0 && valid >= self.majority()).then_some(Lease { at: now })
    }

    /// From here on this life holds no lease: no read is served and no write acknowledged any more. Only then
    /// may it say `Goodbye`.
    pub fn retire(&mut self) {
        self.retired = true;
    }

    /// When the present lease ends (for checkers); `None` if there is none.
    pub fn lease_until(&self) -> Option<Instant> {
        if self.retired {
            return None;
        }
        let mut sent: Vec<Instant> = self.granted.values().copied().collect();
        sent.sort_unstable();
        let last = sent.len().checked_sub(self.majority())?;
        Some(sent[last] + LEASE)
    }

    fn majority(&self) -> usize {
        self.members.len() / 2 + 1
    }

    /// The next output, until `None`.
    pub fn poll_output(&mut self) -> Option<LivenessOutput> {
        self.out.pop_front()
    }

    /// When `tick` has something to do.
    pub fn next_timeout(&self) -> Instant {
        let told = |server: &ServerId| self.silent.binary_search(server).is_ok();
        let silences = self.heard.iter().filter(|(server, _)| !told(server)).map(|(_, heard)| heard.at + HALF_LEASE);
        let over = self.proposed_or_waiting();
        silences.chain(over).fold(self.heartbeat_at, Instant::min)
    }

    /// Of a leader: when the leases of suspected servers are over.
    fn proposed_or_waiting(&self) -> Option<Instant> {
        let waits = |server: &ServerId| !matches!(self.proposed.get(server), Some((_, Command::ServerDown { .. })));
        let over =
            self.suspected.iter().filter(|(server, _)| waits(server)).map(|(_, (_, at))| *at + LEASE_SURELY_OVER);
        over.filter(|at| *at > self.watched_at).min()
    }

    /// Panics if the room contradicts itself.
    pub fn check_invariants(&self) {
        assert!(self.silent.is_sorted_by(|a, b| a < b));
        assert!(self.heard.values().all(|heard| heard.unanswered.len() <= UNANSWERED_MAX));
    }
}

// ------------------------------------------------------------------------------------------------
// Inputs.

impl Liveness {
    /// The global state has moved (or was opened): members, lives and suspicions are looked at anew.
    /// `named`: an entry that names this server is among what was applied: ask for a lease at once.
    pub fn on_state(&mut self, now: Instant, global: &mut GlobalState, named: bool) {
        let state = global.state();
        let is_new = state.ring.id != self.configuration;
        if is_new {
            self.configuration = state.ring.id;
            self.members = state.ring.members.iter().map(|m| m.server).collect();
            self.granted.clear();
            self.answered.clear();
        }
        if global.is_member() {
            self.follow_lives(now, global);
            self.follow_suspicions(now, global);
        }
        if named || is_new {
            self.ask(now, global, None);
        }
        self.watch(now, global);
    }

    fn follow_lives(&mut self, now: Instant, global: &GlobalState) {
        let servers = &global.state().servers;
        let lives = |server: &ServerId| servers.get(server).filter(|s| watched(s)).map(|s| s.incarnation);
        self.heard.retain(|server, heard| lives(server) == Some(heard.incarnation));
        for (server, known) in servers.iter().filter(|(server, known)| **server != self.me && watched(known)) {
            self.heard.entry(*server).or_insert_with(|| Heard::new(now, known.incarnation));
        }
    }

    fn follow_suspicions(&mut self, now: Instant, global: &GlobalState) {
        let servers = &global.state().servers;
        let any_index = self.sabotage == Sabotage::DownWithoutSuspectIndex;
        self.suspected.retain(|server, (index, _)| {
            any_index || servers.get(server).is_some_and(|s| s.suspect == Some(*index) && !s.down)
        });
        for (server, known) in servers.iter().filter(|(_, known)| !known.down) {
            if let Some(index) = known.suspect {
                self.suspected.entry(*server).or_insert((index, now)).0 = index;
            }
        }
    }

    /// The connection to a server is new.
    pub fn on_connected(&mut self, now: Instant, global: &mut GlobalState, server: ServerId) {
        self.met.insert(server);
        if let Some(heard) = self.heard.get_mut(&server) {
            heard.refuses = false;
            heard.unanswered.clear();
        }
        if self.members.contains(&server) {
            self.ask(now, global, Some(server));
        }
    }

    /// The connection to a server is gone; what was on its way is lost.
    pub fn on_disconnected(&mut self, server: ServerId) {
        if let Some(heard) = self.heard.get_mut(&server) {
            heard.unanswered.clear();
        }
    }

    /// The server, which is not connected, refuses connections: nobody is there.
    pub fn on_refused(&mut self, now: Instant, global: &mut GlobalState, server: ServerId) {
        if !self.met.contains(&server) {
            return; // It may not have been started yet, with the others.
        }
        if let Some(heard) = self.heard.get_mut(&server) {
            heard.refuses = true;
            self.watch(now, global);
        } else if global.is_member() && global.leader() == Some(server) {
            // It led the ring, and said goodbye.
            global.on_leader_gone(now);
        }
    }

    /// A server asks for a lease.
    pub fn on_heartbeat(&mut self, now: Instant, global: &mut GlobalState, from: ServerId, m: Heartbeat) {
        if !global.is_member() {
            return;
        }
        self.notice_stall(now);
        self.note_end(now, global);
        let granted = self.may_grant(now, global, from, m.incarnation, m.applied);
        let grant = Grant { sequence: m.sequence, configuration: self.configuration, granted };
        self.out.push_back(LivenessOutput::Send { to: from, body: Body::Grant(grant) });
        // A newer life, whose ServerUp is on its way, is there as well.
        if let Some(heard) = self.heard.get_mut(&from).filter(|h| h.incarnation <= m.incarnation) {
            heard.unanswered.retain(|(sequence, _)| *sequence > m.answered);
            if heard.unanswered.iter().all(|(_, at)| *at + HEARTBEAT * 2 > now) {
                heard.at = now;
                heard.refuses = false;
            }
            if heard.unanswered.len() == UNANSWERED_MAX {
                heard.unanswered.pop_front();
            }
            heard.unanswered.push_back((m.sequence, now));
            if heard.incarnation == m.incarnation {
                heard.applied = heard.applied.max(m.applied);
            }
            let news = heard.silent != m.silent || self.silent.contains(&from);
            heard.silent = m.silent;
            if news || self.suspected.contains_key(&from) {
                self.watch(now, global);
            }
        }
    }

    /// A ring member has answered.
    pub fn on_grant(&mut self, now: Instant, from: ServerId, m: Grant) {
        if m.configuration != self.configuration || !self.members.contains(&from) {
            return;
        }
        let answered = self.answered.entry(from).or_default();
        *answered = (*answered).max(m.sequence.min(self.sequence));
        let sent = self.asked.iter().find(|(sequence, _)| *sequence == m.sequence).map(|(_, sent)| *sent);
        if let (Some(sent), true) = (sent, m.granted) {
            self.hold(now, from, sent);
        }
    }

    /// Heartbeats, silence, leases that are over.
    pub fn tick(&mut self, now: Instant, global: &mut GlobalState) {
        if now < self.next_timeout() {
            return;
        }
        self.notice_stall(now);
        self.note_end(now, global);
        self.watch(now, global);
        if now >= self.heartbeat_at {
            self.ask(now, global, None);
        }
    }
}

/// A server whose silence is counted: it came up once, and was not declared down.
fn watched(known: &ServerState) -> bool {
    known.incarnation.0 > 0 && !known.down
}

// ------------------------------------------------------------------------------------------------
// Asking, granting.

impl Liveness {
    /// Asks for a lease: all ring members, or one that has just become reachable.
    fn ask(&mut self, now: Instant, global: &GlobalState, only: Option<ServerId>) {
        self.sequence += 1;
        while self.asked.front().is_some_and(|(_, sent)| *sent + LEASE <= now) {
            self.asked.pop_front();
        }
        self.asked.push_back((self.sequence, now));
        let applied = global.state().index;
        for member in self.members.iter().copied().filter(|m| *m != self.me && only.is_none_or(|only| only == *m)) {
            let heartbeat = Heartbeat {
                incarnation: self.incarnation,
                sequence: self.sequence,
                applied,
                answered: self.answered.get(&member).copied().unwrap_or(0),
                silent: self.silent.clone(),
            };
            self.out.push_back(LivenessOutput::Send { to: member, body: Body::Heartbeat(heartbeat) });
        }
        if only.is_none() {
            self.note_end(now, global);
            self.heartbeat_at = now + HEARTBEAT;
            if global.is_member() && self.may_grant(now, global, self.me, self.incarnation, applied) {
                self.hold(now, self.me, now);
            }
        }
    }

    fn hold(&mut self, now: Instant, member: ServerId, sent: Instant) {
        let had = self.lease(now).is_some();
        let newest = self.granted.entry(member).or_insert(sent);
        *newest = (*newest).max(sent);
        if !had && self.lease(now).is_some() {
            self.out.push_back(LivenessOutput::LeaseGained);
        }
    }

    /// The granter's rule (2.5).
    fn may_grant(
        &self,
        now: Instant,
        global: &GlobalState,
        server: ServerId,
        incarnation: Incarnation,
        applied: StateIndex,
    ) -> bool {
        let state = global.state();
        let Some(known) = state.servers.get(&server) else { return false };
        if known.incarnation != incarnation || known.down || known.suspect.is_some() {
            return false;
        }
        let accepted = match self.sabotage {
            Sabotage::GrantByAppliedLog => Accepted::default(),
            _ => global.accepted(),
        };
        let named = accepted.names.get(&server).copied().unwrap_or(0).max(global.named(server));
        !accepted.unknown && !accepted.forbidden.contains(&server) && applied >= named.max(self.overdue(now, &accepted))
    }

    fn note_end(&mut self, now: Instant, global: &GlobalState) {
        let end = global.accepted_end();
        if self.ends.back().is_none_or(|(_, last)| *last != end) {
            self.ends.push_back((now, end));
        }
        while self.ends.get(1).is_some_and(|(at, _)| *at + HALF_LEASE <= now) {
            self.ends.pop_front();
        }
    }

    /// The last entry that was accepted more than half a lease ago: who has not applied it lags.
    fn overdue(&self, now: Instant, accepted: &Accepted) -> StateIndex {
        let old = self.ends.front().filter(|(at, _)| *at + HALF_LEASE <= now);
        old.map_or(0, |(_, end)| (*end).min(accepted.end))
    }
}

// ------------------------------------------------------------------------------------------------
// Watching.

impl Liveness {
    /// Who runs late has not been listening: silence counts from now.
    fn notice_stall(&mut self, now: Instant) {
        if now <= self.heartbeat_at + STALL {
            return;
        }
        for heard in self.heard.values_mut() {
            heard.at = now;
            heard.unanswered.clear();
        }
    }

    fn is_silent(&self, now: Instant, server: ServerId) -> bool {
        server != self.me && self.heard.get(&server).is_none_or(|heard| heard.is_silent(now))
    }

    /// Whether a majority of the ring is left that could grant a lease to the server: a member that it is
    /// itself, or that hears it, as far as this member hears of that.
    fn can_get_lease(&self, now: Instant, server: ServerId) -> bool {
        let hears = |member: &&ServerId| match self.heard.get(member) {
            _ if **member == server => true,
            _ if **member == self.me => !self.is_silent(now, server),
            Some(heard) => !heard.is_silent(now) && heard.silent.binary_search(&server).is_err(),
            None => false,
        };
        self.members.iter().filter(hears).count() >= self.majority()
    }

    /// What a ring member does about silence.
    fn watch(&mut self, now: Instant, global: &mut GlobalState) {
        if !global.is_member() {
            return;
        }
        self.notice_stall(now);
        self.watched_at = now;
        let silent: Vec<ServerId> =
            self.heard.iter().filter(|(_, heard)| heard.is_silent(now)).map(|(server, _)| *server).collect();
        if silent != self.silent {
            self.silent = silent;
            self.ask(now, global, None);
        }
        if global.leads() {
            return self.lead(now, global);
        }
        for (_, (id, _)) in std::mem::take(&mut self.proposed) {
            global.forget_proposal(&id);
        }
        // Of a leader that has never been up, or was declared down, silence says nothing.
        let leader = global.leader().filter(|leader| self.heard.contains_key(leader));
        if leader.is_some_and(|leader| !self.can_get_lease(now, leader)) {
            global.on_leader_gone(now);
        }
    }

    /// What the leader proposes about each server. Who does not hear a majority of the ring itself judges
    /// nobody.
    fn lead(&mut self, now: Instant, global: &mut GlobalState) {
        let state = global.state();
        self.proposed.retain(|server, (id, _)| state.servers.contains_key(server) && !state.is_executed(id));
        if self.members.iter().filter(|member| !self.is_silent(now, **member)).count() < self.majority() {
            return;
        }
        let wanted: Vec<(ServerId, Option<Command>)> = self
            .heard
            .iter()
            .filter_map(|(server, heard)| {
                let known = state.servers.get(server)?;
                Some((*server, self.verdict(now, *server, heard, known, global.named(*server))))
            })
            .collect();
        // Who leads, and is heard by a majority, has no reason to be suspected by an earlier leader.
        let own = state.servers.get(&self.me).filter(|s| s.incarnation == self.incarnation && !s.down);
        let own = own.and_then(|s| s.suspect).map(|suspect| Command::Reinstate {
            server: self.me,
            incarnation: self.incarnation,
            suspect,
        });
        for (server, command) in wanted.into_iter().chain([(self.me, own)]) {
            self.want(now, global, server, command);
        }
    }

    /// `named`: the last entry that names the server.
    fn verdict(
        &self,
        now: Instant,
        server: ServerId,
        heard: &Heard,
        known: &ServerState,
        named: StateIndex,
    ) -> Option<Command> {
        let incarnation = known.incarnation;
        let is_there = self.can_get_lease(now, server);
        match known.suspect {
            None => (!is_there).then_some(Command::Suspect { server, incarnation }),
            Some(suspect) if is_there && heard.applied >= suspect && !heard.is_silent(now) => {
                Some(Command::Reinstate { server, incarnation, suspect })
            }
            Some(suspect) => {
                let over = |(_, at): &(StateIndex, Instant)| *at + LEASE_SURELY_OVER <= now;
                let over = self.suspected.get(&server).is_some_and(over);
                let over = over && (self.sabotage != Sabotage::DownCancelledByTakeOut || named <= suspect);
                over.then_some(Command::ServerDown { server, incarnation, suspect })
            }
        }
    }

    /// Proposes, or no longer wants, a command about a server.
    fn want(&mut self, now: Instant, global: &mut GlobalState, server: ServerId, command: Option<Command>) {
        match (self.proposed.get(&server), &command) {
            (Some((_, proposed)), Some(command)) if proposed == command => return,
            // Nobody knows what becomes of it: nothing else is said of this suspicion.
            (Some((_, Command::ServerDown { .. })), _) | (None, None) => return,
            (Some((id, _)), _) => global.forget_proposal(id),
            (None, _) => {}
        }
        self.proposed.remove(&server);
        if let Some(command) = command {
            let id = global.propose_own(now, command.clone());
            self.proposed.insert(server, (id, command));
        }
    }
}

#[cfg(test)]
#[path = "liveness_tests.rs"]
mod tests;
