//! The client of the data path, stepped: hints, splitting, routing, retries. (API skeleton.)

use crate::global_state::Attachment;
use crate::ids::*;
use crate::message::{AdminError, AdminRequest, AdminResponse, Message};
use bytes::Bytes;
use stdx::{Instant, Machine};

/// Number of a request, given by the caller.
pub type RequestNumber = u64;

/// What can be asked of a disk or the cluster.
#[derive(Clone, Debug)]
pub enum Request {
    /// A management call, to any server.
    Admin(AdminRequest),
    /// Attach a disk by name; answered with `Response::Attached`.
    Attach {
        /// Name of the disk.
        name: String,
        /// How.
        mode: Attachment,
        /// Who, in words for people.
        holder: String,
        /// End the sessions that are in the way.
        take_over: bool,
    },
    /// End a session, after its requests in flight.
    Detach {
        /// The session.
        session: SessionId,
    },
    /// Read bytes.
    Read {
        /// The session.
        session: SessionId,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Write bytes.
    Write {
        /// The session.
        session: SessionId,
        /// Byte offset.
        offset: u64,
        /// The bytes.
        data: Bytes,
    },
    /// Make bytes zero. A large range costs by what exists, not by its length.
    Zero {
        /// The session.
        session: SessionId,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Discard: bytes of partly covered blocks may be kept.
        discard: bool,
    },
    /// Which ranges hold data.
    Extents {
        /// The session.
        session: SessionId,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        length: u64,
    },
}

/// Answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// `Admin`.
    Admin(AdminResponse),
    /// `Attach`.
    Attached {
        /// The session.
        session: SessionId,
        /// The disk.
        vdisk: VdiskId,
        /// Bytes.
        size: u64,
    },
    /// `Detach`, `Write`, `Zero`.
    Done,
    /// `Read`: pieces one behind the other; checked against their checksums.
    Data(Vec<Bytes>),
    /// `Extents`: `(length, allocated)`, covering the range.
    Extents(Vec<(u64, bool)>),
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Refused by the cluster's management.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// Refused by a server for good.
    #[error(transparent)]
    Refused(#[from] crate::message::Refusal),
    /// The session is not (any more) one of this client's.
    #[error("the disk is not attached")]
    NotAttached,
    /// The deadline passed.
    #[error("no answer in time from {waiting_for}; {advice}")]
    Deadline {
        /// Whom the request waits for.
        waiting_for: String,
        /// What to do next.
        advice: String,
    },
}

/// What the world tells a client.
#[derive(Clone, Debug)]
pub enum Input {
    /// A caller wants something.
    Request {
        /// Its number.
        number: RequestNumber,
        /// What.
        request: Request,
    },
    /// A connection to a server is up.
    Connected {
        /// The server.
        server: ServerId,
        /// Its life.
        incarnation: Incarnation,
    },
    /// It is gone.
    Disconnected {
        /// The server.
        server: ServerId,
    },
    /// A message from a server.
    Message {
        /// Which.
        from: ServerId,
        /// What.
        message: Message,
    },
    /// Time has passed.
    Tick,
}

/// What a client wants of the world.
#[derive(Clone, Debug)]
pub enum Output {
    /// Send to a server.
    Send {
        /// Which.
        to: ServerId,
        /// What.
        message: Message,
    },
    /// Keep a connection to a server at one of these addresses.
    Dial {
        /// Which.
        server: ServerId,
        /// The best first.
        addresses: Vec<String>,
    },
    /// A request is answered.
    Reply {
        /// Which.
        number: RequestNumber,
        /// The answer.
        result: Result<Response, RequestError>,
    },
    /// Something that a person should know while a request waits ("waits for s3 since 10 s").
    Warning(String),
}

/// What a client is started with.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Servers to begin with. The ids may be guesses where only addresses are known (`petal up` and
    /// the config file know both).
    pub servers: Vec<(ServerId, Vec<String>)>,
    /// Proposer id for management commands: drawn at random by the shell.
    pub proposer: u64,
    /// `None`: block clients wait for ever, with warnings (like a hard mount).
    pub deadline: Option<stdx::Duration>,
}

/// The client.
pub struct Client;

#[allow(unused_variables, missing_docs, clippy::unimplemented)]
impl Client {
    pub fn new(now: Instant, config: ClientConfig) -> Client {
        unimplemented!()
    }
}

#[allow(unused_variables, clippy::unimplemented)]
impl Machine for Client {
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
