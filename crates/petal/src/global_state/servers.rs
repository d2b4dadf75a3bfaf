//! What the log says of servers: who is there, in which life, and which slots they are in sync in (2.4, 2.5, 2.7).
//!
//! A part of the state machine (`state.rs`), apart from disks and sessions. Invariants: see there; an in-sync set is never
//! empty (I3); every command that changes one gives its slot a new term.

use super::arguments::check_addresses;
use super::command::{CommandError, Outcome};
use super::state::{Applied, DiskState, Effects, Member, ServerState, SlotState, State};
use crate::ids::*;
use crate::limits::*;
use std::collections::{BTreeMap, BTreeSet};

impl SlotState {
    /// Nobody is in sync any more: who goes on, with what it has? Members that are live; that have held everything at
    /// some time since they became members or were made anew; all others only where there are none, after the
    /// server itself, if it keeps disks.
    pub(super) fn go_on_without(&mut self, lost: ServerId, keeps: bool, is_live: impl Fn(ServerId) -> bool) {
        let others = |wanted: &dyn Fn(&Member) -> bool| -> Vec<ServerId> {
            self.tuple.iter().filter(|m| m.server != lost && wanted(m)).map(|m| m.server).collect()
        };
        // Made anew and never in sync since: the command that voided its copies is the last that took it out.
        let was_whole = |m: &Member| m.out != m.since;
        let heirs = [
            others(&|m| was_whole(m) && is_live(m.server)),
            others(&was_whole),
            if keeps { vec![lost] } else { Vec::new() },
            others(&|m| is_live(m.server)),
            others(&|_| true),
            vec![lost],
        ];
        let heirs = heirs.into_iter().find(|heirs| !heirs.is_empty()).expect("one is not empty");
        self.tuple.iter_mut().filter(|m| heirs.contains(&m.server)).for_each(|m| m.in_sync = true);
    }
}

impl State {
    pub(super) fn add_server(&mut self, addresses: &[String], token: u128, effects: &mut Effects) -> Applied {
        check_addresses(addresses)?;
        if let Some((server, _)) = self.servers.iter().find(|(_, s)| token != 0 && s.token == token) {
            return Ok(Outcome::Server(*server));
        }
        if self.servers.len() >= SERVERS_MAX || self.last_server == u16::MAX {
            return Err(CommandError::TooMany { limit: SERVERS_MAX, what: "servers".into() });
        }
        self.last_server += 1;
        let server = ServerId(self.last_server);
        self.servers.insert(server, ServerState::new(addresses.to_vec(), token));
        effects.servers.push(server);
        Ok(Outcome::Server(server))
    }

    /// Nothing of it is needed by anybody, and it cannot come back: its next `ServerUp` is refused.
    pub(super) fn remove_server(&mut self, id: ServerId, effects: &mut Effects) -> Applied {
        let server = self.servers.get(&id).ok_or(CommandError::NoSuchServer(id))?;
        if server.incarnation.0 > 0 && !server.down {
            return Err(CommandError::NotDown(id));
        }
        if self.ring.node_of(id).is_some() {
            return Err(CommandError::InRing(id));
        }
        let is_member = self.all_slots().filter(|(_, slot)| slot.member(id).is_some()).count();
        let targets = self.reconfigurations.values().flat_map(|r| r.moves.values().chain(r.fenced.values()));
        let slots = is_member + targets.filter(|tuple| tuple.contains(&id)).count();
        if slots > 0 {
            return Err(CommandError::HoldsData { server: id, slots });
        }
        let held = !server.drained && server.weight > 0;
        self.servers.remove(&id);
        for slot in self.slots.values_mut().flatten() {
            slot.left.retain(|d| d.server != id);
        }
        if held {
            self.placed = self.index; // It was to be filled.
        }
        effects.servers.push(id);
        Ok(Outcome::Done)
    }

    /// A restart by itself takes the server out of nothing. But it ends what the old life had begun, so
    /// every slot in which the server is in sync gets a new term: promise and settlement before anything
    /// is served there again (2.1, "term").
    pub(super) fn server_up(
        &mut self,
        id: ServerId,
        incarnation: Incarnation,
        addresses: &[String],
        disks: &[(DiskId, Lives, u64)],
        effects: &mut Effects,
    ) -> Applied {
        check_addresses(addresses)?;
        let server = self.servers.get(&id).ok_or(CommandError::NoSuchServer(id))?;
        if incarnation <= server.incarnation {
            return Err(CommandError::OldIncarnation { server: id, known: server.incarnation, given: incarnation });
        }
        if disks.len() > DISKS_PER_SERVER_MAX {
            let what = format!("disks in {id}");
            return Err(CommandError::TooMany { limit: DISKS_PER_SERVER_MAX, what });
        }
        let found: BTreeMap<DiskId, (Lives, u64)> =
            disks.iter().map(|(d, lives, c)| (*d, (lives.clone(), *c))).collect();
        server.check_disks(id, incarnation, &found)?;
        let up = ServerState {
            addresses: addresses.to_vec(),
            incarnation,
            token: server.token,
            disks: found
                .iter()
                .map(|(d, (_, capacity))| (*d, DiskState { incarnation, capacity: *capacity }))
                .collect(),
            down: false,
            up: self.index,
            suspect: None,
            weight: found.values().fold(0, |sum: u64, (_, capacity)| sum.saturating_add(*capacity)),
            drained: server.drained && !server.away,
            away: false,
        };
        if server.away {
            self.came_back(id);
        }
        self.servers.insert(id, up);
        effects.servers.push(id);
        effects.names.insert(id);
        self.renew_terms(Some(id), effects);
        Ok(Outcome::Done)
    }

    /// Suspicion moves neither roles nor terms: it only ends the granting of leases.
    pub(super) fn suspect(&mut self, id: ServerId, incarnation: Incarnation, effects: &mut Effects) -> Applied {
        let index = self.index;
        let server = self.servers.get_mut(&id).ok_or(CommandError::NoSuchServer(id))?;
        if server.incarnation != incarnation || server.down || server.suspect.is_some() {
            return Err(CommandError::Overtaken);
        }
        server.suspect = Some(index);
        effects.names.insert(id);
        Ok(Outcome::Done)
    }

    pub(super) fn server_down(
        &mut self,
        id: ServerId,
        incarnation: Incarnation,
        suspect: StateIndex,
        effects: &mut Effects,
    ) -> Applied {
        self.suspected(id, incarnation, suspect)?.down = true;
        Ok(self.went_down(id, effects))
    }

    /// What follows when a server is down, by whoever's word.
    fn went_down(&mut self, id: ServerId, effects: &mut Effects) -> Outcome {
        effects.names.insert(id);
        effects.downs.push(id);
        self.renew_terms(Some(id), effects);
        Outcome::Done
    }

    /// Down by its own word, which it gives when it has stopped to serve: no suspicion, nothing to wait for.
    pub(super) fn goodbye(&mut self, id: ServerId, incarnation: Incarnation, effects: &mut Effects) -> Applied {
        let server = self.servers.get_mut(&id).ok_or(CommandError::NoSuchServer(id))?;
        if server.incarnation != incarnation || server.down {
            return Err(CommandError::Overtaken);
        }
        server.down = true;
        Ok(self.went_down(id, effects))
    }

    /// What the server had counts for nothing from here on (`since`). Where nobody else holds all acknowledged
    /// writes the others go on with what they have, if that was accepted.
    pub(super) fn replace_disks(
        &mut self,
        id: ServerId,
        incarnation: Incarnation,
        disks: &[DiskId],
        accept_data_loss: bool,
        effects: &mut Effects,
    ) -> Applied {
        let server = self.servers.get(&id).ok_or(CommandError::NoSuchServer(id))?;
        if server.incarnation != incarnation {
            return Err(CommandError::OldIncarnation { server: id, known: server.incarnation, given: incarnation });
        }
        if !server.down {
            return Err(CommandError::NotDown(id));
        }
        let distinct: BTreeSet<&DiskId> = disks.iter().collect();
        if disks.is_empty() || disks.len() > DISKS_PER_SERVER_MAX || distinct.len() != disks.len() {
            return Err(CommandError::Malformed(format!("{id} cannot have these {} disks", disks.len())));
        }
        let is_last = |slot: &&SlotState| slot.in_sync().all(|s| s == id);
        let all = self.slots.values().flatten().count() as u64;
        let slots = self.slots.values().flatten().filter(is_last).count() as u64;
        if slots > 0 && !accept_data_loss {
            return Err(CommandError::LastCopy { server: id, slots, all });
        }
        let index = self.index;
        let keeps = disks.iter().any(|disk| server.disks.contains_key(disk));
        let (servers, flattenings) = (&self.servers, &mut self.flattenings);
        let is_live = |s: ServerId| servers.get(&s).is_some_and(|s| !s.down && s.suspect.is_none());
        for (gmap, slots) in &mut self.slots {
            for (number, slot) in (0..).zip(slots) {
                let Some(own) = slot.tuple.iter_mut().find(|m| m.server == id) else { continue };
                (own.since, own.out, own.in_sync) = (index, index, false);
                if slot.in_sync().next().is_none() {
                    slot.go_on_without(id, keeps, is_live);
                    // Rows that a clone was given may be among what is lost.
                    let in_map = flattenings.values_mut().filter(|f| f.gmap == *gmap);
                    in_map.for_each(|f| {
                        f.left.insert(number);
                    });
                }
                slot.term = index;
                effects.slots.push(SlotId { gmap: *gmap, slot: number });
            }
        }
        let server = self.servers.get_mut(&id).expect("just seen");
        let capacity = |disk: &DiskId| server.disks.get(disk).map_or(0, |d| d.capacity);
        server.disks = disks.iter().map(|d| (*d, DiskState { incarnation, capacity: capacity(d) })).collect();
        effects.servers.push(id);
        effects.names.insert(id);
        Ok(Outcome::Done)
    }

    pub(super) fn reinstate(
        &mut self,
        id: ServerId,
        incarnation: Incarnation,
        suspect: StateIndex,
        effects: &mut Effects,
    ) -> Applied {
        self.suspected(id, incarnation, suspect)?.suspect = None;
        effects.names.insert(id);
        self.renew_terms(None, effects);
        Ok(Outcome::Done)
    }

    /// The server, if it is suspected by that very command and not down yet.
    fn suspected(
        &mut self,
        id: ServerId,
        incarnation: Incarnation,
        suspect: StateIndex,
    ) -> Result<&mut ServerState, CommandError> {
        let server = self.servers.get_mut(&id).ok_or(CommandError::NoSuchServer(id))?;
        if server.incarnation != incarnation || server.down || server.suspect != Some(suspect) {
            return Err(CommandError::Overtaken);
        }
        Ok(server)
    }

    /// After every command that may have changed who is live: in each slot with a live in-sync member the
    /// members that are down leave the in-sync set; elsewhere they stay (I3). A slot whose set changed, or
    /// in which the in-sync member `touched` was started or taken down, has a new term.
    fn renew_terms(&mut self, touched: Option<ServerId>, effects: &mut Effects) {
        let (index, servers) = (self.index, &self.servers);
        let is_down = |s: ServerId| servers.get(&s).is_none_or(|s| s.down);
        let is_live = |s: ServerId| servers.get(&s).is_some_and(|s| !s.down && s.suspect.is_none());
        for (gmap, slots) in &mut self.slots {
            for (number, slot) in (0..).zip(slots) {
                let mut renewed = slot.in_sync().any(|s| Some(s) == touched);
                if slot.in_sync().any(is_live) {
                    for member in slot.tuple.iter_mut().filter(|m| m.in_sync && is_down(m.server)) {
                        member.in_sync = false;
                        member.out = index;
                        renewed = true;
                    }
                }
                if renewed {
                    slot.term = index;
                    effects.slots.push(SlotId { gmap: *gmap, slot: number });
                }
            }
        }
    }

    pub(super) fn in_sync(
        &mut self,
        id: ServerId,
        incarnation: Incarnation,
        slots: &[(SlotId, Term)],
        effects: &mut Effects,
    ) -> Applied {
        let server = self.servers.get(&id).ok_or(CommandError::NoSuchServer(id))?;
        if server.incarnation != incarnation || server.down || server.suspect.is_some() {
            return Err(CommandError::Overtaken);
        }
        self.change_members(slots, effects, |slot| {
            let member = slot.tuple.iter_mut().find(|m| m.server == id && !m.in_sync);
            member.map(|m| m.in_sync = true).is_some()
        })
    }

    pub(super) fn take_out(&mut self, id: ServerId, slots: &[(SlotId, Term)], effects: &mut Effects) -> Applied {
        let index = self.index;
        let live: BTreeSet<ServerId> =
            self.servers.iter().filter(|(_, s)| !s.down && s.suspect.is_none()).map(|(id, _)| *id).collect();
        self.change_members(slots, effects, |slot| {
            if !slot.in_sync().any(|s| s != id && live.contains(&s)) {
                return false;
            }
            let member = slot.tuple.iter_mut().find(|m| m.server == id && m.in_sync);
            member.map(|m| (m.in_sync, m.out) = (false, index)).is_some()
        })
    }

    /// Changes the in-sync sets of those slots that are still in the given terms.
    fn change_members(
        &mut self,
        slots: &[(SlotId, Term)],
        effects: &mut Effects,
        mut change: impl FnMut(&mut SlotState) -> bool,
    ) -> Applied {
        let index = self.index;
        for (id, term) in slots {
            let slot = self.slots.get_mut(&id.gmap).and_then(|slots| slots.get_mut(id.slot as usize));
            let Some(slot) = slot.filter(|slot| slot.term == *term) else { continue };
            if change(slot) {
                slot.term = index;
                effects.slots.push(*id);
                effects.names.extend(slot.tuple.iter().map(|m| m.server));
            }
        }
        if effects.slots.is_empty() { Err(CommandError::Overtaken) } else { Ok(Outcome::Done) }
    }
}
