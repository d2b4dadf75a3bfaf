//! The block jobs of design 5.3 with fio: Petal through NBD, and beside it in the same run the raw disk
//! file, nbdkit's file plugin and qemu-nbd. Rewrites the marked part of docs/performance.md.
//!
//! Targets take turns within each job, so that a noisy minute of the machine hits all of them. CPU is
//! counted for everything that works for the I/O: server processes from /proc/PID/stat, fio from its own
//! report.

use crate::cluster::{self, Cluster};
use crate::packages;
use crate::run::{command, read, root};
use anyhow::{Context, Result, ensure};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

const DOCUMENT: &str = "docs/performance.md";
const BEGIN: &str = "<!-- bench: written by `cargo xtask bench` -->";
const END: &str = "<!-- bench: end -->";

/// What to measure.
#[derive(clap::Args)]
pub struct Arguments {
    /// Seconds per job and target
    #[arg(long, default_value_t = 15)]
    seconds: u64,
    /// Rounds; the table shows medians
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// GiB that are written before and used by the jobs
    #[arg(long, default_value_t = 4)]
    gib: u64,
    /// Only jobs whose name contains this
    #[arg(long)]
    job: Option<String>,
    /// Only targets whose name contains this (petal, raw, raw+sync, nbdkit, qemu-nbd)
    #[arg(long)]
    target: Option<String>,
    /// Do not write docs/performance.md
    #[arg(long)]
    no_write: bool,
}

/// A job of fio.
struct Job {
    name: &'static str,
    pattern: &'static str,
    block: u32,
    depth: u32,
}

const JOBS: &[Job] = &[
    Job { name: "4k random write, depth 1", pattern: "randwrite", block: 4096, depth: 1 },
    Job { name: "4k random write, depth 32", pattern: "randwrite", block: 4096, depth: 32 },
    Job { name: "4k random read, depth 1", pattern: "randread", block: 4096, depth: 1 },
    Job { name: "4k random read, depth 32", pattern: "randread", block: 4096, depth: 32 },
    Job { name: "64k random write, depth 8", pattern: "randwrite", block: 65536, depth: 8 },
    Job { name: "64k random read, depth 8", pattern: "randread", block: 65536, depth: 8 },
    Job { name: "1M sequential write, depth 8", pattern: "write", block: 1 << 20, depth: 8 },
    Job { name: "1M sequential read, depth 8", pattern: "read", block: 1 << 20, depth: 8 },
];

impl Job {
    fn writes(&self) -> bool {
        self.pattern.contains("write")
    }
}

/// What fio is pointed at.
struct Target {
    name: &'static str,
    place: Place,
    /// Processes whose CPU counts besides fio's.
    pids: Vec<u32>,
}

enum Place {
    Nbd(String),
    File { path: PathBuf, sync: bool },
}

/// One job on one target.
#[derive(Clone, Copy, Default)]
struct Figures {
    iops: f64,
    p50_micros: f64,
    p99_micros: f64,
    /// CPU seconds per 1,000 I/Os, which is also milliseconds per I/O.
    cpu: f64,
}

/// Runs it.
pub fn run(arguments: Arguments) -> Result<()> {
    packages::install_missing()?;
    let petal = cluster::build_petal()?;
    let cluster = Cluster::new(&petal, "bench")?;
    let start = Instant::now();
    cluster.up(&["--disk-size", "32GiB", "--size", "10GiB"])?;
    let start_seconds = start.elapsed().as_secs_f64();
    std::thread::sleep(Duration::from_secs(2));
    let pids: Vec<u32> = cluster.processes().into_iter().map(|(pid, _)| pid).collect();
    let idle_percent = idle_cpu(&pids)?;

    let (targets, helpers) = make_targets(&arguments, &cluster, pids)?;
    for target in &targets {
        eprintln!("writing {} GiB to {}", arguments.gib, target.name);
        prepare(target, &arguments)?;
    }
    let mut report = String::new();
    writeln!(report, "| job | target | IOPS | p50 us | p99 us | CPU s / 1000 I/O | IOPS to raw |")?;
    writeln!(report, "|---|---|---:|---:|---:|---:|---:|")?;
    for job in JOBS.iter().filter(|j| arguments.job.as_ref().is_none_or(|n| j.name.contains(n.as_str()))) {
        let mut raw = None;
        let mut rounds = vec![Vec::new(); targets.len()];
        for _ in 0..arguments.rounds {
            for (target, figures) in targets.iter().zip(&mut rounds) {
                if !matches!(target.place, Place::File { sync: true, .. }) || job.writes() {
                    figures.push(measure(job, target, &arguments)?);
                }
            }
        }
        for (target, figures) in targets.iter().zip(rounds).filter(|(_, f)| !f.is_empty()) {
            let f = medians(figures);
            raw = raw.or((target.name == "raw").then_some(f.iops));
            let ratio = raw.map_or("".into(), |raw| format!("{:.2}", f.iops / raw));
            let Figures { iops, p50_micros, p99_micros, cpu } = f;
            let (job, name) = (job.name, target.name);
            let row =
                format!("| {job} | {name} | {iops:.0} | {p50_micros:.0} | {p99_micros:.0} | {cpu:.3} | {ratio} |");
            println!("{row}");
            writeln!(report, "{row}")?;
        }
    }
    writeln!(
        report,
        "\nReady after {start_seconds:.1} s. Idle CPU of all processes: {idle_percent:.1} % of one core."
    )?;
    writeln!(report, "Memory after the jobs (RSS): {}.", memory(&cluster))?;
    drop(helpers);
    println!("{report}");
    if !arguments.no_write {
        write_document(&conditions(&arguments)?, &report)?;
    }
    Ok(())
}

/// A helper process, ended with the benchmark.
struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn make_targets(arguments: &Arguments, cluster: &Cluster, pids: Vec<u32>) -> Result<(Vec<Target>, Vec<Helper>)> {
    let folder = cluster.folder();
    let file = |name: &str| -> Result<PathBuf> {
        let path = folder.join(name);
        std::fs::File::create(&path)?.set_len(arguments.gib << 30)?;
        Ok(path)
    };
    let wanted = |name: &str| arguments.target.as_ref().is_none_or(|t| name == t || name.contains(t.as_str()));
    let mut targets = Vec::new();
    let mut helpers = Vec::new();
    if wanted("raw") {
        let path = file("raw.img")?;
        targets.push(Target { name: "raw", place: Place::File { path: path.clone(), sync: false }, pids: vec![] });
        targets.push(Target { name: "raw+sync", place: Place::File { path, sync: true }, pids: vec![] });
    }
    if wanted("petal") {
        targets.push(Target { name: "petal", place: Place::Nbd(cluster.nbd_uri("vol0")?), pids });
    }
    if wanted("nbdkit") {
        let (path, socket) = (file("nbdkit.img")?, folder.join("nbdkit.sock"));
        let mut nbdkit = command("nbdkit");
        nbdkit.args(["-f", "-U"]).arg(&socket).arg("file").arg(path);
        helpers.push(start(nbdkit, &socket)?);
        targets.push(nbd_target("nbdkit", &socket, &helpers));
    }
    if wanted("qemu-nbd") {
        let (path, socket) = (file("qemu.img")?, folder.join("qemu.sock"));
        let mut qemu = command("qemu-nbd");
        qemu.args(["--persistent", "--cache=none", "--aio=io_uring", "--format=raw", "--shared=4"]);
        qemu.arg(format!("--socket={}", socket.display())).arg(path);
        helpers.push(start(qemu, &socket)?);
        targets.push(nbd_target("qemu-nbd", &socket, &helpers));
    }
    ensure!(!targets.is_empty(), "no target has such a name");
    Ok((targets, helpers))
}

fn start(mut server: std::process::Command, socket: &Path) -> Result<Helper> {
    let helper = Helper(server.stdout(Stdio::null()).spawn().context("cannot start a peer's server")?);
    Cluster::wait_for("the peer's socket", Duration::from_secs(5), || socket.exists())?;
    Ok(helper)
}

fn nbd_target(name: &'static str, socket: &Path, helpers: &[Helper]) -> Target {
    let pids = helpers.last().map(|h| h.0.id()).into_iter().collect();
    Target { name, place: Place::Nbd(format!("nbd+unix:///?socket={}", socket.display())), pids }
}

fn fio(target: &Target, arguments: &Arguments) -> std::process::Command {
    let mut fio = command("fio");
    fio.args(["--name=job", "--output-format=json", "--randrepeat=0", "--norandommap", "--thread"]);
    fio.arg(format!("--size={}g", arguments.gib));
    match &target.place {
        Place::Nbd(uri) => fio.arg("--ioengine=nbd").arg(format!("--uri={uri}")),
        Place::File { path, sync } => {
            fio.args(["--ioengine=io_uring", "--direct=1"]).arg(format!("--filename={}", path.display()));
            fio.args(sync.then_some("--fdatasync=1"))
        }
    };
    fio
}

/// Writes everything once: jobs measure a disk in use, not a sparse file.
fn prepare(target: &Target, arguments: &Arguments) -> Result<()> {
    if matches!(target.place, Place::File { sync: true, .. }) {
        return Ok(()); // the same file as the target without sync
    }
    read(fio(target, arguments).args(["--rw=write", "--bs=1m", "--iodepth=8", "--end_fsync=1"])).map(|_| ())
}

fn measure(job: &Job, target: &Target, arguments: &Arguments) -> Result<Figures> {
    let mut fio = fio(target, arguments);
    fio.args([format!("--rw={}", job.pattern), format!("--bs={}", job.block), format!("--iodepth={}", job.depth)]);
    fio.args(["--time_based".into(), format!("--runtime={}", arguments.seconds)]);
    let before = cpu_seconds(&target.pids);
    let text = read(&mut fio)?;
    let servers = cpu_seconds(&target.pids) - before;
    // fio prints notes before its JSON.
    let json: serde_json::Value = serde_json::from_str(&text[text.find('{').unwrap_or(0)..])?;
    let result = &json["jobs"][0];
    let side = &result[if job.writes() { "write" } else { "read" }];
    let number = |value: &serde_json::Value| value.as_f64().unwrap_or(0.0);
    let ios = number(&side["total_ios"]);
    ensure!(ios > 0.0, "{} did nothing on {}", job.name, target.name);
    let seconds = number(&result["job_runtime"]) / 1000.0;
    let client = (number(&result["usr_cpu"]) + number(&result["sys_cpu"])) / 100.0 * seconds;
    // With fdatasync after each write, the wait for it belongs to the write.
    let sync = match target.place {
        Place::File { sync: true, .. } => &result["sync"]["lat_ns"]["percentile"],
        _ => &serde_json::Value::Null,
    };
    let percentile = |p: &str| (number(&side["clat_ns"]["percentile"][p]) + number(&sync[p])) / 1000.0;
    Ok(Figures {
        iops: number(&side["iops"]),
        p50_micros: percentile("50.000000"),
        p99_micros: percentile("99.000000"),
        cpu: (servers + client) / ios * 1000.0,
    })
}

/// The middle one of each figure by itself.
fn medians(figures: Vec<Figures>) -> Figures {
    let median = |pick: fn(&Figures) -> f64| {
        let mut values: Vec<f64> = figures.iter().map(pick).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Figures {
        iops: median(|f| f.iops),
        p50_micros: median(|f| f.p50_micros),
        p99_micros: median(|f| f.p99_micros),
        cpu: median(|f| f.cpu),
    }
}

/// User and system time of processes, all threads, in seconds.
fn cpu_seconds(pids: &[u32]) -> f64 {
    // 100 ticks per second on every Linux that we run on (USER_HZ is fixed for /proc).
    let ticks: f64 = pids.iter().filter_map(|pid| ticks_of(*pid)).sum();
    ticks / 100.0
}

fn ticks_of(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may contain anything; the fields are counted behind its closing bracket.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?)
}

fn idle_cpu(pids: &[u32]) -> Result<f64> {
    const SECONDS: u64 = 10;
    let before = cpu_seconds(pids);
    std::thread::sleep(Duration::from_secs(SECONDS));
    Ok((cpu_seconds(pids) - before) / SECONDS as f64 * 100.0)
}

fn memory(cluster: &Cluster) -> String {
    let rss = |pid: u32| -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find(|l| l.starts_with("VmRSS:"))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    let one = |(pid, line): (u32, String)| {
        let what = if line.contains(" server ") { "server" } else { "up (NBD)" };
        format!("{what} {} MiB", rss(pid).unwrap_or(0) / 1024)
    };
    cluster.processes().into_iter().map(one).collect::<Vec<_>>().join(", ")
}

/// What a figure depends on.
fn conditions(arguments: &Arguments) -> Result<String> {
    let date = read(command("date").args(["-u", "+%Y-%m-%d"]))?;
    let commit = read(command("git").args(["rev-parse", "--short", "HEAD"])).unwrap_or_else(|_| "unknown".into());
    let kernel = read(command("uname").arg("-r"))?;
    let cores = std::thread::available_parallelism()?;
    let Arguments { seconds, rounds, gib, .. } = arguments;
    Ok(format!(
        "{}, commit {}, Linux {}, {cores} cores; {gib} GiB pre-written, {seconds} s per job, medians of {rounds}; \
         4 servers, two copies, client and servers on the same machine.",
        date.trim(),
        commit.trim(),
        kernel.trim()
    ))
}

fn write_document(conditions: &str, report: &str) -> Result<()> {
    let path = root().join(DOCUMENT);
    let old = std::fs::read_to_string(&path).unwrap_or_else(|_| "# Performance\n".into());
    let section = format!("{BEGIN}\n\n{conditions}\n\n{report}\n{END}");
    let new = match (old.find(BEGIN), old.find(END)) {
        (Some(begin), Some(end)) if begin < end => format!("{}{section}{}", &old[..begin], &old[end + END.len()..]),
        _ => format!("{}\n\n## Block jobs through NBD\n\n{section}\n", old.trim_end()),
    };
    std::fs::write(&path, new).with_context(|| format!("cannot write {DOCUMENT}"))?;
    println!("wrote {DOCUMENT}");
    Ok(())
}
