//! The room: owns the state and, on ring members, the consensus library; talks to the other servers.
//! (API skeleton.)

use super::{Command, Effects, Genesis, State};
use crate::ids::*;
use crate::message::{Body, CommandId};
use bytes::Bytes;
use stdx::Instant;

/// What the room wants.
#[derive(Clone, Debug)]
pub enum GlobalOutput {
    /// Send to a server (dropped if it is not connected; the room sends again what matters).
    Send {
        /// To whom.
        to: ServerId,
        /// What.
        body: Body,
    },
    /// Make these durable, in this order, then call `on_persisted(number)`. Messages that depend on them
    /// are held back until then.
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
        /// Which command it was.
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

/// The global-state room of one server.
pub struct GlobalState;

#[allow(unused_variables, missing_docs, clippy::unimplemented)]
impl GlobalState {
    /// `durable` is every metadata value whose key begins with `ring/`, as persisted before.
    /// `proposer` is this server life's own proposer id (server id and incarnation mixed into 64 bits).
    pub fn open(me: ServerId, genesis: &Genesis, proposer: u64, durable: Vec<(Bytes, Bytes)>) -> GlobalState {
        unimplemented!()
    }
    /// The state as applied.
    pub fn state(&self) -> &State {
        unimplemented!()
    }
    /// Ring, Propose, Learn, Entries, Snapshot messages.
    pub fn on_message(&mut self, now: Instant, from: ServerId, body: Body) {
        unimplemented!()
    }
    /// A peer told its state index (it comes with every message); a higher one starts catching up.
    pub fn on_index(&mut self, now: Instant, from: ServerId, index: StateIndex) {
        unimplemented!()
    }
    pub fn on_connected(&mut self, now: Instant, server: ServerId) {
        unimplemented!()
    }
    pub fn on_disconnected(&mut self, now: Instant, server: ServerId) {
        unimplemented!()
    }
    /// The writes of `Persist { number }` are stable (and all before).
    pub fn on_persisted(&mut self, number: u64) {
        unimplemented!()
    }
    /// Keeps proposing the command until the state says that it was executed.
    pub fn propose(&mut self, now: Instant, id: CommandId, command: Command) {
        unimplemented!()
    }
    /// Proposes a command of this server itself; its number is drawn here.
    pub fn propose_own(&mut self, now: Instant, command: Command) -> CommandId {
        unimplemented!()
    }
    /// Elections, retries.
    pub fn tick(&mut self, now: Instant) {
        unimplemented!()
    }
    pub fn next_timeout(&self) -> Option<Instant> {
        unimplemented!()
    }
    pub fn poll_output(&mut self) -> Option<GlobalOutput> {
        unimplemented!()
    }
    /// Who leads the ring, as far as this server knows.
    pub fn leader(&self) -> Option<ServerId> {
        unimplemented!()
    }
    pub fn check_invariants(&self) {
        unimplemented!()
    }
}
