//! A block device that hangs or fails when it is told to, for scenarios with real processes:
//!
//! ```text
//!   faulty_disk FILE DIR      a loop device on a FUSE file (mounted on DIR) on FILE; prints its path when it is there
//!     pass                    every request is done (this is how it begins)
//!     hang                    none is answered until something else is said; then all that waited are
//!     fail-writes             EIO
//!     fail-reads AT AT ...    EIO for whoever reads one of these blocks of 4 KiB, by offset
//! ```
//!
//! Each line of the standard input is answered, when it holds, by the number of requests that the one before held up or
//! failed. At its end the device is taken down; whoever uses it must be gone. Needs root. What is answered is not on
//! stable storage: machines do not lose power in these scenarios.

use bytes::Bytes;
use petal_fuse::{AttachOptions, BlockError, BlockFile, KernelDisk, mount, serve};
use std::collections::BTreeSet;
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::watch;

/// What is done with requests.
enum Mode {
    Pass,
    Hang,
    FailWrites,
    FailReads(BTreeSet<u64>),
}

impl Mode {
    fn from_line(line: &str) -> Result<Mode, Box<dyn Error>> {
        let mut words = line.split_whitespace();
        Ok(match words.next() {
            Some("pass") => Mode::Pass,
            Some("hang") => Mode::Hang,
            Some("fail-writes") => Mode::FailWrites,
            Some("fail-reads") => Mode::FailReads(words.map(str::parse).collect::<Result<_, _>>()?),
            _ => return Err(format!("'{line}' is not a mode").into()),
        })
    }
}

struct FaultyFile {
    file: File,
    mode: watch::Receiver<Mode>,
    /// Requests that were held up or failed.
    met: Arc<AtomicU64>,
}

impl FaultyFile {
    /// Waits while it hangs; then fails if it should.
    async fn pass(&self, fails: impl Fn(&Mode) -> bool) -> Result<(), BlockError> {
        let mut mode = self.mode.clone();
        if matches!(*mode.borrow(), Mode::Hang) {
            self.met.fetch_add(1, Ordering::Relaxed);
        }
        let mode = mode.wait_for(|mode| !matches!(mode, Mode::Hang)).await.map_err(|_| BlockError::Io)?;
        if fails(&mode) {
            self.met.fetch_add(1, Ordering::Relaxed);
            return Err(BlockError::Io);
        }
        Ok(())
    }

    async fn pass_write(&self) -> Result<(), BlockError> {
        self.pass(|mode| matches!(mode, Mode::FailWrites)).await
    }
}

impl BlockFile for FaultyFile {
    async fn read(&self, offset: u64, length: u32) -> Result<Vec<Bytes>, BlockError> {
        let range = offset..offset + u64::from(length);
        self.pass(|mode| matches!(mode, Mode::FailReads(bad) if bad.range(range.clone()).next().is_some())).await?;
        let mut data = vec![0; length as usize];
        self.file.read_exact_at(&mut data, offset).map_err(|_| BlockError::Io)?;
        Ok(vec![data.into()])
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), BlockError> {
        self.pass_write().await?;
        self.file.write_all_at(&data, offset).map_err(|_| BlockError::Io)
    }

    async fn zero(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.pass_write().await?;
        let zeros = vec![0; length.min(1 << 20) as usize];
        for at in (0..length).step_by(1 << 20) {
            let piece = &zeros[..(length - at).min(1 << 20) as usize];
            self.file.write_all_at(piece, offset + at).map_err(|_| BlockError::Io)?;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), BlockError> {
        self.pass_write().await
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [file, dir] = arguments.as_slice() else { return Err("usage: faulty_disk FILE DIR".into()) };
    let file = OpenOptions::new().read(true).write(true).open(file)?;
    let (mounted, requests) = mount(Path::new(dir), file.metadata()?.len(), false)?;
    let (modes, mode) = watch::channel(Mode::Pass);
    let met = Arc::new(AtomicU64::new(0));
    let faulty = FaultyFile { file, mode, met: met.clone() };
    let serving = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime without I/O");
        tokio::task::LocalSet::new().block_on(&runtime, serve(requests, Rc::new(faulty)));
    });
    let options = AttachOptions { block_size: 4096, read_only: false };
    let disk = KernelDisk::attach(mounted, Path::new(dir), options)?;
    println!("{}", disk.device().display());
    for line in std::io::stdin().lines() {
        modes.send_replace(Mode::from_line(&line?)?);
        println!("{}", met.swap(0, Ordering::Relaxed));
        std::io::stdout().flush()?;
    }
    modes.send_replace(Mode::Pass);
    disk.detach().map_err(|(_, error)| error)?;
    serving.join().map_err(|_| "the thread that serves panicked")?;
    Ok(())
}
