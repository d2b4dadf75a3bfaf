//! What the log says of flattening (2.9): a clone that is to need nothing of its parents any more.
//!
//! ```text
//!  Flatten -> every primary gives each element that the clone inherits a row of the clone's own (`data_access/flatten.rs`)
//!                -> Inherited, slot by slot -> the last slot: the clone's lineage has no parent any more
//! ```
//!
//! No data moves, and nothing that anybody reads changes: such a row refers to the blocks of the parent's. What a slot
//! has it keeps, whoever acts there next, so a slot is reported once. The rows are made under a session of its own, which
//! ends when it is over; who ends that session stops it, and so does a rollback or a deletion of the clone.
//!
//! Invariant: while a clone is flattened nothing is made of it. A snapshot or a clone would inherit what it inherits, and
//! lose that when it is cut off.

use super::command::{Attachment, CommandError, Outcome};
use super::state::{Applied, Effects, Session, State};
use crate::ids::*;
use crate::translator::vdir::Vdisk;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// The holder of the session, for people.
const HOLDER: &str = "flatten, in the background";

/// A clone that is being flattened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flattening {
    /// Under which its rows are made.
    pub session: SessionId,
    /// The GMap whose slots are counted: if its family has another, all of it is looked through anew.
    pub gmap: GmapId,
    /// Slots in which something may be inherited still.
    pub left: BTreeSet<u32>,
}

impl Flattening {
    /// True if this slot may have elements that the clone inherits still.
    pub(crate) fn is_left(&self, slot: SlotId) -> bool {
        self.gmap != slot.gmap || self.left.contains(&slot.slot)
    }
}

impl State {
    /// Begins, if it has not begun; or stops.
    pub(super) fn flatten(&mut self, id: VdiskId, wanted: bool, effects: &mut Effects) -> Applied {
        let disk = self.vdisks.get(&id).ok_or(CommandError::NoSuchDisk(id))?;
        if !wanted {
            self.stop_flattening(id, effects);
            return Ok(Outcome::Done);
        }
        if self.flattenings.contains_key(&id) {
            return Ok(Outcome::Done);
        }
        if disk.is_snapshot() {
            return Err(CommandError::IsSnapshot { name: disk.name.clone() });
        }
        self.check_no_imports([id])?;
        let (family, own, name) = (disk.family, disk.lineage, disk.name.clone());
        let lineages = &self.families[&family].lineages;
        if lineages[&own].parent.is_none() {
            return Err(CommandError::StandsByItself { name });
        }
        if let Some(first) = self.members(family).find(|m| m.is_snapshot() && m.lineage == own) {
            return Err(CommandError::IsInherited { name, by: first.name.clone() });
        }
        // Named or not: something stands on each.
        if let Some((child, _)) = lineages.iter().find(|(_, l)| l.parent.is_some_and(|(parent, _)| parent == own)) {
            let ancestors = |m: &&Vdisk| self.families[&family].ancestors(m.lineage).any(|(l, _)| l == *child);
            let first = self.members(family).find(|m| m.lineage == *child || ancestors(m));
            return Err(CommandError::IsInherited { name, by: first.map_or_else(String::new, |m| m.name.clone()) });
        }
        let session = SessionId(self.index);
        let holder = HOLDER.into();
        self.sessions.insert(session, Session { id: session, vdisk: id, mode: Attachment::ReadOnly, holder });
        let disk = self.vdisks.get_mut(&id).expect("found above");
        disk.sessions.push(session);
        disk.revision = self.index;
        let gmap = self.families[&family].gmap;
        self.flattenings.insert(id, Flattening { session, gmap, left: self.numbers(gmap) });
        Ok(Outcome::Done)
    }

    /// In these slots every element that the clone inherits has a row of its own, on every member in sync. `slots`: each with
    /// the term in which its primary has seen to that.
    pub(super) fn inherited(
        &mut self,
        id: VdiskId,
        session: SessionId,
        gmap: GmapId,
        slots: &[(u32, Term)],
        effects: &mut Effects,
    ) -> Applied {
        let family = self.vdisks.get(&id).map(|disk| disk.family);
        let all = self.numbers(gmap);
        let is_present = |slot: &u32, term: Term| self.slots[&gmap][*slot as usize].term == term;
        let done: BTreeSet<u32> =
            slots.iter().filter(|(s, t)| all.contains(s) && is_present(s, *t)).map(|s| s.0).collect();
        let flattening =
            self.flattenings.get_mut(&id).filter(|f| f.session == session).ok_or(CommandError::Overtaken)?;
        let family = family.expect("what is flattened exists");
        if self.families[&family].gmap != gmap {
            return Err(CommandError::Overtaken);
        }
        if flattening.gmap != gmap {
            (flattening.gmap, flattening.left) = (gmap, all);
        }
        flattening.left.retain(|slot| !done.contains(slot));
        if flattening.left.is_empty() {
            self.cut_off(id, effects);
        }
        Ok(Outcome::Done)
    }

    /// It has all that it shows: nothing of its parents is seen through it any more.
    fn cut_off(&mut self, id: VdiskId, effects: &mut Effects) {
        let (family, lineage) = (self.vdisks[&id].family, self.vdisks[&id].lineage);
        let lineages = &mut self.families.get_mut(&family).expect("a disk has a family").lineages;
        lineages.get_mut(&lineage).expect("a disk has a lineage").parent = None;
        self.stop_flattening(id, effects);
        self.look_anew(family);
        effects.families_narrowed.push(family);
    }

    /// It is over, if it has begun.
    pub(super) fn stop_flattening(&mut self, id: VdiskId, effects: &mut Effects) {
        let Some(Flattening { session, .. }) = self.flattenings.remove(&id) else { return };
        self.sessions.remove(&session);
        let disk = self.vdisks.get_mut(&id).expect("what is flattened exists");
        disk.sessions.retain(|s| *s != session);
        disk.revision = self.index;
        effects.sessions_ended.push(session);
    }

    /// Nothing is made of a clone that is being flattened.
    pub(super) fn check_not_flattened(&self, disks: impl IntoIterator<Item = VdiskId>) -> Result<(), CommandError> {
        match disks.into_iter().find(|id| self.flattenings.contains_key(id)) {
            Some(id) => Err(CommandError::IsFlattened { name: self.vdisks[&id].name.clone() }),
            None => Ok(()),
        }
    }

    /// Who has a disk attached: a rollback or deletion waits for that. Flattening does not hold it up.
    pub fn attached_by(&self, disk: &Vdisk) -> Option<SessionId> {
        self.attachments(disk).next().map(|session| session.id)
    }

    /// Those who have a disk attached; that it is flattened does not count.
    pub fn attachments<'a>(&'a self, disk: &'a Vdisk) -> impl Iterator<Item = &'a Session> {
        let own = self.flattenings.get(&disk.id).map(|f| f.session);
        disk.sessions.iter().filter(move |session| Some(**session) != own).filter_map(|id| self.sessions.get(id))
    }

    /// Slots of a clone that is being flattened, and how many of them are left.
    pub fn flattening(&self, id: VdiskId) -> Option<(usize, usize)> {
        let flattening = self.flattenings.get(&id)?;
        let all = self.slots.get(&flattening.gmap).map_or(0, Vec::len);
        Some((all, flattening.left.len().min(all)))
    }

    pub(super) fn check_flattenings(&self) -> Result<(), String> {
        for (id, flattening) in &self.flattenings {
            let disk = self.vdisks.get(id).ok_or_else(|| format!("{id} is flattened, and does not exist"))?;
            let family = self.families.get(&disk.family).ok_or_else(|| format!("{id} has no family"))?;
            let is_own = self.sessions.get(&flattening.session).is_some_and(|s| s.vdisk == *id);
            let has_parent = family.lineages.get(&disk.lineage).is_some_and(|l| l.parent.is_some());
            let slots = self.slots.get(&flattening.gmap).map_or(0, Vec::len);
            let last = flattening.left.last().map_or(usize::MAX, |last| *last as usize);
            let is_inherited = self.members(disk.family).any(|m| m.is_snapshot() && m.lineage == disk.lineage);
            if !is_own || !has_parent || last >= slots || is_inherited {
                return Err(format!("{id} cannot be flattened as it is said to be"));
            }
        }
        Ok(())
    }

    fn numbers(&self, gmap: GmapId) -> BTreeSet<u32> {
        (0..self.slots.get(&gmap).map_or(0, Vec::len) as u32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::global_state::{Command, Fixture, SnapshotOf};
    use crate::translator::gmap::Scheme;

    fn clone(f: &mut Fixture, source: VdiskId, name: &str) -> VdiskId {
        let epoch = f.state.vdisk(source).unwrap().epoch;
        match f.run(Command::Clone { source, epoch, name: name.into(), made: 0 }) {
            Ok(Outcome::Disk(id)) => id,
            other => panic!("{other:?}"),
        }
    }

    fn snapshot(f: &mut Fixture, vdisk: VdiskId, name: &str) -> Result<VdiskId, CommandError> {
        let of = vec![SnapshotOf { vdisk, epoch: f.state.vdisk(vdisk).unwrap().epoch, name: name.into() }];
        match f.run(Command::Snapshot { of, made: 0, protected: false })? {
            Outcome::Disks(ids) => Ok(ids[0]),
            other => panic!("{other:?}"),
        }
    }

    fn ancestors(f: &Fixture, vdisk: VdiskId) -> usize {
        let disk = f.state.vdisk(vdisk).unwrap();
        f.state.family(disk.family).unwrap().ancestors(disk.lineage).count()
    }

    fn begin(f: &mut Fixture, vdisk: VdiskId) -> Applied {
        f.run(Command::Flatten { vdisk, wanted: true })
    }

    #[test]
    fn a_clone_is_cut_off_when_its_last_slot_is_reported() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let copy = clone(&mut f, disk, "copy");
        assert_eq!(begin(&mut f, disk), Err(CommandError::StandsByItself { name: "db".into() }));
        begin(&mut f, copy).unwrap();
        let session = f.state.flattenings[&copy].session;
        begin(&mut f, copy).unwrap();
        assert_eq!(f.state.flattenings[&copy].session, session, "asked for twice it goes on");
        let (all, _) = f.state.flattening(copy).unwrap();
        let most = f.inherited(copy, all as u32 - 1);
        f.run(most).unwrap();
        assert_eq!((f.state.flattening(copy), ancestors(&f, copy)), (Some((all, 1)), 1));
        let rest = f.inherited(copy, u32::MAX);
        f.run(rest.clone()).unwrap();
        assert_eq!((f.state.flattening(copy), ancestors(&f, copy)), (None, 0));
        assert_eq!((f.effects.families_narrowed.len(), f.effects.sessions_ended.clone()), (1, vec![session]));
        assert!(f.state.vdisk(copy).unwrap().sessions.is_empty() && f.state.sessions.is_empty());
        assert_eq!(f.run(rest), Err(CommandError::Overtaken), "told twice");
        assert_eq!(begin(&mut f, copy), Err(CommandError::StandsByItself { name: "copy".into() }));
    }

    #[test]
    fn what_another_term_map_or_session_has_seen_to_does_not_count() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let copy = clone(&mut f, disk, "copy");
        begin(&mut f, copy).unwrap();
        let Command::Inherited { session, gmap, mut slots, .. } = f.inherited(copy, 8) else { panic!() };
        slots.iter_mut().for_each(|(_, term)| *term += 1);
        slots.push((u32::MAX, 0));
        f.run(Command::Inherited { vdisk: copy, session, gmap, slots }).unwrap();
        let (all, left) = f.state.flattening(copy).unwrap();
        assert_eq!(left, all);
        let old = f.inherited(copy, 8);
        f.run(old.clone()).unwrap();
        assert_eq!(f.state.flattening(copy), Some((all, all - 8)));
        f.run(Command::SetCopies { vdisk: disk, scheme: Scheme::Chained3 }).unwrap();
        assert_eq!(f.run(old), Err(CommandError::Overtaken));
        let new = f.inherited(copy, 1);
        f.run(new).unwrap();
        assert_eq!(f.state.flattening(copy), Some((all, all - 1)), "in another map all slots are looked through");
        let old = f.inherited(copy, u32::MAX);
        f.run(Command::Flatten { vdisk: copy, wanted: false }).unwrap();
        begin(&mut f, copy).unwrap();
        assert_eq!(f.run(old), Err(CommandError::Overtaken));
    }

    #[test]
    fn nothing_is_made_of_a_clone_meanwhile_and_whoever_ends_its_session_stops_it() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let copy = clone(&mut f, disk, "copy");
        begin(&mut f, copy).unwrap();
        let refused = CommandError::IsFlattened { name: "copy".into() };
        assert_eq!(snapshot(&mut f, copy, "a"), Err(refused.clone()));
        let epoch = f.state.vdisk(copy).unwrap().epoch;
        let of_it = Command::Clone { source: copy, epoch, name: "second".into(), made: 0 };
        assert_eq!(f.run(of_it), Err(refused));
        let session = f.state.flattenings[&copy].session;
        f.run(Command::Detach { session }).unwrap();
        assert_eq!((f.state.flattening(copy), ancestors(&f, copy)), (None, 1));
        let first = snapshot(&mut f, copy, "a").unwrap();
        let inherited = |by: &str| Err(CommandError::IsInherited { name: "copy".into(), by: by.into() });
        assert_eq!(begin(&mut f, copy), inherited("copy@a"));
        let second = clone(&mut f, first, "second");
        f.run(Command::DeleteDisks { vdisks: vec![first] }).unwrap();
        assert_eq!(begin(&mut f, copy), inherited("second"));
        f.run(Command::DeleteDisks { vdisks: vec![second] }).unwrap();
        begin(&mut f, copy).unwrap();
    }

    #[test]
    fn a_rollback_or_deletion_does_not_wait_for_it() {
        let mut f = Fixture::up(3);
        let disk = f.disk("db");
        let first = snapshot(&mut f, disk, "a").unwrap();
        let back = |f: &mut Fixture| {
            let epoch = f.state.vdisk(disk).unwrap().epoch;
            f.run(Command::Rollback { vdisk: disk, epoch, to: first, keep: None, made: 0 })
        };
        back(&mut f).unwrap();
        begin(&mut f, disk).unwrap();
        let own = f.state.flattenings[&disk].session;
        let reader = f.attach(disk, Attachment::ReadOnly, false).unwrap();
        assert!(matches!(back(&mut f), Err(CommandError::InUse { session, .. }) if session == reader));
        f.run(Command::Detach { session: reader }).unwrap();
        back(&mut f).unwrap();
        assert_eq!((f.state.flattening(disk), f.effects.sessions_ended.clone()), (None, vec![own]));
        begin(&mut f, disk).unwrap();
        f.run(Command::DeleteDisks { vdisks: vec![first, disk] }).unwrap();
        assert!(f.state.flattenings.is_empty() && f.state.sessions.is_empty());
    }
}
