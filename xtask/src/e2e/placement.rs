//! Servers are drained and filled while a disk is written (design 2.8).

use crate::cluster::Cluster;
use crate::run::{command, read};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};

/// How long a move may take: much longer than it does.
const MOVED_WITHIN: Duration = Duration::from_secs(300);

fn list(cluster: &Cluster) -> Result<Value> {
    Ok(serde_json::from_str(&read(cluster.petal().args(["server", "list", "--json"]))?)?)
}

fn of_server(list: &Value, server: &str, what: &str) -> Result<u64> {
    let servers = list["servers"].as_array().context("no servers")?;
    let one = servers.iter().find(|s| s["server"] == server).context("no such server")?;
    one[what].as_u64().with_context(|| format!("no {what} of {server}"))
}

/// Elements on a server's disks.
fn elements(cluster: &Cluster, server: &str) -> Result<u64> {
    let status = super::failures::server_status(cluster, server)?;
    let disks = status["disks"].as_array().context("no disks")?;
    Ok(disks.iter().filter_map(|d| d["elements"].as_u64()).sum())
}

fn wait_until_moved(cluster: &Cluster) -> Result<()> {
    let end = Instant::now() + MOVED_WITHIN;
    loop {
        let list = list(cluster)?;
        let moving = list["reconfiguration"]["moving"].as_array().context("no progress")?;
        if moving.is_empty() && list["reconfiguration"]["to_plan"] == 0 {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("it does not end: {list}");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

pub fn drained_and_filled(cluster: &Cluster) -> Result<()> {
    cluster.up(&[])?;
    let uri = format!("--uri={}", cluster.nbd_uri("vol0")?);
    let fio = |more: &[&str]| {
        let mut fio = command("fio");
        fio.args(["--name=load", "--ioengine=nbd", "--size=192m", &uri]).args(more);
        fio
    };
    read(&mut fio(&["--rw=write", "--bs=1m", "--iodepth=4"]))?;
    let before = list(cluster)?;
    ensure!(of_server(&before, "s3", "copies")? > 0, "s3 holds nothing to begin with: {before}");
    let plan: Value =
        serde_json::from_str(&read(cluster.petal().args(["server", "drain", "s3", "--dry-run", "--json"]))?)?;
    let (stored, moved) = (plan["bytes_stored"].as_u64().unwrap_or(0), plan["bytes_to_move"].as_u64().unwrap_or(0));
    println!("stored: {stored}, to move: {moved}");
    ensure!(moved > stored / 6 && moved < stored / 3, "of four servers one is to move about a quarter: {plan}");
    ensure!(list(cluster)?["reconfiguration"] == before["reconfiguration"], "a dry run has changed something");
    for (command_word, copies_left) in [("drain", false), ("fill", true)] {
        let verify = ["--rw=randwrite", "--bs=4k", "--iodepth=4", "--verify=crc32c", "--time_based", "--runtime=15"];
        let mut load = fio(&verify);
        let load = load.stdout(std::process::Stdio::piped()).spawn()?;
        std::thread::sleep(Duration::from_secs(1));
        let begun = Instant::now();
        read(cluster.petal().args(["server", command_word, "s3"]))?;
        wait_until_moved(cluster)?;
        println!("{command_word} took {:.1} s under writes", begun.elapsed().as_secs_f64());
        let said = load.wait_with_output()?;
        ensure!(said.status.success(), "fio ended with {} during {command_word}", said.status);
        let after = list(cluster)?;
        ensure!((of_server(&after, "s3", "copies")? > 0) == copies_left, "after {command_word}: {after}");
        read(cluster.petal().arg("verify"))?;
        if !copies_left {
            let end = Instant::now() + Duration::from_secs(30);
            while elements(cluster, "s3")? > 0 {
                ensure!(Instant::now() < end, "s3 still holds {} elements", elements(cluster, "s3")?);
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    }
    cluster.down()
}
