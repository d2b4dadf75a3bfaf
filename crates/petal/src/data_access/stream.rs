//! One ordered stream per slot and receiver (2.6 step 3): the sending and the receiving end.
//!
//! A stream numbers its own messages, apart from the versions in them: n after n-1, nothing of an older
//! stream or term. A reconnect opens the next stream and resends what is not known stable, with the
//! same numbers, so that what arrives twice is known. Without the order, a late Replicate could bring
//! back old bytes that the element's version hides (docs/petal.md, "why streams").

use crate::ids::*;
use crate::message::{Part, Payload, Replicate};
use crate::store::Ticket;
use std::collections::VecDeque;

/// A message that the receiver has not reported stable.
#[derive(Debug)]
struct Sent {
    part: Part,
    data: Payload,
    cost: u64,
    /// Sequence of the write that waits for it.
    sequence: Option<u64>,
}

/// The sending end.
#[derive(Debug)]
pub struct Outgoing {
    stream: u64,
    /// Number of the first message in `unstable`.
    first: u64,
    unstable: VecDeque<Sent>,
    /// Blocks of all of them.
    cost: u64,
}

/// What an acknowledgement released.
#[derive(Debug, Default)]
pub struct Released {
    /// Blocks.
    pub cost: u64,
    /// Writes that this receiver has made stable.
    pub sequences: Vec<u64>,
}

impl Outgoing {
    /// An empty stream.
    pub fn new(stream: u64) -> Self {
        Outgoing { stream, first: 1, unstable: VecDeque::new(), cost: 0 }
    }

    /// Adds a message; the caller sends what comes back, if it is connected.
    pub fn push(
        &mut self,
        slot: SlotId,
        term: Term,
        watermark: Version,
        part: Part,
        data: Payload,
        sequence: Option<u64>,
    ) -> Replicate {
        let number = self.first + self.unstable.len() as u64;
        let cost = data.len() as u64 / BLOCK_SIZE;
        self.cost += cost;
        self.unstable.push_back(Sent { part: part.clone(), data: data.clone(), cost, sequence });
        Replicate { slot, term, stream: self.stream, number, watermark, part, data }
    }

    /// Everything up to `through` of this stream is stable at the receiver.
    pub fn on_stable(&mut self, stream: u64, through: u64) -> Released {
        let mut released = Released::default();
        // An acknowledgement of an older stream is as true as one of this: numbers keep their meaning.
        if stream > self.stream {
            return released;
        }
        while self.first <= through {
            let Some(sent) = self.unstable.pop_front() else { break };
            self.first += 1;
            self.cost -= sent.cost;
            released.cost += sent.cost;
            released.sequences.extend(sent.sequence);
        }
        released
    }

    /// The connection is new: the next stream, and everything that is not known stable, again.
    pub fn reopen(&mut self, stream: u64, slot: SlotId, term: Term, watermark: Version) -> Vec<Replicate> {
        assert!(stream > self.stream, "streams only go forward");
        self.stream = stream;
        let numbers = self.first..;
        numbers
            .zip(&self.unstable)
            .map(|(number, sent)| Replicate {
                slot,
                term,
                stream,
                number,
                watermark,
                part: sent.part.clone(),
                data: sent.data.clone(),
            })
            .collect()
    }

    /// Number of the first message that is not known stable.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Nothing is on its way.
    pub fn is_empty(&self) -> bool {
        self.unstable.is_empty()
    }

    /// Blocks on their way.
    pub fn cost(&self) -> u64 {
        self.cost
    }
}

/// The receiving end.
#[derive(Debug)]
pub struct Incoming {
    /// Who sends.
    pub from: ServerId,
    /// In which term.
    pub term: Term,
    stream: u64,
    /// Next number to arrive.
    next: u64,
    /// Arrived, not staged yet (an entry must be loaded first).
    pub arrived: VecDeque<Replicate>,
    /// Staged, not all stable: `first_pending` is the number of the first.
    pending: VecDeque<Pending>,
    first_pending: u64,
    /// The newest mark.
    mark: StateIndex,
}

#[derive(Debug)]
struct Pending {
    ticket: Option<Ticket>,
}

/// What to do with a message that arrived.
#[derive(Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It is in `arrived`.
    New,
    /// It came before; what is stable should be told again.
    Again,
    /// Of an older stream, or after a gap: nothing.
    Ignore,
}

impl Incoming {
    /// Nothing received yet in this term.
    pub fn new(from: ServerId, term: Term) -> Self {
        Incoming {
            from,
            term,
            stream: 0,
            next: 1,
            arrived: VecDeque::new(),
            pending: VecDeque::new(),
            first_pending: 1,
            mark: 0,
        }
    }

    /// The primary had applied this state index when it sent what comes from here on.
    pub fn note_mark(&mut self, state_index: StateIndex) {
        self.mark = self.mark.max(state_index);
    }

    /// The newest mark that came.
    pub fn mark(&self) -> StateIndex {
        self.mark
    }

    /// Takes a message in.
    pub fn accept(&mut self, message: Replicate, unordered: bool) -> Arrival {
        if unordered {
            self.stream = self.stream.max(message.stream);
            self.arrived.push_back(message);
            return Arrival::New;
        }
        if message.stream < self.stream {
            return Arrival::Ignore;
        }
        self.stream = message.stream;
        if message.number < self.next {
            return Arrival::Again;
        }
        if message.number > self.next {
            return Arrival::Ignore;
        }
        self.next += 1;
        self.arrived.push_back(message);
        Arrival::New
    }

    /// The message at the front of `arrived` was staged; `None` if nothing of it must become stable.
    pub fn staged(&mut self, ticket: Option<Ticket>) {
        self.pending.push_back(Pending { ticket });
    }

    /// A ticket is stable; true if the stream got on.
    pub fn on_stable(&mut self, number: u64) -> bool {
        if let Some(p) = number.checked_sub(self.first_pending).and_then(|i| self.pending.get_mut(i as usize)) {
            p.ticket = None;
        }
        self.advance()
    }

    /// Passes over everything at the front that is stable; true if there was something.
    pub fn advance(&mut self) -> bool {
        let before = self.first_pending;
        while self.pending.front().is_some_and(|p| p.ticket.is_none()) {
            self.pending.pop_front();
            self.first_pending += 1;
        }
        before != self.first_pending
    }

    /// Number that the next staged message has.
    pub fn next_staged(&self) -> u64 {
        self.first_pending + self.pending.len() as u64
    }

    /// Everything up to this number is stable.
    pub fn through(&self) -> u64 {
        self.first_pending - 1
    }

    /// The present stream.
    pub fn stream(&self) -> u64 {
        self.stream
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: SlotId = SlotId { gmap: GmapId(1), slot: 0 };

    fn skip(out: &mut Outgoing, n: u64) -> Replicate {
        let version = Version { term: 5, sequence: n };
        out.push(SLOT, 5, Version::ZERO, Part::Skip { version }, Payload::default(), Some(n))
    }

    #[test]
    fn a_reconnect_resends_what_is_not_known_stable_under_the_same_numbers() {
        let mut out = Outgoing::new(1);
        let sent: Vec<_> = (1..=3).map(|n| skip(&mut out, n)).collect();
        assert_eq!(sent.iter().map(|r| r.number).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(out.on_stable(1, 1).sequences, [1]);
        let again = out.reopen(2, SLOT, 5, Version::ZERO);
        assert_eq!(again.iter().map(|r| (r.stream, r.number)).collect::<Vec<_>>(), [(2, 2), (2, 3)]);
        assert_eq!(out.on_stable(2, 3).sequences, [2, 3]);
        assert!(out.is_empty());
    }

    #[test]
    fn what_arrives_twice_or_out_of_order_is_not_taken() {
        let mut out = Outgoing::new(1);
        let sent: Vec<_> = (1..=3).map(|n| skip(&mut out, n)).collect();
        let mut incoming = Incoming::new(ServerId(1), 5);
        assert_eq!(incoming.accept(sent[0].clone(), false), Arrival::New);
        assert_eq!(incoming.accept(sent[2].clone(), false), Arrival::Ignore);
        let again = out.reopen(2, SLOT, 5, Version::ZERO);
        assert_eq!(incoming.accept(again[0].clone(), false), Arrival::Again);
        assert_eq!(incoming.accept(again[1].clone(), false), Arrival::New);
        assert_eq!(incoming.accept(sent[2].clone(), false), Arrival::Ignore, "an older stream");
        assert_eq!(incoming.accept(again[2].clone(), false), Arrival::New);
    }

    #[test]
    fn stability_is_told_as_a_prefix() {
        let mut out = Outgoing::new(1);
        let mut incoming = Incoming::new(ServerId(1), 5);
        for n in 1..=3 {
            incoming.accept(skip(&mut out, n), false);
            incoming.arrived.pop_front();
            incoming.staged(Some(n));
        }
        assert!(!incoming.on_stable(2));
        assert_eq!(incoming.through(), 0);
        assert!(incoming.on_stable(1));
        assert_eq!(incoming.through(), 2);
    }
}
