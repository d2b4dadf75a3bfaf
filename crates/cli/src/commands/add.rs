//! `petal server add --local`: one more server for a cluster that `petal up` made.
//!
//! ```text
//!   cluster.toml names it --AddServer--> its disks are made --> it runs --Drain{false}--> the ring's leader moves its share
//! ```
//!
//! Ended in the middle, it is gone on with by the next `petal server add --local`, or, but for the filling, by `petal up`.

use super::placement::{Held, Plan, held};
use super::up;
use crate::cluster_folder::{ClusterFile, ClusterFolder, ServerEntry};
use crate::connect::{self, Connection};
use crate::place::{self, Place};
use crate::{output, supervisor};
use anyhow::{Context, Result, bail, ensure};
use petal::global_state::{Command, Entry, Outcome, State};
use petal::ids::{DiskId, Incarnation, ServerId};
use petal::message::CommandId;
use rustix::fs::FlockOperation;
use serde_json::json;
use std::fs::File;
use std::time::{Duration, Instant};

/// How long the ring may take to know that it is up, after it says so itself.
const KNOWN_LIMIT: Duration = Duration::from_secs(30);

/// `petal server add`
#[derive(clap::Args)]
pub struct Arguments {
    /// On this machine, in the cluster's folder
    #[arg(long)]
    local: bool,
    /// Only tell what would move
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Adds it.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    ensure!(
        arguments.local,
        "a server on another machine is added there, by `petal join` with the token that `petal init` printed, and then \
         filled (`petal server fill`); `--local` adds one on this machine to a cluster of `petal up`"
    );
    let (folder, place) = (place.folder()?, place.clone());
    folder.read()?;
    connect::block_on(async move {
        let connection = Connection::open(&place).await?;
        add(&folder, &connection, &arguments).await
    })
}

async fn add(folder: &ClusterFolder, connection: &Connection, arguments: &Arguments) -> Result<()> {
    // One at a time; ends with the process.
    let lock = File::open(folder.path()).context("cannot open the cluster's folder")?;
    if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("another `petal server add` works in {}", folder.path().display());
    }
    let mut file = folder.read()?;
    let state = connection.state().await?;
    let entry = match unfinished(&file, &state) {
        Some(entry) => entry,
        None => {
            let id = state.last_server.checked_add(1).context("there are as many servers as numbers")?;
            ServerEntry { id, ring: false, port: up::free_ports(1)?[0], formatted: false }
        }
    };
    let server = entry.server();
    let plan = plan(&state, held(connection, &state).await?, server)?;
    plan.check_room()?;
    if arguments.json {
        let mut value = plan.json();
        value["server"] = server.to_string().into();
        // What moves already, if anything does, tells the present rate; nobody knows it of a move that has not begun.
        let rate = super::reconfigure::bytes_per_second(connection).await?;
        value["minutes"] = json!(rate.map(|rate| (plan.bytes() as f64 / rate / 60.0 * 10.0).round() / 10.0));
        output::print_json(&value)?;
    } else {
        println!("{server} {} added.", if arguments.dry_run { "would be" } else { "is being" });
        plan.print();
    }
    if arguments.dry_run {
        return Ok(());
    }
    start(folder, &mut file, entry, connection).await?;
    connection.execute(Command::Drain { server, drained: false }).await?;
    if !arguments.json {
        let petal = place::petal(folder);
        println!("{server} runs and gets its share; `{petal} reconfigure status --watch` shows how far it is.");
    }
    Ok(())
}

/// One that was begun and has never held anything.
fn unfinished(file: &ClusterFile, state: &State) -> Option<ServerEntry> {
    let is_new = |e: &&ServerEntry| !e.ring && state.servers.get(&e.server()).is_none_or(|s| s.incarnation.0 == 0);
    file.servers.iter().find(is_new).cloned()
}

/// What moves to it, if it has disks like the others'.
fn plan(state: &State, mut before: std::collections::BTreeMap<ServerId, Held>, server: ServerId) -> Result<Plan> {
    let holder =
        |(id, h): (&ServerId, &Held)| Some((h.capacity, state.servers.get(id)?.weight)).filter(|(c, _)| *c > 0);
    let (capacity, weight) = before.iter().find_map(holder).context("no server answers")?;
    before.insert(server, Held { capacity, ..Held::default() });
    Plan::between(state, &with_server(state, server, weight)?, before)
}

/// The state in which it is there, too.
fn with_server(state: &State, server: ServerId, weight: u64) -> Result<State> {
    let mut then = state.clone();
    let mut run = |command| {
        let number = then.index + 1;
        then.apply(&Entry { id: CommandId { proposer: u64::MAX, number, finished_below: number }, command }).0
    };
    let addresses = vec!["unix:new".to_string()];
    if !state.servers.contains_key(&server) {
        let added = run(Command::AddServer { addresses: addresses.clone(), token: 0 })?;
        ensure!(added == Outcome::Server(server), "the new server would get another number than {server}");
    }
    let disks = vec![(DiskId(u128::MAX), Incarnation(0).into(), weight)];
    run(Command::ServerUp { server, incarnation: Incarnation(1), addresses, disks })?;
    Ok(then)
}

/// Names it in the folder, makes it known and its disks, and starts it.
async fn start(
    folder: &ClusterFolder,
    file: &mut ClusterFile,
    entry: ServerEntry,
    connection: &Connection,
) -> Result<()> {
    let server = entry.server();
    if file.servers.iter().all(|e| e.id != entry.id) {
        file.servers.push(entry.clone());
        folder.write(file)?;
    }
    if !entry.formatted {
        up::join_learner(folder, file, &entry, connection).await?;
        file.servers.iter_mut().filter(|e| e.id == entry.id).for_each(|e| e.formatted = true);
        folder.write(file)?;
    }
    let (folder, file) = (folder.clone(), file.clone());
    let started = tokio::task::spawn_blocking(move || supervisor::start_all(&folder, &file, &[entry])).await?;
    if let Some(complaint) = started.complaint() {
        bail!(complaint);
    }
    let end = Instant::now() + KNOWN_LIMIT;
    while connection.state().await?.servers.get(&server).is_none_or(|s| s.incarnation.0 == 0) {
        ensure!(Instant::now() < end, "{server} runs, and the ring has not taken note; see its log");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
