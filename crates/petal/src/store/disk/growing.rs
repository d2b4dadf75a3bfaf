//! Growing a disk file ahead of its use: when, by how much, and whether with zeros.
//!
//! A file that was written with zeros before needs nothing of its file system when data come, which is what small
//! batches want: each would wait for the file system's own commit. Large ones want the opposite. For them that commit is
//! little, and zeros would be as many bytes again: they are grown for *in a hurry*, without any.

use super::*;

/// Free bytes below the frontier under which the file is grown ahead.
const EXTEND_AHEAD_BLOCKS: u64 = (96 << 20) / BLOCK_SIZE;
/// Bytes by which it is grown.
const EXTEND_STEP: u64 = 64 << 20;
/// Bytes by which it is grown in a hurry.
const HURRY_STEP: u64 = 256 << 20;
/// Blocks in each batch since the last step from which on it is: what a disk writes in the time that a commit of a file
/// system takes.
const HURRY_BATCH_BLOCKS: u64 = (512 << 10) / BLOCK_SIZE;
/// After so many batches it is tried again to grow a file that could not be grown.
const HOST_FULL_BATCHES: u64 = 1024;

impl Disk {
    pub(super) fn grow_ahead(&mut self) {
        let frontier = self.allocator.frontier();
        let free = self.allocator.free_below_frontier();
        let enough = free >= EXTEND_AHEAD_BLOCKS;
        let waits =
            self.host_full.is_some_and(|then| self.last_issued.number < then + HOST_FULL_BATCHES) && !self.grow_again;
        if self.extending || waits || enough || frontier >= self.allocator.capacity() {
            return;
        }
        self.extending = true;
        let data = self.superblock.layout.data;
        let hurry = self.grown.is_some_and(|(batches, before)| {
            before.saturating_sub(free) >= (self.last_issued.number - batches).max(1) * HURRY_BATCH_BLOCKS
        });
        let step = if hurry { HURRY_STEP } else { EXTEND_STEP };
        let to = (data.offset + frontier * BLOCK_SIZE + step) >> 20 << 20;
        let to = to.min(data.end());
        self.issue(Pending::Extend { to, hurry }, DiskCommand::Extend { to, hurry });
    }

    pub(super) fn on_extended(&mut self, to: u64, hurry: bool, result: Result<(), DiskError>) {
        self.extending = false;
        // What lies below the frontier goes on to be used: full, not failed. A step in a hurry is a long one: a
        // shorter one, which comes next, may still fit.
        self.grow_again = false;
        self.host_full = (result.is_err() && !hurry).then_some(self.last_issued.number);
        self.grown = None;
        if result.is_ok() {
            self.allocator.set_frontier((to - self.superblock.layout.data.offset) / BLOCK_SIZE);
            self.grown = Some((self.last_issued.number, self.allocator.free_below_frontier()));
        }
    }
}
