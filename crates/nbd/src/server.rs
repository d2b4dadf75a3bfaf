//! Listeners, connections, and their end.

use crate::export::Exports;
use crate::inbox::{Chunks, Inbox};
use crate::negotiate::{Negotiated, Negotiation};
use crate::registry::Registry;
use crate::room::Room;
use crate::transmission::transmit;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::task::Waker;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// How long to wait before accepting again when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// TCP: a peer whose machine is gone is noticed after about this time (three probes).
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Unix sockets: a reply of 1 MiB leaves in half as many system calls as with the kernel's default
/// (measured: 230 instead of 270 microseconds of CPU, client included). A limit, not memory in use.
const UNIX_SEND_BUFFER: usize = 512 << 10;

/// Bounds and names.
#[derive(Clone, Debug)]
pub struct Config {
    /// The export that the empty name means. `None`: the first of the list.
    pub default_export: Option<String>,
    /// Longest time that a client may take for one step of the handshake.
    pub handshake_timeout: Duration,
    /// Connections at one time; further ones are closed at once.
    pub connections_max: usize,
    /// Requests of a connection that run at one time, at most 128.
    pub requests_in_flight_max: usize,
    /// Bytes of requests and replies held for one connection: two of the largest requests.
    pub bytes_in_flight_max: u64,
    /// Bytes of requests and replies held for all connections. Beyond it, each runs one request of at most 64 KiB
    /// at a time, and longer ones wait for each other.
    pub bytes_in_flight_total: u64,
    /// How long connections may take to finish their requests when the server stops.
    pub linger: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            default_export: None,
            handshake_timeout: Duration::from_secs(30),
            connections_max: 4096,
            requests_in_flight_max: 128,
            bytes_in_flight_max: 64 << 20,
            bytes_in_flight_total: 512 << 20,
            linger: Duration::from_secs(10),
        }
    }
}

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) closing: Closing,
    /// For requests and replies of all connections.
    pub(crate) room: Room,
    chunks: Rc<Chunks>,
    connections: Cell<usize>,
}

/// The end of the server, as connections learn of it.
#[derive(Default)]
pub(crate) struct Closing {
    begun: Cell<bool>,
    notify: Notify,
    /// Connections that are past their handshake. Not `notify`: asking it in each poll would cost.
    wakers: RefCell<BTreeMap<u64, Waker>>,
    next: Cell<u64>,
}

impl Closing {
    /// True from the moment on at which no new requests are taken.
    pub(crate) fn is_begun(&self) -> bool {
        self.begun.get()
    }

    /// Resolves when that moment has come.
    pub(crate) async fn begun(&self) {
        let notified = self.notify.notified();
        if !self.begun.get() {
            notified.await;
        }
    }

    /// Wakes `waker` at that moment, for as long as what comes back lives.
    pub(crate) fn remember(&self, waker: Waker) -> Remembered<'_> {
        let key = self.next.get();
        self.next.set(key + 1);
        self.wakers.borrow_mut().insert(key, waker);
        Remembered { closing: self, key }
    }

    fn begin(&self) {
        self.begun.set(true);
        self.notify.notify_waiters();
        for waker in std::mem::take(&mut *self.wakers.borrow_mut()).into_values() {
            waker.wake();
        }
    }
}

/// A waker that [`Closing`] remembers.
pub(crate) struct Remembered<'a> {
    closing: &'a Closing,
    key: u64,
}

impl Drop for Remembered<'_> {
    fn drop(&mut self) {
        self.closing.wakers.borrow_mut().remove(&self.key);
    }
}

/// A socket that clients connect to.
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A unix socket; its file is removed in the end.
    Unix(UnixListener, SocketFile),
}

/// The file of a unix socket, removed when this is dropped.
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Listener {
    /// Listens on TCP.
    pub async fn bind_tcp(address: SocketAddr) -> io::Result<Listener> {
        Ok(Listener::Tcp(TcpListener::bind(address).await?))
    }

    /// Listens on a unix socket. A file that a dead server left behind is replaced; one behind which
    /// somebody listens, or that is no socket, is an error.
    pub fn bind_unix(path: &Path) -> io::Result<Listener> {
        use std::os::unix::fs::FileTypeExt;
        if let Ok(found) = std::fs::symlink_metadata(path) {
            if !found.file_type().is_socket() {
                let why = format!("{} exists and is no socket", path.display());
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
            }
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                let why = format!("another server listens on {}", path.display());
                return Err(io::Error::new(io::ErrorKind::AddrInUse, why));
            }
            std::fs::remove_file(path)?;
        }
        Ok(Listener::Unix(UnixListener::bind(path)?, SocketFile(path.to_owned())))
    }

    /// The TCP address, with the port that was chosen if 0 was asked for.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match self {
            Listener::Tcp(listener) => listener.local_addr().ok(),
            Listener::Unix(..) => None,
        }
    }
}

/// An NBD server. Cloning it gives another handle to the same one.
///
/// Everything it does must happen inside a [`tokio::task::LocalSet`] (see the crate's notes).
pub struct Server<X: Exports>(Rc<Inner<X>>);

struct Inner<X: Exports> {
    shared: Shared,
    registry: Registry<X>,
    /// Calls of `serve` that have not returned.
    serving: Cell<usize>,
    stopped: Notify,
}

impl<X: Exports> Clone for Server<X> {
    fn clone(&self) -> Self {
        Server(self.0.clone())
    }
}

/// Counts something for as long as it lives.
struct Counted<'a>(&'a Cell<usize>, Option<&'a Notify>);

impl<'a> Counted<'a> {
    fn new(cell: &'a Cell<usize>, at_end: Option<&'a Notify>) -> Self {
        cell.set(cell.get() + 1);
        Counted(cell, at_end)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
        if let Some(notify) = self.1 {
            notify.notify_waiters();
        }
    }
}

impl<X: Exports> Server<X> {
    /// A server of these exports. It does nothing until it is given listeners.
    pub fn new(exports: X, config: Config) -> Self {
        let room = Room::new(config.bytes_in_flight_total);
        let shared =
            Shared { config, closing: Closing::default(), room, chunks: Rc::default(), connections: Cell::new(0) };
        let registry = Registry::new(exports);
        Server(Rc::new(Inner { shared, registry, serving: Cell::new(0), stopped: Notify::new() }))
    }

    /// Accepts connections until [`Server::shutdown`]; returns when the last one has ended. Dropping
    /// the future cuts the connections off.
    pub async fn serve(&self, listener: Listener) {
        let inner = &*self.0;
        let _serving = Counted::new(&inner.serving, Some(&inner.stopped));
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                accepted = accept(&listener) => match accepted {
                    Ok(stream) => self.admit(stream, &mut tasks),
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept an NBD connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(ended) = tasks.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        tracing::error!("an NBD connection panicked; the others go on");
                    }
                }
                () = inner.shared.closing.begun() => break,
            }
        }
        drop(listener);
        let all = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(inner.shared.config.linger, all).await.is_err() {
            tracing::warn!("NBD connections with unfinished requests are cut off");
        }
        tasks.shutdown().await;
    }

    /// Serves one stream that somebody else accepted; returns when it has ended. The caller waits for it
    /// before [`Server::shutdown`] may return.
    pub async fn serve_stream<S: AsyncRead + AsyncWrite + Unpin>(&self, mut stream: S) {
        let Inner { shared, registry, .. } = &*self.0;
        let _counted = Counted::new(&shared.connections, None);
        let default_export = shared.config.default_export.as_deref();
        let timeout = shared.config.handshake_timeout;
        let negotiation = Negotiation::new(registry, &shared.closing, default_export, timeout, &mut stream);
        let Negotiated { export, lease, mode, extents, received } = match negotiation.run().await {
            Ok(negotiated) => negotiated,
            Err(why) => return tracing::debug!(%why, "an NBD handshake ended without an export"),
        };
        tracing::debug!(export = lease.name(), ?mode, "an NBD connection is up");
        let inbox = Inbox::new(shared.chunks.clone(), &received);
        drop(received);
        // Unconstrained: the connection bounds its rounds itself, and a budget that ran out in the middle of
        // one would make requests wait that are ready.
        let end = tokio::task::unconstrained(transmit(shared, &mut stream, inbox, export, mode, extents)).await;
        tracing::debug!(export = lease.name(), ?end, "an NBD connection has ended");
        // The client sees the end only after its export has been closed, if it was the last: who opens it
        // elsewhere next is not refused.
        lease.release().await;
    }

    /// Stops: no new connections and requests, replies to those that run, exports closed.
    pub async fn shutdown(&self) {
        let inner = &*self.0;
        inner.shared.closing.begin();
        loop {
            let stopped = inner.stopped.notified();
            if inner.serving.get() == 0 {
                break;
            }
            stopped.await;
        }
        inner.registry.close_all().await;
    }

    /// Connections at this moment.
    pub fn connections(&self) -> usize {
        self.0.shared.connections.get()
    }

    fn admit(&self, stream: Stream, tasks: &mut JoinSet<()>) {
        let shared = &self.0.shared;
        if tasks.len() >= shared.config.connections_max || self.connections() >= shared.config.connections_max {
            return tracing::warn!(max = shared.config.connections_max, "one NBD connection too many was closed");
        }
        let server = self.clone();
        match stream {
            Stream::Tcp(stream) => {
                if let Err(error) = tune(&stream) {
                    tracing::debug!(%error, "cannot set options of a TCP connection");
                }
                tasks.spawn_local(async move { server.serve_stream(stream).await });
            }
            Stream::Unix(stream) => {
                // The kernel cuts this to its own maximum, and that is no error.
                let _ = socket2::SockRef::from(&stream).set_send_buffer_size(UNIX_SEND_BUFFER);
                tasks.spawn_local(async move { server.serve_stream(stream).await });
            }
        }
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(tokio::net::UnixStream),
}

async fn accept(listener: &Listener) -> io::Result<Stream> {
    Ok(match listener {
        Listener::Tcp(listener) => Stream::Tcp(listener.accept().await?.0),
        Listener::Unix(listener, _) => Stream::Unix(listener.accept().await?.0),
    })
}

fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 4).with_retries(3);
    socket2::SockRef::from(stream).set_tcp_keepalive(&keepalive)
}
