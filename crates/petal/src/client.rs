//! The client of the data path, stepped: hints, splitting, routing, windows, retries, sessions.
//!
//! ```text
//!   Request --admit--> pieces, one operation per element --route--> a server's window --> Send
//!      ^                       ^  |  refused, server gone: again, elsewhere or later        |
//!      |                       |  +-- StaleMap, newer need: fetch hints --+                 v
//!    Reply <-- all operations done <------------- checked answer <------------------------ Message
//! ```
//!
//! Why: a server answers for single elements of slots in which it has a right to; everything that
//! makes a disk of that is here, in one place for every front end (design 2.11).
//!
//! How it fails: it does not. A server that is away holds up the operations that need it, with a
//! warning for people, until it is back or the deadline that the caller configured passes. Refusals
//! that trying again cannot cure are the request's error, after all its operations came to an end.
//!
//! Invariants:
//! * I6, this end of it: a write keeps its number however often and wherever it is sent; a number is
//!   used once; `finished_below` never falls, and never passes a number that may be sent again.
//! * The highest need heard of is merged before a request is answered, and sent with every operation.
//! * At most `CLIENT_WINDOW` operations are outstanding at one server, and `CLIENT_BYTES_MAX` bytes
//!   of requests are worked on; the rest waits in order.
//!
//! Paper: section 2.1 (clients hold hints), 2.3 (read balancing). Read next: `operations.rs` (one
//! element), `walk.rs` (huge ranges), `management.rs` (calls, attach, detach), `session.rs`, `link.rs`,
//! `split.rs`; `hedges.rs` (reads that are asked of two copies).

mod hedges;
mod link;
mod management;
mod operations;
mod session;
mod split;
#[cfg(test)]
mod tests;
mod walk;

use crate::global_state::{Attachment, Command};
use crate::ids::*;
use crate::limits::*;
use crate::message::{AdminError, AdminRequest, AdminResponse, Body, Message, Refusal, Tag};
use bytes::Bytes;
use hedges::Hedges;
use link::Link;
use management::Call;
use operations::{Operation, Operations, Task};
use session::{Numbers, Session};
use split::{Pieces, pieces};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use stdx::{Duration, Instant, Machine, Prng};
use walk::Walk;

/// Number of a request, given by the caller.
pub type RequestNumber = u64;

/// What can be asked of a disk or the cluster.
#[derive(Clone, Debug)]
pub enum Request {
    /// A management call, to any server; tried at another one if the connection breaks. The client's
    /// own deadline holds.
    Admin(AdminRequest),
    /// A management call with a deadline of its own, to one server or to any.
    Call {
        /// `None`: any. `Some`: this one, and no other.
        to: Option<ServerId>,
        /// What.
        request: AdminRequest,
        /// `None`: for ever.
        deadline: Option<Duration>,
    },
    /// A command of this client, executed once however often it has to be sent; answered with
    /// `Response::Admin(AdminResponse::Executed)`.
    Execute {
        /// What.
        command: Command,
        /// How long to wait until it is decided and settled.
        deadline: Duration,
    },
    /// Attach a disk by name; answered with `Response::Attached`.
    Attach {
        /// Name of the disk.
        name: String,
        /// How.
        mode: Attachment,
        /// Who, in words for people.
        holder: String,
        /// End the sessions that are in the way.
        take_over: bool,
    },
    /// Asks for the disk as it is now (its size may have changed); answered with `Response::Attached`.
    Refresh {
        /// The session.
        session: SessionId,
    },
    /// End a session, after its requests in flight.
    Detach {
        /// The session.
        session: SessionId,
    },
    /// Read bytes.
    Read {
        /// The session.
        session: SessionId,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Write bytes.
    Write {
        /// The session.
        session: SessionId,
        /// Byte offset.
        offset: u64,
        /// The bytes.
        data: Bytes,
    },
    /// Make bytes zero. A large range costs by what exists, not by its length.
    Zero {
        /// The session.
        session: SessionId,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Discard: bytes of partly covered blocks may be kept.
        discard: bool,
    },
    /// Which ranges hold data. Where the answer would be long it is about the first part only.
    Extents {
        /// The session.
        session: SessionId,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Another disk or snapshot of the family: then which ranges differ from it.
        than: Option<VdiskId>,
    },
}

/// Answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// `Admin`.
    Admin(AdminResponse),
    /// `Attach`, `Refresh`.
    Attached {
        /// The session.
        session: SessionId,
        /// The disk.
        vdisk: VdiskId,
        /// Bytes.
        size: u64,
    },
    /// `Detach`, `Write`, `Zero`.
    Done,
    /// `Read`: pieces one behind the other; checked against their checksums.
    Data(Vec<Bytes>),
    /// `Extents`: `(length, allocated or different)`, alternating, covering the range or the first part of it.
    Extents(Vec<(u64, bool)>),
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Refused by the cluster's management.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// Refused by a server for good.
    #[error(transparent)]
    Refused(#[from] crate::message::Refusal),
    /// The session is not (any more) one of this client's.
    #[error("the disk is not attached")]
    NotAttached,
    /// Longer than one request may be.
    #[error("{length} bytes are too long for one request; the longest is {max}")]
    TooLong {
        /// Length asked for.
        length: u64,
        /// The bound.
        max: u64,
    },
    /// The caller has handed in more than the client can remember.
    #[error("{0} requests wait already, which is the most; wait for answers before asking for more")]
    TooMany(usize),
    /// The client has come to its end with the request unanswered.
    #[error("the client was stopped")]
    Stopped,
    /// The deadline passed.
    #[error("no answer in time from {waiting_for}; {advice}")]
    Deadline {
        /// Whom the request waits for.
        waiting_for: String,
        /// What to do next.
        advice: String,
    },
}

/// What the world tells a client.
#[derive(Clone, Debug)]
pub enum Input {
    /// A caller wants something.
    Request {
        /// Its number.
        number: RequestNumber,
        /// What.
        request: Request,
    },
    /// A connection to a server is up.
    Connected {
        /// The server.
        server: ServerId,
        /// Its life.
        incarnation: Incarnation,
    },
    /// It is gone.
    Disconnected {
        /// The server.
        server: ServerId,
    },
    /// A message from a server.
    Message {
        /// Which.
        from: ServerId,
        /// What.
        message: Message,
    },
    /// Time has passed.
    Tick,
}

/// What a client wants of the world.
#[derive(Clone, Debug)]
pub enum Output {
    /// Send to a server.
    Send {
        /// Which.
        to: ServerId,
        /// What.
        message: Message,
    },
    /// Keep a connection to a server at one of these addresses.
    Dial {
        /// Which.
        server: ServerId,
        /// The best first.
        addresses: Vec<String>,
    },
    /// A request is answered.
    Reply {
        /// Which.
        number: RequestNumber,
        /// The answer.
        result: Result<Response, RequestError>,
    },
    /// Something that a person should know while a request waits ("waits for s3 since 10 s").
    Warning(String),
}

/// What a client is started with.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Servers to begin with. The ids may be guesses where only addresses are known (`petal up` and
    /// the config file know both).
    pub servers: Vec<(ServerId, Vec<String>)>,
    /// Proposer id for management commands: drawn at random by the shell.
    pub proposer: u64,
    /// `None`: block clients wait for ever, with warnings (like a hard mount).
    pub deadline: Option<stdx::Duration>,
}

/// What wakes the client up.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Timer {
    /// An operation is tried again.
    Operation { index: u32, generation: u64 },
    /// A call is sent again.
    Call(Tag),
    /// Hints may be fetched again.
    Refresh(SessionId),
    /// A walk goes on.
    Walk { index: u32, number: RequestNumber },
}

/// A request that is worked on.
#[derive(Debug)]
struct Pending {
    number: RequestNumber,
    session: Option<SessionId>,
    deadline: Option<Instant>,
    /// Its share of `CLIENT_BYTES_MAX`.
    cost: u64,
    /// Operations that are not finished.
    open: u32,
    /// The first error; told when all operations are finished, so that nothing of a request that
    /// failed happens behind the caller's back.
    error: Option<RequestError>,
    work: Work,
}

/// What a request consists of.
#[derive(Debug)]
enum Work {
    /// One entry per operation, in order.
    Read { parts: Vec<Pieces> },
    /// Only operations.
    Change,
    /// First a walk over what exists, which makes the operations.
    Zero(Walk),
    /// A walk.
    Extents { offset: u64, end: u64, walk: Walk },
    /// Calls; see `management.rs`.
    Management(management::Work),
}

/// A request that waits until there is room.
#[derive(Debug)]
struct Waiting {
    number: RequestNumber,
    request: Request,
    since: Instant,
}

/// The client.
#[derive(Debug)]
pub struct Client {
    now: Instant,
    config: ClientConfig,
    /// Highest state index heard of.
    state_index: StateIndex,
    links: BTreeMap<ServerId, Link>,
    sessions: BTreeMap<SessionId, Session>,
    /// Data requests that wait for room, and detaches behind them.
    waiting: VecDeque<Waiting>,
    /// Sum of the costs of the requests worked on.
    admitted: u64,
    requests: Vec<Option<Pending>>,
    requests_free: Vec<u32>,
    operations: Operations,
    /// Operations in `State::Ready`, to be routed in this step.
    ready: VecDeque<u32>,
    /// Requests without open operations, to be answered or carried on in this step.
    advance: VecDeque<u32>,
    calls: BTreeMap<Tag, Call>,
    calls_made: u64,
    /// Numbers of this client's commands.
    commands: Numbers,
    /// Server that answered the last call.
    management: Option<ServerId>,
    timers: BTreeSet<(Instant, Timer)>,
    /// Next look at deadlines and at who waits for long.
    next_scan: Option<Instant>,
    /// Next look at who waits for very long.
    next_warning: Instant,
    /// Grows with each choice between copies.
    turn: u64,
    /// Reads that may be asked of another copy, too.
    hedges: Hedges,
    prng: Prng,
    outputs: VecDeque<Output>,
}

/// Time between two looks at what is not answered, while anything is asked.
const SCAN_EVERY: Duration = Duration::from_millis(50);
/// Shortest time between two such looks for deadlines.
const SCAN_LEAST: Duration = Duration::from_millis(5);
/// Time between two looks at what waits so long that people should know.
const WARN_EVERY: Duration = Duration::from_secs(1);
/// A server that has not answered for so long may be away: reads go to another copy, and somebody else is
/// asked who acts now. A few times what a slow disk takes, a fraction of a lease.
const IMPATIENCE: Duration = Duration::from_millis(150);
/// How long one server may take to pass an operation on and an answer back, before it goes another way: the operation
/// itself may be what takes long, and each way is a message more.
const RELAY_PATIENCE: Duration = Duration::from_millis(300);
/// What a request costs besides its bytes.
const REQUEST_COST: u64 = 4096;
/// What a walk costs: lists of elements of some servers.
const WALK_COST: u64 = 256 << 10;

impl Client {
    /// A client that knows some servers and is connected to none.
    pub fn new(now: Instant, config: ClientConfig) -> Client {
        let mut client = Client {
            now,
            state_index: 0,
            links: BTreeMap::new(),
            sessions: BTreeMap::new(),
            waiting: VecDeque::new(),
            admitted: 0,
            requests: Vec::new(),
            requests_free: Vec::new(),
            operations: Operations::default(),
            ready: VecDeque::new(),
            advance: VecDeque::new(),
            calls: BTreeMap::new(),
            calls_made: 0,
            commands: Numbers::new(SESSION_NUMBERS_MAX),
            management: None,
            timers: BTreeSet::new(),
            next_scan: None,
            next_warning: now,
            turn: 0,
            hedges: Hedges::default(),
            prng: Prng::new(config.proposer),
            outputs: VecDeque::new(),
            config,
        };
        for (server, addresses) in client.config.servers.clone() {
            client.links.insert(server, Link::new(addresses));
            client.dial(server);
        }
        client
    }

    /// Size of an attached disk as last heard.
    pub fn size(&self, session: SessionId) -> Option<u64> {
        self.sessions.get(&session).map(|s| s.size)
    }

    /// Requests that are not answered.
    pub fn unanswered(&self) -> usize {
        self.requests.len() - self.requests_free.len() + self.waiting.len()
    }

    /// Servers to which a connection is up.
    pub fn connected(&self) -> impl Iterator<Item = ServerId> + '_ {
        self.links.iter().filter(|(_, link)| link.connected.is_some()).map(|(server, _)| *server)
    }

    fn on_request(&mut self, number: RequestNumber, request: Request) {
        let since = self.now;
        match request {
            Request::Read { .. }
            | Request::Write { .. }
            | Request::Zero { .. }
            | Request::Extents { .. }
            | Request::Detach { .. } => {
                if self.waiting.len() >= CLIENT_REQUESTS_WAITING_MAX {
                    return self.answer(number, Err(RequestError::TooMany(self.waiting.len())));
                }
                self.waiting.push_back(Waiting { number, request, since });
                self.schedule_scan(self.config.deadline);
            }
            Request::Admin(request) => self.begin_call(number, None, request, self.config.deadline),
            Request::Call { to, request, deadline } => self.begin_call(number, to, request, deadline),
            Request::Execute { command, deadline } => self.begin_execute(number, command, deadline),
            Request::Refresh { session } => self.begin_refresh(number, session),
            Request::Attach { name, mode, holder, take_over } => {
                self.begin_attach(number, name, mode, holder, take_over);
            }
        }
    }

    /// Begins requests that wait, in order, as far as there is room.
    fn admit(&mut self) {
        while let Some(next) = self.waiting.front() {
            let cost = match &next.request {
                Request::Read { length, .. } => length.saturating_add(REQUEST_COST),
                Request::Write { data, .. } => data.len() as u64 + REQUEST_COST,
                _ => WALK_COST,
            };
            if self.admitted > 0 && self.admitted.saturating_add(cost) > CLIENT_BYTES_MAX {
                return;
            }
            let Waiting { number, request, since } = self.waiting.pop_front().expect("there is a front");
            if let Err(error) = self.begin(number, request, since, cost) {
                self.answer(number, Err(error));
            }
        }
    }

    fn begin(
        &mut self,
        number: RequestNumber,
        request: Request,
        since: Instant,
        cost: u64,
    ) -> Result<(), RequestError> {
        match request {
            Request::Read { session, offset, length } => {
                let end = self.check(session, offset, length, false)?;
                too_long(length)?;
                let count = pieces(offset, end).count();
                let parts = vec![Pieces::new(); count];
                let request = self.add(number, session, since, cost, Work::Read { parts });
                for (part, piece) in pieces(offset, end).enumerate() {
                    self.start(request, session, Task::Read { piece, part: part as u32 });
                }
                self.started(request);
            }
            Request::Write { session, offset, data } => {
                let end = self.check(session, offset, data.len() as u64, true)?;
                too_long(data.len() as u64)?;
                let request = self.add(number, session, since, cost, Work::Change);
                let mut at = 0;
                for piece in pieces(offset, end) {
                    let next = at + piece.length() as usize;
                    self.start(request, session, Task::Write { number: 0, piece, data: data.slice(at..next) });
                    at = next;
                }
                self.started(request);
            }
            Request::Zero { session, offset, length, discard } => {
                let end = self.check(session, offset, length, true)?;
                let (offset, end) = if discard { whole_blocks(offset, end) } else { (offset, end) };
                self.begin_zero(number, session, since, cost, offset, end);
            }
            Request::Extents { session, offset, length, than } => {
                let end = self.check(session, offset, length, false)?;
                self.begin_extents(number, session, since, cost, (offset, end), than);
            }
            Request::Detach { session } => self.begin_detach(number, session, since)?,
            _ => unreachable!("only data requests and detaches wait"),
        }
        Ok(())
    }

    /// Checks that the session may do this; the end of the range.
    fn check(&self, session: SessionId, offset: u64, length: u64, changes: bool) -> Result<u64, RequestError> {
        let session = self.sessions.get(&session).filter(|s| !s.detaching).ok_or(RequestError::NotAttached)?;
        if session.ended {
            return Err(Refusal::SessionEnded.into());
        }
        if changes && session.mode == Attachment::ReadOnly {
            return Err(Refusal::ReadOnly.into());
        }
        let end = offset.checked_add(length).filter(|end| *end <= session.size);
        end.ok_or(RequestError::Refused(Refusal::BeyondEnd))
    }

    /// Remembers a data request.
    fn add(&mut self, number: RequestNumber, session: SessionId, since: Instant, cost: u64, work: Work) -> u32 {
        self.sessions.get_mut(&session).expect("checked").open += 1;
        let deadline = self.config.deadline.map(|d| since + d);
        let pending = Pending { number, session: Some(session), deadline, cost, open: 0, error: None, work };
        self.insert(pending)
    }

    fn insert(&mut self, pending: Pending) -> u32 {
        self.admitted += pending.cost;
        self.schedule_scan(pending.deadline.map(|d| d.since(self.now)));
        match self.requests_free.pop() {
            Some(index) => {
                self.requests[index as usize] = Some(pending);
                index
            }
            None => {
                self.requests.push(Some(pending));
                (self.requests.len() - 1) as u32
            }
        }
    }

    fn request(&mut self, index: u32) -> &mut Pending {
        self.requests[index as usize].as_mut().expect("a request that is worked on")
    }

    /// Adds an operation to a request.
    fn start(&mut self, request: u32, session: SessionId, task: Task) {
        self.request(request).open += 1;
        let index = self.operations.insert(Operation::new(request, session, task, self.now));
        self.ready.push_back(index);
    }

    /// All operations of a request were added; there may be none.
    fn started(&mut self, request: u32) {
        if self.request(request).open == 0 {
            self.advance.push_back(request);
        }
    }

    /// A request has no open operations.
    fn on_operations_done(&mut self, index: u32) {
        let Some(pending) = self.requests[index as usize].as_mut() else { return };
        if pending.open > 0 {
            return;
        }
        if let Some(error) = pending.error.take() {
            return self.finish(index, Err(error));
        }
        match &mut pending.work {
            Work::Read { parts } => {
                let data = std::mem::take(parts).into_iter().flatten().collect();
                self.finish(index, Ok(Response::Data(data)));
            }
            Work::Change => self.finish(index, Ok(Response::Done)),
            Work::Zero(_) | Work::Extents { .. } => self.walk_on(index),
            Work::Management(_) => {}
        }
    }

    /// Answers a request and forgets it.
    fn finish(&mut self, index: u32, result: Result<Response, RequestError>) {
        let pending = self.requests[index as usize].take().expect("a request that is worked on");
        debug_assert_eq!(pending.open, 0);
        self.requests_free.push(index);
        self.admitted -= pending.cost;
        self.answer(pending.number, result);
        if let Some(session) = pending.session {
            self.sessions.get_mut(&session).expect("it has open requests").open -= 1;
            self.detach_if_idle(session);
        }
    }

    fn answer(&mut self, number: RequestNumber, result: Result<Response, RequestError>) {
        self.outputs.push_back(Output::Reply { number, result });
    }

    fn send(&mut self, to: ServerId, body: Body) {
        let message = Message { state_index: self.state_index, body };
        self.outputs.push_back(Output::Send { to, message });
    }

    // --------------------------------------------------------------------------------------------
    // Connections.

    /// Tells the driver to keep a connection, once it is known where to.
    fn dial(&mut self, server: ServerId) {
        let link = self.links.entry(server).or_insert_with(|| Link::new(Vec::new()));
        if !link.dialed && !link.addresses.is_empty() {
            link.dialed = true;
            link.away_since = Some(self.now);
            self.outputs.push_back(Output::Dial { server, addresses: link.addresses.clone() });
        }
    }

    /// Hints tell where a server is.
    fn learn_addresses(&mut self, server: ServerId, addresses: &[String]) {
        let link = self.links.entry(server).or_insert_with(|| Link::new(Vec::new()));
        if link.addresses != addresses {
            link.addresses = addresses.to_vec();
            // Told again if it was told before, or if operations have been waiting for it.
            if std::mem::take(&mut link.dialed) || !link.queue.is_empty() {
                self.dial(server);
            }
        }
    }

    fn on_connected(&mut self, server: ServerId, incarnation: Incarnation) {
        if self.links.get(&server).is_some_and(|l| l.connected.is_some()) {
            self.on_disconnected(server);
        }
        self.links.entry(server).or_insert_with(|| Link::new(Vec::new())).connected(incarnation);
        self.wake_waiting_for(server);
        // Reads that wait for another copy may go here.
        self.route_again(|link| link.connected.is_none());
        self.fill_window(server);
        self.send_calls_that_wait(server);
    }

    fn on_disconnected(&mut self, server: ServerId) {
        let Some(link) = self.links.get_mut(&server).filter(|l| l.connected.is_some()) else { return };
        link.disconnected(self.now);
        self.take_back_operations(server);
        self.route_again(|link| link.connected.is_none());
        self.take_back_calls(server);
        self.refresh_busy_sessions();
    }

    fn on_message(&mut self, from: ServerId, message: Message) {
        self.state_index = self.state_index.max(message.state_index);
        if let Some(link) = self.links.get_mut(&from) {
            link.silent = false;
            link.away_since = None;
        }
        match message.body {
            Body::ReadReply(reply) => self.on_read_reply(from, reply),
            Body::WriteReply(reply) => self.on_write_reply(from, reply),
            Body::MapReply(reply) => self.on_map_reply(from, reply),
            Body::AdminReply(reply) => self.on_admin_reply(from, message.state_index, reply),
            // Nothing else is for clients; a newer server may know better.
            _ => {}
        }
    }

    // --------------------------------------------------------------------------------------------
    // Time.

    fn wake_at(&mut self, at: Instant, timer: Timer) {
        self.timers.insert((at, timer));
    }

    /// Looks at what waits within `SCAN_EVERY`, or sooner if a deadline is nearer.
    fn schedule_scan(&mut self, deadline: Option<Duration>) {
        let at = self.now + deadline.map_or(SCAN_EVERY, |d| d.min(SCAN_EVERY));
        self.next_scan = Some(self.next_scan.map_or(at, |old| old.min(at)));
    }

    fn on_tick(&mut self) {
        while let Some((_, timer)) = self.timers.first().copied().filter(|(at, _)| *at <= self.now) {
            self.timers.pop_first();
            match timer {
                Timer::Operation { index, generation } => self.on_retry(index, generation),
                Timer::Call(tag) => self.on_call_timer(tag),
                Timer::Refresh(session) => self.on_refresh_timer(session),
                Timer::Walk { index, number } => self.on_walk_timer(index, number),
            }
        }
        self.hedge();
        if self.next_scan.is_some_and(|at| at <= self.now) {
            self.scan();
        }
    }

    /// Ends what is past its deadline, and tells people what has waited for long.
    fn scan(&mut self) {
        self.next_scan = None;
        self.end_waiting_requests();
        let mut expired = Vec::new();
        for index in 0..self.requests.len() as u32 {
            let Some(pending) = &self.requests[index as usize] else { continue };
            match pending.deadline {
                Some(deadline) if deadline <= self.now => expired.push(index),
                // Those that end within a moment are ended together: each look is at all that waits.
                deadline => self.schedule_scan(deadline.map(|d| d.since(self.now).max(SCAN_LEAST))),
            }
        }
        self.give_up(&expired);
        self.hurry();
        if self.next_warning <= self.now {
            self.next_warning = self.now + WARN_EVERY;
            self.warn_about_operations();
            self.warn_about_calls();
        }
    }

    fn end_waiting_requests(&mut self) {
        let Some(deadline) = self.config.deadline else {
            return;
        };
        while self.waiting.front().is_some_and(|w| w.since + deadline <= self.now) {
            let waiting = self.waiting.pop_front().expect("there is a front");
            let waiting_for = "requests before it".to_string();
            let advice = DEADLINE_ADVICE.to_string();
            self.answer(waiting.number, Err(RequestError::Deadline { waiting_for, advice }));
        }
        if let Some(next) = self.waiting.front() {
            let left = (next.since + deadline).since(self.now);
            self.schedule_scan(Some(left));
        }
    }

    /// The deadlines of these requests have passed: their operations end here. What was sent may still happen,
    /// until a later request tells the servers that its number is finished.
    fn give_up(&mut self, indices: &[u32]) {
        if indices.is_empty() {
            return;
        }
        let waiting_for = self.drop_operations(indices);
        for (index, waiting_for) in indices.iter().zip(waiting_for) {
            let calls = self.drop_calls(*index);
            let waiting_for = match (waiting_for.is_empty(), calls) {
                (false, _) => waiting_for,
                (true, Some(server)) => server,
                (true, None) => "the cluster".into(),
            };
            let error = RequestError::Deadline { waiting_for, advice: DEADLINE_ADVICE.into() };
            self.finish(*index, Err(error));
        }
    }
}

const DEADLINE_ADVICE: &str =
    "`petal status` shows which servers are up; start those that are missing, or wait longer, and try again";

fn too_long(length: u64) -> Result<(), RequestError> {
    if length > REQUEST_LENGTH_MAX {
        return Err(RequestError::TooLong { length, max: REQUEST_LENGTH_MAX });
    }
    Ok(())
}

/// The whole blocks within a range; empty if there are none.
fn whole_blocks(offset: u64, end: u64) -> (u64, u64) {
    let first = offset.div_ceil(BLOCK_SIZE).saturating_mul(BLOCK_SIZE);
    let last = end / BLOCK_SIZE * BLOCK_SIZE;
    (first.min(last), last)
}

impl Machine for Client {
    type Input = Input;
    type Output = Output;

    fn handle(&mut self, now: Instant, input: Input) {
        self.now = now.max(self.now);
        match input {
            Input::Request { number, request } => self.on_request(number, request),
            Input::Connected { server, incarnation } => self.on_connected(server, incarnation),
            Input::Disconnected { server } => self.on_disconnected(server),
            Input::Message { from, message } => self.on_message(from, message),
            Input::Tick => {}
        }
        self.on_tick();
        self.maintain();
    }

    fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    fn next_timeout(&self) -> Option<Instant> {
        let timer = self.timers.first().map(|(at, _)| *at);
        let hedge = self.hedges.next().map(|(due, _)| due);
        [timer, self.next_scan, hedge].into_iter().flatten().min()
    }

    fn check_invariants(&self) {
        assert!(self.ready.is_empty() && self.advance.is_empty(), "a step leaves nothing to do behind");
        let mut cost = 0;
        let mut open: BTreeMap<u32, u32> = BTreeMap::new();
        let mut in_flight: BTreeMap<ServerId, usize> = BTreeMap::new();
        for (index, operation) in self.operations.iter() {
            *open.entry(operation.request).or_default() += 1;
            for server in operation.sent_to() {
                *in_flight.entry(server).or_default() += 1;
            }
            if let Some(number) = operation.number() {
                let session = &self.sessions[&operation.session];
                assert!(number == 0 || session.numbers.is_open(number), "operation {index} has a finished number");
            }
        }
        for (index, pending) in self.requests.iter().enumerate() {
            let Some(pending) = pending else { continue };
            cost += pending.cost;
            assert_eq!(pending.open, open.get(&(index as u32)).copied().unwrap_or(0), "open operations of {index}");
        }
        assert_eq!(cost, self.admitted);
        for (server, link) in &self.links {
            assert_eq!(link.in_flight, in_flight.get(server).copied().unwrap_or(0), "in flight at {server}");
            assert!(link.in_flight <= CLIENT_WINDOW);
            assert!(link.connected.is_some() || link.in_flight == 0);
        }
    }
}

impl Client {
    /// Puts in order what the input has set off.
    fn maintain(&mut self) {
        loop {
            if let Some(index) = self.ready.pop_front() {
                self.route(index);
            } else if let Some(index) = self.advance.pop_front() {
                self.on_operations_done(index);
            } else {
                let before = self.waiting.len();
                self.admit();
                if self.waiting.len() == before && self.ready.is_empty() && self.advance.is_empty() {
                    return;
                }
            }
        }
    }
}
