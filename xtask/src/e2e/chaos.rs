//! Servers are killed and stopped at random while clients record what they see; the simulator's checker
//! judges the record.

use crate::cluster::{Cluster, kill9};
use crate::run::{self, cargo, read};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::time::{Duration, Instant};

/// Seconds of chaos, unless `PETAL_CHAOS_SECONDS` says otherwise.
const SECONDS: u64 = 25;

/// Four clients on the same blocks; one server at a time is killed, or stopped for up to three leases.
pub fn history_is_linearizable(cluster: &Cluster) -> Result<()> {
    let seconds = match std::env::var("PETAL_CHAOS_SECONDS") {
        Ok(text) => text.parse().context("PETAL_CHAOS_SECONDS is not a number")?,
        Err(_) => SECONDS,
    };
    cluster.up(&[])?;
    read(cluster.petal().args(["disk", "create", "judged", "1GiB"]))?;
    let record = cluster.folder().join("history.jsonl");
    let mut history = cluster.petal();
    history.args(["history", "judged", "--clients", "4", "--seconds", &seconds.to_string(), "--out"]).arg(&record);
    let mut history = history.spawn().context("cannot start `petal history`")?;
    let seed = u64::from(std::process::id());
    println!("chaos of {seconds} s, drawn from {seed}");
    let mut dice = Dice(seed);
    let (mut kills, mut stops) = (0, 0);
    let end = Instant::now() + Duration::from_secs(seconds.saturating_sub(4));
    while Instant::now() < end {
        let pids = cluster.server_pids()?;
        let victim = pids[dice.below(pids.len() as u64) as usize];
        if dice.below(2) == 0 {
            kill9(victim)?;
            kills += 1;
            std::thread::sleep(Duration::from_millis(dice.below(3000)));
            cluster.up(&[])?;
        } else {
            read(run::command("kill").args(["-STOP", &victim.to_string()]))?;
            stops += 1;
            std::thread::sleep(Duration::from_millis(dice.below(3000)));
            read(run::command("kill").args(["-CONT", &victim.to_string()]))?;
        }
        std::thread::sleep(Duration::from_millis(dice.below(3000)));
    }
    println!("{kills} servers were killed, {stops} stopped");
    let status = history.wait()?;
    ensure!(status.success(), "`petal history` ended with {status}");
    println!("{}", judge(&record)?);
    Ok(())
}

/// What the simulator's checker says of a record; an error if it cannot be explained.
pub(super) fn judge(record: &Path) -> Result<String> {
    run::show(cargo().args(["build", "--release", "--quiet", "-p", "petal-sim"]))?;
    let said = read(run::command(run::root().join("target/release/petal-sim")).arg("--judge").arg(record))?;
    Ok(said.trim().to_string())
}

/// Enough randomness for chaos, and the same again from the same seed.
pub(super) struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % end
    }
}
