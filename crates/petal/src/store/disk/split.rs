//! A family leaves the GMap that it shares, for one of its own (decision 0016): what is known of its slots there goes with it.

use super::*;
use crate::store::Stores;

impl Stores {
    /// A family has a GMap of its own, whose slots begin with what is known here of those that it left. Stable with the
    /// ticket, and then so is all that was staged before; none if every disk knew it.
    pub fn split(&mut self, family: FamilyId, from: GmapId, to: GmapId) -> Option<Ticket> {
        let is_new = |d: &Disk| d.failed.is_none() && !d.splits.contains_key(&family);
        let homes: SmallVec<[usize; 4]> = (0..self.disks.len()).filter(|d| is_new(&self.disks[*d])).collect();
        if homes.is_empty() {
            return None;
        }
        let ticket = self.ticket();
        if homes.len() > 1 {
            self.copies.insert(ticket, homes.len() as u8);
        }
        let of_from = |(slot, watermark): (&SlotId, &Version)| {
            (slot.gmap == from && watermark.term < to.0).then_some((SlotId { gmap: to, ..*slot }, *watermark))
        };
        for (slot, watermark) in self.watermarks.iter().filter_map(of_from).collect::<Vec<_>>() {
            let of_new = self.watermarks.entry(slot).or_default();
            *of_new = (*of_new).max(watermark);
        }
        for home in homes {
            self.disks[home].stage_split(ticket, family, from, to);
        }
        Some(ticket)
    }
}

impl Disk {
    /// The slot that an element has, where a record names one that its family has left.
    pub(super) fn present_slot(&self, element: ElementKey, slot: SlotId) -> SlotId {
        let left = self.splits.get(&element.family).filter(|(from, _)| *from == slot.gmap);
        left.map_or(slot, |(_, to)| SlotId { gmap: *to, ..slot })
    }

    /// A family has slots of its own: they begin with what is known of those with the same numbers that it left. What
    /// those have from its term on (`to` is its state index) is not about it any more.
    pub(super) fn split(&mut self, family: FamilyId, from: GmapId, to: GmapId) {
        self.splits.insert(family, (from, to));
        self.dirty_splits.insert(family);
        let theirs = SlotId { gmap: from, slot: 0 }..=SlotId { gmap: from, slot: u32::MAX };
        let known: Vec<(SlotId, Version)> =
            self.watermarks.iter().filter(|(slot, _)| theirs.contains(slot)).map(|(slot, w)| (*slot, *w)).collect();
        for (slot, watermark) in known.into_iter().filter(|(_, watermark)| watermark.term < to.0) {
            self.note_watermark(SlotId { gmap: to, ..slot }, watermark);
        }
        let floors: Vec<(SlotId, Version)> =
            self.floors.iter().filter(|(slot, _)| theirs.contains(slot)).map(|(slot, f)| (*slot, *f)).collect();
        for (slot, floor) in floors {
            let of_new = self.floors.entry(SlotId { gmap: to, ..slot }).or_default();
            *of_new = (*of_new).max(floor.min(Version { term: to.0, sequence: 0 }));
        }
        let left: Vec<(SlotId, Version, ElementKey)> = self
            .changes
            .iter()
            .filter(|(slot, _)| theirs.contains(slot))
            .flat_map(|(slot, index)| index.iter().map(|(version, element)| (*slot, *version, *element)))
            .filter(|(_, _, element)| element.family == family && self.sabotage != Sabotage::SplitLosesChanges)
            .collect();
        for (slot, version, element) in left {
            self.index_change(element, (slot, version), Some((SlotId { gmap: to, ..slot }, version)));
        }
        for element in self.clock.iter().filter(|element| element.family == family) {
            if let Some(cached) = self.cache.get_mut(element).filter(|cached| cached.entry.slot.gmap == from) {
                cached.entry.slot.gmap = to;
            }
        }
    }

    /// A family has left a GMap for another one, if this disk does not know that yet. Never refused for want of room in the
    /// journal: there is one such record for a family at most.
    fn stage_split(&mut self, ticket: Ticket, family: FamilyId, from: GmapId, to: GmapId) {
        let record = Record::Split { family, from, to };
        self.append(&record);
        self.apply(record);
        self.staged(Some(ticket));
    }
}
