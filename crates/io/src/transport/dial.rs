//! Keeping a connection to a server: dial, and again when it breaks.

use super::greeting::GreetError;
use super::socket::Socket;
use super::{Address, AddressError, Closed, Event, Shared};
use petal::ids::ServerId;
use petal_wire::{Reject, WireError};
use std::cell::RefCell;
use std::io;
use std::rc::{Rc, Weak};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// A connection that lived this long was a good one: after it the first try comes at once.
const GOOD_LIFE: Duration = Duration::from_secs(1);

/// Why a server was not reached. The sentences name what to do; the event names server and address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// The address is none.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Nobody is there.
    #[error("nobody listens there: is the server running?")]
    NobodyThere,
    /// The socket says so.
    #[error("{0}")]
    Io(String),
    /// It does not answer.
    #[error("no answer in time: does the host run, and does a firewall let the port through?")]
    Timeout,
    /// It closed the connection without a word.
    #[error("the connection was closed during the hello")]
    ClosedDuringHello,
    /// What answers is not Petal.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// It would not, and says why.
    #[error("{0}")]
    Rejected(Reject),
    /// We would not: it is not whom we look for.
    #[error("{0}")]
    Refused(Reject),
}

impl From<GreetError> for DialError {
    fn from(error: GreetError) -> Self {
        match error {
            GreetError::Io(e) if e.kind() == io::ErrorKind::UnexpectedEof => DialError::ClosedDuringHello,
            GreetError::Io(e) => DialError::from(e),
            GreetError::Timeout => DialError::Timeout,
            GreetError::Wire(e) => DialError::Wire(e),
            GreetError::Rejected(r) => DialError::Rejected(r),
            GreetError::Refused(r) => DialError::Refused(r),
        }
    }
}

impl From<io::Error> for DialError {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            _ if is_nobody(&e) => DialError::NobodyThere,
            io::ErrorKind::TimedOut => DialError::Timeout,
            _ => DialError::Io(e.to_string()),
        }
    }
}

/// The address refuses: the host is there, and nobody listens.
fn is_nobody(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
}

/// A server that is dialled. Dropping it ends the dialling, not the connection.
pub(super) struct Dial {
    target: Rc<RefCell<Vec<String>>>,
    changed: Rc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for Dial {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) fn dial(shared: &Rc<Shared>, server: ServerId, addresses: &[String], strict: bool) {
    let mut connections = shared.connections.borrow_mut();
    if let Some(dial) = connections.dials.get(&server) {
        let mut target = dial.target.borrow_mut();
        if *target != addresses {
            *target = addresses.to_vec();
            dial.changed.notify_one();
        }
        return;
    }
    let target = Rc::new(RefCell::new(addresses.to_vec()));
    let changed = Rc::new(Notify::new());
    let task = Task { shared: Rc::downgrade(shared), server, strict, target: target.clone(), changed: changed.clone() };
    let task = tokio::task::spawn_local(task.run());
    connections.dials.insert(server, Dial { target, changed, task });
}

pub(super) fn stop(shared: &Rc<Shared>, server: ServerId) {
    let (dial, connection) = {
        let mut connections = shared.connections.borrow_mut();
        let dial = connections.dials.remove(&server);
        let connection = connections.by_id.values().find(|c| c.peer.dialled == Some(server)).map(|c| c.id);
        (dial, connection)
    };
    drop(dial);
    if let Some(connection) = connection {
        shared.close(connection, Closed::Asked);
    }
}

/// Waits before each look.
const LOOKS: [Duration; 3] = [Duration::from_millis(20), Duration::from_millis(40), Duration::from_millis(140)];
/// How long one look may take: what does not answer is not refused.
const LOOK_TIMEOUT: Duration = Duration::from_millis(200);

pub(super) fn look_for(shared: &Rc<Shared>, server: ServerId, addresses: &[String]) {
    let (shared, addresses) = (Rc::downgrade(shared), addresses.to_vec());
    tokio::task::spawn_local(async move {
        for wait in LOOKS {
            tokio::time::sleep(wait).await;
            let nobody = nobody_listens(&addresses).await;
            let Some(shared) = shared.upgrade() else { return };
            if nobody {
                shared.push(Event::NobodyThere { server }, 0);
            }
        }
    });
}

/// True only if every address refuses.
async fn nobody_listens(addresses: &[String]) -> bool {
    for text in addresses {
        let Ok(address) = text.parse::<Address>() else { return false };
        match tokio::time::timeout(LOOK_TIMEOUT, Socket::connect(&address)).await {
            Ok(Err(error)) if is_nobody(&error) => {}
            _ => return false,
        }
    }
    !addresses.is_empty()
}

struct Task {
    shared: Weak<Shared>,
    server: ServerId,
    strict: bool,
    target: Rc<RefCell<Vec<String>>>,
    changed: Rc<Notify>,
}

impl Task {
    async fn run(self) {
        let mut failures = 0;
        while let Some(shared) = self.shared.upgrade() {
            let (min, max) = (shared.bounds.retry_min, shared.bounds.retry_max);
            let lived = self.try_each(shared, &mut failures).await;
            let delay = match lived {
                Some(life) if life >= GOOD_LIFE => Duration::ZERO,
                _ => (min * 2u32.saturating_pow(failures.saturating_sub(1).min(16))).min(max),
            };
            // Other addresses may be better than waiting.
            let _ = tokio::time::timeout(delay, self.changed.notified()).await;
        }
    }

    /// Tries one address after the other. Returns how long the connection lived, if there was one.
    async fn try_each(&self, shared: Rc<Shared>, failures: &mut u32) -> Option<Duration> {
        *failures = failures.saturating_add(1);
        let addresses = self.target.borrow().clone();
        let mut nobody = !addresses.is_empty();
        for text in &addresses {
            match self.try_one(&shared, text).await {
                Ok(greeted) => {
                    let began = tokio::time::Instant::now();
                    let (_, reading) = shared.admit(greeted);
                    // Not in this task: the connection outlives a dial that is dropped.
                    let reading = tokio::task::spawn_local(reading);
                    drop(shared);
                    let _ = reading.await;
                    let life = began.elapsed();
                    if life >= GOOD_LIFE {
                        *failures = 0;
                    }
                    return Some(life);
                }
                Err(error) => {
                    nobody &= matches!(error, DialError::NobodyThere);
                    let event =
                        Event::DialFailed { server: self.server, address: text.clone(), error, failures: *failures };
                    shared.push(event, 0);
                }
            }
        }
        if nobody {
            shared.push(Event::NobodyThere { server: self.server }, 0);
        }
        None
    }

    async fn try_one(&self, shared: &Rc<Shared>, text: &str) -> Result<super::connection::Greeted, DialError> {
        let address: Address = text.parse()?;
        let timeout = shared.bounds.hello_timeout;
        let socket =
            tokio::time::timeout(timeout, Socket::connect(&address)).await.map_err(|_| DialError::Timeout)??;
        Ok(shared.greet_as_dialler(socket, text.to_string(), self.server, self.strict).await?)
    }
}
