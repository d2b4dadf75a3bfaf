//! Servers whose disks are full, under load: what needs room is refused and says so, all else goes on, nothing acknowledged is
//! lost, and room that is given back is used again.

use super::failures::{full_again, pid_of};
use super::snapshots::json;
use crate::cluster::{Cluster, kill9};
use crate::run::{nbdsh, read};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// Writes MiB after MiB, each with its number in all bytes, until there is no room; prints how many.
const FILL: &str = "
good = 0
for n in range(int(first), 1024):
    try:
        h.pwrite(bytes([n % 251 + 1]) * 1048576, n << 20)
    except nbd.Error as error:
        assert error.errno == 'ENOSPC', error
        break
    good += 1
print(good)
";

fn run(cluster: &Cluster, code: &str) -> Result<String> {
    read(nbdsh().args(["-u", &cluster.nbd_uri("vol0")?, "-c", code]))
}

fn fill(cluster: &Cluster, first: u64) -> Result<u64> {
    let said = run(cluster, &format!("first = {first}{FILL}"))?;
    said.trim().parse().with_context(|| format!("not a number: {said}"))
}

/// MiB of these numbers hold what was written.
fn holds(cluster: &Cluster, from: u64, to: u64) -> Result<()> {
    let right = "h.pread(1048576, n << 20) == bytes([n % 251 + 1]) * 1048576";
    run(cluster, &format!("assert all({right} for n in range({from}, {to})), 'other data'")).map(|_| ())
}

/// Some disk is told to be full.
fn is_full(cluster: &Cluster) -> Result<bool> {
    let status = json(cluster, &["status"])?;
    let servers = status["servers"].as_array().context("the status has servers")?;
    let disks = servers.iter().filter_map(|s| s["disks"].as_array()).flatten();
    Ok(disks.filter(|d| d["full"] == true).count() > 0)
}

pub fn refuses_and_goes_on(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--servers", "3", "--disk-size", "256MiB", "--size", "1GiB"])?;
    let written = fill(cluster, 0)?;
    println!("{written} MiB of 1,024 were written before there was no room");
    ensure!((250..385).contains(&written), "three disks of 256 MiB take {written} MiB in two copies");
    holds(cluster, 0, written)?;
    // What is there can be written over, again and again, in large pieces and single blocks; nothing new is taken.
    for round in [1, 2, 0] {
        run(
            cluster,
            &format!("for n in range({written}): h.pwrite(bytes([(n + {round}) % 251 + 1]) * 1048576, n << 20)"),
        )?;
        let right = format!("h.pread(1048576, n << 20) == bytes([(n + {round}) % 251 + 1]) * 1048576");
        run(cluster, &format!("assert all({right} for n in range({written})), 'not what was written over it'"))?;
    }
    let blocks =
        "for n in range({w}): [h.pwrite(bytes([n % 251 + 1]) * 4096, (n << 20) + b * 4096) for b in range(0, 256, 16)]";
    run(cluster, &blocks.replace("{w}", &written.to_string()))?;
    ensure!(fill(cluster, written + 1)? == 0, "a full pool took something new");
    ensure!(is_full(cluster)?, "the status does not tell that disks are full");
    // While nothing can be written two servers die, one after the other, and are brought back.
    for server in ["s2", "s3"] {
        kill9(pid_of(cluster, server)?)?;
        holds(cluster, 0, written)?;
        cluster.up(&[])?;
        full_again(cluster)?;
    }
    holds(cluster, 0, written)?;
    // What is given back is room for others.
    run(cluster, "h.trim(64 << 20, 0)")?;
    let mut more = 0;
    Cluster::wait_for("there is room again", Duration::from_secs(30), || {
        more += fill(cluster, written + more).unwrap_or(0);
        more >= 32
    })?;
    println!("{more} MiB more were written after 64 MiB had been discarded");
    ensure!(written + more < 450, "{written} MiB and {more} more");
    holds(cluster, 64, written + more)?;
    run(cluster, &format!("h.trim({} << 20, 0)", written / 2))?;
    Cluster::wait_for("no disk is full", Duration::from_secs(30), || is_full(cluster).is_ok_and(|full| !full))?;
    run(cluster, "assert h.pread(1 << 20, 0) == bytes(1 << 20), 'what was discarded is not zeros'")?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}
