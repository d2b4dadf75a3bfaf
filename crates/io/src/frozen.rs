//! Freezing file systems: `FIFREEZE` writes everything back and holds up every write until `FITHAW`.
//!
//! Why here: two ioctls need `unsafe`, which only this crate may use. A snapshot of the disk below a frozen file
//! system needs no journal replay (`petal snapshot create --freeze`).
//!
//! How it fails: no permission (root is needed), a file system that cannot (tmpfs, FUSE: `EOPNOTSUPP`), one that
//! is frozen already (`EBUSY`), or, for a thaw, one that is not (`EINVAL`).

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)` of `linux/fs.h`.
const FIFREEZE: libc::c_ulong = 0xC004_5877;
const FITHAW: libc::c_ulong = 0xC004_5878;

/// Freezes the file system of this file or folder. Blocks until everything is written back.
pub fn freeze(on: &File) -> io::Result<()> {
    ask(on, FIFREEZE)
}

/// Lets it go on.
pub fn thaw(on: &File) -> io::Result<()> {
    ask(on, FITHAW)
}

fn ask(on: &File, request: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the two requests that come here read and write no memory of ours, whatever their number says: the
    // kernel ignores the argument. The descriptor is open because `on` is borrowed.
    let result = unsafe { libc::ioctl(on.as_raw_fd(), request, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_that_cannot_be_frozen_says_so() {
        let proc = File::open("/proc").unwrap();
        let code = freeze(&proc).unwrap_err().raw_os_error();
        // Without root already the permission is missing.
        assert!(matches!(code, Some(libc::EOPNOTSUPP | libc::EPERM)), "{code:?}");
    }
}
