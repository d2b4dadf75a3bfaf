//! What a server tells of itself: its disks, its scrub, what a verification of it found.

use super::*;

/// What a server tells of itself.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ServerStatus {
    /// The server.
    pub server: ServerId,
    /// Its life.
    pub incarnation: Incarnation,
    /// Log entries applied.
    pub state_index: StateIndex,
    /// Who leads the ring, as far as it knows.
    pub ring_leader: Option<ServerId>,
    /// Whether it holds a lease: whether it may serve.
    pub lease: bool,
    /// Servers that it is connected to.
    pub connected: Vec<ServerId>,
    /// Slots in which it acts as primary, and how many of these are served.
    pub slots_acting: (u32, u32),
    /// Its disks.
    pub disks: Vec<DiskStatus>,
    /// Counters since it started, by name.
    pub counters: Vec<(String, u64)>,
}

/// What a server tells of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// The disk.
    pub disk: DiskId,
    /// Path, as configured.
    pub path: String,
    /// Bytes for data.
    pub capacity: u64,
    /// Bytes of data in use.
    pub used: u64,
    /// Elements.
    pub elements: u64,
    /// Writes of new blocks are refused; overwrites, discards and reads are not.
    pub full: bool,
    /// None: works. Else why it does not.
    pub error: Option<String>,
}

/// What is asked of a server's scrub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ScrubOrder {
    /// Only how far it is.
    Tell,
    /// A round from the beginning, as fast as clients allow; if such a one goes on already, nothing more.
    Begin,
    /// The present round goes on at the pace of the background.
    Slow,
}

/// A server's scrub.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// The present round.
    pub present: Option<ScrubRound>,
    /// It goes as fast as clients allow.
    pub is_full: bool,
    /// The last round that ended.
    pub last: Option<ScrubRound>,
    /// Seconds that a round takes in the background; 0: there are rounds only when somebody asks.
    pub period_seconds: u64,
}

/// One look at everything that a server stores.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ScrubRound {
    /// From 1.
    pub number: u64,
    /// When it began, in seconds since 1970.
    pub began: u64,
    /// When it ended, likewise.
    pub ended: Option<u64>,
    /// Elements that there were when it began.
    pub of: u64,
    /// Elements looked at.
    pub elements: u64,
    /// Blocks read.
    pub blocks: u64,
    /// Blocks found bad.
    pub bad: u64,
    /// Of these, made good from another copy.
    pub repaired: u64,
}

/// What a part of a verification found.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VerifyPart {
    /// Elements of slots in which the server acts: image of each, compared with the other replicas.
    pub elements: u64,
    /// Blocks read and compared with their checksums.
    pub blocks: u64,
    /// What is wrong, one sentence each.
    pub complaints: Vec<String>,
    /// Checksum over the image (version, request ids, checksums of all blocks) of each element that has no
    /// unfinished write here: the same at every in-sync replica (I2).
    pub digests: Vec<(ElementKey, u32)>,
    /// The books of the free map when the part was finished; `None` if an element that was just being written was
    /// passed over, so that `blocks` is not all that there is.
    pub books: Option<Books>,
    /// Continue after this element; `None` = the end.
    pub next: Option<ElementKey>,
}

/// What the free maps of a server's disks count as used, to be compared with what its elements store (I8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Books {
    /// Another number whenever something has been taken or given back.
    pub changes: u64,
    /// Blocks that count as used.
    pub used: u64,
}
