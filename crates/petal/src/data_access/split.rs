//! Families that leave the GMap that they share (decision 0016).

use super::{Context, DataAccess, TicketOwner};
use crate::global_state::Split;
use crate::ids::{GmapId, ServerId, SlotId};
use std::collections::BTreeSet;

impl DataAccess {
    /// Families that have GMaps of their own since: before anything of their new slots is known here, the stores know that
    /// what they have of the old ones belongs there. Told are all slots of both maps: they have new terms in the same step.
    pub(super) fn split_families(&mut self, ctx: &mut Context, heirs: &mut BTreeSet<ServerId>) -> Vec<SlotId> {
        let known = &self.splits;
        let new: Vec<(GmapId, Split)> =
            ctx.state.splits.iter().filter(|(gmap, _)| !known.contains(gmap)).map(|(gmap, s)| (*gmap, *s)).collect();
        let mut changed = Vec::new();
        for (gmap, Split { family, from }) in new {
            self.splits.insert(gmap);
            self.forget_repairs_of(ctx.now, family);
            let ticket = ctx.stores.split(family, from, gmap);
            let mut here = Vec::new();
            for (number, slot) in (0..).zip(&ctx.state.slots[&gmap]) {
                let (id, old) = (SlotId { gmap, slot: number }, SlotId { gmap: from, slot: number });
                if slot.member(self.me).is_some() {
                    here.push(self.slot_index(ctx, id));
                } else if self.by_id.get(&old).is_some_and(|index| self.slots[*index].is_member) {
                    // It left what it never knew to be a slot.
                    self.leaving.is_due = true;
                    heirs.extend(self.who_acts(ctx.state, slot));
                }
                changed.extend([old, id]);
            }
            // What was staged for the family before counts as the old slots': promises for the new ones wait for it, too.
            if let Some(ticket) = ticket {
                here.iter().for_each(|index| self.slots[*index].outstanding += 1);
                self.tickets.insert(ticket, TicketOwner::Split { slots: here });
            }
        }
        changed
    }
}
