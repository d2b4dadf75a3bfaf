//! `petal join`: another machine of a real deployment.

use super::init::{self, OwnServer};
use crate::connect::{self, Connection};
use crate::disk_files;
use crate::output;
use crate::place::Place;
use anyhow::{Context, Result, bail};
use petal::global_state::{Command, Genesis, Outcome};
use petal::ids::ServerId;
use serde_json::json;

/// `petal join`
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  petal join petal1-0123... --listen 10.0.0.4:7000 --disk /dev/sdb --config /etc/petal/server.toml
  petal server --config /etc/petal/server.toml

A server whose address is one of the ring's becomes that member; the cluster need not run. Any other
is made known to the running cluster first.")]
pub struct Arguments {
    /// The token that `petal init` printed
    token: String,
    /// Address of this machine's server, HOST:PORT, as the others reach it
    #[arg(long, value_name = "ADDRESS")]
    listen: String,
    #[command(flatten)]
    own: OwnServer,
}

/// Prepares this machine.
pub fn run(arguments: Arguments) -> Result<()> {
    let genesis = init::read_token(&arguments.token)?;
    let member = genesis.ring.iter().find(|m| m.addresses.contains(&arguments.listen)).map(|m| m.server);
    let server = match member {
        Some(server) => server,
        None => make_known(&genesis, &arguments.listen)?,
    };
    let config = init::prepare(&arguments.own, &genesis, server, &arguments.listen)?;
    if arguments.own.json {
        return output::print_json(&json!({"server": server.to_string(), "ring": member.is_some(), "config": config}));
    }
    println!("This is server {server} of the cluster {}. Start it:", genesis.name);
    println!("  petal server --config {}", config.display());
    Ok(())
}

/// Asks the running cluster for a number.
fn make_known(genesis: &Genesis, address: &str) -> Result<ServerId> {
    let ring: Vec<String> = genesis.ring.iter().flat_map(|m| m.addresses.clone()).collect();
    let addresses = vec![address.to_string()];
    // The same token after a failure gives the same server.
    let token = disk_files::join_token(genesis.cluster, &addresses);
    let command = Command::AddServer { addresses, token };
    let what =
        format!("{address} is none of the ring's addresses ({}), so the cluster must run to take it", ring.join(", "));
    let outcome =
        connect::block_on(async move { Connection::open(&Place::Addresses(ring)).await?.execute(command).await });
    match outcome.context(what)? {
        Outcome::Server(server) => Ok(server),
        other => bail!("the cluster answered {other:?} to the new server"),
    }
}
