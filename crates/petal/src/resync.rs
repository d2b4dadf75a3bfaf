//! Bringing a member back (2.7): what a replica missed is copied to it while the slot is served.
//!
//! ```text
//!  member is up, not in sync
//!    -> Promising -> Listing -> Copying -> Closing -> Proposing -> InSync (a new term, `promise.rs`)
//!                       |          |          |           |
//!     what is newer than its       |          |       the log decides; until it says otherwise the
//!     watermark, here and there    |          |       member counts for acknowledgements (I4)
//!                 each stale element, whole    everything sent is stable there; from here on every
//!                 and whichever is newer,      write waits for it
//!                 *replaces* the member's
//! ```
//!
//! *Stale* is what is newer than the member's watermark at either end: nothing had to be written down
//! while it was away. An element is copied in its own queue (no write of it is under way) and in the
//! slot's stream (2.6), so that writes before and after the copy keep their order. Elements that are
//! still stale get no writes; all others get every write from then on.
//!
//! Only blocks whose checksums differ travel. A copy that cannot be read leaves its element stale, so
//! the member does not come back with less than all; it is tried again when it may be repaired.
//!
//! What is lost with a connection: until it is proposed a member is begun with anew (what was copied compares as
//! equal then, so nothing travels twice), and writes stop to wait for it at once. A proposed one counts until the log
//! has spoken, so its stream goes on and resends by itself.
//!
//! Rate: while clients are served what their waiting allows, in bursts (`pace.rs`); many at a time when nobody asks for
//! anything. And never more than the receiver's window, so a member without space delays itself and nobody else.

use crate::data_access::{
    Context, DataAccess, LoadWaiter, OpNumber, Outgoing, ReadOwner, SlotIndex, family_ended, graft, keep_seen,
    seen_image,
};
use crate::global_state::Command;
use crate::ids::*;
use crate::message::*;
use crate::promise::{COPY_BLOCKS_MAX, ahead_part, finished_below, lacking};
use crate::repair::Retry;
use crate::sabotage::Sabotage;
use crate::server::Peer;
use crate::store::{BlockSum, ElementImage, Loaded, ReadBlocks, ReadError, RowImage};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use stdx::Instant;

/// Slots that one primary brings one member up to date in, side by side.
const SLOTS_MAX: usize = 8;
/// Elements that are copied side by side while clients are served, and while nobody asks for anything.
const COPIES_BUSY: usize = 4;
const COPIES_IDLE: usize = 32;
/// Elements in one question for images.
const COMPARE_MAX: usize = 64;
/// Blocks of copies on their way in one stream.
const BLOCKS_MAX: u64 = 1024;
/// Slots in one `InSync`.
const PROPOSAL_MAX: usize = 1024;
/// All blocks of an element.
pub(crate) const WHOLE: u16 = u16::MAX;

/// A member of a slot that is not in sync, as its acting primary sees it.
pub(crate) struct Joiner {
    incarnation: Incarnation,
    /// Which attempt this is: answers to earlier ones are of no interest.
    attempt: u64,
    stage: Stage,
    /// The stream to it.
    pub outgoing: Outgoing,
}

enum Stage {
    /// It is asked for its promise of the term.
    Promising,
    /// Both ends list what is newer than its watermark.
    Listing {
        above: Version,
        theirs: BTreeMap<ElementKey, ElementImage>,
        mine: BTreeSet<ElementKey>,
        theirs_done: bool,
        mine_done: bool,
        /// Written since the lists were begun.
        written: BTreeSet<ElementKey>,
    },
    Copying {
        /// Everything that it lacks; it gets no writes of these.
        stale: BTreeMap<ElementKey, Theirs>,
        /// Of these, not begun.
        todo: VecDeque<ElementKey>,
        /// Asked about at the member.
        comparing: BTreeSet<ElementKey>,
        /// Being copied.
        active: usize,
    },
    /// `CaughtUp` has this number in the stream.
    Closing { number: u64 },
    /// It has everything; `key` of the proposal that says so.
    Proposing { key: Option<u64> },
}

/// What the member has of a stale element.
#[derive(Clone)]
enum Theirs {
    /// It must be asked.
    Unknown,
    /// This.
    Image(ElementImage),
}

/// An element being copied.
pub(crate) struct Copy {
    slot: SlotIndex,
    to: ServerId,
    element: ElementKey,
    /// Its blocks are held in its queue.
    pub holds: bool,
    image: ElementImage,
    blocks: Vec<(u16, u8)>,
    /// Blocks that are the same as those of earlier rows.
    twins: Vec<(u16, u8, u16)>,
    /// Only a part of what the member lacks: more than one message carries (2.7, "in pieces").
    is_ahead: bool,
}

/// What a member that is not in sync gets of a write.
pub(crate) enum Share {
    /// Nothing: the copy will have it.
    Nothing,
    /// The write, which does not wait for it.
    Sent,
    /// The write, which waits for it.
    Counts,
}

impl Joiner {
    /// Decides what the member gets of a write of `element`, and notes what it does not get.
    pub fn share(&mut self, element: ElementKey, admits: bool) -> Share {
        match &mut self.stage {
            Stage::Promising => Share::Nothing,
            Stage::Listing { written, .. } => {
                written.insert(element);
                Share::Nothing
            }
            Stage::Copying { stale, .. } if stale.contains_key(&element) => Share::Nothing,
            Stage::Copying { .. } if admits => Share::Sent,
            Stage::Copying { stale, todo, .. } => {
                // It has no room at the moment: the element is stale again. What it has of it is not
                // known before its stream is empty, so all blocks will be sent.
                stale.insert(element, Theirs::Image(ElementImage::default()));
                todo.push_back(element);
                Share::Nothing
            }
            Stage::Closing { .. } | Stage::Proposing { .. } => Share::Counts,
        }
    }

    /// A part of an element is on its way to it.
    fn has_got(&mut self, part: &Part) {
        let (Stage::Copying { stale, .. }, Part::Ahead { element, rows, blocks }) = (&mut self.stage, part) else {
            return;
        };
        if let Some(Theirs::Image(theirs)) = stale.get_mut(element) {
            graft(theirs, rows, blocks.clone(), std::iter::repeat(()));
        }
    }

    /// Every write waits for it.
    pub fn counts(&self) -> bool {
        matches!(self.stage, Stage::Closing { .. } | Stage::Proposing { .. })
    }

    /// It is proposed: only the log can take it out of the count.
    fn is_proposed(&self) -> bool {
        matches!(self.stage, Stage::Proposing { key: Some(_) })
    }

    /// Writes wait for it, and it could still be left out.
    pub fn is_closing(&self) -> bool {
        self.counts() && !self.is_proposed()
    }

    /// Something is to be done for it before it can be proposed, and can be done: not where what it lacks cannot be
    /// read here.
    fn is_under_way(&self) -> bool {
        match &self.stage {
            Stage::Copying { stale, todo, comparing, active: 0 } => {
                stale.is_empty() || !todo.is_empty() || !comparing.is_empty()
            }
            Stage::Closing { .. } | Stage::Proposing { .. } => false,
            _ => true,
        }
    }

    /// Elements that it still lacks, as far as known.
    pub fn left(&self) -> usize {
        match &self.stage {
            Stage::Copying { stale, .. } => stale.len(),
            Stage::Listing { theirs, mine, .. } => theirs.len().max(mine.len()),
            _ => 0,
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Who is to be brought back.

impl DataAccess {
    /// Looks through all slots for members to bring back, and for those who went away meanwhile.
    pub(crate) fn review_joiners(&mut self, ctx: &mut Context) {
        if !std::mem::take(&mut self.joins_due) {
            return;
        }
        let mut joining: BTreeMap<ServerId, usize> = BTreeMap::new();
        for index in 0..self.slots.len() {
            self.drop_lost_joiners(ctx, index);
            for (server, joiner) in self.slots[index].acting.iter().flat_map(|a| &a.joiners) {
                *joining.entry(*server).or_default() += usize::from(joiner.is_under_way());
            }
        }
        let mut asks: BTreeMap<ServerId, Vec<(SlotId, Term)>> = BTreeMap::new();
        // Those with the fewest copies first: they are nearest to a loss.
        let mut by_risk: Vec<SlotIndex> = (0..self.slots.len()).collect();
        by_risk.sort_by_key(|index| self.slots[*index].in_sync.len());
        for index in by_risk {
            let slot = &self.slots[index];
            let Some(acting) = slot.acting.as_ref().filter(|a| a.is_serving()) else { continue };
            let Some(state) = ctx.state.slot(slot.id).filter(|s| s.term == slot.term) else { continue };
            let wanted: Vec<(ServerId, Incarnation)> = state
                .tuple
                .iter()
                .filter(|m| !m.in_sync && !acting.joiners.contains_key(&m.server) && self.connected.contains(&m.server))
                .filter_map(|m| ctx.state.servers.get(&m.server).map(|s| (m.server, s)))
                .filter(|(_, s)| !s.down && s.suspect.is_none())
                .map(|(server, s)| (server, s.incarnation))
                .collect();
            for (server, incarnation) in wanted {
                // Only with the life that the connection belongs to.
                let here = self.windows.get(&server).is_some_and(|w| w.incarnation == incarnation);
                let count = joining.entry(server).or_default();
                if *count >= SLOTS_MAX || !here {
                    continue;
                }
                *count += 1;
                self.next_stream += 1;
                let outgoing = Outgoing::new(self.next_stream);
                let slot = &mut self.slots[index];
                let (attempt, stage) = (self.next_stream, Stage::Promising);
                let joiner = Joiner { incarnation, attempt, stage, outgoing };
                slot.acting.as_mut().expect("just seen").joiners.insert(server, joiner);
                asks.entry(server).or_default().push((slot.id, slot.term));
                self.joining.insert((index, server));
            }
        }
        self.send_promises(ctx, asks);
    }

    /// Joiners whose life is over, or who are suspected and not proposed.
    fn drop_lost_joiners(&mut self, ctx: &mut Context, index: SlotIndex) {
        let Some(acting) = &self.slots[index].acting else { return };
        let is_lost = |server: &ServerId, joiner: &Joiner| {
            let Some(state) = ctx.state.servers.get(server) else { return true };
            let is_away = state.suspect.is_some() || !self.connected.contains(server);
            state.incarnation != joiner.incarnation || state.down || (is_away && !joiner.is_proposed())
        };
        let lost: Vec<ServerId> = acting.joiners.iter().filter(|(s, j)| is_lost(s, j)).map(|(s, _)| *s).collect();
        for server in lost {
            self.drop_joiner(ctx, index, server);
        }
    }

    /// Forgets a joiner; what waited for it waits no more.
    pub(crate) fn drop_joiner(&mut self, ctx: &mut Context, index: SlotIndex, server: ServerId) {
        self.joining.remove(&(index, server));
        self.joins_due = true;
        let Some(acting) = self.slots[index].acting.as_mut() else { return };
        let Some(joiner) = acting.joiners.remove(&server) else { return };
        let waiting: Vec<u64> =
            acting.unfinished.iter().filter(|(_, u)| u.waits.contains(&server)).map(|(s, _)| *s).collect();
        let window = self.windows.entry(server).or_default();
        window.in_flight = window.in_flight.saturating_sub(joiner.outgoing.cost());
        let copies: Vec<OpNumber> =
            self.copies.iter().filter(|(_, c)| c.slot == index && c.to == server).map(|(n, _)| *n).collect();
        for number in copies {
            let copy = self.copies.remove(&number).expect("just listed");
            self.leave_queue(ctx, number, copy.element, WHOLE, copy.holds);
        }
        for sequence in waiting {
            self.on_write_stable(ctx, index, sequence, server);
        }
    }

    /// A new term: joiners of the old one are gone with it, their copies too.
    pub(crate) fn forget_copies(&mut self, index: SlotIndex) {
        let of_slot: Vec<OpNumber> = self.copies.iter().filter(|(_, c)| c.slot == index).map(|(n, _)| *n).collect();
        for number in of_slot {
            let copy = self.copies.remove(&number).expect("just listed");
            self.remove_queue(copy.element);
        }
        self.joining.retain(|(slot, _)| *slot != index);
        self.joins_due = true;
    }

    /// A connection to a member is new: see the head of the file.
    pub(crate) fn on_joiner_connected(&mut self, ctx: &mut Context, index: SlotIndex, server: ServerId) {
        let Some(acting) = self.slots[index].acting.as_mut() else { return };
        let Some(joiner) = acting.joiners.get_mut(&server) else { return };
        if !joiner.counts() {
            return self.drop_joiner(ctx, index, server);
        }
        let slot = &mut self.slots[index];
        let (id, term, watermark) = (slot.id, slot.term, slot.watermark);
        let joiner = slot.acting.as_mut().and_then(|a| a.joiners.get_mut(&server)).expect("just seen");
        self.next_stream += 1;
        for m in joiner.outgoing.reopen(self.next_stream, id, term, watermark) {
            ctx.send(Peer::Server(server), Body::Replicate(m));
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Lists.

impl DataAccess {
    /// The joiner has promised: `watermark` is what it knows.
    pub(crate) fn on_joiner_promised(&mut self, ctx: &mut Context, index: SlotIndex, from: ServerId, above: Version) {
        let slot = &mut self.slots[index];
        let (id, term) = (slot.id, slot.term);
        let Some(joiner) = slot.acting.as_mut().and_then(|a| a.joiners.get_mut(&from)) else { return };
        let Stage::Promising = joiner.stage else { return };
        joiner.stage = Stage::Listing {
            above,
            theirs: BTreeMap::new(),
            mine: BTreeSet::new(),
            theirs_done: false,
            mine_done: false,
            written: BTreeSet::new(),
        };
        let attempt = joiner.attempt;
        ctx.send(Peer::Server(from), Body::List(List { slot: id, term, above, after: None, attempt }));
        match ctx.stores.newer(id, above) {
            Some(keys) => self.on_joiner_mine(ctx, index, (from, attempt), keys, None),
            None => self.scan_for_joiner(ctx, index, (from, attempt), above, None),
        }
    }

    /// The elements of the slot here that are newer than the joiner's watermark.
    pub(crate) fn on_joiner_mine(
        &mut self,
        ctx: &mut Context,
        index: SlotIndex,
        (to, attempt): (ServerId, u64),
        keys: Vec<ElementKey>,
        next: Option<ElementKey>,
    ) {
        let joiner = self.slots[index].acting.as_mut().and_then(|a| a.joiners.get_mut(&to));
        let joiner = joiner.filter(|j| j.attempt == attempt);
        let Some(Stage::Listing { above, mine, mine_done, .. }) = joiner.map(|j| &mut j.stage) else { return };
        mine.extend(keys);
        let above = *above;
        match next {
            Some(after) => self.scan_for_joiner(ctx, index, (to, attempt), above, Some(after)),
            None => {
                *mine_done = true;
                self.copy_if_listed(ctx, index, to);
            }
        }
    }

    /// What the joiner has that is newer than its watermark.
    pub(crate) fn on_joiner_listed(
        &mut self,
        ctx: &mut Context,
        index: SlotIndex,
        (from, attempt): (ServerId, u64),
        elements: Vec<(ElementKey, ElementImage)>,
        next: Option<ElementKey>,
    ) {
        let slot = &mut self.slots[index];
        let (id, term) = (slot.id, slot.term);
        let joiner = slot.acting.as_mut().and_then(|a| a.joiners.get_mut(&from)).filter(|j| j.attempt == attempt);
        let Some(Stage::Listing { above, theirs, theirs_done, .. }) = joiner.map(|j| &mut j.stage) else { return };
        theirs.extend(elements);
        match next {
            Some(after) => {
                let list = List { slot: id, term, above: *above, after: Some(after), attempt };
                ctx.send(Peer::Server(from), Body::List(list));
            }
            None => {
                *theirs_done = true;
                self.copy_if_listed(ctx, index, from);
            }
        }
    }

    fn copy_if_listed(&mut self, ctx: &mut Context, index: SlotIndex, server: ServerId) {
        let joiner = self.slots[index].acting.as_mut().and_then(|a| a.joiners.get_mut(&server));
        let Some(joiner) = joiner else { return };
        let Stage::Listing { theirs, mine, theirs_done: true, mine_done: true, written, .. } = &mut joiner.stage else {
            return;
        };
        let mut stale: BTreeMap<ElementKey, Theirs> =
            std::mem::take(theirs).into_iter().map(|(key, image)| (key, Theirs::Image(image))).collect();
        if self.sabotage == Sabotage::SurvivorsListOnly {
            stale.clear();
        }
        for key in std::mem::take(mine).into_iter().chain(std::mem::take(written)) {
            stale.entry(key).or_insert(Theirs::Unknown);
        }
        stale.retain(|key, _| !family_ended(ctx.state, key.family));
        let todo = stale.keys().copied().collect();
        joiner.stage = Stage::Copying { stale, todo, comparing: BTreeSet::new(), active: 0 };
        self.close_if_equal(ctx, index, server);
    }
}

// ------------------------------------------------------------------------------------------------
// Copies.

impl DataAccess {
    /// Begins as many copies as there is room for, one slot after the other.
    pub(crate) fn advance_copies(&mut self, ctx: &mut Context) {
        self.pace.look(ctx.now);
        if self.joining.is_empty() {
            return;
        }
        let joining: Vec<(SlotIndex, ServerId)> = self.joining.iter().copied().collect();
        for (index, server) in joining {
            self.copy_more(ctx, index, server);
        }
        self.propose_due(ctx);
    }

    /// Clients are served: what goes on beside them has its pace.
    fn is_paced(&self, now: Instant) -> bool {
        self.pace.is_busy(now, self.operations())
    }

    fn copy_more(&mut self, ctx: &mut Context, index: SlotIndex, server: ServerId) {
        let is_paced = self.is_paced(ctx.now);
        let most = if is_paced { COPIES_BUSY } else { COPIES_IDLE };
        let mut asked = Vec::new();
        let mut begun = Vec::new();
        let slot = &mut self.slots[index];
        let (id, term) = (slot.id, slot.term);
        let Some(joiner) = slot.acting.as_mut().and_then(|a| a.joiners.get_mut(&server)) else { return };
        let attempt = joiner.attempt;
        let window = self.windows.entry(server).or_default();
        let has_room = joiner.outgoing.cost() < BLOCKS_MAX && window.admits(BLOCKS_PER_ELEMENT as u64);
        let is_full = window.takes != Takes::Everything;
        let Stage::Copying { stale, todo, comparing, active } = &mut joiner.stage else { return };
        // A fair share: this slot's copies and everybody's.
        while has_room && *active + comparing.len() < COPIES_BUSY.max(most / SLOTS_MAX) {
            if self.copies.len() + begun.len() + asked.len() >= most && *active + comparing.len() > 0 {
                break;
            }
            if todo.is_empty() || (is_paced && !self.pace.admits(ctx.now)) {
                break;
            }
            let Some(element) = todo.pop_front() else { break };
            if family_ended(ctx.state, element.family) {
                stale.remove(&element);
                continue;
            }
            match stale.get(&element) {
                // What a full member does not have at all would take what its overwrites need.
                Some(Theirs::Image(image)) if is_full && image.rows.is_empty() => {
                    todo.push_back(element);
                    break;
                }
                Some(Theirs::Image(_)) => {
                    self.pace.element(ctx.now);
                    *active += 1;
                    begun.push(element);
                }
                Some(Theirs::Unknown) => {
                    // One question for many: what follows in line is asked about, too.
                    self.pace.element(ctx.now);
                    comparing.insert(element);
                    asked.push(element);
                    while asked.len() < COMPARE_MAX
                        && todo.front().is_some_and(|e| matches!(stale.get(e), Some(Theirs::Unknown)))
                    {
                        let element = todo.pop_front().expect("just seen");
                        self.pace.element(ctx.now);
                        comparing.insert(element);
                        asked.push(element);
                    }
                }
                None => {}
            }
        }
        asked.sort_unstable();
        if !asked.is_empty() {
            ctx.send(Peer::Server(server), Body::Compare(Compare { slot: id, term, elements: asked, attempt }));
        }
        for element in begun {
            self.begin_copy(ctx, index, server, element);
        }
        self.close_if_equal(ctx, index, server);
    }

    /// What the joiner has of the elements that it was asked about.
    pub(crate) fn on_compared(&mut self, ctx: &mut Context, from: ServerId, m: Compared) {
        let Some(&index) = self.by_id.get(&m.slot) else { return };
        let slot = &mut self.slots[index];
        if slot.term != m.term {
            return;
        }
        let joiner = slot.acting.as_mut().and_then(|a| a.joiners.get_mut(&from));
        let Some(joiner) = joiner.filter(|j| j.attempt == m.attempt) else { return };
        let Stage::Copying { stale, todo, comparing, .. } = &mut joiner.stage else { return };
        for (element, image) in m.elements {
            if comparing.remove(&element) {
                stale.insert(element, Theirs::Image(image));
                todo.push_front(element);
            }
        }
        self.copy_more(ctx, index, from);
    }

    fn begin_copy(&mut self, ctx: &mut Context, index: SlotIndex, to: ServerId, element: ElementKey) {
        let number = self.take_number();
        let holds = self.enter_queue(number, element);
        let copy = Copy {
            slot: index,
            to,
            element,
            holds,
            image: ElementImage::default(),
            blocks: Vec::new(),
            twins: Vec::new(),
            is_ahead: false,
        };
        self.copies.insert(number, copy);
        if holds {
            self.start_copy(ctx, number);
        }
    }

    /// No write of the element is under way, and none begins before the copy is in the stream.
    pub(crate) fn start_copy(&mut self, ctx: &mut Context, number: OpNumber) {
        let Some(copy) = self.copies.get_mut(&number) else { return };
        copy.holds = true;
        let element = copy.element;
        match ctx.stores.load(element) {
            Loaded::Ready => {}
            Loaded::Pending => return self.wait_for_load(element, LoadWaiter::Copy(number)),
            Loaded::Failed => return self.end_copy(ctx, number, false),
        }
        let (index, to) = (copy.slot, copy.to);
        let joiner = self.slots[index].acting.as_ref().and_then(|a| a.joiners.get(&to));
        let Some(Stage::Copying { stale, .. }) = joiner.map(|j| &j.stage) else {
            return self.end_copy(ctx, number, false);
        };
        let Some(Theirs::Image(theirs)) = stale.get(&element) else { return self.end_copy(ctx, number, false) };
        let mut theirs = theirs.clone();
        keep_seen(ctx.state, element.family, &mut theirs);
        let mut image = seen_image(ctx, element);
        if self.sabotage == Sabotage::NewestEpochOnly {
            let lineages: Vec<LineageId> = image.rows.iter().skip(1).map(|r| r.lineage).collect();
            let mut next = lineages.into_iter();
            image.rows.retain(|r| next.next() != Some(r.lineage));
        }
        if image == theirs && image.version != Version::ZERO {
            return self.end_copy(ctx, number, true);
        }
        if self.sabotage == Sabotage::CopyOnlyIfNewer && theirs.version >= image.version {
            return self.end_copy(ctx, number, true);
        }
        let is_zero = |row: &RowImage| row.sums.iter().all(|sum| *sum == BlockSum::Zero);
        if self.sabotage == Sabotage::DeletionWithoutVersion && image.rows.iter().all(is_zero) {
            return self.end_copy(ctx, number, true);
        }
        let (mut blocks, mut twins) = ctx.stores.twins(element, &image, &lacking(&image, Some(&theirs)));
        let is_ahead = blocks.len() > COPY_BLOCKS_MAX;
        if is_ahead {
            blocks.truncate(COPY_BLOCKS_MAX);
            twins.clear();
        }
        self.pace.spend(ctx.now, blocks.len() as u64 * BLOCK_SIZE);
        let read = ctx.stores.read_places(element, &image.places(&blocks));
        let copy = self.copies.get_mut(&number).expect("just seen");
        (copy.image, copy.blocks, copy.twins, copy.is_ahead) = (image, blocks, twins, is_ahead);
        self.reads.insert(read, ReadOwner::Copy(number));
        if is_ahead {
            // Writes of the element may go on: the member gets none of them, and the copy at the end has them.
            copy.holds = false;
            self.leave_queue(ctx, number, element, WHOLE, true);
        }
    }

    pub(crate) fn on_copy_read(&mut self, ctx: &mut Context, number: OpNumber, result: Result<ReadBlocks, ReadError>) {
        let Some(copy) = self.copies.get_mut(&number) else { return };
        let Ok(read) = result else {
            let (index, to, element) = (copy.slot, copy.to, copy.element);
            self.begin_repair(ctx, index, element);
            self.retry_in_a_while(ctx.now, Retry::Copy(index, to, element));
            return self.end_copy(ctx, number, false);
        };
        let (index, to, element, is_ahead) = (copy.slot, copy.to, copy.element, copy.is_ahead);
        let (image, blocks) = (std::mem::take(&mut copy.image), std::mem::take(&mut copy.blocks));
        let twins = std::mem::take(&mut copy.twins);
        let payload = Payload(read.data);
        let cost = payload.len() as u64 / BLOCK_SIZE;
        let slot = &mut self.slots[index];
        let Some(joiner) = slot.acting.as_mut().and_then(|a| a.joiners.get_mut(&to)) else { return };
        self.windows.entry(to).or_default().in_flight += cost;
        self.counters.recovered_elements += u64::from(!is_ahead);
        self.counters.recovered_blocks += cost;
        let part = if is_ahead {
            let part = ahead_part(element, &image, &blocks);
            joiner.has_got(&part);
            part
        } else {
            let finished_below = finished_below(&self.session_low, &image);
            Part::Copy { element, image, blocks, twins, settles: false, finished_below }
        };
        let m = joiner.outgoing.push(slot.id, slot.term, slot.watermark, part, payload, None);
        if self.connected.contains(&to) {
            ctx.send(Peer::Server(to), Body::Replicate(m));
        }
        self.end_copy(ctx, number, !is_ahead);
        if is_ahead {
            self.copy_again(ctx, index, to, element);
        }
    }

    /// An element could not be read and has perhaps been repaired: its copy is made again.
    pub(crate) fn copy_again(&mut self, ctx: &mut Context, index: SlotIndex, to: ServerId, element: ElementKey) {
        let joiner = self.slots[index].acting.as_mut().and_then(|a| a.joiners.get_mut(&to));
        let Some(Stage::Copying { stale, todo, comparing, .. }) = joiner.map(|j| &mut j.stage) else { return };
        let is_under_way = self.copies.values().any(|c| (c.slot, c.to, c.element) == (index, to, element));
        if stale.contains_key(&element) && !comparing.contains(&element) && !is_under_way && !todo.contains(&element) {
            todo.push_back(element);
            self.copy_more(ctx, index, to);
        }
    }

    /// A copy is in the stream, or was not needed (`equal`); or it could not be made, and its element
    /// stays stale.
    fn end_copy(&mut self, ctx: &mut Context, number: OpNumber, equal: bool) {
        let Some(copy) = self.copies.remove(&number) else { return };
        let joiner = self.slots[copy.slot].acting.as_mut().and_then(|a| a.joiners.get_mut(&copy.to));
        if let Some(Stage::Copying { stale, active, .. }) = joiner.map(|j| &mut j.stage) {
            *active -= 1;
            if equal {
                stale.remove(&copy.element);
            }
        }
        self.leave_queue(ctx, number, copy.element, WHOLE, copy.holds);
        self.close_if_equal(ctx, copy.slot, copy.to);
    }

    /// Nothing is stale any more: from here on every write waits for the joiner.
    fn close_if_equal(&mut self, ctx: &mut Context, index: SlotIndex, server: ServerId) {
        let slot = &mut self.slots[index];
        let Some(joiner) = slot.acting.as_mut().and_then(|a| a.joiners.get_mut(&server)) else { return };
        let Stage::Copying { stale, active: 0, .. } = &joiner.stage else { return };
        if !stale.is_empty() {
            return;
        }
        let m = joiner.outgoing.push(slot.id, slot.term, slot.watermark, Part::CaughtUp, Payload::default(), None);
        joiner.stage = match self.sabotage {
            Sabotage::InSyncWithSendsOutstanding => Stage::Proposing { key: None },
            _ => Stage::Closing { number: m.number },
        };
        self.joins_due = true;
        if self.connected.contains(&server) {
            ctx.send(Peer::Server(server), Body::Replicate(m));
        }
    }
}

// ------------------------------------------------------------------------------------------------
// In sync again.

impl DataAccess {
    /// The joiner has made its stream stable up to here.
    pub(crate) fn on_joiner_stable(&mut self, index: SlotIndex, server: ServerId, through: u64) {
        let joiner = self.slots[index].acting.as_mut().and_then(|a| a.joiners.get_mut(&server));
        if let Some(joiner) = joiner
            && let Stage::Closing { number } = joiner.stage
            && through >= number
        {
            joiner.stage = Stage::Proposing { key: None };
        }
    }

    fn propose_due(&mut self, ctx: &mut Context) {
        let is_due = self.joining.iter().any(|(index, server)| {
            let joiner = self.slots[*index].acting.as_ref().and_then(|a| a.joiners.get(server));
            joiner.is_some_and(|j| matches!(j.stage, Stage::Proposing { key: None }))
        });
        // Every new term holds up the clients of its slots: several at a time are better.
        if !is_due || (self.is_paced(ctx.now) && !self.pace.may_propose(ctx.now)) {
            return;
        }
        let mut due: BTreeMap<(ServerId, Incarnation), Vec<(SlotId, Term)>> = BTreeMap::new();
        let mut keys: BTreeMap<ServerId, u64> = BTreeMap::new();
        for (index, server) in &self.joining {
            let slot = &mut self.slots[*index];
            let Some(joiner) = slot.acting.as_mut().and_then(|a| a.joiners.get_mut(server)) else { continue };
            let is_live = ctx.state.servers.get(server).is_some_and(|s| !s.down && s.suspect.is_none());
            if let Stage::Proposing { key: none @ None } = &mut joiner.stage
                && is_live
            {
                let slots = due.entry((*server, joiner.incarnation)).or_default();
                if slots.len() < PROPOSAL_MAX {
                    slots.push((slot.id, slot.term));
                    // One for each command: one that is decided says nothing of another.
                    *none = Some(*keys.entry(*server).or_insert_with(|| {
                        self.next_job += 1;
                        self.next_job - 1
                    }));
                }
            }
        }
        for ((server, incarnation), slots) in due {
            self.proposals.push((keys[&server], Command::InSync { server, incarnation, slots }));
        }
    }

    /// Servers came, went, or are suspected.
    pub fn want_review(&mut self) {
        self.joins_due = true;
    }

    /// Commands that the room wants decided, each with the key to tell when it was.
    pub fn take_proposals(&mut self) -> Vec<(u64, Command)> {
        std::mem::take(&mut self.proposals)
    }

    /// A proposal was decided. Where it had its effect a new term has begun already; where it had none,
    /// it is proposed again if what it says still holds.
    pub fn on_proposal_decided(&mut self, ctx: &mut Context, decided: u64) {
        for (index, server) in self.joining.clone() {
            let joiner = self.slots[index].acting.as_mut().and_then(|a| a.joiners.get_mut(&server));
            if let Some(Stage::Proposing { key }) = joiner.map(|j| &mut j.stage)
                && *key == Some(decided)
            {
                *key = None;
            }
        }
        self.silence.decided(decided);
        self.flatten.decided(decided);
        self.joins_due = true;
        self.review_joiners(ctx);
    }

    /// Slots in which members are being brought back, and elements that are known to be left.
    pub fn recovery(&self) -> (usize, usize) {
        let joiners = self.slots.iter().filter_map(|s| s.acting.as_ref()).flat_map(|a| a.joiners.values());
        joiners.fold((0, 0), |(slots, left), joiner| (slots + 1, left + joiner.left()))
    }

    // --------------------------------------------------------------------------------------------
    // At the member.

    /// The primary asks what is here of some elements.
    pub(crate) fn on_compare(&mut self, ctx: &mut Context, from: ServerId, m: Compare) {
        let Some(&index) = self.by_id.get(&m.slot) else { return };
        let slot = &self.slots[index];
        if slot.promised == m.term && slot.term == m.term && slot.primary == Some(from) {
            self.begin_comparing(ctx, index, (from, m.attempt), m.elements);
        }
    }
}
