//! What comes from outside, as the decoders get it: any bytes. Each function takes some and must neither panic nor keep
//! more memory than a small multiple of them; what it accepts must come out the same after it was written again.
//!
//! Checksums are made right first where there are any, or nothing behind them would ever be reached. Run one with
//! `cargo +nightly fuzz run --features libfuzzer frames`; the files under `corpus/` replay in `cargo test -p petal-fuzz`.

use bytes::BytesMut;
use petal::global_state::{Entry, Genesis, GenesisServer, State};
use petal::ids::{ClusterId, DiskId, Epoch, LineageId, ServerId};
use petal::store::{element, journal, superblock};
use petal_nbd::{Config, MemoryExport, Server, StaticExports};
use petal_wire::{Decoded, Frame, Limits};
use std::time::Duration;
use stdx::checksum::{crc32c, crc32c_append};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// What is done with bytes from outside.
pub type Target = fn(&[u8]);

/// Every target by its name.
pub const TARGETS: &[(&str, Target)] = &[
    ("frames", frames),
    ("superblock", superblock),
    ("journal", journal),
    ("rows", rows),
    ("commands", commands),
    ("state", state),
    ("stream", stream),
    ("nbd", nbd),
];

/// Frames of the wire protocol: from a stranger, from a client, from a server.
pub fn frames(data: &[u8]) {
    let mut sealed = data.to_vec();
    if let Some(header) = data.first_chunk().and_then(|first| petal_wire::header::Header::parse(first).ok()) {
        let end = petal_wire::header::HEADER_LENGTH.saturating_add(header.body_length).min(sealed.len());
        let payload = u32::try_from(header.payload_length).expect("it was 32 bits");
        petal_wire::header::seal(&mut sealed[..end], header.version, header.kind, payload);
    }
    let version = petal_wire::VERSION;
    for limits in [Limits::GREETING, Limits::from_client(version), Limits::from_server(version)] {
        let mut buffer = BytesMut::from(&sealed[..]);
        while let Ok(Decoded::Frame(frame)) = petal_wire::decode(&mut buffer, &limits) {
            let Frame::Message(message) = frame else { continue };
            if petal_wire::validate(&message).is_err() {
                continue;
            }
            let mut again = BytesMut::new();
            petal_wire::encode(&message, version, &mut again).expect("what was decoded fits");
            for piece in message.body.payload().into_iter().flat_map(|payload| &payload.0) {
                again.extend_from_slice(piece);
            }
            let decoded = petal_wire::decode(&mut again, &limits).expect("what was encoded is right");
            assert_eq!(decoded, Decoded::Frame(Frame::Message(message)));
        }
    }
}

/// One copy of a superblock.
pub fn superblock(data: &[u8]) {
    const CHECKSUM_AT: usize = 16;
    let mut bytes = data.to_vec();
    if let Some(copy) = bytes.get_mut(..superblock::SUPERBLOCK_SIZE) {
        let crc = crc32c_append(crc32c(&copy[..CHECKSUM_AT]), &copy[CHECKSUM_AT + 4..]);
        copy[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&crc.to_le_bytes());
    }
    if let Ok(read) = superblock::Superblock::decode(&bytes) {
        let again = superblock::Superblock::decode(&read.encode()).expect("what was encoded is right");
        assert_eq!(again, read);
    }
}

/// A batch of the journal.
pub fn journal(data: &[u8]) {
    let Some(disk) = data.get(8..24) else { return };
    let disk = DiskId(u128::from_le_bytes(disk.try_into().expect("sixteen bytes")));
    let mut bytes = data.to_vec();
    let length = u32::from_le_bytes(data.get(56..60).map_or([0; 4], |b| b.try_into().expect("four bytes")));
    if let Some(end) = journal::HEADER_BYTES.checked_add(length as usize).filter(|end| *end <= bytes.len()) {
        let crc = crc32c_append(crc32c(&bytes[..60]), &bytes[journal::HEADER_BYTES..end]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
    }
    if let Some((_, records, _)) = journal::decode_batch(disk, &bytes) {
        journal::decode_records(records);
    }
    journal::decode_records(data);
}

/// Heads and rows of elements, as the PMap store keeps them.
pub fn rows(data: &[u8]) {
    let mut bytes = data.to_vec();
    bytes.extend_from_slice(&crc32c(data).to_le_bytes());
    if let Some(head) = element::Entry::decode_head(&bytes) {
        assert_eq!(element::Entry::decode_head(&head.encode_head()), Some(head));
    }
    if let Some(row) = element::Row::decode(LineageId(1), Epoch(1), &bytes) {
        assert_eq!(element::Row::decode(LineageId(1), Epoch(1), &row.encode()), Some(row));
    }
}

/// The state of a cluster that has just been founded.
pub fn founded() -> State {
    let addresses = |s: u16| vec![format!("host{s}:7000")];
    let ring = (1..=3).map(|s| GenesisServer { server: ServerId(s), addresses: addresses(s) }).collect();
    State::genesis(&Genesis { cluster: ClusterId(7), name: "fuzz".into(), ring })
}

/// Commands to the global state, one after the other: clients send them, and the ring carries them to everybody.
pub fn commands(data: &[u8]) {
    let mut state = founded();
    let mut rest = data;
    while let Ok((entry, after)) = postcard::take_from_bytes::<Entry>(rest) {
        rest = after;
        // (A refused command must change nothing; the state asserts that itself.)
        let _ = state.apply(&entry);
    }
    let again = State::decode(&state.encode()).expect("a state that commands made is consistent");
    assert_eq!(again, state);
}

/// A whole global state, as it comes to a server that is far behind.
pub fn state(data: &[u8]) {
    if let Ok(state) = State::decode(data) {
        assert_eq!(State::decode(&state.encode()), Ok(state));
    }
}

/// A backup stream.
pub fn stream(data: &[u8]) {
    if let Ok(summary) = petal_stream::verify(data) {
        assert_eq!(petal_stream::verify(data).ok(), Some(summary), "it says the same twice");
    }
}

/// What a client says to the NBD server: all of it at once, then the end.
pub fn nbd(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("a runtime can be made");
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let exports = StaticExports::new(vec![("vol0", "", MemoryExport::new(1 << 20))]);
        let server = Server::new(exports, Config { handshake_timeout: Duration::from_secs(1), ..Config::default() });
        let (mut client, side) = tokio::io::duplex(1 << 16);
        let speaks = async move {
            let (mut hears, mut says) = tokio::io::split(&mut client);
            let mut heard = Vec::new();
            let says = async move {
                let _ = says.write_all(data).await;
                let _ = says.shutdown().await;
            };
            let (_, _) = tokio::join!(says, hears.read_to_end(&mut heard));
        };
        let (_, _) = tokio::join!(server.serve_stream(side), speaks);
        assert_eq!(server.connections(), 0);
    });
}
