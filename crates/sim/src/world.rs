//! The world: time, hosts, and what happens between them.
//!
//! One event after the other, each caused by an earlier one or by the seed; nothing else decides
//! anything. The cores are the shipped ones, stepped as the real driver steps them; every message goes
//! through `petal-wire`. Faults are in `nemesis.rs`, what clients do in `workload.rs`, how a run ends
//! in `ending.rs`, and what must hold in `checkers/`.

use crate::checkers::Checkers;
use crate::clock::Clock;
use crate::counters::{Counters, Kind};
use crate::disk::{SimDisk, Ticket};
use crate::ending::Ending;
use crate::event::{Event, Queue};
use crate::history::History;
use crate::host::{Arrival, ClientHost, ClientLife, Driver, ServerHost, ServerLife, address_of, host_at};
use crate::nemesis::Trap;
use crate::net::{ConnectionId, EndPoint, Node, Side, SimNet};
use crate::options::Options;
use crate::trace::Trace;
use crate::workload::{Role, User, Workload};
use crate::{codec, formatting};
use bytes::Bytes;
use petal::client::{self, Client, ClientConfig};
use petal::global_state::{Genesis, GenesisServer};
use petal::ids::{ClusterId, DiskId, Incarnation, ServerId, SlotId, Term};
use petal::message::{Body, Message, Part, Replicate};
use petal::sabotage::Sabotage;
use petal::server::{self, Peer, Server};
use petal::store::{DiskCommand, OpId};
use std::collections::{BTreeMap, BTreeSet};
use stdx::{Duration, Instant, Machine, Prng};

/// When a server whose connection broke looks whether the other end is there, as the real driver does.
const PROBES: [Duration; 3] = [Duration::from_millis(20), Duration::from_millis(60), Duration::from_millis(200)];
/// How often it is looked whether a disk that hung answers again.
const HUNG_LOOK: Duration = Duration::from_millis(10);
/// Complaints after which a run is stopped.
const COMPLAINTS_MAX: usize = 20;
/// Events after which a run is stopped as endless.
const EVENTS_MAX: u64 = 20_000_000;
/// Wake-ups in a row without any other input after which a core is said to spin.
const IDLE_TICKS_MAX: u64 = 50_000;

/// One run.
pub struct World {
    /// What was drawn.
    pub options: Options,
    /// The world's time.
    pub now: Instant,
    /// What will happen.
    pub queue: Queue,
    /// What happened.
    pub trace: Trace,
    /// How often.
    pub counters: Counters,
    /// What must not have.
    pub complaints: Vec<String>,
    /// Connections.
    pub net: SimNet,
    /// Machines with servers.
    pub servers: Vec<ServerHost>,
    /// Machines with clients.
    pub clients: Vec<ClientHost>,
    /// What clients do.
    pub workload: Workload,
    /// What they were told.
    pub history: History,
    /// What must hold at every step.
    pub checkers: Checkers,
    /// How the run ends.
    pub ending: Ending,
    /// For faults.
    pub chaos: Prng,
    /// When members caught up last: the term and the life that it was proposed for.
    pub caught_up: BTreeMap<(SlotId, ServerId), (Term, Incarnation)>,
    /// Slots in which something was written.
    pub written: BTreeSet<SlotId>,
    /// The longest time that one operation of a client took.
    pub longest: Duration,
    /// A disk has lied, and what it lost is not put back everywhere yet: no other failure meanwhile.
    pub lied: bool,
    /// Since when nothing is wrong, where the next failure has to wait for that.
    pub whole_since: Option<Instant>,
    /// What an assassin waits for.
    pub trap: Option<Trap>,
    /// Answers to what a scenario asked.
    pub answers: Vec<Result<client::Response, client::RequestError>>,
    prng: Prng,
    frames: u64,
    stopped: bool,
}

impl World {
    /// The beginning: disks of the ring's members formatted, nothing running.
    pub fn new(options: Options, mut prng: Prng, trace: Trace) -> World {
        let net = SimNet::new(options.net, prng.fork());
        let genesis = draw_genesis(&mut prng, options.ring);
        let servers = (0..options.servers).map(|host| draw_server(&mut prng, &options, &genesis, host)).collect();
        let managers = 1 + usize::from(options.snapshots.is_some());
        let clients = (0..options.clients + managers).map(|i| draw_client(&mut prng, &options, i)).collect();
        let workload = Workload::new(&options, prng.fork());
        let chaos = prng.fork();
        let mut world = World {
            options,
            now: Instant::ZERO,
            queue: Queue::default(),
            trace,
            counters: Counters::default(),
            complaints: Vec::new(),
            net,
            servers,
            clients,
            workload,
            history: History::default(),
            checkers: Checkers::default(),
            ending: Ending::default(),
            chaos,
            caught_up: BTreeMap::new(),
            written: BTreeSet::new(),
            longest: Duration::ZERO,
            lied: false,
            whole_since: None,
            trap: None,
            answers: Vec::new(),
            prng,
            frames: 0,
            stopped: false,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        for host in 0..self.options.ring {
            let id = ServerId(host as u16 + 1);
            self.format(host, id);
            let at = self.now + self.draw(Duration::from_millis(20));
            self.plan_start(Node::Server(host), at);
        }
        for client in 0..self.clients.len() {
            let at = self.now + self.draw(Duration::from_millis(50));
            self.plan_start(Node::Client(client), at);
        }
        if let Some(interval) = self.options.fault_interval {
            let at = self.now + self.draw(interval.max(Duration::from_millis(100)));
            self.queue.plan(at, Event::Fault);
        }
        self.queue.plan(self.now + crate::ending::LOOK_EVERY, Event::Phase);
    }

    /// Runs until the end, or until somebody complains too much.
    pub fn run(&mut self) {
        while self.advance() {}
    }

    /// The next thing happens; false at the end.
    pub fn advance(&mut self) -> bool {
        if self.stopped || self.complaints.len() >= COMPLAINTS_MAX {
            return false;
        }
        let Some((at, event)) = self.queue.next() else { return false };
        self.now = at;
        if self.trace.events() > EVENTS_MAX {
            self.complain(format!("the run does not end: {EVENTS_MAX} events"));
            return false;
        }
        self.step(event);
        true
    }

    /// Ends the run.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// Somebody found something that must not be.
    pub fn complain(&mut self, complaint: String) {
        self.trace.words(self.now, || format!("COMPLAINT: {complaint}"));
        if self.complaints.len() < COMPLAINTS_MAX {
            self.complaints.push(format!("at {:?}: {complaint}", self.now));
        }
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Dial { node, life, host } => self.on_dial(node, life, host),
            Event::Probe { node, life, host } => self.on_probe(node, life, host),
            Event::Up { connection, side } => self.on_up(connection, side),
            Event::Closed { connection, side } => self.on_closed(connection, side),
            Event::Deliver { connection, side, frame, sent } => self.on_deliver(connection, side, frame, sent),
            Event::DiskDone { host, disk, life, ticket } => self.on_disk_done(host, disk, life, ticket),
            Event::Run { node, life } => self.on_run(node, life),
            Event::Tick { node, life, generation } => self.on_tick(node, life, generation),
            Event::Start { node } => self.on_start(node),
            Event::Fault => self.on_fault(),
            Event::Ambush { host } => self.on_ambush(host),
            Event::Bury { host, life } => self.on_bury(host, life),
            Event::Lose { host, life, tries } => self.on_lose(host, life, tries),
            Event::Replace { host, disks } => self.on_replace(host, disks),
            Event::Cut { connection } => self.on_cut(connection),
            Event::Ghost { from, to, frame } => self.on_ghost(from, to, frame),
            Event::Oust { host, life } => self.on_oust(host, life),
            Event::Freeze { host, time } => self.on_freeze(host, time),
            Event::Eager { client, name, mode, tries } => self.on_eager(client, name, mode, tries),
            Event::Think { client, life } => self.on_think(client, life),
            Event::Phase => self.on_phase(),
        }
    }

    // --------------------------------------------------------------------------------------------
    // Lives.

    /// Formats a host's disks for a server of this id.
    pub fn format(&mut self, host: usize, id: ServerId) {
        let machine = &mut self.servers[host];
        machine.id = Some(id);
        for disk in 0..machine.disks.len() {
            formatting::format(machine, disk, &self.options);
        }
    }

    /// Plans a start unless one is planned.
    pub fn plan_start(&mut self, node: Node, at: Instant) {
        let planned = match node {
            Node::Server(host) => &mut self.servers[host].start_planned,
            Node::Client(host) => &mut self.clients[host].start_planned,
        };
        if !std::mem::replace(planned, true) {
            self.queue.plan(at, Event::Start { node });
        }
    }

    fn on_start(&mut self, node: Node) {
        self.trace.event(self.now, &[8, number(node)], || format!("{node:?} starts"));
        match node {
            Node::Server(host) => self.start_server(host),
            Node::Client(host) => self.start_client(host),
        }
    }

    fn start_server(&mut self, host: usize) {
        let options = &self.options;
        let machine = &mut self.servers[host];
        machine.start_planned = false;
        if machine.life.is_some() || machine.losing || machine.lost {
            return;
        }
        if machine.disks.iter().any(|d| d.is_hung(self.now)) {
            // The old process cannot end before its disk answers, and a new one cannot read from it.
            return self.plan_start(Node::Server(host), self.now + HUNG_LOOK);
        }
        let opened: Result<Vec<_>, String> = (0..machine.disks.len() - usize::from(machine.lacks_a_disk))
            .map(|disk| formatting::open(machine, disk))
            .collect();
        let disks = match opened {
            Ok(disks) => disks,
            Err(_) if machine.disks.iter().any(|d| d.failing) => {
                machine.lost = true;
                return;
            }
            Err(why) => return self.complain(format!("host {host} cannot open its disk: {why}")),
        };
        if machine.lives > 0 {
            self.counters.count(Kind::Restart);
        }
        machine.lives += 1;
        let local = machine.clock.local(self.now);
        let server = Server::start(local, formatting::server_config(options, host, machine.lives, local), disks);
        let driver = Driver::new(machine.lives);
        machine.life = Some(ServerLife { server, driver, open: false, ready: false, stopped_at: None, next_client: 1 });
        self.run_server(host);
    }

    fn start_client(&mut self, host: usize) {
        let machine = &mut self.clients[host];
        machine.start_planned = false;
        if machine.life.is_some() {
            return;
        }
        machine.lives += 1;
        let ring = 0..self.options.ring;
        let config = ClientConfig {
            servers: ring.map(|i| (ServerId(i as u16 + 1), vec![address_of(i)])).collect(),
            proposer: self.prng.next_u64(),
            deadline: self.options.client_deadline.filter(|_| machine.role == Role::Data),
        };
        let client = Client::new(machine.clock.local(self.now), config);
        let driver = Driver::new(machine.lives);
        let life = machine.lives;
        machine.life = Some(ClientLife { client, driver, next_request: 1, user: User::new(machine.role) });
        self.run_client(host);
        self.queue.plan(self.now, Event::Think { client: host, life });
    }

    /// Kills a server; what its disks have in flight is kept, lost or torn.
    pub fn crash_server(&mut self, host: usize) {
        let Some(end) = self.servers[host].end_point(host) else { return };
        self.trace.event(self.now, &[20, host as u64], || format!("host {host} crashes"));
        self.note_recovery_cut_short(host);
        let machine = &mut self.servers[host];
        if machine.life.take().is_some_and(|l| !l.ready) {
            self.counters.count(Kind::CrashInStart);
        }
        for disk in &mut machine.disks {
            disk.crash(&mut self.counters);
        }
        self.checkers.primaries.forget(host);
        self.cut_connections(end);
        if let Some(after) = self.options.bury_after {
            let (life, at) = (self.servers[host].lives, self.now + self.draw(after));
            self.queue.plan(at, Event::Bury { host, life });
        }
    }

    /// Counts whose death interrupts a recovery.
    fn note_recovery_cut_short(&mut self, host: usize) {
        let Some(id) = self.servers[host].id else { return };
        let lives = || self.servers.iter().enumerate().filter_map(|(h, s)| Some((h, s.life.as_ref()?)));
        let is_source = lives().any(|(h, l)| h == host && l.server.is_recovering(None));
        let is_member = lives().any(|(h, l)| h != host && l.server.is_recovering(Some(id)));
        let met = lives().find(|(h, _)| *h == host).map(|(_, l)| l.server.counters().clone()).unwrap_or_default();
        self.counters.add(Kind::BadMet, met.bad_blocks);
        self.counters.add(Kind::Repaired, met.repaired_blocks);
        self.counters.add(Kind::Relayed, met.relayed);
        self.counters.add(Kind::LieNoticed, met.lost_by_others);
        let rounds = lives().find(|(h, _)| *h == host).and_then(|(_, l)| l.server.data().scrub_status().last);
        self.counters.add(Kind::Scrubbed, rounds.map_or(0, |r| r.number));
        self.counters.add(Kind::SourceDied, u64::from(is_source));
        self.counters.add(Kind::DiedCatchingUp, u64::from(is_member));
    }

    /// Kills a client; nobody will ever know what became of its requests.
    pub fn crash_client(&mut self, host: usize) {
        let Some(end) = self.clients[host].end_point(host) else { return };
        self.trace.event(self.now, &[21, host as u64], || format!("client {host} crashes"));
        self.counters.count(Kind::ClientCrash);
        self.abandon_requests(host);
        self.clients[host].life = None;
        self.cut_connections(end);
    }

    fn cut_connections(&mut self, end: EndPoint) {
        for (connection, side) in self.net.of(end) {
            let notices = self.net.break_connection(self.now, connection);
            self.net.close_end(connection, side);
            for (other, at) in notices.into_iter().filter(|n| n.0 != side) {
                self.queue.plan(at, Event::Closed { connection, side: other });
            }
        }
    }

    // --------------------------------------------------------------------------------------------
    // Connections.

    fn end_point(&self, node: Node) -> Option<EndPoint> {
        match node {
            Node::Server(host) => self.servers[host].end_point(host),
            Node::Client(host) => self.clients[host].end_point(host),
        }
    }

    fn on_dial(&mut self, node: Node, life: u64, host: usize) {
        let dialler = EndPoint { node, life };
        if self.end_point(node) != Some(dialler) {
            return;
        }
        self.trace.event(self.now, &[1, number(node), host as u64], || format!("{node:?} dials host {host}"));
        let open = self.servers[host].life.as_ref().is_some_and(|l| l.open);
        match self.servers[host].end_point(host).filter(|_| open) {
            Some(acceptor) => {
                let (connection, [at_acceptor, at_dialler]) = self.net.connect(self.now, dialler, acceptor);
                self.queue.plan(at_acceptor, Event::Up { connection, side: Side::Acceptor });
                self.queue.plan(at_dialler, Event::Up { connection, side: Side::Dialler });
            }
            None => {
                self.tell_refused(node, host);
                self.plan_dial(dialler, host);
            }
        }
    }

    /// Nobody listens on the host; a server that looked hears so.
    fn tell_refused(&mut self, node: Node, host: usize) {
        let (Node::Server(looker), Some(server)) = (node, self.servers[host].id) else { return };
        let Some(life) = &mut self.servers[looker].life else { return };
        if life.driver.connections.contains_key(&Peer::Server(server)) {
            return;
        }
        life.driver.inbox.push_back(Arrival::Input(server::Input::Refused { server }));
        self.counters.count(Kind::Refused);
        self.plan_run(node);
    }

    /// A server whose connection from a larger id broke looks whether anybody is there.
    fn on_probe(&mut self, node: Node, life: u64, host: usize) {
        let open = self.servers[host].life.as_ref().is_some_and(|l| l.open);
        if self.end_point(node) == Some(EndPoint { node, life }) && !open {
            self.tell_refused(node, host);
        }
    }

    fn plan_dial(&mut self, dialler: EndPoint, host: usize) {
        let at = self.now + Duration::from_millis(1) + self.draw(Duration::from_millis(50));
        self.queue.plan(at, Event::Dial { node: dialler.node, life: dialler.life, host });
    }

    fn on_up(&mut self, connection: ConnectionId, side: Side) {
        let Some([dialler, acceptor]) = self.net.ends(connection) else { return };
        if !self.net.up(connection, side) {
            return;
        }
        let (us, them) = if side == Side::Dialler { (dialler, acceptor) } else { (acceptor, dialler) };
        self.trace.event(self.now, &[2, connection, side as u64], || format!("{:?} is connected to {:?}", us, them));
        match us.node {
            Node::Server(host) => self.up_at_server(host, connection, side, them),
            Node::Client(host) => self.up_at_client(host, connection, them),
        }
    }

    fn up_at_server(&mut self, host: usize, connection: ConnectionId, side: Side, them: EndPoint) {
        let remote = self.identity(them);
        let Some(life) = &mut self.servers[host].life else { return };
        let (peer, incarnation) = match (them.node, remote) {
            (Node::Client(_), _) => {
                life.next_client += 1;
                (Peer::Client(life.next_client), Incarnation(0))
            }
            (Node::Server(_), Some((id, incarnation))) => (Peer::Server(id), incarnation),
            // The other end died while the hello was on its way.
            (Node::Server(_), None) => return,
        };
        life.driver.inbox.push_back(Arrival::Up { connection, side, peer, incarnation });
        self.plan_run(Node::Server(host));
    }

    fn up_at_client(&mut self, host: usize, connection: ConnectionId, them: EndPoint) {
        let Some((server, incarnation)) = self.identity(them) else { return };
        let Some(life) = &mut self.clients[host].life else { return };
        let up = Arrival::Up { connection, side: Side::Dialler, peer: server, incarnation };
        life.driver.inbox.push_back(up);
        self.plan_run(Node::Client(host));
    }

    /// What the hello of a server says; `None` if that life is over.
    fn identity(&self, at: EndPoint) -> Option<(ServerId, Incarnation)> {
        let Node::Server(host) = at.node else { return None };
        let life = self.servers[host].life.as_ref().filter(|l| l.driver.life == at.life)?;
        Some((life.server.id(), life.server.incarnation()))
    }

    fn on_closed(&mut self, connection: ConnectionId, side: Side) {
        let Some(ends) = self.net.ends(connection) else { return };
        self.trace.event(self.now, &[3, connection, side as u64], || {
            format!("{:?} sees the connection with {:?} break", ends[side as usize], ends[side.other() as usize])
        });
        let us = ends[side as usize];
        self.net.close_end(connection, side);
        if self.end_point(us.node) != Some(us) {
            return;
        }
        match us.node {
            Node::Server(host) => {
                let Some(life) = &mut self.servers[host].life else { return };
                life.driver.inbox.push_back(Arrival::Down { connection });
            }
            Node::Client(host) => {
                let Some(life) = &mut self.clients[host].life else { return };
                life.driver.inbox.push_back(Arrival::Down { connection });
            }
        }
        self.plan_run(us.node);
        if let (Side::Dialler, Node::Server(host)) = (side, ends[1].node) {
            self.plan_dial(us, host);
        }
        if let (Side::Acceptor, Node::Server(_), Node::Server(host)) = (side, us.node, ends[0].node) {
            for wait in PROBES {
                self.queue.plan(self.now + wait, Event::Probe { node: us.node, life: us.life, host });
            }
        }
    }

    /// Breaks a connection between two nodes that live.
    pub fn reset(&mut self, connection: ConnectionId) {
        self.trace.event(self.now, &[22, connection], || format!("connection {connection} is reset"));
        for (side, at) in self.net.break_connection(self.now, connection) {
            self.queue.plan(at, Event::Closed { connection, side });
        }
    }

    fn send(&mut self, connection: ConnectionId, from: Side, message: &Message) {
        let frame = match codec::encode(message) {
            Ok(frame) => frame,
            Err(why) => return self.complain(format!("a message cannot be encoded: {why}")),
        };
        self.frames += 1;
        match self.net.send(self.now, connection, from) {
            Some(at) => {
                let event = Event::Deliver { connection, side: from.other(), frame, sent: self.frames };
                self.queue.plan(at, event);
            }
            None => self.counters.count(Kind::MessageLost),
        }
    }

    pub(crate) fn on_deliver(&mut self, connection: ConnectionId, side: Side, frame: Bytes, sent: u64) {
        let Some(us) = self.net.receiver(connection, side).filter(|us| self.end_point(us.node) == Some(*us)) else {
            self.counters.count(Kind::MessageLost);
            return;
        };
        let from_client = matches!(self.net.ends(connection), Some(ends) if matches!(ends[side.other() as usize].node, Node::Client(_)));
        let sum = u64::from(stdx::checksum::crc32c(&frame));
        let message = match codec::decode(frame, from_client) {
            Ok(message) => Box::new(message),
            Err(why) => return self.complain(format!("a frame of {connection} cannot be decoded: {why}")),
        };
        self.trace.event(self.now, &[4, connection, side as u64, sum], || {
            let from = self.net.ends(connection).map(|ends| ends[side.other() as usize].node);
            format!("{:?} <- {from:?}: {}", us.node, codec::describe(&message))
        });
        let overtaken = match us.node {
            Node::Server(host) => {
                let Some(life) = &mut self.servers[host].life else { return };
                life.driver.inbox.push_back(Arrival::Message { connection, message });
                note_frame(&mut life.driver.newest_frame, sent, connection)
            }
            Node::Client(host) => {
                let Some(life) = &mut self.clients[host].life else { return };
                life.driver.inbox.push_back(Arrival::Message { connection, message });
                note_frame(&mut life.driver.newest_frame, sent, connection)
            }
        };
        if overtaken {
            self.counters.count(Kind::Overtaken);
        }
        self.plan_run(us.node);
    }

    /// Where to dial for a server with these addresses, for a node that wants a connection kept.
    fn on_want(&mut self, node: Node, server: ServerId, addresses: &[String]) {
        if addresses.is_empty() {
            return; // It was removed.
        }
        let Some(host) = addresses.iter().find_map(|a| host_at(a)) else {
            return self.complain(format!("{node:?} is to dial {server} at {addresses:?}, which is nowhere"));
        };
        let Some(us) = self.end_point(node) else { return };
        let dials = match node {
            // Between servers the one with the larger id dials.
            Node::Server(me) if self.servers[me].id <= Some(server) => return,
            Node::Server(me) => &mut self.servers[me].life.as_mut().expect("it lives").driver.dials,
            Node::Client(me) => &mut self.clients[me].life.as_mut().expect("it lives").driver.dials,
        };
        if dials.insert(host, true).is_none() {
            let at = self.now + self.draw(Duration::from_millis(2));
            self.queue.plan(at, Event::Dial { node, life: us.life, host });
        }
    }

    // --------------------------------------------------------------------------------------------
    // Stepping.

    /// Plans that a node takes up its inputs.
    pub fn plan_run(&mut self, node: Node) {
        let mut most = self.options.run_delay;
        let (planned, life) = match node {
            Node::Server(host) => {
                let machine = &mut self.servers[host];
                if self.now < machine.slow_until {
                    most = most * 20 + Duration::from_millis(5);
                }
                let Some(life) = &mut machine.life else { return };
                (&mut life.driver.run_planned, life.driver.life)
            }
            Node::Client(host) => {
                let Some(life) = &mut self.clients[host].life else { return };
                (&mut life.driver.run_planned, life.driver.life)
            }
        };
        if !std::mem::replace(planned, true) {
            let at = self.now + self.draw(most);
            self.queue.plan(at, Event::Run { node, life });
        }
    }

    fn on_run(&mut self, node: Node, life: u64) {
        if self.end_point(node) != Some(EndPoint { node, life }) {
            return;
        }
        if let Node::Server(host) = node
            && self.now < self.servers[host].frozen_until
        {
            let at = self.servers[host].frozen_until;
            if let Some(life) = &mut self.servers[host].life {
                life.stopped_at.get_or_insert(self.now);
            }
            return self.queue.plan(at, Event::Run { node, life });
        }
        self.trace.event(self.now, &[6, number(node)], || format!("{node:?} runs"));
        match node {
            Node::Server(host) => self.run_server(host),
            Node::Client(host) => self.run_client(host),
        }
    }

    fn on_tick(&mut self, node: Node, life: u64, generation: u64) {
        if self.end_point(node) != Some(EndPoint { node, life }) {
            return;
        }
        let spins = match node {
            Node::Server(host) => {
                let driver = &mut self.servers[host].life.as_mut().expect("it lives").driver;
                tick(driver, generation)
            }
            Node::Client(host) => {
                let driver = &mut self.clients[host].life.as_mut().expect("it lives").driver;
                tick(driver, generation)
            }
        };
        match spins {
            None => return,
            Some(true) => {
                self.complain(format!("{node:?} asks for {IDLE_TICKS_MAX} wake-ups in a row and does nothing"));
                return self.stop();
            }
            Some(false) => {}
        }
        self.trace.event(self.now, &[7, number(node)], || format!("{node:?} ticks"));
        self.plan_run(node);
    }

    /// As `petal_io::server` does it: all that has arrived goes in, then the wake-up if it is due, then
    /// all outputs come out; outputs from before a connection changed are carried out before it changes.
    fn run_server(&mut self, host: usize) {
        let local = self.servers[host].clock.local(self.read_clock(host));
        while let Some(arrival) = self.next_at_server(host) {
            if matches!(arrival, Arrival::Up { .. } | Arrival::Down { .. }) {
                self.carry_out_all(host);
            }
            let Some(input) = self.server_input(host, local, arrival) else { continue };
            let Some(life) = &mut self.servers[host].life else { return };
            life.server.handle(local, input);
        }
        let Some(life) = &mut self.servers[host].life else { return };
        life.driver.run_planned = false;
        if life.server.next_timeout().is_some_and(|at| at <= local) {
            life.server.handle(local, server::Input::Tick);
        }
        self.carry_out_all(host);
        let machine = &mut self.servers[host];
        let Some(life) = &mut machine.life else { return };
        life.server.check_invariants();
        let wanted = life.server.next_timeout().map(|at| machine.clock.world(at));
        let lease = life.server.lease_until().map_or(Instant::ZERO, |at| machine.clock.world(at));
        let complaint = self.checkers.see_server(host, &life.server, self.now, lease);
        let state = self.servers[host].life.as_ref().and_then(|life| life.server.state());
        let of_leases =
            state.and_then(|state| self.checkers.leases.see(self.now, state, &self.servers, &mut self.counters));
        for complaint in complaint.into_iter().chain(of_leases) {
            self.complain(complaint);
        }
        self.plan_tick(Node::Server(host), wanted);
    }

    /// The clock is read after what is handed in was received, however long the process was stopped before.
    fn read_clock(&mut self, host: usize) -> Instant {
        let stopped_at = self.servers[host].life.as_mut().and_then(|life| life.stopped_at.take());
        let is_early = self.options.sabotage == Sabotage::LeaseByEarlierClock;
        stopped_at.filter(|_| is_early).unwrap_or(self.now)
    }

    fn next_at_server(&mut self, host: usize) -> Option<Arrival<server::Input, Peer>> {
        self.servers[host].life.as_mut()?.driver.inbox.pop_front()
    }

    /// What an arrival is to the core; `None` if it is of a connection that was replaced.
    fn server_input(
        &mut self,
        host: usize,
        local: Instant,
        arrival: Arrival<server::Input, Peer>,
    ) -> Option<server::Input> {
        let life = self.servers[host].life.as_mut()?;
        match arrival {
            Arrival::Input(input) => Some(input),
            Arrival::Message { connection, message } => {
                let from = *life.driver.peers.get(&connection)?;
                Some(server::Input::Message { from, message: *message })
            }
            Arrival::Up { connection, side, peer, incarnation } => {
                if let Some((old, old_side)) = life.driver.enter(peer, connection, side) {
                    self.counters.count(Kind::Replaced);
                    self.net.close_end(old, old_side);
                    // The contract lets the driver say so or not: a new connection replaces the old.
                    if self.prng.chance(1, 2) {
                        life.server.handle(local, server::Input::Disconnected { peer });
                    }
                }
                Some(server::Input::Connected { peer, incarnation })
            }
            Arrival::Down { connection } => {
                let peer = life.driver.forget(connection)?;
                Some(server::Input::Disconnected { peer })
            }
        }
    }

    fn carry_out_all(&mut self, host: usize) {
        while let Some(output) = self.servers[host].life.as_mut().and_then(|l| l.server.poll_output()) {
            self.carry_out(host, output);
        }
    }

    fn carry_out(&mut self, host: usize, output: server::Output) {
        let Some(life) = &mut self.servers[host].life else { return };
        if matches!(output, server::Output::Send { .. } | server::Output::Dial { .. } | server::Output::Ready) {
            life.open = true;
        }
        match output {
            server::Output::Send { to, mut message } => match life.driver.connections.get(&to).copied() {
                Some((connection, side)) => {
                    match &message.body {
                        Body::Replicate(Replicate { part: Part::CaughtUp, slot, term, .. }) => {
                            self.counters.count(Kind::CaughtUp);
                            self.note_caught_up(host, to, *slot, *term);
                        }
                        Body::Replicate(Replicate { part: Part::Write { .. }, slot, .. }) => {
                            self.written.insert(*slot);
                        }
                        Body::Replicate(Replicate { part: Part::Copy { settles: false, .. }, .. }) => {
                            self.counters.count(Kind::CopiedBack);
                        }
                        Body::Replicate(Replicate { part: Part::Mark { .. }, .. }) => {
                            self.counters.count(Kind::Marked);
                        }
                        _ => {}
                    }
                    self.spring_at_message(host, to, &message);
                    self.meddle(host, to, connection, side, &mut message);
                    self.send(connection, side, &message);
                }
                None => self.counters.count(Kind::MessageLost),
            },
            server::Output::Disk { disk, op, command } => {
                self.spring_at_command(host, &command);
                self.disk_command(host, disk, op, command);
            }
            server::Output::Dial { server, addresses } => self.on_want(Node::Server(host), server, &addresses),
            server::Output::Ready => {
                life.ready = true;
                self.trace.words(self.now, || format!("host {host} is ready"));
            }
            server::Output::Restart(why) => {
                self.trace.words(self.now, || format!("host {host}: {why}"));
                self.counters.count(Kind::NewLife);
                if self.servers[host].disks.iter().any(|d| d.is_hung(self.now)) {
                    self.counters.count(Kind::LeftHung);
                }
                self.crash_server(host);
                self.plan_start(Node::Server(host), self.now);
            }
            server::Output::Fatal(why) if self.servers[host].disks.iter().any(|d| d.failing) => {
                self.trace.words(self.now, || format!("host {host} gives up: {why}"));
                self.counters.count(Kind::LeftFailed);
                self.crash_server(host);
                self.servers[host].lost = true;
            }
            server::Output::Fatal(why) if self.servers[host].lacks_a_disk => {
                self.trace.words(self.now, || format!("host {host} gives up: {why}"));
                self.crash_server(host);
            }
            server::Output::Fatal(why) => {
                self.complain(format!("the server on host {host} gives up: {why}"));
                self.crash_server(host);
            }
            server::Output::Stopped => {
                self.counters.count(Kind::Stop);
                self.crash_server(host);
                let at = self.now + self.draw(self.options.restart_delay);
                self.plan_start(Node::Server(host), at);
            }
        }
    }

    fn disk_command(&mut self, host: usize, disk: usize, op: OpId, command: DiskCommand) {
        self.trace.words(self.now, || format!("host {host} disk {disk}: {}", codec::describe_command(op, &command)));
        let machine = &mut self.servers[host];
        let life = machine.life.as_ref().map_or(0, |l| l.driver.life);
        let (ticket, at) = machine.disks[disk].submit(self.now, op, command);
        self.queue.plan(at, Event::DiskDone { host, disk, life, ticket });
    }

    fn on_disk_done(&mut self, host: usize, disk: usize, life: u64, ticket: Ticket) {
        let machine = &mut self.servers[host];
        let Some(server) = machine.life.as_mut().filter(|l| l.driver.life == life) else { return };
        if machine.disks[disk].withholds(ticket, self.now) {
            return self.queue.plan(self.now + HUNG_LOOK, Event::DiskDone { host, disk, life, ticket });
        }
        let Some((op, result)) = machine.disks[disk].finish(ticket, &mut self.counters) else { return };
        self.trace
            .event(self.now, &[5, host as u64, disk as u64, op], || format!("host {host} disk {disk}: {op} is done"));
        server.driver.inbox.push_back(Arrival::Input(server::Input::Disk { disk, op, result }));
        server.driver.idle_ticks = 0;
        self.plan_run(Node::Server(host));
    }

    fn run_client(&mut self, host: usize) {
        let local = self.clients[host].clock.local(self.now);
        self.carry_out_client(host);
        while let Some(arrival) = self.clients[host].life.as_mut().and_then(|l| l.driver.inbox.pop_front()) {
            if matches!(arrival, Arrival::Up { .. } | Arrival::Down { .. }) {
                self.carry_out_client(host);
            }
            let Some(input) = self.client_input(host, local, arrival) else { continue };
            let Some(life) = &mut self.clients[host].life else { return };
            life.client.handle(local, input);
        }
        let Some(life) = &mut self.clients[host].life else { return };
        life.driver.run_planned = false;
        if life.client.next_timeout().is_some_and(|at| at <= local) {
            life.client.handle(local, client::Input::Tick);
        }
        self.carry_out_client(host);
        let machine = &mut self.clients[host];
        let Some(life) = &mut machine.life else { return };
        life.client.check_invariants();
        let wanted = life.client.next_timeout().map(|at| machine.clock.world(at));
        self.plan_tick(Node::Client(host), wanted);
    }

    fn client_input(
        &mut self,
        host: usize,
        local: Instant,
        arrival: Arrival<client::Input, ServerId>,
    ) -> Option<client::Input> {
        let life = self.clients[host].life.as_mut()?;
        match arrival {
            Arrival::Input(input) => Some(input),
            Arrival::Message { connection, message } => {
                let from = *life.driver.peers.get(&connection)?;
                Some(client::Input::Message { from, message: *message })
            }
            Arrival::Up { connection, side, peer: server, incarnation } => {
                if let Some((old, old_side)) = life.driver.enter(server, connection, side) {
                    self.net.close_end(old, old_side);
                    life.client.handle(local, client::Input::Disconnected { server });
                }
                Some(client::Input::Connected { server, incarnation })
            }
            Arrival::Down { connection } => {
                let server = life.driver.forget(connection)?;
                Some(client::Input::Disconnected { server })
            }
        }
    }

    fn carry_out_client(&mut self, host: usize) {
        while let Some(output) = self.clients[host].life.as_mut().and_then(|l| l.client.poll_output()) {
            match output {
                client::Output::Send { to, message } => {
                    let connections = self.clients[host].life.as_ref().map(|l| &l.driver.connections);
                    match connections.and_then(|c| c.get(&to)).copied() {
                        Some((connection, side)) => self.send(connection, side, &message),
                        None => self.counters.count(Kind::MessageLost),
                    }
                }
                client::Output::Dial { server, addresses } => self.on_want(Node::Client(host), server, &addresses),
                client::Output::Reply { number, result } => self.on_reply(host, number, result),
                client::Output::Warning(words) => {
                    self.trace.words(self.now, || format!("client {host} warns: {words}"));
                }
            }
        }
    }

    fn plan_tick(&mut self, node: Node, wanted: Option<Instant>) {
        let floor = self.now + Duration::from_micros(1);
        let (generation, at, life) = match node {
            Node::Server(host) => {
                let driver = &mut self.servers[host].life.as_mut().expect("it just ran").driver;
                (&mut driver.tick_generation, &mut driver.tick_at, driver.life)
            }
            Node::Client(host) => {
                let driver = &mut self.clients[host].life.as_mut().expect("it just ran").driver;
                (&mut driver.tick_generation, &mut driver.tick_at, driver.life)
            }
        };
        let wanted = wanted.map(|w| w.max(floor));
        if wanted == *at {
            return;
        }
        *generation += 1;
        *at = wanted;
        if let Some(at) = wanted {
            let generation = *generation;
            self.queue.plan(at, Event::Tick { node, life, generation });
        }
    }

    /// Uniform up to `most`.
    pub fn draw(&mut self, most: Duration) -> Duration {
        Duration::from_nanos(self.prng.below(most.as_nanos() as u64 + 1))
    }
}

/// Tells whether the wake-up is the one that counts, and whether the core spins.
fn tick<I, P>(driver: &mut Driver<I, P>, generation: u64) -> Option<bool> {
    if driver.tick_generation != generation {
        return None;
    }
    driver.tick_at = None;
    driver.idle_ticks = if driver.inbox.is_empty() { driver.idle_ticks + 1 } else { 0 };
    Some(driver.idle_ticks > IDLE_TICKS_MAX)
}

/// True if the frame overtook one that another connection still has, or had, on its way.
fn note_frame(newest: &mut (u64, ConnectionId), sent: u64, connection: ConnectionId) -> bool {
    let overtaken = sent < newest.0 && connection != newest.1;
    if sent > newest.0 {
        *newest = (sent, connection);
    }
    overtaken
}

/// A number for a node, for the log.
pub fn number(node: Node) -> u64 {
    match node {
        Node::Server(host) => host as u64,
        Node::Client(host) => 1000 + host as u64,
    }
}

fn draw_genesis(prng: &mut Prng, ring: usize) -> Genesis {
    Genesis {
        cluster: ClusterId(u128::from(prng.next_u64()) << 64 | u128::from(prng.next_u64())),
        name: "simulated".into(),
        ring: (0..ring)
            .map(|host| GenesisServer { server: ServerId(host as u16 + 1), addresses: vec![address_of(host)] })
            .collect(),
    }
}

fn draw_clock(prng: &mut Prng, options: &Options) -> Clock {
    let drift = prng.below(2 * options.drift + 1) as i64 - options.drift as i64;
    Clock::new(prng.below(1_000_000_000_000), drift)
}

fn draw_server(prng: &mut Prng, options: &Options, genesis: &Genesis, _host: usize) -> ServerHost {
    let id = |prng: &mut Prng| u128::from(prng.next_u64()) << 64 | u128::from(prng.next_u64());
    let frontier = if options.raw_disks { options.disk_size } else { 0 };
    let disk_ids: Vec<DiskId> = (0..options.disks).map(|_| DiskId(id(prng))).collect();
    let new_disk = |prng: &mut Prng| SimDisk::new(options.disk_size, frontier, options.disk_times, prng.fork());
    ServerHost {
        id: None,
        disks: disk_ids.iter().map(|_| new_disk(prng)).collect(),
        disk_ids,
        clock: draw_clock(prng, options),
        life: None,
        lives: 0,
        start_planned: false,
        lacks_a_disk: false,
        losing: false,
        slow_until: Instant::ZERO,
        frozen_until: Instant::ZERO,
        lost: false,
        token: id(prng),
        genesis: genesis.clone(),
    }
}

fn draw_client(prng: &mut Prng, options: &Options, index: usize) -> ClientHost {
    let role = match index {
        0 => Role::Operator,
        _ if index <= options.clients => Role::Data,
        _ => Role::Keeper,
    };
    ClientHost { clock: draw_clock(prng, options), life: None, lives: 0, start_planned: false, role }
}
