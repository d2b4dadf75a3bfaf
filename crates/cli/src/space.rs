//! Whose space it is, gathered from all servers: each answers for the slots in which it acts, a page at a time.
//!
//! The sum is right only if every slot was counted once, by one server from its first page to its last. Who acts may
//! change meanwhile; then everything is counted again.

use crate::connect::Connection;
use anyhow::{Result, bail};
use petal::global_state::State;
use petal::ids::{BLOCK_SIZE, FamilyId, ServerId, VdiskId};
use petal::space::SpaceQuestion;
use petal::translator::gmap::Scheme;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How often it is counted again before a person is told why that does not help.
const TRIES: u32 = 8;
/// The first pause in between, for a server that lags; each is twice as long, up to the longest: a new primary
/// serves after a lease and a settlement.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Bytes of a family, one copy of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FamilySpace {
    /// Kept by anybody.
    pub used: u64,
    /// What comes back with what is thought of as deleted.
    pub back: u64,
    /// For each disk and snapshot: what it shows, and what would come back if it alone were deleted.
    pub members: BTreeMap<VdiskId, (u64, u64)>,
    /// Copies of everything.
    pub copies: u64,
}

/// What one server has counted.
#[derive(Debug, Default)]
struct Share {
    space: FamilySpace,
    not_here: BTreeSet<u32>,
}

/// Counts, with a connection to every server.
pub struct Counting<'a> {
    connection: &'a Connection,
    all: Option<Connection>,
}

impl<'a> Counting<'a> {
    /// Connects when it is needed.
    pub fn new(connection: &'a Connection) -> Counting<'a> {
        Counting { connection, all: None }
    }

    /// Space of a family, and what comes back if these members of it are deleted.
    pub async fn family(&mut self, family: FamilyId, going: &BTreeSet<VdiskId>) -> Result<FamilySpace> {
        if going.len() > VdiskId::AT_ONCE_MAX {
            bail!("{} are too many at once; ask for {} at most", going.len(), VdiskId::AT_ONCE_MAX);
        }
        let mut why = String::new();
        for attempt in 0..TRIES {
            if attempt > 0 {
                // Servers may have other addresses by now.
                self.all = None;
                tokio::time::sleep((PAUSE_MIN * (1 << (attempt - 1))).min(PAUSE_MAX)).await;
            }
            match self.count(family, going).await? {
                Ok(space) => return Ok(space),
                Err(now) => why = now,
            }
        }
        bail!(
            "space can be counted only while every part of the data is served by one server: {why}; see `petal status`"
        )
    }

    /// One try; why it has to be tried again.
    async fn count(&mut self, family: FamilyId, going: &BTreeSet<VdiskId>) -> Result<Result<FamilySpace, String>> {
        let state = self.connection.state().await?;
        let Some(slots) = state.families.get(&family).and_then(|f| state.slots.get(&f.gmap)) else {
            return Ok(Ok(FamilySpace::default()));
        };
        let slots = slots.len() as u32;
        let all = match &mut self.all {
            Some(all) => all,
            none => none.insert(self.connection.to_all(&state).await?),
        };
        let mut asked = tokio::task::JoinSet::new();
        for server in state.servers_of_family(family) {
            if state.servers.get(&server).is_none_or(|s| s.down) {
                continue;
            }
            let going = going.iter().copied().collect();
            let question = SpaceQuestion { at: state.index, family, first_element: 0, going };
            let all = all.clone();
            asked.spawn_local(async move { (server, pages(&all, server, question).await) });
        }
        let (mut shares, mut why) = (BTreeMap::new(), None);
        while let Some(answer) = asked.join_next().await {
            match answer? {
                (server, Ok(Some(share))) => drop(shares.insert(server, share)),
                (server, Ok(None)) => why = Some(format!("{server} took over from others, or others from it")),
                (_, Err(error)) => why = Some(format!("{error:#}")),
            }
        }
        let missing = |missing| format!("{missing} of {slots} slots are served by nobody at present");
        let space = together(shares.values(), slots).map_err(|slots| why.unwrap_or_else(|| missing(slots)));
        Ok(space.map(|space| FamilySpace { copies: copies(&state, family), ..space }))
    }

    /// What comes back when these are deleted: bytes, and bytes with all copies.
    pub async fn given_back(&mut self, state: &State, going: &BTreeSet<VdiskId>) -> Result<(u64, u64)> {
        let mut families: BTreeMap<FamilyId, BTreeSet<VdiskId>> = BTreeMap::new();
        for disk in going.iter().filter_map(|id| state.vdisk(*id)) {
            families.entry(disk.family).or_default().insert(disk.id);
        }
        let (mut once, mut pool) = (0, 0);
        for (family, going) in families {
            let space = self.family(family, &going).await?;
            once += space.back;
            pool += space.back * space.copies;
        }
        Ok((once, pool))
    }

    /// Of all these families.
    pub async fn families(&mut self, families: BTreeSet<FamilyId>) -> Result<BTreeMap<FamilyId, FamilySpace>> {
        let mut all = BTreeMap::new();
        for family in families {
            all.insert(family, self.family(family, &BTreeSet::new()).await?);
        }
        Ok(all)
    }
}

/// All pages of one server; `None` if it did not act in the same slots for all of them.
async fn pages(connection: &Connection, server: ServerId, mut question: SpaceQuestion) -> Result<Option<Share>> {
    let mut share: Option<Share> = None;
    loop {
        let part = connection.space(server, question.clone()).await?;
        let not_here: BTreeSet<u32> = part.not_here.iter().copied().collect();
        let share = match &mut share {
            Some(share) if share.not_here != not_here => return Ok(None),
            Some(share) => share,
            None => share.insert(Share { not_here, ..Share::default() }),
        };
        let bytes = |blocks: u64| blocks.saturating_mul(BLOCK_SIZE);
        share.space.used += bytes(part.used);
        share.space.back += bytes(part.back);
        for (member, shown, exclusive) in part.members {
            let sum = share.space.members.entry(member).or_default();
            *sum = (sum.0 + bytes(shown), sum.1 + bytes(exclusive));
        }
        match part.next {
            Some(next) if next > question.first_element => question.first_element = next,
            _ => break,
        }
    }
    Ok(share)
}

/// The sum, if every slot was counted once; else how many were not.
fn together<'a>(shares: impl Iterator<Item = &'a Share>, slots: u32) -> Result<FamilySpace, usize> {
    let mut counted = vec![0; slots as usize];
    let mut sum = FamilySpace::default();
    for share in shares {
        for slot in (0..slots).filter(|slot| !share.not_here.contains(slot)) {
            counted[slot as usize] += 1;
        }
        sum.used += share.space.used;
        sum.back += share.space.back;
        for (member, (shown, exclusive)) in &share.space.members {
            let of = sum.members.entry(*member).or_default();
            *of = (of.0 + shown, of.1 + exclusive);
        }
    }
    match counted.iter().filter(|times| **times != 1).count() {
        0 => Ok(sum),
        wrong => Err(wrong),
    }
}

fn copies(state: &State, family: FamilyId) -> u64 {
    let scheme = state.families.get(&family).and_then(|f| state.gmaps.get(&f.gmap)).map(|g| g.scheme);
    scheme.map_or(1, Scheme::copies) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(not_here: &[u32], used: u64) -> Share {
        let members = BTreeMap::from([(VdiskId(1), (used, 1))]);
        let space = FamilySpace { used, back: 1, members, copies: 0 };
        Share { space, not_here: not_here.iter().copied().collect() }
    }

    #[test]
    fn shares_are_added_up_if_every_slot_was_counted_once() {
        let sum = together([share(&[0, 1], 10), share(&[2, 3], 20)].iter(), 4).unwrap();
        assert_eq!((sum.used, sum.back, sum.members[&VdiskId(1)]), (30, 2, (30, 2)));
        assert_eq!(together([share(&[0, 1], 10), share(&[1, 2, 3], 20)].iter(), 4), Err(1), "nobody had slot 1");
        assert_eq!(together([share(&[0], 10), share(&[2, 3], 20)].iter(), 4), Err(1), "two had slot 1");
        assert_eq!(together([].iter(), 4), Err(4));
    }
}
