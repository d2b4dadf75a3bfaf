//! Which blocks of a disk's data region are free (design 2.10, invariant I8).
//!
//! Two bitmaps, in memory: `referenced` (an entry of the PMap refers to the block; this is what a
//! checkpoint keeps, in chunks) and `in_use` (the block may not be handed out). A block that is
//! written over is *released* first: no entry refers to it any more, but a journal that is cut short
//! could bring the old entry back, and a reader may still be under way. Once neither can happen it is
//! *reused*. A crash forgets the blocks in between, which is right: after a start they are free.
//!
//! Invariants: every referenced block is in use; nothing at or above the frontier (the part of the
//! disk that can be written without growing the file) is handed out; the counts agree with the bits.
//!
//! Cost: 2 bits per block, 64 MiB of RAM per TiB. Allocation is next-fit, a word of 64 blocks at a
//! time; full chunks are skipped by one bit each, so that a nearly full disk of many TiB still
//! answers within microseconds.
//!
//! Failures: none of its own. Chunks that come from a disk are checked; blocks out of range, releases of
//! what nobody refers to and the like are mistakes of the caller and panic.

use bytes::Bytes;
use core::ops::Range;
use smallvec::SmallVec;

/// Blocks in a chunk: unit of persistence and of the free counts.
pub const CHUNK_BLOCKS: u64 = 32768;
/// Bytes of a stored chunk.
pub const CHUNK_BYTES: usize = (CHUNK_BLOCKS / 8) as usize;

const CHUNK_WORDS: usize = (CHUNK_BLOCKS / 64) as usize;
/// How far behind the first free block one contiguous run is looked for: 1,024 words are read in
/// less time than a second write to the disk costs.
const SEARCH_BLOCKS: u64 = 65536;
/// Runs that are too short and looked at before several are taken.
const SEARCH_RUNS: usize = 64;

/// Runs of blocks, `(first, number)`.
pub type Extents = SmallVec<[(u64, u32); 4]>;

/// The free map of one disk. Blocks are numbered from 0 within the data region.
#[derive(Clone, Debug)]
pub struct Allocator {
    capacity: u64,
    frontier: u64,
    /// Where the next search begins.
    cursor: u64,
    in_use: Bitmap,
    referenced: Bitmap,
    /// Free blocks below the frontier, per chunk.
    chunk_free: Vec<u32>,
    /// Chunks with free blocks below the frontier.
    open: Bitmap,
    /// Chunks whose referenced bits have changed since they were taken.
    dirty: Bitmap,
    free_below_frontier: u64,
    in_use_count: u64,
    referenced_count: u64,
    /// Grows with each change of what is referenced.
    changes: u64,
}

/// Why bytes are not a chunk of this disk's free map.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// There is no such chunk.
    #[error("the free map has {chunks} chunks, there is no chunk {index}; the PMap store is damaged or another disk's")]
    NoSuchChunk {
        /// Number that was given.
        index: u32,
        /// Chunks that there are.
        chunks: u32,
    },
    /// It has another length.
    #[error("chunk {index} of the free map has {length} bytes instead of 4096; the PMap store is damaged")]
    BadLength {
        /// Chunk.
        index: u32,
        /// Its bytes.
        length: usize,
    },
    /// It refers to blocks behind the last.
    #[error(
        "chunk {index} of the free map has blocks beyond the disk's end; the PMap store is damaged or another disk's"
    )]
    BeyondCapacity {
        /// Chunk.
        index: u32,
    },
}

impl Allocator {
    /// A map of `capacity` free blocks, none of which can be written yet (frontier 0).
    pub fn new(capacity: u64) -> Allocator {
        let chunks = capacity.div_ceil(CHUNK_BLOCKS);
        assert!(chunks <= u64::from(u32::MAX), "a disk of {capacity} blocks is beyond the format");
        Allocator {
            capacity,
            frontier: 0,
            cursor: 0,
            in_use: Bitmap::new(chunks * CHUNK_BLOCKS),
            referenced: Bitmap::new(chunks * CHUNK_BLOCKS),
            chunk_free: vec![0; chunks as usize],
            open: Bitmap::new(chunks),
            dirty: Bitmap::new(chunks),
            free_below_frontier: 0,
            in_use_count: 0,
            referenced_count: 0,
            changes: 0,
        }
    }

    /// Blocks of the disk.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Blocks below this one can be written.
    pub fn frontier(&self) -> u64 {
        self.frontier
    }

    /// Blocks below this one can be written from now on (at most the capacity counts).
    pub fn set_frontier(&mut self, blocks: u64) {
        let old = self.frontier;
        let new = blocks.min(self.capacity);
        self.frontier = new;
        for part in by_chunk(old.min(new)..old.max(new)) {
            let free = (part.end - part.start) - self.in_use.count(part.clone());
            self.count_free(chunk_of(part.start), if new > old { free as i64 } else { -(free as i64) });
        }
    }

    /// Free blocks that can be handed out now.
    pub fn free_below_frontier(&self) -> u64 {
        self.free_below_frontier
    }

    /// Free blocks up to the capacity.
    pub fn free(&self) -> u64 {
        self.capacity - self.in_use_count
    }

    /// Blocks that entries refer to.
    pub fn referenced(&self) -> u64 {
        self.referenced_count
    }

    /// A number that is another one whenever what is referenced may have changed.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Whether the block may not be handed out.
    pub fn is_in_use(&self, block: u64) -> bool {
        self.check(block);
        self.in_use.get(block)
    }

    /// A block that an entry refers to and that lies behind what was ever written.
    pub fn beyond_frontier(&self) -> Option<u64> {
        self.referenced.next_set(self.frontier, self.capacity)
    }

    /// Whether an entry refers to the block.
    pub fn is_referenced(&self, block: u64) -> bool {
        self.check(block);
        self.referenced.get(block)
    }

    /// Hands out `wanted` blocks, appended to `extents`: all, or none and `false`. They are then in
    /// use and referenced. One contiguous run where a short search finds it, else several.
    pub fn allocate(&mut self, wanted: u32, extents: &mut Extents) -> bool {
        if u64::from(wanted) > self.free_below_frontier {
            return false;
        }
        if wanted == 0 {
            return true;
        }
        if self.cursor >= self.frontier {
            self.cursor = 0;
        }
        match self.find_run(u64::from(wanted)) {
            Some(start) => self.take(start, wanted, extents),
            None => self.take_pieces(wanted, extents),
        }
        true
    }

    /// No entry refers to the block any more. It stays in use until `reuse`.
    pub fn release(&mut self, block: u64) {
        self.check(block);
        assert!(self.referenced.get(block), "block {block} is released, and nothing referred to it");
        self.referenced.clear(block..block + 1);
        self.referenced_count -= 1;
        self.changes += 1;
        self.dirty.set(chunk_range(block));
    }

    /// A released block may be handed out again.
    pub fn reuse(&mut self, block: u64) {
        self.check(block);
        assert!(!self.referenced.get(block), "block {block} is to be reused, and an entry refers to it");
        assert!(self.in_use.get(block), "block {block} is to be reused, and it is free already");
        self.in_use.clear(block..block + 1);
        self.in_use_count -= 1;
        if block < self.frontier {
            self.count_free(chunk_of(block), 1);
        }
    }

    /// `release` and `reuse` at once: nobody can ask for the block any more (replay; a change that was
    /// undone before it was issued).
    pub fn free_now(&mut self, block: u64) {
        self.release(block);
        self.reuse(block);
    }

    /// An entry refers to the block (replay of the journal). Twice is as good as once.
    pub fn mark(&mut self, block: u64) {
        self.check(block);
        if !self.referenced.get(block) {
            self.mark_range(block..block + 1);
        }
    }

    /// Adds the blocks of a stored chunk to those that are referenced. For the time of opening.
    pub fn load_chunk(&mut self, index: u32, bytes: &[u8]) -> Result<(), ChunkError> {
        let chunks = self.chunk_free.len() as u32;
        if index >= chunks {
            return Err(ChunkError::NoSuchChunk { index, chunks });
        }
        if bytes.len() != CHUNK_BYTES {
            return Err(ChunkError::BadLength { index, length: bytes.len() });
        }
        let first = u64::from(index) * CHUNK_BLOCKS;
        let words: Vec<u64> =
            bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect();
        let loaded = Bitmap { words };
        let behind = (self.capacity - first).min(CHUNK_BLOCKS)..CHUNK_BLOCKS;
        if loaded.count(behind) > 0 {
            return Err(ChunkError::BeyondCapacity { index });
        }
        let was_dirty = self.dirty.get(u64::from(index));
        let mut at = 0;
        while let Some(start) = loaded.next_set(at, CHUNK_BLOCKS) {
            at = loaded.next_clear(start, CHUNK_BLOCKS).unwrap_or(CHUNK_BLOCKS);
            self.mark_range(first + start..first + at);
        }
        if !was_dirty {
            self.dirty.clear(u64::from(index)..u64::from(index) + 1);
        }
        Ok(())
    }

    /// Chunks whose referenced blocks have changed since the last call, with what is to be stored;
    /// `None` if nothing in it is referenced any more. They are as of this moment: whoever stores
    /// them must store in the same transaction the entries of the same moment.
    pub fn take_dirty(&mut self) -> Vec<(u32, Option<Bytes>)> {
        let chunks = self.chunk_free.len() as u64;
        let mut taken = Vec::new();
        let mut at = 0;
        while let Some(index) = self.dirty.next_set(at, chunks) {
            taken.push((index as u32, self.stored_chunk(index as usize)));
            at = index + 1;
        }
        self.dirty.clear(0..chunks);
        taken
    }

    /// Counts everything again (slow). Panics if an invariant does not hold.
    pub fn check_invariants(&self) {
        let all = 0..self.capacity;
        assert_eq!(self.in_use.count(all.clone()), self.in_use_count);
        assert_eq!(self.referenced.count(all), self.referenced_count);
        let both = self.in_use.words.iter().zip(&self.referenced.words);
        assert!(both.into_iter().all(|(in_use, referenced)| referenced & !in_use == 0), "referenced, but not in use");
        let mut free = 0;
        for (index, counted) in self.chunk_free.iter().enumerate() {
            let first = index as u64 * CHUNK_BLOCKS;
            let part = first..(first + CHUNK_BLOCKS).min(self.frontier).max(first);
            let found = (part.end - part.start) - self.in_use.count(part);
            assert_eq!(found, u64::from(*counted), "free blocks of chunk {index}");
            assert_eq!(self.open.get(index as u64), found > 0);
            free += found;
        }
        assert_eq!(free, self.free_below_frontier);
    }

    /// First block of a free run of `wanted` blocks, looked for in a bounded distance from the cursor,
    /// around the end.
    fn find_run(&self, wanted: u64) -> Option<u64> {
        let mut runs = 0;
        for (from, to) in [(self.cursor, self.frontier), (0, self.cursor)] {
            let Some(mut start) = self.next_free(from, to) else { continue };
            let to = to.min(start + SEARCH_BLOCKS);
            loop {
                let longest = (start + wanted).min(self.frontier);
                let end = self.in_use.next_set(start, longest).unwrap_or(longest);
                runs += 1;
                if end - start == wanted {
                    return Some(start);
                }
                if runs >= SEARCH_RUNS {
                    return None;
                }
                match self.next_free(end, to) {
                    Some(next) => start = next,
                    None => break,
                }
            }
        }
        None
    }

    /// Takes the next free runs, whatever their length. There are enough free blocks.
    fn take_pieces(&mut self, wanted: u32, extents: &mut Extents) {
        let mut missing = wanted;
        while missing > 0 {
            let start = self.next_free(self.cursor, self.frontier).or_else(|| self.next_free(0, self.frontier));
            let start = start.expect("the count of free blocks was checked");
            let longest = (start + u64::from(missing)).min(self.frontier);
            let end = self.in_use.next_set(start, longest).unwrap_or(longest);
            let count = (end - start) as u32;
            self.take(start, count, extents);
            missing -= count;
        }
    }

    fn take(&mut self, start: u64, count: u32, extents: &mut Extents) {
        let end = start + u64::from(count);
        self.mark_range(start..end);
        self.cursor = end;
        extents.push((start, count));
    }

    /// First free block in `from..to`; `to` is at most the frontier.
    fn next_free(&self, mut from: u64, to: u64) -> Option<u64> {
        while from < to {
            let chunk = self.open.next_set(from / CHUNK_BLOCKS, to.div_ceil(CHUNK_BLOCKS))?;
            let first = chunk * CHUNK_BLOCKS;
            let end = (first + CHUNK_BLOCKS).min(to);
            if let Some(block) = self.in_use.next_clear(from.max(first), end) {
                return Some(block);
            }
            from = end;
        }
        None
    }

    /// Sets both bits of all blocks, whatever they were.
    fn mark_range(&mut self, range: Range<u64>) {
        for part in by_chunk(range) {
            let chunk = chunk_of(part.start);
            let blocks = part.end - part.start;
            let below = part.start..part.end.min(self.frontier).max(part.start);
            let taken = (below.end - below.start) - self.in_use.count(below);
            self.in_use_count += blocks - self.in_use.count(part.clone());
            self.changes += 1;
            self.referenced_count += blocks - self.referenced.count(part.clone());
            self.count_free(chunk, -(taken as i64));
            self.dirty.set(chunk_range(part.start));
            self.in_use.set(part.clone());
            self.referenced.set(part);
        }
    }

    fn count_free(&mut self, chunk: usize, change: i64) {
        let free = &mut self.chunk_free[chunk];
        *free = u32::try_from(i64::from(*free) + change).expect("a chunk has no fewer than 0 free blocks");
        let bit = chunk as u64..chunk as u64 + 1;
        match *free > 0 {
            true => self.open.set(bit),
            false => self.open.clear(bit),
        }
        self.free_below_frontier = self.free_below_frontier.wrapping_add_signed(change);
    }

    fn stored_chunk(&self, index: usize) -> Option<Bytes> {
        let words = &self.referenced.words[index * CHUNK_WORDS..(index + 1) * CHUNK_WORDS];
        if words.iter().all(|word| *word == 0) {
            return None;
        }
        let mut bytes = Vec::with_capacity(CHUNK_BYTES);
        words.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
        Some(Bytes::from(bytes))
    }

    fn check(&self, block: u64) {
        assert!(block < self.capacity, "block {block} is beyond the disk's {}", self.capacity);
    }
}

fn chunk_of(block: u64) -> usize {
    (block / CHUNK_BLOCKS) as usize
}

/// The chunk's bit in the bitmaps of chunks.
fn chunk_range(block: u64) -> Range<u64> {
    let chunk = block / CHUNK_BLOCKS;
    chunk..chunk + 1
}

/// Cuts a range at the chunks' borders.
fn by_chunk(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    core::iter::from_fn(move || {
        let start = at;
        at = range.end.min((start / CHUNK_BLOCKS + 1) * CHUNK_BLOCKS);
        (start < range.end).then_some(start..at)
    })
}

/// Bits, 64 to a word.
#[derive(Clone, Debug)]
struct Bitmap {
    words: Vec<u64>,
}

impl Bitmap {
    fn new(bits: u64) -> Bitmap {
        Bitmap { words: vec![0; bits.div_ceil(64) as usize] }
    }

    fn get(&self, bit: u64) -> bool {
        self.words[(bit / 64) as usize] >> (bit % 64) & 1 == 1
    }

    fn set(&mut self, range: Range<u64>) {
        for (word, mask) in masks(range) {
            self.words[word] |= mask;
        }
    }

    fn clear(&mut self, range: Range<u64>) {
        for (word, mask) in masks(range) {
            self.words[word] &= !mask;
        }
    }

    fn count(&self, range: Range<u64>) -> u64 {
        masks(range).map(|(word, mask)| u64::from((self.words[word] & mask).count_ones())).sum()
    }

    /// First set bit in `from..to`.
    fn next_set(&self, from: u64, to: u64) -> Option<u64> {
        self.next(from, to, 0)
    }

    /// First clear bit in `from..to`.
    fn next_clear(&self, from: u64, to: u64) -> Option<u64> {
        self.next(from, to, u64::MAX)
    }

    /// First bit in `from..to` that is set after `flip`.
    fn next(&self, from: u64, to: u64, flip: u64) -> Option<u64> {
        if from >= to {
            return None;
        }
        let first = (from / 64) as usize;
        let last = ((to - 1) / 64) as usize;
        let head = (self.words[first] ^ flip) & (u64::MAX << (from % 64));
        let (index, word) = match head {
            0 => {
                let rest = &self.words[first + 1..=last];
                let skipped = rest.iter().position(|word| word ^ flip != 0)?;
                (first + 1 + skipped, rest[skipped] ^ flip)
            }
            word => (first, word),
        };
        let bit = index as u64 * 64 + u64::from(word.trailing_zeros());
        (bit < to).then_some(bit)
    }
}

/// The words that a range of bits touches, each with the mask of those bits.
fn masks(range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let Range { start, end } = range;
    let words = if start < end { start / 64..end.div_ceil(64) } else { 0..0 };
    words.map(move |word| {
        let low = start.saturating_sub(word * 64);
        let high = (end - word * 64).min(64);
        ((word as usize), (u64::MAX << low) & (u64::MAX >> (64 - high)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use stdx::Prng;

    fn allocator(capacity: u64, frontier: u64) -> Allocator {
        let mut allocator = Allocator::new(capacity);
        allocator.set_frontier(frontier);
        allocator
    }

    fn blocks(extents: &Extents) -> Vec<u64> {
        extents.iter().flat_map(|(start, count)| *start..*start + u64::from(*count)).collect()
    }

    fn take(allocator: &mut Allocator, wanted: u32) -> Option<Vec<u64>> {
        let mut extents = Extents::new();
        let done = allocator.allocate(wanted, &mut extents);
        assert!(done || extents.is_empty());
        done.then(|| blocks(&extents))
    }

    #[test]
    fn blocks_are_handed_out_one_behind_the_other_in_one_run() {
        let mut a = allocator(CHUNK_BLOCKS * 2, CHUNK_BLOCKS * 2);
        let mut extents = Extents::new();
        assert!(a.allocate(1, &mut extents) && a.allocate(40_000, &mut extents) && a.allocate(0, &mut extents));
        assert_eq!(extents.as_slice(), [(0, 1), (1, 40_000)]);
        assert!(a.is_referenced(40_000) && a.is_in_use(40_000) && !a.is_in_use(40_001));
        assert_eq!((a.referenced(), a.free()), (40_001, CHUNK_BLOCKS * 2 - 40_001));
        a.check_invariants();
    }

    #[test]
    fn nothing_is_handed_out_at_or_above_the_frontier() {
        let mut a = allocator(1000, 100);
        assert_eq!(take(&mut a, 101), None);
        assert_eq!(take(&mut a, 100), Some((0..100).collect()));
        assert_eq!(take(&mut a, 1), None);
        assert_eq!((a.free_below_frontier(), a.free(), a.frontier(), a.capacity()), (0, 900, 100, 1000));
        a.mark(150);
        a.set_frontier(200);
        assert_eq!(a.free_below_frontier(), 99);
        assert_eq!(take(&mut a, 99), Some((100..150).chain(151..200).collect()));
        a.set_frontier(u64::MAX);
        assert_eq!(a.frontier(), 1000);
        a.set_frontier(10);
        a.free_now(5);
        a.free_now(50);
        assert_eq!((take(&mut a, 1), take(&mut a, 1)), (Some(vec![5]), None));
        a.check_invariants();
    }

    #[test]
    fn a_released_block_is_handed_out_only_after_its_reuse() {
        let mut a = allocator(64, 64);
        take(&mut a, 64).unwrap();
        a.release(7);
        assert!(a.is_in_use(7) && !a.is_referenced(7));
        assert_eq!((take(&mut a, 1), a.referenced()), (None, 63));
        a.reuse(7);
        assert_eq!(take(&mut a, 1), Some(vec![7]));
    }

    #[test]
    #[should_panic(expected = "an entry refers to it")]
    fn a_referenced_block_is_never_reused() {
        let mut a = allocator(64, 64);
        take(&mut a, 1).unwrap();
        a.reuse(0);
    }

    #[test]
    #[should_panic(expected = "nothing referred to it")]
    fn a_block_is_not_released_twice() {
        let mut a = allocator(64, 64);
        take(&mut a, 1).unwrap();
        a.release(0);
        a.release(0);
    }

    #[test]
    fn a_contiguous_run_is_preferred_to_nearer_holes() {
        let mut a = allocator(4096, 4096);
        take(&mut a, 4096).unwrap();
        [10, 12, 14, 100, 101, 102, 103].into_iter().for_each(|block| a.free_now(block));
        assert_eq!(take(&mut a, 4), Some(vec![100, 101, 102, 103]));
        assert_eq!(take(&mut a, 3), Some(vec![10, 12, 14]));
    }

    #[test]
    fn a_run_across_the_cursor_is_found() {
        let mut a = allocator(1000, 1000);
        take(&mut a, 500).unwrap();
        (490..500).for_each(|block| a.free_now(block));
        take(&mut a, 490).unwrap();
        assert_eq!(take(&mut a, 15), Some((990..1000).chain(490..495).collect()));
    }

    #[test]
    fn the_last_free_blocks_of_a_nearly_full_disk_are_found_wherever_they_are() {
        let capacity = 300 * CHUNK_BLOCKS + 77;
        let mut a = allocator(capacity, capacity);
        assert!(a.allocate(capacity as u32, &mut Extents::new()));
        let mut prng = Prng::new(7);
        for _ in 0..2000 {
            let mut freed: BTreeSet<u64> = (0..prng.between(1, 20)).map(|_| prng.below(capacity)).collect();
            freed.insert(capacity - 1);
            freed.iter().for_each(|block| a.free_now(*block));
            let wanted = freed.len() as u32;
            assert_eq!(take(&mut a, wanted + 1), None);
            assert_eq!(take(&mut a, wanted).unwrap().into_iter().collect::<BTreeSet<_>>(), freed);
            assert_eq!((a.free(), a.free_below_frontier()), (0, 0));
        }
        a.check_invariants();
    }

    #[test]
    fn what_was_stored_is_loaded_and_an_empty_chunk_is_deleted() {
        let capacity = 3 * CHUNK_BLOCKS + 100;
        let mut a = allocator(capacity, capacity);
        [0, CHUNK_BLOCKS - 1, CHUNK_BLOCKS, capacity - 1].into_iter().for_each(|block| a.mark(block));
        let stored = a.take_dirty();
        assert_eq!(stored.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [0, 1, 3]);
        assert_eq!(a.take_dirty(), []);
        let mut b = Allocator::new(capacity);
        stored.iter().for_each(|(index, bytes)| b.load_chunk(*index, bytes.as_ref().unwrap()).unwrap());
        assert_eq!((b.take_dirty(), b.referenced(), b.free()), (vec![], 4, capacity - 4));
        b.set_frontier(capacity);
        b.check_invariants();
        assert_eq!((&a.referenced.words, &a.in_use.words), (&b.referenced.words, &b.in_use.words));
        a.release(CHUNK_BLOCKS);
        assert_eq!(a.take_dirty(), [(1, None)]);
        a.reuse(CHUNK_BLOCKS);
        assert_eq!(a.take_dirty(), []);
    }

    #[test]
    fn a_stored_bit_is_block_64_w_plus_b_in_little_endian_words() {
        let mut a = Allocator::new(CHUNK_BLOCKS);
        [0, 9, 64].into_iter().for_each(|block| a.mark(block));
        let bytes = a.take_dirty().remove(0).1.unwrap();
        assert_eq!((bytes.len(), &bytes[..10]), (CHUNK_BYTES, &[1u8, 2, 0, 0, 0, 0, 0, 0, 1, 0][..]));
    }

    #[test]
    fn strange_chunks_are_refused() {
        let mut a = Allocator::new(CHUNK_BLOCKS + 10);
        let mut bytes = vec![0; CHUNK_BYTES];
        assert_eq!(a.load_chunk(2, &bytes), Err(ChunkError::NoSuchChunk { index: 2, chunks: 2 }));
        assert_eq!(a.load_chunk(1, &bytes[1..]), Err(ChunkError::BadLength { index: 1, length: 4095 }));
        bytes[1] = 0b0000_0010;
        assert_eq!(a.load_chunk(1, &bytes), Ok(()));
        bytes[1] = 0b0000_0100;
        assert_eq!(a.load_chunk(1, &bytes), Err(ChunkError::BeyondCapacity { index: 1 }));
        assert_eq!(a.referenced(), 1);
    }

    /// The obvious allocator: sets of numbers.
    #[derive(Default)]
    struct Model {
        in_use: BTreeSet<u64>,
        referenced: BTreeSet<u64>,
        stored: std::collections::BTreeMap<u32, Bytes>,
    }

    fn step(a: &mut Allocator, model: &mut Model, prng: &mut Prng, most: u32) {
        let some = |set: &BTreeSet<u64>, prng: &mut Prng| {
            let from = prng.below(a.capacity());
            set.range(from..).next().or_else(|| set.first()).copied()
        };
        match prng.below(20) {
            0 => {
                let frontier = (a.frontier() + prng.below(3000)).min(a.capacity());
                a.set_frontier(frontier);
            }
            1 => {
                let block = prng.below(a.capacity());
                a.mark(block);
                model.in_use.insert(block);
                model.referenced.insert(block);
            }
            2..=8 => {
                let Some(block) = some(&model.referenced, prng) else { return };
                a.release(block);
                model.referenced.remove(&block);
            }
            9..=14 => {
                let waiting: BTreeSet<u64> = model.in_use.difference(&model.referenced).copied().collect();
                let Some(block) = some(&waiting, prng) else { return };
                a.reuse(block);
                model.in_use.remove(&block);
            }
            15 => a.take_dirty().into_iter().for_each(|(index, bytes)| match bytes {
                Some(bytes) => drop(model.stored.insert(index, bytes)),
                None => drop(model.stored.remove(&index)),
            }),
            _ => {
                let wanted = prng.between(0, u64::from(most)) as u32;
                let free = a.frontier() - model.in_use.range(..a.frontier()).count() as u64;
                assert_eq!(a.free_below_frontier(), free);
                let taken = take(a, wanted);
                assert_eq!(taken.is_some(), u64::from(wanted) <= free);
                for block in taken.into_iter().flatten() {
                    assert!(block < a.frontier() && model.in_use.insert(block) && model.referenced.insert(block));
                }
            }
        }
    }

    #[test]
    fn a_random_walk_agrees_with_sets_of_numbers_and_survives_a_restart() {
        for seed in 0..40 {
            let mut prng = Prng::new(seed);
            let capacity = prng.between(1, 3) * CHUNK_BLOCKS / prng.between(1, 40) + prng.below(100) + 1;
            let mut a = Allocator::new(capacity);
            let mut model = Model::default();
            let most = *prng.pick(&[1, 16, 300]);
            for _ in 0..1500 {
                step(&mut a, &mut model, &mut prng, most);
                assert_eq!(a.free(), capacity - model.in_use.len() as u64);
                assert_eq!(a.referenced(), model.referenced.len() as u64);
            }
            a.check_invariants();
            assert!((0..capacity).all(|block| a.is_in_use(block) == model.in_use.contains(&block)));
            assert!((0..capacity).all(|block| a.is_referenced(block) == model.referenced.contains(&block)));
            for (index, bytes) in a.take_dirty() {
                match bytes {
                    Some(bytes) => drop(model.stored.insert(index, bytes)),
                    None => drop(model.stored.remove(&index)),
                }
            }
            let mut again = Allocator::new(capacity);
            again.set_frontier(a.frontier());
            model.stored.iter().for_each(|(index, bytes)| again.load_chunk(*index, bytes).unwrap());
            again.check_invariants();
            assert_eq!(again.referenced.words, a.referenced.words);
            assert_eq!(again.in_use.words, a.referenced.words);
        }
    }

    /// Not a benchmark, a bound: a disk of 4 TiB that is full but for one block per chunk, or for one
    /// block at all, still hands out thousands of blocks in a test's time.
    #[test]
    fn a_nearly_full_disk_of_4_tib_is_searched_by_chunks_not_by_blocks() {
        let capacity = 1u64 << 30;
        let mut a = allocator(capacity, capacity);
        assert!(a.allocate(capacity as u32, &mut Extents::new()));
        for round in 0..20_000u64 {
            let block = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) % capacity;
            a.free_now(block);
            assert_eq!(take(&mut a, 1), Some(vec![block]));
        }
    }
}
