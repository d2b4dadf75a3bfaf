//! The mount with its one file, and the bridge from FUSE's thread to the caller's runtime.
//!
//! FUSE's handlers run on a thread of `fuser`; they only put the request, with the handle that answers
//! it, into a bounded channel. [`serve`] takes requests out and runs each as a local task, so many are
//! in flight and answered in any order. The channel's bound is no promise of the kernel's: it limits its
//! background requests to [`BACKGROUND_MAX`], and a full channel makes FUSE's thread wait, which makes
//! the kernel wait.

use crate::{BlockError, BlockFile};
use bytes::Bytes;
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyStatfs, ReplyWrite, Request, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

/// Requests that the kernel sends ahead without waiting (read-ahead, asynchronous direct I/O). The loop
/// driver has 128 tags; more than that never come.
const BACKGROUND_MAX: u16 = 128;
/// Largest write in one request: 1 MiB is what the kernel makes of it anyway (256 pages).
const WRITE_MAX: u32 = 1 << 20;
/// How long the kernel may believe attributes: not at all, because the loop driver asks for the size
/// just after a resize, and otherwise hardly anybody asks.
const ATTRIBUTES_FOR: Duration = Duration::ZERO;
const FILE: INodeNo = INodeNo(2);
const FILE_NAME: &str = "disk";

/// A mounted file system; dropping it unmounts.
pub struct FuseMount {
    session: Option<fuser::BackgroundSession>,
    size: Arc<AtomicU64>,
}

/// The kernel's requests, for [`serve`].
pub struct Requests(mpsc::Receiver<KernelRequest>);

enum KernelRequest {
    Read { offset: u64, length: u32, reply: ReplyData },
    Write { offset: u64, data: Bytes, reply: ReplyWrite },
    Zero { offset: u64, length: u64, reply: ReplyEmpty },
    Flush { reply: ReplyEmpty },
}

/// Mounts a file system whose only file, `disk`, has `size` bytes, on the directory `dir`. It answers
/// once [`serve`] runs.
pub fn mount(dir: &Path, size: u64, read_only: bool) -> io::Result<(FuseMount, Requests)> {
    let (sender, receiver) = mpsc::channel(usize::from(BACKGROUND_MAX));
    let size = Arc::new(AtomicU64::new(size));
    let file = DiskFile { size: size.clone(), requests: sender, made: SystemTime::now(), read_only };
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("petal".into()), MountOption::NoAtime, MountOption::NoExec];
    config.mount_options.push(if read_only { MountOption::RO } else { MountOption::RW });
    let session = fuser::spawn_mount(file, dir, &config)?;
    Ok((FuseMount { session: Some(session), size }, Requests(receiver)))
}

impl FuseMount {
    /// The disk has another size from now on; the kernel learns it with the next look.
    pub fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
    }

    /// Unmounts and waits until FUSE's thread has ended. Blocks.
    pub fn unmount(mut self) -> io::Result<()> {
        match self.session.take() {
            Some(session) => session.umount_and_join(),
            None => Ok(()),
        }
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            let _ = session.umount_and_join();
        }
    }
}

/// Answers the kernel's requests from `file` until the file system is unmounted and everything is
/// answered. Must run within a `tokio::task::LocalSet`.
pub async fn serve<F: BlockFile>(mut requests: Requests, file: Rc<F>) {
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            request = requests.0.recv() => match request {
                Some(request) => { tasks.spawn_local(answer(request, file.clone())); }
                None => break,
            },
            Some(_) = tasks.join_next() => {}
        }
    }
    while tasks.join_next().await.is_some() {}
}

async fn answer<F: BlockFile>(request: KernelRequest, file: Rc<F>) {
    match request {
        KernelRequest::Read { offset, length, reply } => match file.read(offset, length).await {
            Ok(pieces) => match pieces.as_slice() {
                [one] => reply.data(one),
                many => reply.data(&many.concat()),
            },
            Err(e) => reply.error(errno(e)),
        },
        KernelRequest::Write { offset, data, reply } => {
            let length = data.len() as u32;
            match file.write(offset, data).await {
                Ok(()) => reply.written(length),
                Err(e) => reply.error(errno(e)),
            }
        }
        KernelRequest::Zero { offset, length, reply } => empty(reply, file.zero(offset, length).await),
        KernelRequest::Flush { reply } => empty(reply, file.flush().await),
    }
}

fn empty(reply: ReplyEmpty, result: Result<(), BlockError>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(e)),
    }
}

fn errno(error: BlockError) -> Errno {
    match error {
        BlockError::Io => Errno::EIO,
        BlockError::NoSpace => Errno::ENOSPC,
        BlockError::ReadOnly => Errno::EROFS,
        BlockError::BeyondEnd => Errno::EINVAL,
    }
}

/// The file system, on FUSE's thread.
struct DiskFile {
    size: Arc<AtomicU64>,
    requests: mpsc::Sender<KernelRequest>,
    made: SystemTime,
    read_only: bool,
}

impl DiskFile {
    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, size, perm, nlink) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0, 0o500, 2),
            FILE => (FileType::RegularFile, self.size.load(Ordering::Relaxed), 0o600, 1),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: self.made,
            mtime: self.made,
            ctime: self.made,
            crtime: self.made,
            kind,
            perm: if self.read_only { perm & 0o555 } else { perm },
            nlink,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    /// Bytes of `offset .. offset + length` that exist.
    fn within(&self, offset: u64, length: u64) -> u64 {
        self.size.load(Ordering::Relaxed).saturating_sub(offset).min(length)
    }

    /// The handle that answers is dropped with the request if nobody serves any more; `fuser` then
    /// answers EIO.
    fn hand_over(&self, request: KernelRequest) {
        let _ = self.requests.blocking_send(request);
    }
}

impl Filesystem for DiskFile {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.set_max_write(WRITE_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        // Without it the kernel would wait for each direct request of the loop driver.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE) {
            Some(attributes) if parent == INodeNo::ROOT && name == FILE_NAME => {
                reply.entry(&ATTRIBUTES_FOR, &attributes, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&ATTRIBUTES_FOR, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let entries = [
            (INodeNo::ROOT, FileType::Directory, "."),
            (INodeNo::ROOT, FileType::Directory, ".."),
            (FILE, FileType::RegularFile, FILE_NAME),
        ];
        for (position, (inode, kind, name)) in entries.into_iter().enumerate().skip(offset as usize) {
            if reply.add(inode, position as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // The device above has its own cache: caching here too would cost memory and copies, and would
        // keep writes in memory that the client library wants to see at once.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.within(offset, u64::from(size)) {
            0 => reply.data(&[]),
            length => self.hand_over(KernelRequest::Read { offset, length: length as u32, reply }),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if self.within(offset, data.len() as u64) < data.len() as u64 {
            return reply.error(Errno::ENOSPC);
        }
        self.hand_over(KernelRequest::Write { offset, data: Bytes::copy_from_slice(data), reply });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Sent at each close of the file; only fsync promises anything.
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.hand_over(KernelRequest::Flush { reply });
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        // The loop driver sends both for discards and for write-zeroes, and relies on zeros after both.
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
        if mode != PUNCH && mode & !libc::FALLOC_FL_KEEP_SIZE != ZERO {
            return reply.error(Errno::EOPNOTSUPP);
        }
        match self.within(offset, length) {
            0 => reply.ok(),
            length => self.hand_over(KernelRequest::Zero { offset, length, reply }),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        // The block size is the granularity of discards that the loop device advertises.
        let blocks = self.size.load(Ordering::Relaxed) / 4096;
        reply.statfs(blocks, 0, 0, 1, 0, 4096, 255, 4096);
    }
}
