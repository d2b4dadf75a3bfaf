//! The superblock: who a disk belongs to, and where its regions are. Two copies, written in turn.

use crate::global_state::Genesis;
use crate::ids::*;
use serde::{Deserialize, Serialize};

/// Identity and layout of a disk. (Skeleton: region layout and codec to come.)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Superblock {
    /// Counts the times that it was written; the copy with the higher valid one counts.
    pub generation: u64,
    /// The cluster, its first ring: enough to find the others.
    pub genesis: Genesis,
    /// The server that owns the disk.
    pub server: ServerId,
    /// The server's present life.
    pub incarnation: Incarnation,
    /// This disk.
    pub disk: DiskId,
    /// All disks of the server, this one included: it refuses to start without one of them.
    pub disks: Vec<DiskId>,
    /// Bytes of the whole disk.
    pub size: u64,
}
