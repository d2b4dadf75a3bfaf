//! `petal verify`: do replicas agree (I2), and does every block match its checksum?
//!
//! Online every server reads all its blocks, part by part, while I/O goes on, and tells a digest of each
//! element; here the digests of the replicas are compared. An element that is just being written can
//! differ for a moment, so what differs is looked at again before it is a complaint. Offline the disks of
//! one stopped server are read by themselves: `inspect.rs` has the code for that.

use super::inspect;
use crate::connect::{self, Connection};
use crate::output;
use crate::place::Place;
use anyhow::{Result, bail};
use petal::global_state::State;
use petal::ids::{ElementKey, FamilyId, ServerId};
use petal::message::VerifyPart;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

/// `petal verify`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal verify                     every server reads its blocks; the copies are compared
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
    let away = connection.away(&state, Duration::from_secs(3)).await;
    if !away.is_empty() {
        let away = away.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ");
        bail!("{away} does not answer, and all copies are compared: start it first (`petal status`)");
    }
    let mut findings = Findings::default();
    let mut after = None;
    loop {
        let mut parts = BTreeMap::new();
        for (server, _) in state.servers.iter().filter(|(_, s)| s.incarnation.0 > 0) {
            parts.insert(*server, connection.verify(*server, after).await?);
        }
        // Every server has told all its elements up to here.
        let bound = parts.values().filter_map(|p| p.next).min();
        let suspects = differing(&state, &parts, after, bound);
        for (server, part) in parts {
            findings.add(&server.to_string(), within(part, bound));
        }
        for element in suspects {
            findings.complaints.extend(look_again(&connection, &state, element).await?);
        }
        after = bound;
        if after.is_none() {
            return Ok(findings);
        }
    }
}

/// Without what the next parts will tell again.
fn within(mut part: VerifyPart, bound: Option<ElementKey>) -> VerifyPart {
    if let Some(bound) = bound {
        let beyond = part.digests.iter().filter(|(key, _)| *key > bound).count() as u64;
        part.elements -= beyond;
    }
    part
}

/// Elements after `after`, up to `bound`, that the in-sync replicas do not all tell alike.
fn differing(
    state: &State,
    parts: &BTreeMap<ServerId, VerifyPart>,
    after: Option<ElementKey>,
    bound: Option<ElementKey>,
) -> BTreeSet<ElementKey> {
    let mut told: BTreeMap<ElementKey, BTreeMap<ServerId, u32>> = BTreeMap::new();
    for (server, part) in parts {
        for (key, digest) in part.digests.iter().filter(|(key, _)| bound.is_none_or(|b| *key <= b)) {
            told.entry(*key).or_default().insert(*server, *digest);
        }
    }
    let differs = |(key, digests): &(&ElementKey, &BTreeMap<ServerId, u32>)| {
        let slot = state.slot_of(key.family, key.element).and_then(|id| state.slot(id));
        let expected: BTreeSet<ServerId> = slot.into_iter().flat_map(|s| s.in_sync()).collect();
        let first = digests.values().next();
        after.is_none_or(|a| **key > a)
            && !expected.is_empty()
            && !expected.iter().all(|s| digests.get(s).is_some_and(|d| Some(d) == first))
    };
    told.iter().filter(differs).map(|(key, _)| *key).collect()
}

/// Compares one element some more times: under load it differs for a moment.
async fn look_again(connection: &Connection, state: &State, element: ElementKey) -> Result<Option<String>> {
    let before = element.element.checked_sub(1).map(|e| ElementKey { family: element.family, element: e });
    let before = before.or(Some(ElementKey { family: FamilyId(element.family.0 - 1), element: u64::MAX }));
    for _ in 0..LOOKS {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut parts = BTreeMap::new();
        for server in state.servers.keys() {
            parts.insert(*server, connection.verify(*server, before).await?);
        }
        if !differing(state, &parts, before, Some(element)).contains(&element) {
            return Ok(None);
        }
    }
    Ok(Some(format!("element {} of {} is not the same on all its replicas", element.element, element.family)))
}

/// How often an element may differ before it is a complaint.
const LOOKS: usize = 10;
