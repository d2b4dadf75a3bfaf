//! Growing a disk file ahead of its use.
//!
//! A write to space that the file system has not allocated, or has allocated but not marked as
//! written, makes the next sync commit the file system's own journal: it doubles the latency and
//! the CPU of a write (docs/performance.md, "Disk engine"). So a file grows in large steps, from a
//! thread of its own: allocate the whole step (contiguous, and a full file system says so before
//! anything is written), then write zeros, then sync. Raw devices have nothing to grow.

use super::DiskError;
use super::mailbox::Mailbox;
use super::open::{DiskFile, Medium, disk_error};
use petal::store::{DiskResult, OpId};
use rustix::fs::FallocateFlags;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

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
    pub(super) fn submit(&mut self, op: OpId, to: u64) {
        self.running.retain(|thread| !thread.is_finished());
        let (disk, file, mailbox, turn) = (self.disk, self.file.clone(), self.mailbox.clone(), self.turn.clone());
        if file.medium() == Medium::Device {
            mailbox.put([(disk, op, DiskResult::Extended(device_reaches(&file, to)))]);
            return;
        }
        let grow = move || {
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            mailbox.put([(disk, op, DiskResult::Extended(grow_to(&file, to)))]);
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

fn grow_to(file: &DiskFile, to: u64) -> Result<(), DiskError> {
    let length = file.length().map_err(|error| disk_error(file.path(), "find out the length of", &error))?;
    if length >= to {
        return Ok(());
    }
    let result = write_zeros(file, length.next_multiple_of(4096)..to)
        .and_then(|()| file.sync().map_err(|error| disk_error(file.path(), "sync", &error)));
    if result.is_err() {
        // Gives back what was allocated in vain. If this fails too there is nothing left to do.
        let _ = file.file().set_len(length);
    }
    result
}

/// Writes zeros over the range, in whole 4 KiB blocks; not yet durable.
pub(super) fn write_zeros(file: &DiskFile, range: Range<u64>) -> Result<(), DiskError> {
    assert!(range.start.is_multiple_of(4096) && range.end.is_multiple_of(4096), "zeros for whole blocks: {range:?}");
    if range.is_empty() {
        return Ok(());
    }
    if file.medium() == Medium::File {
        match rustix::fs::fallocate(file.file(), FallocateFlags::KEEP_SIZE, range.start, range.end - range.start) {
            // Where it is not supported, the writes allocate.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(disk_error(file.path(), "make room in", &errno.into())),
        }
    }
    let mut zeros = super::BufferPool::new().take(CHUNK);
    zeros.fill(0);
    let mut at = range.start;
    while at < range.end {
        let length = (range.end - at).min(CHUNK as u64);
        file.write_at(&zeros[..length as usize], at)
            .map_err(|error| disk_error(file.path(), "write zeros to", &error))?;
        at += length;
    }
    Ok(())
}
