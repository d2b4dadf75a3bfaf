//! Disks that go bad under a running server.

use super::failures::{declared_down, full_again, incarnation, server_status};
use crate::cluster::Cluster;
use crate::faulty_disk::FaultyDisk;
use crate::run::{nbdsh, read};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

const BLOCK: u64 = 4096;
/// Blocks written, and how many of them are overwritten on one disk.
const BLOCKS: u64 = 8192;
const SPOILT: usize = 300;

/// Every block begins with these bytes and its number.
const MARK: &[u8] = b"block of the scrub scenario ";

const WRITE: &str = "\
blocks = [(b'block of the scrub scenario %08d' % i).ljust(4096, bytes([i % 256])) for i in range(8192)]
[h.pwrite(b''.join(blocks[i:i + 256]), i * 4096) for i in range(0, 8192, 256)]
h.flush()
";
const CHECK: &str = "\
blocks = [(b'block of the scrub scenario %08d' % i).ljust(4096, bytes([i % 256])) for i in range(8192)]
assert all(h.pread(1 << 20, i * 4096) == b''.join(blocks[i:i + 256]) for i in range(0, 8192, 256)), 'not what was written'
";

pub fn scrub_repairs(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--disk-size", "2GiB"])?;
    let uri = cluster.nbd_uri("vol0")?;
    read(nbdsh().args(["-u", &uri, "-c", WRITE]))?;
    let scrub = || -> Result<Value> {
        let text = read(cluster.petal().args(["scrub", "--json"]))?;
        serde_json::from_str(&text).with_context(|| format!("`petal scrub --json` printed no JSON: {text}"))
    };
    let sum = |rounds: &Value, field: &str| -> u64 {
        rounds.as_array().into_iter().flatten().filter_map(|r| r[field].as_u64()).sum()
    };
    let clean = scrub()?;
    ensure!(sum(&clean, "bad") == 0, "nothing is bad yet: {clean}");
    ensure!(sum(&clean, "blocks") >= 2 * BLOCKS, "both copies of everything are read: {clean}");

    // Somebody writes over data of a disk that is in use.
    let spoilt = spoil(&cluster.data().join("s2/disk1"))?;
    println!("{spoilt} blocks of s2 are overwritten");
    let found = scrub()?;
    println!("petal scrub: {found}");
    ensure!(sum(&found, "bad") == spoilt as u64, "not all were found: {found}");
    ensure!(sum(&found, "repaired") == spoilt as u64, "not all were repaired: {found}");

    read(nbdsh().args(["-u", &uri, "-c", CHECK]))?;
    println!("petal verify: {}", read(cluster.petal().arg("verify"))?.trim());
    let again = scrub()?;
    ensure!(sum(&again, "bad") == 0, "something was left: {again}");
    let status = cluster.status()?;
    let s2 = status["servers"].as_array().into_iter().flatten().find(|s| s["id"] == "s2").context("no s2")?;
    ensure!(s2["scrub"]["last"]["ended"].is_u64(), "the status does not tell when it ended: {}", s2["scrub"]);
    ensure!(s2["counters"]["repaired_blocks"].as_u64() >= Some(spoilt as u64), "{}", s2["counters"]);
    println!("{}", read(cluster.petal().arg("status"))?);
    // What is durable is good, too.
    cluster.down()?;
    read(cluster.petal().args(["verify", "--offline", "s2"]))?;
    // Where the round was, and when the last one ended, is known after a restart.
    cluster.up(&[])?;
    let status = cluster.status()?;
    let s2 = status["servers"].as_array().into_iter().flatten().find(|s| s["id"] == "s2").context("no s2")?;
    ensure!(s2["scrub"]["last"]["round"].as_u64() >= Some(3), "the rounds are forgotten: {}", s2["scrub"]);
    read(nbdsh().args(["-u", &cluster.nbd_uri("vol0")?, "-c", CHECK]))?;
    cluster.down()
}

/// Writes garbage over some of the blocks that the scenario wrote, wherever they are on the disk; how many.
fn spoil(disk: &Path) -> Result<usize> {
    let file = OpenOptions::new().read(true).write(true).open(disk)?;
    let places = marked(&file)?;
    ensure!(places.len() > 2 * SPOILT, "only {} blocks of the scenario are on {}", places.len(), disk.display());
    let step = places.len() / SPOILT;
    let spoilt: Vec<u64> = places.into_iter().step_by(step).collect();
    for place in &spoilt {
        file.write_all_at(&[0xa5; BLOCK as usize], *place)?;
    }
    file.sync_all()?;
    Ok(spoilt.len())
}

fn marked(file: &File) -> Result<Vec<u64>> {
    let mut places = Vec::new();
    let mut chunk = vec![0; 1 << 20];
    for at in (0..file.metadata()?.len()).step_by(chunk.len()) {
        let length = file.read_at(&mut chunk, at)?;
        let blocks = chunk[..length].chunks(BLOCK as usize).enumerate();
        places.extend(blocks.filter(|(_, b)| b.starts_with(MARK)).map(|(i, _)| at + i as u64 * BLOCK));
    }
    Ok(places)
}

/// Bytes of a disk that hangs or fails.
const DISK_SIZE: u64 = 2 << 30;

/// A cluster in which everything was written once, and s2 has its disk on a device that is told what to do.
fn with_faulty_disk(cluster: &Cluster) -> Result<FaultyDisk<'_>> {
    cluster.up(&["--disk-size", &DISK_SIZE.to_string()])?;
    read(nbdsh().args(["-u", &cluster.nbd_uri("vol0")?, "-c", WRITE]))?;
    read(cluster.petal().args(["down", "s2"]))?;
    let faulty = FaultyDisk::put_below(cluster, "s2", DISK_SIZE)?;
    cluster.up(&[])?;
    full_again(cluster)?;
    Ok(faulty)
}

/// Another content for everything, and what must be there then. Both have a time within which they must be done: with a
/// disk in the way they would wait for ever.
const WRITE_NEXT: &str = "[h.pwrite(b'n' * (1 << 20), i << 20) for i in range(32)]";
const CHECK_NEXT: &str =
    "assert all(h.pread(1 << 20, i << 20) == b'n' * (1 << 20) for i in range(32)), 'a write is lost'";

fn in_time(cluster: &Cluster, code: &str) -> Result<()> {
    let uri = cluster.nbd_uri("vol0")?;
    let mut nbdsh = nbdsh();
    read(nbdsh.args(["-u", &uri, "-c", "import signal; signal.alarm(30)", "-c", code])).map(|_| ())
}

/// What clients write is done and read while the server goes out of the way, and the status says why it did.
fn goes_down_for_its_disk(cluster: &Cluster) -> Result<()> {
    in_time(cluster, WRITE_NEXT)?;
    in_time(cluster, CHECK_NEXT)?;
    declared_down(cluster, "s2")?;
    let s2 = server_status(cluster, "s2")?;
    let why = s2["why_down"].as_str().unwrap_or_default();
    ensure!(why.contains("disk1"), "the status does not name the disk: {s2}");
    println!("s2 is down: {why}");
    Ok(())
}

pub fn hanging_disk(cluster: &Cluster) -> Result<()> {
    let mut disk = with_faulty_disk(cluster)?;
    let life = incarnation(cluster, "s2")?;
    disk.tell("hang")?;
    goes_down_for_its_disk(cluster)?;
    let held = disk.tell("pass")?;
    ensure!(held > 0, "nothing hung");
    println!("{held} requests hung; the disk answers again");
    full_again(cluster)?;
    ensure!(incarnation(cluster, "s2")? > life, "it must have begun a new life");
    in_time(cluster, CHECK_NEXT)?;
    println!("petal verify: {}", read(cluster.petal().arg("verify"))?.trim());
    Ok(())
}

pub fn unreadable_blocks(cluster: &Cluster) -> Result<()> {
    let mut disk = with_faulty_disk(cluster)?;
    let places = marked(&File::open(&disk.below)?)?;
    ensure!(places.len() > 1000, "only {} blocks of the scenario are on s2", places.len());
    // Whoever reads an element loses all of it to one bad block: of more the disk would be given up.
    let spoilt: Vec<String> = places.iter().step_by(places.len() / 20).map(u64::to_string).collect();
    disk.tell(&format!("fail-reads {}", spoilt.join(" ")))?;
    // Clients are answered from the other copy, from wherever they are told.
    for _ in 0..3 {
        in_time(cluster, CHECK)?;
    }
    let scrub: Value = serde_json::from_str(&read(cluster.petal().args(["scrub", "--json"]))?)?;
    println!("petal scrub: {scrub}");
    let s2 = server_status(cluster, "s2")?;
    let repaired = s2["counters"]["repaired_blocks"].as_u64().context("no counter")?;
    ensure!(repaired >= spoilt.len() as u64, "{repaired} of {} blocks were repaired", spoilt.len());
    println!("{} blocks could not be read, {repaired} were repaired", spoilt.len());
    // Elsewhere on the disk, which has not got better: nothing in use is on the bad places any more.
    let again: Value = serde_json::from_str(&read(cluster.petal().args(["scrub", "--json"]))?)?;
    let bad: u64 = again.as_array().into_iter().flatten().filter_map(|r| r["bad"].as_u64()).sum();
    ensure!(bad == 0, "something was left: {again}");
    let failed = disk.tell("fail-reads")?;
    ensure!(failed >= spoilt.len() as u64, "the device failed {failed} reads only");
    in_time(cluster, CHECK)?;
    println!("petal verify: {}", read(cluster.petal().arg("verify"))?.trim());
    Ok(())
}

pub fn disk_that_cannot_be_written(cluster: &Cluster) -> Result<()> {
    let mut disk = with_faulty_disk(cluster)?;
    disk.tell("fail-writes")?;
    goes_down_for_its_disk(cluster)?;
    ensure!(disk.tell("pass")? > 0, "no write failed");
    // The disk is well again: whoever has seen to that starts the server.
    cluster.up(&[])?;
    full_again(cluster)?;
    in_time(cluster, CHECK_NEXT)?;
    println!("petal verify: {}", read(cluster.petal().arg("verify"))?.trim());
    Ok(())
}
