//! VDir: what a disk's name stands for (paper 2.1), and the families that share a GMap.

use crate::ids::{Epoch, FamilyId, GmapId, LineageId, Revision, SessionId, VdiskId};
use serde::{Deserialize, Serialize};

/// One virtual disk (or, later, one snapshot of it).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Vdisk {
    /// Its id.
    pub id: VdiskId,
    /// Its name, unique in the cluster.
    pub name: String,
    /// Size in bytes, a multiple of 512.
    pub size: u64,
    /// The family that it belongs to.
    pub family: FamilyId,
    /// The lineage that it writes.
    pub lineage: LineageId,
    /// The epoch that it writes.
    pub epoch: Epoch,
    /// True for a snapshot.
    pub read_only: bool,
    /// Where it was cloned from.
    pub parent: Option<(LineageId, Epoch)>,
    /// State index of the last command that changed what its data messages may do.
    pub revision: Revision,
    /// Who has it attached.
    pub sessions: Vec<SessionId>,
}

/// A disk with all its snapshots and clones.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Family {
    /// Its id.
    pub id: FamilyId,
    /// Where its elements live.
    pub gmap: GmapId,
    /// Bytes that go to one slot before the next; power of two, at least 64 KiB; fixed for life.
    pub stripe_unit: u64,
    /// Added to the stripe number, so that small disks do not all begin at slot 0; fixed for life.
    pub shift: u32,
    /// Revision that every disk of the family has at least (a change of GMap revises all).
    pub revision: Revision,
}
