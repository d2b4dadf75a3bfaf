//! Geometry of requests: a range of bytes cut into elements, blocks checked and trimmed, extents
//! merged. Pure functions.
//!
//! ```text
//!          element 4                 element 5                 element 6
//!   |--------------------------|-------------------------|---------------------------|
//!                      offset ^................ length ..............^
//!                      [from, 64 KiB)     [0, 64 KiB)     [0, to)          three pieces
//! ```

use crate::ids::{BLOCK_SIZE, BLOCKS_PER_ELEMENT, ELEMENT_SIZE};
use crate::message::Payload;
use crate::store::BlockSum;
use bytes::Bytes;
use smallvec::SmallVec;
use stdx::checksum::crc32c;

/// Bytes `from..to` of one element; never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub element: u64,
    pub from: u32,
    pub to: u32,
}

impl Piece {
    pub fn length(self) -> u32 {
        self.to - self.from
    }
    /// First block that the piece touches.
    pub fn first_block(self) -> u8 {
        (u64::from(self.from) / BLOCK_SIZE) as u8
    }
    /// Blocks that it touches.
    pub fn blocks(self) -> u8 {
        (u64::from(self.to).div_ceil(BLOCK_SIZE) - u64::from(self.from) / BLOCK_SIZE) as u8
    }
}

/// Cuts `offset..end` into one piece per element.
pub(super) fn pieces(offset: u64, end: u64) -> impl Iterator<Item = Piece> {
    let mut at = offset;
    core::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let element = at / ELEMENT_SIZE;
        let from = at % ELEMENT_SIZE;
        let to = (end - element * ELEMENT_SIZE).min(ELEMENT_SIZE);
        at += to - from;
        Some(Piece { element, from: from as u32, to: to as u32 })
    })
}

/// CRC-32C of the part of each block that `data`, which begins at byte `from` of an element, touches.
pub(super) fn piece_crcs(from: u32, data: &[u8]) -> Vec<u32> {
    let head = (BLOCK_SIZE - u64::from(from) % BLOCK_SIZE) as usize;
    let (first, rest) = data.split_at(head.min(data.len()));
    let mut crcs = Vec::with_capacity(1 + rest.len().div_ceil(BLOCK_SIZE as usize));
    crcs.push(crc32c(first));
    crcs.extend(rest.chunks(BLOCK_SIZE as usize).map(crc32c));
    crcs
}

static ZEROS: [u8; ELEMENT_SIZE as usize] = [0; ELEMENT_SIZE as usize];

/// Zeros that nobody allocates.
pub(super) fn zeros(length: usize) -> Bytes {
    Bytes::from_static(&ZEROS[..length])
}

/// Bytes of one piece.
pub(super) type Pieces = SmallVec<[Bytes; 1]>;

/// Checks the answer to a read of all blocks of `piece` and trims it to the piece. `None`: the bytes
/// are not what their checksums say, or the answer has another shape than was asked for (P7).
pub(super) fn checked_read(piece: Piece, sums: &[BlockSum], data: &Payload) -> Option<Pieces> {
    if sums.len() != usize::from(piece.blocks()) {
        return None;
    }
    let data = data.to_bytes();
    let mut at = 0;
    for sum in sums {
        let BlockSum::Crc(crc) = sum else { continue };
        let block = data.get(at..at + BLOCK_SIZE as usize)?;
        if crc32c(block) != *crc {
            return None;
        }
        at += BLOCK_SIZE as usize;
    }
    (at == data.len()).then(|| trim(piece, sums, &data))
}

/// Runs of zero and of stored blocks, one behind the other, cut to the piece.
fn trim(piece: Piece, sums: &[BlockSum], data: &Bytes) -> Pieces {
    let mut out = Pieces::new();
    let mut block = 0;
    let mut stored = 0;
    while block < sums.len() {
        let zero = sums[block] == BlockSum::Zero;
        let end = sums[block..].iter().position(|s| (*s == BlockSum::Zero) != zero).map_or(sums.len(), |n| block + n);
        let length = (end - block) * BLOCK_SIZE as usize;
        // Where the run lies in the element, and which part of it the piece wants.
        let begin = (usize::from(piece.first_block()) + block) * BLOCK_SIZE as usize;
        let low = (piece.from as usize).max(begin) - begin;
        let high = (piece.to as usize).min(begin + length) - begin;
        out.push(if zero { zeros(high - low) } else { data.slice(stored + low..stored + high) });
        if !zero {
            stored += length;
        }
        block = end;
    }
    out
}

/// Merges elements with data (ascending, bit n of the mask = block n) into `(length, allocated)` runs
/// that cover `offset..end`.
pub(super) fn extents(offset: u64, end: u64, elements: &[(u64, u16)]) -> Vec<(u64, bool)> {
    let mut runs = Runs { at: offset, end, runs: Vec::new() };
    for &(element, mask) in elements {
        let base = element * ELEMENT_SIZE;
        for block in 0..BLOCKS_PER_ELEMENT as u64 {
            if mask >> block & 1 == 1 {
                let begin = base + block * BLOCK_SIZE;
                runs.push(begin, false);
                runs.push(begin.saturating_add(BLOCK_SIZE), true);
            }
        }
    }
    runs.push(end, false);
    runs.runs
}

struct Runs {
    at: u64,
    end: u64,
    runs: Vec<(u64, bool)>,
}

impl Runs {
    /// Everything from where we are up to `to` is like this.
    fn push(&mut self, to: u64, allocated: bool) {
        let to = to.min(self.end);
        if to <= self.at {
            return;
        }
        let length = to - self.at;
        self.at = to;
        match self.runs.last_mut() {
            Some((n, last)) if *last == allocated => *n += length,
            _ => self.runs.push((length, allocated)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_is_cut_at_elements() {
        let cut: Vec<Piece> = pieces(65536 * 4 + 100, 65536 * 6 + 7).collect();
        let piece = |element, from, to| Piece { element, from, to };
        assert_eq!(cut, [piece(4, 100, 65536), piece(5, 0, 65536), piece(6, 0, 7)]);
        assert_eq!(pieces(5, 5).count(), 0);
    }

    #[test]
    fn the_end_of_the_largest_disk_is_cut_without_overflow() {
        let end = u64::MAX;
        let cut: Vec<Piece> = pieces(end - 70000, end).collect();
        assert_eq!(cut.len(), 2);
        assert_eq!(cut.iter().map(|p| u64::from(p.length())).sum::<u64>(), 70000);
        assert_eq!(cut[1], Piece { element: (1 << 48) - 1, from: 0, to: 65535 });
    }

    #[test]
    fn unaligned_pieces_have_a_checksum_per_touched_block() {
        let data = vec![7; 4096 + 10];
        let crcs = piece_crcs(4000, &data);
        assert_eq!(crcs, [crc32c(&data[..96]), crc32c(&data[96..96 + 4010])]);
        assert_eq!(piece_crcs(0, &data).len(), 2);
        assert_eq!(piece_crcs(10, &data[..5]), [crc32c(&data[..5])]);
    }

    #[test]
    fn a_flipped_bit_and_a_wrong_shape_are_seen() {
        let block = vec![3u8; 4096];
        let piece = Piece { element: 0, from: 4096, to: 8192 };
        let sums = [BlockSum::Crc(crc32c(&block))];
        assert!(checked_read(piece, &sums, &Bytes::from(block.clone()).into()).is_some());
        let mut flipped = block.clone();
        flipped[17] ^= 4;
        assert!(checked_read(piece, &sums, &Bytes::from(flipped).into()).is_none());
        assert!(checked_read(piece, &sums, &Bytes::from(block[..100].to_vec()).into()).is_none());
        assert!(checked_read(piece, &[], &Payload::default()).is_none());
        assert!(checked_read(piece, &[BlockSum::Zero], &Bytes::from(block).into()).is_none());
    }

    proptest! {
        #[test]
        fn reads_are_trimmed_to_what_was_asked_for(from in 0u32..65536, length in 1u32..65536, mask: u16) {
            let piece = Piece { element: 9, from, to: (from + length).min(65536) };
            let mut whole = vec![0u8; 65536];
            let (mut sums, mut data) = (Vec::new(), Vec::new());
            for block in 0..16usize {
                let range = block * 4096..(block + 1) * 4096;
                if mask >> block & 1 == 1 {
                    whole[range.clone()].fill(block as u8 + 1);
                }
                let n = block as u8;
                if (piece.first_block()..piece.first_block() + piece.blocks()).contains(&n) {
                    if mask >> block & 1 == 1 {
                        sums.push(BlockSum::Crc(crc32c(&whole[range.clone()])));
                        data.extend_from_slice(&whole[range]);
                    } else {
                        sums.push(BlockSum::Zero);
                    }
                }
            }
            let got = checked_read(piece, &sums, &Bytes::from(data).into()).unwrap().concat();
            prop_assert_eq!(&got[..], &whole[piece.from as usize..piece.to as usize]);
        }

        #[test]
        fn extents_cover_the_range_and_alternate(
            offset in 0u64..300_000, length in 1u64..300_000, masks in proptest::collection::vec(any::<u16>(), 10)
        ) {
            let elements: Vec<(u64, u16)> = masks.iter().enumerate().map(|(n, m)| (n as u64, *m)).collect();
            let runs = extents(offset, offset + length, &elements);
            prop_assert_eq!(runs.iter().map(|r| r.0).sum::<u64>(), length);
            prop_assert!(runs.windows(2).all(|w| w[0].1 != w[1].1));
            let mut at = offset;
            for (n, allocated) in runs {
                for byte in [at, at + n / 2, at + n - 1] {
                    let set = masks.get((byte / 65536) as usize).is_some_and(|m| m >> (byte % 65536 / 4096) & 1 == 1);
                    prop_assert_eq!(set, allocated);
                }
                at += n;
            }
        }
    }
}
