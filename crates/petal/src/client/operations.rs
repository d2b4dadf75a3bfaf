//! One operation on one element: routed, sent, answered, tried again.
//!
//! ```text
//!             +--------------------------- Waiting <------ refused: again later
//!             v   timer, newer hints                            ^
//!   new --> Ready --route--> Queued --window has room--> Sent --+--> finished
//!             |  ^  connection gone  |                    |
//!             |  +-------------------+--------------------+
//!             v
//!         Unnumbered (the oldest unfinished write of the session is too far behind)
//! ```
//!
//! A read that takes longer than most is asked of a second copy as well (`second`), and the first good answer is the
//! answer (2.6, "hedged"): it has no effect, so asking twice is harmless. While the second attempt is out the state is
//! `Sent`, and the attempt that is left over when the other one ends takes its place there.
//!
//! Lists of operations hold indices, and are checked against the state when an index is taken out: an
//! operation that was dropped or moved leaves its index behind, which then means nothing.

use super::link::{choose_copy, hedge_after};
use super::split::{Piece, checked_read, piece_crcs};
use super::*;
use crate::message::{Access, Map, Payload, Read, ReadReply, Write, WriteReply, Zero};
use smallvec::SmallVec;

/// What an operation does.
#[derive(Clone, Debug)]
pub(super) enum Task {
    /// Read the blocks of a piece; the result is that part of the request.
    Read { piece: Piece, part: u32 },
    /// Write a piece. The number is zero until it is given.
    Write { number: u64, piece: Piece, data: Bytes },
    /// Make a piece zero.
    Zero { number: u64, piece: Piece },
    /// Ask a server which elements exist; for that part of the request's walk.
    Map { server: ServerId, first: u64, end: u64, map_changes: u64, than: Option<VdiskId> },
}

/// Where an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Ready,
    Unnumbered,
    Queued(ServerId),
    Sent(Attempt),
    Waiting,
}

/// A message that is on its way, or being worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attempt {
    /// Who is to answer.
    pub server: ServerId,
    /// Who has got the message: the same, or a server that passes it on.
    via: ServerId,
    at: Instant,
    tag: Tag,
}

impl Attempt {
    fn is_relayed(&self) -> bool {
        self.via != self.server
    }
}

/// An operation.
#[derive(Clone, Debug)]
pub(super) struct Operation {
    pub request: u32,
    pub session: SessionId,
    pub task: Task,
    pub state: State,
    /// Tags of its attempts are of later generations.
    born: u64,
    /// The same read at another copy; only while the state is `Sent`.
    second: Option<Attempt>,
    since: Instant,
    /// Where it went last.
    target: Option<ServerId>,
    /// The last refusal, for people.
    trouble: Option<Refusal>,
    /// Refusals in a row.
    tries: u32,
    /// Who was to pass it on, since it was last sent to the one that is to answer.
    carriers: SmallVec<[ServerId; 2]>,
    /// Replicas whose copy cannot be used, in this round.
    bad: SmallVec<[ServerId; 2]>,
    bad_rounds: u32,
    /// The secondary has an unfinished write there.
    primary_only: bool,
}

impl Operation {
    pub fn new(request: u32, session: SessionId, task: Task, since: Instant) -> Operation {
        Operation {
            request,
            session,
            task,
            state: State::Ready,
            born: 0,
            second: None,
            since,
            target: None,
            trouble: None,
            tries: 0,
            carriers: SmallVec::new(),
            bad: SmallVec::new(),
            bad_rounds: 0,
            primary_only: false,
        }
    }
    fn element(&self) -> u64 {
        match &self.task {
            Task::Read { piece, .. } | Task::Write { piece, .. } | Task::Zero { piece, .. } => piece.element,
            Task::Map { first, .. } => *first,
        }
    }
    /// Of a change: its number, zero before it is given.
    pub fn number(&self) -> Option<u64> {
        match &self.task {
            Task::Write { number, .. } | Task::Zero { number, .. } => Some(*number),
            Task::Read { .. } | Task::Map { .. } => None,
        }
    }
    fn number_mut(&mut self) -> Option<&mut u64> {
        match &mut self.task {
            Task::Write { number, .. } | Task::Zero { number, .. } => Some(number),
            Task::Read { .. } | Task::Map { .. } => None,
        }
    }
    /// True if this server may answer it, by what is known now.
    fn may_ask(&self, server: ServerId, session: &Session) -> bool {
        let slot = session.slot(self.element());
        match &self.task {
            Task::Read { .. } if !self.primary_only => slot.in_sync.contains(&server),
            Task::Read { .. } | Task::Write { .. } | Task::Zero { .. } => slot.in_sync.first() == Some(&server),
            Task::Map { map_changes, .. } => *map_changes == session.map_changes,
        }
    }
    /// The servers that have got it.
    pub fn sent_to(&self) -> impl Iterator<Item = ServerId> + use<> {
        self.attempts().map(|attempt| attempt.via)
    }
    fn attempts(&self) -> impl Iterator<Item = Attempt> + use<> {
        let first = match self.state {
            State::Sent(attempt) => Some(attempt),
            _ => None,
        };
        first.into_iter().chain(self.second)
    }
    /// An attempt has come to its end, whichever; the other one goes on, or it is ready to be sent again.
    fn end_attempt(&mut self, attempt: Attempt) {
        match self.state {
            State::Sent(first) if first == attempt => {
                self.state = self.second.take().map_or(State::Ready, State::Sent);
            }
            _ => {
                let second = self.second.take();
                assert!(second == Some(attempt), "the attempt at {} was under way", attempt.server);
            }
        }
    }
}

/// All operations. A tag is the place here and the generation of its use, so that an answer finds its
/// operation without a map, and one to an earlier use finds none. A new one with each attempt of an operation.
#[derive(Debug, Default)]
pub(super) struct Operations {
    entries: Vec<(u64, Option<Operation>)>,
    free: Vec<u32>,
}

const INDEX_BITS: u32 = 24;

impl Operations {
    pub fn insert(&mut self, mut operation: Operation) -> u32 {
        match self.free.pop() {
            Some(index) => {
                let (generation, entry) = &mut self.entries[index as usize];
                operation.born = *generation;
                *entry = Some(operation);
                index
            }
            None => {
                assert!(self.entries.len() < 1 << INDEX_BITS, "bounded by CLIENT_BYTES_MAX");
                self.entries.push((0, Some(operation)));
                (self.entries.len() - 1) as u32
            }
        }
    }
    pub fn remove(&mut self, index: u32) -> Operation {
        let entry = &mut self.entries[index as usize];
        entry.0 += 1;
        self.free.push(index);
        entry.1.take().expect("an operation is finished once")
    }
    pub fn get_mut(&mut self, index: u32) -> Option<&mut Operation> {
        self.entries.get_mut(index as usize)?.1.as_mut()
    }
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Operation)> {
        self.entries.iter().enumerate().filter_map(|(n, e)| Some((n as u32, e.1.as_ref()?)))
    }
    fn generation(&self, index: u32) -> u64 {
        self.entries[index as usize].0
    }
    /// A tag for the next attempt.
    fn new_tag(&mut self, index: u32) -> Tag {
        let generation = &mut self.entries[index as usize].0;
        *generation += 1;
        *generation << INDEX_BITS | u64::from(index)
    }
    /// The operation that waits for this answer of this server.
    fn answered(&self, tag: Tag, from: ServerId) -> Option<u32> {
        let index = (tag & ((1 << INDEX_BITS) - 1)) as u32;
        let operation = self.entries.get(index as usize)?.1.as_ref()?;
        operation.attempts().any(|a| a.tag == tag && a.via == from).then_some(index)
    }
    /// The change of which an attempt that was given up had this tag: all of them ask for the same, with one number (P4).
    fn given_up(&self, tag: Tag) -> Option<u32> {
        let index = (tag & ((1 << INDEX_BITS) - 1)) as u32;
        let (generation, operation) = self.entries.get(index as usize)?;
        let operation = operation.as_ref()?;
        let made_for_it = operation.born + 1..=*generation;
        let is_its = operation.number().is_some_and(|n| n > 0) && made_for_it.contains(&(tag >> INDEX_BITS));
        is_its.then_some(index)
    }
    /// The operation of which this is the only attempt.
    fn unanswered(&self, tag: Tag) -> Option<u32> {
        let index = (tag & ((1 << INDEX_BITS) - 1)) as u32;
        let operation = self.entries.get(index as usize)?.1.as_ref()?;
        let only = operation.second.is_none() && operation.attempts().any(|a| a.tag == tag);
        only.then_some(index)
    }
}

impl Client {
    // --------------------------------------------------------------------------------------------
    // Out.

    /// Ready -> Unnumbered, Queued, Sent, Waiting or finished.
    pub(super) fn route(&mut self, index: u32) {
        let Some(operation) = self.operations.get_mut(index) else { return };
        if operation.state != State::Ready {
            return;
        }
        let session = self.sessions.get_mut(&operation.session).expect("a session outlives its operations");
        if session.ended {
            return self.finish_operation(index, Some(Refusal::SessionEnded.into()));
        }
        if let Some(number) = operation.number_mut()
            && *number == 0
        {
            match session.numbers.next() {
                Some(next) => *number = next,
                None => {
                    operation.state = State::Unnumbered;
                    return session.without_number.push_back(index);
                }
            }
        }
        let slot = session.slot(operation.element());
        let target = match &operation.task {
            Task::Map { map_changes, .. } if *map_changes != session.map_changes => {
                // Another server acts somewhere: the walk asks anew.
                return self.finish_operation(index, None);
            }
            Task::Map { server, .. } => Some(*server),
            Task::Read { .. } if !operation.primary_only => {
                self.turn += 1;
                let links = &self.links;
                let usable = slot.in_sync.iter().filter(|s| !operation.bad.contains(s));
                choose_copy(usable.filter_map(|s| Some((*s, links.get(s)?))), self.turn)
            }
            _ => slot.in_sync.first().copied(),
        };
        match target {
            Some(server) => self.enqueue(index, server),
            None => {
                operation.bad.clear();
                let session = operation.session;
                self.refresh(session);
                self.retry_later(index);
            }
        }
    }

    fn enqueue(&mut self, index: u32, server: ServerId) {
        let operation = self.operations.get_mut(index).expect("it is being routed");
        operation.target = Some(server);
        let link = self.links.entry(server).or_insert_with(|| Link::new(Vec::new()));
        if link.is_away(self.now)
            && let Some(via) = self.carrier(index, server)
        {
            return self.send_operation(index, server, via);
        }
        let operation = self.operations.get_mut(index).expect("it is being routed");
        let link = self.links.get_mut(&server).expect("just made");
        if link.has_room() {
            return self.send_operation(index, server, server);
        }
        // It cannot go to that server itself: whoever has tried may try again.
        operation.carriers.clear();
        operation.state = State::Queued(server);
        link.queue.push_back(index);
        if !link.dialed {
            self.dial(server);
        }
    }

    /// Who may pass an operation on to a server that cannot be reached: somebody who answers and has not tried, a
    /// replica of the slot before others. When all have tried, it goes to that server itself once more.
    fn carrier(&mut self, index: u32, server: ServerId) -> Option<ServerId> {
        let operation = self.operations.get_mut(index).expect("it is being routed");
        let in_sync = &self.sessions[&operation.session].slot(operation.element()).in_sync;
        let able = self.links.iter().filter(|(s, link)| **s != server && link.has_room() && !link.silent);
        let able = able.filter(|(s, _)| !operation.carriers.contains(s));
        able.min_by_key(|(s, link)| (!in_sync.contains(s), link.outstanding())).map(|(s, _)| *s)
    }

    /// Sends what waits for a server's window.
    pub(super) fn fill_window(&mut self, server: ServerId) {
        while let Some(link) = self.links.get_mut(&server)
            && link.has_room()
            && let Some(index) = link.queue.pop_front()
        {
            if self.operations.get_mut(index).is_some_and(|o| o.state == State::Queued(server)) {
                self.send_operation(index, server, server);
            }
        }
    }

    fn send_operation(&mut self, index: u32, server: ServerId, via: ServerId) {
        let tag = self.operations.new_tag(index);
        let operation = self.operations.get_mut(index).expect("it is being sent");
        let attempt = Attempt { server, via, at: self.now, tag };
        operation.state = State::Sent(attempt);
        if attempt.is_relayed() {
            operation.carriers.push(via);
        } else {
            operation.carriers.clear();
        }
        if matches!(operation.task, Task::Read { .. }) && !operation.primary_only {
            let in_sync = &self.sessions[&operation.session].slot(operation.element()).in_sync;
            if in_sync.len() > 1 {
                let links = in_sync.iter().filter_map(|s| self.links.get(s));
                let due = self.now + hedge_after(links, IMPATIENCE);
                self.hedges.read_sent(due, tag);
            }
        }
        self.send_attempt(index, attempt);
    }

    /// Asks another copy, where a read has taken so long that most are answered by then.
    pub(super) fn hedge(&mut self) {
        while let Some((due, tag)) = self.hedges.next() {
            let Some(index) = self.operations.unanswered(tag) else {
                self.hedges.pop();
                continue;
            };
            if due > self.now {
                return;
            }
            self.hedges.pop();
            self.ask_second(index);
        }
    }

    fn ask_second(&mut self, index: u32) {
        let operation = self.operations.get_mut(index).expect("it is not answered");
        let slot = self.sessions[&operation.session].slot(operation.element());
        let asked = operation.attempts().flat_map(|attempt| [attempt.server, attempt.via]);
        let asked: SmallVec<[ServerId; 2]> = asked.chain(operation.bad.iter().copied()).collect();
        let links = &self.links;
        let others = slot.in_sync.iter().filter(|s| !asked.contains(s)).filter_map(|s| Some((*s, links.get(s)?)));
        let first = operation.sent_to().next().and_then(|s| links.get(&s)).map(|l| l.reads.smoothed());
        let first = first.unwrap_or(IMPATIENCE);
        let others = others.filter(|(_, link)| link.has_room() && !link.silent && !link.is_slow(first));
        let Some(server) = choose_copy(others, self.turn) else { return };
        if !self.hedges.take() {
            return;
        }
        let tag = self.operations.new_tag(index);
        let operation = self.operations.get_mut(index).expect("it is not answered");
        let attempt = Attempt { server, via: server, at: self.now, tag };
        operation.second = Some(attempt);
        self.send_attempt(index, attempt);
    }

    /// The message of an attempt.
    fn send_attempt(&mut self, index: u32, attempt: Attempt) {
        let operation = self.operations.get_mut(index).expect("it is being sent");
        let session = &self.sessions[&operation.session];
        let need = match operation.task {
            Task::Map { .. } => session.need_of_disk(),
            _ => session.need(operation.element()),
        };
        let relay = attempt.is_relayed().then_some(attempt.server);
        let access = Access { tag: attempt.tag, vdisk: session.vdisk, session: operation.session, need, relay };
        let finished_below = session.numbers.finished_below();
        let body = match &operation.task {
            Task::Read { piece, .. } => {
                let (first_block, blocks) = (piece.first_block(), piece.blocks());
                Body::Read(Read { access, element: piece.element, first_block, blocks })
            }
            Task::Write { number, piece, data } => Body::Write(Write {
                access,
                number: *number,
                finished_below,
                element: piece.element,
                offset: piece.from,
                crcs: piece_crcs(piece.from, data),
                data: Payload::from(data.clone()),
            }),
            Task::Zero { number, piece } => Body::Zero(Zero {
                access,
                number: *number,
                finished_below,
                element: piece.element,
                offset: piece.from,
                length: piece.length(),
            }),
            Task::Map { first, end, than, .. } => {
                Body::Map(Map { access, first_element: *first, end_element: *end, than: *than })
            }
        };
        self.links.get_mut(&attempt.via).expect("it has room").in_flight += 1;
        self.send(attempt.via, body);
    }

    // --------------------------------------------------------------------------------------------
    // In.

    /// The operation and the attempt that an answer belongs to; its place in the window is free. The
    /// operation is ready again, or waits for its other attempt.
    fn take_answer(&mut self, from: ServerId, tag: Tag) -> Option<(u32, Attempt)> {
        let index = self.operations.answered(tag, from)?;
        self.links.get_mut(&from).expect("it was sent there").in_flight -= 1;
        let operation = self.operations.get_mut(index)?;
        let attempt = operation.attempts().find(|a| a.tag == tag)?;
        operation.end_attempt(attempt);
        Some((index, attempt))
    }

    /// A client merges the need before it completes the request (2.4).
    fn merge_need(&mut self, index: u32, need: Need) {
        let operation = self.operations.get_mut(index).expect("it was answered");
        let id = operation.session;
        let element = operation.element();
        let now = self.now;
        if self.sessions.get_mut(&id).expect("a session outlives its operations").merge(now, element, need) {
            self.refresh(id);
        }
    }

    pub(super) fn on_read_reply(&mut self, from: ServerId, reply: ReadReply) {
        let Some((index, attempt)) = self.take_answer(from, reply.tag) else { return };
        self.merge_need(index, reply.need);
        let operation = self.operations.get_mut(index).expect("it was answered");
        let (request, task) = (operation.request, &operation.task);
        match (reply.result, task) {
            (Ok(sums), Task::Read { piece, part }) => match checked_read(*piece, &sums, &reply.data) {
                Some(data) => {
                    if !attempt.is_relayed() {
                        self.links.get_mut(&from).expect("it has answered").reads.add(self.now.since(attempt.at));
                    }
                    // Who was overtaken is not waited for; what it took so far is known.
                    for other in operation.attempts().filter(|a| !a.is_relayed()) {
                        let link = self.links.get_mut(&other.server).expect("it was sent there");
                        link.reads.at_least(self.now.since(other.at));
                    }
                    let part = *part as usize;
                    if let Work::Read { parts } = &mut self.request(request).work {
                        parts[part] = data;
                    }
                    self.finish_operation(index, None);
                }
                None => self.on_refused(index, attempt, Refusal::BadCopy),
            },
            (Err(refusal), _) => self.on_refused(index, attempt, refusal),
            // An answer to another question: no better than a refusal.
            (Ok(_), _) => self.on_refused(index, attempt, Refusal::NotReady),
        }
        self.fill_window(from);
    }

    pub(super) fn on_write_reply(&mut self, from: ServerId, reply: WriteReply) {
        let Some((index, attempt)) = self.take_answer(from, reply.tag) else {
            if let (Ok(()), Some(index)) = (reply.result, self.operations.given_up(reply.tag)) {
                self.merge_need(index, reply.need);
                self.finish_operation(index, None);
            }
            return;
        };
        self.merge_need(index, reply.need);
        let is_change = self.operations.get_mut(index).is_some_and(|o| o.number().is_some());
        match reply.result {
            Ok(()) if is_change => self.finish_operation(index, None),
            Ok(()) => self.on_refused(index, attempt, Refusal::NotReady),
            Err(refusal) => self.on_refused(index, attempt, refusal),
        }
        self.fill_window(from);
    }

    pub(super) fn on_map_reply(&mut self, from: ServerId, reply: crate::message::MapReply) {
        let Some((index, attempt)) = self.take_answer(from, reply.tag) else { return };
        match reply.result {
            Ok(part) => self.on_map_part(index, attempt.server, part),
            Err(refusal) => self.on_refused(index, attempt, refusal),
        }
        self.fill_window(from);
    }

    fn on_refused(&mut self, index: u32, attempt: Attempt, refusal: Refusal) {
        if attempt.is_relayed() && refusal == Refusal::NotReady {
            // Who passes on cannot reach it, or it is not ready: not again at once.
            self.links.get_mut(&attempt.server).expect("it is to be reached").away_since = Some(self.now);
        }
        self.on_refusal(index, attempt.server, refusal);
    }

    pub(super) fn on_refusal(&mut self, index: u32, from: ServerId, refusal: Refusal) {
        let operation = self.operations.get_mut(index).expect("it was answered");
        operation.trouble = Some(refusal);
        let session = operation.session;
        if operation.state != State::Ready && another_may_do_better(refusal) {
            // The other attempt may do better, and if it does not it comes here in its turn.
            if refusal == Refusal::BadCopy && !operation.bad.contains(&from) {
                operation.bad.push(from);
            }
            if matches!(refusal, Refusal::StaleMap | Refusal::NotReady) {
                self.refresh(session);
            }
            return;
        }
        match refusal {
            Refusal::StaleMap | Refusal::NotReady => {
                self.refresh(session);
                self.retry_later(index);
            }
            Refusal::Busy => self.on_busy(index, from),
            Refusal::TooMany => self.retry_later(index),
            Refusal::BadCopy => self.on_bad_copy(index, from),
            Refusal::Damaged if operation.bad_rounds < BAD_COPY_ROUNDS_MAX => {
                operation.bad_rounds += 1;
                self.ready.push_back(index);
            }
            Refusal::NoSpace
            | Refusal::SessionEnded
            | Refusal::ReadOnly
            | Refusal::BeyondEnd
            | Refusal::Damaged
            | Refusal::Malformed
            | Refusal::Finished => self.finish_operation(index, Some(refusal.into())),
        }
    }

    /// The copy there may be newer than what is known complete: only the primary can say.
    fn on_busy(&mut self, index: u32, from: ServerId) {
        let operation = self.operations.get_mut(index).expect("it was answered");
        let slot = self.sessions[&operation.session].slot(operation.element());
        let at_primary = operation.primary_only || slot.in_sync.first() == Some(&from);
        let primary_is_bad = slot.in_sync.first().is_some_and(|p| operation.bad.contains(p));
        operation.primary_only = !primary_is_bad;
        if at_primary || primary_is_bad {
            self.retry_later(index);
        } else {
            self.ready.push_back(index);
        }
    }

    /// This copy cannot be used: the other ones, and when there is none left all of them again, a few
    /// times (the servers repair a bad copy from a good one, P7).
    fn on_bad_copy(&mut self, index: u32, from: ServerId) {
        let operation = self.operations.get_mut(index).expect("it was answered");
        operation.primary_only = false;
        if !operation.bad.contains(&from) {
            operation.bad.push(from);
        }
        let slot = self.sessions[&operation.session].slot(operation.element());
        let is_read = matches!(operation.task, Task::Read { .. });
        if is_read && slot.in_sync.iter().any(|s| !operation.bad.contains(s)) {
            return self.ready.push_back(index);
        }
        operation.bad.clear();
        operation.bad_rounds += 1;
        if operation.bad_rounds >= BAD_COPY_ROUNDS_MAX {
            return self.finish_operation(index, Some(Refusal::BadCopy.into()));
        }
        self.retry_later(index);
    }

    /// Ready -> Waiting.
    pub(super) fn retry_later(&mut self, index: u32) {
        let pause = {
            let operation = self.operations.get_mut(index).expect("it is to be retried");
            operation.state = State::Waiting;
            operation.tries += 1;
            backoff(operation.tries, &mut self.prng)
        };
        let generation = self.operations.generation(index);
        self.wake_at(self.now + pause, Timer::Operation { index, generation });
    }

    /// Waiting -> Ready.
    pub(super) fn on_retry(&mut self, index: u32, generation: u64) {
        if self.operations.entries.get(index as usize).is_some_and(|e| e.0 == generation)
            && let Some(operation) = self.operations.get_mut(index)
            && operation.state == State::Waiting
        {
            operation.state = State::Ready;
            self.ready.push_back(index);
        }
    }

    /// Any state -> gone.
    pub(super) fn finish_operation(&mut self, index: u32, error: Option<RequestError>) {
        let request = self.forget_operation(index);
        let pending = self.request(request);
        pending.open -= 1;
        if pending.error.is_none() {
            pending.error = error;
        }
        if pending.open == 0 {
            self.advance.push_back(request);
        }
    }

    /// Takes an operation out, whatever its state; its number is finished.
    fn forget_operation(&mut self, index: u32) -> u32 {
        let operation = self.operations.remove(index);
        for server in operation.sent_to() {
            self.links.get_mut(&server).expect("it was sent there").in_flight -= 1;
        }
        if let Some(number) = operation.number().filter(|n| *n > 0) {
            let session = self.sessions.get_mut(&operation.session).expect("a session outlives its operations");
            session.numbers.finish(number);
            // Those that could not get a number try again.
            let room = session.numbers.room().min(session.without_number.len());
            for index in session.without_number.drain(..room) {
                if let Some(operation) = self.operations.get_mut(index)
                    && operation.state == State::Unnumbered
                {
                    operation.state = State::Ready;
                    self.ready.push_back(index);
                }
            }
        }
        operation.request
    }

    // --------------------------------------------------------------------------------------------
    // Many at once.

    /// Sent -> Ready for everything that a lost connection took with it.
    pub(super) fn take_back_operations(&mut self, server: ServerId) {
        for (index, entry) in self.operations.entries.iter_mut().enumerate() {
            if let Some(operation) = entry.1.as_mut()
                && operation.attempts().any(|a| a.via == server)
            {
                while let Some(attempt) = operation.attempts().find(|a| a.via == server) {
                    operation.end_attempt(attempt);
                }
                if operation.state == State::Ready {
                    self.ready.push_back(index as u32);
                }
            }
        }
    }

    /// Waiting -> Ready for everything that this server was the right one for, when it can be reached again.
    pub(super) fn wake_waiting_for(&mut self, server: ServerId) {
        for (index, entry) in self.operations.entries.iter_mut().enumerate() {
            if let Some(operation) = entry.1.as_mut()
                && operation.state == State::Waiting
                && operation.target == Some(server)
            {
                operation.state = State::Ready;
                self.ready.push_back(index as u32);
            }
        }
    }

    /// Queued -> Ready for everything that waits for such servers.
    pub(super) fn route_again(&mut self, which: impl Fn(&Link) -> bool) {
        for (server, link) in self.links.iter_mut().filter(|(_, link)| which(link)) {
            for index in std::mem::take(&mut link.queue) {
                if let Some(operation) = self.operations.get_mut(index)
                    && operation.state == State::Queued(*server)
                {
                    operation.state = State::Ready;
                    self.ready.push_back(index);
                }
            }
        }
    }

    /// Waiting -> Ready for a session whose map has changed.
    pub(super) fn wake_session(&mut self, session: SessionId) {
        for (index, entry) in self.operations.entries.iter_mut().enumerate() {
            if let Some(operation) = entry.1.as_mut()
                && operation.session == session
            {
                // It asks a server that is not the right one any more. Should that one have done it all the
                // same, the next finds the request's number in the element (I6).
                let wrong = operation.attempts().filter(|a| !operation.may_ask(a.server, &self.sessions[&session]));
                for attempt in wrong.collect::<SmallVec<[Attempt; 2]>>() {
                    operation.end_attempt(attempt);
                    self.links.get_mut(&attempt.via).expect("it was sent there").in_flight -= 1;
                    if operation.state == State::Ready {
                        operation.state = State::Waiting;
                    }
                }
                if operation.state == State::Waiting {
                    operation.state = State::Ready;
                    operation.tries = 0;
                    self.ready.push_back(index as u32);
                }
            }
        }
        self.route_again(|_| true);
    }

    /// Looks after operations that nobody answers: reads go to another copy; for all of them somebody is
    /// asked who acts by now.
    pub(super) fn hurry(&mut self) {
        let mut waiting: BTreeSet<SessionId> = BTreeSet::new();
        let mut silent: BTreeSet<ServerId> = BTreeSet::new();
        let mut reads: Vec<u32> = Vec::new();
        let mut unreached: Vec<u32> = Vec::new();
        for (index, operation) in self.operations.iter() {
            let is_late = |attempt: &Attempt| self.now.since(attempt.at) >= IMPATIENCE;
            // Who passes on may be waiting itself.
            let is_direct = |attempt: &Attempt| !attempt.is_relayed();
            silent.extend(operation.attempts().filter(is_late).filter(is_direct).map(|attempt| attempt.server));
            // Who was to pass it on may be as hard to reach, and the other one not any more.
            if operation.second.is_none()
                && let State::Sent(only) = operation.state
                && match is_direct(&only) {
                    true => is_late(&only) && self.links.get(&only.server).is_some_and(|l| l.is_away(self.now)),
                    false => self.now.since(only.at) >= RELAY_PATIENCE,
                }
            {
                unreached.push(index);
            }
            match operation.state {
                State::Sent(first) if is_late(&first) => {
                    waiting.insert(operation.session);
                    if matches!(operation.task, Task::Read { .. }) && operation.attempts().all(|a| is_late(&a)) {
                        reads.push(index);
                    }
                }
                State::Queued(server) if self.links.get(&server).is_none_or(|l| l.connected.is_none()) => {
                    waiting.insert(operation.session);
                }
                _ => {}
            }
        }
        for server in silent {
            let link = self.links.get_mut(&server).expect("something was sent there");
            if !std::mem::replace(&mut link.silent, true) {
                link.away_since = Some(self.now);
                self.take_back_calls(server);
            }
        }
        for index in reads {
            let operation = self.operations.get_mut(index).expect("just seen");
            let slot = self.sessions[&operation.session].slot(operation.element());
            let links = &self.links;
            let answers = |s: &ServerId| links.get(s).is_some_and(|l| l.connected.is_some() && !l.silent);
            // Who was asked is silent, so it is another one.
            if slot.in_sync.iter().any(|s| !operation.bad.contains(s) && answers(s)) {
                for attempt in operation.attempts() {
                    operation.end_attempt(attempt);
                    self.links.get_mut(&attempt.via).expect("it was sent there").in_flight -= 1;
                }
                operation.primary_only = false;
                self.ready.push_back(index);
            }
        }
        for index in unreached {
            let operation = self.operations.get_mut(index).expect("just seen");
            let State::Sent(attempt) = operation.state else { continue };
            if attempt.is_relayed() || self.carrier(index, attempt.server).is_some() {
                let operation = self.operations.get_mut(index).expect("just seen");
                operation.end_attempt(attempt);
                self.links.get_mut(&attempt.via).expect("it was sent there").in_flight -= 1;
                self.ready.push_back(index);
            }
        }
        // What waits for such a server may go elsewhere, and windows have room again.
        let now = self.now;
        self.route_again(|link| link.silent || link.is_away(now));
        let servers: Vec<ServerId> = self.links.iter().filter(|(_, l)| l.silent).map(|(s, _)| *s).collect();
        for server in servers {
            self.fill_window(server);
        }
        for id in waiting {
            let session = self.sessions.get_mut(&id).expect("a session outlives its operations");
            session.refresh.pause = session.refresh.pause.min(SCAN_EVERY);
            self.refresh(id);
        }
    }

    /// Drops the operations of these requests, in one look at all; for whom each waited.
    pub(super) fn drop_operations(&mut self, requests: &[u32]) -> Vec<String> {
        let mut waits: BTreeMap<u32, BTreeMap<ServerId, &'static str>> =
            requests.iter().map(|request| (*request, BTreeMap::new())).collect();
        let dropped = |(index, o): (u32, &Operation)| waits.contains_key(&o.request).then_some((index, o.request));
        let dropped: Vec<(u32, u32)> = self.operations.iter().filter_map(dropped).collect();
        for (index, request) in dropped {
            self.collect_reason(index, waits.entry(request).or_default());
            self.forget_operation(index);
        }
        for request in requests {
            self.request(*request).open = 0;
        }
        let servers: Vec<ServerId> = self.links.keys().copied().collect();
        for server in servers {
            self.fill_window(server);
        }
        requests.iter().map(|request| in_words(&waits[request])).collect()
    }

    fn collect_reason(&self, index: u32, reasons: &mut BTreeMap<ServerId, &'static str>) {
        let Some(operation) = self.operations.entries[index as usize].1.as_ref() else { return };
        let Some(server) = operation.target else { return };
        let connected = self.links.get(&server).is_some_and(|l| l.connected.is_some());
        let reason = match (connected, operation.state, operation.trouble) {
            (false, ..) => "not connected",
            (true, State::Waiting, Some(Refusal::NotReady)) => "not ready yet",
            (true, State::Waiting, Some(Refusal::StaleMap)) => "no longer responsible",
            (true, State::Waiting, Some(Refusal::TooMany)) => "overloaded",
            (true, State::Waiting, Some(Refusal::BadCopy)) => "its copy cannot be read",
            (true, ..) => "connected, but does not answer",
        };
        reasons.insert(server, reason);
    }

    /// Tells people who waits for whom; fetches hints where something waits for a server that is away.
    pub(super) fn warn_about_operations(&mut self) {
        // Of each session: since when its oldest operation waits, and for whom they wait.
        let mut waits: BTreeMap<SessionId, (Instant, BTreeMap<ServerId, &'static str>)> = BTreeMap::new();
        let old: Vec<(u32, SessionId, Instant)> = self
            .operations
            .iter()
            .filter(|(_, o)| self.now.since(o.since) >= WARN_EVERY)
            .map(|(index, o)| (index, o.session, o.since))
            .collect();
        for (index, session, since) in old {
            let entry = waits.entry(session).or_insert((since, BTreeMap::new()));
            entry.0 = entry.0.min(since);
            self.collect_reason(index, &mut entry.1);
        }
        let ids: Vec<SessionId> = self.sessions.keys().copied().collect();
        for id in ids {
            let session = self.sessions.get_mut(&id).expect("its key was there");
            let now = self.now;
            match waits.get(&id) {
                Some((since, reasons)) => {
                    let due =
                        session.warned.map_or(now.since(*since) >= WARNING_FIRST, |w| now.since(w) >= WARNING_AGAIN);
                    if due && !reasons.is_empty() {
                        session.warned = Some(now);
                        let seconds = now.since(*since).as_secs();
                        let text = format!("{}: waits for {} since {seconds} s", session.name, in_words(reasons));
                        self.outputs.push_back(Output::Warning(text));
                    }
                    self.refresh(id);
                }
                None if session.warned.take().is_some() => {
                    let text = format!("{}: goes on", session.name);
                    self.outputs.push_back(Output::Warning(text));
                }
                None => {}
            }
        }
    }
}

/// What one server refuses that another one, or the same a little later, may grant.
fn another_may_do_better(refusal: Refusal) -> bool {
    use Refusal::{BadCopy, Busy, Damaged, NotReady, StaleMap, TooMany};
    matches!(refusal, StaleMap | NotReady | Busy | TooMany | BadCopy | Damaged)
}

/// `s2 (not ready yet), s3 (not connected)`.
fn in_words(reasons: &BTreeMap<ServerId, &'static str>) -> String {
    let words: Vec<String> = reasons.iter().map(|(server, reason)| format!("{server} ({reason})")).collect();
    words.join(", ")
}

/// Doubles from `RETRY_MIN` to `RETRY_MAX`, less up to a quarter, so that those who were refused
/// together do not come back together.
pub(super) fn backoff(tries: u32, prng: &mut Prng) -> Duration {
    let full = RETRY_MIN.saturating_mul(1 << tries.saturating_sub(1).min(16)).min(RETRY_MAX);
    full - full.mul_f64(prng.below(250) as f64 / 1000.0)
}
