//! `petal attach`: a virtual disk as a kernel block device, through FUSE and a loop device.
//!
//! A process in the background serves the FUSE file for as long as the disk is attached:
//!
//! ```text
//!   petal attach vol0 --starts--> petal attach vol0 --serve   one thread: runtime, client, FUSE's requests
//!        waits until ready          |-- thread of fuser        reads /dev/fuse
//!                                   +-- helper thread          sets the loop device up and takes it down
//! ```
//!
//! It keeps its process file, its log and its mount in `attached/NAME/` of the cluster's folder, or of a
//! folder for run-time files when the cluster was named by addresses. A disk may be renamed meanwhile, and another one
//! get its name: the process file says which disk it is, and the name of the folder nothing.

use crate::connect::{self, Connection, Disk};
use crate::holder;
use crate::output;
use crate::place::Place;
use crate::processes::{self, Log, ProcessFile};
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use petal::client::RequestError;
use petal::global_state::{Attachment, Command, split_name};
use petal::ids::{SessionId, VdiskId};
use petal::message::Refusal;
use petal_fuse::{AttachError, AttachOptions, BlockError, BlockFile, KernelDisk};
use serde_json::json;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// How long attaching may take.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// `petal attach`
#[derive(clap::Args, Clone)]
#[command(after_help = "\
Example:
  petal attach vol0            prints /dev/loop0
  mkfs.ext4 /dev/loop0 && mount /dev/loop0 /mnt
  umount /mnt && petal detach vol0
  petal attach vol0@monday     a snapshot, read-only

To mount what a snapshot holds, attach a clone of it: a file system that was in use replays its
journal then, which it cannot do read-only (with noload it may look empty):
  petal clone vol0@monday look && petal attach look

Needs root, /dev/fuse and /dev/loop-control; no kernel module of ours.")]
pub struct Arguments {
    /// The disk, or a snapshot of it (DISK@SNAPSHOT), which is read-only
    disk: String,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// End the session of whoever has the disk attached
    #[arg(long)]
    take_over: bool,
    /// Logical block size of the device
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(512..=4096))]
    block_size: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Be the process in the background, with its files in this folder
    #[arg(long, hide = true)]
    serve: Option<PathBuf>,
}

/// Attaches, or is the process that serves.
pub fn run(place: &Place, mut arguments: Arguments) -> Result<()> {
    arguments.read_only |= split_name(&arguments.disk).1.is_some();
    if let Some(folder) = arguments.serve.clone() {
        let place = place.clone();
        return connect::block_on(async move { serve(&place, &folder, &arguments).await });
    }
    ensure!(rustix::process::geteuid().is_root(), "a kernel block device needs root; NBD clients like qemu do without");
    ensure!(arguments.block_size.is_power_of_two(), "the block size must be a power of two");
    let folder = folder_of(place, &arguments.disk)?;
    if let Some(process) = ProcessFile::alive_at(&folder.join("pid")) {
        let device = process.text("device").unwrap_or("a device that is not ready yet");
        bail!(
            "{} is attached as {device} (pid {}); `petal detach {}` ends that",
            arguments.disk,
            process.pid,
            arguments.disk
        );
    }
    let process_file = folder.join("pid");
    let held = hold(&folder, &arguments.disk)?;
    take_down(place, &folder)?;
    // Its process inherits the lock.
    rustix::io::fcntl_setfd(&held, rustix::io::FdFlags::empty())?;
    std::fs::create_dir_all(folder.join("fuse")).with_context(|| format!("cannot make {}", folder.display()))?;
    let log_path = folder.join("log");
    let log = Log::from_here(&log_path);
    let started = processes::spawn_detached(&words(place, &folder, &arguments)?, &log_path)
        .and_then(|mut child| processes::wait_until_ready(&mut child, &process_file, &log, READY_LIMIT));
    let process = match started {
        Ok(process) => process,
        Err(error) => {
            let _ = take_down(place, &folder);
            return Err(error.context(format!("cannot attach {}", arguments.disk)));
        }
    };
    let device = process.text("device").unwrap_or_default();
    if arguments.json {
        return output::print_json(&json!({"disk": arguments.disk, "device": device, "pid": process.pid}));
    }
    println!("{device}");
    Ok(())
}

/// How long the cluster may take to say which disk has a name.
const NAME_LIMIT: Duration = Duration::from_secs(3);

/// Where the process of the disk that has a name at present keeps its files, or will; where nobody can say which disk
/// that is, of the one that had it when it was attached. Blocks, and asks the cluster.
pub fn folder_of(place: &Place, disk: &str) -> Result<PathBuf> {
    let (asked, name) = (place.clone(), disk.to_string());
    let find = async move {
        let state = Connection::open(&asked).await?.state().await?;
        Ok::<_, anyhow::Error>(super::disk::find(&state, &name)?.id)
    };
    match connect::block_on(async move { tokio::time::timeout(NAME_LIMIT, find).await? }) {
        Ok(id) => folder_of_present(place, disk, id),
        Err(_) => folder_named(place, disk),
    }
}

/// The same, of a disk that is known to have the name at present.
pub fn folder_of_present(place: &Place, disk: &str, id: VdiskId) -> Result<PathBuf> {
    let by_name = folder_named(place, disk)?;
    let of = |process: &ProcessFile| process.text("vdisk") == Some(&id.to_string());
    let beside = std::fs::read_dir(by_name.parent().unwrap_or(Path::new("."))).into_iter().flatten().flatten();
    let found = beside.map(|entry| entry.path()).find(|f| ProcessFile::at(&f.join("pid")).is_some_and(|p| of(&p)));
    // A disk that had this name before is attached.
    let taken = ProcessFile::alive_at(&by_name.join("pid")).is_some_and(|p| p.text("vdisk").is_some() && !of(&p));
    Ok(found.unwrap_or_else(|| if taken { by_name.with_file_name(format!("{disk}@{id}")) } else { by_name }))
}

/// By the name that it had when it was attached.
fn folder_named(place: &Place, disk: &str) -> Result<PathBuf> {
    // Names of disks have no slash and no dot in front (the cluster refuses them): safe as file names.
    ensure!(!disk.is_empty() && !disk.contains('/') && !disk.starts_with('.'), "'{disk}' is not the name of a disk");
    match place {
        Place::Folder(_) => {
            let folder = place.folder()?;
            folder.read()?;
            Ok(folder.attached(disk))
        }
        Place::Addresses(addresses) => {
            let mark = stdx::checksum::crc32c(addresses.join(",").as_bytes());
            Ok(Path::new("/run/petal").join(format!("{mark:08x}")).join(disk))
        }
    }
}

/// The lock of a disk that is attached, which its process holds while it lives, and who attaches or detaches it meanwhile.
/// (A pid says less: another namespace has other pids.) It is beside the folder and stays for ever: who locked a file that
/// is removed holds nothing.
fn hold(folder: &Path, disk: &str) -> Result<File> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let path = folder.with_file_name(format!(".{name}.lock"));
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    let held = processes::lock(&path)?;
    held.with_context(|| {
        format!("another process has {disk} attached, or attaches or detaches it at this moment; try again")
    })
}

/// Takes down what a process left that died: its session, its device and its folder.
///
/// # Errors
/// If it lives, or something of it cannot be removed.
pub fn take_down_dead(place: &Place, folder: &Path, disk: &str) -> Result<()> {
    let _held = hold(folder, disk)?;
    take_down(place, folder)
}

/// The same, under the lock.
fn take_down(place: &Place, folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    end_session_of_dead(place, folder);
    petal_fuse::clean_up_remains(&folder.join("fuse"))?;
    std::fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))
}

/// Nobody can do anything with it any more, and the disk would count as attached.
fn end_session_of_dead(place: &Place, folder: &Path) {
    let Some(process) = ProcessFile::at(&folder.join("pid")).filter(|process| !process.lives()) else { return };
    let Some(number) = process.text("session").and_then(|text| text.parse().ok()).map(SessionId) else { return };
    let (place, holder) = (place.clone(), process.text("holder").unwrap_or_default().to_string());
    let ended = connect::block_on(async move {
        let connection = Connection::open(&place).await?;
        // Another cluster, made in the same place since, has given the number to somebody else.
        let state = connection.state().await?;
        if state.sessions.get(&number).is_some_and(|session| session.holder == holder) {
            connection.execute_settled(Command::Detach { session: number }).await?;
        }
        Ok(())
    });
    if let Err(error) = ended {
        tracing::warn!(
            "the process of the disk has died (pid {}), and its session {number} cannot be ended: {error:#}",
            process.pid
        );
    }
}

/// The command line of the process in the background.
fn words(place: &Place, folder: &Path, arguments: &Arguments) -> Result<Vec<String>> {
    let place = match place {
        Place::Folder(_) => place.folder()?.path().display().to_string(),
        Place::Addresses(addresses) => addresses.join(","),
    };
    let mut words = vec!["--cluster".into(), place, "attach".into(), arguments.disk.clone()];
    words.extend(["--serve".into(), folder.display().to_string()]);
    words.extend(["--block-size".into(), arguments.block_size.to_string()]);
    words.extend(arguments.read_only.then(|| "--read-only".into()));
    words.extend(arguments.take_over.then(|| "--take-over".into()));
    Ok(words)
}

/// The life of the process that serves.
async fn serve(place: &Place, folder: &Path, arguments: &Arguments) -> Result<()> {
    let mut process = ProcessFile::own();
    process.write(&folder.join("pid"))?;
    let connection = Connection::open(place).await?;
    let mode = if arguments.read_only { Attachment::ReadOnly } else { Attachment::Exclusive };
    let holder = holder::of_process("petal attach");
    let disk = connection.attach(&arguments.disk, mode, &holder, arguments.take_over).await?;
    process.details.insert("disk".into(), arguments.disk.clone().into());
    process.details.insert("vdisk".into(), disk.id().to_string().into());
    process.details.insert("session".into(), disk.session().0.to_string().into());
    process.details.insert("holder".into(), holder.into());
    process.write(&folder.join("pid"))?;
    let served = serve_attached(folder, arguments, process, &disk).await;
    let detached = disk.detach().await;
    served?;
    Ok(detached?)
}

/// From the mount to its end.
async fn serve_attached(folder: &Path, arguments: &Arguments, mut process: ProcessFile, disk: &Disk) -> Result<()> {
    let (mount, requests) = petal_fuse::mount(&folder.join("fuse"), disk.size(), arguments.read_only)
        .with_context(|| format!("cannot mount FUSE on {}", folder.join("fuse").display()))?;
    let serving = tokio::task::spawn_local(petal_fuse::serve(requests, Rc::new(ServedDisk(disk.clone()))));

    let (fuse, options) =
        (folder.join("fuse"), AttachOptions { block_size: arguments.block_size, read_only: arguments.read_only });
    let kernel_disk = tokio::task::spawn_blocking(move || KernelDisk::attach(mount, &fuse, options)).await?;
    let kernel_disk = kernel_disk?;
    let device = kernel_disk.device().display().to_string();
    process.details.insert("device".into(), device.clone().into());
    process.ready = true;
    process.write(&folder.join("pid"))?;
    tracing::info!("{} is {device}", arguments.disk);

    until_detached(kernel_disk).await?;
    serving.await?;
    Ok(())
}

/// Takes the device down when a signal asks for it; one in use stays, and the next signal tries again.
async fn until_detached(mut kernel_disk: KernelDisk) -> Result<()> {
    loop {
        connect::stop_signal().await?;
        kernel_disk = match tokio::task::spawn_blocking(move || kernel_disk.detach()).await? {
            Ok(()) => return Ok(()),
            Err((kept, error @ AttachError::InUse { .. })) => {
                tracing::warn!("{error}");
                *kept
            }
            Err((_, error)) => return Err(error.into()),
        };
    }
}

/// The client library's disk as FUSE wants it.
struct ServedDisk(Disk);

impl BlockFile for ServedDisk {
    async fn read(&self, offset: u64, length: u32) -> Result<Vec<Bytes>, BlockError> {
        self.0.read(offset, length.into()).await.map_err(|e| errno(&e))
    }
    async fn write(&self, offset: u64, data: Bytes) -> Result<(), BlockError> {
        self.0.write(offset, data).await.map_err(|e| errno(&e))
    }
    async fn zero(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.0.zero(offset, length).await.map_err(|e| errno(&e))
    }
    async fn flush(&self) -> Result<(), BlockError> {
        // Acknowledged is stable.
        Ok(())
    }
}

fn errno(error: &RequestError) -> BlockError {
    tracing::warn!("a request of the kernel failed: {error}");
    match error {
        RequestError::Refused(Refusal::NoSpace) => BlockError::NoSpace,
        RequestError::Refused(Refusal::ReadOnly) => BlockError::ReadOnly,
        RequestError::Refused(Refusal::BeyondEnd) => BlockError::BeyondEnd,
        _ => BlockError::Io,
    }
}
