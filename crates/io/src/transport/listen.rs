//! Listening: bind early (a taken address is an error at the start), accept when the core is ready.

use super::socket::Socket;
use super::{Address, Shared};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::task::JoinHandle;

/// After an error of accept (no more file descriptors, mostly) others may close some.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody does.
    #[error("{address} is in use: another program listens there; stop it, or choose another address")]
    InUse {
        /// The address.
        address: String,
    },
    /// A file that is no socket has the path.
    #[error("{path} exists and is not a socket: move it away, or choose another address")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system says so.
    #[error("cannot listen on {address}: {error}")]
    Io {
        /// The address.
        address: String,
        /// Why.
        error: io::Error,
    },
}

enum Bound {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// An address that is bound. Connections wait in the kernel until [`Listener::accept`]; dropping it
/// ends the listening and removes the socket's file.
pub struct Listener {
    shared: Rc<Shared>,
    socket: Option<Bound>,
    address: Address,
    path: Option<PathBuf>,
    task: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Listener({})", self.address)
    }
}

impl Listener {
    /// Where it listens; for port 0, the port that it got.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Begins to take connections.
    pub fn accept(&mut self) {
        if let Some(socket) = self.socket.take() {
            self.task = Some(tokio::task::spawn_local(accept_all(self.shared.clone(), socket)));
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

pub(super) async fn bind(shared: Rc<Shared>, address: &Address) -> Result<Listener, ListenError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse { address: address.to_string() },
        _ => ListenError::Io { address: address.to_string(), error },
    };
    match address {
        Address::Tcp(text) => {
            let listener = TcpListener::bind(text.as_str()).await.map_err(failed)?;
            let bound = listener.local_addr().map_err(failed)?.to_string();
            let (socket, address) = (Some(Bound::Tcp(listener)), Address::Tcp(bound));
            Ok(Listener { shared, socket, address, path: None, task: None })
        }
        Address::Unix(path) => {
            remove_stale(path, address).await?;
            let listener = UnixListener::bind(path).map_err(failed)?;
            let (socket, path) = (Some(Bound::Unix(listener, path.clone())), Some(path.clone()));
            Ok(Listener { shared, socket, address: address.clone(), path, task: None })
        }
    }
}

/// The file of a server that was killed is still there; that of one that runs answers.
async fn remove_stale(path: &Path, address: &Address) -> Result<(), ListenError> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.into() });
    }
    match UnixStream::connect(path).await {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|error| ListenError::Io { address: address.to_string(), error })
        }
        _ => Err(ListenError::InUse { address: address.to_string() }),
    }
}

async fn accept_all(shared: Rc<Shared>, socket: Bound) {
    loop {
        match accept_one(&socket).await {
            // Beyond this bound nobody is even told: it is somebody who opens and says nothing.
            Ok(_) if shared.greeting.get() >= shared.bounds.greeting_max => {}
            Ok((socket, address)) => {
                shared.greeting.set(shared.greeting.get() + 1);
                tokio::task::spawn_local(receive(shared.clone(), socket, address));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot take a connection; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn accept_one(bound: &Bound) -> io::Result<(Socket, String)> {
    match bound {
        Bound::Tcp(listener) => {
            let (stream, address) = listener.accept().await?;
            Ok((Socket::from_tcp(stream)?, address.to_string()))
        }
        Bound::Unix(listener, path) => {
            let (stream, _) = listener.accept().await?;
            Ok((Socket::from_unix(stream)?, format!("unix:{}", path.display())))
        }
    }
}

async fn receive(shared: Rc<Shared>, socket: Socket, address: String) {
    let greeted = shared.greet_as_listener(socket, address.clone()).await;
    shared.greeting.set(shared.greeting.get() - 1);
    match greeted {
        Ok(greeted) => {
            let (_, reading) = shared.admit(greeted);
            // A task of its own: this one's state is larger, and an idle connection keeps its task.
            tokio::task::spawn_local(reading);
        }
        Err(error) => tracing::debug!(%address, ?error, "a connection without a hello that fits"),
    }
}
