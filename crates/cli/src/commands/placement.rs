//! `petal server list | drain | fill | remove`: which servers hold data, and how it gets from one to the other.
//!
//! These commands only say what is wanted; the ring's leader plans and moves (`petal::replan`, 2.8). So they may be ended at
//! any time, and `petal reconfigure status` (`reconfigure.rs`) shows how far it is.

use super::reconfigure;
use crate::connect::{self, Connection, refusal};
use crate::output;
use crate::place::Place;
use anyhow::{Context, Result, bail, ensure};
use petal::global_state::{Command, CommandError, ServerState, State};
use petal::ids::ServerId;
use petal::replan::{copies_to_move, replan};
use petal::translator::gmap::Gmap;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// How long a server may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// Of a server's room so many per cent are kept free.
const KEPT_FREE_PERCENT: u64 = 5;

/// What is asked of the placement.
#[derive(clap::Subcommand)]
pub enum Placement {
    /// The servers, and what each of them holds
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Move all data of a server to the others, while everything is used; one that is down is replaced by them
    Drain(Change),
    /// Let a server hold its share of the data: a new one, or one that was drained
    Fill(Change),
    /// One more server for a cluster that `petal up` made: starts it, and fills it
    Add(super::add::Arguments),
    /// Forget a server that is down and holds nothing: one that was drained and stopped, or was replaced. Its number is not given again
    Remove {
        /// The server
        #[arg(value_parser = output::parse_server)]
        server: ServerId,
    },
    /// How long a server may be down before the others make its copies anew: 90s, 10m (as in a new cluster), 2h or never
    ReplaceAfter {
        /// The time
        #[arg(value_parser = parse_time)]
        time: u32,
    },
}

/// Seconds; 0 for never.
fn parse_time(text: &str) -> Result<u32, String> {
    let wrong = || format!("'{text}' is no time; times are like 90s, 10m, 2h or never");
    if text == "never" {
        return Ok(0);
    }
    let (number, unit) = text.split_at(text.len() - text.chars().last().map_or(0, char::len_utf8));
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(wrong()),
    };
    let seconds = number.parse::<u32>().ok().and_then(|n| n.checked_mul(unit)).ok_or_else(wrong)?;
    if seconds == 0 { Err(wrong()) } else { Ok(seconds) }
}

/// A change of the placement.
#[derive(clap::Args)]
pub struct Change {
    /// The server
    #[arg(value_parser = output::parse_server)]
    server: ServerId,
    /// Only tell what would move
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Does it.
pub fn run(place: &Place, command: Placement) -> Result<()> {
    if let Placement::Add(arguments) = command {
        return super::add::run(place, arguments);
    }
    let place = place.clone();
    connect::block_on(async move {
        let connection = Connection::open(&place).await?;
        match command {
            Placement::List { json } => list(&connection, json).await,
            Placement::Drain(change) => apply(&connection, change, true).await,
            Placement::Fill(change) => apply(&connection, change, false).await,
            Placement::Add(_) => unreachable!("done above"),
            Placement::Remove { server } => remove(&place, &connection, server).await,
            Placement::ReplaceAfter { time: seconds } => {
                connection.execute(Command::ReplaceAfter { seconds }).await?;
                println!("{}", replaced_after(seconds));
                Ok(())
            }
        }
    })
}

/// What one server holds.
#[derive(Clone, Copy, Default)]
pub(super) struct Held {
    /// Copies of slots.
    pub copies: u64,
    /// Bytes of data, and for how many there is room; of a server that does not answer, none are known.
    pub bytes: u64,
    pub capacity: u64,
    /// One of its disks takes nothing more: what is free is kept for what must go on.
    pub is_full: bool,
}

/// A copy of a slot that these servers have has the mean size of their copies.
pub(super) fn copy_size(tuple: &[ServerId], held: &BTreeMap<ServerId, Held>) -> u64 {
    let known = tuple.iter().filter_map(|s| held.get(s)).filter(|h| h.capacity > 0 && h.copies > 0);
    let sizes: Vec<u64> = known.map(|h| h.bytes / h.copies).collect();
    sizes.iter().sum::<u64>() / sizes.len().max(1) as u64
}

pub(super) async fn held(connection: &Connection, state: &State) -> Result<BTreeMap<ServerId, Held>> {
    let connection = connection.to_all(state).await?;
    let mut all = BTreeMap::new();
    for server in state.servers.keys() {
        let copies = state.gmaps.values().flat_map(|g| &g.slots).filter(|tuple| tuple.contains(server)).count() as u64;
        let mut held = Held { copies, ..Held::default() };
        if let Ok(status) = connection.server_status(*server, ANSWER_LIMIT).await {
            held.bytes = status.disks.iter().map(|d| d.used).sum();
            held.capacity = status.disks.iter().map(|d| d.capacity).sum();
            held.is_full = status.disks.iter().any(|d| d.full);
        }
        all.insert(*server, held);
    }
    Ok(all)
}

fn word(server: &ServerState) -> &'static str {
    match server {
        _ if server.incarnation.0 == 0 => "never up",
        _ if server.down && server.away => "away, being replaced",
        _ if server.down => "down",
        _ if server.weight == 0 => "witness",
        _ if server.drained => "drained",
        _ => "holds data",
    }
}

async fn remove(place: &Place, connection: &Connection, server: ServerId) -> Result<()> {
    let removed = connection.execute(Command::RemoveServer { server }).await;
    // Of one that was removed before the folder may still tell, if that command was ended in the middle.
    let is_gone = removed.as_ref().is_err_and(|e| refusal(e) == Some(&CommandError::NoSuchServer(server)));
    let entry = place.folder().ok().and_then(|folder| Some((folder.read_if_there().ok()??, folder)));
    let entry = entry.filter(|(file, _)| file.servers.iter().any(|entry| entry.server() == server));
    if !is_gone || entry.is_none() {
        removed?;
    }
    println!("{server} is removed; its disks are of no use to the cluster any more.");
    // A cluster of `petal up` would start it again.
    if let Some((mut file, folder)) = entry {
        file.servers.retain(|entry| entry.server() != server);
        folder.write(&file)?;
        println!("What is in {} can be deleted.", folder.server(server).display());
    }
    Ok(())
}

fn replaced_after(seconds: u32) -> String {
    match seconds {
        0 => "A server that stays away is not replaced.".into(),
        _ => format!("A server that is down for {} is replaced by the others.", output::duration(u64::from(seconds))),
    }
}

async fn list(connection: &Connection, json: bool) -> Result<()> {
    let state = connection.state().await?;
    let held = held(connection, &state).await?;
    if json {
        let one = |(id, server): (&ServerId, &ServerState)| {
            let held = held[id];
            json!({
                "server": id.to_string(), "state": word(server), "drained": server.drained,
                "copies": held.copies, "bytes": held.bytes, "capacity": held.capacity,
            })
        };
        let servers: Vec<Value> = state.servers.iter().map(one).collect();
        return output::print_json(
            &json!({ "servers": servers, "replace_after_s": state.replace_after, "reconfiguration": reconfigure::json(&state) }),
        );
    }
    let mut table = output::table(&["server", "state", "slots", "data", "room"]);
    output::right(&mut table, &[2, 3, 4]);
    for (id, server) in &state.servers {
        let Held { copies, bytes, capacity, .. } = held[id];
        let row = [copies.to_string(), output::size(bytes), output::size(capacity)];
        table.add_row([id.to_string(), word(server).to_string()].into_iter().chain(row));
    }
    output::print_table(&table);
    println!("{}", replaced_after(state.replace_after));
    reconfigure::sentences(&state).iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// What a change would move.
pub(super) struct Plan {
    before: BTreeMap<ServerId, Held>,
    after: BTreeMap<ServerId, Held>,
    copies: u64,
    bytes: u64,
}

impl Plan {
    fn of(state: &State, before: BTreeMap<ServerId, Held>, server: ServerId, drained: bool) -> Result<Plan> {
        let mut then = state.clone();
        then.servers.get_mut(&server).context("no such server")?.drained = drained;
        Plan::between(state, &then, before)
    }

    /// What the ring's leader will plan when other servers hold data than now, if nothing else changes until then.
    pub fn between(state: &State, then: &State, before: BTreeMap<ServerId, Held>) -> Result<Plan> {
        let candidates = then.candidates();
        let mut plan = Plan { after: before.clone(), before, copies: 0, bytes: 0 };
        for (id, from) in &state.gmaps {
            let to = replan(*id, from, &candidates)?;
            plan.copies += copies_to_move(from, &to) as u64;
            for (old, new) in from.slots.iter().zip(&to.slots) {
                plan.slot(old, new, copy_size(old, &plan.before));
            }
        }
        for held in plan.after.values_mut().filter(|held| held.copies == 0) {
            held.bytes = 0;
        }
        Ok(plan)
    }

    /// Other copies of one family, of which every slot has so many bytes.
    pub(super) fn of_copies(before: BTreeMap<ServerId, Held>, from: &Gmap, to: &Gmap, size: u64) -> Plan {
        let copies = copies_to_move(from, to) as u64;
        let mut plan = Plan { after: before.clone(), before, copies, bytes: 0 };
        for (old, new) in from.slots.iter().zip(&to.slots) {
            plan.slot(old, new, size);
        }
        plan
    }

    /// A slot gets another tuple, and each copy of it has so many bytes.
    fn slot(&mut self, old: &[ServerId], new: &[ServerId], size: u64) {
        for server in old.iter().filter(|s| !new.contains(s)) {
            let held = self.after.entry(*server).or_default();
            (held.copies, held.bytes) = (held.copies.saturating_sub(1), held.bytes.saturating_sub(size));
        }
        for server in new.iter().filter(|s| !old.contains(s)) {
            let held = self.after.entry(*server).or_default();
            (held.copies, held.bytes) = (held.copies + 1, held.bytes + size);
            self.bytes += size;
        }
    }

    fn stored(&self) -> u64 {
        self.before.values().map(|h| h.bytes).sum()
    }

    /// Refuses what cannot be held.
    pub fn check_room(&self) -> Result<()> {
        for (server, held) in &self.after {
            let grows = held.copies > self.before.get(server).map_or(0, |h| h.copies);
            let room = held.capacity / 100 * (100 - KEPT_FREE_PERCENT);
            ensure!(
                !grows || held.bytes <= room,
                "there is not enough room: {server} would hold {}, and has room for {}, so {} are missing; add a server or a \
                 larger disk, or delete something",
                output::size(held.bytes),
                output::size(room),
                output::size(held.bytes - room)
            );
        }
        Ok(())
    }

    /// How much fuller the fullest server is than the mean of those that hold data: 1.0 is even.
    fn balance(held: &BTreeMap<ServerId, Held>) -> Option<f64> {
        let holders: Vec<&Held> = held.values().filter(|h| h.copies > 0 && h.capacity > 0).collect();
        let (bytes, room) = holders.iter().fold((0, 0), |(b, r), h| (b + h.bytes, r + h.capacity));
        let mean = bytes as f64 / room as f64;
        let fullest = holders.iter().map(|h| h.bytes as f64 / h.capacity as f64).fold(0.0, f64::max);
        (bytes > 0).then(|| (fullest / mean * 1000.0).round() / 1000.0)
    }

    /// Bytes that are to move.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn json(&self) -> Value {
        let of = |held: &Held| json!({ "slots": held.copies, "bytes": held.bytes });
        let one = |(server, before): (&ServerId, &Held)| json!({ "server": server.to_string(), "before": of(before), "after": of(&self.after[server]) });
        let servers: Vec<Value> = self.before.iter().map(one).collect();
        json!({
            "bytes_stored": self.stored(),
            "bytes_to_move": self.bytes,
            "slots_to_move": self.copies,
            "balance": { "before": Plan::balance(&self.before), "after": Plan::balance(&self.after) },
            "servers": servers,
        })
    }

    pub fn print(&self) {
        println!(
            "About {} of {} are to move, in {} slots:",
            output::size(self.bytes),
            output::size(self.stored()),
            self.copies
        );
        let mut table = output::table(&["server", "slots", "then", "data", "then"]);
        output::right(&mut table, &[1, 2, 3, 4]);
        for (server, before) in &self.before {
            let after = &self.after[server];
            let slots = [before.copies.to_string(), after.copies.to_string()];
            let sizes = [output::size(before.bytes), output::size(after.bytes)];
            table.add_row(std::iter::once(server.to_string()).chain(slots).chain(sizes));
        }
        output::print_table(&table);
    }
}

async fn apply(connection: &Connection, change: Change, drained: bool) -> Result<()> {
    let Change { server, dry_run, json } = change;
    let state = connection.state().await?;
    let Some(known) = state.servers.get(&server) else {
        bail!("there is no server {server}; `petal status` shows the servers");
    };
    ensure!(known.incarnation.0 > 0, "{server} has never been up; start it first");
    let plan = Plan::of(&state, held(connection, &state).await?, server, drained)?;
    plan.check_room()?;
    if json {
        output::print_json(&plan.json())?;
    } else {
        plan.print();
    }
    if dry_run {
        return Ok(());
    }
    connection.execute(Command::Drain { server, drained }).await?;
    if !json {
        println!(
            "It begins now and goes on by itself; `petal reconfigure` shows how far it is, pauses it and turns it back."
        );
    }
    Ok(())
}
