//! The names of things. Each has its own type, so that a slot cannot be taken for a server.

use core::fmt;
use serde::{Deserialize, Serialize};

/// A block: unit of checksum and allocation, in bytes.
pub const BLOCK_SIZE: u64 = 4096;
/// An element: unit of the PMap, of versions and of recovery (the paper's "data element"), in bytes.
pub const ELEMENT_SIZE: u64 = 65536;
/// Blocks in an element.
pub const BLOCKS_PER_ELEMENT: usize = 16;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($repr:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub $repr);
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(
    /// A server, for as long as the cluster lives. From 1.
    ServerId(u16), "s"
);
/// One life of a server: a count, which grows by one each time it starts, and below it a mark, drawn at random (32 bits
/// each). Whoever starts from a copy of a disk begins another life than the one of that count that others have seen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Incarnation(pub u64);

impl Incarnation {
    /// Grows by one with each life.
    pub fn count(self) -> u64 {
        if self.has_mark() { self.0 >> 32 } else { self.0 }
    }
    fn has_mark(self) -> bool {
        self.0 >> 32 > 0
    }
    fn mark(self) -> u32 {
        self.0 as u32
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "i{}", self.count())?;
        if self.has_mark() { write!(f, ".{:08x}", self.mark()) } else { Ok(()) }
    }
}

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a disk knows of its server's lives.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub struct Lives {
    /// The last that began with it; the cluster may never have heard of it.
    pub last: Incarnation,
    /// The last of which it is known that the cluster took it.
    pub taken: Incarnation,
    /// The lives that began with it since: the cluster may have taken one of them. Each stands for those behind it that have
    /// its mark, too.
    pub open: Vec<Incarnation>,
}

impl Lives {
    /// Lives that are kept in mind by themselves; where more were broken off, those behind have one mark.
    pub const OPEN_MAX: usize = 16;

    /// The life that begins now, with disks that know these.
    pub fn next<'a>(disks: impl Iterator<Item = &'a Lives> + Clone, mark: u32) -> Incarnation {
        let count = disks.clone().map(|lives| lives.last.count()).max().unwrap_or(0);
        let full = disks.filter(|lives| lives.open.len() >= Self::OPEN_MAX).find_map(|lives| lives.open.last());
        Incarnation((count + 1) << 32 | u64::from(full.map_or(mark, |last| last.mark())))
    }

    /// What it knows when a life has begun, whose server knows that another one was taken.
    pub fn then(mut self, life: Incarnation, taken: Incarnation) -> Lives {
        if self.saw(taken) {
            self.take(taken);
        }
        self.last = life;
        if self.open.last().is_none_or(|last| last.mark() != life.mark()) {
            // Only where disks differ in what was broken off, too.
            self.open.drain(..(self.open.len() + 1).saturating_sub(Self::OPEN_MAX));
            self.open.push(life);
        }
        self
    }

    /// The cluster has taken that life.
    pub fn take(&mut self, life: Incarnation) {
        self.taken = life;
        self.open.retain(|open| *open > life);
    }

    /// True if that life began with this disk. It did not if the disk is an image from before, however often it was started
    /// since.
    pub fn saw(&self, life: Incarnation) -> bool {
        let is_open = |first: &Incarnation| *first <= life && life <= self.last && life.mark() == first.mark();
        life == self.taken || self.open.iter().any(is_open)
    }
}

impl From<Incarnation> for Lives {
    fn from(life: Incarnation) -> Lives {
        Lives { last: life, taken: life, open: Vec::new() }
    }
}
/// A virtual disk or a snapshot: the state index of the command that made it, and, where one command made
/// several, which of them it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct VdiskId(pub u64);

impl VdiskId {
    /// Bits of the state index; above them is the ordinal.
    const INDEX_BITS: u32 = 48;
    /// How many one command can make.
    pub const AT_ONCE_MAX: usize = 1 << 12;

    /// The one of this ordinal, from 0, that the command at `index` makes.
    pub fn made_by(index: StateIndex, ordinal: usize) -> VdiskId {
        assert!(index < 1 << Self::INDEX_BITS && ordinal < Self::AT_ONCE_MAX);
        VdiskId(index | (ordinal as u64) << Self::INDEX_BITS)
    }
    /// State index of the command that made it.
    pub fn index(self) -> StateIndex {
        self.0 & ((1 << Self::INDEX_BITS) - 1)
    }
    /// Which of those it is that the command made.
    pub fn ordinal(self) -> usize {
        (self.0 >> Self::INDEX_BITS) as usize
    }
}

impl fmt::Display for VdiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 >> Self::INDEX_BITS {
            0 => write!(f, "v{}", self.0),
            ordinal => write!(f, "v{}.{ordinal}", self.index()),
        }
    }
}

impl fmt::Debug for VdiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

id!(
    /// A disk with all its snapshots and clones: the state index of the command that made it.
    FamilyId(u64), "f"
);
id!(
    /// A GMap: the state index of the command that made it.
    GmapId(u64), "g"
);
id!(
    /// A writable member of a family.
    LineageId(u32), "l"
);
id!(
    /// One state in time of a lineage.
    Epoch(u32), "e"
);
id!(
    /// An attachment: the state index of the command that made it.
    SessionId(u64), "a"
);

/// State index: the number of log entries applied since the cluster was made. The cluster's one
/// logical clock.
pub type StateIndex = u64;
/// Term of a slot: the state index of the last command that changed who may act in it.
pub type Term = u64;
/// Revision of a disk: the state index of the last command that changed what its data messages may do.
pub type Revision = u64;

/// A cluster, drawn at random when it is made.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ClusterId(pub u128);
/// A physical disk, drawn at random when it is formatted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DiskId(pub u128);

macro_rules! hex_id {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:08x}", (self.0 >> 96) as u32)
            }
        }
    };
}
hex_id!(ClusterId);
hex_id!(DiskId);

/// One row of a GMap.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SlotId {
    /// The GMap.
    pub gmap: GmapId,
    /// The row, from 0.
    pub slot: u32,
}

impl fmt::Debug for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.gmap, self.slot)
    }
}

/// An element of a family: bytes `element * 64 KiB ..` of every member of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ElementKey {
    /// The family.
    pub family: FamilyId,
    /// Byte offset divided by 64 KiB.
    pub element: u64,
}

impl fmt::Debug for ElementKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.family, self.element)
    }
}

/// Version of an element: of the newest write to it. The term is the one in which the write was
/// numbered, the sequence counts per slot, without gaps, from 1 in each term.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Version {
    /// Term in which the write got its number.
    pub term: Term,
    /// The number.
    pub sequence: u64,
}

impl Version {
    /// Older than every write.
    pub const ZERO: Version = Version { term: 0, sequence: 0 };
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({},{})", self.term, self.sequence)
    }
}

/// A request of a session, applied exactly once however often it is sent (promise P4).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct RequestId {
    /// The session.
    pub session: SessionId,
    /// Number within the session, from 1.
    pub number: u64,
}

/// What a data message relies on: a receiver that knows less catches up before it acts.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Need {
    /// Highest revision of the disk that the sender knows.
    pub revision: Revision,
    /// Highest term of the slot that the sender knows.
    pub term: Term,
}

impl Need {
    /// The greater of both in each part.
    pub fn merge(self, other: Need) -> Need {
        Need { revision: self.revision.max(other.revision), term: self.term.max(other.term) }
    }
}
