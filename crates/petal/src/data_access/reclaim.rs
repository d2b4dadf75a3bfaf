//! Reclaim: giving back what nobody can see any more (2.9; paper 2.2: a deleted snapshot's space comes back).
//!
//! ```text
//!  less of a family can be seen -> its elements are looked through, some at a time
//!                                    -> rows of an element that nobody sees are dropped (`Change::Reclaim`)
//! ```
//!
//! Every replica does this by itself, at its own time: what is seen follows from the state alone, and closed epochs
//! only ever lose sight (`translator/visible.rs`). So replicas compare and copy images without such rows
//! (`seen_image`), and what was dropped here never comes back by a copy that counts. A replica that is not in sync, or
//! whose slot is not settled, leaves its rows alone: its primary may be asking for just these.
//!
//! A write that puts a new row over one that nobody sees any more names its element, so that only this one is looked at
//! again, and not the family.
//!
//! Nothing must be remembered across a restart: the next life looks again. It gives way to clients: a small step every
//! `PACE` while they work, one after the other while nobody does.

use super::*;
use stdx::Duration;

/// Elements looked at in one step.
const STEP: usize = 64;
/// Time between two steps while clients work.
const PACE: Duration = Duration::from_millis(10);
/// What could not be dropped is looked at again after so long.
const AGAIN: Duration = Duration::from_secs(1);
/// Elements that are remembered one by one, 16 bytes each. Of what is more the whole family is looked through.
const LEFT_MAX: usize = 65536;

/// Where it is.
#[derive(Debug, Default)]
pub struct Reclaim {
    /// Families to look through.
    wanted: BTreeSet<FamilyId>,
    /// Elements to look at by themselves.
    due: BTreeSet<ElementKey>,
    /// Those for which it is too early: something could not be dropped, or may have company soon.
    left: BTreeSet<ElementKey>,
    /// Families with more of these than are remembered.
    left_families: BTreeSet<FamilyId>,
    again_at: Option<Instant>,
    pass: Option<Pass>,
}

/// A look through a family, or at some elements.
#[derive(Debug)]
struct Pass {
    /// Where to go on in a family; `None` at its end, and for elements by themselves.
    next: Option<(FamilyId, u64)>,
    scan: Option<ReadId>,
    /// Elements whose entries are being loaded.
    waiting: BTreeSet<ElementKey>,
    /// Not before.
    at: Instant,
}

impl Reclaim {
    /// Less of a family can be seen than what is stored.
    pub(super) fn want(&mut self, family: FamilyId) {
        self.wanted.insert(family);
    }

    pub(super) fn owns(&self, scan: ReadId) -> bool {
        self.pass.as_ref().is_some_and(|p| p.scan == Some(scan))
    }

    /// Something of an element cannot be seen any more, or could not be dropped yet: looked at soon, with others.
    pub(super) fn want_soon(&mut self, element: ElementKey, now: Instant) {
        if self.left.len() < LEFT_MAX {
            self.left.insert(element);
        } else {
            self.left_families.insert(element.family);
        }
        self.again_at.get_or_insert(now + AGAIN);
    }

    /// When something is due although nothing else happens.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let pass = self.pass.as_ref().filter(|p| p.scan.is_none() && p.waiting.is_empty()).map(|p| p.at);
        pass.or(self.again_at)
    }

    /// Families, and elements by themselves, that are not looked at yet.
    pub fn left(&self) -> usize {
        let families = self.wanted.union(&self.left_families).count();
        families + self.due.len() + self.left.len() + usize::from(self.pass.is_some())
    }

    /// Begins with the next family, or some elements; returns those.
    fn begin(&mut self, now: Instant) -> Vec<ElementKey> {
        let mut elements = Vec::new();
        let next = self.wanted.pop_first().map(|family| (family, 0));
        if next.is_none() {
            elements.extend(std::iter::from_fn(|| self.due.pop_first()).take(STEP));
        }
        let waiting = elements.iter().copied().collect();
        self.pass = (next.is_some() || !elements.is_empty()).then_some(Pass { next, scan: None, waiting, at: now });
        elements
    }
}

impl DataAccess {
    /// Less of a family can be seen than before: look through its elements.
    pub fn want_reclaim(&mut self, family: FamilyId) {
        self.reclaim.want(family);
    }

    /// The same for every family that has or had snapshots: the server has started, or has missed commands.
    pub fn want_reclaim_of_all(&mut self, state: &State) {
        let has_history = |f: &FamilyId| state.members(*f).any(|m| m.epoch > Epoch(1) || m.lineage > LineageId(1));
        self.reclaim.wanted.extend(state.families.keys().copied().filter(has_history));
    }

    pub(super) fn advance_reclaim(&mut self, ctx: &mut Context) {
        let reclaim = &mut self.reclaim;
        if reclaim.again_at.is_some_and(|at| at <= ctx.now) {
            reclaim.again_at = None;
            reclaim.wanted.append(&mut reclaim.left_families);
            reclaim.due.append(&mut reclaim.left);
        }
        if reclaim.pass.is_none() {
            let elements = reclaim.begin(ctx.now);
            self.look_at_all(ctx, elements);
        }
        let Some(pass) = self.reclaim.pass.as_mut() else { return };
        if pass.scan.is_some() || !pass.waiting.is_empty() || pass.at > ctx.now {
            return;
        }
        // A family that has ended meanwhile is dropped whole, by the sweep.
        match pass.next.take().filter(|(family, _)| ctx.state.family(*family).is_some()) {
            Some((family, next)) => {
                pass.next = Some((family, next));
                pass.scan = Some(ctx.stores.scan(family, next, u64::MAX, STEP));
            }
            None => self.reclaim.pass = None,
        }
    }

    pub(super) fn on_reclaim_scanned(
        &mut self,
        ctx: &mut Context,
        elements: Result<Vec<(ElementKey, Version)>, crate::store::DiskError>,
    ) {
        let Some(pass) = &mut self.reclaim.pass else { return };
        pass.scan = None;
        let Ok(elements) = elements else {
            self.reclaim.pass = None; // The disk's failure is told apart.
            return;
        };
        let last = elements.last().filter(|_| elements.len() == STEP);
        pass.next = last.map(|(key, _)| (key.family, key.element.saturating_add(1)));
        let elements: Vec<ElementKey> = elements.into_iter().map(|(key, _)| key).collect();
        pass.waiting = elements.iter().copied().collect();
        self.look_at_all(ctx, elements);
    }

    fn look_at_all(&mut self, ctx: &mut Context, elements: Vec<ElementKey>) {
        if self.operations() > 0
            && let Some(pass) = &mut self.reclaim.pass
        {
            pass.at = ctx.now + PACE;
        }
        for key in elements {
            match ctx.stores.load(key) {
                Loaded::Pending => self.wait_for_load(key, LoadWaiter::Reclaim),
                _ => self.reclaim_element(ctx, key),
            }
        }
    }

    pub(super) fn reclaim_element(&mut self, ctx: &mut Context, key: ElementKey) {
        if !self.reclaim.pass.as_mut().is_some_and(|pass| pass.waiting.remove(&key)) {
            return;
        }
        let Some(visible) = ctx.state.visible(key.family) else { return };
        let rows = ctx.stores.row_ids(key);
        let kept = visible.kept(rows.iter().copied());
        let unseen: Vec<_> = rows.iter().copied().zip(kept).filter(|(_, kept)| !kept).map(|(row, _)| row).collect();
        if unseen.is_empty() || self.drop_rows(ctx, key, unseen) {
            return;
        }
        self.reclaim.want_soon(key, ctx.now);
    }

    /// False if it cannot be done at present.
    fn drop_rows(&mut self, ctx: &mut Context, key: ElementKey, rows: Vec<(LineageId, Epoch)>) -> bool {
        let slot = ctx.state.slot_of(key.family, key.element);
        let Some(&index) = slot.and_then(|id| self.by_id.get(&id)) else { return false };
        let slot = &self.slots[index];
        let is_ready = slot.in_sync.contains(&self.me)
            && slot.watermark.term >= slot.term
            && slot.acting.as_ref().is_none_or(|a| a.is_serving());
        if !is_ready || ctx.stores.load(key) != Loaded::Ready {
            return false;
        }
        let count = rows.len() as u64;
        let Ok(ticket) = ctx.stores.stage(Change::Reclaim { element: key, rows }) else { return false };
        self.counters.reclaimed_rows += count;
        self.slots[index].outstanding += 1;
        self.tickets.insert(ticket, TicketOwner::Background { slot: index });
        true
    }
}

/// True if some of an element's rows cannot be seen by this server's state. Where they were sent, the sender was behind.
pub(super) fn has_unseen(
    state: &State,
    element: ElementKey,
    rows: impl Iterator<Item = (LineageId, Epoch)> + Clone,
) -> bool {
    state.visible(element.family).is_some_and(|visible| !visible.kept(rows).all(|is_kept| is_kept))
}
