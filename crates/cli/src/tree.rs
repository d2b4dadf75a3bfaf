//! Disks, their snapshots, and the clones under the snapshot that they came from.
//!
//! ```text
//!   vol0
//!     @monday
//!       copy          a clone of vol0@monday
//!         @before
//!     @tuesday
//! ```

use crate::output;
use crate::space::FamilySpace;
use petal::global_state::{State, split_name};
use petal::ids::{Epoch, FamilyId, LineageId, VdiskId};
use petal::translator::vdir::Vdisk;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Where a disk's content came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin<'a> {
    /// Nowhere: it began empty.
    None,
    /// A clone of this snapshot.
    Clone(&'a Vdisk),
    /// It went back to this snapshot of its own.
    RolledBack(&'a Vdisk),
    /// A clone of this disk as it was at a moment that has no name.
    CloneOfDisk(&'a Vdisk),
    /// What it came from has no name any more: its snapshot or its disk was deleted.
    Unnamed,
}

impl Origin<'_> {
    /// In a few words.
    pub fn words(&self) -> String {
        match self {
            Origin::None => String::new(),
            Origin::Clone(of) => format!("clone of {}", of.name),
            Origin::RolledBack(to) => format!("rolled back to @{}", short_name(to)),
            Origin::CloneOfDisk(of) => format!("clone of {} as it was", of.name),
            Origin::Unnamed => "began with a state whose name was deleted".into(),
        }
    }

    /// For programs.
    pub fn json(&self) -> Value {
        match self {
            Origin::None => Value::Null,
            Origin::Clone(of) => json!({"how": "clone", "of": of.name}),
            Origin::RolledBack(to) => json!({"how": "rollback", "of": to.name}),
            Origin::CloneOfDisk(of) => json!({"how": "clone", "of": of.name}),
            Origin::Unnamed => json!({"how": null, "of": null}),
        }
    }
}

/// A snapshot's name without that of its disk.
pub fn short_name(snapshot: &Vdisk) -> &str {
    split_name(&snapshot.name).1.unwrap_or(&snapshot.name)
}

/// What is where, for many questions about one state.
pub struct Tree<'a> {
    state: &'a State,
    by_epoch: BTreeMap<(FamilyId, LineageId, Epoch), &'a Vdisk>,
    snapshots: BTreeMap<VdiskId, Vec<&'a Vdisk>>,
    /// Clones of each snapshot.
    clones: BTreeMap<VdiskId, Vec<&'a Vdisk>>,
}

impl<'a> Tree<'a> {
    /// Of everything.
    pub fn new(state: &'a State) -> Tree<'a> {
        let (mut by_epoch, mut snapshots) = (BTreeMap::new(), BTreeMap::<VdiskId, Vec<&Vdisk>>::new());
        for disk in state.vdisks.values() {
            if let Some(of) = disk.snapshot_of {
                by_epoch.insert((disk.family, disk.lineage, disk.epoch), disk);
                snapshots.entry(of).or_default().push(disk);
            }
        }
        snapshots.values_mut().for_each(|all| all.sort_by_key(|s| (s.id.index(), s.id)));
        let mut tree = Tree { state, by_epoch, snapshots, clones: BTreeMap::new() };
        for disk in state.vdisks.values().filter(|d| !d.is_snapshot()) {
            if let Origin::Clone(of) = tree.origin(disk) {
                tree.clones.entry(of.id).or_default().push(disk);
            }
        }
        tree
    }

    /// Where a disk came from. Of a snapshot: nowhere, it is a state of its disk.
    pub fn origin(&self, disk: &Vdisk) -> Origin<'a> {
        let lineage = self.state.family(disk.family).and_then(|f| f.lineages.get(&disk.lineage));
        let Some((parent, epoch)) = lineage.and_then(|l| l.parent).filter(|_| !disk.is_snapshot()) else {
            return Origin::None;
        };
        match self.by_epoch.get(&(disk.family, parent, epoch)) {
            Some(from) if from.snapshot_of == Some(disk.id) => Origin::RolledBack(from),
            Some(from) => Origin::Clone(from),
            None => {
                let is_it = |d: &&Vdisk| !d.is_snapshot() && d.lineage == parent && d.id != disk.id;
                self.state.members(disk.family).find(is_it).map_or(Origin::Unnamed, Origin::CloneOfDisk)
            }
        }
    }

    /// Snapshots of a disk, the oldest first.
    pub fn snapshots(&self, disk: VdiskId) -> &[&'a Vdisk] {
        self.snapshots.get(&disk).map_or(&[], Vec::as_slice)
    }

    /// Clones of a snapshot that know it as their origin.
    pub fn clones(&self, snapshot: VdiskId) -> &[&'a Vdisk] {
        self.clones.get(&snapshot).map_or(&[], Vec::as_slice)
    }

    /// All, or what hangs on one disk or snapshot: how deep, and what.
    pub fn lines(&self, root: Option<&'a Vdisk>) -> Vec<(usize, &'a Vdisk)> {
        let (mut lines, mut seen) = (Vec::new(), BTreeSet::new());
        let is_root = |d: &&Vdisk| !d.is_snapshot() && !matches!(self.origin(d), Origin::Clone(_));
        match root {
            Some(root) => self.hang(root, 0, &mut lines, &mut seen),
            None => {
                self.state.vdisks.values().filter(is_root).for_each(|d| self.hang(d, 0, &mut lines, &mut seen));
                // None is left out.
                let disks = self.state.vdisks.values().filter(|d| !d.is_snapshot());
                disks.for_each(|d| self.hang(d, 0, &mut lines, &mut seen));
            }
        }
        lines
    }

    fn hang(&self, from: &'a Vdisk, depth: usize, lines: &mut Vec<(usize, &'a Vdisk)>, seen: &mut BTreeSet<VdiskId>) {
        // A stack of its own: clones of clones may be a thousand deep.
        let mut waiting = vec![(depth, from)];
        while let Some((depth, disk)) = waiting.pop() {
            if !seen.insert(disk.id) {
                continue;
            }
            lines.push((depth, disk));
            let below = if disk.is_snapshot() { self.clones(disk.id) } else { self.snapshots(disk.id) };
            waiting.extend(below.iter().rev().map(|d| (depth + 1, *d)));
        }
    }
}

/// The tree as a table for people.
pub fn print(state: &State, root: Option<&Vdisk>, space: Option<&BTreeMap<FamilyId, FamilySpace>>) {
    let tree = Tree::new(state);
    let lines = tree.lines(root);
    if lines.is_empty() {
        return println!("No disks; `petal disk create NAME SIZE` makes one.");
    }
    let mut header = vec!["disk, @snapshot", "size", "age"];
    header.extend(space.iter().flat_map(|_| ["used", "exclusive"]));
    header.push("");
    let mut table = output::table(&header);
    let now = output::unix_seconds();
    for (depth, disk) in lines {
        let name = if disk.is_snapshot() { format!("@{}", short_name(disk)) } else { disk.name.clone() };
        let age = if disk.made == 0 { "-".into() } else { output::duration(now.saturating_sub(disk.made)) };
        let mut row = vec![format!("{}{name}", "  ".repeat(depth)), output::size(disk.size), age];
        if let Some(space) = space {
            let (used, exclusive) = of(space, disk);
            row.extend([output::size(used), output::size(exclusive)]);
        }
        row.push(notes(state, &tree, disk));
        table.add_row(row);
    }
    output::right(&mut table, if space.is_some() { &[1, 2, 3, 4] } else { &[1, 2] });
    output::print_table(&table);
}

fn of(space: &BTreeMap<FamilyId, FamilySpace>, disk: &Vdisk) -> (u64, u64) {
    space.get(&disk.family).and_then(|s| s.members.get(&disk.id)).copied().unwrap_or_default()
}

fn notes(state: &State, tree: &Tree, disk: &Vdisk) -> String {
    let holders: Vec<&str> = state.attachments(disk).map(|s| s.holder.as_str()).collect();
    let origin = match tree.origin(disk) {
        // It stands below it.
        Origin::Clone(_) => "clone".into(),
        other => other.words(),
    };
    let attached = if holders.is_empty() { String::new() } else { format!("attached by {}", holders.join("; ")) };
    let note = |is_so: bool, note: &str| if is_so { note.into() } else { String::new() };
    let states = [note(disk.protected, "protected"), note(disk.is_importing(), "import unfinished")];
    let notes = [origin].into_iter().chain(states).chain([attached]);
    notes.filter(|n| !n.is_empty()).collect::<Vec<_>>().join(", ")
}

/// The tree for programs: a list, parents before what hangs on them.
pub fn json(state: &State, root: Option<&Vdisk>, space: Option<&BTreeMap<FamilyId, FamilySpace>>) -> Value {
    let tree = Tree::new(state);
    let line = |(depth, disk): (usize, &Vdisk)| {
        let clones: Vec<&str> = tree.clones(disk.id).iter().map(|d| d.name.as_str()).collect();
        let of_disk = disk.snapshot_of.and_then(|of| state.vdisk(of)).map(|d| d.name.clone());
        let mut value = json!({
            "name": disk.name,
            "id": disk.id.to_string(),
            "kind": if disk.is_snapshot() { "snapshot" } else { "disk" },
            "depth": depth,
            "snapshot_of": of_disk,
            "origin": tree.origin(disk).json(),
            "clones": clones,
            "size": disk.size,
            "made": disk.made,
            "protected": disk.protected,
            "import_unfinished": disk.is_importing(),
            "attached": state.attachments(disk).count(),
        });
        if let Some(space) = space {
            let (used, exclusive) = of(space, disk);
            value["used"] = used.into();
            value["exclusive"] = exclusive.into();
        }
        value
    };
    tree.lines(root).into_iter().map(line).collect::<Vec<_>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use petal::global_state::{Command, Entry, Genesis, GenesisServer, Outcome, SnapshotOf};
    use petal::ids::*;
    use petal::message::CommandId;
    use petal::translator::gmap::Scheme;

    struct Cluster {
        state: State,
        number: u64,
    }

    impl Cluster {
        fn new() -> Cluster {
            let server = GenesisServer { server: ServerId(1), addresses: vec!["unix:s1".into()] };
            let genesis = Genesis { cluster: ClusterId(1), name: "test".into(), ring: vec![server] };
            let mut cluster = Cluster { state: State::genesis(&genesis), number: 0 };
            cluster.run(Command::ServerUp {
                server: ServerId(1),
                incarnation: Incarnation(1),
                addresses: vec!["unix:s1".into()],
                disks: vec![(DiskId(1), Incarnation(0).into(), 1 << 30)],
            });
            cluster
        }
        fn run(&mut self, command: Command) -> Outcome {
            self.number += 1;
            let id = CommandId { proposer: 1, number: self.number, finished_below: self.number };
            self.state.apply(&Entry { id, command }).0.unwrap()
        }
        fn named(&self, name: &str) -> Vdisk {
            self.state.vdisk_named(name).unwrap().clone()
        }
        fn disk(&mut self, name: &str) {
            let (size, stripe_unit) = (1 << 30, 1 << 20);
            self.run(Command::CreateDisk { name: name.into(), size, scheme: Scheme::Striped, stripe_unit });
        }
        fn snapshot(&mut self, disk: &str, name: &str) {
            let disk = self.named(disk);
            let of = vec![SnapshotOf { vdisk: disk.id, epoch: disk.epoch, name: name.into() }];
            self.run(Command::Snapshot { of, made: 7, protected: false });
        }
        fn clone_of(&mut self, source: &str, name: &str) {
            let source = self.named(source);
            let (source, epoch) = (source.id, source.epoch);
            self.run(Command::Clone { source, epoch, name: name.into(), made: 7 });
        }
        fn tree(&self) -> Vec<String> {
            let lines = Tree::new(&self.state).lines(None);
            lines.iter().map(|(depth, d)| format!("{depth} {}", d.name)).collect()
        }
    }

    #[test]
    fn clones_hang_under_the_snapshot_that_they_came_from() {
        let mut c = Cluster::new();
        c.disk("a");
        c.disk("b");
        c.snapshot("a", "monday");
        c.snapshot("a", "tuesday");
        c.clone_of("a@monday", "copy");
        c.snapshot("copy", "s");
        c.clone_of("copy@s", "copy2");
        c.clone_of("a", "of-a");
        let all =
            ["0 a", "1 a@monday", "2 copy", "3 copy@s", "4 copy2", "1 a@tuesday", "0 b", "0 of-a"].map(String::from);
        assert_eq!(c.tree(), all);
        let origin = |name: &str| Tree::new(&c.state).origin(&c.named(name)).words();
        assert_eq!(origin("copy2"), "clone of copy@s");
        assert_eq!(origin("of-a"), "clone of a as it was");
        assert_eq!((origin("a"), origin("a@monday")), (String::new(), String::new()));
    }

    #[test]
    fn a_disk_that_went_back_stays_a_root_and_tells_where_it_went() {
        let mut c = Cluster::new();
        c.disk("a");
        c.snapshot("a", "monday");
        let (a, to) = (c.named("a"), c.named("a@monday"));
        let keep = Some("before".into());
        c.run(Command::Rollback { vdisk: a.id, epoch: a.epoch, to: to.id, keep, made: 0 });
        assert_eq!(c.tree(), ["0 a", "1 a@monday", "1 a@before"]);
        assert_eq!(Tree::new(&c.state).origin(&c.named("a")).words(), "rolled back to @monday");
        c.clone_of("a@before", "copy");
        assert_eq!(c.tree(), ["0 a", "1 a@monday", "1 a@before", "2 copy"]);
        let of_snapshot = c.named("a@before");
        let lines = Tree::new(&c.state).lines(c.state.vdisk(of_snapshot.id)).len();
        assert_eq!(lines, 2);
    }

    #[test]
    fn a_thousand_clones_of_clones_are_walked() {
        let mut c = Cluster::new();
        c.disk("d0");
        for n in 0..1000 {
            c.snapshot(&format!("d{n}"), "s");
            c.clone_of(&format!("d{n}@s"), &format!("d{}", n + 1));
        }
        assert_eq!(c.tree().len(), 2001);
    }
}
