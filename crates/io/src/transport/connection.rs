//! One connection: bytes in, bytes out, and its end.
//!
//! A connection is known to [`Shared`] from `admit` to `close`. Its reader task ends with it; so does
//! its writer task, if it has one: `close` shuts the socket down, which wakes both.

use super::queue::OutQueue;
use super::socket::{Shutdown, Socket};
use super::{Closed, ConnectionId, Event, PeerInfo, Shared};
use bytes::{Bytes, BytesMut};
use petal::ids::{Incarnation, ServerId};
use petal::message::Message;
use petal_wire::{Decoded, Frame, Limits, Reject, RejectCode, Role, WireError, decode, encode, encode_reject};
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, ready};

/// Bytes that one read may bring.
const CHUNK: usize = 256 << 10;
/// A chunk with less room than this at its end is not read into any more.
const CHUNK_SPARE_MIN: usize = 32 << 10;
/// A partial frame up to this size waits in a small buffer of its own, and the chunk goes back.
const PARTIAL_SMALL: usize = 16 << 10;
/// Chunks kept for the next reads. One is in use at a time; some come back late.
const CHUNKS_KEPT: usize = 4;
/// A reader lets others run after so many bytes.
const READ_TURN: usize = 1 << 20;
/// Buffer into which headers and bodies of all connections are encoded.
const HEADS: usize = 64 << 10;
/// Payload pieces up to this size are copied behind their body: a piece of its own costs more.
const COPY_MAX: usize = 512;

/// The buffers that all connections of a thread share.
#[derive(Default)]
pub(super) struct Buffers {
    chunks: RefCell<Vec<BytesMut>>,
    heads: RefCell<BytesMut>,
}

impl Buffers {
    fn take_chunk(&self) -> BytesMut {
        self.chunks.borrow_mut().pop().unwrap_or_else(|| BytesMut::with_capacity(CHUNK))
    }

    /// Takes a chunk back. Slices of it may still be in use: then its tail is, until it is too short.
    fn put_chunk(&self, mut chunk: BytesMut) {
        chunk.clear();
        let mut chunks = self.chunks.borrow_mut();
        // A buffer that grew for one large frame is not worth keeping.
        if chunks.len() < CHUNKS_KEPT && chunk.capacity() <= CHUNK {
            chunks.push(chunk);
        }
    }
}

/// One connection, hellos exchanged.
pub(super) struct Connection {
    pub id: ConnectionId,
    pub peer: Rc<PeerInfo>,
    socket: Socket,
    out: RefCell<OutQueue>,
    /// It is in `Shared::dirty`.
    dirty: Cell<bool>,
    /// The socket takes no more, and a writer task waits for it.
    blocked: Cell<bool>,
    closed: Cell<bool>,
    /// A frame is half there.
    mid_frame: Cell<bool>,
    bytes_read: Cell<u64>,
    bytes_written: Cell<u64>,
    /// Of the watch for stalls: what was read and written at its last look, and since how many looks
    /// something that should move has not.
    watched: Cell<(u64, u64, u32)>,
}

impl Connection {
    pub fn bytes_waiting(&self) -> usize {
        self.out.borrow().bytes()
    }

    /// Writes until the queue is empty (true) or the socket takes no more (false).
    fn write_some(&self) -> io::Result<bool> {
        let mut out = self.out.borrow_mut();
        while !out.is_empty() {
            match out.write_with(|slices| self.socket.try_write(slices)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.bytes_written.set(self.bytes_written.get() + n as u64),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }
}

/// What a greeting brought: everything that a connection is made of.
pub(super) struct Greeted {
    pub peer: PeerInfo,
    pub socket: Socket,
    /// Bytes that came behind the hello.
    pub buffer: BytesMut,
}

impl Shared {
    /// The life of a newly greeted peer, if it may not come in: what to tell it. Nothing is changed.
    pub fn may_enter(&self, role: Role) -> Result<(), Reject> {
        let connections = self.connections.borrow();
        match role {
            Role::Client if connections.clients >= self.bounds.clients_max => Err(Reject::new(
                RejectCode::TooManyConnections,
                format!(
                    "{} has {} client connections, which is the most it takes: close some, or use another server",
                    self.own_name(),
                    connections.clients
                ),
            )),
            Role::Client => Ok(()),
            Role::Server { id, incarnation } => self.may_enter_server(id, incarnation),
        }
    }

    fn may_enter_server(&self, id: ServerId, incarnation: Incarnation) -> Result<(), Reject> {
        let Role::Server { id: own, .. } = self.hello.role else {
            return Ok(());
        };
        if id == own {
            let sentence = format!("two programs say that they are {id}: stop one of them, or correct the address");
            return Err(Reject::new(RejectCode::WrongServer, sentence));
        }
        match self.connections.borrow().servers.get(&id) {
            Some((newest, _)) if incarnation < *newest => Err(Reject::new(
                RejectCode::StaleIncarnation,
                format!(
                    "{id} has been started again since: {newest} is known, and this is {incarnation}; stop the old one"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Makes a connection of a greeted peer, and returns what its reader task does until its end.
    pub fn admit(self: &Rc<Self>, greeted: Greeted) -> (ConnectionId, impl Future<Output = ()> + use<>) {
        let role = greeted.peer.hello.role;
        self.replace_older(role);
        let mut connections = self.connections.borrow_mut();
        connections.last_id += 1;
        let id = ConnectionId(connections.last_id);
        let connection = Rc::new(Connection {
            id,
            peer: Rc::new(greeted.peer),
            socket: greeted.socket,
            out: RefCell::default(),
            dirty: Cell::new(false),
            blocked: Cell::new(false),
            closed: Cell::new(false),
            mid_frame: Cell::new(false),
            bytes_read: Cell::new(0),
            bytes_written: Cell::new(0),
            watched: Cell::new((0, 0, 0)),
        });
        connections.by_id.insert(id, connection.clone());
        connections.fast.insert(id.0, connection.clone());
        match role {
            Role::Client => connections.clients += 1,
            Role::Server { id: server, incarnation } => {
                connections.servers.insert(server, (incarnation, id));
            }
        }
        drop(connections);
        self.push(Event::Connected { connection: id, peer: connection.peer.clone() }, 0);
        (id, read_until_closed(self.clone(), connection, greeted.buffer))
    }

    /// Between servers there is one connection. A client may well reach one server twice.
    fn replace_older(self: &Rc<Self>, role: Role) {
        let (Role::Server { id, .. }, Role::Server { .. }) = (role, self.hello.role) else {
            return;
        };
        let old = self.connections.borrow().servers.get(&id).map(|(_, connection)| *connection);
        if let Some(old) = old {
            self.close(old, Closed::Replaced);
        }
    }

    /// Ends a connection. Nothing if it has ended.
    pub fn close(&self, id: ConnectionId, reason: Closed) {
        let mut connections = self.connections.borrow_mut();
        let Some(connection) = connections.by_id.remove(&id) else {
            return;
        };
        connections.fast.remove(&id.0);
        match connection.peer.hello.role {
            Role::Client => connections.clients -= 1,
            Role::Server { id: server, .. } => {
                // With its life: what a peer says of itself holds for as long as it is there.
                if connections.servers.get(&server).is_some_and(|(_, current)| *current == id) {
                    connections.servers.remove(&server);
                }
            }
        }
        drop(connections);
        connection.closed.set(true);
        connection.out.borrow_mut().clear();
        connection.socket.shutdown(Shutdown::Both);
        self.push(Event::Disconnected { connection: id, peer: connection.peer.clone(), reason }, 0);
    }

    /// Ends a connection, and tries to say why. Only if nothing waits to be written: else the sentence
    /// would stand in the middle of a frame.
    pub fn reject_and_close(&self, id: ConnectionId, reject: &Reject, reason: Closed) {
        let connection = self.connections.borrow().by_id.get(&id).cloned();
        if let Some(connection) = connection
            && let Ok(true) = connection.write_some()
        {
            let mut bytes = BytesMut::new();
            encode_reject(reject, &mut bytes);
            connection.out.borrow_mut().push(bytes.freeze());
            let _ = connection.write_some();
        }
        self.close(id, reason);
    }

    /// Puts a message into a connection's queue. A queue beyond its bound ends the connection.
    pub fn enqueue(self: &Rc<Self>, connection: &Rc<Connection>, mut message: Message) -> bool {
        let Some(head) = self.encode_head(connection, &mut message) else {
            return false;
        };
        let mut out = connection.out.borrow_mut();
        out.push(head);
        if let Some(payload) = message.body.payload_mut() {
            payload.0.drain(..).for_each(|piece| out.push(piece));
        }
        let waiting = out.bytes();
        drop(out);
        let bound = match connection.peer.hello.role {
            Role::Client => self.bounds.client_queue_max,
            Role::Server { .. } => self.bounds.server_queue_max,
        };
        if waiting > bound {
            self.close(connection.id, Closed::NotReading(waiting));
            return false;
        }
        if !connection.dirty.get() && !connection.blocked.get() {
            connection.dirty.set(true);
            self.dirty.borrow_mut().push(connection.clone());
        }
        true
    }

    /// Header and body; a small payload goes right behind them and is taken out of the message.
    fn encode_head(&self, connection: &Connection, message: &mut Message) -> Option<Bytes> {
        let mut heads = self.buffers.heads.borrow_mut();
        if heads.capacity() < 1024 {
            heads.reserve(HEADS);
        }
        let payload_length = match encode(message, connection.peer.version, &mut heads) {
            Ok(length) => length,
            Err(error) => {
                // It would be refused at the other end; the cores bound what they send.
                tracing::error!(peer = %connection.peer.address, %error, "a message that cannot be sent was dropped");
                return None;
            }
        };
        if (1..=COPY_MAX).contains(&payload_length)
            && let Some(payload) = message.body.payload_mut()
        {
            payload.0.drain(..).for_each(|piece| heads.extend_from_slice(&piece));
        }
        Some(heads.split().freeze())
    }

    pub fn flush(self: &Rc<Self>) {
        let mut dirty = std::mem::take(&mut *self.dirty.borrow_mut());
        for connection in dirty.drain(..) {
            connection.dirty.set(false);
            if connection.closed.get() {
                continue;
            }
            match connection.write_some() {
                Ok(true) => {}
                Ok(false) => {
                    connection.blocked.set(true);
                    tokio::task::spawn_local(write_the_rest(self.clone(), connection));
                }
                Err(e) => self.close(connection.id, Closed::Io(e.to_string())),
            }
        }
        // The list keeps its room; nothing was added meanwhile (closing sends nothing).
        *self.dirty.borrow_mut() = dirty;
    }
}

/// The writer task: exists while the socket takes no more.
async fn write_the_rest(shared: Rc<Shared>, connection: Rc<Connection>) {
    let wait_and_write = async {
        let room = connection.socket.room()?;
        // One `Ok` of `write_some` is all: the queue is empty. A closed connection has nothing to write.
        room.write(|| match connection.closed.get() || connection.write_some()? {
            true => Ok(()),
            false => Err(io::ErrorKind::WouldBlock.into()),
        })
        .await
    };
    match wait_and_write.await {
        Ok(()) => connection.blocked.set(false),
        Err(e) => shared.close(connection.id, Closed::Io(e.to_string())),
    }
}

/// The reader task.
async fn read_until_closed(shared: Rc<Shared>, connection: Rc<Connection>, mut buffer: BytesMut) {
    let version = connection.peer.version;
    let limits = match connection.peer.hello.role {
        Role::Client => Limits::from_client(version),
        Role::Server { .. } => Limits::from_server(version),
    };
    let mut turn = 0;
    while !connection.closed.get() {
        let need = match shared.take_frames(&connection, &mut buffer, &limits) {
            Ok(need) => need,
            Err(reason) => return shared.close_for(&connection, reason),
        };
        connection.mid_frame.set(!buffer.is_empty());
        shared.give_back(&mut buffer);
        if turn >= READ_TURN {
            turn = 0;
            tokio::task::yield_now().await;
        }
        while shared.inbox_is_full() && !connection.closed.get() {
            shared.drained.notified().await;
        }
        match poll_fn(|cx| shared.poll_fill(cx, &connection.socket, &mut buffer, need)).await {
            Ok(0) => return shared.close(connection.id, Closed::ByPeer),
            Ok(n) => {
                turn += n;
                connection.bytes_read.set(connection.bytes_read.get() + n as u64);
            }
            Err(e) => return shared.close(connection.id, Closed::Io(e.to_string())),
        }
    }
}

impl Shared {
    /// Every complete frame in `buffer` becomes an event. Returns how long the buffer must be before
    /// there is another.
    fn take_frames(&self, connection: &Connection, buffer: &mut BytesMut, limits: &Limits) -> Result<usize, Closed> {
        let from = connection.peer.hello.role;
        loop {
            let before = buffer.len();
            match decode(buffer, limits)? {
                Decoded::Need(need) => return Ok(need),
                Decoded::Frame(Frame::Message(message)) if !connection.closed.get() => {
                    let event = Event::Message { connection: connection.id, from, message };
                    self.push(event, before - buffer.len());
                }
                Decoded::Frame(Frame::Message(_)) => {}
                Decoded::Frame(Frame::Reject(reject)) => return Err(Closed::Rejected(reject)),
                Decoded::Frame(Frame::Hello(_)) => return Err(Closed::Bad(WireError::SecondHello)),
            }
        }
    }

    fn close_for(&self, connection: &Connection, reason: Closed) {
        match &reason {
            Closed::Bad(error) => {
                let reject = Reject::new(RejectCode::Malformed, error.to_string());
                self.reject_and_close(connection.id, &reject, reason);
            }
            _ => self.close(connection.id, reason),
        }
    }

    /// A connection that waits holds no chunk, unless much of a frame is in it.
    fn give_back(&self, buffer: &mut BytesMut) {
        if buffer.len() <= PARTIAL_SMALL {
            let small = BytesMut::from(&buffer[..]);
            self.buffers.put_chunk(std::mem::replace(buffer, small));
        }
    }

    /// Reads once, as much as there is, behind what `buffer` has. No buffer is touched while there is
    /// nothing to read.
    fn poll_fill(
        &self,
        cx: &mut Context<'_>,
        socket: &Socket,
        buffer: &mut BytesMut,
        need: usize,
    ) -> Poll<io::Result<usize>> {
        loop {
            let readable = ready!(socket.poll_readable(cx))?;
            if buffer.len() <= PARTIAL_SMALL {
                let mut chunk = self.buffers.take_chunk();
                make_room(&mut chunk, need);
                chunk.extend_from_slice(buffer);
                *buffer = chunk;
            } else {
                make_room(buffer, need - buffer.len().min(need));
            }
            match socket.read(readable, buffer)? {
                Some(n) => return Poll::Ready(Ok(n)),
                None => self.give_back(buffer),
            }
        }
    }
}

/// Room for `missing` more bytes, or for as many as are already there: memory follows what a peer
/// really sent, not what it claimed.
fn make_room(buffer: &mut BytesMut, missing: usize) {
    let wanted = missing.min(buffer.len().max(CHUNK));
    let spare = buffer.capacity() - buffer.len();
    if spare < wanted.max(CHUNK_SPARE_MIN) {
        buffer.reserve(wanted.max(CHUNK - buffer.len().min(CHUNK / 2)));
    }
}

/// Looks at every connection a few times per stall timeout: cheaper than a timer for each read.
pub(super) async fn watch_for_stalls(shared: Weak<Shared>) {
    const LOOKS: u32 = 5;
    let Some(pause) = shared.upgrade().map(|s| s.bounds.stall_timeout / LOOKS) else {
        return;
    };
    loop {
        tokio::time::sleep(pause).await;
        let Some(shared) = shared.upgrade() else {
            return;
        };
        let stalled: Vec<Rc<Connection>> =
            shared.connections.borrow().by_id.values().filter(|c| c.is_stalled(LOOKS)).cloned().collect();
        for connection in stalled {
            let reason = match connection.blocked.get() {
                true => Closed::NotReading(connection.bytes_waiting()),
                false => Closed::HalfFrame,
            };
            let reject = Reject::new(RejectCode::TooSlow, reason.to_string());
            shared.reject_and_close(connection.id, &reject, reason);
        }
    }
}

impl Connection {
    fn is_stalled(&self, looks: u32) -> bool {
        let (read, written, since) = self.watched.get();
        let (now_read, now_written) = (self.bytes_read.get(), self.bytes_written.get());
        let stuck = (self.mid_frame.get() && read == now_read) || (self.blocked.get() && written == now_written);
        let since = if stuck { since + 1 } else { 0 };
        self.watched.set((now_read, now_written, since));
        since >= looks
    }
}
