//! Slots whose member this server is no more (2.8): what it holds of them is dropped, and others wait until it knows.
//!
//! ```text
//!  member --its state says that it is none--> serves nothing of it, and tells so
//!                                               --everybody has settled that--> its elements are dropped (`sweep.rs`)
//! ```
//!
//! It drops only what its state says, never what the state does not know: from its own `ServerUp` on the state is newer
//! than everything that it holds. Nothing must be remembered across a restart, the next life looks again. Data that are still
//! there when it becomes a member again are compared with those of the others, as for any member that is not in sync.
//!
//! The other end: whoever acts in a slot that somebody left serves nothing before that server has told a state index at
//! or above the command's, or every lease from before is over.

use super::gates::Gates;
use super::replica::family_ended;
use super::*;

/// Memberships that ended here, and who is waited for elsewhere.
#[derive(Debug, Default)]
pub struct Leaving {
    /// A membership ended here, or may have in an earlier life: to be settled.
    pub(super) is_due: bool,
    /// It has applied its own `ServerUp`.
    is_running: bool,
    /// Who has not settled the last end of a membership.
    pub unsettled: Gates,
    /// State index that each server told last.
    told: FastMap<ServerId, StateIndex>,
    /// Slots here that wait for a server to tell one.
    awaited: BTreeSet<(ServerId, SlotIndex)>,
}

impl Leaving {
    /// True once for each time that something is to be settled.
    pub fn take_due(&mut self) -> bool {
        self.is_running && std::mem::take(&mut self.is_due)
    }

    /// A server has told a state index that it does not know yet.
    pub(crate) fn has_told(&self, server: ServerId, index: StateIndex) -> bool {
        self.told.get(&server).is_some_and(|told| *told >= index)
    }

    pub(crate) fn wait_for(&mut self, server: ServerId, slot: SlotIndex) {
        self.awaited.insert((server, slot));
    }
}

impl DataAccess {
    /// This life acts: what an earlier one was a member of may be left.
    pub fn begin_to_leave(&mut self, state: &State) {
        self.leaving.is_running = true;
        self.leaving.is_due |= !state.layouts.is_empty();
    }

    /// A server tells what it has applied.
    pub fn on_told(&mut self, ctx: &mut Context, server: ServerId, index: StateIndex) {
        let told = self.leaving.told.get_or_insert_with(server, || 0);
        if index <= *told {
            return;
        }
        *told = index;
        if self.leaving.awaited.is_empty() {
            return;
        }
        let slots = self.leaving.awaited.range((server, 0)..=(server, SlotIndex::MAX)).map(|(_, slot)| *slot);
        for slot in slots.collect::<Vec<_>>() {
            let Some(acting) = self.slots[slot].acting.as_mut() else {
                self.leaving.awaited.remove(&(server, slot));
                continue;
            };
            if acting.leavers.get(&server).is_none_or(|left| *left <= index) {
                acting.leavers.remove(&server);
                self.leaving.awaited.remove(&(server, slot));
                self.settlement_may_be_done(ctx, slot);
            }
        }
    }

    /// Who left the slot may serve reads of it until it knows (2.1, "complete").
    pub(crate) fn wait_for_leavers(&mut self, ctx: &Context, index: SlotIndex) {
        let id = self.slots[index].id;
        let state = &ctx.state.slots[&id.gmap][id.slot as usize];
        for left in state.unaware_leavers(&ctx.state.servers) {
            if left.server == self.me || self.leaving.has_told(left.server, left.index) {
                continue;
            }
            let acting = self.slots[index].acting.as_mut().expect("it has just begun to act");
            acting.leavers.insert(left.server, left.index);
            acting.leavers_until = ctx.now + LEASE_SURELY_OVER;
            self.leaving.wait_for(left.server, index);
        }
    }

    /// True if nothing here has any business with the element any more.
    pub(super) fn is_to_go(&self, state: &State, key: ElementKey) -> bool {
        if family_ended(state, key.family) {
            return true;
        }
        let Some(id) = state.slot_of(key.family, key.element) else { return false };
        let is_member = |index: &SlotIndex| self.slots[*index].is_member;
        let has_left =
            state.slot(id).is_some_and(|s| s.member(self.me).is_none()) && !self.by_id.get(&id).is_some_and(is_member);
        self.may_have_left(state, key.family) && has_left
    }

    /// True if slots of the family's GMap may have been left here, and everybody knows.
    pub(super) fn may_have_left(&self, state: &State, family: FamilyId) -> bool {
        let is_known = self.leaving.is_running && !self.leaving.is_due && self.leaving.unsettled.is_idle();
        is_known && state.family(family).is_some_and(|f| state.layouts.contains_key(&f.gmap))
    }
}
