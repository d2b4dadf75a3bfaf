//! What moving data costs (design 2.8, 2.13): servers are added to a cluster, filled, and drained again, while a disk
//! is written. What is counted: bytes that moved, beside those that had to; the load before and meanwhile; how even the
//! servers are afterwards. Prints a table, and JSON; docs/performance.md is written by hand from them.

use crate::cluster::{self, Cluster};
use crate::packages;
use crate::run::{command, read};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What to measure.
#[derive(clap::Args)]
pub struct Arguments {
    /// GiB that are stored, in two copies
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=64))]
    gib: u64,
    /// Servers to grow to, from four, and to shrink from again
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(5..=12))]
    to: u64,
    /// Seconds of load before each change, for comparison
    #[arg(long, default_value_t = 20)]
    before: u64,
    /// Nobody writes meanwhile
    #[arg(long)]
    idle: bool,
}

/// Servers that the cluster begins with.
const FIRST: u64 = 4;
/// How long one change may take.
const MOVED_WITHIN: Duration = Duration::from_secs(3600);
/// How long who left may take to drop what it had.
const DROPPED_WITHIN: Duration = Duration::from_secs(300);
/// Servers are even if none has so many per cent more or less than the mean.
const EVEN_PERCENT: f64 = 5.0;

/// Runs it.
pub fn run(arguments: Arguments) -> Result<()> {
    packages::install_missing()?;
    let petal = cluster::build_petal()?;
    let cluster = prepared(&petal, arguments.gib)?;
    let load = if arguments.idle { None } else { Some(Load::begin(&cluster, arguments.gib)?) };
    let mut changes = Vec::new();
    for grows in [true, false] {
        let clock = Instant::now();
        let before = Duration::from_secs(if arguments.idle { 0 } else { arguments.before });
        std::thread::sleep(before);
        changes.push(change(&cluster, arguments.to, grows, clock)?);
    }
    let completions = load.map(Load::end).transpose()?;
    let said = read(cluster.petal().arg("verify"))?;
    println!("{}", said.lines().last().unwrap_or_default());
    tell(&arguments, &changes, completions.as_ref())?;
    cluster.down()
}

/// A cluster whose disk was written once.
fn prepared(petal: &Path, gib: u64) -> Result<Cluster> {
    let cluster = Cluster::new(petal, "reconfigure")?;
    // Room for what is overwritten before it is freed, and for a server less.
    let disk = gib.max(2);
    cluster.up(&[
        "--servers",
        &FIRST.to_string(),
        "--disk-size",
        &format!("{disk}GiB"),
        "--size",
        &format!("{}GiB", gib + 1),
    ])?;
    read(fio(&cluster, gib)?.args(["--rw=write", "--bs=1m", "--iodepth=8"]))?;
    Ok(cluster)
}

fn fio(cluster: &Cluster, gib: u64) -> Result<Command> {
    let mut fio = command("fio");
    fio.args(["--name=job", "--ioengine=nbd", "--randrepeat=0", "--norandommap", "--thread", "--output-format=json"]);
    fio.arg(format!("--size={gib}g")).arg(format!("--uri={}", cluster.nbd_uri("vol0")?));
    fio.current_dir(cluster.folder());
    Ok(fio)
}

// ------------------------------------------------------------------------------------------------
// The load.

/// 4 KiB random writes at depth 4 until they are ended.
struct Load {
    fio: Child,
    begun: Instant,
    folder: std::path::PathBuf,
}

/// When each write was completed, in milliseconds since the load began, and what it took, in microseconds.
struct Completions {
    begun: Instant,
    all: Vec<(u64, u64)>,
    errors: u64,
}

impl Load {
    fn begin(cluster: &Cluster, gib: u64) -> Result<Load> {
        let mut load = fio(cluster, gib)?;
        load.args(["--rw=randwrite", "--bs=4k", "--iodepth=4", "--time_based", "--runtime=7200"]);
        load.args(["--write_lat_log=done", "--output=load.json"]);
        let begun = Instant::now();
        Ok(Load { fio: load.stdout(Stdio::null()).spawn()?, begun, folder: cluster.folder().into() })
    }

    fn end(mut self) -> Result<Completions> {
        // Asked to end it finishes what it has begun, and writes its report.
        read(command("kill").args(["-INT", &self.fio.id().to_string()]))?;
        self.fio.wait()?;
        let report = std::fs::read_to_string(self.folder.join("load.json"))?;
        let report: Value = serde_json::from_str(&report[report.find('{').unwrap_or(0)..])?;
        let job = &report["jobs"][0];
        let errors = job["total_err"].as_u64().unwrap_or(0) + u64::from(job["error"].as_i64() != Some(0));
        let log = std::fs::read_to_string(self.folder.join("done_clat.1.log"))?;
        let pair = |line: &str| {
            let mut fields = line.split(',').map(|f| f.trim().parse::<u64>());
            Some((fields.next()?.ok()?, fields.next()?.ok()? / 1000))
        };
        let mut all: Vec<(u64, u64)> = log.lines().filter_map(pair).collect();
        all.sort_unstable();
        ensure!(!all.is_empty(), "the load has written nothing");
        Ok(Completions { begun: self.begun, all, errors })
    }
}

/// What the load was like for some time.
struct Seen {
    iops: f64,
    p50: u64,
    p99: u64,
    longest_gap: u64,
}

impl Completions {
    fn between(&self, from: Instant, to: Instant) -> Seen {
        let millis = |at: Instant| (at - self.begun).as_millis() as u64;
        let (from, to) = (millis(from), millis(to));
        let part = &self.all[self.all.partition_point(|c| c.0 < from)..self.all.partition_point(|c| c.0 < to)];
        let mut took: Vec<u64> = part.iter().map(|c| c.1).collect();
        took.sort_unstable();
        let of = |percent: usize| took.get(took.len() * percent / 100).copied().unwrap_or(0);
        Seen {
            iops: part.len() as f64 * 1000.0 / (to - from).max(1) as f64,
            p50: of(50),
            p99: of(99),
            longest_gap: part.windows(2).map(|pair| pair[1].0 - pair[0].0).max().unwrap_or(0),
        }
    }
}

// ------------------------------------------------------------------------------------------------
// A change.

/// Servers came or went.
struct Change {
    what: String,
    /// When the load alone began to be looked at, when the change began, and when nothing moved any more.
    times: [Instant; 3],
    /// Bytes that all servers stored when it began.
    stored: u64,
    /// Bytes that no placement could have spared.
    least: u64,
    /// Bytes that moved, by the servers' counters.
    moved: u64,
    /// Bytes of each server that holds data, when who left had dropped it.
    after: Vec<(String, u64)>,
    /// Seconds until it had.
    dropped: f64,
}

fn change(cluster: &Cluster, to: u64, grows: bool, clock: Instant) -> Result<Change> {
    let (stored, recovered) = (used(cluster)?.iter().map(|(_, bytes)| bytes).sum(), recovered(cluster)?);
    let begun = Instant::now();
    let servers = FIRST + 1..=to;
    for server in servers.clone() {
        match grows {
            true => read(cluster.petal().args(["server", "add", "--local", "--json"]))?,
            false => read(cluster.petal().args(["server", "drain", &format!("s{server}")]))?,
        };
    }
    Cluster::wait_for("it has moved", MOVED_WITHIN, || {
        // Not oftener: to be asked takes the servers' time, too.
        std::thread::sleep(Duration::from_secs(1));
        is_over(cluster).unwrap_or(false)
    })?;
    let ended = Instant::now();
    let moved = recovered_since(cluster, recovered)?;
    let holders = if grows { to } else { FIRST };
    // While a disk is overwritten a little more is in use than is stored.
    Cluster::wait_for("who left has dropped what it had", DROPPED_WITHIN, || {
        std::thread::sleep(Duration::from_millis(200));
        used(cluster).is_ok_and(|all| {
            all.iter().map(|(_, bytes)| bytes).sum::<u64>() <= stored + stored / 50
                && all.iter().skip(holders as usize).all(|(_, bytes)| *bytes == 0)
        })
    })?;
    let mut after = used(cluster)?;
    after.truncate(holders as usize);
    Ok(Change {
        what: if grows { format!("{FIRST} -> {to}") } else { format!("{to} -> {FIRST}") },
        times: [clock, begun, ended],
        stored,
        least: stored * (to - FIRST) / to,
        moved,
        after,
        dropped: ended.elapsed().as_secs_f64(),
    })
}

fn is_over(cluster: &Cluster) -> Result<bool> {
    let status: Value = serde_json::from_str(&read(cluster.petal().args(["reconfigure", "status", "--json"]))?)?;
    Ok(status["moving"].as_array().is_some_and(Vec::is_empty) && status["to_plan"] == 0)
}

fn servers(cluster: &Cluster) -> Result<Vec<Value>> {
    cluster.status()?["servers"].as_array().cloned().context("the status has no servers")
}

/// Bytes stored on each server.
fn used(cluster: &Cluster) -> Result<Vec<(String, u64)>> {
    let of = |server: &Value| {
        let disks = server["disks"].as_array().context("a server does not answer")?;
        Ok((
            server["id"].as_str().unwrap_or_default().to_string(),
            disks.iter().filter_map(|d| d["used"].as_u64()).sum(),
        ))
    };
    servers(cluster)?.iter().map(of).collect()
}

/// Blocks that all servers have copied to others since they started.
fn recovered(cluster: &Cluster) -> Result<u64> {
    Ok(servers(cluster)?.iter().filter_map(|s| s["counters"]["recovered_blocks"].as_u64()).sum())
}

fn recovered_since(cluster: &Cluster, before: u64) -> Result<u64> {
    Ok(recovered(cluster)?.saturating_sub(before) * 4096)
}

impl Change {
    fn seconds(&self) -> f64 {
        (self.times[2] - self.times[1]).as_secs_f64()
    }

    /// Per cent by which the server that is farthest from the mean differs from it.
    fn uneven(&self) -> f64 {
        let mean = self.after.iter().map(|(_, b)| *b).sum::<u64>() as f64 / self.after.len() as f64;
        self.after.iter().map(|(_, b)| (*b as f64 - mean).abs() / mean * 100.0).fold(0.0, f64::max)
    }

    fn json(&self, load: Option<&Completions>) -> Value {
        let seen = |from, to| {
            load.map(|l| {
                let Seen { iops, p50, p99, longest_gap } = l.between(from, to);
                json!({"iops": iops.round(), "p50_us": p50, "p99_us": p99, "longest_gap_ms": longest_gap})
            })
        };
        let [clock, begun, ended] = self.times;
        json!({
            "change": self.what, "stored": self.stored, "least": self.least, "moved": self.moved,
            "seconds": self.seconds(), "bytes_per_second": (self.moved as f64 / self.seconds()).round(),
            "before": seen(clock, begun), "during": seen(begun, ended),
            "uneven_percent": self.uneven(), "seconds_until_dropped": self.dropped,
            "bytes": self.after.iter().map(|(s, b)| (s.clone(), json!(b))).collect::<serde_json::Map<_, _>>(),
        })
    }
}

fn tell(arguments: &Arguments, changes: &[Change], load: Option<&Completions>) -> Result<()> {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    println!("{} GiB in two copies; 4 KiB random writes at depth 4 through NBD", arguments.gib);
    println!(
        "| servers | moved | least | time | MB/s | IOPS before | during | p99 before | during | longest gap | uneven |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    for change in changes {
        let [clock, begun, ended] = change.times;
        let seen = load.map(|l| (l.between(clock, begun), l.between(begun, ended)));
        let of_load = seen.map_or_else(
            || "- | - | - | - | -".into(),
            |(a, b)| {
                let ms = |us: u64| us as f64 / 1000.0;
                let (iops, p99) = ((a.iops, b.iops), (ms(a.p99), ms(b.p99)));
                format!("{:.0} | {:.0} | {:.1} ms | {:.1} ms | {} ms", iops.0, iops.1, p99.0, p99.1, b.longest_gap)
            },
        );
        println!(
            "| {} | {:.2} GiB | {:.2} GiB | {:.0} s | {:.0} | {of_load} | {:.1} % |",
            change.what,
            gib(change.moved),
            gib(change.least),
            change.seconds(),
            change.moved as f64 / 1e6 / change.seconds(),
            change.uneven()
        );
    }
    let errors = load.map_or(0, |l| l.errors);
    println!("errors of the load: {errors}");
    let all: Vec<Value> = changes.iter().map(|c| c.json(load)).collect();
    println!("{}", json!({"gib": arguments.gib, "errors": errors, "changes": all}));
    ensure!(errors == 0, "the load met {errors} errors");
    for change in changes.iter().filter(|c| c.uneven() > EVEN_PERCENT) {
        println!("not even after {}: {:?}", change.what, change.after);
    }
    Ok(())
}
