//! Members that do not answer who acts in their slots (2.5, `TakeOut`).
//!
//! The ring may well hear a server whose link to one other server is broken, or whose disk hangs: it
//! keeps its lease, and every write of the slots that it shares with that other one waits for it. So
//! who acts there, and has waited too long, proposes to take it out. Its own silence is not held
//! against others: time counts only while this server ran, and held a lease all along.
//!
//! At first it is taken out of the slots in which something waits: it may only be slow for a moment. Who has not said a
//! word for a while after that is cut off, and is taken out of all slots at once. Else each slot would wait its own time
//! for it when something is written there, and whoever writes one block after the other would hardly get on.
//!
//! A server may also answer, and yet not get on in one slot (it has no room for what is at the front of that stream, or
//! lost what it should go on from): every slot's stream is watched by itself, with more patience.
//!
//! What was taken out may not know it for as long as a lease: until then nothing new is served
//! (`Acting::not_before`).

use crate::data_access::{Context, DataAccess, Slot, SlotIndex};
use crate::global_state::{Command, State};
use crate::ids::*;
use crate::limits::{LEASE, SILENCE_CONNECTED, SILENCE_CUT_OFF, SILENCE_DISCONNECTED, SILENCE_SLOT};
use crate::promise::Acting;
use crate::resync::Joiner;
use std::collections::{BTreeMap, BTreeSet};
use stdx::{Duration, Instant};

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A look that comes so late shows that this server itself did not run.
const LATE: Duration = Duration::from_millis(250);
/// Slots in one `TakeOut`.
const SLOTS_MAX: usize = 1024;

/// Who has not answered since when.
#[derive(Debug, Default)]
pub(crate) struct Silence {
    next_look: Option<Instant>,
    /// Members that something waits for, and since when they have been silent.
    since: BTreeMap<ServerId, Instant>,
    /// Taken out of slots where something waited, and silent ever since: since when.
    cut_off: BTreeMap<ServerId, Instant>,
    /// Those of whom there was an answer since the last look.
    heard: BTreeSet<ServerId>,
    /// Streams with something on its way: since when their first message is the same, and which it is.
    standing: BTreeMap<(SlotIndex, ServerId), (Instant, (Term, u64))>,
    /// A `TakeOut` of these is being decided.
    proposed: BTreeMap<ServerId, u64>,
}

impl Silence {
    /// An answer has come.
    pub fn heard(&mut self, server: ServerId) {
        self.heard.insert(server);
    }

    /// There is a connection to it again. That is no answer yet, but it can be asked back.
    pub fn is_connected(&mut self, server: ServerId) {
        self.cut_off.remove(&server);
    }

    /// When to look next.
    pub fn next_look(&self) -> Option<Instant> {
        self.next_look
    }

    /// A proposal was decided.
    pub fn decided(&mut self, key: u64) {
        self.proposed.retain(|_, k| *k != key);
    }
}

impl DataAccess {
    /// Looks now and then who is silent, while anything is waited for.
    pub(crate) fn watch_silence(&mut self, ctx: &mut Context) {
        // Something happens, so something may be waited for: look in a while.
        let look = *self.silence.next_look.get_or_insert(ctx.now + LOOK_EVERY);
        if look > ctx.now {
            return;
        }
        let is_late = ctx.now.since(look) > LATE;
        let waited_for = self.waited_for();
        let heard = std::mem::take(&mut self.silence.heard);
        // When the youngest request was sent for which a majority has granted the present lease.
        let granted =
            ctx.liveness.lease_until().map(|until| Instant::from_nanos(until.as_nanos() - LEASE.as_nanos() as u64));
        let lease = ctx.liveness.lease(ctx.now).is_some();
        self.silence.since.retain(|server, _| waited_for.contains(server) && !heard.contains(server));
        for server in &waited_for {
            let since = self.silence.since.entry(*server).or_insert(ctx.now);
            if is_late || !lease {
                *since = ctx.now;
            }
        }
        let standing = self.standing(ctx.now, is_late || !lease);
        self.silence.cut_off.retain(|server, _| !heard.contains(server) && is_live(ctx.state, *server));
        if is_late || !lease {
            self.silence.cut_off.values_mut().for_each(|since| *since = ctx.now);
        }
        let is_watched = !waited_for.is_empty() || !self.silence.cut_off.is_empty();
        self.silence.next_look = is_watched.then(|| ctx.now + LOOK_EVERY);
        for server in waited_for {
            let silent = ctx.now.since(self.silence.since[&server]);
            let patience = if self.connected.contains(&server) { SILENCE_CONNECTED } else { SILENCE_DISCONNECTED };
            if silent < patience {
                continue;
            }
            self.leave_closing_joiners(ctx, server);
            // It may be this server that is cut off: only who is heard by a majority since then may judge.
            let since = self.silence.since[&server];
            let is_heard = granted.is_some_and(|at| at >= since);
            if is_heard && !self.silence.proposed.contains_key(&server) {
                self.silence.cut_off.entry(server).or_insert(since);
                self.propose_take_out(ctx, server, |slot| waits_for(slot, server));
            }
        }
        let is_long = |since: Instant| ctx.now.since(since) >= SILENCE_CUT_OFF && granted.is_some_and(|at| at >= since);
        let cut_off: Vec<ServerId> =
            self.silence.cut_off.iter().filter(|(_, since)| is_long(**since)).map(|(server, _)| *server).collect();
        for server in cut_off {
            if !self.silence.proposed.contains_key(&server) {
                self.propose_take_out(ctx, server, |slot| {
                    slot.acting.as_ref().is_some_and(|a| a.receivers.contains(&server))
                });
            }
        }
        for (server, slots) in standing {
            if !self.silence.proposed.contains_key(&server) {
                self.propose_take_out(ctx, server, |slot| slots.contains(&slot.id) && waits_for(slot, server));
            }
        }
    }

    /// Receivers whose streams stand still for long, in these slots. `anew`: time up to now does not count.
    fn standing(&mut self, now: Instant, anew: bool) -> BTreeMap<ServerId, BTreeSet<SlotId>> {
        let (mut before, mut standing) = (std::mem::take(&mut self.silence.standing), BTreeMap::new());
        for (index, slot) in self.slots.iter().enumerate() {
            let streams = slot.acting.iter().flat_map(|a| &a.streams).filter(|(_, stream)| !stream.is_empty());
            for (server, stream) in streams {
                let front = (slot.term, stream.first());
                let known = before.remove(&(index, *server)).filter(|(_, known)| *known == front && !anew);
                let (since, _) = known.unwrap_or((now, front));
                self.silence.standing.insert((index, *server), (since, front));
                if now.since(since) >= SILENCE_SLOT {
                    let slots: &mut BTreeSet<SlotId> = standing.entry(*server).or_default();
                    slots.insert(slot.id);
                }
            }
        }
        standing
    }

    fn waited_for(&self) -> BTreeSet<ServerId> {
        let acting = self.slots.iter().filter_map(|s| s.acting.as_ref());
        let in_sync = |a: &Acting| a.receivers.iter().filter(|r| a.waits_for(**r)).copied().collect::<Vec<_>>();
        let closing =
            |a: &Acting| a.joiners.iter().filter(|(_, j)| j.is_closing()).map(|(s, _)| *s).collect::<Vec<_>>();
        acting.flat_map(|a| in_sync(a).into_iter().chain(closing(a))).collect()
    }

    /// Writes wait for members that have everything and are not proposed yet: who is silent is left out
    /// again, and begun with anew when it answers.
    fn leave_closing_joiners(&mut self, ctx: &mut Context, server: ServerId) {
        let is_closing =
            |slot: &Slot| slot.acting.as_ref().and_then(|a| a.joiners.get(&server)).is_some_and(Joiner::is_closing);
        let slots: Vec<SlotIndex> = (0..self.slots.len()).filter(|i| is_closing(&self.slots[*i])).collect();
        for index in slots {
            self.drop_joiner(ctx, index, server);
        }
    }

    /// Those of these slots where another live member remains.
    fn propose_take_out(&mut self, ctx: &mut Context, server: ServerId, which: impl Fn(&Slot) -> bool) {
        if !is_live(ctx.state, server) {
            return; // The ring knows already.
        }
        let slots: Vec<(SlotId, Term)> = self
            .slots
            .iter()
            .filter(|slot| which(slot))
            .filter(|slot| slot.in_sync.iter().any(|s| *s != server && is_live(ctx.state, *s)))
            .map(|slot| (slot.id, slot.term))
            .take(SLOTS_MAX)
            .collect();
        if slots.is_empty() {
            return;
        }
        let key = self.next_job;
        self.next_job += 1;
        self.silence.proposed.insert(server, key);
        self.proposals.push((key, Command::TakeOut { server, slots }));
    }
}

/// True if the ring hears it.
fn is_live(state: &State, server: ServerId) -> bool {
    state.servers.get(&server).is_some_and(|s| !s.down && s.suspect.is_none())
}

/// True if it holds something up there.
fn waits_for(slot: &Slot, server: ServerId) -> bool {
    slot.acting.as_ref().is_some_and(|a| a.waits_for(server))
}
