//! Growing a disk file ahead of its use: when, and by how much.

use super::*;

/// Free bytes below the frontier under which the file is grown ahead.
const EXTEND_AHEAD_BLOCKS: u64 = (96 << 20) / BLOCK_SIZE;
/// Bytes by which it is grown.
const EXTEND_STEP: u64 = 64 << 20;
/// Bytes by which it is grown in a hurry: much, so that what is written in between is little beside it.
const HURRY_STEP: u64 = 256 << 20;
/// After so many batches it is tried again to grow a file that could not be grown.
const HOST_FULL_BATCHES: u64 = 1024;

impl Disk {
    pub(super) fn grow_ahead(&mut self) {
        let frontier = self.allocator.frontier();
        let free_before = self.allocator.free_below_frontier();
        let enough = free_before >= EXTEND_AHEAD_BLOCKS;
        let waits =
            self.host_full.is_some_and(|then| self.last_issued.number < then + HOST_FULL_BATCHES) && !self.grow_again;
        if self.extending || waits || enough || frontier >= self.allocator.capacity() {
            return;
        }
        self.extending = true;
        let data = self.superblock.layout.data;
        let hurry = std::mem::take(&mut self.outrun);
        let step = if hurry { HURRY_STEP } else { EXTEND_STEP };
        let to = (data.offset + frontier * BLOCK_SIZE + step) >> 20 << 20;
        let to = to.min(data.end());
        self.issue(Pending::Extend { to, hurry, free_before }, DiskCommand::Extend { to, hurry });
    }

    pub(super) fn on_extended(&mut self, to: u64, hurry: bool, free_before: u64, result: Result<(), DiskError>) {
        self.extending = false;
        // What lies below the frontier goes on to be used: full, not failed. A step in a hurry is a long one: a
        // shorter one may still fit.
        self.grow_again = false;
        self.host_full = (result.is_err() && !hurry).then_some(self.last_issued.number);
        if result.is_ok() {
            self.allocator.set_frontier((to - self.superblock.layout.data.offset) / BLOCK_SIZE);
            self.outrun = !hurry && self.allocator.free_below_frontier() < free_before;
        }
    }
}
