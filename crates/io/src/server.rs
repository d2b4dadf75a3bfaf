//! Drives a server's core: sockets, disks and clock on one side, a stepped machine on the other.
//!
//! One round is: everything that has arrived goes in, the clock is read *after* it arrived, then all
//! outputs come out and are carried out, then disks and sockets are flushed once. Group commit and
//! merged messages fall out of that order, and so do few system calls.
//!
//! ```text
//!        +--> wait (sockets, disks, timer) --+
//!        |                                   v
//!   flush disks, sockets          events, completions, tick --> machine.handle
//!        ^                                   |
//!        +---- machine.poll_output <---------+
//! ```
//!
//! The address is bound before anything else (a taken address is an error at the start), but nobody is
//! let in, and nobody is told the new incarnation, before the core's first `Dial`, `Send` or `Ready`:
//! that is how it shows that its incarnation is durable. A core therefore names with `Dial` every
//! server that it knows, whoever of the two dials; here only servers with smaller ids are dialled.
//!
//! Invariants: a message to a connection that is gone is dropped, never sent over a later one: outputs
//! that were caused before a `Disconnected` are carried out before it is handed in. Connections of one
//! server are handed in as `Connected Message* Disconnected`, one after the other.
//!
//! Generic over the machine, so that the driver is tested with a machine of a few lines.

use crate::clock;
use crate::engine::DiskEngine;
use crate::transport::{
    Address, AddressError, Bounds, ConnectionId, DialError, Event, ListenError, Listener, Transport,
};
use petal::ids::{ClusterId, Incarnation, ServerId};
use petal::server::{Input, Output, Peer};
use petal::store::{DiskResult, OpId};
use petal_wire::{Hello, RejectCode, Role};
use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use stdx::{Instant, Machine};

/// A server with no connection that is told for so long that a later life of it is there ends.
const DISPLACED_MAX: std::time::Duration = std::time::Duration::from_secs(10);
/// How often a round looks again for inputs before it takes outputs.
const LOOKS_MAX: usize = 4;
/// How often the core is told the wall clock, if it ticks.
const WALL_CLOCK_EVERY: std::time::Duration = std::time::Duration::from_secs(1);
/// How long the last words of a server that stops may take to leave.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(1);

/// Who the server is, and where.
pub struct ShellConfig {
    /// The cluster.
    pub cluster: ClusterId,
    /// The server.
    pub server: ServerId,
    /// Its life. Told to others only when the core shows that it is durable.
    pub incarnation: Incarnation,
    /// Where to listen.
    pub listen: Vec<String>,
    /// Bounds of the connections.
    pub bounds: Bounds,
    /// Called once when the server serves.
    pub on_ready: Box<dyn FnOnce()>,
}

/// Why a server could not begin.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Not an address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// It cannot listen there.
    #[error(transparent)]
    Listen(#[from] ListenError),
}

/// How a server ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The core stopped as it was asked to.
    Stopped,
    /// The core cannot go on.
    Fatal(String),
    /// The core must begin a new life: open its disks again and start it.
    Restart(String),
    /// The process was told to end.
    Signalled,
}

/// A server's machine with the world around it.
pub struct ServerShell<M, E> {
    machine: M,
    engine: E,
    transport: Transport,
    listeners: Vec<Listener>,
    own_id: ServerId,
    /// Nobody is let in before the core shows that its incarnation is durable.
    open: bool,
    on_ready: Option<Box<dyn FnOnce()>>,
    servers: BTreeMap<ServerId, ConnectionId>,
    /// Where the others are, as the core told.
    addresses: BTreeMap<ServerId, Vec<String>>,
    ended: Option<Ended>,
    /// The core was asked to end.
    told: bool,
    /// When the core was told the wall clock last.
    wall_clock_told: Option<Instant>,
    /// Since when others say that a later life of this server is there, and none is connected; and when one said so last.
    displaced: Option<(Instant, Instant)>,
    // Kept from round to round for their memory.
    events: VecDeque<Event>,
    completions: Vec<(usize, OpId, DiskResult)>,
}

impl<M, E> ServerShell<M, E>
where
    M: Machine<Input = Input, Output = Output>,
    E: DiskEngine,
{
    /// Binds the addresses. Call within the runtime ([`crate::run`]).
    pub async fn start(machine: M, engine: E, config: ShellConfig) -> Result<Self, StartError> {
        let role = Role::Server { id: config.server, incarnation: config.incarnation };
        let transport = Transport::new(Hello::new(Some(config.cluster), role), config.bounds);
        let mut listeners = Vec::new();
        for text in &config.listen {
            let address: Address = text.parse()?;
            listeners.push(transport.bind(&address).await?);
        }
        Ok(ServerShell {
            machine,
            engine,
            transport,
            listeners,
            own_id: config.server,
            open: false,
            on_ready: Some(config.on_ready),
            servers: BTreeMap::new(),
            addresses: BTreeMap::new(),
            ended: None,
            told: false,
            wall_clock_told: None,
            displaced: None,
            events: VecDeque::new(),
            completions: Vec::new(),
        })
    }

    /// Where the server listens (with the port that it got for port 0).
    pub fn addresses(&self) -> Vec<String> {
        self.listeners.iter().map(|l| l.address().to_string()).collect()
    }

    /// Runs until the core ends. When `shutdown` resolves, the core is asked to end, or not even asked.
    pub async fn run(mut self, shutdown: impl Future<Output = Stop>) -> Ended {
        let mut shutdown = pin!(shutdown);
        let mut timer = Timer::new();
        loop {
            self.hand_in();
            self.tick_if_due();
            self.carry_out();
            // Messages first: another server works on them while this one hands its disks their work.
            self.transport.flush();
            self.engine.flush();
            if let Some(ended) = self.ended.take() {
                self.transport.drain(LAST_WORDS).await;
                self.transport.shut_down();
                // A disk that hangs holds up the end of the engine: who dials meanwhile must find that nobody is
                // here. The tasks that listen end when they are polled.
                self.listeners.clear();
                for _ in 0..4 {
                    tokio::task::yield_now().await;
                }
                return ended;
            }
            match self.wait(&mut timer, shutdown.as_mut()).await {
                // There was more already: let the readers of sockets look first.
                Wake::AtOnce => tokio::task::yield_now().await,
                Wake::Later => {}
                Wake::Shutdown(Stop::AtOnce) => self.ended = Some(Ended::Signalled),
                Wake::Shutdown(Stop::HandOver) => {
                    self.told = true;
                    self.machine.handle(clock::now(), Input::ShutDown);
                }
            }
        }
    }

    /// Everything that has arrived goes into the machine.
    fn hand_in(&mut self) {
        for _ in 0..LOOKS_MAX {
            self.engine.completions(&mut self.completions);
            self.transport.take_events(&mut self.events);
            if self.completions.is_empty() && self.events.is_empty() {
                return;
            }
            // One reading serves all that arrived before it: late is right, early is not.
            let now = clock::now();
            let mut completions = std::mem::take(&mut self.completions);
            for (disk, op, result) in completions.drain(..) {
                self.machine.handle(now, Input::Disk { disk, op, result });
            }
            self.completions = completions;
            let mut events = std::mem::take(&mut self.events);
            events.drain(..).for_each(|event| self.hand_in_event(now, event));
            self.events = events;
        }
    }

    fn hand_in_event(&mut self, now: Instant, event: Event) {
        match event {
            Event::Message { connection, from, message } => {
                self.machine.handle(now, Input::Message { from: peer(connection, from), message });
            }
            Event::Connected { connection, peer: info } => {
                let (peer, incarnation) = match info.hello.role {
                    Role::Server { id, incarnation } => {
                        self.displaced = None;
                        tracing::info!(server = %id, %incarnation, address = %info.address, "connected");
                        self.servers.insert(id, connection);
                        (Peer::Server(id), incarnation)
                    }
                    Role::Client => (peer(connection, Role::Client), Incarnation(0)),
                };
                self.machine.handle(now, Input::Connected { peer, incarnation });
            }
            Event::Disconnected { connection, peer: info, reason } => {
                // What was meant for this connection must not go over the next one.
                self.carry_out();
                if let Role::Server { id, .. } = info.hello.role {
                    tracing::info!(server = %id, %reason, "disconnected");
                    if self.servers.get(&id) == Some(&connection) {
                        self.servers.remove(&id);
                        self.look_for(id);
                    }
                } else {
                    tracing::debug!(client = connection.0, address = %info.address, %reason, "disconnected");
                }
                let peer = peer(connection, info.hello.role);
                self.machine.handle(now, Input::Disconnected { peer });
            }
            Event::NobodyThere { server } => {
                if !self.servers.contains_key(&server) {
                    self.machine.handle(now, Input::Refused { server });
                }
            }
            Event::DialFailed { error: DialError::Rejected(r), .. } if r.code == RejectCode::StaleIncarnation => {
                // Somebody there says that it is this server; perhaps it is, with a copy of the disks. It may be refused yet.
                let is_still = |at: &(Instant, Instant)| self.servers.is_empty() && now.since(at.1) < DISPLACED_MAX;
                let since = self.displaced.filter(is_still).map_or(now, |(since, _)| since);
                self.displaced = Some((since, now));
                if now.since(since) >= DISPLACED_MAX {
                    self.ended = Some(Ended::Fatal(format!(
                        "nobody listens to this process, for another one runs with the disks of this server, or with a copy of \
                         them: {r}. This one ends"
                    )));
                }
            }
            Event::DialFailed { server, address, error, failures } => {
                tell_of_failure(server, &address, &error, failures)
            }
        }
    }

    /// Servers with larger ids dial this one: nothing would tell that they are gone.
    fn look_for(&self, server: ServerId) {
        if let Some(addresses) = self.addresses.get(&server).filter(|_| server > self.own_id) {
            self.transport.look_for(server, addresses);
        }
    }

    fn tick_if_due(&mut self) {
        if let Some(at) = self.machine.next_timeout() {
            let now = clock::now();
            if at <= now {
                if self.wall_clock_told.is_none_or(|told| now.since(told) >= WALL_CLOCK_EVERY) {
                    self.wall_clock_told = Some(now);
                    self.machine.handle(now, Input::WallClock { unix_seconds: clock::unix_seconds() });
                }
                self.machine.handle(now, Input::Tick);
            }
        }
    }

    fn carry_out(&mut self) {
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::Send { to, message } => {
                    self.open_doors();
                    let connection = match to {
                        Peer::Server(id) => self.servers.get(&id).copied(),
                        Peer::Client(number) => Some(ConnectionId(number)),
                    };
                    if let Some(connection) = connection {
                        self.transport.send(connection, message);
                    }
                }
                Output::Disk { disk, op, command } => self.engine.submit(disk, op, command),
                Output::Dial { server, addresses } => {
                    self.open_doors();
                    if addresses.is_empty() {
                        self.transport.stop_dialling(server);
                    } else if server < self.own_id {
                        self.transport.dial(server, &addresses, true);
                    }
                    self.addresses.insert(server, addresses);
                }
                Output::Ready => {
                    self.open_doors();
                    if let Some(on_ready) = self.on_ready.take() {
                        on_ready();
                    }
                }
                Output::Restart(why) => {
                    self.ended.get_or_insert(Ended::Restart(why));
                }
                Output::Fatal(why) => self.ended = Some(Ended::Fatal(why)),
                Output::Stopped => {
                    self.ended.get_or_insert(Ended::Stopped);
                }
            }
        }
    }

    fn open_doors(&mut self) {
        if !self.open {
            self.open = true;
            self.listeners.iter_mut().for_each(Listener::accept);
        }
    }

    async fn wait(&mut self, timer: &mut Timer, mut shutdown: Pin<&mut impl Future<Output = Stop>>) -> Wake {
        timer.arm(self.machine.next_timeout());
        let mut first = true;
        poll_fn(|cx| {
            let now_or_later = if std::mem::take(&mut first) { Wake::AtOnce } else { Wake::Later };
            // What has resolved is not to be asked again.
            if !self.told
                && let Poll::Ready(stop) = shutdown.as_mut().poll(cx)
            {
                return Poll::Ready(Wake::Shutdown(stop));
            }
            let ready = self.transport.poll_ready(cx).is_ready()
                | self.engine.poll_ready(cx).is_ready()
                | timer.poll(cx).is_ready();
            if ready { Poll::Ready(now_or_later) } else { Poll::Pending }
        })
        .await
    }
}

/// What ended a wait.
enum Wake {
    /// There was no wait: something was there already.
    AtOnce,
    /// Something came.
    Later,
    /// The process is to end.
    Shutdown(Stop),
}

fn peer(connection: ConnectionId, role: Role) -> Peer {
    match role {
        Role::Server { id, .. } => Peer::Server(id),
        Role::Client => Peer::Client(connection.0),
    }
}

/// A server that is not there yet is normal for a while; one that will not have us never is.
fn tell_of_failure(server: ServerId, address: &str, error: &DialError, failures: u32) {
    match error {
        DialError::Rejected(r) | DialError::Refused(r) if !r.code.may_pass() && failures.is_power_of_two() => {
            tracing::warn!(%server, %address, "cannot connect: {error}");
        }
        DialError::Address(_) | DialError::Wire(_) if failures.is_power_of_two() => {
            tracing::warn!(%server, %address, "cannot connect: {error}");
        }
        _ if failures >= 16 && failures.is_power_of_two() => {
            tracing::warn!(%server, %address, failures, "cannot connect: {error}; trying on");
        }
        _ => tracing::debug!(%server, %address, "cannot connect: {error}"),
    }
}

/// The core's next timeout as a timer of the runtime. It is only ever made earlier: most timeouts are
/// moved on before they come, and one wake-up too many costs less than moving a timer every round.
pub(crate) struct Timer {
    sleep: Pin<Box<tokio::time::Sleep>>,
    armed: Option<Instant>,
}

impl Timer {
    pub fn new() -> Timer {
        Timer { sleep: Box::pin(tokio::time::sleep(std::time::Duration::ZERO)), armed: None }
    }

    /// Wakes at `at` or before.
    pub fn arm(&mut self, at: Option<Instant>) {
        let Some(at) = at else {
            return;
        };
        if self.armed.is_none_or(|armed| at < armed) {
            self.sleep.as_mut().reset(tokio::time::Instant::now() + at.since(clock::now()));
            self.armed = Some(at);
        }
    }

    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.armed.is_none() {
            return Poll::Pending;
        }
        let fired = self.sleep.as_mut().poll(cx);
        if fired.is_ready() {
            self.armed = None;
        }
        fired
    }
}

/// How a server process is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The others go on: hand over to them first (SIGTERM, SIGINT).
    HandOver,
    /// Everything stops, or is to be quick (SIGQUIT).
    AtOnce,
}

/// Resolves when the process is told to stop.
pub async fn told_to_stop() -> Stop {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut quit) = signal(SignalKind::quit()) else { return std::future::pending().await };
    tokio::select! {
        () = terminated() => Stop::HandOver,
        _ = quit.recv() => Stop::AtOnce,
    }
}

/// Ends when the process gets SIGTERM or SIGINT.
pub async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
