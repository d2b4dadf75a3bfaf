//! Huge ranges by what exists in them: every server that acts in the range's slots is asked for its
//! elements (`Map`), in rounds.
//!
//! ```text
//!   range   |-----------------------------------------------------------|
//!           at = smallest cursor                                       end
//!   s1      =========>cursor
//!   s2      ==================>cursor       a round asks each server from its cursor on
//!   s3      ============================================================> done
//! ```
//!
//! When another server begins to act in a slot, or one answers that it does not, the walk begins anew
//! at the smallest cursor with the servers that act then. What is seen twice is made zero once: a write
//! that was acknowledged in between must not be lost to the same request.
//! Costs O(existing elements / answer + servers), whatever the length of the range.

use super::operations::backoff;
use super::split::{Piece, extents};
use super::*;
use crate::message::MapPart;

/// A walk over elements.
#[derive(Debug)]
pub(super) struct Walk {
    /// The first element.
    first: u64,
    /// Elements below are done.
    at: u64,
    /// One past the last element.
    end: u64,
    /// Who is asked, and from which element on.
    parts: Vec<(ServerId, u64)>,
    /// The session's map that the parts were made from; `None` = they must be made.
    map_changes: Option<u64>,
    /// Troubled rounds in a row.
    tries: u32,
    /// Something was not answered in this round.
    troubled: bool,
    /// Elements found, with their blocks (for `Extents`).
    found: Vec<(u64, u16)>,
    /// Elements at and above `at` that have been made zero, or are being (for `Zero`).
    zeroed: BTreeSet<u64>,
    /// What the disk is compared with (for `Extents`).
    than: Option<VdiskId>,
}

impl Walk {
    fn new(first: u64, end: u64) -> Walk {
        Walk {
            first,
            at: first,
            end,
            parts: Vec::new(),
            map_changes: None,
            tries: 0,
            troubled: false,
            found: Vec::new(),
            zeroed: BTreeSet::new(),
            than: None,
        }
    }
    /// Nothing below the smallest cursor is left to be done.
    fn move_on(&mut self) {
        if let Some(least) = self.parts.iter().map(|(_, cursor)| *cursor).min() {
            self.at = self.at.max(least.min(self.end));
            self.zeroed = self.zeroed.split_off(&self.at);
        }
    }
    /// So much was found that no more should be remembered.
    fn is_full(&self) -> bool {
        self.found.len() >= EXTENT_ELEMENTS_MAX
    }
    /// Whom to ask in this round, from where on: all, or only the last if much is remembered already.
    fn round(&self) -> Vec<(ServerId, u64)> {
        let bound = if self.is_full() { self.at + 1 } else { self.end };
        self.parts.iter().copied().filter(|(_, cursor)| *cursor < bound).collect()
    }
    fn restart(&mut self) {
        self.map_changes = None;
        self.parts.clear();
        let at = self.at;
        self.found.retain(|(element, _)| *element < at);
    }
}

impl Client {
    pub(super) fn begin_zero(
        &mut self,
        number: RequestNumber,
        session: SessionId,
        since: Instant,
        cost: u64,
        offset: u64,
        end: u64,
    ) {
        let (first, last) = (offset.div_ceil(ELEMENT_SIZE), end / ELEMENT_SIZE);
        let whole = first..last.max(first);
        if last.saturating_sub(first) <= ZERO_ELEMENTS_MAX {
            let request = self.add(number, session, since, cost, Work::Change);
            for piece in pieces(offset, end) {
                self.start(request, session, Task::Zero { number: 0, piece });
            }
            return self.started(request);
        }
        // The edges precisely, what lies between by what exists.
        let request = self.add(number, session, since, cost, Work::Zero(Walk::new(whole.start, whole.end)));
        for piece in pieces(offset, first * ELEMENT_SIZE).chain(pieces(last * ELEMENT_SIZE, end)) {
            self.start(request, session, Task::Zero { number: 0, piece });
        }
        self.started(request);
    }

    pub(super) fn begin_extents(
        &mut self,
        number: RequestNumber,
        session: SessionId,
        since: Instant,
        cost: u64,
        (offset, end): (u64, u64),
        than: Option<VdiskId>,
    ) {
        let mut walk = Walk::new(offset / ELEMENT_SIZE, end.div_ceil(ELEMENT_SIZE).max(offset / ELEMENT_SIZE));
        walk.than = than;
        let request = self.add(number, session, since, cost, Work::Extents { offset, end, walk });
        self.started(request);
    }

    fn walk(&mut self, request: u32) -> Option<&mut Walk> {
        match &mut self.requests.get_mut(request as usize)?.as_mut()?.work {
            Work::Zero(walk) | Work::Extents { walk, .. } => Some(walk),
            _ => None,
        }
    }

    /// A round is over (or none has begun): the next, or the answer.
    pub(super) fn walk_on(&mut self, request: u32) {
        let session_id = self.request(request).session.expect("walks have a session");
        let map_changes = self.sessions[&session_id].map_changes;
        let walk = self.walk(request).expect("only walks are carried on");
        walk.move_on();
        if walk.at >= walk.end || (walk.is_full() && walk.at > walk.first) {
            return self.finish_walk(request);
        }
        if std::mem::take(&mut walk.troubled) {
            walk.restart();
            return self.walk_later(request);
        }
        walk.tries = 0;
        if walk.map_changes.is_some_and(|m| m != map_changes) {
            walk.restart();
        }
        if walk.map_changes.is_none() && !self.plan_walk(request, session_id) {
            self.refresh(session_id);
            return self.walk_later(request);
        }
        let walk = self.walk(request).expect("it is a walk");
        let (end, than) = (walk.end, walk.than);
        for (server, first) in walk.round() {
            self.start(request, session_id, Task::Map { server, first, end, map_changes, than });
        }
    }

    /// Decides whom to ask. False if nobody acts in a part of the range.
    fn plan_walk(&mut self, request: u32, session: SessionId) -> bool {
        let walk = self.walk(request).expect("it is a walk");
        let (at, end) = (walk.at, walk.end);
        let session = &self.sessions[&session];
        let (servers, map_changes) = (session.acting_in(at, end), session.map_changes);
        let walk = self.walk(request).expect("it is a walk");
        match servers {
            Some(servers) => {
                walk.parts = servers.into_iter().map(|server| (server, at)).collect();
                walk.map_changes = Some(map_changes);
                true
            }
            None => false,
        }
    }

    fn walk_later(&mut self, request: u32) {
        let tries = {
            let walk = self.walk(request).expect("it is a walk");
            walk.tries += 1;
            walk.tries
        };
        let at = self.now + backoff(tries, &mut self.prng);
        let number = self.request(request).number;
        self.wake_at(at, Timer::Walk { index: request, number });
    }

    pub(super) fn on_walk_timer(&mut self, index: u32, number: RequestNumber) {
        let same = self.requests.get(index as usize).and_then(Option::as_ref).is_some_and(|p| p.number == number);
        if same {
            self.advance.push_back(index);
        }
    }

    /// A server told what exists.
    pub(super) fn on_map_part(&mut self, operation: u32, from: ServerId, part: MapPart) {
        let Some(&mut Operation { request, session: id, task: Task::Map { first, end, map_changes, .. }, .. }) =
            self.operations.get_mut(operation)
        else {
            // An answer to another question: no better than a refusal.
            return self.on_refusal(operation, from, Refusal::NotReady);
        };
        let session = &self.sessions[&id];
        if session.map_changes != map_changes {
            // Who ought to have answered for which slot is not known any more: the walk begins anew.
            return self.finish_operation(operation, None);
        }
        // Slots that it ought to answer for by our hints, and does not.
        let missing = session.misses(from, &part.not_here, first, end);
        let elements = part.elements.into_iter().filter(|(e, mask)| *mask != 0 && (first..end).contains(e));
        let elements: Vec<(u64, u16)> = elements.filter(|(e, _)| *e < part.complete_below).collect();
        let walk = self.walk(request).expect("a map is asked for by a walk");
        if missing || part.complete_below <= first {
            walk.troubled = true;
            self.refresh(id);
            return self.finish_operation(operation, None);
        }
        if let Some(entry) = walk.parts.iter_mut().find(|(server, _)| *server == from) {
            entry.1 = part.complete_below;
        }
        if let Work::Extents { walk, .. } = &mut self.request(request).work {
            walk.found.extend(elements);
        } else {
            let walk = self.walk(request).expect("a map is asked for by a walk");
            let fresh: Vec<u64> = elements.into_iter().map(|e| e.0).filter(|e| walk.zeroed.insert(*e)).collect();
            for element in fresh {
                let piece = Piece { element, from: 0, to: ELEMENT_SIZE as u32 };
                self.start(request, id, Task::Zero { number: 0, piece });
            }
        }
        self.finish_operation(operation, None);
    }

    fn finish_walk(&mut self, request: u32) {
        let response = match &mut self.request(request).work {
            Work::Extents { offset, end, walk } => {
                walk.found.sort_unstable();
                let end = walk.at.saturating_mul(ELEMENT_SIZE).clamp(*offset, *end);
                let known = walk.found.partition_point(|(element, _)| *element < walk.at);
                Response::Extents(extents(*offset, end, &walk.found[..known]))
            }
            _ => Response::Done,
        };
        self.finish(request, Ok(response));
    }
}
