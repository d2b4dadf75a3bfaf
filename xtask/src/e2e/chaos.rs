//! Servers are killed, stopped and cut off from each other at random while clients record what they see; the
//! simulator's checker judges the record. Each server and the clients have a machine of their own, as in
//! `partitions.rs`.

use super::partitions::{Lab, SERVERS, end_of, have_begun};
use crate::cluster::Cluster;
use crate::run::{self, cargo, read};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::time::{Duration, Instant};

/// Seconds of chaos, unless `PETAL_CHAOS_SECONDS` says otherwise.
const SECONDS: u64 = 25;
/// A run of so many seconds has every kind of fault, or it does not do what it says.
const SECONDS_OF_EVERY_KIND: u64 = 60;
/// How long a fault lasts, in milliseconds: from less than a lease to several.
const FAULT_MIN: u64 = 500;
const FAULT_MAX: u64 = 5000;
/// How long everything is whole before the next fault, at most, in milliseconds. What was missed need not be copied
/// by then.
const WHOLE_MAX: u64 = 3000;

/// What happens to the servers. The clients reach every server that runs.
#[derive(Clone, Copy)]
enum Fault {
    /// kill -9, and started again later.
    Kill,
    /// SIGSTOP, and SIGCONT later.
    Stop,
    /// One server is cut off from all others, either way.
    CutOff,
    /// A link between two servers is cut.
    Link,
    /// What one server sends to another one is lost; what that one sends arrives.
    OneWay,
}

impl Fault {
    const ALL: [Fault; 5] = [Fault::Kill, Fault::Stop, Fault::CutOff, Fault::Link, Fault::OneWay];

    fn name(self) -> &'static str {
        match self {
            Fault::Kill => "server killed",
            Fault::Stop => "server stopped",
            Fault::CutOff => "server cut off from all others",
            Fault::Link => "link cut",
            Fault::OneWay => "link cut in one direction",
        }
    }

    /// The same with the servers' names.
    fn of(self, victim: &str, other: &str) -> String {
        match self {
            Fault::Kill | Fault::Stop | Fault::CutOff => format!("{}: {victim}", self.name()),
            Fault::Link | Fault::OneWay => format!("{}: {victim} to {other}", self.name()),
        }
    }
}

/// Four clients on the same blocks; one fault at a time, of every kind in turn, in an order that is drawn.
pub fn history_is_linearizable(cluster: &Cluster) -> Result<()> {
    let seconds = number("PETAL_CHAOS_SECONDS", SECONDS)?;
    let seed = number("PETAL_E2E_SEED", u64::from(std::process::id()))?;
    let mut lab = Lab::start(cluster)?;
    let record = cluster.folder().join("history.jsonl");
    println!("chaos of {seconds} s, drawn from {seed} (PETAL_CHAOS_SECONDS, PETAL_E2E_SEED)");
    let mut clients = lab.clients(&record, seconds)?;
    let mut nemesis = Nemesis { lab: &mut lab, dice: Dice(seed), counts: [0; Fault::ALL.len()] };
    let done = have_begun(&record).and_then(|()| nemesis.rage(Duration::from_secs(seconds.saturating_sub(4))));
    let counts = nemesis.counts;
    if done.is_err() {
        clients.kill()?;
        clients.wait()?;
    }
    done?;
    println!("{}", in_words(&counts));
    end_of(&mut clients, seconds)?;
    println!("{}", judge(&record)?);
    Cluster::wait_for("everything is redundant again", Duration::from_secs(60), || {
        lab.status().is_ok_and(|s| s["redundancy"]["full"] == true)
    })?;
    lab.ask(&["verify"])?;
    lab.all_run()?;
    let each = counts.iter().all(|count| *count > 0);
    ensure!(each || seconds < SECONDS_OF_EVERY_KIND, "a kind of fault never happened: {}", in_words(&counts));
    Ok(())
}

/// How often each kind happened.
fn in_words(counts: &[u32; Fault::ALL.len()]) -> String {
    let each = Fault::ALL.iter().zip(counts).map(|(fault, count)| format!("{}: {count}", fault.name()));
    each.collect::<Vec<_>>().join(", ")
}

/// Who does it all.
struct Nemesis<'a, 'b> {
    lab: &'a mut Lab<'b>,
    dice: Dice,
    counts: [u32; Fault::ALL.len()],
}

impl Nemesis<'_, '_> {
    /// One fault after the other; at the end everything is healed.
    fn rage(&mut self, time: Duration) -> Result<()> {
        let start = Instant::now();
        // Dealt as cards are: independent draws would leave a kind out of a minute too often.
        let mut cards = Vec::new();
        while start.elapsed() < time {
            if cards.is_empty() {
                cards = self.dice.shuffled((0..Fault::ALL.len()).collect());
            }
            let card = cards.pop().expect("they were just dealt");
            let servers = self.dice.shuffled(SERVERS.to_vec());
            let (victim, other) = (servers[0], servers[1]);
            let lasts = Duration::from_millis(FAULT_MIN + self.dice.below(FAULT_MAX - FAULT_MIN));
            let (fault, at) = (Fault::ALL[card], start.elapsed().as_secs_f32());
            println!("{at:5.1} s: {}, for {lasts:?}", fault.of(victim, other));
            self.happen(fault, victim, other, lasts)?;
            self.counts[card] += 1;
            self.lab.all_run()?;
            std::thread::sleep(Duration::from_millis(self.dice.below(WHOLE_MAX)));
        }
        Ok(())
    }

    fn happen(&mut self, fault: Fault, victim: &'static str, other: &str, lasts: Duration) -> Result<()> {
        match fault {
            Fault::Kill => {
                self.lab.kill_server(victim)?;
                std::thread::sleep(lasts);
                self.lab.run_server(victim)?;
                return self.is_up(victim);
            }
            Fault::Stop => {
                let signal = |name: &str| read(run::command("kill").args([name, &self.lab.pid_of(victim).to_string()]));
                signal("-STOP")?;
                std::thread::sleep(lasts);
                return signal("-CONT").map(|_| ());
            }
            Fault::CutOff => {
                let others: Vec<&str> = SERVERS.into_iter().filter(|server| *server != victim).collect();
                self.lab.network.cut_off(victim, &others)?;
            }
            Fault::Link => self.lab.network.cut_off(victim, &[other])?,
            Fault::OneWay => self.lab.network.cut(victim, other)?,
        }
        std::thread::sleep(lasts);
        self.lab.network.heal()
    }

    /// A server that is not up yet would be a second one that is away.
    fn is_up(&mut self, server: &str) -> Result<()> {
        Cluster::wait_for("the killed server is up again", Duration::from_secs(20), || {
            let status = self.lab.status().unwrap_or_default();
            status["servers"].as_array().into_iter().flatten().any(|s| s["id"] == server && s["state"] == "up")
        })
    }
}

/// A number that the environment may give.
pub(super) fn number(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} is not a number")),
        Err(_) => Ok(default),
    }
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
    /// The same in another order.
    fn shuffled<T>(&mut self, mut items: Vec<T>) -> Vec<T> {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at as u64 + 1) as usize);
        }
        items
    }
}
