//! VDir: what a disk's name stands for (paper 2.1), and the families that share a GMap.
//!
//! ```text
//!  family f9, GMap g4
//!    lineage l1  --e1--e2--e3--> vol0 (writes e3)
//!                    |   `-- vol0@monday (reads e2 and older)
//!                    `-- lineage l2 (parent l1, e1) --e1--> clone (writes e1)
//! ```
//!
//! A *lineage* is one writable line of states; an *epoch* is one of these states in time. A snapshot is a name
//! for an epoch that is over; the disk goes on in the next one (paper 2.2). A clone is a lineage with a parent,
//! and so is a disk that was rolled back. A lineage stays for as long as a disk, a snapshot or another lineage
//! stands on it, named or not.

use crate::ids::{ClusterId, Epoch, FamilyId, GmapId, LineageId, Revision, SessionId, StateIndex, VdiskId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use stdx::calendar::{Utc, iso_week};

/// One virtual disk, or one snapshot of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Vdisk {
    /// Its id.
    pub id: VdiskId,
    /// Its name, unique in the cluster: `DISK` or `DISK@SNAPSHOT`.
    pub name: String,
    /// Size in bytes, a multiple of 512.
    pub size: u64,
    /// The family that it belongs to.
    pub family: FamilyId,
    /// The lineage that it shows.
    pub lineage: LineageId,
    /// The epoch that it writes; of a snapshot, the newest one that it shows.
    pub epoch: Epoch,
    /// Of a snapshot: the disk that it was made of. It never changes.
    pub snapshot_of: Option<VdiskId>,
    /// State index of the command that closed what it stands on: of a snapshot its own epoch, of a clone its
    /// parent's. A replica shows it when it has everything that was written before (2.9); zero where it stands on
    /// nothing.
    pub stands_on: StateIndex,
    /// It cannot be deleted until it is released.
    pub protected: bool,
    /// When it was made, in seconds since 1970, for people.
    pub made: u64,
    /// Snapshots that the cluster makes of it by itself.
    pub policy: Policy,
    /// When it made the last ones.
    pub automatic: Automatic,
    /// What was imported into it.
    pub imported: Imported,
    /// How far an import has come that has not ended.
    pub reached: Option<Reached>,
    /// State index of the last command that changed what its data messages may do.
    pub revision: Revision,
    /// Who has it attached.
    pub sessions: Vec<SessionId>,
}

impl Vdisk {
    /// True for a snapshot.
    pub fn is_snapshot(&self) -> bool {
        self.snapshot_of.is_some()
    }

    /// True for a disk into which an import was begun that has not ended.
    pub fn is_importing(&self) -> bool {
        !self.is_snapshot() && self.imported.begun.is_some()
    }
}

/// How many snapshots of each kind the cluster keeps of a disk; it makes them by itself. Zero: none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Policy {
    /// One an hour.
    pub hourly: u16,
    /// One a day.
    pub daily: u16,
    /// One a week.
    pub weekly: u16,
}

impl Policy {
    /// True if nothing is made.
    pub fn is_empty(&self) -> bool {
        *self == Policy::default()
    }
}

/// A kind of snapshots that the cluster makes by itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// One an hour.
    Hourly,
    /// One a day.
    Daily,
    /// One a week.
    Weekly,
}

impl Kind {
    pub(crate) const ALL: [Kind; 3] = [Kind::Hourly, Kind::Daily, Kind::Weekly];

    /// How many of them a policy keeps.
    pub(crate) fn keeps(self, policy: Policy) -> usize {
        usize::from(match self {
            Kind::Hourly => policy.hourly,
            Kind::Daily => policy.daily,
            Kind::Weekly => policy.weekly,
        })
    }

    /// How long it is until the next one, in seconds.
    pub(crate) fn seconds(self) -> u64 {
        match self {
            Kind::Hourly => 3600,
            Kind::Daily => 86_400,
            Kind::Weekly => 7 * 86_400,
        }
    }

    /// Name of the one that belongs to this moment.
    pub(crate) fn name(self, unix_seconds: u64) -> String {
        let Utc { year, month, day, hour, .. } = Utc::at(unix_seconds);
        match self {
            Kind::Hourly => format!("auto-hourly-{year:04}-{month:02}-{day:02}T{hour:02}"),
            Kind::Daily => format!("auto-daily-{year:04}-{month:02}-{day:02}"),
            Kind::Weekly => {
                let (year, week) = iso_week(unix_seconds);
                format!("auto-weekly-{year:04}-W{week:02}")
            }
        }
    }

    /// The kind of a snapshot that was made here, by its name without the disk's. A name that only begins alike is
    /// a person's.
    pub(crate) fn of(name: &str) -> Option<Kind> {
        if !name.starts_with("auto-") {
            return None; // Most snapshots, and a hundred thousand are looked at.
        }
        let like = |sample: &str| {
            let alike = |(a, b): (u8, u8)| if b.is_ascii_digit() { a.is_ascii_digit() } else { a == b };
            name.len() == sample.len() && name.bytes().zip(sample.bytes()).all(alike)
        };
        Kind::ALL.into_iter().find(|kind| like(&kind.name(0)))
    }
}

/// When the cluster made the last snapshot of each kind of a disk, in seconds since 1970; zero: none. What was made once
/// and deleted by hand is not made again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Automatic([u64; 3]);

impl Automatic {
    pub(crate) fn made(&mut self, kind: Kind, seconds: u64) {
        self.0[kind as usize] = seconds;
    }

    pub(crate) fn last(&self, kind: Kind) -> Option<u64> {
        Some(self.0[kind as usize]).filter(|made| *made > 0)
    }
}

/// A state of some family, anywhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ForeignState {
    /// The cluster in which it came to be.
    pub cluster: ClusterId,
    /// The family there.
    pub family: FamilyId,
    /// The state.
    pub lineage: LineageId,
    /// The state.
    pub epoch: Epoch,
}

/// What was imported into a disk: increments must follow each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Imported {
    /// The newest state that was imported to its end.
    pub newest: Option<ForeignState>,
    /// The state that an import was to lead to which has not ended; of a snapshot, the state that it is.
    pub begun: Option<ForeignState>,
}

/// How far an import has come, by a check mark of its stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Reached {
    /// Everything in the elements below this one was written.
    pub below: u64,
    /// Stands for every byte of the stream before the check mark: only the same stream goes on here.
    pub hash: [u8; 32],
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
    /// Its lineages that something stands on.
    pub lineages: BTreeMap<LineageId, Lineage>,
    /// The next lineage gets this id: every one below it was known, and what is not in `lineages` has ended.
    pub next_lineage: LineageId,
}

/// A writable line of states.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Lineage {
    /// Where it was cloned from.
    pub parent: Option<(LineageId, Epoch)>,
}

impl Family {
    /// The ancestors of a lineage, nearest first: where it inherits from.
    pub fn ancestors(&self, lineage: LineageId) -> impl Iterator<Item = (LineageId, Epoch)> + '_ {
        let parent_of = |l: LineageId| self.lineages.get(&l).and_then(|l| l.parent);
        std::iter::successors(parent_of(lineage), move |(parent, _)| parent_of(*parent))
    }
}
