//! Exports without a disk: for tests, and to measure what the protocol itself costs.

use crate::export::{Errno, Export, ExportError, ExportInfo, Exports, OpenError, Piece, Zeroing};
use bytes::{Bytes, BytesMut};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Pages of a region: the directory has one entry for each 2 MiB that hold data.
const REGION_PAGES: u64 = 512;
/// Extents in one answer.
const EXTENTS_MAX: usize = 8192;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Reads as zeros and forgets what is written. The zeros are sent as data, not as holes: it is there to
/// measure what the way costs.
#[derive(Clone, Copy, Debug)]
pub struct NullExport {
    /// Bytes.
    pub size: u64,
}

impl Export for NullExport {
    fn size(&self) -> u64 {
        self.size
    }
    async fn read(&self, _: u64, length: u64) -> Result<Vec<Piece>, ExportError> {
        let zeros = Bytes::from_static(&ZEROS);
        let whole = length / zeros.len() as u64;
        let rest = (length % zeros.len() as u64) as usize;
        let mut pieces = vec![Piece::Data(zeros.clone()); whole as usize];
        if rest > 0 {
            pieces.push(Piece::Data(zeros.slice(..rest)));
        }
        Ok(pieces)
    }
    async fn write(&self, _: u64, _: Bytes, _: bool) -> Result<(), ExportError> {
        Ok(())
    }
    async fn zero(&self, _: u64, _: u64, _: Zeroing) -> Result<(), ExportError> {
        Ok(())
    }
    async fn trim(&self, _: u64, _: u64, _: bool) -> Result<(), ExportError> {
        Ok(())
    }
    async fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }
    async fn extents(&self, _: u64, length: u64) -> Result<Vec<(u64, bool)>, ExportError> {
        Ok(vec![(length, false)])
    }
}

type Region = Box<[Option<Bytes>]>;

/// A sparse disk in memory: pages of 4 KiB, of which those that were never written do not exist.
/// Clones are the same disk.
#[derive(Clone)]
pub struct MemoryExport {
    size: u64,
    /// Region number (byte offset / 2 MiB) to its pages.
    regions: Rc<RefCell<BTreeMap<u64, Region>>>,
}

impl MemoryExport {
    /// A disk of `size` bytes, all zero.
    pub fn new(size: u64) -> Self {
        MemoryExport { size, regions: Rc::default() }
    }

    /// Pages of the range, each with the part of it that is meant: `(page, begin, end)`.
    fn parts(offset: u64, length: u64) -> impl Iterator<Item = (u64, usize, usize)> {
        let end = offset + length;
        (offset / PAGE..end.div_ceil(PAGE)).map(move |page| {
            let start = page * PAGE;
            (page, (offset.max(start) - start) as usize, (end.min(start + PAGE) - start) as usize)
        })
    }

    /// The page with part of it replaced.
    fn merge(old: Option<&Bytes>, begin: usize, new: &[u8]) -> Bytes {
        let mut page = BytesMut::from(old.map_or(&ZEROS[..PAGE as usize], |b| &b[..]));
        page[begin..begin + new.len()].copy_from_slice(new);
        page.freeze()
    }

    fn put(&self, offset: u64, data: &[u8]) {
        let mut regions = self.regions.borrow_mut();
        let mut data = data;
        for (page, begin, end) in Self::parts(offset, data.len() as u64) {
            let (now, later) = data.split_at(end - begin);
            data = later;
            let region = regions
                .entry(page / REGION_PAGES)
                .or_insert_with(|| vec![None; REGION_PAGES as usize].into_boxed_slice());
            let slot = &mut region[(page % REGION_PAGES) as usize];
            let whole = now.len() as u64 == PAGE;
            *slot = Some(if whole { Bytes::copy_from_slice(now) } else { Self::merge(slot.as_ref(), begin, now) });
        }
    }

    /// Makes a range zero: whole pages cease to exist, or exist as zeros if there must be no hole.
    fn clear(&self, offset: u64, length: u64, no_hole: bool) {
        let end = offset + length;
        let (first, last) = (offset.div_ceil(PAGE), end / PAGE);
        if no_hole {
            for (page, begin, end) in Self::parts(offset, length) {
                self.put(page * PAGE + begin as u64, &ZEROS[begin..end]);
            }
            return;
        }
        if first > last {
            return self.clear_part(offset, end);
        }
        self.clear_part(offset, first * PAGE);
        self.clear_part(last * PAGE, end);
        let mut regions = self.regions.borrow_mut();
        let within: Vec<u64> = regions.range(first / REGION_PAGES..last.div_ceil(REGION_PAGES)).map(|r| *r.0).collect();
        for number in within {
            let start = number * REGION_PAGES;
            let from = first.saturating_sub(start).min(REGION_PAGES) as usize;
            let to = last.saturating_sub(start).min(REGION_PAGES) as usize;
            if from == 0 && to == REGION_PAGES as usize {
                regions.remove(&number);
            } else if let Some(region) = regions.get_mut(&number) {
                region[from..to].fill(None);
            }
        }
    }

    /// Makes part of one page zero, if the page exists.
    fn clear_part(&self, offset: u64, end: u64) {
        if offset < end && self.page(offset / PAGE).is_some() {
            self.put(offset, &ZEROS[..(end - offset) as usize]);
        }
    }

    fn page(&self, page: u64) -> Option<Bytes> {
        self.regions.borrow().get(&(page / REGION_PAGES))?[(page % REGION_PAGES) as usize].clone()
    }
}

impl Export for MemoryExport {
    fn size(&self) -> u64 {
        self.size
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Vec<Piece>, ExportError> {
        let regions = self.regions.borrow();
        let mut pieces = Vec::with_capacity((length / PAGE) as usize + 1);
        for (page, begin, end) in Self::parts(offset, length) {
            let region = regions.get(&(page / REGION_PAGES));
            pieces.push(match region.and_then(|r| r[(page % REGION_PAGES) as usize].as_ref()) {
                Some(bytes) => Piece::Data(bytes.slice(begin..end)),
                None => Piece::Zero((end - begin) as u64),
            });
        }
        Ok(pieces)
    }

    async fn write(&self, offset: u64, data: Bytes, _fua: bool) -> Result<(), ExportError> {
        self.put(offset, &data);
        Ok(())
    }

    async fn zero(&self, offset: u64, length: u64, how: Zeroing) -> Result<(), ExportError> {
        if how.no_hole && how.fast_only {
            return Err(ExportError::new(Errno::NotSupported, "zeroing without holes writes every page"));
        }
        self.clear(offset, length, how.no_hole);
        Ok(())
    }

    async fn trim(&self, offset: u64, length: u64, _fua: bool) -> Result<(), ExportError> {
        self.clear(offset, length, false);
        Ok(())
    }

    async fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<(u64, bool)>, ExportError> {
        let regions = self.regions.borrow();
        let end = offset + length;
        let mut extents: Vec<(u64, bool)> = Vec::new();
        let mut at = offset;
        while at < end && extents.len() <= EXTENTS_MAX {
            let number = at / PAGE / REGION_PAGES;
            let (next, allocated) = match regions.get(&number) {
                Some(region) => (at / PAGE + 1, region[(at / PAGE % REGION_PAGES) as usize].is_some()),
                // On to the next region that exists, however far it is.
                None => (regions.range(number..).next().map_or(u64::MAX / PAGE, |r| r.0 * REGION_PAGES), false),
            };
            let next = (next * PAGE).min(end);
            match extents.last_mut() {
                Some(last) if last.1 == allocated => last.0 += next - at,
                _ => extents.push((next - at, allocated)),
            }
            at = next;
        }
        Ok(extents)
    }
}

/// A fixed list of exports, which exist for as long as the server does.
pub struct StaticExports<E>(Vec<(ExportInfo, E)>);

impl<E: Export + Clone> StaticExports<E> {
    /// These exports, by name and description.
    pub fn new(exports: Vec<(&str, &str, E)>) -> Self {
        let described = exports.into_iter().map(|(name, description, export)| {
            let (size, read_only) = (export.size(), export.read_only());
            (ExportInfo { name: name.into(), description: description.into(), size, read_only }, export)
        });
        StaticExports(described.collect())
    }
}

impl<E: Export + Clone> Exports for StaticExports<E> {
    type Export = E;

    async fn list(&self) -> Result<Vec<ExportInfo>, OpenError> {
        Ok(self.0.iter().map(|(info, _)| info.clone()).collect())
    }

    async fn open(&self, name: &str) -> Result<E, OpenError> {
        let found = self.0.iter().find(|(info, _)| info.name == name);
        found.map(|(_, export)| export.clone()).ok_or_else(|| OpenError::NotFound(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Futures of this file never wait.
    fn now<T>(future: impl Future<Output = T>) -> T {
        let mut future = std::pin::pin!(future);
        match future.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
            std::task::Poll::Ready(value) => value,
            std::task::Poll::Pending => unreachable!("memory does not wait"),
        }
    }

    fn bytes_of(pieces: Vec<Piece>) -> Vec<u8> {
        let mut all = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Data(bytes) => all.extend_from_slice(&bytes),
                Piece::Zero(length) => all.resize(all.len() + length as usize, 0),
            }
        }
        all
    }

    const SIZE: u64 = 5 << 20;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn memory_disk_reads_what_a_plain_array_reads(
            steps in proptest::collection::vec((0..4u8, 0..SIZE, 1..1_500_000u64, any::<u8>()), 1..20)
        ) {
            let disk = MemoryExport::new(SIZE);
            let mut model = vec![0u8; SIZE as usize];
            for (kind, offset, length, byte) in steps {
                let length = length.min(SIZE - offset);
                let range = offset as usize..(offset + length) as usize;
                match kind {
                    0 => {
                        model[range.clone()].fill(byte);
                        now(disk.write(offset, vec![byte; length as usize].into(), false)).unwrap();
                    }
                    1 | 2 => {
                        model[range.clone()].fill(0);
                        let how = Zeroing { no_hole: kind == 2, ..Zeroing::default() };
                        now(disk.zero(offset, length, how)).unwrap();
                    }
                    _ => {
                        model[range.clone()].fill(0);
                        now(disk.trim(offset, length, false)).unwrap();
                    }
                }
                prop_assert!(bytes_of(now(disk.read(0, SIZE)).unwrap()) == model);
                prop_assert!(bytes_of(now(disk.read(offset, length)).unwrap()) == model[range]);
                let mut at = offset;
                for (extent, allocated) in now(disk.extents(offset, length)).unwrap() {
                    let range = at as usize..(at + extent) as usize;
                    prop_assert!(allocated || model[range].iter().all(|b| *b == 0));
                    at += extent;
                }
                prop_assert_eq!(at, offset + length);
            }
        }
    }
}
