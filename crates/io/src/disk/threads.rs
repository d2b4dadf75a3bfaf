//! The engine for systems without io_uring (old kernels, containers that forbid it): a few threads
//! that read, write and sync where they stand.
//!
//! It does what the other engine does, at the price of two changes of thread per operation. Writes of
//! one disk share syncs by the same rule ([`Group`]). Dropping it finishes what was submitted.

use super::buffer::{Buffer, BufferPool};
use super::group::Group;
use super::mailbox::{Answer, Doorbell, Mailbox};
use super::open::{DiskFile, disk_error};
use super::{EngineDisk, EngineOptions, SlowPaths, check_blocks, total};
use crate::engine::DiskEngine;
use petal::store::{DiskCommand, DiskResult, OpId};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;

/// Threads per engine: enough to keep a fast disk busy, few enough for small machines.
const THREADS: usize = 4;

enum Job {
    Read { disk: usize, op: OpId, offset: u64, buffer: Buffer },
    Write { disk: usize, op: OpId, serial: u64, offset: u64, buffer: Buffer },
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    disks: Vec<Arc<DiskFile>>,
    mailbox: Arc<Mailbox>,
}

struct State {
    jobs: VecDeque<Job>,
    groups: Vec<Group<OpId>>,
    ending: bool,
}

/// See the head of the file.
pub struct ThreadEngine {
    /// Submitted since the last flush.
    fresh: Vec<Job>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    pool: BufferPool,
    slow: SlowPaths,
    mailbox: Arc<Mailbox>,
    doorbell: Doorbell,
}

impl ThreadEngine {
    /// Starts the engine.
    ///
    /// # Errors
    /// No eventfd or no thread to be had.
    pub fn start(disks: Vec<EngineDisk>, options: &EngineOptions) -> io::Result<ThreadEngine> {
        let (doorbell, mailbox) = Doorbell::new()?;
        let slow = SlowPaths::start(&disks, options, &mailbox)?;
        let groups = disks.iter().map(|_| Group::default()).collect();
        let shared = Arc::new(Shared {
            state: Mutex::new(State { jobs: VecDeque::new(), groups, ending: false }),
            work: Condvar::new(),
            disks: disks.into_iter().map(|disk| disk.file).collect(),
            mailbox: mailbox.clone(),
        });
        let mut engine = ThreadEngine {
            fresh: Vec::new(),
            shared,
            threads: Vec::new(),
            pool: BufferPool::new(),
            slow,
            mailbox,
            doorbell,
        };
        for _ in 0..THREADS {
            let shared = engine.shared.clone();
            let thread = std::thread::Builder::new().name("disk".into()).spawn(move || shared.run())?;
            engine.threads.push(thread);
        }
        Ok(engine)
    }

    /// Blocks until there may be completions: for tools without a reactor.
    pub fn wait(&mut self) {
        if !self.mailbox.any() {
            self.doorbell.wait();
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                self.carry_out(job);
                state = self.lock();
            } else if state.ending {
                return;
            } else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn carry_out(&self, job: Job) {
        match job {
            Job::Read { disk, op, offset, mut buffer } => {
                let file = &self.disks[disk];
                let result = file.read_at(&mut buffer, offset).map(|()| buffer.into_bytes());
                let result = result.map_err(|error| disk_error(file.path(), "read", &error));
                self.mailbox.put([(disk, op, DiskResult::Read(result))]);
            }
            Job::Write { disk, op, serial, offset, buffer } => {
                let file = &self.disks[disk];
                match file.write_at(&buffer, offset) {
                    Ok(()) => self.lock().groups[disk].ended(serial, op),
                    Err(error) => {
                        self.lock().groups[disk].dropped(serial);
                        let error = disk_error(file.path(), "write", &error);
                        self.mailbox.put([(disk, op, DiskResult::Written(Err(error)))]);
                    }
                }
                self.sync(disk);
            }
        }
    }

    /// Syncs until nothing waits for it; one thread per disk does.
    fn sync(&self, disk: usize) {
        while self.lock().groups[disk].begin_sync() {
            let file = &self.disks[disk];
            let result = file.sync().map_err(|error| disk_error(file.path(), "sync", &error));
            let ops = self.lock().groups[disk].sync_ended();
            self.mailbox.put(ops.into_iter().map(|op| (disk, op, DiskResult::Written(result.clone()))));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DiskEngine for ThreadEngine {
    fn submit(&mut self, disk: usize, op: OpId, command: DiskCommand) {
        match command {
            DiskCommand::Read { offset, length } => {
                check_blocks(offset, length);
                let buffer = self.pool.take(length as usize);
                self.fresh.push(Job::Read { disk, op, offset, buffer });
            }
            DiskCommand::Write { offset, pieces } => {
                let length = total(&pieces);
                check_blocks(offset, length);
                let mut buffer = self.pool.take(length as usize);
                buffer.gather(&pieces);
                let serial = self.shared.lock().groups[disk].issued();
                self.fresh.push(Job::Write { disk, op, serial, offset, buffer });
            }
            command => self.slow.submit(disk, op, command),
        }
    }

    fn flush(&mut self) {
        if self.fresh.is_empty() {
            return;
        }
        self.shared.lock().jobs.extend(self.fresh.drain(..));
        self.shared.work.notify_all();
    }

    fn completions(&mut self, out: &mut Vec<Answer>) {
        self.mailbox.take(out);
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.mailbox.any() {
            return Poll::Ready(());
        }
        match self.doorbell.poll(cx) {
            Poll::Pending if !self.mailbox.any() => Poll::Pending,
            _ => Poll::Ready(()),
        }
    }
}

impl Drop for ThreadEngine {
    fn drop(&mut self) {
        self.flush();
        self.shared.lock().ending = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
