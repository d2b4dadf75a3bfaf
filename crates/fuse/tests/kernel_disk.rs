//! A disk in memory becomes a kernel block device; a file system lives on it. Needs root, /dev/fuse and
//! /dev/loop-control, and mkfs.ext4 and e2fsck (Debian: e2fsprogs); without root the tests say so and pass.

use bytes::Bytes;
use petal_fuse::{AttachOptions, BlockError, BlockFile, KernelDisk, mount, serve};
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the kernel asked for, so that a test can see that it did.
#[derive(Default)]
struct Counts {
    flushes: AtomicU64,
    zeroed: AtomicU64,
}

struct Memory {
    bytes: RefCell<Vec<u8>>,
    counts: Arc<Counts>,
}

impl BlockFile for Memory {
    async fn read(&self, offset: u64, length: u32) -> Result<Vec<Bytes>, BlockError> {
        // Answers in two pieces and after others had their turn: both must be fine.
        tokio::task::yield_now().await;
        let bytes = self.bytes.borrow();
        let range = &bytes[offset as usize..][..length as usize];
        let (a, b) = range.split_at(range.len() / 2);
        Ok(vec![Bytes::copy_from_slice(a), Bytes::copy_from_slice(b)])
    }
    async fn write(&self, offset: u64, data: Bytes) -> Result<(), BlockError> {
        tokio::task::yield_now().await;
        self.bytes.borrow_mut()[offset as usize..][..data.len()].copy_from_slice(&data);
        Ok(())
    }
    async fn zero(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.counts.zeroed.fetch_add(length, Ordering::Relaxed);
        self.bytes.borrow_mut()[offset as usize..][..length as usize].fill(0);
        Ok(())
    }
    async fn flush(&self) -> Result<(), BlockError> {
        self.counts.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// An attached disk in memory, taken down on every path out of a test.
struct Attached {
    disk: Option<KernelDisk>,
    counts: Arc<Counts>,
    server: Option<std::thread::JoinHandle<()>>,
    dir: tempfile::TempDir,
}

impl Attached {
    fn new(size: usize) -> Attached {
        let dir = tempfile::tempdir().unwrap();
        let on = dir.path().join("fuse");
        std::fs::create_dir(&on).unwrap();
        let (mounted, requests) = mount(&on, size as u64, false).unwrap();
        let counts = Arc::new(Counts::default());
        let for_server = counts.clone();
        let server = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let file = Rc::new(Memory { bytes: RefCell::new(vec![0; size]), counts: for_server });
            tokio::task::LocalSet::new().block_on(&runtime, serve(requests, file));
        });
        let disk = KernelDisk::attach(mounted, &on, AttachOptions { block_size: 512, read_only: false }).unwrap();
        Attached { disk: Some(disk), counts, server: Some(server), dir }
    }
    fn device(&self) -> PathBuf {
        self.disk.as_ref().unwrap().device().to_path_buf()
    }
    fn mount_point(&self) -> PathBuf {
        let on = self.dir.path().join("ext4");
        std::fs::create_dir_all(&on).unwrap();
        on
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.dir.path().join("ext4")).stderr(std::process::Stdio::null()).status();
        if let Some(disk) = self.disk.take() {
            let _ = disk.detach();
        }
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

fn run(program: &str, arguments: &[&Path]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {} {text}", output.status);
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !root {
        eprintln!("skipped: a loop device needs root and /dev/fuse");
    }
    root
}

#[test]
fn ext4_lives_on_the_device_and_discard_and_flush_reach_the_disk() {
    if !is_root() {
        return;
    }
    let mut a = Attached::new(256 << 20);
    let (device, on) = (a.device(), a.mount_point());
    run("mkfs.ext4", &[Path::new("-q"), &device]);
    assert!(a.counts.zeroed.load(Ordering::Relaxed) > 0, "mkfs discards");
    run("mount", &[&device, &on]);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    run("cp", &[Path::new("-r"), source, &on]);
    run("sync", &[]);
    assert!(a.counts.flushes.load(Ordering::Relaxed) > 0, "sync flushes");

    let in_use = a.disk.take().unwrap().detach();
    let Err((disk, error)) = in_use else { panic!("a mounted device must not be taken down") };
    assert!(error.to_string().contains("in use"), "{error}");
    a.disk = Some(*disk);

    run("umount", &[&on]);
    run("mount", &[&device, &on]);
    run("diff", &[Path::new("-r"), source, &on.join(source.file_name().unwrap())]);
    run("umount", &[&on]);
    run("e2fsck", &[Path::new("-f"), Path::new("-n"), &device]);

    a.disk.take().unwrap().detach().map_err(|(_, e)| e).unwrap();
    a.server.take().unwrap().join().unwrap();
    assert!(!petal_io::loop_device::LoopDevice::existing(&device).backing_file().is_some_and(|f| f.starts_with(&on)));
}

#[test]
fn a_disk_that_grows_is_seen_by_the_kernel() {
    if !is_root() {
        return;
    }
    let a = Attached::new(8 << 20);
    let sectors = |device: &Path| {
        let name = device.file_name().unwrap().to_str().unwrap();
        let text = std::fs::read_to_string(format!("/sys/block/{name}/size")).unwrap();
        text.trim().parse::<u64>().unwrap()
    };
    assert_eq!(sectors(&a.device()), (8 << 20) / 512);
    a.disk.as_ref().unwrap().set_size(16 << 20).unwrap();
    assert_eq!(sectors(&a.device()), (16 << 20) / 512);
}
