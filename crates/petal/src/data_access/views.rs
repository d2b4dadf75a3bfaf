//! What of an element's rows is seen: by a request (a view), by anybody (an image without the rest), and whether a
//! replica has all of it (marks). 2.9; `translator/visible.rs` says what anybody can see.

use super::*;

impl DataAccess {
    /// At a secondary an element above the watermark may hold a write that is not complete: only the
    /// primary knows.
    pub(super) fn read_as_secondary(&mut self, ctx: &mut Context, number: OpNumber) {
        let op = &self.operations[&number];
        let slot = &self.slots[op.slot];
        // Before the settlement of its term an element may lack, here, what the settlement will bring: were
        // it served, a write of a fenced client could still become visible after the fence (P5).
        let unsettled = slot.watermark.term < slot.term;
        // A snapshot or a clone stands on what was written before a certain command: has all of that come?
        let stands_on = ctx.state.vdisk(op.access.vdisk).map_or(0, |v| v.stands_on);
        let told = slot.incoming.as_ref().map_or(0, Incoming::mark).max(slot.term);
        let unmarked = stands_on > told && !self.is_sabotaged(Sabotage::SnapshotWithoutMark);
        let busy = unsettled || unmarked || ctx.stores.version(op.element) > slot.watermark;
        let catches_up = !slot.in_sync.contains(&self.me); // Only with the rule left out.
        if busy && !catches_up && !self.is_sabotaged(Sabotage::ServeBusy) {
            return self.refuse(ctx, number, Refusal::Busy);
        }
        self.capture(ctx, number);
    }

    /// Somebody reads what stands on the command at this index: the other replicas are told that they have all
    /// that was written before, so that they can serve it too. Once a slot; a new term tells it by itself.
    pub(super) fn mark(&mut self, ctx: &mut Context, index: SlotIndex, stands_on: StateIndex) {
        let slot = &mut self.slots[index];
        let Some(acting) = slot.acting.as_mut() else { return };
        if stands_on <= acting.marked.max(slot.term) {
            return;
        }
        acting.marked = ctx.state.index;
        for (receiver, outgoing) in &mut acting.streams {
            let part = Part::Mark { state_index: ctx.state.index };
            let m = outgoing.push(slot.id, slot.term, slot.watermark, part, Payload::default(), None);
            if self.connected.contains(receiver) {
                let message = Message { state_index: ctx.state.index, body: Body::Replicate(m) };
                ctx.out.push_back(Output::Send { to: Peer::Server(*receiver), message });
            }
        }
    }
}

/// The image of a loaded element without the rows that nobody can see any more (2.9): what replicas compare and copy,
/// because each drops such rows when it comes to it.
pub(crate) fn seen_image(ctx: &Context, element: ElementKey) -> ElementImage {
    let mut image = ctx.stores.image(element);
    keep_seen(ctx.state, element.family, &mut image);
    image
}

/// Takes the rows out of an image that nobody can see any more.
pub(crate) fn keep_seen(state: &State, family: FamilyId, image: &mut ElementImage) {
    let Some(visible) = state.visible(family) else { return };
    if image.rows.len() <= 1 && image.rows.iter().all(|r| visible.sees(r.lineage, r.epoch, None)) {
        return;
    }
    let rows: SmallVec<[(LineageId, Epoch); 8]> = image.rows.iter().map(|r| (r.lineage, r.epoch)).collect();
    let mut kept = visible.kept(rows.iter().copied());
    image.rows.retain(|_| kept.next().unwrap_or(true));
}

/// What a disk or snapshot shows; nothing if it is gone.
pub(crate) fn view_of(state: &State, vdisk: VdiskId) -> View {
    let Some(v) = state.vdisks.get(&vdisk) else { return View::new() };
    // Of a disk always the newest row: this server may be behind, and others write a later epoch already.
    let newest = if v.is_snapshot() { v.epoch } else { Epoch(u32::MAX) };
    let ancestors = state.families.get(&v.family).map(|f| f.ancestors(v.lineage));
    std::iter::once((v.lineage, newest)).chain(ancestors.into_iter().flatten()).collect()
}

pub(super) fn revision_of(state: &State, vdisk: VdiskId) -> Revision {
    let Some(v) = state.vdisks.get(&vdisk) else { return state.index };
    v.revision.max(state.families.get(&v.family).map_or(0, |f| f.revision))
}

/// Step 1 of 2.6: may the session write? (The session and the disk are looked for by who locates the element.)
pub(super) fn check_writable(state: &State, access: &Access) -> Result<(), Refusal> {
    let is_snapshot = state.vdisk(access.vdisk).is_some_and(Vdisk::is_snapshot);
    let reads_only = state.session(access.session).is_some_and(|s| s.mode == Attachment::ReadOnly);
    if is_snapshot || reads_only { Err(Refusal::ReadOnly) } else { Ok(()) }
}
