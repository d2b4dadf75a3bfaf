//! `petal init`: a real deployment's first machine.

use crate::disk_files;
use crate::output;
use crate::server_config::ServerConfig;
use anyhow::{Context, Result, bail, ensure};
use petal::global_state::{Genesis, GenesisServer};
use petal::ids::{ClusterId, ServerId};
use petal::store::layout::DISK_SIZE_MIN;
use serde_json::json;
use std::path::{Path, PathBuf};

/// What a token begins with; the number is its format's.
const TOKEN_PREFIX: &str = "petal1-";

/// `petal init`
#[derive(clap::Args)]
#[command(after_help = "\
Example: three machines, each with one disk. On the first:
  petal init --name lab --ring 10.0.0.1:7000,10.0.0.2:7000,10.0.0.3:7000 \\
      --disk /dev/sdb --config /etc/petal/server.toml
  petal server --config /etc/petal/server.toml
and on the others what `init` prints:
  petal join TOKEN --listen 10.0.0.2:7000 --disk /dev/sdb --config /etc/petal/server.toml
  petal server --config /etc/petal/server.toml

The ring (1 or 3 servers) decides about everything that all servers must agree on. The first address
is this machine's.")]
pub struct Arguments {
    /// The cluster's name
    #[arg(long, default_value = "petal")]
    name: String,
    /// Addresses of the ring's 1 or 3 servers, HOST:PORT; this machine's first
    #[arg(long, value_delimiter = ',', required = true, value_name = "ADDRESSES")]
    ring: Vec<String>,
    #[command(flatten)]
    own: OwnServer,
}

/// This machine's server, for `init` and `join`.
#[derive(clap::Args)]
pub struct OwnServer {
    /// A disk of this machine: a block device, or a file that will be made
    #[arg(long = "disk", required = true, value_name = "PATH")]
    pub disks: Vec<PathBuf>,
    /// Size of each disk file; block devices are used whole
    #[arg(long, value_parser = output::parse_size)]
    pub disk_size: Option<u64>,
    /// This server only votes in the ring, as the third beside two machines with data; a file of 128 MiB will do
    #[arg(long)]
    pub witness: bool,
    /// Where to write the server's config file
    #[arg(long, default_value = "server.toml", value_name = "FILE")]
    pub config: PathBuf,
    /// Format disks that hold data
    #[arg(long)]
    pub force: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Makes the cluster.
pub fn run(arguments: Arguments) -> Result<()> {
    let ring = &arguments.ring;
    ensure!(
        matches!(ring.len(), 1 | 3),
        "a ring has 1 or 3 servers at first, not {}; the others join later",
        ring.len()
    );
    let mut sorted = ring.clone();
    sorted.sort();
    sorted.dedup();
    ensure!(sorted.len() == ring.len(), "an address appears twice in --ring");
    let member = |(n, address): (usize, &String)| GenesisServer {
        server: ServerId(n as u16 + 1),
        addresses: vec![address.clone()],
    };
    let genesis = Genesis {
        cluster: ClusterId(disk_files::random()?),
        name: arguments.name.clone(),
        ring: ring.iter().enumerate().map(member).collect(),
    };
    let token = token(&genesis)?;
    let config = prepare(&arguments.own, &genesis, ServerId(1), &ring[0])?;
    if arguments.own.json {
        let cluster = genesis.cluster.to_string();
        return output::print_json(&json!({"cluster": cluster, "server": "s1", "token": token, "config": config}));
    }
    println!("Cluster {} ({}); this is server s1.", genesis.name, genesis.cluster);
    println!("\nStart it:\n  petal server --config {}", config.display());
    for member in &genesis.ring[1..] {
        println!("\nOn the machine at {}:", member.addresses[0]);
        println!("  petal join {token} --listen {} --disk DISK --config server.toml", member.addresses[0]);
    }
    println!("\nMore machines later, with an address of their own:\n  petal join {token} --listen ADDRESS --disk DISK");
    println!("\nThe token lets whoever has it join; keep it to yourself.");
    Ok(())
}

/// Formats this machine's disks and writes its config file.
pub fn prepare(own: &OwnServer, genesis: &Genesis, server: ServerId, address: &str) -> Result<PathBuf> {
    let config_path = std::path::absolute(&own.config)?;
    ensure!(!config_path.exists(), "{} exists already; name another with --config", config_path.display());
    let absolute = |path: &PathBuf| std::path::absolute(path).with_context(|| format!("{} is no path", path.display()));
    let disks: Vec<PathBuf> = own.disks.iter().map(absolute).collect::<Result<_>>()?;
    let size = own.disk_size.or(own.witness.then_some(DISK_SIZE_MIN));
    disk_files::format(&disks, size, genesis, server, own.force)?;
    let cluster = Some(genesis.cluster.to_string());
    let config = ServerConfig {
        server: Some(server.0),
        cluster,
        listen: vec![address.into()],
        disks,
        witness: own.witness,
        ..ServerConfig::default()
    };
    std::fs::create_dir_all(config_path.parent().unwrap_or(Path::new(".")))?;
    config.write(&config_path)?;
    Ok(config_path)
}

/// The join token: the cluster's genesis in hexadecimal digits, with a checksum against half a copy.
pub fn token(genesis: &Genesis) -> Result<String> {
    let mut bytes = postcard::to_stdvec(genesis)?;
    bytes.extend(stdx::checksum::crc32c(&bytes).to_le_bytes());
    Ok(bytes.iter().fold(TOKEN_PREFIX.to_string(), |text, byte| format!("{text}{byte:02x}")))
}

/// Reads a join token.
pub fn read_token(token: &str) -> Result<Genesis> {
    let wrong = || "this is not a join token, or only a part of one; copy it as a whole from what `petal init` printed";
    let Some(digits) = token.trim().strip_prefix(TOKEN_PREFIX) else { bail!(wrong()) };
    let pairs: Option<Vec<&str>> = (0..digits.len()).step_by(2).map(|i| digits.get(i..i + 2)).collect();
    let bytes = pairs.and_then(|p| p.iter().map(|d| u8::from_str_radix(d, 16).ok()).collect::<Option<Vec<u8>>>());
    let Some((bytes, sum)) = bytes.as_deref().and_then(|b| b.split_last_chunk::<4>()) else { bail!(wrong()) };
    ensure!(stdx::checksum::crc32c(bytes) == u32::from_le_bytes(*sum), wrong());
    postcard::from_bytes(bytes).context(wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_as_it_was_made_and_half_of_one_is_refused() {
        let ring = vec![GenesisServer { server: ServerId(1), addresses: vec!["10.0.0.1:7000".into()] }];
        let genesis = Genesis { cluster: ClusterId(77), name: "lab".into(), ring };
        let token = token(&genesis).unwrap();
        assert_eq!(read_token(&format!(" {token}\n")).unwrap(), genesis);
        for part in ["", "petal1-", "petal1-zz", "ä", &token[..token.len() - 2], &token[..token.len() - 1]] {
            assert!(read_token(part).unwrap_err().to_string().contains("join token"), "{part}");
        }
    }
}
