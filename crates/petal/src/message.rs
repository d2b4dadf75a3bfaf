//! Every message of the system. A message, its handler `on_<message>` and its heading in
//! docs/wire-protocol.md carry the same name; the tidy test compares the two lists.
//!
//! Bulk data is never serialised: it travels in [`Payload`] fields, which the wire format appends
//! behind the body as they are.

mod status;

use crate::global_state::{Command, CommandError, Entry, Outcome};
use crate::ids::*;
use crate::store::{BlockSum, ElementImage, Place, RowImage};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
pub use status::*;

/// Bytes that travel behind the body of a message, in pieces that nobody copies together. The
/// receiver gets them in one piece.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Payload(pub Vec<Bytes>);

impl Payload {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }
    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Bytes::is_empty)
    }
    /// All bytes in one piece; copies only if there are several.
    pub fn to_bytes(&self) -> Bytes {
        match self.0.as_slice() {
            [] => Bytes::new(),
            [one] => one.clone(),
            many => many.concat().into(),
        }
    }
}

impl From<Bytes> for Payload {
    fn from(b: Bytes) -> Self {
        Payload(vec![b])
    }
}

/// What travels between two peers: the sender's state index with every message (2-way learning of
/// the global state), and the body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Log entries that the sender has applied. Zero from a client that knows nothing.
    pub state_index: StateIndex,
    /// The rest.
    pub body: Body,
}

/// Number that a client gives to a request, echoed in the reply; unique per connection.
pub type Tag = u64;

/// The bodies. New ones are added at the end: the position is the number on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    // ---- client to server: data
    /// Read blocks of an element.
    Read(Read),
    /// Write bytes of an element.
    Write(Write),
    /// Make bytes of an element zero (discard, write-zeroes).
    Zero(Zero),
    /// Which blocks exist.
    Map(Map),
    // ---- server to client: data
    /// Answer to `Read`.
    ReadReply(ReadReply),
    /// Answer to `Write` and `Zero`.
    WriteReply(WriteReply),
    /// Answer to `Map`.
    MapReply(MapReply),
    // ---- client to server: management
    /// A management call.
    Admin(Admin),
    /// Its answer.
    AdminReply(AdminReply),
    // ---- between servers: replication
    /// One message of a slot's ordered stream.
    Replicate(Replicate),
    /// What is stable of streams, and the window.
    StreamAck(StreamAck),
    /// Unused parts of a window are given back.
    CreditReturned(CreditReturned),
    /// Watermarks told without a write to carry them.
    Watermarks(Watermarks),
    /// Asks to promise terms.
    Promise(Promise),
    /// Promises given.
    Promised(Promised),
    /// Asks for elements newer than a version.
    List(List),
    /// Answer to `List`.
    Listed(Listed),
    /// Reads an element at a replica, for settlement and recovery.
    Fetch(Fetch),
    /// Answer to `Fetch`.
    Fetched(Fetched),
    // ---- between servers: global state
    /// A message of the consensus library, within one ring configuration.
    Ring(Ring),
    /// Hands a command to a ring member.
    Propose(Propose),
    /// Asks for decided entries.
    Learn(Learn),
    /// Decided entries.
    Entries(Entries),
    /// The whole state, for who is far behind.
    Snapshot(Snapshot),
    /// Asks to be told when an index is settled at the receiver.
    Settle(Settle),
    /// An index is settled at the sender.
    Settled(Settled),
    /// Tells the sender's state index to an idle peer.
    Index,
    // ---- between servers: liveness
    /// Asks a ring member for a lease, and shows that the sender is there.
    Heartbeat(Heartbeat),
    /// Answer to `Heartbeat`.
    Grant(Grant),
    // ---- between servers: recovery
    /// Asks a member that is being brought back what it has.
    Compare(Compare),
    /// Answer to `Compare`.
    Compared(Compared),
}

// ------------------------------------------------------------------------------------------------
// Data messages of clients. One message concerns one element: large requests are split by the client.

/// By what right a data message speaks, and for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Access {
    /// Echoed in the reply.
    pub tag: Tag,
    /// The disk.
    pub vdisk: VdiskId,
    /// The attachment that allows it.
    pub session: SessionId,
    /// What the sender knows.
    pub need: Need,
    /// The server that is to answer, where that is not the one that gets the message: it passes the message on, for a
    /// client that cannot reach the other (2.6).
    pub relay: Option<ServerId>,
}

/// Read blocks of an element.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Read {
    /// Rights.
    pub access: Access,
    /// Byte offset in the disk divided by 64 KiB.
    pub element: u64,
    /// First block.
    pub first_block: u8,
    /// Number of blocks, 1..=16; `first_block + blocks <= 16`.
    pub blocks: u8,
}

/// Write bytes of an element.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write {
    /// Rights.
    pub access: Access,
    /// Number of the request within the session.
    pub number: u64,
    /// Every request of the session below this number is finished.
    pub finished_below: u64,
    /// Byte offset in the disk divided by 64 KiB.
    pub element: u64,
    /// First byte within the element.
    pub offset: u32,
    /// CRC-32C of each touched block's piece of the data, first block first. With whole blocks these
    /// are the blocks' checksums; pieces at an unaligned edge have the CRC of the piece.
    pub crcs: Vec<u32>,
    /// The bytes.
    #[serde(skip)]
    pub data: Payload,
}

/// Make bytes of an element zero; one at least.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Zero {
    /// Rights.
    pub access: Access,
    /// Number of the request within the session.
    pub number: u64,
    /// Every request of the session below this number is finished.
    pub finished_below: u64,
    /// Byte offset in the disk divided by 64 KiB.
    pub element: u64,
    /// First byte within the element.
    pub offset: u32,
    /// Number of bytes; `offset + length <= 65536`.
    pub length: u32,
}

/// Which blocks exist, in the slots of which the receiver is the acting primary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Map {
    /// Rights. `need.term` is of no slot and zero.
    pub access: Access,
    /// First element asked for.
    pub first_element: u64,
    /// One past the last element asked for.
    pub end_element: u64,
    /// Another disk or snapshot of the family: then not what exists is asked for, but what differs from it.
    pub than: Option<VdiskId>,
}

/// Answer to `Map`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapReply {
    /// The request.
    pub tag: Tag,
    /// The elements with at least one block that is not zero, or that differs: bit n of the mask is block n.
    pub result: Result<MapPart, Refusal>,
}

/// A part of a map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapPart {
    /// `(element, mask)`, ascending; only elements of slots in which the sender acts.
    pub elements: Vec<(u64, u16)>,
    /// The answer is whole for elements below this one; ask again from here for the rest.
    pub complete_below: u64,
    /// Slots of the range for which the sender cannot answer (it does not act in them, or not yet).
    pub not_here: Vec<u32>,
}

/// Answer to `Read`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadReply {
    /// The request.
    pub tag: Tag,
    /// What the sender knows.
    pub need: Need,
    /// One checksum per block.
    pub result: Result<Vec<BlockSum>, Refusal>,
    /// The blocks that are not zero, in order.
    #[serde(skip)]
    pub data: Payload,
}

/// Answer to `Write` and `Zero`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteReply {
    /// The request.
    pub tag: Tag,
    /// What the sender knows.
    pub need: Need,
    /// `Ok`: stable on every in-sync replica.
    pub result: Result<(), Refusal>,
}

/// Why a data request was not done. Nothing of it was or will be applied, unless the text says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The receiver is the wrong server under the map that it knows: refresh and go elsewhere.
    #[error("the map that the request relied on is no longer right")]
    StaleMap,
    /// A secondary has a write of these blocks that it does not know complete: ask the primary.
    #[error("the block has an unfinished write; only the primary can answer")]
    Busy,
    /// The slot is not served yet (promise, settlement, or the receiver still learns): try again soon.
    #[error("the slot is not ready yet")]
    NotReady,
    /// More requests than one connection may have outstanding.
    #[error("too many requests outstanding on one connection")]
    TooMany,
    /// No free space, on this server or a replica's.
    #[error("no space left in the pool of disks")]
    NoSpace,
    /// The session is over (detached, taken over, or of a disk that is gone).
    #[error("the session is over: the disk was detached, taken over by another client, or deleted")]
    SessionEnded,
    /// The session or the disk is read-only.
    #[error("the disk is attached read-only")]
    ReadOnly,
    /// Beyond the end of the disk.
    #[error("beyond the end of the disk")]
    BeyondEnd,
    /// A checksum of the request does not match its data.
    #[error("the data was damaged on the way")]
    Damaged,
    /// The request makes no sense.
    #[error("malformed request")]
    Malformed,
    /// This copy cannot be read (bad block or disk error): ask another replica.
    #[error("this copy cannot be read")]
    BadCopy,
    /// The request's number is below what the session said was finished.
    #[error("a request that the session had declared finished")]
    Finished,
}

// ------------------------------------------------------------------------------------------------
// Management.

/// A management call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admin {
    /// Echoed in the reply.
    pub tag: Tag,
    /// What is asked.
    pub request: AdminRequest,
}

/// Its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdminReply {
    /// The request.
    pub tag: Tag,
    /// The answer.
    pub result: Result<AdminResponse, AdminError>,
}

/// What can be asked of any server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdminRequest {
    /// Decide a command, wait until it is durable, and until it is settled where it narrows what data
    /// messages may do. `deadline_millis` bounds the wait.
    Execute {
        /// Who asks: `(client, number)`, so that a call sent again is executed once.
        id: CommandId,
        /// What.
        command: Command,
        /// How long to wait for decision and settlement.
        deadline_millis: u32,
    },
    /// What a client needs to reach a disk: map, servers.
    Hints {
        /// Name of the disk.
        name: String,
    },
    /// The same for a disk known by id.
    HintsById {
        /// The disk.
        vdisk: VdiskId,
    },
    /// The global state as the server knows it (postcard of `global_state::State`).
    State,
    /// What this one server knows of itself.
    ServerStatus,
    /// Compare replicas and addresses of everything (I2, I8); answers with what was found.
    Verify {
        /// Continue after this element.
        after: Option<ElementKey>,
    },
    /// Hand over and stop.
    Shutdown,
    /// The last commands that this server has applied.
    Log,
    /// How this one server's scrub gets on, or that it is to.
    Scrub(ScrubOrder),
    /// Whose space the elements are for which this one server acts, of one family; a page at a time.
    Space(crate::space::SpaceQuestion),
}

/// Who proposed a command: a proposer draws a random id once and counts its commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CommandId {
    /// The proposer.
    pub proposer: u64,
    /// Its number, from 1.
    pub number: u64,
    /// Every command of the proposer below this number is finished.
    pub finished_below: u64,
}

/// Answers to management calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdminResponse {
    /// The command was executed.
    Executed {
        /// State index of the command.
        index: StateIndex,
        /// What it did.
        outcome: Outcome,
        /// Empty: settled, or nothing to settle. Else: accepted, and waits for these servers.
        unsettled: Vec<ServerId>,
    },
    /// Hints.
    Hints(Box<Hints>),
    /// The global state.
    State(Vec<u8>),
    /// One server.
    ServerStatus(Box<ServerStatus>),
    /// A part of a verification.
    Verified(VerifyPart),
    /// The server stops now.
    ShuttingDown,
    /// The last commands, oldest first.
    Log(Vec<LogLine>),
    /// The scrub as it is after the order.
    Scrub(Box<ScrubStatus>),
    /// A page.
    Space(Box<crate::space::SpacePart>),
}

/// A command of the log, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Its state index.
    pub index: StateIndex,
    /// What it does, in words.
    pub text: String,
    /// Why it was a no-op, if it was.
    pub refused: Option<String>,
    /// How long ago the server that tells this applied it, in milliseconds: one that was away learnt it later than
    /// others. Nothing of what was decided before it started.
    pub age_millis: Option<u64>,
}

/// Why a management call failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum AdminError {
    /// The command was decided, and refused.
    #[error(transparent)]
    Refused(#[from] CommandError),
    /// No majority of the ring decided it within the deadline; it may still be decided later.
    #[error("the ring did not decide in time: a majority of {ring:?} must be up; ask again to see whether it was done")]
    NotDecided {
        /// The ring members.
        ring: Vec<ServerId>,
    },
    /// There is no such disk.
    #[error("{}", no_such_disk(.0))]
    NoSuchDisk(String),
    /// There is no disk with that id any more.
    #[error("the disk {0} is gone")]
    DiskGone(VdiskId),
    /// The server has not yet caught up with the cluster since it started, or was cut off.
    #[error(
        "{0} is starting, or cut off, and does not know the cluster's present state; try again, or ask another server"
    )]
    Starting(ServerId),
    /// What the server has stored about its own elements cannot be read.
    #[error("{0} cannot read its maps; `petal status` says whether one of its disks does not work")]
    Unreadable(ServerId),
    /// So many commands are waited for at this server that it takes no more.
    #[error("{0} has too many commands waiting, and this one was not begun; try again when others have ended")]
    Busy(ServerId),
}

/// That there is no disk or snapshot of this name, in words for people.
pub fn no_such_disk(name: &str) -> String {
    match crate::global_state::split_name(name) {
        (_, None) => format!("there is no disk named '{name}'; `petal disk list` shows the disks"),
        (disk, Some(_)) => {
            format!("there is no snapshot '{name}'; `petal snapshot list {disk}` shows those that there are")
        }
    }
}

/// What a client needs to reach a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hints {
    /// State index of the answer.
    pub state_index: StateIndex,
    /// The disk.
    pub vdisk: crate::translator::vdir::Vdisk,
    /// Its family.
    pub family: crate::translator::vdir::Family,
    /// The highest revision that concerns the disk.
    pub revision: Revision,
    /// Its slots.
    pub slots: Vec<SlotHint>,
    /// Every server that appears in them.
    pub servers: Vec<ServerHint>,
}

/// Who serves a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotHint {
    /// Its term.
    pub term: Term,
    /// The members in sync, acting primary first.
    pub in_sync: Vec<ServerId>,
}

/// How to reach a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerHint {
    /// The server.
    pub server: ServerId,
    /// Its addresses, the best first: `unix:PATH` or `HOST:PORT`.
    pub addresses: Vec<String>,
}

// ------------------------------------------------------------------------------------------------
// Replication.

/// One message of the ordered stream of a slot from its acting primary to one receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replicate {
    /// The slot.
    pub slot: SlotId,
    /// Term by whose right the sender speaks.
    pub term: Term,
    /// The stream: the sender opens a new one whenever the connection is new.
    pub stream: u64,
    /// Number of the message within (slot, term, receiver), from 1, without gaps. Apart from versions. A
    /// new stream of the same term goes on with the first number that is not known stable, so that what
    /// arrives twice is known by its number.
    pub number: u64,
    /// The sender's watermark of the slot.
    pub watermark: Version,
    /// What it carries.
    pub part: Part,
    /// Data of the part: blocks that are not zero, in order.
    #[serde(skip)]
    pub data: Payload,
}

/// What a stream carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// A client's write.
    Write {
        /// The element.
        element: ElementKey,
        /// Its new version.
        version: Version,
        /// Lineage that it writes.
        lineage: LineageId,
        /// Epoch that it writes.
        epoch: Epoch,
        /// Where the row inherits from if the lineage has none yet: its ancestors, nearest first (a
        /// clone's parents; empty otherwise).
        parents: Vec<(LineageId, Epoch)>,
        /// The request, for exactly-once.
        id: RequestId,
        /// Requests of the session below this number are finished.
        finished_below: u64,
        /// Sessions that are over: their requests are forgotten too.
        ended: Vec<SessionId>,
        /// First block.
        first_block: u8,
        /// One checksum per block.
        sums: Vec<BlockSum>,
    },
    /// The whole element as it must be, ids included (I7 and recovery). Data only for the blocks that
    /// the receiver's listed image lacks: `(row, block)` for each, in order.
    Copy {
        /// The element.
        element: ElementKey,
        /// What it must be.
        image: ElementImage,
        /// Which blocks the data has.
        blocks: Vec<(u16, u8)>,
        /// `(row, block, earlier row)`: blocks that have no data because they are the same as the earlier row's.
        twins: Vec<(u16, u8, u16)>,
        /// True when it settles the slot, false when it brings a candidate up to date.
        settles: bool,
        /// Of each session with an id in the image: requests below this number are finished (I6).
        finished_below: Vec<(SessionId, u64)>,
    },
    /// The settlement is finished: the watermark moves to (term, 0).
    SettlementDone,
    /// A number of the version sequence that no write got.
    Skip {
        /// The number.
        version: Version,
    },
    /// The primary had applied this state index when it sent this.
    Mark {
        /// The index.
        state_index: StateIndex,
    },
    /// To a member that is being brought back: with everything before this in the stream it has all that is
    /// complete up to this message's watermark.
    CaughtUp,
    /// A part of an element with more blocks than one message carries, ahead of its `Copy`: these blocks of these
    /// rows; the receiver keeps the rest as it is, its version too.
    Ahead {
        /// The element.
        element: ElementKey,
        /// Rows, with the checksums of the blocks that are carried; other blocks count for nothing.
        rows: Vec<RowImage>,
        /// Which blocks the data has.
        blocks: Vec<(u16, u8)>,
    },
}

/// What a receiver has made stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamAck {
    /// One per stream that got on.
    pub slots: Vec<SlotAck>,
    /// Slots whose stream came damaged in these terms, so that it does not go on: it is to be opened again.
    pub again: Vec<(SlotId, Term)>,
    /// Room for writes.
    pub credit: Credit,
}

/// Room that a receiver has for a primary's writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// Blocks kept free for writes that are not answered yet.
    pub window: u64,
    /// Blocks that the primary has given back, as far as the receiver knows: `window` is without them.
    pub returned: u64,
    /// What the primary has beyond this and does not use the receiver asks back.
    pub keep: Option<u64>,
    /// What is taken.
    pub takes: Takes,
}

/// What writes a receiver has room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Takes {
    /// All, within the window.
    #[default]
    Everything,
    /// It is full: only those that give back as much as they take.
    Overwrites,
    /// Not even those, and nothing is on its way that would help.
    Nothing,
}

/// What a primary has given back of a receiver's window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreditReturned {
    /// Blocks in all, since either began its present life.
    pub blocks: u64,
}

/// How far one stream is stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotAck {
    /// The slot.
    pub slot: SlotId,
    /// Term of the stream.
    pub term: Term,
    /// The stream.
    pub stream: u64,
    /// Every message up to this number is stable.
    pub through: u64,
    /// The receiver's watermark on its disks.
    pub durable_watermark: Version,
}

/// Watermarks told without a write to carry them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watermarks {
    /// One per slot whose watermark has moved.
    pub slots: Vec<SlotWatermark>,
}

/// A primary's word about a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotWatermark {
    /// The slot.
    pub slot: SlotId,
    /// The primary's term.
    pub term: Term,
    /// Every write up to here is complete.
    pub watermark: Version,
    /// The lowest durable watermark of all members: nobody will ask for changes up to here again.
    pub lowest: Version,
}

/// Asks to promise terms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    /// `(slot, term)`.
    pub slots: Vec<(SlotId, Term)>,
}

/// Promises given: nothing older than the term will be accepted, all that was is stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promised {
    /// One per slot; the watermark is the promiser's own.
    pub slots: Vec<(SlotId, Term, Version)>,
    /// As in `StreamAck`.
    pub credit: Credit,
}

/// Asks for elements newer than a version, in a promised term.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct List {
    /// The slot.
    pub slot: SlotId,
    /// The promised term.
    pub term: Term,
    /// Elements with a version above this one.
    pub above: Version,
    /// Only elements after this one.
    pub after: Option<ElementKey>,
    /// Echoed: which attempt to bring a member back it belongs to; 0 in a settlement.
    pub attempt: u64,
}

/// Answer to `List`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// The slot.
    pub slot: SlotId,
    /// The promised term.
    pub term: Term,
    /// The elements, ascending.
    pub elements: Vec<(ElementKey, ElementImage)>,
    /// Ask again after this one; `None` = all told.
    pub next: Option<ElementKey>,
    /// As asked.
    pub attempt: u64,
}

/// Asks what a member that is being brought back has of some elements, in a promised term.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compare {
    /// The slot.
    pub slot: SlotId,
    /// The promised term.
    pub term: Term,
    /// The elements.
    pub elements: Vec<ElementKey>,
    /// Echoed: which attempt it belongs to.
    pub attempt: u64,
}

/// Answer to `Compare`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compared {
    /// The slot.
    pub slot: SlotId,
    /// The promised term.
    pub term: Term,
    /// What is there of each, whatever its version.
    pub elements: Vec<(ElementKey, ElementImage)>,
    /// As asked.
    pub attempt: u64,
}

/// Reads an element at a replica. Answered with what is there, never bounced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    /// The slot.
    pub slot: SlotId,
    /// The promised term.
    pub term: Term,
    /// The element.
    pub element: ElementKey,
    /// Blocks whose data is wanted.
    pub places: Vec<Place>,
}

/// Answer to `Fetch`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetched {
    /// The slot.
    pub slot: SlotId,
    /// The promised term.
    pub term: Term,
    /// The element.
    pub element: ElementKey,
    /// `Ok`: the data has the blocks that were asked for, in order.
    pub result: Result<(), Refusal>,
    /// The blocks.
    #[serde(skip)]
    pub data: Payload,
}

// ------------------------------------------------------------------------------------------------
// Global state.

/// A message of the consensus library.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// Ring configuration that it belongs to.
    pub configuration: u32,
    /// postcard of `omnipaxos::messages::Message`.
    pub bytes: Vec<u8>,
}

/// Hands a command to a ring member, which proposes it if it has not been decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Propose {
    /// Who proposes.
    pub id: CommandId,
    /// What.
    pub command: Command,
    /// It was handed on once by a ring member: not again.
    pub forwarded: bool,
}

/// Asks for decided entries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Learn {
    /// The sender has applied this many.
    pub from: StateIndex,
}

/// Decided entries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entries {
    /// State index before the first of them.
    pub from: StateIndex,
    /// The entries.
    pub entries: Vec<Entry>,
}

/// The whole state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// postcard of `global_state::State`.
    pub state: Vec<u8>,
}

/// Asks to be told when an index is settled at a server: applied, and everything that it began
/// before and that the index affects finished or refused. Who is neither of the two passes it on, and the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settle {
    /// The index.
    pub index: StateIndex,
    /// Who wants to know.
    pub asker: ServerId,
    /// Who is asked.
    pub settler: ServerId,
}

/// An index is settled at a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    /// The index.
    pub index: StateIndex,
    /// Who wants to know.
    pub asker: ServerId,
    /// Who has settled it.
    pub settler: ServerId,
}

// ------------------------------------------------------------------------------------------------
// Liveness.

/// Asks a ring member for a lease (2.5), and shows that the sender is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The sender's life.
    pub incarnation: Incarnation,
    /// Number of the request, from 1, growing within the life.
    pub sequence: u64,
    /// Log entries that the sender had applied when it sent this.
    pub applied: StateIndex,
    /// The newest request that the receiver has answered, as far as the sender knows; 0: none. A sender
    /// that does not hear the answers is as good as silent.
    pub answered: u64,
    /// From a ring member: servers that it has not heard for half a lease, ascending.
    pub silent: Vec<ServerId>,
}

/// Answer to `Heartbeat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The request.
    pub sequence: u64,
    /// Ring configuration in which it is granted: a majority is one of the members of one configuration.
    pub configuration: u32,
    /// Granted for a lease time from when the request was sent, or not.
    pub granted: bool,
}

impl Body {
    /// The bytes behind the body.
    pub fn payload(&self) -> Option<&Payload> {
        match self {
            Body::Write(m) => Some(&m.data),
            Body::ReadReply(m) => Some(&m.data),
            Body::Replicate(m) => Some(&m.data),
            Body::Fetched(m) => Some(&m.data),
            _ => None,
        }
    }

    /// Where a received payload goes; `None` if this body has none.
    pub fn payload_mut(&mut self) -> Option<&mut Payload> {
        match self {
            Body::Write(m) => Some(&mut m.data),
            Body::ReadReply(m) => Some(&mut m.data),
            Body::Replicate(m) => Some(&mut m.data),
            Body::Fetched(m) => Some(&mut m.data),
            _ => None,
        }
    }
}
