//! File systems that stand still while a snapshot is made of the disks below them (`--freeze`).
//!
//! ```text
//!   find where the disk's device is mounted -> a freezer: written back -> frozen -> snapshot -> thawed
//! ```
//!
//! A file system that stays frozen hangs everybody who uses it, and one whose disk takes no writes holds up whoever
//! freezes it, so that no signal ends that process. So a *freezer*, a small process of its own, does both: it thaws when this
//! process ends, however it ends (Ctrl-C, kill -9), and [`FROZEN_LIMIT`] after it was frozen in any case; and this process
//! waits for none of its words for ever. It is told by a pipe, whose end means that nobody is there any more.

use crate::commands::attach;
use crate::commands::disk::find_disk;
use crate::place::Place;
use crate::processes::ProcessFile;
use anyhow::{Context, Result, bail, ensure};
use petal::global_state::State;
use petal_io::frozen::{freeze, thaw};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

/// How long the snapshot may take while file systems stand still.
pub const HOLD_LIMIT: Duration = Duration::from_secs(15);
/// How long a freezer waits when it stands still.
const FROZEN_LIMIT: Duration = Duration::from_secs(20);
/// How long writing back may take, while everybody goes on.
const WRITE_BACK_LIMIT: Duration = Duration::from_secs(60);
/// What a freezer says of its file system; anything else is why it does not go on.
const WRITTEN: &str = "written back";
const FROZEN: &str = "frozen";
const THAWED: &str = "thawed";

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
pub struct Frozen(Vec<Freezer>);

/// The process that freezes one.
struct Freezer {
    mounted: Mounted,
    child: Child,
    told: ChildStdin,
    words: Receiver<String>,
}

impl Frozen {
    /// Freezes all, or none.
    pub fn freeze(mounts: Vec<Mounted>) -> Result<Frozen> {
        let mut all = Frozen(Vec::new());
        for mounted in mounts {
            all.0.push(Freezer::start(mounted)?);
        }
        // What is written back before takes less time in which nothing can be written.
        all.0.iter().try_for_each(|f| f.wait_for(WRITTEN, WRITE_BACK_LIMIT))?;
        for freezer in &mut all.0 {
            freezer.told.write_all(b"f").context("the process that was to freeze a file system has ended")?;
            freezer.wait_for(FROZEN, HOLD_LIMIT)?;
        }
        Ok(all)
    }

    /// Lets all go on.
    pub fn thaw(self) -> Result<()> {
        let all: Vec<_> = self.0.into_iter().map(Freezer::leave).collect();
        let mut result = Ok(());
        for (mounted, words) in all {
            let thawed = wait_for(&mounted, &words, THAWED, HOLD_LIMIT);
            if thawed.is_err() && words.try_recv() == Err(TryRecvError::Disconnected) {
                // Somebody has killed it: what was thawed already stays so.
                let _ = File::open(&mounted.on).and_then(|root| thaw(&root));
            }
            result = result.and(thawed);
        }
        result
    }
}

impl Freezer {
    /// Out of reach of the terminal's signals.
    fn start(mounted: Mounted) -> Result<Freezer> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(program);
        command.arg("freeze-until-left").arg(&mounted.on).stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.stderr(Stdio::null()).process_group(0).spawn();
        let mut child = child.context("cannot start the process that freezes the file system")?;
        let told = child.stdin.take().context("a process has no pipe")?;
        let out = child.stdout.take().context("a process has no pipe")?;
        let (tell, words) = std::sync::mpsc::channel();
        // Ends with the pipe.
        std::thread::spawn(move || BufReader::new(out).lines().map_while(Result::ok).try_for_each(|l| tell.send(l)));
        Ok(Freezer { mounted, child, told, words })
    }

    fn wait_for(&self, word: &str, limit: Duration) -> Result<()> {
        wait_for(&self.mounted, &self.words, word, limit)
    }

    /// Its pipe ends, so it thaws, now or as soon as it can. Nobody waits for it to end.
    fn leave(self) -> (Mounted, Receiver<String>) {
        drop(self.told);
        drop(self.child);
        (self.mounted, self.words)
    }
}

fn wait_for(Mounted { disk, on }: &Mounted, words: &Receiver<String>, word: &str, limit: Duration) -> Result<()> {
    let on = on.display();
    match words.recv_timeout(limit) {
        Ok(said) if said == word => Ok(()),
        Ok(said) => bail!("{on} ({disk}): {said}"),
        Err(RecvTimeoutError::Timeout) => bail!(
            "the file system on {on} is not {word} after {} s: {disk} takes no writes at present (`petal status`); it goes \
             on as soon as it can",
            limit.as_secs()
        ),
        Err(RecvTimeoutError::Disconnected) => bail!("the process that was to freeze {on} has ended"),
    }
}

/// A freezer's life: `petal freeze-until-left PATH`.
pub fn freeze_until_left(on: &Path) -> Result<()> {
    let say = |word: &str| {
        // If nobody listens, the other pipe has ended, too.
        let _ = writeln!(std::io::stdout(), "{word}").and_then(|()| std::io::stdout().flush());
    };
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut byte = [0];
        while matches!(std::io::stdin().read(&mut byte), Ok(1)) {
            if tell.send(()).is_err() {
                return;
            }
        }
    });
    let written = File::open(on).and_then(|root| Ok((rustix::fs::syncfs(&root)?, root)));
    let root = match written {
        Ok(((), root)) => root,
        Err(error) => {
            say(&format!("it cannot be written back: {error}"));
            return Ok(());
        }
    };
    say(WRITTEN);
    if told.recv().is_err() {
        return Ok(());
    }
    if let Err(error) = freeze(&root) {
        // It is somebody else's, if it is frozen: not ours to thaw.
        say(&format!("it cannot be frozen: {error}"));
        return Ok(());
    }
    say(FROZEN);
    let is_left = matches!(told.recv_timeout(FROZEN_LIMIT), Err(RecvTimeoutError::Disconnected));
    let thawed = thaw(&root);
    say(match (is_left, thawed) {
        (true, Ok(())) => THAWED,
        (true, Err(_)) => "it was not frozen any more: somebody else has thawed it, perhaps too early",
        (false, _) => "it was thawed after so long that it may have been too early",
    });
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
