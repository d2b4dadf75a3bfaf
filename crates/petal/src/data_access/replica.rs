//! The replica's side of data access: taking in streams, telling what is stable, windows, watermarks.

use super::reclaim::has_unseen;
use super::*;
use crate::store::RowImage;

impl DataAccess {
    /// One message of a slot's stream. Judged by term, stream and checksums only, never by session, epoch
    /// or size: those were judged by the primary, and a replica that judged again could differ from it.
    pub fn on_replicate(&mut self, ctx: &mut Context, from: ServerId, m: Replicate) {
        let Some(&index) = self.by_id.get(&m.slot) else { return };
        let slot = &mut self.slots[index];
        let old_term = m.term != slot.term || m.term < slot.promised;
        if (old_term || slot.primary != Some(from)) && self.sabotage != Sabotage::NoPromise {
            return; // Nothing of an older term is accepted once a newer one is promised or known.
        }
        if !sums_match(&m) {
            self.counters.bad_blocks += 1;
            self.again_due.insert(index); // Damaged on the way: as if it had not come.
            return;
        }
        let slot = &mut self.slots[index];
        let moves = slot.in_sync.contains(&self.me) || self.sabotage == Sabotage::WatermarkWhileOut;
        if moves && m.watermark > slot.watermark {
            slot.watermark = m.watermark;
        }
        let incoming = slot.incoming.get_or_insert_with(|| Incoming::new(from, m.term));
        let unordered = match self.sabotage {
            Sabotage::NoOrderedStream => true,
            // Streams of different terms come from different servers: their numbers cannot be compared.
            Sabotage::NoPromise => m.term != incoming.term,
            _ => false,
        };
        let element = part_element(&m.part);
        match incoming.accept(m, unordered) {
            stream::Arrival::New => {
                // Loads of all that arrived run side by side; staging keeps the order.
                if let Some(element) = element
                    && ctx.stores.load(element) == Loaded::Pending
                {
                    self.wait_for_load(element, LoadWaiter::Incoming(index));
                }
                self.advance_incoming(ctx, index);
            }
            stream::Arrival::Again => self.ack_due(index),
            stream::Arrival::Ignore => {}
        }
    }

    /// Stages what has arrived, in order, as far as entries are in memory.
    pub(crate) fn advance_incoming(&mut self, ctx: &mut Context, index: SlotIndex) {
        loop {
            let slot = &mut self.slots[index];
            let Some(incoming) = slot.incoming.as_mut() else { return };
            let Some(front) = incoming.arrived.front() else { return };
            if let Some(element) = part_element(&front.part) {
                match ctx.stores.load(element) {
                    Loaded::Ready => {}
                    Loaded::Pending => return self.wait_for_load(element, LoadWaiter::Incoming(index)),
                    Loaded::Failed => return, // The disk's failure ends this server's part; the primary waits.
                }
            }
            if !ctx.stores.is_ready_for(front.data.len() as u64 / BLOCK_SIZE) {
                self.blocked_incoming.insert(index);
                return;
            }
            let message = incoming.arrived.pop_front().expect("just seen");
            let number = incoming.next_staged();
            let (from, term) = (incoming.from, incoming.term);
            let cost = message.data.len() as u64 / BLOCK_SIZE;
            let Some(change) = self.change_of(ctx, index, message) else {
                let incoming = self.slots[index].incoming.as_mut().expect("just seen");
                incoming.staged(None);
                if incoming.advance() {
                    self.ack_due(index);
                }
                continue;
            };
            let written = match &change {
                Change::Write { element, lineage, epoch, .. } if !ctx.stores.has_row(*element, *lineage, *epoch) => {
                    Some(*element)
                }
                _ => None,
            };
            let ticket = match ctx.stores.stage(change) {
                Ok(ticket) => ticket,
                Err(error) => {
                    // Space was reserved and the image promised: this is a broken disk or a broken peer.
                    // Nothing is acknowledged from here on in this stream.
                    ctx.out.push_back(Output::Fatal(format!(
                        "cannot store a write that {from} sent for slot {:?}: {error:?}; check this server's disks",
                        self.slots[index].id
                    )));
                    return;
                }
            };
            if let Some(element) = written
                && has_unseen(ctx.state, element, ctx.stores.row_ids(element).into_iter())
            {
                self.reclaim.want_soon(element, ctx.now);
            }
            self.counters.replicated += 1;
            self.windows.entry(from).or_default().staged += cost;
            let slot = &mut self.slots[index];
            slot.outstanding += 1;
            slot.incoming.as_mut().expect("just seen").staged(Some(ticket));
            self.tickets.insert(ticket, TicketOwner::Incoming { slot: index, term, number, from, cost });
        }
    }

    /// What a message changes on this replica's disks; `None` for nothing.
    fn change_of(&mut self, ctx: &mut Context, index: SlotIndex, m: Replicate) -> Option<Change> {
        let data = m.data.to_bytes();
        let mut blocks = (0..data.len() / BLOCK_SIZE as usize)
            .map(|i| data.slice(i * BLOCK_SIZE as usize..(i + 1) * BLOCK_SIZE as usize));
        let slot = &mut self.slots[index];
        match m.part {
            Part::Write { element, version, lineage, epoch, parents, id, finished_below, ended, first_block, sums } => {
                let low = self.session_low.get_or_insert_with(id.session, || 0);
                *low = (*low).max(finished_below);
                if family_ended(ctx.state, element.family) {
                    return None; // Its number counts, its data does not.
                }
                if ctx.state.visible(element.family).is_some_and(|visible| !visible.sees(lineage, epoch, None)) {
                    // Of a clone that is gone: its primary is behind.
                    self.reclaim.want(element.family);
                }
                let blocks = sums
                    .iter()
                    .map(|sum| match sum {
                        BlockSum::Zero => BlockData::Zero,
                        BlockSum::Crc(crc) => BlockData::Data { crc: *crc, bytes: blocks.next().expect("checked") },
                    })
                    .collect();
                Some(Change::Write {
                    element,
                    slot: slot.id,
                    version,
                    lineage,
                    epoch,
                    parents,
                    id: Some(id),
                    finished_below,
                    ended,
                    first_block,
                    blocks,
                    watermark: slot.watermark,
                })
            }
            Part::Copy { element, image, .. } if image.version == Version::ZERO => {
                // The primary has no such element: what was here was never complete.
                (!family_ended(ctx.state, element.family)).then_some(Change::Drop { element })
            }
            Part::Ahead { element, rows, blocks: places } => {
                if family_ended(ctx.state, element.family) {
                    return None;
                }
                let mut image = ctx.stores.image(element);
                let data = graft(&mut image, &rows, places, blocks);
                Some(Change::Replace {
                    element,
                    slot: slot.id,
                    image,
                    data,
                    twins: Vec::new(),
                    again: false,
                    watermark: slot.watermark,
                })
            }
            Part::Copy { element, mut image, blocks: places, twins, finished_below, .. } => {
                for (session, below) in finished_below {
                    let low = self.session_low.get_or_insert_with(session, || 0);
                    *low = (*low).max(below);
                }
                if self.sabotage == Sabotage::IdsNotCopied {
                    image.ids = ctx.stores.ids(element).to_vec();
                }
                if family_ended(ctx.state, element.family) {
                    return None;
                }
                let data = places.into_iter().zip(blocks).map(|((row, block), bytes)| (row, block, bytes)).collect();
                let (slot, watermark) = (slot.id, slot.watermark);
                if has_unseen(ctx.state, element, image.rows.iter().map(|r| (r.lineage, r.epoch))) {
                    self.reclaim.want(element.family);
                }
                Some(Change::Replace { element, slot, image, data, twins, again: false, watermark })
            }
            Part::SettlementDone => {
                slot.settled_at = ctx.state.index;
                slot.watermark = slot.watermark.max(Version { term: m.term, sequence: 0 });
                let (slot, watermark) = (slot.id, slot.watermark);
                self.on_slot_settled_or_not(ctx, index);
                Some(Change::Watermark { slot, watermark })
            }
            Part::CaughtUp => {
                slot.caught_up = Some((m.term, m.watermark));
                None
            }
            Part::Mark { state_index } => {
                slot.incoming.as_mut().expect("the message came in it").note_mark(state_index);
                None
            }
            Part::Skip { .. } => None,
        }
    }

    pub(super) fn on_incoming_stable(&mut self, index: SlotIndex, term: Term, number: u64, from: ServerId, cost: u64) {
        let window = self.windows.entry(from).or_default();
        window.released += cost;
        if cost > 0 {
            self.window_due.insert(from);
        }
        let slot = &mut self.slots[index];
        let Some(incoming) = slot.incoming.as_mut().filter(|i| i.term == term) else { return };
        if incoming.on_stable(number) {
            self.ack_due(index);
        }
    }

    pub(crate) fn ack_due(&mut self, index: SlotIndex) {
        let slot = &mut self.slots[index];
        if !slot.ack_due {
            slot.ack_due = true;
            self.acks_due.push(index);
        }
    }

    /// One acknowledgement per peer, for all streams that got on since the last one.
    pub(super) fn send_acks(&mut self, ctx: &mut Context) {
        self.review_windows(ctx);
        if self.acks_due.is_empty() && self.window_due.is_empty() && self.again_due.is_empty() {
            return;
        }
        let mut told: BTreeMap<ServerId, Vec<SlotAck>> = BTreeMap::new();
        let mut again: BTreeMap<ServerId, Vec<(SlotId, Term)>> = BTreeMap::new();
        for index in std::mem::take(&mut self.again_due) {
            let slot = &self.slots[index];
            if let Some(primary) = slot.primary {
                again.entry(primary).or_default().push((slot.id, slot.term));
                told.entry(primary).or_default();
            }
        }
        for from in std::mem::take(&mut self.window_due) {
            told.entry(from).or_default();
        }
        for index in std::mem::take(&mut self.acks_due) {
            let slot = &mut self.slots[index];
            slot.ack_due = false;
            let Some(incoming) = &slot.incoming else { continue };
            told.entry(incoming.from).or_default().push(SlotAck {
                slot: slot.id,
                term: incoming.term,
                stream: incoming.stream(),
                through: incoming.through(),
                durable_watermark: ctx.stores.durable_watermark(slot.id),
            });
        }
        for (to, slots) in told {
            let credit = self.credit(ctx, to);
            let again = again.remove(&to).unwrap_or_default();
            ctx.send(Peer::Server(to), Body::StreamAck(StreamAck { slots, again, credit }));
        }
    }

    /// What a receiver has made stable.
    pub fn on_stream_ack(&mut self, ctx: &mut Context, from: ServerId, m: StreamAck) {
        self.silence.heard(from);
        for ack in m.slots {
            let Some(&index) = self.by_id.get(&ack.slot) else { continue };
            let slot = &mut self.slots[index];
            // An older term's numbers count other messages: taken for this term's they would release writes that
            // the receiver never saw.
            if slot.term != ack.term {
                continue;
            }
            let Some(acting) = slot.acting.as_mut() else { continue };
            let joiner = acting.joiners.get_mut(&from);
            let is_joiner = joiner.is_some();
            let outgoing = match joiner {
                Some(joiner) => &mut joiner.outgoing,
                None => match acting.streams.get_mut(&from) {
                    Some(outgoing) => outgoing,
                    None => continue,
                },
            };
            let released = outgoing.on_stable(ack.stream, ack.through);
            if !is_joiner {
                let durable = acting.durable.entry(from).or_default();
                *durable = ack.durable_watermark.max(*durable);
                let told = slot.told_durable.entry(from).or_default();
                *told = ack.durable_watermark.max(*told);
            }
            let window = self.windows.entry(from).or_default();
            window.in_flight = window.in_flight.saturating_sub(released.cost);
            for sequence in released.sequences {
                self.on_write_stable(ctx, index, sequence, from);
            }
            if is_joiner {
                self.on_joiner_stable(index, from, ack.through);
            }
            self.settle_more(ctx, index);
            self.settlement_may_be_done(ctx, index);
        }
        self.on_credit(ctx, from, m.credit);
        for (id, term) in m.again {
            let index = self.by_id.get(&id).copied().filter(|index| self.slots[*index].term == term);
            if let Some(index) = index.filter(|_| self.connected.contains(&from)) {
                self.open_stream_again(ctx, index, from);
            }
        }
    }

    /// The next stream of a slot to a receiver, with everything that is not known stable there.
    fn open_stream_again(&mut self, ctx: &mut Context, index: SlotIndex, receiver: ServerId) {
        let slot = &mut self.slots[index];
        let outgoing = slot.acting.as_mut().and_then(|acting| acting.streams.get_mut(&receiver));
        if let Some(outgoing) = outgoing {
            self.next_stream += 1;
            for m in outgoing.reopen(self.next_stream, slot.id, slot.term, slot.watermark) {
                ctx.send(Peer::Server(receiver), Body::Replicate(m));
            }
        }
        self.on_joiner_connected(ctx, index, receiver);
    }

    /// Watermarks of slots in which the sender acts.
    pub fn on_watermarks(&mut self, ctx: &mut Context, from: ServerId, m: Watermarks) {
        for told in m.slots {
            let Some(&index) = self.by_id.get(&told.slot) else { continue };
            let slot = &mut self.slots[index];
            let moves = slot.in_sync.contains(&self.me) || self.sabotage == Sabotage::WatermarkWhileOut;
            if slot.term != told.term || slot.primary != Some(from) || !moves {
                continue;
            }
            slot.watermark = slot.watermark.max(told.watermark);
            if told.lowest > slot.lowest_durable {
                slot.lowest_durable = told.lowest;
                ctx.stores.forget_changes(slot.id, told.lowest);
            }
        }
    }

    /// A connection to a server is up: promises and streams go on where they were.
    pub fn on_connected(&mut self, ctx: &mut Context, server: ServerId, incarnation: Incarnation) {
        self.connected.insert(server);
        self.silence.is_connected(server);
        // What was told of the window may have been lost with the last connection.
        self.window_due.insert(server);
        let window = self.windows.entry(server).or_default();
        if window.incarnation != incarnation {
            *window = Window::new(incarnation);
        } else {
            // What was asked on the last connection may be lost, even if nobody said that this one had ended.
            window.on_disconnected();
            if window.returned > 0 {
                let blocks = window.returned;
                ctx.send(Peer::Server(server), Body::CreditReturned(CreditReturned { blocks }));
            }
        }
        let mut promises = Vec::new();
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            let Some(acting) = slot.acting.as_mut() else { continue };
            if acting.waits_for_promise_of(server) {
                promises.push((slot.id, slot.term));
            }
            self.open_stream_again(ctx, index, server);
            self.ask_again(ctx, index, server);
        }
        self.joins_due = true;
        if !promises.is_empty() {
            ctx.send(Peer::Server(server), Body::Promise(Promise { slots: promises }));
        }
    }

    /// A connection to a server is gone, with what was on it.
    pub fn on_disconnected(&mut self, server: ServerId) {
        self.connected.remove(&server);
        self.windows.entry(server).or_default().on_disconnected();
        self.joins_due = true;
    }
}

fn part_element(part: &Part) -> Option<ElementKey> {
    match part {
        Part::Write { element, .. } | Part::Copy { element, .. } | Part::Ahead { element, .. } => Some(*element),
        Part::SettlementDone | Part::CaughtUp | Part::Skip { .. } | Part::Mark { .. } => None,
    }
}

/// Puts single blocks into an image: what is carried ahead of a copy. Returns them as the image has them.
pub(crate) fn graft<B>(
    image: &mut ElementImage,
    rows: &[RowImage],
    places: Vec<(u16, u8)>,
    blocks: impl Iterator<Item = B>,
) -> Vec<(u16, u8, B)> {
    for row in rows {
        let at = image.rows.binary_search_by_key(&(row.lineage, row.epoch), |r| (r.lineage, r.epoch));
        if let Err(at) = at {
            let sums = [BlockSum::Zero; BLOCKS_PER_ELEMENT];
            image.rows.insert(at, RowImage { lineage: row.lineage, epoch: row.epoch, sums });
        }
    }
    let mut data = Vec::new();
    for ((row, block), bytes) in places.into_iter().zip(blocks) {
        let from = &rows[usize::from(row)];
        let at = image.rows.binary_search_by_key(&(from.lineage, from.epoch), |r| (r.lineage, r.epoch));
        let at = at.expect("every row was put in");
        image.rows[at].sums[usize::from(block)] = from.sums[usize::from(block)];
        data.push((at as u16, block, bytes));
    }
    data
}

/// A family that the state knew and does not know any more. (One that is newer than the state cannot
/// appear: its writes have a term that this server does not know.)
pub(crate) fn family_ended(state: &State, family: FamilyId) -> bool {
    family.0 <= state.index && !state.families.contains_key(&family)
}

/// The data of a stream message has the length and the checksums that the message says.
fn sums_match(m: &Replicate) -> bool {
    let data = m.data.to_bytes();
    let chunks = data.chunks_exact(BLOCK_SIZE as usize);
    let whole = chunks.remainder().is_empty();
    let sums: Vec<BlockSum> = match &m.part {
        Part::Write { sums, first_block, .. } => {
            if usize::from(*first_block) + sums.len() > BLOCKS_PER_ELEMENT {
                return false;
            }
            sums.iter().copied().filter(|s| *s != BlockSum::Zero).collect()
        }
        Part::Copy { image: ElementImage { rows, .. }, blocks, .. } | Part::Ahead { rows, blocks, .. } => {
            let sum = |(row, block): &(u16, u8)| rows.get(usize::from(*row))?.sums.get(usize::from(*block)).copied();
            match blocks.iter().map(sum).collect::<Option<Vec<_>>>() {
                Some(sums) => sums,
                None => return false,
            }
        }
        _ => Vec::new(),
    };
    whole && chunks.len() == sums.len() && chunks.zip(&sums).all(|(c, s)| *s == BlockSum::Crc(crc32c(c)))
}
