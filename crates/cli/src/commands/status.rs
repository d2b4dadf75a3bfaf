//! `petal status`: the whole cluster on one screen.

use super::{disk, flatten, reconfigure, scrub};
use crate::cluster_folder::ClusterFolder;
use crate::connect::{self, Connection};
use crate::output;
use crate::place::Place;
use crate::processes::ProcessFile;
use crate::redundancy::{self, Missing, Redundancy};
use crate::supervisor;
use anyhow::Result;
use petal::global_state::State;
use petal::ids::{ServerId, StateIndex};
use petal::message::{DiskStatus, LogLine, ScrubOrder, ScrubStatus, ServerStatus};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long one server may take to tell of itself.
const ANSWER_LIMIT: Duration = Duration::from_millis(1500);

/// `petal status`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal status
  petal status --json | jq '.servers[] | select(.state != \"up\")'

States of a server: up, starting (it runs and does not serve all of its slots yet), suspected (the ring has
not heard it and grants it no lease), down (the ring declared it down, and others act in its place; or its
process does not run, only known for a cluster of `petal up`), unreachable (it does not answer).
A server without a lease serves nothing until a majority of the ring hears it again.
A server is called slow if its disks take much longer than those of the others at present; clients then read from
other copies by themselves.")]
pub struct Arguments {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Shows it.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let folder = match place {
        Place::Folder(_) => Some(place.folder()?),
        Place::Addresses(_) => None,
    };
    let place = place.clone();
    let report = connect::block_on(async move { report(&place, folder.as_ref()).await })?;
    if arguments.json { output::print_json(&report.json()) } else { report.print() }
}

/// Everything that is known.
struct Report {
    state: State,
    servers: Vec<ServerReport>,
    redundancy: Redundancy,
    ages: Ages,
    nbd: Value,
}

/// How long ago commands were applied, in seconds, as far as the servers' logs reach. The cluster has no clock: each
/// server tells since when it knows a command, and the one that was there told the longest.
#[derive(Debug, Default)]
struct Ages(BTreeMap<StateIndex, u64>);

struct ServerReport {
    id: ServerId,
    addresses: Vec<String>,
    pid: Option<u32>,
    state: &'static str,
    /// State index of the command that suspects it, which its being down relies on.
    suspected_since: Option<u64>,
    down: bool,
    /// Why it went down, if by itself for a disk.
    why_down: Option<String>,
    ring: bool,
    witness: bool,
    leads: bool,
    status: Option<ServerStatus>,
    scrub: Option<ScrubStatus>,
}

async fn report(place: &Place, folder: Option<&ClusterFolder>) -> Result<Report> {
    let connection = Connection::open(place).await?;
    let state = connection.state().await?;
    let connection = connection.to_all(&state).await?;
    let pids: BTreeMap<ServerId, u32> = match folder {
        Some(folder) => {
            let servers = state.servers.keys();
            servers.filter_map(|id| Some((*id, supervisor::process(folder, *id)?.pid))).collect()
        }
        None => BTreeMap::new(),
    };
    // All at one time: a server that is away must not add its wait to the others'.
    let mut asked = tokio::task::JoinSet::new();
    for (id, known) in &state.servers {
        let id = *id;
        let local_and_down = folder.is_some() && !pids.contains_key(&id) && !somebody_listens(&known.addresses);
        let connection = connection.clone();
        asked.spawn_local(async move {
            let status = if local_and_down { None } else { connection.server_status(id, ANSWER_LIMIT).await.ok() };
            let scrub = match &status {
                Some(_) => connection.scrub(id, ScrubOrder::Tell, ANSWER_LIMIT).await.ok(),
                None => None,
            };
            (id, status.map(|status| (status, scrub)))
        });
    }
    let mut statuses: BTreeMap<ServerId, Option<(ServerStatus, Option<ScrubStatus>)>> = BTreeMap::new();
    while let Some(answer) = asked.join_next().await {
        statuses.extend(answer);
    }
    let away: BTreeSet<ServerId> = statuses.iter().filter(|(_, s)| s.is_none()).map(|(id, _)| *id).collect();
    let redundancy = Redundancy::of(&state, &away);
    let is_somebody_missed = state.servers.values().any(|s| s.down || s.suspect.is_some());
    let logs = match !redundancy.is_full() || is_somebody_missed {
        true => logs(&connection, statuses.keys().copied().filter(|id| !away.contains(id))).await,
        false => Vec::new(),
    };
    let log = logs.iter().max_by_key(|log| log.last().map(|line| line.index)).map_or(&[][..], Vec::as_slice);
    let leader = statuses.values().flatten().map(|(s, _)| s).max_by_key(|s| s.state_index).and_then(|s| s.ring_leader);
    let server = |(id, known): (&ServerId, &petal::global_state::ServerState)| {
        let (status, scrub) = statuses.get_mut(id).and_then(Option::take).unzip();
        let pid = pids.get(id).copied();
        ServerReport {
            id: *id,
            addresses: known.addresses.clone(),
            pid,
            state: state_word(folder.is_some(), pid, status.as_ref(), known),
            suspected_since: known.suspect,
            down: known.down,
            why_down: if known.down { why_down(log, *id) } else { None },
            ring: state.ring.members.iter().any(|m| m.server == *id),
            witness: known.incarnation.0 > 0 && known.weight == 0,
            leads: leader == Some(*id),
            status,
            scrub: scrub.flatten(),
        }
    };
    let servers: Vec<ServerReport> = state.servers.iter().map(server).collect();
    let redundancy = redundancy.with_progress(servers.iter().filter_map(|s| s.status.as_ref()));
    Ok(Report { redundancy, servers, ages: Ages::of(&logs), nbd: nbd(folder), state })
}

/// True if one of the addresses of a server of this machine takes connections: a process that this folder knows nothing
/// of may serve for it.
fn somebody_listens(addresses: &[String]) -> bool {
    addresses.iter().any(|address| match address.strip_prefix("unix:") {
        Some(path) => std::os::unix::net::UnixStream::connect(path).is_ok(),
        // Of this machine, so that no answer takes no time.
        None => address.parse().is_ok_and(|at: std::net::SocketAddr| {
            at.ip().is_loopback() && std::net::TcpStream::connect_timeout(&at, ANSWER_LIMIT).is_ok()
        }),
    })
}

/// What those servers have applied lately.
pub(super) async fn logs(connection: &Connection, servers: impl Iterator<Item = ServerId>) -> Vec<Vec<LogLine>> {
    let mut asked = tokio::task::JoinSet::new();
    for id in servers {
        let connection = connection.clone();
        asked.spawn_local(async move { connection.log_within(Some(id), ANSWER_LIMIT).await });
    }
    let mut logs = Vec::new();
    while let Some(answer) = asked.join_next().await {
        logs.extend(answer.ok().and_then(Result::ok));
    }
    logs
}

impl Ages {
    fn of(logs: &[Vec<LogLine>]) -> Ages {
        let mut ages = BTreeMap::new();
        for (index, millis) in logs.iter().flatten().filter_map(|line| Some((line.index, line.age_millis?))) {
            let age = ages.entry(index).or_default();
            *age = millis.max(*age);
        }
        Ages(ages.into_iter().map(|(index, millis)| (index, millis / 1000)).collect())
    }

    /// "for 3 min 2 s (state index 17)", or only since which index.
    fn since(&self, index: StateIndex) -> String {
        match self.0.get(&index) {
            Some(age) => format!("for {} (state index {index})", output::duration(*age)),
            None => format!("since state index {index}"),
        }
    }

    /// How a server gets on that is being brought back, and how long it will take if it goes on like this.
    fn progress(&self, missing: &Missing) -> String {
        let Missing { slots, begun, back, .. } = *missing;
        let left = match self.0.get(&begun) {
            Some(age) if back > 0 => format!(", about {} left", output::duration((age * slots).div_ceil(back))),
            _ => String::new(),
        };
        format!("{back} of {} back{left}", redundancy::slots(back + slots))
    }
}

/// What a server that is down said of its disk when it went, if the log reaches back so far.
fn why_down(log: &[LogLine], server: ServerId) -> Option<String> {
    let of_server = format!("{server} ");
    let last = log.iter().rev().filter_map(|line| line.text.strip_prefix(&of_server));
    let gone = last.take_while(|text| !text.starts_with("is up")).find_map(|text| text.strip_prefix(BY_ITSELF));
    gone.map(String::from)
}

/// How `Command::DiskFailed` is told in the log, behind the server's name.
const BY_ITSELF: &str = "goes down by itself: ";

fn state_word(
    local: bool,
    pid: Option<u32>,
    status: Option<&ServerStatus>,
    known: &petal::global_state::ServerState,
) -> &'static str {
    match status {
        None if local && pid.is_none() => "down",
        _ if known.down => "down",
        _ if known.suspect.is_some() => "suspected",
        Some(status) if status.slots_acting.0 == status.slots_acting.1 => "up",
        Some(_) => "starting",
        None => "unreachable",
    }
}

/// What the supervisor tells of its NBD server.
fn nbd(folder: Option<&ClusterFolder>) -> Value {
    let Some(process) = folder.and_then(|f| ProcessFile::alive_at(&f.supervisor())) else { return Value::Null };
    json!({
        "socket": process.text("nbd_socket"),
        "tcp": process.text("nbd_tcp"),
        "pid": process.pid,
        "state": if process.ready { "up" } else { "starting" },
    })
}

impl Report {
    fn json(&self) -> Value {
        let State { cluster, name, index, .. } = &self.state;
        let disks = disk::describe_all(&self.state);
        json!({
            "cluster": cluster.to_string(),
            "name": name,
            "state_index": index,
            "servers": self.servers.iter().map(ServerReport::json).collect::<Vec<_>>(),
            "slow": slow_servers(&self.servers).iter().map(SlowServer::json).collect::<Vec<_>>(),
            "majority": self.has_majority(),
            "leases": self.leases(),
            "redundancy": self.redundancy.json(),
            "reconfiguration": reconfigure::json(&self.state),
            "disks": disks,
            "nbd": self.nbd,
        })
    }

    /// A majority of the ring answers: without one there are no leases.
    fn has_majority(&self) -> bool {
        let members = || self.servers.iter().filter(|s| s.ring);
        members().filter(|s| s.status.is_some()).count() > members().count() / 2
    }

    /// Servers that may serve.
    fn leases(&self) -> usize {
        self.servers.iter().filter(|s| s.status.as_ref().is_some_and(|status| status.lease)).count()
    }

    fn full_disks(&self) -> impl Iterator<Item = (ServerId, &DiskStatus)> {
        let all =
            self.servers.iter().flat_map(|s| s.status.iter().flat_map(move |st| st.disks.iter().map(|d| (s.id, d))));
        all.filter(|(_, disk)| disk.full)
    }

    /// Why the copies of a server are missing.
    fn why(&self, server: ServerId, missing: &Missing) -> String {
        let server = self.servers.iter().find(|s| s.id == server);
        match server.map(|s| (s.state, s.down)) {
            Some((_, true)) if missing.since > 0 => format!("it has been down {}", self.ages.since(missing.since)),
            Some((_, true)) => "it is down".into(),
            Some((state, false)) if missing.away => format!("it is {state}, and not declared down yet"),
            _ if missing.since > 0 => {
                let (since, progress) = (self.ages.since(missing.since), self.ages.progress(missing));
                format!("it has been out {since} and is catching up: {progress}")
            }
            _ => format!("it is catching up: {}", self.ages.progress(missing)),
        }
    }

    fn print(&self) -> Result<()> {
        let up = self.servers.iter().filter(|s| s.state == "up").count();
        let State { name, index, .. } = &self.state;
        println!("Cluster {name}: {up} of {} servers are up, state index {index}.", self.servers.len());
        for server in self.servers.iter().filter(|s| s.state != "up") {
            println!("  {}", server.sentence(&self.ages));
        }
        if !self.has_majority() {
            let members = self.servers.iter().filter(|s| s.ring);
            let away: Vec<String> = members.filter(|s| s.status.is_none()).map(|s| s.id.to_string()).collect();
            println!(
                "  THE RING HAS NO MAJORITY: nothing can be read, written or changed until it has; start {}.",
                away.join(" or ")
            );
        }
        if self.has_majority() && self.leases() == 0 {
            println!(
                "  NO SERVER HAS A LEASE: nothing can be read, written or changed. Too few members of the ring take part in \
                 it; see the logs of those that answer, and start the others."
            );
        }
        slow_servers(&self.servers).iter().for_each(|slow| println!("  {}", slow.sentence()));
        for (server, disk) in self.full_disks() {
            println!(
                "  {server} is full ({}, {} of {}): what needs room there is refused; discard or delete something, or \
                 add a server.",
                disk.path,
                output::size(disk.used),
                output::size(disk.capacity)
            );
        }
        let is_served = self.has_majority() && self.leases() > 0;
        let sentences = self.redundancy.sentences(|server, missing| self.why(server, missing));
        let true_ones = sentences.iter().filter(|l| is_served || *l != redundancy::NOTHING_UNAVAILABLE);
        true_ones.for_each(|l| println!("{l}"));
        reconfigure::sentences(&self.state).iter().for_each(|l| println!("{l}"));
        flatten::sentences(&self.state).iter().for_each(|l| println!("{l}"));
        let scrubs = self.servers.iter().filter_map(|s| Some((s.id, s.scrub.as_ref()?)));
        scrub::sentences(scrubs, output::unix_seconds()).iter().for_each(|l| println!("{l}"));
        println!();
        let mut table = output::table(&["server", "state", "lease", "pid", "ring", "used", "of", "slots", "address"]);
        for server in &self.servers {
            let (used, capacity) = server.space();
            let acting = server.status.as_ref().map_or("-".into(), |s| s.slots_acting.0.to_string());
            table.add_row([
                server.id.to_string(),
                server.state.into(),
                server.status.as_ref().map_or("-", |s| if s.lease { "held" } else { "none" }).into(),
                server.pid.map_or("-".into(), |p| p.to_string()),
                server.part_in_ring().into(),
                output::size(used),
                output::size(capacity),
                acting,
                server.addresses.last().cloned().unwrap_or_default(),
            ]);
        }
        output::right(&mut table, &[3, 5, 6, 7]);
        output::print_table(&table);
        for server in &self.servers {
            let disks = server.status.iter().flat_map(|s| &s.disks);
            for (path, error) in disks.filter_map(|d| Some((&d.path, d.error.as_ref()?))) {
                println!("  {}: disk {path} does not work: {error}", server.id);
            }
        }
        println!();
        disk::print_disks(&self.state);
        let places: Vec<&str> = ["socket", "tcp"].iter().filter_map(|key| self.nbd[key].as_str()).collect();
        if !places.is_empty() {
            println!("\nNBD on {}.", places.join(" and "));
        }
        Ok(())
    }
}

impl ServerReport {
    /// What it means that it is not up.
    fn part_in_ring(&self) -> &'static str {
        match (self.leads, self.ring, self.witness) {
            (true, _, false) => "leads",
            (true, _, true) => "leads, witness",
            (_, true, false) => "member",
            (_, true, true) => "witness",
            _ => "learns",
        }
    }

    fn sentence(&self, ages: &Ages) -> String {
        let id = self.id;
        match (self.state, self.suspected_since) {
            ("down", _) if self.down => {
                let why = self.why_down.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
                format!("{id} is down{why}: others act in its place where they have the data.")
            }
            ("suspected", Some(since)) => {
                let since = ages.since(since);
                format!("{id} has been suspected {since}: it is about to be declared down, or to be heard again.")
            }
            ("starting", _) => format!("{id} is starting: it has not settled all of its slots yet."),
            (state, _) => format!("{id} is {state}: I/O that needs it waits until it is back or declared down."),
        }
    }

    /// Bytes in use and bytes for data, over all disks.
    fn space(&self) -> (u64, u64) {
        let disks = self.status.iter().flat_map(|s| &s.disks);
        disks.fold((0, 0), |(used, capacity), d| (used + d.used, capacity + d.capacity))
    }

    fn json(&self) -> Value {
        let status = self.status.as_ref();
        let disk = |d: &petal::message::DiskStatus| {
            json!({
                "id": d.disk.to_string(), "path": d.path, "capacity": d.capacity, "used": d.used,
                "elements": d.elements, "full": d.full, "error": d.error,
            })
        };
        let counters = |s: &ServerStatus| -> serde_json::Map<String, Value> {
            s.counters.iter().map(|(name, value)| (name.clone(), (*value).into())).collect()
        };
        json!({
            "id": self.id.to_string(),
            "address": self.addresses.first(),
            "addresses": self.addresses,
            "pid": self.pid,
            "state": self.state,
            "down": self.down,
            "why_down": self.why_down,
            "suspected_since": self.suspected_since,
            "lease": status.map(|s| s.lease),
            "ring": self.ring,
            "witness": self.witness,
            "leads": self.leads,
            "incarnation": status.map(|s| s.incarnation.0),
            "state_index": status.map(|s| s.state_index),
            "connected": status.map(|s| s.connected.iter().map(ToString::to_string).collect::<Vec<_>>()),
            "slots_acting": status.map(|s| s.slots_acting.0),
            "slots_served": status.map(|s| s.slots_acting.1),
            "disks": status.map(|s| s.disks.iter().map(disk).collect::<Vec<_>>()),
            "counters": status.map(counters),
            "scrub": self.scrub.as_ref().map(scrub::json),
        })
    }
}

/// Disks are slow if they take this many times as long as the others' ...
const SLOW_TIMES: u64 = 4;
/// ... and so many microseconds more: what a busy disk may take longer than an idle one.
const SLOW_MICROS: u64 = 20_000;

/// A server whose disks are much slower than those of the others at present.
#[derive(Debug, PartialEq, Eq)]
struct SlowServer {
    id: ServerId,
    what: &'static str,
    /// What 95 of 100 commands took, in microseconds: its own, and the others' in the middle.
    took: u64,
    others: u64,
}

impl SlowServer {
    fn sentence(&self) -> String {
        let millis = |micros: u64| micros as f64 / 1000.0;
        format!(
            "{} is slow: its disks take {:.0} ms for {} (95 of 100), those of the others {:.1} ms; reads avoid it.",
            self.id,
            millis(self.took),
            self.what,
            millis(self.others)
        )
    }

    fn json(&self) -> Value {
        json!({"server": self.id.to_string(), "what": self.what, "p95_us": self.took, "others_p95_us": self.others})
    }
}

fn slow_servers(servers: &[ServerReport]) -> Vec<SlowServer> {
    let time = |server: &ServerReport, name: &str| -> Option<u64> {
        let found = server.status.as_ref()?.counters.iter().find(|(n, _)| n == name)?;
        Some(found.1).filter(|micros| *micros > 0)
    };
    let mut slow: Vec<SlowServer> = Vec::new();
    for (name, what) in [("disk_write_p95_us", "a write"), ("disk_read_p95_us", "a read")] {
        let times: Vec<(ServerId, u64)> = servers.iter().filter_map(|s| Some((s.id, time(s, name)?))).collect();
        let found = much_slower(&times).into_iter().filter(|(id, ..)| slow.iter().all(|s| s.id != *id));
        let found: Vec<SlowServer> = found.map(|(id, took, others)| SlowServer { id, what, took, others }).collect();
        slow.extend(found);
    }
    slow
}

/// Who takes much longer than the others' median, with both.
fn much_slower(times: &[(ServerId, u64)]) -> Vec<(ServerId, u64, u64)> {
    let judge = |&(id, took): &(ServerId, u64)| {
        let mut others: Vec<u64> = times.iter().filter(|(other, _)| *other != id).map(|(_, time)| *time).collect();
        others.sort_unstable();
        let median = *others.get(others.len() / 2)?;
        (took > median * SLOW_TIMES && took > median + SLOW_MICROS).then_some((id, took, median))
    };
    times.iter().filter_map(judge).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use petal::global_state::Command;
    use petal::ids::Incarnation;

    #[test]
    fn slow_is_who_is_slow_beside_the_others() {
        let ids = |times: &[u64]| -> Vec<u16> {
            let times: Vec<(ServerId, u64)> = (1..).map(ServerId).zip(times.iter().copied()).collect();
            much_slower(&times).iter().map(|(id, ..)| id.0).collect()
        };
        assert_eq!(ids(&[800, 900, 85_000, 700]), [3]);
        assert_eq!(ids(&[80_000, 90_000, 85_000, 70_000]), [0u16; 0], "all are busy");
        assert_eq!(ids(&[100, 90, 8_000, 70]), [0u16; 0], "a few milliseconds hurt nobody");
        assert_eq!(ids(&[100_000]), [0u16; 0], "there is nobody to compare it with");
        assert_eq!(ids(&[100_000, 1000]), [1]);
    }

    #[test]
    fn times_are_those_of_the_server_that_was_there() {
        let line = |index, age| LogLine { index, text: String::new(), refused: None, age_millis: age };
        let ages =
            Ages::of(&[vec![line(7, Some(1500)), line(8, Some(1000))], vec![line(6, None), line(7, Some(185_000))]]);
        assert_eq!(ages.since(7), "for 3 min 5 s (state index 7)");
        assert_eq!(ages.since(8), "for 1 s (state index 8)");
        assert_eq!(ages.since(6), "since state index 6");
        let missing = Missing { slots: 96, begun: 7, back: 32, ..Missing::default() };
        assert_eq!(ages.progress(&missing), "32 of 128 slots back, about 9 min 15 s left");
        assert_eq!(ages.progress(&Missing { back: 0, ..missing.clone() }), "0 of 96 slots back");
        assert_eq!(ages.progress(&Missing { begun: 6, ..missing }), "32 of 128 slots back");
    }

    #[test]
    fn a_server_is_down_for_what_it_said_of_its_disk_when_it_went_last() {
        let failed = |server| Command::DiskFailed {
            server: ServerId(server),
            incarnation: Incarnation(1),
            why: format!("disk {server} hangs"),
        };
        let up = Command::ServerUp {
            server: ServerId(1),
            incarnation: Incarnation(2),
            addresses: Vec::new(),
            disks: Vec::new(),
        };
        let line = |command: Command| LogLine { index: 1, text: command.to_string(), refused: None, age_millis: None };
        let mut log = vec![line(failed(1)), line(failed(2))];
        assert_eq!(why_down(&log, ServerId(1)).as_deref(), Some("disk 1 hangs"));
        assert_eq!(why_down(&log, ServerId(3)), None);
        log.push(line(up));
        assert_eq!(why_down(&log, ServerId(1)), None, "that was an earlier life");
    }
}
