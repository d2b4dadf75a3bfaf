//! A disk as a kernel block device, without a kernel module: a FUSE file system with one file, `disk`,
//! and a loop device on that file (`petal attach`).
//!
//! ```text
//!   ext4, XFS, dd, ...
//!        |
//!   /dev/loopN          loop driver, direct I/O: requests go on in parallel
//!        |
//!   DIR/disk            the FUSE file; one thread reads requests from /dev/fuse
//!        |  bounded channel
//!   serve(file)         tasks on the caller's current-thread runtime
//!        |
//!   BlockFile           the client library, or a test's memory
//! ```
//!
//! How it fails: an error of the [`BlockFile`] becomes an errno of the request, never more. If the
//! process dies, requests on the device end with EIO; [`clean_up_remains`] then removes the device and
//! the mount. Whoever calls [`KernelDisk::attach`] or [`KernelDisk::detach`] blocks until the kernel's
//! requests are answered, so it must not be the thread that runs [`serve`].
//!
//! Not from the paper: its clients had a kernel driver (section 3). ARCHITECTURE.md says why ours have
//! none.

mod kernel_disk;
mod mount;

pub use kernel_disk::{AttachError, AttachOptions, KernelDisk, clean_up_remains};
pub use mount::{FuseMount, Requests, mount, serve};

use bytes::Bytes;
use std::future::Future;

/// What can be served as a block device. Offsets and lengths are in bytes and within the disk.
///
/// The futures need not be `Send`: they run on the runtime that drives [`serve`]. What `write` and
/// `zero` did is stable when they return, or at the latest when a later `flush` does.
pub trait BlockFile: 'static {
    /// `length` bytes at `offset`, in pieces one behind the other.
    fn read(&self, offset: u64, length: u32) -> impl Future<Output = Result<Vec<Bytes>, BlockError>>;
    /// Writes `data` at `offset`.
    fn write(&self, offset: u64, data: Bytes) -> impl Future<Output = Result<(), BlockError>>;
    /// Makes exactly `length` bytes at `offset` read as zeros, and frees what it can.
    fn zero(&self, offset: u64, length: u64) -> impl Future<Output = Result<(), BlockError>>;
    /// Everything that was answered before is stable.
    fn flush(&self) -> impl Future<Output = Result<(), BlockError>>;
}

/// Why a request of the kernel failed; each becomes an errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// EIO.
    #[error("input/output error")]
    Io,
    /// ENOSPC.
    #[error("no space left in the pool of disks")]
    NoSpace,
    /// EROFS.
    #[error("the disk is read-only")]
    ReadOnly,
    /// EINVAL.
    #[error("beyond the end of the disk")]
    BeyondEnd,
}
