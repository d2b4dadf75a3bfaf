//! The pages below redb, each checked on every read.
//!
//! redb does not look at its page checksums when it reads. A page that rotted could hide a key, and a
//! hidden key reads as zeros: a wrong answer instead of an error (invariant of 2.10). So this file,
//! which is redb's `StorageBackend`, keeps a CRC-32C per 4 KiB page in memory and in a table at the
//! beginning of the region, and fails the read that does not match.
//!
//! ```text
//! region:   | head A | head B | table of checksums: 4 bytes per page | page 0 (unused), 1, 2, ...     |
//!           0        4K       8K                                     then 4 KiB each
//! head:     magic 8 | crc 4 | bytes of page 0: 4 | sequence 8 | region length 8 | redb length 8 | redb's page 0
//! checksum: crc32c(page number as 8 bytes || page), 1 instead of 0; 0 = never written
//! ```
//!
//! All integers little-endian. redb's page 0 (its header; 320 bytes, the only thing that redb writes in
//! place) lives in the heads, with the length of redb's "file": a head is one checksummed whole.
//!
//! # Small regions
//! redb doubles its file until it is 4 GiB long and then grows by 4 GiB: up to half of a region of ours
//! could never be used. The size of its steps is a field of its header, but its builder has no setting
//! for it; so we put a smaller number into the header when the database is made
//! ([`redb_region_pages`]), and from then on redb reads and writes that one.
//!
//! # Why no crash makes a false mismatch
//! Between two syncs redb writes only pages that the last durable commit does not refer to, and page 0;
//! with two-phase commit (the only kind used here) page 0 begins to refer to new pages only after a
//! sync that covers them. So after a crash redb reads only pages that were written before a sync that
//! returned, and their checksums were written before that same sync. A sector of the table also holds
//! checksums of neighbours that did not change: it is rewritten with the same bytes for them, so it does
//! not matter whether the old or the new sector survives. We assume that a sector of 512 bytes is
//! written wholly or not at all (docs/on-disk-format.md, "what we assume of disks").
//!
//! # Why heads are written twice, with a sync between
//! A sync that changed the head writes A with everything else, syncs, writes B, syncs. So when it
//! returns both copies hold the new head: a copy that rots later is answered by the other one, and
//! never by an older one. A crash in between leaves one new and one old copy, or one torn: either is a
//! state that was never reported. Opening makes the copies equal before redb sees them.

use super::super::buffer::{Buffer, BufferPool};
use petal::store::DiskError;
use redb::StorageBackend;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A page: redb's, and the unit of checking.
pub(super) const PAGE: usize = 4096;
const HEAD_MAGIC: &[u8; 8] = b"PETALPM1";
const HEAD_FIELDS: usize = 40;
const HEAD_BYTES_MAX: usize = PAGE - HEAD_FIELDS;
/// What redb's page 0 begins with once its database is there.
const REDB_MAGIC: &[u8] = b"redb\x1a\x0a";
/// In redb's header: bytes per page, and pages per redb region, both 4 bytes.
const REDB_PAGE_SIZE_AT: usize = 12;
const REDB_REGION_PAGES_AT: usize = 20;
/// What redb writes there by itself: regions of 4 GiB.
const REDB_REGION_PAGES: u32 = 1 << 20;
/// Table entries per page of the table.
const SUMS_PER_PAGE: usize = PAGE / 4;
/// Written pages that may wait in memory, to be written in long sequential runs: 4 MiB.
const PENDING_MAX: usize = 1024;
/// Pages of one write.
const RUN_MAX: usize = 256;
/// Smallest region: redb begins with 1 MiB and wants room to grow.
pub(super) const REGION_MIN: u64 = 4 << 20;

/// Where the pages lie: a region of a disk, or what a test pretends. Buffers are aligned, offsets
/// count from the beginning of the region and are multiples of 4 KiB.
pub(super) trait Region: Send + 'static {
    /// Fills the buffer.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), DiskError>;
    /// Writes; not yet durable.
    fn write_at(&self, buffer: &[u8], offset: u64) -> Result<(), DiskError>;
    /// What was written is on stable storage when this returns.
    fn sync(&self) -> Result<(), DiskError>;
    /// Bytes.
    fn length(&self) -> u64;
}

/// Where things are in a region of some length.
#[derive(Clone, Copy)]
struct Layout {
    table_pages: u64,
    pages: u64,
}

impl Layout {
    fn of(length: u64) -> Layout {
        let after_heads = (length / PAGE as u64).saturating_sub(2);
        // n pages of the table serve n * 1024 pages: one in 1,025.
        let table_pages = after_heads.div_ceil(SUMS_PER_PAGE as u64 + 1);
        Layout { table_pages, pages: after_heads - table_pages }
    }
    fn table(self) -> u64 {
        2 * PAGE as u64
    }
    fn page(self, number: u64) -> u64 {
        self.table() + (self.table_pages + number) * PAGE as u64
    }
}

/// Pages per redb region: at most a 256th of our region stays unused at its end, but regions are not so
/// many that their bookkeeping is felt.
fn redb_region_pages(length: u64) -> u32 {
    let bytes = (length / 256).next_power_of_two().clamp(2 << 20, 1 << 30);
    (bytes / PAGE as u64) as u32
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Head {
    sequence: u64,
    region_length: u64,
    redb_length: u64,
    page_zero: Vec<u8>,
}

impl Head {
    fn empty(region_length: u64) -> Head {
        Head { sequence: 1, region_length, redb_length: 0, page_zero: Vec::new() }
    }

    fn encode(&self, out: &mut [u8]) {
        out.fill(0);
        out[12..16].copy_from_slice(&(self.page_zero.len() as u32).to_le_bytes());
        out[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        out[24..32].copy_from_slice(&self.region_length.to_le_bytes());
        out[32..40].copy_from_slice(&self.redb_length.to_le_bytes());
        out[HEAD_FIELDS..HEAD_FIELDS + self.page_zero.len()].copy_from_slice(&self.page_zero);
        let crc = stdx::checksum::crc32c(&out[12..]);
        out[..8].copy_from_slice(HEAD_MAGIC);
        out[8..12].copy_from_slice(&crc.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Option<Head> {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let length = u32_at(12) as usize;
        if &bytes[..8] != HEAD_MAGIC || u32_at(8) != stdx::checksum::crc32c(&bytes[12..]) || length > HEAD_BYTES_MAX {
            return None;
        }
        let page_zero = bytes[HEAD_FIELDS..HEAD_FIELDS + length].to_vec();
        Some(Head { sequence: u64_at(16), region_length: u64_at(24), redb_length: u64_at(32), page_zero })
    }
}

fn sum_of(number: u64, page: &[u8]) -> u32 {
    let crc = stdx::checksum::crc32c(&number.to_le_bytes());
    stdx::checksum::crc32c_append(crc, page).max(1)
}

/// Makes an empty store of the region. Everything else of the region keeps its bytes: the table is
/// written as redb's length grows over it, and pages without a checksum are never read.
pub(super) fn format(region: &impl Region) -> Result<(), DiskError> {
    let length = region.length();
    if length < REGION_MIN {
        return Err(DiskError::Io(format!("a region of {length} bytes is too small for a PMap store ({REGION_MIN})")));
    }
    let mut head = BufferPool::new().take(PAGE);
    Head::empty(length).encode(&mut head);
    region.write_at(&head, 0)?;
    region.write_at(&head, PAGE as u64)?;
    region.sync()
}

/// The checked pages of one region; redb owns one clone, the thread around it another.
#[derive(Clone)]
pub(super) struct CheckedPages(Arc<Mutex<Pages>>);

struct Pages {
    region: Box<dyn Region>,
    layout: Layout,
    pool: BufferPool,
    head: Head,
    head_changed: bool,
    /// redb has not yet made its database.
    creating: bool,
    /// Of redb's length, in whole pages of the table.
    sums: Vec<u32>,
    /// Pages of the table that differ from the disk.
    sums_changed: BTreeSet<u64>,
    /// Written, but not yet handed to the region.
    pending: BTreeMap<u64, Buffer>,
    /// The first thing that went wrong; from then on nothing works, so that redb cannot write on the
    /// ground of what it could not read.
    fault: Option<DiskError>,
}

impl CheckedPages {
    /// Opens the region: finds the newest head and reads the table.
    pub(super) fn open(region: impl Region) -> Result<CheckedPages, DiskError> {
        let length = region.length();
        let layout = Layout::of(length);
        let pool = BufferPool::new();
        let mut heads = pool.take(2 * PAGE);
        region.read_at(&mut heads, 0)?;
        let copies = [Head::decode(&heads[..PAGE]), Head::decode(&heads[PAGE..])];
        let newest = copies.iter().flatten().max_by_key(|head| head.sequence).cloned();
        let Some(head) = newest else {
            return Err(damaged("both copies of its head are unreadable"));
        };
        if head.region_length != length || head.redb_length > layout.pages * PAGE as u64 {
            return Err(damaged(format!("its head is of a region of {} bytes, not {length}", head.region_length)));
        }
        heads.truncate_to(PAGE);
        head.encode(&mut heads);
        for (copy, at) in copies.iter().zip([0, PAGE as u64]) {
            if copy.as_ref() != Some(&head) {
                region.write_at(&heads, at)?;
                region.sync()?;
            }
        }
        let sums = read_table(&region, layout, head.redb_length, &pool)?;
        let pages = Pages {
            region: Box::new(region),
            layout,
            pool,
            creating: !head.page_zero.starts_with(REDB_MAGIC),
            head,
            head_changed: false,
            sums,
            sums_changed: BTreeSet::new(),
            pending: BTreeMap::new(),
            fault: None,
        };
        Ok(CheckedPages(Arc::new(Mutex::new(pages))))
    }

    /// What went wrong first, if anything did.
    pub(super) fn fault(&self) -> Option<DiskError> {
        self.lock().fault.clone()
    }

    /// Lets nothing through any more: after a panic of redb nobody knows what it would write.
    pub(super) fn kill(&self, why: DiskError) {
        self.lock().fault.get_or_insert(why);
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` unless something went wrong before; remembers what goes wrong.
    fn guarded<T>(&self, work: impl FnOnce(&mut Pages) -> Result<T, DiskError>) -> io::Result<T> {
        let mut pages = self.lock();
        let result = match &pages.fault {
            Some(fault) => Err(fault.clone()),
            None => work(&mut pages),
        };
        result.map_err(|error| {
            let text = error.to_string();
            pages.fault.get_or_insert(error);
            io::Error::other(text)
        })
    }
}

fn damaged(why: impl Into<String>) -> DiskError {
    DiskError::PmapDamaged(why.into())
}

/// Pages of the table that serve a redb file of this length.
fn table_pages_of(redb_length: u64) -> u64 {
    redb_length.div_ceil((PAGE * SUMS_PER_PAGE) as u64)
}

fn read_table(
    region: &impl Region,
    layout: Layout,
    redb_length: u64,
    pool: &BufferPool,
) -> Result<Vec<u32>, DiskError> {
    let table_pages = table_pages_of(redb_length);
    let mut sums = Vec::with_capacity(table_pages as usize * SUMS_PER_PAGE);
    let mut at = 0;
    while at < table_pages {
        let pages = (table_pages - at).min(RUN_MAX as u64);
        let mut run = pool.take(pages as usize * PAGE);
        region.read_at(&mut run, layout.table() + at * PAGE as u64)?;
        sums.extend(run.chunks_exact(4).map(|sum| u32::from_le_bytes(sum.try_into().expect("4 bytes"))));
        at += pages;
    }
    Ok(sums)
}

impl Pages {
    fn read(&mut self, offset: u64, out: &mut [u8]) -> Result<(), DiskError> {
        let end = offset + out.len() as u64;
        if end > self.head.redb_length {
            return Err(damaged(format!("a read ends at {end}, behind its {} bytes", self.head.redb_length)));
        }
        if offset < PAGE as u64 {
            self.read_page_zero(offset as usize, out);
            return Ok(());
        }
        if !is_whole_pages(offset, out.len()) {
            return Err(damaged(format!("a read of {} bytes at {offset} is not of whole pages", out.len())));
        }
        let first = offset / PAGE as u64;
        let mut run = self.pool.take(out.len());
        self.region.read_at(&mut run, self.layout.page(first))?;
        for (index, page) in run.chunks_exact_mut(PAGE).enumerate() {
            let number = first + index as u64;
            match self.pending.get(&number) {
                Some(written) => page.copy_from_slice(written),
                None => self.check(number, page)?,
            }
        }
        out.copy_from_slice(&run);
        Ok(())
    }

    fn read_page_zero(&self, offset: usize, out: &mut [u8]) {
        out.fill(0);
        if let Some(present) = self.head.page_zero.get(offset..) {
            let length = present.len().min(out.len());
            out[..length].copy_from_slice(&present[..length]);
        }
    }

    fn check(&self, number: u64, page: &[u8]) -> Result<(), DiskError> {
        match self.sums[number as usize] {
            0 => Err(damaged(format!("page {number} was never written"))),
            sum if sum == sum_of(number, page) => Ok(()),
            sum => Err(damaged(format!(
                "page {number} has checksum {:08x}, its table says {sum:08x}",
                sum_of(number, page)
            ))),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        if offset < PAGE as u64 {
            return self.write_page_zero(offset as usize, data);
        }
        let end = offset + data.len() as u64;
        if !is_whole_pages(offset, data.len()) || end > self.head.redb_length {
            return Err(damaged(format!("a write of {} bytes at {offset} is not of its pages", data.len())));
        }
        let first = offset / PAGE as u64;
        for (index, page) in data.chunks_exact(PAGE).enumerate() {
            let number = first + index as u64;
            self.set_sum(number, sum_of(number, page));
            let mut copy = self.pool.take(PAGE);
            copy.copy_from_slice(page);
            self.pending.insert(number, copy);
        }
        if self.pending.len() >= PENDING_MAX { self.write_pending() } else { Ok(()) }
    }

    fn write_page_zero(&mut self, offset: usize, data: &[u8]) -> Result<(), DiskError> {
        let end = offset + data.len();
        if end > HEAD_BYTES_MAX {
            return Err(damaged(format!("redb's header has grown to {end} bytes")));
        }
        let length = self.head.page_zero.len().max(end);
        self.head.page_zero.resize(length, 0);
        self.head.page_zero[offset..end].copy_from_slice(data);
        self.head_changed = true;
        if self.creating {
            self.make_regions_small();
        }
        Ok(())
    }

    fn make_regions_small(&mut self) {
        let number_at = |bytes: &[u8], at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
        let page_zero = &mut self.head.page_zero;
        // Another version of redb may have other ideas; then its regions stay as they are.
        if number_at(page_zero, REDB_PAGE_SIZE_AT) == Some(PAGE as u32)
            && number_at(page_zero, REDB_REGION_PAGES_AT) == Some(REDB_REGION_PAGES)
        {
            let pages = redb_region_pages(self.head.region_length).to_le_bytes();
            page_zero[REDB_REGION_PAGES_AT..REDB_REGION_PAGES_AT + 4].copy_from_slice(&pages);
        }
    }

    fn set_sum(&mut self, number: u64, sum: u32) {
        let entry = &mut self.sums[number as usize];
        if *entry != sum {
            *entry = sum;
            self.sums_changed.insert(number / SUMS_PER_PAGE as u64);
        }
    }

    fn set_length(&mut self, length: u64) -> Result<(), DiskError> {
        let room = self.layout.pages * PAGE as u64;
        if length > room {
            return Err(DiskError::Io(format!("the PMap store's region is full: it holds {room} bytes")));
        }
        let old = self.head.redb_length;
        let covered = (self.sums.len() / SUMS_PER_PAGE) as u64;
        let needed = table_pages_of(length);
        if needed > covered {
            // Memory follows redb's length, not the region's. What lies on the disk there is not ours.
            self.sums.resize(needed as usize * SUMS_PER_PAGE, 0);
            self.sums_changed.extend(covered..needed);
        }
        // What is cut off reads as never written if it comes back.
        for number in length.div_ceil(PAGE as u64)..old.div_ceil(PAGE as u64) {
            self.set_sum(number, 0);
            self.pending.remove(&number);
        }
        self.head.redb_length = length;
        self.head_changed |= length != old;
        Ok(())
    }

    /// Hands waiting pages to the region, neighbours in one write.
    fn write_pending(&mut self) -> Result<(), DiskError> {
        let pending = std::mem::take(&mut self.pending);
        let mut run: Vec<(u64, Buffer)> = Vec::new();
        for (number, page) in pending {
            let follows = run.last().is_some_and(|(last, _)| last + 1 == number);
            if !follows || run.len() == RUN_MAX {
                self.write_run(&run)?;
                run.clear();
            }
            run.push((number, page));
        }
        self.write_run(&run)
    }

    fn write_run(&self, run: &[(u64, Buffer)]) -> Result<(), DiskError> {
        let Some((first, page)) = run.first() else { return Ok(()) };
        if run.len() == 1 {
            return self.region.write_at(page, self.layout.page(*first));
        }
        let mut bytes = self.pool.take(run.len() * PAGE);
        for (place, (_, page)) in bytes.chunks_exact_mut(PAGE).zip(run) {
            place.copy_from_slice(page);
        }
        self.region.write_at(&bytes, self.layout.page(*first))
    }

    fn write_table(&mut self) -> Result<(), DiskError> {
        for table_page in std::mem::take(&mut self.sums_changed) {
            let mut bytes = self.pool.take(PAGE);
            let first = table_page as usize * SUMS_PER_PAGE;
            for (place, sum) in bytes.chunks_exact_mut(4).zip(&self.sums[first..first + SUMS_PER_PAGE]) {
                place.copy_from_slice(&sum.to_le_bytes());
            }
            self.region.write_at(&bytes, self.layout.table() + table_page * PAGE as u64)?;
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), DiskError> {
        self.write_pending()?;
        self.write_table()?;
        // A database that redb has only begun to make (no magic yet) is none: after a crash it is made anew.
        if !self.head_changed || !self.head.page_zero.starts_with(REDB_MAGIC) {
            return self.region.sync();
        }
        self.head.sequence += 1;
        let mut head = self.pool.take(PAGE);
        self.head.encode(&mut head);
        self.region.write_at(&head, 0)?;
        self.region.sync()?;
        self.region.write_at(&head, PAGE as u64)?;
        self.region.sync()?;
        self.head_changed = false;
        self.creating = false;
        Ok(())
    }
}

fn is_whole_pages(offset: u64, length: usize) -> bool {
    offset.is_multiple_of(PAGE as u64) && length.is_multiple_of(PAGE)
}

impl std::fmt::Debug for CheckedPages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CheckedPages")
    }
}

impl StorageBackend for CheckedPages {
    fn len(&self) -> io::Result<u64> {
        self.guarded(|pages| Ok(pages.head.redb_length))
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.guarded(|pages| pages.read(offset, out))
    }
    fn set_len(&self, length: u64) -> io::Result<()> {
        self.guarded(|pages| pages.set_length(length))
    }
    fn sync_data(&self) -> io::Result<()> {
        self.guarded(Pages::sync)
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.guarded(|pages| pages.write(offset, data))
    }
}
