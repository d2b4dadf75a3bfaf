//! How much room there is on the disks, and for what.
//!
//! ```text
//!   free blocks of a disk:  | reserve | only overwrites | writes of new blocks |
//! ```
//! The reserve is for settlements and for what keeps a full disk going. Overwrites give back as much as they take, once
//! they are stable: what they need is kept from everything that grows.

use super::disk::Disk;
use super::*;

/// Bytes of the PMap region that an element's head may need, and each of its rows, with the store's own overhead.
const PMAP_BYTES_PER_HEAD: u64 = 512;
const PMAP_BYTES_PER_ROW: u64 = 512;

impl Disk {
    /// Blocks that may be handed out, beyond the reserve. None if there is no room for another entry.
    pub fn free_blocks(&self) -> u64 {
        let free = if self.host_full.is_some() { self.allocator.free_below_frontier() } else { self.allocator.free() };
        if self.has_room_for_entries() { free.saturating_sub(self.reserve()) } else { 0 }
    }

    /// Free blocks that writes of new blocks may take: what overwrites may take is left, since those give back as
    /// much when they are stable. What is about to be given back counts as free.
    pub fn growth(&self) -> u64 {
        let free = if self.host_full.is_some() {
            self.allocator.free_below_frontier()
        } else {
            self.allocator.capacity() - self.allocator.referenced()
        };
        let kept = self.reserve() + self.overwrite_reserve();
        if self.has_room_for_entries() { free.saturating_sub(kept) } else { 0 }
    }

    /// So little is free that what was given back is made fit to be handed out without anybody's doing.
    pub fn is_short(&self) -> bool {
        self.growth() < self.allocator.capacity() / 8
    }

    /// Blocks were given back that cannot be handed out yet, and will be soon.
    fn has_frees(&self) -> bool {
        !self.unpinned.is_empty() || self.is_short() && !self.freed.is_empty()
    }

    /// True if the PMap has room for another one.
    pub fn has_room_for_entries(&self) -> bool {
        let entries = self.elements * PMAP_BYTES_PER_HEAD + self.rows * PMAP_BYTES_PER_ROW;
        entries < self.superblock.layout.pmap.length
    }

    /// Blocks that only overwrites may take.
    pub fn overwrite_reserve(&self) -> u64 {
        let all = self.allocator.capacity();
        (all / 64).max((all / 4).min(512)).min(16384)
    }

    /// Blocks kept for settlements and for what keeps a full disk going.
    fn reserve(&self) -> u64 {
        (self.allocator.capacity() / 256).clamp(64, 16384)
    }
}

impl Stores {
    /// Free blocks on the fullest disk, beyond the reserve for deletes, settlements and metadata.
    pub fn free_blocks(&self) -> u64 {
        self.disks.iter().map(Disk::free_blocks).min().unwrap_or(0)
    }

    /// Blocks that writes of new blocks may take on the fullest disk. Another disk may have less that can be handed
    /// out at the moment (`free_blocks`).
    pub fn growth(&self) -> u64 {
        self.disks.iter().map(Disk::growth).min().unwrap_or(0)
    }

    /// Blocks that only overwrites may take, on the disk with the fewest of them.
    pub fn overwrite_reserve(&self) -> u64 {
        self.disks.iter().map(Disk::overwrite_reserve).min().unwrap_or(0)
    }

    /// Blocks will be free that are not yet.
    pub fn has_frees(&self) -> bool {
        self.disks.iter().any(Disk::has_frees)
    }

    /// True if a write of these blocks of a loaded element takes more than it gives back when it is stable.
    pub fn grows(&self, element: ElementKey, lineage: LineageId, epoch: Epoch, first_block: u8, blocks: usize) -> bool {
        self.entry(element).is_none_or(|e| e.grows(lineage, epoch, first_block, blocks))
    }

    /// True if every disk has room for another entry.
    pub fn has_room_for_entries(&self) -> bool {
        self.disks.iter().all(Disk::has_room_for_entries)
    }

    /// Blocks of the smallest disk.
    pub fn capacity_blocks(&self) -> u64 {
        self.disks.iter().map(|d| d.allocator.capacity()).min().unwrap_or(0)
    }
}
