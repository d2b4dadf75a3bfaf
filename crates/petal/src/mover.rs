//! The mover: takes reconfigurations on, step by step (2.8).
//!
//! ```text
//!  a server is drained or filled -> plan (`replan.rs`) -> Reconfigure
//!       -> Fence some slots -> (recovery brings the joiners up to date, `resync.rs`) -> Moved -> Fence the next ...
//! ```
//!
//! The leader of the ring looks at the state, and proposes the next step of each GMap. All that it knows is in the state:
//! whoever leads next goes on, and what two leaders propose is conditional on terms and on what a plan was made from. At most
//! 1/20 of what is to move is fenced at one time, scattered over the slots, so that no part of a disk is all at once
//! written to more servers than before.
//!
//! It waits for servers that are away. One that does not come back for as long as the state says is drained until it
//! does (`StayedAway`); a third of the servers at most, so that a room without power is not copied into the others. [`waits_for`] tells people
//! what it waits for, by the same questions.

use crate::global_state::{Command, Move, Reconfiguration, ServerState, State};
use crate::ids::*;
use crate::message::CommandId;
use crate::replan::{replan, scattered};
use std::collections::{BTreeMap, BTreeSet};
use stdx::{Duration, Instant};

/// Time between two looks at least.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Of so many slots that are to move one is fenced, and one at least.
const FENCED_ONE_IN: usize = 20;
/// Slots in one command.
const SLOTS_PER_COMMAND: usize = 512;
/// Moves in one plan: 13 bytes each at most, and a command has 64 KiB.
const MOVES_PER_PLAN: usize = 4096;

/// What the leader does about reconfigurations.
#[derive(Debug, Default)]
pub(crate) struct Mover {
    look_at: Option<Instant>,
    /// Since when this leader sees servers down, each in its last life.
    absent: BTreeMap<ServerId, (Incarnation, Instant)>,
    /// What is under way.
    proposed: BTreeMap<Subject, CommandId>,
}

/// What a step is about: there is one at a time of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Subject {
    /// The reconfiguration of a GMap.
    Gmap(GmapId),
    /// Servers that stay away.
    Absence,
}

impl Mover {
    /// What is to be proposed now, one command for each subject. [`Mover::on_proposed`] tells as what.
    pub fn look(&mut self, now: Instant, state: &State) -> Vec<(Subject, Command)> {
        if self.look_at.is_some_and(|at| at > now) {
            return Vec::new();
        }
        self.look_at = Some(now + LOOK_EVERY);
        self.proposed.retain(|_, id| !state.is_executed(id));
        let of_gmaps = state.gmaps.keys().map(|gmap| (Subject::Gmap(*gmap), next_step(state, *gmap)));
        let all = of_gmaps.chain([(Subject::Absence, self.stayed_away(now, state))]);
        let due = all.filter(|(subject, _)| !self.proposed.contains_key(subject));
        due.filter_map(|(subject, command)| Some((subject, command?))).collect()
    }

    /// Keeps in mind who is down. The one that has been for longest, if that is too long, and few enough are away already.
    fn stayed_away(&mut self, now: Instant, state: &State) -> Option<Command> {
        let is_absent = |s: &&ServerState| s.down && s.weight > 0 && !s.drained;
        let absent = state.servers.iter().filter(|(_, s)| is_absent(s)).map(|(id, s)| (*id, s.incarnation));
        let known = std::mem::take(&mut self.absent);
        let since = |id: ServerId, life: Incarnation| known.get(&id).filter(|(of, _)| *of == life).map_or(now, |k| k.1);
        self.absent = absent.map(|(id, life)| (id, (life, since(id, life)))).collect();
        let holds = |id: &ServerId| state.all_slots().any(|(_, slot)| slot.member(*id).is_some());
        let (server, (incarnation, at)) = self.absent.iter().min_by_key(|(_, (_, at))| *at)?;
        let away = state.servers.values().filter(|s| s.away).count();
        let is_few = (away + 1) * 3 <= state.candidates().iter().filter(|c| c.weight > 0).count() + away;
        let patience = Duration::from_secs(u64::from(state.replace_after));
        let is_late = state.replace_after > 0 && now.since(*at) >= patience;
        let is_due = is_late && is_few && holds(server) && state.check_enough_without(*server).is_ok();
        is_due.then_some(Command::StayedAway { server: *server, incarnation: *incarnation })
    }

    /// A command that `look` wanted is under way.
    pub fn on_proposed(&mut self, subject: Subject, id: CommandId) {
        self.proposed.insert(subject, id);
    }

    /// A command was applied.
    pub fn on_executed(&mut self, id: CommandId) {
        self.proposed.retain(|_, own| (own.proposer, own.number) != (id.proposer, id.number));
    }

    /// This server does not lead: nothing of it is wanted any more.
    pub fn step_down(&mut self) -> Vec<CommandId> {
        self.absent.clear();
        std::mem::take(&mut self.proposed).into_values().collect()
    }
}

fn is_live(server: &ServerState) -> bool {
    !server.down && server.suspect.is_none()
}

/// What a GMap's reconfiguration waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Nothing is planned while these are away, which may hold data.
    ToPlan(Vec<ServerId>),
    /// To be resumed: nothing more is fenced.
    Paused,
    /// So many slots are to move to this server, which is not live.
    Target(ServerId, usize),
    /// No server that is in sync in these slots is live: so many slots, and who has them.
    Source(usize, Vec<ServerId>),
    /// What every move takes: so many slots are being copied to this server.
    Copying(ServerId, usize),
}

/// What the reconfiguration of a GMap waits for; nothing if none is under way or to be planned, or if the next step is due.
pub fn waits_for(state: &State, gmap: GmapId) -> Vec<Wait> {
    let Some(under_way) = state.reconfigurations.get(&gmap) else {
        let away = if state.replan.contains(&gmap) { away(state) } else { Vec::new() };
        return if away.is_empty() { Vec::new() } else { vec![Wait::ToPlan(away)] };
    };
    let live = |s: &ServerId| state.servers.get(s).is_some_and(is_live);
    let (mut targets, mut copying) = (BTreeMap::<ServerId, usize>::new(), BTreeMap::<ServerId, usize>::new());
    let (mut sources, mut have) = (0, BTreeSet::new());
    for (number, target) in &under_way.moves {
        let is_fenced = under_way.fenced.contains_key(number);
        let Some(slot) = state.slot(SlotId { gmap, slot: *number }) else { continue };
        if under_way.turns_back && !is_fenced {
            continue;
        }
        target.iter().filter(|s| !live(s)).for_each(|s| *targets.entry(*s).or_default() += 1);
        if !slot.in_sync().any(|s| live(&s)) {
            sources += 1;
            have.extend(slot.in_sync());
        } else if is_fenced {
            let is_copied = |s: &&ServerId| live(s) && slot.member(**s).is_some_and(|m| !m.in_sync);
            target.iter().filter(is_copied).for_each(|s| *copying.entry(*s).or_default() += 1);
        }
    }
    let mut all = Vec::new();
    if under_way.paused && !under_way.turns_back {
        all.push(Wait::Paused);
    }
    all.extend(targets.into_iter().map(|(server, slots)| Wait::Target(server, slots)));
    if sources > 0 {
        all.push(Wait::Source(sources, have.into_iter().collect()));
    }
    all.extend(copying.into_iter().map(|(server, slots)| Wait::Copying(server, slots)));
    all
}

/// Servers that may hold data, and are not live.
fn away(state: &State) -> Vec<ServerId> {
    let holders = state.candidates().into_iter().filter(|c| c.weight > 0).map(|c| c.server);
    holders.filter(|s| !state.servers.get(s).is_some_and(is_live)).collect()
}

/// The next step of a GMap's reconfiguration, if one can be taken.
pub fn next_step(state: &State, gmap: GmapId) -> Option<Command> {
    match state.reconfigurations.get(&gmap) {
        Some(under_way) if under_way.turns_back => {
            let back = state.can_turn_back(gmap).then_some(Command::AbortReconfiguration { gmap });
            back.or_else(|| moved(state, gmap, under_way))
        }
        Some(under_way) if has_drained_target(state, under_way) => Some(Command::AbortReconfiguration { gmap }),
        Some(under_way) => moved(state, gmap, under_way).or_else(|| fence(state, gmap, under_way)),
        None if state.replan.contains(&gmap) => plan(state, gmap),
        None => None,
    }
}

/// Nothing is to move to a server any more that was drained since.
fn has_drained_target(state: &State, under_way: &Reconfiguration) -> bool {
    under_way.moves.values().flatten().any(|s| state.servers.get(s).is_none_or(|s| s.drained))
}

fn moved(state: &State, gmap: GmapId, under_way: &Reconfiguration) -> Option<Command> {
    let are_ready = |number: u32| {
        let slot = state.slot(SlotId { gmap, slot: number })?;
        let is_ready =
            |s: &ServerId| slot.member(*s).is_some_and(|m| m.in_sync) && state.servers.get(s).is_some_and(is_live);
        under_way.moves.get(&number)?.iter().all(is_ready).then_some((number, slot.term))
    };
    let slots: Vec<(u32, Term)> =
        under_way.fenced.keys().filter_map(|n| are_ready(*n)).take(SLOTS_PER_COMMAND).collect();
    (!slots.is_empty()).then_some(Command::Moved { gmap, slots })
}

fn fence(state: &State, gmap: GmapId, under_way: &Reconfiguration) -> Option<Command> {
    let all = under_way.moves.len() + under_way.moved as usize;
    let most = (all / FENCED_ONE_IN).max(1);
    // Some at one time: each command is an entry of the log.
    if under_way.paused || under_way.fenced.len() > most / 2 {
        return None;
    }
    let can_begin = |number: &u32| {
        let slot = state.slot(SlotId { gmap, slot: *number })?;
        let target = under_way.moves.get(number).filter(|_| !under_way.fenced.contains_key(number))?;
        let are_live = target.iter().all(|s| state.servers.get(s).is_some_and(is_live));
        let is_served = slot.in_sync().any(|s| state.servers.get(&s).is_some_and(is_live));
        (are_live && is_served).then_some((*number, slot.term))
    };
    let count = state.gmaps.get(&gmap)?.slots.len();
    let order = scattered(count).into_iter().map(|n| n as u32);
    let room = (most - under_way.fenced.len()).min(SLOTS_PER_COMMAND);
    let slots: Vec<(u32, Term)> = order.filter_map(|n| can_begin(&n)).take(room).collect();
    (!slots.is_empty()).then_some(Command::Fence { gmap, slots })
}

/// Planned when all that may hold data are there: what is away for a moment must not be planned around.
fn plan(state: &State, gmap: GmapId) -> Option<Command> {
    if !away(state).is_empty() {
        return None;
    }
    let candidates = state.candidates();
    let from = state.gmaps.get(&gmap)?;
    let to = replan(gmap, from, &candidates).ok()?;
    let differ = (0..).zip(from.slots.iter().zip(to.slots)).filter(|(_, (old, new))| *old != new);
    let mut moves: Vec<Move> = differ.map(|(number, (_, new))| (number, new)).collect();
    let more = moves.len() > MOVES_PER_PLAN;
    if more {
        // Some of every part of a disk, not all of one.
        let order = scattered(from.slots.len());
        let chosen: BTreeSet<u32> = {
            let moving: BTreeSet<u32> = moves.iter().map(|(number, _)| *number).collect();
            order.into_iter().map(|n| n as u32).filter(|n| moving.contains(n)).take(MOVES_PER_PLAN).collect()
        };
        moves.retain(|(number, _)| chosen.contains(number));
    }
    Some(Command::Reconfigure { gmap, planned_from: state.planned_from(gmap), moves, more })
}
