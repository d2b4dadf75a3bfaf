//! Where cores run: what the real driver keeps around a server or a client, in pretended form.
//!
//! Inputs wait in an inbox; a while later the node's thread takes them all up, and then asks the core
//! for all its outputs. So group commit and merging happen as they do for real, and the core is never
//! called in the middle of what it asked for itself.

use crate::clock::Clock;
use crate::disk::SimDisk;
use crate::net::{ConnectionId, EndPoint, Node, Side};
use petal::client::{self, Client};
use petal::global_state::Genesis;
use petal::ids::{DiskId, Incarnation, ServerId};
use petal::message::Message;
use petal::server::{self, ClientId, Peer, Server};
use std::collections::{BTreeMap, VecDeque};
use stdx::Instant;

/// What has arrived at a node and was not taken up yet. Connections change for the core when they are
/// taken up, so that what it wanted to send before goes over the connection that it meant, or nowhere.
#[derive(Debug)]
pub enum Arrival<I, P> {
    /// For the core as it is.
    Input(I),
    /// A message.
    Message {
        /// Over which connection.
        connection: ConnectionId,
        /// What.
        message: Box<Message>,
    },
    /// A connection is up.
    Up {
        /// Which.
        connection: ConnectionId,
        /// Our side of it.
        side: Side,
        /// Who is at the other end.
        peer: P,
        /// Of a server; zero for clients.
        incarnation: Incarnation,
    },
    /// A connection is gone.
    Down {
        /// Which.
        connection: ConnectionId,
    },
}

/// What every life of a node has.
#[derive(Debug)]
pub struct Driver<I, P> {
    /// Which life of the node, from 1.
    pub life: u64,
    /// What was not taken up yet.
    pub inbox: VecDeque<Arrival<I, P>>,
    /// The thread will take them up.
    pub run_planned: bool,
    /// Number of the wake-up that counts; older ones are void.
    pub tick_generation: u64,
    /// When it comes, in the world's time.
    pub tick_at: Option<Instant>,
    /// Wake-ups in a row without anything else.
    pub idle_ticks: u64,
    /// The connection to each peer, and our side of it.
    pub connections: BTreeMap<P, (ConnectionId, Side)>,
    /// The peer of each connection.
    pub peers: BTreeMap<ConnectionId, P>,
    /// Server hosts to keep a connection to; true while an attempt is planned or a connection exists.
    pub dials: BTreeMap<usize, bool>,
    /// Number of the newest frame received, and its connection.
    pub newest_frame: (u64, ConnectionId),
}

impl<I, P: Ord + Copy> Driver<I, P> {
    /// A new life.
    pub fn new(life: u64) -> Self {
        Driver {
            life,
            inbox: VecDeque::new(),
            run_planned: false,
            tick_generation: 0,
            tick_at: None,
            idle_ticks: 0,
            connections: BTreeMap::new(),
            peers: BTreeMap::new(),
            dials: BTreeMap::new(),
            newest_frame: (0, 0),
        }
    }

    /// Enters a connection; the one that it replaces comes back.
    pub fn enter(&mut self, peer: P, connection: ConnectionId, side: Side) -> Option<(ConnectionId, Side)> {
        let old = self.connections.insert(peer, (connection, side));
        if let Some((old, _)) = old {
            self.peers.remove(&old);
        }
        self.peers.insert(connection, peer);
        old
    }

    /// Forgets a connection; its peer comes back unless another connection has replaced it.
    pub fn forget(&mut self, connection: ConnectionId) -> Option<P> {
        let peer = self.peers.remove(&connection)?;
        self.connections.remove(&peer);
        Some(peer)
    }
}

/// A running server.
pub struct ServerLife {
    /// The shipped core.
    pub server: Server,
    /// What drives it.
    pub driver: Driver<server::Input, Peer>,
    /// It showed that its incarnation is durable: from then on it lets others in.
    pub open: bool,
    /// It said that it serves.
    pub ready: bool,
    /// When it would have run first, had it not been stopped at that moment.
    pub stopped_at: Option<Instant>,
    /// Number of the next client connection.
    pub next_client: ClientId,
}

/// A machine for a server.
pub struct ServerHost {
    /// Its id, once it has one.
    pub id: Option<ServerId>,
    /// Its disks' ids.
    pub disk_ids: Vec<DiskId>,
    /// Its disks.
    pub disks: Vec<SimDisk>,
    /// Its clock.
    pub clock: Clock,
    /// The running server, if one runs.
    pub life: Option<ServerLife>,
    /// Lives so far.
    pub lives: u64,
    /// A start is planned.
    pub start_planned: bool,
    /// Its last disk is not there at the next start.
    pub lacks_a_disk: bool,
    /// It stays down until its disks are replaced.
    pub losing: bool,
    /// Its thread is slow until then.
    pub slow_until: Instant,
    /// It does not run at all before.
    pub frozen_until: Instant,
    /// Its disk has failed for good.
    pub lost: bool,
    /// What a joining server draws once.
    pub token: u128,
    /// The cluster that it was formatted for.
    pub genesis: Genesis,
}

/// A running client.
pub struct ClientLife {
    /// The shipped core.
    pub client: Client,
    /// What drives it.
    pub driver: Driver<client::Input, ServerId>,
    /// Number of the next request.
    pub next_request: u64,
    /// What uses it.
    pub user: crate::workload::User,
}

/// A machine for a client.
pub struct ClientHost {
    /// Its clock.
    pub clock: Clock,
    /// The running client, if one runs.
    pub life: Option<ClientLife>,
    /// Lives so far.
    pub lives: u64,
    /// A start is planned.
    pub start_planned: bool,
    /// What its users do.
    pub role: crate::workload::Role,
}

/// The address of a server host.
pub fn address_of(host: usize) -> String {
    format!("sim:{host}")
}

/// The host at an address.
pub fn host_at(address: &str) -> Option<usize> {
    address.strip_prefix("sim:")?.parse().ok()
}

impl ServerHost {
    /// One of its disks has failed for good, whether its server has met that or not.
    pub fn has_failed(&self) -> bool {
        self.lost || self.disks.iter().any(|d| d.failing)
    }

    /// The running life as an end of connections.
    pub fn end_point(&self, host: usize) -> Option<EndPoint> {
        self.life.as_ref().map(|l| EndPoint { node: Node::Server(host), life: l.driver.life })
    }
}

impl ClientHost {
    /// The running life as an end of connections.
    pub fn end_point(&self, host: usize) -> Option<EndPoint> {
        self.life.as_ref().map(|l| EndPoint { node: Node::Client(host), life: l.driver.life })
    }
}
