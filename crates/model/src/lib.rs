//! One slot's protocol as a small model: promise, settlement, watermark, InSync, leases, TakeOut.
//!
//! The simulator runs the shipped code and meets what its seeds draw. This model is not the shipped code: it is the
//! rules of docs/petal.md once more, so small that *every* run of it can be looked at (`tests/exhaustive.rs`, with
//! stateright): three servers, a few writes, a few faults, every order in which messages arrive, log entries are
//! applied, leases end and servers die. What it shows is that the rules are enough, and, by leaving them out one at a
//! time ([`Rule`]), that none of them is idle.
//!
//! How it is made small:
//! * The ring is one log that decides at once; every server applies its entries one by one, as late as it likes.
//! * A connection is a queue in order. What a server has on its way to its own disk is a queue to itself. What has
//!   arrived at a replica is stable there; what is not yet is still in the queue.
//! * A lease is a bit. It is held while the log's end has nothing against its holder and the holder has applied every
//!   entry that names it; from then on it is held until it ends, at any moment ([`Action::Expire`]).
//! * Recovery's own steps (list, copy, propose) are taken as soon as they can be; the messages between them are not.
//! * Clients are not fenced. So it cannot be seen here why a secondary serves nothing before its term is settled.
//! * Left out: several blocks in an element, request ids, reconnecting streams, the ring itself, disks that lose data.
//!
//! Invariants: those of [`State::complaint`].

/// Servers of the cluster, all members of the slot or not ([`Config::copies`]).
pub const SERVERS: usize = 3;
/// Elements of the slot.
pub const ELEMENTS: usize = 2;

/// A set of servers, or of elements: bit i is number i.
type Set = u8;

/// A rule that is left out.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Rule {
    /// None: the protocol as it is meant.
    None,
    /// A write waits for every in-sync replica (I5).
    AckBeforeSecondary,
    /// What was in flight at a change of term is made equal before it is served (I7).
    NoSettlement,
    /// Nothing of an older term is accepted once a newer one is promised.
    NoPromise,
    /// A secondary serves nothing above its watermark.
    ServeBusy,
    /// `InSync` is for one term and one life (I4).
    InSyncUnconditional,
    /// Writes wait for a member that is proposed to be in sync (I4).
    NewcomerNotCounted,
    /// All that was ever sent to a member is stable there before it is proposed (I4).
    SendsOutstanding,
    /// What a member has above its watermark is stale, too.
    SurvivorsListOnly,
    /// What is stale is replaced, whichever version is higher.
    CopyOnlyIfNewer,
    /// Only an in-sync replica moves its watermark.
    WatermarkWhileOut,
    /// `ServerDown` comes when every lease is surely over.
    DownWithinLease,
    /// Nothing new is served while who was taken out may still hold a lease.
    TakeOutWithoutWait,
    /// An in-sync set is never empty (I3): members that are down leave it only where a live one stays.
    LastMemberLeaves,
}

/// How much happens.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Members of the slot, 2 or 3.
    pub copies: usize,
    /// Writes.
    pub writes: u8,
    /// Servers that die.
    pub crashes: u8,
    /// Suspicions.
    pub suspicions: u8,
    /// `TakeOut`s.
    pub take_outs: u8,
    /// The rule that is left out.
    pub without: Rule,
}

/// What the data is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Version {
    term: u8,
    sequence: u8,
}

/// An element's content: the write that made it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Image {
    version: Version,
    value: u8,
}

type Images = [Image; ELEMENTS];

/// The global state after an entry of the log.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Global {
    term: u8,
    in_sync: Set,
    down: Set,
    suspected: Set,
    incarnation: [u8; SERVERS],
    /// The last entry that names each server.
    named: [u8; SERVERS],
    /// The entry that took each out of the slot by `TakeOut`, 0 for none.
    taken_out: [u8; SERVERS],
}

impl Global {
    fn is(&self, set: Set, server: usize) -> bool {
        set & 1 << server != 0
    }

    fn is_live(&self, server: usize) -> bool {
        (self.down | self.suspected) & 1 << server == 0
    }

    /// The first in-sync member that is not down, suspected or not.
    fn who_acts(&self) -> Option<usize> {
        (0..SERVERS).find(|s| self.is(self.in_sync & !self.down, *s))
    }
}

/// Messages. Those of a stream are answered by `Ack`, in order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Message {
    Promise { term: u8 },
    Promised { term: u8, watermark: Version, images: Images },
    Write { term: u8, element: usize, image: Image, watermark: Version },
    Copy { term: u8, element: usize, image: Image },
    SettlementDone { term: u8 },
    CaughtUp { term: u8, watermark: Version },
    Ack { term: u8 },
}

impl Message {
    fn term(&self) -> u8 {
        match *self {
            Message::Promise { term }
            | Message::Promised { term, .. }
            | Message::Write { term, .. }
            | Message::Copy { term, .. }
            | Message::SettlementDone { term }
            | Message::CaughtUp { term, .. }
            | Message::Ack { term } => term,
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Phase {
    Promising { promised: [Option<(Version, Images)>; SERVERS] },
    Settling,
    Serving,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Unfinished {
    sequence: u8,
    element: usize,
    image: Image,
    waits: Set,
}

/// A member that is brought back.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Joiner {
    /// `None` until it has promised: the elements that are not copied yet.
    stale: Option<Set>,
    /// It was told that it has everything; writes wait for it from then on.
    counts: bool,
    proposed: bool,
}

/// A primary's state in one term.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Acting {
    phase: Phase,
    sequence: u8,
    unfinished: Vec<Unfinished>,
    /// What each other server has not acknowledged: of writes, the sequence.
    streams: [Vec<Option<u8>>; SERVERS],
    joiners: [Option<Joiner>; SERVERS],
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Server {
    is_up: bool,
    incarnation: u8,
    /// Entries of the log that it has applied.
    applied: u8,
    // ---- on its disk
    images: Images,
    durable_watermark: Version,
    // ---- in its memory
    watermark: Version,
    promised: u8,
    caught_up: Option<(u8, Version)>,
    acting: Option<Acting>,
}

/// A proposal that a member is in sync.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Proposal {
    server: usize,
    term: u8,
    incarnation: u8,
}

/// Everything.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct State {
    log: Vec<Global>,
    servers: Vec<Server>,
    queues: [[Vec<Message>; SERVERS]; SERVERS],
    /// Leases that are held although the log's end has something against their holders.
    held: Set,
    proposals: Vec<Proposal>,
    /// The newest write of each element that was acknowledged or shown.
    floor: Images,
    writes: u8,
    crashes: u8,
    suspicions: u8,
    take_outs: u8,
    /// Completed writes.
    acknowledged: u8,
}

/// A step.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(missing_docs)]
pub enum Action {
    /// A server applies the next entry of the log.
    Apply(usize),
    /// The first message of a queue arrives.
    Deliver {
        from: usize,
        to: usize,
    },
    /// A client writes.
    Write {
        primary: usize,
        element: usize,
    },
    /// A client reads, and is shown more than anybody was before.
    Read {
        server: usize,
        element: usize,
    },
    /// A primary's watermark is told.
    Tell {
        primary: usize,
        to: usize,
    },
    Crash(usize),
    /// It starts again; its `ServerUp` is decided.
    Start(usize),
    Suspect(usize),
    /// A lease that was not renewed ends.
    Expire(usize),
    Down(usize),
    Reinstate(usize),
    TakeOut {
        primary: usize,
        server: usize,
    },
    /// A proposal that a member is in sync is decided.
    Decide(usize),
}

impl Config {
    /// The beginning: everybody is up and in sync, the first term is served, nothing is written.
    pub fn first(&self) -> State {
        let members = (1 << self.copies) - 1;
        let global = Global {
            term: 0,
            in_sync: members,
            down: 0,
            suspected: 0,
            incarnation: [0; SERVERS],
            named: [0; SERVERS],
            taken_out: [0; SERVERS],
        };
        let server = Server {
            is_up: true,
            incarnation: 0,
            applied: 0,
            images: Images::default(),
            durable_watermark: Version::default(),
            watermark: Version::default(),
            promised: 0,
            caught_up: None,
            acting: None,
        };
        let mut servers = vec![server; SERVERS];
        servers[0].acting = Some(Acting { phase: Phase::Serving, ..Acting::new() });
        State {
            log: vec![global],
            servers,
            queues: Default::default(),
            held: (1 << SERVERS) - 1,
            proposals: Vec::new(),
            floor: Images::default(),
            writes: self.writes,
            crashes: self.crashes,
            suspicions: self.suspicions,
            take_outs: self.take_outs,
            acknowledged: 0,
        }
    }

    fn is_member(&self, server: usize) -> bool {
        server < self.copies
    }

    /// What can happen.
    pub fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let end = state.end();
        for (server, s) in state.servers.iter().enumerate() {
            if s.is_up {
                if usize::from(s.applied) + 1 < state.log.len() {
                    actions.push(Action::Apply(server));
                }
                if state.crashes > 0 && self.is_member(server) {
                    actions.push(Action::Crash(server));
                }
                self.actions_of(state, server, actions);
            } else {
                actions.push(Action::Start(server));
            }
            if state.held & 1 << server != 0 && !state.is_renewed(server) {
                actions.push(Action::Expire(server));
            }
            if end.is_live(server) && state.suspicions > 0 && self.is_member(server) {
                actions.push(Action::Suspect(server));
            }
            if end.is(end.suspected & !end.down, server) {
                if state.held & 1 << server == 0 || self.without == Rule::DownWithinLease {
                    actions.push(Action::Down(server));
                }
                if s.is_up && s.incarnation == end.incarnation[server] && s.applied >= end.named[server] {
                    actions.push(Action::Reinstate(server));
                }
            }
        }
        for (from, queues) in state.queues.iter().enumerate() {
            for (to, queue) in queues.iter().enumerate() {
                // A promise is given when everything that was accepted before is stable.
                let waits = matches!(queue.first(), Some(Message::Promise { .. })) && !state.queues[to][to].is_empty();
                if !queue.is_empty() && !waits {
                    actions.push(Action::Deliver { from, to });
                }
            }
        }
        actions.extend((0..state.proposals.len()).map(Action::Decide));
    }

    fn actions_of(&self, state: &State, server: usize, actions: &mut Vec<Action>) {
        let s = &state.servers[server];
        let known = state.known(server);
        for element in 0..ELEMENTS {
            if self.reads(state, server, element).is_some_and(|image| image.version > state.floor[element].version) {
                actions.push(Action::Read { server, element });
            }
        }
        let Some(acting) = &s.acting else { return };
        for other in (0..SERVERS).filter(|o| *o != server && self.is_member(*o)) {
            let waits = !acting.streams[other].is_empty() || matches!(acting.phase, Phase::Promising { .. });
            if state.take_outs > 0 && waits && known.is(known.in_sync, other) && state.end().term == known.term {
                actions.push(Action::TakeOut { primary: server, server: other });
            }
        }
        if acting.phase != Phase::Serving {
            return;
        }
        for element in 0..ELEMENTS {
            let is_free = acting.unfinished.iter().all(|u| u.element != element);
            if state.writes > 0 && state.has_lease(server) && is_free {
                actions.push(Action::Write { primary: server, element });
            }
        }
        for to in (0..SERVERS).filter(|to| *to != server && state.servers[*to].is_up && self.is_member(*to)) {
            let other = &state.servers[to];
            let moves = known.is(known.in_sync, to) || self.without == Rule::WatermarkWhileOut;
            if state.known(to).term == known.term && moves && other.watermark < s.watermark {
                actions.push(Action::Tell { primary: server, to });
            }
        }
    }

    /// What a read at this server would be answered with now.
    fn reads(&self, state: &State, server: usize, element: usize) -> Option<Image> {
        let s = &state.servers[server];
        let known = state.known(server);
        if !s.is_up || !state.is_of_this_life(server) || !state.has_lease(server) || !known.is(known.in_sync, server) {
            return None;
        }
        let image = s.images[element];
        if known.who_acts() == Some(server) {
            let acting = s.acting.as_ref().filter(|a| a.phase == Phase::Serving)?;
            return acting.unfinished.iter().all(|u| u.element != element).then_some(image);
        }
        let is_settled = s.watermark.term >= known.term;
        let is_busy = image.version > s.watermark && self.without != Rule::ServeBusy;
        (is_settled && !is_busy).then_some(image)
    }

    /// The state after a step.
    pub fn next(&self, before: &State, action: Action) -> State {
        let mut state = before.clone();
        match action {
            Action::Apply(server) => self.apply(&mut state, server),
            Action::Deliver { from, to } => {
                let message = state.queues[from][to].remove(0);
                self.deliver(&mut state, from, to, message);
            }
            Action::Write { primary, element } => self.write(&mut state, primary, element),
            Action::Read { server, element } => state.floor[element] = state.servers[server].images[element],
            Action::Tell { primary, to } => state.servers[to].watermark = state.servers[primary].watermark,
            Action::Crash(server) => {
                state.crashes -= 1;
                state.die(server);
            }
            Action::Start(server) => self.start(&mut state, server),
            Action::Suspect(server) => {
                state.suspicions -= 1;
                state.decide(&[server], |g| g.suspected |= 1 << server);
            }
            Action::Expire(server) => state.held &= !(1 << server),
            Action::Down(server) => {
                state.decide(&[server], |g| g.down |= 1 << server);
                self.renew_term(&mut state, Some(server));
            }
            Action::Reinstate(server) => {
                state.decide(&[server], |g| g.suspected &= !(1 << server));
                self.renew_term(&mut state, None);
            }
            Action::TakeOut { server, .. } => self.take_out(&mut state, server),
            Action::Decide(proposal) => self.in_sync(&mut state, proposal),
        }
        for server in 0..SERVERS {
            self.go_on(&mut state, server);
        }
        for server in 0..SERVERS {
            if state.is_renewed(server) {
                state.held |= 1 << server;
            }
        }
        state
    }

    // --------------------------------------------------------------------------------------------
    // The log.

    /// Members that are down leave the in-sync set where a live one stays; a slot whose set changed, or in which an
    /// in-sync member was started or taken down, has a new term.
    fn renew_term(&self, state: &mut State, touched: Option<usize>) {
        let index = state.index();
        let g = state.log.last_mut().expect("never empty");
        let mut renewed = touched.is_some_and(|s| g.is(g.in_sync, s));
        let a_live_one_stays = (0..SERVERS).any(|s| g.is(g.in_sync, s) && g.is_live(s));
        let left = g.in_sync & !g.down;
        if (a_live_one_stays || self.without == Rule::LastMemberLeaves) && left != g.in_sync {
            g.in_sync = left;
            renewed = true;
        }
        // With the rule left out somebody must act nevertheless: whoever is there.
        if g.in_sync == 0 {
            g.in_sync = (0..self.copies).map(|s| 1 << s).find(|s| s & g.down == 0).unwrap_or(0);
        }
        if renewed {
            g.term = index;
        }
    }

    fn start(&self, state: &mut State, server: usize) {
        for other in 0..SERVERS {
            state.queues[server][other].clear();
            state.queues[other][server].clear();
        }
        state.decide(&[server], |g| {
            g.incarnation[server] += 1;
            g.down &= !(1 << server);
            g.suspected &= !(1 << server);
            g.taken_out[server] = 0;
        });
        self.renew_term(state, Some(server));
        let (index, incarnation) = (state.index(), state.end().incarnation[server]);
        let s = &mut state.servers[server];
        (s.is_up, s.incarnation, s.watermark) = (true, incarnation, s.durable_watermark);
        // It acts when it has applied its own ServerUp.
        s.applied = index - 1;
        self.apply(state, server);
    }

    fn take_out(&self, state: &mut State, server: usize) {
        state.take_outs -= 1;
        let end = state.end();
        if !(0..SERVERS).any(|s| s != server && end.is(end.in_sync, s) && end.is_live(s)) {
            return;
        }
        let index = state.index() + 1;
        let members: Vec<usize> = (0..self.copies).collect();
        state.decide(&members, |g| {
            g.in_sync &= !(1 << server);
            g.taken_out[server] = index;
            g.term = index;
        });
    }

    fn in_sync(&self, state: &mut State, proposal: usize) {
        let Proposal { server, term, incarnation } = state.proposals.remove(proposal);
        let end = state.end();
        let is_as_proposed = end.term == term && end.incarnation[server] == incarnation;
        let is_allowed = is_as_proposed || self.without == Rule::InSyncUnconditional;
        if !is_allowed || !end.is_live(server) || end.is(end.in_sync, server) {
            return;
        }
        let index = state.index() + 1;
        let members: Vec<usize> = (0..self.copies).collect();
        state.decide(&members, |g| {
            g.in_sync |= 1 << server;
            g.term = index;
        });
    }

    /// A server applies the next entry.
    fn apply(&self, state: &mut State, server: usize) {
        let old = state.known(server).clone();
        state.servers[server].applied += 1;
        let new = state.known(server).clone();
        let s = &mut state.servers[server];
        if new.is(new.down, server) && new.incarnation[server] == s.incarnation {
            return state.die(server); // It begins a new life.
        }
        if let Some(acting) = &mut s.acting {
            for other in (0..SERVERS).filter(|o| old.incarnation[*o] != new.incarnation[*o]) {
                acting.joiners[other] = None;
                acting.streams[other].clear();
            }
        }
        if new.term != old.term || s.incarnation != old.incarnation[server] {
            s.acting = None;
            if let Some((term, watermark)) = s.caught_up.take()
                && term == old.term
                && !old.is(old.in_sync, server)
                && new.is(new.in_sync, server)
            {
                s.watermark = s.watermark.max(watermark);
            }
            if new.who_acts() == Some(server) && new.incarnation[server] == s.incarnation {
                s.promised = new.term;
                s.acting = Some(Acting::new());
                for other in (0..SERVERS).filter(|o| *o != server && new.is(new.in_sync, *o)) {
                    state.send(server, other, Message::Promise { term: new.term });
                }
            }
        }
    }

    // --------------------------------------------------------------------------------------------
    // Data access.

    fn write(&self, state: &mut State, primary: usize, element: usize) {
        let known = state.known(primary).clone();
        let value = self.writes - state.writes + 1;
        state.writes -= 1;
        let watermark = state.servers[primary].watermark;
        let acting = state.servers[primary].acting.as_mut().expect("only who acts writes");
        acting.sequence += 1;
        let sequence = acting.sequence;
        let image = Image { version: Version { term: known.term, sequence }, value };
        let message = Message::Write { term: known.term, element, image, watermark };
        let mut waits = 1 << primary;
        let mut receivers = vec![primary];
        for other in (0..SERVERS).filter(|o| *o != primary) {
            let joiner = acting.joiners[other].as_ref();
            let gets = joiner.and_then(|j| j.stale).is_some_and(|stale| stale & 1 << element == 0);
            let counts = joiner.is_some_and(|j| j.counts) && self.without != Rule::NewcomerNotCounted;
            if known.is(known.in_sync, other) || gets {
                acting.streams[other].push(Some(sequence));
                receivers.push(other);
            }
            if known.is(known.in_sync, other) || counts {
                waits |= 1 << other;
            }
        }
        if self.without == Rule::AckBeforeSecondary {
            waits = 1 << primary;
        }
        acting.unfinished.push(Unfinished { sequence, element, image, waits });
        for receiver in receivers {
            state.send(primary, receiver, message);
        }
    }

    fn deliver(&self, state: &mut State, from: usize, to: usize, message: Message) {
        // Who knows less than the sender catches up before it acts.
        while state.servers[to].is_up && state.servers[to].applied < message.term() {
            self.apply(state, to);
        }
        if !state.servers[to].is_up {
            return;
        }
        let known = state.known(to).clone();
        let is_present = message.term() == known.term;
        let is_in_sync = known.is(known.in_sync, to);
        let s = &mut state.servers[to];
        match message {
            Message::Promise { term } if is_present && known.who_acts() == Some(from) => {
                s.promised = term;
                let promised = Message::Promised { term, watermark: s.watermark, images: s.images };
                state.send(to, from, promised);
            }
            Message::Promised { watermark, images, .. } if is_present => {
                let Some(acting) = &mut s.acting else { return };
                if let Some(joiner) = &mut acting.joiners[from] {
                    let mut stale = 0;
                    for (element, (mine, theirs)) in s.images.iter().zip(&images).enumerate() {
                        let newer_there = theirs.version > watermark && self.without != Rule::SurvivorsListOnly;
                        let in_flight = acting.unfinished.iter().any(|u| u.element == element);
                        if mine.version > watermark || newer_there || in_flight {
                            stale |= 1 << element;
                        }
                        if self.without == Rule::CopyOnlyIfNewer && theirs.version >= mine.version && !in_flight {
                            stale &= !(1 << element);
                        }
                    }
                    joiner.stale = Some(stale);
                } else if let Phase::Promising { promised } = &mut acting.phase {
                    promised[from] = Some((watermark, images));
                }
            }
            Message::Write { term, element, image, watermark } => {
                let is_own = from == to;
                let is_right = is_present && known.who_acts() == Some(from) && term >= s.promised;
                if !is_own && !is_right && self.without != Rule::NoPromise {
                    return;
                }
                s.images[element] = image;
                if !is_own && (is_in_sync || self.without == Rule::WatermarkWhileOut) {
                    s.watermark = s.watermark.max(watermark);
                }
                s.durable_watermark = s.durable_watermark.max(s.watermark);
                match is_own {
                    true => state.stable(to, to, term, Some(image.version.sequence)),
                    false => state.send(to, from, Message::Ack { term }),
                }
            }
            Message::Copy { term, element, image } if is_present && known.who_acts() == Some(from) => {
                s.images[element] = image;
                s.durable_watermark = s.durable_watermark.max(s.watermark);
                state.send(to, from, Message::Ack { term });
            }
            Message::SettlementDone { term } if is_present && known.who_acts() == Some(from) => {
                s.watermark = s.watermark.max(Version { term, sequence: 0 });
                s.durable_watermark = s.durable_watermark.max(s.watermark);
                state.send(to, from, Message::Ack { term });
            }
            Message::CaughtUp { term, watermark } if is_present && known.who_acts() == Some(from) => {
                s.caught_up = Some((term, watermark));
                state.send(to, from, Message::Ack { term });
            }
            Message::Ack { term } if is_present => {
                let Some(acting) = &mut s.acting else { return };
                if !acting.streams[from].is_empty() {
                    let sequence = acting.streams[from].remove(0);
                    state.stable(to, from, term, sequence);
                }
            }
            _ => {} // Of an older term, or from somebody who does not act any more.
        }
    }

    /// What a server does by itself as soon as it can.
    fn go_on(&self, state: &mut State, server: usize) {
        if !state.servers[server].is_up || state.servers[server].acting.is_none() {
            return;
        }
        self.settle(state, server);
        self.settled(state, server);
        self.complete(state, server);
        self.bring_back(state, server);
    }

    /// All have promised: of each element that some member has above the lowest watermark the highest version wins.
    fn settle(&self, state: &mut State, server: usize) {
        if !state.queues[server][server].is_empty() {
            return; // What was staged in older terms.
        }
        let known = state.known(server).clone();
        let s = &mut state.servers[server];
        let acting = s.acting.as_mut().expect("checked");
        let Phase::Promising { promised } = &mut acting.phase else { return };
        promised[server] = Some((s.watermark, s.images));
        let promised = *promised;
        let members: Vec<usize> = (0..SERVERS).filter(|m| known.is(known.in_sync, *m)).collect();
        if members.iter().any(|m| promised[*m].is_none()) {
            return;
        }
        acting.phase = Phase::Settling;
        if self.without == Rule::NoSettlement {
            return;
        }
        let told = |m: usize| promised[m].expect("all have promised");
        let lowest = members.iter().map(|m| told(*m).0).min().expect("its own at least");
        for element in 0..ELEMENTS {
            let listed = |m: &usize| Some(told(*m).1[element]).filter(|image| image.version > lowest);
            let Some(winner) = members.iter().filter_map(listed).max() else { continue };
            state.servers[server].images[element] = winner;
            for other in members.iter().filter(|m| **m != server && listed(m) != Some(winner)) {
                let acting = state.servers[server].acting.as_mut().expect("checked");
                acting.streams[*other].push(None);
                state.send(server, *other, Message::Copy { term: known.term, element, image: winner });
            }
        }
    }

    /// Everything is equal: the slot is served, if nobody may still serve what was before.
    fn settled(&self, state: &mut State, server: usize) {
        let known = state.known(server).clone();
        let acting = state.servers[server].acting.as_ref().expect("checked");
        let is_equal = acting.phase == Phase::Settling && acting.streams.iter().all(Vec::is_empty);
        let may_serve_old = |other: usize| {
            let at = known.taken_out[other];
            let of_this_life = known.incarnation[other] == state.servers[other].incarnation;
            at > 0 && of_this_life && state.servers[other].applied < at && state.has_lease(other)
        };
        let waits = (0..SERVERS).any(may_serve_old) && self.without != Rule::TakeOutWithoutWait;
        if !is_equal || waits {
            return;
        }
        let s = &mut state.servers[server];
        s.watermark = s.watermark.max(Version { term: known.term, sequence: 0 });
        s.durable_watermark = s.watermark;
        let acting = s.acting.as_mut().expect("checked");
        acting.phase = Phase::Serving;
        for other in (0..SERVERS).filter(|o| *o != server && known.is(known.in_sync, *o)) {
            state.servers[server].acting.as_mut().expect("checked").streams[other].push(None);
            state.send(server, other, Message::SettlementDone { term: known.term });
        }
    }

    /// Writes that are stable everywhere are acknowledged, with a lease.
    fn complete(&self, state: &mut State, server: usize) {
        if !state.has_lease(server) {
            return;
        }
        let term = state.known(server).term;
        let s = &mut state.servers[server];
        let acting = s.acting.as_mut().expect("checked");
        let (done, rest): (Vec<_>, Vec<_>) = acting.unfinished.drain(..).partition(|u| u.waits == 0);
        acting.unfinished = rest;
        for u in done {
            state.floor[u.element] = state.floor[u.element].max(u.image);
            state.acknowledged += 1;
        }
        if acting.phase == Phase::Serving {
            let sequence = acting.unfinished.iter().map(|u| u.sequence - 1).min().unwrap_or(acting.sequence);
            s.watermark = s.watermark.max(Version { term, sequence });
        }
    }

    /// Recovery, of every member that is up and not in sync.
    fn bring_back(&self, state: &mut State, server: usize) {
        let known = state.known(server).clone();
        for other in (0..self.copies).filter(|o| *o != server && !known.is(known.in_sync | known.down, *o)) {
            let (images, watermark) = (state.servers[server].images, state.servers[server].watermark);
            // Only with the life that the connection belongs to: what an earlier one said must not count for it.
            let is_there = state.servers[other].is_up
                && state.servers[other].incarnation == known.incarnation[other]
                && known.is_live(other);
            let acting = state.servers[server].acting.as_mut().expect("checked");
            if acting.phase != Phase::Serving || !is_there {
                continue;
            }
            let Some(joiner) = &mut acting.joiners[other] else {
                acting.joiners[other] = Some(Joiner { stale: None, counts: false, proposed: false });
                state.send(server, other, Message::Promise { term: known.term });
                continue;
            };
            let Some(stale) = &mut joiner.stale else { continue };
            let mut messages = Vec::new();
            for (element, image) in images.iter().enumerate() {
                let is_free = acting.unfinished.iter().all(|u| u.element != element);
                if *stale & 1 << element != 0 && is_free {
                    *stale &= !(1 << element);
                    messages.push(Message::Copy { term: known.term, element, image: *image });
                }
            }
            if *stale == 0 && !joiner.counts {
                joiner.counts = true;
                messages.push(Message::CaughtUp { term: known.term, watermark });
            }
            acting.streams[other].extend(messages.iter().map(|_| None));
            let is_stable = acting.streams[other].is_empty() || self.without == Rule::SendsOutstanding;
            if joiner.counts && is_stable && !joiner.proposed {
                joiner.proposed = true;
                let incarnation = known.incarnation[other];
                state.proposals.push(Proposal { server: other, term: known.term, incarnation });
            }
            for message in messages {
                state.send(server, other, message);
            }
        }
    }

    /// What is wrong with a state.
    pub fn complaint(&self, state: &State) -> Option<&'static str> {
        let end = state.end();
        for element in 0..ELEMENTS {
            let floor = state.floor[element];
            for server in 0..SERVERS {
                if self.reads(state, server, element).is_some_and(|image| image < floor) {
                    return Some("an old value can be read");
                }
                if end.is(end.in_sync, server) && state.servers[server].images[element] < floor {
                    return Some("an in-sync member lacks what was acknowledged or shown");
                }
            }
        }
        if end.in_sync == 0 {
            return Some("nobody is in sync");
        }
        let acts = |s: &usize| {
            let acting = state.servers[*s].acting.as_ref();
            acting.is_some_and(|a| a.phase == Phase::Serving) && state.servers[*s].is_up && state.has_lease(*s)
        };
        ((0..SERVERS).filter(acts).count() > 1).then_some("two servers act")
    }
}

impl Acting {
    fn new() -> Acting {
        Acting {
            phase: Phase::Promising { promised: [None; SERVERS] },
            sequence: 0,
            unfinished: Vec::new(),
            streams: Default::default(),
            joiners: Default::default(),
        }
    }
}

impl State {
    fn end(&self) -> &Global {
        self.log.last().expect("never empty")
    }

    fn index(&self) -> u8 {
        self.log.len() as u8 - 1
    }

    /// The global state as a server knows it.
    fn known(&self, server: usize) -> &Global {
        &self.log[usize::from(self.servers[server].applied)]
    }

    fn is_of_this_life(&self, server: usize) -> bool {
        self.known(server).incarnation[server] == self.servers[server].incarnation
    }

    /// The ring goes on granting.
    fn is_renewed(&self, server: usize) -> bool {
        let (end, s) = (self.end(), &self.servers[server]);
        let is_present = s.is_up && s.incarnation == end.incarnation[server];
        is_present && end.is_live(server) && s.applied >= end.named[server]
    }

    fn has_lease(&self, server: usize) -> bool {
        self.held & 1 << server != 0
    }

    fn decide(&mut self, named: &[usize], change: impl FnOnce(&mut Global)) {
        let mut global = self.end().clone();
        self.log.push(global.clone());
        for server in named {
            global.named[*server] = self.index();
        }
        change(&mut global);
        *self.log.last_mut().expect("just pushed") = global;
    }

    fn send(&mut self, from: usize, to: usize, message: Message) {
        if self.servers[to].is_up {
            self.queues[from][to].push(message);
        }
    }

    /// What is in memory is gone, and what was on its way to it or to its disk.
    fn die(&mut self, server: usize) {
        for from in 0..SERVERS {
            self.queues[from][server].clear();
        }
        let s = &mut self.servers[server];
        (s.is_up, s.promised, s.caught_up, s.acting) = (false, 0, None, None);
        self.held &= !(1 << server);
    }

    /// A write of a primary is stable somewhere.
    fn stable(&mut self, primary: usize, at: usize, term: u8, sequence: Option<u8>) {
        let is_present = self.known(primary).term == term;
        let Some(acting) = self.servers[primary].acting.as_mut().filter(|_| is_present) else { return };
        for u in acting.unfinished.iter_mut().filter(|u| Some(u.sequence) == sequence) {
            u.waits &= !(1 << at);
        }
    }

    /// So many writes were acknowledged.
    pub fn acknowledged(&self) -> u8 {
        self.acknowledged
    }

    /// A member left, and is in sync again in a later term.
    pub fn has_come_back(&self, server: usize) -> bool {
        let was_out = self.log.iter().any(|g| !g.is(g.in_sync, server));
        was_out && self.end().is(self.end().in_sync, server)
    }
}
