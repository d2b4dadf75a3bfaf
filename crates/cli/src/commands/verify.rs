//! `petal verify`: do replicas agree (I2), does every block match its checksum, and is what counts as used what the
//! elements store (I8)?
//!
//! Online every server reads all its blocks, part by part, while I/O goes on, and tells a digest of each
//! element; here the digests of the replicas are compared. An element that is just being written can
//! differ for a moment, so what differs is looked at again before it is a complaint. Offline the disks of
//! stopped servers are read by `offline.rs`.

use super::inspect;
use crate::connect::{self, Connection};
use crate::offline::Offline;
use crate::output;
use crate::place::Place;
use anyhow::{Result, bail};
use petal::global_state::State;
use petal::ids::{ElementKey, FamilyId, ServerId, Version};
use petal::message::{Books, VerifyPart};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::time::Duration;

/// `petal verify`
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  petal verify                     every server reads its blocks; the copies are compared
  petal verify --offline s1        the disks of s1, which must be stopped
  petal verify --offline all       the disks of all servers, all stopped: the copies are compared too
  petal verify --disk /dev/sdb     the same for disks named by path (all disks of the server)

Exit code 1 if anything is wrong; each finding is one line.")]
pub struct Arguments {
    /// The disks of this server of the folder, or of all, which must be stopped
    #[arg(long, value_name = "SERVER|all", conflicts_with = "disks")]
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
        Some(all) if all == "all" => offline_all(place)?,
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

/// Every server of a folder by itself, and then their copies beside each other (I2).
fn offline_all(place: &Place) -> Result<Findings> {
    let folder = place.folder()?;
    let file = folder.read()?;
    let servers: Vec<Vec<PathBuf>> = file.servers.iter().map(|entry| folder.disks(&file, entry.server())).collect();
    connect::block_on(async move {
        let (mut findings, mut walks) = (Findings::default(), Vec::new());
        for disks in &servers {
            let mut offline = Offline::open(disks).await?;
            let server = offline.disks[0].superblock.server;
            findings.add(&server.to_string(), offline.verify().await?);
            walks.push(OfflineWalk { server, offline, told: VecDeque::new(), last: None, ended: false });
        }
        findings.complaints.extend(compare_offline(&mut walks).await?);
        Ok(findings)
    })
}

/// How far a stopped server has told its elements, in order of their keys.
struct OfflineWalk {
    server: ServerId,
    offline: Offline,
    told: VecDeque<(ElementKey, Version, u32)>,
    last: Option<ElementKey>,
    ended: bool,
}

/// In-sync copies differ only in elements that are newer than the watermark: those are made the same when the
/// servers start.
async fn compare_offline(walks: &mut [OfflineWalk]) -> Result<Vec<String>> {
    let states = walks.iter().map(|walk| walk.offline.state()).collect::<Result<Vec<_>>>()?;
    let Some(state) = states.into_iter().max_by_key(|state| state.index) else { return Ok(Vec::new()) };
    let mut complaints = Vec::new();
    loop {
        for walk in walks.iter_mut().filter(|walk| walk.told.is_empty() && !walk.ended) {
            walk.told.extend(walk.offline.tell(&state, walk.last).await?);
            walk.last = walk.told.back().map(|(key, ..)| *key).or(walk.last);
            walk.ended = walk.told.is_empty();
        }
        let Some(key) = walks.iter().filter_map(|walk| walk.told.front()).map(|(key, ..)| *key).min() else {
            return Ok(complaints);
        };
        let slot = state.slot_of(key.family, key.element);
        let in_sync: BTreeSet<ServerId> =
            slot.and_then(|id| state.slot(id)).into_iter().flat_map(|s| s.in_sync()).collect();
        let (mut copies, mut watermark) = (Vec::new(), Version::ZERO);
        for walk in walks.iter_mut() {
            let told = walk.told.pop_front_if(|(k, ..)| *k == key);
            if in_sync.contains(&walk.server) {
                copies.push(told.map(|(_, version, digest)| (version, digest)));
                watermark = watermark.max(slot.map_or(Version::ZERO, |slot| walk.offline.watermark(slot)));
            }
        }
        let newest = copies.iter().flatten().map(|(version, _)| *version).max();
        let differ = copies.iter().any(|copy| *copy != copies[0]);
        if differ && newest.is_some_and(|newest| newest <= watermark) {
            let ElementKey { family, element } = key;
            complaints.push(format!("element {element} of {family} is not the same on all its replicas"));
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
    let mut leaks = BTreeSet::new();
    let servers = state.servers.iter().filter(|(_, s)| s.incarnation.0 > 0).map(|(server, _)| *server);
    let mut walks: BTreeMap<ServerId, Walk> = servers.map(|server| (server, Walk::default())).collect();
    // Who is the furthest behind goes on, so that nobody tells much that cannot be compared yet.
    while let Some(behind) = walks.iter().filter(|(_, w)| !w.ended).min_by_key(|(_, w)| w.told).map(|(s, _)| *s) {
        let walk = walks.get_mut(&behind).expect("just chosen");
        let mut part = connection.verify(behind, walk.told).await?;
        walk.take(&mut part);
        if walk.ended && !walk.count.agrees() {
            leaks.insert(behind);
        }
        findings.add(&behind.to_string(), part);
        // By who is in sync now: slots may be moving.
        for element in differing(&connection.state().await?, &mut walks) {
            findings.complaints.extend(look_again(&connection, &state, element).await?);
        }
    }
    for server in leaks {
        findings.complaints.extend(count_again(&connection, server).await?);
    }
    Ok(findings)
}

/// Blocks that a server's elements store, beside those that its free maps count as used (I8).
#[derive(Default)]
struct Count {
    stored: u64,
    first: Option<Books>,
    last: Option<Books>,
    /// Something was written meanwhile: there is nothing to compare.
    moved: bool,
}

impl Count {
    fn take(&mut self, part: &VerifyPart) {
        self.stored += part.blocks;
        self.first = self.first.or(part.books);
        self.last = part.books;
        self.moved |= part.books.is_none() || part.books.map(|b| b.changes) != self.first.map(|b| b.changes);
    }

    fn agrees(&self) -> bool {
        self.moved || self.last.is_none_or(|books| books.used == self.stored)
    }
}

/// Counts the blocks of one server once more: what changed while its elements were listed differs once only.
async fn count_again(connection: &Connection, server: ServerId) -> Result<Option<String>> {
    let (mut count, mut after) = (Count::default(), None);
    loop {
        let part = connection.verify(server, after).await?;
        count.take(&part);
        after = part.next;
        if after.is_none() {
            break;
        }
    }
    let Some(books) = count.last.filter(|_| !count.agrees()) else { return Ok(None) };
    Ok(Some(format!("{server}: {} blocks count as used and its elements store {}", books.used, count.stored)))
}

/// How far a server has told its elements, and what it told that the others have not told yet.
#[derive(Default)]
struct Walk {
    told: Option<ElementKey>,
    ended: bool,
    count: Count,
    digests: BTreeMap<ElementKey, u32>,
}

impl Walk {
    fn take(&mut self, part: &mut VerifyPart) {
        self.count.take(part);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn part(blocks: u64, books: Option<(u64, u64)>) -> VerifyPart {
        let books = books.map(|(changes, used)| Books { changes, used });
        VerifyPart { blocks, books, ..VerifyPart::default() }
    }

    #[test]
    fn what_counts_as_used_is_compared_with_what_is_stored_while_nothing_changes() {
        let agrees = |parts: &[VerifyPart]| {
            let mut count = Count::default();
            parts.iter().for_each(|p| count.take(p));
            count.agrees()
        };
        assert!(agrees(&[part(3, Some((7, 5))), part(2, Some((7, 5)))]));
        assert!(!agrees(&[part(3, Some((7, 6))), part(2, Some((7, 6)))]), "a block belongs to nobody");
        assert!(!agrees(&[part(6, Some((7, 5)))]), "two elements share a block");
        assert!(agrees(&[part(3, Some((7, 5))), part(3, Some((8, 6)))]), "something was written meanwhile");
        assert!(agrees(&[part(3, None), part(3, Some((8, 9)))]), "an element was passed over");
    }
}
