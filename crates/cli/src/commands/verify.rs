//! `petal verify`: do replicas agree (I2), and does every block match its checksum?
//!
//! Online every server checks the slots in which it acts, part by part, while I/O goes on. Offline the
//! disks of one stopped server are read by themselves: `inspect.rs` has the code for that.

use super::inspect;
use crate::connect::{self, Connection};
use crate::output;
use crate::place::Place;
use anyhow::{Result, bail};
use petal::message::VerifyPart;
use serde_json::json;
use std::path::PathBuf;

/// `petal verify`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal verify                     every server compares its slots with the other copies
  petal verify --offline s1        the disks of s1, which must be stopped
  petal verify --disk /dev/sdb     the same for disks named by path (all disks of the server)

Exit code 1 if anything is wrong; each finding is one line.")]
pub struct Arguments {
    /// The disks of this server of the folder, which must be stopped
    #[arg(long, value_name = "SERVER", conflicts_with = "disks")]
    offline: Option<String>,
    /// Disks of one stopped server, all of them
    #[arg(long = "disk", value_name = "PATH")]
    disks: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was found.
#[derive(Default)]
pub struct Findings {
    /// Elements looked at.
    pub elements: u64,
    /// Blocks read and compared with their checksums.
    pub blocks: u64,
    /// One sentence each.
    pub complaints: Vec<String>,
}

impl Findings {
    /// Adds a part, with who found it.
    pub fn add(&mut self, who: &str, part: VerifyPart) {
        self.elements += part.elements;
        self.blocks += part.blocks;
        self.complaints.extend(part.complaints.into_iter().map(|c| format!("{who}: {c}")));
    }
}

/// Verifies.
pub fn run(place: &Place, arguments: Arguments) -> Result<()> {
    let findings = match &arguments.offline {
        Some(server) => inspect::verify_disks(&disks_of(place, server)?)?,
        None if !arguments.disks.is_empty() => inspect::verify_disks(&arguments.disks)?,
        None => {
            let place = place.clone();
            connect::block_on(async move { online(&place).await })?
        }
    };
    let Findings { elements, blocks, complaints } = &findings;
    if arguments.json {
        output::print_json(&json!({"elements": elements, "blocks": blocks, "complaints": complaints}))?;
    } else {
        complaints.iter().for_each(|c| println!("{c}"));
        println!("{elements} elements, {blocks} blocks, {} complaints", complaints.len());
    }
    if !complaints.is_empty() {
        bail!("verification found {} faults", complaints.len());
    }
    Ok(())
}

/// Disk files of a server of a folder.
fn disks_of(place: &Place, server: &str) -> Result<Vec<PathBuf>> {
    let folder = place.folder()?;
    let file = folder.read()?;
    match file.servers.iter().find(|s| s.server().to_string() == server) {
        Some(entry) => Ok(folder.disks(&file, entry.server())),
        None => {
            bail!("{} has no server '{server}'; its servers are s1 to s{}", folder.path().display(), file.servers.len())
        }
    }
}

async fn online(place: &Place) -> Result<Findings> {
    let connection = Connection::open(place).await?;
    let state = connection.state().await?;
    let connection = connection.to_all(&state).await?;
    let mut findings = Findings::default();
    for server in state.servers.keys() {
        let mut after = None;
        loop {
            let part = connection.verify(*server, after).await?;
            after = part.next;
            findings.add(&server.to_string(), part);
            if after.is_none() {
                break;
            }
        }
    }
    Ok(findings)
}
