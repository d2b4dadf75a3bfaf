//! Loop devices: a file as a kernel block device, without a kernel module of ours.
//!
//! Why here: the four ioctls of `/dev/loop-control` and `/dev/loopN` need `unsafe`, which only this
//! crate may use. `petal-fuse` puts a loop device on the file that it serves (`petal attach`).
//!
//! How it fails: no permission (root is needed), no free device (the kernel makes another), two
//! processes race for the free one (tried again). A device in use cannot be cleared: the kernel would
//! only promise to do it later, so [`LoopDevice::clear`] claims it exclusively first and says `EBUSY`.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4C07;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of `linux/loop.h`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo64>() == 232);
const _: () = assert!(size_of::<LoopConfig>() == 304);

/// How a loop device treats its file.
#[derive(Clone, Copy, Debug)]
pub struct LoopOptions {
    /// Logical block size of the device in bytes: 512 to 4096, a power of two.
    pub block_size: u32,
    /// The device refuses writes.
    pub read_only: bool,
    /// Past the page cache of the file: requests reach it in parallel, and nothing is cached twice.
    pub direct: bool,
}

/// A loop device that is set up.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Puts a free loop device on `file`. Blocks, also on reads of the file (the kernel looks for a
    /// partition table): whoever serves the file must be another thread.
    pub fn attach(file: &File, options: LoopOptions) -> io::Result<LoopDevice> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        loop {
            let number = get_free(&control)?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = open_when_it_appears(&path, options.read_only)?;
            match configure(&device, file, options) {
                Ok(()) => return Ok(LoopDevice { path }),
                // Somebody else took it between the two calls.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => continue,
                Err(e) => return Err(e),
            }
        }
    }

    /// A device that was set up by an earlier process.
    pub fn existing(path: impl Into<PathBuf>) -> LoopDevice {
        LoopDevice { path: path.into() }
    }

    /// Those whose file lies in a folder, which is named by its real path.
    pub fn all_on_files_in(folder: &Path) -> Vec<LoopDevice> {
        let entries = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|n| n.starts_with("loop"));
        let devices = names.map(|name| LoopDevice { path: Path::new("/dev").join(name) });
        devices.filter(|device| device.backing_file().is_some_and(|file| file.starts_with(folder))).collect()
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file below, as the kernel names it; `None` if the device is free.
    pub fn backing_file(&self) -> Option<PathBuf> {
        let name = self.path.file_name()?.to_str()?;
        let text = std::fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()?;
        Some(PathBuf::from(text.trim_end()))
    }

    /// True if it is mounted, or claimed by another program.
    pub fn is_in_use(&self) -> bool {
        self.claim().is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
    }

    /// Tells the device that the file has grown or shrunk.
    pub fn refresh_size(&self) -> io::Result<()> {
        let device = File::open(&self.path)?;
        ioctl_value(&device, LOOP_SET_CAPACITY, 0)
    }

    /// Writes everything back and frees the device. `EBUSY` if it is mounted or open elsewhere: then
    /// nothing has changed.
    pub fn clear(&self) -> io::Result<()> {
        let device = self.claim()?;
        device.sync_all()?;
        self.free(device)
    }

    /// Frees a device whose file's server has died: nothing can be written back. `EBUSY` as in `clear`.
    pub fn abandon(&self) -> io::Result<()> {
        let device = self.claim()?;
        let _ = device.sync_all();
        self.free(device)
    }

    /// O_EXCL on a block device means: nobody has it mounted or claimed.
    fn claim(&self) -> io::Result<File> {
        OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&self.path)
    }

    fn free(&self, device: File) -> io::Result<()> {
        ioctl_value(&device, LOOP_CLR_FD, 0)?;
        drop(device);
        // The kernel lets go at the last close, which may be of somebody who looks at it (udev).
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.backing_file().is_some() {
            if Instant::now() > deadline {
                return Err(io::Error::from_raw_os_error(libc::EBUSY));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

fn get_free(control: &File) -> io::Result<u32> {
    // SAFETY: LOOP_CTL_GET_FREE takes no argument and touches no memory of ours; the descriptor is
    // open for the length of the call because `control` is borrowed.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

fn ioctl_value(device: &File, request: libc::c_ulong, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the two requests that come here (LOOP_CLR_FD, LOOP_SET_CAPACITY) take a plain number and
    // touch no memory of ours; the descriptor is open because `device` is borrowed.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request, value) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn configure(device: &File, file: &File, options: LoopOptions) -> io::Result<()> {
    let mut flags = 0;
    flags |= if options.read_only { LO_FLAGS_READ_ONLY } else { 0 };
    flags |= if options.direct { LO_FLAGS_DIRECT_IO } else { 0 };
    let info = LoopInfo64 {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    let config = LoopConfig { fd: file.as_raw_fd() as u32, block_size: options.block_size, info, reserved: [0; 8] };
    // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`; `config` has that layout (repr(C), size
    // asserted above), is initialised, and lives until the call returns. Both descriptors are open
    // because their files are borrowed.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &config as *const LoopConfig) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The device node of a new loop device is made by the kernel (devtmpfs) or by udev, a moment later.
fn open_when_it_appears(path: &Path, read_only: bool) -> io::Result<File> {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match OpenOptions::new().read(true).write(!read_only).open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}
