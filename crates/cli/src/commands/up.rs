//! `petal up`: a whole cluster on one machine, and NBD in front of it.
//!
//! ```text
//!   petal up (foreground) ---------------------------+
//!   petal up --detach --starts--> petal up --supervise|--> holds `lock`, is the NBD front end,
//!        waits until it is ready                      |    starts servers, stops them when it ends
//!   petal up, while a supervisor lives --------------->    starts the servers that do not run, returns
//! ```

use super::nbd::Front;
use crate::cluster_folder::{ClusterFile, ClusterFolder, FirstDisk, ServerEntry};
use crate::connect::{self, Connection};
use crate::nbd_exports::ClusterExports;
use crate::place::{self, Place, shorter};
use crate::processes::{self, Log, ProcessFile};
use crate::supervisor::{self, Started};
use crate::{disk_files, holder, output};
use anyhow::{Context, Result, bail, ensure};
use petal::global_state::{Command, Genesis, GenesisServer, Outcome};
use petal::ids::ServerId;
use std::fs::File;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

/// How long everything may take until it is ready.
const READY_LIMIT: Duration = Duration::from_secs(90);
/// How long a server that runs may take to answer.
const SILENCE_LIMIT: Duration = Duration::from_secs(2);
const SERVERS_DEFAULT: u16 = 4;
const DISK_SIZE_DEFAULT: u64 = 32 << 30;
const SIZE_DEFAULT: u64 = 10 << 30;
const NBD_PORT_DEFAULT: u16 = 10809;
/// Servers of the first ring: three where there are three.
const RING: u16 = 3;

/// `petal up`
#[derive(clap::Args, Clone)]
#[command(after_help = "\
Examples:
  petal up                               four servers in ./petal-data, disk vol0 of 10 GiB in two copies
  petal up --detach                      the same in the background; `petal down` stops it
  petal --cluster /srv/p up --servers 6 --disk-size 100GiB --size 50GiB --copies 3
  petal up --nbd-port 0                  NBD on the unix socket only

Sizes and numbers hold for a new cluster; a second `petal up` continues with the one that is there,
and starts what does not run.")]
pub struct Arguments {
    /// Server processes (new cluster; default 4)
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=64))]
    servers: Option<u16>,
    /// Disk files per server (new cluster; default 1)
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=32))]
    disks_per_server: Option<u16>,
    /// Size of each disk file; it takes room as it is used (new cluster; default 32GiB)
    #[arg(long, value_parser = output::parse_size)]
    disk_size: Option<u64>,
    /// Size of the first disk, vol0 (new cluster; default 10GiB)
    #[arg(long, value_parser = output::parse_size)]
    size: Option<u64>,
    /// Copies of vol0's data (new cluster; default 2)
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=3))]
    copies: Option<u8>,
    /// TCP port of NBD on 127.0.0.1; 0 = none
    #[arg(long)]
    nbd_port: Option<u16>,
    /// Return when everything is ready; it runs on in the background
    #[arg(long)]
    detach: bool,
    /// For `--detach`: be the process in the background
    #[arg(long, hide = true)]
    supervise: bool,
}

/// Starts the cluster.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let mut folder = place.folder()?;
    folder.create()?;
    check_same(&folder, &arguments)?;
    match Lock::take(&folder)? {
        None => start_beside(&folder),
        Some(lock) if arguments.detach => {
            drop(lock);
            in_background(&folder, &arguments)
        }
        Some(_lock) => connect::block_on(supervise(folder, arguments)),
    }
}

/// The lock of the supervisor; ends with its process, however that ends.
struct Lock(#[allow(dead_code, reason = "held, not used")] File);

impl Lock {
    /// `None` if somebody holds it.
    fn take(folder: &ClusterFolder) -> Result<Option<Lock>> {
        Ok(processes::lock(&folder.path().join("lock"))?.map(Lock))
    }
}

/// What was asked for and cannot be had without a new cluster is an error, not ignored.
fn check_same(folder: &ClusterFolder, arguments: &Arguments) -> Result<()> {
    let Some(file) = folder.read_if_there()? else { return Ok(()) };
    let there = folder.path().display();
    let advice = "leave the option out to continue with it, or name another folder with --cluster";
    if let Some(servers) = arguments.servers.filter(|n| usize::from(*n) != file.servers.len()) {
        bail!("the cluster in {there} has {} servers, not {servers}; {advice}", file.servers.len());
    }
    if let Some(disks) = arguments.disks_per_server.filter(|n| usize::from(*n) != file.disks_per_server) {
        bail!("the cluster in {there} has {} disks per server, not {disks}; {advice}", file.disks_per_server);
    }
    if let Some(size) = arguments.disk_size.filter(|n| *n != file.disk_size) {
        let (has, wanted) = (output::size(file.disk_size), output::size(size));
        bail!("the cluster in {there} has disks of {has}, not {wanted}; {advice}");
    }
    Ok(())
}

/// A supervisor lives: start what it lost, and leave it in charge.
fn start_beside(folder: &ClusterFolder) -> Result<()> {
    let end = Instant::now() + READY_LIMIT;
    let supervisor = loop {
        match ProcessFile::alive_at(&folder.supervisor()) {
            Some(process) if process.ready => break process,
            _ if Instant::now() > end => {
                bail!("another `petal up` in {} holds the lock and is not ready", folder.path().display())
            }
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let file = folder.read()?;
    let started = supervisor::start_all(folder, &file, &file.servers);
    let names: Vec<String> = started.ready.iter().map(|(s, _)| s.to_string()).collect();
    let pid = supervisor.pid;
    let silent = silent(folder, &file, &started);
    match names.as_slice() {
        [] if !started.failed.is_empty() => {}
        [] if !silent.is_empty() => {}
        [] => println!("Everything runs already (pid {pid} supervises)."),
        names => println!("Started {} (pid {pid} supervises).", names.join(", ")),
    }
    let complaints: Vec<String> = started.complaint().into_iter().chain(silent).collect();
    ensure!(complaints.is_empty(), "{}", complaints.join("; "));
    print_usage(folder, &without_past(supervisor, folder, &file));
    Ok(())
}

/// The supervisor's process file without warnings about servers that run now.
fn without_past(mut supervisor: ProcessFile, folder: &ClusterFolder, file: &ClusterFile) -> ProcessFile {
    let runs = |server: &ServerId| supervisor::process(folder, *server).is_some_and(|process| process.ready);
    let running: Vec<String> =
        file.servers.iter().map(ServerEntry::server).filter(runs).map(|s| s.to_string()).collect();
    let is_past = |warning: &str| running.iter().any(|server| warning.contains(&supervisor::not_started(server)));
    let kept: Vec<String> = supervisor.warnings().filter(|warning| !is_past(warning)).map(String::from).collect();
    supervisor.details.insert("warnings".into(), kept.into());
    supervisor
}

/// Servers whose process is there and does not answer: one sentence each.
fn silent(folder: &ClusterFolder, file: &ClusterFile, started: &Started) -> Vec<String> {
    let place = Place::Folder(folder.path().to_path_buf());
    let ask = async move {
        let connection = Connection::open(&place).await?;
        let state = connection.state().await?;
        Ok(connection.to_all(&state).await?.away(&state, SILENCE_LIMIT).await)
    };
    // Whom it reaches on the way is nobody's business.
    let away =
        tracing::subscriber::with_default(tracing::subscriber::NoSubscriber::default(), || connect::block_on(ask));
    // Who cannot be asked for the others is not answered by anybody: `petal status` says more.
    let away = away.unwrap_or_default();
    let is_new = |server: ServerId| started.ready.iter().any(|(ready, _)| *ready == server);
    let hangs = file.servers.iter().map(ServerEntry::server).filter(|s| away.contains(s) && !is_new(*s));
    hangs
        .filter_map(|server| {
            // One that is not ready yet replays its journal.
            let pid = supervisor::process(folder, server).filter(|process| process.ready)?.pid;
            let log = folder.server(server).join("log");
            Some(format!(
                "{server} runs (pid {pid}) and does not answer: see {}, and if it hangs end it (`kill -9 {pid}`) and start \
                 it with `{} up`",
                log.display(),
                place::petal(folder)
            ))
        })
        .collect()
}

/// Starts a supervisor in the background and waits until it is ready.
fn in_background(folder: &ClusterFolder, arguments: &Arguments) -> Result<()> {
    let log_path = folder.path().join("up.log");
    let log = Log::from_here(&log_path);
    let mut words = vec!["--cluster".into(), folder.path().display().to_string(), "up".into(), "--supervise".into()];
    let mut add = |name: &str, value: Option<u64>| words.extend(value.map(|v| format!("--{name}={v}")));
    add("servers", arguments.servers.map(u64::from));
    add("disks-per-server", arguments.disks_per_server.map(u64::from));
    add("disk-size", arguments.disk_size);
    add("size", arguments.size);
    add("copies", arguments.copies.map(u64::from));
    add("nbd-port", arguments.nbd_port.map(u64::from));
    let mut child = processes::spawn_detached(&words, &log_path)?;
    let process = processes::wait_until_ready(&mut child, &folder.supervisor(), &log, READY_LIMIT)?;
    print_usage(folder, &process);
    Ok(())
}

/// The supervisor's life.
async fn supervise(folder: ClusterFolder, arguments: Arguments) -> Result<()> {
    ProcessFile::own().write(&folder.supervisor())?;
    // From here on an end of any kind stops what was started.
    let brought_up = tokio::select! {
        result = bring_up(&folder, &arguments) => result.map(Some),
        signal = connect::stop_signal() => signal.map(|()| None),
    };
    let result = match brought_up {
        Ok(Some((front, children))) => {
            let end = async {
                tokio::select! {
                    () = watch(children) => Ok(()),
                    signal = connect::stop_signal() => signal,
                }
            };
            front.serve_until(end).await
        }
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    if let Some(file) = folder.read_if_there()? {
        supervisor::stop_all(&folder, &file);
        supervisor::reap();
    }
    let _ = std::fs::remove_file(folder.supervisor());
    result
}

/// Starts everything, and opens the NBD sockets.
async fn bring_up(folder: &ClusterFolder, arguments: &Arguments) -> Result<(Front, Vec<(ServerId, Child)>)> {
    let there = folder.read_if_there()?;
    let is_new = there.is_none();
    let mut file = match there {
        Some(file) => file,
        None => make_cluster(folder, arguments)?,
    };
    if let Some(port) = arguments.nbd_port {
        file.nbd_port = (port != 0).then_some(port);
        folder.write(&file)?;
    }
    let (ring, learners): (Vec<_>, Vec<_>) = file.servers.iter().cloned().partition(|s| s.ring);
    let mut started = start_without_blocking(folder, &file, ring).await?;
    let connection = Connection::open(&Place::Folder(folder.path().into())).await.with_context(|| {
        started.complaint().unwrap_or_else(|| "all servers of the ring run, and none answers".into())
    })?;
    for learner in learners.iter().filter(|l| !l.formatted) {
        join_learner(folder, &file, learner, &connection).await?;
        file.servers.iter_mut().filter(|s| s.id == learner.id).for_each(|s| s.formatted = true);
        folder.write(&file)?;
    }
    started.extend(start_without_blocking(folder, &file, learners).await?);
    let complaint = started.complaint();
    if is_new && let Some(complaint) = complaint {
        bail!(complaint);
    }
    make_first_disk(folder, &mut file, &connection).await?;

    let mut process = ProcessFile::own();
    let front = listen(folder, &file, connection, &mut process).await?;
    if let Some(complaint) = complaint {
        // The rest is worth having; what needs the missing server waits for it.
        tracing::error!("{complaint}");
        process.warn(format!("{complaint}; I/O that needs it waits. `petal up` tries again"));
    }
    process.ready = true;
    process.write(&folder.supervisor())?;
    if !arguments.supervise {
        print_usage(folder, &process);
        println!("\nCtrl-C stops everything.");
    }
    Ok((front, started.ready))
}

/// Waiting for processes would stop NBD, and signals from being heard.
async fn start_without_blocking(
    folder: &ClusterFolder,
    file: &ClusterFile,
    entries: Vec<ServerEntry>,
) -> Result<Started> {
    let (folder, file) = (folder.clone(), file.clone());
    Ok(tokio::task::spawn_blocking(move || supervisor::start_all(&folder, &file, &entries)).await?)
}

/// Takes note of servers that end; they stay down, to be seen.
async fn watch(mut children: Vec<(ServerId, Child)>) {
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        children.retain_mut(|(server, child)| match child.try_wait() {
            Ok(Some(status)) => {
                tracing::warn!("server {server} has ended ({status}); `petal up` starts it again");
                false
            }
            _ => true,
        });
    }
}

/// Formats the ring's disks and writes `cluster.toml`.
fn make_cluster(folder: &ClusterFolder, arguments: &Arguments) -> Result<ClusterFile> {
    let servers = arguments.servers.unwrap_or(SERVERS_DEFAULT);
    let copies = arguments.copies.unwrap_or(if servers == 1 { 1 } else { 2 });
    ensure!(
        u16::from(copies) <= servers,
        "{copies} copies need {copies} servers; ask for more servers or fewer copies"
    );
    let size = arguments.size.unwrap_or(SIZE_DEFAULT);
    petal::global_state::check_size(size).context("--size")?;
    let ring = if servers >= RING { RING } else { 1 };
    let entry = |(port, id): (u16, u16)| ServerEntry { id, ring: id <= ring, port, formatted: false };
    let port = arguments.nbd_port.unwrap_or(NBD_PORT_DEFAULT);
    let file = ClusterFile {
        cluster: format!("{:032x}", disk_files::random()?),
        name: folder.path().file_name().map_or("petal".into(), |n| n.to_string_lossy().into_owned()),
        disks_per_server: arguments.disks_per_server.unwrap_or(1).into(),
        disk_size: arguments.disk_size.unwrap_or(DISK_SIZE_DEFAULT),
        nbd_port: (port != 0).then_some(port),
        first_disk: Some(FirstDisk { name: "vol0".into(), size, copies }),
        servers: free_ports(servers)?.into_iter().zip(1..=servers).map(entry).collect(),
    };
    let genesis = genesis(folder, &file)?;
    let mut file = file;
    for number in 0..usize::from(ring) {
        // Disks without a cluster.toml are of a first start that did not finish: nothing is on them.
        format(folder, &file, &file.servers[number], &genesis)?;
        file.servers[number].formatted = true;
    }
    folder.write(&file)?;
    Ok(file)
}

fn genesis(folder: &ClusterFolder, file: &ClusterFile) -> Result<Genesis> {
    let ring = file.servers.iter().filter(|s| s.ring);
    let member = |e: &ServerEntry| Ok(GenesisServer { server: e.server(), addresses: folder.addresses(e)? });
    let ring: Result<Vec<_>> = ring.map(member).collect();
    Ok(Genesis { cluster: file.id()?, name: file.name.clone(), ring: ring? })
}

fn format(folder: &ClusterFolder, file: &ClusterFile, entry: &ServerEntry, genesis: &Genesis) -> Result<()> {
    std::fs::create_dir_all(folder.server(entry.server()))?;
    let disks = folder.disks(file, entry.server());
    disk_files::format(&disks, Some(file.disk_size), genesis, entry.server(), true)
}

/// Ports that were free a moment ago. They are remembered: servers know each other by them.
pub(super) fn free_ports(count: u16) -> Result<Vec<u16>> {
    let listeners: std::io::Result<Vec<_>> = (0..count).map(|_| std::net::TcpListener::bind("127.0.0.1:0")).collect();
    let listeners = listeners.context("cannot listen on 127.0.0.1")?;
    Ok(listeners.iter().filter_map(|l| l.local_addr().ok()).map(|a| a.port()).collect())
}

/// Makes a server known to the cluster and formats its disks.
pub(super) async fn join_learner(
    folder: &ClusterFolder,
    file: &ClusterFile,
    entry: &ServerEntry,
    connection: &Connection,
) -> Result<()> {
    let addresses = folder.addresses(entry)?;
    // The same token after a crash in between gives the same server.
    let token = disk_files::join_token(file.id()?, &addresses);
    let command = Command::AddServer { addresses, token };
    match connection.execute(command).await? {
        Outcome::Server(server) if server == entry.server() => {
            let genesis = genesis(folder, file)?;
            format(folder, file, entry, &genesis)
        }
        other => {
            bail!("the cluster gave {other:?} to {}; this folder's cluster.toml is not of this cluster", entry.server())
        }
    }
}

/// Makes `vol0`, once.
async fn make_first_disk(folder: &ClusterFolder, file: &mut ClusterFile, connection: &Connection) -> Result<()> {
    let Some(disk) = &file.first_disk else { return Ok(()) };
    let there = connection.state().await?.vdisks.values().any(|d| d.name == disk.name);
    if !there {
        super::disk::create(connection, &disk.name, disk.size, disk.copies, None).await?;
    }
    file.first_disk = None;
    folder.write(file)
}

/// Opens the NBD sockets.
async fn listen(
    folder: &ClusterFolder,
    file: &ClusterFile,
    connection: Connection,
    process: &mut ProcessFile,
) -> Result<Front> {
    let socket = folder.nbd_socket()?;
    let exports = ClusterExports::new(connection, holder::of_folder(folder));
    let mut front = Front::new(exports);
    front.listen_unix(&socket)?;
    process.details.insert("nbd_socket".into(), socket.display().to_string().into());
    if let Some(port) = file.nbd_port {
        let address = format!("127.0.0.1:{port}");
        match front.listen_tcp(&address).await {
            Ok(()) => drop(process.details.insert("nbd_tcp".into(), address.into())),
            // The socket is enough to work with: a second cluster on the machine must not fail for this.
            Err(error) => {
                process.warn(format!("{error:#}: NBD is on the unix socket only; --nbd-port chooses another port"))
            }
        }
    }
    Ok(front)
}

/// What can be done now.
fn print_usage(folder: &ClusterFolder, process: &ProcessFile) {
    let shown = |path: &str| shorter(Path::new(path));
    let socket = process.text("nbd_socket").map(shown).unwrap_or_default();
    println!("Petal runs in {}.", shorter(folder.path()));
    println!("  disk     nbd+unix:///vol0?socket={socket}");
    if let Some(tcp) = process.text("nbd_tcp") {
        println!("           nbd://{tcp}/vol0");
    }
    for warning in process.warnings() {
        println!("  warning: {warning}");
    }
    let petal = place::petal(folder);
    println!("  look     {petal} status");
    println!("  try      nbdinfo 'nbd+unix:///vol0?socket={socket}'");
    println!("  mount    {petal} attach vol0        (root: a kernel block device)");
    println!("  stop     {petal} down");
}
