//! The engine on io_uring: one ring for all disks of a server, on the reactor's own thread.
//!
//! `submit` only makes a note, `flush` hands everything to the kernel with one system call, and
//! `completions` looks into shared memory. The ring tells the reactor through the doorbell's eventfd;
//! signals are switched off while the reactor is awake anyway, so a busy engine costs no wake-ups.
//!
//! Ownership: every buffer that the kernel may touch lies in `ops` until its completion was seen.
//! Dropping the engine waits for all of them; if even that fails, the memory is leaked rather than freed.
//!
//! How it fails: an error of the kernel on an operation is that operation's answer. A ring that does
//! not take submissions any more is a broken kernel interface, and panics.

#![allow(unsafe_code)]

use super::buffer::{Buffer, BufferPool};
use super::group::Group;
use super::mailbox::{Answer, Doorbell, Mailbox};
use super::open::{DiskFile, disk_error};
use super::{EngineDisk, EngineOptions, SlowPaths, check_blocks, syncs_each_write, total};
use crate::engine::DiskEngine;
use io_uring::{IoUring, opcode, squeue, types};
use petal::store::{DiskCommand, DiskError, DiskResult, OpId};
use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::task::{Context, Poll};

/// Entries of the ring. What does not fit waits in `backlog`; the completion queue is twice as long, so
/// it cannot overflow.
const ENTRIES: u32 = 256;

/// One operation that the kernel has, or will get.
enum Op {
    /// The place is free.
    None,
    /// A read; `done` bytes are there.
    Read { disk: usize, op: OpId, offset: u64, buffer: Buffer, done: usize },
    /// A write; `done` bytes are written.
    Write { disk: usize, op: OpId, serial: u64, offset: u64, buffer: Buffer, done: usize },
    /// A sync of everything that had ended.
    Sync { disk: usize },
}

struct Disk {
    file: Arc<DiskFile>,
    /// RWF_DSYNC on each write instead of grouped syncs.
    each: bool,
    group: Group<OpId>,
}

/// See the head of the file.
pub struct UringEngine {
    ring: IoUring,
    ops: Vec<Op>,
    free: Vec<usize>,
    /// Places in `ops` that the kernel has not been given.
    backlog: VecDeque<usize>,
    /// Number of places in `ops` that the kernel has.
    in_kernel: usize,
    disks: Vec<Disk>,
    answers: Vec<Answer>,
    pool: BufferPool,
    slow: SlowPaths,
    mailbox: Arc<Mailbox>,
    doorbell: Doorbell,
    /// The ring takes submissions only from the thread that made it.
    _not_send: PhantomData<*const ()>,
}

impl UringEngine {
    /// Starts the engine; must be called on the thread on which it will be used.
    ///
    /// # Errors
    /// The kernel has no io_uring or refuses it, or there is no thread to be had.
    pub fn start(disks: Vec<EngineDisk>, options: &EngineOptions) -> io::Result<UringEngine> {
        let ring = make_ring()?;
        let (doorbell, mailbox) = Doorbell::new()?;
        ring.submitter().register_eventfd(doorbell.raw_fd())?;
        let slow = SlowPaths::start(&disks, options, &mailbox)?;
        let disks = disks
            .into_iter()
            .map(|disk| Disk {
                each: syncs_each_write(options.durability, &disk.file),
                file: disk.file,
                group: Group::default(),
            })
            .collect();
        Ok(UringEngine {
            ring,
            ops: Vec::new(),
            free: Vec::new(),
            backlog: VecDeque::new(),
            in_kernel: 0,
            disks,
            answers: Vec::new(),
            pool: BufferPool::new(),
            slow,
            mailbox,
            doorbell,
            _not_send: PhantomData,
        })
    }

    /// Blocks until there may be completions: for tools without a reactor.
    pub fn wait(&mut self) {
        self.allow_signals(true);
        if !self.anything_there() {
            self.doorbell.wait();
        }
        self.allow_signals(false);
    }

    fn begin(&mut self, op: Op) {
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                self.ops.push(Op::None);
                self.ops.len() - 1
            }
        };
        self.ops[place] = op;
        self.backlog.push_back(place);
    }

    fn finish(&mut self, place: usize) -> Op {
        self.free.push(place);
        std::mem::replace(&mut self.ops[place], Op::None)
    }

    /// Gives the kernel as much of the backlog as the ring holds.
    fn pump(&mut self) {
        while !self.backlog.is_empty() {
            while self.in_kernel < ENTRIES as usize {
                let Some(place) = self.backlog.pop_front() else { break };
                let entry = self.entry(place);
                // SAFETY: the entry points into a buffer that `ops[place]` owns. The place is given up
                // only in `complete`, when the kernel is done with it, and `drop` waits for that.
                let pushed = unsafe { self.ring.submission().push(&entry) };
                if pushed.is_err() {
                    self.backlog.push_front(place);
                    break;
                }
                self.in_kernel += 1;
            }
            self.enter(0);
            if self.in_kernel >= ENTRIES as usize {
                break;
            }
        }
    }

    /// One system call: submits what is in the ring, waits for `want` completions.
    fn enter(&mut self, want: usize) {
        for _ in 0..10_000 {
            match self.ring.submitter().submit_and_wait(want) {
                Ok(_) if self.ring.submission().is_empty() => return,
                Ok(_) => {}
                // Memory or the completion queue is short for the moment.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    std::thread::sleep(std::time::Duration::from_micros(100));
                }
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => panic!("io_uring does not take submissions any more: {error}"),
            }
        }
        panic!("io_uring takes no submissions for a second");
    }

    fn entry(&mut self, place: usize) -> squeue::Entry {
        let entry = match &mut self.ops[place] {
            Op::None => unreachable!("the backlog has only operations"),
            Op::Read { disk, offset, buffer, done, .. } => {
                let fd = types::Fd(self.disks[*disk].file.as_fd().as_raw_fd());
                let rest = (buffer.len() - *done) as u32;
                // SAFETY (of the address): `done` is below the buffer's length.
                let at = unsafe { buffer.as_mut_ptr().add(*done) };
                opcode::Read::new(fd, at, rest).offset(*offset + *done as u64).build()
            }
            Op::Write { disk, offset, buffer, done, .. } => {
                let disk = &self.disks[*disk];
                let fd = types::Fd(disk.file.as_fd().as_raw_fd());
                let rest = (buffer.len() - *done) as u32;
                // SAFETY (of the address): `done` is below the buffer's length.
                let at = unsafe { buffer.as_mut_ptr().add(*done) };
                let flags = if disk.each { libc::RWF_DSYNC } else { 0 };
                opcode::Write::new(fd, at, rest).offset(*offset + *done as u64).rw_flags(flags).build()
            }
            Op::Sync { disk } => {
                let fd = types::Fd(self.disks[*disk].file.as_fd().as_raw_fd());
                opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build()
            }
        };
        entry.user_data(place as u64)
    }

    /// Takes what the kernel has finished, and begins the syncs that this calls for.
    fn reap(&mut self) {
        let pending = {
            let submission = self.ring.submission();
            submission.taskrun() || submission.cq_overflow()
        };
        if pending {
            self.enter(0);
        }
        loop {
            let Some(entry) = self.ring.completion().next() else { break };
            self.in_kernel -= 1;
            self.complete(entry.user_data() as usize, entry.result());
        }
        for disk in 0..self.disks.len() {
            if self.disks[disk].group.begin_sync() {
                self.begin(Op::Sync { disk });
            }
        }
    }

    fn complete(&mut self, place: usize, result: i32) {
        if matches!(-result, libc::EINTR | libc::EAGAIN) {
            self.backlog.push_back(place);
            return;
        }
        let moved = u32::try_from(result).map(|moved| moved as usize);
        let moved = moved.map_err(|_| io::Error::from_raw_os_error(-result));
        match &mut self.ops[place] {
            Op::None => unreachable!("a completion of nothing"),
            Op::Read { .. } => self.complete_read(place, moved),
            Op::Write { .. } => self.complete_write(place, moved),
            Op::Sync { disk } => {
                let disk = *disk;
                self.finish(place);
                self.complete_sync(disk, moved);
            }
        }
    }

    fn complete_read(&mut self, place: usize, moved: io::Result<usize>) {
        let Op::Read { buffer, done, .. } = &mut self.ops[place] else { unreachable!("asked for a read") };
        if let Ok(moved @ 1..) = moved {
            *done += moved;
            if *done < buffer.len() && done.is_multiple_of(4096) {
                self.backlog.push_back(place);
                return;
            }
        }
        let Op::Read { disk, op, mut buffer, done, .. } = self.finish(place) else { unreachable!("as above") };
        let result = match moved {
            Ok(_) => {
                // The file ends here: what is behind it reads as zeros.
                buffer[done..].fill(0);
                Ok(buffer.into_bytes())
            }
            Err(error) => Err(self.error(disk, "read", &error)),
        };
        self.answers.push((disk, op, DiskResult::Read(result)));
    }

    fn complete_write(&mut self, place: usize, moved: io::Result<usize>) {
        let Op::Write { buffer, done, .. } = &mut self.ops[place] else { unreachable!("asked for a write") };
        let moved = match moved {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            other => other,
        };
        if let Ok(moved) = moved {
            *done += moved;
            if *done < buffer.len() {
                self.backlog.push_back(place);
                return;
            }
        }
        let Op::Write { disk, op, serial, .. } = self.finish(place) else { unreachable!("as above") };
        match moved {
            Ok(_) if !self.disks[disk].each => return self.disks[disk].group.ended(serial, op),
            Ok(_) => self.answers.push((disk, op, DiskResult::Written(Ok(())))),
            Err(error) => {
                let error = self.error(disk, "write", &error);
                self.answers.push((disk, op, DiskResult::Written(Err(error))));
            }
        }
        self.disks[disk].group.dropped(serial);
    }

    fn complete_sync(&mut self, disk: usize, result: io::Result<usize>) {
        let result = result.map(|_| ()).map_err(|error| self.error(disk, "sync", &error));
        for op in self.disks[disk].group.sync_ended() {
            self.answers.push((disk, op, DiskResult::Written(result.clone())));
        }
    }

    fn error(&self, disk: usize, action: &str, error: &io::Error) -> DiskError {
        disk_error(self.disks[disk].file.path(), action, error)
    }

    fn anything_there(&mut self) -> bool {
        if !self.answers.is_empty() || self.mailbox.any() || !self.ring.completion().is_empty() {
            return true;
        }
        let submission = self.ring.submission();
        submission.taskrun() || submission.cq_overflow()
    }

    fn allow_signals(&mut self, allow: bool) {
        let completion = self.ring.completion();
        if allow {
            completion.enable_eventfd();
            // The kernel looks at the switch after it has published; we must look after we have switched.
            fence(Ordering::SeqCst);
        } else {
            completion.disable_eventfd();
        }
    }
}

fn make_ring() -> io::Result<IoUring> {
    // Completions are worked on when we ask for them, not by interrupting the thread; the flag tells
    // without a system call that there are some. Kernels before 6.1 do not know it: any ring will do.
    let mut builder = IoUring::builder();
    builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    builder.build(ENTRIES).or_else(|_| IoUring::new(ENTRIES))
}

impl DiskEngine for UringEngine {
    fn submit(&mut self, disk: usize, op: OpId, command: DiskCommand) {
        match command {
            DiskCommand::Read { offset, length } => {
                check_blocks(offset, length);
                let buffer = self.pool.take(length as usize);
                self.begin(Op::Read { disk, op, offset, buffer, done: 0 });
            }
            DiskCommand::Write { offset, pieces } => {
                let length = total(&pieces);
                check_blocks(offset, length);
                let mut buffer = self.pool.take(length as usize);
                buffer.gather(&pieces);
                let serial = self.disks[disk].group.issued();
                self.begin(Op::Write { disk, op, serial, offset, buffer, done: 0 });
            }
            command => self.slow.submit(disk, op, command),
        }
    }

    fn flush(&mut self) {
        self.pump();
    }

    fn completions(&mut self, out: &mut Vec<Answer>) {
        self.reap();
        self.pump();
        out.append(&mut self.answers);
        self.mailbox.take(out);
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.anything_there() {
            return Poll::Ready(());
        }
        // Each poll registers the waker; a signal from before is one look too many, no more.
        self.allow_signals(true);
        let rung = self.doorbell.poll(cx);
        if rung.is_ready() || self.anything_there() {
            self.allow_signals(false);
            return Poll::Ready(());
        }
        Poll::Pending
    }
}

impl Drop for UringEngine {
    /// The kernel may write into our buffers until it has told the end of each operation.
    fn drop(&mut self) {
        while self.in_kernel > 0 {
            if let Err(error) = self.ring.submitter().submit_and_wait(1)
                && error.raw_os_error() != Some(libc::EINTR)
            {
                tracing::error!("io_uring cannot be waited for ({error}): its buffers are given up");
                std::mem::forget(std::mem::take(&mut self.ops));
                return;
            }
            loop {
                let Some(entry) = self.ring.completion().next() else { break };
                self.in_kernel -= 1;
                self.finish(entry.user_data() as usize);
            }
        }
    }
}
