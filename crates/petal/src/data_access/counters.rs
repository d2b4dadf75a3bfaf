//! What data access counts, and what it tells of itself: for status and checkers.

use super::DataAccess;
use crate::ids::{SlotId, Term, Version};

/// What is counted for status; since the server started.
#[derive(Debug, Default, Clone)]
pub struct Counters {
    /// Reads answered.
    pub reads: u64,
    /// Writes and zeroes acknowledged.
    pub writes: u64,
    /// Messages passed on to servers for clients which cannot reach those.
    pub relayed: u64,
    /// Requests refused, whatever the reason.
    pub refused: u64,
    /// Messages of streams applied as replica.
    pub replicated: u64,
    /// Settlements finished.
    pub settlements: u64,
    /// Elements that a settlement had to change on some replica.
    pub settled_elements: u64,
    /// Blocks whose checksum did not match, or that could not be read.
    pub bad_blocks: u64,
    /// Of these, made good from another copy.
    pub repaired_blocks: u64,
    /// Slots in which a member came back with less than it had told to have on stable storage.
    pub lost_by_others: u64,
    /// Elements copied to members that were brought back.
    pub recovered_elements: u64,
    /// Blocks that travelled for that.
    pub recovered_blocks: u64,
    /// Rows dropped that nobody could see any more.
    pub reclaimed_rows: u64,
}

impl DataAccess {
    /// Elements with bad blocks that are not repaired yet.
    pub fn repairs(&self) -> usize {
        self.repairs.len()
    }

    /// Operations in progress.
    pub fn operations(&self) -> usize {
        self.operations.len()
    }

    /// `(slots in which this server acts, of these served)`.
    pub fn acting(&self) -> (u32, u32) {
        let acting = self.slots.iter().filter_map(|s| s.acting.as_ref());
        acting.fold((0, 0), |(all, served), a| (all + 1, served + u32::from(a.is_serving())))
    }

    /// The slots that this server serves as primary, with the term: for checkers (I1).
    pub fn serving(&self) -> impl Iterator<Item = (SlotId, Term)> + '_ {
        let serving = self.slots.iter().filter(|s| s.acting.as_ref().is_some_and(|a| a.is_serving()));
        serving.map(|s| (s.id, s.term))
    }

    /// `(slot, watermark, unfinished writes)` of every slot, for checkers and status.
    pub fn watermarks(&self) -> impl Iterator<Item = (SlotId, Version, usize)> + '_ {
        self.slots.iter().map(|s| (s.id, s.watermark, s.acting.as_ref().map_or(0, |a| a.unfinished.len())))
    }
}
