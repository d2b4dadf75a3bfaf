//! The first frame in each direction: who are you, and can we talk?
//!
//! The dialler sends a [`Hello`]; the other side answers with its own, or with a [`Reject`]: a code
//! for programs and a sentence for people, which names the object and the remedy. The layouts never
//! change (like the header's): that is how programs of different versions part politely.

use crate::{VERSION, VERSION_MIN, WireError};
use petal::ids::{ClusterId, Incarnation, ServerId};
use zerocopy::little_endian::{U16, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Length of the body of a hello. A later version may append to it; who is older ignores that.
pub const HELLO_LENGTH: usize = 64;
/// Longest sentence in a reject, in bytes.
pub const SENTENCE_MAX: usize = 1024;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A server of the cluster.
    Server {
        /// Its id.
        id: ServerId,
        /// Its life.
        incarnation: Incarnation,
    },
    /// A client.
    Client,
}

/// The first frame in each direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest protocol version that the sender speaks.
    pub version_min: u16,
    /// Newest.
    pub version_max: u16,
    /// The cluster. `None`: a client that knows an address and nothing else yet.
    pub cluster: Option<ClusterId>,
    /// Who speaks.
    pub role: Role,
    /// Whom the dialler thinks to have called; `None` = whoever is there.
    pub expects: Option<ServerId>,
}

impl Hello {
    /// A hello of this program.
    pub fn new(cluster: Option<ClusterId>, role: Role) -> Hello {
        Hello { version_min: VERSION_MIN, version_max: VERSION, cluster, role, expects: None }
    }
}

/// A hello as it travels. Little-endian; what is reserved is written as zero and ignored.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHello {
    version_min: U16,
    version_max: U16,
    /// 1 = server, 2 = client.
    role: u8,
    reserved_a: [u8; 3],
    /// Zero for clients.
    server: U16,
    /// Zero = whoever is there.
    expects: U16,
    reserved_b: [u8; 4],
    /// Zero = not known.
    cluster: U128,
    /// Zero for clients.
    incarnation: U64,
    reserved_c: [u8; 24],
}

pub(crate) fn write_hello(hello: &Hello) -> [u8; HELLO_LENGTH] {
    let (role, server, incarnation) = match hello.role {
        Role::Server { id, incarnation } => (1, id.0, incarnation.0),
        Role::Client => (2, 0, 0),
    };
    let raw = RawHello {
        version_min: hello.version_min.into(),
        version_max: hello.version_max.into(),
        role,
        reserved_a: [0; 3],
        server: server.into(),
        expects: hello.expects.map_or(0, |s| s.0).into(),
        reserved_b: [0; 4],
        cluster: hello.cluster.map_or(0, |c| c.0).into(),
        incarnation: incarnation.into(),
        reserved_c: [0; 24],
    };
    zerocopy::transmute!(raw)
}

pub(crate) fn read_hello(body: &[u8]) -> Result<Hello, WireError> {
    let (raw, _of_a_later_version) =
        RawHello::ref_from_prefix(body).map_err(|_| WireError::BadHello("it is too short"))?;
    let server = ServerId(raw.server.get());
    let role = match raw.role {
        1 if server == ServerId(0) => return Err(WireError::BadHello("a server without a number")),
        1 => Role::Server { id: server, incarnation: Incarnation(raw.incarnation.get()) },
        2 => Role::Client,
        _ => return Err(WireError::BadHello("neither server nor client")),
    };
    Ok(Hello {
        version_min: raw.version_min.get(),
        version_max: raw.version_max.get(),
        cluster: Some(ClusterId(raw.cluster.get())).filter(|c| c.0 != 0),
        role,
        expects: Some(ServerId(raw.expects.get())).filter(|s| s.0 != 0),
    })
}

/// Why a peer will not talk. The number on the wire never changes its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RejectCode {
    /// The peer is of another cluster.
    WrongCluster,
    /// The other side's newest version is older than the oldest spoken here.
    VersionTooOld,
    /// The other side's oldest version is newer than the newest spoken here.
    VersionTooNew,
    /// A newer life of that server has been seen.
    StaleIncarnation,
    /// Somebody else was expected at this address.
    WrongServer,
    /// No more connections are taken.
    TooManyConnections,
    /// What was received is no frame, or not one that may come now.
    Malformed,
    /// Nothing came in time (the hello, or the rest of a frame).
    TooSlow,
    /// The server stops.
    Stopping,
    /// A code of a later version.
    Other(u16),
}

impl RejectCode {
    const KNOWN: [(u16, RejectCode); 9] = [
        (1, RejectCode::WrongCluster),
        (2, RejectCode::VersionTooOld),
        (3, RejectCode::VersionTooNew),
        (4, RejectCode::StaleIncarnation),
        (5, RejectCode::WrongServer),
        (6, RejectCode::TooManyConnections),
        (7, RejectCode::Malformed),
        (8, RejectCode::TooSlow),
        (9, RejectCode::Stopping),
    ];

    /// The number on the wire.
    pub fn number(self) -> u16 {
        match self {
            RejectCode::Other(n) => n,
            known => Self::KNOWN.iter().find(|(_, c)| *c == known).expect("the table has every code").0,
        }
    }

    /// From the number on the wire.
    pub fn from_number(number: u16) -> RejectCode {
        Self::KNOWN.iter().find(|(n, _)| *n == number).map_or(RejectCode::Other(number), |(_, c)| *c)
    }

    /// True if trying again later, unchanged, may help.
    pub fn may_pass(self) -> bool {
        matches!(self, RejectCode::TooManyConnections | RejectCode::TooSlow | RejectCode::Stopping)
    }
}

/// The sender will not go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{sentence}")]
pub struct Reject {
    /// For programs.
    pub code: RejectCode,
    /// For people: what is wrong, and what to do.
    pub sentence: String,
}

impl Reject {
    /// A reject.
    pub fn new(code: RejectCode, sentence: impl Into<String>) -> Reject {
        Reject { code, sentence: sentence.into() }
    }
}

pub(crate) fn write_reject(reject: &Reject, out: &mut impl Extend<u8>) {
    out.extend(reject.code.number().to_le_bytes());
    out.extend([0, 0]);
    let mut end = reject.sentence.len().min(SENTENCE_MAX);
    while !reject.sentence.is_char_boundary(end) {
        end -= 1;
    }
    out.extend(reject.sentence[..end].bytes());
}

pub(crate) fn read_reject(body: &[u8]) -> Result<Reject, WireError> {
    let Some((code, [_, _, sentence @ ..])) = body.split_first_chunk::<2>() else {
        return Err(WireError::BadHello("a reject that is too short"));
    };
    // It will be printed on somebody's terminal: nothing in it may move a cursor.
    let sentence = String::from_utf8_lossy(&sentence[..sentence.len().min(SENTENCE_MAX)])
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    Ok(Reject { code: RejectCode::from_number(u16::from_le_bytes(*code)), sentence })
}

/// Compares the other side's hello with ours: the version to speak, or what to answer.
pub fn check_hello(ours: &Hello, theirs: &Hello) -> Result<u16, Reject> {
    if theirs.version_max < ours.version_min {
        return Err(Reject::new(
            RejectCode::VersionTooOld,
            format!(
                "{} speaks protocol versions {} to {}, and the other side only up to {}: update the older program",
                name(ours),
                ours.version_min,
                ours.version_max,
                theirs.version_max
            ),
        ));
    }
    if theirs.version_min > ours.version_max {
        return Err(Reject::new(
            RejectCode::VersionTooNew,
            format!(
                "{} speaks protocol versions {} to {}, and the other side only from {} on: update this one first",
                name(ours),
                ours.version_min,
                ours.version_max,
                theirs.version_min
            ),
        ));
    }
    match (ours.cluster, theirs.cluster) {
        (Some(a), Some(b)) if a != b => {
            return Err(Reject::new(
                RejectCode::WrongCluster,
                format!(
                    "{} belongs to cluster {a}, and the other side to cluster {b}: check the address, or --cluster",
                    name(ours)
                ),
            ));
        }
        (_, None) if theirs.role != Role::Client => {
            return Err(Reject::new(RejectCode::Malformed, "a server's hello must name its cluster"));
        }
        _ => {}
    }
    check_expected(ours, theirs)?;
    check_expected(theirs, ours)?;
    Ok(theirs.version_max.min(ours.version_max))
}

fn check_expected(caller: &Hello, called: &Hello) -> Result<(), Reject> {
    match (caller.expects, called.role) {
        (Some(expected), Role::Server { id, .. }) if expected != id => Err(Reject::new(
            RejectCode::WrongServer,
            format!("{id} answers at this address, and {expected} was expected: check the address of {expected}"),
        )),
        (Some(expected), Role::Client) => Err(Reject::new(
            RejectCode::WrongServer,
            format!("a client answers at this address, and {expected} was expected"),
        )),
        _ => Ok(()),
    }
}

fn name(hello: &Hello) -> String {
    match hello.role {
        Role::Server { id, .. } => format!("server {id}"),
        Role::Client => "the client".into(),
    }
}
