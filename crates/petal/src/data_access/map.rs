//! Which blocks exist: answered by the acting primary of each slot, for block status and for zeroing
//! large ranges by what is there.

use super::*;

/// A question whose elements' entries are being loaded.
pub(super) struct MapRequest {
    client: ClientId,
    tag: Tag,
    view: View,
    elements: BTreeMap<u64, u16>,
    waiting: BTreeSet<u64>,
    family: FamilyId,
    complete_below: u64,
    not_here: Vec<u32>,
}

impl DataAccess {
    pub(super) fn on_map(&mut self, ctx: &mut Context, client: ClientId, m: Map) -> Result<(), Refusal> {
        // Who has no lease may have been away: somebody else acts, and has written, by now.
        ctx.liveness.lease(ctx.now).ok_or(Refusal::NotReady)?;
        let session = ctx.state.sessions.get(&m.access.session).ok_or(Refusal::SessionEnded)?;
        let vdisk = ctx.state.vdisks.get(&m.access.vdisk).ok_or(Refusal::SessionEnded)?;
        if session.vdisk != m.access.vdisk {
            return Err(Refusal::SessionEnded);
        }
        if m.first_element > m.end_element {
            return Err(Refusal::Malformed);
        }
        let family = ctx.state.families.get(&vdisk.family).ok_or(Refusal::SessionEnded)?;
        let count = self.client_requests.get_or_insert_with(client, || 0);
        if *count >= CLIENT_REQUESTS_MAX {
            return Err(Refusal::TooMany);
        }
        *count += 1;
        let not_here = (0..ctx.state.slots.get(&family.gmap).map_or(0, Vec::len) as u32)
            .filter(|slot| !self.serves(SlotId { gmap: family.gmap, slot: *slot }))
            .collect();
        let map = MapRequest {
            client,
            tag: m.access.tag,
            view: self.view_of(ctx.state, m.access.vdisk),
            elements: BTreeMap::new(),
            waiting: BTreeSet::new(),
            family: vdisk.family,
            complete_below: m.end_element,
            not_here,
        };
        let job = self.next_job;
        self.next_job += 1;
        self.maps.insert(job, map);
        let scan = ctx.stores.scan(vdisk.family, m.first_element, m.end_element, LIST_ELEMENTS_MAX);
        self.map_scans.insert(scan, job);
        Ok(())
    }

    fn serves(&self, slot: SlotId) -> bool {
        let index = self.by_id.get(&slot);
        index.is_some_and(|i| self.slots[*i].acting.as_ref().is_some_and(|a| a.is_serving()))
    }

    /// A scan is done; true if it was one of this room's.
    pub fn on_scanned(
        &mut self,
        ctx: &mut Context,
        scan: ReadId,
        elements: Result<Vec<(ElementKey, Version)>, crate::store::DiskError>,
    ) {
        if let Some(job) = self.map_scans.remove(&scan) {
            return self.on_map_scanned(ctx, job, elements);
        }
        if self.sweep.owns(scan) {
            return self.on_sweep_scanned(ctx, elements);
        }
        if self.scrub.owns(scan) {
            return self.on_scrub_scanned(ctx.now, elements);
        }
        if !self.on_verify_scanned(ctx, scan, &elements) {
            self.on_listing_scanned(ctx, scan, elements);
        }
    }

    pub(super) fn on_map_scanned(
        &mut self,
        ctx: &mut Context,
        job: u64,
        elements: Result<Vec<(ElementKey, Version)>, crate::store::DiskError>,
    ) {
        let Some(map) = self.maps.get_mut(&job) else { return };
        let Ok(elements) = elements else { return self.refuse_map(ctx, job) };
        if elements.len() >= LIST_ELEMENTS_MAX {
            map.complete_below = elements.last().expect("many").0.element + 1;
        }
        let Some(family) = ctx.state.families.get(&map.family) else {
            return self.answer_map_if_whole(ctx, job);
        };
        let slots = ctx.state.slots.get(&family.gmap).map_or(0, Vec::len) as u32;
        let wanted: Vec<ElementKey> = elements
            .into_iter()
            .map(|(key, _)| key)
            .filter(|key| {
                let slot =
                    crate::translator::gmap::slot_of_element(key.element, family.stripe_unit, family.shift, slots);
                map.not_here.binary_search(&slot).is_err()
            })
            .collect();
        map.waiting = wanted.iter().map(|k| k.element).collect();
        for key in wanted {
            match ctx.stores.load(key) {
                Loaded::Pending => self.wait_for_load(key, LoadWaiter::Map(job)),
                Loaded::Ready => self.note_mapped(ctx, job, key),
                Loaded::Failed => return self.refuse_map(ctx, job),
            }
        }
        self.answer_map_if_whole(ctx, job);
    }

    fn refuse_map(&mut self, ctx: &mut Context, job: u64) {
        let Some(map) = self.maps.remove(&job) else { return };
        self.answered(map.client);
        ctx.reply(map.client, Body::MapReply(MapReply { tag: map.tag, result: Err(Refusal::BadCopy) }));
    }

    fn note_mapped(&mut self, ctx: &mut Context, job: u64, key: ElementKey) {
        let Some(map) = self.maps.get_mut(&job) else { return };
        map.waiting.remove(&key.element);
        // A block with an unfinished write counts as data, whatever it will be: a zero that a crash takes
        // back must not have been told as a hole.
        let mask = ctx.stores.mask(key, &map.view) | self.queues.get(&key).map_or(0, ElementQueue::held);
        if mask != 0 {
            map.elements.insert(key.element, mask);
        }
    }

    pub(super) fn on_map_loaded(&mut self, ctx: &mut Context, job: u64, key: ElementKey) {
        self.note_mapped(ctx, job, key);
        self.answer_map_if_whole(ctx, job);
    }

    fn answer_map_if_whole(&mut self, ctx: &mut Context, job: u64) {
        if !self.maps.get(&job).is_some_and(|m| m.waiting.is_empty()) {
            return;
        }
        let map = self.maps.remove(&job).expect("just found");
        self.answered(map.client);
        let part = MapPart {
            elements: map.elements.into_iter().collect(),
            complete_below: map.complete_below,
            not_here: map.not_here,
        };
        ctx.reply(map.client, Body::MapReply(MapReply { tag: map.tag, result: Ok(part) }));
    }
}
