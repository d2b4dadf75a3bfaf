//! Connections: listen, dial, hello, frames in, frames out. Knows no meaning of messages.
//!
//! One [`Transport`] belongs to one thread and one core. What arrives, from all connections, waits in
//! one inbox of [`Event`]s, which the driver takes whole; what it sends is put into a queue per
//! connection and leaves with [`Transport::flush`], in one vectored write per connection and round.
//! The fewest system calls and wake-ups per message is what this file is about:
//!
//! * a reader task per connection; a read takes all that the socket has (up to 256 KiB), every
//!   complete frame in it becomes an event, payloads are slices of what was read;
//! * the large read buffers belong to the thread, not to connections: who has nothing to say holds
//!   none. A connection keeps one only while a large frame is half there;
//! * a writer task exists only while a socket takes no more.
//!
//! What can go wrong and what becomes of it:
//!
//! * bytes that are no frame, a hello that does not fit: the peer is told in a reject, and the
//!   connection is closed;
//! * a peer that does not read: its queue is bounded, and it must take something every 10 s;
//! * a peer that stops in the middle of a frame or of its hello: closed after 10 s, 5 s;
//! * too many connections: clients beyond the limit are told so; servers are always let in;
//! * a connection breaks: [`Event::Disconnected`], and if we dialled it, we dial again.
//!
//! Invariants: events of a connection come as `Connected Message* Disconnected`. A server transport
//! has at most one connection per other server, and never one of an older incarnation than it has
//! seen: a newer connection replaces an older one, with the old one's `Disconnected` first.
//!
//! Read next: `connection.rs` (bytes in and out), `greeting.rs` (hello), `dial.rs`, `listen.rs`.

mod address;
mod connection;
mod dial;
mod greeting;
mod listen;
mod queue;
mod socket;

pub use address::{Address, AddressError};
pub use dial::DialError;
pub use listen::{ListenError, Listener};

use connection::Connection;
use petal::ids::{Incarnation, ServerId};
use petal::message::Message;
use petal_wire::{Hello, Reject, RejectCode, Role, WireError};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use stdx::FastMap;
use tokio::sync::Notify;

/// Number of a connection; never used twice by one transport.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ConnectionId(pub u64);

/// The bounds of a transport.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// Connections of clients. 10,000 idle ones cost about 2 KiB each here, and as much in the kernel.
    pub clients_max: usize,
    /// Connections that have not said hello.
    pub greeting_max: usize,
    /// How long a hello may take.
    pub hello_timeout: Duration,
    /// How long a connection may stop in the middle of a frame, or not read what waits for it.
    pub stall_timeout: Duration,
    /// Bytes that may wait for a server that does not read.
    pub server_queue_max: usize,
    /// The same for a client: more than all its requests at one time can be answered with
    /// (1,024 elements are 64 MiB).
    pub client_queue_max: usize,
    /// Bytes in the inbox above which sockets are read no further until the driver took them.
    pub inbox_bytes_max: usize,
    /// First delay between two tries to reach a server.
    pub retry_min: Duration,
    /// Longest delay.
    pub retry_max: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds {
            clients_max: 10_000,
            greeting_max: 4096,
            hello_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(10),
            server_queue_max: 256 << 20,
            client_queue_max: 96 << 20,
            inbox_bytes_max: 64 << 20,
            retry_min: petal::limits::RETRY_MIN,
            retry_max: petal::limits::RETRY_MAX,
        }
    }
}

/// Who is at the other end of a connection, and how we came by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerInfo {
    /// As it said itself.
    pub hello: Hello,
    /// Protocol version agreed on.
    pub version: u16,
    /// Its address, as far as one is known: for people.
    pub address: String,
    /// The key under which we dialled it; `None`: it called us.
    pub dialled: Option<ServerId>,
}

/// What happened.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "most events are messages: a box would be an allocation for each")]
pub enum Event {
    /// A connection is up, hellos exchanged and compared.
    Connected {
        /// The connection.
        connection: ConnectionId,
        /// Who.
        peer: Rc<PeerInfo>,
    },
    /// A message.
    Message {
        /// The connection.
        connection: ConnectionId,
        /// Who sent it (so that nobody must look it up).
        from: Role,
        /// The message.
        message: Message,
    },
    /// The connection is gone.
    Disconnected {
        /// The connection.
        connection: ConnectionId,
        /// Who it was.
        peer: Rc<PeerInfo>,
        /// Why.
        reason: Closed,
    },
    /// Nobody listens at any address of a server (that is dialled, or was looked for).
    NobodyThere {
        /// The server.
        server: ServerId,
    },
    /// A dialled server was not reached; it is dialled again.
    DialFailed {
        /// The key under which it is dialled.
        server: ServerId,
        /// Which of its addresses.
        address: String,
        /// Why.
        error: DialError,
        /// Tries in a row that failed, this one included.
        failures: u32,
    },
}

/// Why a connection ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Closed {
    /// The other side closed it.
    #[error("the other side closed the connection")]
    ByPeer,
    /// The socket says so.
    #[error("{0}")]
    Io(String),
    /// What came is no frame.
    #[error("bad bytes: {0}")]
    Bad(#[from] WireError),
    /// The other side gave a reason.
    #[error("the other side closed the connection: {0}")]
    Rejected(Reject),
    /// A newer connection of the same server took its place.
    #[error("replaced by a newer connection of the same server")]
    Replaced,
    /// It stopped in the middle of a frame.
    #[error("the other side stopped in the middle of a frame")]
    HalfFrame,
    /// It does not read.
    #[error("the other side does not read what is sent to it ({0} bytes wait)")]
    NotReading(usize),
    /// This side wanted it.
    #[error("closed by this side")]
    Asked,
}

/// All connections of one thread. Clones are handles to the same.
///
/// Must be used within a `tokio` runtime that can `spawn_local` (see [`crate::run`]).
#[derive(Clone)]
pub struct Transport {
    shared: Rc<Shared>,
}

struct Shared {
    hello: Hello,
    bounds: Bounds,
    inbox: RefCell<Inbox>,
    /// Readers that found the inbox full wait here.
    drained: Notify,
    connections: RefCell<Connections>,
    /// Connections with something to write that nobody tried to write yet.
    dirty: RefCell<Vec<Rc<Connection>>>,
    buffers: connection::Buffers,
    greeting: Cell<usize>,
}

#[derive(Default)]
struct Inbox {
    events: VecDeque<Event>,
    bytes: usize,
    waker: Option<Waker>,
}

#[derive(Default)]
struct Connections {
    last_id: u64,
    by_id: BTreeMap<ConnectionId, Rc<Connection>>,
    /// The same, for the look-up of every send.
    fast: FastMap<u64, Rc<Connection>>,
    clients: usize,
    /// Of a server transport: the newest life seen of each other server, and its connection.
    servers: BTreeMap<ServerId, (Incarnation, ConnectionId)>,
    dials: BTreeMap<ServerId, dial::Dial>,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Transport({} connections)", self.shared.connections.borrow().by_id.len())
    }
}

impl Transport {
    /// A transport that introduces itself with `hello`. Call within the runtime.
    pub fn new(hello: Hello, bounds: Bounds) -> Transport {
        let shared = Rc::new(Shared {
            hello,
            bounds,
            inbox: RefCell::default(),
            drained: Notify::new(),
            connections: RefCell::default(),
            dirty: RefCell::default(),
            buffers: connection::Buffers::default(),
            greeting: Cell::new(0),
        });
        tokio::task::spawn_local(connection::watch_for_stalls(Rc::downgrade(&shared)));
        Transport { shared }
    }

    /// Binds an address. Connections are taken from the moment that [`Listener::accept`] is called.
    pub async fn bind(&self, address: &Address) -> Result<Listener, ListenError> {
        listen::bind(self.shared.clone(), address).await
    }

    /// Keeps a connection to a server at one of these addresses, the best first: dials until there is
    /// one, and again whenever it breaks. Called again: other addresses from the next try on.
    ///
    /// `server` is the key under which events tell of it. With `strict` the peer must be that server;
    /// without, whoever answers is taken (who knows addresses only guesses the key).
    pub fn dial(&self, server: ServerId, addresses: &[String], strict: bool) {
        dial::dial(&self.shared, server, addresses, strict);
    }

    /// Looks a few times, soon, whether anybody listens at one of a server's addresses, and tells if nobody
    /// does: for a server that dials us and whose connection broke.
    pub fn look_for(&self, server: ServerId, addresses: &[String]) {
        dial::look_for(&self.shared, server, addresses);
    }

    /// Dials a server no more, and closes the connection that came of it.
    pub fn stop_dialling(&self, server: ServerId) {
        dial::stop(&self.shared, server);
    }

    /// Puts a message into the queue of a connection; false if the connection is gone (the message is
    /// dropped). Nothing leaves before [`Transport::flush`].
    pub fn send(&self, to: ConnectionId, message: Message) -> bool {
        let connection = self.shared.connections.borrow().fast.get(&to.0).cloned();
        match connection {
            Some(connection) => self.shared.enqueue(&connection, message),
            None => false,
        }
    }

    /// Writes what was sent since the last flush: one vectored write per connection if the sockets
    /// take it; what they do not take follows by itself.
    pub fn flush(&self) {
        self.shared.flush();
    }

    /// Moves all events to the end of `out`. Never waits.
    pub fn take_events(&self, out: &mut VecDeque<Event>) {
        let mut inbox = self.shared.inbox.borrow_mut();
        out.append(&mut inbox.events);
        if inbox.bytes > self.shared.bounds.inbox_bytes_max {
            self.shared.drained.notify_waiters();
        }
        inbox.bytes = 0;
    }

    /// Ready when there are events. One task may wait at a time.
    pub async fn ready(&self) {
        std::future::poll_fn(|cx| self.poll_ready(cx)).await
    }

    /// As `ready`, for a driver that waits for several things.
    pub fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut inbox = self.shared.inbox.borrow_mut();
        if !inbox.events.is_empty() {
            return Poll::Ready(());
        }
        match &mut inbox.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Closes a connection; its `Disconnected` follows. A dialled one is dialled again.
    pub fn close(&self, connection: ConnectionId) {
        self.shared.close(connection, Closed::Asked);
    }

    /// Who is at the other end.
    pub fn peer(&self, connection: ConnectionId) -> Option<Rc<PeerInfo>> {
        self.shared.connections.borrow().by_id.get(&connection).map(|c| c.peer.clone())
    }

    /// Connections that are up.
    pub fn connection_count(&self) -> usize {
        self.shared.connections.borrow().by_id.len()
    }

    /// Waits until everything sent has been handed to the kernel, at most so long.
    pub async fn drain(&self, at_most: Duration) {
        let end = tokio::time::Instant::now() + at_most;
        self.flush();
        while self.shared.bytes_waiting() > 0 && tokio::time::Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Tells every peer that this side stops, closes every connection, and dials nobody any more.
    pub fn shut_down(&self) {
        let dials = std::mem::take(&mut self.shared.connections.borrow_mut().dials);
        drop(dials);
        let all: Vec<ConnectionId> = self.shared.connections.borrow().by_id.keys().copied().collect();
        let sentence = format!("{} stops", self.shared.own_name());
        for connection in all {
            self.shared.reject_and_close(
                connection,
                &Reject::new(RejectCode::Stopping, sentence.clone()),
                Closed::Asked,
            );
        }
    }
}

impl Shared {
    fn own_name(&self) -> String {
        match self.hello.role {
            Role::Server { id, .. } => format!("server {id}"),
            Role::Client => "the client".into(),
        }
    }

    fn push(&self, event: Event, bytes: usize) {
        let mut inbox = self.inbox.borrow_mut();
        inbox.events.push_back(event);
        inbox.bytes += bytes;
        if let Some(waker) = inbox.waker.take() {
            waker.wake();
        }
    }

    fn inbox_is_full(&self) -> bool {
        self.inbox.borrow().bytes > self.bounds.inbox_bytes_max
    }

    fn bytes_waiting(&self) -> usize {
        self.connections.borrow().by_id.values().map(|c| c.bytes_waiting()).sum()
    }
}
