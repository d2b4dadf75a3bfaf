//! Whose space it is: what a family's disks and snapshots use, and what comes back when some of them go (2.9).
//!
//! Answered from the rows of elements alone, by the acting primary of each slot for its own elements
//! (`data_access/map.rs`), a page at a time.
//!
//! *Who keeps a row.* Every disk and every snapshot stands at one epoch of its lineage, and so does every lineage
//! that branched off. A row `(lineage, epoch)` is kept by those who stand from its epoch on and before the next row
//! of its lineage; a branch stands for all who stand on it or on its own branches. That is `Visible` with the names
//! still on it: a row is kept after a deletion if somebody keeps it who was not deleted.
//!
//! ```text
//!  lineage l1   rows:      e1 ........... e4 ..........
//!               standing:     ^a   ^l2         ^disk        l2: the clone and its snapshots
//!               kept by:   a, clone, ...  disk
//! ```
//!
//! An address comes back when nobody is left who keeps one of the rows that refer to it. Rows that nobody keeps any
//! more, and that wait to be dropped, count for nobody.
//!
//! Numbers are of blocks, and of one copy. Next: `translator/visible.rs`.

use crate::ids::*;
use crate::store::element::{Address, NOWHERE, Row};
use crate::translator::vdir::{Family, Vdisk};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Rows of one page, and no further element: each row costs the sorting of 16 addresses, so a page takes some
/// milliseconds.
const PAGE_ROWS: usize = 4096;

/// A question about the space of a family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceQuestion {
    /// Who knows less of the state does not answer.
    pub at: StateIndex,
    /// The family.
    pub family: FamilyId,
    /// First element asked for.
    pub first_element: u64,
    /// What is thought of as deleted, ascending.
    pub going: Vec<VdiskId>,
}

/// What elements of a family use, in the slots in which the sender acts.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SpacePart {
    /// What was looked at.
    pub elements: u64,
    /// Blocks that somebody keeps.
    pub used: u64,
    /// Of these, blocks that come back with what is thought of as deleted.
    pub back: u64,
    /// For each disk and snapshot that has any, ascending: blocks that it shows, and blocks that would come back if
    /// it alone were deleted.
    pub members: Vec<(VdiskId, u64, u64)>,
    /// Ask again from here; `None`: that was all.
    pub next: Option<u64>,
    /// Slots for which the sender cannot answer (it does not act in them, or not yet), ascending.
    pub not_here: Vec<u32>,
}

/// Position in [`Accounts::members`].
type MemberIndex = usize;

/// Somebody who stands at an epoch of a lineage, or a branch with all who stand on it.
#[derive(Clone, Copy, Debug, Default)]
struct Stand {
    epoch: Epoch,
    holders: Holders,
}

/// Who keeps something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Holders {
    #[default]
    Nobody,
    /// One alone.
    One(MemberIndex),
    /// Several, all of which are thought of as deleted, or not all.
    Many { all_go: bool },
}

/// A lineage, as far as accounts need it.
#[derive(Debug, Default)]
struct Line {
    id: LineageId,
    /// Position of its parent, and where it branched off.
    parent: Option<(usize, Epoch)>,
    /// Ascending by epoch.
    stands: Vec<Stand>,
    /// Its snapshots: position of the first, epochs. They follow each other in `members`.
    first: MemberIndex,
    snapshots: Vec<Epoch>,
    /// The disk that writes it, and which epoch now.
    disk: Option<(MemberIndex, Epoch)>,
}

/// Adds up the elements of a page.
#[derive(Debug)]
pub struct Accounts {
    /// Ascending by id, so that parents come before their children.
    lines: Vec<Line>,
    next_lineage: LineageId,
    /// Snapshots of the first lineage, of the second, ...; then disks.
    members: Vec<VdiskId>,
    goes: Vec<bool>,
    /// Blocks that a member shows more than the one before it does.
    shown: Vec<i64>,
    exclusive: Vec<u64>,
    /// Rows added.
    rows: usize,
    part: SpacePart,
}

impl Accounts {
    /// Of a family with these members, some of which are thought of as deleted.
    pub fn new<'a>(family: &Family, members: impl Iterator<Item = &'a Vdisk>, going: &[VdiskId]) -> Accounts {
        let going: BTreeSet<VdiskId> = going.iter().copied().collect();
        let mut snapshots: BTreeMap<(LineageId, Epoch), VdiskId> = BTreeMap::new();
        let mut disks: Vec<(LineageId, Epoch, VdiskId)> = Vec::new();
        for member in members {
            if member.is_snapshot() {
                snapshots.insert((member.lineage, member.epoch), member.id);
            } else {
                disks.push((member.lineage, member.epoch, member.id));
            }
        }
        let ids: Vec<LineageId> = family.lineages.keys().copied().collect();
        let place = |id: LineageId| ids.binary_search(&id).ok();
        let mut members: Vec<VdiskId> = snapshots.values().copied().collect();
        let mut lines = Vec::with_capacity(ids.len());
        let mut first = 0;
        for (id, lineage) in &family.lineages {
            let own = snapshots.range((*id, Epoch(0))..=(*id, Epoch(u32::MAX)));
            let snapshots: Vec<Epoch> = own.map(|((_, epoch), _)| *epoch).collect();
            let parent = lineage.parent.and_then(|(parent, epoch)| Some((place(parent)?, epoch)));
            let count = snapshots.len();
            lines.push(Line { id: *id, parent, first, snapshots, ..Line::default() });
            first += count;
        }
        for (lineage, epoch, id) in disks {
            if let Some(line) = place(lineage) {
                lines[line].disk = Some((members.len(), epoch));
                members.push(id);
            }
        }
        let goes = members.iter().map(|id| going.contains(id)).collect();
        let (shown, exclusive) = (vec![0; members.len() + 1], vec![0; members.len()]);
        let part = SpacePart::default();
        let next_lineage = family.next_lineage;
        let mut accounts = Accounts { lines, next_lineage, members, goes, shown, exclusive, rows: 0, part };
        accounts.stand();
        accounts
    }

    /// The page has as many rows as one may have.
    pub fn is_full(&self) -> bool {
        self.rows >= PAGE_ROWS
    }

    /// Who stands where. Children come behind their parents: from the last to the first, each knows its branches.
    fn stand(&mut self) {
        let mut on: Vec<Holders> = vec![Holders::Nobody; self.lines.len()];
        for at in (0..self.lines.len()).rev() {
            let line = &self.lines[at];
            let own = line.snapshots.iter().enumerate().map(|(n, epoch)| (*epoch, line.first + n));
            let own: Vec<Stand> = own
                .chain(line.disk.map(|(member, epoch)| (epoch, member)))
                .map(|(epoch, member)| Stand { epoch, holders: Holders::One(member) })
                .collect();
            let all = own.iter().chain(&line.stands).fold(on[at], |all, s| self.together(all, s.holders));
            on[at] = all;
            let line = &mut self.lines[at];
            line.stands.extend(own);
            line.stands.sort_by_key(|s| s.epoch);
            if let Some((parent, epoch)) = line.parent {
                self.lines[parent].stands.push(Stand { epoch, holders: all });
            }
        }
    }

    fn all_go(&self, holders: Holders) -> bool {
        match holders {
            Holders::Nobody => true,
            Holders::One(member) => self.goes[member],
            Holders::Many { all_go } => all_go,
        }
    }

    fn together(&self, a: Holders, b: Holders) -> Holders {
        match (a, b) {
            (Holders::Nobody, other) | (other, Holders::Nobody) => other,
            (Holders::One(a), Holders::One(b)) if a == b => Holders::One(a),
            (a, b) => Holders::Many { all_go: self.all_go(a) && self.all_go(b) },
        }
    }

    /// Who keeps a row, which holds until the next one of its lineage.
    fn holders(&self, row: &Row, until: Option<Epoch>) -> Holders {
        let Ok(at) = self.lines.binary_search_by_key(&row.lineage, |l| l.id) else {
            // A lineage that this server has not heard of is somebody's; one that it knew has ended.
            let is_new = row.lineage >= self.next_lineage;
            return if is_new { Holders::Many { all_go: false } } else { Holders::Nobody };
        };
        let line = &self.lines[at];
        let from = line.stands.partition_point(|s| s.epoch < row.epoch);
        let stands = line.stands[from..].iter().take_while(|s| until.is_none_or(|until| s.epoch < until));
        let mut all = Holders::Nobody;
        for stand in stands {
            all = self.together(all, stand.holders);
            // More can only be the same.
            if all == (Holders::Many { all_go: false }) {
                return all;
            }
        }
        // Epochs that this server has not heard of: the disk's, or of snapshots to come.
        match line.disk {
            Some((member, epoch)) if row.epoch > epoch => self.together(all, Holders::One(member)),
            _ => all,
        }
    }

    /// Adds an element. Rows ascend by (lineage, epoch).
    pub fn add(&mut self, rows: &[Row]) {
        self.part.elements += 1;
        self.rows += rows.len();
        self.add_shown(rows);
        let mut kept: Vec<(Address, Holders)> = Vec::new();
        for (n, row) in rows.iter().enumerate() {
            let until = rows.get(n + 1).filter(|next| next.lineage == row.lineage).map(|next| next.epoch);
            let holders = self.holders(row, until);
            if holders != Holders::Nobody {
                kept.extend(row.used().map(|address| (address, holders)));
            }
        }
        kept.sort_unstable_by_key(|(address, _)| *address);
        for same in kept.chunk_by(|a, b| a.0 == b.0) {
            let all = same.iter().fold(Holders::Nobody, |all, (_, holders)| self.together(all, *holders));
            self.part.used += 1;
            self.part.back += u64::from(self.all_go(all));
            if let Holders::One(member) = all {
                self.exclusive[member] += 1;
            }
        }
    }

    /// What each member shows: the newest row of its lineage that is not newer than itself, or what its lineage
    /// began with.
    fn add_shown(&mut self, rows: &[Row]) {
        let mut began: Vec<Option<&Row>> = vec![None; self.lines.len()];
        let mut rest = rows;
        for at in 0..self.lines.len() {
            let line = &self.lines[at];
            if let Some((parent, epoch)) = line.parent {
                let upto = rows.partition_point(|r| (r.lineage, r.epoch) <= (self.lines[parent].id, epoch));
                let own = rows[..upto].last().filter(|r| r.lineage == self.lines[parent].id);
                began[at] = own.or(began[parent]);
            }
            rest = &rest[rest.partition_point(|r| r.lineage < line.id)..];
            let own = &rest[..rest.partition_point(|r| r.lineage == line.id)];
            let mut shown = began[at];
            let mut from = 0;
            for row in own {
                let to = line.snapshots.partition_point(|epoch| *epoch < row.epoch);
                show(&mut self.shown, line.first + from..line.first + to, shown);
                (shown, from) = (Some(row), to);
            }
            show(&mut self.shown, line.first + from..line.first + line.snapshots.len(), shown);
            if let Some((disk, _)) = line.disk {
                show(&mut self.shown, disk..disk + 1, shown);
            }
        }
    }

    /// What was added up.
    pub fn part(self, next: Option<u64>, not_here: Vec<u32>) -> SpacePart {
        let mut shown = 0;
        let mut members: Vec<(VdiskId, u64, u64)> = Vec::new();
        for (member, id) in self.members.iter().enumerate() {
            shown += self.shown[member];
            if shown > 0 {
                members.push((*id, shown.unsigned_abs(), self.exclusive[member]));
            }
        }
        members.sort_unstable_by_key(|(id, ..)| *id);
        SpacePart { members, next, not_here, ..self.part }
    }
}

/// All of these members show the row.
fn show(shown: &mut [i64], members: std::ops::Range<MemberIndex>, row: Option<&Row>) {
    let blocks = row.map_or(0, |r| r.addresses.iter().filter(|a| **a != NOWHERE).count()) as i64;
    if blocks > 0 && !members.is_empty() {
        shown[members.start] += blocks;
        shown[members.end] -= blocks;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data_access::view_of;
    use crate::global_state::{Command, Entry, Fixture, Outcome, SnapshotOf, State};
    use crate::message::CommandId;
    use crate::store::element;
    use crate::translator::visible::Visible;
    use stdx::Prng;

    /// A family and some elements of it, written and snapshotted as a disk is; every address in it once.
    struct Written {
        f: Fixture,
        family: FamilyId,
        elements: Vec<element::Entry>,
        next: Address,
        number: u32,
    }

    impl Written {
        fn new(elements: usize) -> Written {
            let mut f = Fixture::up(3);
            let disk = f.disk("disk");
            let family = f.state.vdisk(disk).unwrap().family;
            Written { f, family, elements: vec![element::Entry::absent(); elements], next: 0, number: 0 }
        }

        fn members(&self, snapshots: bool) -> Vec<Vdisk> {
            self.f.state.members(self.family).filter(|v| v.is_snapshot() == snapshots).cloned().collect()
        }

        /// As a replica does it: on the row of the disk's epoch, made from what it inherits.
        fn write(&mut self, disk: &Vdisk, element: usize, block: usize) {
            let parents: Vec<_> = self.f.state.family(self.family).unwrap().ancestors(disk.lineage).collect();
            let row = self.elements[element].row_to_write(disk.lineage, disk.epoch, &parents);
            row.addresses[block] = self.next;
            self.next += 1;
        }

        fn discard(&mut self, disk: &Vdisk, element: usize, block: usize) {
            let parents: Vec<_> = self.f.state.family(self.family).unwrap().ancestors(disk.lineage).collect();
            self.elements[element].row_to_write(disk.lineage, disk.epoch, &parents).addresses[block] = NOWHERE;
        }

        fn snapshot(&mut self, disk: &Vdisk) -> VdiskId {
            self.number += 1;
            let of = vec![SnapshotOf { vdisk: disk.id, epoch: disk.epoch, name: format!("s{}", self.number) }];
            match self.f.run(Command::Snapshot { of, made: 0, protected: false }) {
                Ok(Outcome::Disks(ids)) => ids[0],
                other => panic!("{other:?}"),
            }
        }

        fn clone_of(&mut self, source: &Vdisk) -> VdiskId {
            self.number += 1;
            let (source, epoch, name) = (source.id, source.epoch, format!("c{}", self.number));
            match self.f.run(Command::Clone { source, epoch, name, made: 0 }) {
                Ok(Outcome::Disk(id)) => id,
                other => panic!("{other:?}"),
            }
        }

        /// One step of a random life.
        fn step(&mut self, prng: &mut Prng) {
            let (disks, snapshots) = (self.members(false), self.members(true));
            let disk = disks[prng.below(disks.len() as u64) as usize].clone();
            let snapshot =
                (!snapshots.is_empty()).then(|| snapshots[prng.below(snapshots.len() as u64) as usize].clone());
            match (prng.below(20), snapshot) {
                (0..=9, _) => {
                    let element = prng.below(self.elements.len() as u64) as usize;
                    self.write(&disk, element, prng.below(4) as usize);
                }
                (10, _) => {
                    let element = prng.below(self.elements.len() as u64) as usize;
                    self.discard(&disk, element, prng.below(4) as usize);
                }
                (11..=14, _) | (_, None) => drop(self.snapshot(&disk)),
                (15, Some(_)) => drop(self.clone_of(&disk)),
                (16, Some(snapshot)) => drop(self.clone_of(&snapshot)),
                (17, Some(snapshot)) => {
                    let disk = self.f.state.vdisk(snapshot.snapshot_of.unwrap()).unwrap().clone();
                    self.number += 1;
                    let keep = prng.chance(1, 2).then(|| format!("k{}", self.number));
                    let (vdisk, epoch, to) = (disk.id, disk.epoch, snapshot.id);
                    self.f.run(Command::Rollback { vdisk, epoch, to, keep, made: 0 }).unwrap();
                }
                (18, Some(snapshot)) => {
                    self.f.run(Command::DeleteDisks { vdisks: vec![snapshot.id] }).unwrap();
                }
                _ => {
                    // With all its snapshots, unless it is the last one.
                    let going: Vec<VdiskId> =
                        std::iter::once(disk.id).chain(self.f.state.snapshots_of(&disk).map(|s| s.id)).collect();
                    if disks.len() > 1 {
                        self.f.run(Command::DeleteDisks { vdisks: going }).unwrap();
                    }
                }
            }
        }

        fn part(&self, going: &[VdiskId]) -> SpacePart {
            let family = self.f.state.family(self.family).unwrap();
            let mut accounts = Accounts::new(family, self.f.state.members(self.family), going);
            self.elements.iter().for_each(|e| accounts.add(&e.rows));
            accounts.part(None, Vec::new())
        }

        /// Addresses that are kept in a state: what reclaim leaves.
        fn left(&self, state: &State) -> u64 {
            let Some(visible) = state.visible(self.family) else { return 0 };
            self.elements.iter().map(|e| kept(visible, e)).sum()
        }

        /// How much comes back when these are deleted, or `None` if that may not be done.
        fn deleted(&self, going: &[VdiskId]) -> Option<u64> {
            let mut state = self.f.state.clone();
            let id = CommandId { proposer: 8, number: 1, finished_below: 1 };
            state.apply(&Entry { id, command: Command::DeleteDisks { vdisks: going.to_vec() } }).0.ok()?;
            Some(self.left(&self.f.state) - self.left(&state))
        }
    }

    fn kept(visible: &Visible, entry: &element::Entry) -> u64 {
        let kept = visible.kept(entry.rows.iter().map(|r| (r.lineage, r.epoch)));
        let rows = entry.rows.iter().zip(kept).filter(|(_, kept)| *kept);
        rows.flat_map(|(r, _)| r.used()).collect::<BTreeSet<Address>>().len() as u64
    }

    fn of(part: &SpacePart, id: VdiskId) -> (u64, u64) {
        part.members.iter().find(|(m, ..)| *m == id).map_or((0, 0), |(_, shown, exclusive)| (*shown, *exclusive))
    }

    #[test]
    fn what_a_snapshot_shares_with_its_disk_comes_back_with_neither_alone() {
        let mut w = Written::new(1);
        let disk = w.members(false)[0].clone();
        w.write(&disk, 0, 0);
        w.write(&disk, 0, 1);
        let snapshot = w.snapshot(&disk);
        let disk = w.members(false)[0].clone();
        w.write(&disk, 0, 1);
        let part = w.part(&[snapshot]);
        assert_eq!((part.used, part.back, part.elements), (3, 1, 1));
        assert_eq!((of(&part, disk.id), of(&part, snapshot)), ((2, 1), (2, 1)));
        assert_eq!(w.part(&[snapshot, disk.id]).back, 3);
    }

    #[test]
    fn what_two_snapshots_share_comes_back_with_both() {
        let mut w = Written::new(1);
        let disk = w.members(false)[0].clone();
        w.write(&disk, 0, 0);
        let a = w.snapshot(&disk);
        let b = w.snapshot(&w.members(false)[0].clone());
        w.write(&w.members(false)[0].clone(), 0, 0);
        assert_eq!(w.part(&[a]).back, 0);
        assert_eq!(w.part(&[b]).back, 0);
        assert_eq!(w.part(&[a, b]).back, 1);
        assert_eq!((of(&w.part(&[]), a), of(&w.part(&[]), b)), ((1, 0), (1, 0)));
    }

    #[test]
    fn a_clone_keeps_what_it_inherits() {
        let mut w = Written::new(1);
        let disk = w.members(false)[0].clone();
        w.write(&disk, 0, 0);
        let snapshot = w.snapshot(&disk);
        let snapshot = w.f.state.vdisk(snapshot).unwrap().clone();
        let clone = w.clone_of(&snapshot);
        assert_eq!(w.part(&[disk.id, snapshot.id]).back, 0);
        assert_eq!(w.part(&[disk.id, snapshot.id, clone]).back, 1);
        assert_eq!(of(&w.part(&[]), clone), (1, 0));
    }

    /// The same as deleting literally, for every member alone and for random sets; and what a member shows is what a
    /// read of it finds.
    #[test]
    fn accounts_are_what_deleting_gives_back() {
        let (mut sets, mut given_back) = (0, 0);
        for seed in 0..150 {
            let mut prng = Prng::new(seed);
            let mut w = Written::new(3);
            for _ in 0..40 + prng.below(60) {
                w.step(&mut prng);
            }
            let part = w.part(&[]);
            assert_eq!(part.used, w.left(&w.f.state), "seed {seed}");
            let all: Vec<VdiskId> = w.f.state.members(w.family).map(|v| v.id).collect();
            for id in &all {
                let view = view_of(&w.f.state, *id);
                let rows = w.elements.iter().filter_map(|e| e.row_in_view(&view));
                let (shown, exclusive) = of(&part, *id);
                assert_eq!(shown, rows.map(|r| r.used().count() as u64).sum::<u64>(), "seed {seed}, {id}");
                if let Some(back) = w.deleted(&[*id]) {
                    assert_eq!(exclusive, back, "seed {seed}, {id} alone");
                }
            }
            for _ in 0..20 {
                let most = 1 + prng.below(9);
                let mut going: BTreeSet<VdiskId> = all.iter().copied().filter(|_| prng.chance(most, 10)).collect();
                // A disk goes with its snapshots.
                for id in going.clone() {
                    going.extend(w.f.state.snapshots_of(w.f.state.vdisk(id).unwrap()).map(|s| s.id));
                }
                let going: Vec<VdiskId> = going.into_iter().collect();
                let Some(back) = w.deleted(&going) else { continue };
                assert_eq!(w.part(&going).back, back, "seed {seed}, {going:?}");
                sets += 1;
                given_back += u64::from(back > 0);
            }
        }
        assert!(sets > 1000 && given_back > 500, "{sets} sets, {given_back} of which gave something back");
    }

    #[test]
    fn a_page_ends_when_it_has_many_rows() {
        let w = Written::new(1);
        let mut accounts = Accounts::new(w.f.state.family(w.family).unwrap(), w.f.state.members(w.family), &[]);
        let row = Row::zeros(LineageId(1), Epoch(1));
        for _ in 0..PAGE_ROWS {
            assert!(!accounts.is_full());
            accounts.add(std::slice::from_ref(&row));
        }
        assert!(accounts.is_full());
    }

    #[test]
    fn rows_of_epochs_and_lineages_that_the_state_has_not_heard_of_are_the_disks_or_somebodys() {
        let mut w = Written::new(1);
        let disk = w.members(false)[0].clone();
        w.write(&Vdisk { epoch: Epoch(5), ..disk.clone() }, 0, 0);
        w.write(&Vdisk { epoch: Epoch(7), ..disk.clone() }, 0, 0);
        assert_eq!((w.part(&[disk.id]).used, w.part(&[disk.id]).back), (2, 2));
        let row = w.elements[0].row_to_write(LineageId(9), Epoch(1), &[]);
        row.addresses[3] = 77;
        assert_eq!((w.part(&[disk.id]).used, w.part(&[disk.id]).back), (3, 2));
    }
}
