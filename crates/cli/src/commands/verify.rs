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
    let servers = state.servers.iter().filter(|(_, s)| s.incarnation.0 > 0).map(|(server, _)| *server);
    let mut walks: BTreeMap<ServerId, Walk> = servers.map(|server| (server, Walk::default())).collect();
    // Who is the furthest behind goes on, so that nobody tells much that cannot be compared yet.
    while let Some(behind) = walks.iter().filter(|(_, w)| !w.ended).min_by_key(|(_, w)| w.told).map(|(s, _)| *s) {
        let walk = walks.get_mut(&behind).expect("just chosen");
        let mut part = connection.verify(behind, walk.told).await?;
        walk.take(&mut part);
        findings.add(&behind.to_string(), part);
        for element in differing(&state, &mut walks) {
            findings.complaints.extend(look_again(&connection, &state, element).await?);
        }
    }
    Ok(findings)
}

/// How far a server has told its elements, and what it told that the others have not told yet.
#[derive(Default)]
struct Walk {
    told: Option<ElementKey>,
    ended: bool,
    digests: BTreeMap<ElementKey, u32>,
}

impl Walk {
    fn take(&mut self, part: &mut VerifyPart) {
        self.digests.extend(part.digests.drain(..));
        self.told = part.next;
        self.ended = part.next.is_none();
    }
}

/// Elements that the in-sync replicas do not all tell alike, as far as every server has told them; those are not
/// looked at again.
fn differing(state: &State, walks: &mut BTreeMap<ServerId, Walk>) -> BTreeSet<ElementKey> {
    // As far as all have told; to the end, if all have ended.
    let bound = walks.values().filter(|w| !w.ended).map(|w| w.told).min();
    if bound == Some(None) {
        return BTreeSet::new();
    }
    let mut told: BTreeMap<ElementKey, BTreeMap<ServerId, u32>> = BTreeMap::new();
    for (server, walk) in walks {
        let beyond = match bound.flatten() {
            None => BTreeMap::new(),
            Some(bound) => walk.digests.split_off(&ElementKey { element: bound.element.saturating_add(1), ..bound }),
        };
        for (key, digest) in std::mem::replace(&mut walk.digests, beyond) {
            told.entry(key).or_default().insert(*server, digest);
        }
    }
    let differs = |(key, digests): &(&ElementKey, &BTreeMap<ServerId, u32>)| {
        let slot = state.slot_of(key.family, key.element).and_then(|id| state.slot(id));
        let expected: BTreeSet<ServerId> = slot.into_iter().flat_map(|s| s.in_sync()).collect();
        // Who is not in sync may have anything, or nothing.
        let mut told = expected.iter().map(|server| digests.get(server));
        let first = told.next().flatten();
        told.any(|digest| digest != first)
    };
    told.iter().filter(differs).map(|(key, _)| *key).collect()
}

/// Compares one element some more times: under load it differs for a moment.
async fn look_again(connection: &Connection, state: &State, element: ElementKey) -> Result<Option<String>> {
    let before = element.element.checked_sub(1).map(|e| ElementKey { family: element.family, element: e });
    let before = before.or(Some(ElementKey { family: FamilyId(element.family.0 - 1), element: u64::MAX }));
    for _ in 0..LOOKS {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut walks = BTreeMap::new();
        for (server, _) in state.servers.iter().filter(|(_, s)| s.incarnation.0 > 0) {
            let mut walk = Walk::default();
            walk.take(&mut connection.verify(*server, before).await?);
            walk.digests.retain(|key, _| *key == element);
            walk.ended = true;
            walks.insert(*server, walk);
        }
        // By who is in sync now.
        if differing(&connection.state().await?, &mut walks).is_empty() {
            return Ok(None);
        }
    }
    Ok(Some(format!("element {} of {} is not the same on all its replicas", element.element, element.family)))
}

/// How often an element may differ before it is a complaint.
const LOOKS: usize = 10;
