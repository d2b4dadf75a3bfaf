//! The server processes of a cluster folder: starting those that do not run, stopping all.
//!
//! Nobody restarts a server that died by itself: a failure is to be seen (`petal status`), and `petal up`
//! starts what is missing, beside a supervisor that lives too. So processes are found by their process
//! files, not by who started them.

use crate::cluster_folder::{ClusterFile, ClusterFolder, ServerEntry};
use crate::processes::{self, Log, ProcessFile};
use crate::server_config::ServerConfig;
use anyhow::{Context, Result};
use petal::ids::ServerId;
use rustix::process::Signal;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

/// How long a server may take until it serves: replay of a full journal, and the ring's decision.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long a server may take to stop by itself.
const STOP_LIMIT: Duration = Duration::from_secs(15);

/// A server that was started, and is not known to be ready.
pub struct Starting {
    server: ServerId,
    child: Child,
    log: Log,
    process_file: PathBuf,
}

impl Starting {
    /// Waits until it serves.
    pub fn wait(mut self) -> Result<Child> {
        processes::wait_until_ready(&mut self.child, &self.process_file, &self.log, READY_LIMIT)
            .with_context(|| not_started(&self.server.to_string()))?;
        Ok(self.child)
    }
}

/// How it is said of a server that it did not start.
pub fn not_started(server: &str) -> String {
    format!("server {server} did not start")
}

/// The process file of a server.
pub fn process_file(folder: &ClusterFolder, server: ServerId) -> PathBuf {
    folder.server(server).join("pid")
}

/// The process of a server, if it runs.
pub fn process(folder: &ClusterFolder, server: ServerId) -> Option<ProcessFile> {
    ProcessFile::alive_at(&process_file(folder, server))
}

/// Starts a server unless it runs. Its config file is written anew: the folder may have been moved.
pub fn start(folder: &ClusterFolder, file: &ClusterFile, entry: &ServerEntry) -> Result<Option<Starting>> {
    let server = entry.server();
    if process(folder, server).is_some() {
        return Ok(None);
    }
    let addresses = folder.addresses(entry)?;
    // A killed process leaves its socket behind.
    if let Some(socket) = addresses[0].strip_prefix("unix:") {
        let _ = std::fs::remove_file(socket);
    }
    let config_path = folder.server(server).join("server.toml");
    let config = ServerConfig {
        server: Some(entry.id),
        cluster: Some(file.cluster.clone()),
        listen: addresses,
        disks: folder.disks(file, server),
        // Here all of them are on one disk: when that stands still for a moment, nobody could go on for the others.
        disk_patience_ms: Some(5000),
        ..ServerConfig::default()
    };
    config.write(&config_path)?;
    let log_path = folder.server(server).join("log");
    let log = Log::from_here(&log_path);
    let process_file = process_file(folder, server);
    let arguments = [
        "server".into(),
        "--config".into(),
        config_path.display().to_string(),
        "--process-file".into(),
        process_file.display().to_string(),
    ];
    let child = processes::spawn_detached(&arguments, &log_path)?;
    Ok(Some(Starting { server, child, log, process_file }))
}

/// What became of starting several servers.
#[derive(Default)]
pub struct Started {
    /// They serve.
    pub ready: Vec<(ServerId, Child)>,
    /// They do not, and why.
    pub failed: Vec<anyhow::Error>,
}

impl Started {
    /// Adds others.
    pub fn extend(&mut self, other: Started) {
        self.ready.extend(other.ready);
        self.failed.extend(other.failed);
    }

    /// One sentence on what failed; `None` if nothing did.
    pub fn complaint(&self) -> Option<String> {
        let reasons: Vec<String> = self.failed.iter().map(|e| format!("{e:#}")).collect();
        (!reasons.is_empty()).then(|| reasons.join("; "))
    }
}

/// Starts every given server that does not run, all at one time, and waits until they serve. One that
/// does not start is no reason to leave the others down.
pub fn start_all(folder: &ClusterFolder, file: &ClusterFile, entries: &[ServerEntry]) -> Started {
    let starting: Vec<_> = entries.iter().filter_map(|entry| start(folder, file, entry).transpose()).collect();
    let mut started = Started::default();
    for server in starting {
        match server.and_then(|s| Ok((s.server, s.wait()?))) {
            Ok(ready) => started.ready.push(ready),
            Err(error) => started.failed.push(error),
        }
    }
    started
}

/// Asks a process to end, and ends it if it does not. True if it was alive.
pub fn stop(process: Option<ProcessFile>, what: &str) -> bool {
    stop_by(process, Signal::TERM, what)
}

fn stop_by(process: Option<ProcessFile>, signal: Signal, what: &str) -> bool {
    let Some(process) = process else { return false };
    process.signal(signal);
    if !process.wait_for_end(STOP_LIMIT) {
        tracing::warn!("{what} did not stop within {} s and is killed", STOP_LIMIT.as_secs());
        process.signal(Signal::KILL);
        process.wait_for_end(STOP_LIMIT);
    }
    true
}

/// Takes the ends of our own children from the kernel, so that they do not stay in its table.
pub fn reap() {
    while let Ok(Some(_)) = rustix::process::waitpid(None, rustix::process::WaitOptions::NOHANG) {}
}

/// Stops one server, which hands over to the others first. True if it ran.
pub fn stop_one(folder: &ClusterFolder, server: ServerId) -> bool {
    let ran = stop(process(folder, server), &server.to_string());
    let _ = std::fs::remove_file(process_file(folder, server));
    ran
}

/// Stops all servers; returns how many ran. All are asked before any is waited for, and none hands over:
/// nobody is left to take it, and each is to go on where it was.
pub fn stop_all(folder: &ClusterFolder, file: &ClusterFile) -> usize {
    let running: Vec<_> =
        file.servers.iter().filter_map(|e| Some((e.server(), process(folder, e.server())?))).collect();
    running.iter().for_each(|(_, p)| p.signal(Signal::QUIT));
    let count = running.len();
    for (server, process) in running {
        stop_by(Some(process), Signal::QUIT, &server.to_string());
        let _ = std::fs::remove_file(process_file(folder, server));
    }
    count
}
