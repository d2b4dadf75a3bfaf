//! Global state: Paxos inside, learning outside (paper 2, "global state module").
//!
//! A deterministic state machine ([`State`]) driven by a log. The inner ring runs consensus
//! (`ring/`, omnipaxos); all servers, ring members included, apply what it decided.
//! `room.rs` is the stepped room that owns both and talks to the other servers.

mod arguments;
mod command;
mod flatten;
mod reconfiguration;
mod ring;
mod room;
mod servers;
mod snapshots;
mod state;

pub use arguments::{check_name, check_size, split_name};
pub use command::{Attachment, Command, CommandError, Entry, Genesis, GenesisServer, Outcome, SnapshotOf};
pub use flatten::Flattening;
pub use reconfiguration::{Move, Reconfiguration};
pub use ring::RingDamaged;
pub(crate) use room::check_length;
pub use room::{Accepted, GlobalOutput, GlobalState, Own, RecentEntry};
#[cfg(test)]
pub(crate) use state::tests::Fixture;
pub use state::{
    Departed, DiskState, Effects, Executed, Member, RingConfiguration, RingMember, ServerState, Session, SlotState,
    Split, State, StateError,
};
