//! A scripted client against the server, over a socket pair: every command, legal and illegal, byte by
//! byte as the protocol document has them. What this client says is not taken from the server's own
//! encoder, so that both cannot be wrong in the same way.

use bytes::Bytes;
use petal_nbd::*;
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, LocalSet, spawn_local};

const SIZE: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const STARTTLS: u32 = 5;
const INFO: u32 = 6;
const GO: u32 = 7;
const STRUCTURED: u32 = 8;
const LIST_CONTEXT: u32 = 9;
const SET_CONTEXT: u32 = 10;
const EXTENDED: u32 = 11;

const ACK: u32 = 1;
const ERR: u32 = 1 << 31;
const ERR_UNSUP: u32 = ERR + 1;
const ERR_POLICY: u32 = ERR + 2;
const ERR_INVALID: u32 = ERR + 3;
const ERR_UNKNOWN: u32 = ERR + 6;
const ERR_TOO_BIG: u32 = ERR + 9;
const ERR_EXT_HEADER_REQD: u32 = ERR + 10;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;

const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;
const PAYLOAD_LEN: u16 = 32;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;

// ---------------------------------------------------------------- the client

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Simple,
    Structured,
    Extended,
}

struct Client {
    stream: UnixStream,
    mode: Mode,
}

#[derive(Debug, PartialEq)]
enum Reply {
    Ok(u64),
    Error(u64, u32),
    Chunk { kind: u16, last: bool, cookie: u64, payload: Vec<u8> },
    Closed,
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

fn go_data(name: &str, kinds: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&(kinds.len() as u16).to_be_bytes());
    kinds.iter().for_each(|k| data.extend_from_slice(&k.to_be_bytes()));
    data
}

fn context_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|q| data.extend_from_slice(&string(q)));
    data
}

impl Client {
    async fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).await.ok().map(|_| bytes)
    }
    async fn take_vec(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).await.expect("the server says as much as it promised");
        bytes
    }
    async fn put(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("the server listens");
    }
    async fn is_closed(&mut self) -> bool {
        // A reset is a close too: the server had not read everything.
        !matches!(self.stream.read(&mut [0; 1]).await, Ok(1))
    }

    async fn greet(&mut self, flags: u32) {
        let greeting = self.take::<18>().await.expect("a greeting");
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\x00\x03");
        self.put(&flags.to_be_bytes()).await;
    }

    async fn send_option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        self.put(&bytes).await;
    }

    /// Replies up to the final one.
    async fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send_option(option, data).await;
        let mut replies = Vec::new();
        loop {
            let header = self.take::<20>().await.expect("a reply to an option");
            assert_eq!(header[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
            assert_eq!(header[8..12], option.to_be_bytes());
            let kind = u32::from_be_bytes(header[12..16].try_into().unwrap());
            let length = u32::from_be_bytes(header[16..20].try_into().unwrap());
            replies.push((kind, self.take_vec(length as usize).await));
            if kind == ACK || kind >= ERR {
                return replies;
            }
        }
    }

    /// The kind of the final reply.
    async fn ask(&mut self, option: u32, data: &[u8]) -> u32 {
        self.option(option, data).await.last().unwrap().0
    }

    /// From greeting to transmission.
    async fn go(&mut self, name: &str) {
        self.greet(3).await;
        match self.mode {
            Mode::Simple => {}
            Mode::Structured => assert_eq!(self.ask(STRUCTURED, &[]).await, ACK),
            Mode::Extended => assert_eq!(self.ask(EXTENDED, &[]).await, ACK),
        }
        if self.mode != Mode::Simple {
            let replies = self.option(SET_CONTEXT, &context_data(name, &["base:allocation"])).await;
            assert_eq!(replies[0], (4, b"\0\0\0\x01base:allocation".to_vec()));
        }
        assert_eq!(self.ask(GO, &go_data(name, &[])).await, ACK);
    }

    fn header(&self, command: u16, flags: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
        let extended = self.mode == Mode::Extended;
        let mut bytes = if extended { 0x21e4_1c71u32 } else { 0x2560_9513 }.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        match extended {
            true => bytes.extend_from_slice(&length.to_be_bytes()),
            false => bytes.extend_from_slice(&(length as u32).to_be_bytes()),
        }
        bytes
    }

    async fn send(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, length: u64) {
        let bytes = self.header(command, flags, cookie, offset, length);
        self.put(&bytes).await;
    }

    /// The next reply; the data of a simple one is the caller's to take.
    async fn reply(&mut self) -> Reply {
        let Some(magic) = self.take::<4>().await else { return Reply::Closed };
        let magic = u32::from_be_bytes(magic);
        if magic == 0x6744_6698 {
            assert_ne!(self.mode, Mode::Extended);
            let error = u32::from_be_bytes(self.take().await.unwrap());
            let cookie = u64::from_be_bytes(self.take().await.unwrap());
            return if error == 0 { Reply::Ok(cookie) } else { Reply::Error(cookie, error) };
        }
        let expected = if self.mode == Mode::Extended { 0x6e8a_278c } else { 0x668e_33ef };
        assert_eq!(magic, expected, "magic of a chunk");
        let flags = u16::from_be_bytes(self.take().await.unwrap());
        let kind = u16::from_be_bytes(self.take().await.unwrap());
        let cookie = u64::from_be_bytes(self.take().await.unwrap());
        let length = if self.mode == Mode::Extended {
            self.take::<8>().await.unwrap();
            u64::from_be_bytes(self.take().await.unwrap())
        } else {
            u64::from(u32::from_be_bytes(self.take().await.unwrap()))
        };
        let payload = self.take_vec(length as usize).await;
        match kind {
            0 => Reply::Ok(cookie),
            0x8001 => {
                let error = u32::from_be_bytes(payload[..4].try_into().unwrap());
                let text = u16::from_be_bytes(payload[4..6].try_into().unwrap());
                assert_eq!(payload.len(), 6 + usize::from(text));
                assert!(text > 0, "an error says why");
                Reply::Error(cookie, error)
            }
            kind => Reply::Chunk { kind, last: flags & 1 == 1, cookie, payload },
        }
    }

    /// A command without data in its reply: 0 or the error.
    async fn command(&mut self, command: u16, flags: u16, offset: u64, length: u64) -> u32 {
        self.send(command, flags, 77, offset, length).await;
        self.outcome(77).await
    }

    async fn outcome(&mut self, cookie: u64) -> u32 {
        match self.reply().await {
            Reply::Ok(c) if c == cookie => 0,
            Reply::Error(c, error) if c == cookie => error,
            other => panic!("expected a plain reply to {cookie}, got {other:?}"),
        }
    }

    async fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        let flags = flags | if self.mode == Mode::Extended { PAYLOAD_LEN } else { 0 };
        self.send(WRITE, flags, 78, offset, data.len() as u64).await;
        self.put(data).await;
        self.outcome(78).await
    }

    /// Reads, and puts chunks together.
    async fn read(&mut self, flags: u16, offset: u64, length: u64) -> Result<Vec<u8>, u32> {
        self.send(READ, flags, 79, offset, length).await;
        let mut data = vec![0xee; length as usize];
        let mut covered = 0;
        loop {
            match self.reply().await {
                Reply::Ok(79) if self.mode == Mode::Simple => return Ok(self.take_vec(length as usize).await),
                Reply::Error(79, error) => return Err(error),
                Reply::Chunk { kind, last, cookie: 79, payload } => {
                    let at = (u64::from_be_bytes(payload[..8].try_into().unwrap()) - offset) as usize;
                    let bytes = match kind {
                        1 => payload[8..].to_vec(),
                        2 => vec![0; u32::from_be_bytes(payload[8..].try_into().unwrap()) as usize],
                        other => panic!("chunk {other} in the answer to a read"),
                    };
                    data[at..at + bytes.len()].copy_from_slice(&bytes);
                    covered += bytes.len();
                    if last {
                        assert_eq!(covered, length as usize);
                        return Ok(data);
                    }
                }
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    /// BLOCK_STATUS: `(length, status)`.
    async fn extents(&mut self, flags: u16, offset: u64, length: u64) -> Result<Vec<(u64, u64)>, u32> {
        self.send(STATUS, flags, 80, offset, length).await;
        match self.reply().await {
            Reply::Error(80, error) => Err(error),
            Reply::Chunk { kind: 5, last: true, cookie: 80, payload } if self.mode == Mode::Structured => {
                assert_eq!(payload[..4], [0, 0, 0, 1]);
                let word = |b: &[u8]| u64::from(u32::from_be_bytes(b.try_into().unwrap()));
                Ok(payload[4..].chunks(8).map(|e| (word(&e[..4]), word(&e[4..]))).collect())
            }
            Reply::Chunk { kind: 6, last: true, cookie: 80, payload } if self.mode == Mode::Extended => {
                let word = |b: &[u8]| u64::from_be_bytes(b.try_into().unwrap());
                assert_eq!(payload[..4], [0, 0, 0, 1]);
                assert_eq!(payload[4..8], (((payload.len() - 8) / 16) as u32).to_be_bytes());
                Ok(payload[8..].chunks(16).map(|e| (word(&e[..8]), word(&e[8..]))).collect())
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

// ---------------------------------------------------------------- the server

/// What the exports of a test have seen, and what they are told to do.
#[derive(Default)]
struct Log {
    opened: Cell<u32>,
    closed: Cell<u32>,
    running: Cell<u32>,
    finished: Cell<u32>,
    /// Requests to the slow half of the disk wait for this.
    gate: Notify,
    fua: RefCell<Vec<&'static str>>,
}

/// Memory, and a second half in which things go wrong:
/// at 32 MiB requests wait for the gate, at 40 MiB reads fail, at 41 MiB they panic, at 42 MiB they give
/// too few bytes, at 43 MiB extents make no progress.
#[derive(Clone)]
struct TestExport {
    memory: MemoryExport,
    log: Rc<Log>,
    read_only: bool,
}

impl TestExport {
    async fn wait_for_gate(&self, offset: u64) {
        if offset / MIB == 32 {
            self.log.running.set(self.log.running.get() + 1);
            self.log.gate.notified().await;
            self.log.running.set(self.log.running.get() - 1);
            self.log.finished.set(self.log.finished.get() + 1);
        }
    }
    fn note(&self, what: &'static str, fua: bool) {
        if fua {
            self.log.fua.borrow_mut().push(what);
        }
    }
}

impl Export for TestExport {
    fn size(&self) -> u64 {
        self.memory.size()
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    async fn read(&self, offset: u64, length: u64) -> Result<Vec<Piece>, ExportError> {
        self.wait_for_gate(offset).await;
        match offset / MIB {
            40 => Err(ExportError::new(Errno::Io, "the disk is on fire")),
            41 => panic!("a bug in the export"),
            42 => Ok(vec![Piece::Zero(length - 1)]),
            _ => self.memory.read(offset, length).await,
        }
    }
    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), ExportError> {
        self.wait_for_gate(offset).await;
        self.note("write", fua);
        self.memory.write(offset, data, fua).await
    }
    async fn zero(&self, offset: u64, length: u64, how: Zeroing) -> Result<(), ExportError> {
        self.note("zero", how.fua);
        self.memory.zero(offset, length, how).await
    }
    async fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<(), ExportError> {
        self.note("trim", fua);
        self.memory.trim(offset, length, fua).await
    }
    async fn flush(&self) -> Result<(), ExportError> {
        self.memory.flush().await
    }
    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<(u64, bool)>, ExportError> {
        if offset / MIB == 43 { Ok(vec![(0, true)]) } else { self.memory.extents(offset, length).await }
    }
    async fn close(&self) {
        assert_eq!(self.log.running.get(), 0, "an export is closed after its requests");
        self.log.closed.set(self.log.closed.get() + 1);
    }
}

struct TestExports {
    memory: MemoryExport,
    log: Rc<Log>,
}

impl Exports for TestExports {
    type Export = TestExport;
    async fn list(&self) -> Result<Vec<ExportInfo>, OpenError> {
        let info = |name: &str, description: &str, read_only| ExportInfo {
            name: name.into(),
            description: description.into(),
            size: SIZE,
            read_only,
        };
        Ok(vec![info("vol0", "the first", false), info("frozen", "", true), info("held", "", false)])
    }
    async fn open(&self, name: &str) -> Result<TestExport, OpenError> {
        tokio::task::yield_now().await;
        let read_only = match name {
            "vol0" => false,
            "frozen" => true,
            "held" => return Err(OpenError::Busy("'held' is attached by somebody".into())),
            _ => return Err(OpenError::NotFound(name.into())),
        };
        self.log.opened.set(self.log.opened.get() + 1);
        Ok(TestExport { memory: self.memory.clone(), log: self.log.clone(), read_only })
    }
}

struct World {
    server: Server<TestExports>,
    log: Rc<Log>,
}

impl World {
    /// A new connection, before the greeting.
    fn connect(&self, mode: Mode) -> (Client, JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let server = self.server.clone();
        let task = spawn_local(async move { server.serve_stream(theirs).await });
        (Client { stream: ours, mode }, task)
    }

    /// A connection that uses vol0.
    async fn vol0(&self, mode: Mode) -> Client {
        let mut client = self.connect(mode).0;
        client.go("vol0").await;
        client
    }

    /// The server still does what it should, for somebody else.
    async fn check_unharmed(&self) {
        let mut client = self.vol0(Mode::Structured).await;
        assert_eq!(client.write(0, 20 * MIB, b"alive").await, 0);
        assert_eq!(client.read(0, 20 * MIB, 5).await.unwrap(), b"alive");
        client.send(DISC, 0, 0, 0, 0).await;
        assert_eq!(client.reply().await, Reply::Closed);
    }
}

fn test_with(config: Config, body: impl AsyncFnOnce(World)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        let log: Rc<Log> = Rc::default();
        let exports = TestExports { memory: MemoryExport::new(SIZE), log: log.clone() };
        let world = World { server: Server::new(exports, config), log };
        let limit = tokio::time::timeout(Duration::from_secs(60), body(world));
        limit.await.expect("a test must not hang");
    });
}

fn test(body: impl AsyncFnOnce(World)) {
    test_with(Config::default(), body);
}

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

// ---------------------------------------------------------------- the handshake

#[test]
fn go_tells_size_flags_words_and_block_sizes() {
    test(async |world| {
        let mut c = world.connect(Mode::Structured).0;
        c.greet(3).await;
        assert_eq!(c.ask(STRUCTURED, &[]).await, ACK);
        let replies = c.option(GO, &go_data("", &[1, 2, 3, 99])).await;
        let flags: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 10 | 1 << 11;
        let export = [&[0, 0][..], &SIZE.to_be_bytes(), &flags.to_be_bytes()].concat();
        let sizes = [&[0, 3][..], &1u32.to_be_bytes(), &4096u32.to_be_bytes(), &(32u32 << 20).to_be_bytes()].concat();
        let expected =
            [(3, export), (3, b"\0\x01vol0".to_vec()), (3, b"\0\x02the first".to_vec()), (3, sizes), (ACK, vec![])];
        assert_eq!(replies, expected);
    });
}

#[test]
fn read_only_export_says_so_and_refuses_every_change() {
    test(async |world| {
        let mut c = world.connect(Mode::Structured).0;
        c.greet(3).await;
        assert_eq!(c.ask(STRUCTURED, &[]).await, ACK);
        let replies = c.option(GO, &go_data("frozen", &[])).await;
        let flags = u16::from_be_bytes(replies[0].1[10..12].try_into().unwrap());
        assert_eq!(flags, 1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 7 | 1 << 8 | 1 << 10);
        assert_eq!(c.write(0, 0, &[1; 4096]).await, EPERM);
        assert_eq!(c.command(TRIM, 0, 0, 4096).await, EPERM);
        assert_eq!(c.command(ZEROES, 0, 0, 4096).await, EPERM);
        assert_eq!(c.command(FLUSH, 0, 0, 0).await, 0);
        assert_eq!(c.read(0, 0, 4096).await.unwrap(), [0; 4096]);
    });
}

#[test]
fn info_tells_about_an_export_without_opening_it() {
    test(async |world| {
        let mut c = world.connect(Mode::Simple).0;
        c.greet(3).await;
        assert_eq!(c.ask(INFO, &go_data("vol0", &[])).await, ACK);
        assert_eq!(c.ask(INFO, &go_data("held", &[])).await, ACK);
        assert_eq!(world.log.opened.get(), 0);
        assert_eq!(c.ask(INFO, &go_data("nobody", &[])).await, ERR_UNKNOWN);
    });
}

#[test]
fn refused_export_leaves_the_client_free_to_choose_another() {
    test(async |world| {
        let mut c = world.connect(Mode::Simple).0;
        c.greet(3).await;
        assert_eq!(c.ask(GO, &go_data("nobody", &[])).await, ERR_UNKNOWN);
        let busy = c.option(GO, &go_data("held", &[])).await;
        assert_eq!(busy, [(ERR_POLICY, b"'held' is attached by somebody".to_vec())]);
        assert_eq!(c.ask(GO, &go_data("vol0", &[])).await, ACK);
        assert_eq!(c.read(0, 0, 10).await.unwrap(), [0; 10]);
    });
}

#[test]
fn list_shows_every_export_with_its_words() {
    test(async |world| {
        let mut c = world.connect(Mode::Simple).0;
        c.greet(3).await;
        let list = c.option(LIST, &[]).await;
        assert_eq!(list[0], (2, [&string("vol0")[..], b"the first"].concat()));
        assert_eq!(list[1], (2, string("frozen")));
        assert_eq!(list.len(), 4);
        assert_eq!(c.ask(LIST, b"x").await, ERR_INVALID);
    });
}

#[test]
fn export_name_enters_transmission_with_or_without_its_zeroes() {
    for (flags, zeroes) in [(0u32, 124), (1, 124), (3, 0)] {
        test(async |world| {
            let mut c = world.connect(Mode::Simple).0;
            c.greet(flags).await;
            c.send_option(EXPORT_NAME, b"vol0").await;
            let head = c.take_vec(10 + zeroes).await;
            assert_eq!(head[..8], SIZE.to_be_bytes());
            assert_eq!(c.read(0, 0, 10).await.unwrap(), [0; 10]);
        });
    }
}

#[test]
fn export_name_of_nothing_closes_the_connection() {
    test(async |world| {
        for name in [&b"nobody"[..], b"\xff\xfe", &[b'x'; 5000]] {
            let mut c = world.connect(Mode::Simple).0;
            c.greet(3).await;
            c.send_option(EXPORT_NAME, name).await;
            assert!(c.is_closed().await);
        }
        world.check_unharmed().await;
    });
}

#[test]
fn abort_is_acknowledged_and_ends_the_connection() {
    test(async |world| {
        let mut c = world.connect(Mode::Simple).0;
        c.greet(3).await;
        assert_eq!(c.ask(ABORT, &[]).await, ACK);
        assert!(c.is_closed().await);
    });
}

#[test]
fn unknown_options_are_refused_and_the_client_may_go_on() {
    test(async |world| {
        let mut c = world.connect(Mode::Simple).0;
        c.greet(3).await;
        assert_eq!(c.ask(STARTTLS, &[]).await, ERR_UNSUP);
        assert_eq!(c.ask(4, &[]).await, ERR_UNSUP);
        assert_eq!(c.ask(12345, b"with data").await, ERR_UNSUP);
        assert_eq!(c.ask(12345, &vec![7; 65536]).await, ERR_UNSUP);
        assert_eq!(c.ask(12345, &vec![7; 65537]).await, ERR_TOO_BIG);
        assert_eq!(c.ask(GO, &vec![7; 3 << 20]).await, ERR_TOO_BIG);
        assert_eq!(c.ask(GO, &go_data("vol0", &[])).await, ACK);
    });
}

#[test]
fn option_far_too_long_closes_the_connection() {
    test(async |world| {
        let mut c = world.connect(Mode::Simple).0;
        c.greet(3).await;
        c.put(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff").await;
        assert!(c.is_closed().await);
        world.check_unharmed().await;
    });
}

#[test]
fn malformed_option_data_is_invalid() {
    test(async |world| {
        let mut c = world.connect(Mode::Structured).0;
        c.greet(3).await;
        assert_eq!(c.ask(STRUCTURED, b"data").await, ERR_INVALID);
        assert_eq!(c.ask(EXTENDED, b"data").await, ERR_INVALID);
        assert_eq!(c.ask(STRUCTURED, &[]).await, ACK);
        let long_name = go_data(&"x".repeat(4097), &[]);
        let bad: [&[u8]; 8] = [
            b"",
            b"\0\0\0",
            b"\0\0\0\x09vol0\0\0",
            b"\0\0\0\x04vol0",
            b"\0\0\0\x04vol0\0\x02\0\0",
            b"\0\0\0\x04vol0\0\0trailing",
            b"\0\0\0\x02\xff\xff\0\0",
            &long_name,
        ];
        for data in bad {
            for option in [GO, INFO] {
                assert_eq!(c.ask(option, data).await, ERR_INVALID, "{data:?}");
            }
        }
        let bad: [&[u8]; 5] = [
            b"",
            b"\0\0\0\x04vol0",
            b"\0\0\0\x04vol0\xff\xff\xff\xff",
            b"\0\0\0\x04vol0\0\0\0\x01\0\0\0\x09base",
            b"\0\0\0\x04vol0\0\0\0\0trailing",
        ];
        for data in bad {
            for option in [LIST_CONTEXT, SET_CONTEXT] {
                assert_eq!(c.ask(option, data).await, ERR_INVALID, "{data:?}");
            }
        }
        assert_eq!(c.ask(GO, &go_data("vol0", &[])).await, ACK);
    });
}

#[test]
fn headers_can_be_raised_once_and_never_lowered() {
    test(async |world| {
        let mut c = world.connect(Mode::Simple).0;
        c.greet(3).await;
        assert_eq!(c.ask(STRUCTURED, &[]).await, ACK);
        assert_eq!(c.ask(STRUCTURED, &[]).await, ERR_INVALID);
        assert_eq!(c.ask(EXTENDED, &[]).await, ACK);
        assert_eq!(c.ask(EXTENDED, &[]).await, ERR_INVALID);
        assert_eq!(c.ask(STRUCTURED, &[]).await, ERR_EXT_HEADER_REQD);
    });
}

#[test]
fn contexts_are_listed_by_query_and_selected_by_name() {
    test(async |world| {
        let mut c = world.connect(Mode::Structured).0;
        c.greet(3).await;
        assert_eq!(c.ask(SET_CONTEXT, &context_data("vol0", &["base:allocation"])).await, ERR_INVALID);
        assert_eq!(c.ask(STRUCTURED, &[]).await, ACK);
        for (queries, found) in [(&[][..], 1), (&["base:"], 1), (&["base:allocation"], 1), (&["qemu:x"], 0)] {
            let replies = c.option(LIST_CONTEXT, &context_data("vol0", queries)).await;
            assert_eq!(replies.len(), found + 1, "{queries:?}");
        }
        for (queries, found) in [(&[][..], 0), (&["base:"], 0), (&["base:allocation"], 1), (&["x", "y:z"], 0)] {
            let replies = c.option(SET_CONTEXT, &context_data("vol0", queries)).await;
            assert_eq!(replies.len(), found + 1, "{queries:?}");
        }
        assert_eq!(c.ask(SET_CONTEXT, &context_data("nobody", &["base:allocation"])).await, ERR_UNKNOWN);
        // What was selected for one export says nothing about another.
        assert_eq!(c.ask(SET_CONTEXT, &context_data("frozen", &["base:allocation"])).await, ACK);
        assert_eq!(c.ask(GO, &go_data("vol0", &[])).await, ACK);
        assert_eq!(c.extents(0, 0, 4096).await, Err(EINVAL));
    });
}

#[test]
fn context_selected_by_the_empty_name_holds_for_the_default_export() {
    test(async |world| {
        let mut c = world.connect(Mode::Structured).0;
        c.greet(3).await;
        assert_eq!(c.ask(STRUCTURED, &[]).await, ACK);
        assert_eq!(c.ask(SET_CONTEXT, &context_data("", &["base:allocation"])).await, ACK);
        assert_eq!(c.ask(GO, &go_data("vol0", &[])).await, ACK);
        assert_eq!(c.extents(0, 0, 4096).await, Ok(vec![(4096, 3)]));
    });
}

#[test]
fn nonsense_in_the_handshake_closes_the_connection() {
    test(async |world| {
        let mut c = world.connect(Mode::Simple).0;
        c.greet(4).await;
        assert!(c.is_closed().await, "unknown client flags");
        let mut c = world.connect(Mode::Simple).0;
        c.greet(0).await;
        c.send_option(LIST, &[]).await;
        assert!(c.is_closed().await, "an option of fixed newstyle from a client that did not ask for it");
        let mut c = world.connect(Mode::Simple).0;
        c.greet(3).await;
        c.put(b"GET / HTTP/1.1\r\n\r\n").await;
        assert!(c.is_closed().await, "another protocol");
        for part in [0, 3, 4, 10, 20, 25] {
            let (mut c, task) = world.connect(Mode::Simple);
            c.take::<18>().await.unwrap();
            let all = [&3u32.to_be_bytes()[..], b"IHAVEOPT\0\0\0\x07\0\0\0\x20half"].concat();
            c.put(&all[..part.min(all.len())]).await;
            drop(c);
            task.await.expect("a handshake that ends halfway does no harm");
        }
        world.check_unharmed().await;
    });
}

#[test]
fn silent_client_is_dropped_after_the_deadline() {
    let config = Config { handshake_timeout: Duration::from_millis(50), ..Config::default() };
    test_with(config, async |world| {
        for said in [&b""[..], b"\0\0\0\x03", b"\0\0\0\x03IHAVEOPT\0\0"] {
            let (mut c, task) = world.connect(Mode::Simple);
            c.take::<18>().await.unwrap();
            c.put(said).await;
            assert!(c.is_closed().await);
            task.await.unwrap();
        }
        // Once it uses an export, a client may be silent for as long as it likes.
        let mut c = world.vol0(Mode::Simple).await;
        tokio::time::sleep(Duration::from_millis(120)).await;
        assert_eq!(c.read(0, 0, 10).await.unwrap(), [0; 10]);
    });
}

// ---------------------------------------------------------------- commands

#[test]
fn every_command_does_what_it_says_in_every_mode() {
    for mode in MODES {
        test(async |world| {
            let mut c = world.vol0(mode).await;
            let data: Vec<u8> = (0..100_000u32).map(|n| (n * 7 + n / 251) as u8 | 1).collect();
            assert_eq!(c.write(0, 12_345, &data).await, 0);
            assert_eq!(c.read(0, 12_345, 100_000).await.unwrap(), data);
            assert_eq!(c.read(0, 12_346, 1).await.unwrap(), data[1..2]);
            assert_eq!(c.write(FUA, 12_345, &data[..4096]).await, 0);
            assert_eq!(c.command(FLUSH, 0, 0, 0).await, 0);
            assert_eq!(c.command(CACHE, 0, 0, SIZE).await, 0);
            assert_eq!(c.command(ZEROES, FUA, 20_000, 10_000).await, 0);
            assert_eq!(c.command(ZEROES, NO_HOLE, 40_000, 10_000).await, 0);
            assert_eq!(c.command(ZEROES, FAST_ZERO, 60_000, 10_000).await, 0);
            assert_eq!(c.command(ZEROES, FAST_ZERO | NO_HOLE, 60_000, 10_000).await, ENOTSUP);
            assert_eq!(c.command(TRIM, FUA, 80_000, 10_000).await, 0);
            let mut expected = data.clone();
            for start in [20_000, 40_000, 60_000, 80_000] {
                expected[start - 12_345..start - 12_345 + 10_000].fill(0);
            }
            assert_eq!(c.read(FUA, 12_345, 100_000).await.unwrap(), expected);
            assert_eq!(*world.log.fua.borrow(), ["write", "zero", "trim"]);
            c.send(DISC, 0, 0, 0, 0).await;
            assert_eq!(c.reply().await, Reply::Closed);
        });
    }
}

#[test]
fn illegal_requests_get_their_error_and_the_next_request_its_answer() {
    for mode in MODES {
        test(async |world| {
            let mut c = world.vol0(mode).await;
            let end = if mode == Mode::Extended { u64::MAX } else { u64::from(u32::MAX) };
            let requests = [
                (READ, 0, SIZE, 1, EINVAL),
                (READ, 0, SIZE - 1, 2, EINVAL),
                (READ, 0, u64::MAX, 4096, EINVAL),
                (READ, 0, 0, 0, EINVAL),
                (READ, 0, 0, (32 << 20) + 1, EINVAL),
                (READ, 0, 0, end, EINVAL),
                (READ, NO_HOLE, 0, 1, EINVAL),
                (READ, 1 << 15, 0, 1, EINVAL),
                (FLUSH, 0, 4096, 0, EINVAL),
                (FLUSH, 0, 0, 1, EINVAL),
                (FLUSH, DF, 0, 0, EINVAL),
                (TRIM, 0, SIZE, 4096, EINVAL),
                (TRIM, 0, 0, 0, EINVAL),
                (TRIM, NO_HOLE, 0, 4096, EINVAL),
                (ZEROES, 0, SIZE - 4096, 8192, ENOSPC),
                (ZEROES, 0, u64::MAX - 1, end, ENOSPC),
                (ZEROES, DF, 0, 4096, EINVAL),
                (CACHE, 0, SIZE, 1, EINVAL),
                (CACHE, REQ_ONE, 0, 1, EINVAL),
                (STATUS, 0, SIZE, 1, EINVAL),
                (STATUS, 0, 0, 0, EINVAL),
                (8, 0, 0, 0, EINVAL),
                (0xffff, 0, 0, 4096, EINVAL),
            ];
            for (command, flags, offset, length, error) in requests {
                let got = c.command(command, flags, offset, length).await;
                assert_eq!(got, error, "{mode:?} command {command} flags {flags} at {offset} length {length}");
            }
            assert_eq!(c.write(0, SIZE - 1, &[1; 2]).await, ENOSPC);
            assert_eq!(c.write(0, u64::MAX, &[1; 4096]).await, ENOSPC);
            assert_eq!(c.write(REQ_ONE, 0, &[1; 4096]).await, EINVAL);
            assert_eq!(c.write(0, 0, &[]).await, EINVAL);
            assert_eq!(c.write(0, 0, &vec![1; (32 << 20) + 1]).await, EINVAL);
            assert_eq!(c.read(0, 0, 4096).await.unwrap(), [0; 4096], "nothing was written by any of them");
        });
    }
}

#[test]
fn flags_that_were_not_negotiated_are_invalid() {
    test(async |world| {
        let mut c = world.vol0(Mode::Simple).await;
        assert_eq!(c.command(READ, DF, 0, 4096).await, EINVAL);
        assert_eq!(c.command(STATUS, 0, 0, 4096).await, EINVAL);
        c.send(WRITE, PAYLOAD_LEN, 5, 0, 3).await;
        c.put(b"abc").await;
        assert_eq!(c.outcome(5).await, EINVAL);
        let mut c = world.vol0(Mode::Extended).await;
        // With extended headers the flag says that a payload follows, whatever the command.
        c.send(STATUS, PAYLOAD_LEN, 6, 0, 12).await;
        c.put(&[0; 12]).await;
        assert_eq!(c.outcome(6).await, EINVAL);
        // A write without it is not what the document asks for, but its payload follows all the same.
        c.send(WRITE, 0, 7, 0, 3).await;
        c.put(b"abc").await;
        assert_eq!(c.outcome(7).await, 0);
        assert_eq!(c.read(0, 0, 3).await.unwrap(), b"abc");
    });
}

#[test]
fn failing_export_fails_that_request_alone() {
    for mode in MODES {
        test(async |world| {
            let mut c = world.vol0(mode).await;
            assert_eq!(c.read(0, 40 * MIB, 4096).await, Err(EIO));
            assert_eq!(c.read(0, 42 * MIB, 4096).await, Err(EIO), "an answer of another length than asked for");
            if mode != Mode::Simple {
                assert_eq!(c.extents(0, 43 * MIB, 4096).await, Err(EIO), "extents without progress");
            }
            assert_eq!(c.read(0, 0, 16).await.unwrap(), [0; 16]);
        });
    }
}

#[test]
fn panic_of_an_export_ends_its_connection_and_no_other() {
    test(async |world| {
        let mut other = world.vol0(Mode::Simple).await;
        let (mut c, task) = world.connect(Mode::Simple);
        c.go("vol0").await;
        c.send(READ, 0, 1, 41 * MIB, 4096).await;
        assert_eq!(c.reply().await, Reply::Closed);
        assert!(task.await.is_err_and(|e| e.is_panic()));
        assert_eq!(other.read(0, 0, 16).await.unwrap(), [0; 16]);
        world.check_unharmed().await;
    });
}

#[test]
fn broken_requests_close_their_connection_and_harm_nobody() {
    test(async |world| {
        for mode in MODES {
            let mut c = world.vol0(mode).await;
            c.put(&[0xab; 64]).await;
            assert_eq!(c.reply().await, Reply::Closed, "bad magic");
            let mut c = world.vol0(mode).await;
            let reply_magic = [&0x6744_6698u32.to_be_bytes()[..], &[0; 60]].concat();
            c.put(&reply_magic).await;
            assert_eq!(c.reply().await, Reply::Closed, "a reply is no request");
            for (length, sent) in [(4096, 100), (4096, 0), (MIB, 300_000), (32 * MIB, 3), (40 * MIB, 3)] {
                let (mut c, task) = world.connect(mode);
                c.go("vol0").await;
                c.send(WRITE, 0, 1, 8 * MIB, length).await;
                c.put(&vec![9; sent]).await;
                drop(c);
                task.await.expect("half a payload does no harm");
            }
            let (mut c, task) = world.connect(mode);
            c.go("vol0").await;
            let half = c.header(READ, 0, 1, 0, 4096);
            c.put(&half[..13]).await;
            drop(c);
            task.await.expect("half a header does no harm");
            let mut c = world.vol0(mode).await;
            c.send(WRITE, 0, 1, 0, (64 << 20) + 1).await;
            assert_eq!(c.reply().await, Reply::Closed, "a payload not worth skipping");
        }
        let mut c = world.vol0(Mode::Simple).await;
        assert_eq!(c.read(0, 8 * MIB, 4096).await.unwrap(), [0; 4096], "half a write writes nothing");
        world.check_unharmed().await;
    });
}

#[test]
fn holes_are_told_as_holes_unless_fragments_are_forbidden() {
    for mode in [Mode::Structured, Mode::Extended] {
        test(async |world| {
            let mut c = world.vol0(mode).await;
            assert_eq!(c.write(0, 8192, &[5; 4096]).await, 0);
            c.send(READ, 0, 1, 0, 16384).await;
            let mut kinds = Vec::new();
            for _ in 0..3 {
                let Reply::Chunk { kind, last, .. } = c.reply().await else { panic!("a chunk") };
                kinds.push((kind, last));
            }
            assert_eq!(kinds, [(2, false), (1, false), (2, true)]);
            c.send(READ, DF, 1, 0, 16384).await;
            let Reply::Chunk { kind: 1, last: true, payload, .. } = c.reply().await else { panic!("one chunk") };
            assert_eq!(payload[8..], [vec![0; 8192], vec![5; 4096], vec![0; 4096]].concat());
            c.send(READ, DF, 1, 12288, 32 * MIB).await;
            let Reply::Chunk { kind: 2, last: true, .. } = c.reply().await else { panic!("one hole") };
        });
    }
}

#[test]
fn extents_cover_what_was_asked_for() {
    for mode in [Mode::Structured, Mode::Extended] {
        test(async |world| {
            let mut c = world.vol0(mode).await;
            assert_eq!(c.extents(0, 0, SIZE).await, Ok(vec![(SIZE, 3)]));
            assert_eq!(c.write(0, 10 * MIB, &vec![1; 65536]).await, 0);
            let expected = vec![(10 * MIB, 3), (65536, 0), (SIZE - 10 * MIB - 65536, 3)];
            assert_eq!(c.extents(0, 0, SIZE).await, Ok(expected));
            assert_eq!(c.extents(REQ_ONE, 0, SIZE).await, Ok(vec![(10 * MIB, 3)]));
            assert_eq!(c.extents(REQ_ONE, 10 * MIB + 4096, SIZE / 2).await, Ok(vec![(61440, 0)]));
            assert_eq!(c.extents(0, 10 * MIB, 100).await, Ok(vec![(100, 0)]));
            assert_eq!(c.command(TRIM, 0, 0, SIZE).await, 0);
            // Every second page of 32 MiB, and one far behind: more extents than an answer holds.
            for offset in (0..4096).map(|n| n * 8192).chain([50 * MIB]) {
                assert_eq!(c.write(0, offset, &[1; 4096]).await, 0);
            }
            let many = c.extents(0, 0, SIZE).await.unwrap();
            assert_eq!(many.len(), 8192);
            assert_eq!(c.command(TRIM, 0, 0, SIZE).await, 0);
            assert_eq!(c.extents(0, 0, SIZE).await, Ok(vec![(SIZE, 3)]));
        });
    }
}

// ---------------------------------------------------------------- many requests, many connections

#[test]
fn requests_of_any_size_keep_their_bytes() {
    for mode in MODES {
        test(async |world| {
            let mut c = world.vol0(mode).await;
            // Around what is copied, what is a slice of a chunk, what has its own buffer.
            for length in [1, 511, 512, 513, 4096, 131_071, 131_072, 131_073, 262_144, 5_000_001, 32 << 20] {
                let data: Vec<u8> = (0..length as u32).map(|n| n.wrapping_mul(2_654_435_761) as u8 | 1).collect();
                assert_eq!(c.write(0, 777, &data).await, 0, "{length}");
                assert!(c.read(0, 777, length).await.unwrap() == data, "{mode:?} {length}");
            }
        });
    }
}

#[test]
fn thousands_of_requests_sent_at_once_are_all_answered() {
    for mode in MODES {
        test(async |world| {
            let c = world.vol0(mode).await;
            let mut all = Vec::new();
            for n in 0..3000u64 {
                let flags = if mode == Mode::Extended { PAYLOAD_LEN } else { 0 };
                all.extend_from_slice(&c.header(WRITE, flags, 2 * n, n * 4096, 4096));
                all.extend_from_slice(&[n as u8; 4096]);
                all.extend_from_slice(&c.header(FLUSH, 0, 2 * n + 1, 0, 0));
            }
            let (reader, mut writer) = c.stream.into_split();
            let sending = spawn_local(async move {
                writer.write_all(&all).await.unwrap();
                writer
            });
            let mut seen = std::collections::BTreeSet::new();
            let mut reader = tokio::io::BufReader::new(reader);
            let size = if mode == Mode::Extended { 32 } else { 16 };
            for _ in 0..6000 {
                let mut reply = vec![0; size];
                reader.read_exact(&mut reply).await.unwrap();
                seen.insert(u64::from_be_bytes(reply[8..16].try_into().unwrap()));
            }
            assert_eq!(seen.len(), 6000);
            drop(sending.await.unwrap());
        });
    }
}

#[test]
fn replies_overtake_requests_that_wait() {
    test(async |world| {
        let mut c = world.vol0(Mode::Structured).await;
        c.send(READ, 0, 1, 32 * MIB, 4096).await;
        c.send(READ, 0, 2, 32 * MIB, 4096).await;
        assert_eq!(c.read(0, 0, 4096).await.unwrap(), [0; 4096]);
        assert_eq!(world.log.running.get(), 2);
        world.log.gate.notify_waiters();
        for _ in 0..2 {
            let Reply::Chunk { cookie: 1 | 2, .. } = c.reply().await else { panic!("a late reply") };
        }
    });
}

#[test]
fn requests_beyond_the_bound_wait_in_the_socket() {
    test(async |world| {
        let mut c = world.vol0(Mode::Simple).await;
        for n in 0..300 {
            c.send(READ, 0, n, 32 * MIB, 1).await;
        }
        settle().await;
        assert_eq!(world.log.running.get(), 128);
        for _ in 0..3 {
            world.log.gate.notify_waiters();
            settle().await;
        }
        for _ in 0..300 {
            let Reply::Ok(_) = c.reply().await else { panic!("a reply") };
            c.take::<1>().await.unwrap();
        }
    });
}

#[test]
fn bytes_beyond_the_bound_wait_in_the_socket() {
    test(async |world| {
        let mut c = world.vol0(Mode::Simple).await;
        for n in 0..9 {
            c.send(READ, 0, n, 32 * MIB, 8 * MIB).await;
        }
        settle().await;
        // 64 MiB and the overhead of replies do not fit eight times.
        assert_eq!(world.log.running.get(), 7);
        world.log.gate.notify_waiters();
        settle().await;
        assert_eq!(world.log.running.get(), 0, "replies that nobody takes count too");
        // Each reply that the client takes makes room for one request more.
        for n in 0..9 {
            world.log.gate.notify_waiters();
            assert_eq!(c.reply().await, Reply::Ok(n));
            let mut left = 8 * MIB as usize;
            while left > 0 {
                let now = left.min(65536);
                c.take_vec(now).await;
                left -= now;
                world.log.gate.notify_waiters();
            }
        }
    });
}

#[test]
fn when_all_hold_too_much_long_requests_wait_for_each_other_and_short_ones_do_not() {
    let config = Config { bytes_in_flight_total: 1 << 20, ..Config::default() };
    test_with(config, async |world| {
        let mut clients = Vec::new();
        for length in [MIB, MIB, MIB, 65536, 65536] {
            let mut c = world.vol0(Mode::Simple).await;
            c.send(READ, 0, 1, 32 * MIB, length).await;
            settle().await;
            clients.push((c, length));
        }
        assert_eq!(world.log.running.get(), 1 + 2, "one long one, and every short one");
        clients.rotate_right(2);
        for (c, length) in &mut clients {
            world.log.gate.notify_waiters();
            assert_eq!(c.reply().await, Reply::Ok(1));
            c.take_vec(*length as usize).await;
            settle().await;
            assert!(world.log.running.get() <= 1, "in the order in which they came");
        }
    });
}

#[test]
fn connections_to_one_export_share_it_and_the_last_closes_it() {
    test(async |world| {
        let (mut a, task_a) = world.connect(Mode::Simple);
        let (mut b, task_b) = world.connect(Mode::Structured);
        tokio::join!(a.go("vol0"), b.go("vol0"));
        assert_eq!(world.log.opened.get(), 1);
        assert_eq!(a.write(0, 0, b"shared").await, 0);
        assert_eq!(b.read(0, 0, 6).await.unwrap(), b"shared");
        drop(a);
        task_a.await.unwrap();
        assert_eq!(world.log.closed.get(), 0);
        b.send(DISC, 0, 0, 0, 0).await;
        task_b.await.unwrap();
        assert_eq!(world.log.closed.get(), 1);
        world.check_unharmed().await;
        assert_eq!((world.log.opened.get(), world.log.closed.get()), (2, 2));
    });
}

#[test]
fn export_is_closed_only_after_the_requests_of_a_client_that_hung_up() {
    test(async |world| {
        let (mut c, task) = world.connect(Mode::Simple);
        c.go("vol0").await;
        c.send(WRITE, 0, 1, 32 * MIB, 5).await;
        c.put(b"still").await;
        settle().await;
        drop(c);
        settle().await;
        assert_eq!((world.log.running.get(), world.log.closed.get()), (1, 0));
        world.log.gate.notify_waiters();
        task.await.unwrap();
        assert_eq!((world.log.finished.get(), world.log.closed.get()), (1, 1));
    });
}

#[test]
fn client_that_only_stops_sending_still_gets_its_replies() {
    test(async |world| {
        let mut c = world.vol0(Mode::Simple).await;
        c.send(READ, 0, 1, 32 * MIB, 5).await;
        c.send(DISC, 0, 0, 0, 0).await;
        c.stream.shutdown().await.unwrap();
        settle().await;
        world.log.gate.notify_waiters();
        assert_eq!(c.reply().await, Reply::Ok(1));
        assert_eq!(c.take_vec(5).await, [0; 5]);
        assert_eq!(c.reply().await, Reply::Closed);
    });
}

#[test]
fn shutdown_answers_what_runs_and_closes_exports() {
    test(async |world| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let listener = Listener::bind_unix(&path).unwrap();
        let server = world.server.clone();
        let serving = spawn_local(async move { server.serve(listener).await });
        let stream = UnixStream::connect(&path).await.unwrap();
        let mut c = Client { stream, mode: Mode::Simple };
        c.go("vol0").await;
        let mut idle = Client { stream: UnixStream::connect(&path).await.unwrap(), mode: Mode::Simple };
        idle.greet(3).await;
        c.send(READ, 0, 1, 32 * MIB, 5).await;
        while world.log.running.get() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let server = world.server.clone();
        let stopping = spawn_local(async move { server.shutdown().await });
        settle().await;
        assert!(!stopping.is_finished());
        world.log.gate.notify_waiters();
        assert_eq!(c.reply().await, Reply::Ok(1));
        c.take_vec(5).await;
        assert_eq!(c.reply().await, Reply::Closed);
        assert!(idle.is_closed().await);
        stopping.await.unwrap();
        serving.await.unwrap();
        assert_eq!(world.log.closed.get(), 1);
        assert!(!path.exists());
    });
}

#[test]
fn request_that_never_ends_delays_shutdown_by_the_linger_only() {
    let config = Config { linger: Duration::from_millis(50), ..Config::default() };
    test_with(config, async |world| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let listener = Listener::bind_unix(&path).unwrap();
        let server = world.server.clone();
        let serving = spawn_local(async move { server.serve(listener).await });
        let mut c = Client { stream: UnixStream::connect(&path).await.unwrap(), mode: Mode::Simple };
        c.go("vol0").await;
        c.send(READ, 0, 1, 32 * MIB, 5).await;
        settle().await;
        world.log.running.set(0); // it is cut off, and `close` would complain
        world.server.shutdown().await;
        serving.await.unwrap();
        assert_eq!(c.reply().await, Reply::Closed);
    });
}

#[test]
fn hundreds_of_idle_connections_do_no_harm_and_too_many_are_closed() {
    let config = Config { connections_max: 300, ..Config::default() };
    test_with(config, async |world| {
        let listener = Listener::bind_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.tcp_address().unwrap();
        let server = world.server.clone();
        let serving = spawn_local(async move { server.serve(listener).await });
        let mut idle = Vec::new();
        for _ in 0..300 {
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let mut greeting = [0; 18];
            stream.read_exact(&mut greeting).await.unwrap();
            idle.push(stream);
        }
        assert_eq!(world.server.connections(), 300);
        let mut late = tokio::net::TcpStream::connect(address).await.unwrap();
        assert_eq!(late.read(&mut [0; 18]).await.unwrap_or(0), 0);
        drop(idle);
        while world.server.connections() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        world.check_unharmed().await;
        world.server.shutdown().await;
        serving.await.unwrap();
    });
}

#[test]
fn socket_file_of_a_dead_server_is_replaced_and_that_of_a_living_one_is_not() {
    test(async |_| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = Listener::bind_unix(&path).unwrap();
        assert_eq!(Listener::bind_unix(&path).err().unwrap().kind(), std::io::ErrorKind::AddrInUse);
        drop(listener);
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(Listener::bind_unix(&path).err().unwrap().kind(), std::io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_bytes_in_the_handshake_harm_the_server(
        steps in proptest::collection::vec((0u32..14, proptest::collection::vec(any::<u8>(), 0..40), any::<bool>()), 1..8),
        cut in 0usize..400,
    ) {
        test(async |world| {
            let (mut c, task) = world.connect(Mode::Simple);
            c.greet(3).await;
            let mut bytes = Vec::new();
            for (option, data, sane) in &steps {
                if *sane {
                    bytes.extend_from_slice(b"IHAVEOPT");
                    bytes.extend_from_slice(&option.to_be_bytes());
                    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
                }
                bytes.extend_from_slice(data);
            }
            bytes.truncate(cut);
            let _ = c.stream.write_all(&bytes).await;
            drop(c);
            task.await.expect("no panic");
            world.check_unharmed().await;
        });
    }

    #[test]
    fn no_bytes_in_transmission_harm_the_server(
        steps in proptest::collection::vec(
            (0u16..10, any::<u16>(), 0u64..SIZE + 100, prop_oneof![0u64..300, 0u64..40_000_000, any::<u64>()]), 1..12),
        tail in proptest::collection::vec(any::<u8>(), 0..100),
        extended in any::<bool>(),
    ) {
        test(async |world| {
            let (mut c, task) = world.connect(if extended { Mode::Extended } else { Mode::Structured });
            c.go("vol0").await;
            let mut bytes = Vec::new();
            for (command, flags, offset, length) in &steps {
                let flags = if flags % 3 == 0 { flags & 63 } else { 0 };
                // Away from where this export panics and waits.
                let offset = if (32 * MIB..44 * MIB).contains(offset) { 0 } else { *offset };
                bytes.extend_from_slice(&c.header(*command, flags, 1, offset, *length));
                if *command == WRITE && *length < 300 {
                    bytes.resize(bytes.len() + *length as usize, 3);
                }
            }
            bytes.extend_from_slice(&tail);
            let (mut reader, mut writer) = c.stream.into_split();
            let sending = spawn_local(async move {
                let _ = writer.write_all(&bytes).await;
            });
            let mut sink = vec![0; 1 << 16];
            let drain = async { while matches!(reader.read(&mut sink).await, Ok(1..)) {} };
            let (_, _) = tokio::join!(sending, drain);
            drop(reader);
            task.await.expect("no panic");
            world.check_unharmed().await;
        });
    }
}
