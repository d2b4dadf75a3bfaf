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

/// Where it is.
#[derive(Debug, Default)]
pub struct Reclaim {
    /// Families to look through.
    wanted: BTreeSet<FamilyId>,
    /// Those again, of which something was left.
    left: BTreeSet<FamilyId>,
    again_at: Option<Instant>,
    pass: Option<Pass>,
}

/// A look through a family.
#[derive(Debug)]
struct Pass {
    family: FamilyId,
    /// The next element.
    next: u64,
    scan: Option<ReadId>,
    /// Elements whose entries are being loaded.
    waiting: BTreeSet<ElementKey>,
    /// The family has no more elements.
    is_last: bool,
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

    /// A new row has taken the place of one that nobody sees any more: looked at soon, with others.
    pub(super) fn want_soon(&mut self, family: FamilyId, now: Instant) {
        self.left.insert(family);
        self.again_at.get_or_insert(now + AGAIN);
    }

    /// When something is due although nothing else happens.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let pass = self.pass.as_ref().filter(|p| p.scan.is_none() && p.waiting.is_empty()).map(|p| p.at);
        pass.or(self.again_at)
    }

    /// Families that are not looked through yet.
    pub fn left(&self) -> usize {
        self.wanted.union(&self.left).count() + usize::from(self.pass.is_some())
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
            reclaim.wanted.append(&mut reclaim.left);
        }
        if reclaim.pass.is_none() {
            let Some(family) = reclaim.wanted.pop_first() else { return };
            if ctx.state.family(family).is_none() {
                return; // It ended meanwhile: the sweep drops all of it.
            }
            let (waiting, at) = (BTreeSet::new(), ctx.now);
            reclaim.pass = Some(Pass { family, next: 0, scan: None, waiting, is_last: false, at });
        }
        let pass = reclaim.pass.as_mut().expect("there is one now");
        if pass.scan.is_some() || !pass.waiting.is_empty() || pass.at > ctx.now {
            return;
        }
        if pass.is_last {
            reclaim.pass = None;
            return;
        }
        pass.scan = Some(ctx.stores.scan(pass.family, pass.next, u64::MAX, STEP));
    }

    pub(super) fn on_reclaim_scanned(
        &mut self,
        ctx: &mut Context,
        elements: Result<Vec<(ElementKey, Version)>, crate::store::DiskError>,
    ) {
        let is_busy = self.operations() > 0;
        let Some(pass) = &mut self.reclaim.pass else { return };
        pass.scan = None;
        let Ok(elements) = elements else {
            self.reclaim.pass = None; // The disk's failure is told apart.
            return;
        };
        pass.is_last = elements.len() < STEP;
        pass.next = elements.last().map_or(pass.next, |(key, _)| key.element.saturating_add(1));
        if is_busy {
            pass.at = ctx.now + PACE;
        }
        pass.waiting = elements.iter().map(|(key, _)| *key).collect();
        for (key, _) in elements {
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
        self.reclaim.left.insert(key.family);
        self.reclaim.again_at.get_or_insert(ctx.now + AGAIN);
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

/// True if something of an image cannot be seen by this server's state: who sent it was behind.
pub(super) fn has_unseen(state: &State, element: ElementKey, image: &ElementImage) -> bool {
    let rows = image.rows.iter().map(|r| (r.lineage, r.epoch));
    state.visible(element.family).is_some_and(|visible| !visible.kept(rows).all(|is_kept| is_kept))
}
