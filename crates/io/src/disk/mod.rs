//! Disks: files and raw block devices, carried out for `petal::store`.
//!
//! * [`open_disk`], [`format_disk`]: a path becomes a locked disk, or an error that says what to do;
//! * [`Engine`]: all disks of one server behind [`DiskEngine`]. Reads and writes go through io_uring on
//!   the reactor's thread ([`uring`]), or through a few threads where io_uring is not to be had
//!   ([`threads`]); the same tests run on both;
//! * [`pmap`]: redb in its region of each disk, on a thread per disk, its pages checked on every read;
//! * `extend`: growing a file ahead of its use.
//!
//! A write is answered when it is on stable storage. Writes of one disk that end at about the same time
//! share one sync ([`group`]): a journal record and its data, issued together, cost one flush of the
//! device's cache. The numbers behind that are in docs/performance.md, "Disk engine".

mod buffer;
mod extend;
mod group;
mod mailbox;
mod open;
mod pmap;
mod threads;
mod uring;

#[cfg(test)]
mod tests;

pub use buffer::{Buffer, BufferPool};
pub use open::{DirectIo, DiskFile, Format, FoundDisk, Medium, OpenError, SUPERBLOCK_AREA, format_disk, open_disk};
pub use threads::ThreadEngine;
pub use uring::UringEngine;

use crate::engine::DiskEngine;
use extend::Extender;
use mailbox::{Answer, Mailbox};
use petal::store::{DiskCommand, DiskError, OpId};
use pmap::PmapThread;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Context, Poll};

/// One disk, as handed to an engine. Its number is its place in the list.
#[derive(Clone, Debug)]
pub struct EngineDisk {
    /// The open file.
    pub file: Arc<DiskFile>,
    /// Bytes of the disk that belong to the PMap store.
    pub pmap: Range<u64>,
}

/// Which engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EngineKind {
    /// io_uring where the kernel allows it, else threads.
    #[default]
    Best,
    /// io_uring, or an error.
    Uring,
    /// Threads.
    Threads,
}

/// How writes become durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Durability {
    /// Each write by itself on devices that write through, else in groups.
    #[default]
    Best,
    /// Plain writes, then one sync for all that have ended.
    Grouped,
    /// Each write with RWF_DSYNC (io_uring only; threads always group).
    PerWrite,
}

/// How an engine is made.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Which engine.
    pub kind: EngineKind,
    /// How writes become durable.
    pub durability: Durability,
    /// redb's cache of each disk, in bytes.
    pub pmap_cache_bytes: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions { kind: EngineKind::Best, durability: Durability::Best, pmap_cache_bytes: 32 << 20 }
    }
}

impl EngineOptions {
    /// The defaults, changed by `PETAL_DISK_ENGINE` (`uring` or `threads`) and `PETAL_DISK_DURABILITY`
    /// (`grouped` or `each`).
    ///
    /// # Errors
    /// A variable has another value.
    pub fn from_environment() -> Result<EngineOptions, String> {
        let kind = match std::env::var("PETAL_DISK_ENGINE").as_deref() {
            Err(_) | Ok("" | "best") => EngineKind::Best,
            Ok("uring") => EngineKind::Uring,
            Ok("threads") => EngineKind::Threads,
            Ok(other) => return Err(format!("PETAL_DISK_ENGINE is '{other}': use best, uring or threads")),
        };
        let durability = match std::env::var("PETAL_DISK_DURABILITY").as_deref() {
            Err(_) | Ok("" | "best") => Durability::Best,
            Ok("grouped") => Durability::Grouped,
            Ok("each") => Durability::PerWrite,
            Ok(other) => return Err(format!("PETAL_DISK_DURABILITY is '{other}': use best, grouped or each")),
        };
        Ok(EngineOptions { kind, durability, ..EngineOptions::default() })
    }
}

/// The engine of a server: whichever could be had.
pub enum Engine {
    /// io_uring. Boxed: it is large.
    Uring(Box<UringEngine>),
    /// Threads.
    Threads(ThreadEngine),
}

impl Engine {
    /// Starts an engine for these disks. With [`EngineKind::Best`] a kernel without io_uring is no error.
    ///
    /// # Errors
    /// No eventfd, no thread, or no io_uring where it was demanded.
    pub fn start(disks: Vec<EngineDisk>, options: &EngineOptions) -> io::Result<Engine> {
        let kind = options.kind;
        if kind != EngineKind::Threads {
            match UringEngine::start(disks.clone(), options) {
                Ok(engine) => return Ok(Engine::Uring(Box::new(engine))),
                Err(error) if kind == EngineKind::Uring => return Err(error),
                Err(error) => tracing::warn!("no io_uring ({error}): disks are driven by threads"),
            }
        }
        Ok(Engine::Threads(ThreadEngine::start(disks, options)?))
    }

    /// Its name, for status and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Engine::Uring(_) => "io_uring",
            Engine::Threads(_) => "threads",
        }
    }

    /// Blocks until there may be completions: for tools without a reactor.
    pub fn wait(&mut self) {
        match self {
            Engine::Uring(engine) => engine.wait(),
            Engine::Threads(engine) => engine.wait(),
        }
    }
}

impl DiskEngine for Engine {
    fn submit(&mut self, disk: usize, op: OpId, command: DiskCommand) {
        match self {
            Engine::Uring(engine) => engine.submit(disk, op, command),
            Engine::Threads(engine) => engine.submit(disk, op, command),
        }
    }
    fn flush(&mut self) {
        match self {
            Engine::Uring(engine) => engine.flush(),
            Engine::Threads(engine) => engine.flush(),
        }
    }
    fn completions(&mut self, out: &mut Vec<Answer>) {
        match self {
            Engine::Uring(engine) => engine.completions(out),
            Engine::Threads(engine) => engine.completions(out),
        }
    }
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Engine::Uring(engine) => engine.poll_ready(cx),
            Engine::Threads(engine) => engine.poll_ready(cx),
        }
    }
}

/// What both engines leave to threads: PMap commands and growing.
struct SlowPaths {
    pmaps: Vec<PmapThread>,
    extenders: Vec<Extender>,
}

impl SlowPaths {
    fn start(disks: &[EngineDisk], options: &EngineOptions, mailbox: &Arc<Mailbox>) -> io::Result<SlowPaths> {
        let mut paths = SlowPaths { pmaps: Vec::new(), extenders: Vec::new() };
        for (index, disk) in disks.iter().enumerate() {
            let cache = options.pmap_cache_bytes;
            let pmap = PmapThread::start(index, disk.file.clone(), disk.pmap.clone(), cache, mailbox.clone())?;
            paths.pmaps.push(pmap);
            paths.extenders.push(Extender::new(index, disk.file.clone(), mailbox.clone()));
        }
        Ok(paths)
    }

    /// Takes a command that is neither a read nor a write.
    fn submit(&mut self, disk: usize, op: OpId, command: DiskCommand) {
        match command {
            DiskCommand::Extend { to, hurry } => self.extenders[disk].submit(op, to, hurry),
            command => self.pmaps[disk].submit(op, command),
        }
    }
}

/// Panics if a read or write is not of whole blocks: the store above made a mistake.
fn check_blocks(offset: u64, length: u64) {
    assert!(
        offset.is_multiple_of(4096) && length.is_multiple_of(4096) && length > 0 && length <= 1 << 30,
        "a disk command of {length} bytes at {offset}"
    );
}

/// Bytes of all pieces.
fn total(pieces: &[bytes::Bytes]) -> u64 {
    pieces.iter().map(|piece| piece.len() as u64).sum()
}

/// True if each write of this disk is made durable by itself.
fn syncs_each_write(durability: Durability, file: &DiskFile) -> bool {
    match durability {
        Durability::Best => file.writes_through(),
        Durability::Grouped => false,
        Durability::PerWrite => true,
    }
}
