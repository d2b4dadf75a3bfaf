//! A cluster of real processes in a folder of its own, taken down on every path.

use crate::run::{self, cargo, root};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Builds the program in release and returns where it is.
pub fn build_petal() -> Result<PathBuf> {
    run::show(cargo().args(["build", "--release", "--quiet", "-p", "petal-cli"]))?;
    Ok(root().join("target/release/petal"))
}

/// A cluster that `petal up` made.
pub struct Cluster {
    petal: PathBuf,
    folder: PathBuf,
    keep: bool,
}

impl Cluster {
    /// A new folder for a cluster, on the disk of the target folder: temporary folders may be in memory.
    pub fn new(petal: &Path, name: &str) -> Result<Cluster> {
        let folder = root().join("target/e2e").join(format!("{name}-{}", std::process::id()));
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
        Ok(Cluster { petal: petal.into(), folder, keep: false })
    }

    /// Another cluster of the same program, in a folder of its own.
    pub fn another(&self, name: &str) -> Result<Cluster> {
        Cluster::new(&self.petal, name)
    }

    /// Keeps the folder, for a person to look at.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// A folder beside the cluster's own, for files of a scenario.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The cluster's folder.
    pub fn data(&self) -> PathBuf {
        self.folder.join("petal-data")
    }

    /// The program, told which cluster.
    pub fn petal(&self) -> Command {
        let mut command = run::command(&self.petal);
        command.current_dir(&self.folder).env("PETAL_CLUSTER", self.data()).env_remove("RUST_LOG");
        command
    }

    /// Starts what does not run, in the background. Without TCP: scenarios must not fight for a port.
    pub fn up(&self, more: &[&str]) -> Result<()> {
        run::read(self.petal().args(["up", "--detach", "--nbd-port", "0"]).args(more))?;
        Ok(())
    }

    /// Stops everything and checks that nothing is left.
    pub fn down(&self) -> Result<()> {
        run::read(self.petal().arg("down"))?;
        let left = self.processes();
        if !left.is_empty() {
            bail!("`petal down` left processes: {left:?}");
        }
        Ok(())
    }

    /// `petal status --json`.
    pub fn status(&self) -> Result<serde_json::Value> {
        let text = run::read(self.petal().args(["status", "--json"]))?;
        serde_json::from_str(&text).with_context(|| format!("`petal status --json` printed no JSON: {text}"))
    }

    /// Bytes that all disks of the servers store.
    pub fn stored(&self) -> Result<u64> {
        let status = self.status()?;
        let servers = status["servers"].as_array().into_iter().flatten();
        let disks = servers.flat_map(|s| s["disks"].as_array().into_iter().flatten());
        disks.map(|d| d["used"].as_u64().context("a disk tells no use")).sum()
    }

    /// Process ids of the servers, as the status tells them.
    pub fn server_pids(&self) -> Result<Vec<u32>> {
        let status = self.status()?;
        let servers = status["servers"].as_array().context("the status has no servers")?;
        let pid = |s: &serde_json::Value| s["pid"].as_u64().map(|p| p as u32).context("a server has no pid");
        servers.iter().map(pid).collect()
    }

    /// Every process that has this cluster's folder on its command line: pid and command line.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let mark = self.folder.to_string_lossy().into_owned();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
            let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.contains("petal") && line.contains(&mark) && pid != std::process::id() {
                found.push((pid, line));
            }
        }
        found
    }

    /// Where NBD is served, for libnbd, qemu and fio.
    pub fn nbd_uri(&self, disk: &str) -> Result<String> {
        let status = self.status()?;
        let socket = status["nbd"]["socket"].as_str().context("the status names no NBD socket")?;
        Ok(format!("nbd+unix:///{disk}?socket={socket}"))
    }

    /// Waits until `done` says so.
    pub fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) -> Result<()> {
        let end = Instant::now() + limit;
        while !done() {
            if Instant::now() > end {
                bail!("{what}: not within {limit:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Ends one process for good.
pub fn kill9(pid: u32) -> Result<()> {
    run::read(run::command("kill").args(["-9", &pid.to_string()]))?;
    // The signal is on its way when `kill` returns; what comes next must not find the process alive.
    let is_gone = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.map_or(true, |stat| stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X'])))
    };
    Cluster::wait_for("the killed process is gone", Duration::from_secs(10), is_gone)
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = run::output(self.petal().arg("down"));
        for (pid, _) in self.processes() {
            let _ = kill9(pid);
        }
        if self.keep {
            eprintln!("the folder is kept: {}", self.folder.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}
