//! PostgreSQL on ext4 on an attached disk, while two servers are killed in turn, and while snapshots are made. Its own
//! tools judge: a sum that every transaction keeps, `pg_amcheck`, `pg_checksums`; then `e2fsck` and `petal verify`.

use super::failures::{declared_down, full_again, pid_of};
use crate::cluster::{Cluster, kill9};
use crate::packages;
use crate::run::{command, output, read};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Seconds of one run of pgbench.
const RUN_SECONDS: &str = "3";
/// Environment variable: so many snapshots under load instead of ten.
const SNAPSHOTS: &str = "PETAL_E2E_SNAPSHOTS";

pub fn lives_through_two_kills(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--size", "4GiB"])?;
    let device = attach(cluster, "vol0")?;
    read(command("mkfs.ext4").arg("-q").arg(&device))?;
    let database = Database::create(&device)?;
    let load = Load::start(database.pgbench()?);
    let failed = ["s2", "s3"].into_iter().try_for_each(|server| {
        load.must_run(&format!("before {server} is killed"))?;
        kill9(pid_of(cluster, server)?)?;
        declared_down(cluster, server)?;
        cluster.up(&[])?;
        full_again(cluster)
    });
    let done = load.end()?;
    failed?;
    println!("pgbench: {done} transactions");
    database.holds(done)?;
    database.stop()?;
    read(command("e2fsck").args(["-f", "-n"]).arg(&device))?;
    read(cluster.petal().args(["detach", "vol0"]))?;
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

fn attach(cluster: &Cluster, disk: &str) -> Result<PathBuf> {
    let told = super::snapshots::json(cluster, &["attach", disk])?;
    Ok(told["device"].as_str().context("attach printed no device")?.into())
}

/// Snapshots of a file system that nobody told: each is what a power cut would have left, with everything in it that was
/// acknowledged before the command, and nothing that was begun after it returned.
pub fn snapshots_hold_what_was_acknowledged(cluster: &Cluster) -> Result<()> {
    let snapshots: u32 = match std::env::var(SNAPSHOTS) {
        Ok(text) => text.parse().with_context(|| format!("{SNAPSHOTS}={text} is no number"))?,
        Err(_) => 10,
    };
    cluster.up(&["--size", "2GiB"])?;
    let device = attach(cluster, "vol0")?;
    read(command("mkfs.ext4").arg("-q").arg(&device))?;
    let database = Database::create(&device)?;
    let load = Load::start(database.pgbench()?);
    let rows = Rows::insert(&database)?;
    let mut made: Vec<(u64, u64)> = Vec::new();
    let failed = (0..snapshots).try_for_each(|n| -> Result<()> {
        let enough = rows.acknowledged() + 20;
        Cluster::wait_for("rows are inserted", Duration::from_secs(20), || rows.acknowledged() > enough)?;
        load.must_run(&format!("before snapshot {n}"))?;
        let acknowledged = rows.acknowledged();
        read(cluster.petal().args(["snapshot", "create", "vol0", "--name", &format!("s{n}")]))?;
        made.push((acknowledged, rows.begun()));
        Ok(())
    });
    let inserted = rows.end()?;
    let done = load.end()?;
    failed?;
    println!("{inserted} rows, and pgbench: {done} transactions, {snapshots} snapshots");
    database.holds(done)?;
    database.stop()?;
    drop(database);
    read(cluster.petal().args(["detach", "vol0"]))?;

    let mut in_flight = 0;
    for (n, (acknowledged, begun)) in made.into_iter().enumerate() {
        let clone = format!("c{n}");
        read(cluster.petal().args(["clone", &format!("vol0@s{n}"), &clone]))?;
        let device = attach(cluster, &clone)?;
        // As after a power cut: the journal is replayed, and then nothing is wrong.
        let replayed = output(command("e2fsck").args(["-p"]).arg(&device))?;
        ensure!(matches!(replayed.status.code(), Some(0 | 1)), "{clone}: e2fsck: {}", crate::run::tail(&replayed));
        read(command("e2fsck").args(["-f", "-n"]).arg(&device)).with_context(|| clone.clone())?;
        let database = Database::open(&device, &clone)?;
        let said = database.ask("select count(*), count(distinct n), max(n) from acknowledged")?;
        let figures: Vec<u64> = said.trim().split('|').filter_map(|n| n.parse().ok()).collect();
        let [count, distinct, most] = figures[..] else { bail!("{clone}: psql said {said}") };
        ensure!(count == most && distinct == most, "{clone}: rows are missing in the middle: {said}");
        ensure!(
            most >= acknowledged,
            "{clone}: row {acknowledged} was acknowledged before the snapshot, {most} are there"
        );
        ensure!(most <= begun, "{clone}: row {most} was begun after the snapshot's command had returned at {begun}");
        in_flight += most - acknowledged;
        database.agrees().with_context(|| clone.clone())?;
        database.stop()?;
        drop(database);
        read(cluster.petal().args(["detach", &clone]))?;
        read(cluster.petal().args(["disk", "delete", &clone, "--yes"]))?;
    }
    println!("all are whole; {in_flight} rows that were acknowledged during the commands are in them");
    read(cluster.petal().arg("verify"))?;
    cluster.down()
}

/// Inserts rows 1, 2, ... in transactions of their own, and counts what the database has acknowledged.
struct Rows {
    /// Rows that were begun, and that were acknowledged.
    counts: Arc<(AtomicU64, AtomicU64)>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Rows {
    fn insert(database: &Database) -> Result<Rows> {
        database.ask("create table acknowledged (n bigint)")?;
        let mut psql = database.client("psql")?;
        let mut psql = psql.args(["-At", "bench"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut to = psql.stdin.take().context("no pipe")?;
        let mut from = BufReader::new(psql.stdout.take().context("no pipe")?);
        let (counts, stop) = (Arc::new((AtomicU64::new(0), AtomicU64::new(0))), Arc::new(AtomicBool::new(false)));
        let (counted, told) = (counts.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut line = String::new();
            for n in 1.. {
                if told.load(Ordering::SeqCst) {
                    break;
                }
                counted.0.store(n, Ordering::SeqCst);
                to.write_all(format!("insert into acknowledged values ({n});\n").as_bytes())?;
                line.clear();
                from.read_line(&mut line)?;
                ensure!(line == "INSERT 0 1\n", "row {n}: psql said '{line}'");
                counted.1.store(n, Ordering::SeqCst);
            }
            drop(to);
            let status = psql.wait()?;
            ensure!(status.success(), "psql ended with {status}");
            Ok(())
        });
        Ok(Rows { counts, stop, thread: Some(thread) })
    }

    fn begun(&self) -> u64 {
        self.counts.0.load(Ordering::SeqCst)
    }

    fn acknowledged(&self) -> u64 {
        self.counts.1.load(Ordering::SeqCst)
    }

    /// How many there are.
    fn end(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().context("it is ended once")?;
        thread.join().map_err(|_| anyhow!("the thread of psql panicked"))??;
        Ok(self.acknowledged())
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// pgbench, again and again until it is told to end: so the load lasts as long as the failures take.
struct Load {
    stop: Arc<AtomicBool>,
    runs: Option<JoinHandle<Result<u64>>>,
}

impl Load {
    fn start(mut pgbench: Command) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let runs = std::thread::spawn(move || {
            let mut transactions = 0;
            while !told.load(Ordering::Relaxed) {
                transactions += transactions_of(&read(&mut pgbench)?)?;
            }
            Ok(transactions)
        });
        Load { stop, runs: Some(runs) }
    }

    /// A run that has failed ends the scenario early.
    fn must_run(&self, when: &str) -> Result<()> {
        ensure!(self.runs.as_ref().is_some_and(|runs| !runs.is_finished()), "pgbench had ended {when}");
        Ok(())
    }

    /// How many transactions were made. One that failed is an error.
    fn end(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let runs = self.runs.take().context("it is ended once")?;
        runs.join().map_err(|_| anyhow!("the thread of pgbench panicked"))?
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(runs) = self.runs.take() {
            let _ = runs.join();
        }
    }
}

fn transactions_of(said: &str) -> Result<u64> {
    let figure = |words: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(words));
        let number = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        number.with_context(|| format!("pgbench did not say '{words}':\n{said}"))
    };
    ensure!(figure("number of failed transactions:")? == 0, "transactions failed:\n{said}");
    figure("number of transactions actually processed:")
}

/// A database in a file system on the device. Its folder can be reached by the user `postgres`, wherever the
/// workspace lies.
struct Database {
    folder: PathBuf,
}

impl Database {
    fn create(device: &Path) -> Result<Database> {
        let database = Database::mounted(device, "vol0")?;
        std::fs::create_dir(database.data())?;
        read(command("chown").arg("postgres").arg(database.data()))?;
        read(database.tool("initdb")?.args(["--data-checksums", "-D"]).arg(database.data()))?;
        database.start()?;
        read(database.client("createdb")?.arg("bench"))?;
        read(database.client("pgbench")?.args(["-i", "-q", "-s", "5", "bench"]))?;
        Ok(database)
    }

    /// The database in a copy of another one's file system, as it was while that one ran.
    fn open(device: &Path, name: &str) -> Result<Database> {
        let database = Database::mounted(device, name)?;
        let pid = database.data().join("postmaster.pid");
        ensure!(pid.exists(), "nothing ran when the snapshot of {name} was made");
        // The number in them may be that of another process of this machine by now, or of one that nobody has waited for.
        std::fs::remove_file(pid)?;
        std::fs::remove_file(database.data().join(".s.PGSQL.5432.lock"))?;
        database.start()?;
        Ok(database)
    }

    fn mounted(device: &Path, name: &str) -> Result<Database> {
        let folder = std::env::temp_dir().join(format!("petal-e2e-postgres-{}-{name}", std::process::id()));
        std::fs::create_dir_all(folder.join("mnt"))?;
        read(command("chmod").arg("755").arg(&folder))?;
        let database = Database { folder };
        read(command("mount").arg(device).arg(database.mount()))?;
        Ok(database)
    }

    fn start(&self) -> Result<()> {
        let options = format!("-c listen_addresses= -k {}", self.data().display());
        let mut start = self.tool("pg_ctl")?;
        // Its output would be held open by the database.
        start.args(["start", "-w", "-o", &options, "-l"]).arg(self.data().join("log")).arg("-D");
        let status = start.arg(self.data()).stdout(Stdio::null()).status()?;
        let log = || std::fs::read_to_string(self.data().join("log"));
        ensure!(status.success(), "the database did not start: {:?}", log());
        Ok(())
    }

    fn mount(&self) -> PathBuf {
        self.folder.join("mnt")
    }

    fn data(&self) -> PathBuf {
        self.mount().join("db")
    }

    /// A program of PostgreSQL, as its user: it refuses to run as root.
    fn tool(&self, name: &str) -> Result<Command> {
        let program = packages::find(name).with_context(|| format!("{name} is not installed"))?;
        let mut tool = command("runuser");
        tool.args(["-u", "postgres", "--"]).arg(program).current_dir(&self.folder);
        Ok(tool)
    }

    /// The same, for one that connects.
    fn client(&self, name: &str) -> Result<Command> {
        let mut client = self.tool(name)?;
        client.arg("-h").arg(self.data());
        Ok(client)
    }

    fn ask(&self, question: &str) -> Result<String> {
        read(self.client("psql")?.args(["-At", "-c", question, "bench"]))
    }

    fn pgbench(&self) -> Result<Command> {
        let mut pgbench = self.client("pgbench")?;
        pgbench.args(["-n", "-c", "4", "-T", RUN_SECONDS, "bench"]);
        Ok(pgbench)
    }

    /// Every transaction is there, once: its row in the history, and the sums that it changed alike.
    fn holds(&self, transactions: u64) -> Result<()> {
        let said = self.ask("select count(*) from pgbench_history")?;
        ensure!(said == format!("{transactions}\n"), "pgbench made {transactions} transactions; rows: {said}");
        self.agrees()
    }

    /// Every transaction changed three sums by the same amount, and noted it; and the indexes fit.
    fn agrees(&self) -> Result<()> {
        let sums = "select count(*) from (select sum(delta) s from pgbench_history union \
                    select sum(abalance) from pgbench_accounts union select sum(tbalance) from pgbench_tellers union \
                    select sum(bbalance) from pgbench_branches) different";
        let said = self.ask(sums)?;
        ensure!(said == "1\n", "the sums are {said} different ones");
        read(self.client("pg_amcheck")?.args(["--install-missing", "--heapallindexed", "bench"])).map(|_| ())
    }

    /// Stops it, checks every page, and unmounts.
    fn stop(&self) -> Result<()> {
        read(self.tool("pg_ctl")?.args(["stop", "-w", "-m", "fast", "-D"]).arg(self.data()))?;
        let said = read(self.tool("pg_checksums")?.args(["--check", "-D"]).arg(self.data()))?;
        ensure!(said.lines().any(|line| line.replace(' ', "") == "Badchecksums:0"), "pg_checksums: {said}");
        read(command("umount").arg(self.mount())).map(|_| ())
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if let Ok(mut stop) = self.tool("pg_ctl") {
            let _ = output(stop.args(["stop", "-m", "immediate", "-D"]).arg(self.data()));
        }
        let _ = output(command("umount").arg(self.mount()));
        // Only folders that are empty: what is mounted there still must not be deleted.
        let _ = std::fs::remove_dir(self.mount());
        let _ = std::fs::remove_dir(&self.folder);
    }
}
