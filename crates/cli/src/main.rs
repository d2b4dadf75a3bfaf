//! The program `petal`: one file per subcommand, in `commands/`.
//!
//! Exit codes: 0 it was done, 1 it failed (the sentence on standard error says what happened, to which
//! object, and what to do next), 2 the command line makes no sense, 3 a server ended for a reason that does not go away
//! by starting it again (a disk that has failed), 4 it is decided, but not yet settled everywhere.

/// What is printed to somebody who has stopped reading (`petal status | head -1`) is not missed; std's macro
/// panics there.
macro_rules! println {
    () => { crate::output::line(format_args!("")) };
    ($($text:tt)*) => { crate::output::line(format_args!($($text)*)) };
}

mod cluster_folder;
mod commands;
mod connect;
mod disk_files;
mod freeze;
mod holder;
mod nbd_exports;
mod offline;
mod output;
mod place;
mod processes;
mod progress;
mod redundancy;
mod server_config;
mod space;
mod supervisor;
mod tree;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Replicated virtual disks from the disks of several machines.
#[derive(Parser)]
#[command(name = "petal", version, max_term_width = 100, after_help = EXAMPLES)]
struct Arguments {
    /// The cluster: its folder, or HOST:PORT or unix:PATH of one of its servers (several with commas)
    #[arg(long, global = true, env = place::CLUSTER_VARIABLE, default_value = place::CLUSTER_DEFAULT, value_name = "WHERE")]
    cluster: place::Place,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  petal up                       a cluster of four servers in ./petal-data, and NBD in front of it
  petal disk create db 100GiB    one more disk
  petal snapshot create db       its present state, kept under a name
  petal status                   the whole cluster on one screen
  petal attach vol0              vol0 as a kernel block device (root)";

#[derive(Subcommand)]
enum Command {
    /// Start a cluster on this machine, or what of it does not run
    Up(commands::up::Arguments),
    /// Stop everything that `up` started, or single servers of it
    Down(commands::down::Arguments),
    /// Run one server (a real deployment has one per machine)
    Server(commands::server::Arguments),
    /// Make a cluster on its first machine; prints the token for `join`
    Init(commands::init::Arguments),
    /// Prepare another machine for a cluster
    Join(commands::join::Arguments),
    /// Bring back a server that lost its disks, or some of them
    Rejoin(commands::rejoin::Arguments),
    /// Data that move from server to server: how far it is; pause, resume, turn back
    #[command(subcommand)]
    Reconfigure(commands::reconfigure::Command),
    /// Create, list, resize, rename and delete virtual disks
    #[command(subcommand)]
    Disk(commands::disk::Command),
    /// Make, list, delete and protect snapshots of disks
    #[command(subcommand)]
    Snapshot(commands::snapshot::Command),
    /// Make a disk that begins with what a snapshot or a disk holds
    Clone(commands::clone::Arguments),
    /// Take a disk back to what one of its snapshots holds
    Rollback(commands::rollback::Arguments),
    /// Where two snapshots or disks of one family differ
    Diff(commands::diff::Arguments),
    /// A snapshot, or what changed since another one, as a stream for backup
    Export(commands::export::Arguments),
    /// A disk, or its next state, from a stream
    Import(commands::import::Arguments),
    /// The whole cluster on one screen
    Status(commands::status::Arguments),
    /// What would become unavailable if servers were down
    WhatIf(commands::what_if::Arguments),
    /// What the cluster has decided lately
    Log(commands::log::Arguments),
    /// Serve disks over NBD
    Nbd(commands::nbd::Arguments),
    /// A disk as a kernel block device (needs root)
    Attach(commands::attach::Arguments),
    /// End what `attach` began
    Detach(commands::detach::Arguments),
    /// Put a load on a disk and measure it
    Bench(commands::bench::Arguments),
    /// Record what clients see of a disk, to judge it afterwards
    History(commands::history::Arguments),
    /// Check that replicas agree and that every block matches its checksum
    Verify(commands::verify::Arguments),
    /// Look for bad blocks now, and repair them from another copy
    Scrub(commands::scrub::Arguments),
    /// Look into a server's disk file
    #[command(subcommand)]
    Inspect(commands::inspect::Command),
    /// Look at backup streams; needs no cluster
    #[command(subcommand)]
    Stream(commands::stream::Command),
    /// Freeze a file system until standard input ends (started by `snapshot create --freeze`)
    #[command(hide = true)]
    FreezeUntilLeft { path: std::path::PathBuf },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    start_logging(&arguments.command);
    let place = arguments.cluster;
    let result = match arguments.command {
        Command::Up(arguments) => commands::up::run(&place, arguments),
        Command::Down(arguments) => commands::down::run(&place, arguments),
        Command::Server(arguments) => commands::server::run(&place, arguments),
        Command::Init(arguments) => commands::init::run(arguments),
        Command::Join(arguments) => commands::join::run(arguments),
        Command::Rejoin(arguments) => commands::rejoin::run(&place, arguments),
        Command::Reconfigure(command) => commands::reconfigure::run(&place, command),
        Command::Disk(command) => commands::disk::run(&place, command),
        Command::Snapshot(command) => commands::snapshot::run(&place, command),
        Command::Clone(arguments) => commands::clone::run(&place, arguments),
        Command::Rollback(arguments) => commands::rollback::run(&place, arguments),
        Command::Status(arguments) => commands::status::run(&place, arguments),
        Command::WhatIf(arguments) => commands::what_if::run(&place, arguments),
        Command::Log(arguments) => commands::log::run(&place, arguments),
        Command::Nbd(arguments) => commands::nbd::run(&place, arguments),
        Command::Attach(arguments) => commands::attach::run(&place, arguments),
        Command::Detach(arguments) => commands::detach::run(&place, arguments),
        Command::Bench(arguments) => commands::bench::run(&place, arguments),
        Command::History(arguments) => commands::history::run(&place, arguments),
        Command::Diff(arguments) => commands::diff::run(&place, arguments),
        Command::Export(arguments) => commands::export::run(&place, arguments),
        Command::Import(arguments) => commands::import::run(&place, arguments),
        Command::Verify(arguments) => commands::verify::run(&place, arguments),
        Command::Scrub(arguments) => commands::scrub::run(&place, arguments),
        Command::Inspect(command) => commands::inspect::run(command),
        Command::Stream(command) => commands::stream::run(command),
        Command::FreezeUntilLeft { path } => freeze::freeze_until_left(&path),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            exit_code(&error)
        }
    }
}

fn exit_code(error: &anyhow::Error) -> ExitCode {
    if error.is::<commands::server::CannotGoOn>() {
        ExitCode::from(3)
    } else if error.is::<connect::NotSettled>() {
        ExitCode::from(4)
    } else {
        ExitCode::FAILURE
    }
}

/// Logs go to standard error. Processes that run for long tell more (`RUST_LOG` decides otherwise).
fn start_logging(command: &Command) {
    let long = match command {
        Command::Server(arguments) => arguments.runs_server(),
        Command::Up(_) | Command::Nbd(_) => true,
        _ => false,
    };
    let default = if long { "info" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| default.into());
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(terminal).init();
}
