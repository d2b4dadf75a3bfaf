//! How commands reach a cluster: the client library on this thread, with deadlines for management calls.
//!
//! Reads and writes have none: a disk waits for its servers like a hard mount.

use crate::cluster_folder::ClusterFolder;
use crate::holder;
use crate::place::Place;
use crate::supervisor;
use anyhow::{Context, Result, bail};
use petal::client::RequestError;
use petal::global_state::{Attachment, Command, CommandError, Outcome, Session, State};
use petal::ids::{ElementKey, ServerId, VdiskId};
use petal::limits::SETTLE_DEADLINE;
use petal::message::{
    AdminError, AdminRequest, AdminResponse, LogLine, ScrubOrder, ScrubStatus, ServerStatus, VerifyPart,
};
use petal::space::{SpacePart, SpaceQuestion};
use petal::translator::vdir::Vdisk;
pub use petal_io::client::Disk;
use petal_io::client::{Client, Config, ConnectError, Executed};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// How long to try to reach a first server.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// How long a question may take.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// How long attaching may take: decision and settlement.
const ATTACH_DEADLINE: Duration = Duration::from_secs(20);
/// How long one server may check a part of its elements.
const VERIFY_DEADLINE: Duration = Duration::from_secs(60);

/// How long one server may look at a page of elements.
const SPACE_DEADLINE: Duration = Duration::from_secs(20);
/// How often a command is made anew because somebody else's came first.
const OVERTAKEN_MAX: u32 = 50;
/// The pause in between: the server that was asked may lag behind the one that decides.
const OVERTAKEN_PAUSE: Duration = Duration::from_millis(20);

/// A command is decided, and these servers have not settled it in time. It completes by itself.
#[derive(Debug, thiserror::Error)]
#[error("accepted, not settled: waits for {}; it completes by itself when they are back", names(.0))]
pub struct NotSettled(Vec<ServerId>);

fn names(servers: &[ServerId]) -> String {
    servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Runs a command's async part on this thread.
pub fn block_on<T: 'static>(future: impl Future<Output = Result<T>> + 'static) -> Result<T> {
    petal_io::run(future).context("cannot start the runtime")?
}

/// Resolves when the process is told to end (SIGTERM, Ctrl-C). A closed terminal is not that.
pub async fn stop_signal() -> Result<()> {
    let _ignored = signal(SignalKind::hangup()).context("cannot listen for signals")?;
    petal_io::server::terminated().await;
    Ok(())
}

/// Told to end: Ctrl-C, SIGTERM, a closed terminal. From when it was made on no signal ends the process by itself.
struct Told([Signal; 3]);

impl Told {
    fn listen() -> Result<Told> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Told([listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?]))
    }

    /// Does the work, or leaves it when the process is told to end.
    async fn unless<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            done = work => done,
            _ = interrupt.recv() => bail!("interrupted"),
            _ = terminate.recv() => bail!("told to end (SIGTERM)"),
            _ = hangup.recv() => bail!("the terminal was closed"),
        }
    }
}

/// A connected client.
#[derive(Clone)]
pub struct Connection {
    pub client: Client,
    place: String,
}

impl Connection {
    /// Connects. Within [`block_on`] only.
    pub async fn open(place: &Place) -> Result<Connection> {
        let (mut config, place) = match place {
            Place::Folder(_) => {
                let folder = place.folder()?;
                (config_of(&folder)?, format!("the cluster in {}", folder.path().display()))
            }
            Place::Addresses(addresses) => {
                (Config::new(addresses.iter().cloned()), format!("the cluster at {}", addresses.join(",")))
            }
        };
        config.connect_deadline = Some(CONNECT_DEADLINE);
        match Client::connect_here(config).await {
            Ok(client) => Ok(Connection { client, place }),
            Err(ConnectError::Unreachable(why)) if why.is_empty() => {
                bail!("{place} does not answer; see whether its servers run")
            }
            Err(error) => Err(error).with_context(|| format!("cannot reach {place}")),
        }
    }

    /// The same with the addresses of every server that `state` knows: to ask each one by itself.
    pub async fn to_all(&self, state: &State) -> Result<Connection> {
        let mut config = Config::new(Vec::<String>::new());
        config.servers = state.servers.iter().map(|(id, server)| (*id, server.addresses.clone())).collect();
        config.cluster = Some(state.cluster);
        config.connect_deadline = Some(CONNECT_DEADLINE);
        let client = Client::connect_here(config).await.with_context(|| format!("cannot reach {}", self.place))?;
        Ok(Connection { client, place: self.place.clone() })
    }

    async fn call(&self, to: Option<ServerId>, request: AdminRequest, limit: Duration) -> Result<AdminResponse> {
        let answer = self.client.call(to, request, Some(limit)).await;
        answer.with_context(|| match to {
            Some(server) => format!("{server} of {}", self.place),
            None => self.place.clone(),
        })
    }

    /// Servers that have been up once and do not answer now. To be asked of a connection to all.
    pub async fn away(&self, state: &State, limit: Duration) -> BTreeSet<ServerId> {
        let mut asked = tokio::task::JoinSet::new();
        for (id, _) in state.servers.iter().filter(|(_, s)| s.incarnation.0 > 0) {
            let (id, connection) = (*id, self.clone());
            asked.spawn_local(async move { (id, connection.server_status(id, limit).await.is_ok()) });
        }
        let mut away = BTreeSet::new();
        while let Some(answer) = asked.join_next().await {
            away.extend(answer.ok().filter(|(_, is_there)| !is_there).map(|(id, _)| id));
        }
        away
    }

    /// The global state, as some server knows it.
    pub async fn state(&self) -> Result<State> {
        match self.call(None, AdminRequest::State, CALL_DEADLINE).await? {
            AdminResponse::State(bytes) => {
                State::decode(&bytes).context("the state that the server sent is not of this version of petal")
            }
            other => bail!("{} answered {other:?} to a question for its state", self.place),
        }
    }

    /// One disk or snapshot, by name, without the rest of the state.
    pub async fn disk(&self, name: &str) -> Result<Option<Vdisk>, RequestError> {
        match self.client.call(None, AdminRequest::Hints { name: name.into() }, Some(CALL_DEADLINE)).await {
            Ok(AdminResponse::Hints(hints)) => Ok(Some(hints.vdisk)),
            Ok(_) | Err(RequestError::Admin(AdminError::NoSuchDisk(_))) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The global state of a server that has heard of this disk, which was made a moment ago.
    pub async fn state_with(&self, disk: VdiskId) -> Result<State> {
        let mut tries = 0;
        loop {
            let state = self.state().await?;
            if state.vdisk(disk).is_some() || tries == OVERTAKEN_MAX {
                return Ok(state);
            }
            tries += 1;
            tokio::time::sleep(OVERTAKEN_PAUSE).await;
        }
    }

    /// What one server tells of itself.
    pub async fn server_status(&self, server: ServerId, limit: Duration) -> Result<ServerStatus> {
        match self.call(Some(server), AdminRequest::ServerStatus, limit).await? {
            AdminResponse::ServerStatus(status) => Ok(*status),
            other => bail!("{server} answered {other:?} to a question for its status"),
        }
    }

    /// Tells a server's scrub something, and how it gets on.
    pub async fn scrub(&self, server: ServerId, order: ScrubOrder, limit: Duration) -> Result<ScrubStatus> {
        match self.call(Some(server), AdminRequest::Scrub(order), limit).await? {
            AdminResponse::Scrub(status) => Ok(*status),
            other => bail!("{server} answered {other:?} to a question about its scrub"),
        }
    }

    /// The last commands that a server has applied.
    pub async fn log(&self, server: Option<ServerId>) -> Result<Vec<LogLine>> {
        self.log_within(server, CALL_DEADLINE).await
    }

    /// The same, if it answers in time.
    pub async fn log_within(&self, server: Option<ServerId>, limit: Duration) -> Result<Vec<LogLine>> {
        match self.call(server, AdminRequest::Log, limit).await? {
            AdminResponse::Log(lines) => Ok(lines),
            other => bail!("{} answered {other:?} to a question for its log", self.place),
        }
    }

    /// Has one server check elements after `after`.
    pub async fn verify(&self, server: ServerId, after: Option<ElementKey>) -> Result<VerifyPart> {
        match self.call(Some(server), AdminRequest::Verify { after }, VERIFY_DEADLINE).await? {
            AdminResponse::Verified(part) => Ok(part),
            other => bail!("{server} answered {other:?} to a verification"),
        }
    }

    /// Executes a command. One that is not settled everywhere in time is a note, not an error: it is
    /// decided, and completes by itself.
    pub async fn execute(&self, command: Command) -> Result<Outcome> {
        Ok(self.executed(command).await?.outcome)
    }

    /// The same, with its state index.
    pub async fn executed(&self, command: Command) -> Result<Executed> {
        let executed = self.client.execute(command, SETTLE_DEADLINE).await?;
        if !executed.unsettled.is_empty() {
            eprintln!("{}", NotSettled(executed.unsettled.clone()));
        }
        Ok(executed)
    }

    /// The same for a command on whose effect the caller relies at once (a fence): not settled in time is an error.
    pub async fn execute_settled(&self, command: Command) -> Result<Outcome> {
        let executed = self.client.execute(command, SETTLE_DEADLINE).await?;
        if executed.unsettled.is_empty() { Ok(executed.outcome) } else { Err(NotSettled(executed.unsettled).into()) }
    }

    /// Executes a command that relies on the present state: made anew if that has changed meanwhile. If the caller relies
    /// on its effect at once, not settled in time is an error.
    pub async fn execute_on_present(
        &self,
        make: impl Fn(&State) -> Result<Command>,
        is_relied_on: bool,
    ) -> Result<Outcome> {
        let mut tries = 0;
        loop {
            let command = make(&self.state().await?)?;
            let executed = if is_relied_on { self.execute_settled(command).await } else { self.execute(command).await };
            match executed {
                Err(error) if tries < OVERTAKEN_MAX && refusal(&error) == Some(&CommandError::Overtaken) => {
                    tries += 1;
                    tokio::time::sleep(OVERTAKEN_PAUSE).await;
                }
                other => return other,
            }
        }
    }

    /// A page of whose space a family's elements are, of one server.
    pub async fn space(&self, server: ServerId, question: SpaceQuestion) -> Result<SpacePart> {
        match self.call(Some(server), AdminRequest::Space(question), SPACE_DEADLINE).await? {
            AdminResponse::Space(part) => Ok(*part),
            other => bail!("{server} answered {other:?} to a question about space"),
        }
    }

    /// Attaches a disk.
    pub async fn attach(
        &self,
        name: &str,
        mode: Attachment,
        holder: &str,
        take_over: bool,
    ) -> Result<Disk, RequestError> {
        let attach = self.client.disk(name).holder(holder).take_over(take_over).attach(mode);
        tokio::time::timeout(ATTACH_DEADLINE, attach).await.unwrap_or_else(|_| {
            Err(RequestError::Deadline {
                waiting_for: self.place.clone(),
                advice: "a majority of the ring must be up to attach a disk; see `petal status`".into(),
            })
        })
    }

    /// Ends the sessions of programs of this machine that only read and were killed: nobody else would, and what they
    /// are of cannot be deleted.
    pub async fn end_dead_readers(&self) -> Result<()> {
        let state = self.state().await?;
        let is_dead = |s: &Session| s.mode == Attachment::ReadOnly && holder::is_gone(&s.holder);
        for (session, _) in state.sessions.iter().filter(|(_, s)| is_dead(s)) {
            match self.execute(Command::Detach { session: *session }).await {
                Err(error) if matches!(refusal(&error), Some(CommandError::NoSuchSession(_))) => {}
                ended => drop(ended?),
            }
        }
        Ok(())
    }

    /// Does some work with a disk attached, and ends the session whatever comes of it: also when the process is told to
    /// end meanwhile.
    pub async fn attached<T>(
        &self,
        name: &str,
        mode: Attachment,
        what: &str,
        take_over: bool,
        work: impl AsyncFnOnce(&Disk) -> Result<T>,
    ) -> Result<T> {
        let mut told = Told::listen()?;
        self.end_dead_readers().await?;
        let holder = if mode == Attachment::ReadOnly { holder::of_reader(what) } else { holder::of_process(what) };
        let disk = self.attach(name, mode, &holder, take_over).await?;
        let done = told.unless(work(&disk)).await;
        let detached = told.unless(async { Ok(disk.detach().await?) }).await;
        let done = done?; // It says more.
        detached?;
        Ok(done)
    }
}

/// Why a command was refused, if that is what the error is.
pub fn refusal(error: &anyhow::Error) -> Option<&CommandError> {
    match error.downcast_ref::<RequestError>()? {
        RequestError::Admin(AdminError::Refused(refused)) => Some(refused),
        _ => None,
    }
}

/// How to reach the cluster of a folder. That none of its servers runs is known without asking.
fn config_of(folder: &ClusterFolder) -> Result<Config> {
    let file = folder.read()?;
    if file.servers.iter().all(|s| supervisor::process(folder, s.server()).is_none()) {
        bail!("no server of the cluster in {} runs; `petal up` starts them", folder.path().display());
    }
    let mut config = Config::new(Vec::<String>::new());
    for entry in &file.servers {
        config.servers.push((entry.server(), folder.addresses(entry)?));
    }
    config.cluster = Some(file.id()?);
    Ok(config)
}
