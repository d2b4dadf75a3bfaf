//! Promise and settlement (2.6): the one mechanism for every change of authority over a slot.
//!
//! ```text
//!  new term -> Promising -> Listing -> Settling -> Serving
//!                 |            |           |
//!     every in-sync member     |     every element in which members differ is made equal
//!     has promised the term    every member has told its elements newer than the lowest watermark
//! ```
//!
//! A member that has promised a term accepts nothing older, and promises only when all that it had
//! accepted is stable. So the lists are final: what is on no list is on no disk, and what was
//! acknowledged is on every one. Of each listed element the highest version wins (ties: the new
//! primary's), and the *whole* element, request ids included, is made equal by its checksums, not by
//! its version: two replicas can have the same version and different blocks (docs/petal.md, "why
//! settlement compares content").
//!
//! Nothing of the slot is served before. Lost connections: promises, lists and fetches are asked for
//! again when the connection is back; streams resend by themselves.

use crate::data_access::{
    Context, DataAccess, Incoming, LoadWaiter, OpNumber, Outgoing, ReadOwner, SlotIndex, TicketOwner, family_ended,
    keep_seen, seen_image,
};
use crate::global_state::{SlotState, State};
use crate::ids::*;
use crate::limits::{LEASE_SURELY_OVER, LIST_ELEMENTS_MAX};
use crate::message::*;
use crate::repair::Retry;
use crate::resync::Joiner;
use crate::sabotage::Sabotage;
use crate::server::{Output, Peer};
use crate::store::{
    BlockSum, Change, DiskError, ElementImage, Loaded, ReadBlocks, ReadError, ReadId, RowImage, SentAndShared,
};
use bytes::Bytes;
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use stdx::{FastMap, Instant};

/// Elements of a slot that are settled side by side.
const SETTLING_MAX: usize = 8;
/// Blocks of settled elements on their way to one receiver of one slot, about.
const SETTLING_BLOCKS_MAX: u64 = 1024;
/// Blocks in one message about an element: 2 MiB of data.
pub(crate) const COPY_BLOCKS_MAX: usize = 512;
/// Rows of images in one answer to a list request: 100 bytes each.
const LIST_ROWS_MAX: usize = 32768;

/// A primary's state in one term of one slot.
pub(crate) struct Acting {
    phase: Phase,
    /// Highest sequence given to a write.
    pub sequence: u64,
    /// Writes that are not complete, by sequence.
    pub unfinished: BTreeMap<u64, Unfinished>,
    /// The other in-sync members.
    pub receivers: SmallVec<[ServerId; 3]>,
    /// One stream to each.
    pub streams: BTreeMap<ServerId, Outgoing>,
    /// Watermark on the disks of each.
    pub durable: BTreeMap<ServerId, Version>,
    /// Members that are being brought back (`resync.rs`).
    pub joiners: BTreeMap<ServerId, Joiner>,
    /// Nothing is served before: a member that was taken out may still have a lease.
    pub not_before: Option<Instant>,
    /// Nor before these, who are no members any more, have told these state indexes, or this moment.
    pub leavers: BTreeMap<ServerId, StateIndex>,
    pub(crate) leavers_until: Instant,
    /// State index of the last mark in the streams.
    pub marked: StateIndex,
}

/// A write that has a version and is not complete.
pub(crate) struct Unfinished {
    /// Whose it is.
    pub operation: OpNumber,
    /// Servers that have not made it stable.
    pub waits: SmallVec<[ServerId; 3]>,
    /// The disk, and the state index by which it got its epoch.
    pub disk: VdiskId,
    /// The second of these.
    pub at: StateIndex,
}

type Lists = BTreeMap<ServerId, BTreeMap<ElementKey, ElementImage>>;

enum Phase {
    Promising { promised: BTreeMap<ServerId, Version> },
    Listing { lowest: Version, lists: Lists, done: BTreeSet<ServerId> },
    Settling { todo: VecDeque<Difference>, active: BTreeMap<ElementKey, Settling> },
    Serving,
}

/// An element in which the members differ.
struct Difference {
    element: ElementKey,
    /// What it must be.
    image: ElementImage,
    /// Who has that.
    winner: ServerId,
    /// What every other member has instead (`None`: nothing newer than the lowest watermark).
    others: BTreeMap<ServerId, Option<ElementImage>>,
}

/// An element being settled.
struct Settling {
    difference: Difference,
    step: Step,
}

/// ```text
///  (winner elsewhere) Fetching -> Replacing -> Reading -> copies sent
///  (winner here) ------------------------------^
/// ```
enum Step {
    /// Blocks that this server lacks are on their way from the winner: one part of them after the other.
    Fetching { blocks: Vec<(u16, u8)>, data: Vec<(u16, u8, Bytes)> },
    /// They have come and wait for the entry.
    Fetched { data: Vec<(u16, u8, Bytes)> },
    /// The element is being made durable here.
    Replacing,
    /// Blocks that others lack are to be read here.
    ToRead,
    /// They are being read.
    Reading { blocks: Vec<(u16, u8)>, parts: BTreeMap<ServerId, SentAndShared> },
}

/// What a list is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// This server's own part of a settlement.
    Own,
    /// The primary asked what is newer.
    Answer { to: ServerId, attempt: u64 },
    /// The primary asked about single elements.
    Compare { to: ServerId, attempt: u64 },
    /// Keys only: what a member may lack that this primary brings back.
    Joiner { server: ServerId, attempt: u64 },
}

impl Step {
    /// The blocks that are asked for next.
    fn wanted(&self) -> &[(u16, u8)] {
        match self {
            Step::Fetching { blocks, data } => &blocks[data.len()..blocks.len().min(data.len() + COPY_BLOCKS_MAX)],
            _ => &[],
        }
    }
}

/// A list being put together, for the primary or for oneself.
pub(crate) struct Listing {
    slot: SlotIndex,
    term: Term,
    above: Version,
    purpose: Purpose,
    keys: VecDeque<ElementKey>,
    images: Vec<(ElementKey, ElementImage)>,
    /// Rows of these.
    rows: usize,
    next: Option<ElementKey>,
    scan: Option<ReadId>,
}

impl Listing {
    fn new(slot: SlotIndex, term: Term, above: Version, purpose: Purpose) -> Listing {
        let (keys, images) = (VecDeque::new(), Vec::new());
        Listing { slot, term, above, purpose, keys, images, rows: 0, next: None, scan: None }
    }
}

impl Acting {
    /// Promise and settlement are over.
    pub fn is_serving(&self) -> bool {
        matches!(self.phase, Phase::Serving)
    }

    /// True if something of the slot waits for an answer of this member.
    pub fn waits_for(&self, server: ServerId) -> bool {
        match &self.phase {
            Phase::Promising { promised } if !promised.contains_key(&server) => return true,
            Phase::Listing { done, .. } if !done.contains(&server) => return true,
            Phase::Settling { active, .. } if active.values().any(|s| s.difference.winner == server) => return true,
            _ => {}
        }
        self.streams.get(&server).is_some_and(|s| !s.is_empty())
    }

    /// True if this server's promise is asked for and has not come.
    pub fn waits_for_promise_of(&self, server: ServerId) -> bool {
        let Phase::Promising { promised } = &self.phase else { return false };
        self.receivers.contains(&server) && !promised.contains_key(&server)
    }
}

impl DataAccess {
    /// The state has a new term for the slot: whatever was under way in the old one ends here.
    pub(crate) fn change_term(
        &mut self,
        ctx: &mut Context,
        index: SlotIndex,
        asks: &mut BTreeMap<ServerId, Vec<(SlotId, Term)>>,
    ) {
        let id = self.slots[index].id;
        let state = &ctx.state.slots[&id.gmap][id.slot as usize];
        let mut in_sync: SmallVec<[ServerId; 3]> = state.in_sync().collect();
        if self.sabotage == Sabotage::FirstNotSuspectedActs {
            in_sync.retain(|s| *s == self.me || !is_suspected(ctx.state, *s));
        }
        let was_out = !self.slots[index].in_sync.contains(&self.me);
        let primary = self.who_acts(ctx.state, state);
        self.listings.retain(|_, l| l.slot != index);
        self.park_operations(index);
        self.forget_copies(index);
        let slot = &mut self.slots[index];
        if let Some(old) = slot.acting.take() {
            // What was on its way in the old term is refused from now on, or stable before the promise.
            let joiners = old.joiners.iter().map(|(server, joiner)| (server, &joiner.outgoing));
            for (receiver, outgoing) in old.streams.iter().chain(joiners) {
                let window = self.windows.entry(*receiver).or_default();
                window.in_flight = window.in_flight.saturating_sub(outgoing.cost());
            }
        }
        slot.incoming = None;
        slot.promise_due = None;
        if let Some((term, watermark)) = slot.caught_up.take()
            && (term == slot.term && was_out && in_sync.contains(&self.me))
        {
            // Back in sync, from the term in which everything was copied: it knows what its primary knew.
            slot.watermark = slot.watermark.max(watermark);
            // Also after a restart: else the whole slot would be listed at the next settlement.
            ctx.stores.note_caught_up(slot.id, slot.watermark);
        }
        slot.term = state.term;
        slot.primary = primary;
        slot.is_member = state.member(self.me).is_some();
        slot.since = state.member(self.me).map_or(0, |m| m.since);
        if let Some(member) = state.member(self.me)
            && slot.watermark.term < member.since
        {
            slot.watermark = Version::ZERO; // 2.1, "since": copies of an earlier membership count as nothing.
        }
        slot.in_sync = in_sync;
        if primary == Some(self.me) {
            let unaware = ctx.state.slots[&id.gmap][id.slot as usize].has_unaware(&ctx.state.servers);
            let waits = unaware && self.sabotage != Sabotage::TakeOutWithoutWait;
            self.begin_to_act(index, waits.then(|| ctx.now + LEASE_SURELY_OVER), asks);
            if self.sabotage != Sabotage::LeaversServeOn {
                self.wait_for_leavers(ctx, index);
            }
            self.on_outstanding_changed(ctx, index);
        } else {
            self.unpark_operations(ctx, index);
        }
        self.on_slot_settled_or_not(ctx, index);
        self.answer_early_promise(ctx, id);
    }

    /// The first in-sync member that is not down acts, suspected or not.
    pub(crate) fn who_acts(&self, state: &State, slot: &SlotState) -> Option<ServerId> {
        let is_down = |s: &ServerId| state.servers.get(s).is_none_or(|s| s.down);
        let passes_by = |s: &ServerId| self.sabotage == Sabotage::FirstNotSuspectedActs && is_suspected(state, *s);
        slot.in_sync().find(|s| !is_down(s) && !passes_by(s))
    }

    fn begin_to_act(
        &mut self,
        index: SlotIndex,
        not_before: Option<Instant>,
        asks: &mut BTreeMap<ServerId, Vec<(SlotId, Term)>>,
    ) {
        let slot = &mut self.slots[index];
        slot.promised = slot.term;
        let receivers: SmallVec<[ServerId; 3]> = slot.in_sync.iter().copied().filter(|s| *s != self.me).collect();
        let mut streams = BTreeMap::new();
        for receiver in &receivers {
            self.next_stream += 1;
            streams.insert(*receiver, Outgoing::new(self.next_stream));
            if self.connected.contains(receiver) {
                asks.entry(*receiver).or_default().push((slot.id, slot.term));
            }
        }
        slot.acting = Some(Box::new(Acting {
            phase: Phase::Promising { promised: BTreeMap::new() },
            sequence: 0,
            unfinished: BTreeMap::new(),
            durable: receivers.iter().map(|r| (*r, Version::ZERO)).collect(),
            receivers,
            streams,
            joiners: BTreeMap::new(),
            not_before,
            leavers: BTreeMap::new(),
            leavers_until: Instant::ZERO,
            marked: 0,
        }));
    }

    pub(crate) fn send_promises(&mut self, ctx: &mut Context, asks: BTreeMap<ServerId, Vec<(SlotId, Term)>>) {
        for (to, slots) in asks {
            ctx.send(Peer::Server(to), Body::Promise(Promise { slots }));
        }
    }

    // --------------------------------------------------------------------------------------------
    // Promising.

    /// A server that acts under a newer term asks for promises.
    pub fn on_promise(&mut self, ctx: &mut Context, from: ServerId, m: Promise) {
        for (id, term) in m.slots {
            let known = self.by_id.get(&id).map(|index| (*index, self.slots[*index].term));
            match known {
                Some((index, present)) if present == term => {
                    let slot = &mut self.slots[index];
                    if slot.primary != Some(from) {
                        continue;
                    }
                    slot.promised = term;
                    if slot.incoming.as_ref().is_none_or(|i| i.term != term) {
                        slot.incoming = Some(Incoming::new(from, term));
                    }
                    slot.promise_due = Some(from);
                    self.on_outstanding_changed(ctx, index);
                }
                Some((_, present)) if present > term => {} // It will learn.
                // This server is behind: it answers when it has caught up.
                _ => {
                    let early = self.early_promises.entry(id).or_insert((from, term));
                    if early.1 <= term {
                        *early = (from, term);
                    }
                }
            }
        }
    }

    fn answer_early_promise(&mut self, ctx: &mut Context, id: SlotId) {
        if let Some((from, term)) = self.early_promises.remove(&id) {
            self.on_promise(ctx, from, Promise { slots: vec![(id, term)] });
        }
    }

    /// Called whenever a change of the slot has become stable: promises and settlements wait for that.
    pub(crate) fn on_outstanding_changed(&mut self, ctx: &mut Context, index: SlotIndex) {
        let slot = &mut self.slots[index];
        if slot.outstanding > 0 {
            return;
        }
        if let Some(to) = slot.promise_due.take() {
            if !slot.in_sync.contains(&self.me) {
                // What came before this promise is known to the primary by the lists that follow it.
                slot.incoming = Some(Incoming::new(to, slot.term));
            }
            self.promised_due.entry(to).or_default().push((slot.id, slot.term, slot.watermark));
        }
        let own = (self.me, slot.watermark);
        if let Some(acting) = slot.acting.as_mut()
            && let Phase::Promising { promised } = &mut acting.phase
        {
            promised.insert(own.0, own.1);
            self.list_if_all_promised(ctx, index);
        }
        self.settlement_may_be_done(ctx, index);
    }

    /// Promises given in this round, one message per primary.
    pub(crate) fn send_promised(&mut self, ctx: &mut Context) {
        for (to, slots) in std::mem::take(&mut self.promised_due) {
            let credit = self.credit(ctx, to);
            ctx.send(Peer::Server(to), Body::Promised(Promised { slots, credit }));
        }
    }

    /// Promises have come.
    pub fn on_promised(&mut self, ctx: &mut Context, from: ServerId, m: Promised) {
        self.silence.heard(from);
        self.on_credit(ctx, from, m.credit);
        for (id, term, watermark) in m.slots {
            let Some(&index) = self.by_id.get(&id) else { continue };
            let slot = &mut self.slots[index];
            let since = ctx.state.slots[&id.gmap][id.slot as usize].member(from).map_or(0, |m| m.since);
            let told = slot.told_durable.get_mut(&from);
            if let Some(told) = told.filter(|told| **told > watermark && told.term >= since) {
                // What a lying disk has lost is newer than this, and so is listed by the others (2.6).
                *told = watermark;
                self.counters.lost_by_others += 1;
            }
            let watermark = if watermark.term < since { Version::ZERO } else { watermark };
            if slot.term != term {
                continue;
            }
            let Some(acting) = slot.acting.as_mut() else { continue };
            if acting.joiners.contains_key(&from) {
                self.on_joiner_promised(ctx, index, from, watermark);
            } else if let Phase::Promising { promised } = &mut acting.phase {
                promised.insert(from, watermark);
                self.list_if_all_promised(ctx, index);
            }
        }
    }

    // --------------------------------------------------------------------------------------------
    // Listing.

    fn list_if_all_promised(&mut self, ctx: &mut Context, index: SlotIndex) {
        let slot = &mut self.slots[index];
        let (id, term, in_sync) = (slot.id, slot.term, slot.in_sync.clone());
        let acting = slot.acting.as_mut().expect("only an acting primary collects promises");
        let Phase::Promising { promised } = &acting.phase else { return };
        if !in_sync.iter().all(|s| promised.contains_key(s)) {
            return;
        }
        let lowest = promised.values().copied().min().expect("its own at least");
        acting.phase = Phase::Listing { lowest, lists: Lists::new(), done: BTreeSet::new() };
        for to in acting.receivers.clone() {
            ctx.send(Peer::Server(to), Body::List(List { slot: id, term, above: lowest, after: None, attempt: 0 }));
        }
        self.begin_listing(ctx, index, lowest, None, Purpose::Own);
    }

    fn begin_listing(
        &mut self,
        ctx: &mut Context,
        index: SlotIndex,
        above: Version,
        after: Option<ElementKey>,
        purpose: Purpose,
    ) {
        let slot = &self.slots[index];
        let mut listing = Listing::new(index, slot.term, above, purpose);
        match ctx.stores.newer(slot.id, above) {
            Some(mut keys) => {
                keys.retain(|k| after.is_none_or(|a| *k > a));
                if keys.len() > LIST_ELEMENTS_MAX {
                    keys.truncate(LIST_ELEMENTS_MAX);
                    listing.next = keys.last().copied();
                }
                listing.keys = keys.into();
            }
            None => listing.scan = Some(ctx.stores.scan_all(after, LIST_ELEMENTS_MAX)),
        }
        self.run_listing(ctx, listing);
    }

    fn run_listing(&mut self, ctx: &mut Context, listing: Listing) {
        for key in &listing.keys {
            let _ = ctx.stores.load(*key); // Side by side; `advance_listing` waits for each in turn.
        }
        let job = self.next_job;
        self.next_job += 1;
        self.listings.insert(job, listing);
        self.advance_listing(ctx, job);
    }

    /// The primary of the slot asks what is here of these elements.
    pub(crate) fn begin_comparing(
        &mut self,
        ctx: &mut Context,
        index: SlotIndex,
        (to, attempt): (ServerId, u64),
        elements: Vec<ElementKey>,
    ) {
        let mut listing = Listing::new(index, self.slots[index].term, Version::ZERO, Purpose::Compare { to, attempt });
        listing.keys = elements.into();
        self.run_listing(ctx, listing);
    }

    /// The fall-back for a joiner's list where the change index does not reach back far enough.
    pub(crate) fn scan_for_joiner(
        &mut self,
        ctx: &mut Context,
        index: SlotIndex,
        (server, attempt): (ServerId, u64),
        above: Version,
        after: Option<ElementKey>,
    ) {
        let mut listing = Listing::new(index, self.slots[index].term, above, Purpose::Joiner { server, attempt });
        listing.scan = Some(ctx.stores.scan_all(after, LIST_ELEMENTS_MAX));
        self.run_listing(ctx, listing);
    }

    /// The fall-back where the change index does not reach back far enough.
    pub(crate) fn on_listing_scanned(
        &mut self,
        ctx: &mut Context,
        scan: ReadId,
        elements: Result<Vec<(ElementKey, Version)>, DiskError>,
    ) {
        let Some(job) = self.listings.iter().find(|(_, l)| l.scan == Some(scan)).map(|(job, _)| *job) else { return };
        let listing = self.listings.get_mut(&job).expect("just found");
        let Ok(elements) = elements else { return }; // The disk's failure is told apart; the slot waits.
        listing.scan = None;
        if elements.len() >= LIST_ELEMENTS_MAX {
            listing.next = elements.last().map(|(key, _)| *key);
        }
        let id = self.slots[listing.slot].id;
        let above = listing.above;
        let of_slot = |key: &ElementKey| ctx.state.slot_of(key.family, key.element) == Some(id);
        listing.keys = elements.iter().filter(|(k, v)| *v > above && of_slot(k)).map(|(k, _)| *k).collect();
        self.advance_listing(ctx, job);
    }

    pub(crate) fn advance_listing(&mut self, ctx: &mut Context, job: u64) {
        let Some(listing) = self.listings.get_mut(&job) else { return };
        if listing.scan.is_some() {
            return;
        }
        if let Purpose::Joiner { server, attempt } = listing.purpose {
            let listing = self.listings.remove(&job).expect("just found");
            return self.on_joiner_mine(ctx, listing.slot, (server, attempt), listing.keys.into(), listing.next);
        }
        while let Some(&key) = listing.keys.front() {
            match ctx.stores.load(key) {
                Loaded::Ready => {
                    listing.keys.pop_front();
                    let image = seen_image(ctx, key);
                    if image.version > listing.above || matches!(listing.purpose, Purpose::Compare { .. }) {
                        listing.rows += image.rows.len();
                        listing.images.push((key, image));
                    }
                    if listing.rows > LIST_ROWS_MAX && !listing.keys.is_empty() {
                        if let Purpose::Compare { to, attempt } = listing.purpose {
                            // What is told by then; the rest in another answer.
                            let (slot, term) = (self.slots[listing.slot].id, listing.term);
                            let elements = std::mem::take(&mut listing.images);
                            listing.rows = 0;
                            ctx.send(Peer::Server(to), Body::Compared(Compared { slot, term, elements, attempt }));
                        } else {
                            listing.keys.clear();
                            listing.next = Some(key);
                        }
                    }
                }
                Loaded::Pending => return self.wait_for_load(key, LoadWaiter::Listing(job)),
                Loaded::Failed => return,
            }
        }
        let listing = self.listings.remove(&job).expect("just found");
        let slot = self.slots[listing.slot].id;
        let (term, elements, next) = (listing.term, listing.images, listing.next);
        match listing.purpose {
            Purpose::Answer { to, attempt } => {
                ctx.send(Peer::Server(to), Body::Listed(Listed { slot, term, elements, next, attempt }));
            }
            Purpose::Compare { to, attempt } => {
                ctx.send(Peer::Server(to), Body::Compared(Compared { slot, term, elements, attempt }));
            }
            Purpose::Own => self.on_list_part(ctx, listing.slot, self.me, elements, next),
            Purpose::Joiner { .. } => unreachable!("told above"),
        }
    }

    /// The primary asks for what is newer than a version.
    pub fn on_list(&mut self, ctx: &mut Context, from: ServerId, m: List) {
        let Some(&index) = self.by_id.get(&m.slot) else { return };
        let slot = &self.slots[index];
        if slot.promised == m.term && slot.term == m.term && slot.primary == Some(from) {
            self.begin_listing(ctx, index, m.above, m.after, Purpose::Answer { to: from, attempt: m.attempt });
        }
    }

    /// A list has come.
    pub fn on_listed(&mut self, ctx: &mut Context, from: ServerId, m: Listed) {
        self.silence.heard(from);
        let Some(&index) = self.by_id.get(&m.slot) else { return };
        let slot = &self.slots[index];
        if slot.term != m.term {
            return;
        }
        if slot.acting.as_ref().is_some_and(|a| a.joiners.contains_key(&from)) {
            self.on_joiner_listed(ctx, index, (from, m.attempt), m.elements, m.next);
        } else {
            self.on_list_part(ctx, index, from, m.elements, m.next);
        }
    }

    fn on_list_part(
        &mut self,
        ctx: &mut Context,
        index: SlotIndex,
        from: ServerId,
        elements: Vec<(ElementKey, ElementImage)>,
        next: Option<ElementKey>,
    ) {
        let slot = &mut self.slots[index];
        let (id, term, in_sync) = (slot.id, slot.term, slot.in_sync.clone());
        let Some(acting) = slot.acting.as_mut() else { return };
        let Phase::Listing { lowest, lists, done } = &mut acting.phase else { return };
        if !in_sync.contains(&from) || done.contains(&from) {
            return;
        }
        lists.entry(from).or_default().extend(elements);
        let above = *lowest;
        match next {
            Some(after) if from == self.me => self.begin_listing(ctx, index, above, Some(after), Purpose::Own),
            Some(after) => {
                let list = List { slot: id, term, above, after: Some(after), attempt: 0 };
                ctx.send(Peer::Server(from), Body::List(list));
            }
            None => {
                done.insert(from);
                if in_sync.iter().all(|s| done.contains(s)) {
                    self.begin_settling(ctx, index);
                }
            }
        }
    }

    // --------------------------------------------------------------------------------------------
    // Settling (I7).

    fn begin_settling(&mut self, ctx: &mut Context, index: SlotIndex) {
        let slot = &mut self.slots[index];
        let acting = slot.acting.as_mut().expect("only an acting primary settles");
        let settling = Phase::Settling { todo: VecDeque::new(), active: BTreeMap::new() };
        let Phase::Listing { mut lists, .. } = std::mem::replace(&mut acting.phase, settling) else {
            unreachable!("settling follows listing")
        };
        // Who is behind has told rows that nobody can see any more.
        for (key, image) in lists.values_mut().flatten() {
            keep_seen(ctx.state, key.family, image);
        }
        let Phase::Settling { todo, .. } = &mut acting.phase else { unreachable!("just set") };
        *todo = differences(&lists, &slot.in_sync, self.me, self.sabotage);
        // Replicas that know already that a family ended have dropped its elements: nothing to make equal.
        todo.retain(|d| !family_ended(ctx.state, d.element.family));
        self.counters.settled_elements += todo.len() as u64;
        self.settle_more(ctx, index);
        self.settlement_may_be_done(ctx, index);
    }

    pub(crate) fn settle_more(&mut self, ctx: &mut Context, index: SlotIndex) {
        let mut begun = Vec::new();
        let slot = &mut self.slots[index];
        let (id, term) = (slot.id, slot.term);
        let Some(acting) = slot.acting.as_mut() else { return };
        let Phase::Settling { todo, active } = &mut acting.phase else { return };
        // What is on its way is bounded: a peer that reads slowly must not get it all at once.
        let has_room = acting.streams.values().all(|s| s.cost() < SETTLING_BLOCKS_MAX);
        while active.len() < SETTLING_MAX && has_room {
            let Some(difference) = todo.pop_front() else { break };
            let element = difference.element;
            let mine = difference.others.get(&self.me);
            let step = match mine {
                None => Step::ToRead,
                Some(mine) => {
                    let blocks = lacking(&difference.image, mine.as_ref());
                    if blocks.is_empty() {
                        Step::Fetched { data: Vec::new() }
                    } else {
                        let step = Step::Fetching { blocks, data: Vec::new() };
                        let places = difference.image.places(step.wanted());
                        let fetch = Fetch { slot: id, term, element, places };
                        ctx.send(Peer::Server(difference.winner), Body::Fetch(fetch));
                        step
                    }
                }
            };
            active.insert(element, Settling { difference, step });
            begun.push(element);
        }
        for element in begun {
            self.advance_settling(ctx, index, element);
        }
    }

    /// Takes an element's next step, if it waits for nothing but this server's memory.
    pub(crate) fn advance_settling(&mut self, ctx: &mut Context, index: SlotIndex, element: ElementKey) {
        let slot = &mut self.slots[index];
        let term = slot.term;
        let Some(Phase::Settling { active, .. }) = slot.acting.as_mut().map(|a| &mut a.phase) else { return };
        let Some(settling) = active.get_mut(&element) else { return };
        if !matches!(settling.step, Step::Fetched { .. } | Step::ToRead) {
            return;
        }
        match ctx.stores.load(element) {
            Loaded::Ready => {}
            Loaded::Pending => return self.wait_for_load(element, LoadWaiter::Settling(index, element)),
            Loaded::Failed => return,
        }
        match std::mem::replace(&mut settling.step, Step::Replacing) {
            Step::Fetched { data } => {
                if !ctx.stores.is_ready_for(data.len() as u64) {
                    settling.step = Step::Fetched { data };
                    self.blocked_settling.insert((index, element));
                    return;
                }
                let mut image = settling.difference.image.clone();
                if self.sabotage == Sabotage::IdsNotCopied {
                    image.ids = ctx.stores.ids(element).to_vec();
                }
                let (slot_id, watermark, twins) = (slot.id, slot.watermark, Vec::new());
                let change = Change::Replace { element, slot: slot_id, image, data, twins, again: false, watermark };
                // Space was reserved by the write that made the difference; the reserve pays otherwise.
                let ticket = match ctx.stores.stage(change) {
                    Ok(ticket) => ticket,
                    Err(error) => {
                        let why =
                            format!("element {element:?} cannot be settled: {error:?}; check this server's disks");
                        return ctx.out.push_back(Output::Fatal(why));
                    }
                };
                slot.outstanding += 1;
                self.tickets.insert(ticket, TicketOwner::Settling { slot: index, term, element });
            }
            Step::ToRead => {
                let image = &settling.difference.image;
                let mut parts = BTreeMap::new();
                for (server, other) in settling.difference.others.iter().filter(|(s, _)| **s != self.me) {
                    let blocks = lacking(image, other.as_ref());
                    parts.insert(*server, ctx.stores.twins(element, image, &blocks));
                }
                let blocks: BTreeSet<(u16, u8)> = parts.values().flat_map(|(sent, _)| sent.iter().copied()).collect();
                let blocks: Vec<(u16, u8)> = blocks.into_iter().collect();
                let read = ctx.stores.read_places(element, &image.places(&blocks));
                settling.step = Step::Reading { blocks, parts };
                self.reads.insert(read, ReadOwner::Settling { slot: index, term, element });
            }
            _ => unreachable!("checked above"),
        }
    }

    /// Blocks that this server lacked have come.
    pub fn on_fetched(&mut self, ctx: &mut Context, from: ServerId, m: Fetched) {
        self.silence.heard(from);
        if self.on_repair_fetched(ctx, from, &m) {
            return;
        }
        let Some(&index) = self.by_id.get(&m.slot) else { return };
        let slot = &mut self.slots[index];
        if slot.term != m.term {
            return;
        }
        let Some(Phase::Settling { active, .. }) = slot.acting.as_mut().map(|a| &mut a.phase) else { return };
        let Some(settling) = active.get_mut(&m.element) else { return };
        let wanted = settling.step.wanted().to_vec();
        if wanted.is_empty() {
            return;
        }
        let bytes = m.data.to_bytes();
        let image = &settling.difference.image;
        let good = m.result.is_ok()
            && bytes.len() == wanted.len() * BLOCK_SIZE as usize
            && wanted.iter().zip(bytes.chunks(BLOCK_SIZE as usize)).all(|((row, block), bytes)| {
                image.rows[usize::from(*row)].sums[usize::from(*block)] == BlockSum::Crc(stdx::checksum::crc32c(bytes))
            });
        if !good {
            // The winner's copy cannot be read. The slot is not served, rather than wrong, until the winner has
            // repaired it.
            return self.retry_in_a_while(ctx.now, Retry::Settling(index, m.element));
        }
        let pieces = wanted.iter().enumerate().map(|(i, (row, block))| {
            (*row, *block, bytes.slice(i * BLOCK_SIZE as usize..(i + 1) * BLOCK_SIZE as usize))
        });
        let Step::Fetching { blocks, data } = &mut settling.step else { unreachable!("something was wanted") };
        data.extend(pieces);
        if data.len() < blocks.len() {
            let places = image.places(settling.step.wanted());
            let (slot, term, element) = (m.slot, m.term, m.element);
            return ctx.send(Peer::Server(from), Body::Fetch(Fetch { slot, term, element, places }));
        }
        settling.step = Step::Fetched { data: std::mem::take(data) };
        self.advance_settling(ctx, index, m.element);
    }

    pub(crate) fn on_settling_stable(&mut self, ctx: &mut Context, index: SlotIndex, element: ElementKey) {
        let acting = self.slots[index].acting.as_mut();
        let Some(Phase::Settling { active, .. }) = acting.map(|a| &mut a.phase) else { return };
        let Some(settling) = active.get_mut(&element) else { return };
        settling.step = Step::ToRead;
        self.advance_settling(ctx, index, element);
    }

    pub(crate) fn on_settling_read(
        &mut self,
        ctx: &mut Context,
        index: SlotIndex,
        element: ElementKey,
        result: Result<ReadBlocks, ReadError>,
    ) {
        let slot = &mut self.slots[index];
        let Some(acting) = slot.acting.as_mut() else { return };
        let Phase::Settling { active, .. } = &mut acting.phase else { return };
        let Some(settling) = active.get(&element) else { return };
        let Step::Reading { blocks, parts } = &settling.step else { return };
        let Ok(read) = result else {
            // As above: not served, rather than wrong.
            self.begin_repair(ctx, index, element);
            return self.retry_in_a_while(ctx.now, Retry::Settling(index, element));
        };
        let bytes = read.data.iter().flat_map(|piece| {
            (0..piece.len() / BLOCK_SIZE as usize)
                .map(|i| piece.slice(i * BLOCK_SIZE as usize..(i + 1) * BLOCK_SIZE as usize))
        });
        let data: BTreeMap<(u16, u8), Bytes> = blocks.iter().copied().zip(bytes).collect();
        let parts = parts.clone();
        let settling = active.remove(&element).expect("just found");
        let image = settling.difference.image;
        let finished = finished_below(&self.session_low, &image);
        for (server, (sent, twins)) in parts {
            let outgoing = acting.streams.get_mut(&server).expect("a stream to every other in-sync member");
            let last = sent.len().saturating_sub(1) / COPY_BLOCKS_MAX * COPY_BLOCKS_MAX;
            let (ahead, blocks) = sent.split_at(last);
            let payload_of =
                |blocks: &[(u16, u8)]| Payload(blocks.iter().filter_map(|b| data.get(b).cloned()).collect());
            let mut messages: Vec<(Part, Payload)> =
                ahead.chunks(COPY_BLOCKS_MAX).map(|c| (ahead_part(element, &image, c), payload_of(c))).collect();
            let (payload, blocks, finished_below) = (payload_of(blocks), blocks.to_vec(), finished.clone());
            let part = Part::Copy { element, image: image.clone(), blocks, twins, settles: true, finished_below };
            messages.push((part, payload));
            for (part, payload) in messages {
                self.windows.entry(server).or_default().in_flight += payload.len() as u64 / BLOCK_SIZE;
                let m = outgoing.push(slot.id, slot.term, slot.watermark, part, payload, None);
                if self.connected.contains(&server) {
                    ctx.send(Peer::Server(server), Body::Replicate(m));
                }
            }
        }
        self.settle_more(ctx, index);
        self.settlement_may_be_done(ctx, index);
    }

    /// A block that could not be read has perhaps been repaired.
    pub(crate) fn settle_again(&mut self, ctx: &mut Context, index: SlotIndex, element: ElementKey) {
        let slot = &mut self.slots[index];
        let (id, term) = (slot.id, slot.term);
        let Some(Phase::Settling { active, .. }) = slot.acting.as_mut().map(|a| &mut a.phase) else { return };
        let Some(settling) = active.get_mut(&element) else { return };
        match &settling.step {
            Step::Fetching { .. } => {
                let (winner, places) =
                    (settling.difference.winner, settling.difference.image.places(settling.step.wanted()));
                ctx.send(Peer::Server(winner), Body::Fetch(Fetch { slot: id, term, element, places }));
            }
            Step::Reading { .. } => {
                settling.step = Step::ToRead;
                self.advance_settling(ctx, index, element);
            }
            _ => {}
        }
    }

    /// The settlement is finished when everything is equal and stable everywhere.
    pub(crate) fn settlement_may_be_done(&mut self, ctx: &mut Context, index: SlotIndex) {
        let slot = &mut self.slots[index];
        let Some(acting) = slot.acting.as_mut() else { return };
        let Phase::Settling { todo, active } = &acting.phase else { return };
        let equal = todo.is_empty() && active.is_empty() && acting.streams.values().all(Outgoing::is_empty);
        if !equal || slot.outstanding > 0 {
            return;
        }
        let until = (!acting.leavers.is_empty()).then_some(acting.leavers_until);
        if let Some(at) = acting.not_before.max(until).filter(|at| *at > ctx.now) {
            self.wake_at = Some(self.wake_at.map_or(at, |other| other.min(at)));
            return;
        }
        acting.phase = Phase::Serving;
        slot.settled_at = ctx.state.index;
        slot.watermark = slot.watermark.max(Version { term: slot.term, sequence: 0 });
        self.counters.settlements += 1;
        for (server, outgoing) in &mut acting.streams {
            let (part, payload) = (Part::SettlementDone, Payload::default());
            let m = outgoing.push(slot.id, slot.term, slot.watermark, part, payload, None);
            if self.connected.contains(server) {
                ctx.send(Peer::Server(*server), Body::Replicate(m));
            }
        }
        let change = Change::Watermark { slot: slot.id, watermark: slot.watermark };
        if let Ok(ticket) = ctx.stores.stage(change) {
            slot.outstanding += 1;
            self.tickets.insert(ticket, TicketOwner::Background { slot: index });
        }
        self.joins_due = true;
        self.on_slot_settled_or_not(ctx, index);
        self.unpark_operations(ctx, index);
    }

    /// The time has come that some settlement waited for.
    pub(crate) fn serve_what_waited(&mut self, ctx: &mut Context) {
        if self.wake_at.is_none_or(|at| at > ctx.now) {
            return;
        }
        self.wake_at = None;
        for index in 0..self.slots.len() {
            self.settlement_may_be_done(ctx, index);
        }
    }

    /// Some family ended: its elements need not be made equal any more, and replicas that have dropped
    /// them cannot tell them.
    pub fn on_families_ended(&mut self, ctx: &mut Context) {
        for index in 0..self.slots.len() {
            let acting = self.slots[index].acting.as_mut();
            let Some(Phase::Settling { todo, active }) = acting.map(|a| &mut a.phase) else { continue };
            todo.retain(|d| !family_ended(ctx.state, d.element.family));
            active.retain(|element, _| !family_ended(ctx.state, element.family));
            self.settle_more(ctx, index);
            self.settlement_may_be_done(ctx, index);
        }
    }

    /// A connection is back: what was asked over the old one is asked again.
    pub(crate) fn ask_again(&mut self, ctx: &mut Context, index: SlotIndex, server: ServerId) {
        let slot = &mut self.slots[index];
        let (id, term) = (slot.id, slot.term);
        let Some(acting) = slot.acting.as_mut().filter(|a| a.receivers.contains(&server)) else { return };
        match &acting.phase {
            Phase::Listing { lowest, lists, done } if !done.contains(&server) => {
                let after = lists.get(&server).and_then(|l| l.last_key_value()).map(|(k, _)| *k);
                ctx.send(Peer::Server(server), Body::List(List { slot: id, term, above: *lowest, after, attempt: 0 }));
            }
            Phase::Settling { active, .. } => {
                for settling in active.values().filter(|s| s.difference.winner == server) {
                    if let Step::Fetching { .. } = &settling.step {
                        let (element, image) = (settling.difference.element, &settling.difference.image);
                        let places = image.places(settling.step.wanted());
                        ctx.send(Peer::Server(server), Body::Fetch(Fetch { slot: id, term, element, places }));
                    }
                }
            }
            _ => {}
        }
    }
}

fn is_suspected(state: &State, server: ServerId) -> bool {
    state.servers.get(&server).is_some_and(|s| s.suspect.is_some())
}

/// The elements in which the members differ, and what each must be.
fn differences(lists: &Lists, in_sync: &[ServerId], me: ServerId, sabotage: Sabotage) -> VecDeque<Difference> {
    if sabotage == Sabotage::NoSettlement {
        return VecDeque::new();
    }
    let elements: BTreeSet<ElementKey> = lists.values().flat_map(|l| l.keys().copied()).collect();
    let mut found = VecDeque::new();
    for element in elements {
        let image_at = |s: &ServerId| lists.get(s).and_then(|l| l.get(&element));
        // Ties go to the new primary: any choice is right, this one copies least.
        let winner = in_sync
            .iter()
            .copied()
            .filter(|s| image_at(s).is_some())
            .max_by_key(|s| (image_at(s).map(|i| i.version), *s == me))
            .expect("somebody listed it");
        let image = image_at(&winner).expect("the winner listed it").clone();
        let differs = |other: Option<&ElementImage>| match (other, sabotage) {
            (Some(other), Sabotage::SettleByVersion) => other.version != image.version,
            (Some(other), _) => *other != image,
            (None, _) => true,
        };
        let others: BTreeMap<ServerId, Option<ElementImage>> = in_sync
            .iter()
            .filter(|s| **s != winner && differs(image_at(s)))
            .map(|s| (*s, image_at(s).cloned()))
            .collect();
        if !others.is_empty() {
            found.push_back(Difference { element, image, winner, others });
        }
    }
    found
}

/// The blocks of `image`, as `(row, block)`, that a replica with `present` does not have.
pub(crate) fn lacking(image: &ElementImage, present: Option<&ElementImage>) -> Vec<(u16, u8)> {
    let mut blocks = Vec::new();
    for (r, row) in image.rows.iter().enumerate() {
        let same = present.and_then(|p| p.row(row.lineage, row.epoch));
        for (b, sum) in row.sums.iter().enumerate() {
            if *sum != BlockSum::Zero && same.is_none_or(|s| s.sums[b] != *sum) {
                blocks.push((r as u16, b as u8));
            }
        }
    }
    blocks
}

/// Blocks of an image that travel ahead of its copy.
pub(crate) fn ahead_part(element: ElementKey, image: &ElementImage, blocks: &[(u16, u8)]) -> Part {
    let mut rows: Vec<RowImage> = Vec::new();
    let mut places = Vec::with_capacity(blocks.len());
    for (row, block) in blocks {
        let of = &image.rows[usize::from(*row)];
        if rows.last().is_none_or(|r| (r.lineage, r.epoch) != (of.lineage, of.epoch)) {
            let sums = [BlockSum::Zero; BLOCKS_PER_ELEMENT];
            rows.push(RowImage { lineage: of.lineage, epoch: of.epoch, sums });
        }
        let last = rows.len() - 1;
        rows[last].sums[usize::from(*block)] = of.sums[usize::from(*block)];
        places.push((last as u16, *block));
    }
    Part::Ahead { element, rows, blocks: places }
}

/// Of each session with an id in the image: the number below which its requests are finished (I6).
pub(crate) fn finished_below(lows: &FastMap<SessionId, u64>, image: &ElementImage) -> Vec<(SessionId, u64)> {
    let sessions: BTreeSet<SessionId> = image.ids.iter().map(|id| id.session).collect();
    sessions.into_iter().filter_map(|s| Some((s, *lows.get(&s)?))).collect()
}
