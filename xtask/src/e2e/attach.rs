//! Disks as kernel block devices whose names change, and whose processes die.

use crate::cluster::{Cluster, kill9};
use crate::run::{command, output, read, read_failure};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::PathBuf;

pub fn renamed(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--size", "1GiB"])?;
    let petal = |arguments: &[&str]| read(cluster.petal().args(arguments));
    let refused = |arguments: &[&str], why: &str| -> Result<()> {
        let (code, text) = read_failure(cluster.petal().args(arguments))?;
        ensure!(code == 1 && text.contains(why), "{arguments:?}: {code}: {text}");
        Ok(())
    };
    let on = cluster.folder().join("mnt");
    std::fs::create_dir(&on)?;
    let mounted = Mounted(on.clone());
    let device = attach(cluster, &["vol0"])?;
    read(command("mkfs.ext4").arg("-q").arg(&device.path))?;
    read(command("mount").args([&device.path, &on]))?;

    petal(&["disk", "rename", "vol0", "files"])?;
    petal(&["snapshot", "create", "files", "--name", "frozen", "--freeze"])?;
    refused(&["attach", "files"], "is attached as")?;
    // Another disk gets the name: what is attached is not that one.
    petal(&["disk", "create", "vol0", "1GiB"])?;
    refused(&["snapshot", "create", "vol0", "--freeze"], "not attached")?;
    refused(&["detach", "vol0"], "not attached")?;
    let another = attach(cluster, &["vol0"])?;
    ensure!(loop_devices(cluster)?.len() == 2, "{:?}", loop_devices(cluster)?);
    refused(&["attach", "vol0"], &another.path.display().to_string())?;
    petal(&["detach", "vol0"])?;
    ensure!(loop_devices(cluster)? == [device.path.clone()], "{:?}", loop_devices(cluster)?);

    std::fs::write(on.join("goes-on"), "")?;
    refused(&["detach", "files"], "in use")?;
    read(command("umount").arg(&on))?;
    petal(&["detach", "files"])?;
    drop(mounted);
    nothing_is_attached(cluster)?;
    // What was frozen is the disk that has the name by now.
    let snapshot = attach(cluster, &["files@frozen"])?;
    read(command("e2fsck").args(["-f", "-n"]).arg(&snapshot.path))?;
    petal(&["detach", "files@frozen"])?;
    cluster.down()
}

pub fn killed(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--size", "1GiB"])?;
    let words = cluster.folder().join("words");
    std::fs::write(&words, "what was written before\n".repeat(4096))?;
    let write = |device: &Attached| {
        let mut dd = command("dd");
        dd.args(["bs=64k", "conv=fsync", "status=none"]);
        read(dd.arg(format!("if={}", words.display())).arg(format!("of={}", device.path.display())))
    };
    let first = attach(cluster, &["vol0"])?;
    write(&first)?;
    // By another name it leaves what it leaves in another folder.
    read(cluster.petal().args(["disk", "rename", "vol0", "files"]))?;
    kill9(first.pid)?;
    let left = loop_devices(cluster)?;
    ensure!(left == [first.path], "its device should be left: {left:?}");

    let second = attach(cluster, &["files", "--take-over"])?;
    let present = loop_devices(cluster)?;
    ensure!(present == [second.path.clone()], "{} is not the only one: {present:?}", second.path.display());
    let length = std::fs::metadata(&words)?.len();
    read(command("cmp").arg("-n").arg(length.to_string()).args([&words, &second.path]))?;
    write(&second)?;
    kill9(second.pid)?;
    // Nobody attaches it again: whoever takes everything down takes that down, too.
    cluster.down()?;
    nothing_is_attached(cluster)
}

/// An attached disk.
struct Attached {
    path: PathBuf,
    pid: u32,
}

fn attach(cluster: &Cluster, arguments: &[&str]) -> Result<Attached> {
    let text = read(cluster.petal().args(["attach", "--json"]).args(arguments))?;
    let json: Value = serde_json::from_str(&text)?;
    let path = json["device"].as_str().context("attach named no device")?.into();
    Ok(Attached { path, pid: json["pid"].as_u64().context("attach named no process")? as u32 })
}

/// Loop devices on files in the cluster's folder.
fn loop_devices(cluster: &Cluster) -> Result<Vec<PathBuf>> {
    let folder = cluster.folder().canonicalize()?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/block")?.flatten() {
        let file = std::fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if file.starts_with(&folder.display().to_string()) {
            found.push(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    Ok(found)
}

fn nothing_is_attached(cluster: &Cluster) -> Result<()> {
    let devices = loop_devices(cluster)?;
    ensure!(devices.is_empty(), "loop devices are left: {devices:?}");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let folder = cluster.folder().display().to_string();
    let left: Vec<&str> = mounts.lines().filter(|line| line.contains(&folder)).collect();
    ensure!(left.is_empty(), "mounts are left: {left:?}");
    let processes = cluster.processes().into_iter().find(|(_, line)| line.contains(" attach "));
    ensure!(processes.is_none(), "a process is left: {processes:?}");
    // The locks of the disks stay.
    let entries = std::fs::read_dir(cluster.data().join("attached"))?.flatten().map(|f| f.path());
    let folders: Vec<_> = entries.filter(|path| path.is_dir()).collect();
    ensure!(folders.is_empty(), "folders are left: {folders:?}");
    Ok(())
}

/// Unmounts on every path out of a scenario.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = output(command("umount").arg(&self.0));
    }
}
