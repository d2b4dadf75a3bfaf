//! What a person or a broken disk can hand in: a clear error that names the object and the remedy.

use crate::cluster::Cluster;
use crate::run::{command, read, read_failure};
use anyhow::{Result, ensure};
use std::os::unix::fs::FileExt;
use std::path::Path;

pub fn damaged_disks(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--servers", "3", "--disk-size", "2GiB"])?;
    let disk = cluster.data().join("s1/disk1");
    let server = |n: u32| {
        let config = cluster.data().join(format!("s{n}/server.toml"));
        read_failure(cluster.petal().args(["server", "--config"]).arg(config))
    };
    let refused = |what: &str, words: &[&str], n: u32| -> Result<()> {
        let (code, text) = server(n)?;
        ensure!(code == 1, "{what}: exit code {code}, not 1: {text}");
        for word in words {
            ensure!(text.contains(word), "{what}: the message does not say '{word}': {text}");
        }
        println!("{what}: {}", text.lines().find(|l| l.contains("error")).unwrap_or_default());
        Ok(())
    };
    refused("a disk in use by another process", &["disk1", "in use"], 1)?;
    cluster.down()?;

    // The good disk is put aside; what is refused is a copy. In the end nothing is lost.
    let good = disk.with_extension("good");
    std::fs::rename(&disk, &good)?;
    refused("a disk that is away", &["disk1"], 1)?;
    let copy_of = |from: &Path| read(command("cp").arg("--sparse=always").args([from, &disk]));

    copy_of(&good)?;
    std::fs::OpenOptions::new().write(true).open(&disk)?.write_all_at(&vec![0x5a; 1 << 20], 0)?;
    refused("a superblock of garbage", &["disk1"], 1)?;

    copy_of(&good)?;
    std::fs::OpenOptions::new().write(true).open(&disk)?.set_len(4096)?;
    refused("a truncated disk", &["disk1"], 1)?;

    copy_of(&cluster.data().join("s2/disk1"))?;
    refused("a disk of another server", &["disk1", "s2"], 1)?;

    std::fs::rename(&good, &disk)?;
    cluster.up(&[])?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

pub fn bad_arguments(cluster: &Cluster) -> Result<()> {
    let fails = |arguments: &[&str], code: i32, words: &[&str]| -> Result<()> {
        let (got, text) = read_failure(cluster.petal().args(arguments))?;
        ensure!(got == code, "{arguments:?}: exit code {got}, not {code}: {text}");
        for word in words {
            ensure!(text.contains(word), "{arguments:?}: the message does not say '{word}': {text}");
        }
        Ok(())
    };
    fails(&["status"], 1, &["PETAL_CLUSTER", "up` makes one"])?;
    fails(&["disk", "create", "a"], 2, &[])?;
    fails(&["nonsense"], 2, &[])?;
    fails(&["up", "--detach", "--nbd-port", "0", "--disk-size", "1KiB"], 1, &["at least"])?;
    cluster.up(&["--servers", "3", "--disk-size", "4GiB"])?;
    fails(&["disk", "create", "vol0", "1GiB"], 1, &["vol0", "already"])?;
    fails(&["disk", "create", "empty", "0"], 1, &["size"])?;
    fails(&["disk", "create", "huge", "9E"], 1, &["size"])?;
    fails(&["disk", "create", "huge", "17E"], 2, &[])?;
    fails(&["disk", "create", "a/b", "1GiB"], 1, &["a/b"])?;
    fails(&["disk", "create", "", "1GiB"], 1, &["name"])?;
    fails(&["disk", "create", &"n".repeat(300), "1GiB"], 1, &["name"])?;
    fails(&["disk", "create", "four", "1GiB", "--copies", "4"], 2, &[])?;
    fails(&["disk", "delete", "nothing", "--yes"], 1, &["nothing", "disk list"])?;
    fails(&["disk", "resize", "vol0", "1GiB"], 1, &["--shrink"])?;
    fails(&["--cluster", "127.0.0.1:1", "status"], 1, &["127.0.0.1:1"])?;
    read(cluster.petal().args(["status"]))?;
    cluster.down()
}
