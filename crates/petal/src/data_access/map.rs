//! Which blocks exist, which differ between two members of a family, and whose space they are: answered by the acting
//! primary of each slot, a page at a time. For block status, for zeroing large ranges by what is there, for incremental
//! backups, and for what a deletion would give back.

use super::*;
use crate::space::{Accounts, SpaceQuestion};

/// A question whose elements' entries are being loaded.
pub(super) struct MapRequest {
    client: ClientId,
    tag: Tag,
    found: Found,
    waiting: BTreeSet<u64>,
    family: FamilyId,
    /// The end of the page, and whether more may follow.
    complete_below: u64,
    is_cut: bool,
    not_here: Vec<u32>,
}

/// What was asked, and has been found.
enum Found {
    /// The blocks that a view shows, or that differ from another one.
    Blocks { session: SessionId, view: View, than: Option<(VdiskId, View)>, elements: BTreeMap<u64, u16> },
    /// Whose space it is.
    Space(Box<Accounts>),
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
        let family = vdisk.family;
        let than = match m.than {
            None => None,
            Some(than) => {
                let other = ctx.state.vdisk(than).filter(|other| other.family == family);
                Some((than, views::view_of(ctx.state, other.ok_or(Refusal::Malformed)?.id)))
            }
        };
        let (session, view) = (m.access.session, views::view_of(ctx.state, m.access.vdisk));
        let found = Found::Blocks { session, view, than, elements: BTreeMap::new() };
        let elements = m.first_element..m.end_element;
        if !self.begin_map(ctx, client, m.access.tag, family, elements, found) {
            return Err(Refusal::TooMany);
        }
        Ok(())
    }

    /// Whose space the elements of a family are, as far as this server acts for them.
    pub fn on_space(&mut self, ctx: &mut Context, client: ClientId, tag: Tag, q: SpaceQuestion) {
        let behind = Err(AdminError::Starting(self.me));
        let result = match ctx.state.families.get(&q.family) {
            _ if ctx.liveness.lease(ctx.now).is_none() || ctx.state.index < q.at => behind,
            None => Ok(AdminResponse::Space(Default::default())),
            Some(family) => {
                let accounts = Accounts::new(family, ctx.state.members(q.family), &q.going);
                let found = Found::Space(Box::new(accounts));
                if self.begin_map(ctx, client, tag, q.family, q.first_element..u64::MAX, found) {
                    return;
                }
                behind
            }
        };
        ctx.reply(client, Body::AdminReply(AdminReply { tag, result }));
    }

    /// False if the client has too many requests under way.
    fn begin_map(
        &mut self,
        ctx: &mut Context,
        client: ClientId,
        tag: Tag,
        family: FamilyId,
        elements: std::ops::Range<u64>,
        found: Found,
    ) -> bool {
        let count = self.client_requests.get_or_insert_with(client, || 0);
        if *count >= CLIENT_REQUESTS_MAX {
            return false;
        }
        *count += 1;
        let gmap = ctx.state.families.get(&family).map(|f| f.gmap);
        let slots = gmap.and_then(|gmap| ctx.state.slots.get(&gmap)).map_or(0, Vec::len) as u32;
        let is_here = |slot: &u32| gmap.is_some_and(|gmap| self.serves(SlotId { gmap, slot: *slot }));
        let not_here = (0..slots).filter(|slot| !is_here(slot)).collect();
        let (waiting, complete_below, is_cut) = (BTreeSet::new(), elements.end, false);
        let map = MapRequest { client, tag, found, waiting, family, complete_below, is_cut, not_here };
        let job = self.next_job;
        self.next_job += 1;
        self.maps.insert(job, map);
        let scan = ctx.stores.scan(family, elements.start, elements.end, LIST_ELEMENTS_MAX);
        self.map_scans.insert(scan, job);
        true
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
        if self.reclaim.owns(scan) {
            return self.on_reclaim_scanned(ctx, elements);
        }
        if self.flatten.owns(scan) {
            return self.on_flatten_scanned(ctx, elements);
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
            map.is_cut = true;
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
        let in_order = matches!(map.found, Found::Space(_));
        for key in wanted {
            match ctx.stores.load(key) {
                Loaded::Failed => return self.refuse_map(ctx, job),
                // They are loaded side by side, and looked at one after the other.
                _ if in_order => {}
                Loaded::Pending => self.wait_for_load(key, LoadWaiter::Map(job)),
                Loaded::Ready => self.note_mapped(ctx, job, key),
            }
        }
        self.advance_space(ctx, job);
        self.answer_map_if_whole(ctx, job);
    }

    /// Looks at elements whose space is asked for, until the page is full: how many rows they have is known only then.
    fn advance_space(&mut self, ctx: &mut Context, job: u64) {
        while let Some(map) = self.maps.get_mut(&job) {
            let (Found::Space(accounts), Some(first)) = (&mut map.found, map.waiting.first().copied()) else { return };
            if accounts.is_full() {
                map.waiting.clear();
                (map.complete_below, map.is_cut) = (first, true);
                return;
            }
            let key = ElementKey { family: map.family, element: first };
            match ctx.stores.load(key) {
                Loaded::Ready => {
                    accounts.add(ctx.stores.rows(key));
                    map.waiting.remove(&first);
                }
                Loaded::Pending => return self.wait_for_load(key, LoadWaiter::Map(job)),
                Loaded::Failed => return self.refuse_map(ctx, job),
            }
        }
    }

    fn refuse_map(&mut self, ctx: &mut Context, job: u64) {
        let Some(map) = self.maps.remove(&job) else { return };
        self.answered(map.client);
        let body = match map.found {
            Found::Blocks { .. } => Body::MapReply(MapReply { tag: map.tag, result: Err(Refusal::BadCopy) }),
            Found::Space(_) => {
                Body::AdminReply(AdminReply { tag: map.tag, result: Err(AdminError::Unreadable(self.me)) })
            }
        };
        ctx.reply(map.client, body);
    }

    fn note_mapped(&mut self, ctx: &mut Context, job: u64, key: ElementKey) {
        let Some(map) = self.maps.get_mut(&job) else { return };
        map.waiting.remove(&key.element);
        if let Found::Blocks { view, than, elements, .. } = &mut map.found {
            // A block with an unfinished write counts as data, whatever it will be: a zero that a crash takes
            // back must not have been told as a hole.
            let present = match than {
                None => ctx.stores.mask(key, view),
                Some((_, than)) => ctx.stores.differing(key, view, than),
            };
            let mask = present | self.queues.get(&key).map_or(0, ElementQueue::held);
            if mask != 0 {
                elements.insert(key.element, mask);
            }
        }
    }

    pub(super) fn on_map_loaded(&mut self, ctx: &mut Context, job: u64, key: ElementKey) {
        if self.maps.get(&job).is_some_and(|m| matches!(m.found, Found::Blocks { .. })) {
            self.note_mapped(ctx, job, key);
        } else {
            self.advance_space(ctx, job);
        }
        self.answer_map_if_whole(ctx, job);
    }

    fn answer_map_if_whole(&mut self, ctx: &mut Context, job: u64) {
        if !self.maps.get(&job).is_some_and(|m| m.waiting.is_empty()) {
            return;
        }
        let mut map = self.maps.remove(&job).expect("just found");
        self.answered(map.client);
        // What was left meanwhile may have been dropped before it was seen.
        let gmap = ctx.state.families.get(&map.family).map(|f| f.gmap);
        let slots = gmap.and_then(|gmap| ctx.state.slots.get(&gmap)).map_or(0, Vec::len) as u32;
        let is_lost = |slot: &u32| gmap.is_none_or(|gmap| !self.serves(SlotId { gmap, slot: *slot }));
        map.not_here.extend((0..slots).filter(is_lost));
        map.not_here.sort_unstable();
        map.not_here.dedup();
        let body = match map.found {
            // The disk may be deleted or gone back by now, and some of its rows dropped before they were seen.
            Found::Blocks { session, .. } if !ctx.state.sessions.contains_key(&session) => {
                Body::MapReply(MapReply { tag: map.tag, result: Err(Refusal::SessionEnded) })
            }
            // The same of the other one, which need not be attached.
            Found::Blocks { than: Some((than, view)), .. }
                if ctx
                    .state
                    .vdisk(than)
                    .is_none_or(|than| view.first().is_none_or(|(own, _)| *own != than.lineage)) =>
            {
                Body::MapReply(MapReply { tag: map.tag, result: Err(Refusal::Malformed) })
            }
            Found::Blocks { elements, .. } => {
                let elements = elements.into_iter().collect();
                let part = MapPart { elements, complete_below: map.complete_below, not_here: map.not_here };
                Body::MapReply(MapReply { tag: map.tag, result: Ok(part) })
            }
            Found::Space(accounts) => {
                let part = accounts.part(map.is_cut.then_some(map.complete_below), map.not_here);
                Body::AdminReply(AdminReply { tag: map.tag, result: Ok(AdminResponse::Space(Box::new(part))) })
            }
        };
        ctx.reply(map.client, body);
    }
}
