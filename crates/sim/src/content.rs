//! What the clients write, and how a read tells who wrote it.
//!
//! The hot set of a disk is a few *spots*: runs of blocks across the edges of elements and stripe
//! units, at the beginning, far out, and at the end. A spot is cut into *cells*, of a block or of a
//! part of one; operations begin and end at cuts. A cell is therefore written whole or not at all by
//! every operation, and is the register whose history the linearizability checker judges: unaligned
//! writes, which are read-modify-write at the server, share a block and never a cell.
//!
//! Each write fills its range with stamps of 16 bytes: the operation's number, and a mark made of it
//! and the block's place. A read thus knows the writer of every byte, and sees bytes that nobody
//! wrote, half-written cells, and blocks that came to a wrong place.

use bytes::Bytes;
use petal::ids::{BLOCK_SIZE, ELEMENT_SIZE};
use stdx::Prng;

/// Content of a cell: the number of the operation that wrote it; zero = zeros.
pub type Value = u64;

/// Zeros.
pub const ZEROS: Value = 0;

const STAMP: u64 = 16;

/// The hot set of one disk.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Spots, ascending and apart from each other; each is its cuts, ascending.
    pub spots: Vec<Vec<u64>>,
}

impl Layout {
    /// Draws the hot set of a disk.
    pub fn draw(prng: &mut Prng, size: u64, stripe_unit: u64) -> Layout {
        Layout::draw_spots(prng, size, stripe_unit)
    }

    /// A hot set of three or four blocks on both sides of an element's edge.
    pub fn crowded(prng: &mut Prng, size: u64) -> Layout {
        let first = ELEMENT_SIZE / BLOCK_SIZE - prng.between(1, 2);
        Layout { spots: vec![cut(prng, first, 3, size.max(2 * ELEMENT_SIZE))] }
    }

    /// A hot set that takes nearly all of a data region of 1 MiB (256 blocks).
    pub fn full(prng: &mut Prng, size: u64) -> Layout {
        let blocks = prng.between(150, 230);
        Layout { spots: vec![cut(prng, 0, blocks, size)] }
    }

    /// A block or two in each of many elements that are in one slot.
    pub fn scattered(prng: &mut Prng, size: u64) -> Layout {
        let elements = prng.between(6, 15);
        let per_element = ELEMENT_SIZE / BLOCK_SIZE;
        let spot = |prng: &mut Prng, e: u64| {
            let first = e * per_element + prng.below(per_element - 2);
            let blocks = prng.between(1, 2);
            cut(prng, first, blocks, size)
        };
        let spots: Vec<Vec<u64>> = (0..elements).map(|e| spot(prng, e)).filter(|s| s.len() >= 2).collect();
        if spots.is_empty() { Layout::crowded(prng, size) } else { Layout { spots } }
    }

    fn draw_spots(prng: &mut Prng, size: u64, stripe_unit: u64) -> Layout {
        let mut bases = vec![
            0,
            ELEMENT_SIZE,
            stripe_unit,
            stripe_unit * prng.between(2, 9),
            prng.below(1 << 41) / BLOCK_SIZE * BLOCK_SIZE,
            (1 << 40) + prng.below(1 << 20) * ELEMENT_SIZE,
            (1 << 62) + prng.below(1 << 30) * ELEMENT_SIZE,
            size / BLOCK_SIZE * BLOCK_SIZE,
        ];
        prng.shuffle(&mut bases);
        bases.truncate(prng.between(2, 5) as usize);
        bases.sort_unstable();
        let mut spots: Vec<Vec<u64>> = Vec::new();
        for base in bases {
            let long = prng.chance(1, 8);
            let before = if long { 20 } else { prng.below(3) };
            let first = (base / BLOCK_SIZE).saturating_sub(before);
            let blocks = if long { 40 } else { prng.between(1, 4) };
            let floor = spots.last().map_or(0, |s| s[s.len() - 1].div_ceil(BLOCK_SIZE));
            let cuts = cut(prng, first.max(floor), blocks, size);
            if cuts.len() >= 2 {
                spots.push(cuts);
            }
        }
        if spots.is_empty() {
            spots.push(cut(prng, 0, 2, size));
        }
        Layout { spots }
    }

    /// Cells within `start..end`, as `(start, end)`.
    pub fn cells(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let inside = move |cell: &(u64, u64)| cell.0 >= start && cell.1 <= end;
        self.all_cells().filter(inside)
    }

    /// Cells that `start..end` touches, wholly or in part.
    pub fn touched(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.all_cells().filter(move |cell| cell.0 < end && cell.1 > start)
    }

    /// All cells.
    pub fn all_cells(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.spots.iter().flat_map(|s| s.windows(2).map(|w| (w[0], w[1])))
    }

    /// A range of cells to operate on, below `size`; `None` if a spot beyond it was drawn.
    pub fn draw_range(&self, prng: &mut Prng, size: u64) -> Option<(u64, u64)> {
        let cuts = prng.pick(&self.spots);
        let first = prng.below(cuts.len() as u64 - 1) as usize;
        let longest = (cuts.len() - 1 - first) as u64;
        let cells = if prng.chance(1, 4) { prng.between(1, longest) } else { prng.between(1, longest.min(3)) };
        let (start, end) = (cuts[first], cuts[first + cells as usize]);
        (end <= size).then_some((start, end))
    }
}

/// Cuts of `blocks` blocks from block `first`, none beyond `size`.
fn cut(prng: &mut Prng, first: u64, blocks: u64, size: u64) -> Vec<u64> {
    const INSIDE: [&[u64]; 6] = [&[512], &[1000, 3584], &[37], &[2048], &[512, 1024, 4059], &[100, 2000]];
    let mut cuts = vec![first * BLOCK_SIZE];
    for block in first..first + blocks {
        if prng.chance(2, 5) {
            cuts.extend(prng.pick(&INSIDE).iter().map(|inner| block * BLOCK_SIZE + inner));
        }
        cuts.push((block + 1) * BLOCK_SIZE);
    }
    cuts.retain(|c| *c <= size);
    cuts
}

/// The bytes that operation `value` writes at `offset`.
pub fn fill(value: Value, offset: u64, length: u64) -> Bytes {
    let first = offset / STAMP * STAMP;
    let mut out = Vec::with_capacity((length + 2 * STAMP) as usize);
    let mut at = first;
    while at < offset + length {
        out.extend_from_slice(&stamp(value, at));
        at += STAMP;
    }
    let skip = (offset - first) as usize;
    Bytes::from(out).slice(skip..skip + length as usize)
}

/// Why bytes are nobody's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Garbage(pub String);

/// Who wrote the cell `bytes` at `offset`. Cells have at least 32 bytes, so one whole stamp.
pub fn read_cell(bytes: &[u8], offset: u64) -> Result<Value, Garbage> {
    let skip = (offset.next_multiple_of(STAMP) - offset) as usize;
    let head = bytes.get(skip..skip + 8).ok_or_else(|| Garbage(format!("{} bytes are no cell", bytes.len())))?;
    let value = u64::from_le_bytes(head.try_into().expect("eight bytes"));
    let mut cached = (u64::MAX, [0; STAMP as usize]);
    for (i, byte) in bytes.iter().enumerate() {
        let at = offset + i as u64;
        let block = at / BLOCK_SIZE;
        if cached.0 != block {
            cached = (block, stamp(value, at));
        }
        if *byte != cached.1[(at % STAMP) as usize] {
            return Err(Garbage(explain(bytes, offset, i, value)));
        }
    }
    Ok(value)
}

fn explain(bytes: &[u8], offset: u64, wrong: usize, value: Value) -> String {
    let at = offset + wrong as u64;
    let around = &bytes[wrong / 16 * 16..bytes.len().min(wrong / 16 * 16 + 16)];
    format!(
        "cell at {offset} begins with operation {value}, but byte {at} is not of it (there: {around:02x?}): \
         a mixture, a wrong place, or bytes that nobody wrote"
    )
}

fn stamp(value: Value, at: u64) -> [u8; STAMP as usize] {
    let mut out = [0; STAMP as usize];
    if value != ZEROS {
        let mark = (value ^ (at / BLOCK_SIZE).rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        out[..8].copy_from_slice(&value.to_le_bytes());
        out[8..].copy_from_slice(&mark.to_le_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_names_its_writer() {
        for (start, end) in
            [(0, 4096), (37, 4096), (4096, 5096), (8192 + 4059, 12288), ((1 << 62) + 512, (1 << 62) + 4096)]
        {
            assert_eq!(read_cell(&fill(991, start, end - start), start), Ok(991));
            assert_eq!(read_cell(&vec![0; (end - start) as usize], start), Ok(ZEROS));
        }
    }

    #[test]
    fn mixtures_wrong_places_and_damage_are_seen() {
        let mut mixed = fill(7, 0, 4096).to_vec();
        mixed[2048..].copy_from_slice(&fill(8, 2048, 2048));
        assert!(read_cell(&mixed, 0).is_err());
        assert!(read_cell(&fill(7, 4096, 4096), 8192).is_err());
        let mut rotten = fill(7, 0, 4096).to_vec();
        rotten[1234] ^= 4;
        assert!(read_cell(&rotten, 0).is_err());
        let mut half = vec![0; 4096];
        half[512..].copy_from_slice(&fill(7, 512, 3584));
        assert!(read_cell(&half, 0).is_err());
    }

    #[test]
    fn layouts_have_cells_of_at_least_32_bytes_within_the_disk() {
        for seed in 0..300 {
            let mut prng = Prng::new(seed);
            let size = *prng.pick(&[65536, 1 << 26, (1 << 40) + 512, 1 << 62, petal::limits::DISK_SIZE_MAX]);
            let layout = Layout::draw(&mut prng, size, 1 << 20);
            let mut last = 0;
            for (start, end) in layout.all_cells() {
                assert!(start >= last && end - start >= 32 && end <= size && end - start <= 4096);
                last = end;
            }
            assert!(last > 0);
            for _ in 0..20 {
                if let Some((start, end)) = layout.draw_range(&mut prng, size) {
                    assert_eq!(layout.cells(start, end).map(|c| c.1 - c.0).sum::<u64>(), end - start);
                }
            }
        }
    }
}
