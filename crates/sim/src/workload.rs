//! What the clients do: operations of all kinds on few blocks, and management at the worst moments.
//!
//! Data clients attach disks, keep some operations outstanding on the hot cells ([`crate::content`]),
//! detach, take disks over from each other, and die. One operator lets servers join and makes, renames,
//! resizes and deletes disks meanwhile; another one, in some runs, snapshots, clones and rolls back (`keeper.rs`).
//! What they are told is checked on the spot where it is wrong by itself (an error that cannot be, bytes that nobody
//! wrote), and goes into the history for the rest.

use crate::checkers::progress::STANDS_MAX;
use crate::content::{Layout, ZEROS, fill, read_cell};
use crate::counters::Kind;
use crate::families::Shown;
use crate::history::{Effect, End, OperationId, Target};
use crate::host::{Arrival, address_of};
use crate::keeper::{Birth, Kept};
use crate::net::Node;
use crate::options::Options;
use crate::world::World;
use bytes::Bytes;
use petal::client::{self, Request, RequestError, RequestNumber, Response};
use petal::global_state::{Attachment, Command, Outcome};
use petal::ids::{BLOCK_SIZE, ELEMENT_SIZE, SessionId, VdiskId};
use petal::message::{AdminError, AdminResponse, Refusal};
use petal::translator::gmap::Scheme;
use std::collections::BTreeMap;
use stdx::{Duration, Instant, Prng};

/// What a client host is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Manages.
    Operator,
    /// Manages snapshots and clones.
    Keeper,
    /// Reads and writes.
    Data,
    /// Reads everything at the end.
    Judge,
}

/// What uses a client, in one of its lives.
#[derive(Debug)]
pub struct User {
    role: Role,
    sessions: Vec<Held>,
    asked: BTreeMap<RequestNumber, Asked>,
    asked_at: BTreeMap<RequestNumber, Instant>,
}

/// A session that a client holds.
#[derive(Clone, Debug)]
pub struct Held {
    /// Its id.
    pub session: SessionId,
    /// The disk.
    pub vdisk: VdiskId,
    /// Its size when it was attached.
    pub size: u64,
    /// How.
    pub mode: Attachment,
    /// It is being made smaller: nothing else is asked meanwhile.
    pub shrinking: bool,
}

/// A request without an answer.
#[derive(Clone, Debug)]
pub enum Asked {
    /// An operation on cells.
    Operation {
        /// Its number.
        id: OperationId,
        /// The session.
        held: Held,
        /// What.
        what: What,
    },
    /// An attachment.
    Attach {
        /// Of what.
        name: String,
        /// How.
        mode: Attachment,
        /// From others.
        take_over: bool,
    },
    /// A detachment.
    Detach,
    /// A management call.
    Admin(Call),
    /// What a scenario asks, and looks at itself.
    Scripted,
}

/// Kinds of operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// Reads `start..end`.
    Read(u64, u64),
    /// Changes something.
    Change,
    /// Makes everything from here on zero, so that the disk can be cut off there.
    CutOff(u64),
    /// Asks which of `start..end` exists.
    Extents(u64, u64),
}

/// Management calls.
#[derive(Clone, Debug)]
pub enum Call {
    /// A server joins.
    Join {
        /// On this host.
        host: usize,
    },
    /// A disk is made.
    Create {
        /// Its name.
        name: String,
        /// Its size.
        size: u64,
    },
    /// A disk gets another name.
    Rename {
        /// Which.
        vdisk: VdiskId,
        /// The name.
        name: String,
    },
    /// A disk gets another size.
    Resize {
        /// Which.
        vdisk: VdiskId,
        /// The size.
        size: u64,
        /// The session that makes it smaller.
        session: Option<SessionId>,
    },
    /// A disk is deleted.
    Delete {
        /// Which.
        vdisk: VdiskId,
    },
    /// A server is asked to stop.
    Stop,
    /// What the keeper asks.
    Kept(Kept),
}

/// What is known of a virtual disk.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Of a snapshot: the disk that it was made of.
    pub of: Option<VdiskId>,
    /// The command that closed what it stands on: see `Workload::takings`.
    pub taken: Option<usize>,
    /// Names that it may have; of a snapshot, without that of its disk.
    pub names: Vec<String>,
    /// Its hot set.
    pub layout: Layout,
    /// The size that it was made with.
    pub full_size: u64,
    /// A resize was asked for: sizes differ between those who look.
    pub resized: bool,
    /// A deletion was asked for.
    pub deleting: bool,
}

/// What all clients share.
pub struct Workload {
    pub(crate) prng: Prng,
    /// Disks and snapshots that were made.
    pub disks: BTreeMap<VdiskId, Disk>,
    /// Hosts of learners that have not joined.
    to_join: Vec<usize>,
    /// Calls that the operator must still make before the random ones.
    pub(crate) to_create: u64,
    joined: usize,
    names: u64,
    think: Duration,
    /// Nothing new is begun.
    pub stopped: bool,
    /// The name that somebody wanted to attach last is unknown where it was asked for: it may be too new.
    pub lags: bool,
    /// Snapshots and clones that were asked for, by name: each name is used once.
    pub births: BTreeMap<String, Birth>,
    /// Commands that closed an epoch: when they were asked for, and done.
    pub takings: Vec<(u64, Option<u64>)>,
    /// What the keeper is about to do, and how often he has tried.
    pub intent: Option<(crate::keeper::Intent, u32)>,
}

impl Workload {
    /// Nothing done yet.
    pub fn new(options: &Options, mut prng: Prng) -> Workload {
        let actors = options.clients as u64;
        let think = options.faulty * (actors as u32) / (options.operations.max(1) as u32);
        Workload {
            to_join: (options.ring..options.servers).collect(),
            to_create: if options.crowded { 1 } else { prng.between(1, 3) },
            prng,
            disks: BTreeMap::new(),
            joined: options.ring,
            names: 0,
            think,
            stopped: false,
            lags: false,
            births: BTreeMap::new(),
            takings: Vec::new(),
            intent: None,
        }
    }

    /// Every server that will ever be has joined, and the first disks exist.
    pub fn is_set_up(&self) -> bool {
        self.to_join.is_empty() && self.to_create == 0
    }

    /// A name that nothing has or will have.
    pub fn new_name(&mut self, what: &str) -> String {
        self.names += 1;
        format!("{what}-{}", self.names)
    }

    /// A disk that probably exists, no snapshot.
    fn pick_disk(&mut self) -> Option<VdiskId> {
        let alive = self.disks.iter().filter(|(_, d)| !d.deleting && d.of.is_none());
        let alive: Vec<VdiskId> = alive.map(|(id, _)| *id).collect();
        (!alive.is_empty()).then(|| *self.prng.pick(&alive))
    }

    /// A disk or a snapshot, likewise.
    fn pick_any(&mut self) -> Option<VdiskId> {
        let alive: Vec<VdiskId> = self.disks.iter().filter(|(_, d)| !d.deleting).map(|(id, _)| *id).collect();
        (!alive.is_empty()).then(|| *self.prng.pick(&alive))
    }

    /// A name of a disk, or `DISK@SNAPSHOT`.
    fn name_of(&mut self, vdisk: VdiskId) -> String {
        let name = self.prng.pick(&self.disks[&vdisk].names).clone();
        match self.disks[&vdisk].of {
            Some(of) => format!("{}@{name}", self.prng.pick(&self.disks[&of].names)),
            None => name,
        }
    }

    /// True for a snapshot.
    pub fn is_snapshot(&self, vdisk: VdiskId) -> bool {
        self.disks.get(&vdisk).is_some_and(|d| d.of.is_some())
    }
}

impl User {
    /// A new life that holds nothing.
    pub fn new(role: Role) -> User {
        User { role, sessions: Vec::new(), asked: BTreeMap::new(), asked_at: BTreeMap::new() }
    }

    /// An attachment is on its way.
    pub fn is_attaching(&self) -> bool {
        self.asked.values().any(|a| matches!(a, Asked::Attach { .. }))
    }

    /// What it has attached.
    pub fn sessions(&self) -> &[Held] {
        &self.sessions
    }

    /// How much is outstanding.
    pub fn outstanding(&self) -> usize {
        self.asked.len()
    }

    /// Nothing is outstanding.
    pub fn is_idle(&self) -> bool {
        self.asked.is_empty()
    }

    /// What is outstanding, in words.
    pub fn waits_for(&self) -> String {
        let words: Vec<String> = self.asked.iter().take(4).map(|(n, a)| format!("{n}: {a:?}")).collect();
        format!("{} requests outstanding: {}", self.asked.len(), words.join("; "))
    }
}

impl World {
    /// Hands a request to a client.
    pub fn ask(&mut self, host: usize, request: Request, asked: Asked) {
        self.trace.words(self.now, || format!("client {host} asks {}", in_words(&request)));
        let Some(life) = &mut self.clients[host].life else { return };
        let number = life.next_request;
        life.next_request += 1;
        life.driver.inbox.push_back(Arrival::Input(client::Input::Request { number, request }));
        life.driver.idle_ticks = 0;
        life.user.asked.insert(number, asked);
        life.user.asked_at.insert(number, self.now);
        self.plan_run(Node::Client(host));
    }

    /// What a dying client leaves open.
    pub fn abandon_requests(&mut self, host: usize) {
        let Some(life) = &mut self.clients[host].life else { return };
        for asked in std::mem::take(&mut life.user.asked).into_values() {
            self.counters.count(Kind::Unfinished);
            match asked {
                Asked::Operation { id, .. } => self.history.finish(id, End::Unknown),
                Asked::Admin(_) | Asked::Attach { .. } | Asked::Detach | Asked::Scripted => {}
            }
        }
    }

    pub(crate) fn on_think(&mut self, host: usize, life: u64) {
        let Some(alive) = self.clients[host].life.as_ref().filter(|l| l.driver.life == life) else { return };
        let (role, outstanding) = (alive.user.role, alive.user.asked.len());
        if self.options.scripted {
            return;
        }
        if !self.workload.stopped || !self.workload.is_set_up() {
            let pause = match role {
                Role::Judge => return self.judge_next(host),
                Role::Operator => self.workload.think * 100 / self.options.mix.admin_percent.max(1) as u32,
                Role::Keeper => self.options.snapshots.map_or(Duration::from_secs(1), |mix| mix.every),
                Role::Data if self.only_reads(host) => self.workload.think * 4,
                Role::Data => self.workload.think,
            };
            let early = !self.workload.is_set_up() && role == Role::Operator;
            let pause = if early { Duration::from_millis(3) } else { pause };
            let at = self.now + self.draw(pause * 2) + Duration::from_nanos(1);
            self.queue.plan(at, crate::event::Event::Think { client: host, life });
        }
        match role {
            Role::Judge => self.judge_next(host),
            Role::Operator if outstanding == 0 => self.operate(host),
            Role::Operator => {}
            Role::Keeper if outstanding == 0 => self.keep(host),
            Role::Keeper => {}
            Role::Data if self.workload.stopped => {}
            Role::Data if outstanding < self.depth_of(host) => self.use_disks(host),
            Role::Data => {}
        }
    }

    // --------------------------------------------------------------------------------------------
    // Data clients.

    fn only_reads(&self, host: usize) -> bool {
        self.options.readers && host.is_multiple_of(2)
    }

    /// Who only reads goes on asking while nobody answers: what it asks late must be answered by what is true then.
    fn depth_of(&self, host: usize) -> usize {
        if self.only_reads(host) { (self.options.depth * 32).min(self.options.reads_max) } else { self.options.depth }
    }

    fn use_disks(&mut self, host: usize) {
        let Some(life) = &self.clients[host].life else { return };
        let sessions = life.user.sessions.clone();
        let attaching = life.user.is_attaching();
        let only_reads = self.only_reads(host);
        let (most, one_in) = if self.options.snapshots.is_some() { (4, 20) } else { (2, 40) };
        let prng = &mut self.workload.prng;
        if sessions.is_empty() || (sessions.len() < most && prng.chance(1, one_in)) {
            if !attaching {
                self.attach(host);
            }
            return;
        }
        let held = prng.pick(&sessions).clone();
        if held.shrinking {
            return;
        }
        // Who has read a snapshot a few times is done with it: so that it can be deleted.
        if self.workload.is_snapshot(held.vdisk) && self.workload.prng.chance(1, 12) {
            return self.detach(host, held.session);
        }
        let prng = &mut self.workload.prng;
        if only_reads {
            return self.read(host, held);
        }
        let mix = self.options.mix;
        if prng.chance(mix.detach, 150) {
            return self.detach(host, held.session);
        }
        if held.mode == Attachment::Exclusive && mix.shrink && prng.chance(1, 25) {
            return self.shrink(host, held);
        }
        let weights = [mix.read, mix.write, mix.zero, mix.discard, mix.zero_all.min(1), mix.extents];
        let writes_allowed = held.mode != Attachment::ReadOnly || prng.chance(1, 20);
        match draw_weighted(prng, &weights) {
            1 if writes_allowed => self.write(host, held),
            2 if writes_allowed => self.zero(host, held, false),
            3 if writes_allowed => self.zero(host, held, true),
            4 if writes_allowed && prng.chance(1, 4) => self.zero_all(host, held),
            5 => self.extents(host, held),
            _ => self.read(host, held),
        }
    }

    fn attach(&mut self, host: usize) {
        let Some(vdisk) = self.pick_to_attach(host) else { return };
        let name = self.workload.name_of(vdisk);
        let only_reads = self.only_reads(host) && self.options.snapshots.is_some();
        let prng = &mut self.workload.prng;
        let mode = match self.options.crowded {
            _ if only_reads || self.workload.disks[&vdisk].of.is_some() => Attachment::ReadOnly,
            true => Attachment::Shared,
            false => draw_mode(prng),
        };
        let take_over = prng.chance(2, 5);
        self.attach_as(host, name, mode, take_over);
    }

    /// Where there are snapshots: one of them now and then, but somebody must write.
    fn pick_to_attach(&mut self, host: usize) -> Option<VdiskId> {
        let holds = |life: &crate::host::ClientLife| {
            life.user.sessions.iter().any(|held| !self.workload.is_snapshot(held.vdisk))
        };
        let holds_disk = self.clients[host].life.as_ref().is_some_and(holds);
        if self.options.snapshots.is_some() && (holds_disk || self.workload.prng.chance(1, 4)) {
            return self.workload.pick_any();
        }
        self.workload.pick_disk()
    }

    /// Attaches a disk or snapshot by name.
    pub fn attach_as(&mut self, host: usize, name: String, mode: Attachment, take_over: bool) {
        let request = Request::Attach { name: name.clone(), mode, holder: format!("client {host}"), take_over };
        self.ask(host, request, Asked::Attach { name, mode, take_over });
    }

    /// Whose cells an operation of a session is about.
    fn target(&mut self, held: &Held) -> Option<Target> {
        let shown = self.checkers.families.shown(held.vdisk, held.session);
        if shown.is_none() {
            self.complain(format!("{} was attached as {}, and no server knows it", held.vdisk, held.session));
        }
        Some(Target { vdisk: held.vdisk, shown: shown?, session: Some(held.session) })
    }

    /// Gives a session back.
    pub fn detach(&mut self, host: usize, session: SessionId) {
        let Some(life) = &mut self.clients[host].life else { return };
        life.user.sessions.retain(|h| h.session != session);
        self.ask(host, Request::Detach { session }, Asked::Detach);
    }

    fn draw_range(&mut self, held: &Held) -> Option<(u64, u64)> {
        let disk = self.workload.disks.get(&held.vdisk)?;
        disk.layout.draw_range(&mut self.workload.prng, held.size)
    }

    /// Reads something.
    pub fn read(&mut self, host: usize, held: Held) {
        if let Some((start, end)) = self.draw_range(&held) {
            self.read_range(host, held, start, end);
        }
    }

    /// Reads a range of cells.
    pub fn read_range(&mut self, host: usize, held: Held, start: u64, end: u64) {
        let Some(target) = self.target(&held) else { return };
        let id = self.history.invoke(target, Effect::Read, Vec::new());
        let request = Request::Read { session: held.session, offset: start, length: end - start };
        self.ask(host, request, Asked::Operation { id, held, what: What::Read(start, end) });
    }

    fn write(&mut self, host: usize, held: Held) {
        if let Some((start, end)) = self.draw_range(&held) {
            self.write_range(host, held, start, end);
        }
    }

    /// Writes a range of cells.
    pub fn write_range(&mut self, host: usize, held: Held, start: u64, end: u64) {
        let Some(target) = self.target(&held) else { return };
        let cells = self.workload.disks[&held.vdisk].layout.cells(start, end).map(|c| (c.0, false)).collect();
        let id = self.history.invoke(target, Effect::Write, cells);
        if !start.is_multiple_of(BLOCK_SIZE) || !end.is_multiple_of(BLOCK_SIZE) {
            self.counters.count(Kind::UnalignedWrite);
        }
        if start / ELEMENT_SIZE != (end - 1) / ELEMENT_SIZE {
            self.counters.count(Kind::StraddlingWrite);
        }
        if start >= 1 << 40 {
            self.counters.count(Kind::FarWrite);
        }
        if matches!(target.shown, Shown::Line(line) if self.checkers.families.parent(line).is_some()) {
            self.counters.count(Kind::CloneWritten);
        }
        let data = fill(id, start, end - start);
        let request = Request::Write { session: held.session, offset: start, data };
        self.ask(host, request, Asked::Operation { id, held, what: What::Change });
    }

    fn zero(&mut self, host: usize, held: Held, discard: bool) {
        if let Some((start, end)) = self.draw_range(&held) {
            self.counters.count(if discard { Kind::Discarded } else { Kind::Zeroed });
            self.zero_range(host, held, start, end, discard);
        }
    }

    fn zero_all(&mut self, host: usize, held: Held) {
        self.counters.count(Kind::ZeroedAll);
        let discard = self.workload.prng.chance(1, 2);
        let end = held.size;
        self.zero_range(host, held, 0, end, discard);
    }

    fn zero_range(&mut self, host: usize, held: Held, start: u64, end: u64, discard: bool) {
        self.zero_as(host, held, start, end, discard, What::Change);
    }

    fn zero_as(&mut self, host: usize, held: Held, start: u64, end: u64, discard: bool, what: What) {
        let whole = |cell: u64| {
            let block = cell / BLOCK_SIZE * BLOCK_SIZE;
            block >= start && block + BLOCK_SIZE <= end
        };
        let Some(target) = self.target(&held) else { return };
        let layout = &self.workload.disks[&held.vdisk].layout;
        let cells = layout.cells(start, end).map(|c| (c.0, discard && !whole(c.0))).collect();
        let id = self.history.invoke(target, Effect::Zero, cells);
        let request = Request::Zero { session: held.session, offset: start, length: end - start, discard };
        self.ask(host, request, Asked::Operation { id, held, what });
    }

    /// The first step of making a disk smaller (docs/decisions/0009-shrink.md): what lies beyond becomes
    /// zero, while nothing else of the session is under way.
    fn shrink(&mut self, host: usize, mut held: Held) {
        let Some(disk) = self.workload.disks.get(&held.vdisk) else { return };
        let fits = |c: &u64| c.is_multiple_of(512) && *c > 0 && *c < held.size;
        let cuts: Vec<u64> = disk.layout.spots.iter().flatten().copied().filter(fits).collect();
        let Some(life) = &mut self.clients[host].life else { return };
        let of_this = |a: &Asked| matches!(a, Asked::Operation { held: h, .. } if h.session == held.session);
        if cuts.is_empty() || life.user.asked.values().any(of_this) {
            return;
        }
        let size = *self.workload.prng.pick(&cuts);
        for h in life.user.sessions.iter_mut().filter(|h| h.session == held.session) {
            h.shrinking = true;
        }
        held.shrinking = true;
        let end = held.size;
        self.zero_as(host, held, size, end, false, What::CutOff(size));
    }

    /// The second step.
    fn cut_off(&mut self, host: usize, held: &Held, size: u64) {
        if let Some(disk) = self.workload.disks.get_mut(&held.vdisk) {
            disk.resized = true;
        }
        let (vdisk, session) = (held.vdisk, held.session);
        let call = Call::Resize { vdisk, size, session: Some(session) };
        self.execute(host, Command::ResizeDisk { vdisk, size, session }, call);
    }

    /// It is smaller now, or not.
    fn after_shrink(&mut self, host: usize, session: SessionId, size: Option<u64>) {
        let Some(life) = &mut self.clients[host].life else { return };
        for held in life.user.sessions.iter_mut().filter(|h| h.session == session) {
            held.shrinking = false;
            held.size = size.unwrap_or(held.size).min(held.size);
        }
    }

    fn extents(&mut self, host: usize, held: Held) {
        let all = self.workload.prng.chance(1, 3).then_some((0, held.size));
        if let Some((start, end)) = all.or_else(|| self.draw_range(&held)) {
            self.counters.count(Kind::Mapped);
            let Some(target) = self.target(&held) else { return };
            let id = self.history.invoke(target, Effect::Read, Vec::new());
            let request = Request::Extents { session: held.session, offset: start, length: end - start, than: None };
            self.ask(host, request, Asked::Operation { id, held, what: What::Extents(start, end) });
        }
    }

    // --------------------------------------------------------------------------------------------
    // Answers.

    pub(crate) fn on_reply(&mut self, host: usize, number: RequestNumber, result: Result<Response, RequestError>) {
        self.trace.words(self.now, || format!("client {host} is answered {number}: {}", outcome_in_words(&result)));
        let Some(life) = &mut self.clients[host].life else { return };
        let Some(asked) = life.user.asked.remove(&number) else {
            return self.complain(format!("client {host} answers request {number}, which is not open"));
        };
        let asked_at = life.user.asked_at.remove(&number);
        if let (Asked::Operation { .. }, Some(at)) = (&asked, asked_at) {
            let took = self.now.since(at);
            self.longest = self.longest.max(took);
            if self.options.alone && took > STANDS_MAX {
                self.complain(format!("request {number} of client {host} took {took:?}, though no two failures met"));
            }
        }
        match (asked, result) {
            (Asked::Operation { id, held, what }, Ok(response)) => self.on_operation(host, id, &held, what, response),
            (Asked::Operation { id, held, what }, Err(error)) => self.on_operation_error(host, id, held, what, error),
            (Asked::Attach { name, mode, take_over }, Ok(Response::Attached { session, vdisk, size })) => {
                self.adopt(vdisk, &name);
                self.on_attached(host, Held { session, vdisk, size, mode, shrinking: false }, take_over);
            }
            (Asked::Attach { .. }, Err(error)) => self.on_attach_error(host, error),
            (Asked::Scripted, result) => self.answers.push(result),
            (Asked::Admin(Call::Kept(kept)), result) => self.on_kept(host, kept, result),
            (Asked::Detach, Ok(Response::Done)) => self.counters.count(Kind::Detached),
            (Asked::Detach, Err(error)) => self.trace.words(self.now, || format!("detach: {error}")),
            (Asked::Admin(call), Ok(Response::Admin(AdminResponse::Executed { outcome, unsettled, .. }))) => {
                self.trace.words(self.now, || format!("not settled at {unsettled:?}"));
                self.on_executed(host, call, outcome);
            }
            (Asked::Admin(Call::Stop), Ok(Response::Admin(AdminResponse::ShuttingDown))) => {}
            (Asked::Admin(call), Err(error)) => self.on_call_error(host, call, error),
            (asked, Ok(response)) => {
                self.complain(format!("client {host} answers {asked:?} with {response:?}"));
            }
        }
        self.judge_next(host);
    }

    fn on_operation(&mut self, host: usize, id: OperationId, held: &Held, what: What, response: Response) {
        match (what, response) {
            (What::Read(start, end), Response::Data(pieces)) => self.on_data(id, held.vdisk, start, end, &pieces),
            (What::Extents(start, end), Response::Extents(extents)) => {
                self.on_extents(id, held.vdisk, start, end, &extents);
            }
            (What::Change, Response::Done) => self.history.finish(id, End::Done),
            (What::CutOff(size), Response::Done) => {
                self.history.finish(id, End::Done);
                self.cut_off(host, held, size);
            }
            (what, response) => self.complain(format!("operation {id}, {what:?}, was answered with {response:?}")),
        }
    }

    fn on_data(&mut self, id: OperationId, vdisk: VdiskId, start: u64, end: u64, pieces: &[Bytes]) {
        let bytes = match pieces {
            [one] => one.clone(),
            many => many.concat().into(),
        };
        if bytes.len() as u64 != end - start {
            return self.complain(format!("operation {id} read {} bytes of {start}..{end}", bytes.len()));
        }
        let cells: Vec<(u64, u64)> = self.workload.disks[&vdisk].layout.cells(start, end).collect();
        if self.workload.is_snapshot(vdisk) {
            self.counters.count(Kind::SnapshotRead);
        }
        for (cell, cell_end) in cells {
            match read_cell(&bytes[(cell - start) as usize..(cell_end - start) as usize], cell) {
                Ok(value) => {
                    if value != ZEROS {
                        self.counters.count(Kind::ReadData);
                    }
                    self.history.saw(id, cell, value);
                }
                Err(garbage) => self.complain(format!("operation {id} read garbage of {vdisk}: {}", garbage.0)),
            }
        }
        self.history.finish(id, End::Done);
    }

    /// Where extents say that nothing exists, a read at that moment would have seen zeros.
    fn on_extents(&mut self, id: OperationId, vdisk: VdiskId, start: u64, end: u64, extents: &[(u64, bool)]) {
        let mut at = start;
        for (length, allocated) in extents {
            let next = at + length;
            if !allocated {
                let cells: Vec<u64> = self.workload.disks[&vdisk].layout.cells(at, next).map(|c| c.0).collect();
                for cell in cells {
                    self.history.saw(id, cell, ZEROS);
                }
            }
            at = next;
        }
        if at > end || at == start {
            self.complain(format!("operation {id}: extents of {start}..{end} go to {at}"));
        }
        self.history.finish(id, End::Done);
    }

    fn on_operation_error(&mut self, host: usize, id: OperationId, held: Held, what: What, error: RequestError) {
        self.counters.count(Kind::Unfinished);
        self.history.finish(id, End::Unknown);
        if let What::CutOff(_) = what {
            self.after_shrink(host, held.session, None);
        }
        let disk = &self.workload.disks[&held.vdisk];
        let over = match &error {
            RequestError::NotAttached | RequestError::Refused(Refusal::SessionEnded) => true,
            RequestError::Admin(AdminError::DiskGone(_) | AdminError::NoSuchDisk(_)) => disk.deleting,
            _ => false,
        };
        if over {
            self.counters.count(Kind::Fenced);
            if let Some(life) = &mut self.clients[host].life {
                life.user.sessions.retain(|h| h.session != held.session);
            }
            return;
        }
        let expected = match &error {
            RequestError::Refused(Refusal::ReadOnly) => {
                held.mode == Attachment::ReadOnly && !matches!(what, What::Read(..) | What::Extents(..))
            }
            RequestError::Refused(Refusal::BeyondEnd) => disk.resized,
            // The other copy is away.
            RequestError::Refused(Refusal::BadCopy) => self.options.faults.spoil > 0 && self.is_before_judgement(),
            RequestError::Deadline { .. } => self.options.client_deadline.is_some(),
            RequestError::Refused(Refusal::NoSpace) => {
                self.counters.count(Kind::NoSpace);
                self.options.data.is_some()
            }
            _ => false,
        };
        if !expected {
            self.complain(format!("operation {id}, {what:?} on {}, failed: {error} ({error:?})", held.vdisk));
        }
    }

    fn on_attached(&mut self, host: usize, held: Held, take_over: bool) {
        if take_over {
            self.counters.count(Kind::TakeOver);
        }
        // Whoever was in the way is over, though it may have been detached by somebody else.
        if held.mode == Attachment::Exclusive {
            self.history.fence(held.vdisk, held.session);
        }
        if !self.workload.disks.contains_key(&held.vdisk) {
            return self.complain(format!("client {host} attached {}, which nobody made", held.vdisk));
        }
        let judging = self.clients[host].role == Role::Judge;
        let Some(life) = &mut self.clients[host].life else { return };
        life.user.sessions.push(held.clone());
        if judging {
            self.judge_attached(host, held);
        } else if self.workload.is_snapshot(held.vdisk) && !self.options.scripted {
            self.read_at_once(host, &held);
        }
    }

    fn on_attach_error(&mut self, host: usize, error: RequestError) {
        let expected = match &error {
            RequestError::Admin(AdminError::Refused(_) | AdminError::NoSuchDisk(_) | AdminError::DiskGone(_)) => true,
            RequestError::Admin(AdminError::NotDecided { .. } | AdminError::Starting(_)) => true,
            RequestError::Deadline { .. } => self.options.client_deadline.is_some(),
            _ => false,
        };
        let judging = self.clients[host].role == Role::Judge;
        self.workload.lags = matches!(error, RequestError::Admin(AdminError::NoSuchDisk(_)));
        if judging && self.workload.lags && self.judge_asks_again(host) {
            return;
        }
        if !expected || judging {
            self.complain(format!("client {host} cannot attach: {error} ({error:?})"));
        }
    }

    // --------------------------------------------------------------------------------------------
    // The operator.

    fn operate(&mut self, host: usize) {
        let late = self.options.late_learners && self.workload.to_create > 0;
        if let (Some(learner), false) = (self.workload.to_join.last().copied(), late) {
            let command =
                Command::AddServer { addresses: vec![address_of(learner)], token: self.servers[learner].token };
            return self.execute(host, command, Call::Join { host: learner });
        }
        if self.workload.to_create > 0 {
            return self.create(host);
        }
        if self.workload.stopped || self.options.mix.admin_percent == 0 {
            return;
        }
        let disks = self.workload.disks.values().filter(|d| d.of.is_none()).count();
        match self.workload.prng.below(8) {
            0 | 1 if disks < 6 => self.create(host),
            2 | 3 => self.rename(host),
            4..=6 => self.grow(host),
            _ => self.delete(host),
        }
    }

    /// Executes a command.
    pub fn execute(&mut self, host: usize, command: Command, call: Call) {
        self.ask(host, crate::ask::execute(command), Asked::Admin(call));
    }

    fn create(&mut self, host: usize) {
        let prng = &mut self.workload.prng;
        let size = match prng.below(6) {
            _ if self.options.crowded => 1 << 30,
            0 => prng.between(1, 16) * BLOCK_SIZE * 3 + 512,
            1 => 3 << 20,
            2 => 1 << 30,
            3 => (1 << 41) + 512,
            4 => petal::limits::DISK_SIZE_MAX,
            _ => prng.between(1 << 20, 1 << 40) / 512 * 512,
        };
        let most = self.workload.joined;
        let copies: Vec<usize> = self.options.copies.iter().copied().filter(|c| *c <= most).collect();
        let scheme = match copies.is_empty() {
            true => Scheme::Striped,
            false => scheme_of(*self.workload.prng.pick(&copies)),
        };
        let name = self.workload.new_name("disk");
        let command = Command::CreateDisk { name: name.clone(), size, scheme, stripe_unit: self.options.stripe_unit };
        self.execute(host, command, Call::Create { name, size });
    }

    fn rename(&mut self, host: usize) {
        let Some(vdisk) = self.workload.pick_disk() else { return };
        self.rename_to_something(host, vdisk);
    }

    /// Gives a disk or snapshot a name that nothing had.
    pub fn rename_to_something(&mut self, host: usize, vdisk: VdiskId) {
        let name = self.workload.new_name(if self.workload.is_snapshot(vdisk) { "snap" } else { "disk" });
        let disk = self.workload.disks.get_mut(&vdisk).expect("it was picked");
        disk.names.push(name.clone());
        self.execute(host, Command::RenameDisk { vdisk, name: name.clone() }, Call::Rename { vdisk, name });
    }

    /// Grows a disk to the size that it was made with, if somebody has made it smaller.
    fn grow(&mut self, host: usize) {
        let Some(vdisk) = self.workload.pick_disk() else { return };
        let size = self.workload.disks[&vdisk].full_size;
        let session = SessionId(0);
        self.execute(host, Command::ResizeDisk { vdisk, size, session }, Call::Resize { vdisk, size, session: None });
    }

    fn delete(&mut self, host: usize) {
        let alive = self.workload.disks.values().filter(|d| !d.deleting && d.of.is_none()).count();
        let Some(vdisk) = self.workload.pick_disk().filter(|_| alive > 1) else { return };
        self.workload.disks.get_mut(&vdisk).expect("it was picked").deleting = true;
        self.execute(host, Command::DeleteDisk { vdisk }, Call::Delete { vdisk });
    }

    /// Asks a server to stop.
    pub fn stop_server(&mut self, host: usize) {
        let Some(id) = self.servers[host].id else { return };
        self.ask(0, crate::ask::stop(id), Asked::Admin(Call::Stop));
    }

    fn on_executed(&mut self, host: usize, call: Call, outcome: Outcome) {
        match (call, outcome) {
            (Call::Join { host }, Outcome::Server(id)) => {
                if self.workload.to_join.contains(&host) {
                    self.counters.count(Kind::Joined);
                    self.workload.to_join.retain(|h| *h != host);
                    self.workload.joined += 1;
                    self.format(host, id);
                    self.plan_start(Node::Server(host), self.now);
                }
            }
            (Call::Create { name, size }, Outcome::Disk(vdisk)) => {
                self.counters.count(Kind::Created);
                self.workload.to_create = self.workload.to_create.saturating_sub(1);
                let layout = match self.options.crowded {
                    _ if self.options.recovering => Layout::scattered(&mut self.workload.prng, size),
                    true if self.options.full => Layout::full(&mut self.workload.prng, size),
                    true => Layout::crowded(&mut self.workload.prng, size),
                    false => Layout::draw(&mut self.workload.prng, size, self.options.stripe_unit),
                };
                let names = vec![name];
                let disk =
                    Disk { of: None, taken: None, names, layout, full_size: size, resized: false, deleting: false };
                if self.workload.disks.insert(vdisk, disk).is_some() {
                    self.complain(format!("two disks were made with the id {vdisk}"));
                }
            }
            (Call::Rename { vdisk, name }, Outcome::Done) => {
                self.counters.count(Kind::Renamed);
                if self.workload.is_snapshot(vdisk) {
                    self.counters.count(Kind::RenamedSnapshot);
                }
                if let Some(disk) = self.workload.disks.get_mut(&vdisk) {
                    disk.names = vec![name];
                }
            }
            (Call::Resize { session: None, .. }, Outcome::Done) => self.counters.count(Kind::Grown),
            (Call::Resize { size, session: Some(session), .. }, Outcome::Done) => {
                self.counters.count(Kind::Shrunk);
                self.after_shrink(host, session, Some(size));
            }
            (Call::Delete { .. }, Outcome::Done) => self.counters.count(Kind::Deleted),
            (call, outcome) => self.complain(format!("{call:?} was executed as {outcome:?}")),
        }
    }

    fn on_call_error(&mut self, host: usize, call: Call, error: RequestError) {
        let expected = match &error {
            RequestError::Admin(AdminError::NotDecided { .. } | AdminError::Starting(_)) => true,
            RequestError::Deadline { .. } => true,
            // Refused: attached when it was to be deleted, gone when it was to be renamed, and so on.
            RequestError::Admin(AdminError::Refused(_)) => !matches!(call, Call::Join { .. }),
            _ => false,
        };
        if !expected {
            self.complain(format!("{call:?} failed: {error} ({error:?})"));
        }
        if let (Call::Delete { vdisk }, RequestError::Admin(AdminError::Refused(_))) = (&call, &error)
            && let Some(disk) = self.workload.disks.get_mut(vdisk)
        {
            disk.deleting = false;
        }
        if let Call::Resize { session: Some(session), size, .. } = call {
            // Perhaps it is smaller: then what lies beyond is refused.
            self.after_shrink(host, session, Some(size));
        }
    }
}

fn draw_mode(prng: &mut Prng) -> Attachment {
    match prng.below(6) {
        0 | 1 => Attachment::Exclusive,
        2..=4 => Attachment::Shared,
        _ => Attachment::ReadOnly,
    }
}

/// The scheme with so many copies.
pub fn scheme_of(copies: usize) -> Scheme {
    match copies {
        1 => Scheme::Striped,
        2 => Scheme::Chained,
        _ => Scheme::Chained3,
    }
}

/// Position of a draw among weights.
pub fn draw_weighted(prng: &mut Prng, weights: &[u64]) -> usize {
    let mut left = prng.below(weights.iter().sum::<u64>().max(1));
    for (i, weight) in weights.iter().enumerate() {
        if left < *weight {
            return i;
        }
        left -= weight;
    }
    0
}

fn in_words(request: &Request) -> String {
    match request {
        Request::Write { session, offset, data } => format!("Write {session} {} bytes at {offset}", data.len()),
        other => format!("{other:?}"),
    }
}

fn outcome_in_words(result: &Result<Response, RequestError>) -> String {
    match result {
        Ok(Response::Data(pieces)) => format!("{} bytes", pieces.iter().map(Bytes::len).sum::<usize>()),
        other => format!("{other:?}"),
    }
}
