//! Byte ranges within an element, and masks of its blocks (bit n for block n).

use crate::ids::*;
use crate::message::Refusal;

/// Bytes of an element, checked to be within it.
#[derive(Clone, Copy)]
pub(super) struct ByteRange {
    pub offset: u32,
    pub length: u32,
}

impl ByteRange {
    pub fn new(offset: u32, length: u64) -> Result<Self, Refusal> {
        if length == 0 || u64::from(offset) + length > ELEMENT_SIZE {
            return Err(Refusal::Malformed);
        }
        Ok(ByteRange { offset, length: length as u32 })
    }
    pub fn end(self) -> u64 {
        u64::from(self.offset) + u64::from(self.length)
    }
    pub fn first_block(self) -> u8 {
        (self.offset / BLOCK_SIZE as u32) as u8
    }
    pub fn blocks(self) -> u8 {
        (self.end().div_ceil(BLOCK_SIZE) - u64::from(self.first_block())) as u8
    }
    pub fn mask(self) -> u16 {
        block_mask(self.first_block(), self.blocks())
    }
    pub fn ragged(self) -> bool {
        !u64::from(self.offset).is_multiple_of(BLOCK_SIZE) || !self.end().is_multiple_of(BLOCK_SIZE)
    }
    /// The data cut at block boundaries.
    pub fn pieces(self, data: &[u8]) -> impl Iterator<Item = &[u8]> {
        let head = (BLOCK_SIZE as usize - self.offset as usize % BLOCK_SIZE as usize) % BLOCK_SIZE as usize;
        let (head, rest) = data.split_at(head.min(data.len()));
        std::iter::once(head).filter(|h| !h.is_empty()).chain(rest.chunks(BLOCK_SIZE as usize))
    }
}

pub(super) fn block_mask(first: u8, count: u8) -> u16 {
    (((1u32 << count) - 1) << first) as u16
}

pub(super) fn mask_range(mask: u16) -> (u8, u8) {
    (mask.trailing_zeros() as u8, mask.count_ones() as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ragged_ranges_are_cut_at_block_boundaries() {
        let data = vec![7; 9000];
        let range = ByteRange::new(4000, 9000).unwrap();
        assert_eq!(range.pieces(&data).map(<[u8]>::len).collect::<Vec<_>>(), [96, 4096, 4096, 712]);
        assert_eq!(range.blocks(), 4);
        assert_eq!(range.mask(), 0b1111);
        assert!(range.ragged());
        let aligned = ByteRange::new(61440, 4096).unwrap();
        assert_eq!((aligned.mask(), aligned.ragged()), (1 << 15, false));
        assert!(ByteRange::new(61440, 4097).is_err());
        assert_eq!(ByteRange::new(0, 65536).unwrap().mask(), u16::MAX);
    }
}
