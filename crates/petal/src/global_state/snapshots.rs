//! What the log says of snapshots, clones and rollbacks (2.9): all of it is names for epochs.
//!
//! A part of the state machine (`state.rs`). Each of these commands costs the same whatever the size of the disk: no
//! data is touched. Those that close an epoch are conditional on the one that their caller saw, so that a command that
//! was decided late, or twice, does not make a second one.
//!
//! Invariants: see `state.rs`; a snapshot stands on an epoch that no disk writes any more; an epoch that is closed
//! is never written again.

use super::arguments::{check_name, split_name};
use super::command::{Attachment, CommandError, Outcome, SnapshotOf};
use super::state::{Applied, Effects, FIRST_EPOCH, Session, State};
use crate::ids::*;
use crate::limits::*;
use crate::translator::vdir::{Automatic, ForeignState, Imported, Kind, Lineage, Policy, Reached, Vdisk};
use std::collections::BTreeSet;

impl State {
    pub(super) fn snapshot(&mut self, of: &[SnapshotOf], made: u64, protected: bool, effects: &mut Effects) -> Applied {
        if of.is_empty() || of.len() > VdiskId::AT_ONCE_MAX {
            return Err(CommandError::Malformed(format!(
                "{} snapshots at once; 1 to {}",
                of.len(),
                VdiskId::AT_ONCE_MAX
            )));
        }
        let disks: BTreeSet<VdiskId> = of.iter().map(|s| s.vdisk).collect();
        if disks.len() != of.len() {
            return Err(CommandError::Malformed("a disk is named twice".into()));
        }
        self.check_room_for(of.len())?;
        for one in of {
            let disk = self.disk_in_epoch(one.vdisk, one.epoch)?;
            self.check_room_in(disk.family, of.len())?;
            check_name(&one.name)?;
            self.check_free(&format!("{}@{}", disk.name, one.name))?;
        }
        let snapshots: Vec<VdiskId> = (0..of.len()).map(|n| VdiskId::made_by(self.index, n)).collect();
        for (id, one) in snapshots.iter().zip(of) {
            self.name_epoch(*id, one.vdisk, &one.name, made, protected);
            let disk = self.vdisks.get_mut(&one.vdisk).expect("checked above");
            // One that is imported was made by the policy of another disk.
            if let (Some(kind), false) = (Kind::of(&one.name), disk.is_importing()) {
                disk.automatic.made(kind, made);
            }
            self.close_epoch(one.vdisk, of.len() > 1, effects);
        }
        let families: BTreeSet<FamilyId> = disks.iter().map(|id| self.vdisks[id].family).collect();
        families.into_iter().for_each(|family| self.look_anew(family));
        Ok(Outcome::Disks(snapshots))
    }

    pub(super) fn clone_of(
        &mut self,
        source: VdiskId,
        epoch: Epoch,
        name: &str,
        made: u64,
        effects: &mut Effects,
    ) -> Applied {
        check_name(name)?;
        self.check_free(name)?;
        self.check_room_for(1)?;
        let from = self.vdisks.get(&source).ok_or(CommandError::NoSuchDisk(source))?;
        let is_snapshot = from.is_snapshot();
        if !is_snapshot {
            self.disk_in_epoch(source, epoch)?;
            self.check_no_imports([source])?;
            self.check_not_flattened([source])?;
        }
        let (family, size) = (from.family, from.size);
        self.check_room_in(family, 1)?;
        let parent = (from.lineage, from.epoch);
        let lineage = self.branch(family, parent, name)?;
        let id = VdiskId::made_by(self.index, 0);
        self.add_vdisk(Vdisk {
            id,
            name: name.into(),
            size,
            family,
            lineage,
            epoch: FIRST_EPOCH,
            snapshot_of: None,
            stands_on: self.index,
            protected: false,
            made,
            policy: Policy::default(),
            imported: Imported::default(),
            reached: None,
            automatic: Automatic::default(),
            revision: self.index,
            sessions: Vec::new(),
        });
        if !is_snapshot {
            self.close_epoch(source, false, effects);
        }
        self.look_anew(family);
        Ok(Outcome::Disk(id))
    }

    pub(super) fn rollback(
        &mut self,
        id: VdiskId,
        epoch: Epoch,
        to: VdiskId,
        keep: Option<&str>,
        made: u64,
        effects: &mut Effects,
    ) -> Applied {
        let disk = self.disk_in_epoch(id, epoch)?;
        if let Some(session) = self.attached_by(disk) {
            return Err(self.in_use(disk, session));
        }
        let target = self.vdisks.get(&to).ok_or(CommandError::NoSuchDisk(to))?;
        if target.snapshot_of != Some(id) {
            return Err(CommandError::NotItsSnapshot { name: target.name.clone(), of: disk.name.clone() });
        }
        let (family, size, name) = (disk.family, target.size, disk.name.clone());
        let parent = (target.lineage, target.epoch);
        let newest = target.imported.begun.or(target.imported.newest);
        if let Some(keep) = keep {
            check_name(keep)?;
            self.check_free(&format!("{name}@{keep}"))?;
            self.check_room_for(1)?;
            self.check_room_in(family, 1)?;
        }
        let lineage = self.branch(family, parent, &name)?;
        self.stop_flattening(id, effects);
        // What an import had written is no longer there: one that goes on must not count on it; and what is kept of it
        // is not the state that it was to lead to.
        let disk = self.vdisks.get_mut(&id).expect("found above");
        (disk.imported.begun, disk.reached) = (None, None);
        if let Some(keep) = keep {
            self.name_epoch(VdiskId::made_by(self.index, 0), id, keep, made, false);
        }
        // A chain of increments goes on from the state that it is now.
        self.vdisks.get_mut(&id).expect("found above").imported.newest = newest;
        let index = self.index;
        let disk = self.vdisks.get_mut(&id).expect("found above");
        (disk.lineage, disk.epoch, disk.size) = (lineage, FIRST_EPOCH, size);
        (disk.stands_on, disk.revision) = (index, index);
        self.look_anew(family);
        self.narrow(family, effects);
        effects.families_narrowed.push(family);
        Ok(Outcome::Done)
    }

    pub(super) fn delete_disks(&mut self, ids: &[VdiskId], effects: &mut Effects) -> Applied {
        let going: BTreeSet<VdiskId> = ids.iter().copied().collect();
        let mut families = BTreeSet::new();
        if going.is_empty() || ids.len() > VDISKS_MAX {
            return Err(CommandError::Malformed("nothing is named that could be deleted".into()));
        }
        for id in &going {
            let disk = self.vdisks.get(id).ok_or(CommandError::NoSuchDisk(*id))?;
            if let Some(session) = self.attached_by(disk) {
                return Err(self.in_use(disk, session));
            }
            if disk.protected {
                return Err(CommandError::Protected { name: disk.name.clone() });
            }
            families.insert(disk.family);
        }
        let stays = |member: &&Vdisk| !going.contains(&member.id);
        let without = |s: &Vdisk| s.snapshot_of.and_then(|of| self.vdisks.get(&of)).filter(|of| going.contains(&of.id));
        let left_alone = families.iter().flat_map(|f| self.members(*f)).filter(stays);
        let left_alone = left_alone.filter_map(|s| Some((s, without(s)?))).next();
        if let Some((first, disk)) = left_alone {
            let count = self.snapshots_of(disk).filter(stays).count();
            return Err(CommandError::HasSnapshots { name: disk.name.clone(), count, first: first.name.clone() });
        }
        let mut concerned = BTreeSet::new();
        for id in &going {
            self.stop_flattening(*id, effects);
            let disk = self.vdisks.remove(id).expect("checked above");
            self.derived.names.remove(&disk.name);
            self.derived.members.entry(disk.family).or_default().remove(id);
        }
        for family in families {
            concerned.extend(self.servers_of_family(family));
            if self.derived.members.get(&family).is_some_and(BTreeSet::is_empty) {
                self.derived.members.remove(&family);
                self.families.remove(&family);
                effects.families_ended.push(family);
            } else {
                effects.families_narrowed.push(family);
            }
            self.look_anew(family);
        }
        effects.narrows = true;
        effects.concerned = concerned.into_iter().collect();
        Ok(Outcome::Done)
    }

    pub(super) fn rename_snapshot(&mut self, id: VdiskId, name: &str) -> Applied {
        let present = &self.vdisks.get(&id).ok_or(CommandError::NoSuchDisk(id))?.name;
        let full = format!("{}@{name}", split_name(present).0);
        if *present == full {
            return Ok(Outcome::Done);
        }
        check_name(name)?;
        self.check_free(&full)?;
        self.set_name(id, full);
        Ok(Outcome::Done)
    }

    pub(super) fn protect(&mut self, id: VdiskId, protected: bool) -> Applied {
        self.vdisks.get_mut(&id).ok_or(CommandError::NoSuchDisk(id))?.protected = protected;
        Ok(Outcome::Done)
    }

    pub(super) fn set_policy(&mut self, id: VdiskId, policy: Policy) -> Applied {
        let disk = self.vdisks.get_mut(&id).ok_or(CommandError::NoSuchDisk(id))?;
        if disk.is_snapshot() {
            return Err(CommandError::IsSnapshot { name: disk.name.clone() });
        }
        let most = policy.hourly.max(policy.daily).max(policy.weekly);
        if most > POLICY_KEEPS_MAX {
            let what = format!("snapshots of one kind by the policy of '{}'", disk.name);
            return Err(CommandError::TooMany { limit: usize::from(POLICY_KEEPS_MAX), what });
        }
        disk.policy = policy;
        Ok(Outcome::Done)
    }

    pub(super) fn begin_import(
        &mut self,
        id: VdiskId,
        session: SessionId,
        seen: Imported,
        to: ForeignState,
    ) -> Applied {
        self.check_importer(id, session)?;
        self.check_not_flattened([id])?;
        let disk = &self.vdisks[&id];
        // Who reads it would see half of what comes.
        if let Some(other) = disk.sessions.iter().find(|s| **s != session) {
            return Err(self.in_use(disk, *other));
        }
        let disk = self.vdisks.get_mut(&id).expect("just checked");
        if disk.imported != seen {
            return Err(CommandError::Overtaken);
        }
        if disk.imported.begun != Some(to) {
            (disk.imported.begun, disk.reached) = (Some(to), None);
        }
        Ok(Outcome::Done)
    }

    /// What lies below is as it is to be, and nobody else writes it.
    pub(super) fn import_reached(&mut self, id: VdiskId, session: SessionId, reached: Option<Reached>) -> Applied {
        self.check_importer(id, session)?;
        let disk = self.vdisks.get_mut(&id).expect("just checked");
        if disk.imported.begun.is_none() {
            return Err(CommandError::Overtaken);
        }
        disk.reached = reached;
        Ok(Outcome::Done)
    }

    /// The snapshot, and that the import is over, in one: nothing comes in between. The snapshot keeps the mark of the
    /// import, which says what state it is.
    pub(super) fn end_import(
        &mut self,
        id: VdiskId,
        session: SessionId,
        name: &str,
        made: u64,
        effects: &mut Effects,
    ) -> Applied {
        self.check_importer(id, session)?;
        let disk = &self.vdisks[&id];
        let begun = disk.imported.begun.ok_or(CommandError::Overtaken)?;
        let of = [SnapshotOf { vdisk: id, epoch: disk.epoch, name: name.into() }];
        let made = self.snapshot(&of, made, false, effects)?;
        let disk = self.vdisks.get_mut(&id).expect("just snapshotted");
        (disk.imported, disk.reached) = (Imported { newest: Some(begun), begun: None }, None);
        Ok(made)
    }

    /// What an import has written a part of is no state of a disk: nothing is made of these.
    pub(super) fn check_no_imports(&self, disks: impl IntoIterator<Item = VdiskId>) -> Result<(), CommandError> {
        match disks.into_iter().filter_map(|id| self.vdisks.get(&id)).find(|disk| disk.is_importing()) {
            Some(disk) => Err(CommandError::ImportUnfinished { name: disk.name.clone() }),
            None => Ok(()),
        }
    }

    fn check_importer(&self, id: VdiskId, session: SessionId) -> Result<(), CommandError> {
        let is_own = |s: &Session| s.vdisk == id && s.mode == Attachment::Import;
        self.sessions.get(&session).is_some_and(is_own).then_some(()).ok_or(CommandError::NoSuchSession(session))
    }

    /// Disks of which writes of a new epoch may have to wait until everybody knows the epoch: several clients may
    /// have them attached, or they were snapshotted together with others.
    pub fn disks_with_gates(&self) -> impl Iterator<Item = VdiskId> + '_ {
        let commands: BTreeSet<StateIndex> =
            self.vdisks.keys().filter(|id| id.ordinal() > 0).map(|id| id.index()).collect();
        let one_of_several = self.vdisks.values().filter(|s| commands.contains(&s.id.index()));
        let together: BTreeSet<VdiskId> = one_of_several.filter_map(|s| s.snapshot_of).collect();
        let has_gate = move |disk: &&Vdisk| self.is_shared(disk) || together.contains(&disk.id);
        self.vdisks.values().filter(|disk| !disk.is_snapshot()).filter(has_gate).map(|disk| disk.id)
    }

    // -------------------------------------------------------------------------------- helpers

    /// True if several clients may have it attached, and write.
    fn is_shared(&self, disk: &Vdisk) -> bool {
        disk.sessions.iter().any(|s| self.sessions.get(s).is_some_and(|s| s.mode == Attachment::Shared))
    }

    fn check_room_for(&self, more: usize) -> Result<(), CommandError> {
        if self.vdisks.len() + more > VDISKS_MAX {
            return Err(CommandError::TooMany { limit: VDISKS_MAX, what: "disks and snapshots".into() });
        }
        Ok(())
    }

    fn check_room_in(&self, family: FamilyId, more: usize) -> Result<(), CommandError> {
        if self.derived.members.get(&family).map_or(0, BTreeSet::len) + more > FAMILY_MEMBERS_MAX {
            let what = "snapshots and clones of one disk, and of each other".into();
            return Err(CommandError::TooMany { limit: FAMILY_MEMBERS_MAX, what });
        }
        Ok(())
    }

    /// A disk, if it still writes this epoch.
    fn disk_in_epoch(&self, id: VdiskId, epoch: Epoch) -> Result<&Vdisk, CommandError> {
        let disk = self.vdisks.get(&id).ok_or(CommandError::NoSuchDisk(id))?;
        if disk.is_snapshot() {
            return Err(CommandError::IsSnapshot { name: disk.name.clone() });
        }
        // The last epoch is never closed: nothing could follow it.
        if disk.epoch != epoch || epoch == Epoch(u32::MAX) {
            return Err(CommandError::Overtaken);
        }
        Ok(disk)
    }

    /// Gives the disk's present epoch a name: a snapshot, as soon as it is closed.
    fn name_epoch(&mut self, id: VdiskId, of: VdiskId, name: &str, made: u64, protected: bool) {
        let disk = &self.vdisks[&of];
        let snapshot = Vdisk {
            id,
            name: format!("{}@{name}", disk.name),
            snapshot_of: Some(of),
            stands_on: self.index,
            protected,
            made,
            policy: Policy::default(),
            automatic: Automatic::default(),
            reached: None,
            revision: self.index,
            sessions: Vec::new(),
            ..disk.clone()
        };
        self.add_vdisk(snapshot);
    }

    /// The disk goes on in its next epoch, perhaps together with others; `look_anew` is due. What was begun in this one
    /// must be over before anybody counts on it.
    fn close_epoch(&mut self, id: VdiskId, together: bool, effects: &mut Effects) {
        let index = self.index;
        let disk = self.vdisks.get_mut(&id).expect("the caller found it");
        disk.epoch = Epoch(disk.epoch.0 + 1);
        disk.revision = index;
        let family = disk.family;
        // What a client knows of one disk its messages for another one do not tell.
        if together || self.is_shared(&self.vdisks[&id]) {
            effects.new_epochs_gated.push(id);
        }
        let concerned: BTreeSet<ServerId> =
            effects.concerned.iter().copied().chain(self.servers_of_family(family)).collect();
        effects.narrows = true;
        effects.concerned = concerned.into_iter().collect();
    }

    /// A new lineage that begins with a state of another one.
    fn branch(&mut self, family: FamilyId, parent: (LineageId, Epoch), name: &str) -> Result<LineageId, CommandError> {
        let family = self.families.get_mut(&family).expect("a disk has a family");
        let depth = family.ancestors(parent.0).count() + 1;
        if depth > ANCESTORS_MAX || family.next_lineage == LineageId(u32::MAX) {
            return Err(CommandError::TooDeep { name: name.into(), depth });
        }
        let lineage = family.next_lineage;
        family.next_lineage = LineageId(lineage.0 + 1);
        family.lineages.insert(lineage, Lineage { parent: Some(parent) });
        Ok(lineage)
    }
}

#[cfg(test)]
mod tests {
    use super::super::command::Command;
    use super::super::state::tests::Fixture;
    use super::*;

    fn take(f: &mut Fixture, vdisk: VdiskId, name: &str) -> Result<VdiskId, CommandError> {
        let epoch = f.state.vdisk(vdisk).unwrap().epoch;
        let of = vec![SnapshotOf { vdisk, epoch, name: name.into() }];
        match f.run(Command::Snapshot { of, made: 7, protected: false })? {
            Outcome::Disks(ids) => Ok(ids[0]),
            other => panic!("{other:?}"),
        }
    }

    fn clone(f: &mut Fixture, source: VdiskId, name: &str) -> Result<VdiskId, CommandError> {
        let epoch = f.state.vdisk(source).unwrap().epoch;
        match f.run(Command::Clone { source, epoch, name: name.into(), made: 0 })? {
            Outcome::Disk(id) => Ok(id),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_snapshot_is_a_name_for_the_epoch_and_the_disk_goes_on_in_the_next() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let snapshot = take(&mut f, disk, "monday").unwrap();
        assert!(f.effects.narrows && !f.effects.concerned.is_empty());
        let (disk, snapshot) = (f.state.vdisk(disk).unwrap(), f.state.vdisk(snapshot).unwrap());
        assert_eq!((snapshot.name.as_str(), snapshot.epoch, disk.epoch), ("db@monday", Epoch(1), Epoch(2)));
        assert_eq!((snapshot.lineage, snapshot.stands_on), (disk.lineage, f.state.index));
        assert_eq!(disk.revision, f.state.index, "what the disk's messages may do has changed");
    }

    #[test]
    fn a_snapshot_of_an_epoch_that_is_over_is_not_made() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        take(&mut f, disk, "a").unwrap();
        let of = vec![SnapshotOf { vdisk: disk, epoch: Epoch(1), name: "b".into() }];
        assert_eq!(f.run(Command::Snapshot { of, made: 0, protected: false }), Err(CommandError::Overtaken));
    }

    /// A state of another cluster.
    fn foreign(epoch: u32) -> ForeignState {
        ForeignState { cluster: ClusterId(9), family: FamilyId(1), lineage: LineageId(1), epoch: Epoch(epoch) }
    }

    fn begin(f: &mut Fixture, vdisk: VdiskId, to: u32) -> SessionId {
        let session = f.attach(vdisk, Attachment::Import, false).unwrap();
        let seen = f.state.vdisk(vdisk).unwrap().imported;
        f.run(Command::BeginImport { vdisk, session, seen, to: foreign(to) }).unwrap();
        session
    }

    fn end(f: &mut Fixture, vdisk: VdiskId, session: SessionId, name: &str) -> Applied {
        f.run(Command::EndImport { vdisk, session, name: name.into(), made: 7 })
    }

    #[test]
    fn only_an_import_writes_where_one_has_not_ended() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let session = begin(&mut f, disk, 4);
        let refused = || CommandError::ImportUnfinished { name: "db".into() };
        for is_gone in [false, true] {
            for mode in [Attachment::Exclusive, Attachment::Shared] {
                assert_eq!(f.attach(disk, mode, true), Err(refused()), "not by a take-over either");
            }
            assert_eq!(take(&mut f, disk, "half"), Err(refused()));
            assert_eq!(clone(&mut f, disk, "half"), Err(refused()));
            assert_eq!(f.attach(disk, Attachment::ReadOnly, false), Err(refused()), "half of it is nothing to be read");
            if !is_gone {
                assert!(f.attach(disk, Attachment::Import, false).is_err(), "one at a time");
                f.run(Command::Detach { session }).unwrap();
            }
        }
        let session = begin(&mut f, disk, 4);
        let Ok(Outcome::Disks(made)) = end(&mut f, disk, session, "monday") else { panic!() };
        let (snapshot, db) = (f.state.vdisk(made[0]).unwrap(), f.state.vdisk(disk).unwrap());
        assert_eq!((snapshot.name.as_str(), snapshot.imported.begun), ("db@monday", Some(foreign(4))));
        assert_eq!(db.imported, Imported { newest: Some(foreign(4)), begun: None });
        assert_eq!((snapshot.epoch, db.epoch), (Epoch(1), Epoch(2)));
        assert!(f.effects.narrows && !f.effects.concerned.is_empty());
        f.run(Command::Detach { session }).unwrap();
        f.attach(disk, Attachment::Exclusive, false).unwrap();
        take(&mut f, disk, "mine").unwrap();
    }

    #[test]
    fn an_import_that_lost_its_session_neither_begins_nor_ends() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let lost = f.attach(disk, Attachment::Import, false).unwrap();
        let other = f.attach(disk, Attachment::Exclusive, true).unwrap();
        let seen = Imported::default();
        let late = Command::BeginImport { vdisk: disk, session: lost, seen, to: foreign(4) };
        assert_eq!(f.run(late.clone()), Err(CommandError::NoSuchSession(lost)));
        f.run(Command::Detach { session: other }).unwrap();
        assert_eq!(f.run(late), Err(CommandError::NoSuchSession(lost)), "what was written meanwhile would be in it");
        let lost = begin(&mut f, disk, 4);
        let own = f.attach(disk, Attachment::Import, true).unwrap();
        assert_eq!(end(&mut f, disk, lost, "monday"), Err(CommandError::NoSuchSession(lost)));
        end(&mut f, disk, own, "monday").unwrap();
        assert_eq!(end(&mut f, disk, own, "tuesday"), Err(CommandError::Overtaken), "nothing was begun");
        let reader = f.attach(disk, Attachment::ReadOnly, false).unwrap();
        let seen = f.state.vdisk(disk).unwrap().imported;
        let by_reader = Command::BeginImport { vdisk: disk, session: reader, seen, to: foreign(5) };
        assert_eq!(f.run(by_reader), Err(CommandError::NoSuchSession(reader)));
        f.run(Command::Detach { session: reader }).unwrap();
        let of_before = Command::BeginImport { vdisk: disk, session: own, seen: Imported::default(), to: foreign(5) };
        assert_eq!(f.run(of_before), Err(CommandError::Overtaken), "another one has ended meanwhile");
    }

    #[test]
    fn a_rollback_ends_an_import_and_what_it_keeps_is_not_the_state_that_was_to_come() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let session = begin(&mut f, disk, 4);
        let Ok(Outcome::Disks(monday)) = end(&mut f, disk, session, "monday") else { panic!() };
        let seen = f.state.vdisk(disk).unwrap().imported;
        f.run(Command::BeginImport { vdisk: disk, session, seen, to: foreign(5) }).unwrap();
        f.run(Command::Detach { session }).unwrap();
        let (epoch, keep) = (f.state.vdisk(disk).unwrap().epoch, Some("half".into()));
        f.run(Command::Rollback { vdisk: disk, epoch, to: monday[0], keep, made: 0 }).unwrap();
        let half = f.state.vdisk_named("db@half").unwrap();
        assert_eq!(half.imported.begun, None);
        assert_eq!(f.state.vdisk(disk).unwrap().imported, Imported { newest: Some(foreign(4)), begun: None });
        f.attach(disk, Attachment::Exclusive, false).unwrap();
    }

    #[test]
    fn an_import_of_the_same_state_goes_on_where_the_last_one_was_told_to_have_come() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let reached = |f: &Fixture| f.state.vdisk(disk).unwrap().reached;
        let at = |below: u64| Some(Reached { below, hash: [below as u8; 32] });
        let say = |session, reached| Command::ImportReached { vdisk: disk, session, reached };
        let own = begin(&mut f, disk, 4);
        f.run(say(own, at(7))).unwrap();
        f.run(Command::Detach { session: own }).unwrap();
        assert_eq!(f.run(say(own, at(9))), Err(CommandError::NoSuchSession(own)));
        let again = begin(&mut f, disk, 4);
        assert_eq!(reached(&f), at(7));
        f.run(say(again, None)).unwrap();
        assert_eq!(reached(&f), None, "it is another stream");
        f.run(say(again, at(8))).unwrap();
        let Ok(Outcome::Disks(made)) = end(&mut f, disk, again, "monday") else { panic!() };
        assert_eq!((reached(&f), f.state.vdisk(made[0]).unwrap().reached), (None, None));
        assert_eq!(f.run(say(again, at(9))), Err(CommandError::Overtaken));
        f.run(Command::Detach { session: again }).unwrap();
        // Of another state it begins anew.
        for state in [5, 6] {
            let own = begin(&mut f, disk, state);
            assert_eq!(reached(&f), None);
            f.run(say(own, at(7))).unwrap();
            f.run(Command::Detach { session: own }).unwrap();
        }
        let epoch = f.state.vdisk(disk).unwrap().epoch;
        f.run(Command::Rollback { vdisk: disk, epoch, to: made[0], keep: None, made: 0 }).unwrap();
        assert_eq!(reached(&f), None);
    }

    #[test]
    fn an_import_does_not_begin_while_somebody_reads_the_disk() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let reader = f.attach(disk, Attachment::ReadOnly, false).unwrap();
        let session = f.attach(disk, Attachment::Import, false).unwrap();
        let begin = Command::BeginImport { vdisk: disk, session, seen: Imported::default(), to: foreign(4) };
        assert!(matches!(f.run(begin.clone()), Err(CommandError::InUse { session, .. }) if session == reader));
        f.run(Command::Detach { session: reader }).unwrap();
        f.run(begin).unwrap();
    }

    #[test]
    fn a_chain_of_imports_goes_on_from_the_state_that_was_rolled_back_to() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let ends = |f: &mut Fixture, to: u32, name: &str| {
            let session = begin(f, disk, to);
            let Ok(Outcome::Disks(made)) = end(f, disk, session, name) else { panic!() };
            f.run(Command::Detach { session }).unwrap();
            made[0]
        };
        let monday = ends(&mut f, 4, "monday");
        take(&mut f, disk, "own").unwrap();
        let own = f.state.vdisk_named("db@own").unwrap().id;
        let tuesday = ends(&mut f, 5, "tuesday");
        for (to, newest) in [(own, 4), (tuesday, 5), (monday, 4)] {
            let epoch = f.state.vdisk(disk).unwrap().epoch;
            f.run(Command::Rollback { vdisk: disk, epoch, to, keep: None, made: 0 }).unwrap();
            assert_eq!(f.state.vdisk(disk).unwrap().imported.newest, Some(foreign(newest)));
        }
        f.run(Command::DeleteDisks { vdisks: vec![tuesday] }).unwrap();
        ends(&mut f, 5, "tuesday");
    }

    #[test]
    fn nobody_else_changes_the_size_while_an_import_has_not_ended() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let size = f.state.vdisk(disk).unwrap().size;
        let own = begin(&mut f, disk, 4);
        let resize = |size, session| Command::ResizeDisk { vdisk: disk, size, session };
        let refused = Err(CommandError::ImportUnfinished { name: "db".into() });
        assert_eq!(f.run(resize(2 * size, SessionId(0))), refused);
        f.run(resize(2 * size, own)).unwrap();
        end(&mut f, disk, own, "monday").unwrap();
        f.run(resize(3 * size, SessionId(0))).unwrap();
    }

    #[test]
    fn rollbacks_deepen_a_disk_up_to_a_bound_and_flattening_makes_it_stand_by_itself() {
        let mut f = Fixture::up(3);
        let vdisk = f.disk("db");
        let mut back = |last: Option<VdiskId>| {
            let to = take(&mut f, vdisk, if last.is_some() { "b" } else { "a" }).unwrap();
            let epoch = f.state.vdisk(vdisk).unwrap().epoch;
            let done = f.run(Command::Rollback { vdisk, epoch, to, keep: None, made: 0 });
            last.map(|last| f.run(Command::DeleteDisks { vdisks: vec![last] }).unwrap());
            f.run(Command::RenameDisk { vdisk: to, name: "a".into() }).unwrap();
            let disk = f.state.vdisk(vdisk).unwrap().clone();
            let depth = f.state.family(disk.family).unwrap().ancestors(disk.lineage).count();
            (to, done, depth, disk.lineage)
        };
        let mut last = None;
        for n in 1..=ANCESTORS_MAX {
            let (to, done, depth, _) = back(last);
            assert_eq!((done, depth), (Ok(Outcome::Done), n));
            last = Some(to);
        }
        let (to, refused, depth, _) = back(last);
        let too_deep = CommandError::TooDeep { name: "db".into(), depth: ANCESTORS_MAX + 1 };
        assert_eq!((refused, depth), (Err(too_deep), ANCESTORS_MAX));
        f.run(Command::DeleteDisks { vdisks: vec![to] }).unwrap();
        flatten(&mut f, vdisk);
        let to = take(&mut f, vdisk, "c").unwrap();
        let epoch = f.state.vdisk(vdisk).unwrap().epoch;
        f.run(Command::Rollback { vdisk, epoch, to, keep: None, made: 0 }).unwrap();
    }

    /// To its end.
    fn flatten(f: &mut Fixture, vdisk: VdiskId) {
        f.run(Command::Flatten { vdisk, wanted: true }).unwrap();
        let inherited = f.inherited(vdisk, u32::MAX);
        f.run(inherited).unwrap();
    }

    #[test]
    fn several_disks_are_snapshotted_at_one_instant_or_none_is() {
        let mut f = Fixture::up(3);
        let (a, b) = (f.disk("a"), f.disk("b"));
        let of = |f: &Fixture, name: &str| {
            let one = |vdisk| SnapshotOf { vdisk, epoch: f.state.vdisk(vdisk).unwrap().epoch, name: name.into() };
            vec![one(a), one(b)]
        };
        let command = Command::Snapshot { of: of(&f, "s"), made: 0, protected: true };
        let Ok(Outcome::Disks(ids)) = f.run(command) else { panic!() };
        assert_eq!(f.effects.new_epochs_gated, [a, b], "nobody has them attached, and yet");
        assert_eq!(ids.iter().map(|id| id.index()).collect::<Vec<_>>(), [f.state.index; 2]);
        assert_eq!(f.state.vdisk_named("b@s").map(|v| v.id), Some(ids[1]));
        f.run(Command::RenameDisk { vdisk: ids[1], name: "t".into() }).unwrap();
        let taken = Command::Snapshot { of: of(&f, "s"), made: 0, protected: false };
        assert_eq!(f.run(taken), Err(CommandError::NameTaken("a@s".into())));
        assert_eq!(f.state.disks_with_gates().collect::<Vec<_>>(), [a, b], "also for who comes later");
        assert!(f.state.vdisk_named("b@s").is_none());
    }

    #[test]
    fn snapshots_are_read_only_protected_and_go_before_their_disk() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let snapshot = take(&mut f, disk, "a").unwrap();
        let refused = f.attach(snapshot, Attachment::Exclusive, false);
        assert_eq!(refused, Err(CommandError::IsSnapshot { name: "db@a".into() }));
        let refused = f.run(Command::DeleteDisk { vdisk: disk });
        assert!(matches!(refused, Err(CommandError::HasSnapshots { count: 1, .. })), "{refused:?}");
        f.run(Command::Protect { vdisk: snapshot, protected: true }).unwrap();
        let all = vec![disk, snapshot];
        let refused = f.run(Command::DeleteDisks { vdisks: all.clone() });
        assert_eq!(refused, Err(CommandError::Protected { name: "db@a".into() }));
        f.run(Command::Protect { vdisk: snapshot, protected: false }).unwrap();
        let session = f.attach(snapshot, Attachment::ReadOnly, false).unwrap();
        let refused = f.run(Command::DeleteDisks { vdisks: all.clone() });
        assert!(matches!(refused, Err(CommandError::InUse { .. })));
        f.run(Command::Detach { session }).unwrap();
        f.run(Command::DeleteDisks { vdisks: all }).unwrap();
        assert_eq!((f.state.vdisks.len(), f.state.families.len(), f.effects.families_ended.len()), (0, 0, 1));
    }

    #[test]
    fn a_renamed_disk_takes_its_snapshots_along() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let snapshot = take(&mut f, disk, "a").unwrap();
        f.run(Command::RenameDisk { vdisk: disk, name: "database".into() }).unwrap();
        assert_eq!(f.state.vdisk_named("database@a").map(|v| v.id), Some(snapshot));
        f.run(Command::RenameDisk { vdisk: snapshot, name: "b".into() }).unwrap();
        assert_eq!(f.state.vdisk(snapshot).unwrap().name, "database@b");
    }

    #[test]
    fn what_a_clone_stands_on_is_kept_when_its_parents_go() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let snapshot = take(&mut f, disk, "a").unwrap();
        let copy = clone(&mut f, snapshot, "copy").unwrap();
        f.run(Command::DeleteDisks { vdisks: vec![disk, snapshot] }).unwrap();
        let copy = f.state.vdisk(copy).unwrap().clone();
        let family = f.state.family(copy.family).unwrap();
        assert_eq!(family.ancestors(copy.lineage).collect::<Vec<_>>(), [(LineageId(1), Epoch(1))]);
        let kept: Vec<bool> = f
            .state
            .visible(copy.family)
            .unwrap()
            .kept([(LineageId(1), Epoch(1)), (LineageId(1), Epoch(2)), (LineageId(2), Epoch(1))].into_iter())
            .collect();
        assert_eq!(kept, [true, false, true]);
        flatten(&mut f, copy.id);
        assert_eq!(f.state.family(copy.family).unwrap().lineages.len(), 1);
    }

    #[test]
    fn a_clone_of_a_disk_closes_its_epoch() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let copy = clone(&mut f, disk, "copy").unwrap();
        assert!(f.effects.narrows);
        assert_eq!(f.state.vdisk(disk).unwrap().epoch, Epoch(2));
        assert_eq!(f.state.vdisk(copy).unwrap().stands_on, f.state.index);
    }

    #[test]
    fn a_rollback_shows_the_snapshot_again_and_keeps_what_there_was() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let snapshot = take(&mut f, disk, "a").unwrap();
        let session = f.attach(disk, Attachment::Exclusive, false).unwrap();
        let back = Command::Rollback { vdisk: disk, epoch: Epoch(2), to: snapshot, keep: Some("was".into()), made: 0 };
        assert!(matches!(f.run(back.clone()), Err(CommandError::InUse { .. })));
        f.run(Command::Detach { session }).unwrap();
        f.run(back).unwrap();
        let (disk, was) = (f.state.vdisk(disk).unwrap(), f.state.vdisk_named("db@was").unwrap());
        assert_eq!((was.lineage, was.epoch), (LineageId(1), Epoch(2)));
        assert_eq!((disk.lineage, disk.epoch), (LineageId(2), Epoch(1)));
        let family = f.state.family(disk.family).unwrap();
        assert_eq!(family.ancestors(disk.lineage).collect::<Vec<_>>(), [(LineageId(1), Epoch(1))]);
    }

    #[test]
    fn a_family_has_no_more_members_than_rows_can_be_counted() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let one = f.state.vdisk(disk).unwrap().clone();
        (0..10).for_each(|_| drop(f.run(Command::Noop)));
        for n in 1..FAMILY_MEMBERS_MAX {
            let id = VdiskId::made_by(1 + n as u64 / 4095, 1 + n % 4095);
            let (name, snapshot_of) = (format!("db@{n}"), Some(disk));
            f.state.add_vdisk(Vdisk { id, name, snapshot_of, ..one.clone() });
        }
        let limit = FAMILY_MEMBERS_MAX;
        assert!(matches!(take(&mut f, disk, "more"), Err(CommandError::TooMany { limit: l, .. }) if l == limit));
        assert!(matches!(clone(&mut f, disk, "more"), Err(CommandError::TooMany { limit: l, .. }) if l == limit));
        let last = f.state.snapshots_of(&one).last().unwrap().id;
        f.run(Command::DeleteDisks { vdisks: vec![last] }).unwrap();
        take(&mut f, disk, "more").unwrap();
    }

    #[test]
    fn two_thousand_clones_are_snapshotted_and_deleted_at_once() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let snapshot = take(&mut f, disk, "a").unwrap();
        let clones: Vec<VdiskId> = (0..2000).map(|n| clone(&mut f, snapshot, &format!("c{n}")).unwrap()).collect();
        let of = clones.iter().map(|c| SnapshotOf { vdisk: *c, epoch: Epoch(1), name: "s".into() }).collect();
        let Ok(Outcome::Disks(made)) = f.run(Command::Snapshot { of, made: 0, protected: false }) else { panic!() };
        let refused = f.run(Command::DeleteDisks { vdisks: clones.clone() });
        assert!(matches!(&refused, Err(CommandError::HasSnapshots { count: 1, .. })), "{refused:?}");
        assert_eq!(f.state.disks_with_gates().count(), clones.len());
        f.run(Command::DeleteDisks { vdisks: clones.into_iter().chain(made).collect() }).unwrap();
        assert!(f.state.vdisks.values().all(|v| v.id == disk || v.id == snapshot));
    }

    #[test]
    fn a_snapshot_of_a_shared_disk_closes_a_gate() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        f.attach(disk, Attachment::Shared, false).unwrap();
        take(&mut f, disk, "a").unwrap();
        assert_eq!(f.effects.new_epochs_gated, [disk]);
        assert_eq!(f.state.disks_with_gates().collect::<Vec<_>>(), [disk]);
    }
}
