//! What failures cost (the paper's 4.1 and table 2): throughput through an outage of one server and its return; how long
//! I/O stands when a server or the ring's leader dies, hangs or is stopped; the rebuild of a lost disk; and degraded over normal throughput with every server limited to a part of a core, so that
//! the servers are the limit although all of them share one machine. Prints tables; docs/performance.md is written by
//! hand from them.

use crate::cluster::{self, Cluster, kill9};
use crate::packages;
use crate::run::{command, read};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What to measure.
#[derive(clap::Args)]
pub struct Arguments {
    /// Seconds before, during and after the outage: each
    #[arg(long, default_value_t = 15)]
    outage: u64,
    /// Seconds per job of table 2
    #[arg(long, default_value_t = 6)]
    seconds: u64,
    /// Per cent of one core that each server may use in table 2
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(5..=100))]
    cpu: u64,
    /// GiB that are written before a server loses its disk; with four servers and two copies half of it is that server's
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=8))]
    rebuild: u64,
    /// Only one of them
    #[arg(long)]
    only: Option<Part>,
}

/// A part of it.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Throughput through an outage and the return
    Outage,
    /// How long I/O stands: kill -9, SIGSTOP and planned stops
    Gaps,
    /// A lost disk, nothing else going on
    Rebuild,
    /// Degraded over normal throughput
    Table2,
}

/// The server that fails.
const VICTIM: &str = "s4";

/// Runs it.
pub fn run(arguments: Arguments) -> Result<()> {
    packages::install_missing()?;
    let petal = cluster::build_petal()?;
    let wanted = |part: Part| arguments.only.is_none_or(|only| only == part);
    if wanted(Part::Outage) {
        outage(&petal, arguments.outage)?;
    }
    if wanted(Part::Gaps) {
        gaps(&petal)?;
    }
    if wanted(Part::Rebuild) {
        rebuild(&petal, arguments.rebuild)?;
    }
    if wanted(Part::Table2) {
        table2(&petal, &arguments)?;
    }
    Ok(())
}

/// A cluster whose disk was written before: so many GiB.
fn prepared(petal: &Path, name: &str, size: u64) -> Result<Cluster> {
    let cluster = Cluster::new(petal, name)?;
    cluster.up(&["--disk-size", "8GiB"])?;
    read(fio(&cluster, size)?.args(["--rw=write", "--bs=1m", "--iodepth=8"]))?;
    Ok(cluster)
}

/// fio on the first so many GiB of the disk.
fn fio(cluster: &Cluster, size: u64) -> Result<Command> {
    let mut fio = command("fio");
    fio.args(["--name=job", "--ioengine=nbd", "--randrepeat=0", "--norandommap", "--thread"]);
    fio.arg(format!("--size={size}g"));
    fio.arg("--output-format=json").arg(format!("--uri={}", cluster.nbd_uri("vol0")?)).current_dir(cluster.folder());
    Ok(fio)
}

fn kill(cluster: &Cluster) -> Result<()> {
    kill9(pid_of(cluster, VICTIM)?)
}

fn pid_of(cluster: &Cluster, server: &str) -> Result<u32> {
    let status = cluster.status()?;
    let found = status["servers"].as_array().into_iter().flatten().find(|s| s["id"] == server);
    Ok(found.and_then(|s| s["pid"].as_u64()).with_context(|| format!("{server} does not run"))? as u32)
}

fn leader(cluster: &Cluster) -> Result<String> {
    let status = cluster.status()?;
    let leads = status["servers"].as_array().into_iter().flatten().find(|s| s["leads"] == true);
    leads.and_then(|s| s["id"].as_str()).map(String::from).context("nobody leads the ring")
}

fn declared_down(cluster: &Cluster) -> Result<()> {
    Cluster::wait_for("it is declared down", Duration::from_secs(15), || {
        let status = cluster.status().unwrap_or_default();
        status["servers"].as_array().into_iter().flatten().any(|s| s["id"] == VICTIM && s["down"] == true)
    })
}

fn is_full(cluster: &Cluster) -> bool {
    cluster.status().is_ok_and(|s| s["redundancy"]["full"] == true)
}

// ------------------------------------------------------------------------------------------------

fn outage(petal: &Path, seconds: u64) -> Result<()> {
    let cluster = prepared(petal, "outage", 1)?;
    let mut load = fio(&cluster, 1)?;
    load.args(["--rw=randwrite", "--bs=4k", "--iodepth=4", "--time_based", "--output=/dev/null"]);
    load.args(["--write_lat_log=done", &format!("--runtime={}", 3 * seconds)]);
    let begun = Instant::now();
    let mut load = load.spawn()?;
    let at = |second: u64| std::thread::sleep(Duration::from_secs(second).saturating_sub(begun.elapsed()));
    at(seconds);
    kill(&cluster)?;
    let killed = begun.elapsed();
    at(2 * seconds);
    let returned = begun.elapsed();
    cluster.up(&[])?;
    Cluster::wait_for("everything is redundant again", Duration::from_secs(120), || is_full(&cluster))?;
    let full = begun.elapsed();
    ensure!(load.wait()?.success(), "fio failed");
    let done = Completions::read(&cluster.folder().join("done_clat.1.log"))?;
    let end = Duration::from_secs(3 * seconds - 1);
    let normal = done.median_second(Duration::from_secs(2), killed);
    // What the failure itself costs is the gap; the load is whole again behind it.
    let away = done.lowest_second(killed + Duration::from_secs(3), returned);
    let back = done.lowest_second(returned, end);
    println!("4 KiB random writes, depth 4, kill -9 of {VICTIM} for {seconds} s:");
    println!("| normal IOPS | longest gap | lowest second while it is away | from its return on | full again after |");
    println!("|---:|---:|---:|---:|---:|");
    println!(
        "| {normal} | {:.2} s | {away} ({:.0} %) | {back} ({:.0} %) | {:.2} s |",
        done.longest_gap(Duration::ZERO, Duration::MAX).as_secs_f64(),
        percent(away, normal),
        percent(back, normal),
        (full - returned).as_secs_f64()
    );
    let quarter = Duration::from_millis(250);
    let quarters = (0..20).map(|n| (4 * done.count(returned + quarter * n, quarter)).to_string());
    println!("quarters of a second from the return on, as IOPS: {}", quarters.collect::<Vec<_>>().join(" "));
    cluster.down()
}

/// What is done to a server.
#[derive(Clone, Copy)]
enum Failure {
    Kill,
    Stop,
    Planned,
}

/// To whom.
#[derive(Clone, Copy)]
enum Whom {
    /// `VICTIM`, which does not lead the ring.
    Other,
    Leader,
}

/// What is measured: fio's kind of load, and what happens during it.
const GAPS: [(&str, Failure, Whom); 7] = [
    ("randwrite", Failure::Kill, Whom::Other),
    ("randwrite", Failure::Kill, Whom::Leader),
    ("randwrite", Failure::Stop, Whom::Other),
    ("randwrite", Failure::Stop, Whom::Leader),
    ("randwrite", Failure::Planned, Whom::Other),
    ("randwrite", Failure::Planned, Whom::Leader),
    ("randread", Failure::Kill, Whom::Other),
];

/// How long the load is alone before the failure.
const CALM: Duration = Duration::from_secs(5);
/// Of that, what is left out at either end: fio begins to count some time after it was started.
const MARGIN: Duration = Duration::from_secs(1);
/// How long the server is away: some leases.
const AWAY: Duration = Duration::from_secs(4);

/// One failure after the other in one cluster; everything is redundant before each.
fn gaps(petal: &Path) -> Result<()> {
    let cluster = prepared(petal, "gaps", 1)?;
    let rows = GAPS.into_iter().map(|(rw, failure, whom)| gap(&cluster, rw, failure, whom));
    let rows = rows.collect::<Result<Vec<String>>>()?;
    println!("4 KiB random, depth 4; longest time without a completed request, from the failure until all data are");
    println!("redundant again, beside that in {} s before:", (CALM - 2 * MARGIN).as_secs());
    println!("| load | what happens | to | longest gap | before | normal IOPS |\n|---|---|---|---:|---:|---:|");
    rows.iter().for_each(|row| println!("{row}"));
    cluster.down()
}

/// A row of the table.
fn gap(cluster: &Cluster, rw: &str, failure: Failure, whom: Whom) -> Result<String> {
    Cluster::wait_for("everything is redundant", Duration::from_secs(120), || is_full(cluster))?;
    let leader = leader(cluster)?;
    let (server, to) = match whom {
        Whom::Other => (VICTIM, "a server"),
        Whom::Leader => (leader.as_str(), "the ring's leader"),
    };
    ensure!(matches!(whom, Whom::Leader) || leader != VICTIM, "{VICTIM} leads the ring: this would measure a leader");
    let pid = pid_of(cluster, server)?;
    let mut load = Load::begin(cluster, rw)?;
    std::thread::sleep(CALM);
    let failed = load.begun.elapsed();
    let what = match failure {
        Failure::Kill => kill9(pid).map(|()| "kill -9"),
        Failure::Stop => signal(pid, "STOP").map(|()| "SIGSTOP for 4 s"),
        Failure::Planned => read(cluster.petal().args(["down", server])).map(|_| "planned stop"),
    }?;
    // A lease later the others have noticed, or this would measure nothing.
    let missed = Cluster::wait_for("the others miss it", AWAY, || {
        cluster.status().is_ok_and(|s| s["redundancy"]["full"] == false)
    });
    std::thread::sleep((failed + AWAY).saturating_sub(load.begun.elapsed()));
    match failure {
        Failure::Stop => signal(pid, "CONT")?,
        Failure::Kill | Failure::Planned => cluster.up(&[])?,
    }
    missed.with_context(|| format!("{what} of {server}"))?;
    Cluster::wait_for("everything is redundant again", Duration::from_secs(120), || is_full(cluster))?;
    let done = load.end(cluster)?;
    let calm_end = failed - MARGIN;
    let before = done.longest_gap(MARGIN, calm_end).as_secs_f64();
    let longest = done.longest_gap(calm_end, Duration::MAX).as_secs_f64();
    let normal = done.median_second(MARGIN, calm_end);
    Ok(format!("| {} | {what} | {to} ({server}) | {longest:.3} s | {before:.3} s | {normal} |", &rw[4..]))
}

fn signal(pid: u32, name: &str) -> Result<()> {
    read(command("kill").args([format!("-{name}"), pid.to_string()])).map(|_| ())
}

/// fio, 4 KiB random at depth 4, until it is ended.
struct Load {
    fio: Child,
    begun: Instant,
}

impl Load {
    fn begin(cluster: &Cluster, rw: &str) -> Result<Load> {
        let mut load = fio(cluster, 1)?;
        load.args([&format!("--rw={rw}"), "--bs=4k", "--iodepth=4", "--time_based", "--runtime=3600"]);
        load.args(["--write_lat_log=gap", "--output=gap.json"]);
        let begun = Instant::now();
        Ok(Load { fio: load.stdout(Stdio::null()).spawn()?, begun })
    }

    fn end(&mut self, cluster: &Cluster) -> Result<Completions> {
        // Asked to end it finishes what it has begun, and writes its logs.
        signal(self.fio.id(), "INT")?;
        self.fio.wait()?;
        let report = std::fs::read_to_string(cluster.folder().join("gap.json"))?;
        let report: Value = serde_json::from_str(&report[report.find('{').unwrap_or(0)..])?;
        let job = &report["jobs"][0];
        ensure!(job["error"] == 0 && job["total_err"].as_u64().unwrap_or(0) == 0, "fio had errors: {job}");
        Completions::read(&cluster.folder().join("gap_clat.1.log"))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // Where something went wrong: it must not outlive the cluster.
        let _ = self.fio.kill();
        let _ = self.fio.wait();
    }
}

/// A server loses its disk, and nothing else goes on.
fn rebuild(petal: &Path, size: u64) -> Result<()> {
    let cluster = prepared(petal, "rebuild", size)?;
    kill(&cluster)?;
    declared_down(&cluster)?;
    std::fs::remove_file(cluster.data().join(VICTIM).join("disk1"))?;
    read(cluster.petal().args(["rejoin", VICTIM]))?;
    let before = recovered_blocks(&cluster)?;
    let raw_before = raw_both(&cluster)?;
    let begun = Instant::now();
    cluster.up(&[])?;
    Cluster::wait_for("everything is redundant again", Duration::from_secs(300), || is_full(&cluster))?;
    let took = begun.elapsed().as_secs_f64();
    let bytes = (recovered_blocks(&cluster)? - before) * 4096;
    let (raw, rate) = ((raw_before + raw_both(&cluster)?) / 2.0, bytes as f64 / 1e6 / took);
    println!(
        "a server whose disk was lost has its {:.2} GiB again after {took:.1} s ({rate:.0} MB/s), nothing else going on; a raw \
         file is read and written at once, as here, at {raw:.0} MB/s of each: {:.0} %",
        bytes as f64 / f64::from(1 << 30),
        rate * 100.0 / raw
    );
    cluster.down()
}

/// MB/s at which a file beside the cluster is read and written at the same time: the lesser of both.
fn raw_both(cluster: &Cluster) -> Result<f64> {
    let file = cluster.folder().join("raw.img");
    let mut fio = command("fio");
    fio.args(["--name=raw", "--rw=rw", "--bs=1m", "--iodepth=8", "--ioengine=io_uring", "--direct=1", "--size=2g"]);
    fio.args(["--time_based", "--runtime=6", "--output-format=json"]).arg(format!("--filename={}", file.display()));
    let told: Value = serde_json::from_str(&read(&mut fio)?)?;
    std::fs::remove_file(&file)?;
    let bytes = |kind: &str| told["jobs"][0][kind]["bw_bytes"].as_f64().context("fio tells no bandwidth");
    Ok(bytes("read")?.min(bytes("write")?) / 1e6)
}

fn recovered_blocks(cluster: &Cluster) -> Result<u64> {
    let status = cluster.status()?;
    let servers = status["servers"].as_array().context("the status has no servers")?;
    Ok(servers.iter().filter_map(|s| s["counters"]["recovered_blocks"].as_u64()).sum())
}

fn percent(part: usize, whole: usize) -> f64 {
    part as f64 * 100.0 / whole.max(1) as f64
}

/// Milliseconds at which fio's requests were completed, ascending.
pub fn completions(log: &Path) -> Result<Vec<u64>> {
    Ok(Completions::read(log)?.0)
}

/// When fio's requests were completed: milliseconds, ascending.
struct Completions(Vec<u64>);

impl Completions {
    fn read(log: &Path) -> Result<Completions> {
        let text = std::fs::read_to_string(log).with_context(|| format!("fio wrote no {}", log.display()))?;
        let mut at: Vec<u64> = text.lines().filter_map(|line| line.split(',').next()?.trim().parse().ok()).collect();
        at.sort_unstable();
        ensure!(!at.is_empty(), "{} is empty", log.display());
        Ok(Completions(at))
    }

    fn count(&self, from: Duration, length: Duration) -> usize {
        let below = |end: Duration| self.0.partition_point(|at| u128::from(*at) < end.as_millis());
        below(from + length) - below(from)
    }

    /// Every second that lies between, whenever it begins.
    fn seconds(&self, from: Duration, to: Duration) -> Vec<usize> {
        let (step, second) = (Duration::from_millis(50), Duration::from_secs(1));
        let starts = (0..).map(|n| from + step * n).take_while(|start| *start + second <= to);
        starts.map(|start| self.count(start, second)).collect()
    }

    fn lowest_second(&self, from: Duration, to: Duration) -> usize {
        self.seconds(from, to).into_iter().min().unwrap_or(0)
    }

    fn median_second(&self, from: Duration, to: Duration) -> usize {
        let mut counts = self.seconds(from, to);
        counts.sort_unstable();
        counts.get(counts.len() / 2).copied().unwrap_or(0)
    }

    /// Between two neighbours of those that lie between.
    fn longest_gap(&self, from: Duration, to: Duration) -> Duration {
        let below = |end: Duration| self.0.partition_point(|at| u128::from(*at) < end.as_millis());
        let between = &self.0[below(from)..below(to)];
        Duration::from_millis(between.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0))
    }
}

// ------------------------------------------------------------------------------------------------

fn table2(petal: &Path, arguments: &Arguments) -> Result<()> {
    let jobs: Vec<(&str, &str)> =
        ["randread", "randwrite"].into_iter().flat_map(|rw| ["512", "8k", "64k"].map(|bs| (rw, bs))).collect();
    let cluster = prepared(petal, "table2", 1)?;
    let limits = Limits::new(&cluster, arguments.cpu)?;
    let measure =
        || -> Result<Vec<f64>> { jobs.iter().map(|(rw, bs)| iops(&cluster, rw, bs, arguments.seconds)).collect() };
    let normal = measure()?;
    kill(&cluster)?;
    declared_down(&cluster)?;
    let degraded = measure()?;
    println!("4 servers, each with {} % of a core ({}), depth 32; degraded: one is down", arguments.cpu, limits.how);
    println!("| job | normal IOPS | degraded IOPS | degraded / normal |\n|---|---:|---:|---:|");
    for ((job, normal), degraded) in jobs.iter().zip(normal).zip(degraded) {
        println!("| {} {} | {normal:.0} | {degraded:.0} | {:.0} % |", job.0, job.1, degraded * 100.0 / normal);
    }
    cluster.down()
}

fn iops(cluster: &Cluster, rw: &str, bs: &str, seconds: u64) -> Result<f64> {
    let mut fio = fio(cluster, 1)?;
    fio.args([format!("--rw={rw}"), format!("--bs={bs}"), format!("--runtime={seconds}")]);
    let text = read(fio.args(["--iodepth=32", "--time_based", "--ramp_time=1"]))?;
    let json: Value = serde_json::from_str(&text[text.find('{').unwrap_or(0)..])?;
    json["jobs"][0][rw.trim_start_matches("rand")]["iops"].as_f64().context("fio told no IOPS")
}

/// A control group for each server's process; removed when dropped.
struct Limits {
    folder: PathBuf,
    how: &'static str,
}

/// Short, so that a server that has used its share does not stand still for long: microseconds.
const PERIOD: u64 = 20_000;

impl Limits {
    fn new(cluster: &Cluster, percent: u64) -> Result<Limits> {
        let name = format!("petal-bench-{}", std::process::id());
        let first = Path::new("/sys/fs/cgroup/cpu");
        let (root, how) = match first.join("cpu.cfs_quota_us").exists() || first.join("cgroup.procs").exists() {
            true => (first, "cgroup v1, cpu.cfs_quota_us"),
            false => (Path::new("/sys/fs/cgroup"), "cgroup v2, cpu.max"),
        };
        let limits = Limits { folder: root.join(name), how };
        std::fs::create_dir(&limits.folder).context("cannot make a control group: root is needed")?;
        let write = |path: PathBuf, text: String| {
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        let quota = PERIOD * percent / 100;
        if how.contains("v2") {
            write(root.join("cgroup.subtree_control"), "+cpu".into())?;
            write(limits.folder.join("cgroup.subtree_control"), "+cpu".into())?;
        }
        for (n, pid) in cluster.server_pids()?.into_iter().enumerate() {
            let group = limits.folder.join(format!("server{n}"));
            std::fs::create_dir(&group)?;
            if how.contains("v2") {
                write(group.join("cpu.max"), format!("{quota} {PERIOD}"))?;
            } else {
                write(group.join("cpu.cfs_period_us"), PERIOD.to_string())?;
                write(group.join("cpu.cfs_quota_us"), quota.to_string())?;
            }
            write(group.join("cgroup.procs"), pid.to_string())?;
        }
        Ok(limits)
    }
}

impl Drop for Limits {
    fn drop(&mut self) {
        // The kernel removes only groups without processes: those that are left go up first.
        let parent = self.folder.parent().map(|p| p.join("cgroup.procs"));
        for group in std::fs::read_dir(&self.folder).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
            let pids = std::fs::read_to_string(group.path().join("cgroup.procs")).unwrap_or_default();
            for (pid, parent) in pids.lines().zip(parent.iter().cycle()) {
                let _ = std::fs::write(parent, pid);
            }
            let _ = std::fs::remove_dir(group.path());
        }
        let _ = std::fs::remove_dir(&self.folder);
    }
}
