//! Commands: what the log consists of. Each names what it relies on and is a no-op when that changed.

use super::arguments::split_name;
use super::reconfiguration::Move;
use crate::ids::*;
use crate::limits::ANCESTORS_MAX;
use crate::message::CommandId;
use crate::translator::gmap::Scheme;
use crate::translator::vdir::{ForeignState, Imported, Policy, Reached};
use serde::{Deserialize, Serialize};

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Who proposed it; a command that was already executed is a no-op.
    pub id: CommandId,
    /// The command.
    pub command: Command,
}

/// How a disk is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attachment {
    /// One client; default for block devices.
    Exclusive,
    /// Many clients that know of each other (a shared file system).
    Shared,
    /// Any number, no writes.
    ReadOnly,
    /// One client, which imports: only so is a disk written whose import has not ended.
    Import,
}

/// The cluster at state index 0: what `petal init` decided. The same on every ring member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Genesis {
    /// The cluster's id.
    pub cluster: ClusterId,
    /// Its name.
    pub name: String,
    /// The ring's first 1 or 3 members. Their node number is their position + 1.
    pub ring: Vec<GenesisServer>,
}

/// A server that the cluster begins with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenesisServer {
    /// Its id.
    pub server: ServerId,
    /// Where to reach it, the best address first.
    pub addresses: Vec<String>,
}

/// Commands. New ones are added at the end: the position is the number in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Nothing; counts.
    Noop,
    /// A new server, which learns (it takes part in the ring only through a ring change, later).
    /// Its id comes back in the outcome.
    AddServer {
        /// Where to reach it.
        addresses: Vec<String>,
        /// Drawn once by the joining server: the same token again gives the same id.
        token: u128,
    },
    /// A server started. Ends its last incarnation; changes the term of every slot that it is in sync
    /// in (2.5).
    ServerUp {
        /// The server.
        server: ServerId,
        /// Its new life.
        incarnation: Incarnation,
        /// Where to reach it now.
        addresses: Vec<String>,
        /// The disks that it found, with the lives that each knows of before this one, and their capacity for data in
        /// bytes.
        disks: Vec<(DiskId, Lives, u64)>,
    },
    /// A new disk, in a family of its own, in the common GMap of the scheme (made when first needed,
    /// from all servers then present).
    CreateDisk {
        /// Its name.
        name: String,
        /// Bytes.
        size: u64,
        /// The scheme.
        scheme: Scheme,
        /// Bytes; power of two, at least 64 KiB.
        stripe_unit: u64,
    },
    /// Deletes a disk that nobody has attached. Settled when no server can answer for it any more.
    DeleteDisk {
        /// The disk.
        vdisk: VdiskId,
    },
    /// Another name for a disk.
    RenameDisk {
        /// The disk.
        vdisk: VdiskId,
        /// The new name.
        name: String,
    },
    /// Another size. Growing holds at once. A smaller size is allowed only to the holder of an exclusive
    /// session, who has discarded what lies beyond it first: then nobody can have written there since,
    /// and a disk that grows again shows zeros there (docs/decisions/0009-shrink.md).
    ResizeDisk {
        /// The disk.
        vdisk: VdiskId,
        /// The new size in bytes.
        size: u64,
        /// The session of who shrinks it; any for growing.
        session: SessionId,
    },
    /// A session begins.
    Attach {
        /// The disk.
        vdisk: VdiskId,
        /// How.
        mode: Attachment,
        /// Who, in words for people: `nbd@host:pid`, `attach /dev/loop0`.
        holder: String,
        /// Ends the sessions that are in the way (fences their holders; settled before it returns).
        take_over: bool,
    },
    /// A session ends.
    Detach {
        /// The session.
        session: SessionId,
    },
    /// A server was not heard from: no ring member grants it a lease from here on (2.5). Who acts in its
    /// slots does not change.
    Suspect {
        /// The server.
        server: ServerId,
        /// The life that was not heard from.
        incarnation: Incarnation,
    },
    /// A server is down: nobody holds a lease any more that its life could act by. Proposed when every
    /// lease that was granted before the `Suspect` has run out.
    ServerDown {
        /// The server.
        server: ServerId,
        /// Its life.
        incarnation: Incarnation,
        /// State index of the `Suspect` that this relies on; a no-op unless the server is still suspected
        /// by that very command.
        suspect: StateIndex,
    },
    /// A suspected server was heard again and goes on in the same terms.
    Reinstate {
        /// The server.
        server: ServerId,
        /// Its life.
        incarnation: Incarnation,
        /// As in `ServerDown`.
        suspect: StateIndex,
    },
    /// A member has all that the others have, and counts for acknowledgements from here on (I4). Slots
    /// whose term has changed since are passed over.
    InSync {
        /// The member.
        server: ServerId,
        /// Its life.
        incarnation: Incarnation,
        /// Slots, each with the term in which it caught up.
        slots: Vec<(SlotId, Term)>,
    },
    /// A member does not answer whoever acts in its slots, although it may be alive: it leaves their
    /// in-sync sets. Slots whose term has changed since, or without another live member, are passed over.
    TakeOut {
        /// The member.
        server: ServerId,
        /// Slots, each with the term in which it did not answer.
        slots: Vec<(SlotId, Term)>,
    },
    /// A server stops, and hands over: it is down from here on. By itself only, and only after it has served
    /// its last read and acknowledged its last write, so there is no lease to wait for (docs/petal.md,
    /// "planned stop").
    Goodbye {
        /// The server.
        server: ServerId,
        /// The life that ends.
        incarnation: Incarnation,
    },
    /// A server that is down will come back without some of its disks, or with none of them (2.7): what it had
    /// counts for nothing any more in any slot, and is copied back from the others. If it was a member of the ring
    /// and its votes are lost with the disks, the ring begins a new configuration with the same members, in which
    /// it has not voted (2.4).
    ReplaceDisks {
        /// The server.
        server: ServerId,
        /// Its last life, which has ended.
        incarnation: Incarnation,
        /// The disks that it will have, kept ones and new ones, with this incarnation written on each.
        disks: Vec<DiskId>,
        /// What it voted in the ring is lost.
        votes_lost: bool,
        /// Last resort: even where it has the only copy that holds every acknowledged write. There the other
        /// members go on with what they have.
        accept_data_loss: bool,
    },
    /// The same, because a disk of the server hangs or fails: nothing can be stored there, so it is down by its own word,
    /// given when it has served its last read and acknowledged its last write.
    DiskFailed {
        /// The server.
        server: ServerId,
        /// The life that ends.
        incarnation: Incarnation,
        /// Which disk, and what is wrong with it, for people.
        why: String,
    },
    /// Snapshots of some disks, all of one instant (2.9): each disk goes on in its next epoch. `Overtaken` unless
    /// every disk still writes the epoch that the caller saw. Settled when nothing that was begun before can still
    /// change them.
    Snapshot {
        /// Of which disks; each once.
        of: Vec<SnapshotOf>,
        /// Seconds since 1970, for people.
        made: u64,
        /// They cannot be deleted until they are released.
        protected: bool,
    },
    /// A new disk that begins with what a snapshot or a disk holds (2.9), in the same family. Of a disk: what it
    /// holds at this instant, and as with `Snapshot` only if it still writes this epoch.
    Clone {
        /// The snapshot or disk.
        source: VdiskId,
        /// Its epoch.
        epoch: Epoch,
        /// Name of the new disk.
        name: String,
        /// Seconds since 1970, for people.
        made: u64,
    },
    /// A disk that nobody has attached goes back to what one of its snapshots holds (2.9).
    Rollback {
        /// The disk.
        vdisk: VdiskId,
        /// The epoch that it writes, as the caller saw it.
        epoch: Epoch,
        /// The snapshot.
        to: VdiskId,
        /// What it held until now is kept as a snapshot of this name, `DISK@NAME`; or not at all.
        keep: Option<String>,
        /// Seconds since 1970, for people.
        made: u64,
    },
    /// Deletes disks and snapshots that nobody has attached, all or none. A disk goes with all its snapshots or
    /// when it has none.
    DeleteDisks {
        /// Which.
        vdisks: Vec<VdiskId>,
    },
    /// A disk or snapshot can be deleted only when this is taken back.
    Protect {
        /// Which.
        vdisk: VdiskId,
        /// From now on, or no longer.
        protected: bool,
    },
    /// Which snapshots the cluster makes of a disk by itself.
    SetPolicy {
        /// The disk.
        vdisk: VdiskId,
        /// How many of each kind are kept.
        policy: Policy,
    },
    /// A clone is to need nothing of its parents any more: the servers see to that (`flatten.rs`).
    Flatten {
        /// The clone.
        vdisk: VdiskId,
        /// Begin, or stop.
        wanted: bool,
    },
    /// A primary has seen to that in some slots: every element there has a row of the clone's own.
    Inherited {
        /// The clone.
        vdisk: VdiskId,
        /// The session under which that was done.
        session: SessionId,
        /// The GMap.
        gmap: GmapId,
        /// Its slots, each with the term in which that was done.
        slots: Vec<(u32, Term)>,
    },
    /// What follows is written into a disk by an import, and is no state of it before its end (`petal import`).
    BeginImport {
        /// The disk.
        vdisk: VdiskId,
        /// The import's.
        session: SessionId,
        /// What its caller saw of earlier ones.
        seen: Imported,
        /// Where it leads to.
        to: ForeignState,
    },
    /// So far an import has come: if it is interrupted, what is repeated begins there.
    ImportReached {
        /// The disk.
        vdisk: VdiskId,
        /// The import's.
        session: SessionId,
        /// So far; nothing: what was said before does not hold for the stream that is there now.
        reached: Option<Reached>,
    },
    /// Everything was written: the state gets its name.
    EndImport {
        /// The disk.
        vdisk: VdiskId,
        /// The import's.
        session: SessionId,
        /// Of the snapshot, without the disk's.
        name: String,
        /// In seconds since 1970.
        made: u64,
    },
    /// A server is to hold no data any more: it moves to the others (2.8). Or it is to hold its share, again or for
    /// the first time. Either way the ring's leader plans the placement anew.
    Drain {
        /// The server.
        server: ServerId,
        /// It is to hold nothing.
        drained: bool,
    },
    /// Slots of a GMap are to get other tuples. A no-op if anything has changed that it was planned from, or while
    /// something of this GMap is under way.
    Reconfigure {
        /// The GMap.
        gmap: GmapId,
        /// [`State::planned_from`](super::State::planned_from) as the planner saw it.
        planned_from: StateIndex,
        /// Slots, and their new tuples. None: the placement is as it should be.
        moves: Vec<Move>,
        /// The plan has more than one command can tell: the rest is planned when this has ended.
        more: bool,
    },
    /// The servers of their new tuples become members of these slots, not in sync. Slots whose term has changed since
    /// are passed over.
    Fence {
        /// The GMap.
        gmap: GmapId,
        /// Slots, each with its term.
        slots: Vec<(u32, Term)>,
    },
    /// These slots have their new tuples. Passed over: slots whose term has changed since, and those in which not every
    /// server of the new tuple is in sync and live.
    Moved {
        /// The GMap.
        gmap: GmapId,
        /// Slots, each with its term.
        slots: Vec<(u32, Term)>,
    },
    /// What is under way is turned back: joiners are forgotten; slots that are new stay so.
    AbortReconfiguration {
        /// The GMap.
        gmap: GmapId,
    },
    /// What is under way rests, or goes on.
    PauseReconfiguration {
        /// The GMap.
        gmap: GmapId,
        /// It rests.
        paused: bool,
    },
    /// The disk's family, that is the disk with its snapshots and clones, is to have other copies (2.8). If others share its
    /// GMap it first gets one of its own, with the same tuples.
    SetCopies {
        /// The disk.
        vdisk: VdiskId,
        /// The scheme.
        scheme: Scheme,
    },
    /// A server that is down has stayed away for so long that its data is copied to others, as if it were drained. When it
    /// comes up that is turned back.
    StayedAway {
        /// The server.
        server: ServerId,
        /// Its life that ended.
        incarnation: Incarnation,
    },
    /// A server that is down, holds nothing and has no vote is forgotten. Its number is not given again.
    RemoveServer {
        /// The server.
        server: ServerId,
    },
    /// Who is down for so long has stayed away.
    ReplaceAfter {
        /// Seconds; 0: never.
        seconds: u32,
    },
}

/// A snapshot that is to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotOf {
    /// The disk.
    pub vdisk: VdiskId,
    /// The epoch that it writes, as the caller saw it.
    pub epoch: Epoch,
    /// Its name, without that of the disk.
    pub name: String,
}

impl Command {
    /// Whether a new configuration of the ring may begin with it. Nothing is appended behind such an entry
    /// before it is decided.
    pub fn may_change_ring(&self) -> bool {
        matches!(self, Command::ReplaceDisks { votes_lost: true, .. })
    }
}

/// In words for people (`petal log`).
impl std::fmt::Display for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Command::Noop => write!(f, "nothing"),
            Command::AddServer { addresses, .. } => write!(f, "a server is added, at {}", addresses.join(", ")),
            Command::ServerUp { server, incarnation, disks, .. } => {
                write!(f, "{server} is up ({}, incarnation {incarnation})", counted(disks.len(), "disk"))
            }
            Command::CreateDisk { name, size, scheme, .. } => {
                write!(f, "disk {name:?} of {} is created, copies: {}", stdx::units::Size(*size), scheme.copies())
            }
            Command::DeleteDisk { vdisk } => write!(f, "{vdisk} is deleted"),
            Command::RenameDisk { vdisk, name } => write!(f, "{vdisk} is renamed to {name:?}"),
            Command::ResizeDisk { vdisk, size, .. } => write!(f, "{vdisk} has {} now", stdx::units::Size(*size)),
            Command::Attach { vdisk, mode, holder, take_over } => {
                let mode = format!("{mode:?}").to_lowercase();
                let how = if *take_over { ", taken over" } else { "" };
                write!(f, "{vdisk} is attached by {holder:?}, {mode}{how}")
            }
            Command::Detach { session } => write!(f, "{session} is detached"),
            Command::Suspect { server, .. } => write!(f, "{server} is suspected: it gets no lease"),
            Command::ServerDown { server, .. } => write!(f, "{server} is declared down"),
            Command::Reinstate { server, .. } => write!(f, "{server} is heard again, and goes on"),
            Command::InSync { server, slots, .. } => {
                write!(f, "{server} is in sync again in {}", counted(slots.len(), "slot"))
            }
            Command::TakeOut { server, slots } => {
                write!(f, "{server} does not answer others, and is taken out of {}", counted(slots.len(), "slot"))
            }
            Command::Goodbye { server, .. } => write!(f, "{server} stops as planned, and hands over"),
            Command::ReplaceDisks { server, disks, votes_lost, accept_data_loss, .. } => {
                let ring = if *votes_lost { "; the ring begins a new configuration" } else { "" };
                let loss = if *accept_data_loss { "; data loss is accepted" } else { "" };
                let disks = counted(disks.len(), "other disk");
                write!(f, "{server} gets {disks}, and its copies count for nothing{ring}{loss}")
            }
            Command::DiskFailed { server, why, .. } => write!(f, "{server} goes down by itself: {why}"),
            Command::Snapshot { of, protected, .. } => {
                let of: Vec<String> = of.iter().map(|s| format!("{:?} of {}", s.name, s.vdisk)).collect();
                let how = if *protected { ", protected" } else { "" };
                write!(f, "a snapshot is made: {}{how}", of.join(", "))
            }
            Command::Clone { source, name, .. } => write!(f, "disk {name:?} is made, a clone of {source}"),
            Command::Rollback { vdisk, to, keep, .. } => {
                write!(f, "{vdisk} is rolled back to {to}")?;
                keep.iter().try_for_each(|keep| write!(f, "; what it held is kept as {keep:?}"))
            }
            Command::DeleteDisks { vdisks } => {
                let all: Vec<String> = vdisks.iter().take(8).map(VdiskId::to_string).collect();
                let more = if vdisks.len() > 8 { format!(" and {} more", vdisks.len() - 8) } else { String::new() };
                write!(f, "deleted: {}{more}", all.join(", "))
            }
            Command::Protect { vdisk, protected: true } => write!(f, "{vdisk} is protected"),
            Command::Protect { vdisk, protected: false } => write!(f, "{vdisk} is released"),
            Command::SetPolicy { vdisk, policy } => write!(
                f,
                "{vdisk} gets snapshots by itself: {} hourly, {} daily, {} weekly are kept",
                policy.hourly, policy.daily, policy.weekly
            ),
            Command::BeginImport { vdisk, .. } => write!(f, "an import into {vdisk} begins"),
            Command::ImportReached { vdisk, reached: Some(Reached { below, .. }), .. } => {
                write!(f, "an import into {vdisk} has come to {} MiB", below.saturating_mul(ELEMENT_SIZE) >> 20)
            }
            Command::ImportReached { vdisk, reached: None, .. } => write!(f, "an import into {vdisk} begins anew"),
            Command::EndImport { vdisk, name, .. } => write!(f, "an import into {vdisk} is whole: snapshot '{name}'"),
            Command::Flatten { vdisk, wanted: true } => write!(f, "{vdisk} is to need nothing of its parents any more"),
            Command::Flatten { vdisk, wanted: false } => write!(f, "flattening of {vdisk} is stopped"),
            Command::Inherited { vdisk, slots, .. } => {
                write!(f, "{vdisk} needs nothing of its parents in {}", counted(slots.len(), "slot"))
            }
            Command::Drain { server, drained: true } => write!(f, "{server} is drained: its data moves to the others"),
            Command::Drain { server, drained: false } => write!(f, "{server} is to hold its share of the data"),
            Command::Reconfigure { gmap, moves, .. } if moves.is_empty() => {
                write!(f, "{gmap} is placed as it should be")
            }
            Command::Reconfigure { gmap, moves, .. } => {
                write!(f, "a reconfiguration of {gmap} begins: {} to move", counted(moves.len(), "slot"))
            }
            Command::Fence { gmap, slots } => {
                write!(f, "others join {} of {gmap}, to have it copied", counted(slots.len(), "slot"))
            }
            Command::Moved { gmap, slots } => write!(f, "{} of {gmap} moved", counted(slots.len(), "slot")),
            Command::AbortReconfiguration { gmap } => write!(f, "the reconfiguration of {gmap} is turned back"),
            Command::PauseReconfiguration { gmap, paused } => {
                write!(f, "the reconfiguration of {gmap} {}", if *paused { "rests" } else { "goes on" })
            }
            Command::SetCopies { vdisk, scheme } => {
                let copies = scheme.copies();
                write!(f, "{vdisk} is to have {copies} {}", if copies == 1 { "copy" } else { "copies" })
            }
            Command::RemoveServer { server } => write!(f, "{server} is removed"),
            Command::ReplaceAfter { seconds: 0 } => write!(f, "who stays away is not replaced"),
            Command::ReplaceAfter { seconds } => write!(f, "who is down for {seconds} s is replaced"),
            Command::StayedAway { server, .. } => {
                write!(f, "{server} stayed away: what it has is copied to the others")
            }
        }
    }
}

/// "1 slot", "2 slots".
fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// What a command did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Nothing to tell.
    Done,
    /// `AddServer`.
    Server(ServerId),
    /// `CreateDisk`.
    Disk(VdiskId),
    /// `Attach`.
    Session(SessionId),
    /// `Snapshot`: the snapshots, in the order of the command.
    Disks(Vec<VdiskId>),
}

/// Why a command was refused (a no-op that counts).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum CommandError {
    /// Name taken.
    #[error("{}", name_taken(.0))]
    NameTaken(String),
    /// Not a name.
    #[error("'{name}' is not a name for a disk or a snapshot: {why}")]
    BadName {
        /// The name.
        name: String,
        /// Why not.
        why: String,
    },
    /// Not a size.
    #[error("{size} bytes is not a size for a disk: {why}")]
    BadSize {
        /// The size.
        size: u64,
        /// Why not.
        why: String,
    },
    /// Not a stripe unit.
    #[error("{0} bytes is not a stripe unit: it must be a power of two from 64 KiB to 1 GiB")]
    BadStripeUnit(u64),
    /// Too few servers for the scheme.
    #[error(
        "{copies} copies need {copies} servers, and the cluster has {servers}; add servers with `petal join`, or ask for fewer copies"
    )]
    TooFewServers {
        /// Copies of the scheme.
        copies: usize,
        /// Servers present.
        servers: usize,
    },
    /// No such disk (any more).
    #[error("the disk {0} does not exist any more")]
    NoSuchDisk(VdiskId),
    /// Attached by somebody.
    #[error("'{name}' is attached by {holder}; {}", until_detached(name, *session))]
    InUse {
        /// The disk.
        name: String,
        /// Who has it.
        holder: String,
        /// By which session.
        session: SessionId,
    },
    /// A smaller size, and not by who has the disk to himself.
    #[error(
        "'{name}' can be made smaller only by who has it attached exclusively and has discarded the rest; `petal disk resize {name} SIZE --shrink` does that"
    )]
    NotExclusive {
        /// The disk.
        name: String,
    },
    /// No such session (any more).
    #[error("the session {0} is over")]
    NoSuchSession(SessionId),
    /// No such server.
    #[error("there is no server {0}")]
    NoSuchServer(ServerId),
    /// An older life of a server.
    #[error(
        "{server} has begun its life {known} already, and would begin life {given} with these disks: they are from an earlier life, a restored image or a copy, and cannot be used as they are; stop what else runs as {server}, or name them as lost with `petal rejoin {server} --lost PATH`"
    )]
    OldIncarnation {
        /// The server.
        server: ServerId,
        /// What the cluster knows.
        known: Incarnation,
        /// What was given.
        given: Incarnation,
    },
    /// Disks are not those that the cluster knows.
    #[error(
        "{server} came without disk {disk}, which holds data of the cluster; bring the disk back and start the server again, or, if it is lost, or was to be made by a `petal rejoin` that was broken off, make it anew with `petal rejoin {server} --lost PATH`"
    )]
    DiskMissing {
        /// The server.
        server: ServerId,
        /// The disk.
        disk: DiskId,
    },
    /// A disk with an older state than the cluster knows.
    #[error(
        "disk {disk} of {server} is from an earlier life (incarnation {found}, the cluster knows {known}): a restored image or an old disk; it cannot be used as it is: name it as lost with `petal rejoin {server} --lost PATH`, and its content is copied back from the others"
    )]
    DiskFromThePast {
        /// The server.
        server: ServerId,
        /// The disk.
        disk: DiskId,
        /// Incarnation on the disk.
        found: Incarnation,
        /// Incarnation that the cluster knows.
        known: Incarnation,
    },
    /// A server that must be down for this is not.
    #[error("{0} is not down; stop it first (`petal down {0}`), or wait until the others have declared it down")]
    NotDown(ServerId),
    /// A server that is to be forgotten holds data.
    #[error(
        "{server} is a member of {slots} slots; let its data move to the others first: `petal server drain {server}`, and wait until `petal server list` shows 0 slots"
    )]
    HoldsData {
        /// The server.
        server: ServerId,
        /// Slots of which it is a member, or is to be.
        slots: usize,
    },
    /// A server that is to be forgotten has a vote.
    #[error(
        "{0} is a member of the ring, which decides for the cluster; members cannot be exchanged yet, so it must stay"
    )]
    InRing(ServerId),
    /// A server's copies are the last ones.
    #[error(
        "{server} has the only complete copy of {slots} of {all} slots: without its disks the last writes there are lost, or all of them where it has the only copy. Bring its disks back; or, as the last resort, accept the loss with --accept-data-loss"
    )]
    LastCopy {
        /// The server.
        server: ServerId,
        /// Slots in which no other member holds every acknowledged write.
        slots: u64,
        /// Slots of the cluster.
        all: u64,
    },
    /// A bound.
    #[error("the cluster has {limit} {what}, which is the most it can have")]
    TooMany {
        /// The bound.
        limit: usize,
        /// Of what.
        what: String,
    },
    /// A field of the command is longer or has more members than any honest caller sends.
    #[error("the command is malformed: {0}")]
    Malformed(String),
    /// What the command relied on has changed.
    #[error("what the command relied on has changed since it was proposed")]
    Overtaken,
    /// A disk that is to go has snapshots that are to stay.
    #[error(
        "'{name}' has {count} snapshots ('{first}' is one); delete them first, or with it: `petal disk delete {name} --with-snapshots`"
    )]
    HasSnapshots {
        /// The disk.
        name: String,
        /// How many.
        count: usize,
        /// The first of them.
        first: String,
    },
    /// Deletion of what is protected.
    #[error("'{name}' is protected; release it first with `petal snapshot release {name}`")]
    Protected {
        /// The disk or snapshot.
        name: String,
    },
    /// A snapshot where a disk is wanted.
    #[error("'{name}' is a snapshot, and never changes; make a disk of it with `petal clone {name} NAME`")]
    IsSnapshot {
        /// The snapshot.
        name: String,
    },
    /// A disk where a snapshot is wanted.
    #[error("'{name}' is no snapshot of '{of}'; `petal snapshot list {of}` shows those that there are")]
    NotItsSnapshot {
        /// What was named.
        name: String,
        /// The disk.
        of: String,
    },
    /// The chain of parents is as long as it may be.
    #[error(
        "'{name}' would stand on {depth} states, each made by a clone or rollback from the one before, and {ANCESTORS_MAX} are the most; \
         `petal disk flatten` makes a disk stand by itself (what was made of it must be deleted first)"
    )]
    TooDeep {
        /// The disk.
        name: String,
        /// How deep.
        depth: usize,
    },
    /// The proposer had declared the command finished: a late copy of it, which changes nothing.
    #[error("the command was executed before, and its result is forgotten")]
    Forgotten,
    /// Half of it is what was, and half is what is to be.
    #[error(
        "an import into '{name}' has not ended; repeat it with the same stream (`petal import FILE {name}`), go back to an earlier snapshot with `petal rollback {name} --to SNAPSHOT`, or delete the disk"
    )]
    ImportUnfinished {
        /// The disk.
        name: String,
    },
    /// Nothing is made of a disk while it is flattened.
    #[error(
        "'{name}' is being flattened; wait until that is done (`petal disk flatten {name}` shows how far it is), or stop it with `petal disk flatten {name} --stop`"
    )]
    IsFlattened {
        /// The disk.
        name: String,
    },
    /// A disk that has no parents.
    #[error("'{name}' is no clone, or needs nothing of its parents already")]
    StandsByItself {
        /// The disk.
        name: String,
    },
    /// Something else needs what a clone inherits.
    #[error(
        "'{by}' was made of '{name}' and needs what it inherits; delete it first, or, if it is a clone, flatten it: `petal snapshot list` shows them"
    )]
    IsInherited {
        /// The clone that was to be flattened.
        name: String,
        /// What was made of it.
        by: String,
    },
    /// More than an entry of the log may have.
    #[error("the command has {bytes} bytes, and {limit} are the most; name fewer disks at one time")]
    TooLong {
        /// Its own.
        bytes: usize,
        /// The most.
        limit: usize,
    },
    /// No such GMap.
    #[error("there is no map {0}")]
    NoSuchGmap(GmapId),
    /// One change of placement at a time.
    #[error(
        "data of {0} is being moved; wait until that has ended (`petal status`), or turn it back (`petal reconfigure abort`)"
    )]
    Moving(GmapId),
}

fn name_taken(name: &str) -> String {
    let (what, command) = match split_name(name) {
        (_, None) => ("a disk named", "disk"),
        (_, Some(_)) => ("a snapshot", "snapshot"),
    };
    format!(
        "there is already {what} '{name}'; choose another name, or delete it first with `petal {command} delete {name}`"
    )
}

fn until_detached(name: &str, session: SessionId) -> String {
    match split_name(name) {
        (_, None) => format!(
            "detach it there, take it over with --take-over, or, where it only reads, end its session with `petal detach --session {session}`"
        ),
        // Readers stand in nobody's way but a deletion's.
        (_, Some(_)) => format!(
            "detach it there, or, if that program is gone, end its session with `petal detach --session {session}`"
        ),
    }
}
