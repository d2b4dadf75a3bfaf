//! `petal rejoin`: a server whose disks are lost, all or some, comes back with others in their place (2.7).
//!
//! ```text
//!   which disks are kept, which are lost -> the cluster takes note (`ReplaceDisks`) -> the new ones are made,
//!   the kept ones are told of them -> `petal up`, or `petal server`, starts it, and the others copy everything back
//! ```
//!
//! The cluster takes note first: it refuses where the lost disks had the only complete copy of something, and then
//! nothing has been touched. Stopped at any point it is asked again with the same words.

use crate::cluster_folder::ClusterFile;
use crate::connect::{self, Connection};
use crate::disk_files::{self, Replacement};
use crate::output;
use crate::place::{self, Place};
use crate::server_config::ServerConfig;
use crate::supervisor;
use anyhow::{Context, Result, bail, ensure};
use petal::global_state::{Command, Genesis, State};
use petal::ids::{DiskId, ServerId};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long the others may take to declare a server down that was just lost: some lease times.
const DOWN_LIMIT: Duration = Duration::from_secs(15);

/// `petal rejoin`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal rejoin s4                                     make the disks of s4 anew that are not there any more
  petal rejoin s2 --lost petal-data/s2/disk1          this one, too: it is there, and damaged
  petal --cluster 10.0.0.1:7000 rejoin s2 --config /etc/petal/server.toml --token petal1-0123...
  petal rejoin s3 --dry-run                           what would be lost, and what would be copied

The server must be down, and a majority of the ring must run. Start it afterwards (`petal up`, or `petal server`): the
others copy back what it had. Where the lost disks had the only complete copy this is refused, and says of how much;
--accept-data-loss is the last resort then: bring the disks back instead if there is any way.")]
pub struct Arguments {
    /// The server
    #[arg(value_name = "SERVER", value_parser = output::parse_server)]
    server: ServerId,
    /// A disk that is to be made anew although it is there; its content goes
    #[arg(long, value_name = "PATH")]
    lost: Vec<PathBuf>,
    /// The server's config file, which names its disks (a real deployment)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The token that `petal init` printed: needed where all of the server's disks are lost (a real deployment)
    #[arg(long)]
    token: Option<String>,
    /// Size of each new disk file; block devices are used whole
    #[arg(long, value_parser = output::parse_size)]
    disk_size: Option<u64>,
    /// Overwrite what --lost names even if it does not look like a disk of Petal
    #[arg(long)]
    force: bool,
    /// Even where the lost disks had the only complete copy: the last writes there, or all of them, are lost for ever
    #[arg(long)]
    accept_data_loss: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Makes a server anew.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let server = arguments.server;
    let own = Own::find(place, &arguments)?;
    let lost: Vec<PathBuf> = arguments.lost.iter().map(|path| plain(path)).collect::<Result<_>>()?;
    if let Some(stranger) = lost.iter().find(|path| !own.disks.contains(path)) {
        bail!("{} is none of the disks of {server}: {}", stranger.display(), list(&own.disks));
    }
    let replacement = Replacement::find(&own.disks, &lost, server, arguments.force)?;
    let state = {
        let place = place.clone();
        connect::block_on(async move { down(&Connection::open(&place).await?, server).await })?
    };
    replacement.check(&state)?;
    let is_half_made = replacement.is_half_made(&state);
    ensure!(
        is_half_made || !replacement.lost_paths().is_empty(),
        "all disks of {server} are there: {}; start it with `petal up` or `petal server`, or name what is lost with --lost",
        list(&own.disks)
    );
    let cost = Cost::of(&state, server);
    if arguments.dry_run {
        return cost.tell(&arguments, &replacement);
    }
    let Some(genesis) = replacement.genesis().or(own.genesis.as_ref()) else {
        bail!(
            "all disks of {server} are lost, and with them what they knew of the cluster; give the token that `petal init` printed with --token"
        );
    };
    ensure!(
        genesis.cluster == state.cluster,
        "the token is of the cluster {}, and this one is {}",
        genesis.cluster,
        state.cluster
    );
    let size = arguments.disk_size.or(own.disk_size);
    replacement.rehearse(genesis, size)?;
    let votes_lost = replacement.votes_lost(&state);
    let state = match is_half_made {
        true => state,
        false => {
            check_majority(place, &state)?;
            let command = Command::ReplaceDisks {
                server,
                incarnation: state.servers[&server].incarnation,
                disks: replacement.ids(),
                votes_lost,
                accept_data_loss: arguments.accept_data_loss,
            };
            take_note(place, command, server, replacement.ids())?
        }
    };
    // Half made: which configuration began for it is not known any more, and the present one is as good.
    let votes_from = if votes_lost || is_half_made { state.ring.id } else { 0 };
    replacement.make(genesis, state.servers[&server].incarnation, size, votes_from).with_context(|| {
        format!(
            "the cluster waits for {server} with other disks, and they could not be made; ask again when this is mended"
        )
    })?;
    cost.tell(&arguments, &replacement)
}

/// Has the command decided; a state after it. (Another server than the one that executed it may answer, and lag: by
/// the ring's configuration of before, the new disks would be let to vote where the lost ones have.)
fn take_note(place: &Place, command: Command, server: ServerId, disks: Vec<DiskId>) -> Result<State> {
    let place = place.clone();
    connect::block_on(async move {
        let connection = Connection::open(&place).await?;
        connection.execute(command).await.context("the disks are as they were, and the cluster has not confirmed")?;
        let end = Instant::now() + DOWN_LIMIT;
        loop {
            let state = connection.state().await?;
            let named: Vec<&DiskId> = state.servers.get(&server).map(|s| s.disks.keys().collect()).unwrap_or_default();
            if named.len() == disks.len() && disks.iter().all(|disk| named.contains(&disk)) {
                return Ok(state);
            }
            ensure!(Instant::now() < end, "the cluster took note, and no server that knows of it answers; ask again");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
}

/// A command that cannot be decided now might be later, when nobody waits for it.
fn check_majority(place: &Place, state: &State) -> Result<()> {
    let (asked, known) = (place.clone(), state.clone());
    let away = connect::block_on(async move {
        let connection = Connection::open(&asked).await?.to_all(&known).await?;
        Ok(connection.away(&known, Duration::from_secs(2)).await)
    })?;
    let members = || state.ring.members.iter().map(|m| m.server);
    let away: Vec<String> = members().filter(|s| away.contains(s)).map(|s| s.to_string()).collect();
    ensure!(
        away.len() < members().count().div_ceil(2),
        "the cluster must take note, and too few members of its ring run: start {} first",
        away.join(" or ")
    );
    Ok(())
}

/// Where the server's disks are.
struct Own {
    disks: Vec<PathBuf>,
    disk_size: Option<u64>,
    genesis: Option<Genesis>,
}

impl Own {
    fn find(place: &Place, arguments: &Arguments) -> Result<Own> {
        let token = arguments.token.as_deref().map(super::init::read_token).transpose()?;
        if let Some(path) = &arguments.config {
            let config = ServerConfig::read(path)?;
            let named = config.server.map(ServerId);
            ensure!(
                named.is_none_or(|named| named == arguments.server),
                "{} is the config file of {}",
                path.display(),
                named.unwrap_or(arguments.server)
            );
            ensure!(!config.disks.is_empty(), "{} names no disks", path.display());
            let disks = config.disks.iter().map(|path| plain(path)).collect::<Result<_>>()?;
            return Ok(Own { disks, disk_size: None, genesis: token });
        }
        let folder = place.folder().context("name the server's config file with --config")?;
        let server = arguments.server;
        if let Some(process) = supervisor::process(&folder, server) {
            bail!("{server} runs (pid {}); stop it first: `{} down {server}`", process.pid, place::petal(&folder));
        }
        let file: ClusterFile = folder.read()?;
        let known = file.servers.iter().any(|s| s.server() == server);
        ensure!(known, "there is no server {server} in {}; `petal status` shows the servers", folder.path().display());
        std::fs::create_dir_all(folder.server(server))?;
        // Any other server of the folder knows the cluster.
        let others = file.servers.iter().filter(|s| s.formatted).flat_map(|s| folder.disks(&file, s.server()));
        let genesis = others.filter_map(|path| disk_files::read_superblock(&path).ok()).map(|s| s.genesis).next();
        let disks = folder.disks(&file, server).iter().map(|path| plain(path)).collect::<Result<_>>()?;
        Ok(Own { disks, disk_size: Some(file.disk_size), genesis: token.or(genesis) })
    }
}

/// Absolute, with the links of its folder followed; the disk itself need not be there.
fn plain(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path).with_context(|| format!("{} is no path", path.display()))?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    let folder = folder.canonicalize().unwrap_or(folder.to_path_buf());
    Ok(path.file_name().map(|name| folder.join(name)).unwrap_or(path))
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// The state, as soon as the server is down in it.
async fn down(connection: &Connection, server: ServerId) -> Result<State> {
    let end = Instant::now() + DOWN_LIMIT;
    loop {
        let state = connection.state().await?;
        let Some(known) = state.servers.get(&server) else {
            bail!("there is no server {server}; `petal status` shows the servers");
        };
        ensure!(known.incarnation.0 > 0, "{server} has never run: make it with `petal join`, or start it");
        if known.down {
            return Ok(state);
        }
        ensure!(Instant::now() < end, petal::global_state::CommandError::NotDown(server));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// What the loss of a server's disks costs.
struct Cost {
    /// Slots that it is a member of.
    slots: usize,
    /// Of these, where nobody else holds every acknowledged write.
    last: usize,
}

impl Cost {
    fn of(state: &State, server: ServerId) -> Cost {
        let slots: Vec<_> = state.all_slots().filter(|(_, slot)| slot.member(server).is_some()).collect();
        let last = slots.iter().filter(|(_, slot)| slot.in_sync().all(|s| s == server)).count();
        Cost { slots: slots.len(), last }
    }

    fn tell(&self, arguments: &Arguments, replacement: &Replacement) -> Result<()> {
        let server = arguments.server;
        if arguments.json {
            return output::print_json(&json!({
                "server": server.to_string(),
                "dry_run": arguments.dry_run,
                "new_disks": replacement.lost_paths(),
                "kept_disks": replacement.kept_paths(),
                "slots": self.slots,
                "last_copies": self.last,
            }));
        }
        let done = if arguments.dry_run { "to be made anew" } else { "made anew" };
        println!("{server}: {done}: {}", list(&replacement.lost_paths()));
        if !replacement.kept_paths().is_empty() {
            println!("  Kept, and compared with the other copies: {}", list(&replacement.kept_paths()));
        }
        match self.last {
            0 => println!("  Its copies of {} slots come back from those of the others.", self.slots),
            last => println!(
                "  {last} of its {} slots have no other complete copy: their last writes are lost.",
                self.slots
            ),
        }
        if !arguments.dry_run {
            match &arguments.config {
                Some(path) => println!("Start it: petal server --config {}", path.display()),
                None => println!("Start it: petal up"),
            }
            println!("`petal status` shows how far the copying is.");
        }
        Ok(())
    }
}
