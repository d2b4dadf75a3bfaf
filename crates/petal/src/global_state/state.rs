//! The state machine: what the log makes. Every server holds the same, at the same index.

use super::command::{Attachment, CommandError, Outcome};
use crate::ids::*;

use crate::translator::gmap::{Gmap, Scheme};
use crate::translator::vdir::{Family, Vdisk};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The global state at one index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Log entries applied, no-ops included.
    pub index: StateIndex,
    /// The cluster's id.
    pub cluster: ClusterId,
    /// The cluster's name.
    pub name: String,
    /// The ring.
    pub ring: RingConfiguration,
    /// Members of the cluster.
    pub servers: BTreeMap<ServerId, ServerState>,
    /// GMaps: immutable.
    pub gmaps: BTreeMap<GmapId, Gmap>,
    /// The scheme's common GMap, which new disks use.
    pub common: BTreeMap<Scheme, GmapId>,
    /// State of the slots of each GMap: changes, and is apart from it for that.
    pub slots: BTreeMap<GmapId, Vec<SlotState>>,
    /// Families.
    pub families: BTreeMap<FamilyId, Family>,
    /// Virtual disks.
    pub vdisks: BTreeMap<VdiskId, Vdisk>,
    /// Sessions.
    pub sessions: BTreeMap<SessionId, Session>,
    /// Commands executed, per proposer: low-water mark, and outcomes at or above it.
    pub executed: BTreeMap<u64, Executed>,
}

/// What is remembered of a proposer, so that a command sent again is executed once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Executed {
    /// Every command below is finished and forgotten.
    pub finished_below: u64,
    /// Results of the others.
    pub results: BTreeMap<u64, (StateIndex, Result<Outcome, CommandError>)>,
}

/// The ring's present configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingConfiguration {
    /// Its id: 1 for the first; in every ring message.
    pub id: u32,
    /// Its members.
    pub members: Vec<RingMember>,
}

/// A member of the ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingMember {
    /// Small node number, 1..=7.
    pub node: u64,
    /// The server.
    pub server: ServerId,
}

/// A server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerState {
    /// Where to reach it, the best address first.
    pub addresses: Vec<String>,
    /// Its life; zero before its first `ServerUp`.
    pub incarnation: Incarnation,
    /// Token of `AddServer`; zero for the first ring members.
    pub token: u128,
    /// Its disks.
    pub disks: BTreeMap<DiskId, DiskState>,
    /// Declared down (always false until failures are handled).
    pub down: bool,
    /// Suspected, by the command of this index.
    pub suspect: Option<StateIndex>,
    /// Capacity weight for the planner: bytes of its disks.
    pub weight: u64,
}

/// A disk of a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskState {
    /// Incarnation that its server wrote on it last.
    pub incarnation: Incarnation,
    /// Bytes for data.
    pub capacity: u64,
}

/// State of a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotState {
    /// Its members, in order.
    pub tuple: Vec<Member>,
    /// Its term.
    pub term: Term,
}

/// A member of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The server.
    pub server: ServerId,
    /// Counts for acknowledgements, and holds every acknowledged write.
    pub in_sync: bool,
    /// State index of the command that made it a member or voided its copies: a watermark of an older
    /// term than this is zero.
    pub since: StateIndex,
    /// It is the last in-sync member and lacks a disk: "not found" is an error there.
    pub incomplete: bool,
}

/// A session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// Its id.
    pub id: SessionId,
    /// The disk.
    pub vdisk: VdiskId,
    /// How.
    pub mode: Attachment,
    /// Who, in words for people.
    pub holder: String,
}

/// What an entry changed, for the rooms that must act on it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Effects {
    /// Slots that are new, or have a new term.
    pub slots: Vec<SlotId>,
    /// Families whose last disk is gone: their elements are to be dropped.
    pub families_ended: Vec<FamilyId>,
    /// Sessions that ended.
    pub sessions_ended: Vec<SessionId>,
    /// Disks that shrank: bytes at and above the new size are to be discarded.
    pub shrunk: Vec<VdiskId>,
    /// Servers whose addresses or incarnation changed.
    pub servers: Vec<ServerId>,
    /// The command narrows what data messages may do: its caller waits until it is settled.
    pub narrows: bool,
}

impl SlotState {
    /// The members in sync, in order.
    pub fn in_sync(&self) -> impl Iterator<Item = ServerId> + '_ {
        self.tuple.iter().filter(|m| m.in_sync).map(|m| m.server)
    }
    /// The member entry of a server.
    pub fn member(&self, server: ServerId) -> Option<&Member> {
        self.tuple.iter().find(|m| m.server == server)
    }
}
