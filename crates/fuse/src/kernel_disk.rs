//! The mount and the loop device on its file, put up and taken down together.

use crate::mount::FuseMount;
use petal_io::loop_device::{LoopDevice, LoopOptions};
use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};

/// How a disk is attached.
#[derive(Clone, Copy, Debug)]
pub struct AttachOptions {
    /// Logical block size of the device: 512, or 4096 if everything that uses it agrees.
    pub block_size: u32,
    /// The device refuses writes.
    pub read_only: bool,
}

/// Why a device cannot be put up or taken down.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Setting up the device failed.
    #[error("no loop device could be put on {file}: {source}; this needs root and /dev/loop-control")]
    Setup {
        /// The file.
        file: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody uses it.
    #[error("{device} is in use (mounted, or open in another program); unmount it and try again")]
    InUse {
        /// The device.
        device: PathBuf,
    },
    /// Taking down failed.
    #[error("{device} could not be taken down: {source}")]
    TakeDown {
        /// The device.
        device: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A loop device on a FUSE file, both up.
pub struct KernelDisk {
    mount: FuseMount,
    device: LoopDevice,
}

impl KernelDisk {
    /// Puts a loop device on the file of `mount`, which is mounted on `dir`. Blocks; [`crate::serve`]
    /// must be running on another thread.
    pub fn attach(mount: FuseMount, dir: &Path, options: AttachOptions) -> Result<KernelDisk, AttachError> {
        let file = dir.join("disk");
        let setup = |source| AttachError::Setup { file: file.clone(), source };
        let opened = OpenOptions::new().read(true).write(!options.read_only).open(&file).map_err(setup)?;
        let AttachOptions { block_size, read_only } = options;
        let device = LoopDevice::attach(&opened, LoopOptions { block_size, read_only, direct: true }).map_err(setup)?;
        Ok(KernelDisk { mount, device })
    }

    /// `/dev/loopN`.
    pub fn device(&self) -> &Path {
        self.device.path()
    }

    /// The disk has another size from now on. Blocks.
    pub fn set_size(&self, size: u64) -> io::Result<()> {
        self.mount.set_size(size);
        self.device.refresh_size()
    }

    /// Writes everything back, frees the device and unmounts. Blocks. If the device is in use nothing has
    /// changed, and the disk is handed back.
    pub fn detach(self) -> Result<(), (Box<KernelDisk>, AttachError)> {
        let device = self.device.path().to_path_buf();
        if let Err(source) = self.device.clear() {
            return Err((Box::new(self), taken_down(device, source)));
        }
        if let Err(source) = self.mount.unmount() {
            // The device is gone; the lazy unmount of a file system that nobody uses cannot fail for long.
            tracing::warn!("the FUSE mount below {} could not be unmounted: {source}", device.display());
        }
        Ok(())
    }
}

fn taken_down(device: PathBuf, source: io::Error) -> AttachError {
    if source.raw_os_error() == Some(libc::EBUSY) {
        AttachError::InUse { device }
    } else {
        AttachError::TakeDown { device, source }
    }
}

/// Removes what a process left that died while a disk was attached: its loop device, whichever that is, and its
/// mount on `dir`. What was not written back is lost, as at a power cut. Blocks.
pub fn clean_up_remains(dir: &Path) -> Result<(), AttachError> {
    // The kernel names files by their real paths. Not that of `dir` itself: nobody serves it any more.
    let real = dir.parent().and_then(|parent| Some(parent.canonicalize().ok()?.join(dir.file_name()?)));
    let real = real.as_deref().unwrap_or(dir);
    for remains in LoopDevice::all_on_files_in(real) {
        remains.abandon().map_err(|e| taken_down(remains.path().into(), e))?;
    }
    match rustix::mount::unmount(dir, rustix::mount::UnmountFlags::DETACH) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        Err(e) => Err(taken_down(dir.into(), e.into())),
    }
}
