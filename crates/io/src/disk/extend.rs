//! Growing a disk file ahead of its use.
//!
//! A write to space that the file system has not allocated, or has allocated but not marked as
//! written, makes the next sync commit the file system's own journal: it doubles the latency and
//! the CPU of a write (docs/performance.md, "Disk engine"). So a file grows in large steps, from a
//! thread of its own:
//!
//! 1. allocate the whole step: contiguous, and a full file system says so before anything is written;
//! 2. make the file longer: writes that do not move its end need no exclusive lock on the file, so the
//!    server's own writes go on beside them;
//! 3. write zeros, resting after each chunk for as long as it took: half of the disk stays free;
//! 4. sync.
//!
//! Where the file is used up by large batches (a lost copy is made again, a disk is filled), zeros would be
//! written beside as much data, and the data would wait for them: such a step is in a hurry and leaves
//! out 3, as a crash between 2 and 4 does. The tail is then allocated but not written: correct (it reads as
//! zeros), and slow for the first write to each block. Raw devices have nothing to grow.

use super::DiskError;
use super::mailbox::Mailbox;
use super::open::{DiskFile, Medium, disk_error};
use petal::store::{DiskResult, OpId};
use rustix::fs::FallocateFlags;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// Bytes of one write of zeros: the largest that does not hold up a small write behind it by more than
/// a millisecond on the slowest of today's solid-state disks.
const CHUNK: usize = 1 << 20;

/// Grows one disk; steps of one disk follow each other.
pub(super) struct Extender {
    disk: usize,
    file: Arc<DiskFile>,
    mailbox: Arc<Mailbox>,
    turn: Arc<Mutex<()>>,
    running: Vec<JoinHandle<()>>,
}

impl Extender {
    pub(super) fn new(disk: usize, file: Arc<DiskFile>, mailbox: Arc<Mailbox>) -> Extender {
        Extender { disk, file, mailbox, turn: Arc::default(), running: Vec::new() }
    }

    /// Begins to grow the disk to `to`; the mailbox gets the answer.
    pub(super) fn submit(&mut self, op: OpId, to: u64, hurry: bool) {
        self.running.retain(|thread| !thread.is_finished());
        let (disk, file, mailbox, turn) = (self.disk, self.file.clone(), self.mailbox.clone(), self.turn.clone());
        if file.medium() == Medium::Device {
            mailbox.put([(disk, op, DiskResult::Extended(device_reaches(&file, to)))]);
            return;
        }
        let grow = move || {
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            mailbox.put([(disk, op, DiskResult::Extended(grow_to(&file, to, hurry)))]);
        };
        // One thread per step: steps are rare, and an idle thread would cost memory for ever.
        let thread = std::thread::Builder::new().name(format!("extend-{disk}")).spawn(grow);
        match thread {
            Ok(thread) => self.running.push(thread),
            Err(error) => {
                let error = disk_error(self.file.path(), "start a thread to grow", &error);
                self.mailbox.put([(disk, op, DiskResult::Extended(Err(error)))]);
            }
        }
    }
}

impl Drop for Extender {
    /// Waits: a thread left behind would hold the disk's lock.
    fn drop(&mut self) {
        for thread in self.running.drain(..) {
            let _ = thread.join();
        }
    }
}

fn device_reaches(file: &DiskFile, to: u64) -> Result<(), DiskError> {
    match file.length() {
        Ok(capacity) if to <= capacity => Ok(()),
        Ok(capacity) => Err(DiskError::HostFull(format!("{} ends at byte {capacity}", file.path().display()))),
        Err(error) => Err(disk_error(file.path(), "find out the size of", &error)),
    }
}

fn grow_to(file: &DiskFile, to: u64, hurry: bool) -> Result<(), DiskError> {
    let length = file.length().map_err(|error| disk_error(file.path(), "find out the length of", &error))?;
    if length >= to {
        return Ok(());
    }
    // What is not reserved is written in any case: else the file system could be full when data come.
    let result = allocate(file, length..to)
        .and_then(|is_reserved| match file.file().set_len(to) {
            Ok(()) => Ok(hurry && is_reserved),
            Err(error) => Err(disk_error(file.path(), "grow", &error)),
        })
        .and_then(|is_enough| match is_enough {
            true => Ok(()),
            false => zero(file, length.next_multiple_of(4096)..to, Pace::Half),
        })
        .and_then(|()| file.sync().map_err(|error| disk_error(file.path(), "sync", &error)));
    if result.is_err() {
        // Gives back what was allocated in vain. If this fails too there is nothing left to do.
        let _ = file.file().set_len(length);
    }
    result
}

/// Writes zeros over the range, in whole 4 KiB blocks, as fast as it goes; not yet durable.
pub(super) fn write_zeros(file: &DiskFile, range: Range<u64>) -> Result<(), DiskError> {
    if file.medium() == Medium::File && !range.is_empty() {
        allocate(file, range.clone())?;
    }
    zero(file, range, Pace::Full)
}

/// Reserves space in the file system without changing the file's length; false if it cannot.
fn allocate(file: &DiskFile, range: Range<u64>) -> Result<bool, DiskError> {
    match rustix::fs::fallocate(file.file(), FallocateFlags::KEEP_SIZE, range.start, range.end - range.start) {
        Ok(()) => Ok(true),
        // The writes allocate.
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(false),
        Err(errno) => Err(disk_error(file.path(), "make room in", &errno.into())),
    }
}

/// How much of the disk's time zeros may take.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// All: nobody else uses the disk.
    Full,
    /// Half.
    Half,
}

fn zero(file: &DiskFile, range: Range<u64>, pace: Pace) -> Result<(), DiskError> {
    assert!(range.start.is_multiple_of(4096) && range.end.is_multiple_of(4096), "zeros for whole blocks: {range:?}");
    let mut zeros = super::BufferPool::new().take(CHUNK);
    zeros.fill(0);
    let mut at = range.start;
    while at < range.end {
        let begun = Instant::now();
        let length = (range.end - at).min(CHUNK as u64);
        file.write_at(&zeros[..length as usize], at)
            .map_err(|error| disk_error(file.path(), "write zeros to", &error))?;
        at += length;
        if pace == Pace::Half {
            std::thread::sleep(begun.elapsed());
        }
    }
    Ok(())
}
