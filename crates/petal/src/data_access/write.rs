//! A write, from its turn in the element's queue to its completion (2.6 steps 1 to 4): the edges that it covers
//! only in part are read, room is found here and at every receiver, it gets its version, is staged and sent; and when
//! everybody has it on stable storage it is answered.

use super::window::{Room, room};
use super::*;

impl DataAccess {
    /// Reads the blocks that an unaligned write covers only in part.
    pub(super) fn modify(&mut self, ctx: &mut Context, number: OpNumber) {
        let view = views::view_of(ctx.state, self.operations[&number].access.vdisk);
        let op = self.operations.get_mut(&number).expect("a modifying operation exists");
        let (first, count) = mask_range(op.mask);
        op.phase = Phase::Modifying;
        match ctx.stores.load(op.element) {
            Loaded::Ready => {
                let read = ctx.stores.read(op.element, &view, first, count);
                self.reads.insert(read, ReadOwner::Modify(number));
            }
            Loaded::Pending => {
                let element = op.element;
                self.wait_for_load(element, LoadWaiter::Operation(number));
            }
            Loaded::Failed => self.refuse(ctx, number, Refusal::BadCopy),
        }
    }

    pub(super) fn on_modify_read(
        &mut self,
        ctx: &mut Context,
        number: OpNumber,
        result: Result<ReadBlocks, ReadError>,
    ) {
        let Some(op) = self.operations.get_mut(&number) else { return };
        if op.phase != Phase::Modifying {
            return; // A new term has parked it; it will be admitted again.
        }
        let old = match result {
            Ok(old) => old,
            Err(_) => {
                let (slot, element) = (op.slot, op.element);
                if !self.repair_for(ctx, slot, element, number) {
                    self.refuse(ctx, number, Refusal::BadCopy);
                }
                return;
            }
        };
        let Kind::Write(w) = &mut op.kind else { unreachable!("only writes are modified") };
        op.original = Some(w.clone());
        let (first, count) = mask_range(op.mask);
        let mut bytes = BytesMut::zeroed(usize::from(count) * BLOCK_SIZE as usize);
        let mut at = old.data.iter().flat_map(|piece| piece.chunks(BLOCK_SIZE as usize));
        for (i, sum) in old.sums.iter().enumerate() {
            if *sum != BlockSum::Zero {
                let block = at.next().expect("one block of data for each that is not zero");
                bytes[i * BLOCK_SIZE as usize..][..BLOCK_SIZE as usize].copy_from_slice(block);
            }
        }
        let from = w.offset as usize - usize::from(first) * BLOCK_SIZE as usize;
        let target = &mut bytes[from..][..w.length as usize];
        match &w.data {
            Some(data) => target.copy_from_slice(data),
            None => target.fill(0),
        }
        w.crcs = bytes.chunks(BLOCK_SIZE as usize).map(crc32c).collect();
        w.data = Some(bytes.freeze());
        w.offset = u32::from(first) * BLOCK_SIZE as u32;
        w.length = u32::from(count) * BLOCK_SIZE as u32;
        self.assign(ctx, number);
    }

    /// What an unaligned write could not read is repaired, or cannot be at the moment.
    pub(crate) fn on_repaired_for(&mut self, ctx: &mut Context, number: OpNumber, is_good: bool) {
        match self.operations.get(&number) {
            Some(op) if op.phase == Phase::Modifying && is_good => self.modify(ctx, number),
            Some(op) if op.phase == Phase::Modifying => self.refuse(ctx, number, Refusal::BadCopy),
            _ => {}
        }
    }

    /// Step 2 and 3 of 2.6: the write gets its version, is staged here, and sent to the others.
    pub(super) fn assign(&mut self, ctx: &mut Context, number: OpNumber) {
        let space = self.space(ctx, self.operations[&number].since);
        let op = self.operations.get_mut(&number).expect("an operation to assign exists");
        let Kind::Write(w) = &op.kind else { unreachable!("only writes get versions") };
        if ctx.liveness.lease(ctx.now).is_none() {
            return self.refuse(ctx, number, Refusal::NotReady);
        }
        // The session may have ended while the operation waited (P5).
        let Some(vdisk) = ctx.state.vdisks.get(&op.access.vdisk) else {
            return self.refuse(ctx, number, Refusal::SessionEnded);
        };
        if !ctx.state.sessions.contains_key(&op.access.session) {
            return self.refuse(ctx, number, Refusal::SessionEnded);
        }
        let last = op.element.element * ELEMENT_SIZE + u64::from(w.offset) + u64::from(w.length.max(1)) - 1;
        if last >= round_up(vdisk.size, BLOCK_SIZE) {
            return self.refuse(ctx, number, Refusal::BeyondEnd);
        }
        match ctx.stores.load(op.element) {
            Loaded::Ready => {}
            Loaded::Pending => {
                op.phase = Phase::Starved;
                let element = op.element;
                return self.wait_for_load(element, LoadWaiter::Operation(number));
            }
            Loaded::Failed => return self.refuse(ctx, number, Refusal::BadCopy),
        }
        let (has_row, is_row_only) = (ctx.stores.has_row(op.element, vdisk.lineage, vdisk.epoch), w.length == 0);
        if is_row_only && (has_row || vdisk.is_snapshot()) {
            return self.finish_write(ctx, number, Ok(()));
        }
        let blocks = block_data(w);
        let cost = blocks.iter().filter(|b| matches!(b, BlockData::Data { .. })).count() as u64;
        let (lineage, epoch) = (vdisk.lineage, vdisk.epoch);
        // Told where the row is made; replicas that have it need nothing of its ancestors any more.
        let parents: Vec<_> = match has_row {
            true => Vec::new(),
            false => ctx.state.families[&vdisk.family].ancestors(lineage).collect(),
        };
        if cost == 0 && !ctx.stores.has_room_for_entries() && ctx.stores.version(op.element) == Version::ZERO {
            // Zeros in an element that does not exist would need an entry, and there is no room for one.
            return self.refuse(ctx, number, Refusal::NoSpace);
        }
        let slot = &mut self.slots[op.slot];
        let acting = slot.acting.as_mut().expect("writes are assigned by an acting primary");
        let mut receivers = acting.receivers.clone();
        receivers.extend(acting.joiners.iter().filter(|(_, j)| j.counts()).map(|(s, _)| *s));
        let first_block = (w.offset / BLOCK_SIZE as u32) as u8;
        let grows = || ctx.stores.grows(op.element, lineage, epoch, first_block, blocks.len());
        match room(&self.windows, self.me, &receivers, acting.unfinished.len(), space, cost, grows) {
            Room::Yes if ctx.stores.is_ready_for(cost) => {}
            Room::Yes | Room::Later => {
                op.phase = Phase::Starved;
                self.starved.push_back(number);
                return;
            }
            Room::No => return self.refuse(ctx, number, Refusal::NoSpace),
        }
        let version = Version { term: slot.term, sequence: acting.sequence + 1 };
        let finished_below = w.finished_below.max(self.session_low.get(&w.id.session).copied().unwrap_or(0));
        let sessions = ctx.stores.ids(op.element).iter().map(|id| id.session);
        let ended: BTreeSet<SessionId> = sessions.filter(|s| !ctx.state.sessions.contains_key(s)).collect();
        let ended: Vec<SessionId> = ended.into_iter().collect();
        let change = Change::Write {
            element: op.element,
            slot: slot.id,
            version,
            lineage,
            epoch,
            parents: parents.clone(),
            id: Some(w.id),
            finished_below,
            ended: ended.clone(),
            first_block,
            blocks,
            watermark: slot.watermark,
        };
        let sums = sums_of(&change);
        let payload = w.data.clone().map(Payload::from).unwrap_or_default();
        let ticket = match ctx.stores.stage(change) {
            Ok(ticket) => ticket,
            Err(StageError::NoSpace) => return self.refuse(ctx, number, Refusal::NoSpace),
            Err(_) => return self.refuse(ctx, number, Refusal::BadCopy),
        };
        if !has_row && has_unseen(ctx.state, op.element, ctx.stores.row_ids(op.element).into_iter()) {
            self.reclaim.want_soon(op.element, ctx.now);
        }
        acting.sequence += 1;
        slot.outstanding += 1;
        op.phase = Phase::Unfinished { sequence: version.sequence };
        op.at = ctx.state.index;
        self.tickets.insert(ticket, TicketOwner::Write { slot: op.slot, term: slot.term, sequence: version.sequence });
        let mut waits: SmallVec<[ServerId; 3]> = smallvec![self.me];
        let part = Part::Write {
            element: op.element,
            version,
            lineage,
            epoch,
            parents,
            id: w.id,
            finished_below,
            ended,
            first_block,
            sums,
        };
        for (receiver, outgoing) in &mut acting.streams {
            waits.push(*receiver);
            self.windows.entry(*receiver).or_default().in_flight += cost;
            let m = outgoing.push(
                slot.id,
                slot.term,
                slot.watermark,
                part.clone(),
                payload.clone(),
                Some(version.sequence),
            );
            if self.connected.contains(receiver) {
                let message = Message { state_index: ctx.state.index, body: Body::Replicate(m) };
                ctx.out.push_back(Output::Send { to: Peer::Server(*receiver), message });
            }
        }
        for (member, joiner) in &mut acting.joiners {
            let window = self.windows.entry(*member).or_default();
            let counts = match joiner.share(op.element, window.admits(cost)) {
                Share::Nothing => continue,
                Share::Sent => false,
                Share::Counts => self.sabotage != Sabotage::NewcomerNotCounted,
            };
            if counts {
                waits.push(*member);
            }
            window.in_flight += cost;
            let (part, payload) = (part.clone(), payload.clone());
            let m = joiner.outgoing.push(slot.id, slot.term, slot.watermark, part, payload, Some(version.sequence));
            if self.connected.contains(member) {
                let message = Message { state_index: ctx.state.index, body: Body::Replicate(m) };
                ctx.out.push_back(Output::Send { to: Peer::Server(*member), message });
            }
        }
        if self.sabotage == Sabotage::AckBeforeSecondary {
            waits.truncate(1);
        }
        let (disk, at) = (op.access.vdisk, op.at);
        acting.unfinished.insert(version.sequence, crate::promise::Unfinished { operation: number, waits, disk, at });
    }

    pub(crate) fn on_write_stable(&mut self, ctx: &mut Context, index: SlotIndex, sequence: u64, at: ServerId) {
        let Some(acting) = self.slots[index].acting.as_mut() else { return };
        let Some(unfinished) = acting.unfinished.get_mut(&sequence) else { return };
        unfinished.waits.retain(|s| *s != at);
        let (is_stable, disk, by) = (unfinished.waits.is_empty(), unfinished.disk, unfinished.at);
        if is_stable && self.may_complete(disk, by) && ctx.liveness.lease(ctx.now).is_some() {
            self.complete_write(ctx, index, sequence);
        }
    }

    /// Every in-sync replica has the write, and this server has a lease.
    pub(super) fn complete_write(&mut self, ctx: &mut Context, index: SlotIndex, sequence: u64) {
        let slot = &mut self.slots[index];
        let Some(acting) = slot.acting.as_mut() else { return };
        if !acting.unfinished.contains_key(&sequence) {
            return;
        }
        // I5: complete. The watermark is a prefix.
        let operation = acting.unfinished.remove(&sequence).expect("just found").operation;
        let prefix = match acting.unfinished.first_key_value() {
            Some((first, _)) if self.sabotage != Sabotage::WatermarkSkipsUnfinished => first - 1,
            _ => acting.sequence,
        };
        slot.watermark = slot.watermark.max(Version { term: slot.term, sequence: prefix });
        self.watermark_moved(ctx.now, index);
        self.finish_write(ctx, operation, Ok(()));
    }

    pub(super) fn finish_write(&mut self, ctx: &mut Context, number: OpNumber, result: Result<(), Refusal>) {
        let op = self.operations.remove(&number).expect("an operation to finish exists");
        let Kind::Write(w) = &op.kind else { unreachable!("only writes finish as writes") };
        self.in_progress.remove(&w.id);
        if result.is_ok() && op.client != FLATTENER {
            self.counters.writes += 1;
            self.pace.answered(ctx.now, true, ctx.now.since(op.since));
        } else if op.client != FLATTENER {
            self.counters.refused += 1;
        }
        let need = self.need(ctx.state, op.access.vdisk, op.slot);
        let askers = std::iter::once((op.client, op.access.tag)).chain(op.joined.iter().copied());
        for (client, tag) in askers {
            self.answered(client);
            match client {
                FLATTENER => self.flatten.answered(tag, self.slots[op.slot].id.slot, result.is_ok()),
                _ => ctx.reply(client, Body::WriteReply(WriteReply { tag, need, result })),
            }
        }
        self.leave_queue(ctx, number, op.element, op.mask, op.holds);
        self.operation_ended(ctx, number);
    }

    pub(super) fn retry_starved(&mut self, ctx: &mut Context) {
        // First come, first served within a slot; a slot whose replica has no room holds up no other.
        let mut blocked = BTreeSet::new();
        for number in std::mem::take(&mut self.starved) {
            let Some(op) = self.operations.get(&number).filter(|op| op.phase == Phase::Starved) else { continue };
            let slot = op.slot;
            if blocked.contains(&slot) {
                self.starved.push_back(number);
                continue;
            }
            let before = self.starved.len();
            self.assign(ctx, number);
            if self.starved.len() > before {
                blocked.insert(slot);
            }
        }
    }
}

fn round_up(n: u64, unit: u64) -> u64 {
    n.div_ceil(unit).saturating_mul(unit)
}

fn block_data(w: &WriteKind) -> Vec<BlockData> {
    match &w.data {
        None => vec![BlockData::Zero; w.length as usize / BLOCK_SIZE as usize],
        Some(data) => w
            .crcs
            .iter()
            .enumerate()
            .map(|(i, crc)| BlockData::Data {
                crc: *crc,
                bytes: data.slice(i * BLOCK_SIZE as usize..(i + 1) * BLOCK_SIZE as usize),
            })
            .collect(),
    }
}

fn sums_of(change: &Change) -> Vec<BlockSum> {
    let Change::Write { blocks, .. } = change else { unreachable!("only writes are replicated as writes") };
    let sum = |b: &BlockData| match b {
        BlockData::Zero => BlockSum::Zero,
        BlockData::Data { crc, .. } => BlockSum::Crc(*crc),
    };
    blocks.iter().map(sum).collect()
}
