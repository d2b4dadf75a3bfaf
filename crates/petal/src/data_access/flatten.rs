//! Flattening (2.9): rows of a clone's own, so that it needs nothing of its parents any more.
//!
//! ```text
//!  State::flattenings -> pass over the family's elements in the slots that this server serves
//!                          -> a row for each that the clone inherits and has not written (an ordinary write of no bytes)
//!                          -> `Inherited` for the slots in which none is left
//! ```
//!
//! The row is made as a client's would be (`Zero` of no bytes), by the session of the flattening: so it has a version, goes
//! to every member in sync, and waits for whatever else is done in its element. Nothing is remembered across a restart: a
//! pass over what has its rows already only looks. It gives way to clients like `reclaim.rs`.

use super::*;
use crate::global_state::Command;
use stdx::Duration;

/// Elements looked at in one step.
const STEP: usize = 64;
/// Time between two steps while clients work.
const PACE: Duration = Duration::from_millis(20);
/// Time between two looks for what is to be done; it grows while nothing comes of them.
const LOOK_EVERY: Duration = Duration::from_millis(250);
const LOOK_EVERY_MAX: Duration = Duration::from_secs(8);
/// Slots in one command.
const SLOTS_PER_COMMAND: usize = 512;
/// Asks for the rows; no client of the network has this number.
pub(super) const FLATTENER: ClientId = ClientId::MAX >> 1;

/// Where it is.
#[derive(Debug, Default)]
pub(crate) struct Flatten {
    look_at: Option<Instant>,
    /// Passes in a row that ended with nothing to report.
    in_vain: u32,
    pass: Option<Pass>,
    /// Commands that are not decided yet.
    proposed: BTreeSet<u64>,
}

/// A look through a family.
#[derive(Debug)]
struct Pass {
    vdisk: VdiskId,
    session: SessionId,
    family: FamilyId,
    gmap: GmapId,
    /// Slots in which every element was seen to so far, each in the term in which this began.
    slots: BTreeMap<u32, (SlotIndex, Term)>,
    /// The next element to look at; none behind the last.
    next: Option<u64>,
    scan: Option<ReadId>,
    /// Elements that are loaded, or of which the row is being made.
    waiting: BTreeSet<u64>,
    /// Not before.
    at: Instant,
}

impl Flatten {
    pub(super) fn owns(&self, scan: ReadId) -> bool {
        self.pass.as_ref().is_some_and(|p| p.scan == Some(scan))
    }

    /// When something is due although nothing else happens.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let pass = self.pass.as_ref().map(|p| (p.scan.is_none() && p.waiting.is_empty()).then_some(p.at));
        pass.unwrap_or(self.look_at)
    }

    /// A command was decided.
    pub(crate) fn decided(&mut self, key: u64) {
        self.proposed.remove(&key);
    }

    /// A row is made, or cannot be made now.
    pub(super) fn answered(&mut self, element: u64, slot: u32, is_done: bool) {
        let Some(pass) = &mut self.pass else { return };
        pass.waiting.remove(&element);
        if !is_done {
            pass.slots.remove(&slot);
        }
    }
}

impl DataAccess {
    pub(super) fn advance_flatten(&mut self, ctx: &mut Context) {
        if self.flatten.pass.is_none() {
            if ctx.state.flattenings.is_empty() {
                self.flatten.look_at = None;
                return;
            }
            if self.flatten.look_at.is_some_and(|at| at > ctx.now) {
                return;
            }
            self.flatten.look_at = Some(ctx.now + LOOK_EVERY);
            if !self.flatten.proposed.is_empty() {
                return;
            }
            self.flatten.pass = self.next_pass(ctx);
        }
        let Some(pass) = self.flatten.pass.as_mut() else { return };
        if pass.scan.is_some() || !pass.waiting.is_empty() || pass.at > ctx.now {
            return;
        }
        let is_over = ctx.state.flattenings.get(&pass.vdisk).is_none_or(|f| f.session != pass.session);
        match pass.next.filter(|_| !is_over && !pass.slots.is_empty()) {
            Some(next) => pass.scan = Some(ctx.stores.scan(pass.family, next, u64::MAX, STEP)),
            None => self.end_pass(ctx, is_over),
        }
    }

    /// The first clone for which something is left to be done in a slot that this server serves.
    fn next_pass(&self, ctx: &Context) -> Option<Pass> {
        ctx.state.flattenings.iter().find_map(|(vdisk, flattening)| {
            let family = ctx.state.family(ctx.state.vdisk(*vdisk)?.family)?;
            let gmap = family.gmap;
            let of_gmap = SlotId { gmap, slot: 0 }..=SlotId { gmap, slot: u32::MAX };
            let here = self.by_id.range(of_gmap).filter(|(id, index)| {
                let acts = self.slots[**index].acting.as_ref().is_some_and(|a| a.is_serving());
                acts && flattening.is_left(**id)
            });
            let slots: BTreeMap<_, _> = here.map(|(id, index)| (id.slot, (*index, self.slots[*index].term))).collect();
            let (vdisk, session, family) = (*vdisk, flattening.session, family.id);
            let (next, waiting) = (Some(0), BTreeSet::new());
            (!slots.is_empty()).then_some(Pass {
                vdisk,
                session,
                family,
                gmap,
                slots,
                next,
                scan: None,
                waiting,
                at: ctx.now,
            })
        })
    }

    /// What was seen to is told, where the same term goes on.
    fn end_pass(&mut self, ctx: &mut Context, is_over: bool) {
        let Some(Pass { vdisk, session, gmap, slots, .. }) = self.flatten.pass.take() else { return };
        if is_over {
            return;
        }
        let goes_on = |index: SlotIndex, term: Term| {
            let slot = &self.slots[index];
            slot.term == term && slot.acting.as_ref().is_some_and(|a| a.is_serving())
        };
        let done = slots.into_iter().filter(|(_, (index, term))| goes_on(*index, *term));
        let done: Vec<(u32, Term)> = done.map(|(slot, (_, term))| (slot, term)).collect();
        let flatten = &mut self.flatten;
        flatten.in_vain = if done.is_empty() { (flatten.in_vain + 1).min(5) } else { 0 };
        flatten.look_at = Some(ctx.now + (LOOK_EVERY * (1 << flatten.in_vain)).min(LOOK_EVERY_MAX));
        for slots in done.chunks(SLOTS_PER_COMMAND) {
            self.next_job += 1;
            let key = self.next_job - 1;
            self.flatten.proposed.insert(key);
            self.proposals.push((key, Command::Inherited { vdisk, session, gmap, slots: slots.to_vec() }));
        }
    }

    pub(super) fn on_flatten_scanned(
        &mut self,
        ctx: &mut Context,
        elements: Result<Vec<(ElementKey, Version)>, crate::store::DiskError>,
    ) {
        let is_busy = self.pace.is_busy(ctx.now, self.operations());
        let Some(pass) = &mut self.flatten.pass else { return };
        pass.scan = None;
        let Ok(elements) = elements else {
            self.flatten.pass = None; // The disk's failure is told apart.
            return;
        };
        let last = elements.last().filter(|_| elements.len() == STEP);
        pass.next = last.map(|(key, _)| key.element.saturating_add(1));
        if is_busy {
            pass.at = ctx.now + PACE;
        }
        let is_its = |key: &ElementKey| {
            let slot = ctx.state.slot_of(key.family, key.element);
            slot.is_some_and(|slot| slot.gmap == pass.gmap && pass.slots.contains_key(&slot.slot))
        };
        let elements: Vec<ElementKey> = elements.into_iter().map(|(key, _)| key).filter(is_its).collect();
        pass.waiting = elements.iter().map(|key| key.element).collect();
        for key in elements {
            match ctx.stores.load(key) {
                Loaded::Pending => self.wait_for_load(key, LoadWaiter::Flatten),
                _ => self.flatten_element(ctx, key),
            }
        }
    }

    /// Its entry is in memory, or cannot be read.
    pub(super) fn flatten_element(&mut self, ctx: &mut Context, key: ElementKey) {
        let Some(pass) = self.flatten.pass.as_mut().filter(|pass| pass.family == key.family) else { return };
        let slot = ctx.state.slot_of(key.family, key.element).map(|slot| slot.slot);
        let Some((slot, &(index, _))) = slot.and_then(|slot| Some((slot, pass.slots.get(&slot)?))) else {
            pass.waiting.remove(&key.element);
            return;
        };
        let (vdisk, session) = (pass.vdisk, pass.session);
        let Some(disk) = ctx.state.vdisk(vdisk) else { return self.flatten.answered(key.element, slot, false) };
        let is_read = ctx.stores.load(key) == Loaded::Ready;
        let has_row = is_read && ctx.stores.row_ids(key).iter().any(|(lineage, _)| *lineage == disk.lineage);
        let inherits_nothing = is_read && ctx.stores.mask(key, &views::view_of(ctx.state, vdisk)) == 0;
        // What lies beyond the end nobody reads: who made the disk smaller has discarded it.
        let is_beyond = key.element.saturating_mul(ELEMENT_SIZE) >= disk.size;
        // What a write that is not complete has done here the others may not have. Behind it the row is looked for again.
        let is_unfinished = self.queues.get(&key).is_some_and(|queue| queue.held() != 0);
        let counts = !is_unfinished || self.is_sabotaged(Sabotage::FlattenCountsUnfinished);
        let needs_none = counts && (has_row || inherits_nothing);
        if needs_none || is_beyond || self.is_sabotaged(Sabotage::FlattenWithoutRows) {
            return self.flatten.answered(key.element, slot, true);
        }
        let need = Need { revision: 0, term: self.slots[index].term };
        let access = Access { tag: key.element, vdisk, session, need, relay: None };
        // The number is the element's: where the row was made before, that is known.
        let (element, number) = (key.element, key.element + 1);
        let zero = Zero { access, element, number, finished_below: 0, offset: 0, length: 0 };
        if self.on_zero(ctx, FLATTENER, zero).is_err() {
            self.flatten.answered(element, slot, false);
        }
    }
}
