//! What a client asked of one element, and where it is.

use super::*;

/// One operation of a client.
pub(super) struct Operation {
    pub client: ClientId,
    pub access: Access,
    pub element: ElementKey,
    pub slot: SlotIndex,
    /// Blocks that it touches.
    pub mask: u16,
    pub kind: Kind,
    pub phase: Phase,
    /// State index at which it was judged last: its version, or what it reads, is by that state.
    pub at: StateIndex,
    /// It came.
    pub since: Instant,
    /// It holds its blocks in the element's queue.
    pub holds: bool,
    /// What the client asked, where an unaligned write was completed to whole blocks: begun again in a new
    /// term it must read its neighbours again.
    pub original: Option<Box<WriteKind>>,
    /// The same request, sent again while this one is in progress.
    pub joined: SmallVec<[(ClientId, Tag); 1]>,
}

pub(super) enum Kind {
    Read { first_block: u8, blocks: u8 },
    Write(Box<WriteKind>),
}

/// A write or zero, after its checks.
#[derive(Clone)]
pub(super) struct WriteKind {
    pub id: RequestId,
    pub finished_below: u64,
    pub offset: u32,
    pub length: u32,
    /// `None`: zeros.
    pub data: Option<Bytes>,
    pub crcs: Vec<u32>,
}

/// Where an operation is.
///
/// ```text
///  admit -> Loading -> Queued -> (read) Reading ----------------------------> replied
///                        |
///                        `-> (write) [Modifying] -> [Starved] -> Unfinished -> replied
/// ```
/// A new term parks every operation of the slot; served again, they begin at `admit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Waits for the element's entry.
    Loading,
    /// Waits for operations on the same blocks.
    Queued,
    /// Its addresses are captured and being read.
    Reading,
    /// Its blocks are held; the edges of an unaligned write are being read.
    Modifying,
    /// Its blocks are held; no replica has room for it at the moment.
    Starved,
    /// It has a version.
    Unfinished { sequence: u64 },
    /// The slot is between two terms.
    Parked,
}
