//! Opening, locking and formatting disk files and raw block devices.
//!
//! A disk belongs to one server process at a time: the open file carries an exclusive lock (flock; for
//! block devices also O_EXCL, which the kernel refuses while the device is mounted) until the last
//! engine or thread that uses it is gone. O_DIRECT is used where the file system allows it.
//!
//! How it fails: each error names the path and what the operator can do about it. Nothing here judges
//! the content of a superblock: the caller gets the bytes and the length of the file.

use super::buffer::BufferPool;
use super::{DiskError, extend};
use bytes::Bytes;
use rustix::fs::{FlockOperation, SeekFrom};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes at the beginning of each disk that hold the two copies of the superblock.
pub const SUPERBLOCK_AREA: usize = 8192;

/// Why a disk cannot be opened or formatted.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is nothing at that path.
    #[error(
        "there is no disk at {path}: check the path; if it is lost, see `petal rejoin --help`, and if it is new, `petal join --help`"
    )]
    NotFound {
        /// The path.
        path: PathBuf,
    },
    /// A directory, a socket...
    #[error("{path} is {what}, not a disk: give a regular file or a block device")]
    NotADisk {
        /// The path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Somebody else has it.
    #[error("the disk {path} is in use by {}: stop that one first", holder(*.pid, *.device))]
    InUse {
        /// The path.
        path: PathBuf,
        /// The process that holds the lock, if it can be found out.
        pid: Option<u32>,
        /// A block device (which may also be mounted).
        device: bool,
    },
    /// Formatting would destroy something.
    #[error("{path} already holds data (at byte {at}): choose another path, or force it if the data can go")]
    HasData {
        /// The path.
        path: PathBuf,
        /// Where the first data were seen.
        at: u64,
    },
    /// The device is smaller than the disk that was asked for.
    #[error("{path} holds {capacity} bytes, the disk needs {needed}: ask for a smaller disk")]
    TooSmall {
        /// The path.
        path: PathBuf,
        /// What it holds.
        capacity: u64,
        /// What is needed.
        needed: u64,
    },
    /// The file system below is full.
    #[error("no room for {path}: {reason}; free some space there, or ask for a smaller disk")]
    HostFull {
        /// The path.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// No permission.
    #[error("no permission to {action} {path}: run as a user that may, or change its owner or mode")]
    Permission {
        /// The path.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
    },
    /// Anything else.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn holder(pid: Option<u32>, device: bool) -> String {
    match (pid, device) {
        (Some(pid), _) => format!("another server (pid {pid})"),
        (None, false) => "another server".into(),
        (None, true) => "another server, or mounted".into(),
    }
}

/// What a disk lies on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Medium {
    /// A regular file, which grows.
    File,
    /// A raw block device.
    Device,
}

/// Whether the page cache may be passed by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DirectIo {
    /// Where the file system allows it.
    #[default]
    WherePossible,
    /// Never (tests).
    Never,
}

/// An open, locked disk.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    path: PathBuf,
    medium: Medium,
    direct: bool,
}

/// What `open_disk` found.
#[derive(Debug)]
pub struct FoundDisk {
    /// The disk, locked. The lock goes when the last clone does.
    pub file: Arc<DiskFile>,
    /// The first [`SUPERBLOCK_AREA`] bytes: both copies; zeros behind the end of a shorter file.
    pub superblocks: Bytes,
    /// Length of the file, capacity of the device. A file that is shorter than its superblock says was
    /// truncated.
    pub length: u64,
}

/// Opens an existing disk for one server: locks it and reads the superblock area.
///
/// # Errors
/// Whatever is wrong with the path, the lock or the device; see [`OpenError`].
pub fn open_disk(path: &Path, direct: DirectIo) -> Result<FoundDisk, OpenError> {
    let file = Arc::new(DiskFile::open(path, false, direct)?);
    let length = file.length().map_err(|source| failed(path, "find out the length of", source))?;
    let mut area = BufferPool::new().take(SUPERBLOCK_AREA);
    if let Err(source) = file.read_at(&mut area, 0) {
        // One copy is enough; one that cannot be read looks as if it were none.
        let (first, second) = area.split_at_mut(SUPERBLOCK_AREA / 2);
        let copies = [(first, 0), (second, SUPERBLOCK_AREA as u64 / 2)];
        let read = copies.map(|(copy, at)| file.read_at(copy, at).map_err(|_| copy.fill(0)).is_ok());
        if read == [false; 2] {
            return Err(failed(path, "read", source));
        }
    }
    Ok(FoundDisk { file, superblocks: area.into_bytes(), length })
}

/// What `format_disk` is to make.
#[derive(Debug, Clone)]
pub struct Format<'a> {
    /// Bytes of the disk. A file is not made that long at once; a device must have room for it.
    pub size: u64,
    /// Ranges to be written with zeros, so that later writes there need no metadata of a file system
    /// (superblocks, journal, the first data). On a device they are zeroed too.
    pub zeroed: &'a [Range<u64>],
    /// The region of the PMap store, which gets an empty store.
    pub pmap: Range<u64>,
    /// What is written last, `(offset, bytes)` in 4 KiB blocks: the superblocks. Only when all else is
    /// on stable storage: half a formatting leaves no disk.
    pub writes: &'a [(u64, Bytes)],
    /// Overwrite what is there.
    pub force: bool,
    /// Whether the page cache may be passed by.
    pub direct: DirectIo,
}

/// Makes a disk at `path`: creates the file if it does not exist, refuses to overwrite data unless
/// forced, and never touches a disk in use.
///
/// # Errors
/// See [`OpenError`]. A file that was created here is removed again when the formatting fails.
pub fn format_disk(path: &Path, format: &Format<'_>) -> Result<(), OpenError> {
    let existed = path.exists();
    let result = format_opened(path, format);
    if result.is_err() && !existed {
        // It was made by this call and holds nothing; the error that counts is the first one.
        let _ = std::fs::remove_file(path);
    }
    result
}

fn format_opened(path: &Path, format: &Format<'_>) -> Result<(), OpenError> {
    let disk = Arc::new(DiskFile::open(path, true, format.direct)?);
    let write_failed = |error: DiskError| match error {
        DiskError::HostFull(reason) => OpenError::HostFull { path: path.into(), reason },
        other => failed(path, "write", io::Error::other(other.to_string())),
    };
    if disk.medium == Medium::Device {
        let capacity = disk.length().map_err(|source| failed(path, "find out the size of", source))?;
        if capacity < format.size {
            return Err(OpenError::TooSmall { path: path.into(), capacity, needed: format.size });
        }
    }
    if let Some(at) = disk.first_data().map_err(|source| failed(path, "read", source))? {
        if !format.force {
            return Err(OpenError::HasData { path: path.into(), at });
        }
        if disk.medium == Medium::File {
            disk.file.set_len(0).map_err(|source| failed(path, "truncate", source))?;
        }
    }
    // An old superblock must not survive a crash in the middle of what follows.
    extend::write_zeros(&disk, 0..SUPERBLOCK_AREA as u64).map_err(write_failed)?;
    disk.sync().map_err(|source| failed(path, "write", source))?;
    for range in format.zeroed {
        extend::write_zeros(&disk, range.clone()).map_err(write_failed)?;
    }
    super::pmap::format(&disk, format.pmap.clone()).map_err(write_failed)?;
    disk.sync().map_err(|source| failed(path, "write", source))?;
    for (offset, bytes) in format.writes {
        disk.write_all_at(bytes, *offset).map_err(|error| write_failed(disk_error(path, "write", &error)))?;
    }
    disk.sync_all().map_err(|source| failed(path, "write", source))
}

/// Mode of new files: what disks hold is for nobody else to read.
const OWNER_ONLY: u32 = 0o600;

impl DiskFile {
    fn open(path: &Path, create: bool, direct: DirectIo) -> Result<DiskFile, OpenError> {
        let action = if create { "create" } else { "open" };
        let known = match std::fs::metadata(path) {
            Ok(metadata) => Some(metadata.file_type()),
            Err(error) if error.kind() == io::ErrorKind::NotFound && create => None,
            Err(error) => return Err(failed(path, action, error)),
        };
        let device = known.is_some_and(|kind| kind.is_block_device());
        if let Some(what) = known.and_then(not_a_disk) {
            return Err(OpenError::NotADisk { path: path.into(), what });
        }
        let open = |flags: i32| {
            let exclusive = if device { libc::O_EXCL } else { 0 };
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(create && !device)
                .truncate(false)
                .mode(OWNER_ONLY)
                .custom_flags(flags | exclusive)
                .open(path)
        };
        let opened = match direct {
            DirectIo::Never => open(0).map(|file| (file, false)),
            DirectIo::WherePossible => match open(libc::O_DIRECT).map(|file| (file, true)) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => open(0).map(|file| (file, false)),
                other => other,
            },
        };
        let (file, direct) = match opened {
            Ok(opened) => opened,
            Err(error) if device && error.raw_os_error() == Some(libc::EBUSY) => {
                return Err(OpenError::InUse { path: path.into(), pid: None, device });
            }
            Err(error) => return Err(failed(path, action, error)),
        };
        let medium = if device { Medium::Device } else { Medium::File };
        let mut disk = DiskFile { file, path: path.into(), medium, direct };
        disk.lock()?;
        disk.prove_direct(open)?;
        if create && known.is_none() {
            disk.sync_directory()?;
        }
        Ok(disk)
    }

    fn lock(&self) -> Result<(), OpenError> {
        match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::InUse {
                path: self.path.clone(),
                pid: self.lock_holder(),
                device: self.medium == Medium::Device,
            }),
            Err(errno) => Err(failed(&self.path, "lock", errno.into())),
        }
    }

    /// The process that the kernel's list of locks names for this file.
    fn lock_holder(&self) -> Option<u32> {
        let inode = self.file.metadata().ok()?.ino();
        let locks = std::fs::read_to_string("/proc/locks").ok()?;
        // "1: FLOCK  ADVISORY  WRITE 4711 fe:00:123456 0 EOF"
        locks.lines().find_map(|line| {
            let mut fields = line.split_whitespace();
            (fields.nth(1)? == "FLOCK").then_some(())?;
            let pid = fields.nth(2)?;
            (fields.next()?.rsplit(':').next()? == inode.to_string()).then_some(())?;
            pid.parse().ok()
        })
    }

    /// Some file systems accept the flag O_DIRECT and refuse the first read.
    fn prove_direct(&mut self, open: impl Fn(i32) -> io::Result<File>) -> Result<(), OpenError> {
        if !self.direct || self.medium == Medium::Device {
            return Ok(());
        }
        let mut block = BufferPool::new().take(4096);
        match self.file.read_at(&mut block, 0) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let plain = open(0).map_err(|error| failed(&self.path, "open", error))?;
                // The lock belongs to the open file: the new one needs its own, after the old one is gone.
                self.file = plain;
                self.direct = false;
                self.lock()
            }
            _ => Ok(()),
        }
    }

    /// Makes the new name durable.
    fn sync_directory(&self) -> Result<(), OpenError> {
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| failed(directory, "write the directory", error))
    }

    /// Its path, for people.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it lies on.
    pub fn medium(&self) -> Medium {
        self.medium
    }

    /// True if I/O passes the page cache by, and so needs aligned buffers.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Length of the file, or capacity of the device, now.
    ///
    /// # Errors
    /// What the system says.
    pub fn length(&self) -> io::Result<u64> {
        match self.medium {
            Medium::File => Ok(self.file.metadata()?.len()),
            Medium::Device => Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?),
        }
    }

    /// Fills `buffer` from `offset`; with zeros behind the end.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            if !done.is_multiple_of(4096) {
                // Only the end of the file is there; direct reads could not go on from here.
                break;
            }
        }
        buffer[done..].fill(0);
        Ok(())
    }

    /// Writes all of an aligned buffer; not yet durable.
    pub(super) fn write_at(&self, buffer: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buffer, offset)
    }

    /// Writes bytes of any alignment in memory; not yet durable.
    fn write_all_at(&self, bytes: &Bytes, offset: u64) -> io::Result<()> {
        let mut buffer = BufferPool::new().take(bytes.len());
        buffer.gather(std::slice::from_ref(bytes));
        self.write_at(&buffer, offset)
    }

    /// Everything written so far is on stable storage when this returns.
    /// Writes one copy of the superblock, `(offset, bytes)`, and waits until it is on stable storage: of a disk that no
    /// engine serves.
    ///
    /// # Errors
    /// Whatever the file system or the device says.
    pub fn write_superblock(&self, (offset, bytes): &(u64, Bytes)) -> io::Result<()> {
        self.write_all_at(bytes, *offset)?;
        self.sync_all()
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Where the first data are, if there are any: of a file the first extent that is no hole, of a
    /// device the first byte of its first MiB that is not zero (where partition tables and file systems
    /// have their marks).
    fn first_data(&self) -> io::Result<Option<u64>> {
        if self.medium == Medium::File {
            return match rustix::fs::seek(&self.file, SeekFrom::Data(0)) {
                Ok(at) => Ok(Some(at)),
                Err(rustix::io::Errno::NXIO) => Ok(None),
                Err(errno) => Err(errno.into()),
            };
        }
        let mut head = BufferPool::new().take(1 << 20);
        self.read_at(&mut head, 0)?;
        Ok(head.iter().position(|byte| *byte != 0).map(|at| at as u64))
    }

    /// True if the device below writes through: then a write with RWF_DSYNC costs no flush.
    pub(super) fn writes_through(&self) -> bool {
        let Ok(metadata) = self.file.metadata() else { return false };
        let number = if self.medium == Medium::Device { metadata.rdev() } else { metadata.dev() };
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        let base = format!("/sys/dev/block/{major}:{minor}");
        // A partition has no queue of its own; its disk is the directory above.
        [format!("{base}/queue/write_cache"), format!("{base}/../queue/write_cache")]
            .iter()
            .find_map(|path| std::fs::read_to_string(path).ok())
            .is_some_and(|cache| cache.trim() == "write through")
    }
}

impl AsFd for DiskFile {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn not_a_disk(kind: std::fs::FileType) -> Option<&'static str> {
    match kind {
        kind if kind.is_file() || kind.is_block_device() => None,
        kind if kind.is_dir() => Some("a directory"),
        kind if kind.is_char_device() => Some("a character device"),
        kind if kind.is_fifo() => Some("a pipe"),
        kind if kind.is_socket() => Some("a socket"),
        _ => Some("something else"),
    }
}

fn failed(path: &Path, action: &'static str, source: io::Error) -> OpenError {
    let path = path.to_path_buf();
    match source.raw_os_error() {
        Some(libc::ENOENT) => OpenError::NotFound { path },
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => OpenError::Permission { path, action },
        Some(libc::ENOSPC | libc::EDQUOT) => OpenError::HostFull { path, reason: source.to_string() },
        _ => OpenError::Io { path, action, source },
    }
}

/// An error of the system as the store hears it.
pub(super) fn disk_error(path: &Path, action: &str, error: &io::Error) -> DiskError {
    let text = format!("{action} {}: {error}", path.display());
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => DiskError::HostFull(text),
        _ => DiskError::Io(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[allow(clippy::single_range_in_vec_init, reason = "one range is what is meant")]
    fn format<'a>(writes: &'a [(u64, Bytes)]) -> Format<'a> {
        Format {
            size: 64 * MIB,
            zeroed: &[0..MIB],
            pmap: MIB..5 * MIB,
            writes,
            force: false,
            direct: DirectIo::WherePossible,
        }
    }

    #[test]
    fn a_formatted_disk_opens_with_its_superblocks_and_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let writes = [(0, Bytes::from(vec![1; 4096])), (4096, Bytes::from(vec![2; 4096]))];
        format_disk(&path, &format(&writes)).unwrap();
        let found = open_disk(&path, DirectIo::WherePossible).unwrap();
        assert_eq!(&found.superblocks[..4096], &[1; 4096]);
        assert_eq!(&found.superblocks[4096..], &[2; 4096]);
        assert!(found.length >= MIB);
    }

    #[test]
    fn formatting_refuses_data_unless_forced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, b"my thesis").unwrap();
        let error = format_disk(&path, &format(&[])).unwrap_err();
        assert!(matches!(error, OpenError::HasData { .. }), "{error}");
        assert!(error.to_string().contains("disk already holds data"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"my thesis");
        format_disk(&path, &Format { force: true, ..format(&[]) }).unwrap();
        assert_eq!(&open_disk(&path, DirectIo::WherePossible).unwrap().superblocks[..9], &[0; 9]);
    }

    #[test]
    fn a_new_file_is_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        format_disk(&path, &format(&[])).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn an_empty_or_sparse_file_may_be_formatted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(64 * MIB).unwrap();
        format_disk(&path, &format(&[])).unwrap();
    }

    #[test]
    fn a_disk_in_use_is_refused_and_says_by_whom() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        format_disk(&path, &format(&[])).unwrap();
        let first = open_disk(&path, DirectIo::WherePossible).unwrap();
        let error = open_disk(&path, DirectIo::WherePossible).unwrap_err().to_string();
        assert!(error.contains("in use by another server (pid "), "{error}");
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        let error = format_disk(&path, &Format { force: true, ..format(&[]) }).unwrap_err();
        assert!(matches!(error, OpenError::InUse { .. }), "{error}");
        drop(first);
        open_disk(&path, DirectIo::Never).unwrap();
    }

    #[test]
    fn what_is_no_disk_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path| open_disk(path, DirectIo::WherePossible).unwrap_err().to_string();
        assert!(open(dir.path()).contains("is a directory, not a disk"));
        assert!(open(Path::new("/dev/null")).contains("is a character device"));
        assert!(open(&dir.path().join("none")).contains("there is no disk at"));
    }

    #[test]
    fn a_truncated_file_opens_with_zeros_behind_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![9; 5000]).unwrap();
        let found = open_disk(&path, DirectIo::WherePossible).unwrap();
        assert_eq!(found.length, 5000);
        assert_eq!(&found.superblocks[..5000], vec![9; 5000]);
        assert_eq!(&found.superblocks[5000..], vec![0; SUPERBLOCK_AREA - 5000]);
    }

    #[test]
    fn a_failed_formatting_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        // The region of the PMap store is too small.
        let error = format_disk(&path, &Format { pmap: MIB..MIB + 8192, ..format(&[]) }).unwrap_err();
        assert!(error.to_string().contains("PMap"), "{error}");
        assert!(!path.exists());
    }
}
