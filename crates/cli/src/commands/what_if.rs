//! `petal what-if`: what the loss of servers would cost, before they are stopped or fail (paper 2.13).

use crate::connect::{self, Connection};
use crate::output;
use crate::place::Place;
use crate::redundancy::{Counts, Redundancy};
use anyhow::{Result, bail, ensure};
use petal::global_state::State;
use petal::ids::ServerId;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;

/// `petal what-if`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal what-if --down s3          may s3 be stopped now?
  petal what-if --down s1,s2       and if two fail together?

It exits with 0 if everything would still be served and the ring could still decide, with 1 if not.
Servers that are down now stay down in the answer. It asks the cluster's state as one server knows it.")]
pub struct Arguments {
    /// These servers are down
    #[arg(long, required = true, value_delimiter = ',', value_parser = output::parse_server, value_name = "SERVER")]
    down: Vec<ServerId>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Answers it.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let loss = Loss::ask(place, &arguments.down)?;
    if arguments.json {
        output::print_json(&loss.json())?
    } else {
        loss.print()
    }
    if !loss.is_harmless() {
        bail!("{}", loss.complaint());
    }
    Ok(())
}

/// What would be when some servers went down.
pub struct Loss {
    down: Vec<String>,
    now: Redundancy,
    then: Redundancy,
    /// Ring members that would be up, and all.
    ring: (usize, usize),
    ring_decides_now: bool,
    disks: Vec<(String, Counts)>,
}

impl Loss {
    /// Asks the cluster; blocks.
    pub fn ask(place: &Place, down: &[ServerId]) -> Result<Loss> {
        let place = place.clone();
        let (state, away) = connect::block_on(async move {
            let connection = Connection::open(&place).await?;
            let state = connection.state().await?;
            let away = connection.to_all(&state).await?.away(&state, Duration::from_millis(1500)).await;
            Ok((state, away))
        })?;
        let down: BTreeSet<ServerId> = down.iter().copied().collect();
        for server in &down {
            ensure!(
                state.servers.contains_key(server),
                "there is no server {server}; `petal status` shows the servers"
            );
        }
        // Who does not answer is down already, declared or not.
        Ok(Loss::of(&state, &down, &away))
    }

    fn of(state: &State, down: &BTreeSet<ServerId>, away: &BTreeSet<ServerId>) -> Loss {
        let all = down | away;
        let then = Redundancy::of(state, &all);
        let is_up = |server: &ServerId| !all.contains(server) && state.servers.get(server).is_some_and(|s| !s.down);
        let members = &state.ring.members;
        let up_now = members.iter().filter(|m| !away.contains(&m.server) && !state.servers[&m.server].down).count();
        Loss {
            ring_decides_now: up_now > members.len() / 2,
            down: down.iter().map(ToString::to_string).collect(),
            now: Redundancy::of(state, away),
            ring: (members.iter().filter(|m| is_up(&m.server)).count(), members.len()),
            // Snapshots lie where their disk does.
            disks: state
                .vdisks
                .values()
                .filter(|d| !d.is_snapshot())
                .map(|d| (d.name.clone(), then.of_disk(state, d)))
                .collect(),
            then,
        }
    }

    fn ring_decides(&self) -> bool {
        self.ring.0 > self.ring.1 / 2
    }

    /// It makes something unavailable that is served now, or takes the ring its majority.
    pub fn is_worse_than_now(&self) -> bool {
        self.then.unavailable() > self.now.unavailable() || !self.ring_decides() && self.ring_decides_now
    }

    fn is_harmless(&self) -> bool {
        self.then.unavailable() == 0 && self.ring_decides()
    }

    /// What would be lost meanwhile, as a sentence.
    pub fn complaint(&self) -> String {
        let down = self.down.join(", ");
        match (self.then.unavailable(), self.ring_decides()) {
            (0, _) => format!("without {down} the ring could decide nothing, and leases would end"),
            (_, true) => format!("without {down} a part of the data would be unavailable"),
            (_, false) => {
                format!("without {down} a part of the data would be unavailable, and the ring without a majority")
            }
        }
    }

    fn print(&self) {
        let (up, all) = self.ring;
        println!("If {} went down:", self.down.join(" and "));
        println!(
            "  Ring: {up} of {all} members up, {}.",
            if self.ring_decides() {
                "a majority"
            } else {
                "NO MAJORITY: after a second nothing could be read or written"
            }
        );
        for (copies, counts) in &self.then.schemes {
            let before = self.now.schemes.get(copies).copied().unwrap_or_default();
            println!(
                "  {copies} copies: of {} slots {} would have fewer in sync (now {}), {} would be unavailable (now {}).",
                counts.slots, counts.degraded, before.degraded, counts.unavailable, before.unavailable
            );
        }
        for (name, counts) in &self.disks {
            let what = match counts {
                Counts { unavailable: 0, degraded: 0, .. } => "as before".into(),
                Counts { unavailable: 0, degraded, slots } if degraded == slots => "all of it with fewer copies".into(),
                Counts { unavailable: 0, degraded, slots } => format!("{} with fewer copies", share(*degraded, *slots)),
                Counts { unavailable, slots, .. } => format!("{} UNAVAILABLE", share(*unavailable, *slots)),
            };
            println!("  disk {name}: {what}.");
        }
    }

    fn json(&self) -> Value {
        let disk = |(name, c): &(String, Counts)| json!({"name": name, "slots": c.slots, "degraded": c.degraded, "unavailable": c.unavailable});
        json!({
            "down": self.down,
            "harmless": self.is_harmless(),
            "ring": {"up": self.ring.0, "members": self.ring.1, "majority": self.ring_decides()},
            "now": self.now.json(),
            "then": self.then.json(),
            "disks": self.disks.iter().map(disk).collect::<Vec<_>>(),
        })
    }
}

fn share(part: u64, of: u64) -> String {
    format!("{} %", (part * 100).div_ceil(of.max(1)))
}
