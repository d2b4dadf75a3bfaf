//! A Petal server: owns its rooms, and is the only file that routes between them.

mod executing;
mod leaving;
mod lives;
mod moving;
mod policies;
mod relays;
mod settling;
mod status;

use crate::data_access::{Context, DataAccess};
use crate::desk::Desk;
use crate::disk_times::DiskTimes;
use crate::disk_watch::DiskWatch;
use crate::global_state::{Command, Effects, Genesis, GlobalOutput, GlobalState, Own, RecentEntry, State};
use crate::ids::*;
use crate::limits::{HALF_LEASE, LEASE};
use crate::liveness::{Liveness, LivenessOutput};
use crate::message::*;
use crate::mover::Mover;
use crate::policy::Policies;
use crate::sabotage::Sabotage;
use crate::scrub::{Scrub, ScrubConfig};
use crate::store::{Change, DiskCommand, DiskResult, Event, OpId, OpenDisk, StageError, StoreConfig, Stores, Ticket};
use bytes::Bytes;
use relays::Relays;
pub(crate) use relays::carrier;
use settling::settlers;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use stdx::{Duration, FastMap, Instant, Machine};

/// Number of a client connection, given by the driver; never used twice in one server life.
pub type ClientId = u64;

/// Who is at the other end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Peer {
    /// Another server of the cluster.
    Server(ServerId),
    /// A client connection.
    Client(ClientId),
}

/// What the world tells a server.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "most inputs are messages: a box would be an allocation for each")]
pub enum Input {
    /// A connection is up, hellos exchanged (cluster, protocol version, identity checked). For a
    /// server: its incarnation. A connection belongs to one incarnation of either end; a new one for
    /// the same server replaces the old.
    Connected {
        /// Who.
        peer: Peer,
        /// Of a server; zero for clients.
        incarnation: Incarnation,
    },
    /// The connection is gone, with whatever was on it.
    Disconnected {
        /// Who.
        peer: Peer,
    },
    /// A server that was connected, and is not, refuses connections: nobody listens at any of its addresses.
    /// (No answer is not a refusal.)
    Refused {
        /// The server.
        server: ServerId,
    },
    /// A message. Messages of one connection arrive in order.
    Message {
        /// From whom.
        from: Peer,
        /// What.
        message: Message,
    },
    /// A disk command is done.
    Disk {
        /// Which disk.
        disk: usize,
        /// Which command.
        op: OpId,
        /// What became of it.
        result: DiskResult,
    },
    /// Time has passed.
    Tick,
    /// The wall clock, now and then: for names and ages, and never for anything that must be right (P9).
    WallClock {
        /// Seconds since 1970.
        unix_seconds: u64,
    },
    /// The process was told to stop: hand over, then `Stopped`.
    ShutDown,
}

/// What a server wants of the world.
#[derive(Clone, Debug)]
pub enum Output {
    /// Send over the connection to `to`; dropped if there is none.
    Send {
        /// To whom.
        to: Peer,
        /// What.
        message: Message,
    },
    /// Do this with a disk.
    Disk {
        /// Which disk.
        disk: usize,
        /// Which command.
        op: OpId,
        /// What.
        command: DiskCommand,
    },
    /// Keep a connection to this server at one of these addresses.
    Dial {
        /// The server.
        server: ServerId,
        /// Its addresses, the best first. None: it was removed, and is dialled no more.
        addresses: Vec<String>,
    },
    /// The server has begun to serve: its `ServerUp` is applied.
    Ready,
    /// The server must begin a new life, and says why: stop it, and start it again on the same disks when
    /// nothing is in flight there any more.
    Restart(String),
    /// The server cannot go on, and says why; the process ends.
    Fatal(String),
    /// The server was asked to stop and has stopped.
    Stopped,
}

/// What a server is started with.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where others reach it, the best address first.
    pub addresses: Vec<String>,
    /// Bounds of memory.
    pub store: StoreConfig,
    /// It only votes: it tells of no room for data, so that nothing is placed on it.
    pub witness: bool,
    /// How long a disk may answer nothing until the server goes out of the way: [`crate::limits::HALF_LEASE`] where disks are
    /// its own, more where other servers have the same one.
    pub disk_patience: Duration,
    /// How it looks for bad blocks.
    pub scrub: ScrubConfig,
    /// A rule left out, to test the checkers. Always `Sabotage::None` in a real server.
    pub sabotage: Sabotage,
    /// Drawn at random for each life. A disk that was copied begins the same life as the original did, by its number;
    /// by this its commands are known for what they are, and not taken for those that were executed before.
    pub salt: u64,
}

/// Where a server's life is.
///
/// ```text
///  Opening (disks replay) -> Joining (ServerUp is proposed) -> Running -> Stopping
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The disks are being opened; nothing is sent.
    Opening,
    /// Follows the log, and waits for its own `ServerUp`.
    Joining { server_up: CommandId },
    /// Serves.
    Running,
    /// Serves no more. Where there are others it has said `Goodbye`, or that a disk failed, and ends when that is
    /// decided; else it ends when the requests in progress have.
    Stopping { deadline: Instant, goodbye: Option<CommandId> },
}

/// A data message that needs a state that this server does not have yet.
struct Deferred {
    from: Peer,
    body: Body,
    /// What a client wants is refused then: it may need a state that no log will ever reach.
    until: Instant,
}

/// A Petal server.
pub struct Server {
    me: ServerId,
    incarnation: Incarnation,
    cluster: ClusterId,
    genesis: Genesis,
    /// See [`crate::store::superblock::Superblock::votes_from`].
    votes_from: u32,
    addresses: Vec<String>,
    /// As the disks were found: id, lives, capacity.
    disks_found: Vec<(DiskId, Lives, u64)>,
    salt: u64,
    /// Why the cluster does not take this life.
    refused: Option<String>,
    stage: Stage,
    /// What it ends with, if not as it was told to.
    last_word: Option<Output>,
    stores: Stores,
    watch: DiskWatch,
    /// When those who have not settled something are asked again, and how often that was done.
    settle_again: Option<Instant>,
    settle_rounds: usize,
    global: Option<GlobalState>,
    liveness: Liveness,
    data: DataAccess,
    admin: Desk,
    policies: Policies,
    mover: Mover,
    /// Tickets of the global state's writes, and the number to tell it.
    persists: FastMap<Ticket, u64>,
    persist_waits: BTreeMap<u64, usize>,
    /// Writes of the global state that wait for room in the journal.
    unstaged: VecDeque<(u64, Bytes, Option<Bytes>)>,
    /// Commands of data access that are being decided, with its keys.
    own_commands: BTreeMap<(u64, u64), u64>,
    deferred: VecDeque<Deferred>,
    relays: Relays,
    connected: BTreeMap<ServerId, Incarnation>,
    sabotage: Sabotage,
    /// Whether this server led the ring when it last looked.
    leads: bool,
    /// A restart was asked for.
    ended: bool,
    /// What came before the disks were open.
    early: VecDeque<Input>,
    now: Instant,
    /// When the stores try again to grow a disk file that the file system below had no room for.
    growth_retry: Option<Instant>,
    /// When it is noted next how far the journals are durable.
    next_mark: Instant,
    /// That was done for the last time.
    is_marked: bool,
    disk_times: DiskTimes,
    out: VecDeque<Output>,
    flushed: bool,
}

impl Server {
    /// Starts a new life on these disks (all of the server's, in the order of their superblocks' list).
    /// Identity, cluster and ring come from the superblocks. Sends nothing before the new incarnation
    /// is durable on every disk.
    pub fn start(now: Instant, config: ServerConfig, mut disks: Vec<OpenDisk>) -> Server {
        let superblock = &disks.first().expect("a server has at least one disk").superblock;
        let (me, genesis, votes_from) = (superblock.server, superblock.genesis.clone(), superblock.votes_from);
        // Of those with the same last life, the one that knows that it was taken.
        let lives: Vec<Lives> = disks.iter().map(|d| d.superblock.lives()).collect();
        let newest = lives.iter().max().expect("at least one");
        let incarnation = Lives::next(lives.iter(), (config.salt >> 32) as u32);
        let room = |s: &crate::store::superblock::Superblock| if config.witness { 0 } else { s.data_capacity() };
        let disks_found =
            disks.iter().map(|d| (d.superblock.disk, d.superblock.lives(), room(&d.superblock))).collect();
        for superblock in disks.iter_mut().map(|d| &mut d.superblock) {
            superblock.set_lives(superblock.lives().then(incarnation, newest.taken));
        }
        let store = StoreConfig { sabotage: config.sabotage, ..config.store };
        Server {
            me,
            incarnation,
            cluster: genesis.cluster,
            genesis,
            votes_from,
            addresses: config.addresses,
            disks_found,
            salt: config.salt,
            refused: None,
            stage: Stage::Opening,
            last_word: None,
            watch: DiskWatch::new(now, disks.len(), config.disk_patience),
            settle_again: None,
            settle_rounds: 0,
            stores: Stores::open(disks, incarnation, store),
            global: None,
            liveness: Liveness::new(now, me, incarnation, config.sabotage),
            data: DataAccess::new(me, incarnation, Scrub::new(now, config.scrub), config.sabotage),
            admin: Desk::default(),
            policies: Policies::default(),
            mover: Mover::default(),
            persists: FastMap::new(),
            persist_waits: BTreeMap::new(),
            unstaged: VecDeque::new(),
            own_commands: BTreeMap::new(),
            deferred: VecDeque::new(),
            relays: Relays::new(incarnation),
            connected: BTreeMap::new(),
            sabotage: config.sabotage,
            leads: false,
            ended: false,
            early: VecDeque::new(),
            now,
            growth_retry: None,
            next_mark: now + MARK_INTERVAL,
            is_marked: false,
            disk_times: DiskTimes::default(),
            out: VecDeque::new(),
            flushed: false,
        }
    }

    /// Who it is.
    pub fn id(&self) -> ServerId {
        self.me
    }

    /// Its life; known at once, durable before anything is sent.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// The cluster.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// What data access has counted since the start.
    pub fn counters(&self) -> &crate::data_access::Counters {
        &self.data.counters
    }

    /// Elements with bad blocks that are not repaired yet.
    pub fn repairs(&self) -> usize {
        self.data.repairs()
    }

    /// True if this server brings members back at the moment: that one, or any.
    pub fn is_recovering(&self, member: Option<ServerId>) -> bool {
        self.data.joining.iter().any(|(_, server)| member.is_none_or(|m| m == *server))
    }

    /// The state as applied; `None` while the disks are being opened.
    pub fn state(&self) -> Option<&State> {
        self.global.as_ref().map(GlobalState::state)
    }

    /// True when it serves.
    pub fn is_running(&self) -> bool {
        self.stage == Stage::Running
    }

    /// The disks, for checkers.
    pub fn stores(&self) -> &Stores {
        &self.stores
    }

    /// The disks, for checkers that must load entries.
    pub fn stores_mut(&mut self) -> &mut Stores {
        &mut self.stores
    }

    /// When its lease ends unless it is renewed, for checkers.
    pub fn lease_until(&self) -> Option<Instant> {
        self.liveness.lease_until()
    }

    /// Data access, for checkers.
    pub fn data(&self) -> &DataAccess {
        &self.data
    }

    // --------------------------------------------------------------------------------------------
    // Routing.

    fn route(&mut self, input: Input) {
        match input {
            Input::Connected { peer: Peer::Server(server), incarnation } => self.on_connected(server, incarnation),
            Input::Connected { peer: Peer::Client(_), .. } => {}
            Input::Disconnected { peer: Peer::Server(server) } => self.on_disconnected(server),
            Input::Disconnected { peer: Peer::Client(client) } => {
                self.client_gone(client);
                self.admin.on_client_gone(client);
            }
            Input::Refused { server } => self.on_refused(server),
            Input::Message { from, message } => self.on_message(from, message),
            Input::Disk { .. } | Input::Tick | Input::WallClock { .. } | Input::ShutDown => {
                unreachable!("handled before routing")
            }
        }
    }

    fn on_connected(&mut self, server: ServerId, incarnation: Incarnation) {
        self.end_relays(server); // A connection that this one replaces answers nothing any more.
        self.connected.insert(server, incarnation);
        let now = self.now;
        self.global().on_connected(now, server);
        self.with_liveness(|liveness, global| liveness.on_connected(now, global, server));
        self.with_data(|data, ctx| data.on_connected(ctx, server, incarnation));
        for index in self.unsettled_at(server) {
            self.ask_to_settle(server, index);
        }
    }

    fn on_disconnected(&mut self, server: ServerId) {
        self.connected.remove(&server);
        let now = self.now;
        self.global().on_disconnected(now, server);
        self.liveness.on_disconnected(server);
        self.data.on_disconnected(server);
        self.deferred.retain(|d| d.from != Peer::Server(server));
        self.end_relays(server);
    }

    fn on_refused(&mut self, server: ServerId) {
        let now = self.now;
        if !self.connected.contains_key(&server) {
            self.with_liveness(|liveness, global| liveness.on_refused(now, global, server));
        }
    }

    fn on_message(&mut self, from: Peer, message: Message) {
        let now = self.now;
        if let Peer::Server(server) = from {
            let stopping = matches!(self.stage, Stage::Stopping { .. });
            let global = self.global();
            if global.has_forgotten(message.state_index) {
                return self.end_as_forgetful(server, message.state_index);
            }
            // Who stops wants to know that the others have its goodbye.
            if stopping || message.state_index > global.state().index {
                global.on_index(now, server, message.state_index);
            }
            if self.data.gates.on_applied(server, message.state_index) {
                self.with_data(|data, ctx| data.complete_what_waited(ctx));
            }
            if self.data.leaving.unsettled.on_applied(server, message.state_index) {
                self.data.want_sweep();
            }
            self.with_data(|data, ctx| data.on_told(ctx, server, message.state_index));
        }
        match (from, message.body) {
            (Peer::Server(server), body @ (Body::Ring(_) | Body::Propose(_) | Body::Learn(_))) => {
                self.global().on_message(now, server, body);
            }
            (Peer::Server(server), body @ (Body::Entries(_) | Body::Snapshot(_))) => {
                self.global().on_message(now, server, body);
            }
            (Peer::Server(server), Body::Heartbeat(m)) => {
                self.with_liveness(|liveness, global| liveness.on_heartbeat(now, global, server, m));
            }
            (Peer::Server(server), Body::Grant(m)) => self.liveness.on_grant(now, server, m),
            (_, Body::Index) => {}
            (Peer::Client(client), Body::Admin(admin)) => self.on_admin(client, admin),
            (Peer::Server(server), body @ (Body::Settle(_) | Body::Settled(_))) => {
                if let Some(body) = self.pass_on_settling(server, body) {
                    self.on_data_message(from, body, self.now + LEASE);
                }
            }
            (from, body) => {
                if let Some((from, body)) = self.pass_on(from, body) {
                    self.on_data_message(from, body, self.now + LEASE);
                }
            }
        }
    }

    /// Data messages rely on a state: who knows less than the sender catches up before it acts (2.4).
    fn on_data_message(&mut self, from: Peer, body: Body, until: Instant) {
        let applied = self.global().state().index;
        let ready = matches!(self.stage, Stage::Running | Stage::Stopping { .. });
        if !ready || need_of(&body) > applied {
            return self.defer(from, body, until);
        }
        if self.is_handing_over() && matches!(from, Peer::Client(_)) {
            return self.defer(from, body, until); // Until it is known who is to answer.
        }
        let stopping = matches!(self.stage, Stage::Stopping { goodbye: None, .. });
        if let (Peer::Server(_), Body::Settled(m)) = (from, &body) {
            return self.on_settled(m.settler, m.index);
        }
        self.with_data(|data, ctx| match (from, body) {
            // What was begun is finished; nothing new is.
            (Peer::Client(_), Body::Read(_) | Body::Write(_) | Body::Zero(_) | Body::Map(_)) if stopping => {}
            (Peer::Client(client), body @ (Body::Read(_) | Body::Write(_) | Body::Zero(_) | Body::Map(_))) => {
                data.on_request(ctx, client, body);
            }
            (Peer::Server(s), Body::Replicate(m)) => data.on_replicate(ctx, s, m),
            (Peer::Server(s), Body::StreamAck(m)) => data.on_stream_ack(ctx, s, m),
            (Peer::Server(s), Body::CreditReturned(m)) => data.on_credit_returned(s, m),
            (Peer::Server(s), Body::Watermarks(m)) => data.on_watermarks(ctx, s, m),
            (Peer::Server(s), Body::Promise(m)) => data.on_promise(ctx, s, m),
            (Peer::Server(s), Body::Promised(m)) => data.on_promised(ctx, s, m),
            (Peer::Server(s), Body::List(m)) => data.on_list(ctx, s, m),
            (Peer::Server(s), Body::Listed(m)) => data.on_listed(ctx, s, m),
            (Peer::Server(s), Body::Fetch(m)) => data.on_fetch(ctx, s, m),
            (Peer::Server(s), Body::Fetched(m)) => data.on_fetched(ctx, s, m),
            (Peer::Server(s), Body::Compare(m)) => data.on_compare(ctx, s, m),
            (Peer::Server(s), Body::Compared(m)) => data.on_compared(ctx, s, m),
            (Peer::Server(s), Body::Settle(m)) => data.on_settle(ctx, s, m.asker, m.index),
            _ => {} // A message that this peer has no business to send.
        });
    }

    /// Keeps a message until the state has caught up. Clients are told to come again when there are many:
    /// they cannot fill the room that servers need.
    fn defer(&mut self, from: Peer, body: Body, until: Instant) {
        if let Peer::Client(client) = from {
            let of_clients = self.deferred.iter().filter(|d| matches!(d.from, Peer::Client(_))).count();
            if of_clients >= DEFERRED_CLIENTS_MAX {
                return self.with_data(|data, ctx| data.refuse_unseen(ctx, client, &body));
            }
            if !matches!(body, Body::Read(_) | Body::Write(_) | Body::Zero(_) | Body::Map(_)) {
                return; // A message that a client has no business to send.
            }
        }
        if self.deferred.len() < DEFERRED_MAX {
            self.deferred.push_back(Deferred { from, body, until });
        }
    }

    fn global(&mut self) -> &mut GlobalState {
        self.global.as_mut().expect("messages are handled when the disks are open")
    }

    fn with_liveness(&mut self, f: impl FnOnce(&mut Liveness, &mut GlobalState)) {
        f(&mut self.liveness, self.global.as_mut().expect("messages are handled when the disks are open"));
    }

    fn with_data<R>(&mut self, f: impl FnOnce(&mut DataAccess, &mut Context) -> R) -> R {
        let global = self.global.as_ref().expect("messages are handled when the disks are open");
        let mut ctx = Context {
            now: self.now,
            stores: &mut self.stores,
            state: global.state(),
            liveness: &self.liveness,
            out: &mut self.out,
        };
        f(&mut self.data, &mut ctx)
    }

    // --------------------------------------------------------------------------------------------
    // Management.

    fn on_admin(&mut self, client: ClientId, m: Admin) {
        let Admin { tag, request } = m;
        let result = match request {
            AdminRequest::Execute { id, command, deadline_millis } => {
                return self.on_execute(client, tag, id, command, deadline_millis);
            }
            AdminRequest::Shutdown => {
                self.shut_down();
                Ok(AdminResponse::ShuttingDown)
            }
            AdminRequest::ServerStatus => Ok(AdminResponse::ServerStatus(Box::new(self.status()))),
            AdminRequest::Log => Ok(AdminResponse::Log(self.log())),
            _ if matches!(self.stage, Stage::Opening | Stage::Joining { .. }) => Err(AdminError::Starting(self.me)),
            AdminRequest::Hints { name } => {
                let gone = self.unless_behind(AdminError::NoSuchDisk(name.clone()));
                self.global().state().hints_by_name(&name).map(hints).ok_or(gone)
            }
            AdminRequest::HintsById { vdisk } => {
                let gone = self.unless_behind(AdminError::DiskGone(vdisk));
                self.global().state().hints(vdisk).map(hints).ok_or(gone)
            }
            AdminRequest::State => Ok(AdminResponse::State(self.global().state().encode())),
            AdminRequest::Verify { after } => {
                return self.with_data(|data, ctx| data.on_verify(ctx, client, tag, after));
            }
            AdminRequest::Space(question) => {
                return self.with_data(|data, ctx| data.on_space(ctx, client, tag, question));
            }
            AdminRequest::Scrub(order) => {
                let status = self.with_data(|data, ctx| data.on_scrub_order(ctx, order));
                Ok(AdminResponse::Scrub(Box::new(status)))
            }
        };
        self.reply_admin(client, tag, result);
    }

    /// Who has no lease may have been away for long: that there is no such disk is for others to say.
    fn unless_behind(&self, error: AdminError) -> AdminError {
        if self.liveness.lease(self.now).is_some() { error } else { AdminError::Starting(self.me) }
    }

    fn reply_admin(&mut self, client: ClientId, tag: Tag, result: Result<AdminResponse, AdminError>) {
        let state_index = self.state().map_or(0, |s| s.index);
        let message = Message { state_index, body: Body::AdminReply(AdminReply { tag, result }) };
        self.out.push_back(Output::Send { to: Peer::Client(client), message });
    }

    fn send(&mut self, to: ServerId, body: Body) {
        let state_index = self.state().map_or(0, |s| s.index);
        self.out.push_back(Output::Send { to: Peer::Server(to), message: Message { state_index, body } });
    }

    // --------------------------------------------------------------------------------------------
    // What the rooms want.

    /// Puts in order what an input has set in motion, until nothing moves any more.
    fn maintain(&mut self) -> bool {
        let mut moved_ever = false;
        loop {
            let mut moved = false;
            while let Some(event) = self.stores.poll_event() {
                self.on_store_event(event);
                moved = true;
            }
            while let Some(output) = self.global.as_mut().and_then(GlobalState::poll_output) {
                self.on_global_output(output);
                moved = true;
            }
            for (key, command) in self.data.take_proposals() {
                let now = self.now;
                let id = self.global().propose_own(now, command);
                self.own_commands.insert((id.proposer, id.number), key);
                moved = true;
            }
            self.follow_leadership();
            while let Some(output) = self.liveness.poll_output() {
                self.on_liveness_output(output);
                moved = true;
            }
            for index in self.data.take_settled_here() {
                self.on_settled(self.me, index);
                moved = true;
            }
            if !moved {
                return moved_ever;
            }
            moved_ever = true;
        }
    }

    /// Who begins to lead looks at once who is gone.
    fn follow_leadership(&mut self) {
        let leads = self.global.as_ref().is_some_and(GlobalState::leads);
        if std::mem::replace(&mut self.leads, leads) != leads {
            self.liveness_follows(false);
        }
    }

    fn liveness_follows(&mut self, named: bool) {
        let now = self.now;
        self.with_liveness(|liveness, global| liveness.on_state(now, global, named));
    }

    fn on_liveness_output(&mut self, output: LivenessOutput) {
        match output {
            LivenessOutput::Send { to, body } => self.send(to, body),
            LivenessOutput::LeaseGained => self.with_data(|data, ctx| data.complete_what_waited(ctx)),
        }
    }

    fn on_store_event(&mut self, event: Event) {
        match event {
            Event::Opened => self.on_opened(),
            Event::LifeTakenBack => {
                let why = self.refused.take().unwrap_or_default();
                self.out.push_back(Output::Fatal(why));
            }
            Event::DiskFailed { reason, .. } => self.on_disk_failed(&reason),
            Event::Loaded(element) => self.with_data(|data, ctx| data.on_loaded(ctx, element)),
            Event::Stable(ticket) => {
                if let Some(number) = self.persists.remove(&ticket) {
                    self.on_persisted(number);
                } else {
                    self.with_data(|data, ctx| data.on_stable(ctx, ticket));
                }
            }
            Event::Read { read, result } => self.with_data(|data, ctx| data.on_read_done(ctx, read, result)),
            Event::Scanned { scan, elements } => self.with_data(|data, ctx| data.on_scanned(ctx, scan, elements)),
        }
    }

    fn on_persisted(&mut self, number: u64) {
        let waits = self.persist_waits.get_mut(&number).expect("a persist in progress is counted");
        *waits -= 1;
        // Changes become stable in order, so the numbers do too.
        if *waits == 0 {
            self.persist_waits.remove(&number);
            self.global().on_persisted(number);
        }
    }

    fn on_opened(&mut self) {
        let proposer = (u64::from(self.me.0) << 48) | ((self.incarnation.0 ^ self.salt) & ((1 << 48) - 1));
        let durable = self.stores.meta_prefix(b"ring/");
        let disks = self.disks_found.iter().map(|(disk, ..)| *disk).collect();
        let own = Own { server: self.me, disks, votes_from: self.votes_from };
        let mut global = match GlobalState::open(own, &self.genesis, proposer, durable) {
            Ok(global) => global,
            Err(damaged) => return self.out.push_back(Output::Fatal(damaged.to_string())),
        };
        let command = Command::ServerUp {
            server: self.me,
            incarnation: self.incarnation,
            addresses: self.addresses.clone(),
            disks: self.disks_to_tell(&global),
        };
        global.leave_out(self.sabotage);
        let server_up = global.propose_own(self.now, command);
        self.stage = Stage::Joining { server_up };
        self.global = Some(global);
        self.liveness = Liveness::new(self.now, self.me, self.incarnation, self.sabotage);
        self.liveness_follows(false);
        for input in std::mem::take(&mut self.early) {
            self.route(input);
        }
    }

    fn on_global_output(&mut self, output: GlobalOutput) {
        match output {
            GlobalOutput::Send { to, body } => {
                let state_index = self.global().state().index;
                let message = Message { state_index, body };
                self.out.push_back(Output::Send { to: Peer::Server(to), message });
            }
            GlobalOutput::Persist { number, writes } => {
                self.persist_waits.insert(number, writes.len());
                self.unstaged.extend(writes.into_iter().map(|(key, value)| (number, key, value)));
                self.stage_persists();
            }
            GlobalOutput::Applied { id, effects, index } => self.on_applied(id, index, effects),
            GlobalOutput::Jumped => {
                self.liveness_follows(true);
                self.follow_state(None);
                self.with_data(|data, ctx| data.on_families_ended(ctx));
                self.data.want_sweep();
                self.data.want_reclaim_of_all(self.global.as_ref().expect("it told that it jumped").state());
                let state = self.global.as_ref().expect("it told that it jumped").state();
                let is_done = |(proposer, number): &(u64, u64)| {
                    state.is_executed(&CommandId { proposer: *proposer, number: *number, finished_below: 0 })
                };
                let done: Vec<(u64, u64)> = self.own_commands.keys().filter(|id| is_done(id)).copied().collect();
                for id in done {
                    let key = self.own_commands.remove(&id).expect("just listed");
                    self.with_data(|data, ctx| data.on_proposal_decided(ctx, key));
                }
                for id in self.admin.waiting() {
                    self.on_executed(id, true);
                }
                let down = self.global().state().servers.iter().filter(|(_, s)| s.down).map(|(s, _)| *s).collect();
                let index = self.global().state().index;
                self.on_downs(index, down);
                self.settle_leaving();
                if self.stage == Stage::Running {
                    self.close_gate_of_all();
                }
                self.retry_deferred();
            }
            GlobalOutput::Dial { server, addresses } => self.out.push_back(Output::Dial { server, addresses }),
        }
    }

    /// Stages the global state's writes, in order. A journal that is full for the moment makes them wait.
    fn stage_persists(&mut self) {
        while let Some((number, key, value)) = self.unstaged.pop_front() {
            match self.stores.stage(Change::Meta { key: key.clone(), value: value.clone() }) {
                Ok(ticket) => {
                    self.persists.insert(ticket, number);
                }
                // A disk that has failed is told of by itself.
                Err(StageError::NoSpace | StageError::DiskFailed) => {
                    return self.unstaged.push_front((number, key, value));
                }
                Err(error) => {
                    let why = format!("the global state cannot be stored: {error:?}; check this server's disks");
                    return self.out.push_back(Output::Fatal(why));
                }
            }
        }
    }

    fn on_applied(&mut self, id: CommandId, index: StateIndex, effects: Effects) {
        if !effects.names.is_empty() {
            self.liveness_follows(effects.names.contains(&self.me));
        }
        if let Stage::Joining { server_up } = self.stage {
            if (server_up.proposer, server_up.number) == (id.proposer, id.number) {
                self.on_own_server_up(id);
            }
        } else {
            // A suspicion moves no slot.
            let only_slots = self.sabotage != Sabotage::FirstNotSuspectedActs;
            self.follow_state(only_slots.then_some(&effects.slots[..]));
            if !effects.servers.is_empty() || !effects.names.is_empty() {
                self.data.want_review();
            }
            if !effects.families_ended.is_empty() {
                self.with_data(|data, ctx| data.on_families_ended(ctx));
                self.data.want_sweep();
            }
            for session in &effects.sessions_ended {
                self.data.on_session_ended(*session);
            }
            for family in &effects.families_narrowed {
                self.data.want_reclaim(*family);
            }
            self.close_gate(&effects.new_epochs_gated);
            self.settle_leaving();
        }
        if let Some(key) = self.own_commands.remove(&(id.proposer, id.number)) {
            self.with_data(|data, ctx| data.on_proposal_decided(ctx, key));
        }
        self.on_executed(id, effects.narrows);
        self.policies_follow(id);
        self.movers_follow(id);
        if !effects.downs.is_empty() {
            self.on_downs(index, effects.downs);
        }
        self.retry_deferred();
    }

    fn follow_state(&mut self, changed: Option<&[SlotId]>) {
        if matches!(self.stage, Stage::Running | Stage::Stopping { .. }) {
            self.end_if_another_life_began();
            self.with_data(|data, ctx| data.on_state(ctx, changed));
        } else if changed.is_none()
            && let Stage::Joining { server_up } = self.stage
            && self.global().state().is_executed(&server_up)
        {
            // A snapshot that contains its own ServerUp.
            self.on_own_server_up(server_up);
        }
    }

    fn retry_deferred(&mut self) {
        for Deferred { from, body, until } in std::mem::take(&mut self.deferred) {
            self.on_data_message(from, body, until);
        }
    }

    /// Clients whose requests have waited for a state for as long as a lease are told to come again.
    fn refuse_deferred(&mut self) {
        let now = self.now;
        let is_late = |d: &Deferred| matches!(d.from, Peer::Client(_)) && d.until <= now;
        if self.global.is_none() || !self.deferred.iter().any(is_late) {
            return;
        }
        let (late, kept): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.deferred).into_iter().partition(is_late);
        self.deferred = kept;
        for Deferred { from, body, .. } in late {
            if let Peer::Client(client) = from {
                self.with_data(|data, ctx| data.refuse_unseen(ctx, client, &body));
            }
        }
    }

    fn flush(&mut self) {
        loop {
            self.stage_persists();
            if self.global.is_some() {
                self.with_data(|data, ctx| data.flush(ctx));
            }
            self.stores.flush();
            // What a flush has set in motion may have staged more.
            if !self.maintain() {
                break;
            }
        }
        if self.stores.is_host_full() && self.growth_retry.is_none() {
            self.growth_retry = Some(self.now + GROWTH_RETRY);
        }
        self.check_stopping();
    }
}

impl Machine for Server {
    type Input = Input;
    type Output = Output;

    fn handle(&mut self, now: Instant, input: Input) {
        self.now = self.now.max(now);
        self.flushed = false;
        match input {
            Input::Disk { disk, op, result } if DiskWatch::is_probe(op) => {
                self.watch.on_answer(self.now, disk, op, &result);
            }
            Input::Disk { disk, op, result } => {
                self.disk_times.ended(self.now, disk, op);
                self.watch.on_answer(self.now, disk, op, &result);
                self.stores.on_disk(disk, op, result);
            }
            Input::Tick => {
                if let Some(global) = &mut self.global {
                    global.tick(now);
                    self.liveness.tick(now, global);
                }
                let ring: Vec<ServerId> =
                    self.state().map_or_else(Vec::new, |s| s.ring.members.iter().map(|m| m.server).collect());
                for id in self.admin.tick(now, &ring, &mut self.out) {
                    self.global().forget_proposal(&id);
                }
                if self.growth_retry.is_some_and(|at| at <= now) {
                    self.growth_retry = None;
                    self.stores.retry_growth();
                }
                if self.next_mark <= now {
                    self.next_mark = now + MARK_INTERVAL;
                    self.stores.mark_journals();
                }
                self.watch_disks();
                self.ask_again_to_settle();
                self.refuse_deferred();
                self.look_at_policies();
                self.look_at_moves();
            }
            Input::WallClock { unix_seconds } => self.policies.on_wall_clock(now, unix_seconds),
            Input::ShutDown => self.shut_down(),
            input if self.global.is_none() => self.early.push_back(input),
            input => self.route(input),
        }
        self.maintain();
    }

    fn poll_output(&mut self) -> Option<Output> {
        // Group commit and the merging of acknowledgements: what waits is put together when the driver
        // has no more inputs.
        if !self.flushed {
            self.flushed = true;
            self.flush();
        }
        if let Some((disk, op, command)) = self.stores.poll_command() {
            self.disk_times.begun(self.now, disk, op, &command);
            self.watch.on_command(self.now, disk, op, &command);
            return Some(Output::Disk { disk, op, command });
        }
        if let Some((disk, op, command)) = self.watch.poll_probe(self.now) {
            return Some(Output::Disk { disk, op, command });
        }
        self.out.pop_front()
    }

    fn next_timeout(&self) -> Option<Instant> {
        let stopping = match self.stage {
            Stage::Stopping { deadline, .. } => Some(deadline),
            _ => None,
        };
        let global = self.global.as_ref().and_then(GlobalState::next_timeout);
        let liveness = self.global.as_ref().map(|_| self.liveness.next_timeout());
        let rooms = [global, liveness, self.data.next_timeout(), self.admin.next_timeout(), self.watch.next_look()];
        rooms.into_iter().chain([stopping, self.growth_retry, self.settle_again]).flatten().min()
    }

    fn check_invariants(&self) {
        self.stores.check_invariants();
        self.data.check_invariants();
        if let Some(global) = &self.global {
            global.check_invariants();
        }
        self.liveness.check_invariants();
        assert!(self.deferred.len() <= DEFERRED_MAX);
    }
}

/// How often a disk file that could not grow tries again.
const MARK_INTERVAL: Duration = Duration::from_secs(1);
const GROWTH_RETRY: Duration = Duration::from_secs(2);
/// How long a stop waits for requests in progress, or for its goodbye to be decided.
const STOP_DEADLINE: Duration = Duration::from_secs(2);
/// Messages that wait for a newer state: what all peers may have in flight in a moment. Their bytes are bounded
/// by what this server has granted: the blocks of its windows, and the copies that it has asked for.
const DEFERRED_MAX: usize = 65536;
/// Of these, from clients: 64 KiB each at most.
const DEFERRED_CLIENTS_MAX: usize = 512;

/// The state index that a message needs its receiver to have applied.
fn need_of(body: &Body) -> StateIndex {
    let of = |a: &Access| a.need.revision.max(a.need.term);
    match body {
        Body::Read(m) => of(&m.access),
        Body::Write(m) => of(&m.access),
        Body::Zero(m) => of(&m.access),
        Body::Map(m) => of(&m.access),
        Body::Settle(m) => m.index,
        _ => 0,
    }
}

fn hints(hints: Hints) -> AdminResponse {
    AdminResponse::Hints(Box::new(hints))
}
