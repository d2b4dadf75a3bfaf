//! The simulator in release: given seeds, or fresh ones for a given time.

use crate::run::{cargo, root, show};
use anyhow::Result;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Seeds per process when a time is given: small enough that the time is kept.
const BATCH: u64 = 5;

/// What to simulate.
#[derive(clap::Args)]
pub struct Arguments {
    /// Number of seeds
    #[arg(long, default_value_t = 500)]
    seeds: u64,
    /// The first of them; a fresh one if it is not given
    #[arg(long)]
    first_seed: Option<u64>,
    /// Stop after about this many seconds, whatever the number of seeds
    #[arg(long)]
    seconds: Option<u64>,
    /// More arguments for petal-sim
    #[arg(last = true)]
    more: Vec<String>,
}

impl Arguments {
    /// Fresh seeds for about this many seconds.
    pub fn fresh_for(seconds: u64) -> Arguments {
        Arguments { seeds: u64::MAX, first_seed: None, seconds: Some(seconds), more: Vec::new() }
    }
}

/// Runs the simulator; a complaint of a checker is an error.
pub fn run(arguments: Arguments) -> Result<()> {
    show(cargo().args(["build", "--release", "-p", "petal-sim", "--bin", "petal-sim"]))?;
    let first = arguments.first_seed.unwrap_or_else(fresh_seed);
    println!("sim: first seed {first}");
    let Some(seconds) = arguments.seconds else { return one(first, arguments.seeds, &arguments.more) };
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut done = 0;
    while done < arguments.seeds && Instant::now() < end {
        let seeds = BATCH.min(arguments.seeds - done);
        one(first + done, seeds, &arguments.more)?;
        done += seeds;
    }
    println!("sim: {done} seeds from {first} without a complaint");
    Ok(())
}

fn one(first: u64, seeds: u64, more: &[String]) -> Result<()> {
    let mut sim = Command::new(root().join("target/release/petal-sim"));
    sim.args(["--seeds", &seeds.to_string(), "--first-seed", &first.to_string()]).args(more);
    show(&mut sim)
}

/// Seconds since 1970: different each time, short enough to type.
fn fresh_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_secs())
}
