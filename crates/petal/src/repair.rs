//! Repair (P7): a block that cannot be read here, or is not what its checksum says, is made good from a copy.
//!
//! ```text
//!  noticed -> Looking -> Checking -> Asking -> Fetched -> Writing -> repaired
//!               ^           |          |  ^                   |
//!               |    all blocks are    |  `-- the next block, or the next member for the same one: no answer,
//!               |    good: nothing to  |      or its copy is bad, too
//!               |    do                v                      v
//!               `---- a while ----- Resting: every other member was asked for some block in vain
//! ```
//!
//! Whoever reads a bad block repairs its own copy: a client's read at any replica, the reading half of an unaligned
//! write, a settlement, a fetch, a copy for a member that comes back, the scrub. Every block of the element is then read by
//! itself, and what is bad is asked of the other members of the slot, in sync or not, block by block, because two
//! copies of an element may each have a bad block: only bytes with the checksum that this replica's own entry has are
//! taken. So a repair changes no version, no entry and nothing that another
//! replica could see; it needs no place in the stream, and may run beside writes of the element. It only writes the
//! same bytes to another place.
//!
//! How it fails: with no good copy within reach the block stays bad, and is answered as such (`BadCopy`); what must
//! have it (settlement, recovery) asks again, and so begins the repair again. A write that was staged and is not
//! durable yet may look bad: then the same bytes are written twice.
//!
//! Memory is bounded by `REPAIRS_MAX`; what is noticed beyond that is noticed again at the next read.

use crate::data_access::{Context, DataAccess, LoadWaiter, OpNumber, ReadOwner, SlotIndex, TicketOwner, family_ended};
use crate::ids::*;
use crate::message::*;
use crate::server::Peer;
use crate::store::{BlockSum, Change, Loaded, Place, ReadBlocks, ReadError, ReadId};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use stdx::checksum::crc32c;
use stdx::{Duration, Instant};

/// Elements that are repaired at one time, and as many again for writes that wait for it: 16 blocks of each are in
/// memory at most, 32 MiB.
const REPAIRS_MAX: usize = 256;
/// Blocks of an element written at one time: half of the smallest reserve of a store.
const AT_ONCE_MAX: usize = 32;
/// A member that has not answered for so long is passed over.
const ANSWER_MAX: Duration = Duration::from_millis(300);
/// Time before all of them are asked once more.
const REST: Duration = Duration::from_millis(500);
/// How often they are.
const ROUNDS_MAX: u32 = 20;
/// What could not be read is tried again after so long by settlement and recovery.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// A block of an image, and what it must be.
type Wanted = (Place, u32);

/// An element that is being repaired.
pub(crate) struct Repair {
    slot: SlotIndex,
    stage: Stage,
    /// Bad blocks in the order in which they are asked for; the first one at present.
    bad: VecDeque<Wanted>,
    /// Members that have not been asked for it in this round.
    sources: VecDeque<ServerId>,
    /// What has come.
    data: Vec<(Wanted, Bytes)>,
    /// Some block was asked for in vain in this round.
    is_missing: bool,
    rounds: u32,
    /// Unaligned writes that need it.
    waiters: Vec<OpNumber>,
    /// Blocks that were bad when it began, and of these, those that are good again.
    progress: (u64, u64),
}

enum Stage {
    /// The entry is to be in memory.
    Looking,
    /// Each block is read by itself.
    Checking { reads: BTreeMap<ReadId, Wanted> },
    /// A member was asked for the first of the bad ones.
    Asking { of: ServerId, until: Instant },
    /// What was to be had has come, and there is no room for it at the moment, or the entry is not in memory.
    Fetched { again_at: Instant },
    /// It is being made durable.
    Writing { blocks: u64 },
    /// Nobody has some of them at the moment.
    Resting { until: Instant },
}

/// Something else that could not go on for a bad block, and tries again in a while.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Retry {
    /// An element's settlement.
    Settling(SlotIndex, ElementKey),
    /// An element's copy for a member that is brought back.
    Copy(SlotIndex, ServerId, ElementKey),
}

/// All repairs of a server.
#[derive(Default)]
pub(crate) struct Repairs {
    elements: BTreeMap<ElementKey, Repair>,
    retries: BTreeSet<Retry>,
    retry_at: Option<Instant>,
}

impl Repairs {
    /// When something is due.
    pub fn next_timeout(&self) -> Option<Instant> {
        let due = |r: &Repair| match r.stage {
            Stage::Asking { until, .. } | Stage::Resting { until } | Stage::Fetched { again_at: until } => Some(until),
            _ => None,
        };
        self.elements.values().filter_map(due).chain(self.retry_at).min()
    }

    /// Blocks that are being written.
    fn writing(&self) -> u64 {
        let blocks = |r: &Repair| if let Stage::Writing { blocks } = r.stage { blocks } else { 0 };
        self.elements.values().map(blocks).sum()
    }

    /// Elements that are not repaired yet.
    pub fn len(&self) -> usize {
        self.elements.len()
    }

    /// Blocks of an element that were found bad, and of these, those that are good again.
    pub fn progress(&self, element: ElementKey) -> (u64, u64) {
        self.elements.get(&element).map_or((0, 0), |repair| repair.progress)
    }
}

impl DataAccess {
    /// A block of the element could not be read here.
    pub(crate) fn begin_repair(&mut self, ctx: &mut Context, slot: SlotIndex, element: ElementKey) {
        self.begin_repair_of(ctx, slot, element, REPAIRS_MAX);
    }

    fn begin_repair_of(&mut self, ctx: &mut Context, slot: SlotIndex, element: ElementKey, most: usize) {
        self.counters.bad_blocks += 1;
        if ctx.state.slot_of(element.family, element.element) != Some(self.slots[slot].id) {
            return; // Its family has other slots since: whoever meets it there repairs it.
        }
        if self.repairs.elements.contains_key(&element) || self.repairs.elements.len() >= most {
            return;
        }
        let repair = Repair {
            slot,
            stage: Stage::Looking,
            bad: VecDeque::new(),
            sources: VecDeque::new(),
            data: Vec::new(),
            is_missing: false,
            rounds: 0,
            waiters: Vec::new(),
            progress: (0, 0),
        };
        self.repairs.elements.insert(element, repair);
        self.look(ctx, element);
    }

    /// The same for a write that cannot go on without it. False if it is not being repaired.
    pub(crate) fn repair_for(
        &mut self,
        ctx: &mut Context,
        slot: SlotIndex,
        element: ElementKey,
        number: OpNumber,
    ) -> bool {
        // Reads leave some room: they have another copy to go to.
        self.begin_repair_of(ctx, slot, element, 2 * REPAIRS_MAX);
        match self.repairs.elements.get_mut(&element) {
            Some(repair) => repair.waiters.push(number),
            None => return false,
        }
        true
    }

    /// The same for the scrub, which is told what becomes of it. False if too many others are being repaired.
    pub(crate) fn repair_for_scrub(&mut self, ctx: &mut Context, slot: SlotIndex, element: ElementKey) -> bool {
        let is_room = self.repairs.elements.contains_key(&element) || self.repairs.elements.len() < REPAIRS_MAX;
        if is_room {
            self.begin_repair(ctx, slot, element);
        }
        is_room
    }

    /// Something waits for a block to be repaired, here or at another replica.
    pub(crate) fn retry_in_a_while(&mut self, now: Instant, retry: Retry) {
        self.repairs.retries.insert(retry);
        self.repairs.retry_at.get_or_insert(now + RETRY_AFTER);
    }

    /// What is due.
    pub(crate) fn advance_repairs(&mut self, ctx: &mut Context) {
        if self.repairs.retry_at.is_some_and(|at| at <= ctx.now) {
            self.repairs.retry_at = None;
            for retry in std::mem::take(&mut self.repairs.retries) {
                match retry {
                    Retry::Settling(index, element) => self.settle_again(ctx, index, element),
                    Retry::Copy(index, to, element) => self.copy_again(ctx, index, to, element),
                }
            }
        }
        let is_due = |r: &Repair| match r.stage {
            Stage::Asking { until, .. } | Stage::Resting { until } | Stage::Fetched { again_at: until } => {
                until <= ctx.now
            }
            _ => false,
        };
        let due: Vec<ElementKey> =
            self.repairs.elements.iter().filter(|(_, r)| is_due(r)).map(|(element, _)| *element).collect();
        for element in due {
            match &self.repairs.elements[&element].stage {
                Stage::Asking { .. } => self.ask_next(ctx, element),
                Stage::Fetched { .. } => self.write_repaired(ctx, element),
                _ => self.look(ctx, element),
            }
        }
    }

    /// Looking -> Checking: what is bad, and what must it be?
    pub(crate) fn look(&mut self, ctx: &mut Context, element: ElementKey) {
        let Some(repair) = self.repairs.elements.get_mut(&element) else { return };
        if let Stage::Fetched { .. } = repair.stage {
            return self.write_repaired(ctx, element);
        }
        if !matches!(repair.stage, Stage::Looking | Stage::Resting { .. }) {
            return;
        }
        repair.stage = Stage::Looking;
        match ctx.stores.load(element) {
            Loaded::Ready => {}
            Loaded::Pending => return self.wait_for_load(element, LoadWaiter::Repair),
            Loaded::Failed => return self.end_repair(ctx, element, false),
        }
        let image = ctx.stores.image(element);
        if image.version == Version::ZERO || family_ended(ctx.state, element.family) {
            return self.end_repair(ctx, element, true);
        }
        let mut reads = BTreeMap::new();
        for place in ctx.stores.stored(element) {
            let Some(BlockSum::Crc(crc)) = image.sum(place) else { continue };
            let read = ctx.stores.read_places(element, &[place]);
            self.reads.insert(read, ReadOwner::Repair(element));
            reads.insert(read, (place, crc));
        }
        let is_empty = reads.is_empty();
        let repair = self.repairs.elements.get_mut(&element).expect("just seen");
        repair.stage = Stage::Checking { reads };
        if is_empty {
            self.end_repair(ctx, element, true);
        }
    }

    /// Checking -> Asking, or nothing is bad any more.
    pub(crate) fn on_repair_read(
        &mut self,
        ctx: &mut Context,
        element: ElementKey,
        read: ReadId,
        result: Result<ReadBlocks, ReadError>,
    ) {
        let Some(repair) = self.repairs.elements.get_mut(&element) else { return };
        let Stage::Checking { reads } = &mut repair.stage else { return };
        let Some(wanted) = reads.remove(&read) else { return };
        let is_last = reads.is_empty();
        if result.is_err() {
            repair.bad.push_back(wanted);
        }
        if !is_last {
            return;
        }
        if repair.bad.is_empty() {
            return self.end_repair(ctx, element, true);
        }
        repair.bad.make_contiguous().sort_unstable();
        repair.progress.0 = repair.progress.0.max(repair.progress.1 + repair.bad.len() as u64);
        self.ask_all(ctx, element);
    }

    /// Asks everyone for the first of the bad blocks.
    fn ask_all(&mut self, ctx: &mut Context, element: ElementKey) {
        let sources = self.sources(ctx, element);
        if let Some(repair) = self.repairs.elements.get_mut(&element) {
            repair.sources = sources;
        }
        self.ask_next(ctx, element);
    }

    /// The other members of an element's slot, who is in sync first: it is likely to have what is wanted.
    fn sources(&self, ctx: &Context, element: ElementKey) -> VecDeque<ServerId> {
        let slot = self.slots[self.repairs.elements[&element].slot].id;
        let members = ctx.state.slot(slot).map(|s| &s.tuple[..]).unwrap_or_default();
        let mut others: Vec<_> = members.iter().filter(|m| m.server != self.me).collect();
        others.sort_by_key(|m| !m.in_sync);
        others.into_iter().map(|m| m.server).collect()
    }

    /// Asks the next member for the first of the bad blocks; the next block, if it was asked of everyone.
    fn ask_next(&mut self, ctx: &mut Context, element: ElementKey) {
        let sources = self.sources(ctx, element);
        let Some(repair) = self.repairs.elements.get_mut(&element) else { return };
        let slot = &self.slots[repair.slot];
        while let Some((place, _)) = repair.bad.front().copied() {
            while let Some(of) = repair.sources.pop_front() {
                if self.connected.contains(&of) {
                    let fetch = Fetch { slot: slot.id, term: slot.term, element, places: vec![place] };
                    repair.stage = Stage::Asking { of, until: ctx.now + ANSWER_MAX };
                    return ctx.send(Peer::Server(of), Body::Fetch(fetch));
                }
            }
            repair.bad.pop_front();
            repair.sources.clone_from(&sources);
            repair.is_missing = true;
        }
        if repair.data.is_empty() {
            return self.end_round(ctx, element);
        }
        repair.stage = Stage::Fetched { again_at: ctx.now };
        self.write_repaired(ctx, element);
    }

    /// Everything was asked for once: that was all, or in a while once more.
    fn end_round(&mut self, ctx: &mut Context, element: ElementKey) {
        let Some(repair) = self.repairs.elements.get_mut(&element) else { return };
        if !std::mem::take(&mut repair.is_missing) {
            return self.end_repair(ctx, element, true);
        }
        repair.rounds += 1;
        if repair.rounds >= ROUNDS_MAX {
            return self.end_repair(ctx, element, false);
        }
        repair.stage = Stage::Resting { until: ctx.now + REST };
        let waiters = std::mem::take(&mut repair.waiters);
        self.tell_waiters(ctx, waiters, false);
    }

    /// A member has answered; true if the answer was for a repair.
    pub(crate) fn on_repair_fetched(&mut self, ctx: &mut Context, from: ServerId, m: &Fetched) -> bool {
        let Some(repair) = self.repairs.elements.get_mut(&m.element) else { return false };
        let (Stage::Asking { of, .. }, Some(wanted)) = (&repair.stage, repair.bad.front().copied()) else {
            return false;
        };
        if *of != from {
            return false;
        }
        let data = m.data.to_bytes();
        let is_good = m.result.is_ok() && data.len() == BLOCK_SIZE as usize && crc32c(&data) == wanted.1;
        if is_good {
            repair.data.push((wanted, data));
            repair.bad.pop_front();
            self.ask_all(ctx, m.element);
        } else {
            // It may have something else there, or a bad copy, too; or this is the answer to a settlement.
            self.ask_next(ctx, m.element);
        }
        is_good
    }

    /// Fetched -> Writing: what is still wanted is written to another place.
    fn write_repaired(&mut self, ctx: &mut Context, element: ElementKey) {
        let Some(repair) = self.repairs.elements.get_mut(&element) else { return };
        let Stage::Fetched { again_at } = &mut repair.stage else { return };
        *again_at = ctx.now + RETRY_AFTER;
        match ctx.stores.load(element) {
            Loaded::Ready => {}
            Loaded::Pending => return self.wait_for_load(element, LoadWaiter::Repair),
            Loaded::Failed => return self.end_repair(ctx, element, false),
        }
        let image = ctx.stores.image(element);
        let is_wanted = |(place, crc): &Wanted| image.sum(*place) == Some(BlockSum::Crc(*crc));
        let found = repair.data.len();
        repair.data.retain(|(wanted, _)| is_wanted(wanted));
        // Written over meanwhile; or its row was dropped, and another one shares the bad block: look again.
        repair.is_missing |= repair.data.len() < found;
        if family_ended(ctx.state, element.family) || !self.slots[repair.slot].is_member {
            return self.end_repair(ctx, element, true);
        }
        if repair.data.is_empty() {
            return self.end_round(ctx, element);
        }
        // The rest in another round.
        repair.is_missing |= repair.data.len() > AT_ONCE_MAX;
        repair.data.truncate(AT_ONCE_MAX);
        // What is promised to others stays free for them. But a repair gives back what it takes, so that a little may
        // come out of the store's reserve.
        let blocks = repair.data.len() as u64;
        let has_room = self.unreserved(ctx) >= blocks || self.repairs.writing() == 0;
        if !has_room || !ctx.stores.is_ready_for(blocks) {
            return;
        }
        let repair = self.repairs.elements.get_mut(&element).expect("just seen");
        let slot = &mut self.slots[repair.slot];
        // All rows that share the bad block share the new one.
        let mut data: Vec<(u16, u8, Bytes)> = Vec::new();
        for ((place, _), bytes) in &repair.data {
            for place in ctx.stores.sharing(element, *place) {
                let row = image.rows.binary_search_by_key(&(place.lineage, place.epoch), |r| (r.lineage, r.epoch));
                data.push((row.expect("the image has every row") as u16, place.block, bytes.clone()));
            }
        }
        let (slot_id, watermark, twins) = (slot.id, slot.watermark, Vec::new());
        let change = Change::Replace { element, slot: slot_id, image, data, twins, again: true, watermark };
        let Ok(ticket) = ctx.stores.stage(change) else { return };
        repair.stage = Stage::Writing { blocks };
        slot.outstanding += 1;
        self.tickets.insert(ticket, TicketOwner::Repair { slot: repair.slot, element });
    }

    /// Writing -> repaired.
    pub(crate) fn on_repair_stable(&mut self, ctx: &mut Context, element: ElementKey) {
        let Some(repair) = self.repairs.elements.get_mut(&element) else { return };
        let Stage::Writing { blocks } = repair.stage else { return };
        self.counters.repaired_blocks += blocks;
        repair.progress.1 += blocks;
        repair.data.clear();
        self.end_round(ctx, element);
    }

    /// The family has other slots since: what is still bad is noticed again. Who waits for it has waited for an old slot, and
    /// is told so when that has its new term.
    pub(crate) fn forget_repairs_of(&mut self, now: Instant, family: FamilyId) {
        let of_family = |element: &&ElementKey| element.family == family;
        for element in self.repairs.elements.keys().filter(of_family).copied().collect::<Vec<_>>() {
            let repair = self.repairs.elements.remove(&element).expect("just listed");
            let (found, repaired) = repair.progress;
            self.on_scrub_repaired(now, element, found, repaired);
        }
    }

    fn end_repair(&mut self, ctx: &mut Context, element: ElementKey, is_good: bool) {
        let Some(repair) = self.repairs.elements.remove(&element) else { return };
        let (found, repaired) = repair.progress;
        // What was written over, reclaimed or deleted meanwhile is not bad any more.
        let repaired = if is_good { found } else { repaired };
        self.on_scrub_repaired(ctx.now, element, found, repaired);
        self.tell_waiters(ctx, repair.waiters, is_good);
    }

    fn tell_waiters(&mut self, ctx: &mut Context, waiters: Vec<OpNumber>, is_good: bool) {
        for number in waiters {
            self.on_repaired_for(ctx, number, is_good);
        }
    }
}
