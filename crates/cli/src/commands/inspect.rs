//! `petal inspect`: what is on a server's disk, as the program reads it.

use super::verify::Findings;
use crate::disk_files;
use crate::output;
use anyhow::{Result, bail};
use serde_json::json;
use std::path::{Path, PathBuf};

/// `petal inspect`
#[derive(clap::Subcommand)]
#[command(after_help = "\
Examples:
  petal inspect superblock petal-data/s1/disk1
  petal inspect superblock /dev/sdb --json")]
pub enum Command {
    /// Whose disk it is, and where its regions are; the server may run
    Superblock {
        /// The disk
        disk: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Shows it.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Superblock { disk, json } => superblock(&disk, json),
    }
}

fn superblock(path: &Path, json: bool) -> Result<()> {
    let block = disk_files::read_superblock(path)?;
    let layout = &block.layout;
    let regions = [("journal", layout.journal), ("pmap", layout.pmap), ("data", layout.data)];
    if json {
        let region = |(name, r): &(&str, petal::store::layout::Region)| json!({"name": name, "offset": r.offset, "length": r.length});
        return output::print_json(&json!({
            "cluster": block.genesis.cluster.to_string(),
            "name": block.genesis.name,
            "server": block.server.to_string(),
            "incarnation": block.incarnation.0,
            "generation": block.generation,
            "disk": block.disk.to_string(),
            "disks": block.disks.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "ring": block.genesis.ring.iter().map(|m| json!({
                "server": m.server.to_string(), "addresses": m.addresses,
            })).collect::<Vec<_>>(),
            "size": layout.size,
            "regions": regions.iter().map(region).collect::<Vec<_>>(),
        }));
    }
    println!("cluster      {} ({})", block.genesis.name, block.genesis.cluster);
    for member in &block.genesis.ring {
        println!("first ring   {} at {}", member.server, member.addresses.join(", "));
    }
    println!("server       {}, incarnation {}", block.server, block.incarnation.0);
    println!("disk         {}", block.disk);
    for disk in block.disks.iter().filter(|d| **d != block.disk) {
        println!("with         {disk}");
    }
    println!("size         {}", output::size(layout.size));
    for (name, region) in regions {
        println!("{name:<12} {} at byte {}", output::size(region.length), region.offset);
    }
    println!("generation   {}", block.generation);
    Ok(())
}

/// Checks the disks of a stopped server by themselves.
pub fn verify_disks(disks: &[PathBuf]) -> Result<Findings> {
    let _ = disks;
    bail!("verifying a stopped server's disks is not built yet")
}
