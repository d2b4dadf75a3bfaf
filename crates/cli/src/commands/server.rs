//! `petal server`: one server of a cluster. A real deployment runs one per machine.

use super::placement::{self, Placement};
use crate::place::Place;
use crate::processes::ProcessFile;
use crate::server_config::{CACHE_ELEMENTS_DEFAULT, ServerConfig};
use crate::{connect, disk_files};
use anyhow::Result;
use petal::ids::ServerId;
use petal::sabotage::Sabotage;
use petal::server::{Server, ServerConfig as CoreConfig};
use petal::store::StoreConfig;
use petal_io::server::{Ended, ServerShell, ShellConfig, Stop};
use std::path::PathBuf;
use std::pin::pin;
use stdx::Duration;

/// `petal server`
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  petal server --config /etc/petal/server.toml
  petal server --listen 10.0.0.1:7000 --disk /dev/sdb --disk /dev/sdc
  petal server list                what each server of the cluster holds
  petal server drain s3 --dry-run  what would move if s3 were to hold nothing
  petal server drain s3            its data moves to the others, while everything is used
  petal server fill s5             s5, which has joined, gets its share
  petal server add --local         one more server where `petal up` made the cluster

The config file:
  listen = [\"0.0.0.0:7000\"]
  advertise = [\"10.0.0.1:7000\"]
  disks = [\"/dev/sdb\", \"/dev/sdc\"]
  scrub_hours = 336            (every block is read once in so long; 0: only when `petal scrub` asks)
`petal init` and `petal join` format the disks and write it."
)]
pub struct Arguments {
    #[command(subcommand)]
    placement: Option<Placement>,
    /// The config file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Accept connections here too: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDRESS")]
    listen: Vec<String>,
    /// A disk, besides those of the config file
    #[arg(long = "disk", value_name = "PATH")]
    disks: Vec<PathBuf>,
    /// Keep the pid, and whether the server serves, in this file
    #[arg(long, value_name = "FILE")]
    process_file: Option<PathBuf>,
}

impl Arguments {
    /// This process is to be a server, and does not only ask about some.
    pub fn runs_server(&self) -> bool {
        self.placement.is_none()
    }
}

/// Runs the server until it is told to stop; or asks a cluster about its servers.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    if let Some(command) = arguments.placement {
        return placement::run(place, command);
    }
    let mut config = match &arguments.config {
        Some(path) => ServerConfig::read(path)?,
        None => ServerConfig::default(),
    };
    config.listen.extend(arguments.listen);
    config.disks.extend(arguments.disks);
    config.check()?;
    let mut process = ProcessFile::own();
    if let Some(path) = &arguments.process_file {
        process.write(path)?;
    }
    let process_file = arguments.process_file.clone();
    let result = connect::block_on(async move {
        let ready = move || {
            process.ready = true;
            if let Some(Err(error)) = process_file.map(|path| process.write(&path)) {
                tracing::warn!("{error:#}");
            }
        };
        serve(config, Box::new(ready)).await
    });
    if let Some(path) = &arguments.process_file {
        let _ = std::fs::remove_file(path);
    }
    result
}

/// Longest wait before a new life: a server that is declared down again and again leaves the others in peace.
const NEW_LIFE_WAIT_MAX: Duration = Duration::from_secs(5);
/// A life of this length was a good one: after it the next begins at once.
const GOOD_LIFE: Duration = Duration::from_secs(30);

/// One life after the other, until it is told to stop.
async fn serve(config: ServerConfig, on_ready: Box<dyn FnOnce()>) -> Result<()> {
    petal_io::raise_file_limit();
    let mut on_ready = Some(on_ready);
    let mut wait = Duration::ZERO;
    let mut told_to_stop = pin!(petal_io::server::told_to_stop());
    loop {
        let began = petal_io::clock::now();
        let ready = on_ready.take().unwrap_or_else(|| Box::new(|| {}));
        let (server, why) = match live(&config, ready, told_to_stop.as_mut()).await? {
            (_, Ended::Stopped | Ended::Signalled) => return Ok(()),
            (server, Ended::Fatal(why)) => return Err(CannotGoOn { server, why }.into()),
            (server, Ended::Restart(why)) => (server, why),
        };
        let good = petal_io::clock::now().since(began) >= GOOD_LIFE;
        tracing::warn!(%server, ?wait, "{why}");
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = told_to_stop.as_mut() => return Ok(()),
        }
        wait = if good { Duration::ZERO } else { (wait * 2).clamp(Duration::from_millis(50), NEW_LIFE_WAIT_MAX) };
    }
}

/// A server ended for a reason that does not go away by starting it again.
#[derive(Debug, thiserror::Error)]
#[error("server {server} cannot go on: {why}")]
pub struct CannotGoOn {
    server: ServerId,
    why: String,
}

/// One life of the server. Its disks are closed, with nothing in flight there, when this returns.
async fn live(
    config: &ServerConfig,
    on_ready: Box<dyn FnOnce()>,
    told_to_stop: impl Future<Output = Stop>,
) -> Result<(ServerId, Ended)> {
    let (open, engine) = disk_files::open(&config.disks, config.owner()?)?;
    let core = CoreConfig {
        addresses: config.addresses().to_vec(),
        store: StoreConfig {
            cache_elements: config.cache_elements.unwrap_or(CACHE_ELEMENTS_DEFAULT),
            ..StoreConfig::default()
        },
        witness: config.witness,
        disk_patience: config.disk_patience(),
        scrub: config.scrub(),
        sabotage: Sabotage::None,
        salt: disk_files::random()? as u64,
    };
    let server = Server::start(petal_io::clock::now(), core, open);
    let id = server.id();
    tracing::info!(server = %id, incarnation = %server.incarnation(), listen = ?config.listen, "starting");
    let shell = ShellConfig {
        cluster: server.cluster(),
        server: id,
        incarnation: server.incarnation(),
        listen: config.listen.clone(),
        bounds: Default::default(),
        on_ready: Box::new(move || {
            tracing::info!(server = %id, "ready");
            on_ready();
        }),
    };
    let shell = ServerShell::start(server, engine, shell).await?;
    let ended = shell.run(told_to_stop).await;
    tracing::info!(server = %id, ?ended, "stopped");
    Ok((id, ended))
}
