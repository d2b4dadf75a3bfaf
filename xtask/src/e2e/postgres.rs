//! PostgreSQL on ext4 on an attached disk, while two servers are killed in turn. Its own tools judge: a sum that
//! every transaction keeps, `pg_amcheck`, `pg_checksums`; then `e2fsck` and `petal verify`.

use super::failures::{declared_down, full_again, pid_of};
use crate::cluster::{Cluster, kill9};
use crate::packages;
use crate::run::{command, output, read};
use anyhow::{Context, Result, anyhow, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Seconds of one run of pgbench.
const RUN_SECONDS: &str = "3";

pub fn lives_through_two_kills(cluster: &Cluster) -> Result<()> {
    cluster.up(&["--size", "4GiB"])?;
    let attached: serde_json::Value = serde_json::from_str(&read(cluster.petal().args(["attach", "vol0", "--json"]))?)?;
    let device = PathBuf::from(attached["device"].as_str().context("attach printed no device")?);
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
        let folder = std::env::temp_dir().join(format!("petal-e2e-postgres-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("mnt"))?;
        read(command("chmod").arg("755").arg(&folder))?;
        let database = Database { folder };
        read(command("mount").arg(device).arg(database.mount()))?;
        std::fs::create_dir(database.data())?;
        read(command("chown").arg("postgres").arg(database.data()))?;
        read(database.tool("initdb")?.args(["--data-checksums", "-D"]).arg(database.data()))?;
        let options = format!("-c listen_addresses= -k {}", database.mount().join("db").display());
        let mut start = database.tool("pg_ctl")?;
        // Its output would be held open by the database.
        start.args(["start", "-w", "-o", &options, "-l"]).arg(database.data().join("log")).arg("-D");
        let status = start.arg(database.data()).stdout(std::process::Stdio::null()).status()?;
        ensure!(
            status.success(),
            "the database did not start: {:?}",
            std::fs::read_to_string(database.data().join("log"))
        );
        read(database.client("createdb")?.arg("bench"))?;
        read(database.client("pgbench")?.args(["-i", "-q", "-s", "5", "bench"]))?;
        Ok(database)
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

    fn pgbench(&self) -> Result<Command> {
        let mut pgbench = self.client("pgbench")?;
        pgbench.args(["-n", "-c", "4", "-T", RUN_SECONDS, "bench"]);
        Ok(pgbench)
    }

    /// Every transaction is there, once: its row in the history, and the sums that it changed alike.
    fn holds(&self, transactions: u64) -> Result<()> {
        let sums = "select count(*) from pgbench_history union all \
                    select count(*) from (select sum(delta) s from pgbench_history union \
                    select sum(abalance) from pgbench_accounts union select sum(tbalance) from pgbench_tellers union \
                    select sum(bbalance) from pgbench_branches) different";
        let said = read(self.client("psql")?.args(["-At", "-c", sums, "bench"]))?;
        ensure!(
            said == format!("{transactions}\n1\n"),
            "pgbench made {transactions} transactions; rows and sums: {said}"
        );
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
