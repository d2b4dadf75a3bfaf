//! What snapshots cost (design, issue of snapshots): making one under load, having a thousand, deleting them. Prints
//! tables; docs/performance.md is written by hand from them.
//!
//! A disk with a thousand snapshots is compared with one that has none and was written as much, in another cluster: the
//! two take turns, so that a noisy minute of the machine hits both, and neither has entries of the other in memory.

use crate::bench_failures::completions;
use crate::cluster::{self, Cluster};
use crate::packages;
use crate::run::{command, read};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What to measure.
#[derive(clap::Args)]
pub struct Arguments {
    /// Snapshots that are made under load
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(3..))]
    made: u32,
    /// Snapshots that a disk has in the end
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(8..))]
    snapshots: u32,
    /// GiB of the disk, all of it written before
    #[arg(long, default_value_t = 4)]
    gib: u32,
    /// Writes per second while the many are made
    #[arg(long, default_value_t = 1500)]
    rate: u32,
    /// Rounds of the comparison
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds of each job of the comparison
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Only one of `create`, `many`
    #[arg(long)]
    only: Option<String>,
}

/// Depth of the load.
const DEPTH: &str = "--iodepth=16";
/// What is compared before and after a snapshot.
const WINDOW: u64 = 3000;

/// Runs it.
pub fn run(arguments: Arguments) -> Result<()> {
    packages::install_missing()?;
    let petal = cluster::build_petal()?;
    let wanted = |what: &str| arguments.only.as_ref().is_none_or(|only| only == what);
    if wanted("create") {
        create(&petal, &arguments)?;
    }
    if wanted("many") {
        many(&petal, &arguments)?;
    }
    Ok(())
}

/// A cluster with one disk, all of which was written before. A second disk came and went, so that the servers' files
/// have grown already: whoever keeps what was written needs new room, and growing a file costs as much as writing it.
fn prepared(program: &Path, name: &str, gib: u32) -> Result<Cluster> {
    let (cluster, size) = (Cluster::new(program, name)?, format!("{gib}GiB"));
    cluster.up(&["--disk-size", "16GiB", "--size", &size])?;
    petal(&cluster, &["disk", "create", "gone", &size])?;
    for disk in ["gone", "vol0"] {
        read(fio_on(&cluster, disk)?.args(["--rw=write", "--bs=1m", "--iodepth=8", "--output-format=json"]))?;
    }
    petal(&cluster, &["disk", "delete", "gone", "--yes"])?;
    let stored = 2 * (u64::from(gib) << 30);
    Cluster::wait_for("the second disk is gone", Duration::from_secs(60), || {
        cluster.stored().is_ok_and(|now| now == stored)
    })?;
    Ok(cluster)
}

fn fio(cluster: &Cluster) -> Result<Command> {
    fio_on(cluster, "vol0")
}

fn fio_on(cluster: &Cluster, disk: &str) -> Result<Command> {
    let mut fio = command("fio");
    fio.args(["--name=job", "--ioengine=nbd", "--randrepeat=0", "--norandommap", "--thread"]);
    fio.arg(format!("--uri={}", cluster.nbd_uri(disk)?)).current_dir(cluster.folder());
    Ok(fio)
}

fn petal(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    read(cluster.petal().args(arguments))
}

fn json(cluster: &Cluster, arguments: &[&str]) -> Result<Value> {
    Ok(serde_json::from_str(&petal(cluster, &[arguments, &["--json"]].concat())?)?)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A program that is ended on every path.
struct Load(Child);

impl Load {
    fn is_running(&mut self) -> Result<()> {
        match self.0.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the load ended early, with {status}"),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

// ------------------------------------------------------------------------------------------------

fn milliseconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

fn create(petal_program: &Path, arguments: &Arguments) -> Result<()> {
    let cluster = prepared(petal_program, "create", arguments.gib)?;
    let period = Duration::from_millis(2 * WINDOW + 1500);
    let seconds = 4 + arguments.made * 2 * period.as_secs() as u32;
    let mut load = fio(&cluster)?;
    load.args(["--rw=randwrite", "--bs=4k", DEPTH, "--time_based", "--output=/dev/null", "--log_unix_epoch=1"]);
    load.args(["--write_lat_log=done", &format!("--runtime={seconds}")]);
    let mut load = Load(load.spawn()?);
    std::thread::sleep(Duration::from_secs(4));
    let mut made = Vec::new();
    for n in 0..arguments.made {
        std::thread::sleep(period);
        load.is_running()?;
        let (began, precise) = (milliseconds(), Instant::now());
        petal(&cluster, &["snapshot", "create", "vol0", "--name", &format!("s{n}")])?;
        made.push((began, precise.elapsed().as_secs_f64() * 1000.0));
    }
    std::thread::sleep(period);
    load.is_running()?;
    // It writes its log when it is told to end.
    read(command("kill").args(["-INT", &load.0.id().to_string()]))?;
    load.0.wait()?;
    let done = completions(&cluster.folder().join("done_clat.1.log"))?;
    println!("Snapshots of a disk of {} GiB, all written, under 4 KiB random writes at depth 16:", arguments.gib);
    println!(
        "| snapshot | command ms | longest gap around it ms | longest gap before ms | IOPS before | after | ratio |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|");
    let mut rows = Vec::new();
    for (n, (began, took)) in made.iter().enumerate() {
        let ended = began + took.ceil() as u64;
        // Both gaps are looked for in stretches of the same length.
        let around = ended - began + 500;
        let gap = longest_gap(&done, *began, began + around);
        let usual = longest_gap(&done, began - 200 - around, began - 200);
        let iops = |from: u64| count(&done, from, from + WINDOW) as f64 * 1000.0 / WINDOW as f64;
        let (before, after) = (iops(began - WINDOW), iops(ended));
        let ratio = after / before;
        println!("| {n} | {took:.0} | {gap} | {usual} | {before:.0} | {after:.0} | {ratio:.2} |");
        rows.push([*took, gap as f64, usual as f64, before, after, ratio]);
    }
    let [took, gap, usual, before, after, ratio] =
        std::array::from_fn(|i| median(rows.iter().map(|row| row[i]).collect()));
    println!("| median | {took:.0} | {gap:.0} | {usual:.0} | {before:.0} | {after:.0} | {ratio:.2} |");
    cluster.down()
}

fn count(done: &[u64], from: u64, until: u64) -> usize {
    done.partition_point(|at| *at < until) - done.partition_point(|at| *at < from)
}

/// Longest time without a completion in a stretch, its ends counted as completions.
fn longest_gap(done: &[u64], from: u64, until: u64) -> u64 {
    let within = &done[done.partition_point(|at| *at < from)..done.partition_point(|at| *at < until)];
    let all: Vec<u64> = std::iter::once(from).chain(within.iter().copied()).chain([until]).collect();
    all.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
}

// ------------------------------------------------------------------------------------------------

fn many(petal_program: &Path, arguments: &Arguments) -> Result<()> {
    let Arguments { gib, snapshots, rate, .. } = arguments;
    let cluster = prepared(petal_program, "many", *gib)?;
    let other = prepared(petal_program, "none", *gib)?;
    let written = make_many(&cluster, arguments)?;
    read(fio(&other)?.args(["--rw=randwrite", "--bs=4k", DEPTH, &format!("--number_ios={written}")]))?;
    println!("{snapshots} snapshots of a disk of {gib} GiB, {written} random writes of 4 KiB between them ({rate}/s)");
    compare(&cluster, &other, arguments)?;
    sizes(&other, "none")?;
    sizes(&cluster, "many")?;
    other.down()?;
    delete_all(&cluster, arguments)?;
    cluster.down()?;
    let rows = rows(&cluster)?;
    println!("rows on the first disk in the end, of elements: {} of {}", rows.0, rows.1);
    Ok(())
}

/// Makes them one after the other while somebody writes; returns how many writes there were.
fn make_many(cluster: &Cluster, arguments: &Arguments) -> Result<u64> {
    let mut load = fio(cluster)?;
    load.args(["--rw=randwrite", "--bs=4k", DEPTH, "--time_based", "--runtime=3600", "--output=made.json"]);
    load.args(["--output-format=json", &format!("--rate_iops={}", arguments.rate)]);
    let mut load = Load(load.spawn()?);
    let mut took = Vec::new();
    for n in 0..arguments.snapshots {
        let began = Instant::now();
        petal(cluster, &["snapshot", "create", "vol0", "--name", &format!("s{n}")])?;
        took.push(began.elapsed().as_secs_f64() * 1000.0);
    }
    load.is_running()?;
    read(command("kill").args(["-INT", &load.0.id().to_string()]))?;
    load.0.wait()?;
    let tenth = took.len() / 10;
    let (first, last) = (median(took[..tenth].to_vec()), median(took[took.len() - tenth..].to_vec()));
    println!("command: median {first:.1} ms for the first tenth, {last:.1} ms for the last");
    let text = std::fs::read_to_string(cluster.folder().join("made.json"))?;
    let told: Value = serde_json::from_str(&text[text.find('{').context("fio wrote nothing")?..])?;
    told["jobs"][0]["write"]["total_ios"].as_u64().filter(|n| *n > 0).context("nothing was written in between")
}

fn compare(many: &Cluster, none: &Cluster, arguments: &Arguments) -> Result<()> {
    println!("| 4 KiB random | none: IOPS | many: IOPS | many / none (median of {} pairs) |", arguments.rounds);
    println!("|---|---:|---:|---:|");
    for (rw, side, depth) in
        [("randread", "read", 32), ("randwrite", "write", 32), ("randread", "read", 1), ("randwrite", "write", 1)]
    {
        let iops = |cluster: &Cluster| -> Result<f64> {
            let mut fio = fio(cluster)?;
            fio.args([format!("--rw={rw}"), format!("--iodepth={depth}"), format!("--runtime={}", arguments.seconds)]);
            let text = read(fio.args(["--bs=4k", "--time_based", "--ramp_time=1", "--output-format=json"]))?;
            let json: Value = serde_json::from_str(&text[text.find('{').unwrap_or(0)..])?;
            json["jobs"][0][side]["iops"].as_f64().context("fio told no IOPS")
        };
        let mut pairs = Vec::new();
        for round in 0..arguments.rounds {
            // Who is first changes, so that neither always follows the other's writes.
            pairs.push(if round % 2 == 0 {
                let none = iops(none)?;
                (none, iops(many)?)
            } else {
                let many = iops(many)?;
                (iops(none)?, many)
            });
        }
        let ratio = median(pairs.iter().map(|(none, many)| many / none).collect());
        let (none, many) = (pairs.iter().map(|p| p.0).collect(), pairs.iter().map(|p| p.1).collect());
        println!("| {side}, depth {depth} | {:.0} | {:.0} | {ratio:.2} |", median(none), median(many));
    }
    Ok(())
}

/// What servers hold in memory, and how long their PMap stores are.
fn sizes(cluster: &Cluster, name: &str) -> Result<()> {
    let mut told = Vec::new();
    for pid in cluster.server_pids()? {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).context("no VmRSS")?;
        let kib: u64 = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).context("no VmRSS")?;
        told.push(format!("{} MiB", kib / 1024));
    }
    println!("{name}: memory of the servers: {}", told.join(", "));
    println!("{name}: PMap store of the first disk: {} MiB", pmap_bytes(cluster)? >> 20);
    Ok(())
}

fn first_disk(cluster: &Cluster) -> String {
    cluster.data().join("s1/disk1").display().to_string()
}

/// Length of redb's file in the region, from the newer of its two heads (docs/on-disk-format.md).
fn pmap_bytes(cluster: &Cluster) -> Result<u64> {
    let told = json(cluster, &["inspect", "superblock", &first_disk(cluster)])?;
    let told = told.as_array().and_then(|list| list.first()).unwrap_or(&told);
    let regions = told["regions"].as_array().context("no regions")?;
    let pmap = regions.iter().find(|r| r["name"] == "pmap").context("no PMap region")?;
    let at = pmap["offset"].as_u64().context("no offset")?;
    let file = std::fs::File::open(first_disk(cluster))?;
    let mut heads = [[0; 40]; 2];
    for (n, head) in heads.iter_mut().enumerate() {
        file.read_exact_at(head, at + 4096 * n as u64)?;
    }
    let field = |head: &[u8; 40], at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    let newer = heads.iter().max_by_key(|head| field(head, 16)).context("two heads")?;
    Ok(field(newer, 32))
}

/// Rows and elements in the PMap store of the first disk; its server is down.
fn rows(cluster: &Cluster) -> Result<(usize, usize)> {
    let count = |table: &str| -> Result<usize> {
        let disk = first_disk(cluster);
        let told = json(cluster, &["inspect", "pmap", &disk, "--table", table, "--limit", "10000000"])?;
        told[0]["entries"].as_array().map(Vec::len).context("no entries")
    };
    Ok((count("rows")?, count("heads")?))
}

fn delete_all(cluster: &Cluster, arguments: &Arguments) -> Result<()> {
    let family =
        || json(cluster, &["disk", "info", "vol0", "--space"])?["space"]["family"].as_u64().context("no space");
    let mut order: Vec<String> = (0..arguments.snapshots).map(|n| format!("vol0@s{n}")).collect();
    let mut drawn = u64::from(std::process::id());
    for n in (1..order.len()).rev() {
        drawn = drawn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        order.swap(n, (drawn >> 33) as usize % (n + 1));
    }
    let (used, stored) = (family()?, cluster.stored()?);
    let mut dry_run = vec!["snapshot", "delete", "--dry-run"];
    dry_run.extend(order.iter().map(String::as_str));
    let began = Instant::now();
    let back = json(cluster, &dry_run)?["bytes"].as_u64().context("a dry run without bytes")?;
    println!("dry run of all: {back} of {used} bytes come back ({:.1} s)", began.elapsed().as_secs_f64());
    // The disk itself was written everywhere, so what it writes meanwhile takes nothing more.
    let mut load = fio(cluster)?;
    load.args(["--rw=randwrite", "--bs=4k", DEPTH, "--time_based", "--runtime=3600", "--output=/dev/null"]);
    let mut load = Load(load.spawn()?);
    std::thread::sleep(Duration::from_secs(1));
    let began = Instant::now();
    for name in &order {
        petal(cluster, &["snapshot", "delete", name])?;
    }
    let deleted = began.elapsed().as_secs_f64();
    load.is_running()?;
    drop(load);
    let left = family()?;
    println!("all deleted, one by one, in {deleted:.0} s under load; {left} bytes are left, {} were told", used - back);
    ensure!(left == used - back, "the space that is left is not what the dry run said");
    let began = Instant::now();
    let expected = stored - 2 * back;
    Cluster::wait_for("the servers have given everything back", Duration::from_secs(120), || {
        cluster.stored().is_ok_and(|now| now == expected)
    })
    .with_context(|| format!("{:?} bytes are stored, {expected} should be", cluster.stored()))?;
    println!("the servers store {expected} bytes instead of {stored}, {:.1} s later", began.elapsed().as_secs_f64());
    print!("petal verify: {}", petal(cluster, &["verify"])?);
    Ok(())
}
