//! The client library: a cluster's disks for async programs (docs/client-library.md).
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use petal_io::client::{Attachment, Client, Config};
//!
//! let client = Client::connect(Config::new(["unix:petal-data/s1.sock", "host2:7001"])).await?;
//! let disk = client.disk("vol0").attach(Attachment::Exclusive).await?;
//! disk.write(4096, &b"hello"[..]).await?; // Stable on every copy when it returns.
//! let pieces = disk.read(4096, 5).await?;
//! assert_eq!(pieces.concat(), b"hello");
//! disk.detach().await?;
//! # Ok(())
//! # }
//! ```
//!
//! What decides is `petal::client::Client`, a stepped core behind a mutex. Whoever asks for something
//! locks it, hands the request in and wakes the driver; the driver, one task, carries out what the
//! core wants: all requests that were handed in since its last turn leave in one write per server.
//!
//! ```text
//!   caller --lock, handle(request)--> core <--lock, handle(message), poll_output-- driver -- sockets
//!      ^                                |                                            |
//!      +------------- answer, waker ----+<---------------- wakes --------------------+
//! ```
//!
//! Where the driver runs: on a thread of its own with [`Client::connect`], whatever runtime the caller
//! has; on the caller's own thread with [`Client::connect_here`], for programs that run within
//! [`crate::run`]: no thread is crossed, and a request costs a few microseconds. Handles
//! are the same, and may be used from any thread, in both cases.
//!
//! How it fails: servers that are away hold up what needs them; see `petal::client`. Dropping a future
//! drops the answer, not the request. When the last handle is gone, requests that are still open have
//! two seconds to come to their end.

mod driver;
#[cfg(test)]
mod tests;

use crate::clock;
use crate::transport::DialError;
use bytes::Bytes;
pub use petal::client::RequestError;
use petal::client::{ClientConfig, Input, Request, RequestNumber, Response};
pub use petal::global_state::Attachment;
use petal::global_state::{Command, Outcome};
use petal::ids::{ClusterId, ServerId, SessionId, StateIndex, VdiskId};
use petal::message::{AdminRequest, AdminResponse};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::Future;
use std::hash::{BuildHasher, Hasher};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use stdx::{Duration, Machine};
use tokio::sync::Notify;

/// How long [`Client::connect`] tries, unless the configuration says otherwise.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// What is told to people while something waits.
pub type OnWarning = Arc<dyn Fn(&str) + Send + Sync>;

/// How to reach a cluster.
#[derive(Clone)]
pub struct Config {
    /// Servers to begin with; the others are found through them. Where only addresses are known the
    /// ids may be guesses: a server says which one it is.
    pub servers: Vec<(ServerId, Vec<String>)>,
    /// Which cluster it must be; `None`: whichever answers.
    pub cluster: Option<ClusterId>,
    /// How long a request may take. `None`: for ever, with warnings, like a hard mount.
    pub deadline: Option<Duration>,
    /// How long to try until the first server answers. `None`: for ever.
    pub connect_deadline: Option<Duration>,
    /// Who is told that something waits; by default the log.
    pub on_warning: Option<OnWarning>,
}

impl Config {
    /// Servers at these addresses (`unix:PATH` or `HOST:PORT`), whoever they are.
    pub fn new<A: Into<String>>(addresses: impl IntoIterator<Item = A>) -> Config {
        let guess = |(n, address): (usize, A)| (ServerId(n as u16 + 1), vec![address.into()]);
        Config {
            servers: addresses.into_iter().enumerate().map(guess).collect(),
            cluster: None,
            deadline: None,
            connect_deadline: Some(CONNECT_DEADLINE),
            on_warning: None,
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config").field("servers", &self.servers).field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No servers were named.
    #[error("no server is named; give the address of at least one, like unix:/path/of/socket or host:port")]
    NoServers,
    /// No server could be reached in time, or none will have us.
    #[error("no server of the cluster can be reached: {}", reasons(.0))]
    Unreachable(Vec<(String, DialError)>),
    /// There is no thread for the driver.
    #[error("cannot start the client's thread: {0}")]
    Thread(std::io::Error),
}

fn reasons(failures: &[(String, DialError)]) -> String {
    let words: Vec<String> = failures.iter().map(|(address, error)| format!("{address}: {error}")).collect();
    if words.is_empty() { "no answer yet".into() } else { words.join("; ") }
}

/// What a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    /// State index of the command.
    pub index: StateIndex,
    /// What it did.
    pub outcome: Outcome,
    /// Empty: settled. Else: accepted, and waits for these servers.
    pub unsettled: Vec<ServerId>,
}

/// A stretch of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub length: u64,
    /// False: nothing is stored, it reads as zeros.
    pub allocated: bool,
}

/// A client of a cluster. Clones are handles to the same; `Send` and `Sync`.
#[derive(Clone)]
pub struct Client {
    handle: Arc<Handle>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({:?})", self.connected())
    }
}

/// Ends the driver when the last client is gone.
struct Handle {
    shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let driver = {
            let mut inner = self.shared.lock();
            inner.closed = true;
            inner.wake_driver()
        };
        driver.into_iter().for_each(Waker::wake);
    }
}

/// What callers and the driver share.
struct Shared {
    inner: Mutex<Inner>,
    /// A server was connected, or a dial failed.
    changed: Notify,
    on_warning: Option<OnWarning>,
}

struct Inner {
    core: petal::client::Client,
    last_number: RequestNumber,
    answers: BTreeMap<RequestNumber, Answer>,
    /// Sessions that a `Disk` holds.
    held: BTreeSet<SessionId>,
    /// Something was handed in since the driver's last turn.
    work: bool,
    driver: Option<Waker>,
    /// No handle is left.
    closed: bool,
    /// The driver has ended; nothing will be answered any more.
    stopped: bool,
    /// Ids of the configuration, which may be wrong.
    guesses: BTreeSet<ServerId>,
    /// When somebody who waits for the first connection gives up.
    connect_until: Option<stdx::Instant>,
    /// The last failed dial of each server, until one succeeds.
    failures: BTreeMap<ServerId, (String, DialError)>,
}

enum Answer {
    Waits(Option<Waker>),
    Ready(Result<Response, RequestError>),
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic within the core leaves it unusable in part, but answers must not panic as well.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn wake_driver(&mut self) -> Option<Waker> {
        self.work = true;
        self.driver.take()
    }

    /// Hands a request in; the answer is kept only if somebody waits for it.
    fn hand_in(&mut self, request: Request, keep: bool) -> (RequestNumber, Option<Waker>) {
        self.last_number += 1;
        let number = self.last_number;
        if keep {
            self.answers.insert(number, Answer::Waits(None));
        }
        self.core.handle(clock::now(), Input::Request { number, request });
        (number, self.wake_driver())
    }

    /// An answer from the core. Returns whom to wake.
    fn answer(&mut self, number: RequestNumber, result: Result<Response, RequestError>) -> Option<Waker> {
        match self.answers.get_mut(&number) {
            Some(answer) => match std::mem::replace(answer, Answer::Ready(result)) {
                Answer::Waits(waker) => waker,
                Answer::Ready(_) => None,
            },
            None => self.give_back(result),
        }
    }

    /// Nobody wants the answer: what it gave is given back. Returns whom to wake.
    fn give_back(&mut self, result: Result<Response, RequestError>) -> Option<Waker> {
        match result {
            // A refresh answers likewise, of a session that somebody has.
            Ok(Response::Attached { session, .. }) if !self.held.contains(&session) => {
                self.hand_in(Request::Detach { session }, false).1
            }
            _ => None,
        }
    }
}

/// An answer to come. Dropping it drops the answer, not the request.
struct Asked {
    shared: Arc<Shared>,
    number: RequestNumber,
}

impl Future for Asked {
    type Output = Result<Response, RequestError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut inner = self.shared.lock();
        let stopped = inner.stopped;
        match inner.answers.get_mut(&self.number) {
            Some(Answer::Waits(_)) | None if stopped => Poll::Ready(Err(RequestError::Stopped)),
            Some(Answer::Waits(Some(waker))) => {
                waker.clone_from(cx.waker());
                Poll::Pending
            }
            Some(Answer::Waits(none)) => {
                *none = Some(cx.waker().clone());
                Poll::Pending
            }
            _ => match inner.answers.remove(&self.number) {
                Some(Answer::Ready(result)) => Poll::Ready(result),
                _ => panic!("a future is not polled after it was ready"),
            },
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let mut inner = self.shared.lock();
        if let Some(Answer::Ready(result)) = inner.answers.remove(&self.number) {
            let driver = inner.give_back(result);
            drop(inner);
            driver.into_iter().for_each(Waker::wake);
        }
    }
}

impl Client {
    /// Connects, with a thread for the driver: for programs with any runtime.
    pub async fn connect(config: Config) -> Result<Client, ConnectError> {
        let (client, shared) = Client::new(&config)?;
        let cluster = config.cluster;
        std::thread::Builder::new()
            .name("petal-client".into())
            .spawn(move || {
                if let Err(error) = crate::run(driver::run(shared.clone(), cluster)) {
                    tracing::error!(%error, "the client's thread has no runtime");
                    driver::stop(&shared);
                }
            })
            .map_err(ConnectError::Thread)?;
        client.until_connected(config).await
    }

    /// Connects, with the driver on this thread: for programs that run within [`crate::run`] (or
    /// another runtime of one thread that can `spawn_local`). The cheapest way.
    ///
    /// Panics elsewhere.
    pub async fn connect_here(config: Config) -> Result<Client, ConnectError> {
        let (client, shared) = Client::new(&config)?;
        tokio::task::spawn_local(driver::run(shared, config.cluster));
        client.until_connected(config).await
    }

    fn new(config: &Config) -> Result<(Client, Arc<Shared>), ConnectError> {
        if config.servers.iter().all(|(_, addresses)| addresses.is_empty()) {
            return Err(ConnectError::NoServers);
        }
        let core = ClientConfig { servers: config.servers.clone(), proposer: random(), deadline: config.deadline };
        let inner = Inner {
            core: petal::client::Client::new(clock::now(), core),
            last_number: 0,
            answers: BTreeMap::new(),
            held: BTreeSet::new(),
            work: true,
            driver: None,
            closed: false,
            stopped: false,
            guesses: config.servers.iter().map(|(server, _)| *server).collect(),
            connect_until: config.connect_deadline.map(|d| clock::now() + d),
            failures: BTreeMap::new(),
        };
        let shared = Arc::new(Shared {
            inner: Mutex::new(inner),
            changed: Notify::new(),
            on_warning: config.on_warning.clone(),
        });
        Ok((Client { handle: Arc::new(Handle { shared: shared.clone() }) }, shared))
    }

    /// Waits for the first server. Ends early if every server has said that it never will.
    async fn until_connected(self, config: Config) -> Result<Client, ConnectError> {
        let shared = self.handle.shared.clone();
        loop {
            let changed = shared.changed.notified();
            {
                let mut inner = shared.lock();
                if inner.core.connected().next().is_some() {
                    inner.connect_until = None;
                    return Ok(self);
                }
                let mut dialled = config.servers.iter().filter(|(_, addresses)| !addresses.is_empty());
                let hopeless = dialled.all(|(s, _)| inner.failures.get(s).is_some_and(|(_, error)| is_final(error)));
                if hopeless || inner.stopped || inner.connect_until.is_some_and(|until| until <= clock::now()) {
                    let failures = std::mem::take(&mut inner.failures);
                    return Err(ConnectError::Unreachable(failures.into_values().collect()));
                }
            }
            changed.await;
        }
    }

    fn ask(&self, request: Request) -> Asked {
        let shared = &self.handle.shared;
        let (number, driver) = shared.lock().hand_in(request, true);
        driver.into_iter().for_each(Waker::wake);
        Asked { shared: shared.clone(), number }
    }

    /// The servers to which a connection is up.
    pub fn connected(&self) -> Vec<ServerId> {
        self.handle.shared.lock().core.connected().collect()
    }

    /// A management call, to any server.
    pub async fn admin(&self, request: AdminRequest) -> Result<AdminResponse, RequestError> {
        admin_response(self.ask(Request::Admin(request)).await)
    }

    /// A management call to one server (`None`: any), with a deadline of its own (`None`: for ever).
    pub async fn call(
        &self,
        to: Option<ServerId>,
        request: AdminRequest,
        deadline: Option<Duration>,
    ) -> Result<AdminResponse, RequestError> {
        admin_response(self.ask(Request::Call { to, request, deadline }).await)
    }

    /// A command: decided once, however often it has to be sent, and settled, or `unsettled` says who
    /// has not heard of it when the deadline ends.
    pub async fn execute(&self, command: Command, deadline: Duration) -> Result<Executed, RequestError> {
        match admin_response(self.ask(Request::Execute { command, deadline }).await)? {
            AdminResponse::Executed { index, outcome, unsettled } => Ok(Executed { index, outcome, unsettled }),
            other => unreachable!("a command is answered with what it did, not {other:?}"),
        }
    }

    /// A disk, by name.
    pub fn disk(&self, name: impl Into<String>) -> AttachDisk {
        AttachDisk { client: self.clone(), name: name.into(), holder: default_holder(), take_over: false }
    }
}

fn admin_response(result: Result<Response, RequestError>) -> Result<AdminResponse, RequestError> {
    match result? {
        Response::Admin(response) => Ok(response),
        other => unreachable!("a call is answered with an answer to it, not {other:?}"),
    }
}

/// True if trying again unchanged cannot help.
fn is_final(error: &DialError) -> bool {
    match error {
        DialError::Address(_) => true,
        DialError::Rejected(reject) | DialError::Refused(reject) => !reject.code.may_pass(),
        _ => false,
    }
}

/// A number that nobody else draws: it names this client's commands.
fn random() -> u64 {
    let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
    hasher.write_u64(clock::now().as_nanos());
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// `program@host:pid`.
fn default_holder() -> String {
    let program = std::env::current_exe().ok();
    let program = program.as_deref().and_then(|p| p.file_name()).map(|n| n.to_string_lossy().into_owned());
    let host = rustix::system::uname();
    let host = host.nodename().to_string_lossy();
    format!("{}@{host}:{}", program.as_deref().unwrap_or("client"), std::process::id())
}

/// A disk that is to be attached.
#[derive(Debug)]
#[must_use = "nothing happens before attach()"]
pub struct AttachDisk {
    client: Client,
    name: String,
    holder: String,
    take_over: bool,
}

impl AttachDisk {
    /// Who attaches, in words for people (default: program, host and process).
    pub fn holder(mut self, holder: impl Into<String>) -> Self {
        self.holder = holder.into();
        self
    }

    /// Ends sessions that are in the way. Their holders can change nothing any more from the moment
    /// that `attach` returns.
    pub fn take_over(mut self, take_over: bool) -> Self {
        self.take_over = take_over;
        self
    }

    /// Attaches the disk.
    pub async fn attach(self, mode: Attachment) -> Result<Disk, RequestError> {
        let AttachDisk { client, name, holder, take_over } = self;
        let request = Request::Attach { name: name.clone(), mode, holder, take_over };
        match client.ask(request).await? {
            Response::Attached { session, vdisk, .. } => {
                client.handle.shared.lock().held.insert(session);
                let detached = AtomicBool::new(false);
                Ok(Disk { attached: Arc::new(Attached { client, session, vdisk, name, mode, detached }) })
            }
            other => unreachable!("an attach is answered with a session, not {other:?}"),
        }
    }
}

/// An attached disk. Clones are handles to the same attachment; requests of all of them may run at the
/// same time. It is detached when the last handle is gone, or, for certain, by [`Disk::detach`].
///
/// Offsets and lengths are bytes, and need no alignment; whole blocks of 4 KiB are cheapest. What a
/// write, zero or discard acknowledges is stable on every copy. Requests on the same bytes that run at
/// the same time happen in any order.
#[derive(Clone)]
pub struct Disk {
    attached: Arc<Attached>,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Disk({}, {}, {:?})", self.attached.name, self.attached.session, self.attached.mode)
    }
}

struct Attached {
    client: Client,
    session: SessionId,
    vdisk: VdiskId,
    name: String,
    mode: Attachment,
    detached: AtomicBool,
}

impl Drop for Attached {
    fn drop(&mut self) {
        let mut inner = self.client.handle.shared.lock();
        inner.held.remove(&self.session);
        if !*self.detached.get_mut() {
            let (_, driver) = inner.hand_in(Request::Detach { session: self.session }, false);
            drop(inner);
            driver.into_iter().for_each(Waker::wake);
        }
    }
}

impl Disk {
    fn ask(&self, request: Request) -> Asked {
        self.attached.client.ask(request)
    }

    /// Its name when it was attached.
    pub fn name(&self) -> &str {
        &self.attached.name
    }
    /// Its id, which never changes.
    pub fn id(&self) -> VdiskId {
        self.attached.vdisk
    }
    /// The attachment.
    pub fn session(&self) -> SessionId {
        self.attached.session
    }
    /// How it is attached.
    pub fn mode(&self) -> Attachment {
        self.attached.mode
    }
    /// Its client.
    pub fn client(&self) -> &Client {
        &self.attached.client
    }
    /// Its size in bytes, as last heard: requests hear of a new size soon after it was set. Zero when
    /// it is detached.
    pub fn size(&self) -> u64 {
        self.attached.client.handle.shared.lock().core.size(self.attached.session).unwrap_or(0)
    }
    /// Asks for its present size.
    pub async fn refresh(&self) -> Result<u64, RequestError> {
        match self.ask(Request::Refresh { session: self.attached.session }).await? {
            Response::Attached { size, .. } => Ok(size),
            other => unreachable!("a refresh is answered with the disk, not {other:?}"),
        }
    }

    /// Reads up to 64 MiB: pieces one behind the other, `length` bytes in sum, each block checked
    /// against its checksum. A piece may share memory with other reads: copy what is kept for long.
    pub async fn read(&self, offset: u64, length: u64) -> Result<Vec<Bytes>, RequestError> {
        match self.ask(Request::Read { session: self.attached.session, offset, length }).await? {
            Response::Data(pieces) => Ok(pieces),
            other => unreachable!("a read is answered with data, not {other:?}"),
        }
    }

    /// Writes up to 64 MiB.
    pub async fn write(&self, offset: u64, data: impl Into<Bytes>) -> Result<(), RequestError> {
        self.done(Request::Write { session: self.attached.session, offset, data: data.into() }).await
    }

    /// Makes bytes zero, exactly these. Large ranges cost by what is stored in them.
    pub async fn zero(&self, offset: u64, length: u64) -> Result<(), RequestError> {
        self.done(Request::Zero { session: self.attached.session, offset, length, discard: false }).await
    }

    /// Gives whole blocks within the range back; they read as zeros. Partly covered blocks stay as
    /// they are.
    pub async fn discard(&self, offset: u64, length: u64) -> Result<(), RequestError> {
        self.done(Request::Zero { session: self.attached.session, offset, length, discard: true }).await
    }

    /// Which parts of a range are stored, from `offset` on, alternating. The answer may end before the
    /// range does (after some thousands of extents); ask again from there.
    pub async fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, RequestError> {
        self.ask_extents(offset, length, None).await
    }

    /// Which ranges differ from another disk or snapshot of the same family (`allocated`: it does), from the maps alone: a
    /// block that was written again with the same bytes differs, too. As `extents` otherwise.
    pub async fn changes(&self, than: VdiskId, offset: u64, length: u64) -> Result<Vec<Extent>, RequestError> {
        self.ask_extents(offset, length, Some(than)).await
    }

    async fn ask_extents(&self, offset: u64, length: u64, than: Option<VdiskId>) -> Result<Vec<Extent>, RequestError> {
        match self.ask(Request::Extents { session: self.attached.session, offset, length, than }).await? {
            Response::Extents(runs) => {
                Ok(runs.into_iter().map(|(length, allocated)| Extent { length, allocated }).collect())
            }
            other => unreachable!("a question for extents is answered with extents, not {other:?}"),
        }
    }

    /// Nothing: what is acknowledged is stable.
    pub async fn flush(&self) -> Result<(), RequestError> {
        Ok(())
    }

    /// Ends the attachment after the requests that run; for all handles.
    pub async fn detach(&self) -> Result<(), RequestError> {
        let result = self.done(Request::Detach { session: self.attached.session }).await;
        if result.is_ok() {
            self.attached.detached.store(true, Ordering::Relaxed);
        }
        result
    }

    async fn done(&self, request: Request) -> Result<(), RequestError> {
        match self.ask(request).await? {
            Response::Done => Ok(()),
            other => unreachable!("a change is answered when it is done, not with {other:?}"),
        }
    }
}
