//! `petal nbd`: NBD in front of a cluster, in a process of its own.

use super::disk::find;
use crate::connect::{self, Connection};
use crate::holder;
use crate::nbd_exports::ClusterExports;
use crate::place::Place;
use anyhow::{Context, Result};
use petal_nbd::{Config, Listener, Server};
use std::path::{Path, PathBuf};

/// `petal nbd`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal --cluster 10.0.0.1:7000,10.0.0.2:7000 nbd --socket /run/petal/nbd.sock
  petal nbd --tcp 127.0.0.1:10810 db
  petal nbd --socket /run/petal/monday.sock db@monday
  qemu-img info 'nbd+unix:///db?socket=/run/petal/nbd.sock'

A disk is attached exclusively while clients are connected to it; its snapshots (db@monday) are served on the same
sockets, read-only. NBD over TCP is not encrypted and asks for no password: listen on a loopback address.")]
pub struct Arguments {
    /// Serve on this unix socket
    #[arg(long, value_name = "PATH", required_unless_present = "tcp")]
    socket: Option<PathBuf>,
    /// Serve on this TCP address
    #[arg(long, value_name = "HOST:PORT")]
    tcp: Option<String>,
    /// Only these disks, each with its snapshots, or snapshots (default: all of the cluster)
    #[arg(value_name = "DISK")]
    names: Vec<String>,
    /// The same
    #[arg(long = "disk", value_name = "NAME")]
    disks: Vec<String>,
    /// Refuse writes; other readers may have the disk attached too
    #[arg(long)]
    read_only: bool,
    /// End the session of whoever has the disk attached
    #[arg(long)]
    take_over: bool,
}

/// Serves until a signal comes.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let place = place.clone();
    connect::block_on(async move {
        let connection = Connection::open(&place).await?;
        // A wrong name is an error now, not at the first client.
        let state = connection.state().await?;
        let only = [arguments.names, arguments.disks].concat();
        only.iter().try_for_each(|name| find(&state, name).map(drop))?;
        let exports = ClusterExports::new(connection, holder::of_process("petal nbd"))
            .only(only)
            .read_only(arguments.read_only)
            .take_over(arguments.take_over);
        let mut front = Front::new(exports);
        if let Some(socket) = &arguments.socket {
            front.listen_unix(socket)?;
            println!("NBD on nbd+unix:///NAME?socket={}", socket.display());
        }
        if let Some(address) = &arguments.tcp {
            front.listen_tcp(address).await?;
            println!("NBD on nbd://{address}/NAME");
        }
        front.serve_until(connect::stop_signal()).await
    })
}

/// An NBD server on its sockets.
pub struct Front {
    server: Server<ClusterExports>,
    listeners: Vec<Listener>,
}

impl Front {
    /// Not listening yet.
    pub fn new(exports: ClusterExports) -> Front {
        Front { server: Server::new(exports, Config::default()), listeners: Vec::new() }
    }

    /// Adds a unix socket; a file that a dead server left is replaced.
    pub fn listen_unix(&mut self, path: &Path) -> Result<()> {
        let listener = Listener::bind_unix(path).with_context(|| format!("cannot serve NBD on {}", path.display()))?;
        self.listeners.push(listener);
        Ok(())
    }

    /// Adds a TCP address.
    pub async fn listen_tcp(&mut self, address: &str) -> Result<()> {
        let resolved = tokio::net::lookup_host(address).await.with_context(|| format!("'{address}' is no address"))?;
        let resolved = resolved.into_iter().next().with_context(|| format!("'{address}' leads nowhere"))?;
        let listener = Listener::bind_tcp(resolved).await.with_context(|| format!("cannot serve NBD on {address}"))?;
        self.listeners.push(listener);
        Ok(())
    }

    /// Serves until `stop` resolves; then lets requests finish, and detaches the disks.
    pub async fn serve_until(self, stop: impl Future<Output = Result<()>>) -> Result<()> {
        let mut serving = tokio::task::JoinSet::new();
        for listener in self.listeners {
            let server = self.server.clone();
            serving.spawn_local(async move { server.serve(listener).await });
        }
        let result = stop.await;
        self.server.shutdown().await;
        while serving.join_next().await.is_some() {}
        result
    }
}
