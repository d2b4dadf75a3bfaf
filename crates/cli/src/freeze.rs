//! File systems that stand still while a snapshot is made of the disks below them (`--freeze`).
//!
//! ```text
//!   find where the disk's device is mounted -> guard starts -> FIFREEZE -> snapshot -> FITHAW -> guard ends
//! ```
//!
//! A file system that stays frozen hangs everybody who uses it. So a *guard*, a small process of its own, thaws it
//! when this process ends, however it ends (Ctrl-C, kill -9), and [`GUARD_LIMIT`] after it was frozen in any case. It is
//! told by a pipe, whose end means that nobody is there any more.

use crate::commands::attach;
use crate::commands::disk::find_disk;
use crate::place::Place;
use crate::processes::ProcessFile;
use anyhow::{Context, Result, bail, ensure};
use petal::global_state::State;
use petal_io::frozen::{freeze, thaw};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

/// How long the snapshot may take while file systems stand still.
pub const HOLD_LIMIT: Duration = Duration::from_secs(15);
/// How long a guard waits when it stands still.
const GUARD_LIMIT: Duration = Duration::from_secs(20);
/// What a guard is told of its file system: it is about to be frozen (writing back may take long), it is, it no longer is.
const ABOUT_TO: u8 = b'a';
const IS_FROZEN: u8 = b'f';
const NO_LONGER: u8 = b't';

/// A mounted file system, and the attached disk below it.
#[derive(Debug)]
pub struct Mounted {
    /// The disk.
    pub disk: String,
    /// Where it is mounted.
    pub on: PathBuf,
}

/// Where the disks, which must be attached on this machine by `petal attach`, are mounted.
pub fn find(place: &Place, state: &State, disks: &[String]) -> Result<Vec<Mounted>> {
    ensure!(rustix::process::geteuid().is_root(), "freezing a file system needs root");
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let mut all = Vec::new();
    for disk in disks {
        let folder = attach::folder_of_present(place, disk, find_disk(state, disk)?.id)?;
        let process = ProcessFile::alive_at(&folder.join("pid")).filter(|p| p.ready);
        let Some(process) = process else {
            bail!(
                "{disk} is not attached on this machine by `petal attach`, so nothing can be frozen here; leave out \
                 --freeze, or run this where its file system is mounted"
            );
        };
        let device = process.text("device").context("the process file of an attached disk names no device")?;
        let number = std::fs::metadata(device).with_context(|| format!("cannot look at {device}"))?.rdev();
        let number = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
        match mount_point(&table, &number, device) {
            Some(on) => all.push(Mounted { disk: disk.clone(), on }),
            None => bail!("{device} ({disk}) is not mounted, so there is no file system to freeze; leave out --freeze"),
        }
    }
    Ok(all)
}

/// Where a device is mounted, by `/proc/self/mountinfo`: `id parent major:minor root on options... - type source ...`.
fn mount_point(table: &str, number: &str, device: &str) -> Option<PathBuf> {
    let of_line = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let before: Vec<&str> = before.split(' ').collect();
        // Some file systems (btrfs) have a number of their own, and name the device as their source.
        let is_it = *before.get(2)? == number || after.split(' ').nth(1)? == device;
        let on = before.get(4)?;
        is_it.then(|| PathBuf::from(unescape(on)))
    };
    table.lines().find_map(of_line)
}

/// `\040` is a blank.
fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.as_bytes();
    while let Some((&byte, rest)) = bytes.split_first() {
        let octal = rest.get(..3).filter(|_| byte == b'\\').and_then(|d| std::str::from_utf8(d).ok());
        match octal.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(escaped) => {
                out.push(escaped);
                bytes = &rest[3..];
            }
            None => {
                out.push(byte);
                bytes = rest;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// File systems that stand still until this is dropped.
pub struct Frozen(Vec<FrozenMount>);

struct FrozenMount {
    on: PathBuf,
    root: File,
    guard: Child,
    told: ChildStdin,
}

impl Frozen {
    /// Freezes all, or none. Blocks while the kernel writes back.
    pub fn freeze(mounts: &[Mounted]) -> Result<Frozen> {
        let mut frozen = Frozen(Vec::new());
        for Mounted { disk, on } in mounts {
            let root = File::open(on).with_context(|| format!("cannot open {}", on.display()))?;
            let mut guard = guard(on)?;
            let mut told = guard.stdin.take().context("a guard has no pipe")?;
            told.write_all(&[ABOUT_TO]).context("the guard of a file system has ended")?;
            if let Err(error) = freeze(&root) {
                // It is somebody else's, if it is frozen: not ours to thaw.
                let _ = told.write_all(&[NO_LONGER]);
                drop(told);
                let _ = guard.wait();
                let what = format!("cannot freeze the file system on {} ({disk})", on.display());
                return Err(error).context(what);
            }
            let _ = told.write_all(&[IS_FROZEN]);
            frozen.0.push(FrozenMount { on: on.clone(), root, guard, told });
        }
        Ok(frozen)
    }

    /// Lets all go on.
    pub fn thaw(mut self) -> Result<()> {
        let mut result = Ok(());
        for mut mount in std::mem::take(&mut self.0) {
            if let Err(error) = mount.end() {
                result = Err(error).with_context(|| {
                    let on = mount.on.display();
                    format!("{on} may have been thawed too early: {on} was not frozen any more")
                });
            }
        }
        result
    }
}

impl FrozenMount {
    fn end(&mut self) -> std::io::Result<()> {
        let result = thaw(&self.root);
        let _ = self.told.write_all(&[NO_LONGER]);
        let _ = self.told.flush();
        result
    }
}

impl Drop for FrozenMount {
    fn drop(&mut self) {
        // A second thaw of what is not frozen does nothing; the guard sees the end of its pipe, and ends.
        let _ = self.end();
        let _ = self.guard.kill();
        let _ = self.guard.wait();
    }
}

/// Starts the guard of a file system, out of reach of the terminal's signals.
fn guard(on: &Path) -> Result<Child> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command = Command::new(program);
    command.arg("thaw-when-left").arg(on).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.process_group(0).spawn().context("cannot start the process that thaws the file system if this one ends")
}

/// The guard's life: `petal thaw-when-left PATH`.
pub fn guard_mount(on: &Path) -> Result<()> {
    let root = File::open(on).with_context(|| format!("cannot open {}", on.display()))?;
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut byte = [0];
        while matches!(std::io::stdin().read(&mut byte), Ok(1)) {
            if tell.send(byte[0]).is_err() {
                return;
            }
        }
    });
    let (mut may_be_frozen, mut limit) = (false, Duration::MAX);
    // Until the pipe ends, or time does: no word follows `IS_FROZEN` but the last one.
    while let Ok(word) = told.recv_timeout(limit) {
        may_be_frozen = word != NO_LONGER;
        limit = if word == IS_FROZEN { GUARD_LIMIT } else { Duration::MAX };
    }
    if may_be_frozen {
        thaw(&root).with_context(|| format!("cannot thaw {}", on.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 28 0:21 / /proc rw,nosuid - proc proc rw
40 28 7:3 / /mnt/with\\040blank rw,relatime shared:1 - ext4 /dev/loop3 rw
41 28 0:55 / /mnt/b rw - btrfs /dev/loop4 rw,ssd
42 28 7:3 /sub /elsewhere rw - ext4 /dev/loop3 rw
";

    #[test]
    fn mount_points_are_found_by_number_and_by_source() {
        let at = |number, device| mount_point(TABLE, number, device).map(|p| p.display().to_string());
        assert_eq!(at("7:3", "/dev/loop3").as_deref(), Some("/mnt/with blank"));
        assert_eq!(at("7:4", "/dev/loop4").as_deref(), Some("/mnt/b"));
        assert_eq!(at("7:5", "/dev/loop5"), None);
    }

    #[test]
    fn escapes_are_undone_and_what_is_none_stays() {
        assert_eq!(unescape("a\\040b\\134c"), "a b\\c");
        assert_eq!(unescape("a\\9zz\\04"), "a\\9zz\\04");
    }
}
