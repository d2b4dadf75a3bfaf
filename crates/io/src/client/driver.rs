//! The driver of a client: one task that carries out what the core wants.
//!
//! One turn: what the core wanted goes out, then everything that has arrived goes in, then all that
//! came of it goes out, in one write per server; then whoever has an answer is woken.
//!
//! Connections have the id that the server gave in its hello. The ids of the configuration may be
//! guesses, so these are dialled under keys of their own; what the core learns from the cluster is
//! dialled under its true id, but not while a guess has made that connection: one per server.

use super::Shared;
use crate::clock;
use crate::server::Timer;
use crate::transport::{Bounds, ConnectionId, Event, PeerInfo, Transport};
use petal::client::{Input, Output};
use petal::ids::{ClusterId, ServerId};
use petal_wire::{Hello, Role};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::{Arc, MutexGuard};
use std::task::{Poll, Waker};
use stdx::{Duration, Machine};

/// How long open requests may take when the last handle is gone.
const LAST_REQUESTS: Duration = Duration::from_secs(2);

/// Carries out what the core wants until no handle is left.
pub(super) async fn run(shared: Arc<Shared>, cluster: Option<ClusterId>) {
    let _stop = StopOnDrop(&shared);
    let transport = Transport::new(Hello::new(cluster, Role::Client), Bounds::default());
    let guesses = shared.lock().guesses.clone();
    let mut driver = Driver {
        shared: shared.clone(),
        transport,
        guesses,
        connections: BTreeMap::new(),
        addresses: BTreeMap::new(),
        events: VecDeque::new(),
        wakers: Vec::new(),
        warnings: Vec::new(),
    };
    let mut timer = Timer::new();
    let mut end = None;
    loop {
        let next = driver.turn();
        if driver.is_over(&mut end) {
            return driver.transport.shut_down();
        }
        timer.arm(next);
        timer.arm(end);
        poll_fn(|cx| {
            if driver.poll_work(cx.waker()) | driver.transport.poll_ready(cx).is_ready() | timer.poll(cx).is_ready() {
                return Poll::Ready(());
            }
            Poll::Pending
        })
        .await;
    }
}

/// Nothing will be answered any more: everybody who waits is told.
pub(super) fn stop(shared: &Shared) {
    let mut wakers = Vec::new();
    {
        let mut inner = shared.lock();
        inner.stopped = true;
        for answer in inner.answers.values_mut() {
            if let super::Answer::Waits(waker) = answer {
                wakers.extend(waker.take());
            }
        }
    }
    wakers.into_iter().for_each(Waker::wake);
    shared.changed.notify_waiters();
}

/// Key under which an id of the configuration is dialled: from the top, where no server's id is
/// (`SERVERS_MAX`, and ids are given from 1).
fn guess_key(id: ServerId) -> ServerId {
    ServerId(u16::MAX - id.0)
}

/// The id of the configuration, if it is such a key.
fn of_guess(key: ServerId) -> Option<ServerId> {
    (key.0 > u16::MAX / 2).then(|| ServerId(u16::MAX - key.0))
}

struct StopOnDrop<'a>(&'a Shared);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        stop(self.0);
    }
}

struct Driver {
    shared: Arc<Shared>,
    transport: Transport,
    connections: BTreeMap<ServerId, ConnectionId>,
    /// Ids of the configuration that are not dialled yet.
    guesses: BTreeSet<ServerId>,
    /// Where the core wants connections to, beyond the guesses.
    addresses: BTreeMap<ServerId, Vec<String>>,
    // Kept from turn to turn for their memory.
    events: VecDeque<Event>,
    wakers: Vec<Waker>,
    warnings: Vec<String>,
}

impl Driver {
    fn turn(&mut self) -> Option<stdx::Instant> {
        let shared = self.shared.clone();
        let mut inner = shared.lock();
        inner.work = false;
        self.transport.take_events(&mut self.events);
        // The clock is read after what it will judge has arrived.
        let now = clock::now();
        self.carry_out(&mut inner);
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            self.hand_in(&mut inner, now, event);
        }
        self.events = events;
        if inner.core.next_timeout().is_some_and(|at| at <= now) {
            inner.core.handle(now, Input::Tick);
        }
        self.carry_out(&mut inner);
        let next = inner.core.next_timeout();
        let gives_up = inner.connect_until;
        drop(inner);
        self.transport.flush();
        self.wakers.drain(..).for_each(Waker::wake);
        self.tell_people();
        if gives_up.is_some_and(|at| at <= now) {
            self.shared.changed.notify_waiters();
        }
        [next, gives_up.filter(|at| *at > now)].into_iter().flatten().min()
    }

    /// Without the lock: who is told may ask the client for something.
    fn tell_people(&mut self) {
        for text in self.warnings.drain(..) {
            match &self.shared.on_warning {
                Some(tell) => tell(&text),
                None => tracing::warn!("{text}"),
            }
        }
    }

    fn hand_in(&mut self, inner: &mut MutexGuard<'_, super::Inner>, now: stdx::Instant, event: Event) {
        match event {
            Event::Message { connection, from: Role::Server { id, .. }, message } => {
                if self.connections.get(&id) == Some(&connection) {
                    inner.core.handle(now, Input::Message { from: id, message });
                }
            }
            Event::Message { .. } => {}
            Event::Connected { connection, peer } => self.on_connected(inner, now, connection, &peer),
            Event::Disconnected { connection, peer, reason } => {
                let Role::Server { id, .. } = peer.hello.role else { return };
                if self.connections.get(&id) != Some(&connection) {
                    return;
                }
                tracing::info!(server = %id, %reason, "disconnected");
                // What was meant for this connection must not go over the next one.
                self.carry_out(inner);
                self.connections.remove(&id);
                inner.core.handle(now, Input::Disconnected { server: id });
                if let Some(addresses) = self.addresses.get(&id) {
                    self.transport.dial(id, addresses, true);
                }
            }
            Event::NobodyThere { .. } => {}
            Event::DialFailed { server, address, error, .. } => {
                tracing::debug!(%server, %address, %error, "not connected");
                inner.failures.insert(of_guess(server).unwrap_or(server), (address, error));
                self.shared.changed.notify_waiters();
            }
        }
    }

    fn on_connected(
        &mut self,
        inner: &mut MutexGuard<'_, super::Inner>,
        now: stdx::Instant,
        connection: ConnectionId,
        peer: &Rc<PeerInfo>,
    ) {
        let Role::Server { id, incarnation } = peer.hello.role else {
            return self.transport.close(connection);
        };
        if let Some(before) = self.connections.get(&id) {
            // Two of the dialled ids are the same server: one was a wrong guess.
            let dialled_before = self.transport.peer(*before).and_then(|p| p.dialled);
            match (peer.dialled, dialled_before) {
                (Some(guess), _) if guess != id => return self.transport.stop_dialling(guess),
                // The core takes back what was outstanding there, and sends it over the new one.
                (_, Some(guess)) if guess != id => self.transport.stop_dialling(guess),
                _ => return self.transport.close(connection),
            }
        }
        tracing::info!(server = %id, address = %peer.address, "connected");
        self.connections.insert(id, connection);
        inner.failures.clear();
        inner.core.handle(now, Input::Connected { server: id, incarnation });
        self.shared.changed.notify_waiters();
    }

    fn carry_out(&mut self, inner: &mut MutexGuard<'_, super::Inner>) {
        while let Some(output) = inner.core.poll_output() {
            match output {
                Output::Send { to, message } => {
                    if let Some(connection) = self.connections.get(&to) {
                        self.transport.send(*connection, message);
                    }
                }
                Output::Reply { number, result } => self.wakers.extend(inner.answer(number, result)),
                Output::Dial { server, addresses } => self.dial(server, addresses),
                Output::Warning(text) => self.warnings.push(text),
            }
        }
    }

    fn dial(&mut self, server: ServerId, addresses: Vec<String>) {
        if self.guesses.remove(&server) {
            return self.transport.dial(guess_key(server), &addresses, false);
        }
        if !self.connections.contains_key(&server) {
            self.transport.dial(server, &addresses, true);
        }
        self.addresses.insert(server, addresses);
    }

    /// True if something was handed in; else `waker` is woken when it is.
    fn poll_work(&self, waker: &Waker) -> bool {
        let mut inner = self.shared.lock();
        match &mut inner.driver {
            Some(known) => known.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        inner.work
    }

    /// True when no handle is left and what was asked for is done, or has had its time.
    fn is_over(&self, end: &mut Option<stdx::Instant>) -> bool {
        let inner = self.shared.lock();
        if !inner.closed {
            return false;
        }
        let now = clock::now();
        let end = *end.get_or_insert(now + LAST_REQUESTS);
        inner.core.unanswered() == 0 || now >= end
    }
}
