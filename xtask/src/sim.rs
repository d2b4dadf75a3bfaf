//! The simulator in release: given seeds, or fresh ones for a given time.

use crate::run::{cargo, output_within, root, show, words};
use anyhow::{Result, ensure};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Seeds per process when a time is given: small enough that the time is kept.
const BATCH: u64 = 5;
/// How long these may take: they take seconds, but with other arguments they may be much larger.
const BATCH_LIMIT: Duration = Duration::from_secs(1800);

/// From so many seeds on each of `OFTEN` must have happened: what happens in every fifth seed stays away from 60 of them
/// once in 650,000 times.
const SEEDS_OF_EVERY_KIND: u64 = 60;
/// Kinds that happened in 24 of a hundred drawn seeds or more (300 seeds). `--coverage` demands all kinds, of many more seeds.
const OFTEN: &[&str] = &[
    "a server was declared down",
    "an element was copied to a member that came back",
    "a member caught up",
    "a block rotted",
    "a block became unreadable",
    "a bad block was met",
    "a disk hung",
    "a disk failed one write",
    "a round of scrub ended",
    "a server was cut off from servers, not from clients",
    "a server was cut off from servers until others acted in its place",
    "a message was passed on for a client",
    "a server was partitioned from others",
    "a server was frozen",
    "one server crashed",
    "all servers crashed at once",
    "a server crashed while it started",
    "a crash was timed to a moment that matters",
    "a reset was timed to a moment that matters",
    "a server started again",
    "a server was suspected",
    "an unanswered disk write was kept by a crash",
    "an unanswered disk write was lost by a crash",
    "an unanswered disk write was torn by a crash",
    "a disk was slow",
    "a server was slow",
    "a connection was reset",
    "a connection stalled",
    "a message was lost with its connection",
    "a client crashed",
    "a disk was taken over",
    "a fenced operation was refused",
    "a server joined",
    "a snapshot was made",
    "a clone was written",
];

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
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
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
    let mut sum = Counters::default();
    while done < arguments.seeds && Instant::now() < end {
        let seeds = BATCH.min(arguments.seeds - done);
        sum.add(&batch(first + done, seeds, &arguments.more)?);
        done += seeds;
    }
    print!("{sum}");
    println!("sim: {done} seeds from {first} without a complaint");
    // More arguments change what is drawn.
    if !arguments.more.is_empty() || done < SEEDS_OF_EVERY_KIND {
        println!("sim: no kind had to happen: that is asked of {SEEDS_OF_EVERY_KIND} seeds without further arguments");
        return Ok(());
    }
    sum.has_what_happens_often()
}

fn one(first: u64, seeds: u64, more: &[String]) -> Result<()> {
    show(&mut petal_sim(first, seeds, more))
}

fn petal_sim(first: u64, seeds: u64, more: &[String]) -> Command {
    let mut sim = Command::new(root().join("target/release/petal-sim"));
    sim.args(["--seeds", &seeds.to_string(), "--first-seed", &first.to_string()]).args(more);
    sim
}

/// Runs some seeds and returns what happened how often. Everything else that is said is shown.
fn batch(first: u64, seeds: u64, more: &[String]) -> Result<Counters> {
    let mut sim = petal_sim(first, seeds, more);
    let output = output_within(&mut sim, BATCH_LIMIT)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let is_told_in_the_sum = |line: &str| counter(line).is_some() || line.starts_with("never happened: ");
    text.lines().filter(|line| !is_told_in_the_sum(line)).for_each(|line| println!("{line}"));
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{} ended with {}", words(&sim), output.status);
    Ok(Counters(text.lines().filter_map(counter).map(|(count, kind)| (kind.to_string(), count)).collect()))
}

// ------------------------------------------------------------------------------------------------
// What happened how often.

/// Kinds, in the order in which petal-sim tells them, which may tell two of them by one name.
#[derive(Default)]
struct Counters(Vec<(String, u64)>);

/// A line that tells how often something happened: `       312  a connection was reset`.
fn counter(line: &str) -> Option<(u64, &str)> {
    let (count, kind) = line.trim_start().split_once("  ")?;
    // Right-aligned in ten columns.
    let is_aligned = line.len() - kind.len() >= 12 && !kind.starts_with(' ');
    Some((count.parse().ok().filter(|_| is_aligned)?, kind))
}

impl Counters {
    fn add(&mut self, other: &Counters) {
        if self.0.is_empty() {
            self.0.clone_from(&other.0);
            return;
        }
        for ((_, mine), (_, theirs)) in self.0.iter_mut().zip(&other.0) {
            *mine += theirs;
        }
    }

    fn has_what_happens_often(&self) -> Result<()> {
        for kind in OFTEN {
            let mut counts = self.0.iter().filter(|(name, _)| name == kind).map(|(_, count)| *count).peekable();
            ensure!(counts.peek().is_some(), "petal-sim does not count '{kind}' any more; `OFTEN` in sim.rs names it");
            ensure!(
                counts.sum::<u64>() > 0,
                "never happened, though it does in every fourth seed or more often: {kind}"
            );
        }
        Ok(())
    }
}

impl std::fmt::Display for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|(kind, count)| writeln!(f, "{count:>10}  {kind}"))
    }
}

/// Seconds since 1970: different each time, short enough to type.
fn fresh_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_petal_sim_counts_is_read_and_nothing_else() {
        assert_eq!(counter("         0  a disk hung"), Some((0, "a disk hung")));
        assert_eq!(counter("12345678901  a disk was slow"), Some((12_345_678_901, "a disk was slow")));
        for line in
            ["", "5 seeds, 9000 operations, 1 events in 0.4 s", "  options: Options { }", "  - at 3 s: 2  cells"]
        {
            assert_eq!(counter(line), None, "{line}");
        }
    }

    #[test]
    fn kinds_have_the_names_that_petal_sim_gives_them() {
        let counters = include_str!("../../crates/sim/src/counters.rs");
        OFTEN.iter().for_each(|kind| assert!(counters.contains(&format!("=> \"{kind}\",")), "{kind}"));
    }

    #[test]
    fn a_kind_that_never_happened_and_one_that_is_not_counted_are_named() {
        let all = |count: u64| Counters(OFTEN.iter().map(|kind| (kind.to_string(), count)).collect());
        let mut sum = all(0);
        assert!(sum.has_what_happens_often().unwrap_err().to_string().contains(OFTEN[0]));
        sum.add(&all(1));
        assert!(sum.has_what_happens_often().is_ok());
        // Told by another name, or not any more.
        sum.0.pop();
        assert!(sum.has_what_happens_often().unwrap_err().to_string().contains(OFTEN[OFTEN.len() - 1]));
    }
}
