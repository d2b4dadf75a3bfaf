//! Processes that outlive the command that started them, and how to find them again.
//!
//! A process file holds the pid and the moment at which that process started, as the kernel counts it: a
//! pid alone may have been given to somebody else since. The file is written by the process itself; it
//! may be stale, and then says nothing.

use anyhow::{Context, Result};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What a process tells of itself, in its process file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessFile {
    /// Its pid.
    pub pid: u32,
    /// When it started, in the kernel's ticks since boot.
    pub started: u64,
    /// True once it does what it was started for.
    pub ready: bool,
    /// What else it tells: addresses, a device.
    #[serde(default)]
    pub details: serde_json::Map<String, serde_json::Value>,
}

/// A lock on a file, which is made if it is not there; it ends with the last process that has it, however that ends. `None`
/// if somebody holds it.
pub fn lock(path: &Path) -> Result<Option<File>> {
    let file = File::options().create(true).truncate(false).write(true).open(path);
    let file = file.with_context(|| format!("cannot write {}", path.display()))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot lock {}", path.display())),
    }
}

impl ProcessFile {
    /// For this process, not ready yet.
    pub fn own() -> ProcessFile {
        let pid = std::process::id();
        ProcessFile { pid, started: start_time(pid).unwrap_or(0), ready: false, details: serde_json::Map::new() }
    }

    /// Reads a process file, whose process may be gone.
    pub fn at(path: &Path) -> Option<ProcessFile> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    /// Reads a process file; `None` if there is none, or if its process is gone.
    pub fn alive_at(path: &Path) -> Option<ProcessFile> {
        ProcessFile::at(path).filter(ProcessFile::lives)
    }

    /// Writes it.
    pub fn write(&self, path: &Path) -> Result<()> {
        let new = path.with_extension("new");
        let write = || std::fs::write(&new, serde_json::to_vec(self)?).and_then(|()| std::fs::rename(&new, path));
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// A detail that is text.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.details.get(key)?.as_str()
    }

    /// Adds a warning for whoever starts it or looks at it.
    pub fn warn(&mut self, warning: String) {
        let warnings = self.details.entry("warnings").or_insert_with(|| serde_json::Value::Array(Vec::new()));
        warnings.as_array_mut().into_iter().for_each(|w| w.push(warning.clone().into()));
    }

    /// Its warnings.
    pub fn warnings(&self) -> impl Iterator<Item = &str> {
        self.details.get("warnings").and_then(|w| w.as_array()).into_iter().flatten().filter_map(|w| w.as_str())
    }

    /// True while the process lives.
    pub fn lives(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Asks it to end (SIGTERM) or ends it (SIGKILL).
    pub fn signal(&self, signal: Signal) {
        if self.lives()
            && let Some(pid) = Pid::from_raw(self.pid as i32)
        {
            // It may have ended just now: that is what was wanted.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Waits until it has ended; false if it has not after `limit`.
    pub fn wait_for_end(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while self.lives() {
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

/// When a living process started; `None` if there is no such process, or only a zombie of it.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may contain anything; fields are counted behind its closing bracket.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let dead = matches!(*fields.first()?, "Z" | "X");
    if dead { None } else { fields.get(19)?.parse().ok() }
}

/// What takes longer than this is told of.
const LONG: Duration = Duration::from_secs(5);

/// This program, in a session of its own: signals of the terminal do not reach it. Its output is appended
/// to `log`.
pub fn spawn_detached(arguments: &[String], log: &Path) -> Result<Child> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let open = || std::fs::OpenOptions::new().create(true).append(true).open(log);
    let (out, err) = (open(), open());
    let (Ok(out), Ok(err)) = (out, err) else { anyhow::bail!("cannot write the log {}", log.display()) };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
    command.spawn().with_context(|| format!("cannot start `petal {}`", arguments.join(" ")))
}

/// Waits until the process of `file` is ready; says so on standard error if that takes long. If `child` ends before, the
/// error is what it wrote to its log since `log_start`.
pub fn wait_until_ready(child: &mut Child, file: &Path, log: &Log, limit: Duration) -> Result<ProcessFile> {
    let begun = Instant::now();
    let (end, mut tells_at) = (begun + limit, Some(begun + LONG));
    loop {
        if let Some(status) = child.try_wait()? {
            anyhow::bail!("{}", log.complaint().unwrap_or_else(|| format!("it ended with {status}")));
        }
        if let Some(process) = ProcessFile::alive_at(file).filter(|p| p.ready && p.pid == child.id()) {
            return Ok(process);
        }
        if Instant::now() > end {
            anyhow::bail!("it is not ready after {} s; see {}", limit.as_secs(), log.path.display());
        }
        if tells_at.take_if(|at| Instant::now() > *at).is_some() {
            let (log, limit) = (log.path.display(), limit.as_secs());
            eprintln!("Not ready yet; it may take up to {limit} s, and {log} says what it waits for.");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The part of a log that one process writes.
pub struct Log {
    path: PathBuf,
    start: u64,
}

impl Log {
    /// From the present end of the log on.
    pub fn from_here(path: &Path) -> Log {
        let start = std::fs::metadata(path).map_or(0, |m| m.len());
        Log { path: path.into(), start }
    }

    /// The last error in it, without the word `error:`; or that it panicked.
    pub fn complaint(&self) -> Option<String> {
        let bytes = std::fs::read(&self.path).ok()?;
        let text = String::from_utf8_lossy(bytes.get(self.start as usize..)?).into_owned();
        if let Some(at) = text.rfind("\nerror: ").map(|at| at + 1).or_else(|| text.starts_with("error: ").then_some(0))
        {
            return Some(text[at + "error: ".len()..].trim_end().to_string());
        }
        let panic = text.lines().skip_while(|l| !l.contains("panicked at")).take(2).collect::<Vec<_>>().join(" ");
        (!panic.is_empty()).then(|| format!("{panic}: this is a bug; its log is {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_file_of_a_dead_or_recycled_pid_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        assert_eq!(ProcessFile::alive_at(&path), None);
        let own = ProcessFile::own();
        own.write(&path).unwrap();
        assert_eq!(ProcessFile::alive_at(&path), Some(own.clone()));
        ProcessFile { started: own.started + 1, ..own }.write(&path).unwrap();
        assert_eq!(ProcessFile::alive_at(&path), None);
        std::fs::write(&path, "garbage").unwrap();
        assert_eq!(ProcessFile::alive_at(&path), None);
    }

    #[test]
    fn the_last_error_of_a_log_is_found_from_where_the_process_began() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "error: old\n").unwrap();
        let log = Log::from_here(&path);
        assert_eq!(log.complaint(), None);
        std::fs::write(&path, "error: old\ninfo\nerror: disk1 is in use\nmore\n").unwrap();
        assert_eq!(log.complaint().unwrap(), "disk1 is in use\nmore");
        std::fs::write(&path, "error: old\nthread 'main' panicked at a.rs:1:2:\nno such thing\n").unwrap();
        assert!(log.complaint().unwrap().contains("a.rs:1:2: no such thing: this is a bug"));
    }
}
