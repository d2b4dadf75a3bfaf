//! What the log says of changes of placement (2.8): servers drained or filled, slots moved from tuple to tuple.
//!
//! ```text
//!   old  --Fence-->  fenced: old tuple, then the joiners  --Moved-->  new tuple
//!    ^                  |
//!    `-- AbortReconfiguration
//! ```
//!
//! A GMap keeps its id, its slots and its families; the tuples of its slots change, one batch after the other
//! (docs/decisions/0014-slots-move-in-place.md). A joiner is a member that is not in sync, and is brought up to date as
//! any other (`resync.rs`). Each command names the terms that it relies on.
//!
//! Invariants: a slot has at most [`TUPLE_MAX`] members; a slot is new only when every server of its new tuple is in sync and
//! live, so redundancy never falls; turning back takes nobody away without whom there were fewer copies. *Who leaves* a slot may not know
//! it for as long as a lease: the slot remembers it ([`SlotState::left`]), and whoever acts next serves nothing before it
//! knows, or that time is over (2.1, "complete").

use super::command::{CommandError, Outcome};
use super::state::{Applied, Departed, Effects, Member, Split, State};
use crate::ids::*;
use crate::limits::*;
use crate::placement::Candidate;
use crate::translator::gmap::{Gmap, Scheme};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A change of a GMap's placement that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reconfiguration {
    /// State index of the command that began it.
    pub begun: StateIndex,
    /// Slots that are not new yet, each with its new tuple.
    pub moves: BTreeMap<u32, Vec<ServerId>>,
    /// Those of them that are fenced, each with its old tuple.
    pub fenced: BTreeMap<u32, Vec<ServerId>>,
    /// Slots that are new.
    pub moved: u32,
    /// Nothing more is fenced until it is resumed.
    pub paused: bool,
    /// It is turned back: nothing more is fenced, and only what cannot be turned back without a copy less moves on.
    pub turns_back: bool,
}

/// A slot that is to move, and the tuple that it is to have.
pub type Move = (u32, Vec<ServerId>);

impl State {
    /// Servers that may hold data, for the planner.
    pub fn candidates(&self) -> Vec<Candidate> {
        let may = self.servers.iter().filter(|(_, s)| s.incarnation.0 > 0 && !s.drained);
        // No failure domains yet: every server is one of its own.
        may.map(|(id, s)| Candidate { server: *id, weight: s.weight, domain: u32::from(id.0) }).collect()
    }

    /// State index of the last command that changed what a plan for this GMap rests on.
    pub fn planned_from(&self, gmap: GmapId) -> StateIndex {
        self.layouts.get(&gmap).copied().unwrap_or(gmap.0).max(self.placed)
    }

    /// The server holds data from here on, or its data moves to others. Either way all placement is planned anew.
    pub(super) fn drain(&mut self, id: ServerId, drained: bool) -> Applied {
        let index = self.index;
        let server = self.servers.get(&id).ok_or(CommandError::NoSuchServer(id))?;
        if drained && !server.drained {
            self.check_enough_without(id)?;
        }
        let server = self.servers.get_mut(&id).expect("just seen");
        (server.drained, server.away) = (drained, false);
        self.placed = index;
        self.replan = self.gmaps.keys().copied().collect();
        Ok(Outcome::Done)
    }

    /// Servers that hold data are enough for every scheme that is used, if this one holds none.
    pub(crate) fn check_enough_without(&self, id: ServerId) -> Result<(), CommandError> {
        let servers = self.candidates().iter().filter(|c| c.server != id && c.weight > 0).count();
        let is_used = |id: &GmapId| !self.splits.contains_key(id) || self.families.values().any(|f| f.gmap == *id);
        let used = self.gmaps.values().filter(|g| is_used(&g.id));
        let copies = used.map(|g| g.scheme.copies()).max().unwrap_or(1);
        if servers < copies { Err(CommandError::TooFewServers { copies, servers }) } else { Ok(()) }
    }

    /// A server that is down is drained until it comes up, if the others are enough.
    pub(super) fn stayed_away(&mut self, id: ServerId, incarnation: Incarnation) -> Applied {
        let server = self.servers.get(&id).ok_or(CommandError::NoSuchServer(id))?;
        if server.incarnation != incarnation || !server.down || server.drained || self.replace_after == 0 {
            return Err(CommandError::Overtaken);
        }
        self.drain(id, true)?;
        self.servers.get_mut(&id).expect("just seen").away = true;
        Ok(Outcome::Done)
    }

    /// A server that stayed away is there again: it is to hold its share. What has not moved yet stays with it, which is
    /// less to copy than all of its share once more.
    pub(super) fn came_back(&mut self, id: ServerId) {
        self.placed = self.index;
        self.replan = self.gmaps.keys().copied().collect();
        let maps = &self.gmaps;
        let leaves = |gmap: &GmapId, (slot, target): (&u32, &Vec<ServerId>)| {
            maps[gmap].slots[*slot as usize].contains(&id) && !target.contains(&id)
        };
        for (gmap, under_way) in &mut self.reconfigurations {
            under_way.turns_back |= under_way.moves.iter().any(|one| leaves(gmap, one));
        }
        self.reconfigurations.retain(|_, r| !(r.turns_back && r.fenced.is_empty()));
    }

    /// A family gets other copies: its GMap, or one of its own, has another scheme, and is planned anew.
    pub(super) fn set_copies(&mut self, vdisk: VdiskId, scheme: Scheme, effects: &mut Effects) -> Applied {
        let index = self.index;
        let family = self.vdisks.get(&vdisk).ok_or(CommandError::NoSuchDisk(vdisk))?.family;
        let from = self.families[&family].gmap;
        let map = &self.gmaps[&from];
        // What was turned back half way may be asked for again.
        let goes_on = self.reconfigurations.get(&from).is_some_and(|r| !r.turns_back) || self.replan.contains(&from);
        if map.scheme == scheme && (goes_on || map.slots.iter().all(|tuple| tuple.len() == scheme.copies())) {
            return Ok(Outcome::Done);
        }
        let (copies, servers) = (scheme.copies(), self.candidates().iter().filter(|c| c.weight > 0).count());
        if servers < copies {
            return Err(CommandError::TooFewServers { copies, servers });
        }
        if self.reconfigurations.contains_key(&from) {
            return Err(CommandError::Moving(from));
        }
        let gmap = if self.splits.contains_key(&from) { from } else { self.split(family, effects)? };
        self.gmaps.get_mut(&gmap).expect("just made").scheme = scheme;
        self.layouts.insert(gmap, index);
        self.replan.insert(gmap);
        Ok(Outcome::Done)
    }

    /// A family gets a GMap of its own. Every slot that it leaves and every slot that it enters has a new term: what is on
    /// its way by the old one is refused, and settled before anything is served.
    fn split(&mut self, family: FamilyId, effects: &mut Effects) -> Result<GmapId, CommandError> {
        let (index, to) = (self.index, GmapId(self.index));
        let from = self.families[&family].gmap;
        let slots: usize = self.slots.values().chain(self.slots.get(&from)).map(Vec::len).sum();
        if slots > SLOTS_ALL_MAX {
            return Err(CommandError::TooMany { limit: SLOTS_ALL_MAX, what: "slots of all maps together".into() });
        }
        let family_state = self.families.get_mut(&family).expect("its disk exists");
        let from = std::mem::replace(&mut family_state.gmap, to);
        family_state.revision = index;
        let map = Gmap { id: to, ..self.gmaps[&from].clone() };
        let table = self.slots.get_mut(&from).expect("a GMap has slots");
        for slot in table.iter_mut() {
            slot.term = index;
            effects.names.extend(slot.tuple.iter().map(|m| m.server));
        }
        let table = table.clone();
        for gmap in [from, to] {
            effects.slots.extend((0..table.len() as u32).map(|slot| SlotId { gmap, slot }));
        }
        self.slots.insert(to, table);
        self.gmaps.insert(to, map);
        self.splits.insert(to, Split { family, from });
        self.narrow_to_members(effects);
        Ok(to)
    }

    /// A plan that was made from what still holds begins. None at all: the placement is as it should be.
    pub(super) fn reconfigure(
        &mut self,
        gmap: GmapId,
        planned_from: StateIndex,
        moves: &[Move],
        more: bool,
    ) -> Applied {
        let map = self.gmaps.get(&gmap).ok_or(CommandError::NoSuchGmap(gmap))?;
        if self.reconfigurations.contains_key(&gmap) || self.planned_from(gmap) != planned_from {
            return Err(CommandError::Overtaken);
        }
        let slots = map.slots.len();
        let numbers: BTreeSet<u32> = moves.iter().map(|(slot, _)| *slot).collect();
        if numbers.len() != moves.len() || numbers.last().is_some_and(|n| *n as usize >= slots) {
            return Err(CommandError::Malformed(format!("{gmap} has {slots} slots, and each moves once")));
        }
        for (slot, tuple) in moves {
            let distinct: BTreeSet<&ServerId> = tuple.iter().collect();
            if tuple.len() != map.scheme.copies() || distinct.len() != tuple.len() {
                return Err(CommandError::Malformed(format!("slot {slot} of {gmap} cannot have the tuple {tuple:?}")));
            }
            for server in tuple {
                let known = self.servers.get(server).ok_or(CommandError::NoSuchServer(*server))?;
                if known.drained || known.incarnation.0 == 0 {
                    return Err(CommandError::Overtaken);
                }
            }
        }
        if !more {
            self.replan.remove(&gmap);
        }
        let map = &self.gmaps[&gmap];
        let differ = moves.iter().filter(|(slot, tuple)| map.slots[*slot as usize] != *tuple).cloned();
        let moves: BTreeMap<u32, Vec<ServerId>> = differ.collect();
        if !moves.is_empty() {
            let (begun, fenced) = (self.index, BTreeMap::new());
            let new = Reconfiguration { begun, moves, fenced, moved: 0, paused: false, turns_back: false };
            self.reconfigurations.insert(gmap, new);
        }
        Ok(Outcome::Done)
    }

    /// The servers of the new tuples that have nothing of these slots yet become members, last in order and not in sync.
    pub(super) fn fence(&mut self, gmap: GmapId, slots: &[(u32, Term)], effects: &mut Effects) -> Applied {
        let index = self.index;
        let (Some(under_way), Some(table)) = (self.reconfigurations.get_mut(&gmap), self.slots.get_mut(&gmap)) else {
            return Err(CommandError::Overtaken);
        };
        if under_way.paused || under_way.turns_back {
            return Err(CommandError::Overtaken);
        }
        let mut fenced = 0;
        for (number, term) in slots {
            let Some(target) = under_way.moves.get(number) else { continue };
            let Some(slot) = table.get_mut(*number as usize).filter(|slot| slot.term == *term) else { continue };
            let joiners: Vec<ServerId> = target.iter().filter(|s| slot.member(**s).is_none()).copied().collect();
            if under_way.fenced.contains_key(number) || slot.tuple.len() + joiners.len() > TUPLE_MAX {
                continue;
            }
            under_way.fenced.insert(*number, slot.tuple.iter().map(|m| m.server).collect());
            fenced += 1;
            if joiners.is_empty() {
                continue; // Somebody only goes, or the order changes: nothing is to be copied.
            }
            let member = |server| Member { server, in_sync: false, since: index, incomplete: false, out: index };
            slot.tuple.extend(joiners.into_iter().map(member));
            slot.term = index;
            effects.slots.push(SlotId { gmap, slot: *number });
            effects.names.extend(slot.tuple.iter().map(|m| m.server));
        }
        if fenced == 0 { Err(CommandError::Overtaken) } else { Ok(Outcome::Done) }
    }

    /// Slots are new: those in which every server of the new tuple is in sync and live. Others are passed over.
    pub(super) fn moved(&mut self, gmap: GmapId, slots: &[(u32, Term)], effects: &mut Effects) -> Applied {
        let index = self.index;
        let servers = &self.servers;
        let is_live = |s: &ServerId| servers.get(s).is_some_and(|s| !s.down && s.suspect.is_none());
        let (Some(under_way), Some(table), Some(map)) =
            (self.reconfigurations.get_mut(&gmap), self.slots.get_mut(&gmap), self.gmaps.get_mut(&gmap))
        else {
            return Err(CommandError::Overtaken);
        };
        for (number, term) in slots {
            let Some(target) = under_way.moves.get(number).filter(|_| under_way.fenced.contains_key(number)) else {
                continue;
            };
            let Some(slot) = table.get_mut(*number as usize).filter(|slot| slot.term == *term) else { continue };
            let has_all = |s: &ServerId| slot.member(*s).is_some_and(|m| m.in_sync) && is_live(s);
            if !target.iter().all(has_all) {
                continue;
            }
            effects.names.extend(slot.tuple.iter().map(|m| m.server));
            let stays = |m: &Member| target.contains(&m.server);
            let mut stay: Vec<Member> = slot.tuple.iter().copied().filter(stays).collect();
            stay.sort_by_key(|m| target.iter().position(|s| *s == m.server));
            slot.leave(index, |m| !target.contains(&m.server), servers);
            slot.tuple = stay;
            slot.term = index;
            effects.slots.push(SlotId { gmap, slot: *number });
            map.slots[*number as usize] = under_way.moves.remove(number).expect("just seen");
            under_way.fenced.remove(number);
            under_way.moved += 1;
        }
        if effects.slots.is_empty() {
            return Err(CommandError::Overtaken);
        }
        if under_way.moves.is_empty() || under_way.turns_back && under_way.fenced.is_empty() {
            self.reconfigurations.remove(&gmap);
        }
        self.layouts.insert(gmap, index);
        self.narrow_to_members(effects);
        Ok(Outcome::Done)
    }

    /// Fenced slots whose joiners can be forgotten: one server of the old tuple is live and in sync, and without the joiners
    /// there are as many copies as before, or as the scheme has. The others move on: see [`State::moved`].
    fn turning_back(&self, gmap: GmapId) -> Vec<u32> {
        let (Some(under_way), Some(table)) = (self.reconfigurations.get(&gmap), self.slots.get(&gmap)) else {
            return Vec::new();
        };
        let is_up = |s: &ServerId| self.servers.get(s).is_some_and(|s| !s.down);
        let is_live = |s: &ServerId| self.servers.get(s).is_some_and(|s| !s.down && s.suspect.is_none());
        let can = |(number, old): &(&u32, &Vec<ServerId>)| {
            let Some(slot) = table.get(**number as usize) else { return false };
            let in_sync = |s: &ServerId| slot.member(*s).is_some_and(|m| m.in_sync);
            let copies_left = old.iter().filter(|s| in_sync(s) && is_up(s)).count();
            let copies = slot.in_sync().filter(is_up).count();
            old.iter().any(|s| in_sync(s) && is_live(s)) && copies_left >= copies.min(old.len())
        };
        under_way.fenced.iter().filter(can).map(|(number, _)| *number).collect()
    }

    /// True if turning back gets on when it is asked for now.
    pub(crate) fn can_turn_back(&self, gmap: GmapId) -> bool {
        !self.turning_back(gmap).is_empty()
    }

    /// Turns back: joiners of fenced slots are forgotten, where that costs no copy. The rest when it is asked again, or
    /// when it is new, if its joiners are in sync first. What is new stays so.
    pub(super) fn abort_reconfiguration(&mut self, gmap: GmapId, effects: &mut Effects) -> Applied {
        let index = self.index;
        let back = self.turning_back(gmap);
        let servers = &self.servers;
        let (Some(under_way), Some(table)) = (self.reconfigurations.get_mut(&gmap), self.slots.get_mut(&gmap)) else {
            return Err(CommandError::Overtaken);
        };
        for number in &back {
            let old = &under_way.fenced[number];
            let slot = &mut table[*number as usize];
            if slot.tuple.iter().all(|m| old.contains(&m.server)) {
                continue;
            }
            effects.names.extend(slot.tuple.iter().map(|m| m.server));
            slot.leave(index, |m| !old.contains(&m.server), servers);
            slot.tuple.retain(|m| old.contains(&m.server));
            slot.term = index;
            effects.slots.push(SlotId { gmap, slot: *number });
        }
        let begun = under_way.begun;
        let is_new = !std::mem::replace(&mut under_way.turns_back, true);
        for number in &back {
            under_way.fenced.remove(number);
        }
        if under_way.fenced.is_empty() {
            self.reconfigurations.remove(&gmap);
        } else if back.is_empty() && !is_new {
            return Err(CommandError::Overtaken);
        }
        self.layouts.insert(gmap, index);
        if self.placed < begun {
            self.replan.remove(&gmap); // What was asked for since is still to be done.
        }
        if !effects.slots.is_empty() {
            self.narrow_to_members(effects);
        }
        Ok(Outcome::Done)
    }

    pub(super) fn pause_reconfiguration(&mut self, gmap: GmapId, paused: bool) -> Applied {
        let under_way = self.reconfigurations.get_mut(&gmap).ok_or(CommandError::Overtaken)?;
        under_way.paused = paused;
        Ok(Outcome::Done)
    }

    /// Whoever is a member, or was until now, settles it.
    fn narrow_to_members(&self, effects: &mut Effects) {
        effects.narrows = true;
        effects.concerned = effects.names.iter().copied().collect();
    }

    pub(super) fn check_reconfigurations(&self) -> Result<(), String> {
        for (gmap, split) in &self.splits {
            let (Some(to), Some(from)) = (self.gmaps.get(gmap), self.gmaps.get(&split.from)) else {
                return Err(format!("{gmap} was split from {}, and one of them does not exist", split.from));
            };
            let is_its = |f: &crate::translator::vdir::Family| f.gmap == *gmap;
            if to.slots.len() != from.slots.len() || !self.families.get(&split.family).is_none_or(is_its) {
                return Err(format!("{gmap} is not what {} got by itself", split.family));
            }
            if self.families.values().any(|f| f.gmap == *gmap && f.id != split.family) {
                return Err(format!("{gmap} is not only the GMap of {}", split.family));
            }
        }
        let known = |s: &ServerId| self.servers.contains_key(s);
        for (gmap, under_way) in &self.reconfigurations {
            let (Some(map), Some(table)) = (self.gmaps.get(gmap), self.slots.get(gmap)) else {
                return Err(format!("{gmap} is reconfigured and does not exist"));
            };
            let copies = map.scheme.copies();
            let is_tuple = |tuple: &Vec<ServerId>| {
                tuple.len() == copies
                    && tuple.iter().all(known)
                    && tuple.iter().collect::<BTreeSet<_>>().len() == copies
            };
            let is_slot = |n: &u32| (*n as usize) < map.slots.len();
            if !under_way.moves.iter().all(|(n, tuple)| is_slot(n) && is_tuple(tuple)) {
                return Err(format!("{gmap} is to get a tuple that cannot be"));
            }
            if under_way.moves.is_empty() || under_way.begun > self.index {
                return Err(format!("{gmap} is reconfigured by nothing"));
            }
            for (number, old) in &under_way.fenced {
                let Some(slot) = table.get(*number as usize) else {
                    return Err(format!("{gmap} has a fenced slot {number}, and no such slot"));
                };
                let target = under_way.moves.get(number);
                let allowed = |s: &ServerId| old.contains(s) || target.is_some_and(|t| t.contains(s));
                let are_there = old.iter().chain(target.into_iter().flatten()).all(|s| slot.member(*s).is_some());
                if target.is_none() || !are_there || !slot.tuple.iter().all(|m| allowed(&m.server)) {
                    return Err(format!("slot {number} of {gmap} is not fenced as it says"));
                }
            }
        }
        let is_past = |(gmap, index): (&GmapId, &StateIndex)| self.gmaps.contains_key(gmap) && *index <= self.index;
        if !self.layouts.iter().all(is_past) || self.placed > self.index {
            return Err("a placement is from the future".into());
        }
        if !self.replan.iter().all(|gmap| self.gmaps.contains_key(gmap)) {
            return Err("a map is to be planned anew and does not exist".into());
        }
        Ok(())
    }
}

impl super::SlotState {
    /// Notes who goes: who may have a lease by which it serves what it has.
    fn leave(
        &mut self,
        index: StateIndex,
        goes: impl Fn(&Member) -> bool,
        servers: &BTreeMap<ServerId, super::ServerState>,
    ) {
        let may_serve = |d: &Departed| servers.get(&d.server).is_some_and(|s| !s.down && d.index > s.up);
        self.left.retain(may_serve);
        // Who never was in sync never served.
        let has_served = |m: &&Member| m.in_sync || m.out != m.since;
        let gone = self.tuple.iter().filter(|m| goes(m)).filter(has_served);
        let gone = gone.map(|m| Departed { server: m.server, index });
        let gone: Vec<Departed> = gone.filter(may_serve).collect();
        self.left.retain(|d| gone.iter().all(|g| g.server != d.server));
        self.left.extend(gone);
        // Who left more memberships ago than a tuple has places is known to know: for joiners to get in sync in between, the
        // slot was served.
        let over = self.left.len().saturating_sub(TUPLE_MAX);
        self.left.drain(..over);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::global_state::{Command, Fixture};
    use crate::mover::{Mover, Wait, next_step, waits_for};
    use stdx::{Duration, Instant};

    fn s(n: u16) -> ServerId {
        ServerId(n)
    }

    /// Four servers, of which the last holds nothing yet; a disk with two copies.
    fn three_and_a_new_one() -> (Fixture, GmapId) {
        let mut f = Fixture::up(4);
        f.run(Command::Drain { server: s(4), drained: true }).unwrap();
        f.disk("a");
        assert!(f.state.all_slots().all(|(_, slot)| slot.member(s(4)).is_none()));
        let gmap = *f.state.gmaps.keys().next().unwrap();
        (f, gmap)
    }

    fn step(f: &mut Fixture, gmap: GmapId) -> Option<Command> {
        let command = next_step(&f.state, gmap)?;
        f.run(command.clone()).unwrap();
        Some(command)
    }

    /// What recovery does.
    fn bring_in_sync(f: &mut Fixture) {
        let out: Vec<(ServerId, SlotId, Term)> = f
            .state
            .all_slots()
            .flat_map(|(id, slot)| slot.tuple.iter().filter(|m| !m.in_sync).map(move |m| (m.server, id, slot.term)))
            .collect();
        for (server, slot, term) in out {
            let incarnation = f.state.servers[&server].incarnation;
            let _ = f.run(Command::InSync { server, incarnation, slots: vec![(slot, term)] });
        }
    }

    fn finish(f: &mut Fixture, gmap: GmapId) -> usize {
        let mut fences = 0;
        for _ in 0..2000 {
            match step(f, gmap) {
                Some(Command::Fence { .. }) => fences += 1,
                Some(_) => {}
                None if f.state.reconfigurations.is_empty() && f.state.replan.is_empty() => return fences,
                None => bring_in_sync(f),
            }
            for (id, slot) in f.state.all_slots() {
                // The lesser of the two schemes, where there are two.
                let map = &f.state.gmaps[&id.gmap];
                let copies = map.scheme.copies().min(map.slots[id.slot as usize].len());
                assert!(slot.in_sync().count() >= copies, "{id:?}: redundancy fell");
            }
        }
        panic!("it does not end: {:?}", f.state.reconfigurations);
    }

    fn held(f: &Fixture, server: u16) -> usize {
        f.state.slots_of_server(s(server)).count()
    }

    #[test]
    fn a_server_that_is_filled_gets_its_share_and_one_that_is_drained_holds_nothing() {
        let (mut f, gmap) = three_and_a_new_one();
        f.run(Command::Drain { server: s(4), drained: false }).unwrap();
        assert!(finish(&mut f, gmap) > 10, "in many steps");
        let all = 2 * f.state.gmaps[&gmap].slots.len();
        for server in 1..=4 {
            assert!(held(&f, server).abs_diff(all / 4) <= 2, "s{server} has {}", held(&f, server));
        }
        f.run(Command::Drain { server: s(2), drained: true }).unwrap();
        finish(&mut f, gmap);
        assert_eq!(held(&f, 2), 0);
        for (id, slot) in f.state.all_slots() {
            let tuple: Vec<ServerId> = slot.tuple.iter().map(|m| m.server).collect();
            assert_eq!(tuple, f.state.gmaps[&gmap].slots[id.slot as usize]);
            assert!(slot.tuple.iter().all(|m| m.in_sync));
        }
        // New disks are placed by it, too.
        assert_eq!(State::decode(&f.state.encode()).unwrap(), f.state);
    }

    fn goodbye(f: &mut Fixture, server: u16) -> Incarnation {
        let incarnation = f.state.servers[&s(server)].incarnation;
        f.run(Command::Goodbye { server: s(server), incarnation }).unwrap();
        incarnation
    }

    fn up_again(f: &mut Fixture, server: u16) {
        let known = &f.state.servers[&s(server)];
        let disks = known.disks.iter().map(|(d, of)| (*d, of.incarnation.into(), of.capacity)).collect();
        let (incarnation, addresses) = (Incarnation(known.incarnation.0 + 1), known.addresses.clone());
        f.run(Command::ServerUp { server: s(server), incarnation, addresses, disks }).unwrap();
    }

    /// Takes steps until this holds, while recovery does its part.
    fn until(f: &mut Fixture, gmap: GmapId, is_so: impl Fn(&Fixture) -> bool) {
        for _ in 0..4000 {
            if is_so(f) {
                return;
            }
            if step(f, gmap).is_none() {
                bring_in_sync(f);
            }
        }
        panic!("it never is so: {:?}", f.state.reconfigurations);
    }

    fn is_at_rest(f: &Fixture) -> bool {
        f.state.reconfigurations.is_empty() && f.state.replan.is_empty()
    }

    #[test]
    fn who_stayed_away_is_replaced_and_gets_its_share_when_it_is_back() {
        let mut f = Fixture::up(4);
        f.disk("a");
        let gmap = *f.state.gmaps.keys().next().unwrap();
        let share = held(&f, 3);
        let incarnation = f.state.servers[&s(3)].incarnation;
        let refused = f.run(Command::StayedAway { server: s(3), incarnation });
        assert_eq!(refused, Err(CommandError::Overtaken), "it is there");
        goodbye(&mut f, 3);
        f.run(Command::StayedAway { server: s(3), incarnation }).unwrap();
        until(&mut f, gmap, is_at_rest);
        assert_eq!(held(&f, 3), 0);
        assert!(f.state.all_slots().all(|(_, slot)| slot.in_sync().count() == 2), "all on two others");
        up_again(&mut f, 3);
        assert!(!f.state.servers[&s(3)].drained);
        assert_eq!(finish(&mut f, gmap).min(2), 2, "it is filled again, in steps");
        assert!(held(&f, 3).abs_diff(share) <= 2);
    }

    #[test]
    fn who_is_back_before_its_replacement_has_ended_keeps_what_has_not_moved() {
        let mut f = Fixture::up(4);
        f.disk("a");
        let gmap = *f.state.gmaps.keys().next().unwrap();
        let before = f.state.gmaps[&gmap].slots.clone();
        let share = held(&f, 3);
        let incarnation = goodbye(&mut f, 3);
        f.run(Command::StayedAway { server: s(3), incarnation }).unwrap();
        until(&mut f, gmap, |f| f.state.slots_of_server(s(3)).count() < share / 2);
        let kept: Vec<u32> = f.state.slots_of_server(s(3)).map(|(id, _)| id.slot).collect();
        up_again(&mut f, 3);
        until(&mut f, gmap, is_at_rest);
        assert!(held(&f, 3).abs_diff(share) <= 2, "{} of {share}", held(&f, 3));
        let stays = |slot: &&u32| f.state.gmaps[&gmap].slots[**slot as usize] == before[**slot as usize];
        let as_before = kept.iter().filter(stays).count();
        assert!(as_before * 4 >= kept.len() * 3, "{as_before} of {} are as they were", kept.len());
        assert_eq!(State::decode(&f.state.encode()).unwrap(), f.state);
    }

    #[test]
    fn who_is_removed_held_nothing_and_its_number_is_not_given_again() {
        let mut f = Fixture::up(3);
        let addresses = vec!["fourth:1".to_string()];
        f.run(Command::AddServer { addresses: addresses.clone(), token: 76 }).unwrap();
        let disks = vec![(DiskId(4), Incarnation(0).into(), f.state.servers[&s(3)].weight)];
        f.run(Command::ServerUp { server: s(4), incarnation: Incarnation(1), addresses, disks }).unwrap();
        f.disk("a");
        let gmap = *f.state.gmaps.keys().next().unwrap();
        let remove = Command::RemoveServer { server: s(4) };
        assert_eq!(f.run(remove.clone()), Err(CommandError::NotDown(s(4))));
        let incarnation = goodbye(&mut f, 4);
        assert!(matches!(f.run(remove.clone()), Err(CommandError::HoldsData { slots, .. }) if slots > 100));
        f.run(Command::Drain { server: s(4), drained: true }).unwrap();
        until(&mut f, gmap, is_at_rest);
        f.run(remove.clone()).unwrap();
        assert_eq!(f.run(remove), Err(CommandError::NoSuchServer(s(4))));
        let addresses = vec!["other:1".to_string()];
        let up = Command::ServerUp {
            server: s(4),
            incarnation: Incarnation(incarnation.0 + 1),
            addresses: addresses.clone(),
            disks: vec![],
        };
        assert_eq!(f.run(up), Err(CommandError::NoSuchServer(s(4))));
        assert_eq!(f.run(Command::AddServer { addresses, token: 77 }), Ok(Outcome::Server(s(5))));
        assert_eq!(State::decode(&f.state.encode()).unwrap(), f.state);
        goodbye(&mut f, 1);
        assert_eq!(f.run(Command::RemoveServer { server: s(1) }), Err(CommandError::InRing(s(1))));
    }

    #[test]
    fn what_an_operator_drained_is_not_filled_when_it_comes_up() {
        let mut f = Fixture::up(4);
        f.disk("a");
        let incarnation = goodbye(&mut f, 3);
        f.run(Command::StayedAway { server: s(3), incarnation }).unwrap();
        f.run(Command::Drain { server: s(3), drained: true }).unwrap();
        up_again(&mut f, 3);
        assert!(f.state.servers[&s(3)].drained);
    }

    #[test]
    fn the_leader_replaces_who_has_been_down_for_too_long_and_a_third_at_most() {
        let mut f = Fixture::up(5);
        f.disk("a");
        let mut mover = Mover::default();
        let at = |seconds: u64| Instant::ZERO + Duration::from_secs(seconds);
        let stayed = |mover: &mut Mover, f: &Fixture, seconds: u64| {
            let all = mover.look(at(seconds), &f.state);
            all.into_iter().find(|(_, c)| matches!(c, Command::StayedAway { .. })).map(|(_, command)| command)
        };
        let gmap = *f.state.gmaps.keys().next().unwrap();
        goodbye(&mut f, 3);
        assert_eq!(stayed(&mut mover, &f, 10), None);
        goodbye(&mut f, 4);
        assert_eq!(stayed(&mut mover, &f, 500), None);
        up_again(&mut f, 3);
        assert_eq!(stayed(&mut mover, &f, 600), None);
        goodbye(&mut f, 3);
        assert_eq!(stayed(&mut mover, &f, 700), None, "another absence");
        let command = stayed(&mut mover, &f, 1100).expect("the other one is down since 500");
        assert!(matches!(command, Command::StayedAway { server, .. } if server == s(4)));
        f.run(command).unwrap();
        assert_eq!(stayed(&mut mover, &f, 2000), None, "a third of five is one");
        up_again(&mut f, 4);
        assert!(stayed(&mut mover, &f, 2100).is_some(), "the other one's turn");
        f.run(Command::ReplaceAfter { seconds: 0 }).unwrap();
        assert_eq!(stayed(&mut mover, &f, 1_000_000), None);
        assert!(f.state.replan.contains(&gmap));
        assert_eq!(next_step(&f.state, gmap), None, "nothing is planned around who may be back in a moment");
    }

    #[test]
    fn the_leader_does_not_ask_for_what_would_be_refused_for_lack_of_servers() {
        for (scheme, asks) in [(Scheme::Chained, true), (Scheme::Chained3, false)] {
            let mut f = Fixture::up(3);
            let stripe_unit = STRIPE_UNIT_DEFAULT;
            f.run(Command::CreateDisk { name: "a".into(), size: 1 << 30, scheme, stripe_unit }).unwrap();
            goodbye(&mut f, 3);
            let mut mover = Mover::default();
            mover.look(Instant::ZERO, &f.state);
            let late = mover.look(Instant::ZERO + Duration::from_secs(700), &f.state);
            assert_eq!(!late.is_empty(), asks, "{scheme:?} on the two that are left");
        }
    }

    #[test]
    fn what_would_leave_too_few_servers_is_refused() {
        let (mut f, gmap) = three_and_a_new_one();
        f.run(Command::Drain { server: s(3), drained: true }).unwrap();
        let refused = f.run(Command::Drain { server: s(2), drained: true });
        assert_eq!(refused, Err(CommandError::TooFewServers { copies: 2, servers: 1 }));
        assert_eq!(f.run(Command::Drain { server: s(9), drained: true }), Err(CommandError::NoSuchServer(s(9))));
        finish(&mut f, gmap);
        assert_eq!(held(&f, 3), 0);
    }

    #[test]
    fn a_slot_is_new_only_when_all_of_the_new_tuple_are_in_sync_and_live_in_its_term() {
        let (mut f, gmap) = three_and_a_new_one();
        let slot = SlotId { gmap, slot: 0 };
        let tuple = |f: &Fixture| f.state.slot(slot).unwrap().tuple.iter().map(|m| m.server.0).collect::<Vec<_>>();
        assert_eq!(tuple(&f), [1, 2]);
        f.run(Command::Drain { server: s(4), drained: false }).unwrap();
        let planned_from = f.state.planned_from(gmap);
        let plan = |planned_from, moves| Command::Reconfigure { gmap, planned_from, moves, more: false };
        let old = f.run(plan(planned_from - 1, vec![(0, vec![s(1), s(4)])]));
        assert_eq!(old, Err(CommandError::Overtaken));
        for bad in [vec![(0, vec![s(1), s(1)])], vec![(0, vec![s(1)])], vec![(4096, vec![s(1), s(2)])]] {
            assert!(matches!(f.run(plan(planned_from, bad)), Err(CommandError::Malformed(_))));
        }
        f.run(plan(planned_from, vec![(0, vec![s(4), s(1)])])).unwrap();
        let moved = |f: &Fixture| Command::Moved { gmap, slots: vec![(0, f.state.slot(slot).unwrap().term)] };
        let early = moved(&f);
        assert_eq!(f.run(early), Err(CommandError::Overtaken), "it is not fenced");
        let term = f.state.slot(slot).unwrap().term;
        f.run(Command::Fence { gmap, slots: vec![(0, term)] }).unwrap();
        assert_eq!(tuple(&f), [1, 2, 4]);
        assert_eq!(f.state.slot(slot).unwrap().term, f.state.index);
        assert_eq!(f.state.slot(slot).unwrap().member(s(4)).unwrap().since, f.state.index);
        assert!(!f.state.slot(slot).unwrap().has_unaware(&f.state.servers), "a joiner has nothing to serve");
        assert_eq!(f.run(Command::Fence { gmap, slots: vec![(0, term)] }), Err(CommandError::Overtaken), "once");
        let early = moved(&f);
        assert_eq!(f.run(early), Err(CommandError::Overtaken), "s4 is not in sync");
        let late = moved(&f);
        bring_in_sync(&mut f);
        assert_eq!(f.run(late), Err(CommandError::Overtaken), "of an older term");
        let suspect = Command::Suspect { server: s(4), incarnation: f.state.servers[&s(4)].incarnation };
        f.run(suspect).unwrap();
        let early = moved(&f);
        assert_eq!(f.run(early.clone()), Err(CommandError::Overtaken), "s4 is suspected");
        let (server, incarnation) = (s(4), f.state.servers[&s(4)].incarnation);
        let suspect = f.state.servers[&s(4)].suspect.unwrap();
        f.run(Command::Reinstate { server, incarnation, suspect }).unwrap();
        f.run(early).unwrap();
        assert_eq!(tuple(&f), [4, 1]);
        assert!(f.effects.narrows && f.effects.names == [s(1), s(2), s(4)].into());
        let new = f.state.slot(slot).unwrap();
        assert_eq!((new.term, new.acting(&f.state.servers)), (f.state.index, Some(s(4))));
        let left: Vec<Departed> = new.unaware_leavers(&f.state.servers).copied().collect();
        assert_eq!(left, [Departed { server: s(2), index: f.state.index }]);
        assert!(f.state.reconfigurations.is_empty());
    }

    /// Some slots have moved, others are fenced.
    fn half_moved() -> (Fixture, GmapId, Vec<u32>) {
        let (mut f, gmap) = three_and_a_new_one();
        f.run(Command::Drain { server: s(4), drained: false }).unwrap();
        for _ in 0..3 {
            step(&mut f, gmap);
            bring_in_sync(&mut f);
        }
        step(&mut f, gmap);
        let under_way = &f.state.reconfigurations[&gmap];
        let fenced: Vec<u32> = under_way.fenced.keys().copied().collect();
        assert!(under_way.moved > 0 && !fenced.is_empty());
        (f, gmap, fenced)
    }

    /// A member is taken out of a slot.
    fn take_out(f: &mut Fixture, slot: SlotId, server: ServerId) {
        let term = f.state.slot(slot).unwrap().term;
        f.run(Command::TakeOut { server, slots: vec![(slot, term)] }).unwrap();
    }

    #[test]
    fn turning_back_forgets_joiners_though_an_old_member_is_out_of_sync() {
        let (mut f, gmap, fenced) = half_moved();
        let moved = f.state.reconfigurations[&gmap].moved as usize;
        let before: Vec<Vec<ServerId>> = f.state.gmaps[&gmap].slots.clone();
        let first = SlotId { gmap, slot: fenced[0] };
        let server = f.state.slot(first).unwrap().tuple[1].server;
        take_out(&mut f, first, server);
        f.run(Command::AbortReconfiguration { gmap }).unwrap();
        assert!(f.state.reconfigurations.is_empty() && f.state.replan.is_empty());
        assert_eq!(f.state.gmaps[&gmap].slots, before, "what was new stays so");
        assert!(f.state.all_slots().all(|(_, slot)| slot.tuple.len() == 2));
        assert_eq!(held(&f, 4), moved);
    }

    #[test]
    fn turning_back_costs_no_copy() {
        let (mut f, gmap, fenced) = half_moved();
        bring_in_sync(&mut f);
        let first = SlotId { gmap, slot: fenced[0] };
        let target = f.state.reconfigurations[&gmap].moves[&fenced[0]].clone();
        let goes = f.state.slot(first).unwrap().tuple.iter().map(|m| m.server).find(|s| !target.contains(s)).unwrap();
        take_out(&mut f, first, goes);
        f.run(Command::AbortReconfiguration { gmap }).unwrap();
        assert_eq!(f.state.reconfigurations[&gmap].fenced.keys().collect::<Vec<_>>(), [&fenced[0]]);
        assert_eq!(f.run(Command::AbortReconfiguration { gmap }), Err(CommandError::Overtaken));
        // Its joiner is one of two copies: it stays, and the slot is new.
        assert!(matches!(step(&mut f, gmap), Some(Command::Moved { .. })));
        assert!(f.state.reconfigurations.is_empty());
        assert_eq!(f.state.slot(first).unwrap().in_sync().collect::<Vec<_>>(), target);
    }

    #[test]
    fn a_disk_gets_other_copies_and_its_neighbours_do_not() {
        let mut f = Fixture::up(4);
        let (a, b) = (f.disk("a"), f.disk("b"));
        let of = |f: &Fixture, disk: VdiskId| f.state.families[&f.state.vdisks[&disk].family].gmap;
        let common = of(&f, a);
        let before = f.state.gmaps[&common].clone();
        let copies = |f: &mut Fixture, vdisk, scheme| f.run(Command::SetCopies { vdisk, scheme });
        copies(&mut f, a, Scheme::Chained).unwrap();
        assert_eq!(of(&f, a), common, "it has them");
        copies(&mut f, a, Scheme::Chained3).unwrap();
        let own = of(&f, a);
        assert_eq!((own, of(&f, b)), (GmapId(f.state.index), common));
        assert_eq!(f.state.slots[&own], f.state.slots[&common]);
        assert!(f.state.all_slots().all(|(_, slot)| slot.term == f.state.index), "what is on its way is refused");
        assert_eq!(f.effects.slots.len(), 2 * before.slots.len());
        assert!(f.effects.narrows && f.effects.names.len() == 4);
        assert_eq!(f.state.revision_of(a), Some(f.state.index), "clients learn of it");
        assert_ne!(f.state.revision_of(b), Some(f.state.index));
        step(&mut f, own);
        let refused = copies(&mut f, a, Scheme::Chained);
        assert_eq!(refused, Err(CommandError::Moving(own)));
        for scheme in [Scheme::Chained3, Scheme::Chained, Scheme::Striped, Scheme::Chained] {
            copies(&mut f, a, scheme).unwrap();
            assert_eq!(of(&f, a), own, "once is enough");
            finish(&mut f, own);
            for (id, slot) in f.state.all_slots().filter(|(id, _)| id.gmap == own) {
                let tuple: Vec<ServerId> = slot.tuple.iter().map(|m| m.server).collect();
                assert_eq!(tuple, f.state.gmaps[&own].slots[id.slot as usize]);
                assert!(tuple.len() == scheme.copies() && slot.tuple.iter().all(|m| m.in_sync));
            }
            assert_eq!(State::decode(&f.state.encode()).unwrap(), f.state);
        }
        assert_eq!(f.state.gmaps[&common], before);
        // Turned back half way, it can be asked for again.
        copies(&mut f, a, Scheme::Chained3).unwrap();
        for _ in 0..4 {
            step(&mut f, own);
            bring_in_sync(&mut f);
        }
        f.run(Command::AbortReconfiguration { gmap: own }).unwrap();
        let lengths = |f: &Fixture| f.state.gmaps[&own].slots.iter().map(Vec::len).collect::<BTreeSet<_>>();
        assert_eq!(lengths(&f), [2, 3].into());
        copies(&mut f, a, Scheme::Chained3).unwrap();
        finish(&mut f, own);
        assert_eq!(lengths(&f), [3].into());
        f.run(Command::DeleteDisks { vdisks: vec![a] }).unwrap();
        assert_eq!(State::decode(&f.state.encode()).unwrap(), f.state);
    }

    #[test]
    fn more_copies_than_servers_are_refused() {
        let mut f = Fixture::up(2);
        let vdisk = f.disk("a");
        let refused = f.run(Command::SetCopies { vdisk, scheme: Scheme::Chained3 });
        assert_eq!(refused, Err(CommandError::TooFewServers { copies: 3, servers: 2 }));
        let none = f.run(Command::SetCopies { vdisk: VdiskId(99), scheme: Scheme::Chained3 });
        assert_eq!(none, Err(CommandError::NoSuchDisk(VdiskId(99))));
    }

    #[test]
    fn a_paused_one_fences_nothing_more_and_a_drained_target_turns_it_back() {
        let (mut f, gmap) = three_and_a_new_one();
        f.run(Command::Drain { server: s(4), drained: false }).unwrap();
        step(&mut f, gmap);
        f.run(Command::PauseReconfiguration { gmap, paused: true }).unwrap();
        assert_eq!(next_step(&f.state, gmap), None);
        f.run(Command::PauseReconfiguration { gmap, paused: false }).unwrap();
        assert!(matches!(step(&mut f, gmap), Some(Command::Fence { .. })));
        f.run(Command::Drain { server: s(4), drained: true }).unwrap();
        assert_eq!(step(&mut f, gmap), Some(Command::AbortReconfiguration { gmap }));
        finish(&mut f, gmap);
        assert_eq!(held(&f, 4), 0);
    }

    #[test]
    fn what_a_reconfiguration_waits_for_is_told_by_server() {
        let (mut f, gmap) = three_and_a_new_one();
        assert_eq!(waits_for(&f.state, gmap), []);
        let suspect = |f: &mut Fixture, n| {
            let incarnation = f.state.servers[&s(n)].incarnation;
            f.run(Command::Suspect { server: s(n), incarnation }).unwrap();
            f.state.index
        };
        let reinstate = |f: &mut Fixture, n, suspect| {
            let incarnation = f.state.servers[&s(n)].incarnation;
            f.run(Command::Reinstate { server: s(n), incarnation, suspect }).unwrap();
        };
        f.run(Command::Drain { server: s(4), drained: false }).unwrap();
        let index = suspect(&mut f, 2);
        assert_eq!(waits_for(&f.state, gmap), [Wait::ToPlan(vec![s(2)])]);
        reinstate(&mut f, 2, index);
        assert_eq!(waits_for(&f.state, gmap), [], "the next step is due");
        step(&mut f, gmap);
        step(&mut f, gmap);
        let under_way = &f.state.reconfigurations[&gmap];
        let (all, fenced) = (under_way.moves.len(), under_way.fenced.len());
        assert!(fenced > 0 && fenced < all);
        assert_eq!(waits_for(&f.state, gmap), [Wait::Copying(s(4), fenced)]);
        f.run(Command::PauseReconfiguration { gmap, paused: true }).unwrap();
        assert_eq!(waits_for(&f.state, gmap), [Wait::Paused, Wait::Copying(s(4), fenced)]);
        let index = suspect(&mut f, 4);
        assert_eq!(waits_for(&f.state, gmap), [Wait::Paused, Wait::Target(s(4), all)]);
        f.run(Command::PauseReconfiguration { gmap, paused: false }).unwrap();
        reinstate(&mut f, 4, index);
        // Of every slot one server of two is suspected at least, and of some both are.
        suspect(&mut f, 1);
        suspect(&mut f, 2);
        let waits = waits_for(&f.state, gmap);
        let source =
            waits.iter().find_map(|w| if let Wait::Source(n, have) = w { Some((*n, have.clone())) } else { None });
        assert!(matches!(source, Some((n, have)) if n > 0 && n < all && have == [s(1), s(2)]), "{waits:?}");
        for server in [1, 2] {
            assert!(waits.iter().any(|w| matches!(w, Wait::Target(to, _) if *to == s(server))), "{waits:?}");
        }
    }
}
