//! Where the regions of a disk are: superblocks, journal, PMap store, data (design 2.10).
//!
//! The sizes are chosen once, when the disk is formatted, and written into the superblock: a later
//! version may choose otherwise and still opens old disks. Invariants: regions are aligned to blocks,
//! do not overlap, come in the order above and end within the disk; [`Layout::check`] refuses
//! anything else, so that nobody behind it has to doubt an offset.

use crate::ids::BLOCK_SIZE;
use serde::{Deserialize, Serialize};
use stdx::units::{MIB, Size};

/// Bytes at the beginning of a disk that hold the two superblocks; the rest of them stays free for
/// what later versions want to keep in a fixed place.
pub const RESERVED: u64 = MIB;
/// Smaller disks would hold little but their own journal.
pub const DISK_SIZE_MIN: u64 = 128 * MIB;
/// Journal at least: four of the largest batches in flight, and as much again until the cut.
pub const JOURNAL_MIN: u64 = 16 * MIB;
/// Journal at most: bounds the time that a start takes to replay it.
pub const JOURNAL_MAX: u64 = 256 * MIB;
/// PMap region at least.
pub const PMAP_MIN: u64 = 32 * MIB;

/// Part of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Region {
    /// First byte; a multiple of 4 KiB.
    pub offset: u64,
    /// Bytes; a multiple of 4 KiB.
    pub length: u64,
}

impl Region {
    /// The byte behind the last.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// The regions of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Layout {
    /// Bytes of the whole disk.
    pub size: u64,
    /// The journal, a ring of batches.
    pub journal: Region,
    /// The PMap store.
    pub pmap: Region,
    /// The blocks.
    pub data: Region,
}

/// Why a disk cannot be laid out so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The disk is too small.
    #[error("the disk has only {}; give it at least {}", Size(*.size), Size(*.minimum))]
    TooSmall {
        /// Its bytes.
        size: u64,
        /// Bytes that it needs.
        minimum: u64,
    },
    /// A region is empty, not aligned, or not where it may be.
    #[error("the {region} region at byte {offset} with {length} bytes is impossible on this disk")]
    Impossible {
        /// Which.
        region: &'static str,
        /// Its offset.
        offset: u64,
        /// Its length.
        length: u64,
    },
}

impl Layout {
    /// The layout of a new disk of `size` bytes.
    pub fn for_size(size: u64) -> Result<Layout, LayoutError> {
        if size < DISK_SIZE_MIN {
            return Err(LayoutError::TooSmall { size, minimum: DISK_SIZE_MIN });
        }
        let journal = Region { offset: RESERVED, length: whole_mib(size / 256).clamp(JOURNAL_MIN, JOURNAL_MAX) };
        // A sixteenth: an element of one row (64 KiB) has an entry of a few hundred bytes, and the
        // tree keeps old pages until the next transaction.
        let pmap = Region { offset: journal.end(), length: whole_mib(size / 16).max(PMAP_MIN) };
        let data = Region { offset: pmap.end(), length: whole_mib(size - pmap.end()) };
        let layout = Layout { size, journal, pmap, data };
        debug_assert_eq!(layout.check(), Ok(()));
        Ok(layout)
    }

    /// Whether the regions are aligned, in order, apart, and within the disk.
    pub fn check(&self) -> Result<(), LayoutError> {
        let mut free_from = RESERVED;
        for (name, region) in [("journal", self.journal), ("PMap", self.pmap), ("data", self.data)] {
            let Region { offset, length } = region;
            let aligned = offset.is_multiple_of(BLOCK_SIZE) && length.is_multiple_of(BLOCK_SIZE) && length > 0;
            let end = offset.checked_add(length).filter(|end| *end <= self.size);
            match end {
                Some(end) if aligned && offset >= free_from => free_from = end,
                _ => return Err(LayoutError::Impossible { region: name, offset, length }),
            }
        }
        Ok(())
    }
}

fn whole_mib(bytes: u64) -> u64 {
    bytes / MIB * MIB
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use stdx::units::{GIB, TIB};

    #[test]
    fn a_disk_of_16_gib_has_a_journal_of_64_mib_and_a_pmap_of_1_gib() {
        let layout = Layout::for_size(16 * GIB).unwrap();
        assert_eq!(layout.journal, Region { offset: MIB, length: 64 * MIB });
        assert_eq!(layout.pmap, Region { offset: 65 * MIB, length: GIB });
        assert_eq!(layout.data, Region { offset: GIB + 65 * MIB, length: 15 * GIB - 65 * MIB });
    }

    #[test]
    fn the_journal_is_never_smaller_than_16_mib_nor_larger_than_256() {
        assert_eq!(Layout::for_size(DISK_SIZE_MIN).unwrap().journal.length, 16 * MIB);
        assert_eq!(Layout::for_size(10 * TIB).unwrap().journal.length, 256 * MIB);
    }

    #[test]
    fn a_disk_that_is_too_small_is_refused_with_the_size_that_it_needs() {
        let error = Layout::for_size(DISK_SIZE_MIN - 1).unwrap_err();
        assert_eq!(error, LayoutError::TooSmall { size: DISK_SIZE_MIN - 1, minimum: DISK_SIZE_MIN });
        assert_eq!(Layout::for_size(MIB).unwrap_err().to_string(), "the disk has only 1 MiB; give it at least 128 MiB");
    }

    #[test]
    fn regions_that_overlap_wrap_around_or_leave_the_disk_are_refused() {
        let good = Layout::for_size(GIB).unwrap();
        let mut overlap = good;
        overlap.pmap.offset -= BLOCK_SIZE;
        let mut wraps = good;
        wraps.data.length = u64::MAX - BLOCK_SIZE + 1;
        let mut beyond = good;
        beyond.size = good.data.end() - 1;
        let mut crooked = good;
        crooked.journal.length -= 1;
        let mut empty = good;
        empty.data.length = 0;
        let mut on_superblock = good;
        on_superblock.journal.offset = 4096;
        for bad in [overlap, wraps, beyond, crooked, empty, on_superblock] {
            assert!(matches!(bad.check(), Err(LayoutError::Impossible { .. })), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn every_size_from_the_smallest_on_has_a_layout_that_passes_its_own_check(size in DISK_SIZE_MIN..) {
            let layout = Layout::for_size(size).unwrap();
            prop_assert_eq!(layout.check(), Ok(()));
            prop_assert!(layout.data.length >= size / 2);
        }
    }
}
