//! The corpus, and what a few thousand small changes make of it: no decoder may panic. (What a fuzzer found goes into
//! `corpus/`, and replays here for ever.)

#[path = "../../crates/wire/tests/samples/mod.rs"]
mod messages;
#[path = "../../crates/stream/tests/samples/mod.rs"]
mod streams;

use bytes::BytesMut;
use petal::global_state::{Attachment, Command, Entry, SnapshotOf};
use petal::ids::*;
use petal::message::CommandId;
use petal::store::element::Row;
use petal::translator::gmap::Scheme;
use petal_fuzz::TARGETS;
use std::path::Path;
use stdx::Prng;

/// Changes made to each seed.
const CHANGES: usize = 2000;

/// What is kept in the corpus, in order of names.
fn files(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut paths: Vec<_> = std::fs::read_dir(&folder).into_iter().flatten().map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

fn frames() -> Vec<Vec<u8>> {
    let encode = |message: &petal::message::Message| {
        let mut out = BytesMut::new();
        petal_wire::encode(message, petal_wire::VERSION, &mut out).unwrap();
        for piece in message.body.payload().into_iter().flat_map(|p| &p.0) {
            out.extend_from_slice(piece);
        }
        out.to_vec()
    };
    messages::samples().iter().map(encode).collect()
}

/// Servers come, a disk is made, written to by somebody, snapshotted, cloned, rolled back, and everything goes again.
fn life() -> Vec<u8> {
    let disk = |n: u16| vec![(DiskId(u128::from(n)), Incarnation(0).into(), 1 << 30)];
    let up = |n: u16| Command::ServerUp {
        server: ServerId(n),
        incarnation: Incarnation(1),
        addresses: vec![format!("host{n}:7000")],
        disks: disk(n),
    };
    let of = |vdisk, name: &str| SnapshotOf { vdisk: VdiskId(vdisk), epoch: Epoch(1), name: name.into() };
    let commands = vec![
        Command::AddServer { addresses: vec!["host4:7000".into()], token: 9 },
        up(1),
        up(2),
        up(3),
        Command::CreateDisk { name: "vol0".into(), size: 1 << 30, scheme: Scheme::Chained, stripe_unit: 1 << 20 },
        Command::Attach { vdisk: VdiskId(5), mode: Attachment::Shared, holder: "a".into(), take_over: false },
        Command::Snapshot { of: vec![of(5, "monday")], made: 1, protected: true },
        Command::Clone { source: VdiskId(7), epoch: Epoch(1), name: "copy".into(), made: 2 },
        Command::Suspect { server: ServerId(2), incarnation: Incarnation(1) },
        Command::ServerDown { server: ServerId(2), incarnation: Incarnation(1), suspect: 9 },
        Command::Detach { session: SessionId(6) },
        Command::Protect { vdisk: VdiskId(7), protected: false },
        Command::DeleteDisks { vdisks: vec![VdiskId(5), VdiskId(7)] },
    ];
    let entry = |(number, command)| Entry { id: CommandId { proposer: 1, number, finished_below: 0 }, command };
    (1..).zip(commands).map(entry).flat_map(|e| postcard::to_stdvec(&e).unwrap()).collect()
}

/// The state that this life leads to.
fn state() -> Vec<u8> {
    let mut state = petal_fuzz::founded();
    let life = life();
    let mut rest = &life[..];
    while let Ok((entry, after)) = postcard::take_from_bytes::<Entry>(rest) {
        rest = after;
        let (result, _) = state.apply(&entry);
        assert!(result.is_ok(), "{entry:?}: {result:?}");
    }
    state.encode()
}

/// A handshake and one request of each kind, as a client says them.
fn nbd() -> Vec<Vec<u8>> {
    let option = |code: u32, data: &[u8]| {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend_from_slice(&code.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        bytes
    };
    let go = [&4_u32.to_be_bytes()[..], b"vol0", &0_u16.to_be_bytes()].concat();
    let context =
        [&4_u32.to_be_bytes()[..], b"vol0", &1_u32.to_be_bytes(), &15_u32.to_be_bytes(), b"base:allocation"].concat();
    let flags = 3_u32.to_be_bytes().to_vec();
    // LIST, STRUCTURED_REPLY or EXTENDED_HEADERS, SET_META_CONTEXT, GO.
    let greeting = |headers: u32| {
        [flags.clone(), option(3, b""), option(headers, b""), option(10, &context), option(7, &go)].concat()
    };
    let request = |command: u16, flags: u16, length: u32| {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&7_u64.to_be_bytes());
        bytes.extend_from_slice(&4096_u64.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        if command == 1 {
            bytes.resize(bytes.len() + length as usize, b'x');
        }
        bytes
    };
    let simple: Vec<u8> =
        [(1, 1, 512), (0, 0, 512), (3, 0, 0), (4, 0, 8192), (6, 2, 8192), (5, 0, 4096), (7, 8, 65536), (2, 0, 0)]
            .into_iter()
            .flat_map(|(command, flags, length)| request(command, flags, length))
            .collect();
    let extended = |command: u16| {
        let mut bytes = 0x21e4_1c71_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&0_u16.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        for word in [7_u64, 0, 512] {
            bytes.extend_from_slice(&word.to_be_bytes());
        }
        bytes
    };
    let long: Vec<u8> = [0, 3, 4, 7, 2].into_iter().flat_map(extended).collect();
    vec![[greeting(8), simple].concat(), [greeting(11), long].concat()]
}

/// A head, and a row of two blocks; the target adds the digest.
fn rows() -> Vec<Vec<u8>> {
    let version = Version { term: 3, sequence: 9 };
    let slot = SlotId { gmap: GmapId(3), slot: 5 };
    let ids = vec![RequestId { session: SessionId(6), number: 21 }];
    let mut row = Row::zeros(LineageId(1), Epoch(1));
    (row.addresses[0], row.crcs[0], row.addresses[5], row.crcs[5]) = (7, 8, 9, 10);
    let mut row = row.encode();
    row.truncate(row.len() - 4);
    vec![postcard::to_stdvec(&(version, slot, ids)).unwrap(), row]
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let mut seeds = match target {
        "frames" => frames(),
        "commands" => vec![life()],
        "state" => vec![state()],
        "rows" => rows(),
        "stream" => vec![streams::small_stream()],
        "nbd" => nbd(),
        _ => Vec::new(),
    };
    seeds.extend(files(target));
    seeds
}

/// One small change: a bit, a byte, a number at its edge, a piece gone, doubled, or cut.
fn change(bytes: &mut Vec<u8>, prng: &mut Prng) {
    let at = prng.below(bytes.len().max(1) as u64) as usize;
    let length = (1 + prng.below(16) as usize).min(bytes.len() - at.min(bytes.len()));
    match prng.below(6) {
        _ if bytes.is_empty() => bytes.push(prng.next_u64() as u8),
        0 => bytes[at] ^= 1 << prng.below(8),
        1 => bytes[at] = prng.next_u64() as u8,
        2 => bytes[at..at + length].fill(*prng.pick(&[0, 0x7f, 0x80, 0xff])),
        3 => drop(bytes.drain(at..at + length)),
        4 => {
            let piece = bytes[at..at + length].to_vec();
            bytes.splice(at..at, piece);
        }
        _ => bytes.truncate(at),
    }
}

#[test]
fn seeds_and_what_small_changes_make_of_them_harm_nobody() {
    let mut prng = Prng::new(1);
    for (target, run) in TARGETS {
        let seeds = seeds(target);
        assert!(!seeds.is_empty(), "{target} has nothing to begin with");
        for seed in seeds {
            run(&seed);
            for _ in 0..CHANGES {
                let mut bytes = seed.clone();
                for _ in 0..=prng.below(4) {
                    change(&mut bytes, &mut prng);
                }
                run(&bytes);
            }
        }
    }
}
