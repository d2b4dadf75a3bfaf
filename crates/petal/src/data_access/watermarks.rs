//! Telling the members of a slot how far its watermark is (2.6), a while after it moved: many writes, one message.

use super::{Context, DataAccess, SlotIndex, WATERMARK_DELAY};
use crate::ids::*;
use crate::message::{Body, SlotWatermark, Watermarks};
use crate::server::Peer;
use std::collections::BTreeMap;
use stdx::Instant;

impl DataAccess {
    pub(super) fn watermark_moved(&mut self, now: Instant, index: SlotIndex) {
        let slot = &mut self.slots[index];
        if !slot.watermark_due {
            slot.watermark_due = true;
            self.watermarks_due.push(index);
            self.watermark_timer.get_or_insert(now + WATERMARK_DELAY);
        }
    }

    pub(super) fn send_watermarks(&mut self, ctx: &mut Context) {
        self.watermark_timer = None;
        let mut told: BTreeMap<ServerId, Vec<SlotWatermark>> = BTreeMap::new();
        for index in std::mem::take(&mut self.watermarks_due) {
            let slot = &mut self.slots[index];
            if !std::mem::take(&mut slot.watermark_due) {
                continue;
            }
            let Some(acting) = slot.acting.as_ref().filter(|a| a.is_serving()) else { continue };
            let own = ctx.stores.durable_watermark(slot.id);
            let lowest = acting.durable.values().copied().fold(own, Version::min);
            // A member that is away will ask for what it missed.
            if ctx.state.slot(slot.id).is_some_and(|s| s.tuple.iter().all(|m| m.in_sync)) {
                slot.lowest_durable = slot.lowest_durable.max(lowest);
            }
            ctx.stores.forget_changes(slot.id, slot.lowest_durable);
            for receiver in acting.streams.keys() {
                told.entry(*receiver).or_default().push(SlotWatermark {
                    slot: slot.id,
                    term: slot.term,
                    watermark: slot.watermark,
                    lowest: slot.lowest_durable,
                });
            }
        }
        for (to, slots) in told {
            ctx.send(Peer::Server(to), Body::Watermarks(Watermarks { slots }));
        }
    }
}
