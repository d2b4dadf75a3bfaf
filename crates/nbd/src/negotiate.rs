//! The handshake: options are haggled over until the client picks an export (protocol document,
//! "Fixed newstyle negotiation").
//!
//! ```text
//!   server  "NBDMAGIC" "IHAVEOPT" flags:2            client  flags:4
//!   client  "IHAVEOPT" option:4 length:4 data        server  magic:8 option:4 reply:4 length:4 data, ...
//! ```
//!
//! A client that sends nonsense is told so and may go on; one whose stream can no longer be
//! understood, or who lets the server wait for longer than the deadline, is dropped.

use crate::export::{Export, ExportInfo, Exports, OpenError};
use crate::protocol::*;
use crate::registry::{Lease, Registry};
use crate::server::Closing;
use bytes::{Buf, BytesMut};
use std::io;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

/// Replies are sent when this many bytes are together, and at the end of each option.
const REPLIES_MAX: usize = 64 << 10;

/// What a successful handshake leaves behind.
pub(crate) struct Negotiated<E: Export> {
    pub(crate) export: Rc<E>,
    pub(crate) lease: Lease<E>,
    pub(crate) mode: Mode,
    /// `base:allocation` was selected.
    pub(crate) extents: bool,
    /// What the client has sent already of its requests.
    pub(crate) received: BytesMut,
}

/// Why a handshake led to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error("the client ended the negotiation")]
    Aborted,
    #[error("the client sent nothing for {0:?}")]
    Silent(Duration),
    #[error("the client {0}")]
    Broken(&'static str),
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error(transparent)]
    Export(#[from] OpenError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What happens after an option.
enum Next<E: Export> {
    Option,
    Transmission(Rc<E>, Lease<E>),
}

/// The handshake of one connection.
pub(crate) struct Negotiation<'a, X: Exports, S> {
    registry: &'a Registry<X>,
    closing: &'a Closing,
    default_export: Option<&'a str>,
    stream: &'a mut S,
    timeout: Duration,
    deadline: Instant,
    received: BytesMut,
    replies: Vec<u8>,
    fixed: bool,
    no_zeroes: bool,
    mode: Mode,
    /// Export for which `base:allocation` was selected.
    context_for: Option<String>,
}

impl<'a, X: Exports, S: AsyncRead + AsyncWrite + Unpin> Negotiation<'a, X, S> {
    pub(crate) fn new(
        registry: &'a Registry<X>,
        closing: &'a Closing,
        default_export: Option<&'a str>,
        timeout: Duration,
        stream: &'a mut S,
    ) -> Self {
        Negotiation {
            registry,
            closing,
            default_export,
            stream,
            timeout,
            deadline: Instant::now() + timeout,
            received: BytesMut::new(),
            replies: Vec::new(),
            fixed: false,
            no_zeroes: false,
            mode: Mode::Simple,
            context_for: None,
        }
    }

    /// The whole handshake.
    pub(crate) async fn run(mut self) -> Result<Negotiated<X::Export>, Refused> {
        self.greet().await?;
        loop {
            self.deadline = Instant::now() + self.timeout;
            if let Next::Transmission(export, lease) = self.option().await? {
                let extents = self.context_for.is_some();
                return Ok(Negotiated { export, lease, mode: self.mode, extents, received: self.received });
            }
            self.send().await?;
        }
    }

    async fn greet(&mut self) -> Result<(), Refused> {
        let flags = HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES;
        self.replies.extend_from_slice(&MAGIC_SERVER.to_be_bytes());
        self.replies.extend_from_slice(&MAGIC_OPTION.to_be_bytes());
        self.replies.extend_from_slice(&flags.to_be_bytes());
        self.send().await?;
        self.receive(4).await?;
        let client = self.received.get_u32();
        if client & !u32::from(flags) != 0 {
            return Err(Refused::Broken("set flags that do not exist"));
        }
        self.fixed = client & u32::from(HANDSHAKE_FIXED_NEWSTYLE) != 0;
        self.no_zeroes = client & u32::from(HANDSHAKE_NO_ZEROES) != 0;
        Ok(())
    }

    /// One option.
    async fn option(&mut self) -> Result<Next<X::Export>, Refused> {
        self.receive(16).await?;
        if self.received.get_u64() != MAGIC_OPTION {
            return Err(Refused::Broken("sent something else than an option"));
        }
        let option = self.received.get_u32();
        let length = self.received.get_u32();
        if !self.fixed && option != option::EXPORT_NAME {
            return Err(Refused::Broken("sent an option that needs fixed newstyle without having asked for that"));
        }
        if length > OPTION_DATA_MAX {
            return self.skip_option(option, length).await;
        }
        self.receive(length as usize).await?;
        let data = self.received.split_to(length as usize);
        match option {
            option::EXPORT_NAME => return self.export_name(&data).await,
            option::GO => return self.info_or_go(option, &data).await,
            option::INFO => return self.info_or_go(option, &data).await,
            option::ABORT => {
                self.ack(option);
                // The client may be gone already; that is fine.
                let _ = self.send().await;
                return Err(Refused::Aborted);
            }
            option::LIST => self.list(&data).await?,
            option::STARTTLS => self.error(option, rep::ERR_UNSUP, "this server does not speak TLS"),
            option::STRUCTURED_REPLY => self.raise_mode(option, Mode::Structured, &data),
            option::EXTENDED_HEADERS => self.raise_mode(option, Mode::Extended, &data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(option, &data).await,
            _ => self.error(option, rep::ERR_UNSUP, "this server does not know that option"),
        }
        Ok(Next::Option)
    }

    /// Refuses an option whose data is too long, without holding it.
    async fn skip_option(&mut self, option: u32, length: u32) -> Result<Next<X::Export>, Refused> {
        if length > OPTION_SKIP_MAX || option == option::EXPORT_NAME {
            return Err(Refused::Broken("sent an option that is far too long"));
        }
        let mut left = length as usize;
        while left > 0 {
            self.receive(left.min(4096)).await?;
            let now = left.min(self.received.len());
            self.received.advance(now);
            left -= now;
        }
        self.error(option, rep::ERR_TOO_BIG, "the data of that option is too long");
        Ok(Next::Option)
    }

    /// The old way to pick an export: there is no way to say no but to hang up.
    async fn export_name(&mut self, data: &[u8]) -> Result<Next<X::Export>, Refused> {
        let name = std::str::from_utf8(data).map_err(|_| Refused::Broken("named an export not in UTF-8"))?;
        if name.len() > STRING_MAX {
            return Err(Refused::Broken("named an export with more than 4096 bytes"));
        }
        let (export, lease) = self.open(name).await?;
        self.replies.extend_from_slice(&export.size().to_be_bytes());
        self.replies.extend_from_slice(&transmission_flags(export.read_only(), self.mode).to_be_bytes());
        if !self.no_zeroes {
            self.replies.extend_from_slice(&[0; 124]);
        }
        self.enter(export, lease).await
    }

    /// Tells the client that the export is its own; if that fails, the share is given back.
    async fn enter(&mut self, export: Rc<X::Export>, lease: Lease<X::Export>) -> Result<Next<X::Export>, Refused> {
        match self.send().await {
            Ok(()) => Ok(Next::Transmission(export, lease)),
            Err(e) => {
                drop(export);
                lease.release().await;
                Err(e)
            }
        }
    }

    async fn open(&mut self, name: &str) -> Result<(Rc<X::Export>, Lease<X::Export>), Refused> {
        let resolved = self.resolve(name).await?;
        if self.context_for.as_deref() != Some(&resolved) {
            self.context_for = None;
        }
        Ok(self.registry.lease(&resolved).await?)
    }

    /// The name that is meant: the empty one means the default export, unless one is named so.
    async fn resolve(&self, name: &str) -> Result<String, OpenError> {
        if !name.is_empty() {
            return Ok(name.to_owned());
        }
        if let Some(default) = self.default_export {
            return Ok(default.to_owned());
        }
        let list = self.registry.exports().list().await?;
        let first = list.iter().find(|e| e.name.is_empty()).or(list.first());
        first.map(|e| e.name.clone()).ok_or_else(|| OpenError::NotFound(name.to_owned()))
    }

    async fn info_or_go(&mut self, option: u32, data: &[u8]) -> Result<Next<X::Export>, Refused> {
        let Some((name, wanted)) = parse_info(data) else {
            self.error(option, rep::ERR_INVALID, "the data of that option is malformed");
            return Ok(Next::Option);
        };
        if option == option::INFO {
            match self.describe(name).await {
                Ok(info) => {
                    self.infos(option, &info, &wanted);
                    self.ack(option);
                }
                Err(e) => self.open_error(option, &e),
            }
            return Ok(Next::Option);
        }
        match self.open(name).await {
            Ok((export, lease)) => {
                let info = self.info_of_open(name, &*export, &wanted).await;
                self.infos(option, &info, &wanted);
                self.ack(option);
                self.enter(export, lease).await
            }
            Err(Refused::Export(e)) => {
                self.open_error(option, &e);
                Ok(Next::Option)
            }
            Err(other) => Err(other),
        }
    }

    async fn describe(&self, name: &str) -> Result<ExportInfo, OpenError> {
        let resolved = self.resolve(name).await?;
        self.registry.exports().describe(&resolved).await
    }

    /// What is known of an opened export. Its words are looked for only if somebody wants them.
    async fn info_of_open(&self, name: &str, export: &X::Export, wanted: &[u16]) -> ExportInfo {
        let words = wanted.contains(&info::DESCRIPTION) || wanted.contains(&info::NAME);
        let described = if words { self.describe(name).await.ok() } else { None };
        let (name, description) = described.map_or((name.to_owned(), String::new()), |d| (d.name, d.description));
        ExportInfo { name, description, size: export.size(), read_only: export.read_only() }
    }

    fn infos(&mut self, option: u32, export: &ExportInfo, wanted: &[u16]) {
        let flags = transmission_flags(export.read_only, self.mode);
        let parts = [&info::EXPORT.to_be_bytes()[..], &export.size.to_be_bytes(), &flags.to_be_bytes()];
        self.reply(option, rep::INFO, &parts);
        for (kind, text) in [(info::NAME, &export.name), (info::DESCRIPTION, &export.description)] {
            if wanted.contains(&kind) && !text.is_empty() {
                self.reply(option, rep::INFO, &[&kind.to_be_bytes(), cut(text).as_bytes()]);
            }
        }
        let sizes = [1, PREFERRED_BLOCK, PAYLOAD_MAX as u32].map(u32::to_be_bytes);
        self.reply(option, rep::INFO, &[&info::BLOCK_SIZE.to_be_bytes(), sizes.as_flattened()]);
    }

    async fn list(&mut self, data: &[u8]) -> Result<(), Refused> {
        if !data.is_empty() {
            self.error(option::LIST, rep::ERR_INVALID, "LIST takes no data");
            return Ok(());
        }
        match self.registry.exports().list().await {
            Ok(list) => {
                for export in list {
                    let (name, description) = (cut(&export.name).as_bytes(), cut(&export.description).as_bytes());
                    let length = (name.len() as u32).to_be_bytes();
                    self.reply(option::LIST, rep::SERVER, &[&length, name, description]);
                    if self.replies.len() > REPLIES_MAX {
                        self.send().await?;
                    }
                }
                self.ack(option::LIST);
            }
            Err(e) => self.open_error(option::LIST, &e),
        }
        Ok(())
    }

    /// STRUCTURED_REPLY and EXTENDED_HEADERS.
    fn raise_mode(&mut self, option: u32, mode: Mode, data: &[u8]) {
        if !data.is_empty() {
            self.error(option, rep::ERR_INVALID, "that option takes no data");
        } else if self.mode == mode {
            self.error(option, rep::ERR_INVALID, "that was negotiated already");
        } else if self.mode > mode {
            self.error(option, rep::ERR_EXT_HEADER_REQD, "extended headers were negotiated, which is more");
        } else {
            self.mode = mode;
            self.ack(option);
        }
    }

    async fn meta_context(&mut self, option: u32, data: &[u8]) {
        let set = option == option::SET_META_CONTEXT;
        if set {
            // Whatever comes of it, what was selected before no longer is.
            self.context_for = None;
        }
        if self.mode == Mode::Simple {
            return self.error(option, rep::ERR_INVALID, "structured replies must be negotiated first");
        }
        let Some((name, queries)) = parse_meta_context(data) else {
            return self.error(option, rep::ERR_INVALID, "the data of that option is malformed");
        };
        // An answer about an export that does not exist would be found out only at GO.
        let export = match self.describe(name).await {
            Ok(export) => export.name,
            Err(e) => return self.open_error(option, &e),
        };
        let matches = |query: &&[u8]| *query == CONTEXT_NAME.as_bytes() || (!set && *query == b"base:");
        if queries.iter().any(matches) || (!set && queries.is_empty()) {
            let id = if set { CONTEXT_ID } else { 0 };
            self.reply(option, rep::META_CONTEXT, &[&id.to_be_bytes(), CONTEXT_NAME.as_bytes()]);
            if set {
                self.context_for = Some(export);
            }
        }
        self.ack(option);
    }

    fn open_error(&mut self, option: u32, error: &OpenError) {
        let kind = match error {
            OpenError::NotFound(_) => rep::ERR_UNKNOWN,
            OpenError::Busy(_) => rep::ERR_POLICY,
            OpenError::ShuttingDown => rep::ERR_SHUTDOWN,
            OpenError::Failed(_) => rep::ERR_PLATFORM,
        };
        self.error(option, kind, &error.to_string());
    }

    fn error(&mut self, option: u32, kind: u32, text: &str) {
        self.reply(option, kind, &[cut(text).as_bytes()]);
    }

    fn ack(&mut self, option: u32) {
        self.reply(option, rep::ACK, &[]);
    }

    fn reply(&mut self, option: u32, kind: u32, parts: &[&[u8]]) {
        let length: usize = parts.iter().map(|p| p.len()).sum();
        self.replies.extend_from_slice(&MAGIC_OPTION_REPLY.to_be_bytes());
        for word in [option, kind, length as u32] {
            self.replies.extend_from_slice(&word.to_be_bytes());
        }
        for part in parts {
            self.replies.extend_from_slice(part);
        }
    }

    /// Receives until `length` bytes are there. Here, and in `send`, is where the deadline and the
    /// server's end interrupt a handshake: never while an export is being opened.
    async fn receive(&mut self, length: usize) -> Result<(), Refused> {
        while self.received.len() < length {
            let read = timeout_at(self.deadline, self.stream.read_buf(&mut self.received));
            let received = tokio::select! {
                received = read => received.map_err(|_| Refused::Silent(self.timeout))??,
                () = self.closing.begun() => return Err(Refused::ShuttingDown),
            };
            if received == 0 {
                return Err(Refused::Aborted);
            }
        }
        Ok(())
    }

    async fn send(&mut self) -> Result<(), Refused> {
        // Not the deadline: opening an export, which is not the client's doing, may have used it up.
        let sent = timeout_at(Instant::now() + self.timeout, self.stream.write_all(&self.replies));
        tokio::select! {
            sent = sent => sent.map_err(|_| Refused::Silent(self.timeout))??,
            () = self.closing.begun() => return Err(Refused::ShuttingDown),
        }
        self.replies.clear();
        Ok(())
    }
}

/// What a client may do with an export.
fn transmission_flags(read_only: bool, mode: Mode) -> u16 {
    use export_flag::*;
    let mut flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN | SEND_CACHE;
    flags |= if read_only { READ_ONLY } else { SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO };
    if mode != Mode::Simple {
        flags |= SEND_DF;
    }
    flags
}

/// Splits off a string with its 32-bit length in front.
fn take_string<'a>(data: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    let length = u32::from_be_bytes(*length) as usize;
    if length > rest.len() || length > STRING_MAX {
        return None;
    }
    let (string, rest) = rest.split_at(length);
    *data = rest;
    Some(string)
}

/// INFO and GO: the name, then the kinds of information wanted.
fn parse_info(mut data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let name = std::str::from_utf8(take_string(&mut data)?).ok()?;
    let (count, kinds) = data.split_first_chunk::<2>()?;
    if kinds.len() != 2 * usize::from(u16::from_be_bytes(*count)) {
        return None;
    }
    Some((name, kinds.chunks_exact(2).map(|k| be16(k, 0)).collect()))
}

/// LIST_META_CONTEXT and SET_META_CONTEXT: the name, then queries.
fn parse_meta_context(mut data: &[u8]) -> Option<(&str, Vec<&[u8]>)> {
    let name = std::str::from_utf8(take_string(&mut data)?).ok()?;
    let (count, rest) = data.split_first_chunk::<4>()?;
    data = rest;
    let count = u32::from_be_bytes(*count) as usize;
    // Each query has at least its length in front: a larger count is a lie, and none of its memory is ours.
    if count > data.len() / 4 {
        return None;
    }
    let queries = (0..count).map(|_| take_string(&mut data)).collect::<Option<Vec<_>>>()?;
    data.is_empty().then_some((name, queries))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_option_data_panics_the_parsers(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_info(&data);
            let _ = parse_meta_context(&data);
        }
    }

    #[test]
    fn a_count_of_queries_that_the_data_cannot_hold_is_refused() {
        let mut data = vec![0, 0, 0, 1, b'x'];
        data.extend_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(parse_meta_context(&data), None);
    }
}
