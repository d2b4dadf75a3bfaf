//! Data access (paper 2.4; design 2.6): reads and writes of clients, and the copies of them.
//!
//! ```text
//!             Write                       Replicate (ordered stream)
//!   client ----------> acting primary ------------------------------> other in-sync replicas
//!          <----------      |    ^                                       |    |
//!            WriteReply     v    `---------------------------------------'    v
//!                         store              StreamAck (stable)             store
//! ```
//!
//! One operation concerns one element. A write waits in the element's queue for operations on the same
//! blocks, gets a version, and is staged here and sent to every other in-sync replica in the same step.
//! It is complete, and acknowledged, when all of them have it on stable storage (I5).
//!
//! Who acts in a slot, and how it begins to, is `promise.rs`. Invariants kept here:
//! * I5: an acknowledgement is sent only when every in-sync replica has the write on stable storage.
//! * I6: request ids live in the element's entry; equal requests in progress are joined.
//! * The watermark is a prefix: it never passes an unfinished write.
//!
//! Reads: the primary lets a read wait for unfinished writes of its blocks; a secondary refuses a read
//! of an element that is newer than its watermark (`Refusal::Busy`), and the client asks the primary.

mod answers;
mod counters;
mod flatten;
mod gates;
mod leaving;
mod map;
mod operation;
mod queue;
mod range;
mod reclaim;
mod replica;
mod space;
mod split;
mod stream;
mod sweep;
mod verify;
mod views;
mod watermarks;
mod window;
mod write;

use crate::global_state::{Attachment, State};
use crate::ids::*;
use crate::limits::*;
use crate::liveness::Liveness;
use crate::message::*;
use crate::promise::Acting;
use crate::resync::{Share, WHOLE};
use crate::sabotage::Sabotage;
use crate::server::{ClientId, Output, Peer, carrier};
use crate::store::{
    BlockData, BlockSum, Change, ElementImage, Loaded, ReadBlocks, ReadError, ReadId, StageError, Stores, Ticket,
};
use crate::translator::vdir::Vdisk;
pub(crate) use answers::Answer;
use bytes::{Bytes, BytesMut};
pub use counters::Counters;
use flatten::FLATTENER;
use operation::{Kind, Operation, Phase, WriteKind};
use queue::ElementQueue;
use range::{ByteRange, block_mask, mask_range};
use reclaim::has_unseen;
pub(crate) use replica::{family_ended, graft};
use smallvec::{SmallVec, smallvec};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use stdx::checksum::crc32c;
use stdx::{FastMap, FastSet, Instant};
pub(crate) use stream::{Incoming, Outgoing};
pub use verify::told_of;
#[cfg(test)]
pub(crate) use views::view_of;
use views::{check_writable, revision_of};
pub(crate) use views::{keep_seen, seen_image};
use window::Window;

/// Number of an operation in progress; grows by one with each.
pub type OpNumber = u64;
/// Position in `DataAccess::slots`.
pub(crate) type SlotIndex = usize;

/// What data access needs of its server to handle one input.
pub struct Context<'a> {
    /// Read after the input was received.
    pub now: Instant,
    /// The disks.
    pub stores: &'a mut Stores,
    /// The global state, as applied.
    pub state: &'a State,
    /// Who asks for leases.
    pub liveness: &'a Liveness,
    /// Outputs of the server.
    pub out: &'a mut VecDeque<Output>,
}

impl Context<'_> {
    fn reply(&mut self, client: ClientId, body: Body) {
        self.send(Peer::Client(client), body);
    }
    pub(crate) fn send(&mut self, to: Peer, body: Body) {
        let to = match to {
            Peer::Client(client) => carrier(client).map_or(to, Peer::Server),
            Peer::Server(_) => to,
        };
        self.out.push_back(Output::Send { to, message: Message { state_index: self.state.index, body } });
    }
}

/// The state of a slot at this server, which is a member of it.
pub(crate) struct Slot {
    pub id: SlotId,
    /// Present term, as applied.
    pub term: Term,
    /// In-sync members, in order.
    pub in_sync: SmallVec<[ServerId; 3]>,
    /// Who may act in the term.
    pub primary: Option<ServerId>,
    /// Highest term promised; nothing older is accepted.
    pub promised: Term,
    /// Every write up to here is complete.
    pub watermark: Version,
    /// State index at which the term was settled here.
    pub settled_at: StateIndex,
    /// Nobody asks for changes up to here any more. Below: what others told to have on stable storage.
    pub lowest_durable: Version,
    pub told_durable: BTreeMap<ServerId, Version>,
    /// Changes of this slot that are staged and not stable, of any term.
    pub outstanding: usize,
    /// As primary of the term.
    pub acting: Option<Box<Acting>>,
    /// As replica in the term.
    pub incoming: Option<Incoming>,
    /// An acknowledgement is due.
    pub ack_due: bool,
    /// The watermark is to be told.
    pub watermark_due: bool,
    /// The primary asked for a promise that waits until everything older is stable.
    pub promise_due: Option<ServerId>,
    /// As a member that is not in sync: everything up to this watermark has come, in this term.
    pub caught_up: Option<(Term, Version)>,
    /// This server is one of its members, in sync or not; since this state index.
    pub is_member: bool,
    pub since: StateIndex,
}

/// Who waits for an entry.
#[derive(Clone, Copy)]
pub(crate) enum LoadWaiter {
    Operation(OpNumber),
    Incoming(SlotIndex),
    Listing(u64),
    Map(u64),
    Settling(SlotIndex, ElementKey),
    Fetch(u64),
    Copy(OpNumber),
    Repair,
    Drop,
    Reclaim,
    Flatten,
    Verify,
    Scrub,
}

/// Who waits for a ticket.
pub(crate) enum TicketOwner {
    Write { slot: SlotIndex, term: Term, sequence: u64 },
    Incoming { slot: SlotIndex, term: Term, number: u64, from: ServerId, cost: u64 },
    Settling { slot: SlotIndex, term: Term, element: ElementKey },
    Repair { slot: SlotIndex, element: ElementKey },
    Background { slot: SlotIndex },
    Split { slots: Vec<SlotIndex> },
}

/// Who waits for a read.
pub(crate) enum ReadOwner {
    Operation(OpNumber),
    Modify(OpNumber),
    Settling { slot: SlotIndex, term: Term, element: ElementKey },
    Fetch(u64),
    Copy(OpNumber),
    Repair(ElementKey),
    Scrub(ElementKey),
}

/// Somebody asked when an index is settled here.
struct Settling {
    asker: ServerId,
    /// Who passed the question on, and is to pass on the answer; else the asker.
    through: ServerId,
    index: StateIndex,
    /// Operations that must end first.
    operations: BTreeSet<OpNumber>,
    /// Slots whose term must be settled first.
    slots: BTreeSet<SlotIndex>,
}

/// `(lineage, epoch)` that a disk shows, followed by its ancestors.
pub(crate) type View = SmallVec<[(LineageId, Epoch); 2]>;

/// The room.
pub struct DataAccess {
    pub(crate) me: ServerId,
    pub(crate) sabotage: Sabotage,
    pub(crate) slots: Vec<Slot>,
    pub(crate) by_id: BTreeMap<SlotId, SlotIndex>,
    operations: BTreeMap<OpNumber, Operation>,
    next_operation: OpNumber,
    queues: FastMap<ElementKey, ElementQueue>,
    /// Elements being copied to members that are brought back; numbered like operations.
    pub(crate) copies: BTreeMap<OpNumber, crate::resync::Copy>,
    /// How fast that goes on.
    pub(crate) pace: crate::pace::Pace,
    /// Elements whose bad blocks are made good (`repair.rs`), and the search for such (`scrub.rs`).
    pub(crate) repairs: crate::repair::Repairs,
    pub(crate) scrub: crate::scrub::Scrub,
    /// Slots and members in which that goes on.
    pub(crate) joining: BTreeSet<(SlotIndex, ServerId)>,
    /// Somebody came, went, or was brought back: look through all slots.
    pub(crate) joins_due: bool,
    /// Some settlement waits for this moment.
    pub(crate) wake_at: Option<Instant>,
    /// Who has not answered for how long (`silence.rs`).
    pub(crate) silence: crate::silence::Silence,
    /// Commands to be decided, with their keys.
    pub(crate) proposals: Vec<(u64, crate::global_state::Command)>,
    in_progress: FastMap<RequestId, OpNumber>,
    loading: FastMap<ElementKey, SmallVec<[LoadWaiter; 2]>>,
    pub(crate) tickets: FastMap<Ticket, TicketOwner>,
    pub(crate) reads: FastMap<ReadId, ReadOwner>,
    maps: BTreeMap<u64, map::MapRequest>,
    map_scans: BTreeMap<ReadId, u64>,
    verifications: Vec<verify::Verification>,
    pub(crate) windows: BTreeMap<ServerId, Window>,
    pub(crate) connected: BTreeSet<ServerId>,
    pub(crate) session_low: FastMap<SessionId, u64>,
    /// Writes of new blocks are refused: so little is free.
    is_full: bool,
    starved: VecDeque<OpNumber>,
    /// Operations whose turn has come.
    startable: VecDeque<OpNumber>,
    is_starting: bool,
    /// Slots whose stream waits for a disk file to grow.
    blocked_incoming: BTreeSet<SlotIndex>,
    /// Elements whose settlement waits for the same.
    pub(crate) blocked_settling: BTreeSet<(SlotIndex, ElementKey)>,
    pub(crate) acks_due: Vec<SlotIndex>,
    /// Slots whose stream came damaged.
    again_due: BTreeSet<SlotIndex>,
    window_due: BTreeSet<ServerId>,
    watermarks_due: Vec<SlotIndex>,
    watermark_timer: Option<Instant>,
    pub(crate) next_stream: u64,
    /// Promises asked for in terms that this server does not know yet.
    pub(crate) early_promises: BTreeMap<SlotId, (ServerId, Term)>,
    /// GMaps that a family has by itself, and that the stores know of.
    splits: BTreeSet<GmapId>,
    pub(crate) promised_due: BTreeMap<ServerId, Vec<(SlotId, Term, Version)>>,
    pub(crate) listings: BTreeMap<u64, crate::promise::Listing>,
    pub(crate) fetches: BTreeMap<u64, crate::fetch::FetchJob>,
    pub(crate) next_job: u64,
    client_requests: FastMap<ClientId, usize>,
    gone_clients: FastSet<ClientId>,
    settles: Vec<Settling>,
    /// What holds up the completion of writes to disks that were snapshotted while several clients have them.
    pub gates: gates::Gates,
    /// Indices that this server itself waited for, and that are settled here.
    settled_here: Vec<StateIndex>,
    /// Elements of families and memberships that ended, being dropped.
    sweep: sweep::Sweep,
    /// What it has to do where it is no member any more.
    pub leaving: leaving::Leaving,
    /// Rows that nobody can see, being dropped.
    reclaim: reclaim::Reclaim,
    /// Rows that clones are given, to need no parents.
    pub(crate) flatten: flatten::Flatten,
    /// Counters for status.
    pub counters: Counters,
}

impl DataAccess {
    /// A room that knows of no slot yet.
    pub(crate) fn new(me: ServerId, incarnation: Incarnation, scrub: crate::scrub::Scrub, sabotage: Sabotage) -> Self {
        DataAccess {
            me,
            sabotage,
            slots: Vec::new(),
            by_id: BTreeMap::new(),
            operations: BTreeMap::new(),
            next_operation: 1,
            queues: FastMap::new(),
            copies: BTreeMap::new(),
            pace: crate::pace::Pace::default(),
            repairs: crate::repair::Repairs::default(),
            scrub,
            joining: BTreeSet::new(),
            joins_due: false,
            wake_at: None,
            silence: crate::silence::Silence::default(),
            proposals: Vec::new(),
            in_progress: FastMap::new(),
            loading: FastMap::new(),
            tickets: FastMap::new(),
            reads: FastMap::new(),
            maps: BTreeMap::new(),
            map_scans: BTreeMap::new(),
            verifications: Vec::new(),
            windows: BTreeMap::new(),
            connected: BTreeSet::new(),
            session_low: FastMap::new(),
            is_full: false,
            starved: VecDeque::new(),
            startable: VecDeque::new(),
            is_starting: false,
            blocked_incoming: BTreeSet::new(),
            blocked_settling: BTreeSet::new(),
            acks_due: Vec::new(),
            again_due: BTreeSet::new(),
            window_due: BTreeSet::new(),
            watermarks_due: Vec::new(),
            watermark_timer: None,
            // A restarted server's streams are newer than those of its last life.
            next_stream: incarnation.count() << 32,
            early_promises: BTreeMap::new(),
            splits: BTreeSet::new(),
            promised_due: BTreeMap::new(),
            listings: BTreeMap::new(),
            fetches: BTreeMap::new(),
            next_job: 1,
            client_requests: FastMap::new(),
            gone_clients: FastSet::new(),
            settles: Vec::new(),
            gates: gates::Gates::default(),
            settled_here: Vec::new(),
            sweep: sweep::Sweep::default(),
            leaving: leaving::Leaving::default(),
            reclaim: reclaim::Reclaim::default(),
            flatten: flatten::Flatten::default(),
            counters: Counters::default(),
        }
    }

    pub(crate) fn is_sabotaged(&self, what: Sabotage) -> bool {
        self.sabotage == what
    }

    // --------------------------------------------------------------------------------------------
    // Requests of clients.

    /// A data request of a client. `Map` too.
    pub fn on_request(&mut self, ctx: &mut Context, client: ClientId, body: Body) {
        let (access, result) = match body {
            Body::Read(m) => (m.access, self.on_read(ctx, client, m).map_err(Answer::Read)),
            Body::Write(m) => (m.access, self.on_write(ctx, client, m).map_err(Answer::Write)),
            Body::Zero(m) => (m.access, self.on_zero(ctx, client, m).map_err(Answer::Write)),
            Body::Map(m) => (m.access, self.on_map(ctx, client, m).map_err(Answer::Map)),
            _ => return,
        };
        if let Err(answer) = result {
            self.answer_refused(ctx, client, access, answer);
        }
    }

    fn on_read(&mut self, ctx: &mut Context, client: ClientId, m: Read) -> Result<(), Refusal> {
        let end = (u64::from(m.first_block) + u64::from(m.blocks)) * BLOCK_SIZE;
        if m.blocks == 0 || end > ELEMENT_SIZE {
            return Err(Refusal::Malformed);
        }
        let mask = block_mask(m.first_block, m.blocks);
        let first = u64::from(m.first_block) * BLOCK_SIZE;
        let (element, slot) = self.locate(ctx.state, &m.access, m.element, first, false)?;
        let kind = Kind::Read { first_block: m.first_block, blocks: m.blocks };
        self.admit_new(ctx, client, m.access, element, slot, mask, kind)
    }

    fn on_write(&mut self, ctx: &mut Context, client: ClientId, m: Write) -> Result<(), Refusal> {
        let length = m.data.len() as u64;
        let range = ByteRange::new(m.offset, length)?;
        let data = m.data.to_bytes();
        if m.crcs.len() != range.blocks() as usize {
            return Err(Refusal::Malformed);
        }
        for (piece, crc) in range.pieces(&data).zip(&m.crcs) {
            if crc32c(piece) != *crc {
                return Err(Refusal::Damaged);
            }
        }
        check_writable(ctx.state, &m.access)?;
        let (element, slot) = self.locate(ctx.state, &m.access, m.element, range.end() - 1, true)?;
        let id = RequestId { session: m.access.session, number: m.number };
        let kind = Kind::Write(Box::new(WriteKind {
            id,
            finished_below: m.finished_below,
            offset: m.offset,
            length: length as u32,
            data: Some(data),
            crcs: m.crcs,
        }));
        self.admit_new(ctx, client, m.access, element, slot, range.mask(), kind)
    }

    fn on_zero(&mut self, ctx: &mut Context, client: ClientId, m: Zero) -> Result<(), Refusal> {
        // Of no bytes: only a row, with what it inherits (`flatten.rs`). It waits for everything else in the element.
        let (mask, last) = match m.length {
            0 if client != FLATTENER => return Err(Refusal::Malformed),
            0 => (WHOLE, 0),
            length => {
                let range = ByteRange::new(m.offset, u64::from(length))?;
                check_writable(ctx.state, &m.access)?;
                (range.mask(), range.end() - 1)
            }
        };
        let (element, slot) = self.locate(ctx.state, &m.access, m.element, last, true)?;
        let id = RequestId { session: m.access.session, number: m.number };
        let kind = Kind::Write(Box::new(WriteKind {
            id,
            finished_below: m.finished_below,
            offset: m.offset,
            length: m.length,
            data: None,
            crcs: Vec::new(),
        }));
        self.admit_new(ctx, client, m.access, element, slot, mask, kind)
    }

    /// Step 1 of 2.6 as far as the state alone decides it.
    fn locate(
        &self,
        state: &State,
        access: &Access,
        element: u64,
        last_byte: u64,
        writes: bool,
    ) -> Result<(ElementKey, SlotIndex), Refusal> {
        let session = state.sessions.get(&access.session).ok_or(Refusal::SessionEnded)?;
        let vdisk = state.vdisks.get(&access.vdisk).ok_or(Refusal::SessionEnded)?;
        if session.vdisk != access.vdisk {
            return Err(Refusal::SessionEnded);
        }
        let start = element.checked_mul(ELEMENT_SIZE).ok_or(Refusal::BeyondEnd)?;
        if start.checked_add(last_byte).is_none_or(|last| last >= vdisk.size) {
            return Err(Refusal::BeyondEnd);
        }
        let family = state.families.get(&vdisk.family).ok_or(Refusal::SessionEnded)?;
        let slots = state.slots.get(&family.gmap).map_or(0, Vec::len) as u32;
        let slot = crate::translator::gmap::slot_of_element(element, family.stripe_unit, family.shift, slots);
        let slot = SlotId { gmap: family.gmap, slot };
        let index = *self.by_id.get(&slot).ok_or(Refusal::StaleMap)?;
        let s = &self.slots[index];
        match s.primary {
            Some(primary) if primary == self.me => {}
            _ if !writes && self.may_read(s) => {}
            _ => return Err(Refusal::StaleMap),
        }
        Ok((ElementKey { family: vdisk.family, element }, index))
    }

    /// Reads are served by members in sync only.
    fn may_read(&self, slot: &Slot) -> bool {
        slot.in_sync.contains(&self.me) || self.sabotage == Sabotage::ReadWhileCatchingUp
    }

    #[allow(clippy::too_many_arguments)]
    fn admit_new(
        &mut self,
        ctx: &mut Context,
        client: ClientId,
        access: Access,
        element: ElementKey,
        slot: SlotIndex,
        mask: u16,
        kind: Kind,
    ) -> Result<(), Refusal> {
        let count = self.client_requests.get_or_insert_with(client, || 0);
        if *count >= CLIENT_REQUESTS_MAX {
            return Err(Refusal::TooMany);
        }
        if let Kind::Write(w) = &kind {
            if w.id.number < self.session_low.get(&w.id.session).copied().unwrap_or(0) {
                return Err(Refusal::Finished);
            }
            let low = self.session_low.get_or_insert_with(w.id.session, || 0);
            *low = (*low).max(w.finished_below);
            if let Some(running) = self.in_progress.get(&w.id) {
                let op = self.operations.get_mut(running).expect("an operation in progress exists");
                op.joined.push((client, access.tag));
                *self.client_requests.get_mut(&client).expect("just made") += 1;
                return Ok(());
            }
        }
        *self.client_requests.get_mut(&client).expect("just made") += 1;
        let number = self.next_operation;
        self.next_operation += 1;
        if let Kind::Write(w) = &kind {
            self.in_progress.insert(w.id, number);
        }
        let phase = Phase::Parked;
        let op = Operation {
            client,
            access,
            element,
            slot,
            mask,
            kind,
            phase,
            at: 0,
            since: ctx.now,
            holds: false,
            original: None,
            joined: SmallVec::new(),
        };
        self.operations.insert(number, op);
        self.admit(ctx, number);
        Ok(())
    }

    /// Begins an operation, or begins it again in a new term.
    fn admit(&mut self, ctx: &mut Context, number: OpNumber) {
        let (slot, element) = (self.operations[&number].slot, self.operations[&number].element);
        if ctx.state.slot_of(element.family, element.element) != Some(self.slots[slot].id) {
            return self.refuse(ctx, number, Refusal::StaleMap); // Its family has another GMap since.
        }
        let (slot, may_read) = (&self.slots[slot], self.may_read(&self.slots[slot]));
        let is_gated = !self.may_complete(self.operations[&number].access.vdisk, slot.settled_at);
        let op = self.operations.get_mut(&number).expect("admitted operations exist");
        let writes = matches!(op.kind, Kind::Write(_));
        let acts = slot.primary == Some(self.me);
        if acts && (is_gated || !slot.acting.as_ref().is_some_and(|a| a.is_serving())) {
            // Promise and settlement come first; a client that waits for them here is served at once after.
            op.phase = Phase::Parked;
            return;
        }
        // What is passed on may come late, to a life that does not know what its session had finished (I6): a new life
        // has a new term.
        let is_passed_on = op.access.relay.is_some() && op.access.need.term != slot.term;
        // The same for what was sent to an earlier membership of this server, and was stuck on its way.
        let is_late = writes && (is_passed_on || acts && op.access.need.term < slot.since);
        if is_late || !acts && (writes || !may_read) {
            return self.refuse(ctx, number, Refusal::StaleMap);
        }
        if is_gated {
            return self.refuse(ctx, number, Refusal::Busy);
        }
        match ctx.stores.load(op.element) {
            Loaded::Ready => self.on_operation_loaded(ctx, number),
            Loaded::Pending => {
                op.phase = Phase::Loading;
                let element = op.element;
                self.wait_for_load(element, LoadWaiter::Operation(number));
            }
            Loaded::Failed => self.refuse(ctx, number, Refusal::BadCopy),
        }
    }

    pub(crate) fn wait_for_load(&mut self, element: ElementKey, waiter: LoadWaiter) {
        self.loading.get_or_insert_with(element, SmallVec::new).push(waiter);
    }

    fn on_operation_loaded(&mut self, ctx: &mut Context, number: OpNumber) {
        let op = self.operations.get_mut(&number).expect("a loading operation exists");
        if self.slots[op.slot].primary != Some(self.me) {
            return self.read_as_secondary(ctx, number);
        }
        if let Kind::Write(w) = &op.kind {
            // P4: what the element already holds was applied, and in a served term nothing that it holds
            // is unfinished but what `in_progress` knows.
            if ctx.stores.ids(op.element).contains(&w.id) && self.sabotage != Sabotage::ForgetIds {
                return self.finish_write(ctx, number, Ok(()));
            }
        }
        let (element, mask) = (op.element, op.mask);
        let queue = self.queues.get_or_insert_with(element, ElementQueue::default);
        if queue.is_free(mask) || (self.sabotage == Sabotage::ServeBusy && matches!(op.kind, Kind::Read { .. })) {
            if matches!(op.kind, Kind::Write(_)) {
                queue.hold(mask);
                op.holds = true;
            } else if queue.is_idle() {
                self.queues.remove(&element);
            }
            self.start(ctx, number);
        } else {
            queue.wait(number, mask);
            op.phase = Phase::Queued;
        }
    }

    /// The operation's turn has come; a write holds its blocks.
    fn start(&mut self, ctx: &mut Context, number: OpNumber) {
        match &self.operations[&number].kind {
            Kind::Read { .. } => self.capture(ctx, number),
            Kind::Write(w) if (ByteRange { offset: w.offset, length: w.length }).ragged() => self.modify(ctx, number),
            Kind::Write(_) => self.assign(ctx, number),
        }
    }

    /// Lease check and capture of addresses are one step: what is captured now is what is served.
    fn capture(&mut self, ctx: &mut Context, number: OpNumber) {
        if ctx.liveness.lease(ctx.now).is_none() && !self.is_sabotaged(Sabotage::ReadWithoutLease) {
            return self.refuse(ctx, number, Refusal::NotReady);
        }
        let op = &self.operations[&number];
        let Kind::Read { first_block, blocks } = op.kind else { unreachable!("only reads are captured") };
        // The session may have ended while the read waited, and the disk be what it never was for that session.
        let is_over = !ctx.state.sessions.contains_key(&op.access.session);
        let view = views::view_of(ctx.state, op.access.vdisk);
        if view.is_empty() || is_over {
            return self.refuse(ctx, number, Refusal::SessionEnded);
        }
        let op = self.operations.get_mut(&number).expect("a reading operation exists");
        match ctx.stores.load(op.element) {
            Loaded::Ready => {}
            Loaded::Pending => {
                // Evicted while it waited in the queue: begin again.
                return self.admit(ctx, number);
            }
            Loaded::Failed => return self.refuse(ctx, number, Refusal::BadCopy),
        }
        op.phase = Phase::Reading;
        op.at = ctx.state.index;
        let slot = op.slot;
        let stands_on = ctx.state.vdisk(op.access.vdisk).map_or(0, |v| v.stands_on);
        let read = ctx.stores.read(op.element, &view, first_block, blocks);
        self.reads.insert(read, ReadOwner::Operation(number));
        self.mark(ctx, slot, stands_on);
    }

    // --------------------------------------------------------------------------------------------
    // Completion.

    /// A receiver (or this server) has made a write stable.
    pub(crate) fn leave_queue(
        &mut self,
        ctx: &mut Context,
        number: OpNumber,
        element: ElementKey,
        mask: u16,
        holds: bool,
    ) {
        let Some(queue) = self.queues.get_mut(&element) else { return };
        if holds {
            queue.release(mask);
        } else {
            queue.forget(number);
        }
        let operations = &mut self.operations;
        let copies = &self.copies;
        let next = queue.take_startable(|op| {
            copies.contains_key(&op) || operations.get(&op).is_some_and(|op| matches!(op.kind, Kind::Write(_)))
        });
        for number in &next {
            if copies.contains_key(number) {
                queue.hold(WHOLE);
                continue;
            }
            let op = operations.get_mut(number).expect("waiting operations exist");
            if matches!(op.kind, Kind::Write(_)) {
                queue.hold(op.mask);
                op.holds = true;
            }
        }
        if queue.is_idle() {
            self.queues.remove(&element);
        }
        // Whoever is refused starts the next: in a loop, not by recursion.
        self.startable.extend(next);
        if std::mem::replace(&mut self.is_starting, true) {
            return;
        }
        while let Some(operation) = self.startable.pop_front() {
            if self.operations.get(&operation).is_some_and(|op| op.phase == Phase::Queued) {
                self.start(ctx, operation);
            } else if self.copies.contains_key(&operation) {
                self.start_copy(ctx, operation);
            }
        }
        self.is_starting = false;
    }

    /// A number in the order of operations.
    pub(crate) fn take_number(&mut self) -> OpNumber {
        self.next_operation += 1;
        self.next_operation - 1
    }

    /// Enters an element's queue for all of its blocks; true if they are held at once.
    pub(crate) fn enter_queue(&mut self, number: OpNumber, element: ElementKey) -> bool {
        let queue = self.queues.get_or_insert_with(element, ElementQueue::default);
        let is_free = queue.is_free(WHOLE);
        if is_free {
            queue.hold(WHOLE);
        } else {
            queue.wait(number, WHOLE);
        }
        is_free
    }

    /// A new term begins: nobody waits in this element's queue any more.
    pub(crate) fn remove_queue(&mut self, element: ElementKey) {
        self.queues.remove(&element);
    }

    fn answered(&mut self, client: ClientId) {
        if let Some(count) = self.client_requests.get_mut(&client) {
            *count -= 1;
            if *count == 0 && self.gone_clients.remove(&client) {
                self.client_requests.remove(&client);
            }
        }
    }

    fn operation_ended(&mut self, ctx: &mut Context, number: OpNumber) {
        for settling in &mut self.settles {
            settling.operations.remove(&number);
        }
        self.tell_settled(ctx);
    }

    fn refuse(&mut self, ctx: &mut Context, number: OpNumber, refusal: Refusal) {
        if matches!(self.operations[&number].kind, Kind::Write(_)) {
            self.finish_write(ctx, number, Err(refusal));
        } else {
            self.finish_read(ctx, number, Err(refusal));
        }
    }

    fn finish_read(&mut self, ctx: &mut Context, number: OpNumber, result: Result<ReadBlocks, Refusal>) {
        let op = self.operations.remove(&number).expect("a read to finish exists");
        if op.phase == Phase::Queued {
            self.leave_queue(ctx, number, op.element, op.mask, false);
        }
        let need = self.need(ctx.state, op.access.vdisk, op.slot);
        let (result, data) = match result {
            Ok(blocks) => {
                self.counters.reads += 1;
                self.pace.answered(ctx.now, false, ctx.now.since(op.since));
                (Ok(blocks.sums), Payload(blocks.data))
            }
            Err(refusal) => {
                self.counters.refused += 1;
                (Err(refusal), Payload::default())
            }
        };
        self.answered(op.client);
        ctx.reply(op.client, Body::ReadReply(ReadReply { tag: op.access.tag, need, result, data }));
        self.operation_ended(ctx, number);
    }

    fn need(&self, state: &State, vdisk: VdiskId, slot: SlotIndex) -> Need {
        // Of a slot that the disk's family has left its client wants no term: it would take it for its present slot's.
        let is_its =
            state.vdisk(vdisk).and_then(|v| state.family(v.family)).is_some_and(|f| f.gmap == self.slots[slot].id.gmap);
        Need { revision: revision_of(state, vdisk), term: if is_its { self.slots[slot].term } else { 0 } }
    }

    // --------------------------------------------------------------------------------------------
    // What the stores tell.

    /// An element's entry is in memory.
    pub fn on_loaded(&mut self, ctx: &mut Context, element: ElementKey) {
        let Some(waiters) = self.loading.remove(&element) else { return };
        for waiter in waiters {
            match waiter {
                LoadWaiter::Operation(number) => self.on_load_for_operation(ctx, number),
                LoadWaiter::Incoming(slot) => self.advance_incoming(ctx, slot),
                LoadWaiter::Listing(job) => self.advance_listing(ctx, job),
                LoadWaiter::Map(map) => self.on_map_loaded(ctx, map, element),
                LoadWaiter::Settling(slot, element) => self.advance_settling(ctx, slot, element),
                LoadWaiter::Fetch(job) => self.advance_fetch(ctx, job),
                LoadWaiter::Copy(number) => self.start_copy(ctx, number),
                LoadWaiter::Repair => self.look(ctx, element),
                LoadWaiter::Drop => self.drop_element(ctx, element),
                LoadWaiter::Reclaim => self.reclaim_element(ctx, element),
                LoadWaiter::Flatten => self.flatten_element(ctx, element),
                LoadWaiter::Verify => self.verify_element(ctx, element),
                LoadWaiter::Scrub => self.on_scrub_loaded(ctx, element),
            }
        }
    }

    fn on_load_for_operation(&mut self, ctx: &mut Context, number: OpNumber) {
        // Ended or parked meanwhile: somebody else takes care.
        let Some(op) = self.operations.get(&number) else { return };
        match op.phase {
            Phase::Loading => match ctx.stores.load(op.element) {
                Loaded::Ready => self.on_operation_loaded(ctx, number),
                Loaded::Pending => self.admit(ctx, number),
                Loaded::Failed => self.refuse(ctx, number, Refusal::BadCopy),
            },
            Phase::Modifying => self.modify(ctx, number),
            Phase::Starved => self.assign(ctx, number),
            _ => {}
        }
    }

    /// A staged change is on stable storage.
    pub fn on_stable(&mut self, ctx: &mut Context, ticket: Ticket) -> bool {
        let Some(owner) = self.tickets.remove(&ticket) else { return false };
        if let TicketOwner::Split { slots } = owner {
            for index in slots {
                self.slots[index].outstanding -= 1;
                self.on_outstanding_changed(ctx, index);
            }
            return true;
        }
        let (TicketOwner::Write { slot: index, .. }
        | TicketOwner::Incoming { slot: index, .. }
        | TicketOwner::Settling { slot: index, .. }
        | TicketOwner::Repair { slot: index, .. }
        | TicketOwner::Background { slot: index }) = owner
        else {
            unreachable!("a split has returned")
        };
        self.slots[index].outstanding -= 1;
        match owner {
            TicketOwner::Write { slot, term, sequence } => {
                if self.slots[slot].term == term {
                    self.on_write_stable(ctx, slot, sequence, self.me);
                }
            }
            TicketOwner::Incoming { slot, term, number, from, cost } => {
                self.on_incoming_stable(slot, term, number, from, cost);
            }
            TicketOwner::Settling { slot, term, element } => {
                if self.slots[slot].term == term {
                    self.on_settling_stable(ctx, slot, element);
                }
            }
            TicketOwner::Repair { element, .. } => self.on_repair_stable(ctx, element),
            TicketOwner::Background { .. } | TicketOwner::Split { .. } => {}
        }
        self.on_outstanding_changed(ctx, index);
        true
    }

    /// A read is done.
    pub fn on_read_done(&mut self, ctx: &mut Context, read: ReadId, result: Result<ReadBlocks, ReadError>) {
        match self.reads.remove(&read) {
            Some(ReadOwner::Operation(number)) => {
                if !self.operations.get(&number).is_some_and(|op| op.phase == Phase::Reading) {
                    return;
                }
                if result.is_err() {
                    let op = &self.operations[&number];
                    let (slot, element) = (op.slot, op.element);
                    self.begin_repair(ctx, slot, element);
                }
                self.finish_read(ctx, number, result.map_err(|_| Refusal::BadCopy));
            }
            Some(ReadOwner::Modify(number)) => self.on_modify_read(ctx, number, result),
            Some(ReadOwner::Settling { slot, term, element }) => {
                if self.slots[slot].term == term {
                    self.on_settling_read(ctx, slot, element, result);
                }
            }
            Some(ReadOwner::Fetch(job)) => self.on_fetch_read(ctx, job, result),
            Some(ReadOwner::Copy(number)) => self.on_copy_read(ctx, number, result),
            Some(ReadOwner::Repair(element)) => self.on_repair_read(ctx, element, read, result),
            Some(ReadOwner::Scrub(element)) => self.on_scrub_read(ctx, element, read, &result),
            None => {
                self.on_verify_read(ctx, read, &result);
            }
        }
    }

    // --------------------------------------------------------------------------------------------
    // Terms, settling, clients, time.

    /// The global state has moved; the slots of this server follow it. `None`: all of them.
    pub fn on_state(&mut self, ctx: &mut Context, changed: Option<&[SlotId]>) {
        let all: Vec<SlotId>;
        let changed = match changed {
            Some(changed) => changed,
            None => {
                all = ctx
                    .state
                    .slots
                    .iter()
                    .flat_map(|(gmap, slots)| {
                        (0..slots.len() as u32).map(|slot| SlotId { gmap: *gmap, slot }).collect::<Vec<_>>()
                    })
                    .collect();
                &all
            }
        };
        let mut asks: BTreeMap<ServerId, Vec<(SlotId, Term)>> = BTreeMap::new();
        let mut heirs: BTreeSet<ServerId> = BTreeSet::new();
        let mut split = self.split_families(ctx, &mut heirs);
        if !split.is_empty() {
            split.extend(changed);
            split.sort_unstable();
            split.dedup();
        }
        for id in if split.is_empty() { changed } else { &split } {
            let Some(slot) = ctx.state.slots.get(&id.gmap).and_then(|s| s.get(id.slot as usize)) else { continue };
            if slot.member(self.me).is_none() {
                // Its membership ended: it has no part in the slot any more. Who acts there now waits to hear that.
                let index = self.by_id.get(id).copied().filter(|index| self.slots[*index].is_member);
                if let Some(index) = index.filter(|_| self.sabotage != Sabotage::LeaversServeOn) {
                    self.change_term(ctx, index, &mut asks);
                    self.leaving.is_due = true;
                    heirs.extend(self.slots[index].primary);
                }
                continue;
            }
            let index = self.slot_index(ctx, *id);
            let moves = self.sabotage == Sabotage::FirstNotSuspectedActs
                && self.slots[index].primary != self.who_acts(ctx.state, slot);
            if self.slots[index].term != slot.term || moves {
                self.change_term(ctx, index, &mut asks);
            }
        }
        for heir in heirs {
            ctx.send(Peer::Server(heir), Body::Index);
        }
        self.send_promises(ctx, asks);
        self.joins_due = true;
    }

    fn slot_index(&mut self, ctx: &mut Context, id: SlotId) -> SlotIndex {
        if let Some(index) = self.by_id.get(&id) {
            return *index;
        }
        let watermark = ctx.stores.watermark(id);
        self.slots.push(Slot {
            id,
            term: 0,
            in_sync: SmallVec::new(),
            primary: None,
            promised: 0,
            watermark,
            lowest_durable: Version::ZERO,
            told_durable: BTreeMap::new(),
            outstanding: 0,
            acting: None,
            incoming: None,
            ack_due: false,
            watermark_due: false,
            promise_due: None,
            caught_up: None,
            settled_at: 0,
            is_member: true,
            since: 0,
        });
        self.by_id.insert(id, self.slots.len() - 1);
        self.slots.len() - 1
    }

    /// Every operation of the slot waits until the new term is served, and then begins again: what the
    /// settled element contains is acknowledged by its id, the rest is done anew.
    pub(crate) fn park_operations(&mut self, index: SlotIndex) {
        let parked: Vec<OpNumber> = self
            .operations
            .iter()
            .filter(|(_, op)| op.slot == index && !matches!(op.phase, Phase::Reading | Phase::Parked))
            .map(|(number, _)| *number)
            .collect();
        for number in parked {
            let op = self.operations.get_mut(&number).expect("just listed");
            op.phase = Phase::Parked;
            op.holds = false;
            if let Some(original) = op.original.take() {
                op.kind = Kind::Write(original);
            }
            let element = op.element;
            self.queues.remove(&element);
            // What it began is known when the slot is settled, and then it is judged anew: by a later index, so that it
            // may wait behind a gate that this very settling is to open.
            for settling in &mut self.settles {
                if settling.operations.remove(&number) {
                    settling.slots.insert(index);
                }
            }
        }
        let operations = &self.operations;
        self.starved.retain(|n| operations.get(n).is_some_and(|op| op.phase == Phase::Starved));
    }

    /// The slot is served (again), or somebody else acts in it: parked operations go on.
    pub(crate) fn unpark_operations(&mut self, ctx: &mut Context, index: SlotIndex) {
        let parked: Vec<OpNumber> = self
            .operations
            .iter()
            .filter(|(_, op)| op.slot == index && op.phase == Phase::Parked)
            .map(|(number, _)| *number)
            .collect();
        for number in parked {
            if self.operations.contains_key(&number) {
                self.admit(ctx, number);
            }
        }
    }

    /// A room's part of `settle`: everything that it had begun when it learnt the index is finished or
    /// refused. Operations without a version check the state again before they get one.
    pub fn on_settle(&mut self, ctx: &mut Context, through: ServerId, asker: ServerId, index: StateIndex) {
        if let Some(known) = self.settles.iter_mut().find(|s| s.asker == asker && s.index == index) {
            known.through = through; // Asked again: this is the way that works now.
            return;
        }
        // What was judged by that index or a later one does not stand in its way.
        let began = |op: &Operation| matches!(op.phase, Phase::Unfinished { .. } | Phase::Reading) && op.at < index;
        let operations = self.operations.iter().filter(|(_, op)| began(op)).map(|(number, _)| *number).collect();
        // What an earlier life of some member began is known only when the slot is settled.
        let slots = (0..self.slots.len()).filter(|s| !self.is_settled(*s)).collect();
        self.settles.push(Settling { asker, through, index, operations, slots });
        self.tell_settled(ctx);
    }

    /// True if this server has nothing to do with the slot, or its present term is settled.
    fn is_settled(&self, index: SlotIndex) -> bool {
        let slot = &self.slots[index];
        !slot.in_sync.contains(&self.me) || slot.watermark.term >= slot.term
    }

    /// A slot has a new term, or its term is settled now.
    pub(crate) fn on_slot_settled_or_not(&mut self, ctx: &mut Context, index: SlotIndex) {
        let is_settled = self.is_settled(index);
        for settling in &mut self.settles {
            if is_settled {
                settling.slots.remove(&index);
            } else {
                settling.slots.insert(index);
            }
        }
        self.tell_settled(ctx);
    }

    fn tell_settled(&mut self, ctx: &mut Context) {
        if self.settles.is_empty() {
            return;
        }
        let is_done = |s: &Settling| s.operations.is_empty() && s.slots.is_empty();
        let (done, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.settles).into_iter().partition(is_done);
        self.settles = rest;
        for Settling { asker, through, index, .. } in done {
            if asker == self.me {
                self.settled_here.push(index);
            } else {
                ctx.send(Peer::Server(through), Body::Settled(Settled { index, asker, settler: self.me }));
            }
        }
    }

    /// Indices that this server itself asked about, and that are settled here now.
    pub fn take_settled_here(&mut self) -> Vec<StateIndex> {
        std::mem::take(&mut self.settled_here)
    }

    /// A client's connection is gone: its writes go on (they may be retried elsewhere and must be found
    /// there), its answers are dropped by the driver.
    pub fn on_client_gone(&mut self, ctx: &mut Context, client: ClientId) {
        self.verifications.retain(|v| !v.is_for(client));
        // What has no version yet, and nobody else waits for, ends: the client will ask again elsewhere.
        let ends = |op: &Operation| {
            let is_early = matches!(op.phase, Phase::Parked | Phase::Loading | Phase::Queued | Phase::Starved);
            op.client == client && op.joined.is_empty() && is_early
        };
        let ended: Vec<OpNumber> = self.operations.iter().filter(|(_, op)| ends(op)).map(|(n, _)| *n).collect();
        for number in ended {
            if self.operations.get(&number).is_some_and(ends) {
                self.refuse(ctx, number, Refusal::NotReady);
            }
        }
        match self.client_requests.get(&client) {
            Some(0) | None => {
                self.client_requests.remove(&client);
            }
            Some(_) => {
                self.gone_clients.insert(client);
            }
        }
    }

    /// Called after every round of inputs: acknowledgements and watermarks that fell together.
    pub fn flush(&mut self, ctx: &mut Context) {
        self.retry_starved(ctx);
        for index in std::mem::take(&mut self.blocked_incoming) {
            self.advance_incoming(ctx, index);
        }
        for (index, element) in std::mem::take(&mut self.blocked_settling) {
            self.advance_settling(ctx, index, element);
        }
        self.serve_what_waited(ctx);
        self.watch_silence(ctx);
        self.review_joiners(ctx);
        self.advance_repairs(ctx);
        self.advance_copies(ctx);
        self.send_promised(ctx);
        self.send_acks(ctx);
        if self.watermark_timer.is_some_and(|at| at <= ctx.now) {
            self.send_watermarks(ctx);
        }
        self.advance_sweep(ctx);
        self.advance_reclaim(ctx);
        self.advance_flatten(ctx);
        self.advance_scrub(ctx);
    }

    /// When something is due although nothing else happens.
    pub fn next_timeout(&self) -> Option<Instant> {
        let rooms = [self.silence.next_look(), self.repairs.next_timeout(), self.scrub.next_timeout()];
        let rooms = rooms.into_iter().chain([self.reclaim.next_timeout(), self.flatten.next_timeout()]);
        rooms.chain([self.pace.next_timeout(), self.watermark_timer, self.wake_at]).flatten().min()
    }

    /// A session is over: nothing of it will be asked again.
    pub fn on_session_ended(&mut self, session: SessionId) {
        self.session_low.remove(&session);
    }

    /// Families of which something may be there that nobody can see any more.
    pub fn reclaims(&self) -> usize {
        self.reclaim.left()
    }

    /// Panics if the room contradicts itself.
    pub fn check_invariants(&self) {
        for slot in &self.slots {
            if let Some(acting) = &slot.acting {
                assert_eq!(slot.primary, Some(self.me), "{:?}: only the primary acts", slot.id);
                assert!(acting.unfinished.len() <= SLOT_UNFINISHED_MAX, "{:?}: too many unfinished", slot.id);
                let first = acting.unfinished.first_key_value().map(|(s, _)| *s);
                if let Some(first) = first
                    && slot.watermark.term == slot.term
                    && self.sabotage == Sabotage::None
                {
                    assert!(slot.watermark.sequence < first, "{:?}: watermark passed an unfinished write", slot.id);
                }
            }
        }
    }
}
