//! The state machine: what the log makes. Every server holds the same, at the same index.
//!
//! [`State::apply`] is deterministic and total: any command at any state gives a new state, a result and
//! the effects that the rooms must act on. A command that relies on something that changed, or that asks
//! for what cannot be, is a no-op that counts: `index` grows by one with every entry.
//!
//! *Ids are indexes.* A disk, family, GMap or session is named by the state index of the command that
//! made it, so no id is ever used twice and none has to be counted apart. *Terms and revisions are
//! indexes* too: a term is the index of the last command that changed who may act in a slot, a revision
//! that of the last command that changed what data messages of a disk may do. A message that carries both
//! (its `Need`) can be compared with any server's state.
//!
//! *Executed once.* A command is sent again until somebody sees its result, so it can be in the log twice.
//! `executed` remembers results per proposer, from the number on that the proposer has not declared
//! finished; the second copy changes nothing and has the same result. It is bounded: see [`Executed`].
//!
//! Fails: never. [`State::decode`] refuses bytes that are not a consistent state.
//!
//! Invariants (checked by [`State::complaint`], on every decoded state and in every simulation step):
//! * every reference (disk to family, family to GMap, session to disk and back) leads somewhere;
//! * names are unique; a GMap has a power of two of slots, one slot state for each;
//! * I3: no slot is without a member in sync; the members of a tuple differ;
//! * no id, term, revision or since is above `index`.
//!
//! Paper 2 (global state module), 2.1 (VDir, GMap). Next: `room.rs`, which feeds it.

use super::arguments::{check_name, check_size, conflict, split_name, valid_stripe_unit};
use super::command::{Attachment, Command, CommandError, Entry, Genesis, Outcome};
use super::flatten::Flattening;
use super::reconfiguration::Reconfiguration;
use crate::ids::*;
use crate::limits::*;
use crate::message::{CommandId, Hints, ServerHint, SlotHint};
use crate::placement::{self, PlanError};
use crate::translator::gmap::{Gmap, Scheme, slot_of_element};
use crate::translator::vdir::{Automatic, Family, Imported, Lineage, Policy, Vdisk};
use crate::translator::visible::Visible;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Version of the encoding of a [`State`]: its first byte.
const STATE_VERSION: u8 = 10;

/// The first lineage of a family, and the first epoch of a lineage.
const FIRST_LINEAGE: LineageId = LineageId(1);
pub(super) const FIRST_EPOCH: Epoch = Epoch(1);

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
    /// GMaps. Each keeps its id, scheme and number of slots; a reconfiguration changes tuples.
    pub gmaps: BTreeMap<GmapId, Gmap>,
    /// The scheme's common GMap, which new disks use.
    pub common: BTreeMap<Scheme, GmapId>,
    /// State of the slots of each GMap: changes, and is apart from it for that.
    pub slots: BTreeMap<GmapId, Vec<SlotState>>,
    /// Changes of placement that are under way (`reconfiguration.rs`).
    pub reconfigurations: BTreeMap<GmapId, Reconfiguration>,
    /// GMaps whose placement is to be planned anew when nothing of them is under way.
    pub replan: BTreeSet<GmapId>,
    /// The highest number that a server ever had.
    pub last_server: u16,
    /// A server that is down for so many seconds has its data copied to others; 0: never.
    pub replace_after: u32,
    /// State index of the last command that changed the tuples of a GMap, where one did.
    pub layouts: BTreeMap<GmapId, StateIndex>,
    /// State index of the last command that changed which servers hold data.
    pub placed: StateIndex,
    /// GMaps that one family has by itself, each with where that came from.
    pub splits: BTreeMap<GmapId, Split>,
    /// Families.
    pub families: BTreeMap<FamilyId, Family>,
    /// Virtual disks.
    pub vdisks: BTreeMap<VdiskId, Vdisk>,
    /// Sessions.
    pub sessions: BTreeMap<SessionId, Session>,
    /// Clones that are being flattened (`flatten.rs`).
    pub flattenings: BTreeMap<VdiskId, Flattening>,
    /// Commands executed, per proposer: low-water mark, and outcomes at or above it.
    pub executed: BTreeMap<u64, Executed>,
    /// Look-ups that follow from the rest.
    #[serde(skip)]
    pub(super) derived: Derived,
}

/// Look-ups that follow from the rest of the state; made anew after decoding.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Derived {
    /// Disk of each name.
    pub names: BTreeMap<String, VdiskId>,
    /// Disks and snapshots of each family.
    pub members: BTreeMap<FamilyId, BTreeSet<VdiskId>>,
    /// What somebody can see of each family.
    visible: BTreeMap<FamilyId, Visible>,
}

/// What is remembered of a proposer, so that a command sent again is executed once.
///
/// Bounded in two ways, both the same on every server because they look at the log only. Of one proposer
/// the newest [`RESULTS_PER_PROPOSER_MAX`] results are kept. Of all proposers the
/// [`PROPOSERS_MAX`] whose last command is newest: when one more comes, the one unheard for longest is
/// forgotten. A command could be executed twice only if a copy of it came that late.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Executed {
    /// Every command below is finished and forgotten.
    pub finished_below: u64,
    /// State index of its last command.
    pub last: StateIndex,
    /// Results of the others.
    pub results: BTreeMap<u64, (StateIndex, Result<Outcome, CommandError>)>,
}

/// The ring's present configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingConfiguration {
    /// Its id: 1 for the first; in every ring message.
    pub id: u32,
    /// State index of the command with which it began: its log starts behind it.
    pub base: StateIndex,
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
    /// Declared down, until its next `ServerUp`.
    pub down: bool,
    /// State index of the `ServerUp` of its life.
    pub up: StateIndex,
    /// Suspected, by the command of this index.
    pub suspect: Option<StateIndex>,
    /// Capacity weight for the planner: bytes of its disks.
    pub weight: u64,
    /// It is to hold no data.
    pub drained: bool,
    /// That is so because it stayed away, and until it comes up.
    pub away: bool,
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
    /// Servers that are no members any more, and may not know it: see [`SlotState::unaware_leavers`].
    pub left: Vec<Departed>,
}

/// A server that is no member of a slot any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Departed {
    /// The server.
    pub server: ServerId,
    /// State index of the command that ended its membership.
    pub index: StateIndex,
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
    /// State index of the command that took it out of the in-sync set last; zero if none did.
    pub out: StateIndex,
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

/// A family that got a GMap of its own (2.8). Its slots began with the tuples, and on each server with the watermarks, of
/// those with the same numbers in the GMap that it left. The new GMap's id is the state index of that, so whatever was
/// written before has a version of an older term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// The family.
    pub family: FamilyId,
    /// The GMap that it left.
    pub from: GmapId,
}

/// What an entry changed, for the rooms that must act on it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Effects {
    /// Slots that are new, or have a new term.
    pub slots: Vec<SlotId>,
    /// Families whose last disk is gone: their elements are to be dropped.
    pub families_ended: Vec<FamilyId>,
    /// Families of which less can be seen than before: rows of their elements are to be dropped.
    pub families_narrowed: Vec<FamilyId>,
    /// Disks that write a new epoch, whose writes wait until everybody knows that: several clients may have them
    /// attached, or several disks were snapshotted at one instant.
    pub new_epochs_gated: Vec<VdiskId>,
    /// Sessions that ended.
    pub sessions_ended: Vec<SessionId>,
    /// Servers whose addresses or incarnation changed.
    pub servers: Vec<ServerId>,
    /// Servers that must have applied the command before they get another lease (2.5, "names").
    pub names: BTreeSet<ServerId>,
    /// Servers that this command declared down.
    pub downs: Vec<ServerId>,
    /// The command narrows what data messages may do: its caller waits until it is settled.
    pub narrows: bool,
    /// If it narrows: the servers of the disk's GMap, ascending. It is settled when all of these have
    /// reported the index.
    pub concerned: Vec<ServerId>,
}

impl SlotState {
    /// The members in sync, in order.
    pub fn in_sync(&self) -> impl Iterator<Item = ServerId> + '_ {
        self.tuple.iter().filter(|m| m.in_sync).map(|m| m.server)
    }
    /// The member who is the acting primary once it holds the promises of the term: the first that is in
    /// sync and not down. `None` while all of them are down.
    pub fn acting(&self, servers: &BTreeMap<ServerId, ServerState>) -> Option<ServerId> {
        self.in_sync().find(|s| servers.get(s).is_some_and(|s| !s.down))
    }
    /// Whether some member that was taken out may not know it, and serve reads for as long as a lease that
    /// it has from before (2.1, "complete"). One that is down has no lease, and one that was started since
    /// got none before it knew.
    pub fn has_unaware(&self, servers: &BTreeMap<ServerId, ServerState>) -> bool {
        // A joiner, out since it is a member, never had a lease for this slot; or see `unaware_leavers`.
        let may_be = |m: &Member| servers.get(&m.server).is_some_and(|s| !s.down && m.out > s.up && m.out != m.since);
        self.tuple.iter().any(|m| !m.in_sync && may_be(m))
    }
    /// Servers whose membership ended by a command that they may not have applied, each with the index of that: until
    /// they tell that they have, they may serve reads by a lease that they have from before. As above.
    pub fn unaware_leavers<'a>(
        &'a self,
        servers: &'a BTreeMap<ServerId, ServerState>,
    ) -> impl Iterator<Item = &'a Departed> + 'a {
        self.left.iter().filter(move |d| servers.get(&d.server).is_some_and(|s| !s.down && d.index > s.up))
    }
    /// The member entry of a server.
    pub fn member(&self, server: ServerId) -> Option<&Member> {
        self.tuple.iter().find(|m| m.server == server)
    }
}

impl RingConfiguration {
    /// The node number of a server in this configuration.
    pub fn node_of(&self, server: ServerId) -> Option<u64> {
        self.members.iter().find(|m| m.server == server).map(|m| m.node)
    }
    /// The server of a node number.
    pub fn server_of(&self, node: u64) -> Option<ServerId> {
        self.members.iter().find(|m| m.node == node).map(|m| m.server)
    }
}

/// Why bytes are not a state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Written by a version of the program that knows more.
    #[error("the global state has format version {0}, this program knows {STATE_VERSION}")]
    UnknownVersion(u8),
    /// Not an encoded state.
    #[error("the bytes are not a global state")]
    Malformed,
    /// Encoded well, but it contradicts itself.
    #[error("the global state contradicts itself: {0}")]
    Inconsistent(String),
}

// ------------------------------------------------------------------------------------------------
// Making, encoding, decoding.

impl State {
    /// The state at index 0.
    pub fn genesis(genesis: &Genesis) -> State {
        let members = (1..).zip(&genesis.ring).map(|(node, s)| RingMember { node, server: s.server }).collect();
        let servers = genesis.ring.iter().map(|s| (s.server, ServerState::new(s.addresses.clone(), 0))).collect();
        State {
            index: 0,
            cluster: genesis.cluster,
            name: genesis.name.clone(),
            ring: RingConfiguration { id: 1, base: 0, members },
            servers,
            gmaps: BTreeMap::new(),
            common: BTreeMap::new(),
            slots: BTreeMap::new(),
            reconfigurations: BTreeMap::new(),
            replan: BTreeSet::new(),
            last_server: genesis.ring.iter().map(|s| s.server.0).max().unwrap_or(0),
            replace_after: REPLACE_AFTER_DEFAULT,
            layouts: BTreeMap::new(),
            splits: BTreeMap::new(),
            placed: 0,
            families: BTreeMap::new(),
            vdisks: BTreeMap::new(),
            sessions: BTreeMap::new(),
            flattenings: BTreeMap::new(),
            executed: BTreeMap::new(),
            derived: Derived::default(),
        }
    }

    /// The state as bytes: a version byte, then postcard.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![STATE_VERSION]).expect("a state in memory can be encoded")
    }

    /// A state from bytes, consistent in itself.
    pub fn decode(bytes: &[u8]) -> Result<State, StateError> {
        let state = match bytes.split_first() {
            Some((&STATE_VERSION, rest)) => postcard::from_bytes::<State>(rest).map_err(|_| StateError::Malformed)?,
            Some((version, _)) => return Err(StateError::UnknownVersion(*version)),
            None => return Err(StateError::Malformed),
        };
        let state = state.with_derived();
        match state.complaint() {
            None => Ok(state),
            Some(why) => Err(StateError::Inconsistent(why)),
        }
    }

    fn with_derived(mut self) -> State {
        self.derived = Derived::default();
        for disk in self.vdisks.values() {
            self.derived.names.insert(disk.name.clone(), disk.id);
            self.derived.members.entry(disk.family).or_default().insert(disk.id);
        }
        for family in self.families.keys().copied().collect::<Vec<_>>() {
            self.look_anew(family);
        }
        self
    }

    /// Disks or snapshots of a family came or went, or a disk writes another epoch.
    pub(super) fn look_anew(&mut self, id: FamilyId) {
        let Some(family) = self.families.get_mut(&id) else {
            self.derived.visible.remove(&id);
            return;
        };
        let members: Vec<&Vdisk> =
            self.derived.members.get(&id).into_iter().flatten().filter_map(|m| self.vdisks.get(m)).collect();
        let mut stood_on = BTreeSet::new();
        for member in &members {
            // Behind one that was met before are its ancestors, met before, too.
            let mut next = Some(member.lineage);
            while let Some(lineage) = next.filter(|lineage| stood_on.insert(*lineage)) {
                next = family.lineages.get(&lineage).and_then(|l| l.parent).map(|(parent, _)| parent);
            }
        }
        family.lineages.retain(|lineage, _| stood_on.contains(lineage));
        let visible = Visible::new(family, members.into_iter());
        self.derived.visible.insert(id, visible);
    }

    /// What contradicts itself, if anything does.
    pub fn complaint(&self) -> Option<String> {
        self.check().err()
    }

    fn check(&self) -> Result<(), String> {
        let here = |condition: bool, what: &dyn std::fmt::Debug, why: &str| {
            if condition { Ok(()) } else { Err(format!("{what:?} {why}")) }
        };
        here(self.index < u64::MAX / 2, &self.index, "is no index that a log reaches")?;
        let nodes: BTreeSet<u64> = self.ring.members.iter().map(|m| m.node).collect();
        here(nodes.len() == self.ring.members.len(), &nodes, "are node numbers used twice")?;
        here(self.ring.base <= self.index, &self.ring.base, "is no index at which the ring can have begun")?;
        here(
            !self.ring.members.is_empty() && self.ring.members.len() <= 7,
            &self.ring.id,
            "has no or too many members",
        )?;
        for member in &self.ring.members {
            here((1..=7).contains(&member.node), &member.server, "has a node number outside 1..=7")?;
            here(self.servers.contains_key(&member.server), &member.server, "is in the ring and not in the cluster")?;
        }
        here(self.gmaps.len() == self.slots.len(), &self.gmaps.len(), "GMaps and slot tables differ in number")?;
        for (id, gmap) in &self.gmaps {
            self.check_gmap(*id, gmap)?;
        }
        self.check_reconfigurations()?;
        for (scheme, gmap) in &self.common {
            here(self.gmaps.get(gmap).is_some_and(|g| g.scheme == *scheme), gmap, "is no common map of its scheme")?;
        }
        for (id, family) in &self.families {
            here(*id == family.id && id.0 <= self.index, id, "has another id inside")?;
            here(self.gmaps.contains_key(&family.gmap), id, "has no GMap")?;
            here(valid_stripe_unit(family.stripe_unit), id, "has an impossible stripe unit")?;
            here(family.revision <= self.index, id, "has a revision from the future")?;
            here(self.derived.members.contains_key(id), id, "has no disk")?;
            for (lineage, l) in &family.lineages {
                here(*lineage < family.next_lineage, id, "has a lineage from the future")?;
                // A child is younger than its parent: so nobody is his own ancestor.
                let is_right = |(parent, _)| parent < *lineage && family.lineages.contains_key(&parent);
                here(l.parent.is_none_or(is_right), id, "has a lineage without its parent")?;
            }
        }
        here(self.derived.names.len() == self.vdisks.len(), &self.vdisks.len(), "disks share names")?;
        for (id, disk) in &self.vdisks {
            here(*id == disk.id && id.index() <= self.index, id, "has another id inside")?;
            let family = self.families.get(&disk.family).ok_or_else(|| format!("{id} has no family"))?;
            here(family.lineages.contains_key(&disk.lineage), id, "has no lineage")?;
            here(disk.revision.max(disk.stands_on) <= self.index, id, "has a revision from the future")?;
            if let Some(of) = disk.snapshot_of {
                let of = self.vdisks.get(&of);
                let is_right = of.is_some_and(|of| !of.is_snapshot() && of.family == disk.family);
                here(is_right, id, "is a snapshot of what is no disk of its family")?;
                here(of.is_some_and(|of| split_name(&disk.name).0 == of.name), id, "has not its disk's name")?;
            }
            for session in &disk.sessions {
                here(self.sessions.get(session).is_some_and(|s| s.vdisk == *id), session, "is not a session of it")?;
            }
        }
        for (id, session) in &self.sessions {
            let disk = self.vdisks.get(&session.vdisk);
            here(*id == session.id && id.0 <= self.index, id, "has another id inside")?;
            here(disk.is_some_and(|d| d.sessions.contains(id)), id, "is not known to its disk")?;
        }
        self.check_flattenings()
    }

    /// Every server that is a member of some slot: those that settle commands about data.
    pub fn servers_with_slots(&self) -> Vec<ServerId> {
        let members = self.slots.values().flatten().flat_map(|slot| slot.tuple.iter().map(|m| m.server));
        members.collect::<BTreeSet<ServerId>>().into_iter().collect()
    }

    fn check_gmap(&self, id: GmapId, gmap: &Gmap) -> Result<(), String> {
        let slots = self.slots.get(&id).ok_or_else(|| format!("{id} has no slots"))?;
        let count = gmap.slots.len();
        if gmap.id != id || id.0 > self.index || count != slots.len() {
            return Err(format!("{id} and its slots do not belong together"));
        }
        if !count.is_power_of_two() || count > SLOTS_MAX as usize {
            return Err(format!("{id} has {count} slots"));
        }
        for (number, slot) in (0..).zip(slots) {
            let slot_id = SlotId { gmap: id, slot: number };
            let members: BTreeSet<_> = slot.tuple.iter().map(|m| m.server).collect();
            if members.len() != slot.tuple.len() {
                return Err(format!("{slot_id:?} has a server twice"));
            }
            if slot.in_sync().next().is_none() {
                return Err(format!("{slot_id:?} has no member in sync (I3)"));
            }
            if slot.tuple.len() > TUPLE_MAX || slot.left.len() > TUPLE_MAX {
                return Err(format!("{slot_id:?} has more than {TUPLE_MAX} members"));
            }
            if slot.left.iter().any(|d| d.index > slot.term || !self.servers.contains_key(&d.server)) {
                return Err(format!("{slot_id:?} was left by nobody that could"));
            }
            if let Some(stranger) = members.iter().find(|s| !self.servers.contains_key(s)) {
                return Err(format!("{slot_id:?} has {stranger}, which is not in the cluster"));
            }
            if slot.term > self.index || slot.tuple.iter().any(|m| m.since > slot.term) {
                return Err(format!("{slot_id:?} has a term or a since from the future"));
            }
        }
        Ok(())
    }
}

// ------------------------------------------------------------------------------------------------
// Questions.

impl State {
    /// A disk by id.
    pub fn vdisk(&self, id: VdiskId) -> Option<&Vdisk> {
        self.vdisks.get(&id)
    }
    /// A disk by name.
    pub fn vdisk_named(&self, name: &str) -> Option<&Vdisk> {
        self.vdisks.get(self.derived.names.get(name)?)
    }
    /// What somebody can see of a family; `None` if the state does not have it.
    pub fn visible(&self, family: FamilyId) -> Option<&Visible> {
        self.derived.visible.get(&family)
    }
    /// Disks and snapshots of a family, ascending by id.
    pub fn members(&self, family: FamilyId) -> impl Iterator<Item = &Vdisk> + '_ {
        self.derived.members.get(&family).into_iter().flatten().filter_map(|id| self.vdisks.get(id))
    }
    /// Snapshots of a disk, the oldest first.
    pub fn snapshots_of(&self, disk: &Vdisk) -> impl Iterator<Item = &Vdisk> + '_ {
        let id = disk.id;
        self.members(disk.family).filter(move |v| v.snapshot_of == Some(id))
    }
    /// A family.
    pub fn family(&self, id: FamilyId) -> Option<&Family> {
        self.families.get(&id)
    }
    /// A session.
    pub fn session(&self, id: SessionId) -> Option<&Session> {
        self.sessions.get(&id)
    }
    /// The state of a slot.
    pub fn slot(&self, id: SlotId) -> Option<&SlotState> {
        self.slots.get(&id.gmap)?.get(id.slot as usize)
    }
    /// The slot of an element of a family.
    pub fn slot_of(&self, family: FamilyId, element: u64) -> Option<SlotId> {
        let family = self.families.get(&family)?;
        let slots = self.slots.get(&family.gmap)?.len() as u32;
        let slot = slot_of_element(element, family.stripe_unit, family.shift, slots);
        Some(SlotId { gmap: family.gmap, slot })
    }
    /// Who acts in a slot once it holds the promises; see [`SlotState::acting`].
    pub fn acting(&self, slot: SlotId) -> Option<ServerId> {
        self.slot(slot)?.acting(&self.servers)
    }
    /// The revision that concerns a disk: its own or its family's, whichever is higher.
    pub fn revision_of(&self, vdisk: VdiskId) -> Option<Revision> {
        let disk = self.vdisks.get(&vdisk)?;
        Some(disk.revision.max(self.families.get(&disk.family)?.revision))
    }
    /// What a data message about this disk and slot relies on. For a disk that is gone, what it relied
    /// on cannot be told any more: the state's own index is at least as high.
    pub fn need(&self, vdisk: VdiskId, slot: SlotId) -> Need {
        Need { revision: self.revision_of(vdisk).unwrap_or(self.index), term: self.slot(slot).map_or(0, |s| s.term) }
    }
    /// All slots in which a server is a member, in sync or not, ascending.
    pub fn slots_of_server(&self, server: ServerId) -> impl Iterator<Item = (SlotId, &SlotState)> + '_ {
        self.all_slots().filter(move |(_, slot)| slot.member(server).is_some())
    }
    /// All slots, ascending.
    pub fn all_slots(&self) -> impl Iterator<Item = (SlotId, &SlotState)> + '_ {
        self.slots
            .iter()
            .flat_map(|(gmap, slots)| (0..).zip(slots).map(|(slot, state)| (SlotId { gmap: *gmap, slot }, state)))
    }
    /// Every server that is a member of a slot of the family's GMap, ascending.
    pub fn servers_of_family(&self, family: FamilyId) -> BTreeSet<ServerId> {
        let slots = self.families.get(&family).and_then(|f| self.slots.get(&f.gmap));
        slots.into_iter().flatten().flat_map(|s| s.tuple.iter().map(|m| m.server)).collect()
    }
    /// What a client needs to reach a disk.
    pub fn hints(&self, vdisk: VdiskId) -> Option<Hints> {
        let disk = self.vdisks.get(&vdisk)?;
        let family = self.families.get(&disk.family)?;
        let slots = self.slots.get(&family.gmap)?.iter().map(|slot| self.slot_hint(slot)).collect();
        let server_hint = |server| {
            let addresses = self.servers.get(&server).map_or_else(Vec::new, |s| s.addresses.clone());
            ServerHint { server, addresses }
        };
        Some(Hints {
            state_index: self.index,
            vdisk: disk.clone(),
            family: family.clone(),
            revision: disk.revision.max(family.revision),
            slots,
            servers: self.servers_of_family(family.id).into_iter().map(server_hint).collect(),
        })
    }
    /// The same for a disk known by name.
    pub fn hints_by_name(&self, name: &str) -> Option<Hints> {
        self.hints(*self.derived.names.get(name)?)
    }
    fn slot_hint(&self, slot: &SlotState) -> SlotHint {
        let mut in_sync: Vec<ServerId> = slot.in_sync().collect();
        // Stable: the members that are down go behind the others, so the acting primary comes first.
        in_sync.sort_by_key(|s| self.servers.get(s).is_none_or(|s| s.down));
        SlotHint { term: slot.term, in_sync }
    }
    /// The result of a command, if it was executed and is still remembered.
    pub fn result(&self, id: &CommandId) -> Option<&(StateIndex, Result<Outcome, CommandError>)> {
        self.executed.get(&id.proposer)?.results.get(&id.number)
    }
    /// True if a command was executed, remembered or not: it need not be proposed any more.
    pub fn is_executed(&self, id: &CommandId) -> bool {
        let proposer = self.executed.get(&id.proposer);
        proposer.is_some_and(|e| id.number < e.finished_below || e.results.contains_key(&id.number))
    }
}

// ------------------------------------------------------------------------------------------------
// Changes.

/// What came of a command.
pub(super) type Applied = Result<Outcome, CommandError>;

impl State {
    /// Applies the next entry of the log. Counts it in any case.
    pub fn apply(&mut self, entry: &Entry) -> (Applied, Effects) {
        self.index += 1;
        let mut effects = Effects::default();
        if self.is_executed(&entry.id) {
            let remembered = self.result(&entry.id).map(|(_, result)| result.clone());
            self.hear(&entry.id);
            return (remembered.unwrap_or(Err(CommandError::Forgotten)), effects);
        }
        let result = self.execute(&entry.command, &mut effects);
        self.remember(&entry.id, result.clone());
        debug_assert!(result.is_ok() || effects == Effects::default(), "a refused command changes nothing");
        (result, effects)
    }

    fn remember(&mut self, id: &CommandId, result: Applied) {
        if !self.executed.contains_key(&id.proposer) && self.executed.len() >= PROPOSERS_MAX {
            let unheard = self.executed.iter().min_by_key(|(proposer, e)| (e.last, **proposer)).map(|(p, _)| *p);
            self.executed.remove(&unheard.expect("there are many"));
        }
        let index = self.index;
        self.executed.entry(id.proposer).or_default().results.insert(id.number, (index, result));
        self.hear(id);
    }

    /// Notes what a command tells of its proposer.
    fn hear(&mut self, id: &CommandId) {
        let Some(proposer) = self.executed.get_mut(&id.proposer) else { return };
        proposer.last = self.index;
        // A command cannot declare itself finished.
        proposer.finished_below = proposer.finished_below.max(id.finished_below.min(id.number));
        proposer.results = proposer.results.split_off(&proposer.finished_below);
        while proposer.results.len() > RESULTS_PER_PROPOSER_MAX {
            let (oldest, _) = proposer.results.pop_first().expect("there are many");
            proposer.finished_below = oldest + 1;
        }
    }

    fn execute(&mut self, command: &Command, effects: &mut Effects) -> Applied {
        match command {
            Command::Noop => Ok(Outcome::Done),
            Command::AddServer { addresses, token } => self.add_server(addresses, *token, effects),
            Command::ServerUp { server, incarnation, addresses, disks } => {
                self.server_up(*server, *incarnation, addresses, disks, effects)
            }
            Command::CreateDisk { name, size, scheme, stripe_unit } => {
                self.create_disk(name, *size, *scheme, *stripe_unit, effects)
            }
            Command::DeleteDisk { vdisk } => self.delete_disk(*vdisk, effects),
            Command::RenameDisk { vdisk, name } => self.rename_disk(*vdisk, name),
            Command::ResizeDisk { vdisk, size, session } => self.resize_disk(*vdisk, *size, *session, effects),
            Command::Attach { vdisk, mode, holder, take_over } => {
                self.attach(*vdisk, *mode, holder, *take_over, effects)
            }
            Command::Detach { session } => self.detach(*session, effects),
            Command::Suspect { server, incarnation } => self.suspect(*server, *incarnation, effects),
            Command::ServerDown { server, incarnation, suspect } => {
                self.server_down(*server, *incarnation, *suspect, effects)
            }
            Command::Reinstate { server, incarnation, suspect } => {
                self.reinstate(*server, *incarnation, *suspect, effects)
            }
            Command::InSync { server, incarnation, slots } => self.in_sync(*server, *incarnation, slots, effects),
            Command::TakeOut { server, slots } => self.take_out(*server, slots, effects),
            Command::Goodbye { server, incarnation } => self.goodbye(*server, *incarnation, effects),
            Command::ReplaceDisks { server, incarnation, disks, votes_lost, accept_data_loss } => {
                self.replace_disks(*server, *incarnation, disks, *accept_data_loss, effects)?;
                if *votes_lost && self.ring.node_of(*server).is_some() {
                    (self.ring.id, self.ring.base) = (self.ring.id + 1, self.index);
                }
                Ok(Outcome::Done)
            }
            Command::DiskFailed { server, incarnation, why: _ } => self.goodbye(*server, *incarnation, effects),
            Command::Snapshot { of, made, protected } => {
                self.check_no_imports(of.iter().map(|one| one.vdisk))?;
                self.check_not_flattened(of.iter().map(|one| one.vdisk))?;
                self.snapshot(of, *made, *protected, effects)
            }
            Command::Clone { source, epoch, name, made } => self.clone_of(*source, *epoch, name, *made, effects),
            Command::Rollback { vdisk, epoch, to, keep, made } => {
                self.rollback(*vdisk, *epoch, *to, keep.as_deref(), *made, effects)
            }
            Command::DeleteDisks { vdisks } => self.delete_disks(vdisks, effects),
            Command::Protect { vdisk, protected } => self.protect(*vdisk, *protected),
            Command::SetPolicy { vdisk, policy } => self.set_policy(*vdisk, *policy),
            Command::Flatten { vdisk, wanted } => self.flatten(*vdisk, *wanted, effects),
            Command::Inherited { vdisk, session, gmap, slots } => {
                self.inherited(*vdisk, *session, *gmap, slots, effects)
            }
            Command::BeginImport { vdisk, session, seen, to } => self.begin_import(*vdisk, *session, *seen, *to),
            Command::ImportReached { vdisk, session, reached } => self.import_reached(*vdisk, *session, *reached),
            Command::EndImport { vdisk, session, name, made } => {
                self.end_import(*vdisk, *session, name, *made, effects)
            }
            Command::Drain { server, drained } => self.drain(*server, *drained),
            Command::Reconfigure { gmap, planned_from, moves, more } => {
                self.reconfigure(*gmap, *planned_from, moves, *more)
            }
            Command::Fence { gmap, slots } => self.fence(*gmap, slots, effects),
            Command::Moved { gmap, slots } => self.moved(*gmap, slots, effects),
            Command::AbortReconfiguration { gmap } => self.abort_reconfiguration(*gmap, effects),
            Command::PauseReconfiguration { gmap, paused } => self.pause_reconfiguration(*gmap, *paused),
            Command::SetCopies { vdisk, scheme } => self.set_copies(*vdisk, *scheme, effects),
            Command::RemoveServer { server } => self.remove_server(*server, effects),
            Command::ReplaceAfter { seconds } => {
                self.replace_after = *seconds;
                Ok(Outcome::Done)
            }
            Command::StayedAway { server, incarnation } => self.stayed_away(*server, *incarnation),
        }
    }

    // -------------------------------------------------------------------------------- disks

    fn create_disk(
        &mut self,
        name: &str,
        size: u64,
        scheme: Scheme,
        stripe_unit: u64,
        effects: &mut Effects,
    ) -> Applied {
        check_name(name)?;
        self.check_free(name)?;
        check_size(size)?;
        if !valid_stripe_unit(stripe_unit) {
            return Err(CommandError::BadStripeUnit(stripe_unit));
        }
        if self.vdisks.len() >= VDISKS_MAX {
            return Err(CommandError::TooMany { limit: VDISKS_MAX, what: "disks".into() });
        }
        let gmap = self.common_gmap(scheme, effects)?;
        let (vdisk, family) = (VdiskId(self.index), FamilyId(self.index));
        // Spread by a fixed hash of the id: disks made one after the other begin far apart.
        let shift = (family.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32;
        let new = Family {
            id: family,
            gmap,
            stripe_unit,
            shift,
            revision: self.index,
            lineages: BTreeMap::from([(FIRST_LINEAGE, Lineage { parent: None })]),
            next_lineage: LineageId(FIRST_LINEAGE.0 + 1),
        };
        self.families.insert(family, new);
        self.add_vdisk(Vdisk {
            id: vdisk,
            name: name.into(),
            size,
            family,
            lineage: FIRST_LINEAGE,
            epoch: FIRST_EPOCH,
            snapshot_of: None,
            stands_on: 0,
            protected: false,
            made: 0,
            policy: Policy::default(),
            imported: Imported::default(),
            reached: None,
            automatic: Automatic::default(),
            revision: self.index,
            sessions: Vec::new(),
        });
        self.look_anew(family);
        Ok(Outcome::Disk(vdisk))
    }

    /// Look-ups by name and family know it too; `look_anew` is due.
    pub(super) fn add_vdisk(&mut self, disk: Vdisk) {
        self.derived.names.insert(disk.name.clone(), disk.id);
        self.derived.members.entry(disk.family).or_default().insert(disk.id);
        self.vdisks.insert(disk.id, disk);
    }

    /// The common GMap of a scheme, made when it is first needed from all servers that have come up.
    fn common_gmap(&mut self, scheme: Scheme, effects: &mut Effects) -> Result<GmapId, CommandError> {
        if let Some(gmap) = self.common.get(&scheme) {
            return Ok(*gmap);
        }
        let mut candidates = self.candidates();
        candidates.retain(|c| !self.servers[&c.server].down);
        let id = GmapId(self.index);
        let gmap = placement::plan(id, scheme, &candidates).map_err(|e| match e {
            PlanError::TooFewServers { copies, servers } => CommandError::TooFewServers { copies, servers },
            PlanError::TooManyServers(_) => CommandError::TooMany { limit: SERVERS_MAX, what: "servers".into() },
        })?;
        let member =
            |server: &ServerId| Member { server: *server, in_sync: true, since: self.index, incomplete: false, out: 0 };
        let slot = |tuple: &Vec<ServerId>| SlotState {
            tuple: tuple.iter().map(member).collect(),
            term: self.index,
            left: Vec::new(),
        };
        self.slots.insert(id, gmap.slots.iter().map(slot).collect());
        effects.slots.extend((0..gmap.slots.len() as u32).map(|slot| SlotId { gmap: id, slot }));
        self.gmaps.insert(id, gmap);
        self.common.insert(scheme, id);
        Ok(id)
    }

    fn delete_disk(&mut self, id: VdiskId, effects: &mut Effects) -> Applied {
        self.delete_disks(&[id], effects)
    }

    /// No data message names a disk by its name: this revises nothing.
    fn rename_disk(&mut self, id: VdiskId, name: &str) -> Applied {
        let disk = self.vdisks.get(&id).ok_or(CommandError::NoSuchDisk(id))?;
        if disk.is_snapshot() {
            return self.rename_snapshot(id, name);
        }
        if disk.name == name {
            return Ok(Outcome::Done);
        }
        check_name(name)?;
        self.check_free(name)?;
        let snapshots: Vec<(VdiskId, String)> = self
            .snapshots_of(disk)
            .map(|s| (s.id, format!("{name}@{}", split_name(&s.name).1.unwrap_or_default())))
            .collect();
        self.set_name(id, name.into());
        for (snapshot, name) in snapshots {
            self.set_name(snapshot, name);
        }
        Ok(Outcome::Done)
    }

    pub(super) fn set_name(&mut self, id: VdiskId, name: String) {
        let disk = self.vdisks.get_mut(&id).expect("the caller found it");
        self.derived.names.remove(&disk.name);
        self.derived.names.insert(name.clone(), id);
        disk.name = name;
    }

    fn resize_disk(&mut self, id: VdiskId, size: u64, session: SessionId, effects: &mut Effects) -> Applied {
        let index = self.index;
        check_size(size)?;
        let disk = self.vdisks.get_mut(&id).ok_or(CommandError::NoSuchDisk(id))?;
        if disk.size == size {
            return Ok(Outcome::Done);
        }
        if disk.is_snapshot() {
            return Err(CommandError::IsSnapshot { name: disk.name.clone() });
        }
        let shrinks = size < disk.size;
        let alone = |mode| matches!(mode, Attachment::Exclusive | Attachment::Import);
        let is_own = self.sessions.get(&session).is_some_and(|s| s.vdisk == id && alone(s.mode));
        if shrinks && !is_own {
            return Err(CommandError::NotExclusive { name: disk.name.clone() });
        }
        if disk.is_importing() && !is_own {
            // The snapshot in its end is to be what the stream says.
            return Err(CommandError::ImportUnfinished { name: disk.name.clone() });
        }
        disk.size = size;
        // Growing too: a server that knows the old size must catch up before it refuses the new end.
        disk.revision = index;
        let family = disk.family;
        if shrinks {
            self.narrow(family, effects);
        }
        Ok(Outcome::Done)
    }

    // -------------------------------------------------------------------------------- sessions

    /// Exclusive stands against exclusive and shared; read-only stands against nothing. Where an import has not ended
    /// only an import writes.
    fn attach(
        &mut self,
        id: VdiskId,
        mode: Attachment,
        holder: &str,
        take_over: bool,
        effects: &mut Effects,
    ) -> Applied {
        if holder.len() > TEXT_MAX {
            return Err(CommandError::Malformed(format!("a holder of {} bytes; {TEXT_MAX} at most", holder.len())));
        }
        let disk = self.vdisks.get(&id).ok_or(CommandError::NoSuchDisk(id))?;
        if disk.is_snapshot() && mode != Attachment::ReadOnly {
            return Err(CommandError::IsSnapshot { name: disk.name.clone() });
        }
        // Half of what an import has written is no state of a disk: nobody reads it either.
        if mode != Attachment::Import {
            self.check_no_imports([id])?;
        }
        let in_the_way = |s: &&SessionId| self.sessions.get(s).is_some_and(|s| conflict(mode, s.mode));
        let in_the_way: Vec<SessionId> = disk.sessions.iter().filter(in_the_way).copied().collect();
        if let (Some(session), false) = (in_the_way.first(), take_over) {
            return Err(self.in_use(disk, *session));
        }
        if disk.sessions.len() - in_the_way.len() >= SESSIONS_PER_DISK_MAX {
            let what = format!("sessions of '{}'", disk.name);
            return Err(CommandError::TooMany { limit: SESSIONS_PER_DISK_MAX, what });
        }
        let family = disk.family;
        for session in &in_the_way {
            self.sessions.remove(session);
        }
        let session = SessionId(self.index);
        self.sessions.insert(session, Session { id: session, vdisk: id, mode, holder: holder.into() });
        let disk = self.vdisks.get_mut(&id).expect("found above");
        disk.sessions.retain(|s| !in_the_way.contains(s));
        disk.sessions.push(session);
        // A server that does not know the session yet must catch up before it refuses its messages.
        disk.revision = self.index;
        effects.sessions_ended = in_the_way;
        // Though nobody is in a writer's way: who was may have been detached a moment ago by somebody who still waits, and
        // what it sent be under way. Whoever writes must not see it come (P5).
        if mode != Attachment::ReadOnly || !effects.sessions_ended.is_empty() {
            self.narrow(family, effects);
        }
        Ok(Outcome::Session(session))
    }

    fn detach(&mut self, id: SessionId, effects: &mut Effects) -> Applied {
        let session = self.sessions.remove(&id).ok_or(CommandError::NoSuchSession(id))?;
        self.flattenings.retain(|_, f| f.session != id);
        let disk = self.vdisks.get_mut(&session.vdisk).expect("a session has a disk");
        disk.sessions.retain(|s| *s != id);
        disk.revision = self.index;
        let family = disk.family;
        effects.sessions_ended.push(id);
        self.narrow(family, effects);
        Ok(Outcome::Done)
    }

    // -------------------------------------------------------------------------------- helpers

    pub(super) fn narrow(&self, family: FamilyId, effects: &mut Effects) {
        effects.narrows = true;
        effects.concerned = self.servers_of_family(family).into_iter().collect();
    }

    pub(super) fn in_use(&self, disk: &Vdisk, session: SessionId) -> CommandError {
        let holder = self.sessions.get(&session).map_or_else(String::new, |s| s.holder.clone());
        CommandError::InUse { name: disk.name.clone(), holder, session }
    }

    pub(super) fn check_free(&self, name: &str) -> Result<(), CommandError> {
        if self.derived.names.contains_key(name) { Err(CommandError::NameTaken(name.into())) } else { Ok(()) }
    }
}

impl ServerState {
    pub(super) fn new(addresses: Vec<String>, token: u128) -> ServerState {
        ServerState {
            addresses,
            incarnation: Incarnation(0),
            token,
            disks: BTreeMap::new(),
            down: false,
            up: 0,
            suspect: None,
            weight: 0,
            drained: false,
            away: false,
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
pub(crate) mod tests;
