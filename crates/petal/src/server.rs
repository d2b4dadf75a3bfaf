//! A Petal server: owns its rooms, and is the only file that routes between them.

use crate::ids::*;
use crate::message::Message;
use crate::store::{DiskCommand, DiskResult, OpId};

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
        /// Its addresses, the best first.
        addresses: Vec<String>,
    },
    /// The server has begun to serve: its `ServerUp` is applied.
    Ready,
    /// The server cannot go on, and says why; the process ends.
    Fatal(String),
    /// The server was asked to stop and has stopped.
    Stopped,
}

use crate::store::{OpenDisk, StoreConfig};
use stdx::{Instant, Machine};

/// What a server is started with.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where others reach it, the best address first.
    pub addresses: Vec<String>,
    /// Bounds of memory.
    pub store: StoreConfig,
}

/// A Petal server.
pub struct Server;

#[allow(unused_variables, missing_docs, clippy::unimplemented)]
impl Server {
    /// Starts a new life on these disks (all of the server's, in the order of their superblocks' list).
    /// Identity, cluster and ring come from the superblocks. Sends nothing before the new incarnation
    /// is durable on every disk.
    pub fn start(now: Instant, config: ServerConfig, disks: Vec<OpenDisk>) -> Server {
        unimplemented!()
    }
    /// Who it is.
    pub fn id(&self) -> ServerId {
        unimplemented!()
    }
    /// Its life; known at once, durable before anything is sent.
    pub fn incarnation(&self) -> Incarnation {
        unimplemented!()
    }
    /// The cluster.
    pub fn cluster(&self) -> ClusterId {
        unimplemented!()
    }
    /// The state, for checkers and status.
    pub fn state(&self) -> &crate::global_state::State {
        unimplemented!()
    }
}

#[allow(unused_variables, clippy::unimplemented)]
impl Machine for Server {
    type Input = Input;
    type Output = Output;
    fn handle(&mut self, now: Instant, input: Input) {
        unimplemented!()
    }
    fn poll_output(&mut self) -> Option<Output> {
        unimplemented!()
    }
    fn next_timeout(&self) -> Option<Instant> {
        unimplemented!()
    }
    fn check_invariants(&self) {
        unimplemented!()
    }
}
